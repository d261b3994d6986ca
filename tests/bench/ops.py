"""Times yolonas.ops on the CPU beside what people use in its place, and prints every figure beside its goal.

Then runs dfl.py, for the ops of the training, and, where there is a CUDA device, the figures of gpu.py.

python tests/bench/ops.py [--write] [--quick] [--shared ../shared]

A case's contenders first have to agree on the detections, then they are called in turn, round after round. The logits
are those of shared/bench/gen_raw.py. torchvision is optional: tests/bench/README.md says how to get it.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from measuring import REPOSITORY, Report, Run, Times, interleave, ms, peak_memory
from pipelines import (
    IOU,
    MAX_DETECTIONS,
    NO_TORCHVISION,
    STRIDES,
    TOP_K,
    Maps,
    agreement,
    detected,
    each_map,
    numpy_cv2,
    reads,
    reference_pipeline,
)
from yolonas import _core, ops
from yolonas.ops import numpy as npops
from yolonas.ops import reference, registration

if not NO_TORCHVISION:
    import torchvision
    from torchvision.ops import boxes as torchvision_boxes

SETTINGS = {"iou_threshold": IOU, "pre_nms_top_k": TOP_K, "max_detections": MAX_DETECTIONS}


class Generator:
    """gen_raw.py's maps as tensors; each set is made once."""

    def __init__(self, shared: Path) -> None:
        path = shared / "bench" / "gen_raw.py"
        if not path.is_file():
            sys.exit(f"{path} is not there: give the folder that holds bench/gen_raw.py with --shared")
        sys.path.insert(0, str(path.parent))
        self.make_raw = importlib.import_module("gen_raw").make_raw
        self.made: dict[tuple[float, int], Maps] = {}

    def maps(self, crowd: float, batch: int, classes: int = 80) -> Maps:
        if (crowd, classes) not in self.made:
            levels = self.make_raw(8 if classes == 80 else 1, 0, crowd=crowd, num_classes=classes)
            self.made[crowd, classes] = Maps(
                *([torch.from_numpy(m) for m in side] for side in zip(*levels, strict=True))
            )
        return each_map(self.made[crowd, classes], lambda m: m[:batch])


def torch_door(maps: Maps, conf: float) -> Run:
    return lambda: ops.decode_nms(*maps, STRIDES, score_threshold=conf, **SETTINGS)


def numpy_door(maps: Maps, conf: float, threads: int) -> Run:
    arrays = [[m.numpy() for m in side] for side in maps]
    return lambda: npops.decode_nms(*arrays, STRIDES, score_threshold=conf, threads=threads, **SETTINGS)


def stages(maps: Maps, conf: float, rounds: int) -> list[str]:
    """Milliseconds of scan, selection, decoding and NMS on one thread, summed over the images."""
    batch, classes = maps.class_logits[0].shape[:2]
    bins, out = maps.box_logits[0].shape[1] // 4, torch_door(maps, conf)()
    options = _core.DecodeNmsOptions(batch, classes, bins, conf, IOU, TOP_K, MAX_DETECTIONS, True, False)
    addresses = [[registration._map(m) for m in side] for side in maps]
    call = (*addresses, [float(s) for s in STRIDES], 0, options, [t.data_ptr() for t in out])
    parts = zip(*(_core.decode_nms_cpu_stages(*call) for _ in range(rounds)), strict=True)
    return [f"{statistics.median(part) * 1e3:.3g}" for part in parts]


def fastest_read(times: dict[str, Times], maps: Maps) -> tuple[Times, str]:
    name = min(reads(maps), key=lambda name: times[name].median)
    size = sum(m.numel() * m.element_size() for m in maps.class_logits)
    return times[name], f"{ms(times[name])}, {name}, {size / times[name].median / 1e9:.0f} GB/s"


def measure_decode_nms(report: Report, generator: Generator, quick: bool) -> None:
    report.table(
        "## decode_nms\n\nMilliseconds: median [least], or median (how many times ours).",
        *("crowd", "conf", "batch", "threads", "ours", "NumPy door", "channels_last", "NumPy + cv2"),
        *("the same, threshold first", "reference pipeline", "ops/reference.py", "least agreement"),
    )
    stage_rows = []
    cases = [(3, 0.25, 1, 1)] if quick else list(itertools.product((3, 8), (0.01, 0.25), (1, 8), (1, 2)))
    for crowd, conf, batch, threads in cases:
        set_threads(threads)
        rounds = 3 if quick else 40 if batch == 1 else 15
        maps = generator.maps(crowd, batch)
        channels_last = each_map(maps, lambda m: m.to(memory_format=torch.channels_last))
        with ThreadPoolExecutor(threads) as executor:
            pool = executor if min(threads, batch) > 1 else None
            contenders: dict[str, Run] = {
                "ours": torch_door(maps, conf),
                "NumPy door": numpy_door(maps, conf, threads),
                "channels_last": torch_door(channels_last, conf),
                "NumPy + cv2": numpy_cv2(maps, conf, pool),
                "threshold first": numpy_cv2(maps, conf, pool, threshold_first=True),
            }
            if not NO_TORCHVISION:
                contenders["reference"] = reference_pipeline(maps, conf)
            results = {name: detected(run()) for name, run in contenders.items()}
            oracle = None
            if batch == threads == 1:  # slow, so one call
                start = time.perf_counter()
                results["oracle"] = detected(reference.decode_nms(*maps, STRIDES, score_threshold=conf, **SETTINGS))
                oracle = Times(*[time.perf_counter() - start] * 2)
            shares = {name: agreement(results["ours"], other) for name, other in results.items()}
            assert all(shares.get(name, 1) == 1 for name in ("NumPy door", "channels_last", "oracle")), shares
            assert min(shares.values()) > 0.98, shares
            times = interleave(contenders | reads(maps), rounds)
        ours = times["ours"]
        others = [
            ms(times.get(name), ours) for name in ("NumPy door", "channels_last", "NumPy + cv2", "threshold first")
        ]
        case = (crowd, conf, batch, threads)
        row = [ms(times.get("reference"), ours), ms(oracle, ours), f"{min(shares.values()):.4f}"]
        report.row(*case, ms(ours), *others, *row)
        read, read_text = fastest_read(times, maps)
        stage_rows.append((*case, *stages(maps, conf, rounds), read_text, f"{ours.median / read.median:.2f}x"))
        decode_goals(report, case, times, read)

    report.table(
        "Stages on one thread, summed over the images, beside the fastest plain read of the class maps (of np.max,\n"
        "torch.sum and cv2.norm, on the threads given) and how many such reads the whole op takes:",
        *("crowd", "conf", "batch", "threads", "scan", "selection", "decoding", "NMS", "read", "ours"),
    )
    for stage_row in stage_rows:
        report.row(*stage_row)


def decode_goals(report: Report, case: tuple[int, float, int, int], times: dict[str, Times], read: Times) -> None:
    crowd, conf, batch, threads = case
    name = f"decode_nms, crowd 3, conf {conf}, batch {batch}, {threads} thread{'s' * (threads > 1)}"
    ours = times["ours"]
    if (crowd, batch, threads) == (3, 1, 1):
        report.goal(f"{name}: NumPy + cv2 / ours", times["NumPy + cv2"], ours, {0.01: 15, 0.25: 35}[conf])
        if conf == 0.25:
            report.goal(f"{name}: ours / streaming read, maps in the cache", ours, read, most=2)
    goals = {(3, 0.01, 1, 1): 12, (3, 0.25, 1, 1): 25, (3, 0.01, 8, 2): 20, (3, 0.25, 8, 2): 40}
    if case in goals:
        report.goal(f"{name}: reference pipeline / ours", times.get("reference"), ours, goals[case])


def measure_from_memory(report: Report, maps: Maps, quick: bool) -> None:
    """The op and the read on maps that are in no cache: copies used in turn."""
    set_threads(1)

    def in_turn(runs: Sequence[Run]) -> Run:
        turn = itertools.cycle(runs)
        return lambda: next(turn)()

    copies = [each_map(maps, torch.clone) for _ in range(40)]  # 200 MB
    contenders = {"ours": in_turn([torch_door(m, 0.25) for m in copies])}
    contenders |= {name: in_turn([reads(m)[name] for m in copies]) for name in reads(maps)}
    times = interleave(contenders, 3 if quick else 30)
    read, read_text = fastest_read(times, maps)
    name = "decode_nms, crowd 3, conf 0.25, batch 1, 1 thread: ours / streaming read, maps from memory"
    report.goal(name, times["ours"], read, most=2)
    report.text(
        "\nAt batch 1 the maps stay in the processor's caches there. From memory (crowd 3, conf 0.25, 1 thread): "
        f"ours {ms(times['ours'])}, read {read_text}."
    )


def measure_decode_cliffs(report: Report, generator: Generator, quick: bool) -> None:
    set_threads(1)
    usual = generator.maps(3, 1)
    best_class = [m.amax(1, keepdim=True) for m in usual.class_logits]
    cases = [("usual, conf 0.01", usual, 0.01), ("none above the threshold", usual, 0.9999)]
    if not quick:
        cases += [
            ("every (anchor, class) a candidate", usual, 0.0),
            ("all logits equal, all candidates", each_map(usual, torch.zeros_like), 0.25),
            ("one class", Maps(best_class, usual.box_logits), 0.01),
            ("1000 classes", generator.maps(3, 1, 1000), 0.01),
        ]
    report.table("### No cliffs\n\nCrowd 3, batch 1, 1 thread; milliseconds.", "maps", "ours", "reference pipeline")
    for name, maps, conf in cases:
        contenders = {"ours": torch_door(maps, conf)}
        if not NO_TORCHVISION:
            contenders["reference"] = reference_pipeline(maps, conf)
        times = interleave(contenders, 3 if quick else 9)
        report.row(name, ms(times["ours"]), ms(times.get("reference"), times["ours"]))


class Boxes(NamedTuple):
    boxes: Tensor  # [n, 4]
    scores: Tensor  # [n]
    labels: Tensor | None  # [n]


def clustered(maps: Maps, n: int) -> Boxes:
    """The n best (anchor, class) pairs of the first image, in the order of class and place."""
    boxes = ops.dfl_decode([m[:1] for m in maps.box_logits], STRIDES)[0]
    logits = torch.cat([m[0].flatten(1) for m in maps.class_logits], 1)  # [C, A]
    best = logits.flatten().topk(n).indices.sort().values
    labels, anchors = best // logits.shape[1], best % logits.shape[1]
    return Boxes(boxes[anchors], logits[labels, anchors].sigmoid(), labels)


def scattered(n: int, classes: int = 80) -> Boxes:
    """Boxes of 14 to 420 px anywhere on a canvas of 640 px, labels at random."""
    random = torch.Generator().manual_seed(n)
    centres = torch.rand(n, 2, generator=random) * 640
    half = 7 * 30 ** torch.rand(n, 2, generator=random)
    labels = torch.randint(classes, (n,), generator=random)
    return Boxes(torch.cat([centres - half, centres + half], 1), torch.rand(n, generator=random), labels)


def nms_cases(maps: Maps, quick: bool) -> Iterator[tuple[str, Boxes, float]]:
    """Name, boxes, goal or 0."""
    sizes = {300: (0, 0), 1000: (15, 8), 3000: (15, 0), 8400: (15, 12), 30000: (10, 0)}  # 80 classes, class-agnostic
    for kind, make in {"clustered": lambda n: clustered(maps, n), "scattered": scattered}.items():
        for n, (goal, agnostic_goal) in sizes.items():
            if n == 300 or not quick:
                yield f"{kind}, 80 classes", make(n), goal
                if agnostic_goal:
                    yield f"{kind}, class-agnostic", make(n)._replace(labels=None), agnostic_goal
    n = 300 if quick else 8400
    boxes, scores, labels = scattered(n, 1000)
    step = 10 * torch.arange(n, dtype=torch.float32)[:, None]
    still, grid = torch.zeros_like(step), torch.cat([step % 920, (step / 920).floor() * 10], 1)
    for name, case, groups in (
        ("1000 classes", boxes, labels),
        ("a class for each box", boxes, torch.arange(n)),
        ("one class, by batched_nms", boxes, torch.zeros(n, dtype=torch.int64)),
        ("all identical", boxes[:1].repeat(n, 1), None),
        ("a row, none overlapping", torch.cat([step, still, step + 9, still + 9], 1), None),
        ("a column, none overlapping", torch.cat([still, step, still + 9, step + 9], 1), None),
        ("a grid, each overlaps 80, none suppressed", torch.cat([grid, grid + 50], 1), None),
    ):
        yield name, Boxes(case, scores, groups), 0


def nms_contenders(case: Boxes) -> dict[str, Run]:
    boxes, scores, labels = case
    if labels is None:
        contenders = {"ours": lambda: ops.nms(boxes, scores, IOU)}
        if not NO_TORCHVISION:
            contenders["torchvision"] = lambda: torchvision_boxes.nms(boxes, scores, IOU)
    else:
        contenders = {"ours": lambda: ops.batched_nms(boxes, scores, labels, IOU)}
        if not NO_TORCHVISION:
            contenders["torchvision"] = lambda: torchvision_boxes.batched_nms(boxes, scores, labels, IOU)
    return contenders


def exact_nms(case: Boxes) -> Tensor:
    """torchvision's NMS of each class, ties by index: its batched_nms may add offsets to the boxes, which rounds."""
    if case.labels is None:
        return torchvision_boxes.nms(case.boxes, case.scores, IOU)
    kept = torchvision_boxes._batched_nms_vanilla(*case, IOU)
    return kept[np.lexsort((kept.numpy(), -case.scores[kept].numpy()))]


def measure_nms(report: Report, generator: Generator, quick: bool) -> None:
    set_threads(1)
    report.table(
        "## nms and batched_nms\n\nOne thread, IoU 0.7; milliseconds. clustered: the best (anchor, class) pairs of an "
        "image of\ncrowd 3; scattered: boxes of 14 to 420 px anywhere on 640 px. equal: to torchvision's, by class.",
        *("boxes", "n", "kept", "ours", "torchvision", "equal"),
    )
    for name, case, goal in nms_cases(generator.maps(3, 1), quick):
        n, contenders = len(case.boxes), nms_contenders(case)
        kept = contenders["ours"]()
        equal = "-" if NO_TORCHVISION else "yes" if torch.equal(kept, exact_nms(case)) else "**no**"
        times = interleave(contenders, 3 if quick else 7 if n > 8400 else 15)
        ours, theirs = times["ours"], times.get("torchvision")
        report.row(name, n, len(kept), ms(ours), ms(theirs, ours), equal)
        if goal:
            report.goal(f"nms, {name}, n = {n}: torchvision / ours", theirs, ours, goal)


def measure_memory(report: Report, maps: Maps) -> None:
    report.table(
        "100,000 boxes, class-agnostic, one call: milliseconds and the memory it needs at its peak.",
        *("boxes", "kept", "ours", "", "torchvision", ""),
    )
    for name, case in {"clustered": clustered(maps, 100_000), "scattered": scattered(100_000)}.items():
        cells, results = [], []
        for run in nms_contenders(case._replace(labels=None)).values():
            kept, seconds, peak = peak_memory(run)
            cells += [f"{seconds * 1e3:.0f}", f"{peak:.1f} MB"]
            results.append(kept)
        assert all(torch.equal(results[0], other) for other in results), f"results differ at 100,000 {name} boxes"
        report.row(name, len(results[0]), *(cells if len(results) == 2 else [*cells, "-", "-"]))


def set_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared", help="holds bench/gen_raw.py")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--write", action="store_true", help="write tests/bench/results/ops_<processor>.md")
    kind.add_argument("--quick", action="store_true", help="a few cases and rounds, to see that all of it works")
    arguments = parser.parse_args()
    generator = Generator(arguments.shared)
    libraries = f"NumPy {np.__version__}, OpenCV {cv2.__version__}, "
    libraries += NO_TORCHVISION or f"torchvision {torchvision.__version__}"
    report = Report("yolonas.ops on a CPU", libraries, "python tests/bench/ops.py --write")
    measure_decode_nms(report, generator, arguments.quick)
    measure_from_memory(report, generator.maps(3, 1), arguments.quick)
    measure_decode_cliffs(report, generator, arguments.quick)
    measure_nms(report, generator, arguments.quick)
    if not arguments.quick:
        measure_memory(report, generator.maps(3, 1))
    report.finish()
    if arguments.write:
        report.write("ops")
    if not arguments.quick:
        training = ["dfl.py", *["--write"] * arguments.write]
        gpu = ["gpu.py", "--steps", "figures", "--shared", str(arguments.shared)]  # run by itself, it writes a report
        for name, *options in [training, gpu] if torch.cuda.is_available() else [training]:
            print(flush=True)
            subprocess.run([sys.executable, str(Path(__file__).with_name(name)), *options], check=True)


if __name__ == "__main__":
    main()
