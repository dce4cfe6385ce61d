"""Convert a checkpoint, or score a GGUF file, in llama.cpp's environment, for chain.py."""

import json
import sys
from pathlib import Path

from probe_llama_cpp import convert, gguf_scores

request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
answer: dict[str, object] = {}
if "convert" in request:
    convert(*request["convert"])
if "score" in request:
    answer["logprobs"], answer["greedy"] = gguf_scores(*request["score"])
Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")
