"""The entry point: the one place where an error becomes a message and an exit status."""

import os
import sys
from collections.abc import Sequence

import click

from .cli import cli
from .errors import ReamStreamError, sentence

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own, and return its exit status."""
    # threads that spin while they wait make a run 8 times as long where others use the
    # processors too (2 threads, load 11: 317 s, or 37 s asleep); torch reads it when imported
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        status = cli.main(arguments, prog_name="ream-stream", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except ReamStreamError as error:
        return _fail(str(error), error.exit_status)
    except click.Abort as error:
        # click makes one exception of Ctrl-C, of an end of input and of a question answered no
        return _INTERRUPTED if isinstance(error.__cause__, KeyboardInterrupt) else 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return 1
    except OSError as error:
        return _fail(sentence(error), ReamStreamError.exit_status)
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int) -> int:
    click.echo(f"error: {message}", err=True)
    return status


def _discard_output() -> None:
    """Keep Python from a second complaint when it flushes at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())
