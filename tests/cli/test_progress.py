"""A run as it is shown."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from ream_stream import units
from ream_stream.cli import progress
from ream_stream.cli.trial_progress import Trials
from ream_stream.compression import event_log
from ream_stream.events import Comparing, Evaluating, LayerDone, Started, Step


def test_what_is_left_follows_from_bytes_and_times():
    pace = event_log.Pace([10, 10, 40, 20])
    assert pace.left() is None
    pace.skip(1)
    pace.finish(2.0)
    # 10 bytes took 2 s, 60 bytes are left
    assert pace.left() == 12.0
    assert pace.left(since_last=5.0) == 7.0
    assert pace.left(since_last=50.0) == 0.0
    assert (pace.done_bytes, pace.total_bytes) == (20, 80)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (41.2, "41 s"),
        (185, "3 min 05 s"),
        (7800, "2 h 10 min"),
    ],
)
def test_durations_are_told_in_two_units(seconds, text):
    assert units.format_seconds(seconds) == text


LAYER_DONE = LayerDone(
    layer=1,
    experts_before=8,
    experts_after=6,
    changed=2,
    read_bytes=2_000_000,
    written_bytes=1_500_000,
    seconds={"observe": 40.0, "write": 1.2},
    peak_anonymous_bytes=700_000_000,
)


def shown(*, terminal, planned=None):
    """Show three layers, of which the first was committed before; return what is printed."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120, highlight=False)
    with progress.running(console, [1_000_000, 2_000_000, 4_000_000], planned) as show:
        show(Started(layers=3, committed=1))
        show(Step(layer=1, phase="observe", done=3, total=4))
        show(LAYER_DONE)
        show(Step(layer=2, phase="observe", done=1, total=4))
    return file.getvalue()


def test_a_log_gets_a_line_at_the_start_and_one_for_each_layer():
    begun, line = shown(terminal=False).splitlines()
    assert begun == "layer 2/3 begins"
    assert line.startswith(
        "layer 2/3  8 -> 6 experts, 2 merged  2.00 MB -> 1.50 MB  41 s  peak 700 MB  "
    )
    assert line.endswith(" left")


def test_the_plan_tells_what_is_left_until_a_layer_was_measured():
    assert shown(terminal=False, planned=7800.0).startswith(
        "layer 2/3 begins  2 h 10 min left (planned)\n"
    )
    pace = event_log.Pace([10, 20], planned_seconds=6.0)
    assert (pace.left(), pace.left(since_last=4.0), pace.is_measured) == (6.0, 2.0, False)
    # a plan that was wrong tells nothing
    assert pace.left(since_last=6.0) is None
    pace.finish(1.0)
    assert (pace.left(), pace.is_measured) == (2.0, True)


def test_a_run_tells_where_it_is_within_a_layer():
    position = progress.Position([10, 20], 60.0)
    assert (position.words(), position.place()) == ("", "")
    position.show(Started(layers=2, committed=0))
    position.show(Step(layer=0, phase="observe", done=3, total=4))
    assert re.fullmatch(
        r"layer 1/2  observe 3/4  memory \S+ MB, peak \S+ MB  (60|1 min 00) s left \(planned\)",
        position.words(),
    )


def test_a_line_tells_the_memory_of_a_device_that_was_used():
    event = replace(LAYER_DONE, peak_device_bytes=3_000_000_000)
    line = progress.layer_line(event, 3, event_log.Pace([1, 2, 4]))
    assert line.endswith("peak 700 MB  device 3.00 GB")


def test_a_terminal_gets_a_bar_beside_the_lines():
    text = shown(terminal=True)
    assert "layer 2/3  8 -> 6 experts, 2 merged" in text
    assert "layer 3/3  observe 1/4" in text
    assert "3.00 MB of 7.00 MB  memory " in text
    assert "begins" not in text


def test_a_comparison_tells_which_of_its_trials_runs_and_where_it_is():
    trials = Trials()
    assert trials.words() == ""
    first = Comparing(number=2, trials=7, to_do=5, name="reap", mix="", seed=None)
    assert trials.show(first) == "trial 2 of 7: reap"
    trials.show(Started(layers=3, committed=1))
    trials.show(Step(layer=1, phase="observe", done=3, total=4))
    assert trials.words().startswith("trial 2 of 7: reap  layer 2/3  observe 3/4")
    trials.show(Evaluating(name="it", layers=3))
    trials.show(Step(layer=0, phase="propagate", done=1, total=2))
    assert trials.words().startswith("trial 2 of 7: reap  it  layer 1/3  propagate 1/2")
    line = trials.show(replace(first, number=3, to_do=4, mix="half", seed=1))
    assert re.fullmatch(r"trial 3 of 7: reap, mix half, seed 1  about 0.0 s left", line)
    assert trials.done == 2
