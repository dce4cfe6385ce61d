"""Copy what a plan needs of a checkpoint: config, index, tokenizer and the shards' headers.

    python tools/headers_only.py SOURCE TARGET
    ream-stream plan TARGET --keep 75%

Each shard of TARGET ends where its header does: kilobytes for a model of any size. SOURCE
may be such a folder itself. Files beside the shards are copied up to 100 MB.
"""

import argparse
import shutil
import sys
from pathlib import Path

from ream_stream.checkpoint.reader import INDEX, open_checkpoint
from ream_stream.errors import ReamStreamError

MAX_OTHER_BYTES = 100_000_000


def copy_headers(source: Path, target: Path) -> int:
    """Copy a checkpoint without its tensors' bytes; return the bytes written.

    Raises
    ------
    ReamStreamError
        The source is no checkpoint, or damaged.
    """
    checkpoint = open_checkpoint(source, with_data=False)
    target.mkdir(parents=True)
    for path in [source / "config.json", source / INDEX, *checkpoint.other_files()]:
        if path.is_file() and path.stat().st_size <= MAX_OTHER_BYTES:
            copied = target / path.relative_to(source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)
    for path in checkpoint.files():
        with path.open("rb") as file:
            prefix = file.read(8)
            header = file.read(int.from_bytes(prefix, "little"))
        (target / path.name).write_bytes(prefix + header)
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def main() -> int:
    """Copy, and tell how much there is now."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    try:
        written = copy_headers(options.source, options.target)
    except (ReamStreamError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_status", 1)
    print(f"{options.target}: {written} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
