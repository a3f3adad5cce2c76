"""The batched torch path against the compiled one and the reference, on the CPU and on a GPU where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autocompress import obs

from . import reference
from .test_engine import KINDS, make_layer

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_order_and_losses(kind: str, device: str) -> None:
    W, H = make_layer(kind, rows=4, d=150, seed=41)
    order, losses = obs.prune_trace(torch.tensor(W, device=device), torch.tensor(H, device=device), backend="torch")
    assert (order.dtype, losses.dtype, order.device.type) == (torch.int32, torch.float64, device)
    tolerance = max(1e-4, 10 * 6e-8 * float(np.linalg.cond(H)))
    replay = reference.replay_order(W, H, order.cpu().numpy())
    assert replay.excess.max() <= 2 * tolerance
    np.testing.assert_allclose(losses.cpu().numpy(), replay.losses, rtol=tolerance)
    compiled = obs.prune_trace(W, H)
    same = np.logical_and.accumulate(order.cpu().numpy() == compiled[0], axis=1)
    np.testing.assert_allclose(losses.cpu().numpy()[same], compiled[1][same], rtol=tolerance)
    if kind in ("white", "correlated", "log-normal"):
        assert same.all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lost", [0, 40])
def test_greedy_codes_equal_those_of_the_compiled_path(lost: int, device: str) -> None:
    W, H = make_layer("correlated", rows=6, d=130, seed=42)
    step = obs.search_scale(W, 3)
    trace, _ = obs.prune_trace(W, H)
    counts = np.array([lost, 0, lost // 2, lost, 1, 0])
    codes = obs.obq(torch.tensor(W, device=device), H, step, -4, 3, trace, counts, backend="torch")
    np.testing.assert_array_equal(codes.cpu().numpy(), obs.obq(W, H, step, -4, 3, trace, counts))


def test_groups_and_batches_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from autocompress.obs import batched

    parts = [make_layer("white", rows=5, d=70, seed=s) for s in (43, 44)]
    W, H = (torch.tensor(np.stack(x)) for x in zip(*parts, strict=True))
    order, losses = obs.prune_trace(W, H, backend="torch")
    monkeypatch.setattr(batched, "ENTRIES", 2 * 70**2)
    again = obs.prune_trace(W * 1e20, H * 1e-20, backend="torch")
    assert torch.equal(again[0], order)
    torch.testing.assert_close(again[1], losses * 1e20, rtol=1e-4, atol=0.0)
    for g, (w, h) in enumerate(parts):
        np.testing.assert_array_equal(order[g].numpy(), obs.prune_trace(w, h)[0])


def test_tensors_on_the_cpu_take_the_compiled_path_unless_told_otherwise() -> None:
    W, H = make_layer("white", rows=2, d=20, seed=45)
    order, _ = obs.prune_trace(torch.tensor(W), torch.tensor(H))
    assert isinstance(order, np.ndarray)


def test_refusals() -> None:
    W, H = (torch.tensor(x) for x in make_layer("white", rows=2, d=4, seed=46))
    with pytest.raises(ValueError, match="backend is 'cuda', needed numba or torch"):
        obs.prune_trace(W, H, backend="cuda")
    with pytest.raises(ValueError, match=r"weight has shape \(2, 3\) and Hessian \(4, 4\)"):
        obs.prune_trace(W[:, :3], H, backend="torch")
    with pytest.raises(ValueError, match="weight has values that are not finite"):
        obs.prune_trace(W * torch.inf, H, backend="torch")
    with pytest.raises(ValueError, match="not positive definite; add damping"):
        obs.prune_trace(W, H - 3, backend="torch")
