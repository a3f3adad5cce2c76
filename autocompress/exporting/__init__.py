"""What runtimes read: an applied model or a file of ours as ONNX, compressed-tensors or safetensors, one file each."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from autocompress.applying import encoded_of
from autocompress.errors import BudgetError, MismatchError
from autocompress.exporting.base import (
    Exporter,
    ExportError,
    ExportInfo,
    ExportWarning,
    Held,
    Request,
    Weight,
    weight_of,
)
from autocompress.exporting.compressed_tensors import CompressedTensors
from autocompress.exporting.onnx import Onnx
from autocompress.exporting.safetensors import Safetensors
from autocompress.layers import dense_file_bytes, stored_tensors
from autocompress.saving import OutputError, fill, halves_of, is_narrower, state_dict_of
from autocompress.storage import Entry, read
from autocompress.types import Budget

__all__ = [
    "EXPORTERS",
    "CompressedTensors",
    "ExportError",
    "ExportInfo",
    "ExportWarning",
    "Exporter",
    "Onnx",
    "Safetensors",
    "export",
]

EXPORTERS: dict[str, Exporter] = {
    "onnx": Onnx(),
    "compressed-tensors": CompressedTensors(),
    "safetensors": Safetensors(),
}


def export(
    source: str | Path | nn.Module,
    model: nn.Module | None = None,
    format: str | Exporter = "onnx",
    out: str | Path = "",
    *,
    example: Any = None,
    budget: Budget | str | int | None = None,
    lossless_only: bool = True,
) -> ExportInfo:
    """Write what `apply` returned, a result folder or a model.acz in a format that runtimes read.

    source: a folder of `compress`, a model.acz, or an applied model. model: an instance of its architecture, which
    stays as it is (an applied model is its own). format: a name of EXPORTERS, or an exporter with other settings, such
    as `Onnx(weights="int8")`. example: one batch as the model takes it; ONNX needs it. budget: what all files together
    may have.

    Everything is checked before anything is written, and what was at `out` stays until the new files are complete.
    Raises ExportError, naming layer and option, for what the format cannot hold: with lossless_only=False it is mapped
    to the nearest that it can, with an ExportWarning; BudgetError; MismatchError for another architecture; FormatError;
    OutputError.
    """
    exporter = exporter_named(format)
    if not str(out):
        raise ExportError("where to? give out=, a file or, for compressed-tensors, a folder")
    entries = _entries(source)
    if isinstance(source, nn.Module):
        model = source if model is None else model
    if model is None and exporter.name != "safetensors":
        raise ExportError(f"{exporter.name} needs the model: its graph or configuration is not in the file")
    tensors = state_dict_of(entries)
    place = "the applied model" if isinstance(source, nn.Module) else str(source)
    halves = halves_of(entries)
    shell = None
    if model is not None:
        shell = fill(in_float32(copy.deepcopy(model)), tensors, place, halves, is_narrower(entries))
    exporter.check(_Tensors(tensors) if shell is None else shell, example)
    aliases = aliases_of(shell) if shell is not None else {name: name for name in entries}
    held: dict[str, Held] = {}
    for name, entry in entries.items():
        if "option" in entry.params:
            keys = sorted(k for k, first in aliases.items() if first == name)
            owners = tuple(k.rpartition(".")[0] if k.rpartition(".")[2] == "weight" else k for k in keys) or (name,)
            modules = [shell.get_submodule(k.rpartition(".")[0]) for k in keys] if shell is not None else []
            # A table that is the output head too can be held only as a table can.
            module = next((m for m in modules if not isinstance(m, nn.Linear)), modules[0] if modules else nn.Module())
            held[name] = exporter.hold(weight_of(entry, owners), module)
    notes = _judge(exporter, held.values(), lossless_only)
    floats = {n: _values(t, entries.get(n)) for n, t in tensors.items() if n not in held}
    limit = None if budget is None else _limit(Budget.of(budget), _Tensors(tensors) if shell is None else shell)

    def admit(size: int) -> None:
        if limit is not None and size > limit:
            raise BudgetError(
                f"the {exporter.name} export would have {size:,} bytes, the budget is {limit:,}; nothing written"
            )

    request = Request(nn.Module() if shell is None else shell, held, floats, aliases, example)
    try:
        files, facts = exporter.write(request, Path(out), admit)
        size = sum(path.stat().st_size for path in files)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}") from error
    for note in notes:
        warnings.warn(note, ExportWarning, stacklevel=2)
    layers = tuple((h.weight.name, str(h.weight.option), h.kind) for h in held.values())
    return ExportInfo(Path(out), exporter.name, tuple(files), size, layers, tuple(notes), facts)


def exporter_named(format: str | Exporter) -> Exporter:
    """The exporter of a name; anything else is one. Raises ExportError with the names there are."""
    if not isinstance(format, str):
        return format
    if format not in EXPORTERS:
        raise ExportError(f"there is no format {format!r}; there are {', '.join(EXPORTERS)}")
    return EXPORTERS[format]


def _entries(source: str | Path | nn.Module) -> dict[str, Entry]:
    if isinstance(source, nn.Module):
        return {entry.name: entry for entry in encoded_of(source).entries}
    path = Path(source)
    path = path / "model.acz" if path.is_dir() else path
    if not path.is_file():
        raise MismatchError(
            f"{path} does not exist; needed a folder that `autocompress compress` wrote, or a model.acz"
        )
    with read(path) as archive:
        return dict(archive)


def in_float32(model: nn.Module) -> nn.Module:
    """The model on the CPU, in float32 where it was in half precision: exports hold the file's values, not rounded."""
    model = model.cpu()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor.data = tensor.data.float()
    return model


def aliases_of(model: nn.Module) -> dict[str, str]:
    """Every name of the state dict -> the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(t), name) for name, t in model.state_dict(keep_vars=True).items()}


def _values(tensor: torch.Tensor, entry: Entry | None) -> np.ndarray:
    """As numpy, in half precision where the file has it so."""
    return tensor.half().numpy() if entry is not None and entry.codec == "fp16" else tensor.numpy()


def _judge(exporter: Exporter, held: Any, lossless_only: bool) -> list[str]:
    """One note for each kind of loss. Raises ExportError instead where nothing may be lost."""
    found: dict[str, list[str]] = {}
    for item in held:
        if item.loses:
            found.setdefault(item.loses, []).append(f"{item.weight.name} ({item.weight.option})")
    notes = [f"{exporter.name} cannot hold {', '.join(names)}: {loses}" for loses, names in sorted(found.items())]
    if notes and lossless_only:
        raise ExportError(
            "; ".join(notes) + ". Nothing was written; lossless_only=False (--no-lossless-only) maps them so"
        )
    return notes


class _Tensors(nn.Module):
    """Tensors by name where a model is wanted for its state dict alone."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return dict(self.tensors)


def _limit(budget: Budget, model: nn.Module) -> int | None:
    """The budget in bytes, as `plan` counts it."""
    parameters = sum(t.numel() for t in stored_tensors(model).values() if t.is_floating_point())
    return budget.bytes(dense_file_bytes(model), parameters)


__all__ += ["Held", "Request", "Weight", "aliases_of", "exporter_named", "in_float32"]
