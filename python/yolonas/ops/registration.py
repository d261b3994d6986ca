"""The ops as torch operators `torch.ops.yolonas.*`: schemas, CPU and CUDA implementations over `_core`, fake kernels.

Registered by `Library.impl`, a call costs about 9 us; `torch.library.custom_op` would cost 31 us. Implementations check
their arguments themselves, so that a direct call of an operator is as safe as one through `yolonas.ops`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from yolonas import _core
from yolonas.ops import arguments

library = torch.library.Library("yolonas", "DEF")
library.define(
    "decode_nms(Tensor[] class_logits, Tensor[] box_logits, float[] strides, float score_threshold, "
    "float iou_threshold, int pre_nms_top_k, int max_detections, bool multi_label, bool class_agnostic) "
    "-> (Tensor boxes, Tensor scores, Tensor labels, Tensor anchors, Tensor counts)"
)
library.define("dfl_decode(Tensor[] box_logits, float[] strides) -> Tensor")
library.define("dfl_decode_backward(Tensor gradient, Tensor[] box_logits, float[] strides) -> Tensor[]")
library.define("dfl_loss(Tensor logits, Tensor targets) -> Tensor")
library.define("dfl_loss_backward(Tensor gradient, Tensor logits, Tensor targets) -> Tensor")
library.define("batched_nms(Tensor boxes, Tensor scores, Tensor? labels, float iou_threshold) -> Tensor")

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_DFL_TYPES = {**_TYPES, torch.float64: 3}

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _check_maps(maps: Sequence[Tensor], types: dict[torch.dtype, int] = _TYPES) -> None:
    dtype, device = maps[0].dtype, maps[0].device
    for tensor in maps:
        if tensor.dtype not in types:
            *names, last = (str(dtype).removeprefix("torch.") for dtype in types)
            raise TypeError(f"logits must be {', '.join(names)} or {last}, not {tensor.dtype}")
        if tensor.dtype != dtype:
            raise TypeError(f"all logits must have one dtype, not {dtype} and {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"all logits must be on one device, not on {device} and {tensor.device}")


def _decode_nms_outputs(
    class_logits: Sequence[Tensor],
    box_logits: Sequence[Tensor],
    strides: Sequence[float],
    score_threshold: float,
    iou_threshold: float,
    pre_nms_top_k: int,
    max_detections: int,
) -> tuple[int, int, Outputs]:
    """Checks the arguments; -> number of classes, bins, uninitialised outputs."""
    arguments.level_strides(strides, len(box_logits), _core.MAX_LEVELS)
    box_shapes = [m.shape for m in box_logits]
    batch, bins = arguments.box_shapes(box_shapes)
    classes = arguments.class_shapes([m.shape for m in class_logits], box_shapes)
    _check_maps([*class_logits, *box_logits])
    arguments.threshold(score_threshold, "score_threshold")
    arguments.threshold(iou_threshold, "iou_threshold")
    arguments.positive(pre_nms_top_k, "pre_nms_top_k")
    k = arguments.positive(max_detections, "max_detections")
    boxes = class_logits[0].new_empty((batch, k, 4), dtype=torch.float32)
    labels = boxes.new_empty((batch, k), dtype=torch.int64)
    outputs = boxes, boxes.new_empty((batch, k)), labels, torch.empty_like(labels), labels.new_empty((batch,))
    return classes, bins, outputs


def _dfl_decode_output(box_logits: Sequence[Tensor], strides: Sequence[float]) -> tuple[int, Tensor]:
    """Checks the arguments; -> bins, uninitialised output."""
    arguments.level_strides(strides, len(box_logits), _core.MAX_LEVELS)
    batch, bins = arguments.box_shapes([m.shape for m in box_logits])
    _check_maps(box_logits, _DFL_TYPES)
    anchors = sum(m.shape[2] * m.shape[3] for m in box_logits)
    return bins, box_logits[0].new_empty((batch, anchors, 4), dtype=_computed(box_logits[0]))


def _dfl_decode_gradients(gradient: Tensor, box_logits: Sequence[Tensor], strides: Sequence[float]) -> list[Tensor]:
    """Checks the arguments; -> zeros for the gradients of the maps."""
    _, boxes = _dfl_decode_output(box_logits, strides)
    if gradient.shape != boxes.shape or gradient.dtype != boxes.dtype or gradient.device != boxes.device:
        raise ValueError(
            f"the gradient of the boxes must be {boxes.dtype} of shape {list(boxes.shape)} on {boxes.device}, not "
            f"{gradient.dtype} of shape {list(gradient.shape)} on {gradient.device}"
        )
    return [torch.zeros_like(m) for m in box_logits]


def _dfl_loss_output(logits: Tensor, targets: Tensor) -> Tensor:
    """Checks the arguments; -> uninitialised loss."""
    _check_maps([logits], _DFL_TYPES)
    if logits.dim() < 1 or logits.shape[-1] < 2:
        raise ValueError(f"logits must be [..., bins] with 2 bins or more, not of shape {list(logits.shape)}")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"logits must be [..., bins] and targets [...], not of shapes {list(logits.shape)} and "
            f"{list(targets.shape)}"
        )
    if not targets.dtype.is_floating_point:
        raise TypeError(f"targets must be of a floating type, not {targets.dtype}")
    if targets.device != logits.device:
        raise ValueError(f"logits and targets must be on one device, not on {logits.device} and {targets.device}")
    return logits.new_empty(logits.shape[:-1], dtype=_computed(logits))


def _dfl_loss_gradient(gradient: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Checks the arguments; -> zeros for the gradient of the logits."""
    loss = _dfl_loss_output(logits, targets)
    if gradient.shape != loss.shape or gradient.dtype != loss.dtype or gradient.device != loss.device:
        raise ValueError(
            f"the gradient of the loss must be {loss.dtype} of shape {list(loss.shape)} on {loss.device}, not "
            f"{gradient.dtype} of shape {list(gradient.shape)} on {gradient.device}"
        )
    return torch.zeros_like(logits, memory_format=torch.contiguous_format)


def _computed(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _check_nms(boxes: Tensor, scores: Tensor, labels: Tensor | None, iou_threshold: float) -> torch.dtype:
    """Checks the arguments; -> the dtype to compute in."""
    arguments.nms_shapes(boxes.shape, scores.shape, None if labels is None else labels.shape)
    for name, tensor in (("boxes", boxes), ("scores", scores)):
        if tensor.dtype not in _TYPES and tensor.dtype != torch.float64:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, not {tensor.dtype}")
    if labels is not None and labels.dtype.is_complex:
        raise TypeError(f"labels must be integers or floats, not {labels.dtype}")
    for name, other in (("scores", scores), ("labels", labels)):
        if other is not None and other.device != boxes.device:
            raise ValueError(f"boxes and {name} must be on one device, not on {boxes.device} and {other.device}")
    arguments.threshold(iou_threshold, "iou_threshold")
    return torch.float64 if torch.float64 in (boxes.dtype, scores.dtype) else torch.float32


def _address(tensor: Tensor) -> int:
    address = tensor.data_ptr()
    if address % tensor.element_size():  # out of torch.frombuffer, or of a field of a packed NumPy record
        raise ValueError(f"a tensor's {tensor.dtype} data starts between two of its elements: pass a clone() of it")
    return address


def _map(tensor: Tensor) -> list[int]:
    _, _, height, width = tensor.shape
    return [_address(tensor), height, width, *tensor.stride()]


def _decode_nms(
    class_logits: Sequence[Tensor],
    box_logits: Sequence[Tensor],
    strides: Sequence[float],
    score_threshold: float,
    iou_threshold: float,
    pre_nms_top_k: int,
    max_detections: int,
    multi_label: bool,
    class_agnostic: bool,
) -> Outputs:
    classes, bins, outputs = _decode_nms_outputs(
        class_logits, box_logits, strides, score_threshold, iou_threshold, pre_nms_top_k, max_detections
    )
    _check_device(outputs[0].device)
    options = _core.DecodeNmsOptions(
        outputs[0].shape[0],
        classes,
        bins,
        score_threshold,
        iou_threshold,
        pre_nms_top_k,
        max_detections,
        multi_label,
        class_agnostic,
    )
    classes_maps, box_maps = [_map(m) for m in class_logits], [_map(m) for m in box_logits]
    addresses = [tensor.data_ptr() for tensor in outputs]
    dtype, device = _TYPES[class_logits[0].dtype], class_logits[0].device
    if device.type == "cuda":
        # Released while the kernels may still run: the caching allocator hands it only to later work of this stream.
        workspace = _workspace(_core.decode_nms_workspace(classes_maps, box_maps, strides, options), device)
        _core.decode_nms_cuda(
            classes_maps, box_maps, strides, dtype, options, addresses, workspace.data_ptr(), *_cuda(device)
        )
    else:
        _core.decode_nms_cpu(classes_maps, box_maps, strides, dtype, options, addresses, torch.get_num_threads())
    return outputs


def _dfl_decode(box_logits: Sequence[Tensor], strides: Sequence[float]) -> Tensor:
    bins, boxes = _dfl_decode_output(box_logits, strides)
    run, where = _kernel("dfl_decode", boxes.device)
    dtype = _DFL_TYPES[box_logits[0].dtype]
    run([_map(m) for m in box_logits], strides, dtype, boxes.shape[0], bins, boxes.data_ptr(), *where)
    return boxes


def _dfl_decode_backward(gradient: Tensor, box_logits: Sequence[Tensor], strides: Sequence[float]) -> list[Tensor]:
    gradients = _dfl_decode_gradients(gradient, box_logits, strides)
    gradient = gradient.contiguous()
    run, where = _kernel("dfl_decode_backward", gradient.device)
    maps, dtype = [_map(m) for m in box_logits], _DFL_TYPES[box_logits[0].dtype]
    batch, channels = box_logits[0].shape[:2]
    out = [_map(m) for m in gradients]
    run(_address(gradient), maps, strides, dtype, batch, channels // 4, out, *where)
    return gradients


def _dfl_loss(logits: Tensor, targets: Tensor) -> Tensor:
    loss = _dfl_loss_output(logits, targets)
    rows, targets = logits.reshape(-1, logits.shape[-1]), targets.to(loss.dtype).contiguous()
    run, where = _kernel("dfl_loss", loss.device)
    run(_rows(rows), _DFL_TYPES[logits.dtype], _address(targets), loss.data_ptr(), *where)
    return loss


def _dfl_loss_backward(gradient: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    result = _dfl_loss_gradient(gradient, logits, targets)
    gradient, targets = gradient.contiguous(), targets.to(gradient.dtype).contiguous()
    rows, out = logits.reshape(-1, logits.shape[-1]), result.view(-1, logits.shape[-1])
    run, where = _kernel("dfl_loss_backward", result.device)
    dtype = _DFL_TYPES[logits.dtype]
    run(_address(gradient), _rows(rows), dtype, _address(targets), _rows(out), *where)
    return result


def _batched_nms(boxes: Tensor, scores: Tensor, labels: Tensor | None, iou_threshold: float) -> Tensor:
    dtype = _check_nms(boxes, scores, labels, iou_threshold)
    _check_device(boxes.device)
    boxes, scores = _dense(boxes, dtype), _dense(scores, dtype)
    if labels is not None:
        if labels.dtype.is_floating_point:
            # Bits that are equal where the floats are, once -0 is 0.
            labels = labels.double().add(0.0).view(torch.int64)
        labels = _dense(labels, torch.int64)
    n, double = boxes.shape[0], dtype == torch.float64
    keep = boxes.new_empty((n,), dtype=torch.int64)
    inputs = (_address(boxes), _address(scores), 0 if labels is None else _address(labels), n, iou_threshold)
    if boxes.device.type == "cuda":
        size = (_core.batched_nms_workspace_float64 if double else _core.batched_nms_workspace_float32)(n)
        workspace, kept = _workspace(size, boxes.device), keep.new_empty((1,))
        on_cuda = _core.batched_nms_cuda_float64 if double else _core.batched_nms_cuda_float32
        on_cuda(*inputs, keep.data_ptr(), kept.data_ptr(), workspace.data_ptr(), *_cuda(boxes.device))
        return keep[: int(kept)].clone()  # torchvision's contract asks for the number: the one synchronisation
    on_cpu = _core.batched_nms_cpu_float64 if double else _core.batched_nms_cpu_float32
    return keep.resize_(on_cpu(*inputs, keep.data_ptr()))


def _dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    ready = tensor.dtype == dtype and tensor.is_contiguous()  # asking costs a tenth of two calls that do nothing
    return tensor if ready else tensor.to(dtype).contiguous()


def _workspace(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _check_device(device: torch.device) -> None:
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"the ops run on cpu and cuda tensors, not on {device}")
    if device.type == "cuda" and not _core.WITH_CUDA:
        raise RuntimeError(
            "this build of yolonas has no CUDA kernels, because nvcc was not found when it was installed: install the "
            "CUDA toolkit (or set CUDA_HOME) and reinstall yolonas, or move the tensors to the CPU"
        )


def _rows(tensor: Tensor) -> list[int]:
    """Of a tensor of two dimensions."""
    return [_address(tensor), *tensor.shape, *tensor.stride()]


def _kernel(name: str, device: torch.device) -> tuple[Callable[..., None], tuple[int, ...]]:
    """The kernel for the device, and its last arguments: where it runs."""
    _check_device(device)
    if device.type == "cuda":
        return getattr(_core, f"{name}_cuda"), _cuda(device)
    return getattr(_core, f"{name}_cpu"), (torch.get_num_threads(),)


def _cuda(device: torch.device) -> tuple[int, int]:
    """Index and current stream of a CUDA device."""
    return device.index, torch.cuda.current_stream(device).cuda_stream


# One implementation for every device, which looks at the device itself: tensors of an unsupported one, or of two,
# get a sentence instead of the dispatcher's list of backends.
for _name, _function in {
    "decode_nms": _decode_nms,
    "dfl_decode": _dfl_decode,
    "dfl_decode_backward": _dfl_decode_backward,
    "dfl_loss": _dfl_loss,
    "dfl_loss_backward": _dfl_loss_backward,
    "batched_nms": _batched_nms,
}.items():
    library.impl(_name, _function, "CompositeExplicitAutograd")

# No gradient flows through a selection: the outputs are detached, so that a `backward()` that relies on one fails
# where it is called, and does not pass None on.
for _name in ("decode_nms", "batched_nms"):
    library.impl(_name, torch.library.fallthrough_kernel, "Autograd")

# Without a rule of its own, torch.vmap would loop over the samples and fail on the first that keeps another number.
_WITHOUT_VMAP = {
    "decode_nms": "decode_nms does not run under torch.vmap: call it once on the whole batch, maps [B, C, h, w]",
    "dfl_decode": "dfl_decode does not run under torch.vmap: call it once on the whole batch, maps [B, 4 * bins, h, w]",
    "dfl_loss": "dfl_loss does not run under torch.vmap: call it once on all samples, logits [..., bins]",
    "batched_nms": "nms and batched_nms do not run under torch.vmap, since every sample keeps another number of boxes: "
    "call batched_nms once on all samples' boxes, with labels such as image * num_classes + label",
}


def _refuse_vmap(sentence: str, info: object, in_dims: object, *inputs: object) -> NoReturn:
    raise RuntimeError(f"yolonas.ops.{sentence}")


for _name, _sentence in _WITHOUT_VMAP.items():
    torch.library.register_vmap(f"yolonas::{_name}", functools.partial(_refuse_vmap, _sentence), lib=library)


@torch.library.register_fake("yolonas::decode_nms", lib=library)
def _(
    class_logits: Sequence[Tensor],
    box_logits: Sequence[Tensor],
    strides: Sequence[float],
    score_threshold: float,
    iou_threshold: float,
    pre_nms_top_k: int,
    max_detections: int,
    multi_label: bool,
    class_agnostic: bool,
) -> Outputs:
    return _decode_nms_outputs(
        class_logits, box_logits, strides, score_threshold, iou_threshold, pre_nms_top_k, max_detections
    )[2]


@torch.library.register_fake("yolonas::dfl_decode", lib=library)
def _(box_logits: Sequence[Tensor], strides: Sequence[float]) -> Tensor:
    return _dfl_decode_output(box_logits, strides)[1]


torch.library.register_fake("yolonas::dfl_decode_backward", _dfl_decode_gradients, lib=library)
torch.library.register_fake("yolonas::dfl_loss", _dfl_loss_output, lib=library)
torch.library.register_fake("yolonas::dfl_loss_backward", _dfl_loss_gradient, lib=library)


@torch.library.register_fake("yolonas::batched_nms", lib=library)
def _(boxes: Tensor, scores: Tensor, labels: Tensor | None, iou_threshold: float) -> Tensor:
    _check_nms(boxes, scores, labels, iou_threshold)
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


Context = torch.autograd.function.FunctionCtx


def _dfl_decode_setup(ctx: Context, inputs: tuple[Sequence[Tensor], Sequence[float]], output: Tensor) -> None:
    box_logits, strides = inputs
    ctx.save_for_backward(*box_logits)
    ctx.strides = strides  # type: ignore[attr-defined]


def _dfl_decode_autograd(ctx: Context, gradient: Tensor) -> tuple[list[Tensor], None]:
    box_logits = list(ctx.saved_tensors)  # type: ignore[attr-defined]
    return torch.ops.yolonas.dfl_decode_backward(gradient, box_logits, ctx.strides), None  # type: ignore[attr-defined]


def _dfl_loss_setup(ctx: Context, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _dfl_loss_autograd(ctx: Context, gradient: Tensor) -> tuple[Tensor, None]:
    logits, targets = ctx.saved_tensors  # type: ignore[attr-defined]
    return torch.ops.yolonas.dfl_loss_backward(gradient, logits, targets), None


def _no_second_derivative(ctx: Context, *gradients: object) -> None:
    raise NotImplementedError("dfl_decode and dfl_loss have no second derivative: differentiate them once")


torch.library.register_autograd(
    "yolonas::dfl_decode", _dfl_decode_autograd, setup_context=_dfl_decode_setup, lib=library
)
torch.library.register_autograd("yolonas::dfl_loss", _dfl_loss_autograd, setup_context=_dfl_loss_setup, lib=library)
torch.library.register_autograd("yolonas::dfl_decode_backward", _no_second_derivative, lib=library)
torch.library.register_autograd("yolonas::dfl_loss_backward", _no_second_derivative, lib=library)
