"""What a model takes: a batch is a tensor, a tuple or a dict. How to feed, split, join, count, fingerprint them."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from autocompress.errors import CalibrationError
from autocompress.offloading import is_streamed, reading

__all__ = [
    "Enough",
    "batch_digest",
    "batch_samples",
    "chunk_batch",
    "describe_batch",
    "evaluating",
    "feed",
    "first_tensor",
    "join_batches",
    "map_tensors",
    "materialise",
    "sample_digests",
    "samples_within",
    "split_batches",
]

Batch = Any


class Enough(Exception):
    """What a hook raises to end a forward pass whose rest would be for nothing."""


HOLDOUT = 0.2


def _tensors(batch: Batch) -> list[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        return [t for key in batch for t in _tensors(batch[key])]
    if isinstance(batch, tuple | list):
        return [t for item in batch for t in _tensors(item)]
    return []


def map_tensors(batch: Batch, function: Any) -> Batch:
    """The same structure, lists as tuples, with function(tensor) in the place of every tensor."""
    if isinstance(batch, torch.Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(map_tensors(item, function) for item in batch)
    return batch


def describe_batch(batch: Batch) -> str:
    """A batch in a few words, for messages: `float32 (128, 3, 32, 32)`."""
    if isinstance(batch, torch.Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key}: {describe_batch(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, tuple | list):
        return "(" + ", ".join(describe_batch(item) for item in batch) + ")"
    return type(batch).__name__


def materialise(batches: Iterable[Batch] | Batch) -> list[Batch]:
    """All batches as a list; a single tensor counts as one batch.

    Raises CalibrationError if there are none, or one holds no tensor.
    """
    if isinstance(batches, torch.Tensor | Mapping):
        batches = [batches]
    try:
        out = list(batches)
    except TypeError:
        raise CalibrationError(
            f"batches are a {type(batches).__name__}; needed an iterable of tensors, tuples or dicts"
        ) from None
    if not out:
        raise CalibrationError("calibration yields no batches; needed at least one")
    for i, batch in enumerate(out):
        if not _tensors(batch):
            raise CalibrationError(
                f"batch {i} is {describe_batch(batch)}; needed a tensor, or a tuple or dict of tensors"
            )
        if batch_samples(batch) == 0:
            raise CalibrationError(f"batch {i} is empty: {describe_batch(batch)}")
    return out


def first_tensor(batch: Batch) -> torch.Tensor:
    return _tensors(batch)[0]


def batch_samples(batch: Batch) -> int:
    """Length of the leading dimension of the first tensor (1 for a scalar)."""
    tensor = first_tensor(batch)
    return int(tensor.shape[0]) if tensor.ndim else 1


def batch_digest(batch: Batch) -> str:
    """SHA-256 over keys, types, shapes and bytes of a batch."""
    digest = hashlib.sha256()

    def visit(item: Batch) -> None:
        if isinstance(item, torch.Tensor):
            digest.update(f"{item.dtype}{tuple(item.shape)}".encode())
            if item.numel():
                digest.update(item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, Mapping):
            for key in item:
                digest.update(f"[{key}]".encode())
                visit(item[key])
        elif isinstance(item, tuple | list):
            digest.update(b"(")
            for value in item:
                visit(value)
            digest.update(b")")
        else:
            digest.update(repr(item).encode())

    visit(batch)
    return digest.hexdigest()


def sample_digests(batch: Batch) -> list[str]:
    """One digest per sample, whichever batch it comes in, with labels or without: of its row of the first tensor."""
    tensor = first_tensor(batch)
    return [batch_digest(sample)[:16] for sample in (tensor if tensor.ndim else [tensor])]


def _holds_samples(tensor: torch.Tensor, size: int) -> bool:
    """Whether a tensor of a batch has one entry per sample; others (a mask, positions) belong to the whole batch."""
    return bool(tensor.ndim) and tensor.shape[0] == size


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have the model in eval mode for a `with` block, and every module in its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _positional_limits(model: nn.Module) -> tuple[int, float]:
    """How many positional arguments forward needs, and how many it can take."""
    needed, most = 0, 0.0
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            most = float("inf")
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            most += 1
            needed += parameter.default is parameter.empty
    return needed, most


def model_arguments(model: nn.Module, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for model.forward.

    A pair whose second item the model cannot take is [inputs, labels], and only the inputs are fed.
    Raises CalibrationError where the signature leaves open what a pair is, and says how to write it.
    """
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if not isinstance(batch, tuple | list):
        return (batch,), {}
    needed, most = _positional_limits(model)
    n = len(batch)
    if n == 2 and most == 1:
        return (batch[0],), {}
    if n == 2 and needed <= 1 and most > 1:
        raise CalibrationError(
            f"a batch is a pair, and {type(model).__name__}.forward takes one argument or more: is the second item "
            "an input or the labels? Yield the inputs alone, or a dict of arguments by name"
        )
    if not needed <= n <= most:
        raise CalibrationError(
            f"a batch has {n} items, {type(model).__name__}.forward takes {needed} to {most:g}; yield what it takes"
        )
    return tuple(batch), {}


def feed(model: nn.Module, batch: Batch) -> Any:
    """model(batch) on the model's device, without gradients being switched on or off.

    A streamed model reads its weights as it goes. Raises CalibrationError, describing the batch, if the model refuses
    it.
    """
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    args, kwargs = model_arguments(model, map_tensors(batch, lambda t: t.to(device)))
    try:
        with reading(model):
            output = model(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CalibrationError(f"the model cannot take a batch of {describe_batch(batch)}: {reason}") from error
    if is_streamed(model) and any(t.is_floating_point() and bool(t.isnan().any()) for t in _tensors(output)):
        raise CalibrationError(
            "the model puts out NaN: it uses a weight outside of the layer that holds it, and those of a streamed "
            "model are in memory only while their layer runs; leave streaming off (--no-stream)"
        )
    return output


def split_batches(batches: Sequence[Batch], holdout: float = HOLDOUT, seed: int = 0) -> tuple[list[Batch], list[Batch]]:
    """(fit, held): a slice of the data that the Hessians never see, chosen by the seed; the same call gives the same
    split.

    From five batches on, or where every batch is a single sample, whole batches are held out; else the last samples of
    each. At least one sample is left to fit on; a single one in all cannot be split, and then nothing is held out.
    """
    n = len(batches)
    if n >= 5 or (n >= 2 and all(batch_samples(b) == 1 for b in batches)):
        count = min(max(1, round(holdout * n)), n - 1)
        held = set(np.random.default_rng(seed).permutation(n)[:count].tolist())
        return [b for i, b in enumerate(batches) if i not in held], [b for i, b in enumerate(batches) if i in held]
    fit, out = [], []
    for batch in batches:
        size = batch_samples(batch)
        keep = max(1, size - max(1, round(holdout * size)))
        fit.append(map_tensors(batch, lambda t, keep=keep, size=size: t[:keep] if _holds_samples(t, size) else t))
        if keep < size:
            out.append(map_tensors(batch, lambda t, keep=keep, size=size: t[keep:] if _holds_samples(t, size) else t))
    return fit, out


def chunk_batch(batch: Batch, samples: int) -> list[Batch]:
    """A batch in pieces of at most that many samples; tensors of another leading dimension go with every piece."""
    size = batch_samples(batch)
    if size <= samples:
        return [batch]

    def part(start: int) -> Batch:
        return map_tensors(batch, lambda t: t[start : start + samples] if t.ndim and t.shape[0] == size else t)

    return [part(start) for start in range(0, size, samples)]


def samples_within(batch: Batch, samples: int, tokens: int) -> int:
    """At most so many samples, and where these are sequences of tokens at most so many tokens; one at least."""
    first = first_tensor(batch)
    length = first[0].numel() if first.ndim > 1 and not first.is_floating_point() else 1
    return max(1, min(samples, tokens // length))


def join_batches(batches: Sequence[Batch], samples: int) -> Batch:
    """The first `samples` samples as one batch; where shapes differ between batches, the largest single batch.

    A statistics correction needs one forward pass that holds all its data, because each layer is corrected before the
    next sees it.
    """
    chosen, total = [], 0
    for batch in batches:
        if total >= samples:
            break
        chosen.append(batch)
        total += batch_samples(batch)

    sizes = [batch_samples(batch) for batch in chosen]

    def join(items: list[Batch]) -> Batch:
        head = items[0]
        if isinstance(head, torch.Tensor):
            if all(_holds_samples(t, size) for t, size in zip(items, sizes, strict=True)):
                return torch.cat(items)
            if all(torch.equal(head, t) for t in items[1:]):
                return head
            raise ValueError("tensors that belong to a whole batch differ between batches")
        if isinstance(head, Mapping):
            return {key: join([item[key] for item in items]) for key in head}
        if isinstance(head, tuple | list):
            return tuple(join(list(group)) for group in zip(*items, strict=True))
        return head

    try:
        joined = join(chosen)
    except (RuntimeError, KeyError, ValueError):
        joined = max(chosen, key=batch_samples)
    size = batch_samples(joined)
    return map_tensors(joined, lambda t: t[:samples] if _holds_samples(t, size) else t)
