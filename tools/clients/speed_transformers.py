"""Time prompts and generation in transformers, model by model in turn, for speed.py."""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
count, length, new = request["sequences"], request["prompt"], request["new_tokens"]
ids = torch.randint(2, 4000, (count, length), generator=torch.Generator().manual_seed(0))
models = {
    name: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, folder in request["models"].items()
}
times: dict[str, dict[str, list[float]]] = {n: {"prompt": [], "generation": []} for n in models}
with torch.inference_mode():
    for number in range(request["rounds"] + 1):
        for name, model in models.items():
            start = time.perf_counter()
            told = model(ids, use_cache=True, logits_to_keep=1)
            middle = time.perf_counter()
            token = told.logits[:, -1:].argmax(-1)
            for _ in range(new):
                told = model(token, past_key_values=told.past_key_values, use_cache=True)
                token = told.logits.argmax(-1)
            end = time.perf_counter()
            if number:  # the first warms up
                times[name]["prompt"].append(middle - start)
                times[name]["generation"].append(end - middle)
Path(sys.argv[2]).write_text(json.dumps(times), encoding="utf-8")
