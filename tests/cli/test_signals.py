"""Signals that ask a run to stop."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_second_signal_ends_the_process_at_once(name):
    code = (
        "import os, signal\n"
        "from ream_stream.cli.signals import stop_requests\n"
        "with stop_requests() as asked:\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        f"    assert asked() == signal.{name}\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    raise SystemExit('it goes on')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 143
    assert done.stderr == "stopping at the next safe point; once more to stop at once\n"


def test_a_hangup_that_nohup_ignores_does_not_stop_a_run():
    code = (
        "import os, signal\n"
        "from ream_stream.cli.signals import stop_requests\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with stop_requests() as asked:\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    assert asked() is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
