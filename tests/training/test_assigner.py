"""The assigners against slow, obvious versions of themselves."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from yolonas.data.targets import Targets
from yolonas.training.assigner import atss, task_aligned
from yolonas.training.loss import Grid

CLASSES = 3


def scene(seed: int, boxes: int) -> tuple[Tensor, Tensor, Grid, Targets]:
    """Predictions near the points of a 96 x 64 canvas, and ground truth for two images: `boxes`, and one box less."""
    rng = np.random.default_rng(seed)
    maps = [torch.zeros(1, 1, 64 // s, 96 // s) for s in (8, 16, 32)]
    grid = Grid.of(maps, (8, 16, 32))
    count = len(grid.points)
    reach = torch.from_numpy(rng.uniform(2, 40, (2, count, 4)).astype(np.float32))
    predicted = torch.cat([grid.points - reach[..., :2], grid.points + reach[..., 2:]], dim=-1)
    scores = torch.from_numpy(rng.uniform(0, 1, (2, count, CLASSES)).astype(np.float32))
    truth, labels = [], []
    for n in (boxes, max(boxes - 1, 0)):
        corner = rng.uniform(0, 60, (n, 2))
        truth.append(np.concatenate([corner, corner + rng.uniform(3, 40, (n, 2))], axis=1))
        labels.append(rng.integers(0, CLASSES, n))
    return scores, predicted, grid, Targets.pad(truth, labels)


def iou(a: Tensor, b: Tensor) -> float:
    wide = float(min(a[2], b[2]) - max(a[0], b[0]))
    high = float(min(a[3], b[3]) - max(a[1], b[1]))
    shared = max(wide, 0.0) * max(high, 0.0)
    areas = [float((box[2] - box[0]) * (box[3] - box[1])) for box in (a, b)]
    return shared / (sum(areas) - shared + 1e-9)


def inside(point: Tensor, box: Tensor) -> bool:
    return bool(((point > box[:2]) & (point < box[2:])).all())


def owners(claims: list[set[int]], overlaps: list[list[float]], points: int) -> list[int | None]:
    """Which box each point belongs to, of those that claim it; a point claimed twice goes to the largest overlap."""
    result: list[int | None] = []
    for point in range(points):
        claimants = [box for box, claimed in enumerate(claims) if point in claimed]
        if len(claimants) > 1:
            result.append(int(np.argmax([overlaps[box][point] for box in range(len(claims))])))
        else:
            result.append(claimants[0] if claimants else None)
    return result


def slow_task_aligned(scores: Tensor, predicted: Tensor, points: Tensor, truth: Tensor, labels: Tensor) -> list:
    overlaps = [[iou(box, p) for p in predicted] for box in truth]
    metrics = [
        [float(score[label]) * overlap**6 for score, overlap in zip(scores, row, strict=True)]
        for label, row in zip(labels, overlaps, strict=True)
    ]
    claims = []
    for box, row in zip(truth, metrics, strict=True):
        candidates = [p for p in range(len(points)) if inside(points[p], box) and row[p] > 0]
        claims.append(set(sorted(candidates, key=lambda p: -row[p])[:13]))
    owner = owners(claims, overlaps, len(points))
    result = []
    for point, box in enumerate(owner):
        if box is None:
            result.append(None)
            continue
        mine = [p for p, other in enumerate(owner) if other == box]
        best_metric, best_iou = max(metrics[box][p] for p in mine), max(overlaps[box][p] for p in mine)
        result.append((int(labels[box]), box, metrics[box][point] / (best_metric + 1e-9) * best_iou))
    return result


def slow_atss(predicted: Tensor, anchors: Tensor, sizes: tuple[int, ...], truth: Tensor, labels: Tensor) -> list:
    points = (anchors[:, :2] + anchors[:, 2:]) / 2
    overlaps = [[iou(box, a) for a in anchors] for box in truth]
    claims = []
    for box, row in zip(truth, overlaps, strict=True):
        distance = (points - (box[:2] + box[2:]) / 2).norm(dim=1).tolist()
        candidates: list[int] = []
        start = 0
        for size in sizes:
            candidates += sorted(range(start, start + size), key=lambda p: distance[p])[:9]
            start += size
        values = np.array([row[p] for p in candidates])
        threshold = values.mean() + values.std(ddof=1)
        claims.append({p for p in candidates if row[p] > threshold and inside(points[p], box)})
    owner = owners(claims, overlaps, len(points))
    return [
        None if box is None else (int(labels[box]), box, iou(truth[box], predicted[point]))
        for point, box in enumerate(owner)
    ]


def compare(actual: tuple, expected: list[list], targets: Targets) -> int:
    positives = 0
    for image, rows in enumerate(expected):
        for point, row in enumerate(rows):
            score = actual.scores[image, point]
            if row is None:
                assert not score.any() or actual.labels[image, point] == CLASSES
                continue
            label, box, value = row
            assert actual.labels[image, point] == label
            assert torch.equal(actual.boxes[image, point], targets.boxes[image, box])
            assert abs(float(score[label]) - value) < 1e-5
            assert int((score != 0).sum()) <= 1
            positives += 1
    return positives


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), boxes=st.integers(1, 6))
def test_task_aligned_is_the_obvious_one(seed: int, boxes: int) -> None:
    scores, predicted, grid, targets = scene(seed, boxes)
    actual = task_aligned(scores, predicted, grid.points, targets)
    expected = [
        slow_task_aligned(scores[i], predicted[i], grid.points, targets.boxes[i][mask], targets.labels[i][mask])
        for i, mask in enumerate(targets.mask)
    ]
    compare(actual, expected, targets)


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), boxes=st.integers(1, 6))
def test_atss_is_the_obvious_one(seed: int, boxes: int) -> None:
    _, predicted, grid, targets = scene(seed, boxes)
    half = 2.5 * grid.strides
    anchors = torch.cat([grid.points - half, grid.points + half], dim=-1)
    actual = atss(predicted, anchors, grid.level_sizes, targets, CLASSES)
    expected = [
        slow_atss(predicted[i], anchors, grid.level_sizes, targets.boxes[i][mask], targets.labels[i][mask])
        for i, mask in enumerate(targets.mask)
    ]
    compare(actual, expected, targets)


def test_no_boxes_is_all_background() -> None:
    scores, predicted, grid, _ = scene(0, 1)
    nothing = Targets.pad([np.zeros((0, 4))] * 2, [np.zeros(0)] * 2)
    assignment = task_aligned(scores, predicted, grid.points, nothing)
    assert (assignment.labels == CLASSES).all()
    assert not assignment.scores.any()


def test_a_canvas_with_fewer_points_than_top_k() -> None:
    grid = Grid.of([torch.zeros(1, 1, 1, 1)], (32,))
    targets = Targets.pad([np.array([[4, 4, 28, 28]])], [np.array([2])])
    assignment = task_aligned(torch.full((1, 1, 3), 0.5), torch.tensor([[[4.0, 4, 28, 28]]]), grid.points, targets)
    assert assignment.labels.tolist() == [[2]]
    torch.testing.assert_close(assignment.scores, torch.tensor([[[0.0, 0.0, 1.0]]]), atol=1e-5, rtol=0)
