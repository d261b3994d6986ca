"""Opening every image before training: which cannot be read, were labelled at another size, or are there twice."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import blake2b
from typing import NamedTuple

from yolonas.data.labelled import LabelledImage, LabelledImages, Remark
from yolonas.errors import DataError
from yolonas.inference import image_header
from yolonas.inference.sources import check_header, decode, read_bytes

# Decoding takes about 10 s of one core for each 10^9 pixels of photographs; 4 * 10^9 are 13,000 of 640 x 480. It is a
# number of pixels and not of seconds, so that the same data give the same run.
DECODED_PIXELS = 4e9


class _Look(NamedTuple):
    digest: bytes
    size: tuple[int, int] | None  # (height, width) of the upright image, where it is known
    error: str


def usable(data: LabelledImages, *, most_pixels: float = DECODED_PIXELS, progress: bool = False) -> LabelledImages:
    """The data set without images that cannot be trained on or measured, each with a line in `.dropped`.

    Left out are images that cannot be read, whose size is not the one that their labels are for, and copies (the same
    content with the same boxes) of an image before them. The kept ones get their `digest`. Images are decoded to find
    damage; where all of them have more than `most_pixels`, only their headers are looked at. Raises DataError where no
    image is left.
    """
    from tqdm import tqdm

    whole = sum(image.width * image.height for image in data.images) <= most_pixels
    # Decoding and hashing run outside Python's lock; eight images of 20 megapixels take 1 GB while they are decoded.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        looks: Iterable[_Look] = pool.map(lambda image: _look(image, whole), data.images)
        description = "decoding images" if whole else "opening images"
        looks = tqdm(
            looks, description, len(data), leave=False, unit="image", delay=1.0, disable=None if progress else True
        )
        images: list[LabelledImage] = []
        dropped: list[str] = []
        known: dict[bytes, list[LabelledImage]] = {}
        for image, look in zip(data.images, looks, strict=True):
            twins = known.setdefault(look.digest, [])
            twin = next((twin for twin in twins if _same_labels(image, twin)), None)
            if look.error:
                dropped.append(Remark(look.error, "images that cannot be read"))
            elif look.size not in (None, (image.height, image.width)):
                dropped.append(_other_size(image, look.size or (0, 0)))
            elif twin is not None:
                line = f"{image.path} is the same picture as {twin.path}, with the same boxes"
                dropped.append(Remark(line, "copies of other images"))
            else:
                images.append(replace(image, digest=look.digest))
                twins.append(images[-1])
    if data.images and not images:
        raise DataError(f"none of the {len(data)} images can be used; the first: {dropped[0]}")
    return replace(data, images=images, dropped=[*data.dropped, *dropped])


def _look(image: LabelledImage, whole: bool) -> _Look:
    name = str(image.path)
    try:
        content = read_bytes(image.path)
        if whole:
            height, width = decode(content, name).shape[:2]
            size: tuple[int, int] | None = (height, width)
        else:
            check_header(content, name)
            size = image_header.size(content)
    except DataError as error:
        return _Look(b"", None, str(error))
    return _Look(blake2b(content, digest_size=16).digest(), size, "")


def _other_size(image: LabelledImage, size: tuple[int, int]) -> Remark:
    height, width = size
    line = f"{image.path} is {width}x{height} upright, but its labels are for {image.width}x{image.height}"
    if (width, height) == (image.height, image.width):
        line += ": they were made before the EXIF rotation; if the boxes are too, remove the file's EXIF orientation"
    return Remark(line, "images of another size than their labels are for")


def _same_labels(a: LabelledImage, b: LabelledImage) -> bool:
    """Whether two images have the same objects, in any order and to the pixel."""
    rows = [
        {(*box, label, crowd) for box, label, crowd in zip(i.boxes.round().tolist(), i.labels, i.crowd, strict=True)}
        for i in (a, b)
    ]
    return rows[0] == rows[1]
