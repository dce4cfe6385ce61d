"""Lines after a silence."""

import io
import re
import threading

from rich.console import Console

from ream_stream.cli.evaluation_progress import Pass
from ream_stream.cli.heartbeat import Heartbeat
from ream_stream.events import Evaluating, Step


def test_a_silence_ends_with_a_line_that_has_a_time():
    file, asked = io.StringIO(), threading.Event()
    answers = iter(["", "layer 1/3  observe 2/4"])

    def words():
        said = next(answers, None)
        if said is None:  # both answers were taken, and the second is printed
            asked.set()
        return said or ""

    with Heartbeat(Console(file=file, width=80), words, seconds=0.001) as lines:
        assert asked.wait(60)
        lines.say("done")
    beat, done = file.getvalue().splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d  layer 1/3  observe 2/4", beat)
    assert done == "done"


def test_a_pass_over_a_checkpoint_tells_its_layer_and_what_is_left():
    now = Pass()
    told = now.show(Evaluating(name="it", layers=4, skipped=2))
    assert told == "running it, 4 layers, from layer 3 on"
    assert (now.done, now.words()) == (0.0, "it")
    assert now.show(Step(layer=2, phase="propagate", done=1, total=4)) is None
    assert now.done == 0.125
    assert re.fullmatch(r"it  layer 3/4  propagate 1/4  .* left", now.words())
    assert now.show(Step(layer=3, phase="score", done=1, total=5)) == "scoring 5 sequences"
    assert now.done == 0.2
    done = Evaluating(name="it", layers=4, skipped=4)
    assert now.show(done) == "it was run before"
