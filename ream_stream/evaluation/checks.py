"""What is true of a good output, except for the bytes of its tensors.

Checks are small functions in a table. Each yields a sentence for every thing that
is wrong, saying what and where.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ream_stream.checkpoint.expert_stack import ExpertStack
from ream_stream.checkpoint.reader import (
    INDEX,
    Checkpoint,
    open_checkpoint,
)
from ream_stream.compression.manifest import MANIFEST, Manifest, read_manifest
from ream_stream.errors import DamagedError
from ream_stream.file_access import read_json, read_object
from ream_stream.files import PARTIAL
from ream_stream.model.families import COUNT_KEYS, Family, family_of, told_counts
from ream_stream.model.streamed_model import StreamedModel

from .consistency import dtype_problems, format_problems, group_problems, list_problems


class Subject:
    """An output folder, read as far as a check asks for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def manifest(self) -> Manifest:
        """Manifest of the checkpoint."""
        return read_manifest(self.folder / MANIFEST)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Config, index and headers of the checkpoint."""
        return open_checkpoint(self.folder)

    @cached_property
    def stacks(self) -> Mapping[str, ExpertStack]:
        """Expert stacks by prefix, anywhere in the model."""
        return self.checkpoint.experts

    @property
    def family(self) -> Family:
        """The model's family."""
        return family_of(self.checkpoint.config)

    @cached_property
    def model(self) -> StreamedModel:
        """The model class of its config, with its tensors' names and shapes."""
        family_of(
            self.checkpoint.config
        )  # of others transformers says less clearly what is wrong
        return StreamedModel(self.checkpoint, torch.bfloat16, torch.device("cpu"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that is true of a good output."""

    name: str
    """Subject of the check."""

    good: str
    """Sentence for an output without problems."""

    problems: Callable[[Subject], Iterator[str]]
    """Yields a sentence for each problem; may raise any error that a damaged file causes."""

    needs: tuple[str, ...] = ()
    """Names of checks that must pass first; otherwise this one finds nothing new."""


def _manifest(subject: Subject) -> Iterator[str]:
    manifest = subject.manifest
    most = manifest.before * max(1, manifest.slices)
    if not 1 <= manifest.after <= most:
        yield f"{MANIFEST} says {manifest.after} experts of {most} are kept"
    if manifest.fingerprint.get("experts") != manifest.after:
        asked = manifest.fingerprint.get("experts")
        yield f"{MANIFEST} says {asked!r} experts were asked for and {manifest.after} are kept"


def _headers(subject: Subject) -> Iterator[str]:
    subject.checkpoint.files()  # that it opens is the check
    yield from ()


def _sizes(subject: Subject) -> Iterator[str]:
    for name, file in subject.manifest.files.items():
        path = subject.folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != file.size:
            yield f"{name} has {path.stat().st_size} bytes, the manifest says {file.size}"


def _complete(subject: Subject) -> Iterator[str]:
    for name in subject.manifest.documents or ():
        if not (subject.folder / name).is_file():
            yield f"{name} is missing"


def _listed(subject: Subject) -> Iterator[str]:
    indexed = {path.name for path in subject.checkpoint.files()}
    listed = set(subject.manifest.files)
    for name in sorted(indexed - listed):
        yield f"{name} is in the index but not in the manifest"
    for name in sorted(listed - indexed):
        yield f"{name} is in the manifest but not in the index"


def _strays(subject: Subject) -> Iterator[str]:
    indexed = {path.name for path in subject.checkpoint.files()}
    for path in sorted(subject.folder.iterdir()):
        if path.name.endswith(PARTIAL):
            yield f"{path.name} is left from a write that was cut off"
        elif path.suffix == ".safetensors" and path.name not in indexed:
            yield f"{path.name} is not in the index; a loader may read it all the same"


def _total(subject: Subject) -> Iterator[str]:
    if not (subject.folder / INDEX).is_file():
        return
    metadata = read_object(subject.folder / INDEX).get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(entry.nbytes for entry in subject.checkpoint.entries.values())
    if said != total:
        yield f"{INDEX} says total_size {said!r}, its tensors have {total} bytes"


def _documents(subject: Subject) -> Iterator[str]:
    for path in sorted(subject.folder.glob("*.json")):
        try:
            read_json(path, finite=False)
        except DamagedError as error:
            yield str(error)


def _model(subject: Subject) -> Iterator[str]:
    model = subject.model
    if not any(layer.stack for layer in model.layers):
        yield "the model has no layer with experts"


def _experts(subject: Subject) -> Iterator[str]:
    counts = told_counts(subject.checkpoint.config)
    if not counts:
        keys = " or ".join(COUNT_KEYS)
        yield f"config.json has no {keys}: readers will take their class's default"
    for prefix, stack in subject.stacks.items():
        # a class may not read all of them: what it reads is for the check of the model
        if counts and stack.count not in counts.values():
            key, count = next(iter(counts.items()))
            yield f"{prefix} has {stack.count} experts, config.json says {key}={count!r}"


def _lists(subject: Subject) -> Iterator[str]:
    modules = [name for name, _ in subject.model.model.named_modules()]
    most = max((stack.count for stack in subject.stacks.values()), default=0)
    yield from list_problems(subject.checkpoint, modules, most)


def _kept(subject: Subject) -> Iterator[str]:
    for prefix, stack in subject.stacks.items():
        if stack.count != subject.manifest.after:
            yield (
                f"{prefix} has {stack.count} experts, the manifest says "
                f"{subject.manifest.after}"
            )
    before, after = subject.manifest.before, subject.manifest.after
    for key, count in told_counts(subject.checkpoint.config).items():
        if count == before != after:
            yield f"config.json says {key}={count}, the manifest that {after} of them are kept"


def _routers(subject: Subject) -> Iterator[str]:
    entries = subject.checkpoint.entries
    for stack in subject.stacks.values():
        for name in subject.family.router_tensors(stack.block, entries)[0]:
            entry = entries.get(name)
            if entry is None:
                yield f"{name} is missing"
            elif stack.count not in entry.shape:
                yield (
                    f"{entry.name} has shape {entry.shape}, none of its axes is the layer's "
                    f"{stack.count} experts"
                )


def _routing(subject: Subject) -> Iterator[str]:
    routing = subject.family.routing(subject.model.text_config, subject.model.top_k)
    for layer in subject.model.layers:
        if layer.stack and (problem := routing.problem(layer.stack.count)):
            yield f"layer {layer.index} has {layer.stack.count} experts: {problem}"


def _groups(subject: Subject) -> Iterator[str]:
    model, manifest = subject.model, subject.manifest
    moe = [layer.index for layer in model.layers if layer.stack]
    described = [layer.index for layer in manifest.layers]
    if described != moe:
        yield f"{MANIFEST} has groups for layers {described}, those with experts are {moe}"
    yield from group_problems(manifest, subject.family.groups(model.text_config))


CHECKS: tuple[Check, ...] = (
    Check(
        name="manifest",
        good=f"{MANIFEST} is whole",
        problems=_manifest,
    ),
    Check(
        name="headers",
        good="config, index and headers of all shards agree",
        problems=_headers,
    ),
    Check(
        name="sizes",
        good="every shard has the size that the manifest says",
        problems=_sizes,
        needs=("manifest",),
    ),
    Check(
        name="complete",
        good="every file beside the shards is there that was written",
        problems=_complete,
        needs=("manifest",),
    ),
    Check(
        name="shards",
        good="index and manifest name the same shards",
        problems=_listed,
        needs=("manifest", "headers"),
    ),
    Check(
        name="strays",
        good="no file is left over",
        problems=_strays,
        needs=("headers",),
    ),
    Check(
        name="total",
        good="the index tells the bytes of all tensors",
        problems=_total,
        needs=("headers",),
    ),
    Check(
        name="documents",
        good="all JSON files can be read",
        problems=_documents,
    ),
    Check(
        name="experts",
        good="config.json tells the number of experts in every layer",
        problems=_experts,
        needs=("headers",),
    ),
    Check(
        name="formats",
        good="config.json tells of quantized tensors what there are",
        problems=lambda subject: format_problems(subject.checkpoint),
        needs=("headers", "experts"),
    ),
    Check(
        name="dtypes",
        good="no tensor has another dtype than in the other layers",
        problems=lambda subject: dtype_problems(subject.checkpoint),
        needs=("headers",),
    ),
    Check(
        name="kept",
        good="every layer has as many experts as the manifest says",
        problems=_kept,
        needs=("manifest", "headers", "experts"),
    ),
    Check(
        name="routers",
        good="every router chooses among the experts of its layer",
        problems=_routers,
        needs=("headers", "experts"),
    ),
    Check(
        name="model",
        good="transformers' class for config.json has a place for every tensor",
        problems=_model,
        needs=("headers",),
    ),
    Check(
        name="lists",
        good="quantization_config names no module that is gone",
        problems=_lists,
        needs=("headers", "experts", "model"),
    ),
    Check(
        name="routing",
        good="there are enough experts for every token",
        problems=_routing,
        needs=("headers", "model"),
    ),
    Check(
        name="groups",
        good="the manifest says where every expert is from",
        problems=_groups,
        needs=("manifest", "headers", "model"),
    ),
)
"""Checks of the folder in their order."""
