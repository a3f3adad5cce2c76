"""The same width for every layer, and the same sparsity and width for every layer: what any allocation should beat.

Of those that fit, the least sum of error / layer energy, as `uniform` has it over all options. Needs the curves only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from autocompress.compressors import Measured
from autocompress.errors import MismatchError
from autocompress.profiling import Profile
from autocompress.strategies.densities import sparse_families
from autocompress.strategies.solved import SingleOption
from autocompress.types import Option

__all__ = ["uniform_bits", "uniform_sparsity"]


def _offering(profile: Profile, allowed: Callable[[Measured], bool]) -> Profile:
    """The profile with only those options of the layers that calibration reached; the others keep what they have."""
    layers = {
        name: dataclasses.replace(layer, rows=tuple(r for r in layer.rows if allowed(r))) if layer.reached else layer
        for name, layer in profile.layers.items()
    }
    return dataclasses.replace(profile, layers=layers)


def _integers(profile: Profile) -> Profile:
    offered = _offering(profile, lambda row: row.option.bits is not None and row.option.structure == Option())
    if not all(layer.rows for layer in offered.layers.values()):
        raise MismatchError(
            "strategy 'uniform_bits' needs options such as w4, and not all layers of this profile have one: profile "
            "with --options default,surface"
        )
    return offered


def _sparse(profile: Profile) -> Profile:
    values = {family.value for family in sparse_families(profile, "uniform_sparsity")}
    return _offering(
        profile,
        lambda row: (
            row.option.structure == Option(sparsity=row.option.sparsity)
            and dataclasses.replace(row.option.inner, sparsity=0.0) in values
        ),
    )


# Integers without any structure, w2 ... w8; and pairs of a sparsity, 0 included, and a width that has sparse options
# (`sparse_families`).
uniform_bits = SingleOption("uniform_bits", _integers)
uniform_sparsity = SingleOption("uniform_sparsity", _sparse)
