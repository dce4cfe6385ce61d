import errno
import os
import subprocess
import sys
import threading

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ream_stream.__main__ as entry
from ream_stream import __version__, errors
from ream_stream.cli.console import console, facts
from ream_stream.untrusted import shell_words


def raising(error):
    @click.command()
    @click.option("--experts", type=int)
    def command(experts):
        raise error

    return command


def run(monkeypatch, command, *arguments):
    monkeypatch.setattr("ream_stream.cli.cli", command)
    return entry.main(arguments)


FAILURES = {
    kind: kind.exit_status
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.ReamStreamError)
}


@pytest.mark.parametrize("kind", FAILURES, ids=lambda kind: kind.__name__)
def test_an_error_of_ours_is_one_line_and_its_own_status(monkeypatch, capsys, kind):
    assert run(monkeypatch, raising(kind("it is so"))) == FAILURES[kind]
    # what a user asked for is none
    head = "" if kind is errors.InterruptedRunError else "error: "
    assert capsys.readouterr() == ("", f"{head}it is so\n")


def test_a_terminated_run_says_so_in_its_status(monkeypatch):
    error = errors.InterruptedRunError("resume with: ...", signal_number=15)
    assert run(monkeypatch, raising(error)) == 143


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (OSError(errno.EIO, "it broke", "/out/a"), 1, "/out/a: it broke"),
        (OSError("the hub does not answer"), 1, "OSError: the hub does not answer"),
        (OSError(errno.ENOSPC, "no space", "/out/a"), 12, "/out/a: no space: free some"),
        (OSError(errno.EMFILE, "too many", "/a"), 1, "ulimit -n"),
        (OSError(errno.ENOMEM, "no memory", "/a"), 12, "memory ran out (/a: no memory)"),
        (MemoryError(), 12, "memory ran out (MemoryError)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 12, "memory ran out"),
        (ImportError("x.so: failed to map segment from shared object"), 12, "memory ran out"),
        (RuntimeError("can't start new thread"), 12, "memory ran out"),
    ],
)
def test_what_the_system_refuses_has_its_status(monkeypatch, capsys, error, status, words):
    assert run(monkeypatch, raising(error)) == status
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("kind", [ZeroDivisionError, RecursionError, KeyError, AssertionError])
def test_a_mistake_of_ours_is_one_sentence_and_a_file(monkeypatch, capsys, tmp_path, kind):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run(monkeypatch, raising(kind("a\x1b[2Jb\nc"))) == 1
    said = capsys.readouterr().err
    (details,) = tmp_path.iterdir()
    assert kind.__name__ in said
    assert str(details) in said
    assert said.count("\n") == 1
    assert details.stat().st_mode & 0o777 == 0o600
    written = details.read_text(encoding="utf-8")
    assert "Traceback" in written
    assert "\x1b" not in said + written


def test_details_that_cannot_be_written_are_told_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert run(monkeypatch, raising(ZeroDivisionError())) == 1
    assert "the details could not be written (FileNotFoundError)" in capsys.readouterr().err


def test_what_fails_in_a_thread_is_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    @click.command()
    def command():
        thread = threading.Thread(target=lambda: 1 // 0)
        thread.start()
        thread.join()

    assert run(monkeypatch, command) == 0
    said = capsys.readouterr().err
    assert said.startswith("note: something unforeseen happened (ZeroDivisionError")
    assert said.count("\n") == 1


def test_ctrl_c_while_modules_are_imported_is_130(tmp_path):
    code = "import sys, builtins; real = builtins.__import__\n"
    code += "def given(name, *a, **k):\n"
    code += "    if name == 'click': raise KeyboardInterrupt\n    return real(name, *a, **k)\n"
    code += "builtins.__import__ = given\n"
    code += "from ream_stream.__main__ import main; sys.exit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (130, b"")


HOSTILE = "\x1b]0;EVIL\x07\x9b2J\r\x7f\u202e\u200b\u2028\ud800\udce9 b\xe4r"
SHOWN = "\\x1b]0;EVIL\\x07\\u009b2J\\r\\x7f\\u202e\\u200b\\u2028\\ud800\\xe9 b\xe4r"


def test_what_a_terminal_obeys_is_shown_as_an_escape(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")

    @click.command()
    def command():
        click.echo(HOSTILE)
        table = facts([(HOSTILE, HOSTILE)], title=HOSTILE)
        console(stderr=True).print(table)
        console(stderr=True).print(HOSTILE, soft_wrap=True)
        print(HOSTILE, file=sys.stderr)  # as libraries do
        raise errors.DamagedError(HOSTILE + "\nerror: a second line")

    assert run(monkeypatch, command) == 3
    out, err = capsys.readouterr()
    assert out == SHOWN + "\n"
    assert err.count(SHOWN) == 6
    assert err.endswith("\\nerror: a second line\n")
    assert not set(out + err) & set("\x1b\x07\x9b\r\x7f\u202e\u200b\u2028\ud800\udce9")


def test_a_long_name_is_shown_in_part(monkeypatch, capsys):
    assert run(monkeypatch, raising(errors.DamagedError("n" * 1_000_000))) == 3
    said = capsys.readouterr().err
    assert "nnn[... 990000 characters ...]nnn" in said


@settings(max_examples=10)
@given(st.lists(st.text(st.characters(exclude_characters="\0")), min_size=1, max_size=40))
def test_bash_reads_shown_words_as_they_were(words):
    words = [word.encode(errors="replace").decode() for word in words] + ["caf\udce9"]
    expected = b"".join(os.fsencode(word) + b"\0" for word in words)
    command = f"LC_ALL=C.UTF-8; printf '%s\\0' {shell_words(words)}"
    assert command.isprintable()
    assert subprocess.run(["bash", "-c", command], capture_output=True).stdout == expected


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


def shell(command, tmp_path):
    """Run a command line in which RUN stands for ours; return its status and its errors."""
    command = command.replace("RUN", f"{sys.executable} -m ream_stream")
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("RUN --help >&-", 0, ""),
        ("RUN --help >&- 2>&- <&-", 0, ""),
        ("RUN status missing 2>&-", 2, ""),
        ("RUN status missing 2>/dev/full", 2, ""),
        ("RUN --help >/dev/full", 12, "error: standard output: No space left on device: "),
        ("RUN --help >/dev/full 2>/dev/full", 12, ""),
    ],
)
def test_closed_and_full_streams_end_in_a_sentence(command, status, said, tmp_path):
    found, errors_said = shell(command, tmp_path)
    assert found == status
    assert errors_said.startswith(said)
    assert errors_said.count("\n") == bool(said)
