"""The compiled search for a grid against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from autocompress.obs.rounding import rounding_errors


@pytest.mark.parametrize("exponent", [1.0, 2.0, 2.4, 3.7])
def test_rounding_errors_equal_numpy(exponent: float) -> None:
    generator = np.random.default_rng(0)
    W = generator.standard_normal((4, 97)) * 10.0 ** generator.uniform(-30, 3, (4, 97))
    W[1] = 0.0
    scales = np.array([0.01, 0.3, 2.0])
    errors = np.empty((4, 3))
    rounding_errors(W, scales, -4, 3, exponent, errors)
    for i, scale in enumerate(scales):
        expected = (np.abs(W - np.clip(np.rint(W / scale), -4, 3) * scale) ** exponent).sum(axis=1)
        np.testing.assert_allclose(errors[:, i], expected, rtol=1e-10, atol=1e-200)
