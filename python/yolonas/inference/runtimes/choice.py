"""Which runtime runs a network: the one asked for, or for a long job the quickest of those that are installed."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolonas.errors import OptionError
from yolonas.exported import SUFFIXES, Manifest
from yolonas.inference.runtimes import Canvases, Decoding, Runtime

if TYPE_CHECKING:
    from yolonas.checkpoint import Checkpoint

RUNTIMES = ("auto", "torch", "onnxruntime", "openvino")
PRECISIONS = ("auto", "fp32", "fp16", "bf16")
LONG = 20.0  # s that a job takes on the network: the export that the others need takes 5 to 15
ROUNDS = 3

log = logging.getLogger(__name__)


class Choice:
    """The runtime of a network, opened; with "auto" it can become another one.

    `current` is it; `milliseconds` says what an image took in each runtime, once they have been measured.
    """

    def __init__(
        self,
        source: Checkpoint | Path,
        manifest: Manifest,
        device: Any,
        runtime: str,
        precision: str,
        threads: int | None,
        compiled: bool,
    ) -> None:
        self.milliseconds: dict[str, float] = {}
        self._open: Callable[[str], Runtime] = lambda name: open_runtime(
            name, source, manifest, device, precision, threads, compiled
        )
        names = _possible(source, manifest, device, precision) if runtime == "auto" else [runtime]
        self.current = self._open(names[0])
        self._others = names[1:]

    def consider(self, canvases: Canvases, decoding: Decoding, images_left: float, seconds_per_image: float) -> None:
        """Before a long rest of a job, measure the runtimes on the first canvas and go on with the quickest."""
        if not self._others or images_left * seconds_per_image < LONG:
            return
        others, self._others = self._others, []
        opened = {self.current.name: self.current}
        for name in others:
            try:
                runtime = self._open(name)
                runtime.detect(canvases[:1], decoding)  # makes plans and takes memory, so it is not timed
            except Exception as error:  # a cache that cannot be written, or whatever an exporter raises
                log.warning("runtime %s is left out: %s", name, error)
            else:
                opened[name] = runtime
        self.milliseconds = dict.fromkeys(opened, float("inf"))
        for _ in range(ROUNDS):
            for name, runtime in opened.items():
                start = time.perf_counter()
                runtime.detect(canvases[:1], decoding)
                self.milliseconds[name] = min(self.milliseconds[name], 1e3 * (time.perf_counter() - start))
        self.current = opened[min(opened, key=self.milliseconds.__getitem__)]
        log.info("%s", self.report())

    def report(self) -> str:
        """What was chosen and why, as one line; empty as long as nothing was measured."""
        times = sorted(self.milliseconds.items(), key=lambda item: item[1])
        listed = ", ".join(f"{name} {ms:.1f}" for name, ms in times)
        return f"Runtime {self.current.name}: milliseconds for an image are {listed}" if times else ""


def open_runtime(
    name: str,
    source: Checkpoint | Path,
    manifest: Manifest,
    device: Any,
    precision: str,
    threads: int | None,
    compiled: bool,
) -> Runtime:
    """A runtime by name. Raises OptionError where it cannot run this file, on this device, in this precision."""
    kind = SUFFIXES[source.suffix.lower()] if isinstance(source, Path) else "checkpoint"
    suits: dict[str, tuple[str, ...]] = {"torch": ("checkpoint", "pt2"), "onnxruntime": ("checkpoint", "onnx")}
    suits["openvino"] = ("checkpoint", "onnx", "openvino")
    if kind not in suits[name]:
        fitting = " or ".join(runtime for runtime, kinds in suits.items() if kind in kinds)
        raise OptionError(f"runtime {name!r} does not run {source}: use {fitting}, or auto")
    if name == "torch":
        return _open_torch(source, device, precision, threads, compiled)
    if compiled:
        raise OptionError(f"compile is of runtime 'torch', not {name!r}")
    if str(device).strip().lower() not in ("auto", "cpu"):
        raise OptionError(f"runtime {name!r} runs on the CPU here, not on device {str(device)!r}: use torch, or cpu")
    own = (manifest.precision, "fp32", "bf16") if name == "openvino" else (manifest.precision,)
    if precision not in ("auto", *own):
        fitting = ", ".join(dict.fromkeys(("auto", *(p for p in own if p in PRECISIONS))))
        raise OptionError(f"precision {precision!r} is not what runtime {name!r} has for these weights: use {fitting}")
    if not isinstance(source, Path):
        from yolonas.inference.runtimes.cache import exported

        source = exported(source)
    if name == "onnxruntime":
        from yolonas.inference.runtimes.onnxruntime import OnnxRuntime

        return OnnxRuntime(source, threads)
    from yolonas.inference.runtimes.openvino import OpenVino

    return OpenVino(source, threads, precision)


def _open_torch(source: Checkpoint | Path, device: Any, precision: str, threads: int | None, compiled: bool) -> Runtime:
    import torch

    from yolonas.inference.device import resolve_device
    from yolonas.inference.runtimes.torch import TorchRuntime

    place = resolve_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    if isinstance(source, Path):
        if precision != "auto":
            raise OptionError(f"precision {precision!r} is not of {source}: leave it at auto")
        return TorchRuntime.load(source, place, compiled=compiled)
    if precision == "fp16" and place.type == "cpu":
        raise OptionError("precision 'fp16' is slow on a CPU: use bf16, or device cuda")
    if precision == "auto":
        precision = "fp32"
    return TorchRuntime.of(source.model, place, precision, compiled=compiled)


def _possible(source: Checkpoint | Path, manifest: Manifest, device: Any, precision: str) -> list[str]:
    """The runtimes that "auto" may choose from, first the one to begin with.

    Those that would give other numbers are none of them: what another runtime makes of INT8 or bfloat16 differs.
    """
    if isinstance(source, Path):
        kind = SUFFIXES[source.suffix.lower()]
        if kind != "onnx":
            return [{"pt2": "torch", "openvino": "openvino"}[kind]]
        names = [name for name in ("openvino", "onnxruntime") if _installed(name)] or ["onnxruntime"]
        if precision == "bf16" and "openvino" in names:
            return ["openvino"]
        return names if manifest.precision == "fp32" else names[:1]
    from yolonas.inference.device import resolve_device

    if resolve_device(device).type != "cpu" or precision not in ("auto", "fp32"):
        return ["torch"]
    exports = _installed("onnx") and _installed("onnxscript")
    return ["torch", *(name for name in ("openvino", "onnxruntime") if exports and _installed(name))]


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
