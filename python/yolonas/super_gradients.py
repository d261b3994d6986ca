"""What a super-gradients checkpoint means: where its weights are, its class names, its preprocessing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from yolonas.model.config import BIT_DEPTH, Preprocessing
from yolonas.pickle_records import NumpyArray, Stub, TensorRef

FIRST_KEY = "backbone.stem.conv."  # every YOLO-NAS has keys with this, whatever stands before it
WEIGHT_KEYS = ("ema_net", "net", "ema", "model", "state_dict", "model_state_dict")  # in the order of preference


@dataclass(frozen=True)
class Processing:
    """What a checkpoint says besides its weights; None where it says nothing. `processor` is for `parse_processor`."""

    class_names: tuple[str, ...] | None = None
    processor: Any = None
    conf: float | None = None
    iou: float | None = None


def find_weights(tree: Any) -> dict[str, TensorRef] | None:
    """The state_dict in what a file holds: averaged weights first, then the others, modules included."""
    candidates = [tree.get(key) for key in WEIGHT_KEYS] if isinstance(tree, dict) else []
    for candidate in [*candidates, tree]:
        state = _state_dict(candidate)
        if names := plain_names(state):
            return {plain: state[key] for plain, key in names.items()}
    return None


def plain_names(keys: Iterable[str]) -> dict[str, str]:
    """Key without prefix -> key, for the keys of a YOLO-NAS among `keys`; empty if there is none.

    DistributedDataParallel, Lightning and torch.compile each put a prefix (`module.`, ...) before all keys of a model.
    """
    keys = list(keys)
    first = next((key for key in keys if FIRST_KEY in key), None)
    if first is None:
        return {}
    prefix = first[: first.index(FIRST_KEY)]
    return {key.removeprefix(prefix): key for key in keys if key.startswith(prefix)}


def find_processing(tree: Any) -> Processing:
    """Class names, preprocessing and thresholds of a checkpoint or of a whole pickled model."""
    if isinstance(tree, dict) and isinstance(tree.get("processing_params"), dict):
        params, prefix, suffix = tree["processing_params"], "", ""
    else:
        modules = [tree, *(tree.get(key) for key in WEIGHT_KEYS)] if isinstance(tree, dict) else [tree]
        params = next((m.state for m in modules if isinstance(m, Stub) and "_modules" in m.state), {})
        prefix, suffix = "_", "_default_nms_"
    return Processing(
        class_names=_names(params.get(f"{prefix}class_names")),
        processor=params.get(f"{prefix}image_processor"),
        conf=_threshold("conf", params.get(f"{suffix}conf")),
        iou=_threshold("iou", params.get(f"{suffix}iou")),
    )


def parse_processor(processor: Any) -> Preprocessing:
    """A `Preprocessing` from super-gradients' description of one: {name: arguments}, lists of it, or its objects.

    Raises ValueError for a step that changes the picture in a way that `Preprocessing` cannot express.
    """
    resize: tuple[int, int] | None = None
    canvas: tuple[int, int] | None = None
    values: dict[str, Any] = {}
    reversed_channels = False
    divisor = 1.0
    mean: list[float] | None = None
    std: list[float] | None = None
    for name, arguments in _steps(processor):
        match name:
            case "ReverseImageChannels":
                reversed_channels = not reversed_channels
                mean, std = mean and mean[::-1], std and std[::-1]
            case "DetectionLongestMaxSizeRescale":
                resize = _size(arguments, "output_shape")
            case "DetectionCenterPadding" | "DetectionBottomRightPadding":
                canvas = _size(arguments, "output_shape")
                values["pad"] = "center" if name == "DetectionCenterPadding" else "bottom_right"
                values["pad_value"] = _pad_value(arguments.get("pad_value", 114))
            case "StandardizeImage":
                max_value = float(arguments.get("max_value", 255.0))
                if std is None:
                    divisor *= max_value
                else:
                    std = [v * max_value for v in std]
            case "NormalizeImage":
                # the image is divided by `divisor` here, and by 255 in `Preprocessing`
                mean = [v * divisor / BIT_DEPTH for v in _numbers(arguments["mean"])]
                std = [v * divisor / BIT_DEPTH for v in _numbers(arguments["std"])]
            case "ImagePermute":
                pass
            case _:
                raise ValueError(f"its preprocessing has the step {name}, which is not supported")
    if resize is None or canvas is None:
        raise ValueError("its preprocessing does not both resize and pad images to one size")
    if std is None and divisor != BIT_DEPTH:
        std = [divisor / BIT_DEPTH] * 3
    if resize != canvas and resize[0] != resize[1]:
        raise ValueError(f"its preprocessing resizes to {resize} on a canvas of {canvas}, which is not supported")
    return Preprocessing(
        image_size=canvas,
        resize_to=max(resize),
        channels="bgr" if reversed_channels else "rgb",  # images are loaded as RGB
        mean=None if mean is None else tuple(mean),
        std=None if std is None else tuple(std),
        **values,
    )


def _steps(processor: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name and arguments of each step, flattened; the forms nest: lists, {name: arguments}, pickled objects."""
    pending, count = [processor], 0
    while pending:
        item, count = pending.pop(0), count + 1
        if count > 100:
            raise ValueError("its preprocessing has more than 100 steps")
        if isinstance(item, list | tuple):
            pending = [*item[:100], *pending]
            continue
        if isinstance(item, Stub):
            item = {item.kind.rpartition(".")[2]: item.state}
        if not isinstance(item, Mapping):
            raise ValueError(f"its preprocessing holds a {type(item).__name__}")
        for name, arguments in item.items():
            arguments = arguments or {}
            if not isinstance(arguments, Mapping):
                raise ValueError(f"its preprocessing step {name} has no named arguments")
            if name == "ComposeProcessing":
                pending = [arguments.get("processings") or [], *pending]
            else:
                yield str(name), arguments


def _state_dict(value: Any) -> dict[str, TensorRef]:
    """The tensors of a state_dict, or of a pickled module, under their names."""
    if isinstance(value, dict):
        return {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, TensorRef)}
    found: dict[str, TensorRef] = {}
    pending: list[tuple[str, Any]] = [("", value)]
    seen: set[int] = set()
    while pending:
        prefix, module = pending.pop()
        if not isinstance(module, Stub) or id(module) in seen:
            continue
        seen.add(id(module))
        skipped = module.state.get("_non_persistent_buffers_set") or ()
        for group in ("_parameters", "_buffers"):
            for name, tensor in _items(module.state.get(group)):
                if isinstance(tensor, TensorRef) and not (group == "_buffers" and name in skipped):
                    found[prefix + name] = tensor
        children = [(f"{prefix}{name}.", child) for name, child in _items(module.state.get("_modules"))]
        pending.extend(reversed(children))
    return found


def _items(value: Any) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in value.items() if isinstance(k, str)] if isinstance(value, dict) else []


def _names(value: Any) -> tuple[str, ...] | None:
    values = value.values if isinstance(value, NumpyArray) else value
    if not isinstance(values, list | tuple) or not values:
        return None
    if not all(isinstance(name, str) for name in values):
        raise ValueError("its class names are not text")
    return tuple(values)


def _threshold(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"its {name} threshold is not a number from 0 to 1")
    return float(value)


def _size(arguments: Mapping[str, Any], name: str) -> tuple[int, int]:
    value = arguments[name]
    height, width = (value, value) if isinstance(value, int) else value
    return int(height), int(width)


def _numbers(value: Any) -> list[float]:
    values = value.values if isinstance(value, NumpyArray) else value
    for _ in range(2):  # arrays of shape (1, 1, 3)
        values = values[0] if isinstance(values, list | tuple) and len(values) == 1 else values
    return [float(v) for v in values]


def _pad_value(value: Any) -> int:
    values = [int(v) for v in (value if isinstance(value, list | tuple) else [value])]
    if not values or values.count(values[0]) != len(values):
        raise ValueError("its preprocessing pads with a colour, and only grey is supported")
    return values[0]
