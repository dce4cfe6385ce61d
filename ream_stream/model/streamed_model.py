"""The model of a checkpoint, with one layer in memory at a time.

The class is built on the meta device: names and shapes, no data. To run layer l
on a batch, the model's OWN forward is called with the batch's ``input_ids`` and
``attention_mask``. Every decoder layer's ``forward`` is replaced on the instance:
layers other than l return their input, layer l runs on the hidden states of the
previous layer, and its output ends the forward. Masks, rotary embeddings, position
ids and per-layer arguments come from the family's own code; nothing of that is
reimplemented here.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ream_stream.checkpoint.expert_stack import Tensors
from ream_stream.checkpoint.reader import Checkpoint
from ream_stream.errors import DamagedError, UnsupportedModelError
from ream_stream.host_memory import bound_kernel_caches, trim

from .embeddings import embed_rows, project_pieces
from .experts import ExpertWeights, Form, StreamedExperts
from .llama4 import route_scaled
from .meta_model import (
    build_skeleton,
    check_sizes,
    drop_tensors,
    dtype_of,
    final_norm,
    find_decoder,
    find_fused_experts,
    get_tensor,
    mixes_states,
    move_buffers,
    passes_selection,
    path_of,
    put_tensor,
    restored,
    states_axis,
    trusting,
)
from .mtp import find_wiring
from .rotary import forgetting
from .tensor_map import TensorMap


class _StopForwardError(Exception):
    """Ends the model's forward after the active layer has run."""

    def __init__(self, output: Tensor | None) -> None:
        super().__init__()
        self.output = output


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Sequences of one forward pass."""

    input_ids_BL: Tensor
    """Token ids of the sequences."""

    attention_mask_BL: Tensor | None
    """Attention mask, 1 for tokens, 0 for padding; None if there is no padding."""


class StreamedModel:
    """A causal language model that never has more than one layer in memory.

    Parameters
    ----------
    checkpoint
        Config and tensors. Tensors of a layer are needed only when it is loaded.
    dtype
        Dtype of the layers' forward pass: the model is equal to
        ``from_pretrained(..., dtype=dtype)``.
    device
        Device of the layers.

    Raises
    ------
    UnsupportedModelError
        The model cannot be driven layer by layer.
    DamagedError
        The checkpoint lacks tensors of the model, or they have other shapes.
    """

    @trusting("config.json is not of a model that can be run layer by layer")
    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
    ) -> None:
        bound_kernel_caches()
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        check_sizes(checkpoint.config, len(checkpoint.entries))
        self._mtp = find_wiring(checkpoint.experts, checkpoint.config)
        self.model = build_skeleton(checkpoint.config, dtype, device, self._mtp)
        layers_path, self._decoder = find_decoder(self.model)
        self.final_norm = final_norm(self.model, layers_path) if self._mtp else None
        """The decoder's final norm for states that enter an MTP layer; None without one."""
        self._is_tuple = passes_selection(self.model, self._decoder)
        self._states = states_axis(self._decoder[0])
        self._forget = forgetting(self.model)
        self._active: int | None = None
        self._feed: Tensor | None = None
        self._only_feed = False
        for index, module in enumerate(self._decoder):
            route_scaled(module)
            module.forward = self._relay(index, module.forward)
        self.map = TensorMap(checkpoint, self.model, self._mtp)
        """Map from parameters of the model to tensors of the checkpoint."""
        self.layers, self.quantized = self.map.layers, self.map.quantized

    def move(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Move to another device, and read tensors of equal shapes from another checkpoint."""
        self.checkpoint, self.device = checkpoint, device
        self._forget()
        move_buffers(self.model, device)
        self._forget = forgetting(self.model)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers, dense ones included, multi-token prediction excluded."""
        return self.map.num_layers

    @property
    def text_config(self) -> Any:  # noqa: ANN401 - a config of transformers
        """Return the config of the text decoder; in a wrapper it is part of the model's."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states between layers; several states of a token are one row."""
        return math.prod(self._states) * self._width

    @property
    def _width(self) -> int:
        embedding: Any = self.model
        return int(embedding.get_input_embeddings().weight.shape[1])

    @property
    def outside_names(self) -> list[str]:
        """Return all tensors of the checkpoint that belong to no decoder layer, sorted."""
        inside = {name for layer in self.layers for name in layer.names}
        return sorted(set(self.checkpoint.entries) - inside)

    def router(self, index: int) -> nn.Module:
        """Return the router module of an MoE layer."""
        for module in self._decoder[index].modules():
            if type(module).__name__.endswith(("Router", "HunYuanMoEV1Gate")):
                return module
        raise UnsupportedModelError(f"layer {index} has experts but no router")

    @property
    def top_k(self) -> int:
        """Number of experts that a token is routed to, the largest of all layers."""
        given = getattr(self.text_config, "top_k_experts", None)
        told: list[tuple[Any, int]] = [
            (getattr(self.router(layer.index), "top_k", given), layer.stack.count)
            for layer in self.layers
            if layer.stack
        ]
        for top_k, count in told:
            if type(top_k) is not int or not 1 <= top_k <= count:
                raise DamagedError(
                    f"config.json sends each token to {top_k!r} of {count} experts"
                )
        largest: int = max(top_k for top_k, _ in told)
        return largest

    @contextmanager
    def open_outside(self) -> Iterator[None]:
        """Load the tensors outside the layers for the length of the block.

        The embedding and the output matrix stay in the mapped file: the model copies
        the embedding rows of a batch, and the output matrix piece by piece.
        """
        with ExitStack() as stack:
            tensors = stack.enter_context(self.checkpoint.open())
            model: Any = self.model
            embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
            stack.enter_context(restored([embedding, head]))
            large = {id(embedding.weight), id(head.weight)}
            small = {
                target: found
                for target, found in self.map.outside.items()
                if id(get_tensor(self.model, target)) not in large
            }
            self._fill(small, tensors)
            stack.callback(drop_tensors, self.model, small)
            (table,) = self.map.outside[path_of(self.model, embedding) + ".weight"]
            embedding.padding_idx = None
            rows = self._read(tensors, table, self.dtype)
            embedding.forward = embed_rows(embedding, rows, self.dtype, self.device)
            (matrix,) = self.map.outside.get(path_of(self.model, head) + ".weight", (table,))
            head.forward = project_pieces(head.bias, self._read(tensors, matrix, self.dtype))
            yield

    @contextmanager
    def open_layer(
        self, index: int, checkpoint: Checkpoint | None = None
    ) -> Iterator[StreamedExperts | None]:
        """Load layer `index`, of this or another checkpoint; yield its experts, if it has any.

        At the end the block drops the layer's parameters, unmaps the files and returns
        the freed memory to the kernel.
        """
        keys, layer = self.layers[index], self._decoder[index]
        try:
            with (checkpoint or self.checkpoint).open() as tensors:
                self._fill(keys.dense, tensors)
                streamed = None
                if keys.stack is not None:
                    path, original = find_fused_experts(layer)
                    weights = ExpertWeights(
                        tensors, keys.stack, self.dtype, self.device, Form.of(original)
                    )
                    streamed = StreamedExperts(original, weights)
                    layer.set_submodule(path, streamed)
                try:
                    yield streamed
                finally:
                    if keys.stack is not None:
                        layer.set_submodule(path, original)
                    drop_tensors(self.model, keys.dense)
        finally:
            trim()

    def run_layer(self, index: int, batch: Batch, hidden_BLH: Tensor | None) -> Tensor:
        """Run an open layer on one batch and return its output, (B, L, H).

        Parameters
        ----------
        index
            Position of the layer.
        batch
            The batch's tokens; the model makes masks and positions from them.
        hidden_BLH
            Output of the previous layer; None for layer 0, which takes the embeddings.
        """
        if index >= self.num_layers:
            assert hidden_BLH is not None
            hidden_BLH = self._with_next_tokens(index, batch, hidden_BLH)
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

    def observe_layer(
        self, index: int, batch: Batch, hidden_BLH: Tensor | None, *, sums: bool = False
    ) -> None:
        """Run an open layer up to its experts and call their listener.

        Parameters
        ----------
        index, batch, hidden_BLH
            As in `run_layer`.
        sums
            Whether the experts also sum their outputs, for forward hooks of the module.
        """
        module = self._decoder[index]
        experts = next(m for m in module.modules() if isinstance(m, StreamedExperts))

        def stop(*_: Any) -> None:  # noqa: ANN401
            raise _StopForwardError(None)

        experts.captures_only = not sums
        handle = experts.register_forward_hook(stop)
        try:
            self.run_layer(index, batch, hidden_BLH)
        except _StopForwardError:
            pass
        finally:
            experts.captures_only = False
            handle.remove()

    def logits(
        self, batch: Batch, hidden_BLH: Tensor, position_P: Tensor | None = None
    ) -> Tensor:
        """Return the logits from the output of the last layer.

        Parameters
        ----------
        batch
            The batch's tokens.
        hidden_BLH
            Output of the last layer.
        position_P
            Positions in every sequence; None for all.

        Returns
        -------
        Tensor
            (B, P, V), or (B, L, V).
        """
        self._active, self._feed, self._only_feed = self.num_layers - 1, hidden_BLH, True
        # transformers takes 0 for all positions
        keep = 0 if position_P is None else position_P.to(self.device)
        try:
            logits: Tensor = self._forward(batch, logits_to_keep=keep).logits
        finally:
            self._active, self._feed, self._only_feed = None, None, False
        return logits

    def mixers(self, index: int) -> list[nn.Module]:
        """Return the layer's costly modules outside the MoE block, the mixers.

        Mixers are direct children with matrices, such as all forms of attention.
        Their outputs do not depend on the experts, so an `AttentionCache` can replay
        them when the layer runs again with other experts.
        """
        experts = find_fused_experts(self._decoder[index])[1]
        apart = {experts, self.router(index)}
        return [
            child
            for child in self._decoder[index].children()
            if apart.isdisjoint(child.modules())
            # it is cheap, and it returns several tensors
            and not mixes_states(child)
            and any(p.dim() > 1 for p in child.parameters())
        ]

    def _forward(self, batch: Batch, **options: Any) -> Any:  # noqa: ANN401
        mask, whole = batch.attention_mask_BL, cast(Any, self.model)
        embedding = whole.get_input_embeddings()
        if embedding.weight.is_meta:  # Llama 4 moves ids to the table's device
            rows = torch.empty(0, self._width, dtype=self.dtype, device=self.device)
            embedding.weight = nn.Parameter(rows, requires_grad=False)
        with torch.no_grad():
            self._forget()
            return self.model(
                input_ids=batch.input_ids_BL.to(self.device),
                attention_mask=None if mask is None else mask.to(self.device),
                # linear attention is silently wrong if its cache is written twice
                use_cache=False,
                **options,
            )

    def _relay(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def relayed(hidden_BLH: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            if index != self._active:
                return (hidden_BLH, None) if self._is_tuple else hidden_BLH
            if self._feed is not None:
                hidden_BLH = self._apart(self._feed)
            if self._only_feed:
                return (hidden_BLH, None) if self._is_tuple else hidden_BLH
            output = forward(hidden_BLH, *args, **kwargs)
            if self._is_tuple:
                output = output[0]
            if not isinstance(output, Tensor):
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} passes more than hidden states between layers"
                )
            raise _StopForwardError(output.flatten(2))

        return relayed

    def _apart(self, hidden_BLH: Tensor) -> Tensor:
        """Return hidden states in the shape of the model's layers, with an axis of states."""
        shape = *hidden_BLH.shape[:2], *self._states, -1
        return hidden_BLH.to(self.device, non_blocking=True).reshape(shape)

    @torch.no_grad()
    def _with_next_tokens(self, index: int, batch: Batch, hidden_BLH: Tensor) -> Tensor:
        """Return the states that enter a multi-token-prediction layer.

        The last token of a sequence gets the first token as its next one; no earlier token
        sees it, and `calibration.tokens.mask_without_next` masks it.
        """
        model, layer = cast(Any, self.model), cast(Any, self._decoder[index])
        assert self.final_norm is not None
        hidden_BLH = self._apart(hidden_BLH)
        if layer.next_token.is_normed:
            hidden_BLH = self.final_norm(hidden_BLH)
        next_BL = batch.input_ids_BL.to(self.device).roll(-1, dims=1)
        joined_BLH: Tensor = layer.next_token(hidden_BLH, model.get_input_embeddings()(next_BL))
        return joined_BLH.flatten(2)

    def _read(self, tensors: Tensors, name: str, dtype: torch.dtype) -> Tensor:
        """Return a tensor: floats as stored, quantized matrices decoded to `dtype`."""
        if name not in self.quantized:
            return tensors[name]
        stored = self.quantized[name]
        return tensors.matrix(stored, None, dtype, lambda part: part.to(self.device))

    def _fill(self, keys: Mapping[str, tuple[str, ...]], tensors: Tensors) -> None:
        for target, names in keys.items():
            dtype = dtype_of(self.model, target, self.dtype)
            values = [self._read(tensors, name, dtype) for name in names]
            value = values[0] if len(values) == 1 else torch.cat(values)
            put_tensor(self.model, target, value.to(self.device, dtype))
