"""Fused DFL decode and exact NMS for torch tensors on CPU and CUDA; `yolonas.ops.numpy` is the same for NumPy arrays.

The functions load on first use, so `yolonas.ops.numpy` stays importable without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yolonas.ops.functional import Decoded, batched_nms, decode_nms, dfl_decode, dfl_loss, nms

__all__ = ["Decoded", "batched_nms", "decode_nms", "dfl_decode", "dfl_loss", "nms"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'yolonas.ops' has no attribute {name!r}")
    try:
        import yolonas.ops.functional as functional
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(
            f"yolonas.ops.{name} needs torch 2.11 or newer, which is not installed: pip install torch "
            "(without torch, use yolonas.ops.numpy)",
            name="torch",
        ) from error
    return getattr(functional, name)
