"""The routed experts of one layer as they are stored: one description to read and to write by.

An expert's matrix is a view into a stored one: by itself or one of a stack, in the
file's orientation or the other, gate and up apart, one above the other or row by row
in turn. What is stored is decoded and encoded by the codec of its scheme.

Letters in shapes: E experts, H hidden, I inner; R rows and C columns as stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from ream_stream import deferred
from ream_stream.method.expert import Expert

from .formats import Codec, Nvfp4, Part, Plain, Stored
from .header import ITEM_BYTES, TensorEntry

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")

Send = Callable[["Tensor"], "Tensor"]
"""Moves a stored tensor to the device that decodes or uses it."""


def stay(tensor: Tensor) -> Tensor:
    """Leave a tensor where it is; a `Send`."""
    return tensor


class Tensors(Protocol):
    """Tensors of a checkpoint."""

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor as it is stored."""

    def ahead(self, stack: ExpertStack, expert: int) -> None:
        """Prepare for an expert that is asked for soon."""

    def matrix(
        self, stored: Stored, index: int | None, dtype: torch.dtype, send: Send = stay
    ) -> Tensor:
        """Return a matrix: floats as they are stored, others decoded to `dtype`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertMatrix:
    """One stored matrix, or vector, of each expert."""

    parts: tuple[str, ...]
    """Parts of the matrix: ``gate``, ``up``, ``down`` or gate and up; ``_bias`` for biases."""

    prefix: str
    """Prefix of the tensor names of the stack: ``model.layers.3.mlp.experts``."""

    leaf: str
    """Name of the matrix after the prefix: ``gate_up_proj``."""

    stored: Stored
    """Scheme, rows and columns of the stored matrix; of expert 0 if experts are numbered."""

    numbered: bool
    """Whether each expert has tensors of its own; otherwise one tensor holds all experts."""

    transposed: bool = False
    """Whether the rows of the matrix are inputs."""

    interleaved: bool = False
    """Whether gate and up rows alternate; otherwise all gate rows come first."""

    activation: tuple[Part, ...] = ()
    """Activation scales stored with the matrix."""

    @property
    def is_vector(self) -> bool:
        """Whether it is a bias."""
        return self.parts[0].endswith("_bias")

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        rows, cols = self.stored.rows, self.stored.cols
        return (cols, rows) if self.transposed else (rows, cols)

    @property
    def tensors(self) -> tuple[Part, ...]:
        """Return the tensors of one expert."""
        parts = self.stored.codec.parts(self.stored.rows, self.stored.cols)
        if self.is_vector:
            parts = tuple(replace(part, shape=part.shape[:1]) for part in parts)
        return (*parts, *self.activation)

    def place(self, expert: int) -> str:
        """Return the prefix of the names of an expert's tensors."""
        number = f".{expert}" if self.numbered else ""
        return f"{self.prefix}{number}.{self.leaf}"

    def read(
        self, tensors: Tensors, expert: int, dtype: torch.dtype, send: Send = stay
    ) -> dict[str, Tensor]:
        """Return the parts of one expert: views of floats as stored, or decoded to `dtype`."""
        stored = replace(self.stored, prefix=self.place(expert))
        matrix_RC = tensors.matrix(stored, None if self.numbered else expert, dtype, send)
        if self.is_vector:
            matrix_RC = matrix_RC.reshape(-1)
        elif self.transposed:
            matrix_RC = matrix_RC.T
        if len(self.parts) == 1:
            return {self.parts[0]: matrix_RC}
        if self.interleaved:
            return {part: matrix_RC[n::2] for n, part in enumerate(self.parts)}
        return dict(zip(self.parts, matrix_RC.chunk(2), strict=True))

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the matrix that is stored for an expert, the inverse of `read`."""
        values = [parts[part] for part in self.parts]
        if self.interleaved:
            matrix_RC = torch.stack(values, dim=1).flatten(0, 1)
        else:
            matrix_RC = torch.cat(values) if len(values) > 1 else values[0]
        if self.is_vector:
            return matrix_RC[:, None]
        return matrix_RC.T.contiguous() if self.transposed else matrix_RC

    def encode(
        self, matrix_RC: Tensor, kept: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the tensors that store a matrix, by suffix; see `Codec.encode`."""
        encoded = self.stored.codec.encode(matrix_RC, kept)
        if self.is_vector:
            encoded = {suffix: tensor[:, 0] for suffix, tensor in encoded.items()}
        return encoded

    def resized(self, before: int, after: int) -> ExpertMatrix:
        """Return the matrix of an expert of inner width `after` in the place of `before`."""
        outputs, inputs = self.shape
        if self.parts == ("down",):
            inputs = after
        elif self.parts != ("down_bias",):
            outputs = outputs // before * after
        rows, cols = (inputs, outputs) if self.transposed else (outputs, inputs)
        return replace(self, stored=replace(self.stored, rows=rows, cols=cols))

    def decoded(self, dtype: str) -> ExpertMatrix:
        """Return the matrix as stored floats, under the name that transformers reads."""
        codec, rows, cols = self.stored.codec, self.stored.rows, self.stored.cols
        if isinstance(codec, Plain):
            plain: Codec = replace(codec, dtype=dtype)
            return replace(self, stored=replace(self.stored, codec=plain))
        # gpt-oss has its blocks in rows, and its floats in columns
        turned = codec.parts(rows, cols)[0].suffix == "_blocks"
        plain = Plain(dtype=dtype, suffix="" if turned else ".weight")
        rows, cols = (cols, rows) if turned else (rows, cols)
        stored = replace(self.stored, codec=plain, rows=rows, cols=cols, activation=())
        return replace(self, stored=stored, transposed=self.transposed or turned, activation=())


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """One tensor of a stack."""

    matrix: int
    """Index of the matrix in the stack."""

    part: Part
    """Part of the stored matrix that the tensor holds."""

    expert: int | None
    """Index of the expert; None if the tensor holds all experts."""

    count: int
    """Number of experts in the stack."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""
        return self.part.shape if self.expert is not None else (self.count, *self.part.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertStack:
    """The routed experts of one layer."""

    prefix: str
    """Prefix of the tensor names of the stack: ``model.layers.3.mlp.experts``."""

    count: int
    """Number of experts, E."""

    inner: int
    """Inner width of an expert, I."""

    hidden: int
    """Hidden size: width of an expert's input and output, H."""

    matrices: tuple[ExpertMatrix, ...]
    """Stored matrices of the experts."""

    @property
    def block(self) -> str:
        """Return the prefix of the MoE block, with its dot: ``model.layers.3.mlp.``."""
        return self.prefix.removesuffix(".experts") + "."

    @property
    def dtype(self) -> str:
        """Return the dtype of the matrices, in the format's spelling."""
        return self.matrices[0].tensors[0].dtype

    @property
    def scheme(self) -> str:
        """Return the storage scheme of the matrices."""
        return self.matrices[0].stored.codec.scheme

    @property
    def layout(self) -> str:
        """Return a word for how experts lie."""
        first = self.matrices[0]
        if first.numbered:
            return "one by one"
        fused = "stacked, fused" if len(first.parts) == 2 else "stacked"
        turned = ", transposed" if first.transposed else ""
        return fused + turned + (", interleaved" if first.interleaved else "")

    @property
    def is_gated(self) -> bool:
        """Whether an expert has a gate projection."""
        return any("gate" in matrix.parts for matrix in self.matrices)

    @property
    def has_bias(self) -> bool:
        """Whether an expert has biases."""
        return any(matrix.is_vector for matrix in self.matrices)

    @property
    def sizes(self) -> list[int]:
        """Return the bytes of each tensor of one expert."""
        return [
            math.prod(part.shape) * ITEM_BYTES[part.dtype]
            for matrix in self.matrices
            for part in matrix.tensors
        ]

    def slots(self) -> dict[str, Slot]:
        """Return all its tensors by name."""
        slots = {}
        for number, matrix in enumerate(self.matrices):
            for expert in range(self.count) if matrix.numbered else (None,):
                for part in matrix.tensors:
                    slots[matrix.place(expert or 0) + part.suffix] = Slot(
                        matrix=number, part=part, expert=expert, count=self.count
                    )
        return slots

    def expert_slots(self, expert: int) -> Iterator[tuple[str, int | None]]:
        """Yield the tensors that hold an expert, and where in a stack it is."""
        for matrix in self.matrices:
            for part in matrix.tensors:
                yield matrix.place(expert) + part.suffix, None if matrix.numbered else expert

    def read(self, tensors: Tensors, expert: int) -> Expert:
        """Return the matrices of one expert: floats without a copy, others in float32."""
        parts: dict[str, Tensor] = {}
        for matrix in self.matrices:
            if not matrix.is_vector:
                parts |= matrix.read(tensors, expert, torch.float32)
        up_IH = parts["up"]
        # an expert without a gate has a gate without columns
        return Expert(
            gate_IH=parts.get("gate", up_IH[:, :0]), up_IH=up_IH, down_HI=parts["down"]
        )

    def stored_down(self, down_HI: Tensor) -> Tensor:
        """Return a down projection after encoding and decoding, in float32."""
        matrix = next(m for m in self.matrices if m.parts == ("down",))
        matrix_RC = matrix.join({"down": down_HI})
        codec, (rows, cols) = matrix.stored.codec, matrix_RC.shape
        decoded_RC = codec.decode(codec.encode(matrix_RC), rows, cols, torch.float32)
        return decoded_RC.T if matrix.transposed else decoded_RC

    def coupled(self, number: int) -> Sequence[ExpertMatrix]:
        """Return the matrices that share the outer scale of one, itself included; or none."""
        matrix = self.matrices[number]
        if not isinstance(matrix.stored.codec, Nvfp4) or "down" in matrix.parts:
            return ()
        return [m for m in self.matrices if not m.is_vector and "down" not in m.parts]

    def resized(self, count: int, inner: int) -> ExpertStack:
        """Return the description of another number of such experts, of another width."""
        matrices = self.matrices
        if inner != self.inner:
            matrices = tuple(matrix.resized(self.inner, inner) for matrix in matrices)
        return replace(self, count=count, inner=inner, matrices=matrices)

    def decoded(self, dtype: str) -> ExpertStack:
        """Return the description of such experts as floats."""
        return replace(self, matrices=tuple(m.decoded(dtype) for m in self.matrices))


def one_of(entry: TensorEntry, expert: int, count: int) -> tuple[int, int]:
    """Return the first and last offset of one expert of a stacked tensor in its file."""
    size = entry.nbytes // count
    return entry.start + expert * size, entry.start + (expert + 1) * size
