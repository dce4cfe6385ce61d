"""Load sources and outputs in the clients that people use, and compare what they compute.

    make test-clients
    python tools/clients/matrix.py --client vllm --source mixtral

Every source is compressed by each of `METHODS`. Each client, in an environment of its own,
scores the same tokens with source and outputs; each score is held to transformers' score of
the same files, in float32, and that to ``eval``. The exit status is 1 if a client that loads a
source fails or differs on one of its outputs. Checkpoints and answers stay in the work
folder: what was asked is not asked again.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from answers import Cell, cell, new_warnings, sections
from checkpoints import NAMES, write_source
from environments import ENVIRONMENTS, UnavailableError, prepare
from tables import printed
from texts import PROMPTS, calibration_tokens, scored_tokens

import ream_stream

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
METHODS: Mapping[str, Mapping[str, Any]] = {
    "REAM": {"method": "ream"},
    "REAP": {"method": "reap"},
    "energy": {"method": "energy"},
    "slices": {"method": "slices", "refit_target": "layer"},
}
"""Arguments of `ream_stream.compress` by the method's name."""

KEEP, NEW_TOKENS, SECONDS = 0.75, 16, 1800
SOURCE, REFERENCE = "source", "transformers"
PROBES = {
    REFERENCE: "probe_transformers.py",
    "transformers-4": "probe_transformers.py",
    "vllm": "probe_vllm.py",
    "llama.cpp": "probe_llama_cpp.py",
    "mlx": "probe_mlx.py",
}
"""Clients that score tokens, and the script that asks each."""
CLIENTS = [name for name in PROBES if name != REFERENCE]


def main() -> int:
    """Run the matrix, print its tables and keep them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, default=ROOT / ".venv" / "clients")
    parser.add_argument("--client", action="append", choices=CLIENTS)
    parser.add_argument("--source", action="append", choices=NAMES)
    options = parser.parse_args()
    clients = options.client or CLIENTS
    folder = options.work_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    calibration = calibration_tokens(folder / "calibration.safetensors")
    request = {
        "tokens": scored_tokens(folder / "scored.safetensors"),
        "prompts": PROMPTS,
        "new_tokens": NEW_TOKENS,
    }
    pythons, absent = environments([REFERENCE, *clients], folder / "environments")
    reference_python, reference_variables = pythons.pop(REFERENCE)
    cells: list[Cell] = []
    versions = {"ream-stream": version("ream-stream")}
    for name in options.source or NAMES:
        models = checkpoints(name, folder / "models" / name.replace(" ", "-"), calibration)
        reference = ask(REFERENCE, str(reference_python), reference_variables, models, request)
        versions[REFERENCE] = reference["version"]
        cells += compared(name, REFERENCE, evaluated(models, folder, reference), reference)
        for client, (python, variables) in pythons.items():
            answer = ask(client, str(python), variables, models, request)
            versions[client] = answer.get("version", versions.get(client, "-"))
            cells += compared(name, client, answer, reference)
            say(f"{name}, {client}:", *(each.text for each in cells[-len(models) :]))
    print("\n".join(printed(cells, versions, absent)))
    return any(not each.ok for each in cells if each.model != SOURCE)


def environments(
    clients: Sequence[str], root: Path
) -> tuple[dict[str, tuple[Path, dict[str, str]]], dict[str, str]]:
    """Return Python and variables of each client, and why others cannot be had."""
    pythons, absent = {}, {}
    for client in clients:
        say(f"{client}: making its environment with {ENVIRONMENTS[client].packages[0]}")
        try:
            pythons[client] = prepare(client, root)
        except UnavailableError as error:
            absent[client] = str(error)
    return pythons, absent


def checkpoints(name: str, folder: Path, calibration: Path) -> dict[str, Path]:
    """Return the source and its outputs, made unless they are there, but refused ones."""
    models = {SOURCE: write_source(name, folder / SOURCE)}
    for method, arguments in METHODS.items():
        output = folder / method
        try:
            ream_stream.compress(
                models[SOURCE],
                output,
                keep=KEEP,
                calibration=calibration,
                device="cpu",
                threads=1,
                compute_dtype="float32",
                **arguments,
            )
        except ream_stream.ReamStreamError as error:
            say(f"{name}, {method}: {error}")
            shutil.rmtree(output, ignore_errors=True)
            continue
        models[method] = output
    return models


def ask(
    client: str,
    python: str,
    variables: Mapping[str, str] | None,
    models: Mapping[str, Path],
    request: Mapping[str, Any],
) -> dict[str, Any]:
    """Ask a client of all models, unless it was asked; one that ends its process is told so."""
    folder = next(iter(models.values())).parent
    kept = folder / f"{client}.json"
    if kept.exists():
        answer: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if answer["models"].keys() == models.keys():
            return answer
    answer = {"models": {}, "warnings": {}}
    while left := {k: str(v) for k, v in models.items() if k not in answer["models"]}:
        told, log = _call(
            [python, str(HERE / PROBES[client])], variables, folder, left, request
        )
        answer |= {"version": told["version"]} if "version" in told else {}
        answer["models"] |= told["models"]
        answer["warnings"] |= sections(log)
    kept.write_text(json.dumps(answer), encoding="utf-8")
    return answer


def _call(
    command: Sequence[str],
    variables: Mapping[str, str] | None,
    folder: Path,
    models: Mapping[str, str],
    request: Mapping[str, Any],
) -> tuple[dict[str, Any], str]:
    """Run a probe; return its answer, with why it ended at a model if it did, and its log."""
    asked, answered = folder / "request.json", folder / "answer.json"
    asked.write_text(json.dumps({"models": models, **request}), encoding="utf-8")
    answered.unlink(missing_ok=True)
    try:
        done = subprocess.run(
            [*command, str(asked), str(answered)],
            env=variables,
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
        log, reason = done.stderr, f"its process ended with {done.returncode}"
    except subprocess.TimeoutExpired as late:
        log, reason = late.stderr or b"", f"no answer in {SECONDS} s"
    answer: dict[str, Any] = {"models": {}}
    if answered.exists():
        answer = json.loads(answered.read_text(encoding="utf-8"))
    missing = [name for name in models if name not in answer["models"]]
    if missing:
        answer["models"][missing[0]] = {"error": reason}
    text = log.decode(errors="replace")
    (folder / f"{Path(command[1]).stem}.log").write_text(text, encoding="utf-8")
    return answer, text


def evaluated(
    models: Mapping[str, Path], folder: Path, reference: Mapping[str, Any]
) -> dict[str, Any]:
    """Return transformers' answer, beside what ``eval`` says of the same tokens."""
    answer: dict[str, Any] = {"models": {}, "warnings": reference["warnings"]}
    for name, path in models.items():
        told = dict(reference["models"][name])
        if "error" not in told:
            scores = ream_stream.evaluate(
                path,
                text=folder / "scored.safetensors",
                device="cpu",
                compute_dtype="float32",
            )
            assert scores.result is not None
            values = [each for sequence in told["logprobs"] for each in sequence]
            told["eval"] = abs(scores.result.evaluation.nats + math.fsum(values) / len(values))
        answer["models"][name] = told
    return answer


def compared(
    source: str, client: str, answer: Mapping[str, Any], reference: Mapping[str, Any]
) -> list[Cell]:
    """Return a cell for each model of a source."""
    cells: list[Cell] = []
    for model, told in answer["models"].items():
        warnings = new_warnings(answer["warnings"], model, SOURCE)
        own = cells[0] if cells else None
        cells.append(
            cell(source, client, model, told, reference["models"][model], own, warnings)
        )
    return cells


def say(*words: str) -> None:
    """Tell how far it is, beside the tables."""
    print(*words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
