"""The facts of a report as one HTML file that needs nothing else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ream_stream.units import format_seconds, format_size
from ream_stream.untrusted import printable

from .figures import STYLE, bars, heat_map, lines, pareto_picture

_UNKNOWN = "-"


def page(facts: Mapping[str, Any]) -> str:
    """Return the page of what `report_facts.gather` found."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.globals["table"] = _table
    template = environment.get_template("report.html.jinja")
    return template.render(
        facts=facts,
        style=Markup(STYLE),
        sentence=_sentence(facts),
        headline=_headline(facts),
        quality=_quality(facts["evaluation"]) if facts["evaluation"] else None,
        comparison=_comparison(facts["comparison"]) if facts["comparison"] else None,
        pareto=pareto_picture(facts["sweep"]) if facts["sweep"] else "",
        sweep_volumes=_volumes(facts["sweep"]) if facts["sweep"] else [],
        resources=_resources(facts) if facts["run"] else [],
        phases=_phases(facts) if facts["run"] else None,
        layers=_layers(facts),
        details=[_detail(layer) for layer in facts["layers"]],
        settings=[(name, str(value)) for name, value in facts["made"]["settings"].items()],
    )


def _shown(value: object) -> object:
    return printable(value, keep="\n") if type(value) is str else value


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> Markup:
    """Return a table that scrolls by itself where the page is narrow."""
    head = "".join(f"<th>{escape(printable(each))}</th>" for each in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(printable(cell))}</td>' for cell in row)}</tr>"
        for row in rows
    )
    told = f'<p class="soft">{escape(caption)}</p>' if caption else ""
    return Markup(
        f'{told}<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _sentence(facts: Mapping[str, Any]) -> str:
    made = facts["made"]
    settings = made["settings"]
    how = (
        "the others dropped"
        if settings["grouping"] == "none"
        else f"the others merged into them by {settings['grouping']}"
    )
    return (
        f"{made['experts_before']} experts a layer, {made['experts_after']} kept, {how}; "
        f"ranked by {settings['saliency']}. Made by ream-stream "
        f"{made['versions'].get('ream-stream', '')}."
    )


def _headline(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    sizes, run, evaluation = facts["sizes"], facts["run"], facts["evaluation"]
    before = sizes["source_bytes"]
    told = [
        ("weights", format_size(sizes["output_bytes"])),
        ("of the original", f"{sizes['output_bytes'] / before:.1%}" if before else _UNKNOWN),
        (
            "experts a layer",
            f"{facts['made']['experts_before']} to {facts['made']['experts_after']}",
        ),
    ]
    if run:
        told.append(("time", format_seconds(run["seconds"])))
        told.append(("peak memory", format_size(run["peak_anonymous_bytes"])))
    if evaluation and evaluation.get("agreement"):
        told.append(("same next token", f"{evaluation['agreement']['value']:.1%}"))
    return told


def _quality(known: Mapping[str, Any]) -> dict[str, Any]:
    several = {"all": known, **known.get("domains", {})}
    heads = ["domain", "tokens", "perplexity", "accuracy"]
    compared = known.get("divergence") is not None
    if compared:
        heads += ["original", "nats more", "divergence", "same top"]
    rows = []
    for name, each in several.items():
        row = [name, str(each["predicted"]), _number(each["perplexity"], 3)]
        row.append(_mean(each["accuracy"]))
        if compared:
            gap = {"value": each["difference"]["nats"], "stderr": each["difference"]["stderr"]}
            row += [_number(each["against"]["perplexity"], 3), _mean(gap)]
            row += [_mean(each["divergence"]), _mean(each["agreement"])]
        rows.append(row)
    errors = known.get("layers") or []
    drawn = ""
    if errors:
        series = {name: [each[name] for each in errors] for name in ("own", "inside", "total")}
        drawn = lines(series, "layer", "relative error")
    caption = "+- is the standard error over sequences; nats more is a paired difference."
    return {"heads": heads, "rows": rows, "caption": caption, "layers": drawn}


def _comparison(known: Mapping[str, Any]) -> dict[str, Any]:
    listed = known["summary"]
    domains = [name for name in listed[0]["scores"] if name != "all"] or ["all"]
    return {
        "heads": ["method", *domains, "nats more", "divergence", "same top"],
        "rows": [
            [
                each["name"],
                *(_spread(each["scores"][domain]["perplexity"], 2) for domain in domains),
                *(
                    _spread(each["scores"]["all"][measure], 4)
                    for measure in ("nats more", "divergence", "same top")
                ),
            ]
            for each in listed
        ],
    }


def _volumes(known: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, f"{value:.2f}") for name, value in known["hypervolume"].items()]


def _resources(facts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    plan, run = facts["plan"], facts["run"]
    planned = plan.get("memory_bytes")
    seconds = (plan.get("forecast") or {}).get("seconds")
    return [
        (
            "anonymous memory",
            format_size(planned) if planned else _UNKNOWN,
            format_size(run["peak_anonymous_bytes"]),
        ),
        (
            "time",
            format_seconds(seconds) if seconds is not None else _UNKNOWN,
            format_seconds(run["seconds"]),
        ),
    ]


def _phases(facts: Mapping[str, Any]) -> dict[str, Any]:
    measured = facts["run"]["seconds_by_phase"]
    planned = (facts["plan"].get("forecast") or {}).get("phases", {})
    names = list(dict.fromkeys([*planned, *measured]))
    rows = [
        [
            name,
            f"{planned[name]['seconds']:.1f}" if name in planned else _UNKNOWN,
            f"{measured[name]:.1f}" if name in measured else _UNKNOWN,
        ]
        for name in names
    ]
    return {"heads": ["phase", "planned", "measured"], "rows": rows}


def _layers(facts: Mapping[str, Any]) -> dict[str, Any]:
    pairs = list(facts["layers"][0]["domain_correlation"]) if facts["layers"] else []
    refits = any(layer["refit"] for layer in facts["layers"])
    heads = ["layer", "merged", "largest group", "saliency kept", "alignment gain"]
    heads += [*(["error before refit", "left by refit"] if refits else []), *pairs]
    rows = []
    for layer in facts["layers"]:
        groups = layer["groups"]
        rows.append(
            [
                str(layer["index"] + 1),
                str(sum(len(group) > 1 for group in groups)),
                str(max(map(len, groups))),
                f"{layer['kept_share']:.1%}",
                _gain(layer["aligned"]),
                *(_refit(layer["refit"]) if refits else []),
                *(
                    _UNKNOWN if value is None else f"{value:+.2f}"
                    for value in layer["domain_correlation"].values()
                ),
            ]
        )
    caption = (
        "Merged: new experts made of several. Alignment gain: how much smaller the mean cost "
        "of a pair of neurons is once they are lined up."
        + (
            " Lacking: squared error of the experts' sum before the refit, as a share of its "
            "own squares, on sequences that were held back; then what the refit left of it."
            if refits
            else ""
        )
        + (" Last: rank correlation of the saliencies of two domains." if pairs else "")
    )
    return {"heads": heads, "rows": rows, "caption": caption}


def _detail(layer: Mapping[str, Any]) -> dict[str, Any]:
    saliency, kept = layer["saliency"], set(layer["kept"])
    gone = [expert for expert in range(len(saliency)) if expert not in kept]
    order = sorted(range(len(saliency)), key=lambda expert: -saliency[expert])
    last = [place for place, expert in enumerate(order) if expert not in kept]
    merged = [group for group in layer["groups"] if len(group) > 1]
    return {
        "number": layer["index"] + 1,
        "title": f"{len(saliency)} to {len(kept)} experts, {len(merged)} merged",
        "saliency": bars(saliency, "saliency of each expert", marked=gone),
        "sorted": bars([saliency[e] for e in order], "saliency, sorted", marked=last),
        "legend": "In the second color: experts that are not kept.",
        "domains": [
            (name, bars(values, f"saliency on {name}", marked=gone))
            for name, values in layer["domains"].items()
        ],
        "similarity": heat_map(layer["similarity"], "similarity of experts")
        if layer["similarity"]
        else "",
        "groups": [f"{group[0]} took in {', '.join(map(str, group[1:]))}" for group in merged],
        "dropped": ", ".join(map(str, layer["dropped"])),
    }


def _refit(outcome: Mapping[str, Any] | None) -> list[str]:
    if outcome is None:
        return [_UNKNOWN, _UNKNOWN]
    left = (
        "left as it was" if outcome["penalty"] is None else f"{outcome['remaining_error']:.0%}"
    )
    return [f"{outcome['error_before']:.2%}", left]


def _gain(aligned: Sequence[Mapping[str, float]]) -> str:
    before = sum(each["kept"] for each in aligned)
    if not before:
        return _UNKNOWN
    return f"{1 - sum(each['least'] for each in aligned) / before:.1%}"


def _number(value: float | None, digits: int) -> str:
    return _UNKNOWN if value is None else f"{value:.{digits}f}"


def _mean(value: Mapping[str, float | None]) -> str:
    error = "" if value["stderr"] is None else f" +- {value['stderr']:.4f}"
    return _number(value["value"], 4) + error


def _spread(found: Sequence[float] | None, digits: int) -> str:
    if found is None:
        return _UNKNOWN
    mean, deviation = found
    return f"{mean:.{digits}f}" + (f" +- {deviation:.{digits}f}" if deviation else "")
