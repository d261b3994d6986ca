"""The post-processing part of an exported graph against our own op, in ONNX Runtime and in OpenVINO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from ops_data import head_output
from yolonas import ops
from yolonas.exported import OUTPUT_NAMES, RAW_OUTPUT_NAMES
from yolonas.extras import openvino_core
from yolonas.onnx_nms import append_nms
from yolonas.ops import reference

STRIDES = (8, 16, 32)
Maps = list[torch.Tensor]
Each = list[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]]


def settings(conf: float = 0.25, iou: float = 0.7, top_k: int = 1000, max_det: int = 300) -> dict[str, Any]:
    return {
        "score_threshold": conf,
        "iou_threshold": iou,
        "pre_nms_top_k": top_k,
        "max_detections": max_det,
    }


def network(classes: int) -> onnx.ModelProto:
    """A "network" that passes the raw maps on."""
    channels = [classes] * 3 + [68] * 3
    ends = [
        [
            helper.make_tensor_value_info(f"{prefix}{name}", TensorProto.FLOAT, ["B", c, f"h{name}", f"w{name}"])
            for name, c in zip(RAW_OUTPUT_NAMES, channels, strict=True)
        ]
        for prefix in ("in_", "")
    ]
    nodes = [helper.make_node("Identity", [f"in_{name}"], [name]) for name in RAW_OUTPUT_NAMES]
    return helper.make_model(
        helper.make_graph(nodes, "network", *ends), opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    )


def onnx_runtime(model: onnx.ModelProto, feed: dict[str, Any], names: tuple[str, ...]) -> list[Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(list(names), feed)


def open_vino(model: onnx.ModelProto, feed: dict[str, Any], names: tuple[str, ...]) -> list[Any]:
    core = openvino_core()
    compiled = core.compile_model(
        core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    results = compiled(feed)
    return [results[name].copy() for name in names]


RUNTIMES = [onnx_runtime, open_vino]


def run(runtime: Callable[..., list[Any]], output: str, maps: tuple[Maps, Maps], nms: dict[str, Any]) -> Each:
    batch, classes = maps[0][0].shape[:2]
    model = append_nms(network(classes), output, classes, nms, for_openvino=runtime is open_vino)
    onnx.checker.check_model(model, full_check=True)
    feed = {f"in_{name}": m.numpy() for name, m in zip(RAW_OUTPUT_NAMES, [*maps[0], *maps[1]], strict=True)}
    outputs = runtime(model, feed, OUTPUT_NAMES[output])
    if output == "flat":
        (flat,) = outputs
        assert flat.shape[1:] == (7,)
        assert flat.dtype == np.float32
        assert (np.diff(flat[:, 0]) >= 0).all()
        each = [flat[flat[:, 0] == i] for i in range(batch)]
        assert sum(map(len, each)) == len(flat)
        return [(rows[:, 1:5], rows[:, 5], rows[:, 6]) for rows in each]
    counts, boxes, scores, labels = outputs
    most = nms["max_detections"]
    assert (counts.dtype, counts.shape) == (np.int64, (batch, 1))
    assert (boxes.dtype, boxes.shape) == (np.float32, (batch, most, 4))
    assert (scores.dtype, scores.shape) == (np.float32, (batch, most))
    assert (labels.dtype, labels.shape) == (np.int64, (batch, most))
    found = []
    for i, n in enumerate(counts[:, 0]):
        assert all((padding == -1).all() for padding in (boxes[i, n:], scores[i, n:], labels[i, n:]))
        found.append((boxes[i, :n], scores[i, :n], labels[i, :n]))
    return found


def assert_same(found: Each, maps: tuple[Maps, Maps], nms: dict[str, Any], expected: ops.Decoded | None = None) -> int:
    expected = expected or ops.decode_nms(*maps, STRIDES, **nms)
    for i, (boxes, scores, labels) in enumerate(found):
        n = int(expected.counts[i])
        assert labels.tolist() == expected.labels[i, :n].tolist()
        np.testing.assert_allclose(scores, expected.scores[i, :n].numpy(), rtol=0, atol=1e-6)
        np.testing.assert_allclose(boxes, expected.boxes[i, :n].numpy(), rtol=0, atol=1e-3)
    return int(expected.counts.sum())


def scene(seed: int, batch: int, objects: int, classes: int = 80, side: int = 320) -> tuple[Maps, Maps]:
    """Maps as a trained network's: around each object scores that fall off from its centre, and boxes that agree."""
    rng = np.random.default_rng(seed)
    class_maps, box_maps = [], []
    boxes = rng.uniform(0, side * 0.7, (batch, objects, 4))
    boxes[..., 2:] = boxes[..., :2] + rng.uniform(12, side * 0.3, (batch, objects, 2))
    kinds, peaks = rng.integers(0, classes, (batch, objects)), rng.uniform(-2, 2.5, (batch, objects))
    for stride in STRIDES:
        n = side // stride
        y, x = (np.indices((n, n)) + 0.5) * stride
        logits = rng.normal(-7.5, 0.8, (batch, classes, n, n))
        sides = rng.uniform(1, 8, (batch, 4, n, n))
        for b in range(batch):
            for box, kind, peak in zip(boxes[b], kinds[b], peaks[b], strict=True):
                away = np.hypot(
                    (x - box[[0, 2]].mean()) / (box[2] - box[0]), (y - box[[1, 3]].mean()) / (box[3] - box[1])
                )
                distances = np.stack([x - box[0], y - box[1], box[2] - x, box[3] - y]) / stride
                inside = distances.min(0) > 0
                logits[b, kind] = np.where(inside, np.maximum(logits[b, kind], peak - 9 * away), logits[b, kind])
                sides[b] = np.where(inside, distances + rng.normal(0, 0.1, distances.shape), sides[b])
        bins = -((np.arange(17)[:, None, None] - sides[:, :, None].clip(0, 15.9)) ** 2)
        class_maps.append(torch.from_numpy(logits.astype(np.float32)))
        box_maps.append(torch.from_numpy(bins.reshape(batch, 68, n, n).astype(np.float32)))
    return class_maps, box_maps


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("output", ["flat", "batch"])
def test_detections_are_those_of_our_op(runtime: Callable[..., list[Any]], output: str) -> None:
    maps, nms = scene(0, batch=3, objects=15), settings(conf=0.05, iou=0.6)
    assert assert_same(run(runtime, output, maps, nms), maps, nms) > 60


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("output", ["flat", "batch"])
def test_of_more_than_max_detections_the_best_of_all_classes_are_left(
    runtime: Callable[..., list[Any]], output: str
) -> None:
    """super-gradients cuts while boxes are grouped by class, and so loses the best of the last classes."""
    maps, nms = scene(1, batch=2, objects=60), settings(conf=0.02, max_det=25)
    best = maps[0][0].flatten(2).max(2).values.argmax(1)
    for logits in maps[0]:
        logits[0, [int(best[0]), -1]] = logits[0, [-1, int(best[0])]]
    assert_same(run(runtime, output, maps, nms), maps, nms)
    expected = ops.decode_nms(*maps, STRIDES, **nms)
    assert expected.counts.tolist() == [25, 25]
    assert 79 in expected.labels[0].tolist()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_top_k_is_over_pairs_of_anchor_and_class(runtime: Callable[..., list[Any]]) -> None:
    maps, nms = scene(2, batch=2, objects=40), settings(conf=0.01, top_k=37)
    assert_same(run(runtime, "batch", maps, nms), maps, nms)
    assert not torch.equal(
        ops.decode_nms(*maps, STRIDES, **nms).counts, ops.decode_nms(*maps, STRIDES, **settings(conf=0.01)).counts
    )


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("output", ["flat", "batch"])
def test_nothing_found_is_no_rows(runtime: Callable[..., list[Any]], output: str) -> None:
    maps, nms = scene(3, batch=2, objects=4), settings(conf=0.9999)
    assert assert_same(run(runtime, output, maps, nms), maps, nms) == 0


@pytest.mark.parametrize("output", ["flat", "batch"])
def test_an_image_without_detections_between_others(output: str) -> None:
    maps, nms = scene(4, batch=3, objects=10), settings()
    for logits in maps[0]:
        logits[1] = -9.0
    assert assert_same(run(onnx_runtime, output, maps, nms), maps, nms) > 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("quantum", [0.0, 0.5])
def test_ties_are_decided_as_by_the_reference(seed: int, quantum: float) -> None:
    """By logit, then anchor, then class; OpenVINO leaves the order of equal logits open, so it is not asked."""
    maps, nms = head_output(seed, batch=2, classes=4, quantum=quantum), settings(conf=0.3, iou=0.4, top_k=60)
    expected = reference.decode_nms(*maps, STRIDES, **nms)
    assert assert_same(run(onnx_runtime, "batch", maps, nms), maps, nms, expected) > 20


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(("iou", "left"), [(0.5, 2), (0.499, 1)])
def test_an_overlap_equal_to_the_threshold_is_kept(runtime: Callable[..., list[Any]], iou: float, left: int) -> None:
    """Boxes (4, 4, 12, 12) and (4, 4, 12, 8): IoU is 1/2 exactly."""
    class_logits = [torch.full((1, 1, n, n), -9.0) for n in (4, 2, 1)]
    box_logits = [torch.full((1, 4, 17, n, n), -1e4) for n in (4, 2, 1)]
    # the first cell's centre is (4, 4), the second row's (4, 12); sides in units of 8 px
    for row, sides, logit in ((0, (0, 0, 1, 1), 2.0), (1, (0, 1, 1, 0), 1.0)):
        class_logits[0][0, 0, row, 0] = logit
        for side, length in enumerate(sides):
            box_logits[0][0, side, length, row, 0] = 0
    box_logits[0][0, 3, :, 0, 0] = -1e4
    box_logits[0][0, 3, 0:2, 0, 0] = 0  # half a cell: the first box ends at y = 8
    for logits in box_logits:
        logits[:, :, 0] = torch.where(logits.amax(2) < 0, 0.0, logits[:, :, 0])
    maps = (class_logits, [m.flatten(1, 2) for m in box_logits])
    found = run(runtime, "batch", maps, settings(iou=iou))
    assert len(found[0][1]) == left
    assert assert_same(found, maps, settings(iou=iou)) == left


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_score_equal_to_the_threshold_is_dropped(runtime: Callable[..., list[Any]]) -> None:
    class_logits = [torch.full((1, 2, n, n), -9.0) for n in (4, 2, 1)]
    box_logits = [torch.zeros(1, 68, n, n) for n in (4, 2, 1)]
    class_logits[0][0, 0, 0, 0] = 0.0  # a score of 0.5 exactly
    class_logits[0][0, 1, 3, 3] = 1e-6
    for conf, left in ((0.5, 1), (0.4999, 2)):
        found = run(runtime, "batch", (class_logits, box_logits), settings(conf=conf))
        assert len(found[0][1]) == left
