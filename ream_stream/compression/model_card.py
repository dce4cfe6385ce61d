"""The model card of an output: metadata that the hub understands, and what was done.

It follows from the plan and the journal alone, as all that `finish` writes: the same run
gives the same bytes.
"""

import json
import re
from pathlib import Path

from ream_stream import __version__
from ream_stream.calibration.tokens import ONE_DOMAIN, Tokens
from ream_stream.planning.plan import Plan
from ream_stream.settings import Method
from ream_stream.units import format_size

from .journal import Journal


def card(plan: Plan, tokens: Tokens, journal: Journal) -> str:
    """Return the card as Markdown with a YAML head."""
    import yaml  # type: ignore[import-untyped]

    settings, method = plan.settings, plan.settings.method
    verb = "pruned" if method.grouping == "none" else "merged"
    name, base = plan.source.folder.resolve().name, base_model(plan.source.folder)
    head = {
        **({"base_model": base} if base else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [
            "mixture-of-experts",
            f"expert-{'pruning' if verb == 'pruned' else 'merging'}",
        ],
        **plan.inherited,
    }
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    shown = base or name
    groups = [g for record in journal.layers for g in record.groups or ()]
    changed = sum(len(group) > 1 for group in groups)
    return f"""---
{front}---

# {shown}, {plan.num_experts} experts a layer {verb} to {settings.experts}

Made by ream-stream {__version__} from {shown}: {len(plan.moe_layers)} layers with experts,
{format_size(plan.source_bytes)} of weights to {format_size(plan.output_bytes)}. \
{_what(method.grouping, changed, len(groups))}{_refit(method, journal)}

Calibrated on {tokens.num_sequences} sequences of {tokens.sequence_length} tokens\
{_domains(tokens)} (digest `{tokens.digest}`). Tensor names, dtypes and layout are those of the
source; groups, saliencies and digests are in `ream_stream.json`.

```json
{json.dumps(settings.fields(), indent=2)}
```
"""


def _refit(method: Method, journal: Journal) -> str:
    """Return the sentence about refits, if there were any."""
    done = [record.refitted for record in journal.layers if record.refitted]
    if method.refit == "none":
        return ""
    which = "the kept" if method.refit_experts == "all" else "merged"
    helped = sum(each.penalty is not None for each in done)
    return (
        f"\nDown projections of {which} experts were refitted in closed form, layer by layer, "
        f"to what\nthe original layer gives on the calibration set; it helped in {helped} of "
        f"{len(done)} layers, on\nsequences held back."
    )


def base_model(folder: Path) -> str | None:
    """Return the hub's name of a source: from the cache it lies in, or of its folder."""
    resolved = folder.resolve()
    for part in reversed(resolved.parts):
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return resolved.name if re.fullmatch(r"[\w.-]+", resolved.name) else None


def _what(grouping: str, changed: int, groups: int) -> str:
    if grouping == "none":
        return f"All {groups} experts that are left are byte copies."
    return f"{changed} of {groups} experts were merged of several, the others are byte copies."


def _domains(tokens: Tokens) -> str:
    if tokens.domains == (ONE_DOMAIN,):
        return ""
    counts = tokens.domain_S.bincount().tolist()
    return ", " + ", ".join(
        f"{count / tokens.num_sequences:.0%} {name}"
        for name, count in zip(tokens.domains, counts, strict=True)
    )
