"""How much memory running a layer takes, found without running it.

The layer's own forward is called on tensors that have shapes and no data, and
every tensor that an operation makes is counted from its birth to its death. So
the number holds for any family's attention, and needs the headers alone.

Operations' private scratch is not seen; it is small on the CPU.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import masking_utils

from ream_stream.checkpoint.expert_stack import ExpertStack, Send, stay
from ream_stream.checkpoint.formats import Plain, Stored
from ream_stream.checkpoint.header import torch_dtype
from ream_stream.checkpoint.reader import Checkpoint
from ream_stream.errors import ReamStreamError, UnsupportedModelError
from ream_stream.model.attention_cache import main_output
from ream_stream.model.experts import Routed, StreamedExperts
from ream_stream.model.meta_model import get_tensor, path_of, put_tensor, restored
from ream_stream.model.streamed_model import Batch, StreamedModel

_RESHAPES = {
    *("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze", "transpose", "alias"),
    *("clone", "detach", "_to_copy"),
}
"""Operations of aten that keep the values of their input, except for rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Bytes of the tensors alive at once while a layer runs on a batch, at most.

    What goes in and what the layer holds (weights, buffers of experts) is not
    counted; what comes out is.
    """

    observe: int
    """Bytes of the layer up to its experts, with a listener's statistics."""

    run: int
    """Bytes of the whole layer."""

    outputs: int
    """Bytes of all mixer outputs, which an `AttentionCache` keeps; not alive at once."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors made within the block, and remembers the most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        output = func(*args, **(kwargs or {}))
        given = {_storage(leaf)[0] for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        for leaf in tree_leaves(output):
            if _is_tensor(leaf):
                self._count(leaf, given)
        return output

    def _count(self, tensor: Tensor, given: set[int]) -> None:
        key, storage = _storage(tensor)
        if key in self._known or key in given:
            return
        nbytes = storage.nbytes()
        self._known.add(key)
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, nbytes)

    def _forget(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes


class Additions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows a tensor as long as it is only reshaped, converted, or added to others."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.other: str | None = None
        """The first operation that did something else with it."""
        # held, so that no other tensor gets the place of one of them
        self._known: list[Tensor] = []

    def follow(self, tensor: Tensor) -> None:
        """Follow a tensor from here on."""
        self._known.append(tensor)

    def knows(self, tensor: Tensor) -> bool:
        """Tell whether it is a followed tensor, or one that such a tensor was added to."""
        return any(tensor is known for known in self._known)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        output = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(output) if _is_tensor(leaf)]
        used = [leaf for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)]
        followed = sum(map(self.knows, used))
        if followed and made:
            name = func.overloadpacket.__name__  # type: ignore[attr-defined]
            adds = name in {"add", "add_"} and followed == 1 and len(args) == 2 and not kwargs
            # a factor of the config, which is 1 in most checkpoints
            same = name == "mul" and not _is_tensor(args[1]) and args[1] == 1
            if name in _RESHAPES or adds or same:
                self._known += made
            else:
                self.other = self.other or name
        return output


class Integers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows the values of whole numbers and truths among tensors without data.

    By such a forward chooses what to do: the length of a batch selects the frequencies of
    some rotary embeddings. They are worked out beside, as far as they do not come of what
    has no data.
    """

    LARGEST = 1 << 22
    """Most numbers of a tensor whose values are tracked; masks may be larger."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._values: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        given = (args, kwargs or {})
        used = [leaf for leaf in tree_leaves(given) if _is_tensor(leaf)]
        if func is torch.ops.aten._local_scalar_dense.default and used[0] in self._values:
            with unset_fake_temporarily():
                return self._values[used[0]].item()
        output = func(*args, **given[1])
        if _is_whole(output) and all(leaf in self._values for leaf in used):
            with unset_fake_temporarily():
                args, kwargs = tree_map_only(Tensor, self._values.__getitem__, given)
                self._values[output] = func(*args, **kwargs)
        return output


class _NoData:
    """Stands in for a checkpoint's mapped tensors: the shapes of its headers, no data."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.entries = checkpoint.entries

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        return torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))

    def ahead(self, stack: ExpertStack, expert: int) -> None:
        """There is nothing to read."""

    def matrix(
        self, stored: Stored, index: int | None, dtype: torch.dtype, send: Send = stay
    ) -> Tensor:
        plain = isinstance(stored.codec, Plain)
        stack = () if index is not None or stored.count is None else (stored.count,)
        stored_dtype = torch_dtype(stored.codec.parts(stored.rows, stored.cols)[0].dtype)
        return torch.empty(
            (*stack, stored.rows, stored.cols), dtype=stored_dtype if plain else dtype
        )

    @contextmanager
    def open(self) -> Iterator["_NoData"]:
        """Give the tensors; there is nothing to close."""
        yield self


class Footprints:
    """Runs the layers of a model on tensors without data.

    Parameters
    ----------
    model
        Its layers' shapes are told by headers. It is left as it was.
    """

    def __init__(self, model: StreamedModel) -> None:
        self.model = model
        self._without_data: Any = _NoData(model.checkpoint)
        self._known: dict[tuple[int, int, int, bool], Footprint] = {}
        self._embedding = path_of(self.model.model, self.model.model.get_input_embeddings())
        self._shape_VH = get_tensor(self.model.model, self._embedding + ".weight").shape

    def kinds(self) -> list[int]:
        """Return one layer of each kind: layers of equal shapes need equal memory."""
        entries = self.model.checkpoint.entries
        kinds: dict[tuple[Any, ...], int] = {}
        for layer in self.model.layers:
            names = [target.split(".", 3)[-1] for target in layer.dense]
            shapes = [layer.shape(name, entries) for name in layer.dense_names()]
            kinds.setdefault((tuple(names), tuple(shapes), layer.stack is None), layer.index)
        return list(kinds.values())

    def beyond_adding(self, index: int) -> str | None:
        """Return the operation of layer `index` on expert outputs other than adding them once.

        Returns
        -------
        str or None
            An operation, such as a norm's; None if what leaves the layer is the outputs and
            something that does not depend on them.
        """
        with self._opened(index, 1, 2) as (experts, batch, hidden_BLH), Additions() as added:
            assert experts is not None
            handle = experts.register_forward_hook(
                lambda _m, _args, output: added.follow(output)
            )
            try:
                leaving_BLH = self.model.run_layer(index, batch, hidden_BLH)
            finally:
                handle.remove()
            return added.other or (None if added.knows(leaving_BLH) else "nothing")

    def of(self, index: int, sequences: int, length: int, *, padded: bool = True) -> Footprint:
        """Return the footprint of layer `index` on a batch.

        With padding a mask is made, which is as large as a head's attention weights.
        """
        key = (index, sequences, length, padded)
        if key not in self._known:
            self._known[key] = self._measured(*key)
        return self._known[key]

    def _measured(self, index: int, sequences: int, length: int, padded: bool) -> Footprint:
        model = self.model
        with (
            nullcontext() if padded else _without_masks(),
            self._opened(index, sequences, length) as (experts, batch, hidden_BLH),
        ):
            if experts is None:
                run = _peak(lambda: model.run_layer(index, batch, hidden_BLH))
                return Footprint(observe=0, run=run, outputs=0)
            with _returned(model.mixers(index)) as returned:
                run = _peak(lambda: model.run_layer(index, batch, hidden_BLH))
            experts.listener = _statistics(experts)
            observe = _peak(lambda: model.observe_layer(index, batch, hidden_BLH))
            return Footprint(observe=observe, run=run, outputs=sum(returned))

    @contextmanager
    def _opened(
        self, index: int, sequences: int, length: int
    ) -> Iterator[tuple[StreamedExperts | None, Batch, Tensor]]:
        """Open a layer without data; give its experts, a batch and what enters the layer."""
        model, dtype = self.model, self.model.dtype
        with (
            restored(model.model.modules()),
            FakeTensorMode(allow_non_fake_inputs=True),
            Integers(),
            torch.no_grad(),
        ):
            table_VH = torch.empty(self._shape_VH, dtype=dtype)
            put_tensor(model.model, self._embedding + ".weight", table_VH)
            if model.final_norm is not None:
                weight_H = torch.empty(self._shape_VH[1], dtype=dtype)
                put_tensor(model.final_norm, "weight", weight_H)
            ids_BL = torch.zeros(sequences, length, dtype=torch.int64)
            hidden_BLH = torch.empty(sequences, length, model.hidden_size, dtype=dtype)
            with model.open_layer(index, self._without_data) as experts:
                if experts is not None:
                    experts.dispatch = _all_to_one
                batch = Batch(input_ids_BL=ids_BL, attention_mask_BL=None)
                try:
                    yield experts, batch, hidden_BLH
                except (ReamStreamError, MemoryError):
                    raise
                except Exception as error:  # anything: transformers trusts a config
                    reason = " ".join(str(error).split())
                    raise UnsupportedModelError(
                        f"transformers cannot run layer {index} of the model of config.json: "
                        f"{reason or type(error).__name__}"
                    ) from error


def _peak(work: Callable[[], object]) -> int:
    with LiveBytes() as counter:
        work()
    peak: int = counter.peak
    return peak


@contextmanager
def _without_masks() -> Iterator[None]:
    """Let transformers make no causal masks, as it makes none for a batch without padding.

    Without data it cannot see that no sequences are packed into one, and makes one.
    """
    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find


@contextmanager
def _returned(modules: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Give a list that fills with the bytes of what modules return."""
    found: list[int] = []

    def count(_module: nn.Module, _args: Any, output: Any) -> None:  # noqa: ANN401
        found.append(main_output(output).nbytes)

    handles = [module.register_forward_hook(count) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _all_to_one(index_TK: Tensor, _num_experts: int) -> list[tuple[int, Tensor]]:
    """Send all tokens to one expert: the most that its buffers can be asked for."""
    tokens, top_k = index_TK.shape
    return [(0, torch.arange(tokens) * top_k)]


def _statistics(experts: StreamedExperts) -> Callable[[Routed], None]:
    """Return a listener that takes the memory of the real one."""
    count = experts.weights.stack.count

    def listen(routed: Routed) -> None:
        tokens, top_k = routed.index_TK.shape
        scores_TE = torch.empty(tokens, count)
        wide_TE = torch.empty(tokens, count, dtype=torch.float64)
        sums = torch.empty(8, tokens * top_k, dtype=torch.float64)
        del scores_TE, wide_TE, sums

    return listen


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _is_whole(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and not (value.is_floating_point() or value.is_complex())
        and value.numel() <= Integers.LARGEST
    )


def _storage(tensor: Tensor) -> tuple[int, torch.UntypedStorage]:
    storage = tensor.untyped_storage()
    return storage._cdata, storage
