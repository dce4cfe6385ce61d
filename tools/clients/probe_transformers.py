"""Score checkpoints with transformers, as it loads them, in float32."""

import probe
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    FineGrainedFP8Config,
)


def score(
    folder: str, tokens: list[list[int]], prompts: list[list[int]], new_tokens: int
) -> probe.Scores:
    """Return log-probabilities of tokens, and greedy tokens, in float32."""
    AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    more = {}
    if getattr(config, "quantization_config", None):
        # its products in FP8 are for GPUs: the floats that the codes stand for
        more["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    model = model.float().eval()
    logprobs, greedy = [], []
    with torch.inference_mode():
        for sequence in torch.tensor(tokens):
            logits = model(sequence[None]).logits[0, :-1].float()
            chosen = logits.log_softmax(dim=-1).gather(1, sequence[1:, None])
            logprobs.append(chosen[:, 0].tolist())
        for prompt in map(torch.tensor, prompts):
            told = model.generate(
                prompt[None],
                attention_mask=torch.ones_like(prompt[None]),
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
            )
            greedy.append(told[0, len(prompt) :].tolist())
    return logprobs, greedy


if __name__ == "__main__":
    probe.run(score, transformers.__version__)
