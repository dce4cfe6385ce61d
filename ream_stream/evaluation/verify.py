"""Verification of an output: whether it is whole, and will load.

No damaged file may crash it. What it knows is in the output itself, so it works
on a copy of it on any machine.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ream_stream.errors import ReamStreamError, UsageError
from ream_stream.events import Finding, Report, no_report
from ream_stream.model.finite import is_finite
from ream_stream.planning.serving_rules import CLIENT_NAMES

from .checks import CHECKS, Subject
from .load_checks import LOAD, RUN, cache_scales
from .serving_checks import NUMBERS, client_findings, notes_on_counts
from .source_diff import against as compare


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """Result of a verification."""

    output: Path
    """Folder of the verified checkpoint."""

    findings: tuple[Finding, ...]
    """Findings: one for each passed check of a shard, one for each problem."""

    def __iter__(self) -> Iterator[Finding]:
        """Return the findings one by one."""
        return iter(self.findings)

    @property
    def ok(self) -> bool:
        """Whether all is well."""
        return all(finding.ok for finding in self.findings)

    def facts(self) -> dict[str, Any]:
        """Return the findings as JSON can hold them."""
        return {"ok": self.ok, "findings": [asdict(finding) for finding in self.findings]}


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardCheck:
    """One thing that is true of every shard, and needs its bytes."""

    name: str
    """Subject of the check."""

    good: str
    """Sentence for a shard without problems, with ``{shard}`` for its name."""

    problems: Callable[[Subject, str], Iterator[str]]
    """Yields a sentence for each problem of the named shard."""

    needs: tuple[str, ...] = ()
    """Names of checks that must pass first; otherwise this one finds nothing new."""


def verify(
    output: str | Path,
    *,
    scan: bool = True,
    load: bool = False,
    run: bool = False,
    against: str | Path | None = None,
    clients: Sequence[str] = (),
    report: Report = no_report,
) -> Verification:
    """Check an output folder.

    Parameters
    ----------
    output
        The folder; its work files are not looked at.
    scan
        Whether to read all bytes, for digests and for numbers that are not finite. Without
        it only headers and documents are read.
    load
        Whether to look for the place of every tensor in transformers' class, and for a tensor
        for every place.
    run
        Whether to run some tokens through all layers.
    against
        The checkpoint that it was made from: all that was not merged must be its bytes.
    clients
        Keys of `CLIENT_NAMES`: what these take is checked too. ``transformers`` is what
        `load` does.
    report
        Is told each finding; it may raise `InterruptedRunError`.

    Returns
    -------
    Verification
        Its findings. A check that builds on one that failed is left out.

    Raises
    ------
    UsageError
        There is no such folder, or no such client.
    """
    for client in set(clients) - CLIENT_NAMES.keys():
        raise UsageError(f"{client!r} is none of {', '.join(CLIENT_NAMES)}")
    folder, found = Path(output), []
    compared = () if against is None else compare(folder, Path(against))
    load = load or "transformers" in clients
    checked = _checked(folder, scan=scan, load=load, run=run, clients=clients)
    for finding in chain(checked, compared):
        found.append(finding)
        report(finding)
    return Verification(output=folder, findings=tuple(found))


def _checked(
    output: Path, *, scan: bool, load: bool, run: bool, clients: Sequence[str]
) -> Iterator[Finding]:
    """Yield what is found in an output folder by itself."""
    if not output.is_dir():
        raise UsageError(f"{output} is not a folder")
    subject, failed = Subject(output), set[str]()
    for check in (*CHECKS, *([LOAD] if load else []), *([RUN] if run else [])):
        if failed.isdisjoint(check.needs):
            for finding in _findings(check.name, check.good, check.problems(subject)):
                yield finding
                failed |= set() if finding.ok else {finding.check}
    yield from _notes(subject, failed, load=load)
    if clients and failed.isdisjoint(NUMBERS):
        yield from client_findings(subject, clients)
    if not scan or "headers" in failed:
        return
    for shard in [path.name for path in subject.checkpoint.files()]:
        for each in SHARD_CHECKS:
            if failed.isdisjoint(each.needs):
                good = each.good.format(shard=shard)
                yield from _findings(each.name, good, each.problems(subject, shard))


def _notes(subject: Subject, failed: set[str], *, load: bool) -> Iterator[Finding]:
    """Tell what servers make of the numbers of experts, if they are known and new ones.

    And what is for servers alone, if places were asked for.
    """
    if load and "headers" not in failed and (scales := cache_scales(subject.checkpoint)):
        message = (
            f"{len(scales)} scales of cached keys and values, such as {scales[0]}, have no "
            "place in transformers: servers read them"
        )
        yield Finding(check=LOAD.name, ok=True, is_note=True, message=message)
    if failed.isdisjoint(("manifest", "kept", *NUMBERS)):
        for note in notes_on_counts(subject):
            yield Finding(check="serving", ok=True, is_note=True, message=note)


def _findings(name: str, good: str, problems: Iterator[str]) -> Iterator[Finding]:
    ok = True
    try:
        for problem in problems:
            ok = False
            yield Finding(check=name, ok=False, message=problem)
    except (ReamStreamError, OSError) as error:
        ok = False
        yield Finding(check=name, ok=False, message=str(error))
    except Exception as error:  # noqa: BLE001 - config.json reaches code that is not ours
        ok = False
        yield Finding(check=name, ok=False, message=f"it cannot be checked: {error!r}")
    if ok:
        yield Finding(check=name, ok=True, message=good)


def _digest(subject: Subject, shard: str) -> Iterator[str]:
    with (subject.folder / shard).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != subject.manifest.files[shard].sha256:
        yield f"{shard} has SHA-256 {digest}, which is not the manifest's: its bytes changed"


def _finite(subject: Subject, shard: str) -> Iterator[str]:
    entries = subject.checkpoint.entries.values()
    names = [entry.name for entry in entries if entry.path.name == shard]
    with subject.checkpoint.open() as tensors:
        for name in sorted(names):
            if not is_finite(tensors[name]):
                yield f"{name} in {shard} holds NaN or infinite numbers"


SHARD_CHECKS: tuple[ShardCheck, ...] = (
    ShardCheck(
        name="digest",
        good="{shard} has the bytes that were written",
        problems=_digest,
        needs=("manifest", "sizes", "shards"),
    ),
    ShardCheck(
        name="finite",
        good="{shard} holds finite numbers only",
        problems=_finite,
        needs=("headers",),
    ),
)
"""Checks of each shard in order; the second finds the shard in the page cache."""
