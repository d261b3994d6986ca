"""Where images come from: files, folders, patterns, web addresses, videos, cameras, bytes and arrays."""

from __future__ import annotations

import glob
import os
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from yolonas.errors import DataError
from yolonas.inference import download, image_header
from yolonas.inference._cv2 import cv2
from yolonas.inference.video import VIDEO_SUFFIXES, Frame, Video

Image: TypeAlias = npt.NDArray[np.uint8]


class ImageUrl(str):
    """The web address of an image, which was asked already what it is."""


Source: TypeAlias = Path | ImageUrl | bytes | Image | Frame | DataError
"""One image for `read_image`, which may run in any thread.

Not read yet: a file, the web address of an image, the bytes of a file. Read: pixels (uint8 [h, w, 3] RGB), or a
frame of a video, which a reader decodes in order. A DataError is what the reader of a video met.
"""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".avif", ".jp2", ".ppm", ".pgm")
MOST_PIXELS = 1 << 28
"""An image that declares more is refused: 16384 x 16384 take 800 MB, and a file of some kilobytes can declare them."""
_STREAM_SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps", "rtp", "tcp", "udp", "srt")
_LIVE_SUFFIXES = (".m3u8", ".mjpg", ".mjpeg")
_STREAM_TYPES = ("multipart/x-mixed-replace", "application/vnd.apple.mpegurl", "application/x-mpegurl")
_RGB: int | None = getattr(cv2, "IMREAD_COLOR_RGB", None)  # since OpenCV 4.11
_HEADER_BYTES = 1 << 17  # enough for the header of a photograph with EXIF data and a thumbnail (64 KiB at most)


def read_image(source: Source | str) -> Image:
    """Read one image into uint8 [h, w, 3] RGB, turned upright by its EXIF orientation.

    Grey images are repeated over the channels, 16-bit ones keep their high byte, transparency is dropped, CMYK is
    converted. An array is checked and returned as it is. Raises DataError, naming the file or address, for what is
    missing, damaged, truncated, animated, larger than `MOST_PIXELS` or no image.
    """
    if isinstance(source, np.ndarray):
        return _checked_array(source)
    if isinstance(source, bytes):
        return decode(source, "<bytes>")
    if isinstance(source, Frame):
        return source.image
    if isinstance(source, DataError):
        raise source
    if isinstance(source, str) and download.is_web_address(source):
        return decode(download.download(source), download.without_password(source))
    return decode(read_bytes(Path(source)), str(source))


class Origin(NamedTuple):
    """Where an image is from, as `Detections` name it."""

    path: str | None = None
    frame: int | None = None
    time: float | None = None


def origin(source: Source) -> Origin:
    """The path or address of an image, and the index and time stamp of a frame; nothing for bytes and arrays."""
    if isinstance(source, Frame):
        return Origin(source.path, source.index, source.time)
    if isinstance(source, str):
        return Origin(download.without_password(source))
    return Origin(str(source)) if isinstance(source, Path) else Origin()


def check_header(data: bytes, name: str) -> None:
    """Raise DataError for what the bytes of an image file show to be unusable without decoding it."""
    if not data:
        raise DataError(f"{name} is empty")
    if data[:256].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise DataError(f"{name} is an HTML page, not an image: it was saved in the place of one")
    if image_header.is_truncated_jpeg(data):
        raise DataError(f"{name} is a truncated JPEG file: its end is missing")
    if image_header.is_animated(data):
        raise DataError(f"{name} is animated: save it as .gif or .mp4, whose frames are read as a video")
    if image_header.is_turned_avif(data):
        raise DataError(f"{name} is an AVIF file with a rotation, which OpenCV ignores: save it upright")
    if (pixels := image_header.pixels(data)) > MOST_PIXELS:
        raise DataError(f"{name} declares {pixels} pixels, and more than {MOST_PIXELS} are not read: cut it into tiles")
    if pixels == 0:  # nor is what may have any number of them
        raise DataError(f"{name} is damaged, or not an image that OpenCV can read: its header tells no size")


def decode(data: bytes, name: str) -> Image:
    """The image in the bytes of a file, as `read_image` gives it; `name` is for the error."""
    check_header(data, name)
    # A fifth of a JPEG's time is the conversion; of AVIF with transparency OpenCV 5.0 still gives BGR.
    flag = _RGB if _RGB is not None and data.startswith(b"\xff\xd8") else cv2.IMREAD_COLOR
    try:
        pixels: Any = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flag)
    except cv2.error as error:  # for instance more pixels than OpenCV's limit of 2^30
        raise DataError(f"{name} cannot be decoded as an image: {str(error.err).strip()}") from error
    if pixels is None:
        raise DataError(f"{name} is damaged, or not an image that OpenCV can read")
    image: Image = pixels if flag == _RGB else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    return image


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image file after EXIF transposition, from its header alone for JPEG and PNG."""
    size = image_header.size(read_bytes(path, _HEADER_BYTES))
    if size is None:
        height, width = read_image(path).shape[:2]
        size = (height, width)
    return size


def is_single(source: Any) -> bool:
    """Whether a source is one image, whose result is not wrapped in a list; a live source is, with its next frame."""
    if isinstance(source, str | Path):
        if _is_many(source):
            return False
        (source,) = _from_path(source)
    if isinstance(source, Video):
        return source.live
    if isinstance(source, str | Path):
        return True
    if isinstance(source, Iterable) and not _holds_pixels(source):
        return isinstance(source, bytes)
    return getattr(source, "ndim", 3) != 4


def is_live(source: Any) -> bool:
    """Whether a source, or one of a list, is live: then nothing may be read ahead, and no batch waited for."""
    if isinstance(source, list | tuple):
        return any(map(is_live, source))
    if isinstance(source, str) and not isinstance(source, ImageUrl) and not _is_many(source):
        (source,) = _from_path(source)
    if isinstance(source, Video):
        return source.live
    return isinstance(source, int | np.integer) and not isinstance(source, bool)


def iter_sources(source: Any, stride: int = 1) -> Generator[Source, None, None]:
    """The images of a source, in order, those of files and addresses not read yet; of videos every `stride`-th frame.

    source: what `list_sources` takes. The frames of a video are decoded as they are asked for, one after the other; a
    live source goes on until it is lost. Raises as `list_sources` does; what a single video lacks is an item instead.
    Closing the generator releases a file or camera.
    """
    for item in list_sources(source):
        if isinstance(item, Video):
            yield from item.frames(stride)
        else:
            yield item


def list_sources(source: Any) -> Iterator[Source | Video]:
    """The images and videos of a source, in order, none of them read or opened yet.

    source: an image or video file; a folder (its images sorted by name, then its videos, without sub-folders and hidden
    files); a glob pattern (`**` goes into sub-folders); the http(s) address of an image or video; the address of a
    stream (rtsp, rtmp, tcp, udp, srt, or http with motion JPEG or HLS); the number of a camera, 0 or "0"; the bytes of
    an image file; an array uint8 [h, w, 3] or [n, h, w, 3] RGB; a PIL image; a torch tensor [3, h, w] or [n, 3, h, w]
    RGB, uint8 or float 0..1; or any iterable of these. An http address whose suffix tells nothing is asked what it is.
    Raises DataError where a folder or pattern holds nothing, or an address is of no such kind; TypeError for the rest.
    """
    if isinstance(source, bytes | ImageUrl | Frame | Video | DataError):
        yield source
    elif isinstance(source, str | Path):
        yield from _from_path(source)
    elif isinstance(source, int | np.integer) and not isinstance(source, bool):
        yield Video(int(source), live=True)
    elif _holds_pixels(source):
        pixels = _pixels(source)
        yield from pixels if pixels.ndim == 4 else (pixels,)
    elif isinstance(source, Iterable):
        for item in source:
            yield from list_sources(item)
    else:
        known = "a path, a web address, the number of a camera, bytes, an array or a list of these"
        raise TypeError(f"a source is {known}, not {type(source).__name__}")


def _from_path(source: str | Path) -> list[Path | ImageUrl | Video]:
    path = Path(source)
    if os.path.isdir(path):  # unlike Path's, it raises nothing for a name that is too long
        found, what = list(path.iterdir()), f"the folder {path}"
    elif _is_many(source):
        found, what = [Path(match) for match in glob.glob(str(source), recursive=True)], f"the pattern {source}"
    elif isinstance(source, str) and "://" in source:
        return [_from_address(source)]
    elif isinstance(source, str) and source.isdecimal() and not os.path.exists(path):
        return [Video(int(source), live=True)]
    else:  # a file that is missing is reported when it is read, like any unreadable one
        return [Video(path) if _is_video(path) else path]
    usable = sorted(file for file in found if _is_usable(file))
    if not usable:
        kinds = ", ".join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)
        raise DataError(f"no image matches {what} (looked for {kinds})")
    videos = dict.fromkeys(file for file in usable if _is_video(file))
    return [*(file for file in usable if file not in videos), *map(Video, videos)]


def _from_address(url: str) -> ImageUrl | Video:
    try:
        urlsplit(url)
    except ValueError as error:
        raise DataError(f"{url} is no web address: {error}") from error
    scheme = url.partition("://")[0].lower()
    if scheme in _STREAM_SCHEMES:
        return Video(url, live=True)
    name = download.without_password(url)
    if not download.is_web_address(url):
        known = ", ".join(("http", "https", *_STREAM_SCHEMES))
        raise DataError(f"{name} is an address of a kind that is not read, {scheme}: use a file, or one of {known}")
    if (suffix := download.suffix(url)) in IMAGE_SUFFIXES:
        return ImageUrl(url)
    if suffix in VIDEO_SUFFIXES:
        return Video(url)
    if suffix in _LIVE_SUFFIXES:
        return Video(url, live=True)
    try:
        kind, finite = download.content_type(url)
    except DataError:
        return ImageUrl(url)  # reported when it is read, like any unreadable image
    if kind.startswith("video/"):
        return Video(url, live=not finite)
    return Video(url, live=True) if kind in _STREAM_TYPES else ImageUrl(url)


def _is_many(source: str | Path) -> bool:
    return os.path.isdir(source) or _is_pattern(source)


def _is_video(file: Path) -> bool:
    if file.suffix.lower() == ".gif":
        try:
            return image_header.is_animated(read_bytes(file))
        except DataError:
            return False
    return file.suffix.lower() in VIDEO_SUFFIXES


def _is_usable(file: Path) -> bool:
    known = file.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES
    return known and not file.name.startswith(".") and file.is_file()


def _is_pattern(source: str | Path) -> bool:
    return glob.has_magic(str(source)) and "://" not in str(source) and not os.path.exists(source)


def read_bytes(path: Path, limit: int = -1) -> bytes:
    """The content of a file, or its first `limit` bytes; raises DataError."""
    try:
        with path.open("rb") as file:
            return file.read(limit)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _holds_pixels(source: Any) -> bool:
    return hasattr(source, "__array__") or hasattr(source, "__array_interface__")  # PIL images have the latter only


def _pixels(source: Any) -> Any:
    """What NumPy reads as an array: PIL images upright and in RGB, torch tensors with their channels last."""
    kind = type(source).__module__.partition(".")[0]
    if kind == "PIL":
        from PIL import ImageOps

        return np.asarray(ImageOps.exif_transpose(source).convert("RGB"))
    if kind == "torch":
        pixels = source.detach().cpu().numpy()
        pixels = (pixels.clip(0, 1) * 255).round().astype(np.uint8) if pixels.dtype.kind == "f" else pixels
        return np.ascontiguousarray(np.moveaxis(pixels, -3, -1)) if pixels.ndim >= 3 else pixels
    return np.asarray(source)


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
