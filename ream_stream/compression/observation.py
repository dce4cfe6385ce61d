"""What an observation can be asked for, and the settings it comes to."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ream_stream.settings import Method, Settings, option, options_of

from .config import RunOptions


@dataclass(frozen=True, kw_only=True)
class ObserveOptions(RunOptions):
    """Options of a run that keeps statistics; how many experts stay is asked later."""

    observes: ClassVar[bool] = True
    """Whether statistics are kept in place of a checkpoint."""

    moments: bool = option(
        "Content",
        "Keep the second moments of each expert's activations, which slices need: a square "
        "matrix for each expert and domain, nearly all of the statistics' size.",
        default=True,
    )


def observing_settings(
    options: ObserveOptions, num_experts: int, *, compute_dtype: str, device_kind: str
) -> Settings:
    """Return the settings of an observation.

    Parameters
    ----------
    options
        What was asked for.
    num_experts
        Experts of a source layer: all of them are observed.
    compute_dtype, device_kind
        What ``--compute-dtype`` and ``--device`` mean on this machine.
    """
    names = options_of(Method)
    method: dict[str, Any] = {n: v for n, v in options.changes.items() if n in names}
    rest = {n: v for n, v in options.changes.items() if n not in names}
    return Settings(
        experts=num_experts,
        method=Method(**method),
        observes=True,
        moments=options.moments,
        compute_dtype=compute_dtype,
        seed=options.seed,
        device_kind=device_kind,
        **{**rest, "sequential": False},
    )
