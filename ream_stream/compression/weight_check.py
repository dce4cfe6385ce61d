"""A layer's weights, read once before it is run: are they numbers, and which bytes are they."""

from ream_stream.errors import DamagedError, NumbersError
from ream_stream.events import Report, Step
from ream_stream.model.finite import not_finite
from ream_stream.planning.plan import LayerPlan

from .context import Context
from .journal import OUTSIDE
from .source_record import TensorDigests, in_order


def check_weights(
    context: Context, layer: LayerPlan, report: Report
) -> dict[str, dict[str, str]]:
    """Read the weights of a layer; with the first layer, also those outside the layers.

    Returns
    -------
    dict[str, dict[str, str]]
        SHA-256 of what was read, by part and file; see `Journal.read`.

    Raises
    ------
    NumbersError
        A weight is NaN or infinite.
    DamagedError
        A table of experts by token id names experts that are not there.
    """
    source, index = context.plan.source, layer.keys.index
    entries = source.entries
    parts = {str(index): layer.keys.names}
    if index == 0:
        parts[OUTSIDE] = tuple(context.source.outside_names)
    done, total = 0, sum(map(len, parts.values()))
    read: dict[str, dict[str, str]] = {}
    with context.timed("check"), source.open() as tensors:
        for part, names in parts.items():
            with TensorDigests(entries) as digests:
                ordered = in_order(entries, names)
                for name, bad in not_finite(tensors, ordered, digests.add):
                    if bad:
                        raise NumbersError(
                            f"{name} in {entries[name].path} holds NaN or infinite numbers "
                            f"(found at layer {index}): fetch the file again",
                            file=entries[name].path.name,
                        )
                    done += 1
                    report(Step(layer=index, phase="check", done=done, total=total))
                read[part] = digests.result()
        table, stack = layer.table, layer.keys.stack
        if table is not None and stack is not None:
            lowest, highest = (int(end) for end in tensors[table].aminmax())
            if lowest < 0 or highest >= stack.count:
                raise DamagedError(
                    f"{table} in {entries[table].path} names experts {lowest} to "
                    f"{highest}, the layer has 0 to {stack.count - 1}: fetch it again"
                )
    return read
