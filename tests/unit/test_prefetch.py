"""Reading ahead: order, errors, an early end, and no thread left behind."""

import threading
import time

import pytest

from common.faces.batches import prefetched


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "facefed-prefetch"]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    assert threads() == []
    yield
    assert threads() == []


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_all_items_come_in_their_order(depth):
    assert list(prefetched(range(50), depth=depth)) == list(range(50))
    assert list(prefetched([], depth=depth)) == []


def test_an_error_comes_after_the_items_before_it_with_its_own_place():
    def making():
        yield from (1, 2)
        raise OSError("the disk is gone")

    items = prefetched(making(), depth=5)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(OSError, match="the disk is gone") as caught:
        next(items)
    assert any(entry.name == "making" for entry in caught.traceback)


def test_no_more_than_the_depth_is_made_ahead():
    """One is taken, two wait, and one more may be in the thread's hand."""
    made = []

    def making():
        for number in range(100):
            made.append(number)
            yield number

    items = prefetched(making(), depth=2)
    assert next(items) == 0
    deadline = time.monotonic() + 20
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]
    items.close()


def test_the_thread_ends_when_nobody_takes_any_more():
    items = prefetched(iter(range(1000)), depth=1)
    next(items)
    assert len(threads()) == 1
    items.close()


def test_it_reads_while_the_taker_works():
    """The second item is made although the first was not given back."""
    second = threading.Event()

    def making():
        yield 1
        second.set()
        yield 2

    items = prefetched(making(), depth=1)
    next(items)
    assert second.wait(timeout=30)
    items.close()
