"""What the tensors of the output are made of, by name: source bytes, or values that are made.

Letters in shapes: I inner.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ream_stream.checkpoint.expert_stack import ExpertStack, Slot, Tensors, one_of
from ream_stream.checkpoint.formats import Nvfp4, Stored
from ream_stream.checkpoint.header import TensorEntry
from ream_stream.checkpoint.quantized import tensors_of
from ream_stream.checkpoint.shards import Content
from ream_stream.errors import NumbersError
from ream_stream.file_access import FileRange
from ream_stream.method.expert import reorder_part
from ream_stream.method.hash_routing import renumbered
from ream_stream.method.merging import weighted_sum
from ream_stream.method.slices import distinct_rows, narrowed_down
from ream_stream.model.batch_store import BatchStore
from ream_stream.model.finite import is_finite

from .decision import Decision, slice_numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class Unchanged:
    """Tensors of neither experts nor router: bytes of the source, or decoded floats."""

    entries: Mapping[str, TensorEntry]
    """Header entries of the source's tensors."""

    tensors: Tensors
    """Values of the source's tensors."""

    decoded: Mapping[str, Stored] = field(default_factory=dict)
    """Quantized matrices that are written as floats, by name of the output tensor."""

    def content(self, name: str) -> Content:
        """Return the content of a tensor by its name."""
        if name in self.decoded:
            return _decode(self.tensors, self.decoded[name])
        return self.entries[name]

    def origins(self, name: str) -> list[str]:
        """Return the source's tensors that are written under a name."""
        return tensors_of(self.decoded[name]) if name in self.decoded else [name]


def _decode(tensors: Tensors, stored: Stored) -> Content:
    if stored.count is None:
        return tensors.matrix(stored, None, torch.bfloat16)
    indices = range(stored.count)
    return (tensors.matrix(stored, index, torch.bfloat16) for index in indices)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """Numbers from which slices of experts are made."""

    factor: int
    """Factor of the down projections: 1 if each slice gets all of a router coefficient, else
    the number of slices."""

    shares: int
    """What the router's biases are divided by; see `Family.bias_shares`."""

    grams: BatchStore
    """Sums of activations A_e by expert."""


def layer_content(
    decision: Decision,
    orders: Mapping[int, Tensor],
    source: ExpertStack,
    output: ExpertStack,
    routers: Mapping[str, int],
    table: str | None,
    unchanged: Unchanged,
    cut: Cut | None = None,
) -> Callable[[str], Content]:
    """Return a function that gives each tensor of a compressed layer, by output name.

    Experts of groups of one are source bytes, with their scales, unless the output has
    another format. A matrix of a merged expert is made when the first of its tensors is
    asked for and held until another is; a tensor that holds all experts is given one
    expert after another.
    """
    tensors = unchanged.tensors
    merged = (
        _Merged(decision, orders, source, output, tensors)
        if cut is None
        else _Sliced(decision, cut, source, output, tensors)
    )
    slots, entries, count = output.slots(), unchanged.entries, source.count
    same = [old.stored.codec == new.stored.codec for old, new in merged.pairs]

    def one(slot: Slot, number: int) -> Tensor | FileRange:
        group = decision.groups[number]
        if cut is not None or len(group) > 1 or not same[slot.matrix]:
            return merged.tensors(slot.matrix, number)[slot.part.suffix]
        matrix = source.matrices[slot.matrix]
        entry = entries[matrix.place(group[0]) + slot.part.suffix]
        start, stop = entry.start, entry.stop
        if not matrix.numbered:
            start, stop = one_of(entry, group[0], count)
        return FileRange(path=entry.path, start=start, stop=stop)

    def every(slot: Slot) -> Iterator[Tensor | FileRange]:
        return (one(slot, number) for number in range(slot.count))

    def content(name: str) -> Content:
        if name in routers:
            groups, tensor = decision.groups, tensors[name]
            if cut is None:
                return routed_rows(tensor, routers[name], groups, count)
            return slice_rows(name, tensor, routers, groups, (source, output), cut.shares)
        if name == table:
            row_EH = tensors[next(iter(routers))]
            return renumbered(tensors[name], row_EH, decision.groups)
        if name not in slots:
            return unchanged.content(name)
        slot = slots[name]
        return every(slot) if slot.expert is None else iter([one(slot, slot.expert)])

    return content


def routed_rows(
    tensor: Tensor, axis: int, groups: Sequence[Sequence[int]], count: int
) -> Tensor:
    """Return the rows of the centroids; those after the experts', of none, stay last."""
    kept = torch.tensor([group[0] for group in groups])
    rest = torch.arange(count, tensor.shape[axis])
    return tensor.index_select(axis, torch.cat([kept, rest]))


def slice_rows(
    name: str,
    tensor: Tensor,
    routers: Mapping[str, int],
    groups: Sequence[Sequence[int]],
    stacks: tuple[ExpertStack, ExpertStack],
    shares: int,
) -> Tensor:
    """Return a router-side tensor of slices.

    Unless all neurons stay, slices of an expert are not equally likely.

    Parameters
    ----------
    name, tensor
        The source's tensor.
    routers
        Axis of experts of each router-side tensor.
    groups
        Source expert of each slice.
    stacks
        Experts of the source and of the output.
    shares
        What biases are divided by.
    """
    source, output = stacks
    tensor = routed_rows(tensor, routers[name], groups, source.count)
    biases = [each for each in routers if each.endswith("bias")]
    if name in biases and shares > 1:
        tensor = (tensor.double() / shares).to(tensor.dtype)
    all_stay = output.count * output.inner == source.count * source.inner
    if all_stay or ((name not in biases) if biases else tensor.dim() < 2):
        return tensor
    row_EX, rank_S = tensor.movedim(routers[name], 0), slice_numbers(groups)
    rank_E = [*rank_S, *[0] * (len(row_EX) - len(rank_S))]
    changed_EX = distinct_rows(row_EX, rank_E, additive=bool(biases))
    return changed_EX.movedim(0, routers[name]).contiguous()


class _Merged:
    """Makes the stored tensors of merged experts, a matrix at a time."""

    def __init__(
        self,
        decision: Decision,
        orders: Mapping[int, Tensor],
        source: ExpertStack,
        output: ExpertStack,
        tensors: Tensors,
    ) -> None:
        self._decision, self._orders = decision, orders
        self._output, self._tensors = output, tensors
        self.pairs = list(zip(source.matrices, output.matrices, strict=True))
        self._last: tuple[tuple[int, int], dict[str, Tensor]] | None = None

    def tensors(self, matrix: int, number: int) -> dict[str, Tensor]:
        """Return all tensors of a matrix of a new expert, by suffix."""
        if self._last is None or self._last[0] != (matrix, number):
            self._last = None  # lets go of the last one first
            self._last = (matrix, number), self._make(matrix, number)
        return self._last[1]

    def _make(self, matrix: int, number: int) -> dict[str, Tensor]:
        output, kept = self._output.matrices[matrix], None
        value_RC = self._matrix(matrix, number)
        codec = output.stored.codec
        if codec.scheme != "plain" and not is_finite(value_RC):
            raise NumbersError(f"merging makes numbers of {output.place(number)} not finite")
        if isinstance(codec, Nvfp4):
            # engines run gate and up as one matrix, with one outer scale
            coupled = [
                value_RC if other is output else self._matrix(index, number)
                for index, other in enumerate(self._output.matrices)
                if other in self._output.coupled(matrix)
            ]
            kept = {codec.outer_suffix: codec.outer_scale(coupled)} if coupled else None
        made = output.encode(value_RC, kept)
        for part in output.activation:
            made[part.suffix] = self._activation(matrix, number, part.suffix)
        return made

    def _matrix(self, matrix: int, number: int) -> Tensor:
        """Return the weighted sum of the members of a group, in float32, as it lies."""
        source, output = self.pairs[matrix]

        def members() -> Iterator[list[Tensor]]:
            for expert in self._decision.groups[number]:
                parts = source.read(self._tensors, expert, torch.float32)
                order_I = self._orders.get(expert)
                yield [
                    part if order_I is None else reorder_part(name, part, order_I)
                    for name, part in parts.items()
                ]

        summed = weighted_sum(self._decision.shares[number], members())
        return output.join(dict(zip(source.parts, summed, strict=True)))

    def _activation(self, matrix: int, number: int, suffix: str) -> Tensor:
        """Return the scale of activations that serves all members of a group."""
        source = self.pairs[matrix][0]
        values = []
        for expert in self._decision.groups[number]:
            value = self._tensors[source.place(expert) + suffix]
            values.append(value if source.numbered else value[expert])
        stacked = torch.stack(values)
        # input_global_scale divides, so that the smallest has the widest range
        return stacked.amin(0) if suffix == ".input_global_scale" else stacked.amax(0)


class _Sliced(_Merged):
    """Makes the stored tensors of slices of experts, a matrix at a time."""

    def __init__(
        self,
        decision: Decision,
        cut: Cut,
        source: ExpertStack,
        output: ExpertStack,
        tensors: Tensors,
    ) -> None:
        super().__init__(decision, {}, source, output, tensors)
        self._source, self._cut, self._ranks = source, cut, slice_numbers(decision.groups)
        self._down: tuple[int, Tensor] = (-1, torch.empty(0))

    def _matrix(self, matrix: int, number: int) -> Tensor:
        """Return a matrix of a slice, as it lies."""
        source, output = self.pairs[matrix]
        (expert,) = self._decision.groups[number]
        neuron_CW, rank = self._decision.neurons[expert], self._ranks[number]
        parts = source.read(self._tensors, expert, torch.float32)
        made = {}
        for name, part in parts.items():
            if name == "down":
                width = neuron_CW.shape[1]
                made[name] = self._narrowed(expert)[:, rank * width : (rank + 1) * width]
            elif name == "down_bias":
                made[name] = part.float() * (self._cut.factor / len(neuron_CW))
            else:
                made[name] = part[neuron_CW[rank]]
        return output.join(made)

    def _narrowed(self, expert: int) -> Tensor:
        """Return the down projection of all slices that an expert keeps."""
        if self._down[0] != expert:
            self._down = -1, torch.empty(0)  # lets go of the last one first
            down_HN = narrowed_down(
                self._cut.grams.get(expert),
                self._source.read(self._tensors, expert).down_HI,
                self._decision.neurons[expert].flatten(),
            )
            self._down = expert, down_HN * self._cut.factor
        return self._down[1]


def finite_content(content: Callable[[str], Content], index: int) -> Callable[[str], Content]:
    """Return the same content with a check that refuses numbers that are not finite."""

    def checked(name: str) -> Content:
        value = content(name)
        if isinstance(value, TensorEntry):
            return value
        return piece(name, value) if isinstance(value, Tensor) else pieces(name, value)

    def pieces(name: str, values: Iterable[Tensor | FileRange]) -> Iterator[Tensor | FileRange]:
        for value in values:
            yield value if isinstance(value, FileRange) else piece(name, value)

    def piece(name: str, value: Tensor) -> Tensor:
        if not is_finite(value):
            raise NumbersError(
                f"layer {index}: merging makes numbers of {name} that are not finite"
            )
        return value

    return checked
