"""What predictions are written to as they come: pictures and videos, JSON, COCO json, YOLO labels, crops, frames."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from yolonas.errors import DataError
from yolonas.inference import download
from yolonas.inference.sources import write_image
from yolonas.inference.video import Video
from yolonas.inference.video_file import VideoFile

if TYPE_CHECKING:
    from yolonas.inference.detections import Detections

Item = Path | str | Video


class Output(Protocol):
    """One kind of result. Nothing but what is being written is kept in memory."""

    def write(self, detections: Detections) -> None:
        """Take the detections of the next image or frame, which carry their `path` and pixels; raises DataError."""

    def close(self) -> str:
        """Finish the files, and say where they are."""


def close_all(outputs: Sequence[Output]) -> list[str]:
    """Close every output, also where one before it cannot be; what they say. Raises the first DataError at the end."""
    said: list[str] = []
    broken: list[DataError] = []
    for output in outputs:
        try:
            said.append(output.close())
        except DataError as error:
            broken.append(error)
    if broken:
        raise broken[0]
    return said


class Names:
    """What the files of each source are called, below the output folder.

    Sources keep their names, and their folders below the common one; no two get the same file.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        keys = [item.name if isinstance(item, Video) else _key(item) for item in items]
        self._pictures = dict(zip(keys, picture_names(items), strict=True))
        stems = _unique(path.with_suffix("") if path.suffix else path for path in _relative(items))
        self._stems = dict(zip(keys, stems, strict=True))

    def picture(self, path: str) -> Path:
        """The picture or video with the boxes of a source: .jpg, .png or .mp4."""
        return self._pictures[path]

    def stem(self, detections: Detections) -> Path:
        """The name of an image's or frame's own files, without a suffix; a frame's ends in its index, six digits."""
        stem = self._stems[str(detections.path)]
        return stem if detections.frame is None else stem.with_name(f"{stem.name}_{detections.frame:06d}")


def picture_names(items: Sequence[Item]) -> list[Path]:
    """Where to write each picture or video: the source's path below the folder that all share, none of them twice."""
    names = []
    for item, name in zip(items, _relative(items), strict=True):
        kept, other = ((".mp4",), ".mp4") if isinstance(item, Video) else ((".jpg", ".jpeg", ".png"), ".jpg")
        names.append(name if name.suffix.lower() in kept else name.with_name(f"{name.name}{other}"))
    return _unique(names)


def _key(item: Path | str) -> str:
    return download.without_password(item) if isinstance(item, str) else str(item)


def _relative(items: Sequence[Item]) -> list[Path]:
    sources = [item.source if isinstance(item, Video) else item for item in items]
    # abspath, not resolve(): links keep the names that people see
    files = {source: Path(os.path.abspath(source)) for source in sources if isinstance(source, Path)}
    shared = os.path.commonpath([path.parent for path in files.values()]) if files else ""
    names = []
    for source in sources:
        if isinstance(source, Path):
            names.append(files[source].relative_to(shared))
        elif isinstance(source, int):
            names.append(Path(f"camera_{source}"))
        else:
            names.append(Path(_file_name(download.file_name(source)) or "stream"))
    return names


def _unique(names: Iterable[Path]) -> list[Path]:
    taken: set[str] = set()
    unique = []
    for name in names:
        plain, number = name, 2
        while str(name).casefold() in taken:  # on file systems that ignore case these are one file
            name = plain.with_name(f"{plain.stem}_{number}{plain.suffix}")
            number += 1
        taken.add(str(name).casefold())
        unique.append(name)
    return unique


def _file_name(text: str) -> str:
    """A text with what no file system takes replaced."""
    return re.sub(r'[\x00-\x1f<>:"/\\|?*]+', "_", text).strip(" .")


class Pictures:
    """Each image with its boxes drawn, and each video as an .mp4 of such frames, under the names of the sources.

    Raises DataError where a picture would take the place of its source.
    """

    def __init__(self, folder: Path, names: Names, items: Sequence[Item]) -> None:
        self._folder, self._names = folder, names
        self._live = {item.name for item in items if isinstance(item, Video) and item.live}
        self._video: VideoFile | None = None
        for item in items:
            source = item.source if isinstance(item, Video) else item
            if isinstance(source, Path) and _same_file(source, folder / names.picture(str(source))):
                raise DataError(
                    f"the picture with the boxes would overwrite {source}: choose another folder than {folder}"
                )

    def write(self, detections: Detections) -> None:
        name = str(detections.path)
        path = self._folder / self._names.picture(name)
        make_folder(path.parent)
        if detections.frame is None:
            detections.save(path)
            return
        if self._video is None or self._video.path != path:
            self._finish()
            self._video = VideoFile(path, live=name in self._live)
        self._video.write(detections.plot(), detections.time or 0.0)

    def close(self) -> str:
        self._finish()
        return f"Pictures in {self._folder}"

    def _finish(self) -> None:
        if self._video is not None:
            self._video.close()
            self._video = None


class JsonLines:
    """One line of JSON for each image or frame, on the disk as soon as it is found."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, _open(path)

    def write(self, detections: Detections) -> None:
        with _writing(self._path):
            self._file.write(json.dumps(detections.to_dict(), ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> str:
        with _writing(self._path):
            self._file.close()
        return f"Wrote {self._path}"


class Json:
    """One JSON array with an entry for each image or frame."""

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._before = path, _open(path), "[\n"

    def write(self, detections: Detections) -> None:
        with _writing(self._path):
            self._file.write(self._before + json.dumps(detections.to_dict(), ensure_ascii=False))
        self._before = ",\n"

    def close(self) -> str:
        with _writing(self._path):
            self._file.write("[]\n" if self._before == "[\n" else "\n]\n")
            self._file.close()
        return f"Wrote {self._path}"


class Coco:
    """A COCO data set whose annotations carry a `score`; category ids are label + 1.

    A frame's `file_name` is that of `Frames`, and its `video` and `frame` tell where it is from.
    """

    def __init__(self, path: Path, class_names: Sequence[str], names: Names) -> None:
        self._path, self._file, self._names = path, _open(path), names
        self._images: list[str] = []  # JSON of each: the annotations, which are many, go to the file at once
        self._annotations = 0
        categories = [{"id": label + 1, "name": name} for label, name in enumerate(class_names)]
        with _writing(path):
            self._file.write(f'{{"categories": {json.dumps(categories, ensure_ascii=False)},\n"annotations": [')

    def write(self, detections: Detections) -> None:
        (height, width), image_id = detections.image_size, len(self._images) + 1
        image: dict[str, Any] = {"id": image_id, "file_name": detections.path, "width": width, "height": height}
        if detections.frame is not None:
            image["file_name"] = f"{self._names.stem(detections).as_posix()}.jpg"
            image |= {"video": detections.path, "frame": detections.frame}
        self._images.append(json.dumps(image, ensure_ascii=False))
        lines = []
        for d in detections:
            x1, y1, x2, y2 = (round(v, 3) for v in d.box.tolist())
            self._annotations += 1
            annotation: dict[str, Any] = {
                "id": self._annotations,
                "image_id": image_id,
                "category_id": d.label + 1,
                "bbox": [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)],
                "area": round((x2 - x1) * (y2 - y1), 3),
                "iscrowd": 0,
                "score": round(d.score, 6),
            }
            if d.track_id is not None:
                annotation["track_id"] = d.track_id
            lines.append(("\n" if self._annotations == 1 else ",\n") + json.dumps(annotation))
        with _writing(self._path):
            self._file.writelines(lines)

    def close(self) -> str:
        with _writing(self._path):
            self._file.write('],\n"images": [\n' + ",\n".join(self._images) + "]}\n")
            self._file.close()
        return f"Wrote {self._path}"


class Labels:
    """A YOLO label file for each image or frame: class, centre x, centre y, width, height as parts of the image.

    Then the score if `with_score`, and the number of the track where there is one.
    """

    def __init__(self, folder: Path, names: Names, with_score: bool) -> None:
        self._folder, self._names, self._with_score = folder, names, with_score

    def write(self, detections: Detections) -> None:
        path = _file(self._folder, self._names.stem(detections), ".txt")
        height, width = detections.image_size
        lines = []
        for d in detections:
            x1, y1, x2, y2 = d.box.tolist()
            numbers = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
            line = " ".join([str(d.label), *(f"{v:.6f}" for v in numbers), *([f"{d.score:.6f}"] * self._with_score)])
            lines.append(line if d.track_id is None else f"{line} {d.track_id}")
        with _writing(path):
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def close(self) -> str:
        return f"Labels in {self._folder}"


class Crops:
    """What each box shows, in a folder for its class."""

    def __init__(self, folder: Path, names: Names) -> None:
        self._folder, self._names = folder, names

    def write(self, detections: Detections) -> None:
        image, stem = _pixels(detections), self._names.stem(detections)
        for number, d in enumerate(detections, start=1):
            x1, y1 = np.floor(d.box[:2]).astype(int)
            x2, y2 = np.ceil(d.box[2:]).astype(int)
            folder = self._folder / (_file_name(d.name) or f"class_{d.label}")
            write_image(_file(folder, stem.with_name(f"{stem.name}_{number}"), ".jpg"), image[y1:y2, x1:x2])

    def close(self) -> str:
        return f"Crops in {self._folder}"


class Frames:
    """Each frame of a video as a picture without boxes: the images to go with labels and COCO json."""

    def __init__(self, folder: Path, names: Names) -> None:
        self._folder, self._names = folder, names

    def write(self, detections: Detections) -> None:
        if detections.frame is not None:
            write_image(_file(self._folder, self._names.stem(detections), ".jpg"), _pixels(detections))

    def close(self) -> str:
        return f"Frames in {self._folder}"


def _pixels(detections: Detections) -> npt.NDArray[np.uint8]:
    if detections.image is None:
        raise ValueError("these detections do not carry the image: take them from Detector.stream")
    return detections.image


def _file(folder: Path, stem: Path, suffix: str) -> Path:
    path = folder / stem.with_name(stem.name + suffix)
    make_folder(path.parent)
    return path


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; raises DataError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be made: {error.strerror or error}") from error


def _open(path: Path) -> IO[str]:
    with _writing(path):
        return path.open("w", encoding="utf-8")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error


def _same_file(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:
        return False
