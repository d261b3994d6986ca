"""The neck of YOLO-NAS: a path aggregation network whose upward stages also see the next finer backbone map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from yolonas.model.blocks import ConvBNReLU, CSPLayer
from yolonas.model.config import NeckStage, Variant


class UpStage(nn.Module):
    """x [B, in, H, W], skip1 [B, s1, 2H, 2W], skip2 [B, s2, 4H, 4W] -> (inter [B, C, H, W], out [B, C, 2H, 2W])."""

    def __init__(self, in_channels: int, skip1: int, skip2: int, stage: NeckStage) -> None:
        super().__init__()
        channels = stage.channels
        self.reduce_skip1 = ConvBNReLU(skip1, channels)
        self.reduce_skip2 = ConvBNReLU(skip2, channels)
        self.conv = ConvBNReLU(in_channels, channels)
        self.upsample = nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
        self.downsample = ConvBNReLU(channels, channels, kernel=3, stride=2)
        self.reduce_after_concat = ConvBNReLU(3 * channels, channels)
        self.blocks = CSPLayer(channels, channels, stage.blocks, stage.hidden)

    def forward(self, x: Tensor, skip1: Tensor, skip2: Tensor) -> tuple[Tensor, Tensor]:
        skip1 = self.reduce_skip1(skip1)
        skip2 = self.downsample(self.reduce_skip2(skip2))
        inter = self.conv(x)
        merged = torch.cat([self.upsample(inter), skip1, skip2], dim=1)
        return inter, self.blocks(self.reduce_after_concat(merged))


class DownStage(nn.Module):
    """x [B, in, 2H, 2W], skip [B, s, H, W] -> [B, C, H, W]; its bottlenecks are plain convolutions."""

    def __init__(self, in_channels: int, skip: int, stage: NeckStage) -> None:
        super().__init__()
        self.conv = ConvBNReLU(in_channels, stage.channels // 2, kernel=3, stride=2)
        self.blocks = CSPLayer(stage.channels // 2 + skip, stage.channels, stage.blocks, stage.hidden, rep=False)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        y: Tensor = self.blocks(torch.cat([self.conv(x), skip], dim=1))
        return y


class Neck(nn.Module):
    """Backbone maps of strides 4, 8, 16, 32 -> feature maps of strides 8, 16, 32."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        c2, c3, c4, c5 = (stage.channels for stage in variant.stages)
        n1, n2, n3, n4 = variant.neck
        self.neck1 = UpStage(c5, c4, c3, n1)
        self.neck2 = UpStage(n1.channels, c3, c2, n2)
        self.neck3 = DownStage(n2.channels, n2.channels, n3)
        self.neck4 = DownStage(n3.channels, n1.channels, n4)

    def forward(self, c2: Tensor, c3: Tensor, c4: Tensor, c5: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inter5, x = self.neck1(c5, c4, c3)
        inter4, p3 = self.neck2(x, c3, c2)
        p4 = self.neck3(p3, inter4)
        p5 = self.neck4(p4, inter5)
        return p3, p4, p5
