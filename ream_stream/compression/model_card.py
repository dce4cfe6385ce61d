"""The model card of an output: metadata that the hub understands, and what was done.

It follows from the plan and the journal alone, as all that `finish` writes: the same run
gives the same bytes. What was measured later is put in by `with_quality`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ream_stream import __version__
from ream_stream.calibration.tokens import ONE_DOMAIN, Tokens
from ream_stream.checkpoint.source_card import hub_name, source_name
from ream_stream.errors import UsageError
from ream_stream.planning.clients import next_steps
from ream_stream.planning.plan import Plan
from ream_stream.planning.serving_limits import check_served
from ream_stream.settings import Method, Settings, flag_of, options_of
from ream_stream.units import format_size, parse_size
from ream_stream.untrusted import printable, shell_words

from .config import PRESETS
from .journal import Journal
from .method_settings import default_group_size

PAPERS: Mapping[tuple[str, str], str] = {
    ("grouping", "ream"): "[REAM](https://arxiv.org/abs/2604.04356)",
    ("grouping", "mc-smoe"): "[MC-SMoE](https://arxiv.org/abs/2310.01334)",
    ("grouping", "hc-smoe"): "[HC-SMoE](https://arxiv.org/abs/2410.08589)",
    ("saliency", "reap"): "[REAP](https://arxiv.org/abs/2510.13999)",
}
"""Papers of parts of a method, by field and value."""

_MOST_NAME = 200


def card(plan: Plan, tokens: Tokens, journal: Journal) -> str:
    """Return the card as Markdown with a YAML head."""
    import yaml  # type: ignore[import-untyped]

    settings, method = plan.settings, plan.settings.method
    verb = "pruned" if method.grouping == "none" else "merged"
    base = hub_name(plan.source.folder)
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
    shown = printable(source_name(plan.source.folder), most=_MOST_NAME)
    mix = _domains(tokens)
    by = "" if settings.runs_layers else ", by statistics of the original model"
    return f"""---
{front}---

# {shown}, {plan.num_experts} experts a layer {_kept(plan, verb)}

Made by ream-stream {__version__} from {shown}: {len(plan.moe_layers)} layers with experts,
{format_size(plan.source_bytes)} of weights to {format_size(plan.output_bytes)}. \
{_experts(settings, journal)}{_refit(method, journal)}

Calibrated on {tokens.num_sequences} sequences of {tokens.sequence_length} tokens\
{mix} (digest `{tokens.digest}`){by}. Tensor names, dtypes and layout are those of the
source; groups, saliencies and digests are in `ream_stream.json`.
{_papers(method)}
## Quality

Not measured yet. What is lost depends on the text: measure it on what the model is for.

## Use

{_use(plan)}
## How it was made

```
{_command(plan, tokens, shown)}
```

```json
{json.dumps(settings.fields(), indent=2)}
```

## License

{_license(plan)}
"""


def _kept(plan: Plan, verb: str) -> str:
    settings, (old, new) = plan.settings, plan.experts
    if not settings.cuts:
        return f"{verb} to {settings.experts}"
    return f"of width {old.inner} cut and pruned to {settings.experts} of width {new.inner}"


def with_quality(text: str, known: Mapping[str, Any]) -> str:
    """Return a card with what ``eval --json`` measured, in place of what it said of quality.

    Parameters
    ----------
    text
        The card of an output.
    known
        The JSON of an evaluation.

    Raises
    ------
    ValueError
        The card has no section on quality.
    """
    section = re.compile(r"(?ms)^## Quality\n.*?(?=^## |\Z)")
    if not section.search(text):
        raise ValueError("it has no section '## Quality'")
    compared = known.get("divergence") is not None
    heads = ["text", "tokens", "perplexity"]
    heads += ["original", "nats a token more", "same first token"] if compared else []
    lines = [heads, ["---"] * len(heads)]
    for name, each in {"all": known, **known.get("domains", {})}.items():
        cells = [_cell(name), f"{each['predicted']}", _number(each["perplexity"], ".3f")]
        if compared:
            cells.append(_number(each["against"]["perplexity"], ".3f"))
            cells.append(_number(each["difference"]["nats"], "+.4f"))
            cells.append(_number(each["agreement"]["value"], ".1%"))
        lines.append(cells)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    told = f"## Quality\n\nMeasured by `ream-stream eval`, by text:\n\n{table}\n\n"
    return section.sub(lambda _: told, text, count=1)


def _experts(settings: Settings, journal: Journal) -> str:
    """Return what became of the experts that are left."""
    total = merged = refitted = copied = 0
    for record in journal.layers:
        helped = record.refitted is not None and record.refitted.penalty is not None
        for group in record.groups or ():
            several = len(group) > 1
            changed = helped and (several or settings.method.refit_experts == "all")
            total, merged = total + 1, merged + several
            refitted, copied = refitted + changed, copied + (not several and not changed)
    copy = "decoded copies" if settings.decodes else "byte copies"
    if settings.cuts:
        copy = "cut from the source's, with down projections made anew"
    if copied == total:
        return f"All {total} experts that are left are {copy}."
    parts = [
        (merged, "merged of several"),
        (refitted, "with refitted down projections"),
        (copied, copy),
    ]
    told = ", ".join(f"{count} {what}" for count, what in parts if count)
    return f"Of {total} experts that are left: {told}."


def _refit(method: Method, journal: Journal) -> str:
    """Return the sentence about refits, if there were any."""
    done = [record.refitted for record in journal.layers if record.refitted]
    if method.refit == "none" or not done:
        return ""
    helped = sum(each.penalty is not None for each in done)
    return (
        "\nRefits are in closed form, layer by layer, to what the original layer gives on the "
        f"calibration\nset; they helped in {helped} of {len(done)} layers, on sequences held "
        "back, and the others were left as they were."
    )


def _domains(tokens: Tokens) -> str:
    if tokens.domains == (ONE_DOMAIN,):
        return ""
    counts = tokens.domain_S.bincount(minlength=len(tokens.domains)).tolist()
    return ", " + ", ".join(
        f"{count / tokens.num_sequences:.0%} {printable(name, most=_MOST_NAME)}"
        for name, count in zip(tokens.domains, counts, strict=True)
    )


def _papers(method: Method) -> str:
    found = [paper for (name, value), paper in PAPERS.items() if getattr(method, name) == value]
    return f"\nMethod: {', '.join(found)}.\n" if found else ""


def _use(plan: Plan) -> str:
    if "text_config" in plan.config:
        return "As the source, with the same class of transformers.\n"
    return """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
tokens = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=20)[0]))
```

""" + _clients(plan)


def _clients(plan: Plan) -> str:
    """Return the commands of servers and converters that were tested with the family."""
    steps = next_steps("FOLDER", plan.config)
    lines = [f"- {use}: `{command}` ({told})" for use, command, told in steps]
    return "\n".join([*lines, ""])


def _command(plan: Plan, tokens: Tokens, shown: str) -> str:
    """Return a command that asks for the same: without the paths of the one that was typed."""
    settings, method = plan.settings, plan.settings.method
    size = default_group_size(settings.experts, plan.num_experts)

    def differing(preset: str) -> list[str]:
        usual = Method(**{"group_size": size, **PRESETS[preset]})
        return [
            name
            for name in options_of(Method)
            if getattr(method, name) != getattr(usual, name)
            # with statistics nothing is refitted
            and (settings.runs_layers or not name.startswith("refit"))
        ]

    preset = min(PRESETS, key=lambda name: len(differing(name)))
    words = ["--experts", str(settings.experts), "--method", preset]
    if settings.cuts and method.width is None:
        words += ["--width", str(plan.experts[1].inner)]
    for name in differing(preset):
        words += _option(options_of(Method)[name], getattr(method, name))
    usual = Settings(experts=settings.experts, method=method)
    if not settings.runs_layers:
        usual = replace(usual, sequential=settings.sequential)
    for name, field in options_of(Settings).items():
        if getattr(settings, name) != getattr(usual, name):
            words += _option(field, getattr(settings, name))
    words += [] if _is_served(plan) else ["--any-count"]
    if settings.runs_layers:
        words += ["--calibration", "TEXT", "--sequences", str(tokens.num_sequences)]
        words += ["--sequence-length", str(tokens.sequence_length)]
    else:
        words += ["--statistics", "STATISTICS"]
        weights = ",".join(f"{name}={each:g}" for name, each in settings.domain_weights)
        words += ["--weights", weights] if weights else []
    return shell_words(["ream-stream", "compress", shown, "OUTPUT", *words])


def _is_served(plan: Plan) -> bool:
    try:
        check_served(
            plan.settings.experts, plan.num_experts, plan.routing_groups, plan.output_top_k
        )
    except UsageError:
        return False
    return True


def _option(field: Any, value: Any) -> list[str]:  # noqa: ANN401
    """Return an option as it is typed."""
    flag = flag_of(field)
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag.removeprefix('--')}"]
    text = ",".join(f"{each:g}" for each in value) if isinstance(value, tuple) else str(value)
    return [flag, f"{text}B" if field.metadata.get("parse") is parse_size else text]


def _license(plan: Plan) -> str:
    if name := plan.inherited.get("license"):
        told = plan.inherited.get("license_name", name)
        return f"That of the source: {printable(str(told), most=_MOST_NAME)}."
    return "Not known: the card of the source names none. Look at it before you pass this on."


def _cell(text: str) -> str:
    return printable(text, most=_MOST_NAME).replace("|", "\\|")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
