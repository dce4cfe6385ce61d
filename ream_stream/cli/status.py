"""The verb `status`."""

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .params import FOLDER, Verb, exit_statuses, json_option, option, work_dir_option

if TYPE_CHECKING:
    from rich.console import Console

    from ream_stream.compression.workspace import Workspace

WATCH_SECONDS = 2.0
"""Time between two looks at a run."""


@click.command(cls=Verb, epilog=exit_statuses(0, 1, 2, 3, 11))
@click.argument("output", type=FOLDER)
@work_dir_option
@option(
    "Output",
    "--watch",
    is_flag=True,
    help="Look again every two seconds until the run ends; Ctrl-C leaves, the run goes on.",
)
@json_option
def status(output: Path, work_dir: Path | None, *, watch: bool, as_json: bool) -> None:
    """Tell how far the run in OUTPUT is, and how to go on with it.

    Its state is complete, running or stopped. Nothing is read but the journal and the log,
    so this may be asked at any time.

    Example:

    \b
        ream-stream status ./Qwen3-23B
        ream-stream status ./Qwen3-23B --watch
        ream-stream status ./Qwen3-23B --json
    """
    from ream_stream.compression.workspace import workspace_of

    from .console import console, facts, print_json

    workspace = workspace_of(output, work_dir)
    known = gather(workspace)
    if watch and known["state"] == "running":
        with suppress(KeyboardInterrupt):
            known = follow(workspace, console(stderr=True))
    if as_json:
        print_json(known)
    else:
        console(stderr=False).print(facts(_rows(known)))


def follow(
    workspace: "Workspace", shown: "Console", pause: Callable[[float], None] = time.sleep
) -> dict[str, Any]:
    """Show a run until it ends, and return what is known of it then.

    Parameters
    ----------
    workspace
        Folders of the run.
    shown
        Console that is refreshed; one that is no terminal gets a line for each change.
    pause
        Waits for a number of seconds between two looks.
    """
    from rich.live import Live

    from .console import facts

    known, last = gather(workspace), ""
    with Live(console=shown, transient=True, auto_refresh=False) as live:
        while known["state"] == "running":
            if shown.is_terminal:
                live.update(facts(_rows(known)), refresh=True)
            elif (line := _line(known)) != last:
                shown.print(f"{time.strftime('%H:%M:%S')}  {line}", soft_wrap=True)
                last = line
            pause(WATCH_SECONDS)
            known = gather(workspace)
    return known


def gather(workspace: "Workspace") -> dict[str, Any]:
    """Return what journal, lock and log tell of a run.

    Raises
    ------
    UsageError
        There is no run.
    """
    from ream_stream.compression.event_log import newest, read_events
    from ream_stream.compression.manifest import MANIFEST, read_manifest
    from ream_stream.errors import UsageError

    holder = workspace.holder()
    complete = workspace.is_complete()
    begun = workspace.has_journal()
    if not begun:
        workspace.check_is_of_one_run()
    if not (begun or holder or complete):
        raise UsageError(f"{workspace.output} holds no run of ream-stream")
    journal = workspace.begun() if begun else None
    cleaned, path = complete and not begun, workspace.output / MANIFEST
    # of statistics nothing but their own files is left
    manifest = read_manifest(path) if cleaned and path.exists() else None
    log = newest(read_events(workspace.log))
    started, command = log.get("started", {}), log.get("command", {})
    shards = journal.shards() if journal else manifest.files.values() if manifest else ()
    state = "complete" if complete else "running" if holder else "stopped"
    return {
        "output": str(workspace.output),
        "state": state,
        "is_cleaned": cleaned,
        "held_by": holder,
        "committed_layers": len(journal.layers) if journal else 0,
        "layers": started.get("layers"),
        "written_bytes": sum(file.size for file in shards),
        "left_seconds": _left(log) if state == "running" else None,
        "anonymous_bytes": log.get("last", {}).get("anonymous_bytes"),
        "last_event": log.get("last"),
        "ranks": log.get("plan", {}).get("ranks"),
        "directory": command.get("directory"),
        "resume": None if state == "complete" else command.get("command"),
    }


def _line(known: dict[str, Any]) -> str:
    """Return what changes while a run goes on."""
    rows = dict(_rows(known))
    return "  ".join([rows["layers"], rows["written"], rows.get("last event", "")[20:]])


def _left(log: dict[str, Any]) -> float | None:
    """Return the seconds that are left, as the last line of the log tells it."""
    last = log.get("last", {})
    try:
        told = datetime.fromisoformat(last["time"])
        # a clock may have been set meanwhile
        since = max(0.0, (datetime.now(UTC) - told).total_seconds())
        return max(0.0, float(last["left_seconds"]) - since)
    except (KeyError, TypeError, ValueError):
        return None


def _rows(known: dict[str, Any]) -> list[tuple[str, str]]:
    from ream_stream.units import format_seconds, format_size

    count = known["layers"] or "?"
    layers = f"{known['committed_layers']} of {count} committed"
    rows = [
        ("state", known["state"] + (f" ({known['held_by']})" if known["held_by"] else "")),
        ("layers", "all; its work files were removed" if known["is_cleaned"] else layers),
        ("written", format_size(known["written_bytes"])),
    ]
    if known["state"] == "running" and (known["ranks"] or 1) > 1:
        rows.append(("ranks", f"{known['ranks']}, the state is that of rank 0"))
    if known["left_seconds"] is not None:
        rows.append(("left", f"about {format_seconds(known['left_seconds'])}"))
    if known["state"] == "running" and known["anonymous_bytes"] is not None:
        rows.append(("memory", format_size(known["anonymous_bytes"])))
    if (last := known["last_event"]) is not None:
        rows.append(("last event", _sentence(last)))
    if known["state"] == "stopped" and known["resume"]:
        rows.append(("resume with", known["resume"]))
        rows.append(("  in", known["directory"]))
    return rows


def _sentence(event: dict[str, Any]) -> str:
    words = [event.get("time", "")[:19].replace("T", " "), event["event"]]
    if "layer" in event:
        words.append(f"(layer {event['layer'] + 1}, {event.get('phase', 'committed')})")
    if "message" in event:
        words.append(f"- {event['message']}")
    return " ".join(words)
