"""Every kind of rotary embedding runs as in transformers, whatever ran before."""

import json
import shutil

import pytest
import torch
from tiny_checkpoints import read_config
from tiny_runs import CPU, forward_in_transformers, forward_streamed, run, settings

from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.errors import UnsupportedModelError
from ream_stream.model.streamed_model import StreamedModel
from ream_stream.planning.activation_memory import Footprints

SLOW = pytest.mark.slow
TRAINED = 16
"""Positions before some scalings begin."""

ROPES = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": TRAINED},
    "longrope": {
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "short_mscale": 1.1,
        "long_mscale": 1.3,
        "original_max_position_embeddings": TRAINED,
    },
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}


def published_before(kind):
    """Return the keys of config.json that old checkpoints have for a scaling."""
    outside = {"original_max_position_embeddings": TRAINED} if kind == "longrope" else {}
    return {
        "rope_theta": 10000.0,
        "rope_scaling": {"type": kind, **ROPES[kind]},
        "max_position_embeddings": TRAINED if kind == "dynamic" else 64,
        **outside,
    }


def published_now(kind, names=()):
    """Return the same as transformers writes them; with names, by kind of layer."""
    values = {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}
    return {
        "rope_parameters": {name: dict(values) for name in names} or values,
        "max_position_embeddings": TRAINED if kind == "dynamic" else 64,
    }


def with_config(folder, source, changes):
    shutil.copytree(source, folder)
    config = {**read_config(folder), **changes}
    if "rope_scaling" in changes:
        del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def batches():
    """Return batches of lengths that change which frequencies are taken, some padded."""
    draw, inputs = torch.Generator().manual_seed(1), []
    for length in (30, 9, TRAINED + 1, TRAINED):
        ids_BL = torch.randint(2, 62, (3, length), generator=draw)
        mask_BL = torch.ones_like(ids_BL)
        mask_BL[0, :4], mask_BL[1, -3:] = 0, 0
        inputs.append((ids_BL, None if length % 2 else mask_BL))
    return inputs


KINDS = [
    pytest.param("qwen3_moe", published_before("dynamic"), id="qwen3_moe-dynamic-before"),
    pytest.param("phimoe", published_before("longrope"), id="phimoe-longrope-before"),
    pytest.param(
        "deepseek_v4",
        published_now("dynamic", ("main", "compress")),
        id="deepseek_v4-dynamic-by-layer",
        marks=SLOW,
    ),
    *(
        pytest.param(name, make(kind), id=f"{name}-{kind}-{make.__name__}", marks=SLOW)
        for name in ("qwen3_moe", "gpt_oss", "deepseek_v3")
        for kind in ROPES
        for make in (published_before, published_now)
    ),
    pytest.param(
        "gemma4_text",
        published_now("longrope", ("full_attention", "sliding_attention")),
        id="gemma4_text-longrope-by-layer",
        marks=SLOW,
    ),
]


@pytest.mark.parametrize(("name", "changes"), KINDS)
def test_no_batch_is_run_otherwise_because_of_those_before(
    checkpoints, tmp_path, name, changes
):
    folder = with_config(tmp_path / "source", checkpoints(name, torch.float32), changes)
    inputs = batches()
    streamed = forward_streamed(folder, torch.float32, inputs)
    for ours, batch in zip(streamed, inputs, strict=True):
        [theirs] = forward_in_transformers(folder, torch.float32, [batch])
        length = batch[0].shape[1]
        for our, their in zip(ours.hidden, theirs.hidden, strict=True):
            assert torch.equal(our, their), length
        assert torch.equal(ours.logits, theirs.logits), length
    told = Footprints(StreamedModel(open_checkpoint(folder), torch.float32, CPU))
    for length in (9, 30):
        assert told.of(0, 2, length).run > 0


def test_a_scaling_that_transformers_cannot_run_is_refused_in_a_sentence(checkpoints, tmp_path):
    changes = published_now("longrope")
    changes["rope_parameters"]["long_factor"] = [2.0] * 7
    folder = with_config(tmp_path / "source", checkpoints("qwen3_moe"), changes)
    with pytest.raises(UnsupportedModelError, match="cannot run layer 0 of the model"):
        run(folder, tmp_path / "out", settings())
    assert not (tmp_path / "out").exists()
