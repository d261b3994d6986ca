"""Exporting a network for other runtimes; decoding and NMS stay ours unless they are asked for in the file."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from yolonas.atomic import atomic_file
from yolonas.checkpoint import Checkpoint
from yolonas.exported import INPUT_NAME, METADATA_KEY, RAW_OUTPUT_NAMES, Manifest
from yolonas.extras import require
from yolonas.model import Preprocessing, YoloNAS
from yolonas.model.config import BIT_DEPTH

OPSET = 18


class RawNetwork(nn.Module):
    """Images [B, 3, H, W], uint8, or float 0..1, -> the six raw maps, with the preprocessing's arithmetic inside."""

    def __init__(self, model: YoloNAS) -> None:
        super().__init__()
        self.model = model if model.form == "fused" else model.fused()
        scale, shift = scale_and_shift(model.preprocessing)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        scale, shift = cast(Tensor, self.scale), cast(Tensor, self.shift)
        if images.dtype == torch.uint8:
            x = images.to(scale.dtype) * (scale / BIT_DEPTH)
        else:
            x = images.to(scale.dtype) * scale
        raw = self.model(x + shift)
        return (*raw.class_logits, *raw.box_logits)


def scale_and_shift(preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """Normalisation of an image 0..1 as image * scale + shift, float32 [3, 1, 1] each."""
    mean = torch.tensor(preprocessing.mean or (0.0, 0.0, 0.0)).reshape(3, 1, 1)
    std = torch.tensor(preprocessing.std or (1.0, 1.0, 1.0)).reshape(3, 1, 1)
    return 1 / std, -mean / std


def manifest_of(checkpoint: Checkpoint) -> Manifest:
    """The manifest of a checkpoint's raw float32 network for images of any size."""
    model = checkpoint.model
    return Manifest(
        model.variant, model.class_names, model.preprocessing, checkpoint.conf, checkpoint.iou,
        checkpoint.license, checkpoint.record,
    )  # fmt: skip


def export_raw_onnx(checkpoint: Checkpoint, path: Path) -> Manifest:
    """Write the raw network as ONNX: uint8 in, any batch, height and width; the file appears complete or not at all."""
    onnx = require("onnx", "onnx", "an export to ONNX")
    require("onnxscript", "onnx", "an export to ONNX")
    manifest = manifest_of(checkpoint)
    dim, height, width = torch.export.Dim, torch.export.Dim("height"), torch.export.Dim("width")
    example = torch.zeros(2, 3, 64, 96, dtype=torch.uint8)
    sizes = {0: dim("batch"), 2: 32 * height, 3: 32 * width}
    with quiet():
        program = torch.onnx.export(
            RawNetwork(checkpoint.model).eval(),
            (example,),
            input_names=[INPUT_NAME],
            output_names=list(RAW_OUTPUT_NAMES),
            dynamic_shapes=(sizes,),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    model = program.model_proto  # type: ignore[union-attr]
    onnx.helper.set_model_props(model, {METADATA_KEY: manifest.to_json()})
    with atomic_file(path) as stream:
        stream.write(model.SerializeToString())
    return manifest


@contextlib.contextmanager
def quiet():  # type: ignore[no-untyped-def]
    """Without the exporter's progress, warnings and log lines, which tell the user nothing to do."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
