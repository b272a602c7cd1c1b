"""Many items through a pool of threads, in order and a few ahead, and where the time goes."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from threading import Lock, local
from typing import TypeVar


Item, Result = TypeVar("Item"), TypeVar("Result")


def in_order(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """`work` of each item, in the order of the items; at most `ahead` are begun or done before they are asked for."""
    items = iter(items)
    queue: deque[Future[Result]] = deque()
    try:
        while True:
            queue.extend(pool.submit(work, item) for item in islice(items, ahead - len(queue)))
            if not queue:
                return
            yield queue.popleft().result()
    finally:
        for future in queue:
            future.cancel()


STAGES = ("decode", "preprocess", "transfer", "tower", "write")  # of indexing


class Stopwatch:
    """Seconds of each stage, summed over threads; a stage inside another one is not the other's."""

    def __init__(self):
        self.seconds: Counter[str] = Counter()
        self._lock = Lock()
        self._inner = local()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start, before = time.perf_counter(), getattr(self._inner, "seconds", 0.0)
        self._inner.seconds = 0.0
        try:
            yield
        finally:
            passed = time.perf_counter() - start
            with self._lock:
                self.seconds[stage] += passed - self._inner.seconds
            self._inner.seconds = before + passed

    def shares(self) -> dict[str, float]:
        """Of the sum; the longest first."""
        total = sum(self.seconds.values()) or 1.0
        return {stage: seconds / total for stage, seconds in self.seconds.most_common()}
