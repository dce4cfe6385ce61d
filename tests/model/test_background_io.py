import gc
import threading
import weakref
from contextlib import closing, suppress

import pytest
import torch

from ream_stream.errors import DamagedError
from ream_stream.model.background_io import WriteBehind, read_ahead

WAIT = 20
"""Seconds after which a thread that should have come counts as hung."""


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def test_all_is_read_in_order_on_another_thread():
    readers = set()

    def read(number):
        readers.add(threading.current_thread())
        return number * number

    assert list(read_ahead(read, range(5))) == [0, 1, 4, 9, 16]
    assert list(read_ahead(read, range(1))) == [0]
    assert threading.current_thread() not in readers


def test_the_next_is_read_while_the_one_before_is_used_and_no_more():
    started = [threading.Event() for _ in range(4)]
    made = []

    def read(number):
        started[number].set()
        tensor = torch.empty(1)
        made.append(weakref.ref(tensor))
        return tensor

    with closing(read_ahead(read, range(4))) as tensors:
        for number, _tensor in enumerate(tensors):
            if number + 1 < len(started):
                assert started[number + 1].wait(WAIT)
            assert not any(event.is_set() for event in started[number + 2 :])
            alive = [ref() is not None for ref in made]
            # what was used before is gone
            assert not any(alive[:number])


def test_an_error_is_raised_where_the_batch_is_used_and_ends_the_thread():
    def read(number):
        if number == 2:
            raise DamagedError("batch 2")
        return number

    found = read_ahead(read, range(5))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(DamagedError, match="batch 2"):
        next(found)


def test_a_pass_that_ends_early_ends_the_thread():
    def use():
        for number in read_ahead(lambda number: number, range(9)):
            if number == 3:
                raise InterruptedError

    with suppress(InterruptedError):
        use()
    gc.collect()


def test_writes_are_done_in_order_and_one_waits_for_the_one_before():
    gate, written = threading.Event(), []
    behind = WriteBehind()

    def slow():
        assert gate.wait(WAIT)
        written.append("first")

    behind.submit(slow)
    assert not written, "it is done beside"
    threading.Timer(0.05, gate.set).start()
    behind.submit(lambda: written.append("second"))
    assert written[0] == "first"
    behind.wait()
    assert written == ["first", "second"]
    behind.close()


@pytest.mark.parametrize("found", ["next", "wait"])
def test_what_failed_is_raised_by_the_next_write_or_at_the_end(found):
    failed = OSError(28, "No space left on device")

    def fail():
        raise failed

    behind = WriteBehind()
    behind.submit(fail)
    with pytest.raises(OSError, match="No space left") as raised:
        behind.submit(fail) if found == "next" else behind.wait()
    assert raised.value is failed
    behind.close()
    behind.wait()
