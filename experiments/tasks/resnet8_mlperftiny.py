"""The MLPerf Tiny image classification network on CIFAR-10, whose inputs are pixels 0..255 as they are."""

from torch import nn

from cifar import Cifar10, resnet8

data = Cifar10(divisor=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
calibration, training, loss = data.calibration, data.training, data.loss
evaluate, score, example_input = data.evaluate, data.score, data.example_input


def model() -> nn.Module:
    return resnet8()
