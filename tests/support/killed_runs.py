"""Runs that are killed and resumed, and what must be on the disk in between.

Letters in shapes: S sequences, L tokens of a sequence.
"""

import dataclasses
import os
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import crash
import pytest
import rank_runs
import torch
from crash import Ending, digests, run_in_child
from tiny_checkpoints import add_mtp
from tiny_runs import scheduled, storing
from transformers import AutoConfig, AutoModelForCausalLM

from ream_stream import files as durable
from ream_stream.calibration.tokens import from_tensors
from ream_stream.checkpoint.reader import INDEX, open_checkpoint
from ream_stream.compression import journal
from ream_stream.compression.finalize import MANIFEST
from ream_stream.compression.pipeline import compress
from ream_stream.compression.workspace import Workspace
from ream_stream.errors import DamagedError
from ream_stream.events import LayerDone
from ream_stream.planning.plan import Plan
from ream_stream.planning.planner import make_plan
from ream_stream.planning.refit_memory import KEPT
from ream_stream.settings import Method, Settings

WORK = ".ream-stream"
SEQUENCES, LENGTH, BATCH = 5, 8, 2
"""Three batches, the last one short."""

VARIANTS = {
    "ream": Settings(experts=3, method=Method(group_size=2)),
    "ream-all-at-once": Settings(experts=3, method=Method(group_size=2), sequential=False),
    "prune": Settings(experts=3, method=Method(grouping="none")),
    "refit": Settings(experts=3, method=Method(group_size=2, refit="down")),
    "mtp": Settings(experts=3, method=Method(group_size=2)),
    "refit-trajectory": Settings(
        experts=3,
        method=Method(grouping="none", refit="down", refit_target="trajectory"),
    ),
    "refit-blocks": Settings(experts=3, method=Method(grouping="none", refit="down")),
    "slices": Settings(
        experts=6,
        method=Method(grouping="none", slices=2, refit="down", refit_target="trajectory"),
    ),
    "observe": Settings(
        experts=4,
        method=Method(similarity_tokens=8),
        sequential=False,
        observes=True,
        moments=True,
    ),
}


def write_source(folder):
    """Write three layers of four experts, the middle one dense, and more than weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        mlp_only_layers=[1],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
    )
    made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(folder, max_shard_size=4000)
    (folder / "tokenizer.json").write_text("{}")
    return open_checkpoint(folder)


def write_mtp_source(folder):
    """Write two layers of four experts, the first dense, and one that predicts beyond."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "glm4_moe",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=8,
    )
    made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(folder)
    add_mtp(folder, "glm4_moe")
    return open_checkpoint(folder)


@dataclass(frozen=True)
class Control:
    """An undisturbed run."""

    plan: Plan
    ending: Ending
    output: dict[str, str]
    """Digests of all files, the finished work folder included."""
    boundaries: dict[str, dict[str, str]]
    """Digests of the files of each hidden-state store, by its name."""


class Runs:
    """Runs of one variant in folders of a test."""

    def __init__(self, source, settings, folder, *, patch=lambda _: None, batch=BATCH):
        in_blocks = settings == VARIANTS["refit-blocks"]
        settings = dataclasses.replace(settings, compute_dtype="bfloat16", max_shard_bytes=2500)
        plan = make_plan(source, settings, SEQUENCES, LENGTH)
        # what a refit keeps goes to disk: more steps, and strays
        memory = {**plan.memory, KEPT: 0}
        self.plan = scheduled(dataclasses.replace(plan, memory=memory), batch_sequences=batch)
        if in_blocks:
            self.plan = storing(self.plan, 2, "disk")
        ids_SL = torch.arange(SEQUENCES * LENGTH).view(SEQUENCES, LENGTH) * 7 % 32
        self.tokens = from_tensors({"input_ids": ids_SL}, description="counted")
        self.report = folder / "report.json"
        self.folder = folder
        self.patch = patch

    def run(self, output, kill=None):
        """Run or resume in a child."""
        workspace = Workspace(output=output, work=output / WORK)
        return run_in_child(
            lambda: self._job(workspace),
            self.report,
            kill=kill,
            committed=lambda: committed_if_whole(workspace),
        )

    def _job(self, workspace):
        with pytest.MonkeyPatch.context() as monkeypatch:
            self.patch(monkeypatch)
            boundaries = {}

            def report(event):
                if isinstance(event, LayerDone):
                    for path in workspace.work.glob("*-0000?"):
                        boundaries[path.name] = digests(path)

            with workspace.locked():
                compress(
                    self.plan,
                    self.tokens,
                    workspace,
                    device=torch.device("cpu"),
                    report=report,
                )
            return boundaries

    def on_ranks(self, output, size, kill=None, victim=0, *, whole=False):
        """Run or resume on several ranks, of which one, or all, are killed; tell how they end.

        Parameters
        ----------
        output, size
            Folder of the run, and number of ranks.
        kill, victim
            At which durable step of which rank it is killed; None to let all finish.
        whole
            Whether the others are killed with it.
        """

        def job(ranks):
            if kill is not None and ranks.rank == victim:
                if whole:
                    others = [each for each in ranks.gather(os.getpid()) if each != os.getpid()]
                    crash.kill_with(others)
                crash.wrap_primitives(kill)
            elif whole:
                ranks.gather(os.getpid())
            workspace = Workspace(output=output, work=output / WORK, rank=ranks.rank)
            with workspace.locked() if ranks.is_first else nullcontext():
                ranks.gather(None)
                compress(
                    self.plan,
                    self.tokens,
                    workspace,
                    device=torch.device("cpu"),
                    ranks=ranks,
                )

        return rank_runs.on_ranks(size, job, self.folder / f"told-{output.name}")

    def control(self):
        output = self.folder / "control"
        ending = self.run(output)
        return Control(self.plan, ending, digests(output), ending.value)

    def check_killed_and_resumed(self, control, kill):
        """Kill a run, look at what is left, resume it, compare."""
        output = self.folder / f"{kill.step}-{kill.moment}"
        assert not self.run(output, kill).finished
        check_what_is_left(output, control)
        before = identities(output)
        self.run(output)
        assert digests(output) == control.output, f"other bytes after {kill}"
        changed = [name for name, was in before.items() if identities(output)[name] != was]
        assert not changed, f"committed before the kill, written again after: {changed}"
        shutil.rmtree(output)


def committed(workspace):
    """Return the paths that the journal names now."""
    if not workspace.journal.is_file():
        return []
    saved = journal.load(workspace.journal)
    paths = [workspace.output / shard.name for shard in saved.shards()]
    paths += [workspace.work / r.statistics.name for r in saved.layers if r.statistics]
    for record in saved.layers[-1:]:
        paths += [workspace.work / name for name in (record.hidden, record.original) if name]
    return [str(path) for path in paths]


def committed_if_whole(workspace):
    """Return the same, or nothing where a planted fault writes the journal in place."""
    try:
        return committed(workspace)
    except DamagedError:
        return []


def identities(output):
    """Return what changes if a committed file is written again, by name."""
    workspace = Workspace(output=output, work=output / WORK)
    found = {}
    for name in committed(workspace):
        path = Path(name)
        if path.is_file():
            found[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def check_what_is_left(output, control):
    """Check the invariants on the disk of a killed run."""
    workspace = Workspace(output=output, work=output / WORK)
    left = digests(output) if output.exists() else {}
    for name, digest in left.items():
        if "/" not in name and not name.endswith((durable.PARTIAL, WORK)):
            assert digest == control.output[name], f"{name} is under its final name, not whole"
    for path in committed(workspace):
        name = Path(path).name
        if name.startswith(("hidden-", "original-")):
            assert digests(Path(path)) == control.boundaries[name]
        else:
            relative = str(Path(path).relative_to(output))
            assert left[relative] == control.output[relative]
    if (output / INDEX).exists():
        whole = open_checkpoint(output).entries
        planned = control.plan.output_checkpoint(output).entries
        assert whole.keys() == planned.keys()
    if (output / MANIFEST).exists():
        assert {n for n in control.output if "/" not in n} <= left.keys()
