"""Exporting a network for other runtimes; decoding and NMS stay ours unless they are asked for in the file."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from yolonas import ops
from yolonas.atomic import atomic_file
from yolonas.checkpoint import Checkpoint
from yolonas.errors import ExportError
from yolonas.exported import INPUT_NAME, METADATA_KEY, RAW_OUTPUT_NAMES, SUFFIXES, Manifest
from yolonas.extras import require
from yolonas.model import Preprocessing, YoloNAS
from yolonas.model.config import BIT_DEPTH
from yolonas.onnx_nms import append_nms

OPSET = 18
PRE_NMS_TOP_K = 1000
Format = Literal["onnx", "openvino", "pt2"]


@dataclass(frozen=True)
class Exported:
    """A file that `export` wrote: how large it is, how long it took, and how near to the model it came."""

    path: Path
    manifest: Manifest
    size: int  # bytes, of the .bin too
    seconds: float
    opset: int | None  # of ONNX
    parity: Any  # yolonas.parity.Parity


def export(
    checkpoint: Checkpoint,
    path: str | Path,
    format: Format | None = None,
    *,
    nms: bool = False,
    output_format: Literal["flat", "batch"] = "batch",
    half: bool = False,
    int8: bool = False,
    dynamic: bool = False,
    imgsz: int | tuple[int, int] | None = None,
    batch: int = 1,
    input: Literal["uint8", "float"] = "uint8",
    conf: float | None = None,
    iou: float | None = None,
    max_det: int = 300,
    images: Any = None,
    data: Any = None,
) -> Exported:
    """Write the network for another runtime, run the file there, and keep it only if it finds what the model finds.

    path ends in .onnx, .xml (OpenVINO, with a .bin beside it) or .pt2, which `format` ("onnx", "openvino", "pt2")
    repeats; a file that is there is replaced. The file takes `images` [B, 3, H, W], uint8 or float 0..1, of `batch`
    and `imgsz` (a side, or height and width; None is the checkpoint's), or of any with `dynamic`. It gives the six raw
    maps, or with `nms` detections in canvas px: see `yolonas.onnx_nms.append_nms` for the two output formats. conf and
    iou replace the checkpoint's thresholds. half stores float16, int8 quantizes with NNCF, calibrated on the images of
    `data` (see `yolonas.quantization.quantize`). images, a source as of a Detector, are those on which file and model
    are compared; without them those of `data`, else sample images.
    Raises ValueError for options that do not go together, ExportError where the file cannot be written or does not
    give the model's results, MissingPackageError where a package is missing.
    """
    from yolonas import parity

    path = Path(path)
    target = _format(path, format)
    if half and int8:
        raise ValueError("half and int8 exclude each other: choose one")
    if int8 and target == "pt2":
        raise ValueError("int8 is not made for pt2: use format onnx or openvino")
    for name, value in (("batch", batch), ("max_det", max_det)):
        if value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value}")
    _require_packages(target)
    manifest = manifest_of(checkpoint, imgsz)
    if conf is not None or iou is not None:
        thresholds = Checkpoint(
            checkpoint.model, manifest.conf if conf is None else conf, manifest.iou if iou is None else iou
        )
        manifest = dataclasses.replace(manifest, conf=thresholds.conf, iou=thresholds.iou)
    manifest = dataclasses.replace(
        manifest,
        precision="int8" if int8 else "fp16" if half else "fp32",
        input="float32" if input == "float" else "uint8",
        output=output_format if nms else "raw",
        nms=_nms(manifest, max_det) if nms else None,
        image_size=None if dynamic else manifest.preprocessing.image_size,
        batch=None if dynamic else batch,
    )
    canvases = parity.canvases(manifest.preprocessing, images if images is not None else data)
    reference = parity.Reference(checkpoint.model, canvases)
    started = time.perf_counter()
    with _folder_beside(path) as folder:
        file = folder / path.name
        write = _writer(checkpoint, target, manifest, data)
        write(manifest, file)
        seconds = time.perf_counter() - started
        compared, judged = file, reference.shown(manifest)
        if judged.nms != manifest.nms:  # nothing is found above the threshold: compare a twin that has a lower one
            compared = folder / f"twin{path.suffix}"
            write(judged, compared)
        result = reference.compare(compared, judged)
        if not result.passed:
            raise ExportError(f"{path} is not kept, as it does not give the model's results: {result}")
        size = _publish(file, path)
    return Exported(path, manifest, size, seconds, OPSET if target == "onnx" else None, result)


def export_raw_onnx(checkpoint: Checkpoint, path: Path) -> Manifest:
    """Write the raw network as ONNX: uint8 in, any batch, height and width; the file appears complete or not at all."""
    _require_packages("onnx")
    manifest = manifest_of(checkpoint)
    data = _onnx_bytes(onnx_model(checkpoint.model, manifest), manifest)
    with atomic_file(path) as stream:
        stream.write(data)
    return manifest


def manifest_of(checkpoint: Checkpoint, imgsz: int | tuple[int, int] | None = None) -> Manifest:
    """The manifest of a checkpoint's raw float32 network for images of any size, on a canvas of `imgsz`."""
    model = checkpoint.model
    preprocessing = model.preprocessing
    if imgsz is not None:
        height, width = (imgsz, imgsz) if isinstance(imgsz, int) else imgsz
        # As the detector does: the margin around the image grows with the canvas.
        resize_to = round(preprocessing.resize_to * max(height, width) / max(preprocessing.image_size))
        try:
            preprocessing = dataclasses.replace(preprocessing, image_size=(height, width), resize_to=resize_to)
        except ValueError as error:
            raise ValueError(f"imgsz {imgsz} must be a multiple of 32, at least 32") from error
    return Manifest(
        model.variant, model.class_names, preprocessing, checkpoint.conf, checkpoint.iou,
        checkpoint.license, checkpoint.record,
    )  # fmt: skip


def onnx_model(model: YoloNAS, manifest: Manifest) -> Any:
    """The ModelProto that the manifest describes (of float32 or float16), without metadata."""
    raw = RawNetwork(model, half=manifest.precision == "fp16").eval()
    with quiet():
        program = torch.onnx.export(
            raw,
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
        part.ClearField("metadata_props")  # stack traces with paths of this machine, a fifth of a small file
    return proto if manifest.output == "raw" else with_nms(proto, manifest)


def with_nms(proto: Any, manifest: Manifest) -> Any:
    """A raw ModelProto with the decoding and NMS that the manifest describes behind it."""
    assert manifest.nms is not None
    return append_nms(proto, manifest.output, len(manifest.class_names), manifest.nms)


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


def _writer(checkpoint: Checkpoint, target: Format, manifest: Manifest, data: Any) -> Callable[[Manifest, Path], None]:
    """A function (manifest, file) that writes the format; the network is traced or quantized once."""
    model = checkpoint.model
    if target == "pt2":
        return lambda wanted, file: _write_pt2(model, wanted, file)
    raw = dataclasses.replace(manifest, output="raw", nms=None)
    proto = onnx_model(model, dataclasses.replace(raw, precision="fp32") if target == "openvino" else raw)

    def write(wanted: Manifest, file: Path) -> None:
        # merge_models takes the graph apart, so it works on a copy
        whole = with_nms(_copy(proto), wanted) if wanted.output != "raw" else proto
        if target == "onnx":
            file.write_bytes(_onnx_bytes(whole, wanted))
        else:
            _write_openvino(whole, wanted, file)

    return write


def _copy(proto: Any) -> Any:
    copied = type(proto)()
    copied.CopyFrom(proto)
    return copied


def _onnx_bytes(proto: Any, manifest: Manifest) -> bytes:
    require("onnx", "onnx", "an export to ONNX").helper.set_model_props(proto, {METADATA_KEY: manifest.to_json()})
    data: bytes = proto.SerializeToString()
    return data


def _write_openvino(proto: Any, manifest: Manifest, file: Path) -> None:
    openvino = require("openvino", "openvino", "an export to OpenVINO")
    model = openvino.Core().read_model(proto.SerializeToString())
    model.set_rt_info(manifest.to_json(), [METADATA_KEY])
    openvino.save_model(model, str(file), compress_to_fp16=manifest.precision == "fp16")


def _write_pt2(model: YoloNAS, manifest: Manifest, file: Path) -> None:
    network: nn.Module = RawNetwork(model, half=manifest.precision == "fp16")
    if manifest.nms is not None:
        network = DetectingNetwork(cast(RawNetwork, network), manifest.output, manifest.nms)
    with quiet(), torch.no_grad():
        program = torch.export.export(
            network.eval().requires_grad_(False), _example(manifest), dynamic_shapes=_dynamic_shapes(manifest)
        )
        torch.export.save(program, str(file), extra_files={METADATA_KEY: manifest.to_json()})


def _example(manifest: Manifest) -> tuple[Tensor]:
    height, width = manifest.image_size or (64, 96)  # sizes that differ, or the exporter takes them for one
    dtype = torch.uint8 if manifest.input == "uint8" else torch.float32
    return (torch.zeros(manifest.batch or 2, 3, height, width, dtype=dtype),)


def _dynamic_shapes(manifest: Manifest) -> tuple[dict[int, Any]] | None:
    if manifest.image_size is not None:
        return None
    dim, height, width = torch.export.Dim, torch.export.Dim("height"), torch.export.Dim("width")
    return ({0: dim("batch"), 2: 32 * height, 3: 32 * width},)


def _nms(manifest: Manifest, max_det: int) -> dict[str, Any]:
    return {
        "score_threshold": manifest.conf,
        "iou_threshold": manifest.iou,
        "pre_nms_top_k": max(PRE_NMS_TOP_K, max_det),
        "max_detections": max_det,
    }


def _format(path: Path, format: str | None) -> Format:
    by_suffix = SUFFIXES.get(path.suffix.lower())
    suffixes = {name: suffix for suffix, name in SUFFIXES.items()}
    if format is not None and format not in suffixes:
        raise ValueError(f"format {format!r} is not one of {', '.join(suffixes)}")
    if by_suffix is None or format not in (None, by_suffix):
        wanted = f"{suffixes[format]} for format {format}" if format else ", ".join(SUFFIXES)
        raise ValueError(f"{path} must end in {wanted}")
    return cast(Format, by_suffix)


def _require_packages(target: Format) -> None:
    if target != "pt2":
        purpose = "an export to ONNX" if target == "onnx" else "an export to OpenVINO"
        for package in ("onnx", "onnxscript"):
            require(package, target, purpose)
        require("onnxruntime" if target == "onnx" else "openvino", target, purpose)


@contextlib.contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A temporary folder on the file system of `path`, so that what it holds can be renamed into place."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        folder = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error
    with folder as name:
        yield Path(name)


def _publish(file: Path, path: Path) -> int:
    """Rename the file, and first the .bin of OpenVINO, into place; their size."""
    parts = [*file.parent.glob(f"{file.stem}.bin"), file]
    size = sum(part.stat().st_size for part in parts)
    try:
        for part in parts:
            part.replace(path.with_suffix(part.suffix))
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error
    return size


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's progress, warnings and log lines, which tell the user nothing to do."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
