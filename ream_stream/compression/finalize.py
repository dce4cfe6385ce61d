"""The end of a run: every file of the output that is not a shard, in the order that counts.

The index comes after all tensors, and the manifest after the index: a folder
with a manifest is complete.
"""

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from ream_stream import __version__, files
from ream_stream.calibration.tokens import Tokens
from ream_stream.checkpoint.reader import INDEX, QUANTIZATION_FILE, Checkpoint
from ream_stream.checkpoint.source_card import CARD
from ream_stream.planning.plan import Plan

from .journal import Journal, Workspace
from .model_card import card

MANIFEST = "ream_stream.json"


def output_files(plan: Plan) -> tuple[str, ...]:
    """Return the names of all that a run writes in OUTPUT, in the order it does.

    Those of files in folders have slashes, whatever the system.
    """
    shards = [shard for layer in plan.layers for shard in layer.shards]
    return (
        *(shard.name for shard in [*shards, *plan.outside]),
        "config.json",
        *([QUANTIZATION_FILE] if plan.quantization_file is not None else []),
        *copied_files(plan.source),
        INDEX,
        CARD,
        MANIFEST,
    )


def write_rest(plan: Plan, tokens: Tokens, workspace: Workspace, journal: Journal) -> None:
    """Write config, other files, index, model card and manifest.

    Everything written here follows from the plan and the journal alone, without
    times or places, so doing it again gives the same bytes.
    """
    output = workspace.output
    files.write_json(output / "config.json", plan.config)
    if plan.quantization_file is not None:
        files.write_json(output / QUANTIZATION_FILE, plan.quantization_file)
    for name in copied_files(plan.source):
        files.make_directory((output / name).parent)
        files.copy_file(plan.source.folder / name, output / name)
    files.write_json(output / INDEX, _index(plan))
    files.write_bytes(output / CARD, card(plan, tokens, journal).encode())
    files.write_json(output / MANIFEST, _manifest(plan, journal))


def copied_files(source: Checkpoint) -> list[str]:
    """Return the names of a source's files that are copied, relative to its folder."""
    names = [path.relative_to(source.folder).as_posix() for path in source.other_files()]
    return [name for name in names if name not in {MANIFEST, CARD}]


def _index(plan: Plan) -> dict[str, Any]:
    shards = [*(shard for layer in plan.layers for shard in layer.shards), *plan.outside]
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _manifest(plan: Plan, journal: Journal) -> dict[str, Any]:
    return {
        "format": 1,
        "fingerprint": journal.fingerprint,
        "versions": {
            "ream-stream": __version__,
            **{name: version(name) for name in ("torch", "transformers", "safetensors")},
        },
        "experts": {"before": plan.num_experts, "after": plan.settings.experts},
        "files": {
            shard.name: {"size": shard.size, "sha256": shard.sha256}
            for shard in journal.shards()
        },
        "layers": [
            {
                "index": record.index,
                "saliency": record.saliency,
                **({"domains": record.domain_saliency} if record.domain_saliency else {}),
                "groups": record.groups,
                **({"refitted": asdict(record.refitted)} if record.refitted else {}),
            }
            for record in journal.layers
            if record.groups is not None
        ],
    }
