"""Writing a video whose frame rate is that of the frames' time stamps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yolonas.errors import DataError
from yolonas.inference._cv2 import cv2

Image = npt.NDArray[np.uint8]

LIVE_FPS = 15.0
"""The rate at which live sources are written: their frames come when they come."""
_SINGLE_FPS = 25.0
_LONGEST_PAUSE = 5.0  # seconds; a camera that is gone for an hour makes no hour of one picture


class VideoFile:
    """An .mp4 (MPEG-4 part 2) that is written frame by frame.

    Of a file the rate follows from the first two time stamps, so every frame is written once. A live source is written
    at `LIVE_FPS`: a frame is repeated until the next is due, or left out where two are due at once. An odd side loses
    its last line of pixels, as MPEG-4 asks. Raises DataError where the file cannot be written.
    """

    def __init__(self, path: Path, live: bool = False) -> None:
        self.path = path
        self._live = live
        self._writer: Any = None
        self._first: tuple[Image, float] | None = None  # until the second tells the rate
        self._fps, self._start, self._count = LIVE_FPS, 0.0, 0

    def write(self, image: Image, time: float) -> None:
        """Add a frame, uint8 [h, w, 3] RGB, with its time stamp in seconds; one of another size is resized."""
        if self._writer is None and self._first is None and not self._live:
            self._first = image, time
            return
        if self._writer is None:
            first, self._start = self._first or (image, time)
            self._open(first, LIVE_FPS if self._live else 1 / (time - self._start))
            if self._first is not None:
                self._put(first, 1)
                self._first = None
        self._put(image, self._due(time) if self._live else 1)

    def close(self) -> None:
        """Finish the file: without this it cannot be played."""
        if self._first is not None:
            self._open(self._first[0], _SINGLE_FPS)
            self._put(self._first[0], 1)
            self._first = None
        if self._writer is not None:
            self._writer.release()
            self._writer = None

    def _open(self, image: Image, fps: float) -> None:
        self._fps, self._size = fps, (image.shape[1], image.shape[0])
        self._writer = cv2.VideoWriter(str(self.path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"mp4v"), fps, self._size)
        if not self._writer.isOpened():
            raise DataError(f"{self.path} cannot be written as a video: is the folder writable, and has OpenCV FFmpeg?")

    def _due(self, time: float) -> int:
        """How often a frame is to be written so that the video keeps the time."""
        due = round((time - self._start) * self._fps) + 1 - self._count
        most = round(_LONGEST_PAUSE * self._fps)
        if due > most:
            self._start += (due - most) / self._fps
        return min(due, most)

    def _put(self, image: Image, times: int) -> None:
        bgr: Any = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        if (image.shape[1], image.shape[0]) != self._size:
            bgr = cv2.resize(bgr, self._size)
        for _ in range(times):
            self._writer.write(bgr)
            self._count += 1
