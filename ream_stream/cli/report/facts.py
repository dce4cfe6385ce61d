"""All that a report tells of an output, as plain numbers: read from its files, not measured."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ream_stream import __version__
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.checkpoint.source_card import source_name
from ream_stream.compression.event_log import read_events
from ream_stream.compression.manifest import MANIFEST, LayerGroups, Manifest, read_manifest
from ream_stream.compression.workspace import Workspace
from ream_stream.errors import UsageError
from ream_stream.evaluation.pareto import correlation
from ream_stream.evaluation.verify import verify
from ream_stream.file_access import read_object, regular_size

_KINDS = ("comparison", "sweep")
_FINDINGS, _EVALUATION = "findings", "perplexity"
"""What only the JSON of `verify`, and that of `eval`, has."""


def gather(workspace: Workspace, results: Sequence[Path]) -> dict[str, Any]:
    """Return the facts of a complete output.

    Parameters
    ----------
    workspace
        Output and work folder. Times, memory, distances and gains are known only while
        the work folder has its log and statistics.
    results
        What `eval` and `verify` print with ``--json``, or `compare` or `sweep` wrote. Without
        one of `verify` headers and documents are checked now.

    Raises
    ------
    DamagedError
        The output has no manifest: the run is not complete.
    UsageError
        A file of results is none.
    """
    manifest = read_manifest(workspace.output / MANIFEST)
    if workspace.data.is_dir():
        workspace.check_is_of_one_run()
    events = list(read_events(workspace.log))
    plans = [each for each in events if each["event"] == "plan"]
    # a resumed run planned what was left of it
    whole = [plan for plan in plans if not plan.get("committed_layers")]
    plan = (whole or plans or [{}])[-1]
    quality = [_result(path) for path in results]
    checked = next((each for each in quality if _FINDINGS in each), None)
    done = _done(events)
    return {
        "ream_stream": __version__,
        "output": workspace.output.resolve().name,
        "source": _source_name(plan),
        "verification": checked or verify(workspace.output, scan=False).facts(),
        "scanned": checked is not None,
        "made": {
            "versions": dict(manifest.versions),
            "settings": dict(manifest.fingerprint),
            "experts_before": manifest.before,
            "experts_after": manifest.after,
            "command": next((e["command"] for e in reversed(events) if "command" in e), None),
        },
        "sizes": _sizes(workspace, plan, manifest),
        "plan": plan,
        "run": _run(events),
        "layers": [
            _layer(workspace, manifest, layer, done.get(layer.index, {}))
            for layer in manifest.layers
        ],
        "evaluation": next((each for each in quality if _EVALUATION in each), None),
        **{kind: next((q for q in quality if q.get("kind") == kind), None) for kind in _KINDS},
    }


def _result(path: Path) -> dict[str, Any]:
    value = read_object(path, finite=False)
    if value.get("kind") not in _KINDS and not {_FINDINGS, _EVALUATION} & set(value):
        raise UsageError(
            f"{path}: not what eval --json or verify --json prints, nor comparison.json or "
            "sweep.json"
        )
    return value


def _source_name(plan: Mapping[str, Any]) -> str | None:
    """Return what the source is called, from the plan in the log; None if that is gone."""
    folder = plan.get("source")
    return source_name(Path(folder)) if isinstance(folder, str) else None


def _sizes(workspace: Workspace, plan: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    checkpoint = open_checkpoint(workspace.output)
    return {
        "output_bytes": sum(entry.nbytes for entry in checkpoint.entries.values()),
        # without its log an output of an older version does not tell
        "source_bytes": plan.get("source_bytes") or manifest.source_bytes,
        "files": len(checkpoint.files()),
    }


def _done(events: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    return {each["layer"]: each for each in events if each["event"] == "layer done"}


def _run(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return time and memory as measured, over all runs that it took."""
    done = list(_done(events).values())
    if not done:
        return {}
    phases: dict[str, float] = {}
    finished = [each for each in events if each["event"] == "finished"]
    for each in done:
        for phase, seconds in each["seconds"].items():
            phases[phase] = phases.get(phase, 0.0) + seconds
    finish = [each["seconds"].get("finish", 0.0) for each in finished]
    phases["finish"] = max(finish, default=0.0)
    peaks = [each["peak_anonymous_bytes"] for each in [*done, *finished]]
    return {
        "seconds": sum(phases.values()),
        "seconds_by_phase": phases,
        "peak_anonymous_bytes": max(peaks),
        "starts": sum(each["event"] == "started" for each in events),
        "read_bytes": sum(each["read_bytes"] for each in done),
        "written_bytes": sum(each["written_bytes"] for each in done),
    }


def _layer(
    workspace: Workspace, manifest: Manifest, layer: LayerGroups, done: Mapping[str, Any]
) -> dict[str, Any]:
    kept = [group[0] for group in layer.groups]
    total = math.fsum(layer.saliency) or 1.0
    return {
        "index": layer.index,
        "saliency": list(layer.saliency),
        "kept": kept,
        "kept_share": math.fsum(layer.saliency[expert] for expert in kept) / total,
        "groups": [list(group) for group in layer.groups],
        "dropped": sorted(
            set(range(manifest.before)) - {e for group in layer.groups for e in group}
        ),
        "domains": {name: list(values) for name, values in layer.domains.items()},
        "domain_correlation": _domain_correlations(layer),
        "refit": None if layer.refit is None else asdict(layer.refit),
        "seconds": done.get("seconds"),
        "peak_anonymous_bytes": done.get("peak_anonymous_bytes"),
        **_statistics(workspace.statistics(layer.index)),
    }


def _domain_correlations(layer: LayerGroups) -> dict[str, float | None]:
    """Return Spearman's correlation of the saliencies of each two domains."""
    ranks = {
        name: [float(sorted(values).index(value)) for value in values]
        for name, values in layer.domains.items()
    }
    names = list(ranks)
    return {
        f"{one}, {other}": correlation(ranks[one], ranks[other])
        for number, one in enumerate(names)
        for other in names[number + 1 :]
    }


def _statistics(path: Path) -> dict[str, Any]:
    """Return routed tokens, similarities and gains of alignment, if they are still known."""
    known: dict[str, Any] = {"similarity": None, "aligned": [], "routed": None}
    if regular_size(path) is None:
        return known
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            known["routed"] = file.get_tensor("count_E").tolist()
            if "distance_EE" in names:
                known["similarity"] = 1 - file.get_tensor("distance_EE")
            if "aligned" in names:
                rows = file.get_tensor("aligned").tolist()
                known["aligned"] = [
                    {"expert": int(expert), "kept": kept, "least": least}
                    for expert, kept, least in rows
                    if math.isfinite(kept)
                ]
    except (OSError, SafetensorError):
        return known
    return known


def without_matrices(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts for JSON: similarities rounded, which are most of the bytes."""
    layers = [
        {
            **layer,
            "similarity": None
            if layer["similarity"] is None
            else [[round(value, 4) for value in row] for row in layer["similarity"].tolist()],
        }
        for layer in facts["layers"]
    ]
    return {**facts, "layers": layers}
