"""What a layer takes, told from headers, against the tensors of a layer that really runs."""

import pytest
import torch
from real_layers import LENGTH, SEQUENCES, Really
from tiny_families import TINY
from tiny_parameters import families
from tiny_runs import CPU

from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.model.streamed_model import StreamedModel
from ream_stream.planning.activation_memory import Footprints, LiveBytes


@pytest.fixture(autouse=True)
def _found_anew(monkeypatch):
    """What other tests find once is found anew by these."""
    monkeypatch.setattr(Footprints, "of", Footprints.of.__wrapped__)


@pytest.mark.parametrize("family", families())
def test_a_layer_that_simply_adds_what_its_experts_give_is_told_by_its_operations(
    family, checkpoints
):
    checkpoint = open_checkpoint(checkpoints(family, torch.float32))
    told = Footprints(StreamedModel(checkpoint, torch.float32, CPU))
    really = Really(checkpoint, torch.float32, padded=False)
    model = really.model
    for index in [i for i in told.kinds() if told.model.layers[i].stack]:
        more = torch.ones(1)
        with model.open_outside(), model.open_layer(index) as experts:
            leaving = model.run_layer(index, really.batch, really.hidden_BLH)
            experts.register_forward_hook(lambda _m, _args, output: output + more)  # noqa: B023
            other = model.run_layer(index, really.batch, really.hidden_BLH)
        adds = torch.allclose(other - leaving, more, atol=1e-4)
        assert (told.beyond_adding(index) is None) == adds, told.beyond_adding(index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "family",
    [
        "qwen3_moe",
        "deepseek_v3",
        pytest.param("deepseek_v4", marks=pytest.mark.slow),
        "qwen3_next",
        "glm4_moe",
    ],
)
def test_a_footprint_is_what_a_padded_batch_takes(family, dtype, checkpoints):
    checkpoint = open_checkpoint(checkpoints(family))
    told, really = (
        Footprints(StreamedModel(checkpoint, dtype, CPU)),
        Really(checkpoint, dtype, padded=True),
    )
    for index in told.kinds():
        footprint = told.of(index, SEQUENCES, LENGTH)
        assert footprint.run == pytest.approx(really.run(index), rel=0.06), index
        if index not in TINY[family].dense:
            assert footprint.observe == pytest.approx(really.observe(index), rel=0.06), index


@pytest.mark.parametrize("family", ["mixtral", "ernie4_5_moe"])
def test_a_batch_without_padding_takes_no_more(family, checkpoints):
    checkpoint = open_checkpoint(checkpoints(family))
    told = Footprints(StreamedModel(checkpoint, torch.float32, CPU))
    really = Really(checkpoint, torch.float32, padded=False)
    for index in told.kinds():
        footprint = told.of(index, SEQUENCES, LENGTH)
        # it has no mask, which is as large as one head's attention
        assert 0.6 * footprint.run < really.run(index) <= footprint.run


def test_a_footprint_does_not_depend_on_the_data(checkpoints, monkeypatch):
    from ream_stream.checkpoint.reader import MappedTensors

    monkeypatch.setattr(MappedTensors, "__getitem__", None)
    told = Footprints(
        StreamedModel(open_checkpoint(checkpoints("qwen3_moe")), torch.float32, CPU)
    )
    small, large = told.of(0, 1, LENGTH), told.of(0, 2, LENGTH)
    assert 0 < small.observe <= small.run
    assert 1.9 * small.run < large.run < 2.1 * small.run


@pytest.mark.parametrize(
    ("family", "kinds"),
    # layers without experts, and layers of another attention, are kinds of their own
    [("mixtral", [0]), ("qwen3_moe", [0, 1]), ("deepseek_v3", [0, 1])],
)
def test_layers_of_equal_shapes_are_of_one_kind(family, kinds, checkpoints):
    told = Footprints(StreamedModel(open_checkpoint(checkpoints(family)), torch.float32, CPU))
    assert told.kinds() == kinds


def test_linear_attention_full_attention_and_no_experts_are_three_kinds(checkpoints):
    told = Footprints(
        StreamedModel(open_checkpoint(checkpoints("qwen3_next")), torch.float32, CPU)
    )
    assert told.kinds() == [0, 2, 3]


def made(kilobytes):
    return torch.empty(kilobytes, 256)


def test_live_bytes_are_counted_from_birth_to_death():
    with LiveBytes() as counter:
        first = made(1)
        assert (counter.live, counter.peak) == (1024, 1024)
        second = made(2)
        assert counter.live == 3 * 1024
        del first
        assert counter.live == 2 * 1024
        third = made(4)
        assert counter.live == 6 * 1024
        del second, third
        assert counter.live == 0
    assert counter.peak == 6 * 1024


def test_views_and_work_in_place_are_not_counted_twice():
    with LiveBytes() as counter:
        whole = made(4)
        half, flat = whole[:2], whole.view(-1)
        flat.mul_(2).add_(1)
        assert counter.live == counter.peak == 4 * 1024
        del whole, flat
        # a view keeps all of its storage
        assert counter.live == 4 * 1024
        del half
        assert counter.live == 0


def test_what_was_there_before_is_not_counted():
    given = made(8)
    with LiveBytes() as counter:
        view = given.view(-1)
        given.zero_()
        assert counter.peak == 0
        added = given + 1
        assert counter.live == 8 * 1024
    assert view.shape == (2048,)
    assert added.shape == given.shape


def test_what_an_expression_makes_on_the_way_is_in_the_peak():
    with LiveBytes() as counter:
        # the square, its sum with 1 beside it, then the root beside that
        root = (made(1).square() + 1).sqrt()
        assert counter.live == 1024
    assert counter.peak == 2 * 1024
    assert root.numel() == 256


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v4", "qwen3_next", "llama4_text"])
def test_a_model_is_left_as_it_was(family, checkpoints):
    model = StreamedModel(open_checkpoint(checkpoints(family)), torch.float32, CPU)

    def state():
        return {
            (path, name): id(value)
            for path, module in model.model.named_modules()
            for kind in (vars(module), module._parameters, module._buffers)
            for name, value in kind.items()
        }

    before = state()
    told = Footprints(model)
    for index in told.kinds():
        told.of(index, 2, 8)
    # the fused experts of an opened layer are taken out and put back
    assert state() == before
