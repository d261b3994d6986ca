"""The network as a run trains it: on its device, in its precision, compiled or not, over one or more processes."""

from __future__ import annotations

import torch
from torch import Tensor

from yolonas.errors import YolonasError
from yolonas.model import RawOutput, YoloNAS
from yolonas.training import distributed
from yolonas.training.recipe import Precision

_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Network:
    """Calls a model, which is on its device, on prepared images."""

    def __init__(self, model: YoloNAS, device: torch.device, precision: Precision, *, compiled: bool = False) -> None:
        self.device, self.preprocessing = device, model.preprocessing
        self.dtype = autocast_dtype(device, precision)
        numbers = (model.preprocessing.mean or (0.0,) * 3, model.preprocessing.std or (1.0,) * 3)
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in numbers)
        # (pixel / 255 - mean) / std in one multiplication and one addition
        self._scale, self._shift = 1 / (255 * std), -mean / std
        parallel = distributed.parallel(model, device)
        self._call = torch.compile(parallel) if compiled else parallel

    def prepare(self, canvases: Tensor) -> Tensor:
        """Images float32 [B, 3, H, W] on the device from canvases uint8, scaled as the model's preprocessing says."""
        return canvases.to(self.device, non_blocking=True).float().mul_(self._scale).add_(self._shift)

    def __call__(self, images: Tensor) -> RawOutput:
        """Raw maps of prepared images."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            output: RawOutput = self._call(images)
        return output


def autocast_dtype(device: torch.device, precision: Precision) -> torch.dtype | None:
    """The 16-bit type that a network computes in, or None for float32.

    "auto" is bfloat16 where the device multiplies it faster than float32 (GPUs since Ampere, CPUs with AVX512-BF16),
    else float16 on a GPU, else float32. Raises YolonasError for float16 on a CPU, whose gradients nothing scales.
    """
    if precision != "auto":
        if precision == "float16" and device.type == "cpu":
            raise YolonasError("precision float16 needs a GPU: use bfloat16 or float32 on the CPU")
        return _DTYPES[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None
