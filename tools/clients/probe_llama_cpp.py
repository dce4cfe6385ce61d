"""Convert checkpoints to GGUF with llama.cpp's converter, and score them with its C API.

The folder of llama.cpp's sources, the shared object that has its C API and the one that
environments.py compiled are told by environment variables.
"""

import ctypes
import logging
import math
import os
import runpy
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import probe

SOURCES = Path(os.environ["LLAMA_CPP_SOURCES"])


def convert(folder: str, path: str, kind: str = "f32") -> None:
    """Write the GGUF of a checkpoint by the converter, as its command line does.

    A tokenizer that the converter does not know has GPT-2's pre-tokenizer: tokens are
    given as numbers here, and the converter refuses to guess.
    """
    sys.path[:0] = [str(SOURCES), str(SOURCES / "gguf-py")]
    from conversion.base import TextModel

    known = TextModel.get_vocab_base_pre

    def or_gpt2(self: TextModel, tokenizer: object) -> str:
        logging.disable(logging.WARNING)
        try:
            told: str = known(self, tokenizer)
        except NotImplementedError:
            return "gpt-2"
        else:
            return told
        finally:
            logging.disable(logging.NOTSET)

    TextModel.get_vocab_base_pre, arguments = or_gpt2, sys.argv
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", path, "--outtype", kind]
    try:
        runpy.run_path(str(SOURCES / sys.argv[0]), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"the converter ended with {ended.code}") from None
    finally:
        TextModel.get_vocab_base_pre, sys.argv = known, arguments


def library() -> ctypes.CDLL:
    """Return the compiled functions, with llama.cpp's own symbols loaded."""
    ctypes.CDLL(os.environ["LLAMA_CPP_LIBRARY"], mode=ctypes.RTLD_GLOBAL)
    scores = ctypes.CDLL(os.environ["LLAMA_CPP_SCORES"])
    scores.scores_load.restype = ctypes.c_void_p
    scores.scores_load.argtypes = [ctypes.c_char_p]
    scores.scores_vocabulary.argtypes = scores.scores_free.argtypes = [ctypes.c_void_p]
    scores.scores_logits.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p,
    ]  # fmt: skip
    return scores


def gguf_scores(
    path: str, tokens: list[list[int]], prompts: list[list[int]], new_tokens: int
) -> probe.Scores:
    """Return log-probabilities of tokens, and greedy tokens by whole forwards."""
    scores = library()
    model = scores.scores_load(path.encode())
    if not model:
        raise RuntimeError("llama.cpp cannot load the file")

    def logits(sequence: list[int]) -> np.ndarray:
        given = np.array(sequence, dtype=np.int32)
        out = np.empty((len(sequence), scores.scores_vocabulary(model)), dtype=np.float32)
        status = scores.scores_logits(model, given.ctypes.data, len(given), out.ctypes.data)
        if status:
            raise RuntimeError(f"llama_decode ended with {status}")
        return out.astype(np.float64)

    try:
        logprobs = []
        for sequence in tokens:
            told = logits(sequence)[:-1]
            highest = told.max(axis=1, keepdims=True)
            told -= highest + np.log(np.exp(told - highest).sum(axis=1, keepdims=True))
            logprobs.append(told[np.arange(len(told)), sequence[1:]].tolist())
        greedy = []
        for prompt in prompts:
            grown = list(prompt)
            for _ in range(new_tokens):
                grown.append(int(logits(grown)[-1].argmax()))
            greedy.append(grown[len(prompt) :])
    finally:
        scores.scores_free(model)
    if not all(math.isfinite(each) for sequence in logprobs for each in sequence):
        raise RuntimeError("llama.cpp's log-probabilities are not finite")
    return logprobs, greedy


def score(
    folder: str, tokens: list[list[int]], prompts: list[list[int]], new_tokens: int
) -> probe.Scores:
    """Return what llama.cpp computes from the converted checkpoint."""
    with tempfile.TemporaryDirectory() as made:
        path = f"{made}/model.gguf"
        convert(folder, path)
        return gguf_scores(path, tokens, prompts, new_tokens)


if __name__ == "__main__":
    probe.run(score, "xllamacpp " + version("xllamacpp"))
