"""What the weight of a module multiplies, as a matrix, times its transpose: the products that Hessians are sums of."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from autocompress.layers import TRANSPOSED
from autocompress.obs import blas
from autocompress.threads import default_workers

__all__ = ["input_products", "positions_in_flight"]

IN_FLIGHT = 1 << 22  # entries of the unfolded input per core held at a time (16 MiB of float32), unless that is
FEW_COLUMNS = 256  # with fewer, a quarter of that: the product is so fast that reading back what was unfolded counts
POSITIONS = 4096  # fewer positions than these or d: summing d x d products in float64 would take longer than they do
PANEL = 256  # rows of a panel where symmetric matrices are worked on in panels
LEAST_CHANNELS = 16  # with fewer, products of channels by channels are too small for BLAS, and unfolding is faster


def input_products(module: nn.Module | None, x: torch.Tensor, output: Any = None) -> torch.Tensor:
    """X Xᵀ of what a module's weight multiplies in one call, float64 (groups, d, d), or float32 where that is exact.

    X (d, positions) holds the input as a convolution unfolds it, columns in the order of the weight (input channel,
    then kernel position), or as it is for a linear module (None: the same, of any input's last dimension). `output` is
    needed for transposed convolutions. Products are float32, of `positions_in_flight` positions or of one sample each,
    and summed in float64; that of a linear module with no more positions is handed out as it is, in half the memory.
    """
    if module is None or isinstance(module, nn.Linear):
        rows = x.reshape(-1, x.shape[-1]).float()
        d = rows.shape[1]
        products = _products(rows.split(positions_in_flight(d, d)), lambda chunk: [chunk.t()])
        if len(rows) <= positions_in_flight(d, d):
            return _mirror(next(products))
        gram = torch.zeros(1, d, d, dtype=torch.float64, device=x.device)
        for product in products:
            gram += product
        return _mirror(gram)
    m: Any = module
    dims = len(m.kernel_size)
    x = x.float() if x.ndim == dims + 2 else x.float()[None]
    transposed = isinstance(module, TRANSPOSED)
    if transposed:
        x, m = _stuffed(m, x, output.shape[-dims:])
    elif _correlates(m, x):
        return _by_correlation(m, x)
    else:
        x = _pad(m, x)
        if m.groups == 1 and {*m.kernel_size, *m.stride} == {1} and x.device.type == "cpu":
            return _of_pixels(x)
    groups, d = m.groups, x.shape[1] // m.groups * int(np.prod(m.kernel_size))
    spatial = [(x.shape[2 + i] - m.dilation[i] * (m.kernel_size[i] - 1) - 1) // m.stride[i] + 1 for i in range(dims)]
    gram = torch.zeros(groups, d, d, dtype=torch.float64, device=x.device)
    chunks = _split(x, positions_in_flight(d, d * groups) // max(1, int(np.prod(spatial))))
    for product in _products(chunks, lambda chunk: _windows(m, chunk, spatial)):
        gram += product
    gram = _mirror(gram)
    if transposed:  # the kernel is applied the other way round
        taps = [-1, *m.kernel_size]
        axes = [*range(2, dims + 2), *range(dims + 3, 2 * dims + 3)]
        gram = gram.reshape(groups, d // int(np.prod(m.kernel_size)), *taps[1:], *taps).flip(axes)
        gram = gram.reshape(groups, d, d)
    return gram


def _of_pixels(x: torch.Tensor) -> torch.Tensor:
    """X Xᵀ, float64 (1, d, d), of a convolution that reads every pixel by itself: samples are what X is made of, and
    are multiplied where they lie.
    """
    d, pixels = x.shape[1], int(np.prod(x.shape[2:]))
    chunks = _split(x.contiguous().reshape(len(x), d, pixels), max(IN_FLIGHT // d, POSITIONS) // max(1, pixels))

    def product(chunk: torch.Tensor) -> torch.Tensor:
        found = np.zeros((d, d), np.float32)
        for sample in chunk.numpy():
            blas.gram(blas.SYRK, sample, found, True, 1.0)
        return torch.from_numpy(found)[None]

    gram = torch.zeros(1, d, d, dtype=torch.float64)
    for part in _in_order(product, chunks):
        gram += part
    return _mirror(gram)


def _correlates(m: Any, x: torch.Tensor) -> bool:
    """Whether `_by_correlation` does it, and is the faster: it needs channels enough for its products."""
    return (
        len(m.kernel_size) == 2
        and m.groups == 1
        and all(k in (1, 3) for k in m.kernel_size)
        and max(m.kernel_size) == 3
        and set(m.stride) == set(m.dilation) == {1}
        and m.padding_mode == "zeros"
        and m.padding in ("same", tuple(k // 2 for k in m.kernel_size))
        and x.shape[1] >= LEAST_CHANNELS
    )


def _by_correlation(m: Any, x: torch.Tensor) -> torch.Tensor:
    """X Xᵀ, float64 (1, d, d), of a convolution of stride 1 whose zero padding keeps the size, without unfolding.

    The block of kernel positions o and o' is Σ_u x[u] x[u + o' - o]ᵀ over the pixels u that o meets. Over all pixels
    that depends on o' - o alone: 13 products of channels by channels for a 3x3 kernel instead of the 45 blocks on and
    above the diagonal. What o does not meet, a row and a column at the border, is then subtracted.
    """
    kh, kw = m.kernel_size
    c, h, w = x.shape[1:]
    d = c * kh * kw
    whole = torch.zeros(kh, 2 * kw - 1, c, c, dtype=torch.float64, device=x.device)
    chunks = x.split(max(1, positions_in_flight(d, d) // (h * w)))
    for product in _in_order(lambda chunk: _correlations(chunk, kh, kw), chunks):
        whole += product
    border: dict[tuple[int, ...], torch.Tensor] = {}

    def over(rows: range, columns: range, dy: int, dx: int) -> torch.Tensor:
        key = (rows.start, rows.stop, columns.start, columns.stop, dy, dx)
        if key not in border:
            here = x[:, :, rows.start : rows.stop, columns.start : columns.stop]
            there = x[:, :, rows.start + dy : rows.stop + dy, columns.start + dx : columns.stop + dx]
            left, right = (part.transpose(0, 1).reshape(c, -1) for part in (here, there))
            border[key] = (left @ right.t()).double()
        return border[key]

    gram = torch.empty(c, kh, kw, c, kh, kw, dtype=torch.float64, device=x.device)
    offsets = list(itertools.product(range(kh), range(kw)))
    for first, (y, a) in enumerate(offsets):
        for z, b in offsets[first:]:
            dy, dx = z - y, b - a
            # Of pixels whose neighbour at (dy, dx) is one too: all rows, and those that the kernel row y does not meet.
            inside = range(max(0, -dy), h - max(0, dy)), range(max(0, -dx), w - max(0, dx))
            missed = _missed(y, kh, inside[0], h), _missed(a, kw, inside[1], w)
            block = whole[dy, dx + kw - 1].clone()
            if missed[0] == inside[0] or missed[1] == inside[1]:
                block.zero_()  # no pixel is met: a difference of sums would leave their rounding, and no dead input
                missed = range(0), range(0)
            for rows, columns, sign in ((missed[0], inside[1], -1), (inside[0], missed[1], -1), (*missed, 1)):
                if rows and columns:
                    block.add_(over(rows, columns, dy, dx), alpha=sign)
            gram[:, y, a, :, z, b] = block
            gram[:, z, b, :, y, a] = block.t()
    return gram.reshape(1, d, d)


def _missed(tap: int, kernel: int, inside: range, size: int) -> range:
    """Those of the rows `inside` that kernel row `tap` never lies on: at the far border for the first taps, at the near
    one for the last.
    """
    middle = kernel // 2
    missed = range(0, tap - middle) if tap > middle else range(size - (middle - tap), size)
    return range(max(missed.start, inside.start), min(missed.stop, inside.stop))


def _correlations(x: torch.Tensor, kh: int, kw: int) -> torch.Tensor:
    """Σ_u x[u] x[u + (dy, dx)]ᵀ over samples and pixels, zero outside: float32 (kh, 2 kw - 1, c, c), dy from 0 to
    kh - 1 and dx from 1 - kw to kw - 1; those of negative dy are the transposes of their opposites.
    """
    n, c, h, w = x.shape
    # Rows and samples end in as many zeros as the kernel reaches, so that in the flat array a step never meets another.
    line = w + kw - 1
    length, reach = n * (h + kh - 1) * line, kw - 1
    flat = x.new_zeros(c, length + 2 * reach + (kh - 1) * line)
    flat[:, reach : reach + length].view(c, n, h + kh - 1, line)[:, :, :h, :w] = x.transpose(0, 1)
    shifted = torch.stack([flat[:, i : i + length + (kh - 1) * line] for i in range(2 * kw - 1)])
    shifted = shifted.view((2 * kw - 1) * c, -1)
    here = flat[:, reach : reach + length]
    found = x.new_empty(kh, c, (2 * kw - 1) * c)
    for dy in range(kh):
        torch.mm(here, shifted[:, dy * line : dy * line + length].t(), out=found[dy])
    return found.view(kh, c, 2 * kw - 1, c).transpose(1, 2)


def _stuffed(m: Any, x: torch.Tensor, spatial: Sequence[int]) -> tuple[torch.Tensor, Any]:
    """The input and the geometry of the plain convolution, its kernel reversed, that a transposed one is.

    Between inputs stand stride - 1 zeros; before them dilation (kernel - 1) - padding, after them what the output's
    size asks for. Exact whatever overlaps, but for stride s most of what is multiplied is zeros.
    """
    dims = len(m.kernel_size)
    size = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], m.stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *size)
    wide[(slice(None), slice(None), *(slice(None, None, s) for s in m.stride))] = x
    sides: list[int] = []
    for i in reversed(range(dims)):  # F.pad wants the last dimension first, and cuts off what is negative
        reach = m.dilation[i] * (m.kernel_size[i] - 1)
        before = reach - m.padding[i]
        sides += [before, spatial[i] + reach - before - size[i]]
    plain = SimpleNamespace(kernel_size=m.kernel_size, stride=(1,) * dims, dilation=m.dilation, groups=m.groups)
    return F.pad(wide, sides), plain


def positions_in_flight(d: int, entries: int) -> int:
    """Positions unfolded at a time by each core, for groups of d columns and so many entries per position."""
    return max(1, (IN_FLIGHT if d >= FEW_COLUMNS else IN_FLIGHT // 4) // entries, min(POSITIONS, d))


def _windows(m: Any, x: torch.Tensor, spatial: list[int]) -> torch.Tensor:
    """Unfolded input (groups, in/groups · kernel, samples · positions), columns in the order of the weight: in, then
    kernel.
    """
    dims = len(m.kernel_size)
    x = x.contiguous()
    n, c = x.shape[:2]
    s = x.stride()
    size = (c, *m.kernel_size, n, *spatial)
    stride = (
        s[1],
        *(s[2 + i] * m.dilation[i] for i in range(dims)),
        s[0],
        *(s[2 + i] * m.stride[i] for i in range(dims)),
    )
    return x.as_strided(size, stride).reshape(m.groups, c // m.groups * int(np.prod(m.kernel_size)), -1)


def _pad(m: Any, x: torch.Tensor) -> torch.Tensor:
    """The input padded as the module pads it before its convolution."""
    if m.padding == "valid":
        return x
    sides: list[int] = []
    for i in reversed(range(len(m.kernel_size))):  # F.pad wants the last dimension first
        if m.padding == "same":
            total = m.dilation[i] * (m.kernel_size[i] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [m.padding[i], m.padding[i]]
    if not any(sides):
        return x
    return F.pad(x, sides) if m.padding_mode == "zeros" else F.pad(x, sides, mode=m.padding_mode)


def _split(x: torch.Tensor, most: int) -> Sequence[torch.Tensor]:
    """Samples in chunks of at most so many, and at least one, as even as they can be: cores wait for the longest."""
    chunks = -(-len(x) // max(1, most))
    return x.split(max(1, -(-len(x) // max(1, chunks))))


def _products(
    chunks: Sequence[torch.Tensor], unfold: Callable[[torch.Tensor], Iterable[torch.Tensor]]
) -> Iterator[torch.Tensor]:
    """Per chunk, in order, X Xᵀ on and above the diagonal for each group, X (d, positions) = unfold(chunk)[group].

    On the CPU one thread per core works on a chunk of its own, with BLAS on one thread; the sums keep their order.
    """

    def product(chunk: torch.Tensor) -> torch.Tensor:
        products = [_upper_product(X) for X in unfold(chunk)]
        return torch.stack(products) if len(products) > 1 else products[0][None]

    return _in_order(product, chunks)


def _in_order(
    product: Callable[[torch.Tensor], torch.Tensor], chunks: Sequence[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """product(chunk) of each chunk, in order; on the CPU a thread per core works on a chunk of its own."""
    if chunks[0].device.type != "cpu" or len(chunks) == 1:
        yield from map(product, chunks)
        return
    workers = default_workers()
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(chunks), workers):
            yield from pool.map(product, chunks[start : start + workers])


def _upper_product(X: torch.Tensor) -> torch.Tensor:
    """X Xᵀ on and above the diagonal, float32 (d, d): half the multiplications of the full product."""
    if X.device.type == "cpu":
        array, found = X.numpy(), np.zeros((X.shape[0], X.shape[0]), np.float32)
        by_columns = array.flags.f_contiguous and not array.flags.c_contiguous
        blas.gram(blas.SYRK, np.ascontiguousarray(array.T if by_columns else array), found, not by_columns, 0.0)
        return torch.from_numpy(found)
    d = X.shape[0]
    product = X.new_zeros(d, d)
    panels = max(1, -(-d // PANEL))
    edges = [d * i // panels for i in range(panels + 1)]
    for a, b in itertools.pairwise(edges):
        product[a:b, a:] = X[a:b] @ X[a:].t()
    return product


def _mirror(gram: torch.Tensor) -> torch.Tensor:
    """Symmetric (groups, d, d) from sums of upper halves, in place: the lower half is written panel by panel."""
    for start in range(0, gram.shape[1], PANEL):
        stop = start + PANEL
        square = gram[:, start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).transpose(1, 2))
        gram[:, stop:, start:stop] = gram[:, start:stop, stop:].transpose(1, 2)
    return gram
