"""All tokens through all layers of a model that stays as it is, and what is done of it.

Order of writing, as in `journal`: the states that leave a layer, then the record that
names the layer, and only then are the states that entered it deleted. A passage that was
cut goes on after the last record.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from ream_stream import __version__
from ream_stream import files as durable
from ream_stream.calibration.tokens import Tokens
from ream_stream.checkpoint.reader import Checkpoint
from ream_stream.errors import DamagedError, UsageError
from ream_stream.events import Evaluating, Report, Step
from ream_stream.file_access import read_own_json, regular_size
from ream_stream.model.batches import Batches, advance
from ream_stream.model.hidden_states import HiddenStates, HiddenWriter
from ream_stream.model.meta_model import get_tensor
from ream_stream.model.ranks.group import ALONE, Ranks
from ream_stream.model.streamed_model import StreamedModel

_JOURNAL = "journal.json"


class States:
    """Hidden states of one or several runs over the same tokens, and a record of each layer.

    Parameters
    ----------
    folder
        Made if it is not there.
    fingerprint
        What must be the same to go on with what the folder holds; else it is discarded.
    shape
        Sequences, tokens, hidden size.
    dtype
        Of the states.
    batch
        Sequences of a batch.
    ranks
        Processes that write the states together; rank 0 keeps the record.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: Mapping[str, Any],
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        batch: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self._folder, self._fingerprint = folder, dict(fingerprint)
        self._store, self._ranks = (shape, dtype, batch), ranks
        self.records: list[Any] = []
        if ranks.is_first:
            self._open(folder / _JOURNAL)
        self.records = list(ranks.broadcast(self.records))

    def _open(self, path: Path) -> None:
        """Read the records that are there, or discard the folder."""
        folder = self._folder
        if regular_size(path) is not None:
            found = read_own_json(path, finite=False)
            if not (isinstance(found, dict) and isinstance(found.get("records"), list)):
                raise DamagedError(f"{path} is damaged: delete {folder} and start over")
            if found.get("fingerprint") == self._fingerprint:
                self.records = found["records"]
        if not self.records:
            durable.remove(folder)
            durable.make_directory(folder)

    def reader(self, run: str, boundary: int) -> HiddenStates | None:
        """Open the states that enter a layer; None for the first, which takes embeddings."""
        return HiddenStates(self._path(run, boundary), *self._store) if boundary else None

    def writer(self, run: str, boundary: int) -> HiddenWriter:
        """Begin the states that enter a layer."""
        return HiddenWriter(self._path(run, boundary), *self._store, ranks=self._ranks)

    def commit(self, record: object, runs: Sequence[str]) -> None:
        """Record that a layer is done, and delete what entered it."""
        self.records.append(record)
        if not self._ranks.is_first:
            return
        value = {"fingerprint": self._fingerprint, "records": self.records}
        durable.write_json(self._folder / _JOURNAL, value)
        for run in runs:
            durable.remove(self._path(run, len(self.records) - 1))

    def _path(self, run: str, boundary: int) -> Path:
        return self._folder / f"{run}-{boundary:05d}"


class ForwardRun:
    """One checkpoint over a token set.

    Parameters
    ----------
    checkpoint
        A source or an output.
    tokens
        What is run.
    work
        Folder in which it has a folder of its own.
    batch
        Sequences of a batch.
    dtype, device
        What the layers are run in, and where.
    ranks
        Processes that divide the batches.

    Raises
    ------
    UnsupportedModelError
        The model cannot be driven layer by layer.
    UsageError
        The tokens are not of this model's vocabulary.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokens: Tokens,
        work: Path,
        *,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        self.name = checkpoint.folder.name
        self.model = StreamedModel(checkpoint, dtype, device)
        self.batches = Batches(tokens, batch, ranks)
        embedding = self.model.model.get_input_embeddings()
        self.vocabulary = len(get_tensor(embedding, "weight"))
        check_vocabulary(tokens, self.vocabulary)
        told = {"checkpoint": identity(checkpoint), **conditions(tokens, dtype, device, batch)}
        key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        self.folder = work / key[:16]
        self._told = told
        self._shape = (tokens.num_sequences, tokens.sequence_length, self.model.hidden_size)

    def run(self, report: Report) -> HiddenStates:
        """Run the layers that are left, and return what leaves the last."""
        model, size, batches = self.model, self.batches.size, len(self.batches)
        ranks = self.batches.ranks
        states = States(self.folder, self._told, self._shape, model.dtype, size, ranks)
        done = len(states.records)
        report(Evaluating(name=self.name, layers=model.num_layers, skipped=done))
        for index in range(done, model.num_layers):
            entering, leaving = (
                states.reader("states", index),
                states.writer("states", index + 1),
            )

            def batch_done(done: int, layer: int = index) -> None:
                report(Step(layer=layer, phase="propagate", done=done, total=batches))

            with model.open_layer(index):
                advance(model, index, self.batches, entering, leaving, batch_done)
            states.commit(None, ["states"])
        last = states.reader("states", model.num_layers)
        assert last is not None
        return last


def identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the identity of a checkpoint without reading its data."""
    files = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.files()
    ]
    return {
        "folder": str(checkpoint.folder.resolve()),
        "headers": checkpoint.digest(),
        "files": [list(file) for file in files],
    }


def conditions(
    tokens: Tokens, dtype: torch.dtype, device: torch.device, batch: int
) -> dict[str, Any]:
    """Return all else that the states of a passage depend on."""
    return {
        "tokens": tokens.digest,
        "dtype": str(dtype),
        "device": device.type,
        "batch": batch,
        "versions": [__version__, torch.__version__, transformers.__version__],
    }


def check_vocabulary(tokens: Tokens, vocabulary: int) -> None:
    """Refuse tokens that a model has no embedding for."""
    largest = int(tokens.input_ids_SL.max())
    if largest >= vocabulary:
        raise UsageError(
            f"{tokens.description}: it holds token {largest}, the "
            f"checkpoint knows 0 to {vocabulary - 1}; it is from another tokenizer"
        )
