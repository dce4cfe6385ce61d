"""What happens in a run, as plain data: the pipeline yields it, the command line shows it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Phase = Literal[
    "check",
    "observe",
    "compare",
    "align",
    "cut",
    "follow",
    "refit",
    "write",
    "propagate",
    "score",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetching:
    """A checkpoint is fetched from the hub, as far as it is not here."""

    repo: str
    """Repository on the hub, ``ORG/NAME``."""

    commit: str
    """Commit of the repository."""

    num_bytes: int
    """Bytes of all files of the repository."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparing:
    """A part of what comes before a run begins."""

    part: str
    """Description of the part, such as ``reading headers``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A run may begin; nothing is written yet."""

    facts: Mapping[str, Any]
    """Facts of the plan, as ``plan --json`` prints them."""

    layer_bytes: tuple[int, ...]
    """Bytes of each layer in the source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """The run begins, or goes on after a stop."""

    layers: int
    """Number of all decoder layers."""

    committed: int
    """Number of layers that earlier runs committed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TakenOver:
    """The run resumes one that ended without a message."""

    previous: str
    """Description of the process that left the run unfinished."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluating:
    """A pass over a checkpoint begins."""

    name: str
    """Name of the checkpoint, and of what it is run on if that is not the text."""

    layers: int
    """Number of decoder layers that the pass runs."""

    skipped: int = 0
    """Number of layers that an interrupted evaluation has run already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparing:
    """A trial of a comparison begins."""

    number: int
    """Number of the trial in the comparison, from 1 on; the original is the first."""

    trials: int
    """Number of all trials."""

    to_do: int
    """Number of trials that are not done yet, this one included."""

    name: str
    """Name of the compared variant."""

    mix: str
    """Name of the calibration mix; empty for a single mix."""

    seed: int | None
    """Seed of the trial; None for the original."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The result of one check of an output, or one of the things that it found wrong."""

    check: str
    """Name of the check."""

    ok: bool
    """Whether the check found no problem."""

    message: str
    """Sentence that states the finding and its place."""

    is_note: bool = False
    """Whether the finding is only a note for the user, not a result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Some work of a layer is done."""

    layer: int
    """Position of the layer."""

    phase: Phase
    """Current phase of the layer."""

    done: int
    """Finished units: batches, experts, files or sequences."""

    total: int
    """Units of this phase."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RefitResult:
    """Error of one layer before and after its refit, on sequences that were held back."""

    penalty: float | None
    """Ridge penalty of the refit; None if none lowered the error: the layer is unchanged."""

    error_before: float
    """Relative squared error of routed outputs before the refit, on held-back tokens."""

    remaining_error: float
    """Share of `error_before` that remains after the refit: 1 for an unchanged layer."""

    tried: tuple[tuple[float, float], ...]
    """Each penalty with the share of the error that remains after its first direction."""

    residuals: tuple[float, ...]
    """Objective before the first iteration and after each, as a share of the first value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerDone:
    """One layer is committed."""

    layer: int
    """Position of the layer."""

    experts_before: int
    """Routed experts of the source layer; 0 for a dense layer."""

    experts_after: int
    """Routed experts of the output layer; 0 if there is none, as they were observed."""

    changed: int
    """New experts merged from several; gate and up of the others are byte copies."""

    read_bytes: int
    """Bytes of the source layer."""

    written_bytes: int
    """Bytes of the layer's shards in the output."""

    seconds: Mapping[str, float]
    """Seconds spent in each phase."""

    peak_anonymous_bytes: int
    """Peak of anonymous memory during the work on the layer."""

    peak_device_bytes: int = 0
    """Peak of GPU memory during the work on the layer; 0 if it ran on the processor."""

    refitted: RefitResult | None = None
    """Result of the refit; None without a refit or for a dense layer."""

    excluded: int = 0
    """Calibration sequences excluded from this layer on: their states are not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchHalved:
    """A layer ran out of device memory and begins again with less at once."""

    layer: int
    """Position of the layer."""

    batch_sequences: int
    """Sequences of a batch from now on."""

    resident_experts: int
    """Experts that stay on the device between batches from now on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The output is complete."""

    output_bytes: int
    """Bytes of all shards."""

    source_bytes: int
    """Bytes of the source's tensors."""

    seconds: Mapping[str, float]
    """Seconds of this run in each phase."""

    peak_anonymous_bytes: int
    """Highest anonymous memory of this run."""

    peak_device_bytes: int
    """Highest memory of the GPU in this run; 0 if layers ran on the processor."""

    already_complete: bool
    """Whether the output was complete before this run."""


Event = (
    Fetching
    | Preparing
    | Planned
    | Started
    | TakenOver
    | Step
    | LayerDone
    | BatchHalved
    | Finished
    | Evaluating
    | Comparing
    | Finding
)

Report = Callable[[Event], None]
"""Receives each event when it happens; may raise `InterruptedRunError` to end the work."""


def no_report(_event: Event) -> None:
    """Let events pass."""
