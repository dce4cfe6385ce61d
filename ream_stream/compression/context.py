"""What all layers of a run share: models, calibration set, folders, and the time spent."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ream_stream.calibration.tokens import Tokens
from ream_stream.model.batch_store import BatchStore, open_batch_store
from ream_stream.model.batches import Batches
from ream_stream.model.finite import CheckedWriter, ExcludedSequences
from ream_stream.model.hidden_states import HiddenStates, HiddenWriter
from ream_stream.model.ranks.group import ALONE, Ranks
from ream_stream.model.streamed_model import StreamedModel
from ream_stream.planning.plan import Plan

from .statistics import Statistics
from .workspace import Workspace


@dataclass(kw_only=True, slots=True)
class Context:
    """Shared state of all layers of a run."""

    plan: Plan
    """Plan of the run."""

    tokens: Tokens
    """Calibration set."""

    workspace: Workspace
    """Folders of the run."""

    source: StreamedModel
    """Source model, without changes."""

    output: StreamedModel
    """Compressed model; it can load a layer once the run has written the layer."""

    excluded: ExcludedSequences
    """Excluded calibration sequences."""

    statistics: Statistics | None = None
    """Statistics that experts are chosen by; None if the run takes its own."""

    ranks: Ranks = ALONE
    """Processes of the run."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds spent in each phase."""

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Book the time of the block on a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    @property
    def batches(self) -> Batches:
        """The calibration set in batches, of which this process runs its own."""
        return Batches(self.tokens, self.plan.schedule.batch_sequences, self.ranks)

    def hidden_reader(self, boundary: int) -> HiddenStates | None:
        """Open the states that enter a layer.

        None for the first, which takes embeddings, and where layers are not run.
        """
        if not boundary or not self.plan.settings.runs_layers:
            return None
        return self._reader(self.workspace.hidden(boundary), boundary)

    def original_reader(self, boundary: int) -> HiddenStates | None:
        """Open the same of the original model."""
        return self._reader(self.workspace.original(boundary), boundary) if boundary else None

    def hidden_writer(self, boundary: int) -> CheckedWriter:
        """Begin the states that enter a layer."""
        return self._writer(self.workspace.hidden(boundary), boundary)

    def original_writer(self, boundary: int) -> CheckedWriter:
        """Begin the same of the original model."""
        return self._writer(self.workspace.original(boundary), boundary)

    def _reader(self, path: Path, boundary: int) -> HiddenStates:
        plan, batch = self.plan, self.plan.schedule.batch_sequences
        return HiddenStates(
            path,
            plan.hidden_shape,
            plan.dtype,
            batch,
            device=self.source.device,
            drop=plan.drops_states(plan.layers[boundary]),
        )

    def _writer(self, path: Path, boundary: int) -> CheckedWriter:
        plan, batch = self.plan, self.plan.schedule.batch_sequences
        drop = plan.drops_states(plan.layers[boundary])
        writer = HiddenWriter(
            path, plan.hidden_shape, plan.dtype, batch, drop=drop, ranks=self.ranks
        )
        return CheckedWriter(writer, self.excluded, boundary - 1, batch)

    def open_batch_store(
        self, part: str, name: str, count: int | None = None
    ) -> AbstractContextManager[BatchStore]:
        """Keep tensors for the length of a block, where the plan has the part.

        They are one a batch, or `count`.
        """
        path = self.workspace.scratch(name) if self.plan.scratch.get(part) else None
        device, count = self.source.device, len(self.batches) if count is None else count
        return open_batch_store(path, count, device=device, beside=True)
