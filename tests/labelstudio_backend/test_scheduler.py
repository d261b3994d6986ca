"""The queue in front of the models, with models that run when the test lets them."""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from labelstudio_backend.scheduler import FETCHERS, TURN_SECONDS, Level, LookError, Picture, Scheduler, Ticket
from yolonas.errors import DataError
from yolonas.inference.detections import Detections

WAIT = 20.0  # seconds after which something has gone wrong


class Model:
    """Runs one batch for each `let()`; an image's number is its first value, and its detections' score."""

    names = ("a",)
    checkpoint = SimpleNamespace(conf=0.25, iou=0.7)

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.batches: list[list[int]] = []
        self.began = threading.Semaphore(0)
        self._may = threading.Semaphore(0)
        self.fail: Callable[[list[int]], bool] = lambda numbers: False

    def let(self, batches: int = 1) -> None:
        self._may.release(batches)

    def predict_batch(self, images: list[np.ndarray], **_: Any) -> list[Detections]:
        numbers = [int(image[0, 0, 0]) for image in images]
        self.batches.append(numbers)
        self.began.release()
        assert self._may.acquire(timeout=WAIT)
        if self.fail(numbers):
            raise RuntimeError("CUDA out of memory")
        return [Detections(np.zeros((1, 4)), [number / 255], [0], self.names, (1, 1)) for number in numbers]

    def ran(self) -> list[int]:
        return [number for batch in self.batches for number in batch]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    def __init__(self, **options: Any) -> None:
        self.clock = Clock()
        self.scheduler = Scheduler(clock=self.clock, **options)
        self.model = Model()
        self.reads: list[int] = []

    def picture(self, number: int, side: int = 1) -> Picture:
        def read() -> np.ndarray:
            self.reads.append(number)
            return np.full((side, side, 3), number, np.uint8)

        return Picture(number, read)

    def submit(self, *numbers: int, level: Level = Level.MANY, side: int = 1, **options: Any) -> Ticket:
        model = options.pop("model", self.model)
        pictures = [self.picture(number, side) for number in numbers]
        return self.scheduler.submit(model, pictures, {"conf": options.pop("conf", 0.5)}, level=level, **options)

    def plug(self, side: int = 1) -> Ticket:
        """A forward pass that is under way until the model may go on: what comes now waits."""
        ticket = self.submit(255, side=side)
        assert self.model.began.acquire(timeout=WAIT)
        return ticket

    def until(self, **load: int) -> None:
        end = time.monotonic() + WAIT
        while not load.items() <= (now := self.scheduler.load()).items():
            assert time.monotonic() < end, f"{now}, not {load}"
            time.sleep(0.002)


@pytest.fixture
def make() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def build(**options: Any) -> Bench:
        made.append(Bench(**options))
        return made[-1]

    yield build
    for bench in made:
        bench.scheduler.close()
        bench.model.let(1000)


@pytest.fixture
def bench(make: Callable[..., Bench]) -> Bench:
    return make()


def numbers(*futures: Future[Detections]) -> list[int]:
    return [round(float(future.result(WAIT).scores[0]) * 255) for future in futures]


# -- order


def test_who_draws_goes_first_then_who_opened_a_task_then_batch_actions(bench: Bench) -> None:
    bench.plug()
    many = bench.submit(1, 2, 3)
    opened = bench.submit(11, level=Level.OPENED)
    drawing = bench.submit(21, level=Level.DRAWING)
    bench.until(ready=5)
    bench.model.let(6)
    assert numbers(*many.futures, *opened.futures, *drawing.futures) == [1, 2, 3, 11, 21]
    assert bench.model.ran() == [255, 21, 11, 1, 2, 3]


def test_requests_of_one_level_take_turns(bench: Bench) -> None:
    bench.plug()
    first, second = bench.submit(1, 2, 3, project="p"), bench.submit(11, 12, 13, project="q")
    bench.until(ready=6)
    bench.model.let(7)
    numbers(*first.futures, *second.futures)
    assert bench.model.ran() == [255, 1, 11, 2, 12, 3, 13]


def test_a_level_that_waited_long_has_one_turn_and_then_waits_again(bench: Bench) -> None:
    bench.plug()
    drawing = [bench.submit(20 + n, level=Level.DRAWING) for n in range(6)]
    many = bench.submit(1, 2, 3)
    bench.until(ready=9)
    bench.model.let(2)
    for _ in range(2):
        assert bench.model.began.acquire(timeout=WAIT)
    assert bench.model.ran() == [255, 20, 21]
    bench.clock.now += TURN_SECONDS + 0.1  # both levels have waited now: each has a turn
    bench.model.let(8)
    numbers(*many.futures, *(future for ticket in drawing for future in ticket.futures))
    assert bench.model.ran() == [255, 20, 21, 22, 1, 23, 24, 25, 2, 3]


def test_an_idle_model_waits_for_no_batch(bench: Bench) -> None:
    bench.model = model = Model("cuda")
    gate = threading.Event()
    slow = Picture(2, lambda: np.full((1, 1, 3), 2 * gate.wait(WAIT), np.uint8))
    ticket = bench.scheduler.submit(model, [bench.picture(1), slow], {})
    assert model.began.acquire(timeout=WAIT)
    assert model.batches == [[1]]
    gate.set()
    model.let(2)
    assert numbers(*ticket.futures) == [1, 2]


def test_a_gpu_s_batch_goes_over_requests_and_projects_of_one_model_and_options(bench: Bench) -> None:
    bench.model, other = Model("cuda"), Model("cuda")
    bench.plug()
    tickets = [bench.submit(n, project=str(n)) for n in range(5)]
    tickets += [bench.submit(10, model=other), bench.submit(11, conf=0.9)]
    tickets += [bench.submit(20, level=Level.OPENED), bench.submit(21, level=Level.OPENED)]
    bench.until(ready=9)
    bench.model.let(9)
    other.let()
    assert numbers(*(ticket.futures[0] for ticket in tickets)) == [0, 1, 2, 3, 4, 10, 11, 20, 21]
    assert bench.model.batches == [[255], [20, 21], [0, 1, 2, 3, 4], [11]], (
        "what waits less urgently does not ride along"
    )
    assert other.batches == [[10]]


def test_the_setting_bounds_a_batch(make: Callable[..., Bench]) -> None:
    bench = make(batch=2)
    bench.plug()
    ticket = bench.submit(1, 2, 3, 4, 5)
    bench.until(ready=5)
    bench.model.let(4)
    assert numbers(*ticket.futures) == [1, 2, 3, 4, 5]
    assert bench.model.batches == [[255], [1, 2], [3, 4], [5]]


# -- once


def test_an_image_that_several_ask_for_is_read_and_run_once(bench: Bench) -> None:
    bench.plug()
    tickets = [bench.submit(1, 2, project=str(n)) for n in range(3)] + [bench.submit(2, level=Level.DRAWING)]
    twice = bench.submit(1, 1)
    bench.until(ready=2)
    bench.model.let(3)
    assert [numbers(*ticket.futures) for ticket in tickets] == [[1, 2]] * 3 + [[2]]
    assert numbers(*twice.futures) == [1, 1]
    assert bench.model.ran() == [255, 2, 1], "at the most urgent level of those that ask"
    assert sorted(bench.reads) == [1, 2, 255]


def test_an_image_that_is_being_run_is_not_run_again(bench: Bench) -> None:
    first = bench.submit(1)
    assert bench.model.began.acquire(timeout=WAIT)
    second = bench.submit(1, level=Level.DRAWING)
    bench.model.let(1)
    assert numbers(*first.futures, *second.futures) == [1, 1]
    third = bench.submit(1)
    bench.model.let(1)
    assert numbers(*third.futures) == [1]
    assert bench.model.ran() == [1, 1], "what is done is not kept"


def test_other_options_and_other_models_are_other_work(bench: Bench) -> None:
    other = Model()
    tickets = [bench.submit(1), bench.submit(1, conf=0.1), bench.submit(1, model=other)]
    bench.model.let(2)
    other.let()
    assert numbers(*(ticket.futures[0] for ticket in tickets)) == [1, 1, 1]
    assert (len(bench.model.ran()), len(other.ran())) == (2, 1)


# -- giving up


def test_what_is_given_up_is_neither_read_nor_run(bench: Bench) -> None:
    bench.plug()
    ticket = bench.submit(*range(100))
    bench.until(ready=10)
    bench.scheduler.give_up(ticket)
    assert all(future.cancelled() for future in ticket.futures)
    assert bench.scheduler.load() == {"requests": 1, "images": 1, "ready": 0, "bytes": 3}
    bench.scheduler.give_up(ticket)
    bench.model.let(2)
    assert numbers(*bench.submit(200).futures) == [200]
    assert bench.model.ran() == [255, 200]
    assert len(bench.reads) == 12


def test_giving_up_takes_nothing_from_others_who_ask_for_the_same(bench: Bench) -> None:
    bench.plug()
    leaves, stays = bench.submit(1, 2, level=Level.DRAWING), bench.submit(2, 3)
    bench.until(ready=3)
    bench.scheduler.give_up(leaves)
    bench.model.let(3)
    assert numbers(*stays.futures) == [2, 3]
    assert bench.model.ran() == [255, 2, 3]


def test_a_request_that_is_given_up_while_it_runs_ends_at_once(bench: Bench) -> None:
    ticket = bench.plug()
    bench.scheduler.give_up(ticket)
    with pytest.raises(CancelledError):
        ticket.futures[0].result(WAIT)
    bench.model.let(2)
    assert numbers(*bench.submit(1).futures) == [1]


def test_after_the_deadline_nothing_is_run(bench: Bench) -> None:
    bench.plug()
    late, later = bench.submit(1, 2, deadline=bench.clock.now + 5), bench.submit(3, deadline=bench.clock.now + 50)
    bench.until(ready=3)
    bench.clock.now += 6
    bench.model.let(2)
    assert numbers(*later.futures) == [3]
    assert [future.cancelled() for future in late.futures] == [True, True]
    assert bench.model.ran() == [255, 3]


def test_a_batch_that_would_end_after_the_deadline_is_not_begun(bench: Bench) -> None:
    ticket = bench.submit(1, 2, deadline=bench.clock.now + 0.001)  # of the clock, which stands still
    assert bench.model.began.acquire(timeout=WAIT)
    time.sleep(0.01)  # the batch takes longer than what is left
    bench.model.let(1)
    assert numbers(ticket.futures[0]) == [1]
    with pytest.raises(CancelledError):
        ticket.futures[1].result(WAIT)
    assert bench.model.ran() == [1]


def test_closing_gives_everything_up(bench: Bench) -> None:
    bench.plug()
    ticket = bench.submit(1, 2)
    bench.scheduler.close()
    assert all(future.cancelled() for future in [*ticket.futures, *bench.submit(3).futures])


# -- isolation


def test_a_failing_image_costs_only_itself(make: Callable[..., Bench]) -> None:
    bench = make(batch=3)
    bench.plug()
    bench.model.fail = lambda batch: 2 in batch
    ticket, other = bench.submit(1, 2, project="p"), bench.submit(3, project="q")
    bench.until(ready=3)
    bench.model.let(5)
    assert numbers(ticket.futures[0], *other.futures) == [1, 3]
    with pytest.raises(LookError, match="CUDA out of memory"):
        ticket.futures[1].result(WAIT)


def test_a_model_that_always_fails_stops_no_other(bench: Bench) -> None:
    broken = Model()
    broken.fail = lambda batch: True
    broken.let(100)
    ticket, other = bench.submit(1, 2, 3, model=broken), bench.submit(4, 5)
    bench.model.let(2)
    assert numbers(*other.futures) == [4, 5]
    for future in ticket.futures:
        with pytest.raises(LookError):
            future.result(WAIT)


@pytest.mark.parametrize(
    ("error", "shown"),
    [(DataError("a.jpg is damaged"), "^a.jpg is damaged$"), (ZeroDivisionError("x"), "ZeroDivision")],
)
def test_an_image_that_cannot_be_read_costs_only_itself(bench: Bench, error: Exception, shown: str) -> None:
    def read() -> np.ndarray:
        raise error

    bench.model.let(2)
    pictures = [bench.picture(1), Picture("broken", read), bench.picture(2)]
    ticket = bench.scheduler.submit(bench.model, pictures, {})
    assert numbers(ticket.futures[0], ticket.futures[2]) == [1, 2]
    with pytest.raises(Exception, match=shown):
        ticket.futures[1].result(WAIT)
    bench.until(requests=0, images=0, bytes=0)


def test_a_host_that_does_not_answer_holds_up_its_own_project_alone(bench: Bench) -> None:
    """Each project that waits leaves half of the threads to others, and the last one to who does not ask for many."""
    answer, hanging = threading.Event(), threading.Semaphore(0)

    def hang() -> np.ndarray:
        hanging.release()
        answer.wait(WAIT)
        return np.zeros((1, 1, 3), np.uint8)

    bench.plug()  # so that the size of an image is known
    stuck = []
    for project in range(4):
        pictures = [Picture((project, n), hang) for n in range(20)]
        stuck.append(bench.scheduler.submit(bench.model, pictures, {}, project=f"stuck{project}"))
    for _ in range(FETCHERS - 1):
        assert hanging.acquire(timeout=WAIT)
    bench.model.let(2)
    assert numbers(*bench.submit(1, level=Level.OPENED).futures) == [1]
    assert not hanging.acquire(blocking=False)
    for ticket in stuck:
        bench.scheduler.give_up(ticket)
    answer.set()


# -- memory


def test_images_are_decoded_ahead_within_a_bound_of_bytes(make: Callable[..., Bench]) -> None:
    bench = make(ahead_bytes=12_000)
    bench.plug(side=20)
    size = 20 * 20 * 3
    tickets = [bench.submit(*range(100 * n, 100 * n + 50), project=str(n), side=20) for n in range(2)]
    bench.until(bytes=4 * size)  # with the plug; of 5 in the half of the bound that batch actions may use
    opened = bench.submit(250, level=Level.OPENED, side=20)
    bench.until(ready=4)
    most = bench.scheduler.load()["bytes"]
    for _ in range(101):
        bench.model.let()
        assert bench.model.began.acquire(timeout=WAIT)
        most = max(most, bench.scheduler.load()["bytes"])
    bench.model.let()
    assert numbers(*opened.futures) == [250]
    for number, ticket in enumerate(tickets):
        assert numbers(*ticket.futures) == list(range(100 * number, 100 * number + 50))
    assert most <= 6 * size
    bench.until(requests=0, images=0, ready=0, bytes=0)


def test_an_image_larger_than_the_bound_is_looked_at_alone(make: Callable[..., Bench]) -> None:
    bench = make(ahead_bytes=100)
    bench.model.let(3)
    ticket = bench.scheduler.submit(bench.model, [bench.picture(n, 20) for n in range(3)], {})
    assert numbers(*ticket.futures) == [0, 1, 2]


def test_while_it_waits_nothing_of_the_last_request_is_kept(bench: Bench) -> None:
    bench.model.let()
    ticket = bench.submit(7)
    kept = weakref.ref(ticket)
    assert numbers(*ticket.futures) == [7]
    del ticket
    end = time.monotonic() + WAIT
    while kept() is not None:
        assert time.monotonic() < end
        time.sleep(0.002)


# -- all at once


def test_every_future_ends_and_nothing_stays_behind(make: Callable[..., Bench]) -> None:
    bench = make(batch=3, ahead_bytes=400)
    bench.model.let(100_000)
    bench.model.fail = lambda batch: 13 in batch

    def client(seed: int) -> list[int]:
        draw, wrong = random.Random(seed), []
        for _ in range(20):
            wanted = [draw.randrange(60) for _ in range(draw.choice([1, 1, 8]))]
            ticket = bench.submit(*wanted, level=draw.choice(list(Level)), project=str(seed % 3))
            if leaves := draw.random() < 0.3:
                bench.scheduler.give_up(ticket)
            for number, future in zip(wanted, ticket.futures, strict=True):
                try:
                    right = numbers(future) == [number] != [13]
                except CancelledError:
                    right = leaves
                except LookError:
                    right = number == 13
                wrong += [] if right else [number]
        return wrong

    with ThreadPoolExecutor(16) as pool:
        assert [wrong for wrong in pool.map(client, range(32)) if wrong] == []
    bench.until(requests=0, images=0, ready=0, bytes=0)
