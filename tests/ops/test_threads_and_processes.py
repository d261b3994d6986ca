"""Both doors called from several Python threads at once, and from processes forked after a call on several threads."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ops_data import Maps, head_output
from yolonas import ops
from yolonas.ops import numpy as npops

STRIDES = (8, 16, 32)
SETTINGS = {"score_threshold": 0.3, "iou_threshold": 0.6}
Arrays = tuple[np.ndarray, ...]

forks = pytest.mark.skipif(sys.platform != "linux", reason="fork is the default way to start a process on Linux alone")


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(threads)


@functools.cache
def inputs(seed: int, batch: int) -> tuple[Maps, Maps, torch.Tensor, torch.Tensor]:
    """Maps and a column of scores and of labels. Made before any fork: torch's own kernels hang in a forked child."""
    class_logits, box_logits = head_output(seed, batch=batch, grids=((20, 24), (10, 12), (5, 6)))
    return class_logits, box_logits, *class_logits[0][0].flatten(1).max(0)


def torch_door(seed: int, batch: int = 4) -> Arrays:
    """Every op on the data of one seed, on as many threads as torch has."""
    class_logits, box_logits, scores, labels = inputs(seed, batch)
    decoded = ops.decode_nms(class_logits, box_logits, STRIDES, **SETTINGS)
    boxes = ops.dfl_decode(box_logits, STRIDES)
    keep = ops.batched_nms(boxes[0, : len(scores)], scores, labels, 0.5)
    return *(t.numpy() for t in decoded), boxes.numpy(), keep.numpy()


def numpy_door(seed: int, batch: int = 4) -> Arrays:
    class_maps, box_maps, *rows = inputs(seed, batch)
    class_logits, box_logits = ([m.numpy() for m in maps] for maps in (class_maps, box_maps))
    scores, labels = (row.numpy() for row in rows)
    decoded = npops.decode_nms(class_logits, box_logits, STRIDES, **SETTINGS, threads=4)
    boxes = npops.dfl_decode(box_logits, STRIDES, threads=4)
    keep = npops.batched_nms(boxes[0, : len(scores)], scores, labels, 0.5)
    return *decoded, boxes, keep


def same(actual: Arrays, expected: Arrays) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(actual, expected, strict=True))


doors = pytest.mark.parametrize("door", [torch_door, numpy_door])


@doors
@pytest.mark.parametrize("batch", [1, 4])
def test_many_python_threads_at_once(door: Callable[..., Arrays], batch: int) -> None:
    expected = {seed: door(seed, batch) for seed in range(8)}
    start = threading.Barrier(8)

    def work(seed: int) -> bool:
        start.wait()
        return all(same(door(seed, batch), expected[seed]) for _ in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.parametrize("op", ["decode_nms", "dfl_decode", "nms"])
def test_other_python_threads_run_during_a_call(op: str) -> None:
    """With this switch interval another thread gets the interpreter lock only from one that gives it up."""
    class_logits, box_logits, *_ = inputs(0, 4)
    arrays = [m.numpy() for m in class_logits], [m.numpy() for m in box_logits]
    boxes, scores = np.ones((20_000, 4), np.float32), np.zeros(20_000, np.float32)
    call = {
        "decode_nms": lambda: npops.decode_nms(*arrays, STRIDES, **SETTINGS),
        "dfl_decode": lambda: npops.dfl_decode(arrays[1], STRIDES),
        "nms": lambda: npops.nms(boxes, scores, 0.5),
    }[op]
    go, ran = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: go.wait() and ran.set())
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        go.set()
        assert any(call() is not None and ran.is_set() for _ in range(200))
    finally:
        sys.setswitchinterval(interval)
        thread.join()


def in_a_fork(work: Callable[[], bool], seconds: int = 20) -> bool:
    """Runs in a child of os.fork, which a deadlock there does not outlive. A thread pool does not survive a fork."""
    child = os.fork()
    if child == 0:
        import signal

        signal.alarm(seconds)
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0


# Python 3.12 and later warn of a fork while threads run, such as those of torch and of NumPy's BLAS.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@forks
@doors
@pytest.mark.parametrize("batch", [1, 4])
def test_a_forked_child_can_call_the_ops_on_several_threads(door: Callable[..., Arrays], batch: int) -> None:
    expected = door(0, batch)

    def grandchild_too() -> bool:
        return same(door(0, batch), expected) and in_a_fork(lambda: same(door(0, batch), expected))

    for _ in range(3):
        assert in_a_fork(grandchild_too)
        assert same(door(0, batch), expected)
    # The parent forks while another of its threads is inside an op.
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            door(1, batch)

    busy = threading.Thread(target=work)
    busy.start()
    try:
        assert all(in_a_fork(lambda: same(door(0, batch), expected)) for _ in range(10))
    finally:
        stop.set()
        busy.join()


class Decoded(Dataset):
    """A data set that decodes in the worker: of both doors, on two threads."""

    def __init__(self, door: Callable[..., Arrays]) -> None:
        self.door = door

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Arrays:
        torch.set_num_threads(2)  # a DataLoader sets 1
        return self.door(index)


@forks
@doors
def test_workers_of_a_data_loader_can_call_the_ops(door: Callable[..., Arrays]) -> None:
    expected = [door(seed) for seed in range(6)]  # a pool of the parent's, if there is one, has started
    loader = DataLoader(Decoded(door), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=20)
    for actual, wanted in zip(loader, expected, strict=True):
        assert same(tuple(np.asarray(a) for a in actual), wanted)
