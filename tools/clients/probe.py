"""What a client says of checkpoints, as one JSON: the part that all probes share.

A probe runs with the Python of its client's own environment, so it imports that client and
the standard library only:

    PYTHON probe_NAME.py REQUEST.json ANSWER.json

The request has ``models`` (folders by name), ``tokens`` (sequences to score), ``prompts``
and ``new_tokens``; the answer has for each model the log-probabilities of the tokens after
the first and the greedy tokens after each prompt, or the error. What the client writes to
standard error stands after a line of `MARK` with the model's name.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "@@ model "

Scores = tuple[list[list[float]], list[list[int]]]
Score = Callable[[str, list[list[int]], list[list[int]], int], Scores]


def run(score: Score, version: str) -> None:
    """Score each model of the request, and write the answer after each: a crash loses one.

    The first is tried before, unrecorded: a client that cannot load it is asked nothing more.
    """
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answer: dict[str, Any] = {"version": version, "models": {}}
    # some clients warn at the second model of a process of what the first has set up
    warm_up = {"": next(iter(request["models"].values()))}
    for name, folder in [*warm_up.items(), *request["models"].items()]:
        os.write(2, f"\n{MARK}{name}\n".encode())
        try:
            logprobs, greedy = score(
                folder, request["tokens"], request["prompts"], request["new_tokens"]
            )
            answer["models"][name] = {"logprobs": logprobs, "greedy": greedy}
        # a client may raise anything, and what it raises is the answer
        except BaseException as error:
            traceback.print_exc()
            if isinstance(error, KeyboardInterrupt):
                raise
            said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
            answer["models"][name] = {"error": f"{type(error).__name__}: {said}"}
        first = answer["models"].pop("", None)
        if first and "error" in first:
            # what a failed attempt left behind would be the error of the next
            answer["models"] = dict.fromkeys(request["models"], first)
        Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")
        if first and "error" in first:
            return
