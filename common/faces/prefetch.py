"""Items made ahead by a thread, so that reading pictures does not hold up a device that works on its own."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
POLL_S = 0.1  # how soon the thread notices that nobody takes any more


def prefetched(items: Iterable[Item], *, depth: int) -> Iterator[Item]:
    """The items in their order, at most `depth` of them made ahead.

    What the making raises is raised here, after the items before it. The thread ends with the items, or when this
    generator is closed.
    """
    ready: queue.Queue[tuple[Item] | BaseException] = queue.Queue(maxsize=depth)
    stop = threading.Event()
    thread = threading.Thread(target=_make, args=(items, ready, stop), name="facefed-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            made = ready.get()
            if isinstance(made, StopIteration):
                return
            if isinstance(made, BaseException):
                raise made
            yield made[0]
    finally:
        stop.set()
        thread.join()


def _make(items: Iterable[Item], ready: "queue.Queue[tuple[Item] | BaseException]", stop: threading.Event) -> None:
    try:
        for item in items:
            if not _hand_over(ready, (item,), stop):
                return
    except BaseException as error:
        _hand_over(ready, error, stop)
    else:
        _hand_over(ready, StopIteration(), stop)


def _hand_over(
    ready: "queue.Queue[tuple[Item] | BaseException]", made: tuple[Item] | BaseException, stop: threading.Event
) -> bool:
    """Whether it was taken into the queue before the taker left."""
    while not stop.is_set():
        try:
            ready.put(made, timeout=POLL_S)
        except queue.Full:
            continue
        return True
    return False
