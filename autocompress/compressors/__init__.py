"""Compressors: each turns (layer, statistics) into options with an error and exact bytes."""

from __future__ import annotations

import numpy as np

from autocompress.compressors.base import Compressor, LayerProblem, Measured, Realised, measure
from autocompress.compressors.obc import ObcUniform
from autocompress.compressors.plain import Plain
from autocompress.compressors.rd import RateDistortion, default_grid
from autocompress.compressors.tcq import TrellisCoded, trellis_grid
from autocompress.errors import OptionError
from autocompress.threads import single_threaded
from autocompress.types import DENSE, Option

__all__ = [
    "COMPRESSORS",
    "Compressor",
    "LayerProblem",
    "Measured",
    "Realised",
    "compressor_of",
    "default_options",
    "profile_layer",
    "realise",
]

COMPRESSORS: dict[str, Compressor] = {
    "plain": Plain(),
    "obc": ObcUniform(),
    "rd": RateDistortion(),
    "tcq": TrellisCoded(),
}


def compressor_of(option: Option) -> tuple[str, Compressor]:
    """The compressor that realises an option. Raises OptionError, naming the option, if none does."""
    for name, compressor in COMPRESSORS.items():
        if compressor.offers(option):
            return name, compressor
    raise OptionError(
        f"no compressor realises {str(option)!r}; there are {', '.join(COMPRESSORS)} "
        "(dense, fp16, s75w4, rd(0.25,0.1)s60, tcq(0.34,0.4))"
    )


def default_options() -> list[Option]:
    """What a profile offers every layer unless told otherwise."""
    return [DENSE, Option(half=True), *(Option(bits=b) for b in range(2, 9)), *default_grid(), *trellis_grid()]


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
    with single_threaded():
        found = compressor_of(option)[1].realise_all(problem, [option])[0]
    if found is None:
        raise OptionError(f"layer {problem.name!r} cannot have option {str(option)!r}")
    return found
