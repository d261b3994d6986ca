"""One training step, ours beside modern-yolonas 0.5's: time, peak memory, and whether the loader keeps ahead.

python tests/bench/step.py [--write] [--compile] [--device cuda] [--threads 2] [--rounds 5] [--shared ../shared]

A step is what a trainer does with a batch: images to the device and the network's input, forward, loss, backward,
clipping of the gradient, optimizer, average of the weights. Ours is `training/trainer.py`'s own; the peer's is its
model, its loss and its callback in the order in which its Lightning module has them called, with its default numbers.
S, 3 classes, 14 boxes an image, the same batch; contenders take turns, and figures are medians over the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import peer
from measuring import REPOSITORY, Report, Times, peak_memory
from yolonas.data.dataset import Batch, DrawSampler, TrainingSet, collate, start_worker
from yolonas.data.labelled import LabelledImage, LabelledImages
from yolonas.data.targets import Targets
from yolonas.training.recipe import Recipe
from yolonas.training.trainer import _Run

NAMES, BOXES = ("a", "b", "c"), 14
CASES = ((320, 8), (640, 4))  # px, batch
GOAL = {"cpu": 1.3, "cuda": 1.5}
PEER = "modern-yolonas"

Step = Callable[[], Any]


def batch_of(size: int, batch: int) -> Batch:
    """Noise with boxes of 15 to 35 % of the canvas."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)).permute(0, 3, 1, 2)
    corners = rng.uniform(0, 0.65, (batch, BOXES, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0.15, 0.35, (batch, BOXES, 2))], axis=-1) * size
    return Batch(images, Targets.pad(list(boxes), list(rng.integers(0, len(NAMES), (batch, BOXES)))))


def our_step(variant: str, size: int, data: Batch, device: torch.device, precision: str, compiled: bool) -> Step:
    one = LabelledImage(
        Path("none"), *(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool)), 1, 1, 1
    )
    recipe = Recipe(image_size=size, batch=len(data.images), precision=precision, compile=compiled)  # type: ignore[arg-type]
    images = LabelledImages(NAMES, [one])
    run = _Run(images, LabelledImages(NAMES, []), recipe, Path("none"), device, None, None, variant, {})
    run.model.train()
    return lambda: run.train_step(data, 0.5)


def peer_step(variant: str, data: Batch, device: torch.device, precision: str) -> Step:
    """The peer's, on float32 images in 0..1, as its data set makes them."""
    training, size = peer.load("training"), data.images.shape[-1]
    network = peer.model(variant, len(NAMES)).to(device).train()
    loss = training.PPYoloELoss(num_classes=len(NAMES))
    optimizer = peer.load("training.optimizer").create_optimizer(network)
    average, holder = training.EMACallback(), SimpleNamespace(model=network)
    average.on_fit_start(None, holder)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
    dtype = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    images = data.images.contiguous().float() / 255
    centres, sides = (
        data.targets.boxes.unflatten(-1, (2, 2)).mean(-2),
        data.targets.boxes.unflatten(-1, (2, 2)).diff(dim=-2),
    )
    rows = torch.cat([centres, sides.squeeze(-2)], dim=-1) / size
    numbers = torch.arange(len(images)).repeat_interleave(BOXES).unsqueeze(-1)
    targets = torch.cat([numbers, data.targets.labels.flatten().unsqueeze(-1), rows.flatten(0, 1)], dim=-1).float()

    def step() -> Tensor:
        inputs, truth = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            total, _ = loss(network(inputs), truth)
        scaler.scale(total).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        average.on_train_batch_end(None, holder, None, None, 0)
        return total.detach()

    return step


def contender(name: str, variant: str, size: int, batch: int, device: torch.device) -> Step:
    """The step of "who, precision[, compiled]"."""
    who, precision, *compiled = name.split(", ")
    torch.manual_seed(0)
    data = batch_of(size, batch)
    if who == PEER:
        return peer_step(variant, data, device, precision)
    return our_step(variant, size, data, device, precision, bool(compiled))


def contenders(device: torch.device, compiled: bool) -> list[str]:
    low = ["bfloat16", "float16"] if device.type == "cuda" else ["bfloat16"]
    names = [f"{who}, {precision}" for precision in ("float32", *low) for who in ("ours", PEER)]
    return names + [f"ours, {precision}, compiled" for precision in ("float32", "bfloat16") if compiled]


def timed(step: Step, device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(steps: Mapping[str, Step], device: torch.device, rounds: int) -> dict[str, Times]:
    """Seconds of a step. The peer shares the machine's noise with ours: a turn is one step, seconds long on a CPU."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(timed(step, device))
    return {name: Times(statistics.median(values), min(values)) for name, values in times.items()}


def memory(name: str, variant: str, size: int, batch: int, device: torch.device) -> float:
    """Megabytes that three steps add to a process at their peak, its model included; on a GPU those of the device."""
    contender(name, "n", 64, 2, device)()  # imports what is imported late

    def run() -> None:
        step = contender(name, variant, size, batch, device)
        for _ in range(3):
            step()

    added = peak_memory(run)[2]
    return torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else added


def memory_of_a_process(name: str, options: argparse.Namespace, size: int, batch: int) -> float:
    arguments = ["--memory", json.dumps([name, size, batch]), "--device", options.device, "--variant", options.variant]
    command = [sys.executable, __file__, *arguments, "--threads", str(options.threads)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{name} at {size} px failed: {result.stderr.strip()[-400:]}")
    return float(result.stdout.splitlines()[-1])


def measure_steps(report: Report, options: argparse.Namespace, size: int, batch: int) -> Times:
    """Tables of one canvas size; returns our time in the precision that a run chooses by itself."""
    device = torch.device(options.device)
    names = contenders(device, options.compile)
    steps, first = {}, {}
    for name in names:
        steps[name] = contender(name, options.variant, size, batch, device)
        first[name] = timed(steps[name], device)
        timed(steps[name], device)
    times = in_turns(steps, device, options.rounds)
    steps.clear()
    peaks = {name: memory_of_a_process(name, options, size, batch) for name in names if "compiled" not in name}
    best = min((name for name in names if name.startswith(PEER)), key=lambda name: times[name].median)
    report.table(
        f"## {size} px, batch {batch}",
        *("step", "seconds [least]", "images/s", f"{best} / it", "first step, s", "peak MB, model included"),
    )
    for name in names:
        median, least = times[name]
        cells = [name, f"{median:.3g} [{least:.3g}]", f"{batch / median:.3g}", f"{times[best].median / median:.3g}x"]
        report.row(*cells, f"{first[name]:.3g}", f"{peaks[name]:.0f}" if name in peaks else "-")
    goal = GOAL[device.type]
    for precision in ("float32", "bfloat16"):
        ours, theirs = f"ours, {precision}", f"{PEER}, {precision}"
        report.goal(f"{size} px, batch {batch}, {theirs} / ours", times[theirs], times[ours], least=goal)
        peak = Times(*[peaks[ours]] * 2), Times(*[peaks[theirs]] * 2)
        report.goal(f"{size} px, batch {batch}, peak memory, ours / {theirs}", *peak, most=1.0)
    chosen = f"ours, {'bfloat16' if device.type == 'cuda' or torch.cpu._is_avx512_bf16_supported() else 'float32'}"
    return times[chosen]


def measure_loader(report: Report, shared: Path, size: int, batch: int, step: Times, count: int) -> None:
    """Samples a second of our loader and of the peer's on BCCD, one thread a process."""
    from yolonas.data.readers import read_dataset
    from yolonas.model import Preprocessing

    data = read_dataset(shared / "data" / "bccd", "train")
    recipe = Recipe(image_size=size)
    rate = Times(batch / step.median, batch / step.median)
    report.table(
        f"## The loader, {size} px, beside our step of {rate.median:.3g} images/s",
        *("loader", "processes", "samples/s, first pass", "samples/s, later"),
    )
    for workers in (0, 1, 2):
        views = TrainingSet(
            data,
            Preprocessing.square(size),
            augmentation=recipe.augmentation,
            cache_bytes=recipe.cache_bytes // max(workers, 1),
        )
        sampler = DrawSampler(len(data), batch)
        arguments: dict[str, Any] = {"num_workers": workers, "worker_init_fn": start_worker}
        loader: DataLoader[Any] = DataLoader(
            views, batch_sampler=sampler, collate_fn=collate, persistent_workers=workers > 0, **arguments
        )
        passes = [samples_per_second(loader, batch, count) for _ in range(2)]
        report.row("ours", workers or "the trainer's", *(f"{rate:.0f}" for rate in passes))
        if workers:
            shares = f"loader / step, {size} px, {workers} worker{'s' * (workers > 1)}"
            report.goal(shares, Times(passes[1], passes[1]), rate, least=1.0)
    with tempfile.TemporaryDirectory() as folder:
        views = peer.data_set(data, size, Path(folder) / "train.json", training=True)
        loader = DataLoader(
            views, batch, shuffle=True, drop_last=True, collate_fn=peer.load("data.collate").detection_collate_fn
        )
        passes = [samples_per_second(loader, batch, count) for _ in range(2)]
    report.row(PEER, "the trainer's", *(f"{rate:.0f}" for rate in passes))


def samples_per_second(loader: DataLoader[Any], batch: int, count: int) -> float:
    start, done = time.perf_counter(), 0
    for _ in islice(loader, -(-count // batch)):
        done += batch
    return done / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--variant", default="s", choices=["n", "s", "m", "l"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="steps of each contender  [5, on a GPU 50]")
    parser.add_argument("--compile", action="store_true", help="ours through torch.compile too, which takes minutes")
    parser.add_argument("--quick", action="store_true", help="n on small canvases: only to see that it runs")
    parser.add_argument("--write", action="store_true", help="into results/")
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared", help="the folder with data/bccd")
    parser.add_argument("--memory", help=argparse.SUPPRESS)  # [contender, px, batch]: print its peak memory
    options = parser.parse_args()
    if options.quick:  # one thread: two wait for each other where other tests use the cores
        options.variant, options.rounds, options.threads = "n", 1, 1
    torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device: leave --device out")
    if options.memory:
        name, size, batch = json.loads(options.memory)
        print(memory(name, options.variant, size, batch, torch.device(options.device)))
        return
    if options.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        print("torch.compile is left out: it needs a C++ compiler, g++ or clang++", file=sys.stderr)
        options.compile = False
    options.rounds = options.rounds or (50 if options.device == "cuda" else 5)
    name = torch.cuda.get_device_name() if options.device == "cuda" else None
    report = Report(
        f"A training step of {options.variant.upper()}",
        f"modern-yolonas {peer.VERSION}, {name or f'{options.threads} threads'}",
        "python tests/bench/step.py" + " --compile" * options.compile + f" --device {options.device}" * bool(name),
    )
    step = None
    for size, batch in ((64, 2), (96, 2)) if options.quick else CASES:
        times = measure_steps(report, options, size, batch)
        step = step or times
    if not (options.shared / "data" / "bccd").exists():
        report.text(f"\nThe loader was not measured: {options.shared}/data/bccd is not there (--shared).")
    elif step is not None:
        size, batch = (64, 2) if options.quick else CASES[0]
        measure_loader(report, options.shared, size, batch, step, 16 if options.quick else 205)
    report.finish()
    if options.write:
        report.write("step", name)


if __name__ == "__main__":
    main()
