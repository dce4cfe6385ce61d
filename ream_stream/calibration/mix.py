"""Which texts a token set is made of, in which shares.

A part is written ``NAME=SOURCE:WEIGHT``; name and weight may be left out. A YAML file
has the same as a mapping of names::

    code: {source: ./src, weight: 0.7}
    math: {source: problems.parquet, weight: 0.3, field: problem}

Nothing here reads the sources: `calibration.sources` does.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from ream_stream.errors import UsageError
from ream_stream.untrusted import MAX_YAML_CHARACTERS, parse_yaml

HUB = "hf:"
"""Prefix of a source on the hub: ``hf:OWNER/NAME/PATTERN``."""

BUILTIN = "builtin:"
"""Prefix of a text that comes with the package: ``builtin:general``, ``code`` or ``math``."""

BUILTIN_NAMES = ("general", "code", "math")
"""Texts that come with the package."""

MIXES: Mapping[str, Mapping[str, float]] = MappingProxyType({
    f"general-{general:02d}-math-{math:02d}-code-{code:02d}": MappingProxyType(
        {"general": general / 100, "math": math / 100, "code": code / 100}
    )
    for general, math, code in (
        (30, 30, 30), (50, 50, 0), (50, 0, 50), (0, 50, 50), (20, 50, 30),
        (10, 80, 10), (0, 70, 30), (20, 25, 55), (10, 10, 80), (0, 30, 70),
    )
})  # fmt: skip
"""The ten mixes of REAM (arXiv 2604.04356), which numbers them; these names are ours.

Its general text is C4, its mathematics NuminaMath, its code The-Stack-Smol, and the
last mix is its default. Weights are shares of the sequences, up to a common factor.
"""

_SPEC = re.compile(
    r"(?:(?P<name>[A-Za-z0-9_.-]+)=)?(?P<source>.+?)(?::(?P<weight>\d+(?:\.\d*)?|\.\d+))?"
)
_FIELDS = frozenset({"source", "weight", "field"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One text of a mix; its name is a domain of the tokens."""

    name: str
    """Name of the domain."""

    source: str
    """Path of a file or folder, or `HUB` followed by the dataset and the file pattern."""

    weight: float = 1.0
    """Relative share of the sequences."""

    field: str | None = None
    """Field of a record that holds the text; None for the common text field."""

    @property
    def is_tokens(self) -> bool:
        """Tell whether it is a token file."""
        return self.source.lower().endswith(".safetensors")


def parse_part(text: str) -> Part:
    """Return the part that ``NAME=SOURCE:WEIGHT`` means; a path that exists is taken whole.

    Raises
    ------
    UsageError
        There is no such file, folder or built-in text.
    """
    match = _SPEC.fullmatch(text)
    if _exists(text) or match is None:
        return Part(name=Path(text).stem, source=text)
    source = match["source"]
    if _is_path(source) and not _exists(source):
        raise UsageError(
            f"{source}: there is no such file or folder; a part of a mix is written "
            "NAME=SOURCE:WEIGHT"
        )
    weight = 1.0 if match["weight"] is None else float(match["weight"])
    name = match["name"] or Path(source.removeprefix(BUILTIN)).stem
    return Part(name=name, source=source, weight=weight)


def parts_of(texts: Sequence[str], *, mix: str | None = None) -> tuple[Part, ...]:
    """Return the parts of a mix, files of parts read.

    Parameters
    ----------
    texts
        Parts as they are written, or paths of YAML files that list them.
    mix
        Key of `MIXES`: its weights count instead of the parts' own.

    Raises
    ------
    UsageError
        A file is not a list of parts, names are taken twice, no weight is above 0, or the
        parts are not those of the mix.
    """
    parts: list[Part] = []
    for text in texts:
        path = Path(text)
        is_list = path.suffix.lower() in {".yaml", ".yml"} and _exists(text) and path.is_file()
        parts += _read(path) if is_list else [parse_part(text)]
    names = [part.name for part in parts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(
            f"two parts of the mix are called {twice[0]}; name them: NAME=SOURCE:WEIGHT"
        )
    if mix is not None:
        parts = _weighted(parts, mix)
    kept = tuple(part for part in parts if part.weight > 0)
    if parts and not kept:
        raise UsageError("no part of the mix has a weight above 0")
    return kept


def shares(parts: Sequence[Part], total: int) -> list[int]:
    """Return how many of `total` sequences each part gives, by largest remainders.

    Raises
    ------
    UsageError
        A part would give none.
    """
    weights = sum(part.weight for part in parts)
    exact = [total * part.weight / weights for part in parts]
    counts = [int(value) for value in exact]
    order = sorted(range(len(parts)), key=lambda n: (counts[n] - exact[n], n))
    for number in order[: total - sum(counts)]:
        counts[number] += 1
    if 0 in counts:
        name = parts[counts.index(0)].name
        raise UsageError(f"{name} gives none of {total} sequences; raise its weight")
    return counts


def _is_path(source: str) -> bool:
    """Tell whether a source is a path, not a name.

    Raises
    ------
    UsageError
        It names a built-in text that there is not.
    """
    if source.startswith(BUILTIN) and source.removeprefix(BUILTIN) not in BUILTIN_NAMES:
        known = ", ".join(BUILTIN + name for name in BUILTIN_NAMES)
        raise UsageError(f"{source}: there are {known}")
    return not source.startswith((HUB, BUILTIN))


def _exists(source: str) -> bool:
    try:
        return Path(source).exists()
    except OSError:  # what a file system takes for no name at all, such as a long one
        return False


def _weighted(parts: Sequence[Part], mix: str) -> list[Part]:
    weights = MIXES[mix]
    wanted = {name for name, weight in weights.items() if weight > 0}
    names = {part.name for part in parts}
    if not wanted <= names <= set(weights):
        raise UsageError(
            f"--mix {mix} is of parts called {', '.join(sorted(wanted))}, not of "
            f"{', '.join(sorted(names)) or 'none'}; name them: NAME=SOURCE"
        )
    return [replace(part, weight=weights[part.name]) for part in parts]


def _read(path: Path) -> list[Part]:
    """Read a YAML file of parts; sources in it are relative to its folder."""
    try:
        with path.open(encoding="utf-8") as file:
            value = parse_yaml(file.read(MAX_YAML_CHARACTERS + 1))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not YAML that can be read ({error})") from error
    if not isinstance(value, dict) or not value:
        raise UsageError(f"{path}: not a mapping of names, such as code: {{source: ./src}}")
    return [_listed(path, str(name), fields) for name, fields in value.items()]


def _listed(path: Path, name: str, fields: object) -> Part:
    where = f"{path}: {name}"
    if not isinstance(fields, dict) or "source" not in fields or not _FIELDS.issuperset(fields):
        raise UsageError(f"{where} has source and, if wanted, weight and field; no others")
    source, weight = fields["source"], fields.get("weight", "1")
    field = fields.get("field") or None
    if not isinstance(source, str) or not isinstance(field, str | None):
        raise UsageError(f"{where}: source and field are text")
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise UsageError(f"{where}: weight {weight!r} is not a number from 0 on")
    if _is_path(source):
        source = str(path.parent / source)
        if not _exists(source):
            raise UsageError(f"{where}: {source}: there is no such file or folder")
    return Part(name=name, source=source, weight=number, field=field)
