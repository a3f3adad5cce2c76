"""The CIFAR-10 tasks: the packed data where it is there, the official sources with a server that is a folder."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from autocompress.errors import TaskError
from autocompress.tasks import Task, load_task

TASKS = Path(__file__).resolve().parents[1] / "experiments" / "tasks"


def task_named(name: str) -> Task:
    return load_task(TASKS / f"{name}.py")


@pytest.fixture
def cifar() -> ModuleType:
    """The loader module, as the tasks import it."""
    task_named("resnet20_cifar10")
    return sys.modules["cifar"]


def joined(batches: Iterator[Any] | list[Any]) -> torch.Tensor:
    return torch.cat(list(batches))


# ---------------------------------------------------------------------------------------------------------- packed data


@pytest.mark.data
@pytest.mark.usefixtures("data_folder")
class TestPacked:
    def test_the_test_images_decode_to_the_published_ones(self, cifar: ModuleType) -> None:
        images, labels = cifar.test_images()
        assert (images.shape, images.dtype, labels.shape) == ((10_000, 32, 32, 3), np.uint8, (10_000,))
        assert labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]  # cat, ship, ship, airplane, frog, ...
        assert np.bincount(labels).tolist() == [1_000] * 10
        assert images[0, 0, 0].tolist() == [158, 112, 49]

    def test_a_shard_is_interleaved_by_class_and_has_the_known_means(self, cifar: ModuleType) -> None:
        images, labels = cifar.shard(0)
        assert images.shape == (10_000, 32, 32, 3)
        assert (labels == np.arange(10_000) % 10).all()
        # The means of all 50,000, times 255, are 125.3, 123.0, 113.9.
        assert np.abs(images.mean(axis=(0, 1, 2)) - [125.3, 123.0, 113.9]).max() < 1.0

    def test_calibration_is_balanced_unaugmented_and_picked_by_the_seed(self, cifar: ModuleType) -> None:
        task = task_named("resnet20_cifar10")
        batches = task.calibration_batches(seed=1)
        assert [tuple(batch.shape) for batch in batches] == [(128, 3, 32, 32)] * 8
        assert torch.equal(joined(batches), joined(task.calibration_batches(seed=1)))
        assert not torch.equal(joined(batches), joined(task.calibration_batches(seed=2)))
        images, labels = cifar.shard(0)
        rows = {image.tobytes(): row for row, image in enumerate(cifar.Cifar10().inputs(images).numpy())}
        found = [rows[image.numpy().tobytes()] for image in joined(batches)]
        assert max(found) < 8_000  # the rows from there on are for score()
        assert len(set(found)) == 1_024
        assert set(np.bincount(labels[found]).tolist()) == {102, 103}

    @pytest.mark.parametrize(
        ("name", "parameters", "top1"),
        [
            ("resnet20_cifar10", 269_722, 91.5),
            ("resnet32_cifar10", 464_154, 92.8),
            ("resnet56_cifar10", 853_018, 92.6),
            ("resnet8_mlperftiny", 78_186, 88.1),
        ],
    )
    def test_the_networks_score_as_they_should_on_the_first_thousand_test_images(
        self, cifar: ModuleType, name: str, parameters: int, top1: float
    ) -> None:
        model = task_named(name).build_model()
        data = sys.modules[type(model).__module__]
        assert data is cifar
        assert sum(p.numel() for p in model.parameters()) == parameters
        raw = name == "resnet8_mlperftiny"
        inputs = cifar.Cifar10(1.0, (0.0,) * 3, (1.0,) * 3) if raw else cifar.Cifar10()
        images, labels = cifar.test_images()
        # One image more or less: another processor may sum in another order.
        assert inputs.top1(model, images[:1_000], labels[:1_000]) == pytest.approx(top1, abs=0.11)

    def test_score_and_loss_and_training(self) -> None:
        task = task_named("resnet8_mlperftiny")
        assert task.score is not None
        assert task.loss is not None
        assert task.example_input is not None
        model = task.build_model()
        assert task.score(model) == pytest.approx(92.5, abs=0.11)
        images, labels = next(task.training_batches(seed=0))
        assert (images.shape, labels.shape, labels.dtype) == ((128, 3, 32, 32), (128,), torch.int64)
        assert 0 <= float(images.min()) <= float(images.max()) == 255
        assert 0 < float(task.loss(model, [images, labels]).detach()) < 1
        assert model(task.example_input()).shape == (1, 10)
        assert torch.equal(next(task.training_batches(seed=0))[0], images)


# --------------------------------------------------------------------------------------------------- without the folder


@pytest.fixture
def nothing(cifar: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No packed data, an empty cache; downloads come from a folder, which is returned."""
    server = tmp_path / "server"
    server.mkdir()
    monkeypatch.delenv("AUTOCOMPRESS_DATA", raising=False)
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cifar, "CIFAR_URL", (server / "cifar-10-python.tar.gz").as_uri())
    monkeypatch.setattr(cifar, "WEIGHTS_URL", server.as_uri() + "/{name}")
    caches = (cifar.shard, cifar.test_images, cifar._official_training)
    for cache in caches:
        cache.cache_clear()
    yield server
    for cache in caches:
        cache.cache_clear()


def python2_batch(pixels: bytes, labels: list[int]) -> bytes:
    """A batch as Python 2's numpy pickled it: byte strings throughout, `numpy.core`."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R(K\x01"
    array += (
        b"M"
        + struct.pack("<H", len(labels))
        + b"M\x00\x0c\x86"
        + dtype
        + b"\x89T"
        + struct.pack("<i", len(pixels))
        + pixels
        + b"tb"
    )
    items = text(b"data") + array + text(b"labels") + b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + items + b"u."


def put_archive(cifar: ModuleType, monkeypatch: pytest.MonkeyPatch, server: Path, batches: dict[str, bytes]) -> None:
    path = server / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in batches.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(cifar, "CIFAR_MD5", hashlib.md5(path.read_bytes()).hexdigest())


def test_augmentation_shifts_by_up_to_four_pixels_and_mirrors_half(cifar: ModuleType) -> None:
    x = torch.rand(64, 3, 32, 32) + 1
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    out = cifar._crop_and_flip(x, np.random.default_rng(0))
    found = []
    for image, source in zip(out, padded, strict=True):
        ways = [(top, left, flip) for top in range(9) for left in range(9) for flip in (False, True)]
        cuts = {way: source[:, way[0] : way[0] + 32, way[1] : way[1] + 32] for way in ways}
        found += [way for way in ways if torch.equal(cuts[way].flip(2) if way[2] else cuts[way], image)]
    assert len(found) == 64
    assert 16 < sum(flip for _, _, flip in found) < 48
    assert {top for top, _, _ in found} == {left for _, left, _ in found} == set(range(9))


def test_the_official_archive_is_downloaded_once_and_read(
    cifar: ModuleType, monkeypatch: pytest.MonkeyPatch, nothing: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    labels = [9 - index % 10 for index in range(20)]
    batch = python2_batch(pixels.tobytes(), labels)
    names = ["test_batch", *(f"data_batch_{index}" for index in range(1, 6))]
    put_archive(cifar, monkeypatch, nothing, dict.fromkeys(names, batch))
    images, read = cifar.test_images()
    assert read.tolist() == labels
    assert (images == pixels.transpose(0, 2, 3, 1)).all()
    (nothing / "cifar-10-python.tar.gz").unlink()
    images, read = cifar.shard(0)
    assert read.tolist() == [index % 10 for index in range(100)]
    assert (images[0] == pixels[9].transpose(1, 2, 0)).all()


def test_a_download_with_another_checksum_is_refused_and_not_kept(
    cifar: ModuleType, nothing: Path, tmp_path: Path
) -> None:
    (nothing / "cifar-10-python.tar.gz").write_bytes(b"not the archive")
    with pytest.raises(
        TaskError, match=r"has md5 [0-9a-f]{32}, needed c58f30108f718f92721af3b95e74349a; try again, or set"
    ):
        cifar.test_images()
    assert os.listdir(tmp_path / "cache" / "downloads") == []


def test_an_archive_that_wants_code_run_is_refused(
    cifar: ModuleType, monkeypatch: pytest.MonkeyPatch, nothing: Path
) -> None:
    put_archive(cifar, monkeypatch, nothing, {"test_batch": b"cos\nsystem\n(S'true'\ntR."})
    with pytest.raises(TaskError, match=r"asks for os.system; only arrays are read"):
        cifar.test_images()


def test_no_folder_and_no_network_is_one_clear_line(nothing: Path) -> None:
    task = task_named("resnet20_cifar10")
    with pytest.raises(
        TaskError, match=r"^cannot download .*tar.gz .*; set AUTOCOMPRESS_DATA to a folder that holds cifar10_test"
    ):
        task.calibration_batches()
    with pytest.raises(
        TaskError, match=r"^cannot download .*resnet20-12fca82f.th .* holds cifar10_resnet20.safetensors$"
    ):
        task.build_model()
    with pytest.raises(TaskError, match=r"^set AUTOCOMPRESS_DATA to a folder that holds cifar10_resnet8_mlperftiny"):
        task_named("resnet8_mlperftiny").build_model()


def test_the_official_weights_lose_their_prefix(
    cifar: ModuleType, monkeypatch: pytest.MonkeyPatch, nothing: Path
) -> None:
    network = cifar.ResNet(20)
    content = io.BytesIO()
    torch.save({"state_dict": {f"module.{key}": value for key, value in network.state_dict().items()}}, content)
    name = f"resnet20-{hashlib.sha256(content.getvalue()).hexdigest()[:8]}.th"
    (nothing / name).write_bytes(content.getvalue())
    monkeypatch.setitem(cifar.WEIGHTS_FILE, 20, name)
    loaded = task_named("resnet20_cifar10").build_model()
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_damaged_files_in_the_folder_are_named(
    cifar: ModuleType, monkeypatch: pytest.MonkeyPatch, nothing: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_DATA", str(tmp_path))
    task = task_named("resnet20_cifar10")
    for name in ("cifar10_train_0.npz", "cifar10_resnet20.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(TaskError, match=r"cifar10_train_0.npz is not a packed CIFAR-10 file"):
        task.calibration_batches()
    with pytest.raises(TaskError, match=r"cifar10_resnet20.safetensors is not a readable safetensors file"):
        task.build_model()
    save_file({"conv2.weight": torch.zeros(1)}, tmp_path / "cifar10_resnet20.safetensors")
    with pytest.raises(TaskError, match=r"do not fit ResNet: lacking \['conv1.weight'.*unexpected \['conv2.weight'\]"):
        task.build_model()
