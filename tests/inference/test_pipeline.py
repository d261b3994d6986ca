"""Reading ahead: in order, within bounds, and over when the consumer is."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import chain

import numpy as np
import pytest

from yolonas.inference.pipeline import in_batches


def squares(items: object, *, batch: int = 3, workers: int = 2, ahead: int = 2, run: object = None) -> Iterator:
    def prepare(item: int, canvas: np.ndarray) -> int:
        time.sleep(0.001 * (item % 3))  # so that they end in another order
        canvas[:] = item
        return item

    def plain(canvases: np.ndarray, prepared: list[int]) -> list[int]:
        assert canvases[:, 0, 0, 0].tolist() == prepared
        return [item**2 for item in prepared]

    def allocate(count: int) -> np.ndarray:
        return np.empty((count, 3, 2, 2), dtype=np.int64)

    return in_batches(items, allocate, prepare, run or plain, batch=batch, workers=workers, ahead=ahead)


def running() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("yolonas-")}


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_results_come_in_order(ahead: int) -> None:
    batches = list(squares(range(20), ahead=ahead))
    assert [len(batch) for batch in batches] == [3] * 6 + [2]
    assert list(chain(*batches)) == [i**2 for i in range(20)]
    assert list(squares([])) == []
    assert not running()


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_no_more_is_taken_than_is_allowed(ahead: int) -> None:
    taken = 0

    def endless() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    results = squares(endless(), ahead=ahead)
    for round_ in range(1, 4):
        next(results)
        time.sleep(0.02)
        assert taken == 3 * (round_ + ahead)
    results.close()
    assert not running()


def test_the_network_runs_while_the_consumer_works() -> None:
    ran = threading.Event()

    def run(canvases: np.ndarray, prepared: list[int]) -> list[int]:
        if prepared[0]:
            ran.set()
        return prepared

    results = squares(range(6), run=run)
    assert next(results) == [0, 1, 2]
    assert ran.wait(60)  # the second batch, which nobody has asked for
    results.close()


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("where", ["items", "prepare", "run"])
def test_a_failure_comes_after_the_results_before_it(where: str, ahead: int) -> None:
    def items() -> Iterator[object]:
        yield from range(7)
        if where == "items":
            raise KeyError("items")
        yield "no number" if where == "prepare" else 7

    def run(canvases: np.ndarray, prepared: list[int]) -> list[int]:
        if 7 in prepared:
            raise KeyError("run")
        return prepared

    got: list[int] = []
    with pytest.raises((KeyError, TypeError)):
        got.extend(chain.from_iterable(squares(items(), run=run, ahead=ahead)))
    assert got == list(range(7 if where == "items" else 6))
    assert not running()
