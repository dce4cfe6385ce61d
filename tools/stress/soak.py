"""Kill a run of many small layers at random moments until it is done, and compare the bytes.

A model of 100 layers is compressed once undisturbed, and then by processes of which each is
killed after a random time, a few hundred milliseconds, without any warning.

    python tools/stress/soak.py --layers 100 --seed 1

It prints how often it was killed, how often with nothing committed since the last kill, and
whether the two outputs are the same; its exit status is 1 if they are not.
"""

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ream_stream.calibration.tokens import Tokens, from_tensors
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.compression.journal import load
from ream_stream.compression.pipeline import compress
from ream_stream.compression.workspace import Workspace
from ream_stream.model import streamed_model
from ream_stream.model.meta_model import build_skeleton
from ream_stream.planning.plan import Plan
from ream_stream.planning.planner import make_plan
from ream_stream.settings import Method, Settings

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "num_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip


def prepare(folder: Path, layers: int) -> tuple[Plan, Tokens]:
    """Make the checkpoint, and plan its compression."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", num_hidden_layers=layers, **SHAPE)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(folder)
    ids_SL = torch.randint(64, (12, 32), generator=torch.Generator().manual_seed(0))
    tokens = from_tensors({"input_ids": ids_SL}, description="drawn")
    settings = Settings(
        experts=6, method=Method(group_size=4), compute_dtype="bfloat16", max_shard_bytes=40_000
    )
    plan = make_plan(open_checkpoint(folder), settings, *ids_SL.shape, threads=1)
    return plan, tokens


def run(plan: Plan, tokens: Tokens, output: Path) -> int:
    """Run or go on in a forked child, which starts in milliseconds; return its process."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        workspace = Workspace(output=output, work=output / ".ream-stream")
        with workspace.locked():
            compress(
                plan,
                tokens,
                workspace,
                device=CPU,
            )
        status = 0
    except Exception:  # noqa: BLE001 - a child must not return into the loop of kills
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(child: int, seconds: float) -> int | None:
    """Wait for a child; kill it after some seconds. Return its status, None if killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of each file, lock and log aside."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in {"lock", "log.jsonl"}
    }


def main() -> int:
    """Soak; return 1 if the outputs differ."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--layers", type=int, default=100)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--from", dest="least", type=float, default=0.1, help="seconds")
    options.add_argument("--to", dest="most", type=float, default=1.5, help="seconds")
    asked = options.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plan, tokens = prepare(folder / "source", asked.layers)
        # children find both models built, in the order in which a run asks for them: a
        # process of its own would take seconds for that
        built = [
            build_skeleton(each, plan.dtype, CPU) for each in (plan.source.config, plan.config)
        ]
        skeletons = iter(built)
        streamed_model.build_skeleton = lambda *_: next(skeletons)
        begin = time.monotonic()
        if ended(run(plan, tokens, folder / "control"), 3600) != 0:
            raise RuntimeError("the undisturbed run failed")
        took = time.monotonic() - begin
        output, killed, idle, committed = folder / "output", 0, 0, 0
        workspace = Workspace(output=output, work=output / ".ream-stream")
        while True:
            status = ended(run(plan, tokens, output), draw.uniform(asked.least, asked.most))
            if status == 0:
                break
            if status is not None:
                raise RuntimeError(f"a run ended with status {status}")
            killed += 1
            before = committed
            if workspace.journal.is_file():
                committed = len(load(workspace.journal).layers)
            idle += committed == before
        same = digests(output) == digests(folder / "control")
    print(f"{asked.layers} layers, undisturbed {took:.1f} s")
    print(f"killed {killed} times, {idle} of them before another layer was committed")
    print(f"output {'equal to' if same else 'DIFFERS from'} the undisturbed one")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
