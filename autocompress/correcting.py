"""Statistics correction: after compression, let every channel have the mean and the spread that it has in the dense
model.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from autocompress.batches import Batch, Enough, chunk_batch, evaluating, feed
from autocompress.inputs import slow_attention
from autocompress.layers import CONVOLUTIONS, NORMS, TRANSPOSED, is_rms_norm
from autocompress.records import foldable_norms

__all__ = ["Moments", "correct_statistics", "dense_moments"]

Moments = dict[str, tuple[torch.Tensor, torch.Tensor, int]]


def dense_moments(dense: nn.Module, layers: Iterable[str], data: Batch) -> Moments:
    """{module: (mean, standard deviation, calls)} of every module that can be corrected, on one batch.

    Batch norms: moments of their input per channel, float64; layer norms and compressed layers with a bias: of their
    output; RMS norms too.
    """
    users = Counter(id(p) for module in dense.modules() for p in module._parameters.values())
    wanted: dict[str, nn.Module] = {}
    for name in layers:
        module = dense.get_submodule(name)
        bias = module._parameters.get("bias")
        if bias is not None and users[id(bias)] == 1:
            wanted[name] = module
    own_norms = {name for name, _ in foldable_norms(dense)}
    for name, module in dense.named_modules():
        if isinstance(module, NORMS):
            if name in own_norms:
                wanted[name] = module
        elif isinstance(module, nn.LayerNorm) and _own_affine(module, users):
            wanted[name] = module
        elif is_rms_norm(module) and users[id(module._parameters["weight"])] == 1 and _scales_only(module):
            wanted[name] = module
    return _collect_moments(dense, wanted, data)


def correct_statistics(
    dense: nn.Module,
    small: nn.Module,
    layers: Iterable[str],
    data: Batch,
    store_as: Callable[[str, torch.Tensor], torch.Tensor] = lambda key, values: values,
    moments: Moments | None = None,
) -> None:
    """Correct `small` in place, in forward order, on one batch that both models see.

    Batch norm (folded: mean 0, variance 1): with channel moments (μ_d, σ_d) of its input in the dense model and
    (μ_p, σ_p) here, the scale becomes a = γ/√(var+ε) · σ_d/σ_p and the shift γ(μ_d - mean)/√(var+ε) + β - a μ_p; a
    channel with σ_p = 0 gets a = 0, unless σ_d = 0 too: the batch says nothing of it then, and it keeps its scale.
    Layer norm: scale and shift likewise, from its output's moments. RMS norm, which has no shift: the scale, so that
    every channel of its output has its mean square. A compressed layer with a bias: its mean output is
    matched. It is the identity where nothing is compressed; re-estimating batch statistics is not, because the running
    ones come from augmented data. Modules that run more than once per forward pass, or share their parameters with
    another module, are left alone. store_as(name, values): the values as they will be stored; a shift is found
    beside its rounded scale.
    `moments`: what `dense_moments` found on the same batch, so that many plans need one dense pass.
    Source: OBC's statistics correction (arXiv 2208.11580, appendix), folded.
    """
    targets = dense_moments(dense, layers, data) if moments is None else moments
    names = {id(module): name for name, module in small.named_modules()}

    def store(module: Any, field: str, values: torch.Tensor) -> None:
        name = names[id(module)]
        key = f"{name}.{field}" if name else field
        getattr(module, field).copy_(store_as(key, values))

    handles = []
    for name, (mean, std, calls) in targets.items():
        if calls != 1:
            continue
        target: Any = small.get_submodule(name)
        if isinstance(target, NORMS):
            original: Any = dense.get_submodule(name)

            def norm_hook(m: Any, args: Any, mean: Any = mean, std: Any = std, original: Any = original) -> None:
                _correct_batch_norm(m, original, args[0], mean, std, store)

            handles.append(target.register_forward_pre_hook(norm_hook))
        elif isinstance(target, nn.LayerNorm):

            def layer_norm_hook(
                m: Any, args: Any, output: torch.Tensor, mean: Any = mean, std: Any = std
            ) -> torch.Tensor:
                return _correct_layer_norm(m, output, mean, std, store)

            handles.append(target.register_forward_hook(layer_norm_hook))
        elif is_rms_norm(target):

            def rms_norm_hook(
                m: Any, args: Any, output: torch.Tensor, mean: Any = mean, std: Any = std
            ) -> torch.Tensor:
                return _correct_rms_norm(m, output, mean, std, store)

            handles.append(target.register_forward_hook(rms_norm_hook))
        else:

            def bias_hook(m: Any, args: Any, output: torch.Tensor, mean: Any = mean) -> torch.Tensor:
                return _correct_bias(m, output, mean, store)

            handles.append(target.register_forward_hook(bias_hook))
    once = [name for name, (_, _, calls) in targets.items() if calls == 1]
    if once:
        handles.append(_ending(small.get_submodule(once[-1])))
    try:
        with torch.no_grad(), slow_attention(), contextlib.suppress(Enough):
            feed(small, data)
    finally:
        for handle in handles:
            handle.remove()


def _ending(module: nn.Module) -> Any:
    """Have a forward pass end with a module, once it is corrected: the scores of a language model take most memory."""

    def end(*_: Any) -> None:
        raise Enough

    return module.register_forward_pre_hook(end) if isinstance(module, NORMS) else module.register_forward_hook(end)


def _own_affine(norm: nn.LayerNorm, users: Mapping[int, int]) -> bool:
    return all(
        p is not None and users[id(p)] == 1 for p in (norm._parameters.get("weight"), norm._parameters.get("bias"))
    )


def _moments(x: torch.Tensor, channel: int, keep: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation over all but `keep` dimensions from `channel` on, float64."""
    x, last = x.detach().float(), channel % x.ndim
    axes = tuple(range(last))
    if last + keep < x.ndim:
        # Pixel by pixel within a sample, then over samples: `var_mean` over both takes several times as long, and
        # its float32 sums are longer.
        flat = x.flatten(last + keep)
        means = flat.mean(-1)
        centred = flat - means[..., None]
        squares = torch.linalg.vecdot(centred, centred).double() / flat.shape[-1]
        mean = means.double().mean(axes) if axes else means.double()
        spread = squares + (means.double() - mean).square()
        return mean, (spread.mean(axes) if axes else spread).sqrt()
    var, mean = torch.var_mean(x, axes, correction=0)
    return mean.double(), var.double().sqrt()


def _output_moments(module: nn.Module, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        return _moments(output, output.ndim - 1 - len(module.kernel_size))
    if isinstance(module, nn.LayerNorm):
        return _moments(output, -len(module.normalized_shape), len(module.normalized_shape))
    return _moments(output, -1)


def _collect_moments(
    dense: nn.Module, wanted: dict[str, nn.Module], data: Batch
) -> dict[str, tuple[torch.Tensor, torch.Tensor, int]]:
    found: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = {}
    calls, last = 0, -1
    handles = []
    for name, module in wanted.items():

        def hook(m: Any, args: Any, output: torch.Tensor, name: str = name) -> None:
            nonlocal calls
            calls += 1
            times = found[name][2] + 1 if name in found else 1
            # Inputs of a batch norm have their channels in dimension 1.
            found[name] = (*(_moments(args[0], 1) if isinstance(m, NORMS) else _output_moments(m, output)), times)
            if calls == last:
                raise Enough

        handles.append(module.register_forward_hook(hook))
    try:
        with torch.no_grad(), evaluating(dense), slow_attention(), contextlib.suppress(Enough):
            # How many calls there are: what follows the last is left out. Norms without statistics want two samples.
            feed(dense, chunk_batch(data, 2)[0])
            calls, last = 0, calls
            found.clear()
            feed(dense, data)
    finally:
        for handle in handles:
            handle.remove()
    return found


# A channel whose spread fell below this part of its magnitude (or of the dense spread) is constant to rounding.
_FLAT = 1e-6


Store = Callable[[Any, str, torch.Tensor], None]


def _correct_batch_norm(
    m: Any, original: Any, x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, store: Store
) -> None:
    mu, sigma = _moments(x, 1)
    scale = original.weight.double() / (original.running_var.double() + original.eps).sqrt()
    a = scale * _ratio(std, sigma, mean, mu)
    store(m, "weight", a * (1.0 + m.eps) ** 0.5)
    # The shift belongs to the scale as it is stored.
    a = m.weight.double() / (m.running_var.double() + m.eps).sqrt()
    store(m, "bias", scale * (mean - original.running_mean.double()) + original.bias.double() - a * mu)


def _correct_layer_norm(
    m: Any, output: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, store: Store
) -> torch.Tensor:
    mu, sigma = _output_moments(m, output)
    weight, bias = m.weight.double(), m.bias.double()
    store(m, "weight", weight * _ratio(std, sigma, mean, mu))
    ratio = torch.where(weight == 0.0, 1.0, m.weight.double() / torch.where(weight == 0.0, 1.0, weight))
    store(m, "bias", mean - (mu - bias) * ratio)
    return ((output.double() - bias) * ratio + m.bias.double()).to(output.dtype)


def _correct_rms_norm(
    m: Any, output: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, store: Store
) -> torch.Tensor:
    mu, sigma = _output_moments(m, output)
    none = torch.zeros_like(mu)
    weight = m.weight.double()
    store(m, "weight", weight * _ratio(torch.hypot(mean, std), torch.hypot(mu, sigma), none, none))
    ratio = torch.where(weight == 0.0, 1.0, m.weight.double() / torch.where(weight == 0.0, 1.0, weight))
    return (output.double() * ratio).to(output.dtype)


def _scales_only(norm: Any) -> bool:
    """Whether a norm's output is its weight times something, and not, say, one plus its weight."""
    silent = copy.deepcopy(norm)
    with torch.no_grad():
        silent.weight.zero_()
        return not bool(silent(torch.ones_like(silent.weight)[None]).any())


def _ratio(std: torch.Tensor, sigma: torch.Tensor, mean: torch.Tensor, mu: torch.Tensor) -> torch.Tensor:
    """σ_d/σ_p: 0 where the compressed channel is constant, 1 where the dense one is too."""
    constant = sigma <= _FLAT * (mu.abs() + std)
    ratio = torch.where(constant, 0.0, std / torch.where(constant, 1.0, sigma))
    return torch.where(constant & (std <= _FLAT * (mean.abs() + std)), 1.0, ratio)


def _correct_bias(m: Any, output: torch.Tensor, mean: torch.Tensor, store: Store) -> torch.Tensor:
    old = m.bias.double()
    store(m, "bias", old + mean - _output_moments(m, output)[0])
    shape = [1] * output.ndim
    channel = output.ndim - 1 - len(m.kernel_size) if isinstance(m, (*CONVOLUTIONS, *TRANSPOSED)) else output.ndim - 1
    shape[channel] = -1
    return (output.double() + (m.bias.double() - old).reshape(shape)).to(output.dtype)
