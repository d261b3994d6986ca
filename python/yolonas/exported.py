"""What an exported file says of itself: enough to run it, and to know where it comes from. Needs no torch."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any, Literal
from xml.etree import ElementTree

from yolonas.errors import CheckpointError
from yolonas.model.config import Preprocessing

METADATA_KEY = "yolonas"  # of the JSON string: ONNX metadata_props, OpenVINO rt_info, an extra file of pt2
FORMAT_VERSION = 1
SUFFIXES = {".onnx": "onnx", ".xml": "openvino", ".pt2": "pt2"}
INPUT_NAME = "images"
RAW_OUTPUT_NAMES = ("class_8", "class_16", "class_32", "box_8", "box_16", "box_32")
OUTPUT_NAMES = {
    "raw": RAW_OUTPUT_NAMES,
    "flat": ("flat_predictions",),
    "batch": ("num_predictions", "pred_boxes", "pred_scores", "pred_classes"),
}


@dataclass(frozen=True)
class Manifest:
    """An exported network: what it takes, what it gives, and what its checkpoint said.

    The file takes `images` [B, 3, H, W], channels as `preprocessing` says: uint8, or float 0..1; division by 255, mean
    and std are inside. output "raw" are the six head maps under `RAW_OUTPUT_NAMES`; "flat" and "batch" are detections
    in canvas px after the NMS that `nms` describes, as super-gradients exports them. image_size is the (height, width)
    that the file is bound to, None where it takes any multiple of 32.
    """

    variant: str
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    conf: float
    iou: float
    license: str | None = None
    record: dict[str, Any] = field(default_factory=dict)
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    input: Literal["uint8", "float32", "float16"] = "uint8"
    output: Literal["raw", "flat", "batch"] = "raw"
    nms: dict[str, Any] | None = None  # score_threshold, iou_threshold, pre_nms_top_k, max_detections
    image_size: tuple[int, int] | None = None
    batch: int | None = None  # images of a call, None where any number goes

    def to_json(self) -> str:
        """One JSON object that `from_json` reads."""
        return json.dumps({"format": FORMAT_VERSION, **asdict(self), "preprocessing": self.preprocessing.to_dict()})

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The inverse of `to_json`. Raises ValueError for what is none, or was written by a newer yolonas."""
        values = json.loads(text)
        if not isinstance(values, dict) or not isinstance(values.get("format"), int):
            raise ValueError("its metadata is not that of yolonas")
        if values.pop("format") > FORMAT_VERSION:
            raise ValueError("it was written by a newer yolonas: upgrade this one")
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"its metadata has unknown fields {unknown}")
        values["preprocessing"] = Preprocessing.from_dict(values["preprocessing"])
        values["class_names"] = tuple(values["class_names"])
        if values.get("image_size") is not None:
            values["image_size"] = tuple(values["image_size"])
        return cls(**values)


def read_manifest(path: str | Path) -> Manifest:
    """The manifest in a file that yolonas exported; CheckpointError where there is none, naming what to do."""
    manifest = find_manifest(path)
    if manifest is None:
        raise CheckpointError(
            f"{path} was not exported by yolonas, so it does not say how to prepare images for it: "
            "export the checkpoint again with `yolonas export`"
        )
    return manifest


def find_manifest(path: str | Path) -> Manifest | None:
    """The manifest in an exported file, None in one of another program; CheckpointError where it cannot be read.

    An .onnx file without a manifest may be one of super-gradients, which `checkpoint.load` reads.
    """
    path = Path(path)
    read = {".onnx": _onnx_metadata, ".xml": _openvino_metadata, ".pt2": _pt2_metadata}.get(path.suffix.lower())
    if read is None:
        raise CheckpointError(f"{path} is no exported network: the suffixes of those are {', '.join(SUFFIXES)}")
    try:
        text = read(path)
        return None if text is None else Manifest.from_json(text)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, ElementTree.ParseError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is damaged or not an exported network ({error}): export it again") from error


def file_size(path: Path) -> int:
    """Bytes of a file, with the weights that lie beside an .xml."""
    weights = path.with_suffix(".bin")
    beside = weights.stat().st_size if path.suffix.lower() == ".xml" and weights.is_file() else 0
    return path.stat().st_size + beside


def _onnx_metadata(path: Path) -> str | None:
    """`metadata_props[METADATA_KEY]` of a ModelProto, read without its weights and without the package onnx."""
    with path.open("rb") as stream:
        for number, data in _fields(stream, path.stat().st_size, wanted=14):
            if number == 14:
                entry = dict(_entry(data))
                if entry.get(1) == METADATA_KEY:
                    return entry.get(2)
    return None


def _fields(stream: IO[bytes], end: int, wanted: int) -> Iterator[tuple[int, bytes]]:
    """Number and content of a protobuf message's length-delimited fields; only `wanted` is read, the rest skipped."""
    while stream.tell() < end:
        key = _varint(stream)
        number, kind = key >> 3, key & 7
        if kind == 2:
            length = _varint(stream)
            if length > end - stream.tell():
                raise ValueError("its end is missing")
            if number == wanted:
                yield number, stream.read(length)
            else:
                stream.seek(length, 1)
        elif kind == 0:
            _varint(stream)
        elif kind in (1, 5):
            stream.seek(8 if kind == 1 else 4, 1)
        else:
            raise ValueError("it is not an ONNX file")


def _entry(data: bytes) -> Iterator[tuple[int, str]]:
    """Key (1) and value (2) of a StringStringEntryProto."""
    for number in (1, 2):
        for _, content in _fields(io.BytesIO(data), len(data), wanted=number):
            yield number, content.decode()


def _varint(stream: IO[bytes]) -> int:
    value = shift = 0
    while True:
        byte = stream.read(1)
        if not byte or shift > 63:
            raise ValueError("it is not an ONNX file, or its end is missing")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
        shift += 7


def _openvino_metadata(path: Path) -> str | None:
    """`rt_info[METADATA_KEY]` of an OpenVINO IR."""
    entry = ElementTree.parse(path).getroot().find(f"rt_info/{METADATA_KEY}")
    return None if entry is None else entry.get("value")


def _pt2_metadata(path: Path) -> str | None:
    """The extra file METADATA_KEY of an archive of torch.export."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(f"extra/{METADATA_KEY}"):
                return archive.read(name).decode()
    return None
