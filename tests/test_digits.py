"""The embedded default: disjoint splits, a network that is the same every time, and a cache that can be trusted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from autocompress import digits
from autocompress.files import cache_dir
from autocompress.tasks import load_task


def cached_file() -> Path:
    (path,) = cache_dir().glob("digits-*.safetensors")
    return path


def test_the_network_is_good_and_small() -> None:
    task = load_task("digits")
    assert task.evaluate is not None
    assert task.score is not None
    model = task.build_model()
    assert 20_000 <= sum(p.numel() for p in model.parameters()) <= 60_000
    assert any(isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) for m in model.modules())
    # 98.25 and 97.67 were measured; another processor sums in another order and may get an image or two less right.
    assert task.evaluate(model) >= 96.5
    assert task.score(model) >= 96.0


def test_no_image_is_in_two_splits() -> None:
    splits = digits._splits()
    assert {name: len(split.labels) for name, split in splits.items()} == {
        "test": 400,
        "validation": 300,
        "train": 1097,
    }
    seen = torch.cat([split.images for split in splits.values()]).flatten(1)
    assert len(torch.unique(seen, dim=0)) == 1797
    for split in splits.values():
        counts = torch.bincount(split.labels, minlength=10).double()
        assert counts.max() - counts.min() <= 0.1 * counts.mean()


def test_calibration_takes_training_images_and_the_seed_picks_them() -> None:
    one, again, two = (torch.cat(digits.calibration(seed)) for seed in (0, 0, 1))
    assert one.shape == (768, 1, 8, 8)
    assert torch.equal(one, again)
    assert not torch.equal(one, two)
    train = {image.numpy().tobytes() for image in digits._splits()["train"].images}
    assert {image.numpy().tobytes() for image in torch.cat([one, two])} <= train


def test_training_is_one_labelled_epoch_and_a_gradient_flows() -> None:
    batches = list(digits.training(seed=1))
    assert sum(len(labels) for _, labels in batches) == 1097
    network = digits.DigitsNet()
    digits.loss(network, batches[0]).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())


def test_measuring_leaves_the_mode_alone() -> None:
    network = digits.DigitsNet().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    digits.evaluate(network)
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of the test's own and one epoch, where the weights need not be good."""
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digits, "EPOCHS", 1)


@pytest.mark.usefixtures("quick")
def test_training_again_gives_the_same_bytes_and_touches_no_global_state() -> None:
    torch.manual_seed(7)
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    digits.model()
    first = cached_file().read_bytes()
    cached_file().unlink()
    digits.model()
    assert cached_file().read_bytes() == first
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit", "other keys", "no checksum"])
def test_a_damaged_cache_is_trained_again(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    digits.model()
    path = cached_file()
    good = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(good[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "one bit":
        path.write_bytes(good[:-100] + bytes([good[-100] ^ 1]) + good[-99:])
    elif damage == "other keys":
        save_file({"weight": torch.zeros(1)}, path)
    else:
        save_file(load_file(path), path)
    digits.model()
    assert path.read_bytes() == good
    assert "training it again" in caplog.text


@pytest.mark.usefixtures("quick")
def test_the_cache_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = digits.model().state_dict()
    monkeypatch.setattr(digits, "_train", lambda network: pytest.fail("trained although cached"))
    assert all(torch.equal(tensor, trained[name]) for name, tensor in digits.model().state_dict().items())


@pytest.mark.usefixtures("quick")
def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "file" / "cache"))
    assert not digits.model().training
    assert "cannot be cached" in caplog.text
    assert os.listdir(tmp_path) == ["file"]
