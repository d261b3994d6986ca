"""Videos and cameras: the frames of a file in order, and the newest frame of what is live."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yolonas.errors import DataError
from yolonas.inference._cv2 import cv2
from yolonas.inference.download import without_password

VIDEO_SUFFIXES = (*(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".wmv", ".asf", ".flv", ".mpg", ".mpeg", ".ts"),)
"""An animated .gif is a video too."""
MOST_FRAME_PIXELS = 1 << 26
"""A video that declares larger frames is refused: at 8192 x 8192 each takes 200 MB."""
_USUAL_FPS = 25.0  # where a file names no frame rate, such as raw H.264
_STREAM_TIMEOUT = 10_000  # milliseconds; OpenCV's own 30 s are long in front of a camera that was switched off


@dataclass(frozen=True, eq=False)
class Frame:
    """A frame of a video: uint8 [h, w, 3] RGB upright, its index from 0, and its time stamp in seconds.

    `index` counts the frames that were left out too. `time` is index / frame rate in a file, and the seconds since the
    first frame where `live` says that the source does not wait.
    """

    image: npt.NDArray[np.uint8]
    path: str
    index: int
    time: float
    live: bool = False


@dataclass(frozen=True)
class Video:
    """A video that is not opened yet: a file, the address of one or of a stream, or the number of a camera.

    `live` is what goes on whether it is read or not; its frames are the newest at the moment they are asked for.
    """

    source: Path | str | int
    live: bool = False

    @property
    def name(self) -> str:
        """What detections have as `path`: the file, the address without its password, or `camera 0`."""
        if isinstance(self.source, int):
            return f"camera {self.source}"
        return without_password(self.source) if isinstance(self.source, str) else str(self.source)

    def frames(self, stride: int = 1) -> Iterator[Frame | DataError]:
        """Every `stride`-th frame; what cannot be read, or breaks off, ends with a DataError that says so.

        A live source that is lost is connected again some times before that.
        """
        if self.live:
            from yolonas.inference.live import newest_frames

            return newest_frames(self, stride)
        return (frame for frame in self.steps(lambda index: index % stride == 0) if frame is not None)

    def chosen(self, indices: Collection[int]) -> Iterator[Frame | DataError]:
        """These frames of a file, in order; as far as there are any, and errors as of `frames`."""
        left = set(indices)
        for frame in self.steps(left.__contains__) if left else ():
            if frame is None:
                continue
            yield frame
            if isinstance(frame, Frame):
                left.discard(frame.index)
            if not left:
                return

    def steps(self, wanted: Callable[[int], bool]) -> Iterator[Frame | DataError | None]:
        """A file frame by frame: those whose index is `wanted`, None for each other one; errors as of `frames`.

        For who may have to stop, or to pause, on the way: what is not wanted is decoded, but not converted.
        """
        if (problem := self._missing()) is not None:
            yield problem
            return
        capture = self.open()
        try:
            if (problem := self._unusable(capture)) is not None:
                yield problem
                return
            fps = _frame_rate(capture)
            count = 0
            while capture.grab():
                frame = None
                if wanted(count):
                    done, bgr = capture.retrieve()
                    if done:
                        frame = Frame(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), self.name, count, count / fps)
                yield frame
                count += 1
            declared = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
            if count == 0:
                yield DataError(f"{self.name} is a video without a frame that can be read")
            elif count < declared - max(2, declared // 20):  # some formats only estimate their number of frames
                yield DataError(f"{self.name} is truncated or damaged: {count} of its {declared} frames could be read")
        finally:
            capture.release()

    def frame_count(self) -> int | None:
        """How many frames a file declares; None for what is live, or cannot be opened or counted."""
        if self.live:
            return None
        capture = self.open()
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        capture.release()
        return count if count > 0 else None

    def frame_rate(self) -> float:
        """Frames per second that a file declares; 25 where it declares none."""
        capture = self.open()
        rate = _frame_rate(capture)
        capture.release()
        return rate

    def open(self) -> Any:
        """A `cv2.VideoCapture`, opened or not."""
        if isinstance(self.source, int):
            return cv2.VideoCapture(self.source)
        if isinstance(self.source, Path):
            return cv2.VideoCapture(str(self.source.absolute()), cv2.CAP_FFMPEG)
        limits = (cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _STREAM_TIMEOUT, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _STREAM_TIMEOUT)
        return cv2.VideoCapture(self.source, cv2.CAP_FFMPEG, limits)

    def _missing(self) -> DataError | None:
        if isinstance(self.source, Path):
            try:
                with self.source.open("rb") as file:
                    if not file.read(1):
                        return DataError(f"{self.name} is empty")
            except OSError as error:
                return DataError(f"{self.name} cannot be read: {error.strerror or error}")
        return None

    def _unusable(self, capture: Any) -> DataError | None:
        if not capture.isOpened():
            what = "cannot be reached, or is" if isinstance(self.source, str) else "is damaged, or"
            return DataError(f"{self.name} {what} not a video that OpenCV can read")
        width, height = (int(capture.get(side)) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        if width * height > MOST_FRAME_PIXELS:
            return DataError(
                f"{self.name} declares frames of {width} x {height}, and larger than 8192 x 8192 is not read"
            )
        return None


def _frame_rate(capture: Any) -> float:
    rate = float(capture.get(cv2.CAP_PROP_FPS))
    return rate if 0 < rate <= 1000 else _USUAL_FPS


def read_frame(path: str, index: int) -> npt.NDArray[np.uint8]:
    """One frame of a video file, uint8 [h, w, 3] RGB; reads all before it, which is exact where seeking is not.

    Raises DataError where there is no such frame.
    """
    problem = DataError(f"{path} has no frame {index}")
    for frame in Video(Path(path)).frames(stride=max(index, 1)):
        if isinstance(frame, DataError):
            problem = frame
        elif frame.index == index:
            return frame.image
    raise problem
