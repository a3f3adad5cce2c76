"""compressed-tensors: a folder that `transformers` loads, with packed integer weights and a `quantization_config`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from autocompress.exporting.base import (
    ExportError,
    Held,
    Request,
    Weight,
    atomic_folder,
    code_bits,
    requantised,
)
from autocompress.factors import Factored
from autocompress.layers import TABLES

__all__ = ["CompressedTensors", "pack_rows"]

VERSION = "0.18.0"  # of the format; packing is dense for every width since 0.17
FILES = ("config.json", "generation_config.json", "model.safetensors")
WIDEST = 8


@dataclass(frozen=True)
class CompressedTensors:
    """`config.json` and `model.safetensors`, written without the library: pack-quantized weights of 1 to 8 bits.

    Each width and kind of step is one config group that names its layers in full; float layers are in `ignore`. Codes
    and steps are the file's, so the library's weight is the file's, bit for bit, in float32 (which `dtype` in the
    configuration therefore says). It packs linear layers only, at most 8 bits wide. bits: 4 or 8 makes every packed
    layer that wide, with a step per row, for runtimes that know nothing else and for transformers' dequantize=True,
    which takes all layers for the first group's (5.23); None takes what the codes need. Embeddings, and a head that is
    tied to one, are dense, with the file's values.
    Source: compressed-tensors 0.18, `pack_quantized`.
    """

    bits: int | None = None
    name: str = "compressed-tensors"
    folder: bool = True

    def check(self, model: nn.Module, example: Any) -> None:
        if not callable(getattr(getattr(model, "config", None), "to_dict", None)):
            raise ExportError(
                f"compressed-tensors needs a Hugging Face model, whose .config goes into config.json; "
                f"{type(model).__name__} has none. ONNX and safetensors take any model"
            )
        if split := next((name for name, module in model.named_modules() if isinstance(module, Factored)), None):
            raise ExportError(
                f"layer {split!r} is several layers (low rank), and what reads compressed-tensors builds the "
                "architecture of config.json, which has one; ONNX and safetensors hold both"
            )

    def hold(self, weight: Weight, owner: nn.Module) -> Held:
        coded = weight.option.bits is not None or weight.option.step is not None
        if weight.codes is None and not coded:
            half = weight.values is not None and weight.values.dtype == np.float16
            return Held(weight, "float16" if half else "float32", 16 if half else 32)
        if isinstance(owner, TABLES):  # no loader of the format has tables of codes
            return Held(weight, "float32", 32)
        other = not isinstance(owner, nn.Linear) or isinstance(owner, NonDynamicallyQuantizableLinear)
        if other or weight.codes is None:
            return Held(weight, "float32", 32, "it packs linear layers only; stored dense, with the same values")
        needed, width = code_bits(weight.codes), self.bits or WIDEST
        group = weight.group
        if group is not None and weight.columns % group:
            return Held(weight, "float32", 32, "its groups do not divide a row; stored dense, with the same values")
        if needed <= width:
            rows = np.array(np.broadcast_to(weight.step, weight.rows)) if self.bits and weight.step.ndim == 0 else None
            kept = weight if rows is None else dataclasses.replace(weight, step=rows)
            return Held(kept, "pack-quantized", self.bits or needed)
        if needed > WIDEST:
            return Held(weight, "float32", 32, "its codes need more than 8 bits; stored dense, with the same values")
        loses = f"its codes need more than {width} bits; rounded to {width} bits with a scale per row"
        return Held(requantised(weight, width), "pack-quantized", width, loses)

    def write(self, request: Request, out: Path, admit: Callable[[int], None]) -> tuple[list[Path], dict[str, Any]]:
        from safetensors.torch import save as to_bytes

        tensors: dict[str, torch.Tensor] = {}
        groups: dict[tuple[int, str, int | None], list[str]] = {}
        ignored: list[str] = []
        modules = dict(request.model.named_modules())
        for key, held in request.held.items():
            weight = held.weight
            if held.kind != "pack-quantized":
                values = weight.values if held.bits == 16 else weight.dense()
                tensors[key] = torch.from_numpy(np.ascontiguousarray(values))
                ignored += [o for o in weight.owners if not isinstance(modules.get(o), (*TABLES, type(None)))]
                continue
            assert weight.codes is not None
            strategy = ("tensor", "channel", "group")[weight.step.ndim]
            groups.setdefault((held.bits, strategy, weight.group), []).extend(weight.owners)
            step = weight.step.reshape(1) if strategy == "tensor" else weight.step.reshape(weight.rows, -1)
            for owner in weight.owners:  # a loader looks for the parts under the name of each module
                tensors[f"{owner}.weight_packed"] = torch.from_numpy(pack_rows(weight.codes, held.bits))
                tensors[f"{owner}.weight_scale"] = torch.from_numpy(np.array(step, np.float32))
                tensors[f"{owner}.weight_shape"] = torch.tensor(weight.shape)
        for name, values in request.floats.items():
            tensors[name] = torch.from_numpy(values.copy())
        for name, module in request.model.named_modules():
            if isinstance(module, nn.Linear) and name not in ignored:
                if not any(name in members for members in groups.values()):
                    ignored.append(name)
        config = request.model.config.to_dict()  # type: ignore[union-attr, operator]
        architectures = config.get("architectures") or [type(request.model).__name__]
        config |= {"dtype": "float32", "architectures": architectures}
        config.pop("torch_dtype", None)
        config["quantization_config"] = quantization_config(groups, sorted(ignored))
        texts = {"config.json": json.dumps(config, indent=2, sort_keys=True, default=str) + "\n"}
        generation = getattr(request.model, "generation_config", None)
        if generation is not None:
            texts["generation_config.json"] = generation.to_json_string()
        data = to_bytes(tensors, metadata={"format": "pt"})
        admit(len(data) + sum(len(text.encode()) for text in texts.values()))
        with atomic_folder(out, FILES) as scratch:
            (scratch / "model.safetensors").write_bytes(data)
            for name, text in texts.items():
                (scratch / name).write_text(text, encoding="utf-8")
        facts = {
            "groups": {f"group_{i}": f"{b} bits per {s}" for i, (b, s, _) in enumerate(sorted(groups, key=_order))}
        }
        return [out / name for name in sorted([*texts, "model.safetensors"])], facts


def _order(group: tuple[int, str, int | None]) -> tuple[int, str, int]:
    return group[0], group[1], group[2] or 0


def quantization_config(groups: dict[tuple[int, str, int | None], list[str]], ignored: list[str]) -> dict[str, Any]:
    """The block that goes into config.json. groups: (bits, strategy, group size) -> full names of modules."""
    made = {}
    for i, group in enumerate(sorted(groups, key=_order)):
        bits, strategy, size = group
        made[f"group_{i}"] = {
            # Full names: the class name "Linear" would put every layer into every group (auto-round#2192).
            "targets": sorted(groups[group]),
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": strategy,
                "group_size": -1 if strategy == "channel" else size,
                "block_structure": None,
                "dynamic": False,
                "actorder": None,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": "mixed-precision" if len(made) > 1 else "pack-quantized" if made else "dense",
        "quantization_status": "compressed",
        "config_groups": made,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (rows, columns) as int32 (rows, ceil(columns * bits / 32)): each plus 2^(bits-1), low bits first, dense.

    >>> pack_rows(np.array([[-8, -7, 7]]), 4)
    array([[3856]], dtype=int32)
    """
    values = (codes + 2 ** (bits - 1)).astype(np.uint8)
    stream = (values[:, :, None] >> np.arange(bits, dtype=np.uint8) & 1).reshape(codes.shape[0], -1)
    padded = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(padded, axis=1, bitorder="little").view("<u4").astype(np.uint32).view(np.int32)
