"""What the weights inside a module multiply, where that is not its own input: attention, recurrence, tables."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

__all__ = ["attention_inputs", "cell_inputs", "lookups", "recurrent_inputs", "slow_attention"]


@contextlib.contextmanager
def slow_attention() -> Iterator[None]:
    """Keep torch from replacing whole encoder layers by one kernel, which calls none of their modules."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def lookups(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """How much each row of a table counts in its output, float64 (rows,): Σ over outputs of (its coefficient)².

    For an embedding that is how often the row was looked up. A bag sums rows, with coefficients: there the error of a
    table is Σ over bags of |Σ_t a_t ΔW_t|², of which the products of different tokens are left out.
    """
    given = _bound(module, args, kwargs)
    m: Any = module
    rows = int(m.num_embeddings)
    tokens = given["input"].detach()
    if isinstance(module, nn.Embedding):
        return torch.bincount(tokens.reshape(-1).cpu(), minlength=rows).double()
    if tokens.ndim == 2:
        bags = torch.arange(len(tokens)).repeat_interleave(tokens.shape[1])
    else:
        starts = given["offsets"].cpu()[: -1 if m.include_last_offset else None]
        bags = torch.searchsorted(starts, torch.arange(len(tokens)), right=True) - 1
    flat = tokens.reshape(-1).cpu().long()
    weights = given.get("per_sample_weights")
    factor = torch.ones(len(flat)).double() if weights is None else weights.detach().reshape(-1).cpu().double()
    if m.padding_idx is not None:
        factor = torch.where(flat == m.padding_idx, 0.0, factor)
    if m.mode == "mean":
        members = (flat != m.padding_idx).double() if m.padding_idx is not None else torch.ones(len(flat)).double()
        factor = factor / torch.bincount(bags, members).clamp(min=1.0)[bags]
    pairs, place = torch.unique(bags * rows + flat, return_inverse=True)
    coefficient = torch.bincount(place, factor, minlength=len(pairs))
    return torch.bincount(pairs % rows, coefficient**2, minlength=rows).double()


def attention_inputs(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, list[torch.Tensor]]:
    """{parameter: what it multiplies} of a MultiheadAttention: query, key and value for the packed projection.

    The input of the output projection is the module's own output with the identity in that projection's place.
    """
    given = _bound(module, args, kwargs)
    query, key, value = (given[name] for name in ("query", "key", "value"))
    kept = dict(module.out_proj._parameters)
    weight = kept.get("weight")
    found = {
        "in_proj_weight": [query, key, value],
        "q_proj_weight": [query],
        "k_proj_weight": [key],
        "v_proj_weight": [value],
    }
    if weight is not None:
        identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        try:
            module.out_proj._parameters["weight"] = nn.Parameter(identity, requires_grad=False)
            module.out_proj._parameters["bias"] = None
            found["out_proj.weight"] = [module.forward(*args, **kwargs)[0].detach()]
        finally:
            module.out_proj._parameters.update(kept)
    return found


def cell_inputs(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, list[torch.Tensor]]:
    """{parameter: what it multiplies} of one step of a recurrent cell; a hidden state that is not given is zero."""
    given = _bound(module, args, kwargs)
    x, hidden = given["input"], given.get("hx")
    h = hidden[0] if isinstance(hidden, tuple | list) else hidden
    h = x.new_zeros(*x.shape[:-1], module.hidden_size) if h is None else h
    return {"weight_ih": [x], "weight_hh": [h]}


def recurrent_inputs(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, list[torch.Tensor]]:
    """{parameter: what it multiplies, (positions, columns)} of an RNN, LSTM or GRU, run again step by step.

    weight_ih multiplies the sequence that its layer gets, weight_hh the hidden states before each step, and weight_hr
    an LSTM's states before their projection. Equations as in the documentation of torch.nn.LSTM, GRU and RNN.
    """
    given = _bound(module, args, kwargs)
    sequence, hidden = given["input"], given.get("hx")
    if isinstance(sequence, PackedSequence):
        data, sizes = sequence.data.detach(), sequence.batch_sizes.tolist()
        hidden = None if hidden is None else module.permute_hidden(hidden, sequence.sorted_indices)
        batched = True
    else:
        batched = sequence.ndim == 3
        x = sequence.detach() if batched else sequence.detach()[:, None]
        x = x.transpose(0, 1) if module.batch_first and batched else x
        data, sizes = x.reshape(-1, x.shape[-1]), [x.shape[1]] * x.shape[0]
    states = hidden if isinstance(hidden, tuple | list) else (hidden, None)
    found: dict[str, list[torch.Tensor]] = {}
    directions = 2 if module.bidirectional else 1
    width = module.proj_size or module.hidden_size
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            suffix = f"_l{layer}" + ("_reverse" if direction else "")
            index = layer * directions + direction
            h, c = (
                data.new_zeros(sizes[0], n)
                if state is None
                else (state[index] if batched else state[index : index + 1]).detach()
                for state, n in zip(states, (width, module.hidden_size), strict=True)
            )
            inside, out = _run(module, suffix, data, sizes, h, c, reverse=bool(direction))
            found |= {f"{name}{suffix}": [value] for name, value in inside.items()}
            outputs.append(out)
        data = torch.cat(outputs, dim=1)
    return found


def _run(
    m: Any, suffix: str, data: torch.Tensor, sizes: list[int], h0: torch.Tensor, c0: torch.Tensor, reverse: bool
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One direction of one layer on packed data (positions, in), `sizes` sequences at each time: inputs, outputs."""

    def parameter(name: str) -> torch.Tensor | None:
        found = getattr(m, f"{name}{suffix}", None)
        return None if found is None else found.detach()

    w_hh, b_hh, w_hr = parameter("weight_hh"), parameter("bias_hh"), parameter("weight_hr")
    w_ih = parameter("weight_ih")
    assert w_ih is not None
    assert w_hh is not None
    given = F.linear(data, w_ih, parameter("bias_ih")).split(sizes)
    steps = range(len(sizes))
    before: list[torch.Tensor] = [data] * len(sizes)
    wide: list[torch.Tensor] = [data] * len(sizes)
    after: list[torch.Tensor] = [data] * len(sizes)
    h, c = h0[:0], c0[:0]
    for t in reversed(steps) if reverse else steps:
        size, running = sizes[t], len(h)
        # Sequences end on the way; backwards, they begin on the way.
        h = torch.cat([h[:size], h0[running:size]])
        c = torch.cat([c[:size], c0[running:size]])
        before[t] = h
        recurrent = F.linear(h, w_hh, b_hh)
        if m.mode == "LSTM":
            i, f, g, o = (given[t] + recurrent).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = wide[t] = o.sigmoid() * c.tanh()
            h = h if w_hr is None else F.linear(h, w_hr)
        elif m.mode == "GRU":
            (r, z, n), (hr, hz, hn) = given[t].chunk(3, dim=1), recurrent.chunk(3, dim=1)
            update, new = (z + hz).sigmoid(), (n + (r + hr).sigmoid() * hn).tanh()
            h = new + update * (h - new)
        else:
            h = (given[t] + recurrent).tanh() if m.mode == "RNN_TANH" else (given[t] + recurrent).relu()
        after[t] = h
    inside = {"weight_ih": data, "weight_hh": torch.cat(before)}
    if w_hr is not None:
        inside["weight_hr"] = torch.cat(wide)
    return inside, torch.cat(after)


def _bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name."""
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
