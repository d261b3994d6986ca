"""YOLO-NAS as plain `nn.Module`s. Names load on first use: `Preprocessing` and `VARIANTS` need no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from yolonas.model.config import VARIANTS, Preprocessing, Variant

if TYPE_CHECKING:
    from yolonas.model.head import RawOutput
    from yolonas.model.info import ModelInfo
    from yolonas.model.yolo_nas import YoloNAS

__all__ = ["VARIANTS", "ModelInfo", "Preprocessing", "RawOutput", "Variant", "YoloNAS"]

_HOME = {"RawOutput": "head", "ModelInfo": "info", "YoloNAS": "yolo_nas"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'yolonas.model' has no attribute {name!r}")
    return getattr(importlib.import_module(f"yolonas.model.{_HOME[name]}"), name)
