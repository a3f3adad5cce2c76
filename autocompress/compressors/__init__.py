"""Compressors: each turns (layer, statistics) into options with an error and exact bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np

from autocompress.compressors.base import Compressor, LayerProblem, Measured, Realised, measure
from autocompress.compressors.fp8 import Fp8
from autocompress.compressors.kq import KernelQuantised, kq_grid
from autocompress.compressors.lowrank import LowRank, lowrank_grid
from autocompress.compressors.mixed import MixedRows, mixed_grid
from autocompress.compressors.narrow import Narrow, narrow_grid
from autocompress.compressors.obc import ObcUniform
from autocompress.compressors.plain import Plain
from autocompress.compressors.pq import ProductQuantised, pq_grid
from autocompress.compressors.pruned import Pruned
from autocompress.compressors.rd import RateDistortion, default_grid
from autocompress.compressors.residual import LowRankResidual, residual_grid
from autocompress.compressors.tcq import TrellisCoded, trellis_grid
from autocompress.errors import OptionError
from autocompress.threads import single_threaded
from autocompress.types import DENSE, Option

__all__ = [
    "COMPRESSORS",
    "FAMILIES",
    "Compressor",
    "LayerProblem",
    "Measured",
    "Realised",
    "compressor_of",
    "default_options",
    "measure",
    "named_options",
    "profile_layer",
    "realise",
    "realise_each",
]

COMPRESSORS: dict[str, Compressor] = {
    "plain": Plain(),
    "pruned": Pruned(),
    "obc": ObcUniform(),
    "fp8": Fp8(),
    "rd": RateDistortion(),
    "tcq": TrellisCoded(),
    "lowrank": LowRank(),
    "residual": LowRankResidual(lambda option: compressor_of(option)[1]),
    "mixed": MixedRows(),
    "narrow": Narrow(lambda option: compressor_of(option)[1]),
    "kq": KernelQuantised(),
    "pq": ProductQuantised(),
}


def compressor_of(option: Option) -> tuple[str, Compressor]:
    """The compressor that realises an option. Raises OptionError, naming the option, if none does."""
    for name, compressor in COMPRESSORS.items():
        if compressor.offers(option):
            return name, compressor
    raise OptionError(
        f"no compressor realises {str(option)!r}; there are {', '.join(COMPRESSORS)} "
        "(dense, fp16, s75w4, 2:4w8, rd(0.25,0.1)s60, tcq(0.34,0.4), mix25/0/25/50/0, kq64w6, rank4w6+w2)"
    )


def default_options() -> list[Option]:
    """What a profile offers every layer unless told otherwise."""
    return [DENSE, Option(half=True), *(Option(bits=b) for b in range(2, 9)), *default_grid(), *trellis_grid()]


# What a runtime supports, as lists of names; sparsity goes from a quarter to nine tenths.
_PERCENT = (25, 50, 60, 70, 75, 80, 85, 90)
_WIDTHS = (2, 3, 4, 5, 6, 8)


def _surface() -> list[Option]:
    """Widths of 2 to 8 bits on top of 25 sparsities, 0 to 92 %, each keeping 0.9 of what the one before it keeps (OBC's
    grid, section 6): what rules that set densities need.
    """
    levels = dict.fromkeys(round(100.0 * (1.0 - 0.9**k), 1) for k in range(1, 25))
    return [Option(bits=b) for b in _WIDTHS] + [Option(sparsity=s, bits=b) for s in levels for b in _WIDTHS]


def _lean() -> list[Option]:
    """A fifth of the default options, for networks whose profile would take long: widths, and codes that are not pruned
    first, at steps half an octave apart. Below 2 bits per weight pruned ones are better.
    """
    steps = [round(0.2 * 2 ** (k / 2), 3) for k in range(8)]
    coded = [Option(step=t, lam=lam) for t in steps for lam in (0.1, 0.3)]
    trellis = [Option(step=t, lam=0.4, trellis=True) for t in (round(0.6 * s, 3) for s in steps)]
    return [DENSE, Option(half=True), *(Option(bits=b) for b in (2, 3, 4, 6, 8)), *coded, *trellis]


FAMILIES: dict[str, Callable[[], list[Option]]] = {
    "default": default_options,
    "lean": _lean,
    "fine": lambda: _named(*(f"{c}({s},0.1)" for c in ("rd", "tcq") for s in (0.025, 0.035, 0.05, 0.071, 0.1, 0.141))),
    "int8": lambda: _named("w8", "w8t", "w8a"),
    "int4g128": lambda: _named("w4g128", "w8g128"),
    "int": lambda: _named(*(f"w{b}{s}" for b in range(1, 9) for s in ("", "a", "t", "g32", "g64", "g128"))),
    "surface": _surface,
    "sparse": lambda: _named(*(f"s{p}{v}" for p in _PERCENT for v in ("", "fp16", "w8", "w4"))),
    "nm": lambda: _named(*(f"{p}{v}" for p in ("1:4", "2:4", "4:8") for v in ("", "fp16", "w8", "w4"))),
    "blocks": lambda: _named(*(f"blk{b}@{p}{v}" for b in ("4", "4x4") for p in _PERCENT for v in ("", "fp16", "w8"))),
    "channels": narrow_grid,
    "units": lambda: _named(*(f"{s}{p}{v}" for s in ("ch", "out") for p in _PERCENT for v in ("", "fp16", "w8"))),
    "lowrank": lowrank_grid,
    "residuals": residual_grid,
    "mixed": mixed_grid,
    "codebooks": lambda: [*kq_grid(), *pq_grid()],
    "floats": lambda: _named("fp16", "fp8", "s50fp8", "2:4fp8"),
    # Narrower layers need more than their names: which channels go together.
    "all": lambda: list(dict.fromkeys(o for n, f in FAMILIES.items() if n not in ("channels", "all") for o in f())),
}


def _named(*names: str) -> list[Option]:
    return [Option.parse(name) for name in names]


def named_options(names: Iterable[Option | str]) -> list[Option]:
    """Options from their names, or those of `FAMILIES`; a text may hold several with commas or spaces between them.

    Each is there once. Raises OptionError for a name that is none, or that no compressor realises.
    """
    found: list[Option] = []
    for given in names:
        if isinstance(given, Option):
            found.append(given)
            continue
        for name in re.split(r"[\s,]+(?![^(]*\))", given.strip()):  # not at the comma of rd(0.25,0.1)
            try:
                found += FAMILIES[name]() if name in FAMILIES else [Option.parse(name)]
            except OptionError as error:
                raise OptionError(f"{error}; families of options are {', '.join(FAMILIES)}") from error
    for option in found:
        compressor_of(option)
    return list(dict.fromkeys(found))


def profile_layer(
    problem: LayerProblem, options: list[Option]
) -> tuple[list[Measured], np.ndarray | None, np.ndarray | None, float]:
    """Every option of one layer: (rows in the order of `options`, order, losses, energy), on one thread.

    A layer without a Hessian gets the options that need no data, with an error of 0 that means nothing.
    """
    with single_threaded():
        by_compressor: dict[str, list[Option]] = {}
        for option in options:
            name, compressor = compressor_of(option)
            if problem.hessian is not None or not compressor.needs_data(option):
                by_compressor.setdefault(name, []).append(option)
        rows = {
            m.option: m for name, group in by_compressor.items() for m in measure(COMPRESSORS[name], problem, group)
        }
        energy = problem.energy if problem.hessian is not None else 0.0
        return [rows[o] for o in options if o in rows], problem.order, problem.losses, energy


def realise(problem: LayerProblem, option: Option) -> Realised:
    """The weight of one option, bit for bit what the profile measured. Raises OptionError if there is none."""
    return realise_each(problem, [option])[option]


def realise_each(problem: LayerProblem, options: Iterable[Option]) -> dict[Option, Realised]:
    """The weights of several options, each as `realise` gives it; what they share is computed once."""
    by_compressor: dict[str, list[Option]] = {}
    for option in dict.fromkeys(options):
        by_compressor.setdefault(compressor_of(option)[0], []).append(option)
    found: dict[Option, Realised] = {}
    with single_threaded():
        for name, group in by_compressor.items():
            for option, realised in zip(group, COMPRESSORS[name].realise_all(problem, group), strict=True):
                if realised is None:
                    raise OptionError(f"layer {problem.name!r} cannot have option {str(option)!r}")
                found[option] = realised
    return found
