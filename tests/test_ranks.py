"""Several processes connected by gloo: sums, disagreement, and ranks that end or die."""

import os
import signal
import time

import pytest
import torch
from rank_runs import environment, on_ranks

from ream_stream.compression.shared_job import check_ranks, check_shared
from ream_stream.errors import InterruptedRunError, OverBudgetError, UsageError
from ream_stream.model.ranks import connected, heartbeat
from ream_stream.model.ranks.group import ALONE, Ranks, in_turn, is_other_rank
from ream_stream.model.ranks.launch import expected, joined

BATCHES = 5


@pytest.fixture
def quick_signs(monkeypatch):
    """Take a rank for dead sooner; the children are forked from here."""
    for module in (heartbeat, connected):
        monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
        monkeypatch.setattr(module, "SILENT_SECONDS", 1.5)


def batch(number):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(64, 24, generator=generator) * (1 + number % 3)


def sums_of(ranks, pieces):
    """Add up products of batches, some of them carried while others are worked on."""
    relay = ranks.relay(BATCHES)
    gram_II, count = torch.zeros(24, 24), torch.zeros((), dtype=torch.float64)
    for number in ranks.own(BATCHES):
        for rows in torch.arange(24).chunk(pieces):
            part_RI = gram_II[rows[0] : rows[-1] + 1]
            with relay.turn(number, [part_RI]):
                part_RI.addmm_(batch(number)[:, rows].T, batch(number))
        with relay.turn(number, [count]):
            count += batch(number).double().sum()
    relay.finish([gram_II, count])
    return gram_II.view(torch.int32).tolist(), float(count).hex()


@pytest.mark.parametrize("size", [2, 3])
def test_sums_have_the_bits_of_one_process_whatever_the_number_of_ranks(size, tmp_path):
    found = on_ranks(size, lambda ranks: sums_of(ranks, 3), tmp_path)
    wanted = sums_of(ALONE, 3)
    assert [tuple(ending.value) for ending in found] == [wanted] * size
    # in another order the last bits are others, so the order counts here
    backwards_II = torch.zeros(24, 24)
    for number in reversed(range(BATCHES)):
        backwards_II.addmm_(batch(number).T, batch(number))
    assert backwards_II.view(torch.int32).tolist() != wanted[0]


def test_tensors_of_any_size_arrive_and_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("ream_stream.model.ranks.tensor_bytes.SMALL_BYTES", 64)
    monkeypatch.setattr("ream_stream.model.ranks.tensor_bytes.CHUNK_BYTES", 100)

    def job(ranks):
        tensors = [
            torch.zeros(2, 40),
            torch.zeros(3, dtype=torch.int64),
            torch.zeros(()).half(),
        ]
        if ranks.rank == 1:
            tensors = [
                torch.arange(80.0).view(2, 40),
                torch.tensor([7, 8, 9]),
                torch.ones(()).half(),
            ]
        ranks.broadcast_tensors(tensors, 1)
        return [each.double().sum().item() for each in tensors], ranks.sent_bytes

    wanted = [80 * 79 / 2, 24.0, 1.0]
    found = on_ranks(3, job, tmp_path)
    assert [ending.value for ending in found] == [[wanted, 0], [wanted, 2 * 346], [wanted, 0]]


def test_what_each_rank_made_of_its_own_is_put_in_order():
    parts = []
    for rank in range(3):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, 3
        parts.append([10 * number for number in ranks.own(7)])
    assert in_turn(parts, 7) == [0, 10, 20, 30, 40, 50, 60]
    assert in_turn([[1, 2, 3]], 3) == [1, 2, 3]


def test_without_torchrun_there_is_one_rank_and_torch_distributed_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(connected, "import_module", None)
    for known in ({}, {"WORLD_SIZE": "1", "RANK": "0"}):
        with joined(known) as ranks:
            assert ranks is ALONE
        assert not is_other_rank(known)
    assert is_other_rank({"WORLD_SIZE": "2", "RANK": "1"})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"RANK": ""}, "RANK is ''"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
        ({"RANK": "2"}, "ranks go from 0 to 1"),
    ],
)
def test_variables_that_make_no_sense_are_named(changed, said):
    with pytest.raises(UsageError, match=said), joined(environment(0, 2, 1) | changed):
        pass


def test_a_rank_that_comes_to_something_else_is_named(tmp_path):
    def job(ranks):
        ranks.agree("layer 3", [1, 2])
        ranks.agree("layer 4", [1, ranks.rank == 1])

    found = on_ranks(3, job, tmp_path)
    for ending in found:
        assert "layer 4: rank 1 (" in ending.error
        assert "came to something else than rank 0 (" in ending.error
        assert ending.status == 1


@pytest.mark.parametrize("failing", [0, 1])
def test_why_a_rank_ends_is_told_to_all_with_its_status(failing, tmp_path):
    def job(ranks):
        if ranks.rank == failing:
            raise OverBudgetError("no space left for hidden-00001")
        ranks.relay(BATCHES).finish([torch.zeros(1)])

    found = on_ranks(3, job, tmp_path)
    assert [ending.status for ending in found] == [12, 12, 12]
    for rank, ending in enumerate(found):
        assert "no space left for hidden-00001" in ending.error
        assert (f"rank {failing} (" in ending.error) == (rank != failing)
        assert ending.seconds < 30


def test_a_signal_that_one_rank_gets_stops_all_the_same_way(tmp_path):
    def job(ranks):
        if ranks.rank == 1:
            raise InterruptedRunError("stopped after 1 of 3 layers", signal_number=15)
        ranks.gather(None)

    found = on_ranks(2, job, tmp_path)
    assert [ending.status for ending in found] == [143, 143]
    assert all(ending.error.startswith("InterruptedRunError: stopped") for ending in found)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_is_named_by_the_others(how, tmp_path, quick_signs):
    def job(ranks):
        sums = torch.zeros(1000)
        relay = ranks.relay(1000)
        for number in ranks.own(1000):
            if (ranks.rank, number) == (1, 7):
                (tmp_path / "now").touch()
                time.sleep(60)
            with relay.turn(number, [sums]):
                sums += 1

    def strike(pids):
        while not (tmp_path / "now").exists():
            time.sleep(0.05)
        os.kill(pids[1], how)
        for _ in range(200):
            if all((tmp_path / f"{rank}.json").exists() for rank in (0, 2)):
                break
            time.sleep(0.1)
        os.kill(pids[1], signal.SIGKILL)

    first, _, third = on_ranks(3, job, tmp_path, beside=strike)
    for ending in (first, third):
        assert "RankError: rank 1 (" in ending.error
        assert "gave no sign of life" in ending.error
        assert ending.seconds < 20


def test_a_rank_that_a_launcher_stops_since_another_died_names_that_one(tmp_path, quick_signs):
    def job(ranks):
        ranks.gather(None)
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        raise InterruptedRunError("stopped after 0 of 3 layers", signal_number=15)

    first, _ = on_ranks(2, job, tmp_path)
    assert "RankError: rank 1 (" in first.error
    assert first.status == 1


def test_rank_0_that_dies_with_the_store_is_named_by_the_others(tmp_path, quick_signs):
    def job(ranks):
        ranks.gather(None)
        if ranks.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.gather(None)

    first, second = on_ranks(2, job, tmp_path)
    assert first.status == -signal.SIGKILL
    assert "RankError: rank 1 (" in second.error
    assert "has lost the store of the ranks: rank 0 (" in second.error
    assert second.seconds < 30


def test_a_rank_that_never_comes_ends_the_others(tmp_path, quick_signs):
    def beside(pids):
        os.kill(pids[1], signal.SIGKILL)

    first, _ = on_ranks(2, lambda ranks: None, tmp_path, beside=beside)
    assert "RankError: rank 1 gave no sign of life" in first.error


def test_a_file_system_that_is_not_shared_is_found_before_anything_is_written(tmp_path):
    def job(ranks):
        folder = tmp_path / ("own" if ranks.rank == 2 else "shared")
        folder.mkdir(parents=True, exist_ok=True)
        ranks.gather(None)
        check_shared(folder, ranks)

    found = on_ranks(3, job, tmp_path / "told")
    for ending in found:
        assert "does not share" in ending.error
        assert "it does not see what rank 2 (" in ending.error
    assert not list(tmp_path.rglob("scratch-*"))


def test_more_ranks_than_batches_are_refused(checkpoints):
    from tiny_runs import plan_for, settings, some_tokens

    plan = plan_for(checkpoints("qwen3_moe"), some_tokens(), settings())
    ranks = Ranks()
    ranks.size = plan.num_batches
    check_ranks(plan, ranks)
    ranks.size += 1
    with pytest.raises(UsageError, match="start at most 1, or give more calibration text"):
        check_ranks(plan, ranks)


def test_what_torchrun_tells_is_known_without_a_connection():
    known = expected(environment(1, 4, 1))
    assert (known.rank, known.size, known.local_rank, known.local_size) == (1, 4, 1, 4)
    assert expected({}).size == 1
