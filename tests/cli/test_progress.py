"""A run as it is shown."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from ream_stream import units
from ream_stream.cli import progress
from ream_stream.compression import event_log
from ream_stream.events import LayerDone, Started, Step


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


def shown(*, terminal):
    """Show three layers, of which the first was committed before; return what is printed."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120, highlight=False)
    with progress.display(console, [1_000_000, 2_000_000, 4_000_000]) as display:
        display.show(Started(layers=3, committed=1))
        display.show(Step(layer=1, phase="observe", done=3, total=4))
        display.show(LAYER_DONE)
        display.show(Step(layer=2, phase="observe", done=1, total=4))
    return file.getvalue()


def test_a_log_gets_one_line_for_each_layer():
    (line,) = shown(terminal=False).splitlines()
    assert line.startswith(
        "layer 2/3  8 -> 6 experts, 2 merged  2.00 MB -> 1.50 MB  41 s  peak 700 MB  "
    )
    assert line.endswith(" left")


def test_a_line_tells_the_memory_of_a_device_that_was_used():
    event = replace(LAYER_DONE, peak_device_bytes=3_000_000_000)
    line = progress.layer_line(event, 3, event_log.Pace([1, 2, 4]))
    assert line.endswith("peak 700 MB  device 3.00 GB")


def test_a_terminal_gets_a_bar_beside_the_lines():
    text = shown(terminal=True)
    assert "layer 2/3  8 -> 6 experts, 2 merged" in text
    assert "layer 3/3  observe 1/4" in text
    assert "3.00 MB of 7.00 MB  memory " in text
