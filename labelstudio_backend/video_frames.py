"""Labelled videos as a data set: their keyframes as images, each with the boxes that Label Studio shows there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from labelstudio_backend.video import checked
from yolonas.atomic import atomic_file
from yolonas.data.label_studio_reader import labelled_image
from yolonas.data.labelled import LabelledImage
from yolonas.errors import DataError
from yolonas.inference._cv2 import cv2
from yolonas.inference.sources import image_size
from yolonas.labelstudio import Control
from yolonas.labelstudio_video import labelled_frames

MOST_FRAMES = 50  # of a video: its frames resemble each other, and many videos teach more than one long one
_JPEG_QUALITY = 95


def keyframe_images(
    file: Path,
    result: Sequence[Mapping[str, Any]],
    controls: Sequence[Control],
    names: Sequence[str],
    data: Mapping[str, Any],
    stem: Path,
    where: str,
) -> list[LabelledImage]:
    """The keyframes of a labelled video, MOST_FRAMES at most, spread over all of them.

    file: the video; result: of the annotation; controls: VideoRectangle tags on this video; names: the classes; data:
    of the task; stem: the images are written as `<stem>-<frame>.jpg`, and not again where they are; where: begins the
    lines of errors. A video without keyframes gives nothing. Raises YolonasError where none of the frames can be read.
    """
    frames = labelled_frames(result, controls)
    numbers = list(frames)
    if len(numbers) > MOST_FRAMES:
        numbers = [numbers[i] for i in np.linspace(0, len(numbers) - 1, MOST_FRAMES).round().astype(int)]
    if not numbers:
        return []
    video = checked(file)
    # Label Studio counts by the rate in the label config, the file has its own; its last frame may lie beyond
    scale, last = video.frame_rate() / controls[0].frames_per_second(data), (video.frame_count() or 1 << 62) - 1
    index_of = {number: min(round((number - 1) * scale), last) for number in numbers}
    paths = {index: stem.with_name(f"{stem.name}-{index}.jpg") for index in index_of.values()}
    problem = DataError(f"{where}: its video has none of the labelled frames")
    for frame in video.chosen([index for index, path in paths.items() if not path.exists()]):
        if isinstance(frame, DataError):
            problem = frame
            continue
        done, content = cv2.imencode(".jpg", frame.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
        if done:
            with atomic_file(paths[frame.index]) as stream:
                stream.write(content.tobytes())
    images: dict[int, LabelledImage] = {}
    for number, index in index_of.items():
        if index not in images and paths[index].exists():
            size = image_size(paths[index])
            images[index] = labelled_image(frames[number], controls, names, paths[index], size, 0, where)
    if not images:
        raise problem
    return list(images.values())
