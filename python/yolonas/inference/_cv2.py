"""OpenCV, imported in one place, so that a missing system library gets one sentence instead of a loader's message."""

from __future__ import annotations

try:
    import cv2
except ModuleNotFoundError:
    raise
except ImportError as error:  # the full opencv-python links the system's libGL, which servers and containers lack
    raise ImportError(
        f"OpenCV is installed but does not load ({error}): install the system's libgl1, "
        "or replace opencv-python by opencv-python-headless"
    ) from error

__all__ = ["cv2"]
