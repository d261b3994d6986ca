"""The example on a GPU: replayed on new images, it gives what the ops give outside a graph."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import cuda_graph
from yolonas import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_replay_equals_eager() -> None:
    torch.manual_seed(0)
    network = cuda_graph.Head().cuda().eval()
    pipeline = cuda_graph.Pipeline(network, torch.rand(2, 3, 320, 320, device="cuda"), threshold=0.5)
    for seed in range(3):
        images = torch.rand(2, 3, 320, 320, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
        decoded = pipeline(images)
        class_logits, box_logits = network(images)
        eager = ops.decode_nms(class_logits, box_logits, (8, 16, 32), score_threshold=0.5, iou_threshold=0.7)
        assert decoded.counts.min() > 0
        for a, b in zip(decoded, eager, strict=True):
            assert torch.equal(a, b)


def test_runs_as_a_script() -> None:
    run = subprocess.run([sys.executable, cuda_graph.__file__], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "ms for 8 images" in run.stdout
