"""CIFAR-10 and the four networks of `experiments/tasks`: where the files come from and how they are read.

Every file is looked for in the folder that AUTOCOMPRESS_DATA names, in the packed form of that folder's README, and
otherwise downloaded once from its official source into the cache, with its checksum verified.

The parts of the training set, by row of the class-interleaved order (row i has label i % 10):

    rows    0 ..  7999   calibration(seed) samples from these
    rows 8000 ..  9999   score(model)
    rows    0 ..  7999 and 10000 .. 49999   training(seed)

so that all but `training` need one shard of five, decoded in about a second. Test images are for `evaluate` alone.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import io
import os
import pickle
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autocompress.errors import TaskError
from autocompress.files import atomic_path, cache_dir

__all__ = ["Cifar10", "ResNet", "ResNet8", "resnet", "resnet8"]

CALIBRATION_ROWS = 8_000
CALIBRATION_IMAGES = 1_024
SHARD_ROWS = 10_000
BATCH = 128

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR_MD5 = "c58f30108f718f92721af3b95e74349a"
WEIGHTS_URL = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/d5489e8/pretrained_models/{name}"
WEIGHTS_FILE = {20: "resnet20-12fca82f.th", 32: "resnet32-d509ac18.th", 56: "resnet56-4bfd9763.th"}  # sha256 starts so


@dataclass(frozen=True)
class Cifar10:
    """The functions of a task on CIFAR-10, for networks on (RGB / divisor - mean) / std, shape (N, 3, 32, 32)."""

    divisor: float = 255.0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def calibration(self, seed: int = 0) -> list[Tensor]:
        """1,024 training images in batches of 128, unlabelled and unaugmented; the seed picks 102 or 103 of a class."""
        images, labels = shard(0)
        generator = np.random.default_rng(seed)
        # Shuffle within every class, then read across the classes: any prefix is balanced.
        classes = [generator.permutation(np.flatnonzero(labels[:CALIBRATION_ROWS] == label)) for label in range(10)]
        rows = np.stack(classes, axis=1).reshape(-1)[:CALIBRATION_IMAGES]
        return [self.inputs(images[rows[start : start + BATCH]]) for start in range(0, len(rows), BATCH)]

    def training(self, seed: int = 0) -> Iterator[list[Tensor]]:
        """48,000 labelled images once, shard by shard, cropped (padding 4) and flipped at random as in training."""
        generator = np.random.default_rng(seed)
        for index in range(5):
            images, labels = shard(index)
            rows = generator.permutation(CALIBRATION_ROWS if index == 0 else SHARD_ROWS)
            for start in range(0, len(rows), BATCH):
                chosen = rows[start : start + BATCH]
                yield [self.inputs(images[chosen], generator), torch.from_numpy(labels[chosen].astype(np.int64))]

    def evaluate(self, model: nn.Module) -> float:
        """Top-1 in percent on the 10,000 test images."""
        return self.top1(model, *test_images())

    def score(self, model: nn.Module) -> float:
        """Top-1 in percent on 2,000 training images that no calibration sample contains."""
        images, labels = shard(0)
        return self.top1(model, images[CALIBRATION_ROWS:], labels[CALIBRATION_ROWS:])

    def loss(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
        """Mean cross-entropy of one labelled batch."""
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    def example_input(self) -> Tensor:
        """The first training image, (1, 3, 32, 32)."""
        return self.inputs(shard(0)[0][:1])

    def inputs(self, images: np.ndarray, augment: np.random.Generator | None = None) -> Tensor:
        """uint8 (N, 32, 32, 3) to what the network takes, float32 (N, 3, 32, 32)."""
        x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / self.divisor
        x = ((x - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)).contiguous()
        return x if augment is None else _crop_and_flip(x, augment)

    def top1(self, model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
        """Share of right answers in percent; the model is left in the mode that it came in."""
        # ResNet-20 on 2 cores: about twice as fast as batches of 500 in the default layout.
        batch, layout = 125, torch.channels_last
        was_training = model.training
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        model.eval()
        try:
            right = 0
            with torch.inference_mode():
                for start in range(0, len(images), batch):
                    x = self.inputs(images[start : start + batch]).to(device, memory_format=layout)
                    answers = model(x).argmax(1).cpu().numpy()
                    right += int((answers == labels[start : start + batch]).sum())
        finally:
            model.train(was_training)
        return 100.0 * right / len(images)


def _crop_and_flip(x: Tensor, generator: np.random.Generator) -> Tensor:
    """Zero-pad by 4, cut 32x32 at random, mirror half of the images; each image by its own draw."""
    n = len(x)
    rows = torch.from_numpy(generator.integers(0, 9, n))[:, None] + torch.arange(32)
    columns = torch.from_numpy(generator.integers(0, 9, n))[:, None] + torch.arange(32)
    columns = torch.where(torch.from_numpy(generator.random(n) < 0.5)[:, None], columns.flip(1), columns)
    padded = F.pad(x, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    return (
        padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
    )


# --------------------------------------------------------------------------------------------------------------- images


@functools.cache
def shard(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Training rows 10,000 * index and on: images uint8 (10000, 32, 32, 3), labels uint8 (10000,)."""
    packed = _packed(f"cifar10_train_{index}.npz")
    if packed is not None:
        return decode(packed)
    images, labels = _official_training()
    return images[SHARD_ROWS * index : SHARD_ROWS * (index + 1)], labels[SHARD_ROWS * index : SHARD_ROWS * (index + 1)]


@functools.cache
def test_images() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (10000, 32, 32, 3) and labels uint8 (10000,) in the published order."""
    packed = _packed("cifar10_test.npz")
    return decode(packed) if packed is not None else _official_batch("test_batch")


def decode(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one packed file; all arithmetic modulo 256. Raises TaskError if it is damaged."""
    try:
        with np.load(path) as file:
            residual, labels = file["residual"], file["label"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise TaskError(f"{path} is not a packed CIFAR-10 file ({error}); copy it again") from error
    planes = np.cumsum(np.cumsum(residual, axis=3, dtype=np.uint8), axis=2, dtype=np.uint8)  # undo the 2-D differences
    planes[0] += planes[1]  # undo the green subtraction
    planes[2] += planes[1]
    return np.ascontiguousarray(planes.transpose(1, 2, 3, 0)), labels


def _packed(name: str) -> Path | None:
    folder = os.environ.get("AUTOCOMPRESS_DATA")
    path = Path(folder).expanduser() / name if folder else None
    return path if path is not None and path.is_file() else None


@functools.cache
def _official_training() -> tuple[np.ndarray, np.ndarray]:
    """The 50,000 training images, in the published order within each class, the classes interleaved."""
    parts = [_official_batch(f"data_batch_{index}") for index in range(1, 6)]
    images, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    rows = np.stack([np.flatnonzero(labels == label) for label in range(10)], axis=1).reshape(-1)
    return images[rows], labels[rows]


def _official_batch(name: str) -> tuple[np.ndarray, np.ndarray]:
    archive = _download(
        CIFAR_URL, "md5", CIFAR_MD5, needed="cifar10_test.npz and cifar10_train_0.npz ... cifar10_train_4.npz"
    )
    with tarfile.open(archive) as tar:
        member = tar.extractfile(f"cifar-10-batches-py/{name}")
        if member is None:
            raise TaskError(f"{archive} holds no {name}; delete it and run again")
        batch = _ArraysOnly(io.BytesIO(member.read()), encoding="bytes").load()
    pixels = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels), np.array(batch[b"labels"], dtype=np.uint8)


class _ArraysOnly(pickle.Unpickler):
    """Reads a pickle of numpy arrays and plain containers, and refuses to call anything else."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]  # its name before numpy 2
        if module == "numpy" and name in {"ndarray", "dtype"}:
            return getattr(np, name)
        raise TaskError(f"the CIFAR-10 archive asks for {module}.{name}; only arrays are read from it")


def _download(url: str, algorithm: str, checksum: str, needed: str) -> Path:
    """The file at `url`, cached once its checksum starts with `checksum`. Raises TaskError if it cannot be had."""
    from rich.console import Console
    from rich.progress import wrap_file

    path = cache_dir() / "downloads" / url.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    digest = hashlib.new(algorithm)
    way_out = f"set AUTOCOMPRESS_DATA to a folder that holds {needed}"
    try:
        with (
            urllib.request.urlopen(url, timeout=60) as response,
            atomic_path(path) as scratch,
            scratch.open("wb") as out,
        ):
            total = int(response.headers.get("Content-Length", 0))
            console = Console(stderr=True)
            with wrap_file(
                response, total, description=f"Downloading {path.name}", console=console, transient=True
            ) as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
                    out.write(block)
            out.flush()
            if not digest.hexdigest().startswith(checksum):
                got = digest.hexdigest()[: len(checksum)]
                raise TaskError(f"{url} has {algorithm} {got}, needed {checksum}; try again, or {way_out}")
    except (OSError, http.client.HTTPException) as error:  # a URLError is an OSError
        raise TaskError(f"cannot download {url} ({error}); {way_out}") from error
    return path


# ------------------------------------------------------------------------------------------------------------- networks


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A): strided pixels, channels padded with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, self.pad, self.pad)))


class ResNet(nn.Module):
    """The CIFAR ResNet of depth 6n + 2: widths 16, 32, 64 with n blocks each (arXiv 1512.03385, section 4.2)."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
        later = (BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1))
        return nn.Sequential(BasicBlock(inputs, outputs, stride), *later)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean(dim=(2, 3)))


class ResNet8(nn.Module):
    """MLPerf Tiny's image classifier, as Keras built it: convolutions with bias, 'same' padding, eps 1e-3."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.bn0 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16, eps=1e-3)
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16, eps=1e-3)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16, eps=1e-3)
        self.conv3, self.bn3 = nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32, eps=1e-3)
        self.conv4, self.bn4 = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32, eps=1e-3)
        self.conv5 = nn.Conv2d(16, 32, 1, stride=2)
        self.conv6, self.bn5 = nn.Conv2d(32, 64, 3, stride=2), nn.BatchNorm2d(64, eps=1e-3)
        self.conv7, self.bn6 = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64, eps=1e-3)
        self.conv8 = nn.Conv2d(32, 64, 1, stride=2)
        self.dense = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        # TensorFlow pads a strided 'same' convolution at the bottom and the right only.
        x = F.relu(self.conv5(x) + self.bn4(self.conv4(F.relu(self.bn3(self.conv3(F.pad(x, (0, 1, 0, 1))))))))
        x = F.relu(self.conv8(x) + self.bn6(self.conv7(F.relu(self.bn5(self.conv6(F.pad(x, (0, 1, 0, 1))))))))
        return self.dense(x.mean(dim=(2, 3)))


def resnet(depth: int) -> nn.Module:
    """ResNet-20, 32 or 56 with the published weights. Raises TaskError if they cannot be had."""
    packed = _packed(f"cifar10_resnet{depth}.safetensors")
    if packed is not None:
        return _filled(ResNet(depth), _read_weights(packed))
    name = WEIGHTS_FILE[depth]
    checksum = name.removesuffix(".th").rsplit("-", 1)[-1]
    path = _download(WEIGHTS_URL.format(name=name), "sha256", checksum, needed=f"cifar10_resnet{depth}.safetensors")
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    return _filled(ResNet(depth), {key.removeprefix("module."): value for key, value in state.items()})


def resnet8() -> nn.Module:
    """The MLPerf Tiny network with its published weights. Raises TaskError if they are not in AUTOCOMPRESS_DATA."""
    name = "cifar10_resnet8_mlperftiny.safetensors"
    packed = _packed(name)
    if packed is None:
        raise TaskError(
            f"set AUTOCOMPRESS_DATA to a folder that holds {name}; its source, mlcommons/tiny, is a Keras file"
        )
    return _filled(ResNet8(), _read_weights(packed))


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise TaskError(f"{path} is not a readable safetensors file ({error}); copy it again") from error


def _filled(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    missing, unexpected = model.load_state_dict(state, strict=False)
    lacking = [key for key in missing if not key.endswith("num_batches_tracked")]
    if lacking or unexpected:
        raise TaskError(
            f"the weights do not fit {type(model).__name__}: lacking {lacking[:3]}, unexpected {unexpected[:3]}"
        )
    return model.eval()
