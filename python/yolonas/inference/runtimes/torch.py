"""A network in PyTorch: on a CPU as it is, on a CUDA device as one graph from canvases to detections."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from yolonas import ops
from yolonas.errors import CheckpointError
from yolonas.exported import read_manifest
from yolonas.inference.runtimes import Canvases, Decoding, Found, in_parts, split
from yolonas.model.config import BIT_DEPTH, STRIDES

if TYPE_CHECKING:
    from yolonas.model import YoloNAS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MOST_GRAPHS = 4  # of CUDA; each keeps its intermediates

Network = Callable[[Tensor], tuple[Tensor, ...]]  # canvases uint8 [B, 3, H, W] -> six raw maps, class maps first


class TorchRuntime:
    """A `Runtime` in PyTorch.

    On a CUDA device network and decoding are captured into one graph when a shape and thresholds come for the second
    time; the `MOST_GRAPHS` last used are kept. The host waits once, for the detections.
    """

    name = "torch"

    def __init__(
        self,
        network: Network,
        device: torch.device,
        precision: str,
        *,
        compiled: bool = False,
        batch: int | None = None,  # the only one that the network takes
    ) -> None:
        self._device, self._batch = device, batch
        self.device = str(device)
        self.precision = precision
        self._network = cast(Network, torch.compile(network)) if compiled else network
        self._lock = threading.Lock()
        self._hidden: dict[tuple[int, ...], Tensor] = {}  # classes that are not looked for, on the device
        self._graphs: OrderedDict[tuple[tuple[int, ...], Decoding], _Graph | None] = OrderedDict()  # None: seen once

    @classmethod
    def of(cls, model: YoloNAS, device: torch.device, precision: str, *, compiled: bool = False) -> TorchRuntime:
        """A model: fused, channels_last, in `precision`. The model itself stays as it is."""
        network = _Preprocessed(model, DTYPES[precision]).to(device)
        return cls(network, device, precision, compiled=compiled)

    @classmethod
    def load(cls, path: Path, device: torch.device, *, compiled: bool = False) -> TorchRuntime:
        """A raw .pt2 file of `yolonas export`. Raises CheckpointError for one that is damaged, or is not raw."""
        manifest = read_manifest(path)
        if (manifest.output, manifest.input) != ("raw", "uint8"):
            raise CheckpointError(
                f"{path} has {manifest.output} outputs and takes {manifest.input} images, which is not run here: "
                "export it as .pt2 without --nms and --input float, or as .onnx"
            )
        try:
            program = torch.export.load(path)
        except Exception as error:  # a zip file of torch: whatever it provokes, it is no exported program
            raise CheckpointError(
                f"{path} is damaged or of another version of torch ({error}): export it again"
            ) from error
        network = program.module()
        return cls(network.to(device), device, manifest.precision, compiled=compiled, batch=manifest.batch)

    def allocate(self, count: int, height: int, width: int) -> Canvases:
        """See `Runtime`; from page-locked memory a CUDA device copies at once."""
        pinned = self._device.type == "cuda"
        return cast(Canvases, torch.empty((count, 3, height, width), dtype=torch.uint8, pin_memory=pinned).numpy())

    def detect(self, canvases: Canvases, decoding: Decoding) -> list[Found]:
        parts = in_parts(canvases, self._batch)
        return [found for part, count in parts for found in self._detect(part, decoding)[:count]]

    def _detect(self, canvases: Canvases, decoding: Decoding) -> list[Found]:
        images = torch.from_numpy(canvases)
        with self._lock, torch.inference_mode():
            if self._device.type == "cuda":
                with torch.cuda.device(self._device):
                    results, maps = self._on_cuda(images, decoding)
            else:
                results, maps = self._run(images, decoding)
            return _found(results, maps)

    def maps(self, canvases: Canvases) -> tuple[Tensor, ...]:
        """See `Runtime`; on a CUDA device without the graph that `detect` runs."""
        with self._lock, torch.inference_mode():
            maps = self._network(torch.from_numpy(canvases).to(self._device))
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            return maps

    def found(self, maps: tuple[Tensor, ...], count: int, decoding: Decoding) -> list[Found]:
        with self._lock, torch.inference_mode():
            decoded = ops.Decoded(*(t.cpu() for t in self._decode(maps, decoding)))
            return _found(decoded, maps if decoding.signals else ())

    def _run(self, images: Tensor, decoding: Decoding) -> tuple[ops.Decoded, tuple[Tensor, ...]]:
        """Detections, and the raw maps where signals are to be gathered from them."""
        maps = self._network(images)
        return self._decode(maps, decoding), maps if decoding.signals else ()

    def _decode(self, maps: tuple[Tensor, ...], decoding: Decoding) -> ops.Decoded:
        if decoding.hidden:
            if decoding.hidden not in self._hidden:  # made at the first call: in a capture nothing can be copied
                self._hidden[decoding.hidden] = torch.tensor(decoding.hidden, device=self._device)
            hidden = self._hidden[decoding.hidden]
            for logits in maps[:3]:
                logits.index_fill_(1, hidden, -torch.inf)
        return ops.decode_nms(
            maps[:3],
            maps[3:],
            STRIDES,
            score_threshold=decoding.conf,
            iou_threshold=decoding.iou,
            pre_nms_top_k=decoding.candidates,
            max_detections=decoding.max_det,
            class_agnostic=decoding.agnostic,
        )

    def _on_cuda(self, images: Tensor, decoding: Decoding) -> tuple[ops.Decoded, tuple[Tensor, ...]]:
        """Detections in host memory, and what `_run` gives with them on the device."""
        key = (tuple(images.shape), decoding)
        if key not in self._graphs:  # a last, smaller batch comes once, and a capture takes longer than its use
            self._graphs[key] = None
            decoded, maps = self._run(images.to(self._device, non_blocking=True), decoding)
        else:
            graph = self._graphs[key]
            if graph is None:
                graph = self._graphs[key] = _Graph(lambda x: self._run(x, decoding), images, self._device)
            decoded, maps = graph(images)
        self._graphs.move_to_end(key)
        while len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
        host = ops.Decoded(*(t.to("cpu", non_blocking=True) for t in decoded))
        torch.cuda.current_stream().synchronize()
        return host, maps


def _found(decoded: ops.Decoded, maps: tuple[Tensor, ...]) -> list[Found]:
    """Detections in host memory by image, with signals where there are maps."""
    boxes, scores, labels, anchors, counts = (tensor.numpy() for tensor in decoded)
    found = split(boxes, scores, labels, counts)
    if maps:
        from yolonas.inference.signals import with_signals

        found = with_signals(found, anchors, maps)
    return found


class _Graph:
    """A captured run. Its results lie in the same device memory at every call."""

    def __init__(
        self,
        run: Callable[[Tensor], tuple[ops.Decoded, tuple[Tensor, ...]]],
        images: Tensor,
        device: torch.device,
    ) -> None:
        self._images = images.to(device)
        # cuDNN's choice by measurement, which pays as the shape comes again; its warm-up calls may not be captured.
        with torch.backends.cudnn.flags(benchmark=True):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    run(self._images)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads go on meanwhile: they fill canvases, and allocate page-locked memory for the next ones.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._results = run(self._images)

    def __call__(self, images: Tensor) -> tuple[ops.Decoded, tuple[Tensor, ...]]:
        self._images.copy_(images, non_blocking=True)
        self._graph.replay()
        return self._results


class _Preprocessed(nn.Module):
    """A fused network that takes canvases: uint8 [B, 3, H, W], any layout -> six maps of `dtype`.

    The arithmetic of the preprocessing is in float32 whatever the network's, as 1/255 in bfloat16 is 0.4 % off.
    """

    def __init__(self, model: YoloNAS, dtype: torch.dtype) -> None:
        super().__init__()
        from yolonas.tracing import scale_and_shift

        scale, shift = scale_and_shift(model.preprocessing)
        self.register_buffer("scale", scale / BIT_DEPTH)
        self.register_buffer("shift", shift if shift.any() else None)
        self.dtype = dtype
        self.model = model.fused().requires_grad_(False).to(dtype)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, canvases: Tensor) -> tuple[Tensor, ...]:
        images = canvases.contiguous(memory_format=torch.channels_last).float().mul_(cast(Tensor, self.scale))
        if self.shift is not None:
            images = images.add_(cast(Tensor, self.shift))
        raw = self.model(images.to(self.dtype))
        return (*raw.class_logits, *raw.box_logits)
