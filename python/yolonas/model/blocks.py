"""The building blocks of YOLO-NAS; every block that holds batch norms can fold them (`fold`)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BN_EPS = 1e-3
BN_MOMENTUM = 0.03


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Batch norm with the constants of the reference."""
    return nn.BatchNorm2d(channels, eps=BN_EPS, momentum=BN_MOMENTUM)


def fold_batch_norm(weight: Tensor, bias: Tensor | None, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight [O, I, k, k] and bias [O] of the convolution that equals `bn(conv(x))` in eval mode, in float64."""
    mean, var = cast(Tensor, bn.running_mean).double(), cast(Tensor, bn.running_var).double()
    scale = bn.weight.double() / torch.sqrt(var + bn.eps)
    bias = torch.zeros_like(mean) if bias is None else bias.double()
    return weight.double() * scale.reshape(-1, 1, 1, 1), bn.bias.double() + (bias - mean) * scale


def convolution(weight: Tensor, bias: Tensor, stride: int, like: Tensor) -> nn.Conv2d:
    """A "same" convolution that holds these values in the dtype and on the device of `like`."""
    out_channels, in_channels, kernel, _ = weight.shape
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, device="meta")
    conv.weight = nn.Parameter(weight.to(like))
    conv.bias = nn.Parameter(bias.to(like))
    return conv


class ConvBNReLU(nn.Module):
    """Convolution without bias, batch norm, ReLU: [B, in, H, W] -> [B, out, H/stride, W/stride]."""

    bn: nn.BatchNorm2d | None

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.bn = batch_norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.relu(x if self.bn is None else self.bn(x))

    @torch.no_grad()
    def fold(self) -> None:
        """Fold the batch norm into the convolution; for inference only."""
        if self.bn is not None:
            weight, bias = fold_batch_norm(self.conv.weight, self.conv.bias, self.bn)
            self.conv = convolution(weight, bias, self.conv.stride[0], like=self.conv.weight)
            self.bn = None


class QARepVGG(nn.Module):
    """ReLU(post_bn(BN(conv3x3(x)) + conv1x1(x) + x)): many branches to train, one convolution to run.

    `x` itself is added where `identity`. A checkpoint of the training form also carries the weights that the fused
    convolution would have (`rbr_reparam`, unused and random in super-gradients): they are ignored when loading and
    written as zeros by `state_dict()`, so that strict loading works in both directions.
    Source: QARepVGG (Chu et al., 2022), as in super-gradients 3.7.1.
    """

    rbr_reparam: nn.Conv2d | None

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, identity: bool = False) -> None:
        super().__init__()
        self.stride = stride
        self.identity = identity
        self.branch_3x3 = nn.Sequential()
        self.branch_3x3.add_module("conv", nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False))
        self.branch_3x3.add_module("bn", batch_norm(out_channels))
        self.branch_1x1 = nn.Conv2d(in_channels, out_channels, 1)
        self.post_bn = batch_norm(out_channels)
        self.rbr_reparam = None
        self.register_state_dict_post_hook(_write_placeholder)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        if self.rbr_reparam is not None:
            return F.relu(self.rbr_reparam(x))
        # Slicing and then convolving with stride 1 is the stride-2 convolution, and dodges torch 2.13.0's memory
        # corruption in the CPU backward of a 1x1 stride-2 convolution on a 3-channel channels_last input.
        y = self.branch_3x3(x) + self.branch_1x1(x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride])
        return F.relu(self.post_bn(y + x if self.identity else y))

    @torch.no_grad()
    def fold(self) -> None:
        """Fold branches and batch norms into one 3x3 convolution; for inference only."""
        if self.rbr_reparam is not None:
            return
        conv, bn = cast(nn.Conv2d, self.branch_3x3.conv), cast(nn.BatchNorm2d, self.branch_3x3.bn)
        kernel, bias = fold_batch_norm(conv.weight, None, bn)
        kernel[:, :, 1, 1] += self.branch_1x1.weight[:, :, 0, 0].double()
        if self.identity:
            kernel[:, :, 1, 1] += torch.eye(kernel.shape[0], dtype=kernel.dtype, device=kernel.device)
        bias = bias + cast(Tensor, self.branch_1x1.bias).double()
        kernel, bias = fold_batch_norm(kernel, bias, self.post_bn)
        self.rbr_reparam = convolution(kernel, bias, self.stride, like=conv.weight)
        del self.branch_3x3, self.branch_1x1, self.post_bn

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.rbr_reparam is None:
            for name in ("weight", "bias"):
                state_dict.pop(f"{prefix}rbr_reparam.{name}", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _write_placeholder(module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: object) -> None:
    if isinstance(module, QARepVGG) and module.rbr_reparam is None:
        weight = cast(nn.Conv2d, module.branch_3x3.conv).weight
        state_dict[f"{prefix}rbr_reparam.weight"] = torch.zeros_like(weight, requires_grad=False)
        state_dict[f"{prefix}rbr_reparam.bias"] = weight.new_zeros(weight.shape[0])


class Bottleneck(nn.Module):
    """alpha * x + cv2(cv1(x)) with a learned scalar alpha; [B, C, H, W] -> the same shape."""

    def __init__(self, channels: int, rep: bool) -> None:
        super().__init__()
        self.cv1 = QARepVGG(channels, channels, identity=True) if rep else ConvBNReLU(channels, channels, 3)
        self.cv2 = QARepVGG(channels, channels, identity=True) if rep else ConvBNReLU(channels, channels, 3)
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.cv2(self.cv1(x))
        return self.alpha * x + y


class CSPLayer(nn.Module):
    """Half of the channels go through `blocks` bottlenecks, half past them: [B, in, H, W] -> [B, out, H, W].

    With `concat` the output of conv1 and of every bottleneck reaches conv3, otherwise only the last one does.
    """

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int, hidden: int, *, concat: bool = False, rep: bool = True
    ) -> None:
        super().__init__()
        self.concat = concat
        self.conv1 = ConvBNReLU(in_channels, hidden)
        self.conv2 = ConvBNReLU(in_channels, hidden)
        self.conv3 = ConvBNReLU(hidden * (2 + blocks if concat else 2), out_channels)
        self.bottlenecks = nn.ModuleList(Bottleneck(hidden, rep) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        outputs = [self.conv1(x)]
        for bottleneck in self.bottlenecks:
            outputs.append(bottleneck(outputs[-1]))
        merged = torch.cat([*(outputs if self.concat else outputs[-1:]), self.conv2(x)], dim=1)
        y: Tensor = self.conv3(merged)
        return y


class SPP(nn.Module):
    """Spatial pyramid pooling over 5, 9 and 13 px windows: [B, in, H, W] -> [B, in, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1 = ConvBNReLU(channels, channels // 2)
        self.cv2 = ConvBNReLU(channels // 2 * 4, channels)

    def forward(self, x: Tensor) -> Tensor:
        pools = [self.cv1(x)]
        # Two (three) 5x5 maxima in a row are the 9x9 (13x13) maximum, at a third of the comparisons.
        for _ in range(3):
            pools.append(F.max_pool2d(pools[-1], kernel_size=5, stride=1, padding=2))
        y: Tensor = self.cv2(torch.cat(pools, dim=1))
        return y
