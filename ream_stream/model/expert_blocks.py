"""The experts of a layer in blocks: blocks outside, batches inside.

A layer that the page cache cannot hold would be read from disk again for each batch.
So its experts are cut into blocks that it can hold, and all batches are run through one
block before the next is read. What a batch takes from one pass to the next is the norms
of its experts' outputs, while statistics are taken, and the sum of these outputs, where
they are needed. With one block there is one pass, and nothing is taken along.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from .attention_cache import AttentionCache
from .batch_store import BatchStore
from .batches import Batches, with_states
from .experts import BlockState, Routed, StreamedExperts
from .hidden_states import HiddenStates
from .streamed_model import Batch, StreamedModel


def cut_experts(count: int, blocks: int) -> list[range]:
    """Cut experts into at most so many blocks of nearly equal size, none of them empty."""
    blocks = min(count, blocks)
    return [range(count * i // blocks, count * (i + 1) // blocks) for i in range(blocks)]


Listeners = Callable[[int, Batch], Callable[[Routed], None]]
"""Returns the listener of the layer's experts for a batch, given its number and the batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertBlockPasses:
    """Passes of all batches through one open layer."""

    model: StreamedModel
    """Model in which the layer is open."""

    index: int
    """Position of the layer in the model."""

    experts: StreamedExperts | None
    """Experts of the layer; None for a dense layer."""

    blocks: int
    """Most blocks that the experts are cut into; each block is one pass."""

    playback: AttentionCache | None
    """Cache of attention outputs; None if attention runs in every pass."""

    sums: BatchStore | None = None
    """Store of partial sums of expert outputs between blocks; None if not needed."""

    captures_sums: bool = False
    """Whether forward hooks of the experts need their summed outputs even in observation; in
    blocks they get what is summed so far, and after the last block all."""

    def __len__(self) -> int:
        return 1 if self.experts is None else len(self._parts(self.experts))

    def run(
        self,
        batches: Batches,
        entering: HiddenStates | None,
        *,
        listeners: Listeners | None = None,
        captures_only: bool = False,
    ) -> Generator[tuple[int, Tensor | None], None, None]:
        """Run all batches of this process through all blocks.

        Parameters
        ----------
        batches
            What is run.
        entering
            The states that enter the layer; None for layer 0.
        listeners
            Give the experts' listener for each batch; None for no listener.
        captures_only
            Run the layer as far as its experts, for their listener.

        Yields
        ------
        tuple
            A batch's number, and what leaves the layer: None if only capturing, and in
            all passes but the last.
        """
        parts = [None] if len(self) == 1 else self._parts(self.experts)  # type: ignore[arg-type]
        norms: dict[int, Tensor] = {}
        for experts in parts:
            mixers = self.model.mixers(self.index) if self.playback else []
            with (
                self.playback.through(mixers) if self.playback else nullcontext(),
                with_states(batches, entering) as states,
            ):
                for place, (number, batch, hidden_BLH) in enumerate(states):
                    with self._capturing(number, batch, listeners):
                        leaving_BLH = (
                            self._whole(batch, hidden_BLH, captures_only=captures_only)
                            if experts is None
                            else self._part(
                                experts,
                                place,
                                batch,
                                hidden_BLH,
                                norms,
                                captures_only=captures_only,
                            )
                        )
                    yield number, leaving_BLH

    @contextmanager
    def _capturing(
        self, number: int, batch: Batch, listeners: Listeners | None
    ) -> Iterator[None]:
        if self.experts is None or listeners is None:
            yield
            return
        self.experts.listener = listeners(number, batch)
        try:
            yield
        finally:
            self.experts.listener = None

    def _parts(self, experts: StreamedExperts) -> list[range]:
        return cut_experts(experts.count, self.blocks)

    def _whole(
        self, batch: Batch, hidden_BLH: Tensor | None, *, captures_only: bool
    ) -> Tensor | None:
        if not captures_only:
            return self.model.run_layer(self.index, batch, hidden_BLH)
        self.model.observe_layer(self.index, batch, hidden_BLH, sums=self.captures_sums)
        return None

    def _part(
        self,
        experts: range,
        place: int,
        batch: Batch,
        hidden_BLH: Tensor | None,
        norms: dict[int, Tensor],
        *,
        captures_only: bool,
    ) -> Tensor | None:
        """Run one batch through one block; return what leaves the layer after the last.

        What is kept of it has its place among the batches of this process.
        """
        streamed, sums, device = self.experts, self.sums, self.model.device
        assert streamed is not None
        is_last = experts.stop == streamed.count
        part = BlockState(experts=experts, is_last=is_last)
        if place in norms:
            part.norm_S = norms[place].to(device)
        if sums is not None and experts.start:
            part.sum_TH = sums.get(place).to(device, non_blocking=True)
        streamed.part = part
        try:
            if sums is None:
                self.model.observe_layer(self.index, batch, hidden_BLH)
            elif is_last and not captures_only:
                return self.model.run_layer(self.index, batch, hidden_BLH)
            else:
                self.model.observe_layer(self.index, batch, hidden_BLH, sums=True)
        finally:
            streamed.part = None
        if part.norm_S is not None and streamed.listener is not None:
            norms[place] = part.norm_S.cpu()
        if sums is not None and part.sum_TH is not None and not is_last:
            sums.put(place, part.sum_TH)
        return None
