"""Reports for tests: events kept in a list, work that is stopped or changed at an event."""

import signal

from ream_stream.compression.event_log import Log
from ream_stream.errors import InterruptedRunError
from ream_stream.events import LayerDone


class Events(list):
    """A report that keeps every event; past `most` of them it asks to stop."""

    def __init__(self, most=None):
        super().__init__()
        self.most = most

    def __call__(self, event):
        self.append(event)
        if self.most is not None and len(self) > self.most:
            raise InterruptedRunError("stopped", signal_number=signal.SIGTERM)


class StopAt(Exception):
    """Raised by `stop_when`, with the event."""


def stop_when(condition):
    """Return a report that leaves the work at the first event with a property."""

    def report(event):
        if condition(event):
            raise StopAt(event)

    return report


def when_a_layer_is_committed(patch, act):
    """Do something once in a run of the command line, after its first layer."""
    show = Log.show

    def tell(log, event):
        show(log, event)
        if isinstance(event, LayerDone) and event.layer == 0:
            act()

    patch.setattr(Log, "show", tell)
