"""A checkpoint's network as a graph: of ONNX, or of torch.export."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from yolonas import ops
from yolonas.exported import INPUT_NAME, RAW_OUTPUT_NAMES, Manifest
from yolonas.model import Preprocessing, YoloNAS
from yolonas.model.config import BIT_DEPTH

OPSET = 18
SCOPES_KEY = "pkg.torch.onnx.name_scopes"  # of a node's metadata: the modules it comes from, outermost first


class RawNetwork(nn.Module):
    """Images [B, 3, H, W], uint8, or float 0..1, -> the six raw maps, float32.

    The preprocessing's arithmetic is inside. With `half` the network computes in float16 between the two.
    """

    def __init__(self, model: YoloNAS, half: bool = False) -> None:
        super().__init__()
        fused = model if model.form == "fused" and not half else model.fused()
        self.model = fused.half() if half else fused
        self.dtype = torch.float16 if half else torch.float32
        self.normalizes = (model.preprocessing.mean, model.preprocessing.std) != (None, None)
        scale, shift = scale_and_shift(model.preprocessing)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        scale, shift = cast(Tensor, self.scale), cast(Tensor, self.shift)
        x = images.to(scale.dtype)
        if images.dtype == torch.uint8:
            x = x * (scale / BIT_DEPTH)
        elif self.normalizes:
            x = x * scale
        if self.normalizes:
            x = x + shift
        raw = self.model(x.to(self.dtype))
        return tuple(m.float() for m in (*raw.class_logits, *raw.box_logits))


class DetectingNetwork(nn.Module):
    """A raw network with `yolonas.ops.decode_nms` behind it, in one of the two output formats; for torch.export."""

    def __init__(self, raw: RawNetwork, output: str, nms: dict[str, Any]) -> None:
        super().__init__()
        self.raw = raw
        self.output = output
        self.nms = nms

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.raw(images)
        found = ops.decode_nms(maps[:3], maps[3:], self.raw.model.strides, **self.nms)
        counts = found.counts.unsqueeze(1)
        is_output = torch.arange(found.scores.shape[1], device=counts.device) < counts
        if self.output == "batch":
            boxes = torch.where(is_output.unsqueeze(2), found.boxes, -1.0)
            return counts, boxes, torch.where(is_output, found.scores, -1.0), found.labels
        image = is_output.nonzero()[:, :1].float()
        scores, labels = found.scores[is_output].unsqueeze(1), found.labels[is_output].unsqueeze(1).float()
        return (torch.cat([image, found.boxes[is_output], scores, labels], dim=1),)


def scale_and_shift(preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """Normalisation of an image 0..1 as image * scale + shift, float32 [3, 1, 1] each."""
    mean = torch.tensor(preprocessing.mean or (0.0, 0.0, 0.0)).reshape(3, 1, 1)
    std = torch.tensor(preprocessing.std or (1.0, 1.0, 1.0)).reshape(3, 1, 1)
    return 1 / std, -mean / std


def onnx_graph(model: YoloNAS, manifest: Manifest, half: bool = False) -> Any:
    """The ModelProto of the raw network, its input as the manifest says."""
    with quiet():
        program = torch.onnx.export(
            RawNetwork(model, half).eval(),
            _example(manifest),
            input_names=[INPUT_NAME],
            output_names=list(RAW_OUTPUT_NAMES),
            dynamic_shapes=_dynamic_shapes(manifest),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    proto = program.model_proto  # type: ignore[union-attr]
    for part in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        # Of a node it is told which module it comes from; the rest is stack traces with paths of this machine.
        scopes = [entry for entry in part.metadata_props if entry.key == SCOPES_KEY]
        del part.metadata_props[:]
        part.metadata_props.extend(scopes)
    return proto


def torch_program(model: YoloNAS, manifest: Manifest) -> torch.export.ExportedProgram:
    """The program of torch.export that the manifest describes."""
    network: nn.Module = RawNetwork(model, half=manifest.precision == "fp16")
    if manifest.nms is not None:
        network = DetectingNetwork(cast(RawNetwork, network), manifest.output, manifest.nms)
    with quiet(), torch.no_grad():
        return torch.export.export(network.eval(), _example(manifest), dynamic_shapes=_dynamic_shapes(manifest))


def _example(manifest: Manifest) -> tuple[Tensor]:
    height, width = manifest.image_size or (64, 96)  # sizes that differ, or the exporter takes them for one
    dtype = torch.uint8 if manifest.input == "uint8" else torch.float32
    return (torch.zeros(manifest.batch or 2, 3, height, width, dtype=dtype),)


def _dynamic_shapes(manifest: Manifest) -> tuple[dict[int, Any]] | None:
    if manifest.image_size is not None:
        return None
    dim, height, width = torch.export.Dim, torch.export.Dim("height"), torch.export.Dim("width")
    return ({0: dim("batch"), 2: 32 * height, 3: 32 * width},)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's progress, warnings and log lines, which tell the user nothing to do."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(cast(IO[str], _Mute(sys.stdout))):
        warnings.simplefilter("ignore")
        yield


class _Mute:
    """Standard output without what this thread writes: others go on printing meanwhile."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
