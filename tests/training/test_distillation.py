"""Distillation: nothing to learn from an equal, something from another, and the labels win."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from yolonas import ops
from yolonas.data.targets import Targets
from yolonas.errors import DataError
from yolonas.model import Preprocessing, RawOutput, YoloNAS
from yolonas.training.distillation import Distiller

NAMES = ("red", "blue")
CPU = torch.device("cpu")


def model(seed: int, names: tuple[str, ...] = NAMES, variant: str = "n", **preprocessing: object) -> YoloNAS:
    """Random weights that are sure of classes and boxes, each seed of others; in training mode, as in a step."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    made = YoloNAS(variant, len(names), class_names=names, preprocessing=Preprocessing(**preprocessing))
    for level in made.heads.levels:
        for predictor in (level.cls_pred, level.reg_pred):
            torch.nn.init.normal_(predictor.bias, std=2.0, generator=generator)
    return made.train()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(5))


def labels_of(teacher: YoloNAS, images: Tensor, label: int, count: int = 8) -> Targets:
    """Some of the teacher's own boxes, as labels of one class: 2 images, one label less in the second."""
    with torch.no_grad():
        boxes = ops.dfl_decode(list(teacher(images).box_logits), teacher.strides)[:, ::7][:, :count]
    mask = torch.ones(2, count, dtype=torch.bool)
    mask[1, -1] = False
    return Targets(torch.full((2, count), label), boxes, mask)


def test_an_equal_has_nothing_to_teach(images: Tensor) -> None:
    teacher = model(0)
    output = RawOutput(*(tuple(m.detach().requires_grad_() for m in maps) for maps in teacher(images)))
    targets = labels_of(teacher, images, 1)
    distiller = Distiller(teacher, teacher, CPU)
    assert distiller.lesson(teacher(images), targets).weights.sum() > 1  # there is something to compare
    loss = distiller(output, images, targets)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    for level in (*output.class_logits, *output.box_logits):
        assert level.grad is not None
        assert level.grad.abs().max() < 1e-5


@pytest.mark.parametrize("variant", ["n", "s"])
def test_the_student_moves_towards_the_teacher(images: Tensor, variant: str) -> None:
    teacher, student = model(0, variant=variant), model(1)
    targets = labels_of(teacher, images, 1)
    distiller = Distiller(teacher, student, CPU)
    lesson = distiller.lesson(teacher(images), targets)
    heard = lesson.weights > 0
    maps = [level.detach().requires_grad_() for part in student(images) for level in part]
    output = RawOutput(tuple(maps[:3]), tuple(maps[3:]))

    def distances() -> tuple[float, float]:
        rows = lesson.points.unsqueeze(-1)
        scores, sides = (torch.cat([m.flatten(2).transpose(1, 2) for m in part], 1).detach() for part in output)
        found = scores.take_along_dim(rows, 1).sigmoid()
        wrong = (found - lesson.logits.sigmoid())[heard].abs().mean().item()
        means = (
            x.softmax(-1) @ torch.arange(17.0)
            for x in (sides.take_along_dim(rows, 1).unflatten(-1, (4, 17)), lesson.sides)
        )
        off = (next(means) - next(means))[heard.any(-1)].abs().mean().item()
        return wrong, off

    before = distances()
    optimizer = torch.optim.Adam(maps, lr=0.2)
    for _ in range(40):
        optimizer.zero_grad()
        distiller(output, images, targets).backward()
        optimizer.step()
    after = distances()
    assert after[0] < 0.3 * before[0]
    assert after[1] < 0.3 * before[1]


def test_the_whole_student_learns_from_it(images: Tensor) -> None:
    teacher, student = model(0), model(1)
    targets = labels_of(teacher, images, 1)
    distiller = Distiller(teacher, student, CPU)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(16):
        loss = distiller(student(images), images, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None for p in teacher.parameters())


def gradients(distiller: Distiller, student: YoloNAS, images: Tensor, targets: Targets) -> RawOutput:
    maps = [level.detach().requires_grad_() for part in student(images) for level in part]
    distiller(RawOutput(tuple(maps[:3]), tuple(maps[3:])), images, targets).backward()
    found = [torch.zeros_like(m) if m.grad is None else m.grad for m in maps]
    return RawOutput(tuple(found[:3]), tuple(found[3:]))


def test_classes_meet_by_name_and_unknown_ones_learn_nothing(images: Tensor) -> None:
    teacher = model(0, ("green", "Blue", "red"))
    student = model(1, ("red", "new", "blue"))
    distiller = Distiller(teacher, student, CPU)
    with torch.no_grad():
        lesson = distiller.lesson(teacher(images), labels_of(teacher, images, 0))
        theirs = torch.cat([m.flatten(2).transpose(1, 2) for m in teacher(images).class_logits], 1)
    rows = lesson.points.unsqueeze(-1)
    for ours, row in ((0, 2), (2, 1)):
        assert torch.equal(lesson.logits[..., ours], theirs.take_along_dim(rows, 1)[..., row])

    for label, learned in ((0, {0}), (1, set()), (2, {2})):  # red, new, blue
        found = gradients(distiller, student, images, labels_of(teacher, images, label))
        channels = {c for c in range(3) if any(level[:, c].abs().max() > 0 for level in found.class_logits)}
        assert channels == learned
        assert any(level.abs().max() > 0 for level in found.box_logits) == bool(learned)


def test_where_the_labels_differ_the_teacher_is_silent(images: Tensor) -> None:
    teacher, student = model(0), model(1)
    distiller = Distiller(teacher, student, CPU)
    targets = labels_of(teacher, images, 1)
    kept = distiller.lesson(teacher(images), targets)
    deleted = Targets(targets.labels, targets.boxes, targets.mask & torch.tensor([[True], [False]]))
    lesson = distiller.lesson(teacher(images), deleted)
    assert kept.weights[1].sum() > 0
    assert lesson.weights[1].sum() == 0
    assert torch.equal(lesson.weights[0], kept.weights[0])
    moved = targets._replace(boxes=targets.boxes + 500)
    assert distiller(student(images), images, moved).item() == 0
    none = Targets.pad([torch.zeros(0, 4).numpy()] * 2, [torch.zeros(0).numpy()] * 2)
    assert distiller(student(images), images, none).item() == 0


def test_the_teacher_sees_its_own_kind_of_input(images: Tensor) -> None:
    statistics = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
    ours = model(0)
    theirs = model(0, channels="bgr", **statistics)
    targets = labels_of(theirs, images, 1)
    for student, teacher in ((ours, theirs), (theirs, ours)):
        seen: list[Tensor] = []
        distiller = Distiller(teacher, student, CPU)
        distiller.teacher.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        given, expected = (_input(images, m.preprocessing) for m in (student, teacher))
        distiller(student(given), given, targets)
        torch.testing.assert_close(seen[0], expected)


def _input(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """RGB images 0..1 as `inference` prepares them."""
    images = images.flip(1) if preprocessing.channels == "bgr" else images
    if preprocessing.mean is not None and preprocessing.std is not None:
        images = (images - torch.tensor(preprocessing.mean).view(3, 1, 1)) / torch.tensor(preprocessing.std).view(
            3, 1, 1
        )
    return images


def test_refuses_what_cannot_teach() -> None:
    student, teacher = model(1), model(0)
    teacher.reg_max = 8
    with pytest.raises(ValueError, match="teacher with reg_max 8 cannot teach a student with reg_max 16"):
        Distiller(teacher, student, CPU)
    teacher = model(0)
    teacher.strides = (4, 8, 16)
    with pytest.raises(ValueError, match="strides"):
        Distiller(teacher, student, CPU)
    with pytest.raises(DataError, match="teacher knows none of the classes to learn: it knows cat, dog"):
        Distiller(model(0, ("cat", "dog")), student, CPU)


def test_the_teacher_is_left_as_it_was(images: Tensor) -> None:
    teacher = model(0).train()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    student = model(1)
    distiller = Distiller(teacher, student, CPU)
    distiller(student(images), images, labels_of(student, images, 0))
    assert teacher.training
    assert teacher.form == "training"
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
