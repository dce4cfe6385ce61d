"""How far each layer of a compressed model is from the original's, in the original's terms.

Both models go through the tokens side by side. With F a layer of the original, G the
compressed one, x what enters it in the original and y in the compressed model::

    own     ||G(x) - F(x)|| / ||F(x)||      the layer's own error
    inside  ||G(y) - F(y)|| / ||F(y)||      the same, on what it gets in its model
    total   ||G(y) - F(x)|| / ||F(x)||      with all errors before it

over all tokens that are no padding, as one vector. What leaves a layer includes what
entered it (the residual), so shares of the layer's own work are larger.
"""

import math
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ream_stream import files
from ream_stream.calibration.tokens import Tokens
from ream_stream.checkpoint.reader import Checkpoint
from ream_stream.compression.file_lock import claimed
from ream_stream.errors import DamagedError, UsageError
from ream_stream.events import Evaluating, Report, Step, no_report
from ream_stream.model.batches import Batches
from ream_stream.model.families import family_of
from ream_stream.model.meta_model import get_tensor
from ream_stream.model.streamed_model import Batch, StreamedModel

from .forward import States, check_vocabulary, conditions, identity

_RUNS = ("original", "compressed")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerError:
    """Relative differences of what leaves one layer."""

    own: float
    """Error of the layer alone: both models' layers get the original's states."""

    inside: float
    """Error of the layer in place: both models' layers get the compressed model's states."""

    total: float
    """Error with earlier layers' errors: each model's layer gets its own states."""


def layer_errors(
    checkpoint: Checkpoint,
    original: Checkpoint,
    tokens: Tokens,
    work: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    batch_sequences: int,
    report: Report = no_report,
) -> tuple[LayerError, ...]:
    """Compare two checkpoints layer by layer; stopped or killed, the same call goes on.

    Parameters
    ----------
    checkpoint, original
        Of as many layers, equally wide.
    tokens
        What they are run on.
    work
        Folder in which it has a folder of its own, removed at the end.
    dtype, device, batch_sequences, report
        As in `evaluate.evaluate`.

    Raises
    ------
    UsageError
        The models have different numbers of layers, or the tokens are not theirs.
    InterruptedRunError
        `report` asked to stop.
    """
    models = [_model(each, dtype, device) for each in (original, checkpoint)]
    widths = {get_tensor(m.model.get_input_embeddings(), "weight").shape for m in models}
    if len(widths) > 1 or models[0].num_layers != models[1].num_layers:
        raise UsageError(
            f"{checkpoint.folder} and {original.folder} have other layers: their outputs "
            "cannot be compared"
        )
    check_vocabulary(tokens, widths.pop()[0])
    batch = min(tokens.num_sequences, batch_sequences)
    told = {
        "checkpoints": [identity(checkpoint), identity(original)],
        **conditions(tokens, dtype, device, batch),
    }
    folder = work / "layers"
    with claimed(folder):
        shape = (tokens.num_sequences, tokens.sequence_length, models[0].hidden_size)
        states = States(folder / "states", told, shape, dtype, batch)
        batches = Batches(tokens, batch)
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(model.open_outside())
            layers, done = models[0].num_layers, len(states.records)
            name = f"both, layer by layer: {checkpoint.folder.name}"
            report(Evaluating(name=name, layers=layers, skipped=done))
            for index in range(done, layers):
                _layer(models, states, batches, index, report)
        found = _errors_of(states, folder / "states")
        files.remove(folder)
    return found


def _errors_of(states: States, folder: Path) -> tuple[LayerError, ...]:
    try:
        return tuple(LayerError(**record) for record in states.records)
    except TypeError as error:
        raise DamagedError(f"{folder} is damaged: delete it and start over") from error


def _model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> StreamedModel:
    family_of(checkpoint.config)
    return StreamedModel(checkpoint, dtype, device)


def _layer(
    models: list[StreamedModel], states: States, batches: Batches, index: int, report: Report
) -> None:
    """Run a layer of both models on what enters it in either."""
    readers = [states.reader(run, index) for run in _RUNS]
    writers = [states.writer(run, index + 1) for run in _RUNS]
    square = dict.fromkeys(("own", "inside", "total", "original", "seen"), 0.0)
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(model.open_layer(index))
        for writer in writers:
            stack.enter_context(writer)
        for number, batch in enumerate(batches):
            x, y = (None if reader is None else reader.read(number) for reader in readers)
            first, second = (model.run_layer(index, batch, x) for model in models)
            writers[0].write(number, first)
            if y is None:  # the embeddings are the same
                third, fourth = first, second
            else:
                third, fourth = (model.run_layer(index, batch, y) for model in models)
            writers[1].write(number, fourth)
            for name, one, other in (
                ("own", second, first),
                ("inside", fourth, third),
                ("total", fourth, first),
                ("original", first, None),
                ("seen", third, None),
            ):
                square[name] += _square(one, other, batch)
            report(Step(layer=index, phase="propagate", done=number + 1, total=len(batches)))
    for writer in writers:
        writer.publish()
    error = LayerError(
        own=math.sqrt(square["own"] / square["original"]),
        inside=math.sqrt(square["inside"] / square["seen"]),
        total=math.sqrt(square["total"] / square["original"]),
    )
    states.commit(asdict(error), _RUNS)


def _square(one_BLH: Tensor, other_BLH: Tensor | None, batch: Batch) -> float:
    """Return the squared norm of a difference over the tokens of a batch."""
    total = 0.0
    for row, one_LH in enumerate(one_BLH):
        gap_LH = one_LH.double() if other_BLH is None else one_LH.double() - other_BLH[row]
        if batch.attention_mask_BL is not None:
            gap_LH = gap_LH[batch.attention_mask_BL[row].bool().to(gap_LH.device)]
        total += float(gap_LH.square().sum())
    return total
