"""YOLO-NAS on fused decode and NMS kernels: predict, evaluate, train.

`yolonas.ops` and `yolonas.ops.numpy` are importable on their own. Names load on first use, so that importing the
package costs nothing and needs neither torch nor OpenCV.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yolonas.inference.detections import Detections
    from yolonas.inference.detector import Detector
    from yolonas.model import YoloNAS

__all__ = ["Detections", "Detector", "YoloNAS"]
__version__ = "0.1.0"

_HOME = {
    "Detections": "yolonas.inference.detections",
    "Detector": "yolonas.inference.detector",
    "YoloNAS": "yolonas.model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'yolonas' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "yolonas":
            raise
        raise ModuleNotFoundError(
            f"yolonas.{name} needs {error.name}, which is not installed: pip install 'yolonas[detector]'",
            name=error.name,
        ) from error
