"""What the user asked for: the choices that decide the bytes of the output."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from .errors import UsageError

REFITS = ("none", "down")
REFIT_EXPERTS = ("all", "changed")
REFIT_TARGETS = ("layer", "trajectory")


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """How experts are ranked, compared, grouped, aligned and merged."""

    saliency: str = "reap"
    """Key of `method.saliency.SALIENCIES`."""

    similarity: str = "gated"
    """Key of `method.similarity.SIMILARITIES`: how mean expert outputs are weighted."""

    gate_term: bool = True
    """Whether router columns count as half of the similarity."""

    grouping: str = "ream"
    """Key of `method.grouping.GROUPINGS`; ``none`` prunes."""

    group_size: int = 16
    """REAM's C: members of a group at most, the centroid included."""

    alignment: str = "both"
    """Key of `method.alignment.ALIGNMENTS`."""

    merge: str = "saliency"
    """Key of `method.merging.MERGES`."""

    similarity_tokens: int = 4096
    """Tokens, sampled once, on which every expert is run; 0 is all of them."""

    alignment_tokens: int = 2048
    """Tokens, sampled once, on which neurons are compared."""

    refit: str = "none"
    """One of `REFITS`: ``down`` refits the down projections of the experts that stay."""

    refit_experts: str = "all"
    """One of `REFIT_EXPERTS`: ``changed`` leaves experts that were not merged as they are."""

    refit_target: str = "layer"
    """One of `REFIT_TARGETS`: ``layer`` is what the original layer gives on the same inputs,
    ``trajectory`` what leaves it in the original model."""

    refit_iterations: int = 2
    """Iterations of conjugate gradients at most."""

    refit_lambda: tuple[float, ...] = (0.3, 1.0, 3.0)
    """Penalties that are tried; those below 0.3 harm text unlike the calibration set's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Everything but the input files that decides what is written."""

    experts: int
    """Experts to keep in each MoE layer."""

    method: Method
    """How they are chosen and merged."""

    sequential: bool = True
    """Calibrate each layer on the outputs of the layers already compressed."""

    compute_dtype: str = "float32"
    """``bfloat16``, ``float16`` or ``float32``: what the layers are run in."""

    dtype: str = "source"
    """``source`` keeps every format; ``bfloat16`` writes quantized tensors decoded."""

    mtp: str = "keep"
    """``keep`` or ``drop``: what becomes of multi-token-prediction layers."""

    seed: int = 0
    """Start of every random choice."""

    device_kind: str = "cpu"
    """``cpu`` or ``cuda``: results are equal only within one kind."""

    max_shard_bytes: int = 5_000_000_000
    """Size of a shard, unless one tensor alone is larger."""

    def merges(self, num_experts: int) -> bool:
        """Tell whether experts are merged, rather than pruned or all kept."""
        return self.method.grouping != "none" and self.experts < num_experts

    def refits(self, num_experts: int) -> bool:
        """Tell whether experts are refitted: where all of them stay nothing is lacking."""
        return self.method.refit != "none" and self.experts < num_experts

    def follows(self, num_experts: int) -> bool:
        """Tell whether the original model's own states are carried beside the others."""
        return self.refits(num_experts) and self.method.refit_target == "trajectory"

    def fields(self) -> dict[str, Any]:
        """Return a flat mapping for fingerprints and the manifest."""
        values = asdict(self)
        # as JSON gives it back
        values["method"]["refit_lambda"] = list(self.method.refit_lambda)
        return {**values.pop("method"), **values}


def check_counts(settings: Settings, num_experts: int) -> None:
    """Refuse counts that make no groups of the experts of a source layer.

    Raises
    ------
    UsageError
        One sentence about the count that does not work and the ones that do.
    """
    keep, method = settings.experts, settings.method
    if keep > num_experts:
        raise UsageError(f"--experts {keep}: the source has {num_experts} experts a layer")
    if method.grouping == "ream" and keep < num_experts:
        if method.group_size < 2:
            raise UsageError(
                f"--group-size {method.group_size}: a group that merges has 2 or more"
            )
        if keep * method.group_size < num_experts:
            smallest = -(-num_experts // keep)
            raise UsageError(
                f"--group-size {method.group_size}: {keep} groups of at most "
                f"{method.group_size} cannot hold {num_experts} experts; use {smallest} or more"
            )


def check_refit(settings: Settings) -> None:
    """Refuse a refit that cannot be solved, or has nothing to change.

    Raises
    ------
    UsageError
        One sentence about the option that does not work.
    """
    method = settings.method
    if method.refit == "none":
        return
    penalties = method.refit_lambda
    if not penalties or not all(0 < penalty < math.inf for penalty in penalties):
        raise UsageError(f"--refit-lambda {penalties}: numbers above 0 are needed")
    if len(set(penalties)) < len(penalties):
        raise UsageError(f"--refit-lambda {penalties}: a number is there twice")
    if method.refit_iterations < 1:
        raise UsageError(f"--refit-iterations {method.refit_iterations}: at least 1 is needed")
    if method.refit_experts == "changed" and method.grouping == "none":
        raise UsageError(
            "--refit-experts changed: pruning changes no expert, so there is none to refit"
        )
    if method.refit_target == "trajectory" and not settings.sequential:
        raise UsageError(
            "--refit-target trajectory: with --no-sequential each layer is given the original "
            "model's states, so there is no other trajectory; use --refit-target layer"
        )
