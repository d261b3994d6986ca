"""The backbone of YOLO-NAS: a stem, four stages, and spatial pyramid pooling on the last."""

from __future__ import annotations

from torch import Tensor, nn

from yolonas.model.blocks import SPP, CSPLayer, QARepVGG
from yolonas.model.config import Stage, Variant


class BackboneStem(nn.Module):
    """The first stride-2 convolution: [B, 3, H, W] -> [B, channels, H/2, W/2]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = QARepVGG(3, channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


class BackboneStage(nn.Module):
    """A stride-2 QARepVGG and a CSP layer: [B, in, H, W] -> [B, stage.channels, H/2, W/2]."""

    def __init__(self, in_channels: int, stage: Stage) -> None:
        super().__init__()
        self.downsample = QARepVGG(in_channels, stage.channels, stride=2)
        self.blocks = CSPLayer(stage.channels, stage.channels, stage.blocks, stage.hidden, concat=stage.concat)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(self.downsample(x))
        return y


class Backbone(nn.Module):
    """Images [B, 3, H, W] -> feature maps of strides 4, 8, 16, 32."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        s1, s2, s3, s4 = variant.stages
        self.stem = BackboneStem(variant.stem)
        self.stage1 = BackboneStage(variant.stem, s1)
        self.stage2 = BackboneStage(s1.channels, s2)
        self.stage3 = BackboneStage(s2.channels, s3)
        self.stage4 = BackboneStage(s3.channels, s4)
        self.context_module = SPP(s4.channels)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c2 = self.stage1(self.stem(images))
        c3 = self.stage2(c2)
        c4 = self.stage3(c3)
        c5 = self.context_module(self.stage4(c4))
        return c2, c3, c4, c5
