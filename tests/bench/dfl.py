"""Times dfl_decode and dfl_loss, forward and backward, beside unfused torch on a training step's shapes, with memory.

python tests/bench/dfl.py [--write] [--quick]

A batch of 8 images of 640 px: 8 x 8400 anchors of 4 x 17 logits, channels_last as the trainer has them, and planar.
Contenders first have to agree on values and gradients, then they are called in turn, round after round.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from measuring import Report, Times, interleave, ms, peak_memory
from yolonas import YoloNAS, ops
from yolonas.data.targets import Targets
from yolonas.model import RawOutput
from yolonas.training.loss import DetectionLoss, Grid, _giou

BATCH, BINS, STRIDES = 8, 17, (8, 16, 32)
OBJECTS = 7  # of an image, as in COCO
POSITIVES = 13 * OBJECTS * BATCH  # the assigner's top 13 of each

Function = Callable[[], Tensor]


def maps(size: int, channels: int, memory_format: torch.memory_format) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, channels, size // stride, size // stride) for stride in STRIDES]
    drawn = [2 * torch.randn(shape, generator=generator) for shape in shapes]
    return [m.to(memory_format=memory_format).requires_grad_() for m in drawn]


def unfused_decode(levels: list[Tensor], grid: Grid) -> Tensor:
    flat = torch.cat([m.permute(0, 2, 3, 1).flatten(1, 2) for m in levels], dim=1).unflatten(-1, (4, BINS))
    distances = flat.softmax(-1) @ torch.arange(BINS, dtype=torch.float32)
    cells = grid.points / grid.strides
    return torch.cat([cells - distances[..., :2], cells + distances[..., 2:]], dim=-1) * grid.strides


def unfused_box_losses(levels: list[Tensor], scores: Tensor, target_boxes: Tensor, grid: Grid) -> Tensor:
    """What the training loss did before there were ops: every result in between is written for every anchor."""
    flat = torch.cat([m.permute(0, 2, 3, 1).flatten(1, 2) for m in levels], dim=1).unflatten(-1, (4, BINS))
    log_probabilities = flat.log_softmax(-1)
    distances = log_probabilities.exp() @ torch.arange(BINS, dtype=torch.float32)
    cells, targets = grid.points / grid.strides, target_boxes / grid.strides
    boxes = torch.cat([cells - distances[..., :2], cells + distances[..., 2:]], dim=-1)
    sides = torch.cat([cells - targets[..., :2], targets[..., 2:] - cells], dim=-1).clamp(0, BINS - 1.01)
    lower = sides.floor()
    index = lower.long().unsqueeze(-1)
    near = log_probabilities.gather(-1, torch.cat([index, index + 1], dim=-1))
    share = sides - lower
    dfl = -(near[..., 0] * (1 - share) + near[..., 1] * share).mean(-1)
    return ((1 - _giou(boxes, targets)) * scores).sum() + (dfl * scores).sum()


def box_losses(levels: list[Tensor], scores: Tensor, target_boxes: Tensor, grid: Grid) -> Tensor:
    ops.dfl_decode([m.detach() for m in levels], STRIDES)  # for the assigner
    return sum(DetectionLoss(80).box_losses(levels, scores, target_boxes, grid, 2 * OBJECTS))


def two_cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    lower = targets.long()
    share = targets - lower
    near, far = (
        F.cross_entropy(logits.flatten(0, -2), index.flatten(), reduction="none").view(targets.shape)
        for index in (lower, lower + 1)
    )
    return (near * (1 - share) + far * share).mean()


def log_softmax_and_gather(logits: Tensor, targets: Tensor) -> Tensor:
    lower = targets.floor()
    index = lower.long().unsqueeze(-1)
    near = logits.log_softmax(-1).gather(-1, torch.cat([index, index + 1], dim=-1))
    share = targets - lower
    return -(near[..., 0] * (1 - share) + near[..., 1] * share).mean()


def forward_and_backward(
    function: Function, leaves: list[Tensor], gradient: Tensor | None = None
) -> Callable[[], list]:
    def run() -> list[Tensor]:
        result = function()
        return [result.detach(), *torch.autograd.grad(result, leaves, gradient)]

    return run


def cases(quick: bool) -> Iterator[tuple[str, bool, dict[str, Callable[[], list]]]]:
    """What is measured, whether it has a goal, and the contenders.

    In a training step only the positives' boxes have a gradient.
    """
    layouts = {"channels_last": torch.channels_last, "planar": torch.contiguous_format}
    generator = torch.Generator().manual_seed(1)
    compiled = functools.partial(torch.compile, dynamic=False)
    for layout, memory_format in layouts.items():
        levels = maps(640, 4 * BINS, memory_format)
        grid = Grid.of(levels, STRIDES)
        every = torch.randn(BATCH, len(grid.points), 4, generator=generator)
        positive = torch.zeros(BATCH * len(grid.points), 1)
        positive[torch.randperm(len(positive), generator=generator)[:POSITIVES]] = 1
        every_point = grid.points.repeat(BATCH, 1, 1)
        sides = 60 * torch.rand(2, *every_point.shape, generator=generator)
        targets = torch.cat([every_point - sides[0], every_point + sides[1]], dim=-1)
        scores = positive.view(BATCH, -1) * torch.rand(BATCH, len(grid.points), generator=generator)
        step = {"torch": unfused_box_losses, "ours": box_losses}
        if not quick:
            step["torch.compile"] = compiled(unfused_box_losses)
        runs = {
            who: forward_and_backward(functools.partial(call, levels, scores, targets, grid), levels)
            for who, call in step.items()
        }
        yield f"boxes, GIoU and DFL of a training step, {layout}", True, runs
        gradients = {"gradients everywhere": every, "gradients of positives": every * positive.view(BATCH, -1, 1)}
        for name, gradient in gradients.items():
            unfused = functools.partial(unfused_decode, levels, grid)
            contenders: dict[str, Function] = {
                "torch": unfused,
                "ours": functools.partial(ops.dfl_decode, levels, STRIDES),
            }
            if not quick:
                contenders["torch.compile"] = functools.partial(compiled(unfused_decode), levels, grid)
            runs = {who: forward_and_backward(call, levels, gradient) for who, call in contenders.items()}
            yield f"dfl_decode, {layout}, {name}", gradient is not every, runs
    for name, rows in (("all anchors", BATCH * 8400), ("positives", POSITIVES)):
        logits = (2 * torch.randn(rows, 4, BINS, generator=generator)).requires_grad_()
        targets = 15.99 * torch.rand(rows, 4, generator=generator)
        contenders = {
            "torch": functools.partial(log_softmax_and_gather, logits, targets),
            "ours": functools.partial(ops.dfl_loss, logits, targets),
            "two cross entropies": functools.partial(two_cross_entropies, logits, targets),
        }
        if not quick:
            contenders["torch.compile"] = functools.partial(compiled(log_softmax_and_gather), logits, targets)
        runs = {who: forward_and_backward(call, [logits]) for who, call in contenders.items()}
        yield f"dfl_loss, {name} ({4 * rows} rows)", True, runs


def check(name: str, runs: dict[str, Callable[[], list]]) -> None:
    expected = runs["torch"]()
    for who, run in runs.items():
        for ours, theirs in zip(run(), expected, strict=True):
            scale = float(theirs.abs().max())
            if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * scale):
                raise SystemExit(f"{name}: {who} and torch differ by {float((ours - theirs).abs().max())} of {scale}")


def measure_ops(report: Report, quick: bool) -> None:
    columns = "torch", "torch.compile", "two cross entropies", "ours"
    for threads in (1,) if quick else (1, 2):
        torch.set_num_threads(threads)
        report.table(
            f"## Forward and backward, ms, {threads} thread{'s' * (threads > 1)}: median (times ours); ours [least]",
            "op",
            *columns,
        )
        for name, goal, runs in cases(quick):
            check(name, runs)
            times = interleave(runs, 3 if quick else 31)
            ours = times["ours"]
            report.row(name, *(ms(times.get(who), None if who == "ours" else ours) for who in columns))
            if goal:
                report.goal(
                    f"torch / ours, {name}, {threads} thread{'s' * (threads > 1)}", times["torch"], ours, least=3
                )


def measure_memory(report: Report) -> None:
    """Resident memory at its peak above that before the call, gradients included: the least of three calls."""
    torch.set_num_threads(1)
    report.table("## Memory that forward and backward add at the peak, MB", "op", "gradients", "torch", "ours")
    for name, _, runs in cases(quick=True):
        gradients = sum(t.nbytes for t in runs["ours"]()[1:]) / 1e6
        peaks = {who: min(peak_memory(runs[who])[2] for _ in range(3)) for who in ("torch", "ours")}
        report.row(name, f"{gradients:.1f}", *(f"{peaks[who]:.1f}" for who in ("torch", "ours")))


class Timed(DetectionLoss):
    """Notes how long the assigner takes."""

    seconds = 0.0

    def assign(self, *arguments: object) -> object:
        start = time.perf_counter()
        assignment = super().assign(*arguments)  # type: ignore[arg-type]
        self.seconds = time.perf_counter() - start
        return assignment


def measure_step(report: Report, quick: bool) -> None:
    """Where the time of a training step goes: n at 320 px, on one thread, images with 1 to 13 objects."""
    torch.set_num_threads(1)
    size, classes, drawn = 320, 80, np.random.default_rng(0)
    boxes, labels = [], []
    for _ in range(BATCH):
        count = drawn.integers(1, 14)
        centres, sides = drawn.uniform(0.1, 0.9, (count, 2)), drawn.uniform(0.05, 0.4, (count, 2))
        boxes.append((np.concatenate([centres - sides / 2, centres + sides / 2], 1).clip(0, 1) * size).astype("f4"))
        labels.append(drawn.integers(0, classes, count))
    targets = Targets.pad(boxes, labels)
    model = YoloNAS("n", num_classes=classes).to(memory_format=torch.channels_last).train()
    images = torch.rand(BATCH, 3, size, size).to(memory_format=torch.channels_last)
    loss, names = Timed(classes), ("network", "loss", "of which assigner", "of which dfl_decode")
    rounds: list[list[float]] = []
    for _ in range(2 if quick else 9):
        clock = [time.perf_counter()]
        output = model(images)
        clock.append(time.perf_counter())
        leaves = [m.detach().requires_grad_() for m in (*output.class_logits, *output.box_logits)]
        loss(RawOutput(tuple(leaves[:3]), tuple(leaves[3:])), targets).total.backward()
        clock.append(time.perf_counter())
        torch.autograd.backward([*output.class_logits, *output.box_logits], [leaf.grad for leaf in leaves])
        clock.append(time.perf_counter())
        model.zero_grad()
        detached = [m.detach() for m in output.box_logits]
        start = time.perf_counter()
        ops.dfl_decode(detached, STRIDES)
        decode = time.perf_counter() - start
        rounds.append([clock[1] - clock[0] + clock[3] - clock[2], clock[2] - clock[1], loss.seconds, decode])
    least = [min(seconds) for seconds in zip(*rounds, strict=True)]
    step = least[0] + least[1]
    report.table(
        f"## A training step of {BATCH} images, n at {size} px, {classes} classes, 1 thread", "part", "ms", "share"
    )
    for name, seconds in zip(names, least, strict=True):
        report.row(name, ms(Times(seconds, seconds)).split()[0], f"{seconds / step:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write tests/bench/results/dfl_<processor>.md")
    parser.add_argument("--quick", action="store_true", help="few rounds and no compiling, to see that all of it works")
    arguments = parser.parse_args()
    report = Report("yolonas.ops in training, on a CPU", "no other library", "python tests/bench/dfl.py --write")
    measure_ops(report, arguments.quick)
    measure_memory(report)
    measure_step(report, arguments.quick)
    report.finish()
    if arguments.write:
        report.write("dfl")


if __name__ == "__main__":
    main()
