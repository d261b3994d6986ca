"""dfl_loss: values and gradients against plain torch, float64 gradients against differences, edges and errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from yolonas import ops
from yolonas.ops import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-13}


def rows(seed: int, n: int, bins: int, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, 4, bins], targets [n, 4] within the bins, beyond them and on them, weights [n, 1], many of them 0."""
    generator = torch.Generator().manual_seed(seed)
    shape = {"bins last": (n, 4, bins), "planes": (4, bins, n), "strided": (n, 4, 2 * bins)}[layout]
    logits = (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    logits = {"bins last": logits, "planes": logits.permute(2, 0, 1), "strided": logits[..., ::2]}[layout]
    targets = (torch.rand(n, 4, generator=generator, dtype=torch.float64) * 1.4 - 0.2) * (bins - 1)
    targets = torch.where(torch.rand(n, 4, generator=generator) < 0.2, targets.round(), targets)
    weights = torch.rand(n, 1, generator=generator, dtype=torch.float64)
    weights[torch.rand(n, 1, generator=generator) < 0.5] = 0
    return logits, targets, weights


cases = st.builds(
    rows,
    seed=st.integers(0, 2**31),
    n=st.integers(0, 40),
    bins=st.sampled_from([2, 3, 16, 17]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["bins last", "planes", "strided"]),
)


@settings(max_examples=100)
@given(case=cases)
def test_equals_the_reference_with_its_gradients(case: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, targets, weights = case
    computed = torch.float64 if logits.dtype == torch.float64 else torch.float32
    targets = targets.to(computed)
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, expected = ops.dfl_loss(mine, targets, reduction="none"), reference.dfl_loss(theirs, targets)
    assert loss.dtype == computed
    tolerance = TOLERANCES[torch.float64 if computed == torch.float64 else torch.float32]
    torch.testing.assert_close(loss, expected, rtol=4 * tolerance, atol=4 * tolerance)
    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    assert mine.grad is not None
    assert mine.grad.dtype == logits.dtype
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=TOLERANCES[logits.dtype], atol=TOLERANCES[logits.dtype])


def test_is_the_mean_of_two_cross_entropies() -> None:
    logits, targets, _ = rows(0, 50, 17, torch.float32, "bins last")
    targets = targets.clamp(0, 15.99).float()
    lower = targets.long()
    near, far = (F.cross_entropy(logits.flatten(0, 1), (lower + k).flatten(), reduction="none") for k in (0, 1))
    share = (targets - lower).flatten()
    torch.testing.assert_close(ops.dfl_loss(logits, targets), (near * (1 - share) + far * share).mean())


def test_weights_and_reductions() -> None:
    logits, targets, weights = rows(1, 20, 17, torch.float32, "bins last")
    targets, weights = targets.float(), weights.float()
    loss = ops.dfl_loss(logits, targets, reduction="none")
    assert torch.equal(ops.dfl_loss(logits, targets), loss.mean())
    assert torch.equal(ops.dfl_loss(logits, targets, reduction="sum"), loss.sum())
    assert torch.equal(ops.dfl_loss(logits, targets, weights, reduction="none"), loss * weights)
    assert torch.equal(ops.dfl_loss(logits, targets, weights), (loss * weights).mean())
    assert torch.equal(ops.dfl_loss(logits[0, 0], targets[0, 0]), loss[0, 0])
    assert torch.equal(ops.dfl_loss(logits[None], targets[None], reduction="none"), loss[None])


def test_rows_of_weight_0_have_no_gradient_whatever_they_hold() -> None:
    logits, targets, _ = rows(2, 8, 17, torch.float32, "bins last")
    logits[3] = math.nan
    logits.requires_grad_()
    weights = torch.ones(8, 1)
    weights[3] = 0
    ops.dfl_loss(logits, targets, weights, reduction="none")[weights.expand(8, 4) > 0].sum().backward()
    assert logits.grad is not None
    assert not logits.grad[3].any()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("layout", ["bins last", "planes", "strided"])
@pytest.mark.parametrize("bins", [2, 16, 17])
def test_gradcheck(bins: int, layout: str) -> None:
    logits, targets, weights = rows(3, 5, bins, torch.float64, layout)
    logits = logits.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.dfl_loss(x, targets, weights, reduction="none"), logits)


def test_targets_are_clamped_to_the_bins() -> None:
    logits = torch.randn(5, 17, generator=torch.Generator().manual_seed(0))
    loss = ops.dfl_loss(logits, torch.tensor([-3.0, 0.0, 16.0, 99.0, torch.inf]), reduction="none")
    log_probabilities = logits.log_softmax(-1)
    expected = -torch.stack([*log_probabilities[:2, 0], *log_probabilities[2:, 16]])
    torch.testing.assert_close(loss, expected)


def test_what_is_not_finite() -> None:
    logits = torch.zeros(8, 17, requires_grad=True)
    with torch.no_grad():
        logits[0, 9] = math.nan
        logits[1, 9] = math.inf
        logits[2] = -math.inf
        logits[3, 9] = -math.inf  # far from the target: probability 0
        logits[4, 3] = -math.inf  # under the target, whose share of it is 0
        logits[5, 2] = -math.inf  # under the target
        logits[6, 9] = 1e30
    targets = torch.tensor([2.5, 2.5, 2.5, 2.5, 2.0, 2.5, 9.0, math.nan])
    loss = ops.dfl_loss(logits, targets, reduction="none")
    assert loss.isnan().tolist() == [True, True, True, False, False, False, False, True]
    torch.testing.assert_close(loss[3:7].detach(), torch.tensor([math.log(16), math.log(16), math.inf, 0.0]))
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isnan().any(1).tolist() == [True, True, True, False, False, False, False, True]
    assert logits.grad[4, 2] == 1 / 16 - 1
    assert logits.grad[4, 3] == 0


def test_no_rows() -> None:
    logits = torch.zeros(0, 4, 17, requires_grad=True)
    loss = ops.dfl_loss(logits, torch.zeros(0, 4), reduction="sum")
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert logits.grad.shape == (0, 4, 17)


def test_threads_change_nothing() -> None:
    logits, targets, _ = rows(4, 3000, 17, torch.float32, "bins last")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            leaf = logits.clone().requires_grad_()
            loss = ops.dfl_loss(leaf, targets, reduction="none")
            loss.sum().backward()
            results.append((loss, leaf.grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_second_derivative_is_refused() -> None:
    logits = torch.randn(3, 17, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.dfl_loss(logits, torch.ones(3)), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


def test_autocast_computes_in_float32() -> None:
    logits, targets, _ = rows(5, 10, 17, torch.bfloat16, "bins last")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ops.dfl_loss(logits, targets)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, ops.dfl_loss(logits.float(), targets))


LOGITS, TARGETS = torch.zeros(3, 4, 17), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (
            ValueError,
            r"\[\.\.\., bins\] and targets \[\.\.\.\], not of shapes \[3, 4, 17\] and \[3\]",
            (LOGITS, TARGETS[:, 0]),
        ),
        (ValueError, r"2 bins or more, not of shape \[3, 4, 1\]", (LOGITS[..., :1], TARGETS)),
        (ValueError, r"2 bins or more, not of shape \[3, 4, 0\]", (LOGITS[..., :0], TARGETS)),
        (TypeError, "float32, float16, bfloat16 or float64, not torch.int64", (LOGITS.long(), TARGETS)),
        (TypeError, "targets must be of a floating type, not torch.int64", (LOGITS, TARGETS.long())),
        (TypeError, "targets must be a tensor, not list", (LOGITS, [0.0])),
        (TypeError, "logits must be a tensor, not list", ([0.0], TARGETS)),
        (ValueError, "on one device, not on cpu and meta", (LOGITS, TARGETS.to("meta"))),
        (ValueError, r"weights of shape \[2, 3, 4\] do not broadcast", (LOGITS, TARGETS, torch.zeros(2, 3, 4))),
        (ValueError, r"weights of shape \[5\] do not broadcast", (LOGITS, TARGETS, torch.zeros(5))),
        (ValueError, r"pass targets.detach\(\)", (LOGITS, TARGETS.clone().requires_grad_())),
    ],
)
def test_wrong_arguments_are_named(error: type[Exception], message: str, arguments: tuple) -> None:
    with pytest.raises(error, match=message):
        ops.dfl_loss(*arguments)


def test_unknown_reduction_is_named() -> None:
    with pytest.raises(ValueError, match='reduction must be "none", "mean" or "sum", not \'max\''):
        ops.dfl_loss(LOGITS, TARGETS, reduction="max")  # type: ignore[arg-type]
