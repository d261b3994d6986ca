"""The example against a loop over images, classes and boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from replace_nms import detections


def slow_iou(a: Tensor, b: Tensor) -> float:
    width, height = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0)
    intersection = width * height
    return float(intersection / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - intersection))


def slow_detections(prediction: Tensor, score_threshold: float, iou_threshold: float) -> list[Tensor]:
    results = []
    for image in prediction:
        kept: list[Tensor] = []
        for label, scores in enumerate(image[4:]):
            of_class: list[Tensor] = []
            for anchor in scores.argsort(descending=True):
                if scores[anchor] <= score_threshold:
                    break
                center, size = image[:2, anchor], image[2:4, anchor]
                box = torch.cat([center - size / 2, center + size / 2])
                if all(slow_iou(other, box) <= iou_threshold for other in of_class):
                    of_class.append(box)
                    kept.append(torch.cat([box, scores[anchor, None], torch.tensor([label])]))
        kept.sort(key=lambda row: -float(row[4]))
        results.append(torch.stack(kept) if kept else torch.zeros(0, 6))
    return results


def test_finds_what_the_loops_find() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction = torch.rand(3, 4 + 5, 60, generator=generator)
    prediction[:, :2] *= 200
    prediction[:, 2:4] = 20 + 60 * prediction[:, 2:4]
    prediction[1, 4:] = 0.1  # an image without objects
    actual, expected = detections(prediction, 0.4, 0.3), slow_detections(prediction, 0.4, 0.3)
    assert [len(rows) for rows in expected] == [len(rows) for rows in actual]
    assert [len(rows) > 20 for rows in actual] == [True, False, True]
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(detections(prediction, 0.4, 0.3, max_detections=7)[0], actual[0][:7])
