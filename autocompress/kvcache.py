"""A causal model that caches low-rank latents instead of keys and values: fewer bytes for every token it remembers.

Keys K = W_K x + b of a layer become A (B x) + b, and what is cached is the latent B x: one for all KV heads of the
layer, or one for each; values alike. Rotary embeddings turn a key by its position after the projection, and turning
does not commute with A: so latents are cached unturned, and keys are expanded, then turned by their own positions,
whenever they are read. A cached token's position is not its place in the cache where a batch is padded or a sequence
packed, so the first layer's latents carry it, in four bytes. Needs the extra `hf`. The weights take no fewer bytes.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from scipy.linalg import solve_triangular
from torch import nn

from autocompress.batches import Batch, batch_samples, evaluating, feed
from autocompress.calibration import calibrate
from autocompress.compressors.base import LayerProblem
from autocompress.compressors.lowrank import bases
from autocompress.errors import BudgetError, InfeasibleError, LayerError, MismatchError, OptionError
from autocompress.factors import Halves, factorise
from autocompress.latents import LatentAttention, position_columns
from autocompress.measuring import Context, logits
from autocompress.strategies.fisher import own_loss
from autocompress.threads import single_threaded
from autocompress.types import Budget
from solvers import Problem, solve

__all__ = ["CachePlan", "CacheProfile", "CompressedCache", "compress_cache", "profile_cache"]

ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention")  # one forward, but for biases and windows
RULES = ("exact", "outputs", "progressive", "uniform")
ALLOCATIONS = ("auto", "refined", *RULES)
FACTORS = ("loss", "inputs", "weights")
HEADS = ("joint", "each")
DAMPING = 1e-2  # of the mean diagonal of G, as `calibrate` has it for Hessians


@dataclass(frozen=True)
class CachePlan:
    """The ranks of what a model caches, and what a token of it takes.

    ranks: projection -> its rank, or that of each KV head. elements: numbers cached per token, over all layers;
    bytes_per_token: these in `dtype`, and the position. loss: what the ranks are predicted to cost, KL to the dense
    model in nats per token; bound: no ranks within the budget are predicted to cost less with these factors. measured:
    that KL on calibration data that no statistics saw, None where nobody measured it. profile: the fingerprint of the
    profile that makes the factors.
    """

    ranks: Mapping[str, tuple[int, ...]]
    allocation: str
    factors: str
    heads: str
    dtype: torch.dtype
    longest: int
    budget_bytes: int
    dense_bytes_per_token: int
    loss: float
    bound: float
    profile: str
    measured: float | None = None

    @property
    def elements(self) -> int:
        return sum(sum(ranks) for ranks in self.ranks.values())

    @property
    def bytes_per_token(self) -> int:
        return self.bytes_in(self.dtype)

    def bytes_in(self, dtype: torch.dtype) -> int:
        """What a token takes with these ranks where the model runs in another type."""
        return dtype.itemsize * (self.elements + position_columns(dtype, self.longest))

    @property
    def gap(self) -> float:
        """How far the predicted loss can be from the least one, (loss - bound) / bound; 0 where they are equal."""
        return 0.0 if self.loss == self.bound else (self.loss - self.bound) / self.bound if self.bound else math.inf


@dataclass(frozen=True)
class CompressedCache:
    """A copy of a model whose attention layers cache latents, and the plan that it follows."""

    model: nn.Module
    plan: CachePlan


def compress_cache(
    model: nn.Module,
    calibration: Iterable[Batch],
    budget: Any,
    allocation: str = "auto",
    factors: str = "loss",
    heads: str = "joint",
    seed: int = 0,
) -> CompressedCache:
    """A copy of a causal Llama-family model that caches at most `budget` bytes per token, with the plan of its ranks.

    budget: bytes per token in the model's type, or "4x": what the dense model caches, divided. `generate` and calls
    with use_cache=True keep working with transformers' DynamicCache and StaticCache. allocation: `exact`, the least
    predicted KL; `refined`, the same once more with what exact's result says of the KL (see `CacheProfile.refined`);
    `outputs`, the least sum of relative errors of keys and values; `progressive`, LoRC's ranks; `uniform`, one rank
    everywhere; `auto`, the one of these whose KL on held-out calibration data is the least.
    factors: least error of the predicted KL (`loss`), of what a projection puts out (`inputs`), of W (`weights`, as
    LoRC has it). heads: `joint`, or `each` KV head by itself. Raises LayerError for a model without such attention or
    with rotary embeddings that change with the length, OptionError, BudgetError, and InfeasibleError naming the least
    budget. Source: LoRC, arXiv 2410.03111; the predicted KL is that of K-FAC, arXiv 1503.05671.
    """
    return profile_cache(model, calibration, seed).compress(budget, allocation, factors, heads)


@dataclass(frozen=True)
class Projection:
    """A key or value projection: its weight W (f, d); C = E[x xᵀ] (d, d) of its inputs; G (f, f), the sum over
    positions of g gᵀ, g the gradient of -log p(y) of a predicted token by what the projection puts out, y drawn from
    the model itself. All float64.

    ½ tr(G ΔW C ΔWᵀ) is the KL per token that ΔW costs, to second order, if inputs and gradients, and positions, are
    independent.
    """

    name: str
    weight: np.ndarray
    C: np.ndarray
    G: np.ndarray
    head_dim: int

    def blocks(self, heads: str, factors: str) -> list[Block]:
        """The rows of W that share a latent, factored."""
        size = len(self.weight) if heads == "joint" else self.head_dim
        energy = float(np.sum((self.weight @ self.C) * self.weight))
        rows = [slice(i, i + size) for i in range(0, len(self.weight), size)]
        return [Block.of(self.name, self.weight[r], self.C, self.G[r, r], factors, energy) for r in rows]


@dataclass(frozen=True)
class Block:
    """Rows of a projection as A B of every rank r: the first r columns of A (f, m) and rows of B (m, d).

    losses[r - 1] = ½ tr(G ΔW C ΔWᵀ); errors[r - 1] = tr(ΔW C ΔWᵀ) over the energy of the whole projection.
    """

    A: np.ndarray
    B: np.ndarray
    losses: np.ndarray
    errors: np.ndarray

    @classmethod
    def of(cls, name: str, W: np.ndarray, C: np.ndarray, G: np.ndarray, factors: str, energy: float) -> Block:
        """With G = L Lᵀ, the truncated Lᵀ W of least error in C and L⁻ᵀ before it: the least ½ tr(G ΔW C ΔWᵀ) of that
        rank (Eckart and Young); with L = I for factors of the inputs, and C = I too for those of the weights alone.
        """
        L = np.linalg.cholesky(G) if factors == "loss" else np.eye(len(G))
        target = L.T @ W
        B, A = (x[0] for x in bases(LayerProblem(name, W.shape, target[None], C[None]), 1, factors == "weights"))
        A = solve_triangular(L, A, lower=True, trans="T")
        sizes = np.linalg.norm(A, axis=0)
        sizes = np.where(sizes > 0.0, sizes, 1.0)
        A, B = A / sizes, B * sizes[:, None]
        inputs = B @ C @ B.T
        return cls(A, B, 0.5 * _tails((A.T @ G @ A) * inputs), _tails((A.T @ A) * inputs) / (energy or 1.0))


def _tails(products: np.ndarray) -> np.ndarray:
    """Σ_{i, j ≥ r} products[i, j] for r = 1, ..., m, float64 (m,); the last is 0."""
    sums = np.diag(products[::-1, ::-1].cumsum(0).cumsum(1))[::-1]
    return np.maximum(np.append(sums[1:], 0.0), 0.0)


@dataclass(frozen=True)
class CacheProfile:
    """What ranks are chosen by: the key and the value projection of every attention layer, from the first to the last,
    and the calibration data that plans are measured on.
    """

    layers: Mapping[str, tuple[Projection, Projection]]
    context: Context
    dtype: torch.dtype
    longest: int
    _found: dict[tuple[str, str], dict[str, list[Block]]] = field(default_factory=dict, repr=False, compare=False)

    def compress(
        self, budget: Any, allocation: str = "auto", factors: str = "loss", heads: str = "joint"
    ) -> CompressedCache:
        """As `compress_cache`, without the statistics being made again."""
        _known("allocation", allocation, ALLOCATIONS)
        tried: list[tuple[CacheProfile, CachePlan]] = []
        for rule in ALLOCATIONS[1:] if allocation == "auto" else (allocation,):
            if rule == "refined":
                profile = self.refined(self.plan(budget, "exact", factors, heads))
                plan = dataclasses.replace(profile.plan(budget, "exact", factors, heads), allocation=rule)
            else:
                profile, plan = self, self.plan(budget, rule, factors, heads)
            tried.append((profile, profile.measured(plan)))
        profile, plan = min(tried, key=lambda pair: cast(float, pair[1].measured))  # of equals the first
        return CompressedCache(profile.apply(plan), plan)

    def refined(self, plan: CachePlan) -> CacheProfile:
        """This profile with G = ⅔ G of the dense model + ⅓ G of the one that the plan makes.

        The KL of ΔW is ∫ (1 - t) ΔWᵀ F_t ΔW dt with F_t the Fisher information at t ΔW, t from 0 to 1, and F_t is taken
        as linear in t. Large errors of one layer make a model less sure, and so change what others cost.
        """
        names = {p.name: f"{p.name}.1" for pair in self.layers.values() for p in pair}  # the halves that put keys out
        there = _gradients(self.apply(plan), self.context.fit, list(names.values()), self.context.seed)

        def of(p: Projection) -> Projection:
            return dataclasses.replace(p, G=(2.0 * p.G + there[names[p.name]]) / 3.0)

        layers = {name: (of(keys), of(values)) for name, (keys, values) in self.layers.items()}
        return CacheProfile(layers, self.context, self.dtype, self.longest)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of everything that makes the factors."""
        digest = hashlib.sha256()
        for p in (p for pair in self.layers.values() for p in pair):
            digest.update(p.name.encode() + b"".join(np.ascontiguousarray(x).tobytes() for x in (p.weight, p.C, p.G)))
        return digest.hexdigest()

    def plan(self, budget: Any, rule: str = "exact", factors: str = "loss", heads: str = "joint") -> CachePlan:
        """Ranks within a budget of cached bytes per token, not measured; see `compress_cache`."""
        for what, value, known in (("allocation", rule, RULES), ("factors", factors, FACTORS), ("heads", heads, HEADS)):
            _known(what, value, known)
        limit, size = self._limit(budget), self.dtype.itemsize
        groups = self._blocks(heads, factors)
        blocks = [block for found in groups.values() for block in found]
        costs = [size * np.arange(1, len(block.losses) + 1) for block in blocks]
        room = limit - size * position_columns(self.dtype, self.longest)
        if room < (least := size * len(blocks)):
            raise InfeasibleError(
                f"rank 1 everywhere, heads={heads!r}, and the position take {limit - room + least} bytes per token; "
                f"the budget is {limit}: give at least as many",
                limit - room + least,
            )
        names = [f"{name}[{i}]" for name, found in groups.items() for i in range(len(found))]
        problem = Problem([block.losses for block in blocks], costs, room, names=names)
        best = solve(problem, "exact")

        if rule == "exact":
            choice = best.choice
        elif rule == "outputs":
            choice = solve(problem.with_loss([block.errors for block in blocks]), "exact").choice
        else:
            choice = self._by_rule(rule, [len(found) for found in groups.values()], costs, room)
        left = iter((choice + 1).tolist())
        return CachePlan(
            ranks={name: tuple(next(left) for _ in found) for name, found in groups.items()},
            allocation=rule,
            factors=factors,
            heads=heads,
            dtype=self.dtype,
            longest=self.longest,
            budget_bytes=limit,
            dense_bytes_per_token=self._dense_bytes(),
            loss=problem.total_loss(choice),
            bound=best.bound,
            profile=self.fingerprint,
        )

    def apply(self, plan: CachePlan) -> nn.Module:
        """A copy of the model that caches latents of these ranks. Raises MismatchError for another profile's plan."""
        if plan.profile != self.fingerprint:
            raise MismatchError("the plan was made of another profile; apply it with that one, or plan again")
        small: Any = copy.deepcopy(self.context.model)
        groups = self._blocks(plan.heads, plan.factors)
        factorise(small, {name: Halves(1, sum(ranks)) for name, ranks in plan.ranks.items()})
        for name, ranks in plan.ranks.items():
            taken = [(block.A[:, :r].copy(), block.B[:r]) for block, r in zip(groups[name], ranks, strict=True)]
            first, second = small.get_submodule(name)
            with torch.no_grad():
                first.weight.copy_(torch.from_numpy(np.concatenate([B for _, B in taken])))
                second.weight.copy_(torch.block_diag(*(torch.from_numpy(A) for A, _ in taken)))
        rotary = _rotary(small)
        for i, name in enumerate(self.layers):
            small.set_submodule(name, LatentAttention(small.get_submodule(name), rotary, self.longest, carries=i == 0))
        return small

    def measured(self, plan: CachePlan) -> CachePlan:
        """The plan with its KL per token on the held-out calibration data."""
        return dataclasses.replace(plan, measured=self.context.divergence_of(self.apply(plan)))

    def _blocks(self, heads: str, factors: str) -> dict[str, list[Block]]:
        if (key := (heads, factors)) not in self._found:
            every = [p for pair in self.layers.values() for p in pair]
            self._found[key] = {p.name: p.blocks(heads, factors) for p in every}
        return self._found[key]

    def _dense_bytes(self) -> int:
        return self.dtype.itemsize * sum(len(p.weight) for pair in self.layers.values() for p in pair)

    def _limit(self, budget: Any) -> int:
        asked = Budget.of(budget)
        given = {name for name, value in dataclasses.asdict(asked).items() if value is not None}
        if not given <= {"size", "ratio"}:
            raise BudgetError(f"the budget of a cache is {asked}; needed bytes per token, or a ratio such as '4x'")
        limits = [asked.size, asked.ratio and math.floor(self._dense_bytes() / asked.ratio)]
        return int(min(limit for limit in limits if limit is not None))

    def _by_rule(self, rule: str, blocks: Sequence[int], costs: Sequence[np.ndarray], room: int) -> np.ndarray:
        """The highest ranks of a rule that cost at most `room`, as indices into costs; blocks: of each projection.

        Progressive: low + (high - low) · s_l rounded, s_l from `_depth_shares`; high is the full rank for as long as
        some low fits.
        """
        most = np.array([len(cost) for cost in costs])
        full = int(most.max())
        if rule == "uniform":
            shares, ends = np.zeros(len(most)), [(rank, rank) for rank in range(full, 0, -1)]
        else:
            shares = np.repeat(_depth_shares(list(self.layers.values())), blocks)
            ends = [(low, full) for low in range(full, 0, -1)] + [(1, high) for high in range(full - 1, 0, -1)]
        for low, high in ends:
            found = np.minimum(np.rint(low + (high - low) * shares).astype(np.int64), most)
            if sum(int(cost[r - 1]) for cost, r in zip(costs, found, strict=True)) <= room:
                return found - 1
        raise AssertionError("rank 1 everywhere was within the budget")


def _known(what: str, value: str, values: Sequence[str]) -> None:
    if value not in values:
        raise OptionError(f"{what} is {value!r}; it is one of {', '.join(values)}")


def _depth_shares(layers: Sequence[tuple[Projection, Projection]]) -> np.ndarray:
    """LoRC's progressive ranks, two entries per layer: 1 for the first layer, 0 for the last.

    s_l = (log κ̃_l - min log κ̃) / (max log κ̃ - min log κ̃), with the cumulative condition number κ̃_l = Π_{m ≥ l} κ(W_K
    of m) κ(W_V of m), κ the largest singular value over the smallest one above rounding. The paper's text was not at
    hand: condition numbers and their product are as others report it, the interpolation of log κ̃ is from memory.
    Source: LoRC, arXiv 2410.03111, its progressive compression strategy.
    """
    logs = []
    for pair in layers:
        values = [np.linalg.svd(p.weight, compute_uv=False) for p in pair]
        above = [s[s > s[0] * len(s) * np.finfo(np.float32).eps] for s in values]
        logs.append(sum(math.log(s[0] / s[-1]) if len(s) else 0.0 for s in above))
    total = np.cumsum(logs[::-1])[::-1]
    span = total[0] - total[-1]
    return np.repeat((total - total[-1]) / span if span > 0.0 else np.ones(len(total)), 2)


def profile_cache(model: nn.Module, calibration: Iterable[Batch], seed: int = 0) -> CacheProfile:
    """The statistics of a causal model's key and value projections; a fifth of the data, chosen by the seed, is held
    out to measure plans on. Raises LayerError for models as `compress_cache` says, CalibrationError as `calibrate`.
    """
    found, context = _attentions(model), Context(model, calibration, seed=seed)
    stats = calibrate(model, [*context.fit], seed=seed, holdout=0.0)
    names = {name: (f"{name}.k_proj", f"{name}.v_proj") for name in found}
    gradients = _gradients(model, context.fit, [n for pair in names.values() for n in pair], seed)

    def projection(name: str, head_dim: int) -> Projection:
        layer, weight = stats.layers[name], model.get_submodule(name).weight
        C = layer.hessian[0] * stats.samples / (2.0 * layer.positions)
        return Projection(
            name, cast(torch.Tensor, weight).detach().double().cpu().numpy(), C, gradients[name], head_dim
        )

    layers = {
        name: (projection(names[name][0], attention.head_dim), projection(names[name][1], attention.head_dim))
        for name, attention in found.items()
    }
    dtype = next(iter(found.values())).k_proj.weight.dtype
    return CacheProfile(layers, context, dtype, cast(Any, model).config.max_position_embeddings)


def _attentions(model: nn.Module) -> dict[str, Any]:
    """The attention layers, in order. Raises LayerError for none, and for what is not as the latents need it."""
    found: dict[str, Any] = {name: m for name, m in model.named_modules() if type(m).__name__ in ATTENTIONS}
    if not found:
        raise LayerError(f"{type(model).__name__} has no attention layer whose cache is known: {', '.join(ATTENTIONS)}")
    kind = getattr(_rotary(model), "rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise LayerError(
            f"rotary embeddings of type {kind!r} turn a token by how long the sequence became; not supported"
        )
    for name, attention in found.items():
        for part in ("k_proj", "v_proj"):
            if type(module := getattr(attention, part)) is not nn.Linear:
                raise LayerError(
                    f"{name}.{part} is a {type(module).__name__}; needed a linear layer, not changed before"
                )
        if getattr(attention, "sliding_window", None) or getattr(attention.config, "sliding_window", None):
            raise LayerError(f"{name} attends to a sliding window, whose cache forgets; set sliding_window to None")
    return found


def _rotary(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(rotary := getattr(module, "rotary_emb", None), nn.Module):
            return rotary
    raise LayerError(f"{type(model).__name__} has no rotary embedding (rotary_emb) that all its layers share")


def _gradients(model: nn.Module, batches: Sequence[Batch], names: Sequence[str], seed: int) -> dict[str, np.ndarray]:
    """G of every projection (see `Projection`), with `DAMPING` of its mean diagonal."""
    generator, total = torch.Generator().manual_seed(seed), dict.fromkeys(names, cast(Any, 0.0))
    added: dict[str, torch.Tensor] = {}

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            # Zeros to differentiate by: the weights themselves may be frozen.
            added[name] = torch.zeros_like(output, requires_grad=True)
            return output + added[name]

        return hook

    handles = [model.get_submodule(name).register_forward_hook(hook_of(name)) for name in names]
    try:
        with evaluating(model), torch.enable_grad(), single_threaded():
            for batch in batches:
                loss = own_loss(logits(feed(model, batch)), -1, generator)
                for name, g in zip(names, torch.autograd.grad(loss, [added[n] for n in names]), strict=True):
                    flat = g.flatten(0, -2).double()
                    total[name] = total[name] + batch_samples(batch) * (flat.T @ flat)
    finally:
        for handle in handles:
            handle.remove()
    samples, found = sum(batch_samples(batch) for batch in batches), {}
    for name, product in total.items():
        G = (product / samples).cpu().numpy()
        found[name] = G + (DAMPING * float(np.diag(G).mean()) or 1.0) * np.eye(len(G))
    return found
