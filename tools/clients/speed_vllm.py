"""Time prompts and generation in vLLM, model by model in turn, for speed.py."""

import json
import sys
import time
from pathlib import Path

import torch
from vllm import LLM, SamplingParams

request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
count, length, new = request["sequences"], request["prompt"], request["new_tokens"]
ids = torch.randint(2, 4000, (count, length), generator=torch.Generator().manual_seed(0))
prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
models = {
    name: LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=length + new + 2,
    )
    for name, folder in request["models"].items()
}
times: dict[str, dict[str, list[float]]] = {n: {"prompt": [], "generation": []} for n in models}
for number in range(request["rounds"] + 1):
    for name, model in models.items():
        seconds = []
        for tokens in (1, new + 1):
            settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
            start = time.perf_counter()
            model.generate(prompts, settings, use_tqdm=False)
            seconds.append(time.perf_counter() - start)
        if number:  # the first warms up
            times[name]["prompt"].append(seconds[0])
            times[name]["generation"].append(seconds[1] - seconds[0])
Path(sys.argv[2]).write_text(json.dumps(times), encoding="utf-8")
