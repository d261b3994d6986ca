"""One queue in front of the models: images of all requests, in the order in which somebody waits for them.

    request -> ticket -> looks (one image for one model) -> read by a few threads -> run by one thread -> futures

Images are decoded ahead of the model within a bound of bytes, and run in batches of one model and one set of options
over requests and projects. One thread runs the models: two at a time would only share the same cores or GPU. An image
that several requests ask for at the same time is read and run once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from labelstudio_backend.models import Model
from yolonas.errors import YolonasError

if TYPE_CHECKING:
    from yolonas.inference.detections import Detections

logger = logging.getLogger(__name__)

FETCHERS = 8  # threads that fetch and decode images while the model runs
AHEAD_BYTES = 512 * 1024**2  # of decoded images that wait for the model; a photograph of 12 megapixels has 36 MB
FIRST_GUESS = 36 * 1000**2  # bytes of an image, before one was seen
TURN_SECONDS = 2.0  # a level that has waited this long has one batch run before the levels above it
GPU_BATCH = 8  # not measured in serving


class Level(IntEnum):
    """How somebody waits; the lowest number goes first."""

    DRAWING = 0  # with the pen in the hand: an interactive request
    OPENED = 1  # for the task that was just opened, or comes next in the label stream
    MANY = 2  # for a batch action


_Reader = tuple[str, Level]  # a project, at one level: what shares threads and bytes with others


class LookError(YolonasError):
    """An image that could not be looked at, with the reason in one sentence."""


class _State(Enum):
    NEW, READING, READY, RUNNING = range(4)


@dataclass(frozen=True)
class Picture:
    """An image to look at. key: equal for equal images; read: gives uint8 RGB [h, w, 3], or raises."""

    key: Hashable
    read: Callable[[], np.ndarray]


@dataclass(eq=False)
class Ticket:
    """What one request waits for: one future for each of its images, in their order, cancelled by `give_up`."""

    project: str
    level: Level
    deadline: float
    model: Model
    options: dict[str, Any]
    served: int  # the turn in which an image of it was last run; before that, when it came
    futures: list[Future[Detections]] = field(default_factory=list)
    slowest: float = 0.0  # seconds of the slowest batch that it took part in
    open: OrderedDict[_Look, list[Future[Detections]]] = field(default_factory=OrderedDict)


@dataclass(eq=False)
class _Look:
    """One image for one model."""

    key: Hashable
    read: Callable[[], np.ndarray]
    state: _State = _State.NEW
    tickets: list[Ticket] = field(default_factory=list)
    pixels: np.ndarray | None = None
    reader: _Reader = ("", Level.MANY)  # for whom it was read
    held: int = 0  # bytes that it counts for


class Scheduler:
    """Runs what tickets ask for. Thread-safe; nothing but the futures is waited for.

    batch: images in one forward pass; 0 is 1 on a CPU, where more at a time take as long and delay whoever comes next,
    and 8 on a GPU.
    """

    def __init__(
        self, batch: int = 0, *, ahead_bytes: int = AHEAD_BYTES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._batch, self._ahead_bytes, self._clock = batch, ahead_bytes, clock
        self._changed = threading.Condition()  # its lock guards all below; never held while something is read or run
        self._tickets: list[Ticket] = []
        self._looks: dict[Hashable, _Look] = {}
        self._turns = dict.fromkeys(Level, 0.0)  # when each level last had a batch, or began to wait for one
        self._turn = count()
        self._reading: Counter[_Reader] = Counter()  # threads that read
        self._held: Counter[_Reader] = Counter()  # bytes that are read, and a guess for those being read
        self._guess = FIRST_GUESS
        self._closing = False
        self._fetchers = ThreadPoolExecutor(FETCHERS, "fetch")
        self._worker = threading.Thread(target=self._work, name="models", daemon=True)
        self._worker.start()

    def submit(
        self,
        model: Model,
        pictures: Sequence[Picture],
        options: Mapping[str, Any],
        *,
        project: str = "",
        level: Level = Level.MANY,
        deadline: float = float("inf"),
    ) -> Ticket:
        """Put the images into the queue; those not run by `deadline` (time.monotonic()) are given up.

        options: of `model.predict_batch`. A future raises LookError, or what `read` raised, or CancelledError.
        """
        now = self._clock()
        ticket = Ticket(project, level, deadline, model, dict(options), next(self._turn))
        common = (id(model), *sorted(options.items()))
        with self._changed:
            if all(other.level != level for other in self._tickets):
                self._turns[level] = now
            for picture in pictures:
                key = (*common, picture.key)
                look = self._looks.setdefault(key, _Look(key, picture.read))
                if ticket not in look.tickets:
                    look.tickets.append(ticket)
                future: Future[Detections] = Future()
                ticket.open.setdefault(look, []).append(future)
                ticket.futures.append(future)
            if self._closing:
                self._drop(ticket)
            elif ticket.open:
                self._tickets.append(ticket)
                self._read_ahead()
                self._changed.notify()
        return ticket

    def give_up(self, ticket: Ticket) -> None:
        """Cancel what is not yet run of a ticket; nothing where it is done."""
        with self._changed:
            self._drop(ticket)
            self._read_ahead()
            self._changed.notify()

    def close(self) -> None:
        """Give up everything; a batch that is being run is left to itself."""
        with self._changed:
            self._closing = True
            for ticket in list(self._tickets):
                self._drop(ticket)
            self._changed.notify()
        self._fetchers.shutdown(wait=False, cancel_futures=True)

    def load(self) -> dict[str, int]:
        """How much there is to do: requests and images that wait, those of them that are read, and their bytes."""
        with self._changed:
            ready = sum(look.state is _State.READY for look in self._looks.values())
            return {
                "requests": len(self._tickets),
                "images": len(self._looks),
                "ready": ready,
                "bytes": self._held.total(),
            }

    # -- with the lock held ------------------------------------------------------------------------------------

    def _drop(self, ticket: Ticket) -> None:
        for look, futures in list(ticket.open.items()):
            for future in futures:
                if future.cancel():
                    future.set_running_or_notify_cancel()  # only then do those who wait hear of it
            look.tickets.remove(ticket)
            if not look.tickets and look.state in (_State.NEW, _State.READY):
                self._forget(look)
        ticket.open.clear()
        if ticket in self._tickets:
            self._tickets.remove(ticket)

    def _forget(self, look: _Look) -> None:
        self._looks.pop(look.key, None)
        self._hold(look, 0)
        look.pixels = None

    def _hold(self, look: _Look, size: int) -> None:
        self._held[look.reader] += size - look.held
        look.held = size

    def _close(self, look: _Look) -> list[Future[Detections]]:
        """Take a look that is done out of the queue; returns whom to tell."""
        futures = [future for ticket in look.tickets for future in ticket.open.pop(look)]
        self._tickets = [ticket for ticket in self._tickets if ticket.open]
        look.tickets = []
        self._forget(look)
        return [future for future in futures if future.set_running_or_notify_cancel()]

    def _size(self, model: Model) -> int:
        """Images in one forward pass. Measured with OpenVINO on two cores: 8 at a time take 8 times as long as one."""
        return self._batch or (1 if getattr(model, "device", "cpu") == "cpu" else GPU_BATCH)

    def _window(self, ticket: Ticket, state: _State) -> Iterator[_Look]:
        """The looks in this state among the ticket's next: one batch that runs, one that is ready, some being read."""
        nearest = islice(ticket.open, 2 * self._size(ticket.model) + FETCHERS)
        return (look for look in nearest if look.state is state)

    def _read_ahead(self) -> None:
        """Have images read, in the order of levels, while threads and bytes are free.

        A project takes as much of both as is left to others at most, and who asks for many leaves the last thread and
        half of the bytes to who does not: a host that does not answer holds up its own project alone.
        """
        while not self._closing and (threads := FETCHERS - self._reading.total()) > 0:
            held = self._held.total()
            for ticket in sorted(self._tickets, key=lambda t: (t.level, self._reading[t.project, t.level], t.served)):
                reader, many = (ticket.project, ticket.level), ticket.level is Level.MANY
                room = (self._ahead_bytes // 2 if many else self._ahead_bytes) - held
                if self._reading[reader] >= threads - many or (held and self._held[reader] + self._guess > room):
                    continue
                if (look := next(self._window(ticket, _State.NEW), None)) is not None:
                    break
            else:
                return
            look.state, look.reader = _State.READING, reader
            self._hold(look, self._guess)
            self._reading[reader] += 1
            self._fetchers.submit(self._read, look)

    def _choose(self) -> list[_Look]:
        """What to run now: images that are read, of one model and one set of options."""
        now = self._clock()
        for ticket in [ticket for ticket in self._tickets if now + ticket.slowest > ticket.deadline]:
            self._drop(ticket)
        ready = [ticket for ticket in self._tickets if next(self._window(ticket, _State.READY), None) is not None]
        if not ready:
            return []
        level = min(ticket.level for ticket in ready)
        waiting = [other for other in {t.level for t in ready} if now - self._turns[other] > TURN_SECONDS]
        if waiting and level not in waiting:
            level = min(waiting, key=lambda other: self._turns[other])
        # In turn within a level, so that two batch actions share the time; others ride along, lower levels do not.
        ready = sorted((t for t in ready if t.level <= level), key=lambda t: (t.level != level, t.level, t.served))
        first = ready[0]
        fellows = [t for t in ready if t.model is first.model and t.options == first.options]
        chosen: dict[_Look, None] = {}
        for ticket in fellows:
            chosen |= dict.fromkeys(self._window(ticket, _State.READY))
        batch = list(chosen)[: self._size(first.model)]
        self._turns[level] = now
        for look in batch:
            look.state = _State.RUNNING
            for ticket in look.tickets:
                ticket.served = next(self._turn)
        return batch

    # -- threads -----------------------------------------------------------------------------------------------

    def _read(self, look: _Look) -> None:
        pixels, failure = None, None
        if look.tickets:  # else given up while it waited for this thread
            try:
                pixels = look.read()
            except Exception as error:
                failure = error
                if not isinstance(error, YolonasError):
                    logger.exception("an image could not be read")
                    failure = LookError(f"its image could not be read ({type(error).__name__}: {error})")
        futures: list[Future[Detections]] = []
        with self._changed:
            self._reading[look.reader] -= 1
            if pixels is not None:
                self._guess = pixels.nbytes
            self._hold(look, 0 if pixels is None else pixels.nbytes)
            if failure is not None or not look.tickets:
                futures = self._close(look)
            elif pixels is None:  # somebody asked for it after it had been given up
                look.state = _State.NEW
            else:
                look.state, look.pixels = _State.READY, pixels
            self._read_ahead()
            self._changed.notify()
        for future in futures:
            future.set_exception(failure)

    def _work(self) -> None:
        while self._run_next():
            pass

    def _run_next(self) -> bool:
        """Wait for a batch and run it; False once the scheduler closes.

        What it knew of the batch goes with its return: pixels, and requests as Label Studio sent them, in which a task
        brings its predictions by every version. A loop would hold on to them while it waits for the next batch.
        """
        with self._changed:
            while not (batch := self._choose()) and not self._closing:
                self._changed.wait()
            if self._closing:
                return False
            first = batch[0].tickets[0]
            images = [look.pixels for look in batch if look.pixels is not None]
        start = time.monotonic()
        outcomes = self._forward(first.model, images, first.options)
        seconds = time.monotonic() - start
        told: list[tuple[list[Future[Detections]], Detections | str]] = []
        with self._changed:
            for look, outcome in zip(batch, outcomes, strict=True):
                for ticket in look.tickets:
                    ticket.slowest = max(ticket.slowest, seconds)
                told.append((self._close(look), outcome))
            self._read_ahead()
        for futures, outcome in told:
            for future in futures:
                if isinstance(outcome, str):
                    future.set_exception(LookError(outcome))
                else:
                    future.set_result(outcome)
        return True

    def _forward(
        self, model: Model, images: list[np.ndarray], options: Mapping[str, Any]
    ) -> Sequence[Detections | str]:
        """One batch through the model; where it fails, image by image, so that a bad one costs only itself."""
        try:
            outcomes = model.predict_batch(images, **options, batch=len(images))
            if len(outcomes) == len(images):
                return outcomes
            raise RuntimeError(f"{len(outcomes)} detections for {len(images)} images")
        except Exception as error:
            logger.exception("a batch of %d images failed", len(images))
            if len(images) == 1:
                return [f"the model failed on its image ({type(error).__name__}: {error})"]
        return [outcome for image in images for outcome in self._forward(model, [image], options)]
