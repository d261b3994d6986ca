"""Images on their way through the network: read ahead of it, which runs ahead of the consumer; in order, bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from yolonas.inference.runtimes import Canvases

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")


def in_batches(
    items: Iterable[Item],
    allocate: Callable[[int], Canvases],
    prepare: Callable[[Item, Canvases], Prepared],
    run: Callable[[Canvases, list[Prepared]], Result],
    *,
    batch: int,
    workers: int,
    ahead: int,
) -> Iterator[Result]:
    """What `run` makes of every `batch` items, in their order.

    `allocate` makes the canvases of a batch; `prepare` fills one from an item, in one of `workers` threads; `run` gets
    one batch after the other in a thread of its own. At most `ahead` batches are begun beyond the one that the consumer
    waits for; with 0 no item is taken before its batch is asked for. What `items`, `prepare` or `run` raises comes
    after the results before it. When the consumer stops, the threads end with the item or batch that they are at.
    """
    source = iter(items)
    pending: deque[Future[Result]] = deque()
    readers, runner = ThreadPoolExecutor(workers, "yolonas-read"), ThreadPoolExecutor(1, "yolonas-network")

    def run_when_prepared(canvases: Canvases, futures: list[Future[Prepared]]) -> Result:
        return run(canvases, [future.result() for future in futures])

    try:
        failure: Exception | None = None
        while failure is None:
            group: list[Item] = []
            try:
                group.extend(islice(source, batch))  # keeps what came before a failure
            except Exception as error:
                failure = error
            if not group:
                break
            canvases = allocate(len(group))
            futures = [readers.submit(prepare, item, canvas) for item, canvas in zip(group, canvases, strict=True)]
            pending.append(runner.submit(run_when_prepared, canvases, futures))
            del group, canvases, futures  # the consumer may take its time
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
        if failure is not None:
            raise failure
    finally:
        readers.shutdown(cancel_futures=True)
        runner.shutdown(cancel_futures=True)
