"""Timing in turns, peak memory, and a report in Markdown that sets each figure beside its goal."""

from __future__ import annotations

import csv
import ctypes
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
BLOCK = 0.004  # s: a contender's turn repeats calls for this long, or is one call
SETTLE = 0.004  # s of rest before a turn: OpenMP's idle threads spin that long and would share the cores with it

Run = Callable[[], Any]


class Times(NamedTuple):
    median: float  # s
    least: float


def interleave(contenders: Mapping[str, Run], rounds: int) -> dict[str, Times]:
    """Time of a call of each contender; they take turns, so that other load on the machine meets all of them."""
    calls = {}
    for name, run in contenders.items():
        run()
        single = []
        for _ in range(3):  # an interruption in the only one would make every turn one call on cold caches
            start = time.perf_counter()
            run()
            single.append(time.perf_counter() - start)
        calls[name] = max(1, int(BLOCK / min(single)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            time.sleep(SETTLE)
            run()  # not counted: it finds its code and its data where the others left room for them
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            times[name].append((time.perf_counter() - start) / calls[name])
    return {name: Times(statistics.median(t), min(t)) for name, t in times.items()}


def peak_memory(run: Run) -> tuple[Any, float, float]:
    """Result, seconds and megabytes of resident memory that a call adds at its peak (Linux)."""

    def resident(field: str) -> float:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) / 1e3 if found else float("nan")

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = resident("VmRSS"), time.perf_counter()
    result = run()
    return result, time.perf_counter() - start, resident("VmHWM") - before


def ms(times: Times | None, ours: Times | None = None) -> str:
    """Milliseconds: "median [least]", or with `ours` "median (how many times ours)"."""
    return _figure(times, ours, 1e3)


def us(times: Times | None, ours: Times | None = None) -> str:
    """The same in microseconds."""
    return _figure(times, ours, 1e6)


def _figure(times: Times | None, ours: Times | None, per_second: float) -> str:
    if times is None:
        return "-"
    median = times.median * per_second
    text = f"{median:.0f}" if median >= 100 else f"{median:.3g}"
    return f"{text} ({times.median / ours.median:.3g}x)" if ours else f"{text} [{times.least * per_second:.3g}]"


def processor() -> str:
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return model[1] if model else platform.machine()


def processor_slug(machine: str | None = None) -> str:
    """The processor, or `machine`, as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", (machine or processor()).lower()).strip("_")


def busy_seconds() -> float:
    """Processor time of all processes of the machine since it started."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def append(path: Path, columns: Sequence[str], row: Mapping[str, Any]) -> None:
    """Add a row to a CSV file; a new file begins with the names of the columns."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


class Report:
    """Markdown, printed as it is measured and kept for a file; the goals come last."""

    def __init__(self, title: str, versions: str, command: str, commit: str | None = None) -> None:
        self.lines: list[str] = []
        self.goals: list[tuple[str, ...]] = []
        self.start, self.busy, self.own = (
            time.perf_counter(),
            busy_seconds(),
            sum(os.times()[:4]),
        )  # with ended children
        describe = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--exclude=*"]
        if commit is None:
            commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
        capability = torch.backends.cpu.get_cpu_capability()
        self.text(
            f"# {title}\n\n{date.today()}, commit {commit}, {processor()}, {os.cpu_count()} cores, {capability}; "
            f"Python {platform.python_version()}, torch {torch.__version__}, {versions}. `{command}` measured this."
        )

    def text(self, text: str) -> None:
        self.lines.append(text)
        print(text, flush=True)

    def row(self, *cells: object) -> None:
        self.text("| " + " | ".join(map(str, cells)) + " |")

    def table(self, above: str, *columns: str) -> None:
        self.text(f"\n{above}\n")
        self.row(*columns)
        self.row(*["---"] * len(columns))

    def goal(
        self, figure: str, above: Times | None, below: Times, least: float = 0, most: float = float("inf")
    ) -> None:
        """A ratio of medians, which is judged, and of least times, which other load on the machine disturbs less."""
        wanted = f"at least {least:g}x" if least else f"at most {most:g}x"
        if above is None:
            self.goals.append((figure, "not measured", "", wanted, ""))
            return
        ratio, of_least = above.median / below.median, above.least / below.least
        holds = "yes" if least <= ratio <= most else "**no**"
        self.goals.append((figure, f"{ratio:.3g}x", f"{of_least:.3g}x", wanted, holds))

    def finish(self) -> None:
        if self.goals:
            self.table("## Goals", "figure", "measured", "of least times", "goal", "holds")
        for goal in self.goals:
            self.row(*goal)
        seconds = time.perf_counter() - self.start
        others = busy_seconds() - self.busy - (sum(os.times()[:4]) - self.own)
        share = max(0.0, others / seconds / (os.cpu_count() or 1))
        self.text(f"\n{seconds:.0f} s, in which other processes used {share:.0%} of the cores.")

    def write(self, kind: str, machine: str | None = None) -> None:
        path = REPOSITORY / "tests" / "bench" / "results" / f"{kind}_{processor_slug(machine)}.md"
        path.write_text("\n".join(self.lines) + "\n")
        print(f"\nwritten to {path}")
