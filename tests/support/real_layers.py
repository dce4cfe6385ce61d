"""Layers that really run, and the most bytes that are alive in them at once."""

import torch
from tiny_runs import CPU, some_tokens

from ream_stream.compression.observer import Observer
from ream_stream.model.families import family_of
from ream_stream.model.finite import ExcludedSequences
from ream_stream.model.streamed_model import Batch, StreamedModel
from ream_stream.planning.activation_memory import LiveBytes

SEQUENCES, LENGTH = 6, 48


def peak_of(work):
    with LiveBytes() as counter:
        work()
    return counter.peak


def all_to_one(index_TK, _num_experts):
    """Send every token to the first expert."""
    return [(0, torch.arange(len(index_TK)) * index_TK.shape[1])]


class Really:
    """Runs layers of a checkpoint on tokens, all of them sent to one expert."""

    def __init__(self, checkpoint, dtype, *, padded):
        self.model = StreamedModel(checkpoint, dtype, CPU)
        self.family = family_of(checkpoint.config)
        self.tokens = tokens = some_tokens(SEQUENCES, LENGTH, padded=padded)
        self.batch = Batch(
            input_ids_BL=tokens.input_ids_SL, attention_mask_BL=tokens.attention_mask_SL
        )
        self.hidden_BLH = torch.ones(SEQUENCES, LENGTH, self.model.hidden_size, dtype=dtype)

    def run(self, index):
        """Return the most bytes alive at once, to the layer's end."""
        with self.model.open_outside(), self.model.open_layer(index) as experts:
            if experts is not None:
                experts.dispatch = all_to_one
            return peak_of(lambda: self.model.run_layer(index, self.batch, self.hidden_BLH))

    def observe(self, index):
        """Return the same as far as the experts, with the statistics of a real run."""
        with self.model.open_outside(), self.model.open_layer(index) as experts:
            experts.dispatch = all_to_one
            count = experts.weights.stack.count
            observer = Observer(
                self.family,
                count,
                None,
                self.tokens,
                ExcludedSequences(self.tokens),
                gate_term=True,
                batch_sequences=len(self.batch.input_ids_BL),
                device=CPU,
            )
            experts.listener = observer.listener(0, self.batch)
            with observer.attached(self.model.router(index)):
                return peak_of(
                    lambda: self.model.observe_layer(index, self.batch, self.hidden_BLH)
                )
