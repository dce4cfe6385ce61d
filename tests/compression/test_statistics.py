"""Statistics that are kept once, and outputs of any size that are made of them.

Letters in shapes: S sequences, L tokens of a sequence, D domains, E experts, I inner.
"""

import json
import shutil

import pytest
import quantized
import torch
from command_line import call, files
from killed_runs import WORK
from safetensors.torch import load_file, save_file
from tiny_checkpoints import add_mtp, write_checkpoint
from tiny_families import TINY
from tiny_runs import scheduled, settings, some_tokens

import ream_stream
from ream_stream.calibration.tokens import from_file
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.compression.pipeline import compress
from ream_stream.compression.statistics import TOKENS
from ream_stream.compression.workspace import Workspace
from ream_stream.errors import (
    DamagedError,
    InterruptedRunError,
    OtherRunError,
    UsageError,
)
from ream_stream.events import LayerDone
from ream_stream.method.saliency import RoutedSums, domain_factors
from ream_stream.planning.planner import make_plan

FAST = {"compute_dtype": "float32", "threads": 1}


def one_layer(folder, name="qwen3_moe", **changes):
    """Write a checkpoint of two layers of which the first alone has experts."""
    config = {"num_hidden_layers": 2, "mlp_only_layers": [1], **changes}
    return write_checkpoint(folder, name, torch.bfloat16, **config)


def token_file(folder, name="tokens", *, domains=None, **drawn):
    tokens = some_tokens(sequences=8, **drawn)
    path, metadata, tensors = folder / f"{name}.safetensors", {}, tokens.tensors()
    if domains:
        metadata = {"domains": json.dumps(domains)}
        tensors["domain"] = torch.arange(8) % len(domains)
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.fixture(scope="module")
def observed(tmp_path_factory, checkpoints):
    """Give a source of two MoE layers, tokens of two domains, and statistics of them."""
    folder = tmp_path_factory.mktemp("observed")
    tokens = token_file(folder, domains=["code", "math"])
    source = checkpoints("qwen3_moe")
    ream_stream.observe(source, folder / "kept", calibration=tokens, **FAST)
    return source, tokens, folder / "kept"


def weights_of(output):
    """Return all files of an output but those that tell how it was made."""
    told = {"ream_stream.json", "README.md"}
    return {name: data for name, data in files(output).items() if name not in told}


def groups_of(output):
    return [layer["groups"] for layer in told_of(output)["layers"]]


def told_of(output):
    return json.loads((output / "ream_stream.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("padded", [False, True])
def test_with_one_moe_layer_they_give_the_bytes_of_a_run_over_the_text(tmp_path, padded):
    source = one_layer(tmp_path / "source")
    tokens = token_file(tmp_path, padded=padded)
    ream_stream.observe(source, tmp_path / "kept", calibration=tokens, **FAST)
    apart = {"method": "slices", "refit": "none", "refit_target": "layer"}
    for number, wanted in enumerate((
        {"method": "reap", "experts": 6},
        {"method": "reap", "saliency": "frequency", "experts": 3},
        {"method": "energy", "refit": "none", "experts": 5},
        {"method": "ream", "experts": 6},
        {"method": "hc-smoe", "experts": 5},
        {"method": "mc-smoe", "experts": 5, "gate_term": False},
        {**apart, "keep": 0.6},
        {**apart, "slices": 1, "keep": 0.5},
    )):  # fmt: skip
        one, other = tmp_path / f"{number}-run", tmp_path / f"{number}-kept"
        given = {**wanted, **FAST, "any_count": True}
        ream_stream.compress(source, one, calibration=tokens, **given)
        ream_stream.compress(source, other, statistics=tmp_path / "kept", **given)
        assert weights_of(one) == weights_of(other), wanted
        assert groups_of(one) == groups_of(other)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt_oss", {"num_hidden_layers": 1, "layer_types": ["full_attention"]}),
        ("deepseek_v3", {"num_hidden_layers": 2, "first_k_dense_replace": 1}),
    ],
)
def test_other_routers_and_biases_too(tmp_path, name, changes):
    source = write_checkpoint(tmp_path / "source", name, torch.bfloat16, **changes)
    tokens = token_file(tmp_path)
    ream_stream.observe(source, tmp_path / "kept", calibration=tokens, **FAST)
    for number, method in enumerate(("reap", "ream")):
        given = {"method": method, "experts": 6, "any_count": True, **FAST}
        one, other = tmp_path / f"{number}-run", tmp_path / f"{number}-kept"
        ream_stream.compress(source, one, calibration=tokens, **given)
        ream_stream.compress(source, other, statistics=tmp_path / "kept", **given)
        assert weights_of(one) == weights_of(other)


def check_equals_a_run_from_the_original_states(source, folder):
    tokens = token_file(folder)
    ream_stream.observe(source, folder / "kept", calibration=tokens, **FAST)
    for method in ("reap", "ream"):
        given = {"method": method, "experts": 6, "any_count": True, **FAST}
        one, other = folder / f"{method}-run", folder / f"{method}-kept"
        ream_stream.compress(source, one, calibration=tokens, sequential=False, **given)
        ream_stream.compress(source, other, statistics=folder / "kept", **given)
        assert weights_of(one) == weights_of(other), method


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_every_family_is_observed(tmp_path, checkpoints, name):
    check_equals_a_run_from_the_original_states(checkpoints(name), tmp_path)


@pytest.mark.parametrize("name", ["deepseek_v3-fp8", "gpt_oss-mxfp4"])
def test_quantized_sources_are_observed(tmp_path, name):
    source, _ = quantized.write(tmp_path, name, torch.bfloat16)
    check_equals_a_run_from_the_original_states(source, tmp_path)


def test_of_several_layers_they_are_those_of_the_original_model(tmp_path, observed):
    source, tokens, kept = observed
    given = {"experts": 5, "any_count": True, "method": "reap", **FAST}
    ream_stream.compress(source, tmp_path / "kept", statistics=kept, **given)
    ream_stream.compress(
        source, tmp_path / "run", calibration=tokens, sequential=False, **given
    )
    assert weights_of(tmp_path / "kept") == weights_of(tmp_path / "run")
    fingerprint = told_of(tmp_path / "kept")["fingerprint"]
    manifest = json.loads((kept / "statistics.json").read_text(encoding="utf-8"))
    assert fingerprint["statistics"] == manifest["sha256"]
    assert (fingerprint["sequential"], "domain_weights" in fingerprint) == (False, False)
    assert "--statistics STATISTICS" in (tmp_path / "kept" / "README.md").read_text()


def test_an_output_of_statistics_is_whole(tmp_path, observed):
    source, _, kept = observed
    ream_stream.compress(
        source, tmp_path / "out", statistics=kept, keep="60%", any_count=True, **FAST
    )
    checked = ream_stream.verify(tmp_path / "out", load=True, run=True, against=source)
    assert [finding.message for finding in checked if not finding.ok] == []


def test_domains_count_by_weights_as_though_there_were_more_tokens_of_some():
    # 100 tokens count as 200 of 400 and 300 as the others; as they were, nothing changes
    assert domain_factors([100, 300], [1, 1]) == [2, pytest.approx(2 / 3)]
    assert domain_factors([100, 300], [0.25, 0.75]) == [1, 1]
    assert domain_factors([100, 300], [3, 0]) == [4, 0]
    sums = RoutedSums(2)
    sums.tokens += 3
    sums.count_E += torch.tensor([1.0, 2.0])
    scaled = sums.scaled(2)
    assert (scaled.tokens, scaled.count_E.tolist(), sums.tokens) == (6, [2, 4], 3)


def test_each_domain_has_the_statistics_of_a_run_of_its_own(tmp_path, observed):
    source, tokens, kept = observed
    drawn = load_file(tokens)
    both = load_file(kept / "layer-00000.safetensors")
    for number, name in enumerate(("code", "math")):
        own = {"input_ids": drawn["input_ids"][drawn["domain"] == number]}
        save_file(own, tmp_path / f"{name}.safetensors")
        ream_stream.observe(
            source, tmp_path / name, calibration=tmp_path / f"{name}.safetensors", **FAST
        )
        alone = load_file(tmp_path / name / "layer-00000.safetensors")
        assert both["tokens_D"][number] == alone["tokens_D"][0] == 4 * 12
        assert torch.equal(both["count_DE"][number], alone["count_DE"][0])
        for each in ("gate_norm_squared_DE", "moments_DEII"):
            torch.testing.assert_close(both[each][number], alone[each][0])


def test_weights_of_one_domain_alone_are_a_run_of_that_domain(tmp_path, observed):
    source, tokens, kept = observed
    drawn = load_file(tokens)
    own = {"input_ids": drawn["input_ids"][drawn["domain"] == 1]}
    save_file(own, tmp_path / "math.safetensors")
    given = {"any_count": True, "keep": 0.6, **FAST}
    sequential = {"sequential": False, "refit": "none", "refit_target": "layer"}
    for method in ("reap", "slices"):
        one, other = tmp_path / f"{method}-kept", tmp_path / f"{method}-run"
        ream_stream.compress(
            source, one, method=method, statistics=kept, weights="math=2", **given
        )
        changed = sequential if method == "slices" else {"sequential": False}
        ream_stream.compress(
            source,
            other,
            method=method,
            calibration=tmp_path / "math.safetensors",
            **given,
            **changed,
        )
        assert groups_of(one) == groups_of(other)
    fingerprint = told_of(one)["fingerprint"]
    assert fingerprint["domain_weights"] == [["math", 2]]


def test_equal_weights_of_domains_of_equal_size_change_no_choice(tmp_path, observed):
    source, _, kept = observed
    given = {"statistics": kept, "experts": 5, "any_count": True, "method": "reap", **FAST}
    ream_stream.compress(source, tmp_path / "plain", **given)
    ream_stream.compress(source, tmp_path / "same", weights="code=3,math=3", **given)
    assert weights_of(tmp_path / "plain") == weights_of(tmp_path / "same")


def test_a_compression_by_statistics_that_stops_goes_on_to_the_same_bytes(tmp_path, observed):
    source, _, kept = observed
    given = {"statistics": kept, "keep": 0.6, "any_count": True, "weights": "code=1", **FAST}
    ream_stream.compress(source, tmp_path / "whole", **given)

    def stop(event):
        if isinstance(event, LayerDone) and event.layer == 0:
            raise InterruptedRunError("enough")

    with pytest.raises(InterruptedRunError):
        ream_stream.compress(source, tmp_path / "cut", report=stop, **given)
    with pytest.raises(OtherRunError, match="domain_weights"):
        ream_stream.compress(source, tmp_path / "cut", **{**given, "weights": "math=1"})
    ream_stream.compress(source, tmp_path / "cut", **given)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"refit": "down"}, "--refit down: a refit needs the activations of all experts"),
        ({"weights": "poetry=1"}, "--weights: poetry is no domain .* there are code, math"),
        ({"method": "ream", "weights": "code=1"}, "--weights: merging compares experts"),
        ({"calibration": "x"}, "--statistics and --calibration exclude each other"),
        ({"compute_dtype": "checkpoint"}, "--compute-dtype checkpoint is bfloat16 here"),
        ({"method": "ream", "similarity_tokens": 7}, "--similarity-tokens 7: the statistics"),
        (
            {"statistics": None, "calibration": "x", "weights": "a=1"},
            "--weights has no effect without --statistics",
        ),
        ({"weights": "code"}, "weights: 'code' are not weights"),
        ({"weights": "code=0"}, "a weight above 0 are needed"),
        ({"weights": "code=1,code=2"}, "each name once"),
    ],
)
def test_what_statistics_do_not_hold_is_refused_before_anything_is_written(
    tmp_path, observed, values, message
):
    source, _, kept = observed
    given = {"statistics": kept, "keep": 0.6, "any_count": True, **FAST, **values}
    with pytest.raises(UsageError, match=message):
        ream_stream.compress(source, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_statistics_of_another_source_are_refused(tmp_path, observed):
    source, _, kept = observed
    given = {"statistics": kept, "keep": 0.6, "any_count": True, **FAST}
    other = shutil.copytree(source, tmp_path / "other")
    # a copy is the same source, whatever its times
    assert ream_stream.plan(other, **given).output_bytes
    path = sorted(other.glob("*.safetensors"))[0]
    tensors = load_file(path)
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(changed, path, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"they are not of .*other, whose headers or weights"):
        ream_stream.compress(other, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_weights_that_the_samples_do_not_show_are_found_at_their_layer(
    tmp_path, observed, monkeypatch
):
    source, _, kept = observed
    other = shutil.copytree(source, tmp_path / "other")
    path = sorted(other.glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = next(name for name in tensors if "layers.0." in name and "experts" in name)
    tensors[name][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    sample = "ream_stream.compression.statistics.Statistics.check_source"
    monkeypatch.setattr(sample, lambda *_: None)
    with pytest.raises(OtherRunError, match="layer 0 of the source is not what the statistics"):
        ream_stream.compress(
            other, tmp_path / "out", statistics=kept, keep=0.6, any_count=True, **FAST
        )


def test_damaged_statistics_are_found(tmp_path, observed):
    source, _, kept = observed
    given = {"keep": 0.6, "any_count": True, **FAST}

    def broken(name, change):
        folder = shutil.copytree(kept, tmp_path / f"{len(list(tmp_path.iterdir()))}")
        path = folder / name
        path.write_bytes(change(path.read_bytes()))
        return folder

    def flipped(data):
        return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]

    manifest = "statistics.json"
    for folder, message in (
        (broken(manifest, lambda d: d.replace(b'"seed": 0', b'"seed": 1')), "its checksum"),
        (broken(manifest, lambda d: d[:40]), "damaged"),
        (broken(TOKENS, flipped), "holds other tokens"),
        (broken("layer-00002.safetensors", lambda d: d[:-1]), "is missing or cut"),
        (broken("layer-00000.safetensors", flipped), "is damaged: observe the source again"),
    ):
        with pytest.raises(DamagedError, match=message):
            ream_stream.compress(source, tmp_path / "out", statistics=folder, **given)
    (folder / manifest).unlink()
    with pytest.raises(UsageError, match="no finished statistics"):
        ream_stream.compress(source, tmp_path / "out", statistics=folder, **given)


def test_without_moments_they_are_small_and_slices_are_refused(tmp_path, observed):
    source, tokens, kept = observed
    small = tmp_path / "small"
    ream_stream.observe(source, small, calibration=tokens, moments=False, **FAST)
    name = "layer-00000.safetensors"
    assert (kept / name).stat().st_size - (small / name).stat().st_size >= 2 * 8 * 16 * 16 * 4
    given = {"statistics": small, "keep": 0.6, "any_count": True, **FAST}
    with pytest.raises(UsageError, match="slices need second moments"):
        ream_stream.compress(source, tmp_path / "out", method="slices", **given)
    # and auto is what they allow
    planned = ream_stream.plan(source, **given).details
    assert planned["method"] == "energy"
    assert planned["settings"]["refit"] == "none"
    assert "slices need second moments" in planned["method_reason"]


def test_multi_token_prediction_layers_are_observed_or_dropped(tmp_path, checkpoints):
    source = shutil.copytree(checkpoints("glm4_moe"), tmp_path / "source")
    assert add_mtp(source, "glm4_moe")
    tokens = token_file(tmp_path)
    ream_stream.observe(source, tmp_path / "kept", calibration=tokens, **FAST)
    ream_stream.observe(source, tmp_path / "less", calibration=tokens, mtp="drop", **FAST)
    given = {"method": "reap", "experts": 6, "any_count": True, **FAST}
    ream_stream.compress(source, tmp_path / "all", statistics=tmp_path / "kept", **given)
    assert (tmp_path / "kept" / "layer-00003.safetensors").is_file()
    with pytest.raises(UsageError, match="layer 3 was not observed; give --mtp drop"):
        ream_stream.compress(source, tmp_path / "no", statistics=tmp_path / "less", **given)
    ream_stream.compress(
        source, tmp_path / "cut", statistics=tmp_path / "less", mtp="drop", **given
    )


def test_blocks_of_experts_and_of_moments_give_the_same_statistics(tmp_path, observed):
    source, tokens, kept = observed
    read = from_file(tokens)
    wanted = settings(8, sequential=False, observes=True, moments=True)
    plan = make_plan(open_checkpoint(source), wanted, 8, 12, domains=2, threads=1)
    plan = scheduled(plan, gram_blocks=3)
    workspace = Workspace(output=tmp_path / "out", work=tmp_path / "out" / WORK)
    with workspace.locked():
        compress(plan, read, workspace, device=torch.device("cpu"))
    for name in ("layer-00000.safetensors", "layer-00002.safetensors", TOKENS):
        assert (tmp_path / "out" / name).read_bytes() == (kept / name).read_bytes()


def test_the_verb_says_what_it_will_keep_and_what_to_do_with_it(capsys, tmp_path, observed):
    source, tokens, _ = observed
    words = ("observe", source, tmp_path / "kept", "--calibration", tokens)
    status, out, err = call(capsys, *words, "--dry-run", "--json")
    planned = json.loads(out)
    assert (status, planned["observes"], (tmp_path / "kept").exists()) == (0, True, False)
    assert "sums by domain, second moments, a token sample" in " ".join(err.split())
    status, out, err = call(capsys, *words, "--json")
    told = " ".join(err.split())
    assert status == 0
    assert "layer 1/3 8 experts observed" in told
    assert f"OUTPUT --statistics {tmp_path / 'kept'} --keep 75%" in told
    size = sum(path.stat().st_size for path in (tmp_path / "kept").glob("layer*"))
    assert json.loads(out)["output_bytes"] == planned["output_bytes"] == size
    status, out, _ = call(capsys, "status", tmp_path / "kept", "--json")
    assert (status, json.loads(out)["state"]) == (0, "complete")
    assert "nothing was left to do" in call(capsys, *words)[2]
    assert call(capsys, "clean", tmp_path / "kept")[0] == 0
    status, out, _ = call(capsys, "status", tmp_path / "kept", "--json")
    assert (status, json.loads(out)["is_cleaned"]) == (0, True)
    words = ("compress", source, tmp_path / "out", "--keep", "60%", "--any-count")
    words = (*words, "--statistics", tmp_path / "kept", "--weights", "code=.7,math=.3")
    run = tmp_path / "run.yaml"
    assert call(capsys, "plan", *words[1:], "--save", run)[0] == 0
    assert "weights: code=0.7,math=0.3" in run.read_text(encoding="utf-8")
    status, _, err = call(capsys, "compress", "--config", run)
    assert status == 0
    assert "weighted code 0.7, math 0.3" in err
    assert "by statistics of the original model" in " ".join(err.split())
    assert call(capsys, "compress", source, tmp_path / "x", "--keep", "60%")[0] == 2


def test_a_plan_by_statistics_has_no_pass_over_tokens(observed):
    source, _, kept = observed
    given = {"keep": 0.6, "any_count": True, **FAST}
    known = ream_stream.plan(source, statistics=kept, method="slices", **given).details
    phases = {name for name, each in known["forecast"]["phases"].items() if each["seconds"]}
    assert phases == {"check", "cut", "write", "finish"}
    assert known["disk_parts"]["hidden states"] == 0
    assert not any("work: observe" in part for part in known["memory_parts"])
