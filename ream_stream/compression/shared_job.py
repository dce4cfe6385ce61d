"""A job on several ranks: what rank 0 prepared, and what each rank makes of it."""

import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ream_stream import __version__, files
from ream_stream.calibration.tokens import Tokens
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.errors import DamagedError, RankError, ReamStreamError, UsageError
from ream_stream.file_access import read_own_json
from ream_stream.model import device as devices
from ream_stream.model.ranks.group import Ranks
from ream_stream.planning.plan import Plan
from ream_stream.planning.planner import make_plan
from ream_stream.planning.schedule import Begun, Budgets
from ream_stream.settings import Method, Settings

from .job import Job
from .journal import schedule_of
from .workspace import Workspace


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prepared:
    """What rank 0 tells of a job; tokens are sent apart."""

    source: str
    settings: dict[str, Any]
    sequences: int
    sequence_length: int
    padded: bool
    budgets: dict[str, Any]
    schedule: dict[str, Any]
    memory: Mapping[str, int]
    device_memory: Mapping[str, int]
    scratch: Mapping[str, int]
    output: str
    work: str
    device: str
    shapes: Mapping[str, list[int]]
    domains: list[str]
    tokens_digest: str
    description: str


def check_ranks(plan: Plan, ranks: Ranks) -> None:
    """Refuse more ranks than there are batches, and shards that one process fetches.

    Raises
    ------
    UsageError
        So many ranks cannot divide the work.
    """
    batches, size = plan.num_batches, plan.schedule.batch_sequences
    if ranks.size > batches:
        raise UsageError(
            f"{ranks.size} ranks for {batches} batches, {plan.sequences} calibration sequences "
            f"{size} at a time: start at most {batches}, or give more calibration text"
        )
    if ranks.size > 1 and plan.source.fetch is not None:
        raise UsageError(
            "--stream fetches each shard for one process: leave it out, or start one rank"
        )


def shared_job(job: Job | None, ranks: Ranks) -> Job:
    """Return the job of this rank.

    Parameters
    ----------
    job
        What rank 0 prepared; None on the others.
    ranks
        The processes.

    Raises
    ------
    UsageError
        There are fewer GPUs than ranks.
    RankError
        A rank sees another source, or has other versions or another kind of processor.
    """
    if ranks.size == 1:
        assert job is not None
        return job
    told = _Prepared(**ranks.broadcast(None if job is None else asdict(_prepared(job))))
    torch.set_num_threads(told.schedule["threads"])
    device = own_device(torch.device(told.device), ranks)
    check_alike(ranks, device)
    tokens = _tokens(told, job, ranks)
    if job is None:
        job = Job(
            plan=_plan(told),
            workspace=Workspace(
                output=Path(told.output), work=Path(told.work), rank=ranks.rank
            ),
            journal=None,
            tokens=tokens,
            device=device,
        )
    ranks.agree("the source", job.plan.source.digest())
    return replace(job, device=device)


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Make sure that each rank sees what every other writes in a work folder.

    Raises
    ------
    RankError
        One does not; the message names both.
    """
    if ranks.size == 1:
        return
    nonce = ranks.broadcast(secrets.token_hex(8))

    def path(rank: int) -> Path:
        # a new name: network file systems remember for a while that a file is not there
        return folder / f"scratch-{nonce}-{rank}"

    try:
        files.write_json(path(ranks.rank), {"rank": ranks.rank})
        error = ""
    except (OSError, ReamStreamError) as why:
        error = str(why)
    written = ranks.gather(error)
    unseen = [
        rank for rank in range(ranks.size) if not written[rank] and not _holds(path(rank), rank)
    ]
    found = ranks.gather(unseen)
    if not written[ranks.rank]:
        files.remove(path(ranks.rank))
    for rank, (failed, missing) in enumerate(zip(written, found, strict=True)):
        if failed or missing:
            what = failed or f"it does not see what rank {ranks.names[missing[0]]} wrote there"
            raise RankError(
                f"rank {ranks.names[rank]} does not share {folder}: {what}; OUTPUT and "
                "work folder must be on a file system that all machines mount",
                told=not ranks.is_first,
            )


def check_alike(ranks: Ranks, device: torch.device) -> None:
    """Refuse ranks whose products would have other last bits.

    Raises
    ------
    RankError
        The message names a rank and what it has.
    """
    if ranks.size == 1:
        return
    own: dict[str, Any] = {
        "ream-stream": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "device": devices.kind(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }
    found = ranks.gather(own)
    for rank, each in enumerate(found):
        for name, value in each.items():
            if value != found[0][name]:
                raise RankError(
                    f"rank {ranks.names[rank]} has {name} {value}, rank {ranks.names[0]} has "
                    f"{found[0][name]}: results would depend on the ranks; start alike ones",
                    told=not ranks.is_first,
                )


def own_device(device: torch.device, ranks: Ranks) -> torch.device:
    """Return the device of this rank: the GPU of its number, unless one is named.

    Raises
    ------
    UsageError
        There is none of this number.
    """
    if str(device) != "cuda":
        return device
    own = torch.device("cuda", ranks.local_rank)
    if ranks.local_rank >= devices.count():
        raise UsageError(
            f"rank {ranks.names[ranks.rank]} has no GPU: its machine has {devices.count()} and "
            f"runs {ranks.local_size} ranks; start one a GPU"
        )
    return own


def _prepared(job: Job) -> _Prepared:
    plan, tokens = job.plan, job.tokens
    assert tokens is not None
    assert job.workspace is not None
    return _Prepared(
        source=str(plan.source.folder.resolve()),
        settings=asdict(plan.settings),
        sequences=plan.sequences,
        sequence_length=plan.sequence_length,
        padded=tokens.attention_mask_SL is not None,
        budgets=asdict(plan.budgets),
        schedule=asdict(plan.schedule),
        memory=dict(plan.memory),
        device_memory=dict(plan.device_memory),
        scratch=dict(plan.scratch),
        output=str(job.workspace.output),
        work=str(job.workspace.work),
        device=str(job.device),
        shapes={name: list(t.shape) for name, t in _token_tensors(tokens).items()},
        domains=list(tokens.domains),
        tokens_digest=tokens.digest,
        description=tokens.description,
    )


def _token_tensors(tokens: Tokens) -> dict[str, torch.Tensor]:
    tensors = {"ids": tokens.input_ids_SL, "domain": tokens.domain_S}
    if tokens.attention_mask_SL is not None:
        tensors["mask"] = tokens.attention_mask_SL
    return tensors


def _tokens(told: _Prepared, job: Job | None, ranks: Ranks) -> Tokens:
    """Return the calibration set, which rank 0 sends."""
    if job is not None and job.tokens is not None:
        ranks.broadcast_tensors(
            [each.contiguous() for each in _token_tensors(job.tokens).values()], 0
        )
        return job.tokens
    tensors = {
        name: torch.empty(shape, dtype=torch.int64) for name, shape in told.shapes.items()
    }
    ranks.broadcast_tensors(list(tensors.values()), 0)
    return Tokens(
        input_ids_SL=tensors["ids"],
        attention_mask_SL=tensors.get("mask"),
        domain_S=tensors["domain"],
        domains=tuple(told.domains),
        digest=told.tokens_digest,
        description=told.description,
    )


def _plan(told: _Prepared) -> Plan:
    """Return the plan of rank 0, made anew: what it is made of is not sent."""
    source, schedule = Path(told.source), schedule_of(told.schedule)
    if not source.is_dir():
        raise DamagedError(f"{source} is not there: all ranks read SOURCE by one path")
    plan = make_plan(
        open_checkpoint(source),
        _settings(told.settings),
        told.sequences,
        told.sequence_length,
        budgets=Budgets(**told.budgets),
        threads=schedule.threads,
        padded=told.padded,
        begun=Begun(schedule=schedule, layers=0, written_bytes=0),
    )
    return replace(
        plan,
        schedule=schedule,
        memory=told.memory,
        device_memory=told.device_memory,
        scratch=told.scratch,
    )


def _settings(told: Mapping[str, Any]) -> Settings:
    method = told["method"]
    method = Method(**{**method, "refit_lambda": tuple(method["refit_lambda"])})
    return Settings(**{**told, "method": method})


def _holds(path: Path, rank: int) -> bool:
    try:
        return bool(read_own_json(path)["rank"] == rank)
    except (OSError, ReamStreamError, KeyError, TypeError):
        return False
