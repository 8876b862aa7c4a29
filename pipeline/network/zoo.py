"""Networks of the benchmarks that torchvision does not have as they are; a config loads weights into them.

Names of modules are those of OpenOOD's published checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.quickstart.resnet import BasicBlock


class SmallResNet18(nn.Module):
    """ResNet-18 (He et al., CVPR 2016) for 32x32 images: a 3x3 stem of stride 1 and no max-pooling.

    Four stages of two blocks with 64, 128, 256 and 512 channels; the last maps are 4x4.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(BasicBlock(64, 64), BasicBlock(64, 64))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, stride=2), BasicBlock(128, 128))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, stride=2), BasicBlock(256, 256))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, stride=2), BasicBlock(512, 512))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))  # type: ignore[no-any-return]
