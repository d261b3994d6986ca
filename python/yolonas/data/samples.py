"""Sample images for a demonstration without any data set: metal parts on a workbench, drawn, with exact ground truth.

Each part is a height map, lit from one side; so bevels, threads and shadows agree, and no two images look alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from yolonas.data.labelled import LabelledImage, LabelledImages
from yolonas.inference._cv2 import cv2

Array = NDArray[np.float32]

NAMES = ("washer", "bolt", "nut")
OVERSAMPLING = 3  # parts are drawn this much larger and averaged down: antialiased edges
MIN_VISIBLE = 0.55  # share of a part that later parts must leave visible
# RGB of zinc, steel, black oxide, brass, copper, yellow chromate; then how sharply each reflects.
METALS = (
    ((196, 202, 210), 0.55),
    ((168, 170, 174), 0.45),
    ((70, 70, 76), 0.30),
    ((214, 176, 92), 0.50),
    ((198, 122, 84), 0.45),
    ((202, 190, 130), 0.40),
)


def generate(out_dir: Path, count: int, seed: int = 0, image_size: tuple[int, int] = (480, 640)) -> LabelledImages:
    """Draw `count` images of `image_size` (height, width) into `out_dir`, with `instances.json` (COCO) beside them.

    Boxes bound the visible part of each outline, xyxy image px, pixel (x, y) covering x..x+1. Image k depends on
    `seed` and k only. Raises ValueError for a size in which no part fits.
    """
    height, width = image_size
    if min(height, width) < 128:
        raise ValueError(f"image_size must be at least 128 x 128 for the parts to fit, not {height} x {width}")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    images = []
    for index in range(count):
        picture, boxes, labels = draw(np.random.default_rng([seed, index]), height, width)
        path = out_dir / f"parts_{index:04d}.jpg"
        encoded = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 93])[1]
        path.write_bytes(encoded.tobytes())
        crowd = np.zeros(len(labels), dtype=bool)
        images.append(LabelledImage(path, boxes, labels, crowd, width, height, index + 1))
    data = LabelledImages(NAMES, images, [])
    coco = data.to_coco()
    for entry in coco["images"]:
        entry["file_name"] = Path(entry["file_name"]).name  # so that the folder can be moved
    (out_dir / "instances.json").write_text(json.dumps(coco), encoding="utf-8")
    return data


def draw(rng: Generator, height: int, width: int) -> tuple[NDArray[np.uint8], Array, NDArray[np.int64]]:
    """One picture [height, width, 3] uint8 RGB, its boxes [n, 4] xyxy px and labels [n]."""
    light = rng.uniform(0, 2 * math.pi)
    picture = _background(rng, height, width)
    owner = np.full((height, width), -1, dtype=np.int32)
    areas: list[int] = []
    labels: list[int] = []
    for _ in range(int(rng.integers(5, 13))):
        for _attempt in range(30):
            label = int(rng.integers(len(NAMES)))
            colour, alpha = _part(rng, label, min(height, width), light)
            top, left = (
                int(rng.integers(-alpha.shape[i] // 8, size - alpha.shape[i] * 7 // 8))
                for i, size in enumerate((height, width))
            )
            claimed = _paste_owner(owner, alpha, top, left, len(labels))
            if claimed is not None and _all_visible(claimed, [*areas, int((alpha >= 0.5).sum())]):
                owner = claimed
                areas.append(int((alpha >= 0.5).sum()))
                labels.append(label)
                _composite(picture, colour, alpha, top, left, light)
                break
    boxes = np.array([_bounds(owner == part) for part in range(len(labels))], dtype=np.float32).reshape(-1, 4)
    return _photograph(rng, picture), boxes, np.array(labels, dtype=np.int64)


# -- parts: a height map and a mask, then lit ----------------------------------------------------------------------


def _part(rng: Generator, label: int, side: int, light: float) -> tuple[Array, Array]:
    """A lit part: colour [h, w, 3] 0..1 and alpha [h, w] 0..1, just large enough for it."""
    radius = OVERSAMPLING * side * rng.uniform(0.052, 0.105)
    shapes: tuple[Callable[[Generator, float], tuple[Array, Array]], ...] = (_washer, _bolt, _nut)
    relief, mask = shapes[label](rng, radius)
    tint, gloss = METALS[rng.integers(len(METALS))]

    slope_y, slope_x = np.gradient(cv2.GaussianBlur(relief, (0, 0), OVERSAMPLING * 0.6))
    normal = np.stack([-slope_x, -slope_y, np.ones_like(relief)], axis=-1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    lamp = np.array([-math.cos(light) * 0.6, -math.sin(light) * 0.6, 0.75])
    diffuse = np.clip(normal @ lamp, 0, 1)
    half = lamp / np.linalg.norm(lamp) + np.array([0, 0, 1])
    shine = np.clip(normal @ (half / np.linalg.norm(half)), 0, 1) ** rng.uniform(18, 50)

    scratches = cv2.GaussianBlur(rng.standard_normal(relief.shape).astype(np.float32), (0, 0), 6, sigmaY=0.8)
    base = np.array(tint, dtype=np.float32) / 255 * rng.uniform(0.8, 1.1)
    colour = base * (0.25 + 0.8 * diffuse[..., None]) * (1 + 0.35 * scratches[..., None]) + gloss * shine[..., None]
    size = tuple(math.ceil(extent / OVERSAMPLING) for extent in mask.shape[::-1])
    alpha = cv2.resize(mask, size, interpolation=cv2.INTER_AREA)
    lit = cv2.resize((colour * mask[..., None]).astype(np.float32), size, interpolation=cv2.INTER_AREA)
    return np.asarray(lit / np.maximum(alpha, 1e-3)[..., None], dtype=np.float32), np.asarray(alpha, dtype=np.float32)


def _washer(rng: Generator, radius: float) -> tuple[Array, Array]:
    canvas = _empty(radius)
    hole = radius * rng.uniform(0.42, 0.62)
    mask = _disc(canvas, radius) - _disc(canvas, hole)
    return _bevel(mask, radius * 0.07), mask


def _nut(rng: Generator, radius: float) -> tuple[Array, Array]:
    canvas = _empty(radius)
    hole = radius * rng.uniform(0.46, 0.56)
    mask = _polygon(canvas, _hexagon(radius, rng.uniform(0, math.pi / 3))) - _disc(canvas, hole)
    # The chamfer of a real nut: the corners fall away outside the inscribed circle.
    distance = _from_centre(canvas)
    chamfer = -0.55 * np.clip(distance - radius * 0.84, 0, None)
    thread = 0.05 * radius * np.sin(distance * (2 * math.pi / (0.09 * radius))) * (distance < hole * 1.22)
    return _bevel(mask, radius * 0.05) + chamfer + thread.astype(np.float32), mask


def _bolt(rng: Generator, radius: float) -> tuple[Array, Array]:
    """A bolt lying on its side: hexagon head, round threaded shank."""
    head_half, head_length = radius * 0.62, radius * rng.uniform(0.42, 0.52)
    shank_half, shank_length = radius * rng.uniform(0.27, 0.36), radius * rng.uniform(1.5, 2.6)
    length = head_length + shank_length
    canvas = _empty(math.hypot(length / 2, head_half))
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.indices(canvas.shape, dtype=np.float32) - canvas.shape[0] / 2 + 0.5
    along = x * math.cos(angle) + y * math.sin(angle) + length / 2
    across = -x * math.sin(angle) + y * math.cos(angle)

    def corners(start: float, end: float, half: float, taper: float) -> Array:
        outline = [(start, -half), (end - taper, -half), (end, -half + taper), (end, half - taper), (end - taper, half)]
        points = np.array([*outline, (start, half)]) - (length / 2, 0)
        turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        return np.asarray(points @ turn, dtype=np.float32)

    head = _polygon(canvas, corners(0, head_length, head_half, 0))
    shank = _polygon(canvas, corners(head_length - 1, length, shank_half, shank_half * 0.3))
    threaded = along > head_length + shank_length * rng.uniform(0.05, 0.4)
    pitch = max(radius * 0.13, 2.2 * OVERSAMPLING)
    round_shank = np.sqrt(np.clip(shank_half**2 - across**2, 0, None))
    thread = 0.2 * pitch * np.sin((along + 0.15 * across) * (2 * math.pi / pitch)) * threaded
    # Three of the head's six flats are seen from the side: the middle one level, the outer ones sloping.
    flats = radius * 0.5 - 0.7 * np.clip(np.abs(across) - head_half * 0.5, 0, None)
    relief = np.where(head > 0, flats + _bevel(head, radius * 0.05), round_shank + thread)
    return relief.astype(np.float32), np.maximum(head, shank)


def _empty(radius: float) -> Array:
    extent = math.ceil((2 * radius + 4 * OVERSAMPLING) / OVERSAMPLING) * OVERSAMPLING
    return np.zeros((extent, extent), dtype=np.float32)


def _from_centre(canvas: Array) -> Array:
    y, x = np.indices(canvas.shape, dtype=np.float32) - canvas.shape[0] / 2 + 0.5
    return np.asarray(np.hypot(x, y), dtype=np.float32)


def _disc(canvas: Array, radius: float) -> Array:
    return (_from_centre(canvas) <= radius).astype(np.float32)


def _hexagon(radius: float, turn: float) -> Array:
    angles = turn + np.arange(6) * (math.pi / 3)
    return (radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)).astype(np.float32)


def _polygon(canvas: Array, corners: Array) -> Array:
    """The polygon with `corners` [n, 2] about the canvas' centre, filled with 1."""
    shift = 6  # OpenCV takes corners in 1/64 px
    points = np.round((corners + canvas.shape[0] / 2 - 0.5) * (1 << shift)).astype(np.int32)
    filled = cv2.fillPoly(canvas.copy(), [points], 1.0, lineType=cv2.LINE_8, shift=shift)
    return np.asarray(filled, dtype=np.float32)


def _bevel(mask: Array, width: float) -> Array:
    """A plateau whose rim falls off over `width` px."""
    distance = cv2.distanceTransform((mask > 0.5).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    rise = np.clip(distance / max(width, 1.0), 0, 1)
    return np.asarray(width * np.sin(rise * (math.pi / 2)), dtype=np.float32)


# -- the scene -----------------------------------------------------------------------------------------------------


def _paste_owner(owner: NDArray[np.int32], alpha: Array, top: int, left: int, part: int) -> NDArray[np.int32] | None:
    """`owner` with the pixels of a new part claimed; None where under `MIN_VISIBLE` of it lies in the image."""
    inside, patch = _overlap(owner.shape, alpha.shape, top, left)
    claimed = owner.copy()
    claimed[inside][alpha[patch] >= 0.5] = part
    return claimed if (alpha[patch] >= 0.5).sum() >= MIN_VISIBLE * (alpha >= 0.5).sum() else None


def _all_visible(owner: NDArray[np.int32], areas: list[int]) -> bool:
    seen = np.bincount(owner[owner >= 0], minlength=len(areas))
    return all(seen[part] >= MIN_VISIBLE * area for part, area in enumerate(areas))


def _overlap(
    outer: tuple[int, ...], inner: tuple[int, ...], top: int, left: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a patch at (top, left) meets the image: slices of the image and of the patch."""
    image, patch = [], []
    for start, outer_size, inner_size in zip((top, left), outer, inner, strict=False):
        first, last = max(start, 0), max(min(start + inner_size, outer_size), start, 0)
        image.append(slice(first, last))
        patch.append(slice(first - start, last - start))
    return (image[0], image[1]), (patch[0], patch[1])


def _composite(picture: Array, colour: Array, alpha: Array, top: int, left: int, light: float) -> None:
    """Lay a part and its soft shadow on the picture, in place."""
    reach = max(3, round(alpha.shape[0] * 0.06))
    pad = 3 * reach
    shadow = cv2.copyMakeBorder(alpha, pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=0)
    for blur, strength, offset in ((reach * 0.9, 0.45, 1.0), (reach * 0.3, 0.35, 0.35)):
        soft = cv2.GaussianBlur(shadow, (0, 0), blur)
        dy, dx = round(math.sin(light) * reach * offset), round(math.cos(light) * reach * offset)
        image, patch = _overlap(picture.shape, soft.shape, top - pad + dy, left - pad + dx)
        picture[image] *= 1 - strength * soft[patch][..., None]
    image, patch = _overlap(picture.shape, alpha.shape, top, left)
    cover = alpha[patch][..., None]
    picture[image] = picture[image] * (1 - cover) + colour[patch] * cover


def _bounds(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _background(rng: Generator, height: int, width: int) -> Array:
    """A workbench [height, width, 3] 0..1: wood, brushed metal, concrete or a cutting mat, unevenly lit."""
    surfaces: tuple[Callable[[Generator, int, int], Array], ...] = (_wood, _brushed, _concrete, _mat)
    picture = surfaces[rng.integers(len(surfaces))](rng, height, width)
    y, x = np.indices((height, width), dtype=np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    slope = ((x / width - 0.5) * math.cos(angle) + (y / height - 0.5) * math.sin(angle)) * rng.uniform(0.1, 0.4)
    return (picture * (1 + slope)[..., None]).astype(np.float32)


def _wood(rng: Generator, height: int, width: int) -> Array:
    rings = np.linspace(0, rng.uniform(7, 14), height)[:, None] + 0.9 * _noise(rng, height, width, (22, 160))
    grain = (rings % 1.0) ** 2  # each ring darkens slowly and ends sharply
    fibre = _noise(rng, height, width, (0.9, 35))
    dark, pale = np.array([0.42, 0.27, 0.16]), np.array([0.74, 0.56, 0.38])
    blend = np.clip(0.8 - 0.45 * cv2.GaussianBlur(grain, (0, 0), 1.2) + 0.09 * fibre, 0, 1)[..., None]
    return np.asarray((dark + (pale - dark) * blend) * rng.uniform(0.8, 1.15), dtype=np.float32)


def _brushed(rng: Generator, height: int, width: int) -> Array:
    streaks = _noise(rng, height, width, (0.7, 50)) * 0.025 + _noise(rng, height, width, (80, 120)) * 0.05
    return np.asarray((rng.uniform(0.42, 0.66) + streaks)[..., None] * (0.98, 1.0, 1.03), dtype=np.float32)


def _concrete(rng: Generator, height: int, width: int) -> Array:
    coarse, fine = _noise(rng, height, width, (30, 30)), _noise(rng, height, width, (1.2, 1.2))
    pores = (_noise(rng, height, width, (2.2, 2.2)) > 2.3).astype(np.float32)
    tone = rng.uniform(0.45, 0.68) + 0.05 * coarse + 0.035 * fine - 0.14 * cv2.GaussianBlur(pores, (0, 0), 0.8)
    return np.asarray(tone[..., None] * (1.0, 0.985, 0.95), dtype=np.float32)


def _mat(rng: Generator, height: int, width: int) -> Array:
    tint = np.array([(0.10, 0.34, 0.27), (0.14, 0.22, 0.40), (0.30, 0.30, 0.32)][rng.integers(3)])
    tone = 1 + 0.06 * _noise(rng, height, width, (1, 1)) + 0.05 * _noise(rng, height, width, (40, 40))
    pitch, offset = int(rng.integers(28, 48)), int(rng.integers(0, 28))
    lines = np.zeros((height, width), dtype=np.float32)
    lines[offset::pitch] = 1
    lines[:, offset::pitch] = 1
    drawn = tone[..., None] * tint + 0.16 * cv2.GaussianBlur(lines, (0, 0), 0.6)[..., None]
    return np.asarray(drawn, dtype=np.float32)


def _noise(rng: Generator, height: int, width: int, sigma: tuple[float, float]) -> Array:
    """Gaussian noise smoothed over `sigma` (vertical, horizontal) px, unit variance."""
    white = rng.standard_normal((height, width)).astype(np.float32)
    smooth = cv2.GaussianBlur(white, (0, 0), sigma[1], sigmaY=sigma[0])
    return np.asarray((smooth - smooth.mean()) / smooth.std(), dtype=np.float32)


def _photograph(rng: Generator, picture: Array) -> NDArray[np.uint8]:
    """What a camera makes of it: a little blur, exposure and sensor noise."""
    seen = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.4, 0.9)) * rng.uniform(0.85, 1.12)
    seen = seen + rng.standard_normal(picture.shape).astype(np.float32) * rng.uniform(0.006, 0.02)
    return np.asarray(np.clip(seen * 255, 0, 255).round(), dtype=np.uint8)
