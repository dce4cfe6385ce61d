"""The facts of a report as one HTML file that needs nothing else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ream_stream.units import format_seconds, format_size
from ream_stream.untrusted import printable

from .experts import details, overview
from .figures import STYLE, lines, pareto_picture, ranges, size_picture

_UNKNOWN = "-"
_MOST_ROWS = 40


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
        title=_title(facts),
        sentence=_sentence(facts),
        verdict=_verdict(facts),
        headline=_headline(facts),
        quality=_quality(facts["evaluation"]) if facts["evaluation"] else None,
        comparison=_comparison(facts["comparison"]) if facts["comparison"] else None,
        sizes=_sizes(facts),
        pareto=pareto_picture(facts["sweep"]) if facts["sweep"] else "",
        sweep_volumes=_volumes(facts["sweep"]) if facts["sweep"] else [],
        resources=_resources(facts) if facts["run"] else [],
        phases=_phases(facts) if facts["run"] else None,
        layers=_layers(facts),
        overview=overview(facts["layers"]),
        details=details(facts["layers"]),
        settings=[(name, str(value)) for name, value in facts["made"]["settings"].items()],
    )


def _shown(value: object) -> object:
    return printable(value, keep="\n") if type(value) is str else value


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> Markup:
    """Return a table that scrolls by itself where the page is narrow, or the table long."""
    head = "".join(f"<th>{escape(printable(each))}</th>" for each in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(printable(cell))}</td>' for cell in row)}</tr>"
        for row in rows
    )
    told = f'<p class="soft">{escape(caption)}</p>' if caption else ""
    box = "scroll tall" if len(rows) > _MOST_ROWS else "scroll"
    return Markup(
        f'{told}<div class="{box}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _title(facts: Mapping[str, Any]) -> str:
    made = facts["made"]
    return (
        f"{facts['source'] or facts['output']}: {made['experts_before']} to "
        f"{made['experts_after']} experts a layer"
    )


def _verdict(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return whether it is whole and how good it is, each sentence with its class."""
    return [_whole(facts), _worth(facts["evaluation"])]


def _whole(facts: Mapping[str, Any]) -> tuple[str, str]:
    findings = facts["verification"]["findings"]
    bad = [each["message"] for each in findings if not each["ok"]]
    told = "" if facts["scanned"] else " Headers and documents only: verify reads all tensors."
    if bad:
        return "bad", f"Not whole: {len(bad)} of {len(findings)} findings are bad. {bad[0]}"
    passed = sum(not each["is_note"] for each in findings)
    return "good", f"Whole and consistent, by {passed} checks.{told}"


def _worth(known: Mapping[str, Any] | None) -> tuple[str, str]:
    if known is None:
        return (
            "soft",
            "Quality is not measured here: give what eval --json prints to --results.",
        )
    own = known["perplexity"]
    if not known.get("against") or known.get("divergence") is None:
        return "soft", f"Perplexity {_number(own, 2)}; not compared with the original."
    before, gap = known["against"]["perplexity"], known["difference"]["nats"]
    change = f" ({own / before - 1:+.1%})" if own and before else ""
    return (
        "soft",
        f"Perplexity {_number(before, 2)} to {_number(own, 2)}{change}, "
        f"{_number(gap, 4)} nats a token more; the same token comes first in "
        f"{known['agreement']['value']:.1%} of places.",
    )


def _sentence(facts: Mapping[str, Any]) -> str:
    made = facts["made"]
    settings, kept = made["settings"], f"{made['experts_after']} kept"
    if settings.get("slices"):
        how = (
            f"cut into {settings['slices']} slices each, {kept}, ranked by the error of a loss"
        )
    elif settings["grouping"] == "none":
        how = f"{kept}, the others dropped; ranked by {settings['saliency']}"
    else:
        how = (
            f"{kept}, the others merged into them by {settings['grouping']}; "
            f"ranked by {settings['saliency']}"
        )
    return (
        f"{made['experts_before']} experts a layer, {how}. Made by ream-stream "
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
    losses = [
        (name, each["difference"]["nats"], each["difference"]["stderr"])
        for name, each in several.items()
        if compared and each["difference"]["nats"] is not None
    ]
    return {
        "heads": heads,
        "rows": rows,
        "caption": "+- is the standard error over sequences; nats more is a paired difference.",
        "losses": ranges(losses, "nats a token more than the original") if losses else "",
        "layers": drawn,
    }


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


def _sizes(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return pictures of loss against size, each with what it recommends and why."""
    found = [facts[kind].get("curve") for kind in ("comparison", "sweep") if facts[kind]]
    return [
        (
            size_picture(curve),
            f"Recommended: {curve['points'][curve['recommended']]['experts']} experts by "
            f"{curve['points'][curve['recommended']]['name']}; {curve['rule']}.",
        )
        for curve in found
        if curve
    ]


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
    rows, refitted = [], [layer["refit"] for layer in facts["layers"] if layer["refit"]]
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
            " Error before refit: squared error of the experts' sum, as a share of its "
            "own squares, on sequences that were held back; then what the refit left of it."
            if refits
            else ""
        )
        + (" Last: rank correlation of the saliencies of two domains." if pairs else "")
    )
    series = {
        "before the refit": [each["error_before"] for each in refitted],
        "after it": [each["error_before"] * each["remaining_error"] for each in refitted],
    }
    drawn = lines(series, "layer with experts", "squared error, share") if refitted else ""
    return {"heads": heads, "rows": rows, "caption": caption, "errors": drawn}


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
