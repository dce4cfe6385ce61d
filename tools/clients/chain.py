"""One chain end to end: compress, verify, convert to GGUF, quantize to Q4_K_M, generate.

    python tools/clients/chain.py
    python tools/clients/chain.py SOURCE --calibration TOKENS --text TOKENS

The packaged checkpoint and texts by default. The perplexity of the same tokens stands at each
step, for the source and for each output, so that one sees what compressing and what
quantizing costs. llama-quantize is built from the sources that the converter is from.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from checkpoints import BUILT_IN, write_source
from environments import prepare, quantizer
from safetensors.torch import load_file
from texts import calibration_tokens, scored_tokens

import ream_stream
from ream_stream.calibration.packing import load_tokenizer

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
METHODS, PROMPT, NEW_TOKENS = ("reap", "slices"), "The type of a", 24


def main() -> int:
    """Run the chain for source and outputs; print a row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="?", type=Path)
    parser.add_argument("--calibration", type=Path, help="token file to compress with")
    parser.add_argument("--text", type=Path, help="token file to score")
    parser.add_argument("--keep", default="75%")
    parser.add_argument("--work-dir", type=Path, default=ROOT / ".venv" / "clients" / "chain")
    options = parser.parse_args()
    folder = options.work_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    source = options.source or write_source(BUILT_IN, folder / "source")
    calibration = options.calibration or calibration_tokens(folder / "calibration.safetensors")
    text = options.text or folder / "text.safetensors"
    if options.text is None:
        scored_tokens(text)
    environment = prepare("llama.cpp", folder.parent / "environments")
    quantize = quantizer(folder.parent / "environments")
    models = {"source": source}
    for method in METHODS:
        models[method] = folder / method
        ream_stream.compress(
            source, models[method], keep=options.keep, method=method, calibration=calibration
        )
        if not ream_stream.verify(models[method], clients=["llama.cpp"]).ok:
            print(f"{method}: verify finds faults", file=sys.stderr)
            return 1
    print("| | eval | GGUF, f32 | | Q4_K_M | | formats |")
    print("|---|---|---|---|---|---|---|")
    said = []
    for name, model in models.items():
        row, generated = _row(name, model, text, environment, quantize, folder)
        print(f"| {' | '.join(row)} |", flush=True)
        said.append(f"{name}: `{' '.join(generated.split())}`")
    print(f"\nPerplexity of the same tokens; what Q4_K_M goes on with after `{PROMPT}`:\n")
    print("\n".join(f"- {line}" for line in said))
    return 0


def _row(
    name: str,
    model: Path,
    text: Path,
    environment: tuple[Path, Mapping[str, str]],
    quantize: Path,
    folder: Path,
) -> tuple[list[str], str]:
    """Convert and quantize a checkpoint; return its row and what it generates at the end."""
    whole, small = folder / f"{name}.gguf", folder / f"{name}-Q4_K_M.gguf"
    _gguf(environment, {"convert": [str(model), str(whole)]}, folder)
    done = subprocess.run(
        [str(quantize), str(whole), str(small), "Q4_K_M"],
        capture_output=True,
        text=True,
        check=True,
    )
    tokens = load_file(text)["input_ids"].tolist()
    scores = ream_stream.evaluate(model, text=text, compute_dtype="float32")
    assert scores.result is not None
    tokenizer = load_tokenizer(model)
    prompt = tokenizer.encode(PROMPT)
    row = [name, f"{scores.result.evaluation.perplexity:.3f}"]
    for path in (whole, small):
        told = _gguf(environment, {"score": [str(path), tokens, [prompt], NEW_TOKENS]}, folder)
        values = [value for sequence in told["logprobs"] for value in sequence]
        row += [
            f"{math.exp(-math.fsum(values) / len(values)):.3f}",
            f"{path.stat().st_size / 1e6:.2f} MB",
        ]
    generated = tokenizer.decode(told["greedy"][0])
    return [*row, _formats(done.stdout + done.stderr)], generated


def _gguf(
    environment: tuple[Path, Mapping[str, str]],
    wanted: Mapping[str, Sequence[object]],
    folder: Path,
) -> dict[str, list[list[float]]]:
    """Let the client's Python convert or score."""
    python, variables = environment
    asked, answered = folder / "request.json", folder / "answer.json"
    asked.write_text(json.dumps(wanted), encoding="utf-8")
    script = str(HERE / "gguf_step.py")
    subprocess.run(
        [str(python), script, str(asked), str(answered)],
        env=dict(variables),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    told: dict[str, list[list[float]]] = json.loads(answered.read_text(encoding="utf-8"))
    return told


def _formats(log: str) -> str:
    """Return how many tensors fell back to another format than Q4_K_M's."""
    fallen = sum("falling back" in line for line in log.splitlines())
    return f"{fallen} tensors in a larger format" if fallen else "all K-quants"


if __name__ == "__main__":
    sys.exit(main())
