"""The ops as torch operators: opcheck, torch.compile, and what an import costs and needs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

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
    rows, targets = torch.randn(17, 4, 6).permute(2, 1, 0), torch.rand(6, 4) * 16
    assert ops.decode_nms is not None
    cases = [
        (torch.ops.yolonas.decode_nms, (class_logits, box_logits, STRIDES, 0.25, 0.7, 1000, 300, True, False)),
        (torch.ops.yolonas.dfl_decode, (box_logits, STRIDES)),
        (torch.ops.yolonas.dfl_decode, ([m.clone().requires_grad_() for m in box_logits], STRIDES)),
        (torch.ops.yolonas.dfl_decode_backward, (boxes.unsqueeze(0).repeat(2, 1, 1), box_logits, STRIDES)),
        (torch.ops.yolonas.dfl_loss, (rows, targets)),
        (torch.ops.yolonas.dfl_loss, (rows.clone().requires_grad_(), targets)),
        (torch.ops.yolonas.dfl_loss_backward, (targets, rows, targets)),
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


class Postprocess(torch.nn.Module):
    def forward(self, *maps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        class_logits, box_logits = maps[:3], maps[3:]
        decoded = ops.decode_nms(class_logits, box_logits, STRIDES, score_threshold=0.25, iou_threshold=0.7)
        return *decoded, ops.dfl_decode(box_logits, STRIDES)


RUN_EXPORTED = """
import sys, torch
from yolonas.ops import decode_nms  # registers the ops
program, inputs, outputs = sys.argv[1:]
inputs = torch.load(inputs)
torch.save(torch.export.load(program).module()(*inputs), outputs)
"""


def test_an_exported_program_runs_on_any_batch_in_another_process(tmp_path: Path) -> None:
    class_logits, box_logits = head_output(0, batch=2)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        Postprocess(), (*class_logits, *box_logits), dynamic_shapes=(tuple({0: batch} for _ in range(6)),)
    )
    torch.export.save(program, tmp_path / "postprocess.pt2")
    maps = [m for group in head_output(1, batch=5) for m in group]
    torch.save(maps, tmp_path / "in.pt")
    paths = [tmp_path / name for name in ("postprocess.pt2", "in.pt", "out.pt")]
    subprocess.run([sys.executable, "-c", RUN_EXPORTED, *map(str, paths)], check=True)
    for a, b in zip(torch.load(paths[2]), Postprocess()(*maps), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_results_are_the_same_inside(context: Callable[[], AbstractContextManager]) -> None:
    class_logits, box_logits = head_output(0, batch=2)
    boxes, scores = random_boxes(0, 50)
    expected = *Postprocess()(*class_logits, *box_logits), ops.nms(boxes, scores, 0.5)
    with context():
        actual = *Postprocess()(*class_logits, *box_logits), ops.nms(boxes, scores, 0.5)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def random_boxes(seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner, size = torch.rand(2, n, 2, generator=generator)
    return torch.cat([corner, corner + size], 1), torch.rand(n, generator=generator)


def test_autocast_of_a_network_gives_the_ops_bfloat16_maps() -> None:
    torch.manual_seed(0)
    head = torch.nn.Conv2d(4, 3 + 68, 1)
    image = torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = head(image)
        assert output.dtype == torch.bfloat16
        class_logits, box_logits = output.split((3, 68), 1)
        actual = ops.decode_nms([class_logits], [box_logits], (8,), score_threshold=0.5, iou_threshold=0.7)
        loss = ops.dfl_decode([box_logits], (8,)).square().mean()
    expected = ops.decode_nms(
        [class_logits.float()], [box_logits.float()], (8,), score_threshold=0.5, iou_threshold=0.7
    )
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    loss.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().sum() > 0


def test_vmap_refuses_and_says_what_to_call() -> None:
    class_logits, box_logits = head_output(0, batch=2)
    boxes, scores = (torch.stack(rows) for rows in zip(*(random_boxes(seed, 9) for seed in range(3)), strict=True))
    labels = torch.zeros(3, 9, dtype=torch.int64)
    threshold = {"score_threshold": 0.5, "iou_threshold": 0.5}
    whole = r" does not run under torch\.vmap: call it once on the whole batch"
    samples = r"yolonas\.ops\.nms and batched_nms do not run under torch\.vmap, .* call batched_nms once on all samples"
    with pytest.raises(RuntimeError, match=r"yolonas\.ops\.decode_nms" + whole):
        torch.vmap(lambda c, b: ops.decode_nms([c[None]], [b[None]], (8,), **threshold))(class_logits[0], box_logits[0])
    with pytest.raises(RuntimeError, match=r"yolonas\.ops\.dfl_decode" + whole):
        torch.vmap(lambda b: ops.dfl_decode([b[None]], (8,)))(box_logits[0])
    with pytest.raises(RuntimeError, match=r"dfl_loss does not run under torch\.vmap: call it once on all samples"):
        torch.vmap(lambda x, t: ops.dfl_loss(x, t))(torch.zeros(2, 3, 17), torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match=samples):
        torch.vmap(lambda b, s: ops.nms(b, s, 0.5))(boxes, scores)
    with pytest.raises(RuntimeError, match=samples):
        torch.vmap(lambda b, s, c: ops.batched_nms(b, s, c, 0.5))(boxes, scores, labels)
    # What the sentence says to do instead.
    keep = ops.batched_nms(boxes.flatten(0, 1), scores.flatten(), labels.add(torch.arange(3)[:, None]).flatten(), 0.5)
    for sample in range(3):
        mine = keep[keep // 9 == sample] - 9 * sample
        assert torch.equal(mine, ops.nms(boxes[sample], scores[sample], 0.5))


def test_selections_are_detached() -> None:
    """A loss on them fails where it is made into a gradient; it does not quietly leave the parameters alone."""
    class_logits, box_logits = head_output(0)
    for tensor in (*class_logits, *box_logits):
        tensor.requires_grad_()
    decoded = ops.decode_nms(class_logits, box_logits, STRIDES, score_threshold=0.25, iou_threshold=0.7)
    assert not any(tensor.requires_grad for tensor in decoded)
    with pytest.raises(RuntimeError, match="does not require grad"):
        decoded.boxes.sum().backward()
    boxes, scores = random_boxes(0, 9)
    keep = ops.nms(boxes.requires_grad_(), scores, 0.5)
    boxes[keep].sum().backward()  # the boxes kept are as differentiable as they were
    assert boxes.grad is not None
    assert boxes.grad.sum(1).tolist() == [4.0 * (index in keep.tolist()) for index in range(9)]
    gradient = torch.func.grad(lambda b: b[ops.nms(b, scores, 0.5)].sum())(boxes.detach())
    assert torch.equal(gradient, boxes.grad)


def test_meta_tensors_give_shapes() -> None:
    class_logits, box_logits = ([m.to("meta") for m in group] for group in head_output(0, batch=2))
    decoded = ops.decode_nms(class_logits, box_logits, STRIDES, score_threshold=0.25, iou_threshold=0.7)
    assert [tuple(t.shape) for t in decoded] == [(2, 300, 4), (2, 300), (2, 300), (2, 300), (2,)]
    assert ops.dfl_decode(box_logits, STRIDES).shape == (2, 106, 4)
    with pytest.raises(RuntimeError, match="data-dependent shape"):
        ops.nms(torch.zeros(3, 4, device="meta"), torch.zeros(3, device="meta"), 0.5)


@pytest.mark.filterwarnings("ignore:.*(prototype|beta|deprecated)")
def test_tensors_that_are_not_dense_get_a_sentence() -> None:
    boxes, scores = random_boxes(0, 9)
    maps = [[m] for m in (torch.zeros(1, 2, 3, 3), torch.zeros(1, 68, 3, 3))]
    odd = {
        "tensor of layout torch.sparse_coo": torch.Tensor.to_sparse,
        "tensor of layout torch.sparse_csr": torch.Tensor.to_sparse_csr,
        "tensor of layout torch._mkldnn": torch.Tensor.to_mkldnn,
        "nested tensor": lambda t: torch.nested.nested_tensor([t, t]),
    }
    for kind, convert in odd.items():
        with pytest.raises(TypeError, match=f"^boxes must be a dense tensor, not a {kind}$"):
            ops.nms(convert(boxes), scores, 0.5)
        with pytest.raises(TypeError, match=rf"^box_logits\[0\] must be a dense tensor, not a {kind}$"):
            ops.dfl_decode([convert(maps[1][0])], (8,))
        with pytest.raises(TypeError, match=rf"^class_logits\[0\] must be a dense tensor, not a {kind}$"):
            ops.decode_nms([convert(maps[0][0])], maps[1], (8,), score_threshold=0.5, iou_threshold=0.5)
    with pytest.raises(TypeError, match=r"not torch\.complex64"):
        ops.nms(boxes.cfloat(), scores, 0.5)
    with pytest.raises(TypeError, match=r"not torch\.qint8"):
        ops.nms(torch.quantize_per_tensor(boxes, 0.1, 0, torch.qint8), scores, 0.5)


def test_data_between_two_elements_is_refused() -> None:
    """Loads of a vector type may assume that elements are aligned to their size."""
    memory = bytearray(4 * 68 * 9 + 1)
    odd = torch.frombuffer(memory, dtype=torch.float32, offset=1, count=68 * 9).reshape(1, 68, 3, 3)
    with pytest.raises(ValueError, match=r"float32 data starts between two of its elements: pass a clone\(\) of it"):
        ops.dfl_decode([odd], (8,))
    with pytest.raises(ValueError, match=r"pass a clone\(\) of it"):
        ops.nms(odd.reshape(-1, 4), torch.zeros(153), 0.5)
    assert ops.dfl_decode([odd.clone()], (8,)).shape == (1, 9, 4)


class Marked(torch.Tensor):
    pass


def test_subclasses_are_tensors() -> None:
    boxes, scores = random_boxes(0, 30)
    assert torch.equal(ops.nms(torch.nn.Parameter(boxes), scores, 0.5), ops.nms(boxes, scores, 0.5))
    keep = ops.nms(boxes.as_subclass(Marked), scores, 0.5)
    assert torch.equal(keep.as_subclass(torch.Tensor), ops.nms(boxes, scores, 0.5))


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_compiles_dfl_loss_forward_and_backward(dynamic: bool) -> None:
    def loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return ops.dfl_loss(2 * logits, targets, weights)

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for n in (5, 7):
        generator = torch.Generator().manual_seed(n)
        leaf = torch.randn(n, 4, 17, generator=generator).requires_grad_()
        targets, weights = 16 * torch.rand(n, 4, generator=generator), torch.rand(n, 1, generator=generator)
        eager = torch.autograd.grad(loss(leaf, targets, weights), leaf)
        torch.testing.assert_close(torch.autograd.grad(compiled(leaf, targets, weights), leaf), eager)


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
yolonas.Detector  # of exported files
try:
    yolonas.YoloNAS
except ModuleNotFoundError as error:
    print(error)
"""


def test_without_torch_the_numpy_door_works_and_the_rest_says_what_is_missing() -> None:
    lines = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert lines[0].startswith("yolonas.ops.nms needs torch 2.11 or newer, which is not installed: pip install torch")
    assert "pip install 'yolonas[detector]'" in lines[1]


# Prints the milliseconds that the door adds to the import of what it needs, then the modules it brings.
IMPORT_COST = """
import sys, time
import {needs}
before = set(sys.modules)
start = time.perf_counter()
{door}
print(1000 * (time.perf_counter() - start))
print(*{{name.partition(".")[0] for name in set(sys.modules) - before}} - sys.stdlib_module_names - {{"numpy"}})
print(*(name for name in ("torch", "cv2", "safetensors") if name in sys.modules))
"""


@pytest.mark.parametrize(
    ("needs", "door", "loaded"),
    [
        ("numpy, torch", "from yolonas.ops import decode_nms, dfl_decode, nms, batched_nms", ["torch"]),
        ("numpy", "from yolonas.ops.numpy import decode_nms, dfl_decode, nms, batched_nms", []),
        ("numpy", "import yolonas, yolonas.ops", []),
    ],
)
def test_importing_adds_little_and_brings_nothing_else(needs: str, door: str, loaded: list[str]) -> None:
    code, costs = IMPORT_COST.format(needs=needs, door=door), []
    while not costs or (min(costs) > 100 and len(costs) < 5):  # other work on the machine only adds to a time
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        cost, brought, present = run.stdout.splitlines()
        assert brought == "yolonas"
        assert present.split() == loaded
        costs.append(float(cost))
    assert min(costs) <= 100, costs
