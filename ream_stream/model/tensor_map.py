"""Which tensors of a checkpoint go where in its model, and whether they are all there.

Names are those of transformers' own mapping, layer by layer. Nothing is read but headers.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from ream_stream.checkpoint.config_json import find_mtp
from ream_stream.checkpoint.expert_stack import ExpertStack
from ream_stream.checkpoint.formats import Stored
from ream_stream.checkpoint.header import TensorEntry
from ream_stream.checkpoint.quantized import float_name, tensors_of
from ream_stream.checkpoint.reader import Checkpoint
from ream_stream.errors import DamagedError, UnsupportedModelError

from .experts import Form
from .meta_model import find_decoder, find_fused_experts, get_tensor, key_targets, text_part
from .mtp import Wiring


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTensors:
    """Tensors of one decoder layer, or of a multi-token-prediction layer."""

    index: int
    """Position of the layer in the model."""

    names: tuple[str, ...]
    """Names of all tensors of the layer in the checkpoint, sorted."""

    dense: Mapping[str, tuple[str, ...]]
    """Names of the tensors of each non-expert parameter and buffer, several if they are
    joined; for quantized tensors the names of their floats."""

    stack: ExpertStack | None
    """Routed experts of the layer; None in a dense layer."""

    quantized: Mapping[str, Stored] = field(default_factory=dict)
    """Quantized matrices of `dense`, by the name of their floats."""

    is_mtp: bool = False
    """Whether this is a multi-token-prediction layer, after the last decoder layer."""

    def shape(self, name: str, entries: Mapping[str, TensorEntry]) -> tuple[int, ...]:
        """Return the shape of one of `dense`."""
        return shape_of(name, self.quantized, entries)

    def dense_names(self) -> list[str]:
        """Return all names of `dense`."""
        return [name for names in self.dense.values() for name in names]

    def dense_tensors(self) -> list[str]:
        """Return its tensors that are no expert's."""
        experts = self.stack.slots() if self.stack else {}
        return [name for name in self.names if name not in experts]


def shape_of(
    name: str, quantized: Mapping[str, Stored], entries: Mapping[str, TensorEntry]
) -> tuple[int, ...]:
    """Return the shape of a tensor's floats, by the name that they have."""
    if name not in quantized:
        return entries[name].shape
    stored = quantized[name]
    return (*([] if stored.count is None else [stored.count]), stored.rows, stored.cols)


class TensorMap:
    """Map from the parameters of a model's skeleton to the checkpoint's tensors.

    Parameters
    ----------
    checkpoint
        Its headers.
    model
        On the meta device.
    wiring
        Of its multi-token-prediction layer, the last of the decoder; None without one.

    Raises
    ------
    UnsupportedModelError
        A layer has more than one set of routed experts.
    DamagedError
        The checkpoint lacks tensors of the model, or they have other shapes.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: PreTrainedModel, wiring: Wiring | None
    ) -> None:
        self._entries, self._config = checkpoint.entries, checkpoint.config
        self._model, self._wiring = model, wiring
        self._layers_path, self._decoder = find_decoder(model)
        self._text = text_part(model, self._layers_path)
        self.quantized = checkpoint.quantized
        """How tensors are stored that are not floats, by the names of their floats."""
        coded = {name for stored in self.quantized.values() for name in tensors_of(stored)}
        names = [name for name in self._entries if name not in coded]
        origin = self.placed([*names, *self.quantized])
        found = key_targets(model, origin, self._text)
        self._targets = {origin[place]: target for place, target in found.items()}
        self.layers = self._plan_layers(checkpoint.experts.values())
        """Of each decoder layer."""
        self.outside: dict[str, tuple[str, ...]] = {}
        """Tensors of parameters and buffers outside the layers, like `LayerTensors.dense`."""
        for name, target in self._targets.items():
            if not target.startswith(self._layers_path + "."):
                self.outside[target] = (*self.outside.get(target, ()), name)
        self._check_outside()

    @property
    def num_layers(self) -> int:
        """Decoder layers, dense ones included; those for multi-token prediction are not."""
        return len(self._decoder) - (self._wiring is not None)

    def placed(self, names: Iterable[str]) -> dict[str, str]:
        """Return tensors by the names that they would have as a decoder layer's.

        Only those of a multi-token-prediction layer have others.
        """
        origin = {name: name for name in names}
        if self._wiring is not None:
            layer = f"{self._layers_path}.{self.num_layers}"
            for name in find_mtp(list(origin), self._config):
                origin[self._wiring.place(name, layer)] = origin.pop(name)
        return origin

    def _plan_layers(self, stacks: Iterable[ExpertStack]) -> list[LayerTensors]:
        pattern = re.compile(re.escape(self._layers_path) + r"\.([0-9]{1,9})\.(.+)")
        names: list[list[str]] = [[] for _ in self._decoder]
        dense: list[dict[str, tuple[str, ...]]] = [{} for _ in self._decoder]
        owner: dict[int, ExpertStack] = {}
        stack_of: dict[str, ExpertStack] = {}
        for stack in stacks:
            for name, slot in stack.slots().items():
                plain = (
                    name
                    if name in self._targets
                    else float_name(
                        stack.matrices[slot.matrix].place(slot.expert or 0), slot.part.suffix
                    )
                )
                stack_of[plain] = stack
        for name, target in self._targets.items():
            match = pattern.fullmatch(target)
            if match is None:
                continue
            index = int(match[1])
            of = stack_of.get(name)
            if of is None:
                dense[index][target] = (*dense[index].get(target, ()), name)
                stored = self.quantized.get(name)
                names[index] += [name] if stored is None else tensors_of(stored)
            elif index not in owner:
                owner[index] = of
                names[index] += of.slots()
            elif owner[index] is not of:
                raise UnsupportedModelError(
                    f"layer {index} has two sets of routed experts, {owner[index].prefix} "
                    f"and {of.prefix}"
                )
        if self._wiring is not None:  # what is not run too: a norm and a head for its output
            names[-1] = [*find_mtp(self._entries, self._config)]
        layers = [
            LayerTensors(
                index=index,
                is_mtp=index >= self.num_layers,
                names=tuple(sorted(names[index])),
                dense=dense[index],
                stack=owner.get(index),
                quantized={
                    name: self.quantized[name]
                    for parts in dense[index].values()
                    for name in parts
                    if name in self.quantized
                },
            )
            for index in range(len(self._decoder))
        ]
        for layer in layers:
            self._check_layer(layer)
        return layers

    def _check_layer(self, layer: LayerTensors) -> None:
        """Refuse a layer whose parameters are not all there, in the model's shapes."""
        prefix = f"{self._layers_path}.{layer.index}."
        wanted = {prefix + key for key in self._decoder[layer.index].state_dict()}
        if layer.stack is not None:
            path, module = find_fused_experts(self._decoder[layer.index])
            fused = {f"{prefix}{path}.{name}" for name, _ in module.named_parameters()}
            wanted -= fused
            self._check_stack(layer.index, layer.stack, module)
        of = " of its multi-token-prediction layer" if layer.is_mtp else ""
        self._check_tensors(wanted, layer.dense, of)

    def _check_stack(self, index: int, stack: ExpertStack, module: nn.Module) -> None:
        """Refuse experts that are not the model's."""
        form = Form.of(module)
        count, hidden, inner = get_tensor(module, "down_proj").shape
        if form.is_transposed:
            hidden, inner = inner, hidden
        if stack.count != count:
            raise DamagedError(
                f"layer {index} has {stack.count} experts, config.json says {count}"
            )
        if (stack.inner, stack.hidden) != (inner, hidden):
            first = stack.matrices[0]
            raise DamagedError(
                f"{next(stack.expert_slots(0))[0]} has shape {first.shape}, the model has "
                f"experts of {(inner, hidden)}"
            )
        if (stack.is_gated, stack.has_bias) != (form.is_gated, form.has_bias):
            raise DamagedError(
                f"{stack.prefix}: gates or biases are not those of {type(module).__name__}"
            )

    def _check_outside(self) -> None:
        """Refuse a checkpoint that lacks what is outside the layers; what is tied may lack."""
        prefix = self._layers_path + "."
        wanted = {
            key
            for key in self._model.state_dict()
            if key.startswith(self._text) and not key.startswith(prefix)
        }
        self._check_tensors(wanted - set(self._model.all_tied_weights_keys), self.outside)

    def _check_tensors(
        self, wanted: set[str], found: Mapping[str, tuple[str, ...]], of: str = ""
    ) -> None:
        missing = sorted(wanted - set(found))
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise DamagedError(f"the checkpoint lacks {missing[0]}{more}{of}")
        for target, names in found.items():
            name = names[0]
            shapes = [shape_of(n, self.quantized, self._entries) for n in names]
            shape = shapes[0]
            if len(names) > 1:
                shape = (sum(part[0] for part in shapes), *shape[1:])
            expected = tuple(get_tensor(self._model, target).shape)
            if shape != expected:
                raise DamagedError(f"{name} has shape {shape}, the model {expected}")
