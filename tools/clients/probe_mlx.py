"""Score checkpoints with mlx-lm, in float32."""

from importlib.metadata import version

import mlx.core as mx
import probe
from mlx_lm import load


def score(
    folder: str, tokens: list[list[int]], prompts: list[list[int]], new_tokens: int
) -> probe.Scores:
    """Return log-probabilities of tokens, and greedy tokens by whole forwards."""
    model = load(folder)[0]
    model.set_dtype(mx.float32)
    logprobs = []
    for sequence in tokens:
        logits = model(mx.array([sequence]))[0, :-1].astype(mx.float32)
        told = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        chosen = mx.take_along_axis(told, mx.array(sequence[1:])[:, None], axis=-1)
        logprobs.append(chosen[:, 0].tolist())
    greedy = []
    for prompt in prompts:
        grown = list(prompt)
        for _ in range(new_tokens):
            grown.append(int(mx.argmax(model(mx.array([grown]))[0, -1]).item()))
        greedy.append(grown[len(prompt) :])
    return logprobs, greedy


if __name__ == "__main__":
    probe.run(score, version("mlx-lm"))
