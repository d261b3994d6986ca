"""The loss against the reference implementation's numbers, and its rules for edge cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from yolonas.data.targets import Targets
from yolonas.model import RawOutput
from yolonas.training.assigner import Assignment
from yolonas.training.loss import DetectionLoss, Grid

LEVELS = ((16, 16), (8, 8), (4, 4))  # of the fixture's 128 x 128 canvas
CASES = {
    "coco": {},
    "static_atss": {"assigner": "atss"},
    "focal_tal": {"classification": "focal"},
    "coco_sequential": {"assigner": "task_aligned_sequential"},
}


@pytest.fixture(scope="module")
def fixture(shared: Path) -> dict:
    return torch.load(shared / "vectors" / "loss_fixture.pt", weights_only=True)


def maps(flat: Tensor, levels: tuple[tuple[int, int], ...] = LEVELS) -> tuple[Tensor, ...]:
    parts = flat.split([h * w for h, w in levels], dim=1)
    return tuple(part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, levels, strict=True))


def padded(rows: Tensor, images: int) -> Targets:
    """Targets from the reference's rows [image, class, cx, cy, w, h]."""
    boxes, labels = [], []
    for image in range(images):
        mine = rows[rows[:, 0] == image].numpy()
        boxes.append(np.concatenate([mine[:, 2:4] - mine[:, 4:] / 2, mine[:, 2:4] + mine[:, 4:] / 2], axis=1))
        labels.append(mine[:, 1].astype(np.int64))
    return Targets.pad(boxes, labels)


class Recording(DetectionLoss):
    assignment: Assignment

    def assign(self, *args: object) -> Assignment:
        self.assignment = super().assign(*args)
        return self.assignment


def run(fixture: dict, targets: Targets, **options: str) -> tuple:
    class_logits = fixture["cls_logits"].clone().requires_grad_()
    box_logits = fixture["reg_distri"].clone().requires_grad_()
    loss = Recording(5, **options)
    losses = loss(RawOutput(maps(class_logits), maps(box_logits)), targets)
    losses.total.backward()
    return losses, class_logits.grad, box_logits.grad, loss.assignment


def assert_gradient(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(fixture: dict, name: str) -> None:
    expected = fixture[name]
    losses, grad_class, grad_box, assignment = run(fixture, padded(fixture["targets"], 3), **CASES[name])

    parts = torch.stack([losses.classification, losses.iou, losses.dfl, losses.total.detach()])
    torch.testing.assert_close(parts, expected["log_cls_iou_dfl_total"], rtol=1e-5, atol=1e-6)
    assert_gradient(grad_class, expected["grad_cls"])
    assert_gradient(grad_box, expected["grad_reg"])
    if "assigned_labels" in expected:
        assert torch.equal(assignment.labels, expected["assigned_labels"])
        foreground = assignment.labels < 5
        assert torch.equal(assignment.boxes[foreground], expected["assigned_bboxes"][foreground])
        torch.testing.assert_close(assignment.scores, expected["assigned_scores"], rtol=1e-5, atol=1e-6)


def test_grid_is_the_references(fixture: dict) -> None:
    grid = Grid.of(maps(fixture["cls_logits"]), (8, 16, 32))
    assert torch.equal(grid.points, fixture["anchor_points"])
    assert torch.equal(grid.strides, fixture["strides"])
    assert grid.level_sizes == tuple(fixture["num_anchors"].tolist())


def test_batch_without_boxes_learns_background(fixture: dict) -> None:
    losses, grad_class, grad_box, _ = run(fixture, padded(torch.zeros(0, 6), 3))
    parts = torch.stack([losses.classification, losses.iou, losses.dfl, losses.total.detach()])
    torch.testing.assert_close(parts, fixture["empty"]["log_cls_iou_dfl_total"], rtol=1e-5, atol=1e-6)
    assert_gradient(grad_class, fixture["empty"]["grad_cls"])
    assert not grad_box.any()


def random_output(levels: tuple[tuple[int, int], ...], classes: int, bins: int = 17) -> RawOutput:
    generator = torch.Generator().manual_seed(0)
    return RawOutput(
        tuple(torch.randn(2, classes, h, w, generator=generator) - 3 for h, w in levels),
        tuple(torch.randn(2, 4 * bins, h, w, generator=generator) for h, w in levels),
    )


def test_padding_changes_nothing() -> None:
    output = random_output(((8, 12), (4, 6), (2, 3)), 4)
    boxes = np.array([[5, 6, 50, 40], [20, 10, 90, 60]], dtype=np.float32)
    two = Targets.pad([boxes, boxes[:1]], [np.array([1, 3]), np.array([0])])
    more = Targets(*(torch.nn.functional.pad(t, (0, 0, 0, 5) if t.dim() == 3 else (0, 5)) for t in two))
    loss = DetectionLoss(4)
    assert loss(output, two).total == loss(output, more).total


def test_assigning_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    output = random_output(((8, 12), (4, 6), (2, 3)), 4)
    targets = Targets.pad([np.array([[5, 6, 50, 40]]), np.array([[20, 10, 90, 60]])], [np.array([1]), np.array([3])])
    at_once = DetectionLoss(4)(output, targets)
    monkeypatch.setattr("yolonas.training.loss.MAX_PAIRS", 1)
    assert DetectionLoss(4)(output, targets) == at_once


def test_gradient_step_lowers_the_loss_on_a_rectangular_canvas() -> None:
    output = RawOutput(
        *(tuple(m.requires_grad_() for m in part) for part in random_output(((8, 12), (4, 6), (2, 3)), 4))
    )
    targets = Targets.pad([np.array([[5, 6, 50, 40]]), np.array([[20, 10, 90, 60]])], [np.array([1]), np.array([3])])
    loss, leaves = DetectionLoss(4), [*output.class_logits, *output.box_logits]
    optimizer = torch.optim.Adam(leaves, lr=0.2)
    first = loss(output, targets).total.item()
    for _ in range(150):
        optimizer.zero_grad()
        loss(output, targets).total.backward()
        optimizer.step()
    last = loss(output, targets)
    assert last.total.item() < 0.2 * first
    assert last.iou.item() < 0.15 * 2.5


def test_computes_in_float32_inside_autocast() -> None:
    output = random_output(((8, 12), (4, 6), (2, 3)), 4)
    half = RawOutput(*(tuple(m.bfloat16() for m in part) for part in output))
    targets = Targets.pad([np.array([[5, 6, 50, 40]])] * 2, [np.array([1])] * 2)
    exact = RawOutput(*(tuple(m.float() for m in part) for part in half))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = DetectionLoss(4)(half, targets)
    assert losses.total.dtype == torch.float32
    assert losses.total == DetectionLoss(4)(exact, targets).total


@pytest.mark.parametrize("option", [{"assigner": "simota"}, {"classification": "bce"}])
def test_unknown_option_is_named(option: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(option.values()))):
        DetectionLoss(4, **option)
