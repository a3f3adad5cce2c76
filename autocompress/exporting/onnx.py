"""ONNX: the model's own graph, with int8 or int4 weights behind DequantizeLinear, or as MatMulNBits where asked."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from autocompress.exporting.base import ExportError, Held, Request, Weight, least_bits, missing, requantised
from autocompress.exporting.graph import Graph
from autocompress.files import atomic_path

__all__ = ["Onnx"]

OPSET = 21  # the first with int4 and blocked DequantizeLinear
PROTOBUF_LIMIT = 2**31 - 2**20  # a protobuf message ends below 2 GiB
TOLERANCE = 1e-3  # of the largest output: float32 sums in another order, through some hundred layers
WEIGHTS = ("auto", "int4", "int8", "dense")
BLOCKS = (16, 32, 64, 128, 256)  # of MatMulNBits: a power of two from 16; 512 gives zeros on CPU (onnxruntime#28551)


@dataclass(frozen=True)
class Onnx:
    """One .onnx file, or with `external` the graph and a file of tensors beside it.

    Integer codes become int4 or int8 initializers behind a DequantizeLinear (opset 21) whose product is the file's
    weight, bit for bit; an asymmetric grid brings zero points (and stays QDQ). Codes beyond 8 bits become dense
    float32. Half precision stays so behind a Cast. Batch norms after convolutions and linear layers are folded into
    their scales and biases.

    weights: "auto" takes the narrowest of int4 and int8 that holds all codes of a layer; "int4" and "int8" insist;
    "dense" makes every weight float32. matmul_nbits: linear layers become com.microsoft::MatMulNBits, 4 or 8 bits,
    with its `accuracy_level` (0 leaves it to the runtime, 1 computes in float32, 4 rounds activations to int8). The
    runtime makes MatMulNBits of QDQ linear layers too, by itself, with the level of the session's entry
    session.qdq_matmulnbits_accuracy_level, which is 4 unless it is set.
    fold_norms, dynamic_batch: as they say. external: None for where a single file would pass 2 GiB.
    Sources: ONNX operators, DequantizeLinear-21; onnxruntime ContribOperators, MatMulNBits.
    """

    weights: str = "auto"
    matmul_nbits: bool = False
    accuracy_level: int = 1
    fold_norms: bool = True
    dynamic_batch: bool = True
    external: bool | None = None
    name: str = "onnx"
    folder: bool = False

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ExportError(f"weights is {self.weights!r}; it is one of {', '.join(WEIGHTS)}")

    def check(self, model: nn.Module, example: Any) -> None:
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise missing("onnx", "onnx", error) from error
        if example is None:
            raise ExportError("onnx needs example=, one batch as the model takes it (a task's example_input())")
        for name, module in model.named_modules():
            if isinstance(module, nn.LSTM) and module.proj_size:
                raise ExportError(
                    f"the operator LSTM of onnx has no projection, and {name or 'the model'!r} has proj_size="
                    f"{module.proj_size}; safetensors takes any model"
                )

    def hold(self, weight: Weight, owner: nn.Module) -> Held:
        if weight.codes is None:
            half = weight.values is not None and weight.values.dtype == np.float16 and self.weights != "dense"
            return Held(weight, "float16" if half else "float32", 16 if half else 32)
        if self.weights == "dense":
            return Held(weight, "float32", 32)
        needed, shifted = least_bits(weight)
        width = {"auto": 4 if needed <= 4 else 8, "int4": 4, "int8": 8}[self.weights]
        if needed <= width:
            return self._placed(Held(weight, f"int{width}", width, shifted=shifted), owner)
        if self.weights == "auto":
            return Held(weight, "float32", 32)
        loses = f"its codes need more than {width} bits; rounded to int{width} with a scale per row"
        return self._placed(Held(requantised(weight, width), f"int{width}", width, loses), owner)

    def _placed(self, held: Held, owner: nn.Module) -> Held:
        group = held.weight.group
        linear = self.matmul_nbits and isinstance(owner, nn.Linear) and not held.shifted
        if not linear or (group is not None and group not in BLOCKS):
            return dataclasses.replace(held, kind=f"{held.kind} QDQ")
        return dataclasses.replace(held, kind=f"MatMulNBits {held.bits}")

    def write(self, request: Request, out: Path, admit: Callable[[int], None]) -> tuple[list[Path], dict[str, Any]]:
        import onnx

        proto = self.graph(trace(request.model, request.example, self.dynamic_batch), request)
        size = proto.ByteSize()
        external = self.external if self.external is not None else size > PROTOBUF_LIMIT
        if not external and size > PROTOBUF_LIMIT:
            raise ExportError(f"the graph has {size:,} bytes, one file holds less than 2 GiB; use external=True")
        facts: dict[str, Any] = {
            "opset": OPSET,
            "nodes": len(proto.graph.node),
            "batch": "any" if self.dynamic_batch else "fixed",
        }
        if size <= PROTOBUF_LIMIT:
            data = proto.SerializeToString(deterministic=True)
            try:
                onnx.checker.check_model(data, full_check=True)
            except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
                reason = " ".join(str(error).split())[:300]
                raise ExportError(
                    f"what torch.onnx.export makes of {type(request.model).__name__} is no valid graph: {reason}"
                ) from error
            facts |= self._compared(data, request)
        if not external:
            admit(len(data))
            with atomic_path(out) as scratch:
                scratch.write_bytes(data)
            _forget_data(out, keep=None)
            return [out], facts
        blob = _moved_out(proto, out.name)
        data = proto.SerializeToString(deterministic=True)
        admit(len(data) + len(blob.data))
        # The tensors' file is named by what it holds: until the graph that wants it is in place, the old pair is whole.
        beside = out.with_name(blob.name)
        known = beside.exists()
        with atomic_path(beside) as scratch:
            scratch.write_bytes(blob.data)
        try:
            with atomic_path(out) as scratch:
                scratch.write_bytes(data)
                onnx.checker.check_model(str(scratch))
                if size > PROTOBUF_LIMIT:
                    facts |= self._compared(str(scratch), request)
        except BaseException:
            if not known:
                beside.unlink(missing_ok=True)
            raise
        _forget_data(out, keep=blob.name)
        return [out, beside], facts

    def graph(self, program: Any, request: Request) -> Any:
        """What is written of a traced program, as an ONNX model; a program may be used again with other weights."""
        graph = Graph(program, request, self.accuracy_level)
        if self.fold_norms:
            graph.fold_norms()
        graph.lower()
        return graph.finished()

    def _compared(self, model: bytes | str, request: Request) -> dict[str, Any]:
        """The largest difference between the runtime's outputs and the model's on the example, where there is one.

        Raises ExportError if that is more than rounding explains and nothing was asked for that would.
        """
        try:
            import onnxruntime
        except ImportError:
            return {"max_difference": None}
        args, kwargs = arguments(request.example, self.dynamic_batch)
        with torch.no_grad():
            wanted = outputs_of(request.model(*args, **kwargs))
        given = [t.numpy() for t in outputs_of((args, kwargs))]

        def run(entries: dict[str, str]) -> float:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            for name, value in entries.items():
                options.add_session_config_entry(name, value)
            session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            names = [value.name for value in session.get_inputs()]
            found = session.run(None, dict(zip(names, given, strict=False)))
            pairs = zip(wanted, found, strict=False)  # a cache that a model returns too is no tensor, but an output
            return max((float(np.abs(a.double().numpy() - b).max(initial=0)) for a, b in pairs), default=0.0)

        difference = run({"session.qdq_matmulnbits_accuracy_level": "1"})
        largest = max((float(a.double().abs().max()) for a in wanted if a.numel()), default=0.0)
        rounded = self.accuracy_level == 4 or any(held.loses for held in request.held.values())
        if not rounded and not difference <= TOLERANCE * max(largest, 1e-3):
            raise ExportError(
                f"onnxruntime's outputs differ from the model's by {difference:g} where the largest is {largest:g}; "
                "nothing written"
            )
        version = f"onnxruntime {onnxruntime.__version__}"
        return {
            "max_difference": difference,
            "max_difference_default_session": run({}),
            "max_output": largest,
            "runtime": version,
        }


def arguments(example: Any, dynamic_batch: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as positional and named arguments; one sample is doubled, as tracing takes a size of 1 for fixed."""
    if isinstance(example, torch.Tensor):
        args: tuple[Any, ...] = (example,)
        kwargs: dict[str, Any] = {}
    elif isinstance(example, dict):
        args, kwargs = (), dict(example)
    elif isinstance(example, tuple | list):
        args, kwargs = tuple(example), {}
    else:
        raise ExportError(f"the example is a {type(example).__name__}; needed a tensor, or a tuple or dict of tensors")

    def grown(value: Any) -> Any:
        one = isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == 1
        return torch.cat([value, value]) if one and dynamic_batch else value

    return tuple(map(grown, args)), {name: grown(value) for name, value in kwargs.items()}


def trace(model: nn.Module, example: Any, dynamic_batch: bool) -> Any:
    """The model's graph, unoptimised, as an ONNX model with the state dict's names. Raises ExportError."""
    args, kwargs = arguments(example, dynamic_batch)
    batch = torch.export.Dim("batch", min=1)

    def axes(value: Any) -> Any:
        return {0: batch} if isinstance(value, torch.Tensor) and value.ndim > 0 else None

    shapes: Any = None
    if dynamic_batch:
        shapes = {name: axes(value) for name, value in kwargs.items()} if kwargs else tuple(map(axes, args))
    try:
        with _quietly(), torch.no_grad():
            program = torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                dynamic_shapes=shapes,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        advice = "; if its batch is fixed, use dynamic_batch=False" if dynamic_batch else ""
        raise ExportError(f"torch.onnx.export cannot trace {type(model).__name__}: {reason}{advice}") from error
    assert program is not None
    return program


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter says about operators of libraries that are not there."""
    logger = logging.getLogger("torch.onnx")
    children = [logging.getLogger(n) for n in logging.root.manager.loggerDict if n.startswith("torch.onnx")]
    levels = {each: each.level for each in (logger, *children)}
    for each in levels:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in levels.items():
            each.setLevel(level)


def outputs_of(value: Any) -> list[torch.Tensor]:
    """The tensors of whatever a model returns or takes, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in outputs_of(item)]
    if isinstance(value, tuple | list):
        return [t for item in value for t in outputs_of(item)]
    return []


@dataclass(frozen=True)
class _Blob:
    name: str
    data: bytes


def _moved_out(proto: Any, name: str) -> _Blob:
    """Move the initializers' bytes into one blob, each at a page of its own where it is long."""
    import onnx

    data = bytearray()
    moved = []
    for tensor in proto.graph.initializer:
        if len(tensor.raw_data) < 64:  # not worth a reference
            continue
        data += bytes(-len(data) % 4096 if len(tensor.raw_data) >= 65536 else -len(data) % 16)
        moved.append((tensor, len(data), len(tensor.raw_data)))
        data += tensor.raw_data
    place = f"{name}.{hashlib.sha256(bytes(data)).hexdigest()[:8]}.data"
    for tensor, offset, length in moved:
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", place), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
    return _Blob(place, bytes(data))


def _forget_data(out: Path, keep: str | None) -> None:
    """Remove the tensors' files of earlier exports to the same name."""
    for path in out.parent.glob(f"{out.name}.????????.data"):
        if path.name != keep:
            path.unlink()
