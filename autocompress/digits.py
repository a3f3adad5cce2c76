"""The task that needs no download: scikit-learn's 8x8 handwritten digits and a small residual network trained on them.

`load_task("digits")` is this module. The 1,797 images are split once, by class and from a fixed seed: 1,097 to train
and calibrate on, 300 to validate on (`score`), 400 that nothing but `evaluate` ever sees.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from autocompress.files import atomic_path, cache_dir

__all__ = ["DigitsNet", "calibration", "evaluate", "example_input", "loss", "model", "score", "training"]

logger = logging.getLogger(__name__)

RECIPE = 1  # raise it when anything below changes the trained weights
SPLIT_SEED = 0
VALIDATION_IMAGES, TEST_IMAGES = 300, 400
CALIBRATION_IMAGES, BATCH = 768, 128
EPOCHS, PEAK_LEARNING_RATE, WEIGHT_DECAY = 30, 0.2, 5e-4


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))), with a 1x1 convolution as shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class DigitsNet(nn.Module):
    """Images (N, 1, 8, 8) to logits (N, 10): a 3x3 stem, three residual blocks of widths 16, 32, 32, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(ResidualBlock(16, 16, 1), ResidualBlock(16, 32, 2), ResidualBlock(32, 32, 1))
        self.linear = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.linear(x.mean(dim=(2, 3)))


@dataclass(frozen=True)
class Split:
    """Images (N, 1, 8, 8) float32 in 0..1 and their labels (N,) int64."""

    images: Tensor
    labels: Tensor


def model() -> nn.Module:
    """The trained network, from the cache if it is there, else trained now (seconds) and cached."""
    network = _untrained()
    path = cache_dir() / f"digits-recipe{RECIPE}-torch{torch.__version__.split('+')[0]}.safetensors"
    state = _read_cache(path)
    if state is not None:
        network.load_state_dict(state)
        return network.eval()
    logger.info("training the digits network once; it is kept in %s", path)
    _train(network)
    _write_cache(path, network)
    return network.eval()


def calibration(seed: int = 0) -> list[Tensor]:
    """768 of the training images in batches of 128, without labels; the seed picks which."""
    images = _splits()["train"].images
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:CALIBRATION_IMAGES]
    return list(images[chosen].split(BATCH))


def training(seed: int = 0) -> Iterator[list[Tensor]]:
    """One epoch of labelled batches of 64, shuffled by the seed."""
    split = _splits()["train"]
    order = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(seed))
    for rows in order.split(64):
        yield [split.images[rows], split.labels[rows]]


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Mean cross-entropy of one labelled batch."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def evaluate(model: nn.Module) -> float:
    """Top-1 in percent on the 400 test images."""
    return _top1(model, _splits()["test"])


def score(model: nn.Module) -> float:
    """Top-1 in percent on the 300 validation images."""
    return _top1(model, _splits()["validation"])


def example_input() -> Tensor:
    """The first training image, (1, 1, 8, 8)."""
    return _splits()["train"].images[:1].clone()


@functools.cache
def _splits() -> dict[str, Split]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy((data.images / 16.0).astype(np.float32))[:, None]
    labels = torch.from_numpy(data.target.astype(np.int64))
    # Order the shuffled rows by how far through their own class they are: every prefix has the classes in equal parts.
    shuffled = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    progress = np.empty(len(labels))
    for digit in range(10):
        rows = np.flatnonzero(data.target[shuffled] == digit)
        progress[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    dealt = shuffled[np.argsort(progress, kind="stable")]
    cuts = {"test": slice(0, TEST_IMAGES), "validation": slice(TEST_IMAGES, TEST_IMAGES + VALIDATION_IMAGES)}
    cuts["train"] = slice(TEST_IMAGES + VALIDATION_IMAGES, None)
    parts = {name: torch.from_numpy(np.sort(dealt[cut])) for name, cut in cuts.items()}
    return {name: Split(images[part], labels[part]) for name, part in parts.items()}


def _top1(model: nn.Module, split: Split) -> float:
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return 100.0 * (model(split.images).argmax(1) == split.labels).double().mean().item()
    finally:
        model.train(was_training)


def _untrained() -> DigitsNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SPLIT_SEED)
        return DigitsNet()


def _train(network: DigitsNet) -> None:
    """SGD with momentum under a one-cycle rate, on images shifted by up to one pixel.

    One thread: with several, the order of the sums and so the weights would depend on the number of cores.
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    steps = sum(1 for _ in training())
    optimiser = torch.optim.SGD(
        network.parameters(), lr=PEAK_LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, PEAK_LEARNING_RATE, total_steps=EPOCHS * steps, pct_start=0.2
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    network.train()
    try:
        for epoch in range(EPOCHS):
            for images, labels in training(seed=epoch):
                top, left = torch.randint(0, 3, (2,), generator=generator).tolist()
                shifted = F.pad(images, (1, 1, 1, 1))[:, :, top : top + 8, left : left + 8]
                optimiser.zero_grad()
                loss(network, [shifted, labels]).backward()
                optimiser.step()
                schedule.step()
    finally:
        torch.set_num_threads(threads)


def _digest(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read_cache(path: Path) -> dict[str, Tensor] | None:
    """The cached weights, or None if there are none or they are not what was written."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            wanted = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        logger.warning("the cached digits network %s is damaged (%s); training it again", path, error)
        return None
    if wanted != _digest(state):
        logger.warning("the cached digits network %s fails its checksum; training it again", path)
        return None
    return state


def _write_cache(path: Path, network: DigitsNet) -> None:
    state = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    try:
        with atomic_path(path) as scratch:
            save_file(state, scratch, metadata={"sha256": _digest(state)})
    except OSError as error:
        logger.warning("the digits network cannot be cached in %s (%s); the next run trains it again", path, error)
