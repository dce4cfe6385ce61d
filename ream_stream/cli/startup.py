"""What is done before a run begins: a line that moves on a terminal, lines elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def starting(console: Console, first: str = "") -> Iterator[Callable[[str], None]]:
    """Show what is being done, the first thing at once; give what tells the next one."""
    if console.is_terminal:
        with console.status(first) as status:
            yield lambda what: status.update(what)
        return
    if first:
        console.print(first)
    yield lambda what: console.print(what, soft_wrap=True)
