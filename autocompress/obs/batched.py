"""Greedy traces in batched torch, many rows at once: what `prune_trace` and `obq` do where the tensors are on a GPU.

The same lazy block updates as in `tracing`, in full symmetric matrices: a batched product has no half.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["greedy"]

BLOCK = 64  # pivots between two trailing updates
ENTRIES = 1 << 29  # of the inverse Hessians that are held at a time: 2 GiB in float32
REFRESH = 6  # the state of a row is computed afresh once d / REFRESH columns are left


@torch.no_grad()
def greedy(W: Any, H: Any, grid: Any = None, first: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """Order int32, losses float64 and levels int32 of greedy OBS, on the device of W; see `pruning.greedy`.

    Raises ValueError on shapes that do not match, values that are not finite, or H not positive definite.
    """
    W = torch.as_tensor(W)
    H = torch.as_tensor(H, device=W.device)
    weight, hessian = (W[None], H[None]) if W.ndim == 2 and H.ndim == 2 else (W, H)
    if weight.ndim != 3 or hessian.shape != (weight.shape[0], weight.shape[2], weight.shape[2]):
        raise ValueError(
            f"weight has shape {tuple(W.shape)} and Hessian {tuple(H.shape)}; needed (rows, d) and (d, d), or both "
            "with groups"
        )
    for name, values in (("weight", weight), ("Hessian", hessian)):
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"the {name} has values that are not finite")
    groups, rows, d = weight.shape
    leading = (groups, rows)
    zeros = torch.zeros(leading, dtype=torch.float64, device=W.device)

    def given(value: Any, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(value, device=W.device).to(dtype).reshape(groups, rows, -1).squeeze(-1)

    step, low, high = (given(x, torch.float64) for x in grid) if grid is not None else (zeros, zeros, zeros)
    sequence = torch.as_tensor(first[0], device=W.device).long().reshape(weight.shape) if first is not None else None
    counts = given(first[1], torch.int64) if first is not None else zeros.long()
    parts = []
    for g in range(groups):
        scale = hessian[g].double().diagonal().mean()
        h = hessian[g].double() / scale
        factor, info = torch.linalg.cholesky_ex(h)
        if int(info) != 0 or not bool(scale > 0):
            raise ValueError("the Hessian is not positive definite; add damping (calibrate does)")
        inverse = torch.cholesky_inverse(factor).float()
        peak = weight[g].double().abs().amax(dim=1, keepdim=True)
        row_scale = torch.where(peak > 0, torch.ldexp(torch.ones_like(peak), torch.frexp(peak)[1]), 1.0)
        for top in range(0, rows, max(1, ENTRIES // d**2)):
            part = slice(top, top + max(1, ENTRIES // d**2))
            unit = row_scale[part]
            order, losses, levels = _rows(
                (weight[g, part].double() / unit).float(),
                h,
                inverse,
                (step[g, part, None] / unit).float(),
                low[g, part, None].float(),
                high[g, part, None].float(),
                None if sequence is None else sequence[g, part],
                counts[g, part],
            )
            parts.append((order, losses.double() * (unit**2 * scale), levels))
    order, losses, levels = (torch.cat(column).reshape(W.shape) for column in zip(*parts, strict=True))
    return order.int(), losses, levels.int()


def _rows(
    weight: Tensor,
    H: Tensor,
    inverse: Tensor,
    step: Tensor,
    low: Tensor,
    high: Tensor,
    sequence: Tensor | None,
    counts: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Order, losses and levels of rows that share one Hessian; weight (rows, d) float32, H float64."""
    rows, d = weight.shape
    device = weight.device
    row = torch.arange(rows, device=device)
    graded = bool((step > 0).any())
    forced = int(counts.max()) if sequence is not None else 0
    G = inverse.expand(rows, d, d).clone()
    w = weight.clone()
    floor = (1.0 / H.diagonal()).float().expand(rows, d)
    g = torch.maximum(G.diagonal(dim1=1, dim2=2), floor)
    column = torch.arange(d, device=device).expand(rows, d)  # of the layer, of each place that is left
    dead = torch.zeros_like(w)  # 0 alive, inf finished
    order = torch.empty(rows, d, dtype=torch.int64, device=device)
    losses, levels = torch.empty_like(w), torch.zeros_like(w)
    delta = torch.zeros(rows, d, dtype=torch.float64, device=device)
    rest = -(-d // REFRESH) if d > 1 else 0
    U = torch.empty(rows, BLOCK, d, device=device)
    k, fresh = 0, False
    for t in range(d):
        level = ((w / step).round().clamp(low, high)) if graded else torch.zeros_like(w)
        away = (w - level * step) ** 2
        score = away / g + dead
        p = score.argmin(dim=1)
        if graded:
            far = torch.where(dead == 0, away, -1.0)
            outlier = (far.amax(dim=1) > 0.25 * step[:, 0] ** 2) & (w[row, p] != 0)
            p = torch.where(outlier, far.argmax(dim=1), p)
        if t < forced:
            assert sequence is not None
            wanted = (column == sequence[:, t, None]).int().argmax(dim=1)
            p = torch.where(t < counts, wanted, p)
            level = torch.where((t < counts)[:, None], 0.0, level)
        at, root = column[row, p], g[row, p].sqrt()
        code = level[row, p]
        pivot = (w[row, p] - code * step[:, 0]) / root
        order[:, t], losses[:, t] = at, 0.5 * pivot**2
        levels[row, at] = code
        delta[row, at] = (code * step[:, 0]).double() - weight[row, at].double()
        u = G[row, p]
        if k:
            u = u - torch.bmm(U[row, :k, p][:, None], U[:, :k])[:, 0]
        u = u / root[:, None]
        U[:, k] = u
        k += 1
        w = w - u * pivot[:, None]
        g = torch.maximum(g - u**2, floor)
        dead[row, p] = torch.inf
        m = d - 1 - t
        if m == 0:
            break
        refresh = not fresh and m <= rest
        if k < BLOCK and not refresh:
            continue
        if not refresh:
            G.baddbmm_(U.transpose(1, 2), U, alpha=-1.0)
        keep = (dead == 0).nonzero()[:, 1].view(rows, m)
        w, g, floor, column = (x.gather(1, keep) for x in (w, g, floor, column))
        dead = torch.zeros_like(w)
        if refresh:
            fresh = True
            A = torch.cholesky_inverse(torch.linalg.cholesky(H[column[:, :, None], column[:, None, :]]))
            pull = (delta @ H).gather(1, column)
            w = (weight.gather(1, column).double() - (A @ pull[:, :, None])[:, :, 0]).float()
            G = A.float()
            g = torch.maximum(G.diagonal(dim1=1, dim2=2), floor)
        else:
            G = G.gather(1, keep[:, :, None].expand(-1, -1, G.shape[2])).gather(2, keep[:, None].expand(-1, m, -1))
        U = torch.empty(rows, BLOCK, m, device=device)
        k = 0
    return order, losses, levels
