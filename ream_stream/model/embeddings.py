"""Embedding table and output matrix of a model, read from mapped files by rows."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

HEAD_BYTES = 64_000_000
"""Size of the pieces in which the output matrix is used."""


def embed_rows(
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


def project_pieces(bias: Tensor | None, matrix_VH: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a forward of the output matrix that converts a piece of its rows at a time."""

    def project(hidden: Tensor) -> Tensor:
        vocabulary, width = matrix_VH.shape
        rows = max(1, HEAD_BYTES // (width * hidden.element_size()))
        logits = hidden.new_empty(*hidden.shape[:-1], vocabulary)
        for start in range(0, vocabulary, rows):
            piece = matrix_VH[start : start + rows].to(hidden.device, hidden.dtype)
            logits[..., start : start + rows] = functional.linear(hidden, piece)
        return logits if bias is None else logits + bias

    return project
