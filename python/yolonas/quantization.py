"""INT8: a checkpoint and some images become an ONNX file with Q/DQ pairs, or an OpenVINO IR of the same graph.

Post-training quantization is NNCF's: int8 weights with a scale for each output channel, 8-bit activations with one
scale, biases corrected. The ONNX file is what NNCF makes; the IR is OpenVINO's reading of it, so that both are one
network, and name the same layers.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yolonas.atomic import atomic_file
from yolonas.checkpoint import Checkpoint
from yolonas.errors import DataError, ExportError
from yolonas.export import export_raw_onnx
from yolonas.exported import INPUT_NAME, METADATA_KEY, Manifest
from yolonas.extras import require
from yolonas.inference.letterbox import letterbox
from yolonas.inference.sources import read_image
from yolonas.tracing import SCOPES_KEY, quiet

CALIBRATION_IMAGES = 300  # NNCF's own default
# What stays in floating point, by module name. "heads-float" is the reference's skip list (super-gradients' pull
# request 1965): the last layers of the heads, not their stems.
PRESETS: dict[str, tuple[str, ...]] = {
    "full": (),
    "heads-float": tuple(
        f"heads.head{level}.{part}"
        for level in (1, 2, 3)
        for part in ("cls_convs", "reg_convs", "cls_pred", "reg_pred")
    ),
}
CONVOLUTIONS = ("Conv", "ConvTranspose")
SUFFIXES = (".onnx", ".xml")


def quantize(
    checkpoint: Checkpoint,
    path: Path | str,
    images: Sequence[Path],
    *,
    preset: str = "full",
    float_layers: Sequence[str] = (),
    count: int = CALIBRATION_IMAGES,
    tensorrt: bool = False,
    progress: bool = False,
) -> Manifest:
    """Quantize a checkpoint to INT8 with the images as calibration, and write it to `path`: .onnx or .xml.

    Layers of `preset` and `float_layers` (module names, which stand for all below them) stay in floating point. Of
    `images` at most `count` are used, spread evenly. The same checkpoint, images and options give the same file; it
    appears complete or not at all. tensorrt: see `Quantizer.write`. Raises DataError for no or unreadable images,
    ValueError for an unknown preset, layer or suffix, ExportError where the checkpoint cannot be quantized.
    """
    quantizer = Quantizer(checkpoint, images, count=count, progress=progress)
    return quantizer.write(Path(path), preset=preset, float_layers=float_layers, tensorrt=tensorrt)


class Quantizer:
    """A checkpoint exported once, with its calibration images; each `write` makes a file of it.

    `layers` are the convolutions by module name, in the order in which they run; `canvases` the letterboxed
    calibration images, uint8 [1, 3, H, W] each.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        images: Sequence[Path],
        *,
        count: int = CALIBRATION_IMAGES,
        progress: bool = False,
    ) -> None:
        onnx = require("onnx", "quantize", "quantization")
        self._nncf = require("nncf", "quantize", "quantization")
        self.progress = progress
        self.canvases = calibration_canvases(checkpoint, images, count)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "float.onnx"
            self.float_manifest = export_raw_onnx(checkpoint, path)
            self._model = onnx.load(path)
        self._nodes = {_module(node): node.name for node in self._model.graph.node if node.op_type in CONVOLUTIONS}
        self.layers = tuple(self._nodes)

    def write_float(self, path: Path) -> Manifest:
        """Write the float network that is quantized, .onnx or .xml."""
        _write(self._model, path, self.float_manifest)
        return self.float_manifest

    def write(
        self, path: Path, *, preset: str = "full", float_layers: Sequence[str] = (), tensorrt: bool = False
    ) -> Manifest:
        """Quantize and write to `path`, .onnx or .xml; see `quantize`.

        tensorrt: activations as int8, the only 8-bit type that TensorRT quantizes to, instead of uint8 behind ReLUs.
        That halves their resolution, runs at half the speed in ONNX Runtime and costs accuracy in OpenVINO.
        """
        check_suffix(path)
        if preset not in PRESETS:
            raise ValueError(f"preset {preset!r} is not known: use {' or '.join(PRESETS)}")
        kept = self.matching([*PRESETS[preset], *float_layers])
        model = self._quantized(kept)
        _slim(model)
        if tensorrt:
            _sign_activations(model)
        record: dict[str, Any] = {
            "preset": preset,
            "calibration_images": len(self.canvases),
            "float_layers": list(kept),
            "activations": "int8" if tensorrt else "uint8",
            "nncf": self._nncf.__version__,
        }
        manifest = dataclasses.replace(
            self.float_manifest, precision="int8", record={**self.float_manifest.record, "quantization": record}
        )
        _write(model, path, manifest)
        return manifest

    def matching(self, names: Sequence[str]) -> tuple[str, ...]:
        """The layers that the names stand for: themselves or all below them. ValueError for a name of none."""
        chosen = set()
        for name in names:
            below = [layer for layer in self.layers if layer == name or layer.startswith(f"{name}.")]
            if not below:
                raise ValueError(f"{name!r} is no layer of this network: layers are named as {self.layers[0]}")
            chosen.update(below)
        return tuple(layer for layer in self.layers if layer in chosen)

    def _quantized(self, float_layers: Sequence[str]) -> Any:
        """NNCF's ModelProto."""
        nncf = self._nncf
        nncf.set_log_level(logging.ERROR)
        with quiet():  # of NNCF's own bars and of its warnings on ONNX opsets
            try:
                return nncf.quantize(
                    self._model,
                    nncf.Dataset(_Passes(self.canvases, self.progress)),
                    preset=nncf.QuantizationPreset.PERFORMANCE,  # symmetric: as fast, and no zero points
                    subset_size=len(self.canvases),
                    ignored_scope=nncf.IgnoredScope(names=[self._nodes[layer] for layer in float_layers]),
                )
            except Exception as error:  # its classes share no base
                raise ExportError(f"NNCF cannot quantize this network: {error}") from error


class _Passes:
    """The calibration canvases as NNCF takes them; it goes through them twice, for ranges and for biases."""

    def __init__(self, canvases: Sequence[npt.NDArray[np.uint8]], progress: bool) -> None:
        self.canvases, self.progress = canvases, progress

    def __len__(self) -> int:
        return len(self.canvases)

    def __iter__(self) -> Iterator[dict[str, npt.NDArray[np.uint8]]]:
        from tqdm import tqdm

        hidden = None if self.progress else True
        for canvas in tqdm(self.canvases, "calibrating", unit="image", leave=False, delay=1.0, disable=hidden):
            yield {INPUT_NAME: canvas}


def calibration_canvases(
    checkpoint: Checkpoint, images: Sequence[Path], count: int = CALIBRATION_IMAGES
) -> list[npt.NDArray[np.uint8]]:
    """At most `count` of the images, spread evenly, as the network gets them: uint8 [1, 3, H, W] each."""
    if count < 1:
        raise ValueError(f"at least one calibration image is needed, not {count}")
    if not images:
        raise DataError("there is no image to calibrate on: give the images that the model was trained on")
    count = min(count, len(images))
    canvases = []
    for k in range(count):
        canvas, _ = letterbox(read_image(images[k * len(images) // count]), checkpoint.model.preprocessing)
        canvases.append(np.ascontiguousarray(canvas.transpose(2, 0, 1)[None]))
    return canvases


def check_suffix(path: Path) -> None:
    """Raises ValueError where `path` names neither an ONNX file nor an OpenVINO IR."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} must end in .onnx (Q/DQ pairs, for every runtime) or .xml (OpenVINO's own format)")


def _module(node: Any) -> str:
    """The module that a node of our export comes from, without the wrapper's `model.`: heads.head1.cls_pred."""
    # Not by the weight's name: equal tensors are stored once, under one name.
    scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES_KEY), "")
    modules = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
    if len(modules) < 2:
        raise ExportError(f"the exported node {node.name} does not say which layer it is: use onnxscript 0.5 or newer")
    return modules[-2].removeprefix("model.")


def _slim(model: Any) -> None:
    """Drop what no runtime reads: a third of the file of an N."""
    from onnx import numpy_helper

    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    del model.graph.value_info[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
        # Weights are symmetric, so that their zero points are the default.
        if node.op_type == "DequantizeLinear" and node.input[0] in initializers and len(node.input) > 2:
            if numpy_helper.to_array(initializers[node.input[2]]).any():
                raise ExportError(f"the weights {node.input[0]} were not quantized symmetrically")
            del node.input[2]
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    for tensor in kept:
        del tensor.metadata_props[:]
        tensor.doc_string = ""
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _sign_activations(model: Any) -> None:
    """Make every uint8 activation int8 over the same range."""
    from onnx import numpy_helper

    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear":
            continue
        scale, zero = (initializers[name] for name in node.input[1:3])
        if numpy_helper.to_array(zero).dtype == np.uint8:
            wider = numpy_helper.to_array(scale) * np.float32(255 / 127)
            scale.CopyFrom(numpy_helper.from_array(np.asarray(wider, dtype=np.float32), scale.name))
            zero.CopyFrom(numpy_helper.from_array(np.zeros((), dtype=np.int8), zero.name))


def _write(model: Any, path: Path, manifest: Manifest) -> None:
    """An ONNX model with its manifest as the format that the suffix names."""
    onnx = require("onnx", "onnx", "quantization")
    check_suffix(path)
    if path.suffix.lower() == ".onnx":
        onnx.helper.set_model_props(model, {METADATA_KEY: manifest.to_json()})
        with atomic_file(path) as stream:
            stream.write(model.SerializeToString())
        return
    openvino = require("openvino", "openvino", "the format .xml")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        source = Path(folder) / "source.onnx"
        source.write_bytes(model.SerializeToString())
        network = openvino.convert_model(source)
        network.set_rt_info(manifest.to_json(), [METADATA_KEY])
        openvino.save_model(network, Path(folder) / path.name, compress_to_fp16=False)
        # The description last: where it is, its weights are.
        for name in (path.with_suffix(".bin").name, path.name):
            with atomic_file(path.with_name(name)) as stream:
                stream.write((Path(folder) / name).read_bytes())
