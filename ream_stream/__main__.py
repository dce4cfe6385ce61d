"""The entry point: errors become a message and an exit status, from the first import on."""

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own, and return its exit status."""
    # threads that spin while they wait make a run 8 times as long where others use the
    # processors too (2 threads, load 11: 317 s, or 37 s asleep); torch reads it when imported
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "WORLD_SIZE" in os.environ:
        # of a rank that ended the others tell in a sentence
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    if sys.stderr is None or not sys.stderr.isatty():
        # bars of a download are codes for a terminal, which a log keeps
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        from . import cli
        from .cli.ending import end, quiet_threads
        from .cli.terminal import guarded
    except KeyboardInterrupt:
        return 130
    except (ImportError, MemoryError, OSError) as error:
        if sys.stderr is not None:
            sys.stderr.write(f"error: it cannot be started: {type(error).__name__}: {error}\n")
        return 1
    with guarded(), quiet_threads():
        try:
            status = cli.cli.main(arguments, prog_name="ream-stream", standalone_mode=False)
            sys.stdout.flush()
        except BaseException as error:  # noqa: BLE001 - the last place there is
            return end(error)
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    sys.exit(main())
