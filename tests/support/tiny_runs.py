"""Runs over tiny checkpoints, and the same models in transformers."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tiny_families import EXPERTS, VOCABULARY
from torch import Tensor
from transformers import AutoModelForCausalLM

from ream_stream.calibration.tokens import Tokens, from_tensors
from ream_stream.checkpoint.reader import Checkpoint, open_checkpoint
from ream_stream.compression.pipeline import compress
from ream_stream.compression.workspace import Workspace
from ream_stream.events import Event, LayerDone, RefitResult
from ream_stream.model.hidden_states import HiddenStates
from ream_stream.model.streamed_model import Batch, StreamedModel
from ream_stream.planning.plan import SUMS, Plan
from ream_stream.planning.planner import make_plan
from ream_stream.planning.refit_memory import ACTIVATIONS
from ream_stream.planning.schedule import Schedule, Solver
from ream_stream.settings import Method, Settings

CPU = torch.device("cpu")


def some_tokens(
    sequences: int = 4, length: int = 12, *, seed: int = 0, padded: bool = False
) -> Tokens:
    """Draw tokens; padded, the first sequence begins with padding and the last ends with it."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sequences, length)
    ids_SL = torch.randint(2, VOCABULARY - 2, shape, generator=generator)
    tensors = {"input_ids": ids_SL}
    if padded:
        mask_SL = torch.ones_like(ids_SL)
        mask_SL[0, :4], mask_SL[-1, -3:] = 0, 0
        tensors["attention_mask"] = mask_SL
    return from_tensors(tensors, description="drawn")


@dataclass(frozen=True, kw_only=True)
class Forward:
    """What a model makes of a batch."""

    hidden: list[torch.Tensor]
    """What leaves each decoder layer."""
    logits: torch.Tensor


Inputs = Sequence[tuple[torch.Tensor, torch.Tensor | None]]
"""Ids and mask of each batch."""


def same_in(name: str, dtype: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor], bool]:
    """Return how a family's states are compared: as bits, but for two in float32.

    On a batch of one row, last bits of jamba's layers change from process to process. Llama 4
    runs each expert on all tokens in transformers, and products of more rows have others.
    """
    wavers = name in {"jamba", "llama4", "llama4_text"} and dtype == torch.float32
    return partial(torch.allclose, rtol=1e-4, atol=1e-4) if wavers else torch.equal


def routed_to(args: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Return inputs, experts and coefficients of what an experts module was called with.

    That of Llama 4 gets each token for every expert, times 0 but for the one it is sent to.
    """
    if len(args) == 3:
        return args
    each_ETH = args[0].view(EXPERTS, -1, args[0].shape[-1])
    index_T1 = each_ETH.abs().sum(-1).argmax(0)[:, None]
    return each_ETH.sum(0), index_T1, torch.ones_like(index_T1, dtype=each_ETH.dtype)


@torch.no_grad()
def output_in_transformers(
    module: torch.nn.Module, expert: int, x_RH: torch.Tensor
) -> torch.Tensor:
    """Return one expert's outputs, in float64, from the flags and parameters of its module."""
    if not hasattr(module, "has_gate"):
        gate, up = (x_RH @ module.gate_up_proj[expert].double()).chunk(2, dim=1)
        return (module.act_fn(gate) * up) @ module.down_proj[expert].double()

    def product(x, name):
        weight = getattr(module, name)[expert].double()
        x = x @ weight if module.is_transposed else x @ weight.T
        return x + getattr(module, f"{name}_bias")[expert].double() if module.has_bias else x

    if module.has_gate:
        inner = module._apply_gate(product(x_RH, "gate_up_proj"))
    else:
        inner = module.act_fn(product(x_RH, "up_proj"))
    return product(inner, "down_proj")


@torch.no_grad()
def forward_in_transformers(folder: Path, dtype: torch.dtype, inputs: Inputs) -> list[Forward]:
    """Load the whole model as users do, all its tensors and no others, and run it."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not any(info.values()), info
    model.eval()
    for parameter in model.parameters():
        # our experts are aligned; a mapped stack is so by accident, which decides last bits
        if parameter.dim() == 3:
            parameter.data = parameter.data.clone()
    hidden: list[torch.Tensor] = []
    for layer in model.model.layers:
        # several states of a token are one row of ours
        layer.register_forward_hook(
            lambda _module, _args, output: hidden.append(
                (output[0] if isinstance(output, tuple) else output).flatten(2)
            )
        )
    forwards = []
    for ids_BL, mask_BL in inputs:
        hidden.clear()
        logits = model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).logits
        forwards.append(Forward(hidden=[*hidden], logits=logits))
    return forwards


def forward_streamed(folder: Path, dtype: torch.dtype, inputs: Inputs) -> list[Forward]:
    """Run the model layer by layer, each on all batches."""
    model = StreamedModel(open_checkpoint(folder), dtype, CPU)
    batches = [Batch(input_ids_BL=ids, attention_mask_BL=mask) for ids, mask in inputs]
    hidden: list[list[torch.Tensor]] = [[] for _ in batches]
    with model.open_outside():
        for index in range(model.num_layers):
            with model.open_layer(index):
                for batch, so_far in zip(batches, hidden, strict=True):
                    entering = so_far[-1] if so_far else None
                    so_far.append(model.run_layer(index, batch, entering))
        return [
            Forward(hidden=states, logits=model.logits(batch, states[-1]))
            for batch, states in zip(batches, hidden, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run left, and what was seen of it on the way."""

    plan: Plan
    tokens: Tokens
    output: Path
    events: list[Event]
    hidden: dict[int, torch.Tensor]
    """What the run itself computed to leave each layer but the last, (S, L, H)."""

    @property
    def manifest(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(
            (self.output / "ream_stream.json").read_text(encoding="utf-8")
        )
        return values

    @property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.output)

    def files(self) -> dict[str, bytes]:
        """Everything in the output, the work folder aside."""
        return {p.name: p.read_bytes() for p in self.output.iterdir() if p.is_file()}

    def shards(self) -> dict[str, bytes]:
        return {n: data for n, data in self.files().items() if n.endswith(".safetensors")}


def groups_by_layer(done: Run) -> dict[int, list[list[int]]]:
    """Return the groups of each layer with experts."""
    return {layer["index"]: layer["groups"] for layer in done.manifest["layers"]}


def refits_by_layer(done: Run) -> dict[int, RefitResult | None]:
    """Return what the refit of each layer with experts came to."""
    return {
        event.layer: event.refitted
        for event in done.events
        if isinstance(event, LayerDone) and event.experts_before
    }


def settings(experts: int = 6, *, dtype: str = "float32", **fields: Any) -> Settings:
    """Settings of a run; fields of the method may be given beside the run's own."""
    names = Method.__dataclass_fields__
    method = Method(**{key: fields.pop(key) for key in list(fields) if key in names})
    if "dtype_out" in fields:
        fields["dtype"] = fields.pop("dtype_out")
    return Settings(experts=experts, method=method, compute_dtype=dtype, **fields)


def plan_for(source: Path, tokens: Tokens, wanted: Settings) -> Plan:
    return make_plan(
        open_checkpoint(source), wanted, tokens.num_sequences, tokens.sequence_length
    )


SCHEDULE = Schedule(
    batch_sequences=4,
    expert_blocks=1,
    resident_experts=0,
    solver=Solver(preconditioner="blocks", gathered=False, column_blocks=1),
    threads=1,
)


def scheduled(plan: Plan, **fields: Any) -> Plan:
    """Return a plan that goes through layers in another way."""
    return replace(plan, schedule=replace(plan.schedule, **fields))


def storing(plan: Plan, blocks: int, where: str) -> Plan:
    """Return a plan whose refit stores activations block by block: memory, disk or both."""
    size = 6 * plan.num_batches
    memory, disk = {"memory": (size, 0), "disk": (0, size), "both": (size // 2, size // 2)}[
        where
    ]
    places = {ACTIVATIONS: disk, SUMS: disk if where == "disk" else 0}
    return replace(
        scheduled(plan, expert_blocks=blocks, resident_experts=2),
        memory={**plan.memory, ACTIVATIONS: memory, SUMS: size - places[SUMS]},
        scratch={part: nbytes for part, nbytes in places.items() if nbytes},
        device_memory={"a device": 1},
    )


def run_plan(plan: Plan, tokens: Tokens, output: Path) -> Run:
    """Compress, and read each boundary's hidden states while they are there."""
    workspace = Workspace(output=output, work=output / ".ream-stream")
    events: list[Event] = []
    hidden: dict[int, Tensor] = {}

    def report(event: Event) -> None:
        events.append(event)
        if isinstance(event, LayerDone) and event.layer + 1 < len(plan.layers):
            hidden[event.layer] = _read_states(plan, workspace, event.layer + 1)

    with workspace.locked():
        compress(plan, tokens, workspace, device=CPU, report=report)
    return Run(plan=plan, tokens=tokens, output=output, events=events, hidden=hidden)


def run(source: Path, output: Path, wanted: Settings, tokens: Tokens | None = None) -> Run:
    tokens = tokens or some_tokens()
    return run_plan(plan_for(source, tokens, wanted), tokens, output)


def _read_states(plan: Plan, workspace: Workspace, boundary: int) -> torch.Tensor:
    states = HiddenStates(
        workspace.hidden(boundary), plan.hidden_shape, plan.dtype, plan.schedule.batch_sequences
    )
    return torch.cat([states.read(number) for number in range(plan.num_batches)])
