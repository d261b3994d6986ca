"""Checkpoints: loading every kind of YOLO-NAS file safely, and saving our own.

Read: super-gradients' `.pth` and whole pickled modules (zip and legacy formats of torch; see `safe_pickle`),
safetensors with super-gradients' keys, ONNX files of a fused network (see `onnx_import`), and our own format, which is
safetensors with one JSON string of metadata: variant, class names, preprocessing, thresholds, licence and training
record.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from yolonas import super_gradients
from yolonas.atomic import atomic_file
from yolonas.errors import CheckpointError, MissingPackageError
from yolonas.exported import Manifest
from yolonas.model import VARIANTS, Preprocessing, YoloNAS
from yolonas.model.config import default_names
from yolonas.model.yolo_nas import checked_names
from yolonas.pickle_records import RefusedPickleError
from yolonas.torch_file import ZIP_MAGIC, open_torch_file

DECI_LICENSE = (
    "Deci YOLO-NAS licence: non-commercial; no production use, no redistribution, no managed service for third parties;"
    " it extends to models fine-tuned from these weights "
    "(https://github.com/Deci-AI/super-gradients/blob/master/LICENSE.YOLONAS.md)"
)
METADATA_KEY = "yolonas"  # of the one JSON string in a safetensors file
FORMAT_VERSION = 1
MAX_CLASSES = 100_000
PLACEHOLDER = ".rbr_reparam."


@dataclass
class Checkpoint:
    """A model with what is needed to run it, and where it comes from.

    conf and iou are the thresholds it is meant to run at. license is the text that binds its weights, None if none
    does: a model fine-tuned from it inherits it. record says how it was trained; its values are JSON.
    """

    model: YoloNAS
    conf: float = 0.25
    iou: float = 0.7
    license: str | None = None
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("conf", "iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} must lie in 0..1")


def load(
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    variant: str | None = None,
    preprocessing: Preprocessing | None = None,
) -> Checkpoint:
    """Load a checkpoint of any kind: its model in eval mode, float32, on the CPU, in the form (fused or not) it has.

    class_names and preprocessing replace what the file says; num_classes and variant are checked against it. Nothing
    in the file is executed. Raises CheckpointError for a file that is missing, damaged, refused or not what was asked
    for.
    """
    path = Path(path)
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {state}: give the path of a checkpoint file")
    if path.suffix.lower() in (".xml", ".pt2"):
        raise CheckpointError(f"{path} is an exported network, which only predicts: give the checkpoint it was made of")
    try:
        contents = _read(path, preprocessing)
        return _checkpoint(contents, class_names, num_classes, variant)
    except MissingPackageError:
        raise
    except RefusedPickleError as error:
        raise CheckpointError(
            f"{path} is refused: its pickle refers to {error.name}, which no plain checkpoint needs and which could "
            "run code; use a file from a source you trust, saved as a state_dict or as safetensors"
        ) from error
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}; check who may read it") from error
    except Exception as error:  # the input is hostile until proven otherwise: whatever it provokes, it is no checkpoint
        told = str(error).rstrip(".")[:300]  # of a KeyError or an IndexError the text means nothing to anybody
        reason = type(error).__name__ if isinstance(error, LookupError) or not told else told
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint of YOLO-NAS ({reason}): copy or download it again"
        ) from error


def save(checkpoint: Checkpoint, path: str | Path, *, half: bool = False) -> None:
    """Write a checkpoint in our own format; the file appears complete or not at all.

    `half` stores float16, which halves the file; a file is loaded as float32 whatever it stores. Raises TypeError where
    the record is not JSON, ValueError where float16 cannot hold the weights, and OSError as writing does.
    """
    path = Path(path)
    model = checkpoint.model
    metadata = {
        "format": FORMAT_VERSION,
        "variant": model.variant,
        "form": model.form,
        "class_names": model.class_names,
        "preprocessing": model.preprocessing.to_dict(),
        "conf": checkpoint.conf,
        "iou": checkpoint.iou,
        "license": checkpoint.license,
        "record": checkpoint.record,
    }
    tensors = {key: value.detach().cpu().contiguous() for key, value in _needed(model).items()}
    if half:
        tensors = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
        if not all(value.isfinite().all() for value in tensors.values()):
            raise ValueError(f"{path} cannot be stored in float16, as some weights are beyond its range")
    data = safetensors.torch.save(tensors, metadata={"format": "pt", METADATA_KEY: json.dumps(metadata)})
    with atomic_file(path) as stream:
        stream.write(data)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of a file that `save` wrote, without its weights; CheckpointError for any other file."""
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    if text is None:
        raise CheckpointError(f"{path} was not written by yolonas, so it has no metadata")
    try:
        return _metadata(text)
    except (ValueError, CheckpointError) as error:
        raise CheckpointError(f"{path} {error}") from error


@dataclass(frozen=True)
class _Contents:
    """What a file holds, checked to be a YOLO-NAS: `skeleton` has the right shapes and no memory yet."""

    skeleton: YoloNAS
    tensors: dict[str, Tensor]
    class_names: Sequence[str] | None
    preprocessing: Preprocessing | None
    conf: float | None = None
    iou: float | None = None
    license: str | None = None
    record: dict[str, Any] = field(default_factory=dict)


def _read(path: Path, preprocessing: Preprocessing | None) -> _Contents:
    with path.open("rb") as stream:
        head = stream.read(64)
    if not head:
        raise ValueError("it is empty")
    if head.lstrip()[:1] == b"<" or head.startswith(b"version https://git-lfs"):
        raise ValueError("it is a web page or a Git LFS pointer, which a failed download leaves")
    if path.suffix.lower() == ".onnx":
        return _read_onnx(path, preprocessing)
    if head[8:9] == b"{" and not head.startswith(ZIP_MAGIC):
        return _read_safetensors(path, preprocessing)
    with open_torch_file(path) as file:
        weights = super_gradients.find_weights(file.tree)
        if weights is None:
            raise CheckpointError("holds no weights of YOLO-NAS: export the state_dict of such a model into it")
        skeleton = _skeleton({key: ref.shape for key, ref in weights.items()})  # before any tensor takes memory
        found = super_gradients.find_processing(file.tree)
        if preprocessing is None and found.processor is not None:
            preprocessing = _preprocessing(found.processor)
        tensors = {key: file.tensor(weights[key]) for key in _needed(skeleton)}
    return _Contents(
        skeleton, tensors, found.class_names, preprocessing, found.conf, found.iou, _foreign_license(skeleton)
    )


def _read_safetensors(path: Path, preprocessing: Preprocessing | None) -> _Contents:
    with safetensors.safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
        names = super_gradients.plain_names(file.keys())
        skeleton = _skeleton({name: tuple(file.get_slice(key).get_shape()) for name, key in names.items()})
        # clone: the file is mapped, and somebody may write to it later
        tensors = {name: file.get_tensor(names[name]).clone() for name in _needed(skeleton)}
    if text is None:
        return _Contents(skeleton, tensors, None, preprocessing, license=_foreign_license(skeleton))
    ours = _metadata(text)
    return _Contents(
        skeleton,
        tensors,
        class_names=[str(name) for name in ours["class_names"]],
        preprocessing=preprocessing or Preprocessing.from_dict(ours["preprocessing"]),
        conf=float(ours["conf"]),
        iou=float(ours["iou"]),
        license=ours["license"],
        record=dict(ours["record"]),
    )


def _read_onnx(path: Path, preprocessing: Preprocessing | None) -> _Contents:
    from yolonas.onnx_import import read_onnx

    file = read_onnx(path)
    text = file.metadata.get(METADATA_KEY)
    if text is not None:
        m = Manifest.from_json(text)
        return _Contents(
            file.skeleton, file.tensors, m.class_names, preprocessing or m.preprocessing, m.conf, m.iou,
            m.license, m.record,
        )  # fmt: skip
    if file.normalizes and preprocessing is None:
        raise CheckpointError(
            "changes the pixels before its first convolution in a way that its weights do not tell: "
            "load it with preprocessing=Preprocessing(...)"
        )
    return _Contents(file.skeleton, file.tensors, None, preprocessing, license=_foreign_license(file.skeleton))


def _foreign_license(model: YoloNAS) -> str | None:
    """Whether others trained from Deci's weights cannot be seen, so it is assumed; of N there are no such weights."""
    return None if model.variant == "n" else DECI_LICENSE


def _metadata(text: str) -> dict[str, Any]:
    metadata = json.loads(text)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("format"), int):
        raise ValueError("its metadata is not that of yolonas")
    if metadata["format"] > FORMAT_VERSION:
        raise CheckpointError(f"was written in format {metadata['format']} by a newer yolonas: upgrade this one")
    return metadata


def _preprocessing(processor: Any) -> Preprocessing:
    try:
        return super_gradients.parse_processor(processor)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"cannot be used as it is ({error or type(error).__name__}): load it with preprocessing=Preprocessing(...)"
        ) from error


def _skeleton(shapes: Mapping[str, tuple[int, ...]]) -> YoloNAS:
    """The model, without memory, whose state_dict has exactly these keys and shapes, or CheckpointError."""
    stem = "backbone.stem.conv."
    kernel = next((k for k in ("branch_3x3.conv.weight", "rbr_reparam.weight") if stem + k in shapes), None)
    heads = [f"heads.head{level}." for level in (1, 2, 3)]
    if kernel is None or any(head + "cls_pred.weight" not in shapes for head in heads):
        raise CheckpointError(f"holds no YOLO-NAS detector, its first entries being {list(shapes)[:3]}")
    sizes = (
        shapes[stem + kernel][:1],
        tuple(shapes.get(f"{head}stem.seq.conv.weight", (0,))[0] for head in heads),
    )
    known = {((v.stem,), v.head): name for name, v in VARIANTS.items()}
    if sizes not in known:
        raise CheckpointError(
            f"has a stem of {sizes[0][0]} and heads of {sizes[1]} channels, which is none of {', '.join(VARIANTS)}"
        )
    num_classes = shapes[heads[0] + "cls_pred.weight"][0]
    if not 1 <= num_classes <= MAX_CLASSES:
        raise CheckpointError(f"has {num_classes} classes, which is not between 1 and {MAX_CLASSES}")
    with torch.device("meta"):
        model = YoloNAS(known[sizes], num_classes)
        if kernel.startswith("rbr"):
            model = model.fused(partial="backbone.stage1.blocks.conv1.bn.weight" in shapes)
    expected = {key: tuple(value.shape) for key, value in _needed(model).items()}
    given = {key: shape for key, shape in shapes.items() if kernel.startswith("rbr") or PLACEHOLDER not in key}
    wrong = [
        *(f"{key} is missing" for key in expected if key not in given),
        *(f"{key} is not part of it" for key in given if key not in expected),
        *(f"{k} is {list(given[k])}, not {list(s)}" for k, s in expected.items() if k in given and given[k] != s),
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise CheckpointError(f"is not a YOLO-NAS-{model.variant.upper()} in {model.form} form: {wrong[0]}{more}")
    return model


def _needed(model: YoloNAS) -> dict[str, Tensor]:
    """The state_dict without the placeholders, which are a third of the training form and carry nothing."""
    training = model.form == "training"
    return {key: value for key, value in model.state_dict().items() if not (training and PLACEHOLDER in key)}


def _checkpoint(
    contents: _Contents, class_names: Sequence[str] | None, num_classes: int | None, variant: str | None
) -> Checkpoint:
    model = contents.skeleton
    if variant is not None and variant != model.variant:
        raise CheckpointError(
            f"is a YOLO-NAS-{model.variant.upper()}, not the {variant!r} asked for: leave variant out"
        )
    if num_classes is not None and num_classes != model.num_classes:
        raise CheckpointError(
            f"has {model.num_classes} classes, not {num_classes}: load it without num_classes, "
            "and give its model other classes by with_classes(names) or by training"
        )
    names = class_names if class_names is not None else contents.class_names
    try:
        model.class_names = checked_names(names or default_names(model.num_classes), model.num_classes)
    except ValueError as error:
        raise CheckpointError(f"does not fit its class names ({error}): load it with class_names=[...]") from error
    model.preprocessing = contents.preprocessing or Preprocessing()
    expected = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for key, tensor in contents.tensors.items():
        if tensor.is_floating_point() != expected[key].is_floating_point():
            raise CheckpointError(f"holds {key} as {tensor.dtype}: load the weights before they were quantized")
        tensors[key] = tensor.to(expected[key].dtype)
        if not torch.isfinite(tensors[key]).all():
            raise CheckpointError(f"holds values in {key} that are not finite: its training diverged, or it is damaged")
    model.load_state_dict(tensors, strict=True, assign=True)
    conf = Checkpoint.conf if contents.conf is None else contents.conf
    iou = Checkpoint.iou if contents.iou is None else contents.iou
    return Checkpoint(model.eval(), conf, iou, contents.license, contents.record)
