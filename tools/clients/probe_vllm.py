"""Score checkpoints with vLLM on the CPU: floats in float32, codes as it must, in bfloat16."""

import gc
import json
from pathlib import Path

import probe
import vllm
from vllm import LLM, SamplingParams


def score(
    folder: str, tokens: list[list[int]], prompts: list[list[int]], new_tokens: int
) -> probe.Scores:
    """Return log-probabilities of prompts' tokens, and greedy tokens."""
    longest = max(map(len, tokens)) + new_tokens + 1
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    dtype = "bfloat16" if "quantization_config" in config else "float32"
    model = LLM(folder, dtype=dtype, enforce_eager=True, max_model_len=longest)
    try:
        told = model.generate(
            [{"prompt_token_ids": sequence} for sequence in tokens],
            SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0),
        )
        logprobs = [
            [
                at[token].logprob
                for token, at in zip(sequence[1:], output.prompt_logprobs[1:], strict=True)
            ]
            for sequence, output in zip(tokens, told, strict=True)
        ]
        told = model.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True),
        )
        return logprobs, [list(output.outputs[0].token_ids) for output in told]
    finally:
        del model
        gc.collect()


if __name__ == "__main__":
    probe.run(score, vllm.__version__)
