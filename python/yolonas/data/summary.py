"""What a data set looks like in a few numbers: how much there is, and how large the objects are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from yolonas.data.labelled import LabelledImages

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class DataSummary:
    """The numbers that a recipe is sized by.

    `sides`: the quantiles 0.1, 0.25, 0.5, 0.75, 0.9 of the objects' sides, each the root of a box's area as a share of
    the longest side of its image, so that `side * canvas` is px on a letterboxed canvas; empty without objects.
    `smallest`: the median side of the class whose objects are smallest, in the same unit; 0 without objects.
    """

    images: int
    objects: int
    names: tuple[str, ...]  # of the classes
    sides: tuple[float, ...]
    smallest: float
    image_side: int  # px, median of the longest sides

    @classmethod
    def of(cls, data: LabelledImages) -> DataSummary:
        """Summarize a data set; crowd regions are no objects."""
        sides, labels = [np.zeros(0)], [np.zeros(0, dtype=np.int64)]
        for image in data.images:
            boxes = image.boxes[~image.crowd]
            areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
            sides.append(np.sqrt(areas) / max(image.width, image.height))
            labels.append(image.labels[~image.crowd])
        every, classes = np.concatenate(sides), np.concatenate(labels)
        present = np.unique(classes)
        longest = [max(image.width, image.height) for image in data.images]
        return cls(
            images=len(data),
            objects=len(every),
            names=data.names,
            sides=tuple(np.quantile(every, QUANTILES).tolist()) if len(every) else (),
            smallest=min((float(np.median(every[classes == label])) for label in present), default=0.0),
            image_side=int(np.median(longest)) if longest else 0,
        )

    def side(self, quantile: float, canvas: int) -> float:
        """The side in px on a letterboxed canvas that a share `quantile` of the objects is below."""
        return self.sides[QUANTILES.index(quantile)] * canvas
