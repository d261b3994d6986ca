"""Where images come from: files, folders, patterns, bytes and arrays."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from yolonas.errors import DataError
from yolonas.inference import image_header
from yolonas.inference._cv2 import cv2

Image: TypeAlias = npt.NDArray[np.uint8]
Source: TypeAlias = Path | bytes | Image
"""One image, not read yet: a file, the bytes of a file, or pixels (uint8 [h, w, 3] RGB)."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".avif", ".jp2", ".ppm", ".pgm")
MOST_PIXELS = 1 << 28
"""An image that declares more is refused: 16384 x 16384 take 800 MB, and a file of some kilobytes can declare them."""
_HEADER_BYTES = 1 << 17  # enough for the header of a photograph with EXIF data and a thumbnail (64 KiB at most)


def read_image(source: Path | str | bytes | Image) -> Image:
    """Read one image into uint8 [h, w, 3] RGB, turned upright by its EXIF orientation.

    Grey images are repeated over the channels, 16-bit ones keep their high byte, transparency is dropped, CMYK is
    converted. An array is checked and returned as it is. Raises DataError, naming the file, for what is missing,
    damaged, truncated, animated, larger than `MOST_PIXELS` or no image.
    """
    if isinstance(source, np.ndarray):
        return _checked_array(source)
    if isinstance(source, bytes):
        return decode(source, "<bytes>")
    return decode(read_bytes(Path(source)), str(source))


def check_header(data: bytes, name: str) -> None:
    """Raise DataError for what the bytes of an image file show to be unusable without decoding it."""
    if not data:
        raise DataError(f"{name} is empty")
    if image_header.is_truncated_jpeg(data):
        raise DataError(f"{name} is a truncated JPEG file: its end is missing")
    if image_header.is_animated(data):
        raise DataError(f"{name} is animated: extract the frames to predict on")
    if image_header.is_turned_avif(data):
        raise DataError(f"{name} is an AVIF file with a rotation, which OpenCV ignores: save it upright")
    if (pixels := image_header.pixels(data)) > MOST_PIXELS:
        raise DataError(f"{name} declares {pixels} pixels, and more than {MOST_PIXELS} are not read: cut it into tiles")


def decode(data: bytes, name: str) -> Image:
    """The image in the bytes of a file, as `read_image` gives it; `name` is for the error."""
    check_header(data, name)
    try:
        pixels: Any = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:  # for instance more pixels than OpenCV's limit of 2^30
        raise DataError(f"{name} cannot be decoded as an image: {str(error.err).strip()}") from error
    if pixels is None:
        raise DataError(f"{name} is damaged, or not an image that OpenCV can read")
    image: Image = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    return image


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image file after EXIF transposition, from its header alone for JPEG and PNG."""
    size = image_header.size(read_bytes(path, _HEADER_BYTES))
    if size is None:
        height, width = read_image(path).shape[:2]
        size = (height, width)
    return size


def is_single(source: Any) -> bool:
    """Whether a source is one image, whose result is not wrapped in a list."""
    if isinstance(source, np.ndarray):
        return source.ndim != 4
    if isinstance(source, str | Path):
        return not Path(source).is_dir() and not _is_pattern(source)
    return isinstance(source, bytes)


def iter_sources(source: Any) -> Iterator[Source]:
    """The images of a source, in order, not read yet.

    source: an image file, a folder (its images sorted by name, without sub-folders and hidden files), a glob pattern
    (`**` goes into sub-folders), the bytes of an image file, an array uint8 [h, w, 3] or [n, h, w, 3] RGB, or any
    iterable of these. Raises DataError where a folder or pattern holds no image, or nothing is there.
    """
    if isinstance(source, np.ndarray):
        yield from source if source.ndim == 4 else (source,)
    elif isinstance(source, bytes):
        yield source
    elif isinstance(source, str | Path):
        yield from _files(source)
    elif isinstance(source, Iterable) and not hasattr(source, "__array__"):
        for item in source:
            yield from iter_sources(item)
    else:
        raise TypeError(f"a source is a path, bytes, a NumPy array or a list of these, not {type(source).__name__}")


def _files(source: str | Path) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        found = [file for file in path.iterdir() if _looks_like_image(file)]
        what = f"the folder {path}"
    elif _is_pattern(source):
        found = [file for match in glob.glob(str(source), recursive=True) if _looks_like_image(file := Path(match))]
        what = f"the pattern {source}"
    elif "://" in str(source):
        raise DataError(f"{source} is a URL: download the image and give its path")
    else:
        return [path]  # a file that is missing is reported when it is read, like any unreadable one
    if not found:
        raise DataError(f"no image matches {what} (looked for {', '.join(IMAGE_SUFFIXES)})")
    return sorted(found)


def _looks_like_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()


def _is_pattern(source: str | Path) -> bool:
    return glob.has_magic(str(source)) and not Path(source).exists()


def read_bytes(path: Path, limit: int = -1) -> bytes:
    """The content of a file, or its first `limit` bytes; raises DataError."""
    try:
        with path.open("rb") as file:
            return file.read(limit)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _checked_array(image: npt.NDArray[Any]) -> Image:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise DataError(f"an image array must be uint8 [height, width, 3] RGB, not {image.dtype} {list(image.shape)}")
    return image


def write_image(path: Path | str, image: Image) -> Path:
    """Write uint8 [h, w, 3] RGB in the format of the path's suffix; raises DataError where that does not work."""
    path = Path(path)
    try:
        done, data = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    except cv2.error as error:
        raise DataError(f"{path} cannot be written: OpenCV knows no image format {path.suffix!r}") from error
    if not done:
        raise DataError(f"{path} cannot be written as {path.suffix!r}: choose .jpg or .png")
    try:
        path.write_bytes(data.tobytes())  # not imwrite, which reports no reason and fails on some Unicode paths
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error
    return path
