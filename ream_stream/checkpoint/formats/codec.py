"""What a codec is: one matrix in, its stored tensors out, and back.

Letters in shapes: R rows, C columns, G groups of columns in a row, N columns of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from ream_stream import deferred
from ream_stream.checkpoint.header import torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")

FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One of the tensors that store a matrix."""

    suffix: str
    """Suffix of the tensor's name after the matrix's prefix: ``.weight_scale``."""

    dtype: str
    """Dtype of the tensor in the safetensors format's spelling."""

    shape: tuple[int, ...]
    """Shape of the tensor of one matrix; a stack adds the number of matrices in front."""


class Codec(Protocol):
    """Storage format of one matrix; a frozen dataclass that holds the scheme's parameters.

    A matrix of a stack is coded like any other: the caller gives slices of the
    stacked tensors. Codecs work on the device of what they get and keep no state.
    """

    scheme: ClassVar[str]
    """Name of the scheme: a key of `SCHEMES`."""

    @property
    def multiple(self) -> int:
        """Divisor of the rows and columns of matrices that are cut to another size."""
        ...

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        """Return the tensors that store a (rows, cols) matrix, the weight itself first."""
        ...

    def size(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """Return rows and columns from the parts' shapes by suffix, which are not checked."""
        ...

    def decode(
        self, parts: Mapping[str, Tensor], rows: int, cols: int, dtype: torch.dtype
    ) -> Tensor:
        """Return the (rows, cols) matrix: multiplied in float32, rounded once to `dtype`."""
        ...

    def encode(
        self, matrix_RC: Tensor, kept: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the parts of a matrix, by suffix.

        Scales given in `kept` are used as they are and the others chosen. With all
        scales of a stored matrix kept, encoding what was decoded gives its bytes again.
        Without them, give float32: a scale taken from values that were rounded to
        bfloat16 is itself off by up to 2**-9.

        Raises
        ------
        ValueError
            A scale has to be chosen for values that are not finite.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Plain:
    """Floats as they are."""

    scheme: ClassVar[str] = "plain"

    dtype: str = "BF16"
    """Dtype of the matrix, one of `FLOATS`."""

    suffix: str = ".weight"
    """Suffix of the tensor's name; empty for a fused parameter, which has no ``.weight``."""

    @property
    def multiple(self) -> int:
        """See `Codec.multiple`."""
        return 1

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        """See `Codec.parts`."""
        return (Part(suffix=self.suffix, dtype=self.dtype, shape=(rows, cols)),)

    def size(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """See `Codec.size`."""
        rows, cols = shapes[self.suffix]
        return rows, cols

    def decode(
        self, parts: Mapping[str, Tensor], rows: int, cols: int, dtype: torch.dtype
    ) -> Tensor:
        """See `Codec.decode`."""
        return parts[self.suffix].reshape(rows, cols).to(dtype)

    def encode(
        self,
        matrix_RC: Tensor,
        kept: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """See `Codec.encode`; there are no scales to keep."""
        return {self.suffix: matrix_RC.to(torch_dtype(self.dtype))}


def require_finite(largest: Tensor) -> None:
    """Refuse to choose scales where the largest magnitudes of groups are not finite.

    Raises
    ------
    ValueError
        One of them is infinite or not a number.
    """
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("a matrix with values that are not finite cannot be quantized")
