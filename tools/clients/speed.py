"""Tokens a second of a model and of what was made of it, in transformers and vLLM.

    python tools/clients/speed.py

A drawn model of Qwen3-30B-A3B's kind with fewer and narrower layers; outputs of the same
bytes: REAP, and slices of halves and quarters, whose experts are narrower and more a token.
In float32, for which every processor has units. All models are loaded, then timed in turn, so
that a busy machine slows them alike; the table has medians of the rounds, and in brackets
relative to the original's in the same round.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from checkpoints import common_config, draw, write_tokenizer
from environments import prepare
from texts import calibration_tokens
from transformers import AutoConfig, AutoModelForCausalLM

import ream_stream

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHAPE = {
    "hidden_size": 512,
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "moe_intermediate_size": 384,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
OUTPUTS: dict[str, dict[str, Any]] = {
    "REAP": {"method": "reap"},
    "slices, halves": {"method": "slices", "slices": 2},
    "slices, quarters": {"method": "slices", "slices": 4},
}
ROUNDS = 3
REQUEST = {"sequences": 8, "prompt": 128, "new_tokens": 16, "rounds": ROUNDS}


def main() -> int:
    """Make the models, time them, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, default=ROOT / ".venv" / "clients")
    folder = parser.parse_args().work_dir.resolve()
    models = _models(folder / "speed", calibration_tokens(folder / "calibration.safetensors"))
    vllm, variables = prepare("vllm", folder / "environments")
    print("| | bytes | experts | width | a token | client | prompt | generation |")
    print("|---|---|---|---|---|---|---|---|")
    for client, python, environment, probe in (
        ("transformers", sys.executable, None, "speed_transformers.py"),
        ("vLLM", str(vllm), variables, "speed_vllm.py"),
    ):
        asked, answered = folder / "speed.json", folder / "speed-answer.json"
        folders = {name: str(path) for name, path in models.items()}
        asked.write_text(json.dumps({"models": folders, **REQUEST}), encoding="utf-8")
        command = [python, str(HERE / probe), str(asked), str(answered)]
        subprocess.run(command, env=environment, check=True, stdout=sys.stderr)
        told = json.loads(answered.read_text(encoding="utf-8"))
        first = next(iter(models))
        for name, path in models.items():
            row = [name, *_numbers(path), client]
            for kind in ("prompt", "generation"):
                ratios = [
                    a / b for a, b in zip(told[first][kind], told[name][kind], strict=True)
                ]
                tokens = REQUEST["sequences"] * (
                    REQUEST["prompt"] if kind == "prompt" else REQUEST["new_tokens"]
                )
                rate = tokens / statistics.median(told[name][kind])
                row.append(f"{rate:.0f} tokens/s ({statistics.median(ratios):.2f})")
            print(f"| {' | '.join(row)} |", flush=True)
    print(f"\nMedians of {ROUNDS} rounds; in brackets relative to the original in that round.")
    return 0


def _models(folder: Path, calibration: Path) -> dict[str, Path]:
    models = {"original": folder / "original"}
    if not (models["original"] / "config.json").exists():
        _write(models["original"])
    for name, arguments in OUTPUTS.items():
        models[name] = folder / name.replace(" ", "-").replace(",", "")
        ream_stream.compress(
            models["original"], models[name], keep=0.75, calibration=calibration, **arguments
        )
    return models


def _write(folder: Path) -> None:
    """Write the drawn model."""
    config = {**common_config("qwen3_moe"), **SHAPE}
    folder.mkdir(parents=True)
    text = json.dumps(config, indent=2)
    (folder / "config.json").write_text(text, encoding="utf-8")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    draw(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "config.json").write_text(text, encoding="utf-8")


def _numbers(folder: Path) -> list[str]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    keys = ("num_experts", "moe_intermediate_size", "num_experts_per_tok")
    return [f"{size / 1e6:.1f} MB", *(str(config[key]) for key in keys)]


if __name__ == "__main__":
    sys.exit(main())
