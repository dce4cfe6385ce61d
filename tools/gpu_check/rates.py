"""Rates: experts of large models, one large product, hidden states, copies.

Letters in shapes: T tokens, K experts a token, E experts, H hidden.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from found import Found
from torch import Tensor
from torch.nn import functional

from ream_stream.checkpoint.expert_stack import ExpertStack, Send, stay
from ream_stream.checkpoint.formats import Stored
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.model.device import free_bytes, host_empty
from ream_stream.model.experts import ExpertWeights, Form, Routed, StreamedExperts
from ream_stream.model.hidden_states import HiddenStates, HiddenWriter

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
import make_headers

TINY = {"num_hidden_layers": 1, "hidden_size": 256, "moe_intermediate_size": 128}
DTYPE = torch.bfloat16


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """A layer's experts to be timed."""

    name: str
    config: dict[str, Any]
    top_k: int
    tokens: int


def _layers(*, quick: bool) -> list[_Layer]:
    qwen = make_headers.CONFIGS["qwen3-30b-a3b"] | {"num_hidden_layers": 1}
    deepseek = make_headers.CONFIGS["deepseek-v3-fp8"] | {
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
    }
    if quick:
        qwen |= TINY | {"num_experts": 16}
        deepseek |= TINY | {"n_routed_experts": 16}
    tokens = 512 if quick else 8192
    return [
        _Layer(name="Qwen3-30B", config=qwen, top_k=8, tokens=tokens),
        _Layer(name="DeepSeek-V3, FP8", config=deepseek, top_k=8, tokens=tokens),
    ]


class _Filled:
    """Stands in for mapped tensors: one random expert, as it is stored, under all numbers."""

    def __init__(self, stack: ExpertStack) -> None:
        stream = torch.Generator().manual_seed(0)
        self._parts: dict[str, dict[str, Tensor]] = {}
        for matrix in stack.matrices:
            stored = matrix.stored
            drawn_RC = torch.randn(stored.rows, stored.cols, generator=stream) / 64
            self._parts[matrix.leaf] = stored.codec.encode(drawn_RC)

    def ahead(self, stack: ExpertStack, expert: int) -> None:
        """All of them are there."""

    def matrix(
        self, stored: Stored, _index: int | None, dtype: torch.dtype, send: Send = stay
    ) -> Tensor:
        """Return a matrix of any expert."""
        leaf = stored.prefix.rpartition(".")[2]
        parts = {suffix: send(part) for suffix, part in self._parts[leaf].items()}
        return stored.codec.decode(parts, stored.rows, stored.cols, dtype)


def run(device: torch.device, folder: Path, *, quick: bool) -> Iterator[Found]:
    """Yield each rate."""
    limit = 0.05 if quick else 1.0
    size = 512 if quick else 8192
    product = _product_rate(device, size, limit)
    yield Found(
        name=f"one product of {size} x {size}",
        value=product / 1e12,
        unit="TFLOP/s",
        note="bf16",
    )
    for layer in _layers(quick=quick):
        yield from _expert_rates(layer, device, folder, product, limit)
    yield from _copies(device, (4 if quick else 256) << 20, limit)
    yield from _states(device, folder / "states", quick=quick)


def _product_rate(device: torch.device, size: int, limit: float) -> float:
    left = torch.randn(size, size, device=device).to(DTYPE)
    right = torch.randn(size, size, device=device).to(DTYPE)
    return 2 * size**3 / _seconds(lambda: functional.linear(left, right), device, limit)


def _expert_rates(
    layer: _Layer, device: torch.device, folder: Path, product: float, limit: float
) -> Iterator[Found]:
    """Observe and propagate one batch through a layer's experts, one expert after another."""
    headers = folder / layer.name.replace(" ", "-")
    make_headers.write_headers(headers, layer.config)
    stack = next(iter(open_checkpoint(headers, with_data=False).experts.values()))
    original: Any = SimpleNamespace(act_fn=functional.silu)
    tensors: Any = _Filled(stack)
    weights = ExpertWeights(tensors, stack, DTYPE, device, Form(is_gated=stack.is_gated))
    expert_bytes = 3 * stack.hidden * stack.inner * DTYPE.itemsize
    room = free_bytes(device) * 3 // 4 if device.type == "cuda" else 0
    weights.resident = min(stack.count, room // expert_bytes)
    experts = StreamedExperts(original, weights)
    stream = torch.Generator().manual_seed(1)
    score_TE = torch.rand(layer.tokens, stack.count, generator=stream)
    index_TK = score_TE.topk(layer.top_k, dim=1).indices.to(device)
    weight_TK = torch.full(index_TK.shape, 1 / layer.top_k, dtype=DTYPE, device=device)
    hidden_TH = torch.randn(layer.tokens, stack.hidden, generator=stream).to(DTYPE).to(device)
    flop = 6 * layer.tokens * layer.top_k * stack.hidden * stack.inner
    with torch.no_grad():
        for phase in ("observe", "propagate"):
            experts.captures_only = phase == "observe"
            experts.listener = _ignore if phase == "observe" else None
            seconds = _seconds(lambda: experts(hidden_TH, index_TK, weight_TK), device, limit)
            yield Found(
                name=f"{phase}, {layer.name}, looped products",
                value=flop / seconds / product,
                unit="of one product's rate",
                note=f"{flop / seconds / 1e12:.4g} TFLOP/s, {stack.count} experts of "
                f"{stack.hidden} x {stack.inner}, {weights.resident} kept, "
                f"{layer.tokens} tokens a batch",
            )


def _ignore(_routed: Routed) -> None:
    """Take no statistics."""


def _copies(device: torch.device, nbytes: int, limit: float) -> Iterator[Found]:
    """Copy to the device from page-locked memory and from other memory."""
    locks = device.type == "cuda"
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    for name, locked in (("page-locked", True), ("pageable", False)):
        here = host_empty((nbytes,), torch.uint8, locked=locked and locks).fill_(1)
        seconds = _seconds(
            lambda here=here: there.copy_(here, non_blocking=True), device, limit
        )
        yield Found(
            name=f"copy to the device, {name}",
            value=nbytes / seconds / 1e9,
            unit="GB/s",
            note="" if locks else "from memory to memory",
        )


def _states(device: torch.device, path: Path, *, quick: bool) -> Iterator[Found]:
    """Write hidden states from the device, and read them to it again."""
    batches, rows, width = (3, 2, 64) if quick else (32, 16, 2048)
    store = ((batches * rows, 512, width), DTYPE, rows)
    states_BLH = torch.randn(rows, 512, width, device=device).to(DTYPE)
    gigabytes, begin = batches * states_BLH.nbytes / 1e9, time.perf_counter()
    with HiddenWriter(path, *store) as writer:
        for number in range(batches):
            writer.write(number, states_BLH)
        writer.publish()
    middle = time.perf_counter()
    for given_BLH in HiddenStates(path, *store, device=device).ahead(range(batches)):
        given_BLH.to(device, non_blocking=True)
    _wait(device)
    end = time.perf_counter()
    yield Found(name="hidden states written", value=gigabytes / (middle - begin), unit="GB/s")
    yield Found(name="hidden states read", value=gigabytes / (end - middle), unit="GB/s")


def _seconds(work: Callable[[], object], device: torch.device, limit: float) -> float:
    """Return the seconds of a call, the mean of as many as `limit` allows after the first."""
    work()
    _wait(device)
    calls, begin = 0, time.perf_counter()
    while not calls or time.perf_counter() - begin < limit:
        work()
        _wait(device)
        calls += 1
    return (time.perf_counter() - begin) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
