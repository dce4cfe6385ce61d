"""Batches of tokens and their hidden states, through one layer after the other."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager

from torch import Tensor

from ream_stream.calibration.tokens import Tokens

from .finite import CheckedWriter
from .hidden_states import HiddenStates, HiddenWriter
from .ranks.group import ALONE, Ranks
from .streamed_model import Batch, StreamedModel


class Batches:
    """A token set cut into batches of `size` sequences; the last may be smaller.

    With several ranks this one iterates over its own.
    """

    def __init__(self, tokens: Tokens, size: int, ranks: Ranks = ALONE) -> None:
        self._tokens, self.size, self.ranks = tokens, size, ranks

    def __len__(self) -> int:
        return -(-self._tokens.num_sequences // self.size)

    @property
    def own(self) -> range:
        """Numbers of the batches that this rank runs."""
        return self.ranks.own(len(self))

    def __iter__(self) -> Iterator[Batch]:
        mask_SL = self._tokens.attention_mask_SL
        for number in self.own:
            rows = slice(number * self.size, (number + 1) * self.size)
            yield Batch(
                input_ids_BL=self._tokens.input_ids_SL[rows],
                attention_mask_BL=None if mask_SL is None else mask_SL[rows],
            )


def advance(
    model: StreamedModel,
    index: int,
    batches: Batches,
    entering: HiddenStates | None,
    leaving: HiddenWriter | CheckedWriter,
    batch_done: Callable[[int], None] = lambda _done: None,
) -> None:
    """Run an open layer on all batches and publish what leaves it.

    Parameters
    ----------
    model
        Its layer `index` is open.
    index
        The layer.
    batches
        What is run.
    entering
        The states that enter the layer; None for layer 0, which takes the embeddings.
    leaving
        Where the states that leave it go.
    batch_done
        Told how many batches are done.
    """
    with leaving, with_states(batches, entering) as states:
        for number, batch, hidden_BLH in states:
            leaving.write(number, model.run_layer(index, batch, hidden_BLH))
            batch_done(number + 1)
    leaving.publish()


@contextmanager
def with_states(
    batches: Batches, entering: HiddenStates | None
) -> Iterator[Iterator[tuple[int, Batch, Tensor | None]]]:
    """Iterate over own batches, each with its number and the states (B, L, H) that enter.

    States are read ahead of their use, on a thread that ends with the block.
    """
    # closed here: an error in the block may be kept, and would keep the thread
    with closing(_with_states(batches, entering)) as found:
        yield found


def _with_states(
    batches: Batches, entering: HiddenStates | None
) -> Generator[tuple[int, Batch, Tensor | None], None, None]:
    if not batches.own:  # there may be fewer batches than ranks
        return
    if entering is None:
        for number, batch in zip(batches.own, batches, strict=True):
            yield number, batch, None
        return
    with closing(entering.ahead(batches.own)) as states:
        yield from zip(batches.own, batches, states, strict=True)
