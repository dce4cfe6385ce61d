"""The matrix as Markdown: a row a source, a column a client, reasons below."""

from collections.abc import Mapping, Sequence

from answers import Cell


def printed(
    cells: Sequence[Cell], versions: Mapping[str, str], absent: Mapping[str, str]
) -> list[str]:
    """Return the lines of the tables."""
    clients = list(dict.fromkeys(each.client for each in cells))
    sources = list(dict.fromkeys(each.source for each in cells))
    rows = [["source", *(f"{name} {versions.get(name, '')}".strip() for name in clients)]]
    rows.append(["---"] * len(rows[0]))
    notes: dict[str, None] = {}
    for source in sources:
        row = [source]
        for client in clients:
            group = [each for each in cells if (each.source, each.client) == (source, client)]
            row.append(_summary(group))
            for each in group:
                wrong = f"{client}, {source}, {each.model}: "
                if not each.ok:
                    notes[wrong + each.text] = None
                for warning in each.warnings:
                    notes[f"{wrong}warns `{warning}`"] = None
        rows.append(row)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", *(f"- {note}" for note in notes)]
    lines += [f"- {client} was not tried: {reason}" for client, reason in absent.items()]
    return lines


def _summary(cells: Sequence[Cell]) -> str:
    source, outputs = cells[0], cells[1:]
    if source.difference is None:
        return "does not load the source"
    good = [each for each in outputs if each.ok]
    worst = max((each.difference or 0.0 for each in outputs), default=0.0)
    names = ", ".join(each.model for each in good) or "none"
    if len(good) == len(outputs):
        return f"{names}: {worst:.0e} (source {source.difference:.0e})"
    return f"{names}; not {', '.join(each.model for each in outputs if not each.ok)}"
