"""Cameras and streams: a thread receives, and whoever asks gets the newest frame."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from yolonas.errors import DataError
from yolonas.inference._cv2 import cv2
from yolonas.inference.video import Frame

if TYPE_CHECKING:
    from yolonas.inference.video import Video

RECONNECT_AFTER = (1.0, 2.0, 4.0)
"""Seconds before each attempt to connect again; a frame that arrives resets them."""


def newest_frames(video: Video, stride: int) -> Iterator[Frame | DataError]:
    """The newest frame each time, of every `stride`-th; frames that nobody asked for in time are dropped.

    Waits for a frame where none is new. Ends with a DataError when the source is lost, or cannot be opened.
    """
    receiver = _Receiver(video, stride)
    try:
        while True:
            item = receiver.take()
            yield item
            if isinstance(item, DataError):
                return
    finally:
        receiver.stop()


class _Receiver:
    """Reads a source in a thread, so that no buffer of OpenCV or the network grows old, into room for one frame."""

    def __init__(self, video: Video, stride: int) -> None:
        self._video, self._stride = video, stride
        self._changed = threading.Condition()
        self._frame: Frame | None = None
        self._end: DataError | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"yolonas {video.name}", daemon=True)
        self._thread.start()

    def take(self) -> Frame | DataError:
        """The newest frame that was not taken yet, waiting for it; what ended the source after the last."""
        with self._changed:
            while (item := self._frame or self._end) is None:
                self._changed.wait(0.5)  # not for ever: on Windows Ctrl-C would not reach a thread that does
            self._frame = None
            return item

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(2.0)  # a read that hangs ends by its own time limit; the thread does not keep the program

    def _run(self) -> None:
        try:
            end = self._receive()
        except Exception as error:  # whatever it was, nobody may wait for this thread for ever
            end = f"{self._video.name} cannot be read: {str(getattr(error, 'err', error)).strip()}"
        with self._changed:
            self._end = DataError(end)
            self._changed.notify()

    def _receive(self) -> str:
        """Put frames until the source is lost for good; what to say of that."""
        count, attempts, start = 0, 0, 0.0
        while not self._stopped.is_set():
            capture = self._video.open()
            try:
                while capture.isOpened() and not self._stopped.is_set() and capture.grab():
                    now = time.monotonic()
                    start = start if count else now
                    if count % self._stride == 0:
                        done, bgr = capture.retrieve()
                        if done:
                            image = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
                            self._put(Frame(image, self._video.name, count, now - start, live=True))
                    count, attempts = count + 1, 0
            finally:
                capture.release()
            if count == 0:
                return self._never_opened()
            if attempts == len(RECONNECT_AFTER):
                break
            self._stopped.wait(RECONNECT_AFTER[attempts])
            attempts += 1
        return f"{self._video.name} was lost after {count} frames, and {attempts} attempts to connect again failed"

    def _put(self, frame: Frame) -> None:
        with self._changed:
            self._frame = frame
            self._changed.notify()

    def _never_opened(self) -> str:
        if isinstance(self._video.source, int):
            return f"{self._video.name} gives no picture: is it connected, and not in use by another program?"
        return f"{self._video.name} gives no picture: check the address, and that the stream runs"
