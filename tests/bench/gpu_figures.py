"""What gpu.py measures: decode_nms, nms and the DFL ops on a device beside what people use in their place."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from measuring import Report, Run, Times, us
from ops import Boxes, Generator, clustered, nms_contenders, scattered, torch_door
from pipelines import NO_TORCHVISION, STRIDES, Maps, agreement, detected, each_map, reference_pipeline
from yolonas import ops
from yolonas.ops import reference

if NO_TORCHVISION:
    TORCHVISION = NO_TORCHVISION
else:
    import torchvision

    TORCHVISION = f"torchvision {torchvision.__version__}"


def seconds_of(device: str, run: Run) -> float:
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def take_turns(device: str, contenders: Mapping[str, Sequence[Run]], rounds: int) -> dict[str, Times]:
    """Time of one of each contender's calls. In its turn a contender makes all of its calls, twice unless slow."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for runs in contenders.values():
        for run in runs:
            run()
    for _ in range(rounds):
        for name, runs in contenders.items():
            calls = runs if len(runs) > 1 else [runs[0]] * 2
            times[name].append(seconds_of(device, lambda calls=calls: [call() for call in calls]) / len(calls))
    return {name: Times(statistics.median(t), min(t)) for name, t in times.items()}


def captured(runs: Sequence[Run]) -> Run:
    """One CUDA graph that makes all of the calls, one after the other: its time has no launches from the host in it."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        runs[0]()
    torch.cuda.current_stream().wait_stream(stream)
    results = []
    with torch.cuda.graph(graph):
        results += [run() for run in runs]  # kept, so that no call's output takes the memory of another's
    return lambda: (graph.replay(), results)


def within(report: Report, figure: str, times: Times | None, most: float) -> None:
    """A goal in microseconds."""
    wanted = f"at most {most * 1e6:.3g} us"
    if times is None:
        report.goals.append((figure, "not measured", "", wanted, ""))
        return
    holds = "yes" if times.median <= most else "**no**"
    report.goals.append((figure, f"{times.median * 1e6:.3g} us", f"{times.least * 1e6:.3g} us", wanted, holds))


def copy_bandwidth(device: str, rounds: int) -> float:
    """Bytes read and written in a second by copies of 1 GiB (64 MiB on a CPU)."""
    source = torch.ones((1 << 30 if device == "cuda" else 1 << 26) // 4, device=device)
    target = torch.empty_like(source)
    times = take_turns(device, {"copy": [lambda: target.copy_(source)]}, rounds)["copy"]
    return 2 * source.numel() * 4 / times.median


def batch_of(maps: Maps, images: int) -> Maps:
    """So many images; those of the generator again and again."""
    return each_map(maps, lambda m: m.repeat(math.ceil(images / len(m)), 1, 1, 1)[:images])


def size_of(maps: Sequence[Tensor]) -> int:
    return sum(m.numel() * m.element_size() for m in maps)


def measure_decode_nms(report: Report, generator: Generator, device: str, quick: bool) -> None:
    rounds = 3 if quick else 30
    bandwidth = copy_bandwidth(device, rounds)
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 1 << 20
    report.table(
        f"## decode_nms\n\nMicroseconds: median [least], or median (how many times ours, eager). Crowd 3. Inputs are "
        f"copies used in turn,\n{2 * cache >> 20} MiB at least, twice the L2 cache, so they come from memory; `in L2` "
        f"repeats one copy instead, which a batch of 32 does not fit.\nfloor: one read of the class maps at the "
        f"{bandwidth / 1e12:.3g} TB/s that a copy moved here.",
        *("dtype", "conf", "batch", "graph", "graph, in L2", "eager", "reference pipeline", "floor", "agreement"),
    )
    dtypes = (torch.float32, torch.float16) if device == "cuda" else (torch.float32,)  # torchvision has no half on CPUs
    cases = list(itertools.product(dtypes, (0.01, 0.25), (1, 8, 32)))
    for dtype, conf, batch in [(torch.float32, 0.25, 1)] if quick else cases:
        maps = each_map(batch_of(generator.maps(3, 8), batch), lambda m, dtype=dtype: m.to(dtype))
        on_device = each_map(maps, lambda m: m.to(device))
        copies = 2 if quick else max(2, math.ceil(2 * cache / (size_of(maps.class_logits) + size_of(maps.box_logits))))
        inputs = [each_map(on_device, torch.clone) for _ in range(copies)]
        calls = [torch_door(m, conf) for m in inputs]

        ours = [t.cpu() for t in calls[0]()]
        expected = torch_door(each_map(maps, lambda m: m[:8]), conf)()
        assert all(torch.equal(a[:8], b) for a, b in zip(ours, expected, strict=True)), "differs from the CPU's bits"
        contenders = {"eager": calls}
        if not NO_TORCHVISION:
            contenders["reference"] = [reference_pipeline(m, conf) for m in inputs[:2]]
            theirs = [tuple(t.cpu() for t in image) for image in contenders["reference"][0]()]
            share = agreement(detected(tuple(ours)), detected(theirs))
            assert share > 0.98 or dtype != torch.float32, share  # theirs computes in the maps' type
        times = take_turns(device, contenders, rounds)
        if device == "cuda":
            per_graph = max(len(calls), 8)  # calls, so that the launch of the graph does not count
            in_turn = list(itertools.islice(itertools.cycle(calls), per_graph))
            turns = {"graph": in_turn, "in L2": [calls[0]] * per_graph}
            graphs = take_turns(device, {name: [captured(runs)] for name, runs in turns.items()}, rounds)
            times |= {name: Times(*(t / per_graph for t in both)) for name, both in graphs.items()}
        floor = size_of(maps.class_logits) / bandwidth
        other = times.get("reference")
        row = (us(times.get("graph")), us(times.get("in L2")), us(times["eager"]), us(other, times["eager"]))
        case = (str(dtype).removeprefix("torch."), conf, batch)
        report.row(*case, *row, f"{floor * 1e6:.3g}", "-" if NO_TORCHVISION else f"{share:.4f}")
        figure = "decode_nms, {}, conf {}, batch {}".format(*case)
        if batch < 32:
            wanted = {1: 25, 8: 100}[batch]
            report.goal(f"{figure}: reference pipeline / ours, eager", other, times["eager"], wanted)
        most = {1: 20e-6, 8: 30e-6, 32: 3 * floor + 10e-6}[batch]
        within(report, f"{figure}: in a graph", times.get("graph"), most)


def measure_cliffs(report: Report, generator: Generator, device: str, quick: bool) -> None:
    usual = each_map(generator.maps(3, 1), lambda m: m.to(device))
    settings = {"iou_threshold": 0.7, "pre_nms_top_k": 1000, "max_detections": 300}

    def call(maps: Maps, conf: float, **changed: object) -> Run:
        return lambda: ops.decode_nms(*maps, STRIDES, score_threshold=conf, **settings | changed)

    cases = {
        "usual": call(usual, 0.01),
        "none above the threshold": call(usual, 0.9999),
        "every (anchor, class) a candidate": call(usual, 0.0),
        "all logits equal, all candidates": call(each_map(usual, torch.zeros_like), 0.25),
        "best class of each anchor alone": call(usual, 0.01, multi_label=False),
        "channels_last": call(each_map(usual, lambda m: m.to(memory_format=torch.channels_last)), 0.01),
        "every one a candidate, top-k 2000": call(usual, 0.0, pre_nms_top_k=2000),
        "every one a candidate, top-k 10,000": call(usual, 0.0, pre_nms_top_k=10_000),
    }
    report.table(
        "### No cliffs\n\nCrowd 3, batch 1, float32, in L2; microseconds, and the least device memory beside the maps.",
        *("maps", "graph", "eager", "MB"),
    )
    for name, run in list(cases.items())[: 3 if quick else None]:
        graph = None
        if device == "cuda":
            both = take_turns(device, {"graph": [captured([run] * 8)]}, 10)["graph"]
            graph = Times(*(t / 8 for t in both))
        eager = take_turns(device, {"eager": [run]}, 3 if quick else 20)["eager"]
        report.row(name, us(graph), us(eager), megabytes(device, run))


def megabytes(device: str, run: Run) -> str:
    """Device memory that a call adds at its peak."""
    if device == "cpu":
        return "-"
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return f"{(torch.cuda.max_memory_allocated() - before) / 1e6:.1f}"


def measure_nms(report: Report, generator: Generator, device: str, quick: bool) -> None:
    report.table(
        "## nms and batched_nms\n\nIoU 0.7; microseconds. clustered: the best (anchor, class) pairs of an image of "
        "crowd 3; scattered: boxes\nof 14 to 420 px anywhere on 640 px. Our CPU op keeps the same boxes in all cases.",
        *("boxes", "n", "kept", "ours", "torchvision", "torchvision keeps the same"),
    )
    maps = generator.maps(3, 1)
    sizes = (1000,) if quick else (1000, 10_000, 30_000, 100_000)
    for n, kind, labelled in itertools.product(sizes, ("clustered", "scattered"), (False, True)):
        case = clustered(maps, n) if kind == "clustered" else scattered(n)
        case = case if labelled else case._replace(labels=None)
        on_device = Boxes(*(None if t is None else t.to(device) for t in case))
        contenders = nms_contenders(on_device)
        kept = {name: run().cpu() for name, run in contenders.items()}
        expected = nms_contenders(case)["ours"]()
        same = {name: "yes" if torch.equal(indices, expected) else "no" for name, indices in kept.items()}
        assert same["ours"] == "yes", f"{kind}, n = {n}: differs from the CPU"
        times = take_turns(device, {name: [run] for name, run in contenders.items()}, 3 if quick or n > 30_000 else 15)
        ours, theirs = times["ours"], times.get("torchvision")
        name = f"{kind}, {'80 classes' if labelled else 'class-agnostic'}"
        report.row(name, n, len(expected), us(ours), us(theirs, ours), same.get("torchvision", "-"))
        report.goal(f"nms, {name}, n = {n}: torchvision / ours", theirs, ours, 3 if n == 1000 else 10)


def forward_backward(loss: Callable[[list[Tensor]], Tensor], leaves: list[Tensor]) -> Run:
    return lambda: torch.autograd.grad(loss(leaves), leaves)


def unfused_dfl_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The usual two cross entropies."""
    lower = targets.long()
    share = targets - lower
    near = F.cross_entropy(logits, lower, reduction="none")
    far = F.cross_entropy(logits, lower + 1, reduction="none")
    return (near * (1 - share) + far * share).mean()


def measure_dfl(report: Report, device: str, quick: bool) -> None:
    report.table(
        "## DFL ops, forward and backward\n\nEager, a training step's shapes: the boxes of all anchors of 16 images of "
        "640 px, the loss of 6000 positive anchors.\nMicroseconds, and megabytes of device memory at the peak.",
        *("op", "dtype", "ours", "unfused", "MB, ours", "MB, unfused"),
    )
    random = torch.Generator().manual_seed(0)
    batch = 1 if quick else 16
    for dtype in (torch.float32,) if quick else (torch.float32, torch.float16):

        def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=random).to(device, dtype).requires_grad_()

        maps = [leaf(batch, 68, 640 // s, 640 // s) for s in STRIDES]
        logits = [leaf(6000 * 4, 17)]
        targets = (torch.rand(6000 * 4, generator=random) * 15.99).to(device)
        pairs = {
            "dfl_decode": (
                forward_backward(lambda m: ops.dfl_decode(m, STRIDES).sum(), maps),
                forward_backward(lambda m: reference.dfl_decode(m, STRIDES).sum(), maps),
            )
        }
        if hasattr(ops, "dfl_loss"):
            pairs["dfl_loss"] = (
                forward_backward(lambda x: ops.dfl_loss(x[0], targets), logits),  # noqa: B023 (used at once)
                forward_backward(lambda x: unfused_dfl_loss(x[0].float(), targets), logits),  # noqa: B023
            )
        for name, runs in pairs.items():
            ours, unfused = runs
            for a, b in zip(ours(), unfused(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 if dtype == torch.float32 else 1.0)
            times = take_turns(device, {"ours": [ours], "unfused": [unfused]}, 3 if quick else 20)
            row = (us(times["ours"]), us(times["unfused"], times["ours"]), *(megabytes(device, run) for run in runs))
            kind = str(dtype).removeprefix("torch.")
            report.row(name, kind, *row)
            report.goal(f"{name}, {kind}, forward and backward: unfused / ours", times["unfused"], times["ours"], 3)


def measure(report: Report, shared: Path, device: str, quick: bool) -> None:
    generator = Generator(shared)
    measure_decode_nms(report, generator, device, quick)
    measure_cliffs(report, generator, device, quick)
    measure_nms(report, generator, device, quick)
    measure_dfl(report, device, quick)
