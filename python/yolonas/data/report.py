"""What a person should know of the data before training: what was left out and why, and what looks wrong."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from yolonas.data.labelled import LabelledImage, LabelledImages

FEW = 10  # objects of a class; with fewer its accuracy is luck
SMALL = 8.0  # px on the canvas: the finest stride of the network
_MOST_CLASSES = 20
_MANY_CUT = 0.25  # share of all boxes


def data_report(train: LabelledImages, val: LabelledImages, canvas: int, *, examples: int = 1) -> list[str]:
    """Lines on the two parts of a data set, in two columns, for a square canvas of `canvas` px.

    Of each kind of entry that was left out or changed the number and so many `examples`; the numbers of objects of each
    class, of images without objects and of boxes too small to see; pictures that are there twice with different labels,
    or in both parts, if the images have their `digest`.
    """
    dropped, changed = [*train.dropped, *val.dropped], [*train.changed, *val.changed]
    rows = [
        *_column("left out", _grouped(dropped, examples) or ["nothing"]),
        *_column("changed", [*_grouped(changed, examples), *_cut(train, val, dropped, changed)]),
        *_column("objects", _classes(train, val)),
        *_column("negatives", _negatives(train, val)),
        *_column("small", _small(train, canvas)),
        *_column("warning", [*_contradictions(train, examples), *_leak(train, val, examples)]),
    ]
    return [f"{label:15}{text}" for label, text in rows]


def _column(label: str, texts: Iterable[str]) -> list[tuple[str, str]]:
    return [(label if number == 0 else "", text) for number, text in enumerate(texts)]


def _grouped(lines: Iterable[str], examples: int) -> list[str]:
    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(getattr(line, "subject", "entries"), []).append(line)
    return [
        f"{len(group)} {subject}{_such_as(group, examples)}"
        for subject, group in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]


def _such_as(lines: list[str], examples: int) -> str:
    if examples == 1:
        return f"{', the first' if len(lines) > 1 else ''}: {lines[0]}"
    more = [f"and {len(lines) - examples} more"] if len(lines) > examples else []
    return ":" + "".join(f"\n{'':17}{line}" for line in [*lines[:examples], *more])


def _cut(train: LabelledImages, val: LabelledImages, dropped: list[str], changed: list[str]) -> list[str]:
    """What so many boxes outside of their images hint at."""
    outside = sum("reach out of" in getattr(line, "subject", "") for line in changed)
    outside += sum("outside" in getattr(line, "subject", "") for line in dropped)
    if outside <= _MANY_CUT * (train.objects + val.objects) or outside < 4:
        return []
    return [
        "so many boxes reach out of their images that their numbers may mean something else: COCO's are x, y, width, "
        "height in pixels, YOLO's are the centre and the size as shares of the image"
    ]


def _classes(train: LabelledImages, val: LabelledImages) -> list[str]:
    counts, others = _objects_by_class(train), _objects_by_class(val)
    shown = [f"{name} {count}" for name, count in counts.items()]
    more = f" and {len(shown) - _MOST_CLASSES} more classes" if len(shown) > _MOST_CLASSES else ""
    texts = [", ".join(shown[:_MOST_CLASSES]) + more]
    if crowd := sum(int(image.crowd.sum()) for image in train.images):
        texts.append(f"{crowd} crowd regions are not trained on")
    if none := [name for name, count in counts.items() if not count]:
        texts.append(f"none to train on of: {', '.join(none)}")
    if few := [name for name, count in counts.items() if 0 < count < FEW]:
        texts.append(f"fewer than {FEW} to train on of: {', '.join(few)}")
    known = {name.strip().casefold() for name in train.names}
    if foreign := [f"{name} {count}" for name, count in others.items() if name.strip().casefold() not in known]:
        texts.append(
            f"classes of the validation images that the training images lack, never found: {', '.join(foreign)}"
        )
    return texts


def _objects_by_class(data: LabelledImages) -> dict[str, int]:
    labels = [image.labels[~image.crowd] for image in data.images]
    counts = np.bincount(np.concatenate(labels), minlength=len(data.names)) if labels else np.zeros(len(data.names))
    return {name: int(count) for name, count in zip(data.names, counts, strict=True)}


def _negatives(train: LabelledImages, val: LabelledImages) -> list[str]:
    counts = [sum(not len(image.boxes) for image in data.images) for data in (train, val)]
    if not any(counts):
        return []
    return [f"{counts[0]} training and {counts[1]} validation images without objects are kept: nothing is to be found"]


def _small(train: LabelledImages, canvas: int) -> list[str]:
    sides = [
        np.sqrt((image.boxes[:, 2:] - image.boxes[:, :2]).prod(axis=1)) * canvas / max(image.width, image.height)
        for image in train.images
    ]
    count = int((np.concatenate(sides) < SMALL).sum()) if sides else 0
    if not count:
        return []
    return [
        f"{count} of {train.objects} boxes are smaller than {SMALL:g} x {SMALL:g} px on the canvas of {canvas} px, and "
        "hard to find there: a larger --imgsz shows them larger"
    ]


def _contradictions(train: LabelledImages, examples: int) -> list[str]:
    pairs = [" and ".join(str(image.path) for image in twins) for twins in _by_digest(train).values() if len(twins) > 1]
    subject = "pictures are there more than once with different labels"
    return [f"{len(pairs)} {subject}{_such_as(pairs, examples)}"] if pairs else []


def _leak(train: LabelledImages, val: LabelledImages, examples: int) -> list[str]:
    seen = _by_digest(train)
    both = [f"{i.path} is {seen[i.digest][0].path}" for i in val.images if i.digest in seen]
    if not both:
        return []
    return [
        f"{len(both)} of {len(val)} validation images are among the training images, so that the accuracy measured on "
        f"them is too good{_such_as(both, examples)}"
    ]


def _by_digest(data: LabelledImages) -> dict[bytes, list[LabelledImage]]:
    found: dict[bytes, list[LabelledImage]] = {}
    for image in data.images:
        if image.digest:
            found.setdefault(image.digest, []).append(image)
    return found
