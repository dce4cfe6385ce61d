"""The files of a checkpoint beside config and weights, which are copied as they are."""

import os
import re
from collections.abc import Collection
from pathlib import Path

from ream_stream.errors import DamagedError, UsageError
from ream_stream.file_access import open_source

MAX_OTHERS = 10_000

WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pth?|ckpt|gguf|h5|msgpack|onnx|onnx_data|index\.json)", re.IGNORECASE
)
"""Names of files with weights, in any format, and of their indexes."""

COMMIT = re.compile(r"[0-9a-f]{40}")
"""Pattern of a full git commit hash."""


def other_files(folder: Path, parsed: Collection[str]) -> dict[str, int]:
    """Return the sizes of a folder's other files, by name; open each once.

    Hidden ones are left out, and so are weights that the index does not name: transformers
    prefers a ``model.safetensors`` to the index beside it.

    Parameters
    ----------
    folder
        Of a checkpoint.
    parsed
        Names of files that are not copied as they are.

    Raises
    ------
    UsageError
        One is neither a file nor a folder, or a link that leads nowhere or elsewhere.
    """

    def refuse(error: OSError) -> None:
        raise error

    found: dict[str, int] = {}
    homes = homes_of(folder)
    for inside, folders, names in os.walk(folder, onerror=refuse):
        # a link to a folder is looked at as a file, which it is not
        links = [name for name in folders if Path(inside, name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(inside, name) for name in (*names, *links)):
            name = path.relative_to(folder).as_posix()
            if path.name.startswith(".") or name in parsed or WEIGHTS.fullmatch(path.name):
                continue
            try:
                with open_source(path, homes) as file:
                    found[name] = os.fstat(file.fileno()).st_size
            except FileNotFoundError as error:
                raise UsageError(f"{path} is a link to what is not there: remove it") from error
            except DamagedError as error:
                raise UsageError(str(error)) from error
    if len(found) > MAX_OTHERS:
        raise UsageError(
            f"{folder} has {len(found)} files beside config and weights, more than {MAX_OTHERS}"
        )
    return dict(sorted(found.items(), key=lambda item: Path(item[0])))


def homes_of(folder: Path) -> tuple[Path, ...]:
    """Return the folders that links among copied files may lead into.

    A stranger's archive could else have a file of this machine copied into an output, and
    published. Config, index and shards may be links to anywhere: they are not copied but
    parsed. The hub's cache is made of links to the ``blobs`` beside its ``snapshots``.
    """
    real = folder.resolve()
    if real.parent.name == "snapshots":
        return real, real.parent.parent / "blobs"
    return (real,)


def commit_of(folder: Path) -> str | None:
    """Return the commit that a folder of the hub's cache is of."""
    *_, above, name = ("", *folder.resolve().parts)
    return name if above == "snapshots" and COMMIT.fullmatch(name) else None
