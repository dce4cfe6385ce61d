"""Experts kept for a size: as many as it has room for, by hand, and none that it has not."""

import json

import pytest
import torch
import yaml
from command_line import call, files

import ream_stream
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.errors import UsageError
from ream_stream.model.streamed_model import StreamedModel
from ream_stream.planning.kv_cache import cache_bytes
from ream_stream.planning.model_size import model_size

# two MoE layers; three matrices of 16 x 32 and a router row
EXPERT_PARAMETERS = 2 * (3 * 16 * 32 + 32)
# three layers, keys and values of two heads of eight, two bytes a number
TOKEN_BYTES = 3 * 2 * 2 * 8 * 2


@pytest.fixture(scope="module")
def source(checkpoints):
    return checkpoints("qwen3_moe")


def kept(source, *, method="reap", any_count=True, **values):
    return ream_stream.plan(source, method=method, any_count=any_count, **values)


@pytest.mark.parametrize(
    ("family", "context", "nbytes"),
    [
        ("qwen3_moe", 10, 10 * TOKEN_BYTES),
        # the latent and its rotary part
        ("deepseek_v3", 10, 3 * (16 + 8) * 2 * 10),
        # and one key of an indexer
        ("deepseek_v32", 10, 3 * (16 + 8 + 8) * 2 * 10),
        # the first and last layer keep no more than a window of five
        ("gpt_oss", 10, (10 + 5 + 5) * 2 * 2 * 8 * 2),
        ("gpt_oss", 4, (4 + 4 + 4) * 2 * 2 * 8 * 2),
        # one layer of four has attention whose state grows
        ("qwen3_next", 10, 2 * 2 * 8 * 2 * 10),
    ],
)
def test_a_cache_is_the_keys_and_values_of_layers_that_keep_them(
    checkpoints, family, context, nbytes
):
    checkpoint = open_checkpoint(checkpoints(family))
    model = StreamedModel(checkpoint, torch.float32, torch.device("cpu"))
    assert cache_bytes(model, context) == nbytes


def test_a_cache_that_is_not_known_is_refused(checkpoints):
    with pytest.raises(UsageError, match=r"deepseek_v4 .* not known|deepseek_v4 has no keys"):
        kept(checkpoints("deepseek_v4"), fits="1MB")


def test_the_most_experts_stay_whose_weights_fit(source):
    exact = kept(source, experts=6).output_bytes
    assert kept(source, target_size=exact).settings.experts == 6
    assert kept(source, target_size=exact - 1).settings.experts == 5
    # of what servers take it is the next below
    served = kept(source, target_size=exact, any_count=False)
    assert served.settings.experts == 4
    whole = kept(source, experts=8).output_bytes
    # a shard's header is a few bytes shorter, in which no expert has room
    assert kept(source, experts=7).output_bytes == pytest.approx(
        whole - 2 * EXPERT_PARAMETERS, abs=3000
    )


def test_weights_of_a_number_of_bits_and_a_cache_fit_a_memory(source):
    total = model_size(open_checkpoint(source)).total
    exact = (total - 2 * EXPERT_PARAMETERS) // 2 + 10 * TOKEN_BYTES
    wanted = {"bits": 4, "context": 10}
    found = kept(source, fits=exact, **wanted)
    assert found.settings.experts == 6
    assert kept(source, fits=exact - 1, **wanted).settings.experts == 5
    assert found.details["size_target"] == {
        "option": "--fits",
        "bytes": exact,
        "bits": 4,
        "context": 10,
        "weights_bytes": exact - 10 * TOKEN_BYTES,
        "cache_bytes": 10 * TOKEN_BYTES,
        "share": 0.75,
        "sentence": f"--fits {exact / 1000:.1f} kB has room for 75.0% of the routed experts: "
        f"{(exact - 10 * TOKEN_BYTES) / 1000:.1f} kB of weights at 4 bits and 1.92 kB of KV "
        "cache for 10 tokens",
    }
    # without them: as written, and the model's longest context, which is less than 32768
    plain = kept(source, experts=6).output_bytes + 64 * TOKEN_BYTES
    assert kept(source, fits=plain).settings.experts == 6
    assert kept(source, fits=plain - 1).settings.experts == 5


def test_slices_fill_a_size_and_the_next_number_does_not_fit(source):
    nbytes = kept(source, experts=6).output_bytes
    found = ream_stream.plan(source, target_size=nbytes, any_count=True)
    method = found.settings.method
    assert (method.slices, found.details["method"]) == (2, "slices")
    assert found.output_bytes <= nbytes
    more = ream_stream.plan(
        source,
        method="slices",
        experts=found.settings.experts + 1,
        width=found.settings.width(16),
        any_count=True,
    )
    assert more.output_bytes > nbytes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_size": "1GB"}, "--target-size 1GB has room for the whole model, which takes"),
        ({"fits": "1GB"}, "--fits 1GB has room for the whole model"),
        ({"target_size": "10kB"}, "has no room for as many experts as a token is sent to"),
        ({"fits": "10kB", "context": 9}, r"takes .*, 1.73 kB of KV cache, and an expert more"),
        ({"target_size": "1GB", "fits": "1GB"}, "--target-size and --fits say the same thing"),
        ({"keep": 0.5, "fits": "1GB"}, "--keep and --fits say the same thing"),
        ({"experts": 4, "context": 9}, "--context has no effect without --fits"),
        ({"target_size": "1GB", "bits": 4}, "--bits has no effect without --fits"),
        ({"fits": "1GB", "bits": "64"}, "bits: '64' is not a number of bits from 1 to 32"),
        ({"fits": "24"}, "write a unit, for example 24GB"),
    ],
)
def test_sizes_that_decide_nothing_are_refused(source, values, message):
    with pytest.raises(UsageError, match=message):
        kept(source, **values)


def test_a_run_for_a_size_is_the_run_of_its_number_and_is_told(
    capsys, source, token_file, tmp_path
):
    nbytes = kept(source, experts=6).output_bytes
    given = ("--any-count", "--calibration", token_file, "--method", "reap")
    run = tmp_path / "run.yaml"
    words = ("--target-size", str(nbytes), *given)
    assert call(capsys, "plan", source, tmp_path / "one", *words, "--save", run)[0] == 0
    assert yaml.safe_load(run.read_text(encoding="utf-8"))["target-size"] == str(nbytes)
    status, out, err = call(capsys, "compress", "--config", run, "--json")
    told = " ".join(err.split())
    assert status == 0
    # in the plan and in the summary
    assert told.count("has room for 75.0% of the routed experts") == 2
    assert json.loads(out)["output_bytes"] == nbytes
    assert call(capsys, "compress", source, tmp_path / "two", "--experts", "6", *given)[0] == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")
