"""The model of a checkpoint, one layer of it at a time.

The class is built on the meta device: names and shapes, no data. To run layer l
on a batch, the model's OWN forward is called with the batch's ``input_ids`` and
``attention_mask``. Every decoder layer's ``forward`` is replaced on the instance:
layers other than l return what they get, layer l takes the hidden states it is
fed, runs, and its output ends the forward. Masks, rotary embeddings, position ids
and per-layer arguments come from the family's own code; none of it is written
again here.

Private names of transformers used here are its key mapping and the context that
`from_pretrained` builds models in; tests/test_model.py is the contract.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.monkey_patching import patch_output_recorders

from .checkpoint.header import TensorEntry
from .checkpoint.layouts import ExpertStack, find_experts
from .checkpoint.source import Checkpoint, MappedTensors
from .errors import DamagedError, UnsupportedModelError
from .experts import ExpertWeights, StreamedExperts
from .memory import trim

HEAD_BYTES = 64_000_000
"""Rows of the output matrix are used in pieces of about this size."""


class _StopForwardError(Exception):
    """Ends a forward once the layer in question has run."""

    def __init__(self, output: Tensor | None) -> None:
        super().__init__()
        self.output = output


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Sequences that are run together."""

    input_ids_BL: Tensor
    """Token ids."""

    attention_mask_BL: Tensor | None
    """1 for tokens, 0 for padding; None if there is no padding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerKeys:
    """Tensors of one decoder layer."""

    index: int
    """Position of the layer in the model."""

    names: tuple[str, ...]
    """All its tensors in the checkpoint, sorted."""

    dense: Mapping[str, str]
    """Checkpoint name of every parameter and buffer that is not an expert's."""

    stack: ExpertStack | None
    """Its routed experts; None in a dense layer."""


class StreamedModel:
    """A causal language model that never has more than one layer in memory.

    Parameters
    ----------
    checkpoint
        Config and tensors. Tensors of a layer are needed only when it is loaded.
    dtype
        What the layers are run in: the model is then equal to
        ``from_pretrained(..., dtype=dtype)``.
    device
        Where they are run.

    Raises
    ------
    UnsupportedModelError
        The model cannot be driven layer by layer.
    DamagedError
        The checkpoint lacks tensors of the model, or they have other shapes.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self.model = build_skeleton(checkpoint.config, dtype, device)
        self._layers_path, self._decoder = _find_decoder(self.model)
        self._active: int | None = None
        self._feed: Tensor | None = None
        self._only_feed = False
        for index, module in enumerate(self._decoder):
            module.forward = self._relay(index, module.forward)
        self._targets = _key_targets(self.model, checkpoint.entries)
        self.layers = self._plan_layers()
        self._outside = {
            target: name
            for name, target in self._targets.items()
            if not target.startswith(self._layers_path + ".")
        }

    @property
    def num_layers(self) -> int:
        """Decoder layers, dense ones included."""
        return len(self._decoder)

    @property
    def outside_names(self) -> list[str]:
        """Return all tensors of the checkpoint that belong to no decoder layer, sorted."""
        inside = {name for layer in self.layers for name in layer.names}
        return sorted(set(self.checkpoint.entries) - inside)

    @property
    def unknown_names(self) -> list[str]:
        """Return the tensors of the checkpoint that the model class does not have, sorted."""
        inside = {name for layer in self.layers for name in layer.names}
        return sorted(set(self.checkpoint.entries) - inside - set(self._targets))

    def router(self, index: int) -> nn.Module:
        """Return the router module of an MoE layer."""
        recorder = self.model._can_record_outputs["router_logits"]  # noqa: SLF001
        kind = getattr(recorder, "target_class", recorder)
        for module in self._decoder[index].modules():
            if isinstance(module, kind):
                return module
        raise UnsupportedModelError(f"layer {index} has experts but no {kind.__name__}")

    @contextmanager
    def open_outside(self) -> Iterator[None]:
        """Load what is outside the layers for the length of the block.

        The embedding and the output matrix stay in the mapped file: only the
        rows that a batch touches, or a piece at a time, are copied.
        """
        with ExitStack() as stack:
            tensors = stack.enter_context(self.checkpoint.open())
            embedding, head = (
                self.model.get_input_embeddings(),
                self.model.get_output_embeddings(),
            )
            large = {id(embedding.weight), id(head.weight)}
            small = {
                target: name
                for target, name in self._outside.items()
                if id(_get(self.model, target)) not in large
            }
            self._fill(small, tensors)
            stack.callback(self._drop, small)
            table = self._outside[_path_of(self.model, embedding) + ".weight"]
            embedding.padding_idx = None
            embedding.forward = _embed_rows(embedding, tensors[table], self.dtype, self.device)
            matrix = self._outside.get(_path_of(self.model, head) + ".weight", table)
            head.forward = _project_pieces(head, tensors[matrix])
            yield

    @contextmanager
    def open_layer(self, index: int) -> Iterator[StreamedExperts | None]:
        """Load one layer for the length of the block; give its experts, if it has any.

        At the end its parameters are dropped, the files unmapped and the freed
        memory is given back.
        """
        keys, layer = self.layers[index], self._decoder[index]
        try:
            with self.checkpoint.open() as tensors:
                self._fill(keys.dense, tensors)
                streamed = None
                if keys.stack is not None:
                    path, original = _find_fused_experts(layer)
                    weights = ExpertWeights(tensors, keys.stack, self.dtype, self.device)
                    streamed = StreamedExperts(original, weights)
                    layer.set_submodule(path, streamed)
                try:
                    yield streamed
                finally:
                    if keys.stack is not None:
                        layer.set_submodule(path, original)
                    self._drop(keys.dense)
        finally:
            trim()

    def run_layer(self, index: int, batch: Batch, hidden_BLH: Tensor | None) -> Tensor:
        """Run an open layer on one batch.

        Parameters
        ----------
        index
            The layer.
        batch
            The batch's tokens; the model makes masks and positions from them.
        hidden_BLH
            What enters the layer; None for layer 0, which takes the embeddings.

        Returns
        -------
        Tensor
            What leaves it, (B, L, H).
        """
        self._active, self._feed = index, hidden_BLH
        try:
            self._forward(batch)
        except _StopForwardError as stop:
            if stop.output is not None:
                return stop.output
            raise
        finally:
            self._active = self._feed = None
        raise UnsupportedModelError(f"the model's forward never called layer {index}")

    def observe_layer(self, index: int, batch: Batch, hidden_BLH: Tensor | None) -> None:
        """Run an open layer only as far as its experts; their listener gets what it came for."""
        module = self._decoder[index]
        experts = next(m for m in module.modules() if isinstance(m, StreamedExperts))

        def stop(*_: Any) -> None:  # noqa: ANN401
            raise _StopForwardError(None)

        handle = experts.register_forward_hook(stop)
        try:
            self.run_layer(index, batch, hidden_BLH)
        except _StopForwardError:
            pass
        finally:
            handle.remove()

    def logits(self, batch: Batch, hidden_BLH: Tensor) -> Tensor:
        """Return the logits (B, L, V) from what leaves the last layer."""
        self._active, self._feed, self._only_feed = self.num_layers - 1, hidden_BLH, True
        try:
            logits: Tensor = self._forward(batch).logits
        finally:
            self._active, self._feed, self._only_feed = None, None, False
        return logits

    def mixers(self, index: int) -> list[nn.Module]:
        """Return the costly parts of a layer beside the block that holds its experts.

        These are its direct children with matrices, attention in its various
        forms: their outputs do not depend on the experts, so they can be kept
        and played back when the layer runs again with other experts.
        """
        block = _find_fused_experts(self._decoder[index])[0].split(".")[0]
        return [
            child
            for name, child in self._decoder[index].named_children()
            if name != block and any(p.dim() > 1 for p in child.parameters())
        ]

    def _forward(self, batch: Batch) -> Any:  # noqa: ANN401
        mask = batch.attention_mask_BL
        with torch.no_grad():
            return self.model(
                input_ids=batch.input_ids_BL.to(self.device),
                attention_mask=None if mask is None else mask.to(self.device),
                # a cache written twice is silently wrong for linear attention
                use_cache=False,
            )

    def _relay(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def relayed(hidden_BLH: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            if index != self._active:
                return hidden_BLH
            if self._feed is not None:
                hidden_BLH = self._feed.to(self.device)
            if self._only_feed:
                return hidden_BLH
            output = forward(hidden_BLH, *args, **kwargs)
            if not isinstance(output, Tensor):
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} passes more than hidden states between layers"
                )
            raise _StopForwardError(output)

        return relayed

    def _plan_layers(self) -> list[LayerKeys]:
        entries = self.checkpoint.entries
        stacks = find_experts(entries)
        pattern = re.compile(re.escape(self._layers_path) + r"\.(\d+)\.(.+)")
        names: list[list[str]] = [[] for _ in self._decoder]
        dense: list[dict[str, str]] = [{} for _ in self._decoder]
        owner: dict[int, ExpertStack] = {}
        stack_of = {n: s for s in stacks.values() for e in s.experts for n in e.parts()}
        for name, target in self._targets.items():
            match = pattern.fullmatch(target)
            if match is None:
                continue
            index = int(match[1])
            names[index].append(name)
            if name in stack_of:
                owner[index] = stack_of[name]
            else:
                dense[index][target] = name
        layers = [
            LayerKeys(
                index=index,
                names=tuple(sorted(names[index])),
                dense=dense[index],
                stack=owner.get(index),
            )
            for index in range(len(self._decoder))
        ]
        for layer in layers:
            self._check_layer(layer)
        return layers

    def _check_layer(self, layer: LayerKeys) -> None:
        """Refuse a layer whose parameters are not all there, in the model's shapes."""
        prefix = f"{self._layers_path}.{layer.index}."
        wanted = {k for k in self.model.state_dict() if k.startswith(prefix)}
        if layer.stack is not None:
            path, module = _find_fused_experts(self._decoder[layer.index])
            fused = {f"{prefix}{path}.{name}" for name, _ in module.named_parameters()}
            wanted -= fused
            count = module.down_proj.shape[0]
            if len(layer.stack.experts) != count:
                raise DamagedError(
                    f"layer {layer.index} has {len(layer.stack.experts)} experts, "
                    f"config.json says {count}"
                )
        missing = sorted(wanted - set(layer.dense))
        if missing:
            raise DamagedError(f"the checkpoint lacks {missing[0]} and {len(missing) - 1} more")
        for target, name in layer.dense.items():
            expected, entry = _get(self.model, target).shape, self.checkpoint.entries[name]
            if tuple(expected) != entry.shape:
                raise DamagedError(
                    f"{name} has shape {entry.shape}, the model {tuple(expected)}"
                )

    def _fill(self, keys: Mapping[str, str], tensors: MappedTensors) -> None:
        plan = self.model._get_dtype_plan(self.dtype)  # noqa: SLF001
        for target, name in keys.items():
            dtype = next((plan[p] for p in plan if p in target), _get(self.model, target).dtype)
            _put(self.model, target, tensors[name].to(self.device, dtype))

    def _drop(self, keys: Mapping[str, str]) -> None:
        for target in keys:
            _put(self.model, target, _get(self.model, target).to("meta"))


def build_skeleton(
    config: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Build the model class of a config on the meta device, its computed buffers filled."""
    values = {key: value for key, value in config.items() if key != "auto_map"}
    loaded = CONFIG_MAPPING[config["model_type"]].from_dict(values)
    loaded.dtype = dtype
    kind = AutoModelForCausalLM._model_mapping[type(loaded)]  # noqa: SLF001
    with ExitStack() as stack:
        for context in kind.get_init_context(dtype, False, False, None):  # noqa: FBT003
            stack.enter_context(context)
        model = kind(loaded)
        patch_output_recorders(model)
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, leaf = name.rpartition(".")
        empty = torch.empty_like(buffer, device="cpu")
        model.get_submodule(path)._buffers[leaf] = empty  # noqa: SLF001
    # all parameters are on meta: this fills nothing but the buffers above
    model.initialize_weights()
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = buffer.to(device)  # noqa: SLF001
    return model.eval()


def _key_targets(model: PreTrainedModel, entries: Mapping[str, TensorEntry]) -> dict[str, str]:
    """Return, for each checkpoint tensor the model has, the name of its parameter or buffer."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    targets = {}
    for name in sorted(entries):
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if target not in state and name in state:
            target, pattern = name, None
        if target not in state:
            continue
        if pattern is not None and ".experts." not in name:
            raise UnsupportedModelError(f"{name} is converted while loading; not supported yet")
        targets[name] = target
    return targets


def _find_decoder(model: PreTrainedModel) -> tuple[str, Sequence[nn.Module]]:
    """Return the list of decoder layers and its path."""
    kinds = set(model._no_split_modules or ())  # noqa: SLF001
    for path, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module)
            and type(module[0]).__name__ in kinds
        ):
            return path, list(module)
    raise UnsupportedModelError(f"{type(model).__name__} has no list of decoder layers")


def _find_fused_experts(layer: nn.Module) -> tuple[str, nn.Module]:
    """Return the module of a layer that holds all routed experts, and its path."""
    for path, module in layer.named_modules():
        if isinstance(module, StreamedExperts):
            return path, module
        down = getattr(module, "down_proj", None)
        if isinstance(down, nn.Parameter) and down.dim() == 3:
            flags = ("has_gate", "is_concatenated")
            wrong = ("has_bias", "is_transposed", "has_post_expert_norm")
            if not all(getattr(module, f, False) for f in flags) or any(
                getattr(module, f, True) for f in wrong
            ):
                raise UnsupportedModelError(
                    f"{type(module).__name__} is not a plain gated expert"
                )
            return path, module
    raise UnsupportedModelError("a layer has expert tensors but no experts module")


def _embed_rows(
    embedding: nn.Module, table_VH: Tensor, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Return an embedding forward that reads only the rows it needs.

    The family's own forward runs on a small table of just these rows, so that
    scaled embeddings stay scaled.
    """
    forward = type(embedding).forward

    def embed(input_ids: Tensor) -> Tensor:
        used, inverse = torch.unique(input_ids, return_inverse=True)
        rows = table_VH[used.to(table_VH.device)].to(device, dtype)
        embedding.weight = nn.Parameter(rows, requires_grad=False)
        try:
            embedded: Tensor = forward(embedding, inverse)
        finally:
            embedding.weight = nn.Parameter(rows.to("meta"), requires_grad=False)
        return embedded

    return embed


def _project_pieces(head: nn.Module, matrix_VH: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a forward of the output matrix that converts a piece of its rows at a time."""

    def project(hidden: Tensor) -> Tensor:
        vocabulary, width = matrix_VH.shape
        rows = max(1, HEAD_BYTES // (width * hidden.element_size()))
        logits = hidden.new_empty(*hidden.shape[:-1], vocabulary)
        for start in range(0, vocabulary, rows):
            piece = matrix_VH[start : start + rows].to(hidden.device, hidden.dtype)
            logits[..., start : start + rows] = functional.linear(hidden, piece)
        return logits if head.bias is None else logits + head.bias

    return project


def _path_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)


def _get(model: nn.Module, target: str) -> Tensor:
    path, _, leaf = target.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), leaf)
    return tensor


def _put(model: nn.Module, target: str, value: Tensor) -> None:
    path, _, leaf = target.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:  # noqa: SLF001
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)  # noqa: SLF001
    else:
        module._buffers[leaf] = value  # noqa: SLF001
