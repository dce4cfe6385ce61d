"""How fast this machine does what a run consists of, and how long the run will take.

Measured in about a second, in the run's own shapes and with its threads; less for a
small run, which should not wait for its estimate. Nothing is written.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from ream_stream.checkpoint.expert_stack import ExpertMatrix, ExpertStack, Send, stay
from ream_stream.checkpoint.formats import Plain, Stored
from ream_stream.checkpoint.header import ITEM_BYTES, torch_dtype
from ream_stream.checkpoint.reader import Checkpoint
from ream_stream.host_memory import trim
from ream_stream.method.rng import generator
from ream_stream.model.expert_rows import slots_by_expert
from ream_stream.model.experts import ExpertWeights, Form, StreamedExperts

from .cost import cost_of
from .gpus import EFFICIENCY, Gpu
from .phase_cost import DIVIDED, Cost, total
from .plan import Plan

ASSUMED_READ = 1e9
"""Bytes read a second, if the tensors are not on disk yet."""

UNCOUNTED = 1.4
"""Factor on the time of products that covers norms, softmax, routing and statistics.

1.4 to 1.9 on the 106M-parameter benchmark and the built-in checkpoint; wide models less.
"""

_SAMPLED_BYTES = 64 << 20  # more than a processor's caches hold
_FEWEST_EXPERTS = 4
_BLOCK = 4 << 20
_MATCHED = 256
_MATCHING_EXPONENT = 2.5
_CODED_ROWS = 256
_DECODED_BYTES = 16  # of memory a number: its code, a float32 in and out, the result


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """Work that this machine does in a second."""

    expert: float
    """Operations a second of experts on a batch's usual number of rows, loading included."""

    product: float
    """Operations a second of a product with many rows, in the run's dtype."""

    float32: float
    """Operations a second of a product with many rows, in float32."""

    matching: float
    """Assignments of I neurons a second, on all threads together."""

    merge: float
    """Merged numbers of experts a second."""

    read: float
    """Bytes read from the source a second; the sample includes cached pages."""

    read_measured: bool
    """Whether `read` was measured; otherwise it is `ASSUMED_READ`."""

    digest: float
    """Bytes of shards hashed a second; writing itself counts as fast as reading."""

    decode: float | None = None
    """Decoded numbers of quantized matrices a second; None without such matrices."""

    encode: float | None = None
    """Encoded numbers a second in the output's format; None without encoding."""

    def seconds(self, cost: Cost) -> float:
        """Return about how long something takes."""
        return (
            (cost.read_bytes - cost.cached_bytes + cost.written_bytes) / self.read
            + cost.written_bytes / self.digest
            + cost.expert_flop / self.expert * UNCOUNTED
            + cost.product_flop / self.product * UNCOUNTED
            + cost.float32_flop / self.float32
            + cost.matchings / self.matching
            + cost.merged_numbers / self.merge
            + (cost.decoded_numbers / self.decode if self.decode else 0)
            + (cost.encoded_numbers / self.encode if self.encode else 0)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Remaining work of a run, and its estimated duration on this machine."""

    costs: Mapping[str, Cost]
    """Cost of each phase."""

    throughput: Throughput = field(repr=False)
    """Throughput of this machine."""

    ranks: int = 1
    """Processes that divide the work."""

    @property
    def total(self) -> Cost:
        """The cost of all phases."""
        return total(self.costs.values())

    @property
    def seconds(self) -> dict[str, float]:
        """About how long each phase takes; what is not divided evenly counts as not at all."""
        return {
            phase: self.throughput.seconds(cost) / (self.ranks if phase in DIVIDED else 1)
            for phase, cost in self.costs.items()
        }


def forecast(
    plan: Plan,
    device: torch.device,
    *,
    committed: int = 0,
    gpu: Gpu | None = None,
    ranks: int = 1,
) -> Forecast:
    """Cost out what is left of a run on so many ranks, and measure the machine for it.

    What layers do on a device takes the rates of `gpu`, if one is named that is not here.
    """
    cache = max(0, plan.budgets.available - plan.memory_bytes)
    costs = cost_of(plan, cache_bytes=cache, committed=committed)
    # a fiftieth of a run at 100 GFLOP/s
    limit = min(0.3, 0.02 + total(costs.values()).flop / 5e12)
    measured = measure(plan, device, limit)
    rates = measured if gpu is None else told(plan, measured, gpu)
    return Forecast(costs=costs, throughput=rates, ranks=ranks)


def told(plan: Plan, measured: Throughput, gpu: Gpu) -> Throughput:
    """Return the rates with those of a GPU's data sheet, times `EFFICIENCY`, for its work.

    An expert takes what is longest: being copied to the GPU, unless it stays there, being
    read from its memory, or its products.
    """
    keys = next(layer.keys for layer in plan.layers if layer.keys.stack)
    stack, schedule = keys.stack, plan.schedule
    assert stack is not None
    numbers = 3 * stack.hidden * stack.inner
    tokens = schedule.batch_sequences * plan.sequence_length
    flop = 2 * numbers * max(1.0, tokens * plan.top_k / stack.count)
    stored = sum(plan.source.entries[name].nbytes for name in stack.slots()) / stack.count
    kept = min(stack.count, schedule.resident_experts * schedule.expert_blocks) / stack.count
    copied = kept / plan.num_batches + 1 - kept
    product = gpu.float32 if plan.dtype == torch.float32 else gpu.bf16
    seconds = max(
        copied * stored / gpu.link,
        numbers * plan.dtype.itemsize / gpu.bandwidth,
        flop / product,
    )
    return replace(
        measured,
        expert=EFFICIENCY * flop / seconds,
        product=EFFICIENCY * product,
        float32=EFFICIENCY * gpu.float32,
        decode=measured.decode and EFFICIENCY * gpu.bandwidth / _DECODED_BYTES,
    )


def measure(plan: Plan, device: torch.device, limit: float) -> Throughput:
    """Measure each rate for `limit` seconds, or once if that takes longer."""
    stack = next(layer.keys.stack for layer in plan.layers if layer.keys.stack)
    expert, product = _products(plan, stack, device, limit)
    wide = torch.ones(512, 512)
    read = _read_rate(plan.source, limit)
    side = min(_MATCHED, stack.inner)
    cost = torch.rand(side, side, generator=generator(0, 0, "rates")).numpy()
    growth = (stack.inner / side) ** _MATCHING_EXPONENT
    matching = _rate(lambda: linear_sum_assignment(cost), 1.0, limit / 2)
    stored = torch.ones(1 << 20).to(torch_dtype(stack.dtype))
    added = torch.zeros(1 << 20)
    data = bytes(1 << 20)
    decode, encode = _coding(plan, device, limit / 2)
    measured = Throughput(
        expert=expert,
        product=product,
        float32=_rate(lambda: functional.linear(wide, wide), 2 * 512**3, limit / 2),
        matching=matching * plan.schedule.threads / growth,
        merge=_rate(lambda: added.add_(stored.float(), alpha=0.5), 1 << 20, limit / 4),
        read=read or ASSUMED_READ,
        read_measured=read is not None,
        digest=_rate(lambda: hashlib.sha256(data), 1 << 20, limit / 4),
        decode=decode,
        encode=encode,
    )
    trim()
    return measured


class _Filled:
    """Stands in for mapped tensors: some experts, all of the same numbers."""

    def __init__(self, stack: ExpertStack, count: int) -> None:
        self._matrices = {
            self._key(
                replace(matrix.stored, prefix=matrix.place(expert)),
                None if matrix.numbered else expert,
            ): self._fill(matrix)
            for matrix in stack.matrices
            for expert in range(count)
        }

    @staticmethod
    def _key(stored: Stored, index: int | None) -> tuple[str, int | None]:
        # a bias has the prefix of its matrix
        return min(stored.names().values()), index

    @staticmethod
    def _fill(matrix: ExpertMatrix) -> Tensor:
        stored = matrix.stored
        plain = isinstance(stored.codec, Plain)
        dtype = torch_dtype(matrix.tensors[0].dtype) if plain else torch.bfloat16
        return torch.full((stored.rows, stored.cols), 0.01, dtype=dtype)

    def ahead(self, stack: ExpertStack, expert: int) -> None:
        """All of them are there."""

    def matrix(
        self, stored: Stored, index: int | None, _dtype: torch.dtype, send: Send = stay
    ) -> Tensor:
        matrix_RC = self._matrices[self._key(stored, index)]
        # what is decoded takes time of its own
        return send(matrix_RC) if isinstance(stored.codec, Plain) else matrix_RC


def _products(
    plan: Plan, stack: ExpertStack, device: torch.device, limit: float
) -> tuple[float, float]:
    """Return the rates of experts as they are run, and of a product with many rows."""
    numbers = 3 * stack.hidden * stack.inner
    held = numbers * ITEM_BYTES[stack.dtype]
    count = min(plan.num_experts, max(_FEWEST_EXPERTS, _SAMPLED_BYTES // held))
    tensors: Any = _Filled(stack, count)
    original: Any = SimpleNamespace(act_fn=functional.silu)
    form = Form(is_gated=stack.is_gated, has_bias=stack.has_bias)
    experts = StreamedExperts(original, ExpertWeights(tensors, stack, plan.dtype, device, form))
    experts.listener = lambda _routed: None
    batch = plan.schedule.batch_sequences * plan.sequence_length
    slots = max(1, batch * plan.top_k * count // plan.num_experts)
    tokens = -(-slots // plan.top_k)
    stream = generator(0, 0, "rates")
    # some experts are sent several times what others are: each number of rows costs anew
    share_E = torch.randn(count, generator=stream).softmax(0)
    drawn = torch.multinomial(share_E, tokens * plan.top_k, replacement=True, generator=stream)
    index_TK = drawn.view(tokens, plan.top_k).to(device)
    hidden_TH = torch.full((tokens, stack.hidden), 0.1, dtype=plan.dtype, device=device)
    weight_TK = torch.ones(tokens, plan.top_k, dtype=plan.dtype, device=device)
    experts.dispatch = lambda index_TK, _num_experts: slots_by_expert(index_TK, count)
    with torch.no_grad():
        run = _rate(
            # one number is asked for, so that a device that works on its own is waited for
            lambda: experts(hidden_TH, index_TK, weight_TK)[0, 0].item(),
            2 * numbers * len(drawn),
            limit,
        )
        many_RH = hidden_TH[:1].expand(min(batch, 1024), -1).contiguous()
        loaded = experts.weights.load(0)
        inner = 4 * stack.hidden * stack.inner * len(many_RH)
        many = _rate(lambda: experts.inner(many_RH, loaded)[0, 0].item(), inner, limit)
    return run, many


def _coding(
    plan: Plan, device: torch.device, limit: float
) -> tuple[float | None, float | None]:
    """Return the rates of decoding on the device and of encoding on the processor."""
    layers = [layer.keys for layer in plan.layers]
    stored = [s for keys in layers for s in keys.quantized.values()]
    stored += [m.stored for keys in layers if keys.stack for m in keys.stack.matrices]
    coded = next((each for each in reversed(stored) if each.codec.scheme != "plain"), None)
    if coded is None:
        return None, None
    rows, cols = min(coded.rows, _CODED_ROWS), coded.cols
    drawn_RC = torch.randn(rows, cols, generator=generator(0, 0, "rates"))
    parts = {suffix: part.to(device) for suffix, part in coded.codec.encode(drawn_RC).items()}
    decode = _rate(
        lambda: coded.codec.decode(parts, rows, cols, plan.dtype)[0, 0].item(),
        rows * cols,
        limit,
    )
    if plan.settings.decodes:
        return decode, None
    return decode, _rate(lambda: coded.codec.encode(drawn_RC), rows * cols, limit)


def _rate(work: Callable[[], object], amount: float, limit: float) -> float:
    """Return the amount done a second in the median of as many calls as `limit` allows."""
    times: list[float] = []
    begin = time.perf_counter()
    while not times or time.perf_counter() - begin < limit:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return amount / max(1e-9, sorted(times)[len(times) // 2])


def _read_rate(source: Checkpoint, limit: float) -> float | None:
    """Return bytes a second of blocks from all over the source; None if there are none."""
    if source.cut_files():
        return None
    blocks: list[tuple[Path, int]] = []
    for path in source.files():
        size = path.stat().st_size
        blocks += [(path, start) for start in range(0, size, _BLOCK)]
    order = torch.randperm(len(blocks), generator=generator(0, 0, "rates")).tolist()
    begin, done = time.perf_counter(), 0
    for number in order:
        path, start = blocks[number]
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            done += len(file.read(_BLOCK))
        if time.perf_counter() - begin > limit:
            break
    return done / max(1e-9, time.perf_counter() - begin)
