"""What clients make of an output: the known rules, asked of its files."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ream_stream.events import Finding
from ream_stream.planning.serving_rules import (
    CLIENT_NAMES,
    RULES,
    Served,
    broken,
    served,
    serving_notes,
)

from .checks import Subject

NUMBERS = ("headers", "experts", "model", "routing")
"""Checks that must pass before a rule can be asked."""


def client_findings(subject: Subject, clients: Sequence[str]) -> Iterator[Finding]:
    """Yield what each client makes of an output: a failure, notes, or that all is well."""
    numbers = _served(subject)
    for client in clients:
        rules, well = list(broken(numbers, [client])), True
        for rule in rules:
            is_note = rule.effect != "fails"
            well = well and is_note
            yield Finding(check=client, ok=is_note, is_note=is_note, message=rule.note(numbers))
        known = sum(client in rule.clients for rule in RULES)
        if well and known:
            name = CLIENT_NAMES[client]
            message = f"none of the {known} known reasons for {name} to refuse it"
            yield Finding(check=client, ok=True, message=message)


def notes_on_counts(subject: Subject) -> list[str]:
    """Return a sentence for each rule that the output breaks and its source kept to."""
    manifest, after = subject.manifest, _served(subject)
    before = replace(
        after,
        experts=manifest.before,
        width=manifest.width or after.width,
        top_k=after.top_k // max(1, manifest.slices),
        files=(),
    )
    return serving_notes(replace(after, files=()), before)


def _served(subject: Subject) -> Served:
    model = subject.model
    stack = next(layer.stack for layer in model.layers if layer.stack)
    groups = subject.family.groups(model.text_config)
    files = [path.name for path in subject.checkpoint.files()]
    return served(stack, model.top_k, groups, files)
