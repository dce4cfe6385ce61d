"""Plans of what the options may come to: the first method that works, and its numbers."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from ream_stream.calibration.mix import parts_of
from ream_stream.calibration.tokens import Tokens
from ream_stream.checkpoint.config_json import text_config
from ream_stream.checkpoint.reader import Checkpoint
from ream_stream.errors import UnsupportedModelError, UsageError
from ream_stream.model.dtypes import compute_dtype
from ream_stream.model.families import TOP_K_KEYS, family_of
from ream_stream.planning.plan import Plan
from ream_stream.planning.planner import make_plan
from ream_stream.planning.schedule import Begun, Budgets
from ream_stream.planning.slice_shape import ExpertLayer
from ream_stream.settings import Settings

from .config import RunOptions
from .method_settings import candidates, settings_for
from .observation import ObserveOptions, observing_settings
from .size_search import largest_plan, target_of
from .statistics import Statistics
from .workspace import Workspace


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """All that a plan is made of but settings and tokens."""

    options: RunOptions
    checkpoint: Checkpoint
    budgets: Budgets
    workspace: Workspace | None
    begun: Begun | None
    statistics: Statistics | None

    def plan(self, settings: Settings, tokens: Tokens | None) -> Plan:
        """Return the plan of a run; without tokens, of as many as are asked for."""
        options, workspace = self.options, self.workspace
        parts = parts_of(options.calibration, mix=options.mix)
        plan = make_plan(
            self.checkpoint,
            settings,
            options.planned_sequences if tokens is None else tokens.num_sequences,
            options.sequence_length if tokens is None else tokens.sequence_length,
            budgets=self.budgets,
            threads=options.threads,
            padded=tokens is None or tokens.attention_mask_SL is not None,
            domains=max(1, len(parts)) if tokens is None else len(tokens.domains),
            output=workspace.output if workspace else None,
            work=workspace.work if workspace else None,
            begun=self.begun,
        )
        if self.statistics is not None:
            self.statistics.check_layers(plan)
        return plan


def first_that_works(
    inputs: PlanInputs, device: torch.device, tokens: Tokens | None
) -> tuple[Plan, RunOptions, str]:
    """Return the plan of the first candidate that works, its options, and the reason."""
    target = target_of(inputs.options)

    def planned(asked: RunOptions) -> Plan:
        return inputs.plan(_settings(inputs, asked, device), tokens)

    if inputs.options.observes:
        return planned(inputs.options), inputs.options, ""
    *tried, (last, last_reason) = candidates(inputs.options)

    def best(asked: RunOptions) -> Plan:
        if target is None:
            return planned(asked)
        return largest_plan(asked, _layer_of(asked, inputs.checkpoint), target, planned)

    why_not: list[str] = []
    for asked, reason in tried:
        try:
            plan = best(asked)
        except UsageError as error:
            why_not.append(str(error))
        else:
            return plan, asked, reason
    return best(last), last, f"{last_reason}: {why_not[0]}" if why_not else last_reason


def num_experts(checkpoint: Checkpoint) -> int:
    """Return the routed experts of a layer.

    Raises
    ------
    UnsupportedModelError
        The model is of no known family, or dense.
    """
    family_of(checkpoint.config)
    stacks = checkpoint.experts.values()
    if not stacks:
        raise UnsupportedModelError(f"{checkpoint.folder} is a dense model: it has no experts")
    return max(stack.count for stack in stacks)


def _settings(inputs: PlanInputs, options: RunOptions, device: torch.device) -> Settings:
    checkpoint, statistics = inputs.checkpoint, inputs.statistics
    dtype = str(compute_dtype(options.compute_dtype, checkpoint, device)).removeprefix("torch.")
    known = {"compute_dtype": dtype, "device_kind": device.type}
    if isinstance(options, ObserveOptions):
        return observing_settings(options, num_experts(checkpoint), **known)
    settings = settings_for(options, _layer_of(options, checkpoint), **known)
    if statistics is None:
        return settings
    then = statistics.fingerprint["compute_dtype"]
    if options.compute_dtype != "auto" and dtype != then:
        raise UsageError(
            f"--compute-dtype {options.compute_dtype} is {dtype} here, and the statistics were "
            f"taken in {then}: leave it out"
        )
    return statistics.settings(settings, options.weights or ())


def _layer_of(options: RunOptions, checkpoint: Checkpoint) -> ExpertLayer:
    return expert_layer(checkpoint, decodes=options.changes.get("dtype") == "bf16")


def expert_layer(checkpoint: Checkpoint, *, decodes: bool = False) -> ExpertLayer:
    """Return the experts of a layer as headers and config.json tell; the plan checks them.

    Parameters
    ----------
    checkpoint
        The source.
    decodes
        Whether quantized tensors are written as floats.

    Raises
    ------
    UnsupportedModelError
        The model is of no known family, or dense.
    """
    family, count = family_of(checkpoint.config), num_experts(checkpoint)
    stack = next(iter(checkpoint.experts.values()))
    text = text_config(checkpoint.config)
    numbers = {key: value for key, value in text.items() if type(value) is int}
    told = SimpleNamespace(**{**numbers, "topk_method": text.get("topk_method")})
    return ExpertLayer(
        count=count,
        inner=stack.inner,
        top_k=max((numbers[key] for key in TOP_K_KEYS if key in numbers), default=1),
        multiple=1 if decodes else max(m.stored.codec.multiple for m in stack.matrices),
        shared=max((numbers.get(key, 0) for key in family.shared_counts), default=0)
        * stack.inner,
        routing_groups=max(1, family.groups(told)),
    )
