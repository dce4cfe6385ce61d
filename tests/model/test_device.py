"""Choosing a device and what to compute in."""

from contextlib import contextmanager

import pytest
import torch

from ream_stream.errors import UsageError
from ream_stream.model.device import (
    TransferLanes,
    choose_device,
    compute_dtype,
    has_bf16_products,
    unused_gpu,
)

CPU = torch.device("cpu")


def test_auto_is_a_device_that_is_here():
    assert choose_device("auto").type in {"cpu", "cuda"}
    assert choose_device("cpu") == CPU


def test_a_word_that_is_no_device_is_told_in_one_sentence():
    with pytest.raises(UsageError, match=r"^--device foo is no device; use auto, cpu or cuda$"):
        choose_device("foo")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_here_is_refused():
    with pytest.raises(UsageError, match="--device cuda: "):
        choose_device("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that torch can use")
@pytest.mark.parametrize("sign", ["proc/driver/nvidia/gpus/0000:01:00.0", "dev/nvidia0"])
def test_a_gpu_that_torch_cannot_use_is_told_with_the_reason(tmp_path, sign):
    assert unused_gpu(tmp_path) is None
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()  # there without a GPU too
    assert unused_gpu(tmp_path) is None
    (tmp_path / sign).mkdir(parents=True)
    told = unused_gpu(tmp_path)
    assert told.startswith(f"there is a GPU ({tmp_path / sign}) that is not used: torch ")
    built = torch.version.cuda
    assert ("built without CUDA" in told) == (built is None)
    assert ("nvidia-smi tells" in told) == (built is not None)


def test_auto_computes_in_the_checkpoint_s_dtype_only_where_that_is_fast():
    wanted = torch.bfloat16 if has_bf16_products(CPU) else torch.float32
    assert compute_dtype("auto", torch.bfloat16, CPU) == wanted
    assert compute_dtype("checkpoint", torch.bfloat16, CPU) == torch.bfloat16
    assert compute_dtype("float32", torch.bfloat16, CPU) == torch.float32
    assert has_bf16_products(torch.device("cuda"))


class Machine:
    """Stands in for torch.cuda: remembers which work of a device must end before which."""

    def __init__(self):
        self.before = {}
        self.ended = frozenset()  # what the host has waited for
        machine = self

        class Stream:
            def __init__(self, _device=None):
                self.queued = frozenset()

            def wait_event(self, event):
                self.queued |= event.work

        class Event:
            work = frozenset()

            def record(self, stream):
                self.work = stream.queued

            def synchronize(self):
                machine.ended |= self.work

        self.Stream, self.Event = Stream, Event
        self.products = self.current = Stream()

    def current_stream(self, _device):
        return self.current

    @contextmanager
    def stream(self, stream):
        self.current = stream
        yield
        self.current = self.products

    def do(self, name):
        stream = self.current
        self.before[name] = stream.queued | self.ended
        stream.queued |= self.before[name] | {name}


@pytest.mark.parametrize("fresh", [(), (0, 1, 2), (3,)], ids=str)
def test_loads_run_beside_products_and_never_into_what_products_use(monkeypatch, fresh):
    machine = Machine()
    monkeypatch.setattr(torch, "get_device_module", lambda _device: machine)
    lanes, before = TransferLanes(CPU, TransferLanes.room([12, 4])), machine.before
    for number in range(6):
        with lanes.load(fresh=number in fresh) as (lane, send):
            assert lane == (number + 1) % 2
            # its page-locked memory is written at once
            assert {f"load {n}" for n in range(number - 1)} <= machine.ended
            assert send(torch.arange(3.0)).tolist() == [0, 1, 2]
            assert send(torch.tensor(7)[None].int()).tolist() == [7]
            machine.do(f"load {number}")
        machine.do(f"products {number}")
    for number in range(6):
        load = before[f"load {number}"]
        assert f"load {number}" in before[f"products {number}"]
        assert {f"products {n}" for n in range(number - 1)} <= load
        if number:
            assert (f"products {number - 1}" in load) == (number in fresh)


def test_page_locked_memory_is_counted_as_torch_takes_it():
    assert TransferLanes.room([1, 256, 257]) == 256 + 256 + 512
    assert TransferLanes.host_bytes(1024) == 2 * 1024
    assert TransferLanes.host_bytes(1025) == 2 * 2048


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_gpu_gets_what_was_sent_while_it_computes():
    device = torch.device("cuda")
    lanes = TransferLanes(device, TransferLanes.room([4 << 20]))
    buffers = [torch.empty(1 << 20, device=device) for _ in range(2)]
    square = torch.ones(4096, 4096, device=device)
    sums = []
    for number in range(20):
        with lanes.load(fresh=False) as (lane, send):
            buffers[lane].copy_(send(torch.full((1 << 20,), float(number))))
        square @ square
        sums.append(buffers[lane].sum())
    assert [float(each) for each in sums] == [number * 2.0**20 for number in range(20)]
