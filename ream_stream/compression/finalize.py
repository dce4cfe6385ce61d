"""The end of a run: every file of the output that is not a shard, in the order that counts.

The index comes after all tensors, and the manifest after the index: a folder
with a manifest is complete.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ream_stream import files
from ream_stream.calibration.tokens import Tokens
from ream_stream.checkpoint.reader import INDEX, QUANTIZATION_FILE
from ream_stream.checkpoint.source_card import CARD
from ream_stream.errors import OtherRunError, UsageError
from ream_stream.file_access import existing
from ream_stream.planning.plan import Plan

from .journal import Journal
from .manifest import MANIFEST, STATISTICS, Manifest, manifest_of
from .model_card import card
from .source_record import check_others
from .statistics import TOKENS
from .workspace import Workspace

_PATH_BYTES = 4096
"""Longest path that Linux takes; other systems take no longer one."""


def output_files(plan: Plan) -> tuple[str, ...]:
    """Return the names of all that a run writes in OUTPUT, in the order it does.

    Those of files in folders have slashes, whatever the system.
    """
    shards = [shard for layer in plan.layers for shard in layer.shards]
    if plan.settings.observes:
        return (*(shard.name for shard in shards), TOKENS, STATISTICS)
    return (
        *(shard.name for shard in [*shards, *plan.outside]),
        "config.json",
        *([QUANTIZATION_FILE] if plan.quantization_file is not None else []),
        *copied_files(plan.source.others),
        INDEX,
        CARD,
        MANIFEST,
    )


def write_rest(plan: Plan, tokens: Tokens, workspace: Workspace, journal: Journal) -> None:
    """Write config, other files, index, model card and manifest.

    Everything written here follows from the plan and the journal alone, without
    times or places, so doing it again gives the same bytes.
    """
    output, source = workspace.output, plan.source
    check_others(source, journal.source)
    written = {"config.json": files.write_json(output / "config.json", plan.config)}
    if plan.quantization_file is not None:
        path = output / QUANTIZATION_FILE
        written[path.name] = files.write_json(path, plan.quantization_file)
    for name in copied_files(journal.source.others):
        files.make_directory((output / name).parent)
        then = journal.source.others[name]
        path, whole = output / name, source.other(name)
        written[name] = files.write_stream(path, [whole], sha256=then.sha256)
    files.write_json(output / INDEX, _index(plan))
    text = card(plan, tokens, journal)
    files.write_bytes(output / CARD, text.encode(errors="backslashreplace"))
    files.write_json(
        output / MANIFEST,
        manifest_of(
            journal,
            plan.num_experts,
            plan.settings.experts,
            written,
            source_bytes=plan.source_bytes,
            width=plan.experts[0].inner,
        ),
    )


def copied_files(others: Iterable[str]) -> list[str]:
    """Return which of a source's other files are copied: those that a run makes are not."""
    return [name for name in others if name not in {MANIFEST, CARD}]


def published_files(manifest: Manifest) -> list[str]:
    """Return the names of what belongs to an output, in the order in which it was written.

    Raises
    ------
    UsageError
        It is of a version that did not note the names.
    """
    if manifest.documents is None:
        raise UsageError(
            f"{MANIFEST} does not name the files beside the shards: the output is of an older "
            "version; upload it with hf upload, and take care what else lies in the folder"
        )
    return [*manifest.files, *manifest.documents, INDEX, CARD, MANIFEST]


def check_names(folder: Path, names: Iterable[str]) -> None:
    """Refuse files that could not be written, before any is.

    Parameters
    ----------
    folder
        Where they are to be; it need not be there yet.
    names
        Relative to it, with slashes.

    Raises
    ------
    UsageError
        A name is too long, or has the place of a folder.
    OtherRunError
        A folder is where a file is to be, or a file where a folder is.
    """
    known = set(names)
    most = os.pathconf(existing(folder), "PC_NAME_MAX")
    for name in sorted(known):
        path, parents = folder / name, [parent.as_posix() for parent in Path(name).parents]
        taken = [other for other in (*parents, name + files.PARTIAL) if other in known]
        if taken:
            raise UsageError(
                f"{name} cannot be written beside {taken[0]}, which {folder} is to have too: "
                "rename it or move it away"
            )
        longest = max(len(os.fsencode(part)) for part in Path(name + files.PARTIAL).parts)
        if longest > most or len(os.fsencode(path)) + len(files.PARTIAL) >= _PATH_BYTES:
            raise UsageError(
                f"{name} cannot be written in {folder}: its name is too long with "
                f"{files.PARTIAL}, which is added until it is whole; rename it"
            )
        if path.is_dir():
            raise OtherRunError(f"{path} is a folder, and a file of this name is to be written")
        for parent in path.parents[: len(parents) - 1]:
            if parent.exists() and not parent.is_dir():
                raise OtherRunError(f"{parent} is a file, and a folder of this name is needed")


def _index(plan: Plan) -> dict[str, Any]:
    shards = [*(shard for layer in plan.layers for shard in layer.shards), *plan.outside]
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
