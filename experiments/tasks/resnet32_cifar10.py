"""ResNet-32 on CIFAR-10, with the published weights of akamaster/pytorch_resnet_cifar10."""

from torch import nn

from cifar import Cifar10, resnet

data = Cifar10()
calibration, training, loss = data.calibration, data.training, data.loss
evaluate, score, example_input = data.evaluate, data.score, data.example_input


def model() -> nn.Module:
    return resnet(32)
