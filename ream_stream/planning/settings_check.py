"""Refuses settings that do not work for a source, each in one sentence with what would."""

import math
from collections.abc import Sequence

from ream_stream.checkpoint.expert_stack import ExpertStack
from ream_stream.errors import UnsupportedModelError, UsageError
from ream_stream.model.families import Family
from ream_stream.model.streamed_model import StreamedModel
from ream_stream.settings import Settings, check_values


def check_settings(settings: Settings, num_experts: int) -> None:
    """Refuse values that there are not, and counts that make no groups of a layer's experts.

    Raises
    ------
    UsageError
        One sentence about the option that does not work and what would.
    """
    keep, method = settings.experts, settings.method
    check_values(settings)
    check_values(method)
    _check_statistics(settings, num_experts)
    _check_refit(settings)
    most = num_experts * max(1, method.slices)
    if not 1 <= keep <= most:
        made = f", cut into {most}" if settings.cuts else ""
        raise UsageError(
            f"--experts {keep}: the source has {num_experts} experts a layer{made}"
        )
    if settings.cuts and method.grouping != "none":
        raise UsageError(
            f"--slices {method.slices}: slices are dropped, and --grouping {method.grouping} "
            "merges experts; use --method slices, or --grouping none"
        )
    if method.grouping == "ream" and keep * method.group_size < num_experts:
        smallest = -(-num_experts // keep)
        raise UsageError(
            f"--group-size {method.group_size}: {keep} groups of at most "
            f"{method.group_size} cannot hold {num_experts} experts; use {smallest} or more"
        )


def _check_statistics(settings: Settings, num_experts: int) -> None:
    """Refuse what statistics of an earlier run do not hold."""
    if settings.runs_layers:
        return
    if settings.method.refit != "none":
        raise UsageError(
            f"--refit {settings.method.refit}: a refit needs the activations of all experts on "
            "the same tokens, which statistics do not hold; leave it out, or give "
            "--calibration in place of --statistics"
        )
    if settings.domain_weights and settings.merges(num_experts):
        raise UsageError(
            "--weights: merging compares experts on tokens of the mix that was observed, which "
            "weights do not change; leave them out, or give a method that drops experts or "
            "parts of them"
        )


def _check_refit(settings: Settings) -> None:
    """Refuse a refit that cannot be solved, or has nothing to change."""
    method = settings.method
    if method.refit == "none":
        return
    penalties = method.refit_lambda
    if not penalties or not all(0 < penalty < math.inf for penalty in penalties):
        raise UsageError(f"--refit-lambda {penalties}: numbers above 0 are needed")
    if len(set(penalties)) < len(penalties):
        raise UsageError(f"--refit-lambda {penalties}: a number is there twice")
    if method.refit_experts == "changed" and method.grouping == "none":
        raise UsageError(
            "--refit-experts changed: pruning changes no expert, so there is none to refit"
        )
    if method.refit_target == "trajectory" and not settings.sequential:
        raise UsageError(
            "--refit-target trajectory: with --no-sequential each layer is given the original "
            "model's states, so there is no other trajectory; use --refit-target layer"
        )


def check_cut(
    model: StreamedModel, family: Family, settings: Settings, stacks: Sequence[ExpertStack]
) -> None:
    """Refuse slices that the family, or the layout of the layers, has no place for."""
    slices, inner, config = settings.method.slices, stacks[0].inner, model.text_config
    if reason := family.uncut(config, slices):
        raise UsageError(f"--slices {slices}: {config.model_type} cannot be cut, {reason}")
    if any(stack.inner != inner for stack in stacks):
        raise UnsupportedModelError(
            "layers have experts of different widths: they cannot be cut"
        )
    if (
        any(
            layer.stack
            and family.router_tensors(layer.stack.block, model.checkpoint.entries)[1]
            for layer in model.layers
        )
        and slices > 1
    ):
        raise UsageError(
            f"--slices {slices}: a layer chooses its experts by a table of token ids, which "
            "has no place for slices; use --slices 1 with --width"
        )
    width = settings.width(inner)
    if slices * width > inner or width * slices < 1:
        raise UsageError(
            f"--slices {slices} --width {width}: an expert has {inner} neurons, "
            f"{slices} slices can have {inner // slices} each"
        )
    multiple = (
        1 if settings.decodes else max(m.stored.codec.multiple for m in stacks[0].matrices)
    )
    if inner % multiple == 0 and width % multiple:
        raise UsageError(
            f"--width {width}: {stacks[0].scheme} is stored and run in groups of {multiple}; "
            "give a multiple of it, or --dtype bf16"
        )
    for key in family.shared_counts:
        shared = getattr(config, key, None)
        if isinstance(shared, int) and shared * inner % width:
            raise UsageError(
                f"--width {width}: the shared experts of {config.model_type} are "
                f"{shared * inner} wide, and config.json can tell multiples of the experts' "
                "width only: give a divisor of it"
            )
