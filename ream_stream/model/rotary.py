"""Rotary embeddings that keep what they worked out from one batch to the next.

Those of dynamic and long scaling choose their frequencies by the longest sequence so far.
What a batch gives must not depend on what ran before: after a resume, or with batches of
another size, something else did.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def forgetting(model: nn.Module) -> Callable[[], None]:
    """Return what brings the rotary embeddings of a model back to what they are now.

    Parameters
    ----------
    model
        On which no forward ran yet.
    """
    kept = [
        (module, dict(vars(module)), _cloned(module._buffers))
        for module in model.modules()
        if hasattr(module, "rope_type")
    ]

    def forget() -> None:
        for module, values, buffers in kept:
            state: dict[str, Any] = vars(module)
            state.clear()
            state.update(values)
            state["_buffers"].update(_cloned(buffers))

    return forget


def _cloned(buffers: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    # they are written to in place
    return {name: buffer.clone() for name, buffer in buffers.items() if buffer is not None}
