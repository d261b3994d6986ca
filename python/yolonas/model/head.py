"""The detection head of YOLO-NAS: per level, class logits and the distributions of the four box sides."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

from torch import Tensor, nn

from yolonas.model.blocks import ConvBNReLU
from yolonas.model.config import REG_MAX, Variant

PRIOR_PROBABILITY = 0.01


class RawOutput(NamedTuple):
    """The raw maps of strides 8, 16, 32: logits before sigmoid, and before the softmax over the DFL bins.

    class_logits: three tensors [B, C, H/s, W/s]; box_logits: three tensors [B, 4 * (reg_max + 1), H/s, W/s], sides in
    the order left, top, right, bottom, in units of the stride.
    """

    class_logits: tuple[Tensor, Tensor, Tensor]
    box_logits: tuple[Tensor, Tensor, Tensor]


class HeadConv(nn.Module):
    """ConvBNReLU under the name that checkpoints use in the heads (`seq.conv`, `seq.bn`)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.seq = ConvBNReLU(in_channels, out_channels, kernel)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.seq(x)
        return y


class LevelHead(nn.Module):
    """One level: [B, in, H, W] -> class logits [B, C, H, W], box logits [B, 4 * (reg_max + 1), H, W]."""

    def __init__(self, in_channels: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.stem = HeadConv(in_channels, channels, kernel=1)
        self.cls_convs = nn.Sequential(HeadConv(channels, channels, kernel=3))
        self.reg_convs = nn.Sequential(HeadConv(channels, channels, kernel=3))
        self.cls_pred = nn.Conv2d(channels, num_classes, 1)
        self.reg_pred = nn.Conv2d(channels, 4 * (REG_MAX + 1), 1)
        nn.init.constant_(cast(Tensor, self.cls_pred.bias), -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        class_logits = self.cls_pred(self.cls_convs(x))
        box_logits = self.reg_pred(self.reg_convs(x))
        return class_logits, box_logits


class Heads(nn.Module):
    """Feature maps of strides 8, 16, 32 -> RawOutput."""

    def __init__(self, variant: Variant, num_classes: int) -> None:
        super().__init__()
        _, n2, n3, n4 = variant.neck
        self.head1 = LevelHead(n2.channels, variant.head[0], num_classes)
        self.head2 = LevelHead(n3.channels, variant.head[1], num_classes)
        self.head3 = LevelHead(n4.channels, variant.head[2], num_classes)

    @property
    def levels(self) -> tuple[LevelHead, LevelHead, LevelHead]:
        """The three heads, finest first."""
        return self.head1, self.head2, self.head3

    def forward(self, p3: Tensor, p4: Tensor, p5: Tensor) -> RawOutput:
        (cls3, box3), (cls4, box4), (cls5, box5) = self.head1(p3), self.head2(p4), self.head3(p5)
        return RawOutput((cls3, cls4, cls5), (box3, box4, box5))
