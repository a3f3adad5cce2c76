"""Label-free tuning of what costs no bytes: scales and shifts of norms, biases, steps of codes. No code moves."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from autocompress.applying import carrying, encoded_of
from autocompress.batches import chunk_batch, evaluating, feed
from autocompress.errors import CalibrationError
from autocompress.factors import Factored
from autocompress.inputs import slow_attention
from autocompress.layers import CONVOLUTIONS, is_rms_norm
from autocompress.measuring import Context
from autocompress.offloading import is_streamed
from autocompress.records import SCALED
from autocompress.storage import Entry, float_entry, grid_codes, grid_entry, step_bytes

__all__ = ["tune"]

RATE = 3e-3  # Adam's first step, in units of a tensor's root mean square; it falls to 0 along a cosine
OUTPUT_SHARE = 1.0  # weight of the outputs beside the mean over all norms; see experiments/sequential_cifar10.py


def tune(
    dense: nn.Module,
    small: nn.Module,
    context: Context,
    steps: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """A copy of an applied model whose norms, biases and steps are distilled from the dense one; same file length.

    `steps` steps of Adam on the data that `calibrate` saw, both models in eval mode, minimise |z - z_d|²/|z_d|² of the
    outputs (centred over classes) plus its mean over the outputs of all norms and biased layers, z_d the dense model's.
    Steps of codes are tuned through a scale of their layer's output, where no norm follows that has one already. At the
    end every value is rounded as it will be stored. Deterministic for a seed. progress: called with (steps done, steps
    in all). Raises MismatchError for a model that carries no records, CalibrationError for a streamed one: gradients
    would want all of its weights at once.
    """
    encoded = encoded_of(small)
    if is_streamed(dense):
        raise CalibrationError("gradients need the whole model in memory; leave streaming off")
    tuned = copy.deepcopy(small).eval().requires_grad_(False)
    entries = {entry.name: entry for entry in encoded.entries}
    values = _tunable(tuned, entries)
    scales = _scales(dense, tuned, entries, context)
    moving = [*values.values(), *scales.values()]
    # Adam's steps are as large as its rate, whatever the gradient, so the rate has to know the size of the tensor.
    sizes = [float(p.detach().square().mean().sqrt()) or 1.0 for p in moving]
    if not moving or steps <= 0:
        return small
    adam = torch.optim.Adam([{"params": [p], "lr": RATE * s} for p, s in zip(moving, sizes, strict=True)])
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda i: 0.5 * (1.0 + np.cos(np.pi * i / steps)))
    generator = np.random.default_rng(seed)
    order: list[int] = []
    pieces = context.pieces("fit")
    names = _watched(tuned, values)
    with evaluating(dense), slow_attention(), _scaled(tuned, scales):
        for p in moving:
            p.requires_grad_(True)
        for step in range(steps):
            order = order or generator.permutation(len(pieces)).tolist()
            piece = pieces[order.pop()]
            with torch.no_grad():
                wanted, features = _features(context, dense, names, piece)
            loss = _loss(context, tuned, names, piece, wanted, features)
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
            if progress is not None:
                progress(step + 1, steps)
    return _stored(tuned.requires_grad_(False), encoded, entries, values, scales)


def _tunable(model: nn.Module, entries: Mapping[str, Entry]) -> dict[str, nn.Parameter]:
    """Scales and shifts of norms and biases of layers, by the names under which the file holds them."""
    names = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    found: dict[str, nn.Parameter] = {}
    for module in model.modules():
        fields: tuple[str, ...] = ("weight", "bias") if isinstance(module, SCALED) else ()
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            fields = ("bias",)
        elif is_rms_norm(module):
            fields = ("weight",)
        for field in fields:
            tensor = module._parameters.get(field)
            if tensor is not None and tensor.dtype == torch.float32 and (name := names[id(tensor)]) in entries:
                found[name] = tensor
    return found


def _scales(
    dense: nn.Module, model: nn.Module, entries: Mapping[str, Entry], context: Context
) -> dict[str, nn.Parameter]:
    """A scale of 1 per step, for the owners of quantised weights whose output is not read by a batch norm at once."""
    outputs: dict[str, torch.Tensor] = {}
    inputs: list[torch.Tensor] = []
    handles = []
    for name, module in dense.named_modules():
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)):

            def keep(m: nn.Module, args: Any, output: torch.Tensor, name: str = name) -> None:
                outputs[name] = output

            handles.append(module.register_forward_hook(keep))
        elif isinstance(module, SCALED) and not isinstance(module, nn.LayerNorm):
            handles.append(module.register_forward_pre_hook(lambda m, args: inputs.append(args[0])))
    try:
        with torch.no_grad(), evaluating(dense):
            feed(dense, chunk_batch(context.fit[0], 1)[0])
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, nn.Parameter] = {}
    for name, output in outputs.items():
        key = f"{name}.weight" if name else "weight"
        entry = entries.get(key)
        quantised = entry is not None and entry.step in ("tensor", "row") and output.dtype == torch.float32
        if entry is not None and quantised and not any(output is x for x in inputs):
            found[name] = nn.Parameter(torch.ones(entry.shape[0] if entry.step == "row" else 1, device=output.device))
    users: dict[int, int] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        users[id(weight)] = users.get(id(weight), 0) + 1
    return {n: s for n, s in found.items() if users[id(model.get_submodule(n).weight)] == 1}


@contextmanager
def _scaled(model: nn.Module, scales: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Have each layer multiply its output, its bias aside, by its scale, as if its steps were multiplied."""
    handles = []
    for name, scale in scales.items():

        def multiply(m: Any, args: Any, output: torch.Tensor, scale: torch.Tensor = scale) -> torch.Tensor:
            tail = (1,) * len(m.kernel_size) if isinstance(m, CONVOLUTIONS) else ()
            factor = scale.reshape(-1, *tail)
            if m.bias is None:
                return output * factor
            bias = m.bias.reshape(-1, *tail)
            return (output - bias) * factor + bias

        handles.append(model.get_submodule(name).register_forward_hook(multiply))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watched(model: nn.Module, values: Mapping[str, nn.Parameter]) -> list[str]:
    """The modules that hold a tuned tensor, as their outputs are what it can change; of a layer that is split the
    whole, which the dense model has too.
    """
    tuned = {id(p) for p in values.values()}
    split = {f"{name}.1": name for name, m in model.named_modules() if isinstance(m, Factored)}
    holders = [name for name, m in model.named_modules() if any(id(p) in tuned for p in m._parameters.values())]
    return [split.get(name, name) for name in holders]


def _features(
    context: Context, model: nn.Module, names: list[str], piece: Any
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The outputs of a model, and those of the named modules in the order of their calls."""
    found: list[torch.Tensor] = []
    # A copy: an in-place activation may follow.
    handles = [model.get_submodule(n).register_forward_hook(lambda m, a, y: found.append(y.clone())) for n in names]
    try:
        return context.output(model, piece), found
    finally:
        for handle in handles:
            handle.remove()


def _loss(
    context: Context,
    model: nn.Module,
    names: list[str],
    piece: Any,
    wanted: torch.Tensor,
    features: list[torch.Tensor],
) -> torch.Tensor:
    output, found = _features(context, model, names, piece)
    axis = context.class_axis(wanted)
    if axis is not None:
        output, wanted = output - output.mean(axis, keepdim=True), wanted - wanted.mean(axis, keepdim=True)
    inner = [_relative(a, b) for a, b in zip(found, features, strict=False) if a.shape == b.shape]
    return OUTPUT_SHARE * _relative(output, wanted) + sum(inner, output.new_zeros(())) / max(len(inner), 1)


def _relative(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (output - wanted).square().mean() / wanted.square().mean().clamp_min(1e-30)


def _stored(
    tuned: nn.Module,
    encoded: Any,
    entries: Mapping[str, Entry],
    values: Mapping[str, nn.Parameter],
    scales: Mapping[str, nn.Parameter],
) -> nn.Module:
    """The tuned model with every value as its record holds it, and the new records."""
    found = dict(entries)
    for name, tensor in values.items():
        found[name] = _rounded(entries[name], tensor.cpu().numpy(), encoded.plan.vector_bits)
        tensor.copy_(torch.from_numpy(np.ascontiguousarray(found[name].dequantise())))
    for owner, scale in scales.items():
        weight: Any = tuned.get_submodule(owner).weight
        name = f"{owner}.weight" if owner else "weight"
        found[name] = _rescaled(entries[name], scale.detach().cpu().numpy())
        weight.copy_(torch.from_numpy(np.ascontiguousarray(found[name].dequantise())).reshape(weight.shape))
    return carrying(tuned, [found[entry.name] for entry in encoded.entries], encoded.plan)


def _rounded(entry: Entry, values: np.ndarray, bits: int) -> Entry:
    """The entry with other values, stored as its own were: on a grid of that many bits, or as floats."""
    if entry.step == "tensor":
        return grid_entry(entry.name, *grid_codes(values, bits), bits, params=entry.params)
    if entry.codec == "fp16":
        values = values.clip(-65504.0, 65504.0)
    return float_entry(entry.name, values, codec=entry.codec, params=entry.params)


def _rescaled(entry: Entry, scale: np.ndarray) -> Entry:
    """The entry with its steps multiplied; its codes stay as they are, byte for byte."""
    kind = "<f4" if entry.step == "tensor" else "<f2"
    steps = entry.steps() * np.abs(scale).reshape(entry.steps().shape)
    # A step of 0 stays one; no other becomes one, or infinite.
    limits = np.finfo(np.dtype(kind))
    steps = np.where(entry.steps() > 0.0, np.clip(steps, limits.tiny, limits.max), 0.0)
    prefix = step_bytes(entry.shape, entry.step)
    return dataclasses.replace(entry, payload=steps.astype(kind).tobytes() + entry.payload[prefix:])
