"""The Python API: light to import, the command line's results, and examples that run."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import ream_stream
from ream_stream.__main__ import main
from ream_stream.cli.demo import CHECKPOINT
from ream_stream.events import (
    Evaluating,
    Finished,
    LayerDone,
    Planned,
    Preparing,
    Started,
    Step,
)

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "python-api.md"
WANTED = {"experts": 6, "any_count": True, "compute_dtype": "float32"}


@pytest.fixture(scope="module")
def source(checkpoints):
    return checkpoints("qwen3_moe")


@pytest.fixture(scope="module")
def tokens(token_file):
    return token_file


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_package_is_imported_without_torch_and_gives_all_that_it_lists():
    code = (
        "import sys, ream_stream\n"
        "assert set(ream_stream.__all__) <= set(dir(ream_stream))\n"
        "ream_stream.Method, ream_stream.Settings, ream_stream.InterruptedRunError\n"
        "assert {'torch', 'transformers', 'numpy', 'click', 'rich'}.isdisjoint(sys.modules)\n"
        "print(*(getattr(ream_stream, name).__name__ for name in ream_stream.__all__))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ream_stream.__all__


def test_a_name_that_there_is_not_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'decompress'"):
        ream_stream.decompress  # noqa: B018


def test_a_call_writes_the_bytes_of_the_command_line_and_tells_the_same(
    capsys, source, tokens, tmp_path
):
    planned = ream_stream.plan(source, calibration=tokens, **WANTED)
    events, threads = [], torch.get_num_threads()
    given = {"calibration": tokens, "threads": 2, **WANTED}
    result = ream_stream.compress(source, tmp_path / "called", report=events.append, **given)
    assert torch.get_num_threads() == threads
    words = ["compress", source, tmp_path / "typed", "--experts", 6, "--any-count", "--json"]
    words += ["--calibration", tokens, "--compute-dtype", "float32", "--threads", 2]
    assert main([str(word) for word in words]) == 0
    known = json.loads(capsys.readouterr().out)
    assert bytes_of(tmp_path / "called") == bytes_of(tmp_path / "typed")
    assert result.facts().keys() == known.keys()
    assert result.output_bytes == known["output_bytes"] == planned.output_bytes
    assert (planned.experts_before, planned.settings.experts) == (8, 6)
    kinds = [type(event) for event in events if not isinstance(event, Preparing)]
    assert isinstance(events[0], Preparing)
    assert (kinds[:2], kinds[-1]) == ([Planned, Started], Finished)
    assert [event.layer for event in events if isinstance(event, LayerDone)] == [0, 1, 2]
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.seconds = 0


def test_a_report_may_end_a_run_and_the_same_call_goes_on(source, tokens, tmp_path):
    def stop(event):
        if isinstance(event, LayerDone):
            raise ream_stream.InterruptedRunError("enough")

    given = {"calibration": tokens, "seed": 3, **WANTED}
    output = tmp_path / "output"
    threads = set(threading.enumerate())
    for phase in ("observe", "propagate"):

        def stop_within(event, phase=phase):
            if isinstance(event, Step) and event.layer and event.phase == phase:
                raise ream_stream.InterruptedRunError("enough")

        with pytest.raises(ream_stream.InterruptedRunError, match="enough"):
            ream_stream.compress(source, tmp_path / phase, report=stop_within, **given)
        assert set(threading.enumerate()) <= threads, "those that read ahead or write behind"
    with pytest.raises(ream_stream.InterruptedRunError, match="enough") as stopped:
        ream_stream.compress(source, output, report=stop, **given)
    assert stopped.value.then == "resume with: the same call"
    events = []
    result = ream_stream.compress(source, output, report=events.append, text=tokens, **given)
    assert [event.committed for event in events if isinstance(event, Started)] == [1]
    assert any(isinstance(event, Evaluating) for event in events)
    scores = ream_stream.evaluate(output, text=tokens, against=source, compute_dtype="float32")
    assert result.quality == scores.facts()
    whole = ream_stream.compress(source, tmp_path / "whole", **given)
    assert whole.quality is None
    assert bytes_of(output) == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"colour": "blue"}, "colour: there is no such option"),
        ({"calibration": None}, "--calibration"),
        ({"experts": None}, "say how many experts to keep"),
        ({"experts": 9}, "the source has 8 experts"),
        ({"saliency": "luck", "method": "reap"}, "--saliency luck: there are reap,"),
        ({"sequences": "many"}, "sequences: 'many' is neither a number above 0 nor all"),
        ({"stream": True}, "--stream is for a SOURCE on the hub"),
        ({"calibration": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_what_cannot_be_done_is_a_usage_error_and_nothing_is_written(
    source, tokens, tmp_path, changed, message
):
    given = {"calibration": tokens, **WANTED, **changed}
    with pytest.raises(ream_stream.UsageError, match=re.escape(message)):
        ream_stream.compress(source, tmp_path / "output", **given)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_a_usage_error_of_every_function(tmp_path):
    gone = tmp_path / "gone"
    for call in (
        lambda: ream_stream.plan(gone, experts=6),
        lambda: ream_stream.inspect(gone),
        lambda: ream_stream.verify(gone),
        lambda: ream_stream.evaluate(gone, text="x.txt"),
    ):
        with pytest.raises(ream_stream.UsageError, match="gone"):
            call()


def test_the_examples_of_the_page_run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(CHECKPOINT, "Qwen3-30B-A3B")
    words = "Some words of a text to predict, and 1 + 1 = 2.\n" * 60
    Path("test.txt").write_text(words, encoding="utf-8")
    made = ["tokens", "Qwen3-30B-A3B", "--calibration", "test.txt", "--sequences", "4"]
    made += ["--sequence-length", "64", "--output", "calibration.safetensors"]
    assert main(made) == 0
    namespace = {}
    page = PAGE.read_text(encoding="utf-8")
    for cell in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(compile(cell, PAGE.name, "exec"), namespace)
    printed = capsys.readouterr().out
    assert "layer 2: 32 -> 24 experts\nenough for today" in printed
    assert namespace["checked"].ok
    assert namespace["result"].output == Path("Qwen3-23B-REAP").resolve()
    assert namespace["result"].quality["difference"]["nats"] > 0
