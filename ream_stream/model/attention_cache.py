"""Outputs of a layer's attention, kept so that it runs once for all passes over a layer.

Attention outputs do not depend on the experts: the compressed layer gets the same hidden
states, so its attention would compute the same bits again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .batch_store import BatchStore


class AttentionCache:
    """Keeps the outputs of one layer's mixers, batch by batch.

    Parameters
    ----------
    make
        Makes a store; called once for each mixer, with a name.
    """

    def __init__(self, make: Callable[[str], BatchStore]) -> None:
        self._make = make
        self._tapes: list[_Tape] = []

    @contextmanager
    def through(self, mixers: Sequence[nn.Module]) -> Iterator[None]:
        """Record the first pass over all batches, and play it back in every later one.

        A pass that only observes experts ends there, so later passes run the mixers after them.
        """
        if not self._tapes:
            names = [f"mixer-{number}" for number in range(len(mixers))]
            self._tapes = [_Tape(self._make(name)) for name in names]
            handles = [
                module.register_forward_hook(tape.recorder())
                for module, tape in zip(mixers, self._tapes, strict=True)
            ]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()
            return
        known = [(m, t) for m, t in zip(mixers, self._tapes, strict=True) if t.length]
        for module, tape in known:
            module.forward = tape.player()
        try:
            yield
        finally:
            for module, _ in known:
                del module.forward


def main_output(output: Any) -> Tensor:  # noqa: ANN401 - whatever a module returns
    """Return the first tensor of an output; nothing reads the attention weights after it."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


class _Tape:
    """Recorded outputs of one mixer."""

    def __init__(self, store: BatchStore) -> None:
        self._store = store
        self._beside: int | None = None
        self._device = torch.device("cpu")
        self.length = 0

    def recorder(self) -> Callable[..., None]:
        def record(_module: nn.Module, _args: Any, output: Any) -> None:  # noqa: ANN401
            tensor = main_output(output)
            self._beside = len(output) - 1 if isinstance(output, tuple) else None
            self._device = tensor.device
            self._store.put(self.length, tensor)
            self.length += 1

        return record

    def player(self) -> Callable[..., Any]:
        number = 0

        def play(*_args: Any, **_kwargs: Any) -> Any:  # noqa: ANN401
            nonlocal number
            tensor = self._store.get(number).to(self._device)
            number += 1
            return tensor if self._beside is None else (tensor, *[None] * self._beside)

        return play
