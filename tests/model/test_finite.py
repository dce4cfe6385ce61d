"""Numbers that are not finite, experts that no token reaches, and experts that are alike."""

import json
import shutil
from contextlib import nullcontext

import pytest
import tiny_runs
import torch
from rank_runs import on_ranks
from tiny_checkpoints import load_tensors, save_tensors
from tiny_families import EXPERTS
from tiny_runs import CPU, plan_for, run_plan, scheduled, settings, some_tokens, storing

from ream_stream.calibration.tokens import from_tensors
from ream_stream.compression import journal, layer, observer, refit_layer
from ream_stream.compression.held_back import held_back
from ream_stream.compression.pipeline import compress
from ream_stream.compression.workspace import Workspace
from ream_stream.errors import NumbersError
from ream_stream.events import LayerDone
from ream_stream.method.grouping import GROUPINGS
from ream_stream.method.saliency import SALIENCIES
from ream_stream.model import streamed_model
from ream_stream.model.finite import is_finite

SEQUENCES = 20


@pytest.fixture
def copy(checkpoints, tmp_path):
    """Give a checkpoint whose tensors may be changed."""

    def give(name, change):
        source = shutil.copytree(checkpoints(name), tmp_path / "source")
        tensors = load_tensors(source)
        change(tensors)
        save_tensors(source, tensors)
        return source

    return give


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu], ids=str
)
def test_every_number_of_eight_bits_is_known_to_be_finite_or_not(dtype):
    code = torch.arange(256).to(torch.uint8)
    finite = code.view(dtype).float().isfinite()
    assert [is_finite(one.view(dtype)) for one in code.split(1)] == finite.tolist()
    assert is_finite(code[finite].view(dtype))
    for bad in code[~finite].split(1):
        assert not is_finite(torch.cat([code[finite], bad]).view(dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.input_layernorm.weight",
        "model.layers.2.mlp.gate.weight",
        "model.layers.2.mlp.experts.3.down_proj.weight",
        "model.embed_tokens.weight",
    ],
)
def test_weights_that_are_no_numbers_are_named_and_what_was_done_stays(
    copy, tmp_path, name, value
):
    source = copy("olmoe", lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    with pytest.raises(
        NumbersError, match=f"{name} in .*model.safetensors holds NaN"
    ) as caught:
        tiny_runs.run(source, tmp_path / "out", settings())
    assert caught.value.exit_status == 1
    index = int(name.split(".")[2]) if "layers" in name else 0
    assert f"(found at layer {index})" in str(caught.value)
    workspace = Workspace(output=tmp_path / "out", work=tmp_path / "out" / ".ream-stream")
    assert len(journal.load(workspace.journal).layers) == index


class Overflowing:
    """A model in which tokens of some sequences overflow in the attention of some layers."""

    def __init__(self, patch, bad, tokens, *, experts=None):
        """Take (layer, sequence) pairs; only in the model with so many experts, if given."""
        self.rows = {index: tokens.input_ids_SL[row] for index, row in bad}
        forward = streamed_model.StreamedModel._forward
        attend = self._attend

        def forward_and_spoil(streamed, batch):
            index = streamed._active
            elsewhere = experts not in {None, streamed.layers[index].stack.count}
            if index not in self.rows or elsewhere:
                return forward(streamed, batch)
            spoiled = (batch.input_ids_BL == self.rows[index]).all(dim=1)
            handles = [
                module.register_forward_hook(attend(spoiled))
                for module in streamed.mixers(index)
            ]
            try:
                return forward(streamed, batch)
            finally:
                for handle in handles:
                    handle.remove()

        patch.setattr(streamed_model.StreamedModel, "_forward", forward_and_spoil)

    @staticmethod
    def _attend(spoiled_B):
        def spoil(_module, _args, output):
            first, *rest = output
            first = first.masked_fill(spoiled_B[:, None, None], float("inf"))
            return (first, *rest)

        return spoil


def in_threes(source, tokens, **wanted):
    """Plan a run of batches of three sequences."""
    plan = plan_for(source, tokens, settings(**wanted))
    return scheduled(plan, batch_sequences=3)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_a_sequence_that_overflows_counts_no_more_and_the_others_as_if_it_were_not_there(
    checkpoints, tmp_path, monkeypatch, sequential, padded
):
    tokens = some_tokens(SEQUENCES, 12, padded=padded)
    source = checkpoints("olmoe", torch.float32)
    wanted = {"sequential": sequential, "similarity_tokens": 0}
    plan = in_threes(source, tokens, **wanted)
    with monkeypatch.context() as patch:
        Overflowing(patch, [(0, 4)], tokens)
        done = run_plan(plan, tokens, tmp_path / "out")
    layers = [event for event in done.events if isinstance(event, LayerDone)]
    assert [event.excluded for event in layers] == [1, 1, 1]
    saved = json.loads((tmp_path / "out/.ream-stream/journal.json").read_text(encoding="utf-8"))
    assert [record["excluded"] for record in saved["layers"]] == [[4], [], []]
    # the same tokens without that sequence give the same experts
    rest = torch.arange(SEQUENCES) != 4
    fewer = {name: tensor[rest] for name, tensor in tokens.tensors().items()}
    fewer = from_tensors(fewer, description="fewer")
    plain = run_plan(in_threes(source, fewer, **wanted), fewer, tmp_path / "fewer")
    for with_it, without in zip(done.manifest["layers"], plain.manifest["layers"], strict=True):
        assert with_it["groups"] == without["groups"]
        assert with_it["saliency"] == pytest.approx(without["saliency"], rel=1e-5)


@pytest.mark.parametrize("held", [False, True], ids=["fitted", "held back"])
@pytest.mark.parametrize(
    ("experts", "sequential", "target"),
    [
        pytest.param(EXPERTS, True, "layer", id="source", marks=pytest.mark.slow),
        pytest.param(6, False, "layer", id="compressed"),
        pytest.param(EXPERTS, True, "trajectory", id="trajectory"),
        pytest.param(6, False, "stored", id="stored"),
    ],
)
def test_a_sequence_that_overflows_reaches_neither_a_fit_nor_its_judgement(
    checkpoints, tmp_path, monkeypatch, sequential, experts, target, held
):
    tokens, source = some_tokens(SEQUENCES, 12), checkpoints("olmoe", torch.float32)
    wanted = {"sequential": sequential, "refit": "down", "grouping": "none"}
    wanted["refit_target"] = target.replace("stored", "layer")
    held_S = held_back(tokens, 0)
    bad = int((held_S == held).nonzero()[-1])
    plan = in_threes(source, tokens, **wanted)
    if target == "stored":
        plan = storing(plan, 2, "disk")
    with monkeypatch.context() as patch:
        Overflowing(patch, [(0, bad)], tokens, experts=experts)
        done = run_plan(plan, tokens, tmp_path / "out")
    rest = torch.arange(SEQUENCES) != bad
    fewer = from_tensors({"input_ids": tokens.input_ids_SL[rest]}, description="fewer")
    monkeypatch.setattr(refit_layer, "held_back", lambda *_: held_S[rest])
    plain = run_plan(in_threes(source, fewer, **wanted), fewer, tmp_path / "fewer")
    chosen = [[layer["groups"] for layer in run.manifest["layers"]] for run in (done, plain)]
    assert chosen[0] == chosen[1]
    told = [[e for e in run.events if isinstance(e, LayerDone)] for run in (done, plain)]
    assert [event.excluded for event in told[0]] == [1, 1, 1]
    for with_it, without in zip(*told, strict=True):
        assert with_it.refitted.penalty == without.refitted.penalty
        for field in ("error_before", "remaining_error", "residuals"):
            found, expected = (getattr(e.refitted, field) for e in (with_it, without))
            assert found == pytest.approx(expected, rel=1e-3), (field, with_it.layer)
    assert any(event.refitted.penalty for event in told[0])
    ours, theirs = load_tensors(done.output), load_tensors(plain.output)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_exclusions_are_the_same_after_a_stop(checkpoints, tmp_path, monkeypatch):
    tokens, source = some_tokens(SEQUENCES, 12), checkpoints("olmoe")
    plan, save = in_threes(source, tokens), Workspace.save
    Overflowing(monkeypatch, [(0, 4), (1, 7)], tokens)
    whole = run_plan(plan, tokens, tmp_path / "whole")

    def stop(workspace, saved):
        save(workspace, saved)
        if len(saved.layers) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run_plan(plan, tokens, tmp_path / "out")
    again = run_plan(plan, tokens, tmp_path / "out")
    assert again.files() == whole.files()
    assert [e.excluded for e in again.events if isinstance(e, LayerDone)] == [2, 2]


def test_ranks_leave_out_what_any_of_them_leaves_out(checkpoints, tmp_path, monkeypatch):
    tokens, source = some_tokens(SEQUENCES, 12), checkpoints("olmoe")
    plan = in_threes(source, tokens, refit="down")
    Overflowing(monkeypatch, [(0, 4), (1, 7)], tokens)  # of batches of two ranks
    whole = run_plan(plan, tokens, tmp_path / "whole")
    output = tmp_path / "out"

    def job(ranks):
        workspace = Workspace(output=output, work=output / ".ream-stream", rank=ranks.rank)
        with workspace.locked() if ranks.is_first else nullcontext():
            ranks.gather(None)
            compress(plan, tokens, workspace, device=CPU, ranks=ranks)

    assert [ending.error for ending in on_ranks(2, job, tmp_path / "told")] == ["", ""]
    found = {p.name: p.read_bytes() for p in output.iterdir() if p.is_file()}
    assert found == whole.files()
    saved = [
        journal.load(tmp_path / run / ".ream-stream/journal.json") for run in ("whole", "out")
    ]
    assert [record.excluded for record in saved[1].layers] == [(4,), (7,), ()]
    assert saved[1].layers == saved[0].layers


def test_more_than_a_tenth_of_the_sequences_is_fatal(checkpoints, tmp_path, monkeypatch):
    tokens, source = some_tokens(SEQUENCES, 12), checkpoints("olmoe")
    plan = in_threes(source, tokens)
    Overflowing(monkeypatch, [(0, 4), (1, 7), (2, 8)], tokens)
    with pytest.raises(
        NumbersError, match=r"layer 2: .* 3 of 20 calibration sequences"
    ) as caught:
        run_plan(plan, tokens, tmp_path / "out")
    assert "the first is number 4" in str(caught.value)


def test_statistics_that_are_no_numbers_stop_the_run(checkpoints, tmp_path, monkeypatch):
    mean_outputs = observer.mean_outputs

    def spoiled(*arguments):
        mean_EH = mean_outputs(*arguments)
        mean_EH[5, 1] = float("nan")
        return mean_EH

    monkeypatch.setattr(layer, "mean_outputs", spoiled)
    with pytest.raises(NumbersError, match="layer 0: the mean output of expert 5 is not"):
        tiny_runs.run(checkpoints("olmoe"), tmp_path / "out", settings())


def test_a_merge_that_overflows_stops_the_run(checkpoints, tmp_path, monkeypatch):
    content = layer.layer_content

    def spoiled(*arguments):
        made = content(*arguments)

        def give(name):
            value = made(name)
            return value * float("inf") if isinstance(value, torch.Tensor) else value

        return give

    monkeypatch.setattr(layer, "layer_content", spoiled)
    with pytest.raises(NumbersError, match="layer 0: merging makes numbers of model"):
        tiny_runs.run(checkpoints("olmoe"), tmp_path / "out", settings())


def never_picked(tensors):
    """Keep tokens away from experts 2 and 5 by the correction bias."""
    for name in [name for name in tensors if name.endswith("e_score_correction_bias")]:
        tensors[name][[2, 5]] = -100


def all_alike(tensors):
    """Make all experts of a layer the same, and the rows of its router."""
    for name in tensors:
        if ".experts." in name:
            before, _, after = name.partition(".experts.")
            tensors[name].copy_(tensors[f"{before}.experts.0.{after.partition('.')[2]}"])
        elif name.endswith("mlp.gate.weight"):
            tensors[name].copy_(tensors[name][:1].expand_as(tensors[name]).clone())


CHOICES = [("glm4_moe", never_picked, {"saliency": name}) for name in sorted(SALIENCIES)]
CHOICES += [("olmoe", all_alike, {"grouping": name}) for name in sorted(GROUPINGS)]


@pytest.mark.parametrize(("name", "change", "choice"), CHOICES)
def test_experts_that_no_token_reaches_or_that_are_all_alike_give_a_model_that_loads(
    copy, tmp_path, name, change, choice
):
    done = tiny_runs.run(copy(name, change), tmp_path / "out", settings(**choice))
    for number in done.manifest["layers"]:
        assert all(value >= 0 for value in number["saliency"])
        assert sorted(expert for group in number["groups"] for expert in group) == [
            *range(EXPERTS)
        ] or choice == {"grouping": "none"}
    tensors = load_tensors(done.output)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
