"""The ops as torch operators: opcheck, torch.compile, and what an import costs and needs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ops_data import head_output
from yolonas import ops

STRIDES = [8.0, 16.0, 32.0]


def test_opcheck() -> None:
    class_logits, box_logits = head_output(0, batch=2)
    boxes = ops.dfl_decode(box_logits, STRIDES)[0]
    scores = class_logits[0].new_ones(len(boxes))
    labels = torch.arange(len(boxes)) % 3
    assert ops.decode_nms is not None
    cases = [
        (torch.ops.yolonas.decode_nms, (class_logits, box_logits, STRIDES, 0.25, 0.7, 1000, 300, True, False)),
        (torch.ops.yolonas.dfl_decode, (box_logits, STRIDES)),
        (torch.ops.yolonas.dfl_decode, ([m.clone().requires_grad_() for m in box_logits], STRIDES)),
        (torch.ops.yolonas.batched_nms, (boxes, scores, labels, 0.5)),
        (torch.ops.yolonas.batched_nms, (boxes, scores, None, 0.5)),
    ]
    for op, arguments in cases:
        result = torch.library.opcheck(op.default, arguments)
        assert set(result.values()) == {"SUCCESS"}, (op, result)


# The default compiler backend (inductor) needs a C++ compiler at run time; tracing, fake kernels and the absence of
# graph breaks are the same under "aot_eager".
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool) -> None:
    def pipeline(class_logits: list[torch.Tensor], box_logits: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        decoded = ops.decode_nms(class_logits, box_logits, STRIDES, score_threshold=0.25, iou_threshold=0.7)
        boxes = ops.dfl_decode(box_logits, STRIDES)[0]
        keep = ops.nms(boxes, class_logits[0].flatten()[: boxes.shape[0]], 0.5)
        return decoded.boxes, decoded.counts, boxes[keep]

    compiled = torch.compile(pipeline, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        maps = head_output(batch, batch=batch)
        for a, b in zip(compiled(*maps), pipeline(*maps), strict=True):
            assert torch.equal(a, b)


def test_inductor_compiles_forward_and_backward() -> None:
    _, box_logits = head_output(4)
    leaves = [m.requires_grad_() for m in box_logits]
    eager = torch.autograd.grad(ops.dfl_decode(leaves, STRIDES).square().sum(), leaves)
    compiled = torch.compile(lambda maps: ops.dfl_decode(maps, STRIDES).square().sum(), fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(leaves), leaves), eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2)  # gradients reach 700


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import numpy as np
from yolonas.ops import numpy as npops
out = npops.decode_nms([np.ones((1, 2, 3, 3), np.float32)], [np.zeros((1, 68, 3, 3), np.float32)], (8,),
                       score_threshold=0.5, iou_threshold=0.7)
assert out.counts[0] > 0
import yolonas.ops
try:
    yolonas.ops.nms
except ModuleNotFoundError as error:
    print(error)
try:
    yolonas.Detector
except ModuleNotFoundError as error:
    print(error)
"""


def test_without_torch_the_numpy_door_works_and_the_rest_says_what_is_missing() -> None:
    lines = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert lines[0].startswith("yolonas.ops.nms needs torch 2.11 or newer, which is not installed: pip install torch")
    assert "pip install 'yolonas[detector]'" in lines[1]


def test_importing_costs_nothing() -> None:
    code = "import sys, yolonas, yolonas.ops, yolonas.ops.numpy; print('torch' in sys.modules, 'cv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False"] * 2
