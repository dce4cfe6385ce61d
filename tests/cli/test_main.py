import errno
import os
import subprocess
import sys

import click
import pytest

import ream_stream.__main__ as entry
from ream_stream import __version__, errors


def raising(error):
    @click.command()
    @click.option("--experts", type=int)
    def command(experts):
        raise error

    return command


def run(monkeypatch, command, *arguments):
    monkeypatch.setattr(entry, "cli", command)
    return entry.main(arguments)


FAILURES = {
    kind: kind.exit_status
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.ReamStreamError)
}


@pytest.mark.parametrize("kind", FAILURES, ids=lambda kind: kind.__name__)
def test_an_error_of_ours_is_one_line_and_its_own_status(monkeypatch, capsys, kind):
    assert run(monkeypatch, raising(kind("it is so"))) == FAILURES[kind]
    assert capsys.readouterr() == ("", "error: it is so\n")


def test_a_terminated_run_says_so_in_its_status(monkeypatch):
    error = errors.InterruptedRunError("resume with: ...", signal_number=15)
    assert run(monkeypatch, raising(error)) == 143


def test_an_error_of_the_system_names_the_file(monkeypatch, capsys):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/out/model.safetensors")
    assert run(monkeypatch, raising(error)) == 1
    assert capsys.readouterr().err == "error: /out/model.safetensors: No space left on device\n"


def test_an_error_of_the_system_without_a_file_keeps_its_text(monkeypatch, capsys):
    assert run(monkeypatch, raising(OSError("the hub does not answer"))) == 1
    assert capsys.readouterr().err == "error: the hub does not answer\n"


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, raising(ZeroDivisionError()))


def test_wrong_usage_is_2_with_the_reason(monkeypatch, capsys):
    assert run(monkeypatch, raising(AssertionError), "--experts", "many") == 2
    assert "'many' is not a valid integer" in capsys.readouterr().err


def test_interruption_is_130(monkeypatch):
    assert run(monkeypatch, raising(KeyboardInterrupt())) == 130


def test_a_question_answered_no_is_1(monkeypatch):
    assert run(monkeypatch, raising(click.Abort())) == 1


def test_success_is_0_and_a_status_a_verb_asks_for_is_kept(monkeypatch):
    @click.command()
    @click.option("--status", type=int)
    @click.pass_context
    def command(context, status):
        if status is not None:
            context.exit(status)

    assert run(monkeypatch, command) == 0
    assert run(monkeypatch, command, "--status", "3") == 3


def module(*arguments, **options):
    command = [sys.executable, "-m", "ream_stream", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_help_and_version_are_printed_by_the_module():
    assert "Usage: ream-stream" in module("--help").stdout
    assert module("--version").stdout == f"ream-stream, version {__version__}\n"


def test_help_imports_nothing_heavy():
    code = "import sys, ream_stream.__main__ as it; it.main(['--help']); print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = done.stdout.splitlines()[-1].split()
    assert {"torch", "transformers", "zarr", "scipy", "numpy"}.isdisjoint(imported)


def test_a_reader_that_goes_away_is_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "ream_stream", "--help"]
    with os.fdopen(writing, "w", encoding="utf-8") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (1, b"")
