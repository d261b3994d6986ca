"""Random calls of the ops, whose results on a device must have the bits of the CPU's."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from measuring import REPOSITORY, Report
from yolonas import ops

sys.path.append(str(REPOSITORY / "tests" / "ops"))
from ops_data import head_output

Case = Callable[[str], Sequence[Tensor]]  # runs on a device
SPECIAL = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0)


def maps_of(choice: random.Random) -> tuple[list[Tensor], list[Tensor], list[float]]:
    large = choice.random() < 0.05
    levels = choice.randint(1, 4)
    grids = [
        (choice.randint(20, 45), choice.randint(20, 45)) if large else (choice.randint(0, 12), choice.randint(1, 12))
        for _ in range(levels)
    ]
    class_logits, box_logits = head_output(
        choice.randrange(2**31),
        batch=choice.randint(0, 3),
        classes=choice.choice([1, 2, 3, 20, 80]),
        bins=choice.choice([2, 16, 17, 33]),
        grids=grids,
        dtype=choice.choice([torch.float32, torch.float16, torch.bfloat16]),
        quantum=choice.choice([0.0, 0.5]),
    )
    generator = torch.Generator().manual_seed(choice.randrange(2**31))
    special = choice.random() < 0.3
    layout = choice.choice(["planar", "channels_last", "strided", "unaligned"])

    def prepare(m: Tensor) -> Tensor:
        if special:
            where = torch.rand(m.shape, generator=generator) < 0.01
            m[where] = torch.tensor(choice.choice(SPECIAL), dtype=m.dtype)
        if layout == "channels_last":
            return m.to(memory_format=torch.channels_last)
        if layout == "strided":
            return m.repeat_interleave(2, 3)[..., ::2]
        if layout == "unaligned":
            return torch.cat([m.new_zeros(1), m.flatten()])[1:].view(m.shape)
        return m

    strides = [float(8 << level) for level in range(levels)]
    return [prepare(m) for m in class_logits], [prepare(m) for m in box_logits], strides


def moved(m: Tensor, device: str) -> Tensor:
    """To the device with the strides, and the alignment, that it has."""
    memory = m.as_strided((m.untyped_storage().size() // m.element_size(),), (1,), 0).to(device)
    return memory.as_strided(m.shape, m.stride(), m.storage_offset())


def decode_nms_case(choice: random.Random) -> Case:
    class_logits, box_logits, strides = maps_of(choice)
    options = {
        "score_threshold": choice.choice([0.0, 0.01, 0.25, 0.5, 0.9, 1.0]),
        "iou_threshold": choice.choice([0.0, 0.3, 0.7, 1.0]),
        "pre_nms_top_k": choice.choice([1, 30, 300, 1000, 1500, 4000, 20_000]),
        "max_detections": choice.choice([1, 50, 300, 2000]),
        "multi_label": choice.random() < 0.7,
        "class_agnostic": choice.random() < 0.4,
    }

    def run(device: str) -> Sequence[Tensor]:
        maps = [[moved(m, device) for m in side] for side in (class_logits, box_logits)]
        return ops.decode_nms(*maps, strides, **options)

    return run


def dfl_decode_case(choice: random.Random) -> Case:
    _, box_logits, strides = maps_of(choice)
    return lambda device: [ops.dfl_decode([moved(m, device) for m in box_logits], strides)]


def nms_case(choice: random.Random) -> Case:
    n = choice.choice([0, 1, 31, 33, 300, 1000, 1025, 3000, 9000]) if choice.random() < 0.3 else choice.randint(0, 500)
    generator = torch.Generator().manual_seed(choice.randrange(2**31))
    dtype = choice.choice([torch.float32, torch.float16, torch.bfloat16, torch.float64])
    corners = torch.rand(n, 2, generator=generator) * choice.choice([5, 40, 400, 1e6])
    boxes = torch.cat([corners, corners + torch.rand(n, 2, generator=generator) * choice.choice([1, 60])], 1)
    scores = torch.rand(n, generator=generator)
    if choice.random() < 0.5:
        boxes, scores = boxes.floor(), (scores * 8).floor() / 8
    if choice.random() < 0.3:
        for values in (boxes, scores):
            values[torch.rand(values.shape, generator=generator) < 0.03] = choice.choice(SPECIAL)
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    labels = torch.randint(-2, choice.choice([-1, 1, 80]), (n,), generator=generator)
    iou_threshold, labelled = choice.choice([0.0, 0.3, 0.5, 0.7, 1.0]), choice.random() < 0.6

    def run(device: str) -> Sequence[Tensor]:
        if labelled:
            return [ops.batched_nms(boxes.to(device), scores.to(device), labels.to(device), iou_threshold)]
        return [ops.nms(boxes.to(device), scores.to(device), iou_threshold)]

    return run


def equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit; which NaN a NaN is, is not promised."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    a, b = (x.nan_to_num(-1, torch.inf, -torch.inf).view(torch.int32) for x in (a, b))
    return torch.equal(a, b)


def compare(report: Report, count: int, device: str) -> bool:
    makers = {"decode_nms": decode_nms_case, "nms": nms_case, "dfl_decode": dfl_decode_case}
    made, failed, start = dict.fromkeys(makers, 0), [], time.perf_counter()
    for seed in range(count):
        choice = random.Random(seed)
        (name,) = choice.choices(list(makers), [5, 4, 1])
        case = makers[name](choice)
        made[name] += 1
        on_cpu, on_device = case("cpu"), case(device)
        if not all(equal(a.cpu(), b) for a, b in zip(on_device, on_cpu, strict=True)):
            failed.append(f"{name} {seed}")
    counts = ", ".join(f"{n} {name}" for name, n in made.items())
    result = f"**{len(failed)} differ from the CPU**: {failed[:10]}" if failed else "all have the bits of the CPU"
    report.text(f"\n{count} random cases ({counts}): {result}; {time.perf_counter() - start:.0f} s")
    return not failed
