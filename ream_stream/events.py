"""What happens in a run, as plain data: the pipeline yields it, the command line shows it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Phase = Literal[
    "check", "observe", "compare", "align", "follow", "refit", "write", "propagate", "score"
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetching:
    """A checkpoint is fetched from the hub, as far as it is not here."""

    repo: str
    """Its repository, ``ORG/NAME``."""

    commit: str
    """Its commit."""

    num_bytes: int
    """Bytes of all its files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A run may begin; nothing is written yet."""

    facts: Mapping[str, Any]
    """What is known of it, as ``plan --json`` prints it."""

    layer_bytes: tuple[int, ...]
    """Bytes of each layer in the source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """The run begins, or goes on after a stop."""

    layers: int
    """Decoder layers in all."""

    committed: int
    """Layers that earlier runs have finished."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TakenOver:
    """The run goes on with one that ended without a word."""

    previous: str
    """The process that left it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluating:
    """A pass over a checkpoint begins."""

    name: str
    """Of the checkpoint, and of what it is asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The result of one check of an output, or one of the things that it found wrong."""

    check: str
    """Name of the check."""

    ok: bool
    """Whether all is well."""

    message: str
    """One sentence: what, and where."""

    is_note: bool = False
    """Whether it is no result, but something that the user may want to know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Some work of a layer is done."""

    layer: int
    """Position of the layer."""

    phase: Phase
    """What is being done."""

    done: int
    """Units finished: batches, experts, files or sequences."""

    total: int
    """Units of this phase."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RefitResult:
    """Error of one layer before and after its refit, on sequences that were held back."""

    penalty: float | None
    """Ridge penalty that was chosen; None if none helped: the layer stays as it was."""

    error_before: float
    """Squared error of routed outputs before the refit, relative to their squares."""

    remaining_error: float
    """Share of `error_before` after the refit: 1 for a layer that was left as it was."""

    tried: tuple[tuple[float, float], ...]
    """Each penalty with the share of the error that its first direction leaves."""

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
    """Routed experts now."""

    changed: int
    """New experts that were merged from several; of the others gate and up are byte copies."""

    read_bytes: int
    """Bytes of the source layer."""

    written_bytes: int
    """Bytes of its shards."""

    seconds: Mapping[str, float]
    """Time by phase."""

    peak_anonymous_bytes: int
    """Highest anonymous memory while it was worked on."""

    peak_device_bytes: int = 0
    """Highest memory of the GPU while it was worked on; 0 if it was the processor's work."""

    refitted: RefitResult | None = None
    """What refitting came to; None if it was not asked for, or the layer is dense."""

    excluded: int = 0
    """Calibration sequences that are left out from here on, as their states are not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchHalved:
    """A layer ran out of device memory and begins again with less at once."""

    layer: int
    """Position of the layer."""

    batch_sequences: int
    """Sequences of a batch from here on."""

    resident_experts: int
    """Experts that stay on the device between batches from here on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The output is complete."""

    output_bytes: int
    """Bytes of all shards."""

    source_bytes: int
    """Bytes of the source's tensors."""

    seconds: Mapping[str, float]
    """Time of this run by phase."""

    peak_anonymous_bytes: int
    """Highest anonymous memory of this run."""

    peak_device_bytes: int
    """Highest memory of the GPU in this run; 0 if layers ran on the processor."""

    already_complete: bool
    """Nothing was left to do."""


Event = (
    Fetching
    | Planned
    | Started
    | TakenOver
    | Step
    | LayerDone
    | BatchHalved
    | Finished
    | Evaluating
    | Finding
)

Report = Callable[[Event], None]
"""Is told what happens as it happens; it may raise `InterruptedRunError` to end the work."""


def no_report(_event: Event) -> None:
    """Let events pass."""
