"""Applied model -> file -> model: `save` writes and verifies, `load` fills a fresh instance, `unpack` makes dense
tensors of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import nn

from autocompress.applying import carrying, encoded_of
from autocompress.errors import AutocompressError, BudgetError, MismatchError
from autocompress.factors import Halves, factorise, split_shapes
from autocompress.files import atomic_path
from autocompress.layers import CONVOLUTIONS, TRANSPOSED, stored_tensors, swapped_shape, weight_of
from autocompress.narrowing import narrow_to
from autocompress.offloading import READER, is_streamed
from autocompress.packed import fixed_width, pack, packable, payload_key
from autocompress.records import foldable_norms, stored_values, swap_groups
from autocompress.storage import Entry, FormatError, file_size, read, write
from autocompress.types import Plan

__all__ = [
    "OutputError",
    "SaveInfo",
    "check_unchanged",
    "fill",
    "halves_of",
    "is_narrower",
    "load",
    "load_carrying",
    "save",
    "state_dict_of",
    "unpack",
    "write_text",
]


class OutputError(AutocompressError):
    """A result cannot be written where it was asked for."""


@dataclass(frozen=True)
class SaveInfo:
    """What stands on disk: `bytes` is the file's length, at most `budget_bytes`."""

    path: Path
    bytes: int
    budget_bytes: int


def save(small: nn.Module, plan: Plan, path: str | Path) -> SaveInfo:
    """Write the applied model's file, read it back, and prove it: length within the budget, every tensor what the model
    computes with.

    The file takes its place only when all of that holds. Raises MismatchError for a model that was not applied, belongs
    to another plan, or was changed since; BudgetError if the file would not fit; OutputError where it cannot be
    written.
    """
    encoded = encoded_of(small)
    if encoded.plan.layers != plan.layers or encoded.plan.fingerprint != plan.fingerprint:
        raise MismatchError("field 'plan': this model was made by another plan; apply this one first")
    size = file_size(encoded.entries)
    if size > plan.budget_bytes:
        raise BudgetError(
            f"the file would have {size:,} bytes, the budget is {plan.budget_bytes:,}; "
            "make the plan again for this model"
        )
    check_unchanged(small, encoded.entries)
    try:
        info = write(path, encoded.entries)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    return SaveInfo(Path(path), info.bytes, plan.budget_bytes)


def check_unchanged(small: nn.Module, entries: Iterable[Entry]) -> None:
    """Raise MismatchError, naming the first, unless every tensor of a model is what these records hold."""
    tensors = stored_tensors(small)
    for entry in entries:
        name = entry.name
        if (payload := tensors.get(payload_key(name))) is not None:
            if bytes(payload.cpu().numpy()) != entry.payload:
                raise MismatchError(f"field {name!r}: its payload was changed after it was loaded; load the file again")
            continue
        values, tensor = stored_values(entry), tensors.get(name)
        if tensor is None or tuple(tensor.shape) != values.shape:
            raise MismatchError(
                f"field {name!r}: the model no longer has this tensor as it was applied; apply the plan again"
            )
        kept = torch.from_numpy(np.ascontiguousarray(values)).reshape(values.shape).to(tensor.dtype)
        here = (weight_of(small, name) if tensor.is_meta else tensor).cpu()
        if not bool(((here == kept) | ((here != here) & (kept != kept))).all()):  # NaN is as good as NaN
            raise MismatchError(
                f"field {name!r}: its values were changed after apply; saving would lose that "
                "(apply again, or tune before)"
            )
    for name, norm in foldable_norms(small):
        if bool((norm.running_mean != 0).any()) or bool((norm.running_var != 1).any()):
            raise MismatchError(
                f"field '{name}.running_mean': batch statistics moved after apply (was the model in training mode?)"
            )


def state_dict_of(archive: Mapping[str, Entry]) -> dict[str, torch.Tensor]:
    """Every tensor of a file (an `Archive`, or its entries by name); the running statistics of folded norms, which it
    only implies, are 0 and 1.

    Raises FormatError, saying where, if anything in the file is damaged.
    """
    out: dict[str, torch.Tensor] = {}
    for name, entry in archive.items():
        values = stored_values(entry)
        out[name] = torch.from_numpy(np.array(values, copy=True)).reshape(values.shape)
        if entry.params.get("folded"):
            owner = name.removesuffix("weight")
            out[f"{owner}running_mean"] = torch.zeros(entry.shape)
            out[f"{owner}running_var"] = torch.ones(entry.shape)
    return out


@dataclass(frozen=True)
class _Some(Mapping[str, Entry]):
    """Some entries of a file, each read, and made something else, when it is asked for."""

    archive: Mapping[str, Entry]
    names: Sequence[str]
    change: Callable[[Entry], Entry] | None = None

    def __getitem__(self, name: str) -> Entry:
        return self.archive[name] if self.change is None else self.change(self.archive[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@overload
def load(path: str | Path, model: None = None) -> dict[str, torch.Tensor]: ...
@overload
def load(path: str | Path, model: nn.Module, packed: bool | Literal["bits"] = False) -> nn.Module: ...
def load(
    path: str | Path, model: nn.Module | None = None, packed: bool | Literal["bits"] = False
) -> nn.Module | dict[str, torch.Tensor]:
    """Fill a fresh instance of the same architecture from a file and return it in eval mode; without a model, a state
    dict.

    packed=True: weights stay in memory as the file holds them, and each is decoded whenever its layer runs (see
    `packed.pack`); outputs are the same, bit for bit. Weights of RNN, LSTM and GRU modules are dense all the same,
    as torch keeps a list of its own of them. packed="bits": with a fixed number of bits per code instead,
    which takes more memory and decodes about ten times as fast. The whole file is checked before the model is touched.
    A model from `streamed_model` takes packed weights only, and needs its folder no more then.
    Raises FormatError for a damaged file, MismatchError, naming what differs, for another architecture.
    """
    if packed not in (False, True, "bits"):
        raise MismatchError(f"packed is {packed!r}; it is False, True or 'bits'")
    with read(path) as archive:
        if packed and model is not None:
            archive.verify()  # one at a time: what is damaged shows before the model is touched
            return _packed(model, archive, str(path), fixed_width if packed == "bits" else None)
        halves, narrower = halves_of(archive), is_narrower(archive)
        tensors = state_dict_of(archive)
    if model is None:
        if packed:
            raise MismatchError("packed=True needs the model whose layers decode their weights; got none")
        return tensors
    return fill(model, tensors, str(path), halves, narrower)


def load_carrying(path: str | Path, model: nn.Module, plan: Plan) -> nn.Module:
    """`load` with packed weights, as a model that `save` takes again: what it carries is what its layers decode, once
    in memory.
    """
    with read(path) as archive:
        entries = dict(archive)
    for entry in entries.values():
        entry.dequantise()
    return carrying(_packed(model, entries, str(path)), entries.values(), plan)


def _packed(
    model: nn.Module, entries: Mapping[str, Entry], place: str, change: Callable[[Entry], Entry] | None = None
) -> nn.Module:
    """Fill a model with what a file holds, weights of layers as they are held there."""
    _reshape(model, _shapes(entries), place, halves_of(entries), is_narrower(entries))
    weights = {name: None for name, entry in entries.items() if packable(entry, model)}
    others = state_dict_of({name: entries[name] for name in entries if name not in weights})
    pack(model, _Some(entries, list(weights), change))
    if is_streamed(model):
        delattr(model, READER)
    return _copy_in(model, others)


def fill(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    place: str,
    halves: Mapping[str, Halves] | None = None,
    narrower: bool = False,
) -> nn.Module:
    """Put a file's tensors into a model of the same architecture, in eval mode; layers that the file has as two
    (`halves`) become two, and those that it has `narrower` lose channels. Raises MismatchError before it is touched.
    """
    if is_streamed(model):
        raise MismatchError(f"the weights of this model are not in memory; load {place} with packed=True")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return _copy_in(_reshape(model, shapes, place, halves or {}, narrower), tensors)


def is_narrower(archive: Mapping[str, Entry]) -> bool:
    """Whether some layer of a file has fewer channels than its architecture: its option begins with its widths."""
    return any(str(entry.params.get("option", "")).startswith("n") for entry in archive.values())


def _reshape(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    place: str,
    halves: Mapping[str, Halves],
    narrower: bool,
) -> nn.Module:
    """The model with the layers that a file has. Raises MismatchError before it is touched."""
    own = {name: tuple(tensor.shape) for name, tensor in stored_tensors(model).items()}
    smaller = {
        n: shapes[n]
        for n in own
        if narrower and n in shapes and _fits(model.get_submodule(n.rpartition(".")[0]), shapes[n], own[n])
    }
    _check_shapes(model, shapes, place, halves, {**own, **smaller})
    return factorise(narrow_to(model, smaller), halves)


def _fits(module: nn.Module, shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether a tensor of a module can be what is left of another: fewer channels, the same kernel."""
    kernel = 2 if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) else len(whole)
    if isinstance(module, CONVOLUTIONS) and module.groups > 1 and len(whole) > 1:
        each = module.out_channels // module.groups  # whole groups go, and no inputs of those that stay
        if shape[1:] != whole[1:] or shape[0] % each:
            return False
    return len(shape) == len(whole) and shape[kernel:] == whole[kernel:] and all(map(_less, shape, whole))


def _less(size: int, whole: int) -> bool:
    return 1 <= size <= whole


def halves_of(archive: Mapping[str, Entry]) -> dict[str, Halves]:
    """The layers that a file has as two or three, by name, in file order. Raises FormatError where these do not fit
    together.
    """
    found: dict[str, Halves] = {}
    for name, entry in archive.items():
        groups = entry.params.get("factor")
        if groups is None or name.endswith((".1.weight", ".2.weight")):
            continue
        layer = name.removesuffix(".0.weight")
        other = archive[f"{layer}.1.weight"] if f"{layer}.1.weight" in archive else None
        if layer == name or other is None or other.params.get("factor") != groups:
            raise FormatError(f"entry {name!r}: the other factor of its layer is not there")
        rest = archive[f"{layer}.2.weight"] if f"{layer}.2.weight" in archive else None
        found[layer] = _halves(entry, other, rest, groups)
    for name, entry in archive.items():
        if "factor" in entry.params and name.rpartition(".")[0].rpartition(".")[0] not in found:
            raise FormatError(f"entry {name!r}: the other factor of its layer is not there")
    return found


def _halves(first: Entry, second: Entry, rest: Entry | None, groups: object) -> Halves:
    between = first.shape[0] if first.shape else 0
    if (
        type(groups) is not int
        or groups < 1
        or between < 1
        or between % groups
        or len(first.shape) < 2
        or second.shape[1:] != (between, *(1,) * (len(first.shape) - 2))
    ):
        raise FormatError(f"entry {first.name!r}: {first.shape} and {second.shape} in {groups!r} groups are no layer")
    whole = (second.shape[0], groups * first.shape[1], *first.shape[2:])
    if rest is not None and (rest.shape != whole or rest.params.get("factor") != groups):
        raise FormatError(f"entry {rest.name!r}: {rest.shape} is no residual of a layer of {whole} in {groups} groups")
    return Halves(groups, between, rest is not None)


def _copy_in(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    with torch.no_grad():
        for name, tensor in stored_tensors(model).items():
            if name in tensors:
                tensor.copy_(tensors[name].to(tensor.device))
    return model.eval()


def _shapes(entries: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a file, with the implied statistics of folded norms."""
    shapes = {}
    for name, entry in entries.items():
        groups = swap_groups(entry)
        shapes[name] = swapped_shape(entry.shape, groups) if groups else entry.shape
        if entry.params.get("folded"):
            owner = name.removesuffix("weight")
            shapes |= {f"{owner}running_mean": entry.shape, f"{owner}running_var": entry.shape}
    return shapes


def _check_shapes(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    place: str,
    halves: Mapping[str, Halves],
    own: Mapping[str, tuple[int, ...]],
) -> None:
    """Raise MismatchError, naming what differs, unless a model of tensors of its `own` shapes has exactly these once it
    is split so.
    """
    wanted = split_shapes(model, own, halves)
    missing, extra = sorted(set(wanted) - set(shapes)), sorted(set(shapes) - set(wanted))
    differ = [n for n in wanted if n in shapes and wanted[n] != shapes[n]]
    if missing or extra or differ:
        parts = [f"the file lacks {_some(missing)}"] if missing else []
        parts += [f"the model lacks {_some(extra)}"] if extra else []
        parts += [f"{n!r} is {shapes[n]} in the file and {wanted[n]} in the model" for n in differ[:3]]
        raise MismatchError(f"{place} belongs to another architecture than {type(model).__name__}: " + "; ".join(parts))


def _some(names: list[str]) -> str:
    return ", ".join(repr(n) for n in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def unpack(path: str | Path, out: str | Path) -> int:
    """Write the file's tensors dense, as safetensors that any tool reads; returns the bytes written. Raises
    FormatError, OutputError.
    """
    from safetensors.torch import save as to_bytes

    tensors: Any = load(path)
    data = to_bytes({name: tensor.contiguous() for name, tensor in tensors.items()})
    _write(out, data)
    return len(data)


def write_text(path: str | Path, text: str) -> None:
    """Put a text in its place, whole or not at all. Raises OutputError."""
    _write(path, text.encode())


def _write(path: str | Path, data: bytes) -> None:
    try:
        with atomic_path(path) as scratch:
            scratch.write_bytes(data)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


__all__ += ["FormatError"]
