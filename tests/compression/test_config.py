"""What a compression can be asked for, and the settings it comes to."""

from dataclasses import replace
from pathlib import Path

import pytest

from ream_stream.compression.config import PRESETS, RunOptions, check_usage
from ream_stream.compression.method_settings import settings_for
from ream_stream.errors import UsageError
from ream_stream.planning.slice_shape import ExpertLayer
from ream_stream.settings import Method, options_of


def settings_of(num_experts=128, *, layer=None, **values):
    options = RunOptions.of(source=Path(), **{"method": "ream", **values})
    layer = layer or ExpertLayer(count=num_experts, inner=768)
    return settings_for(options, layer, compute_dtype="float32", device_kind="cpu")


def test_any_share_is_rounded_down_without_an_error_of_floating_point():
    wanted = {"num_experts": 100, "any_count": True}
    assert settings_of(keep="75%", num_experts=66, any_count=True).experts == 49
    # 0.07 * 100 is 7.000000000000001, 0.29 * 100 is 28.999999999999996
    assert settings_of(keep="29%", **wanted).experts == 29
    assert settings_of(keep=0.29, **wanted).experts == 29


@pytest.mark.parametrize(
    ("keep", "num_experts", "groups", "experts"),
    [
        ("75%", 128, 1, 96),
        ("80%", 128, 1, 104),  # 102.4 is nearer to 104 than to 100
        ("79", 128, 1, 100),  # 101.12
        ("0.67", 128, 1, 84),  # 85.76 is between 84 and 88
        ("75%", 66, 1, 48),
        ("100%", 66, 1, 66),
        ("98.5%", 66, 1, 66),  # 65.01 is nearer to all of them than to 64
        ("70%", 256, 8, 176),  # 179.2: multiples of 4 and of the groups
    ],
)
def test_a_share_is_rounded_to_the_nearest_number_that_servers_take(
    keep, num_experts, groups, experts
):
    layer = ExpertLayer(count=num_experts, inner=768, routing_groups=groups)
    assert settings_of(keep=keep, layer=layer).experts == experts


def test_every_whole_percent_of_128_experts_is_near_a_number_that_servers_take():
    kept = {settings_of(keep=f"{percent}%").experts for percent in range(3, 101)}
    assert kept == set(range(4, 129, 4))


def test_a_share_far_from_all_numbers_that_servers_take_names_those_around():
    with pytest.raises(UsageError, match=r"is 6, and .* --experts 4, or --any-count"):
        settings_of(keep="75%", num_experts=8)
    layer = ExpertLayer(count=32, inner=768, routing_groups=8)
    with pytest.raises(UsageError, match=r"is 11.9, and .* --experts 8 or --experts 16, or"):
        settings_of(keep="37.2%", layer=layer)


@pytest.mark.parametrize(
    ("experts", "num_experts", "size"), [(65, 128, 16), (64, 128, 32), (511, 512, 32)]
)
def test_groups_may_be_larger_where_half_go_or_experts_are_very_many(
    experts, num_experts, size
):
    assert settings_of(num_experts, experts=experts).method.group_size == size
    asked = settings_of(num_experts, experts=experts, group_size=5)
    assert asked.method.group_size == 5


def test_a_method_is_a_grouping_and_a_saliency_and_single_options_count_more():
    reap = settings_of(experts=9, method="reap").method
    assert (reap.grouping, reap.saliency) == ("none", "reap")
    mixed = settings_of(experts=9, method="reap", saliency="ean").method
    assert (mixed.grouping, mixed.saliency) == ("none", "ean")
    own = settings_of(experts=9, method=Method(grouping="hc-smoe"), merge="mean").method
    assert own == Method(grouping="hc-smoe", merge="mean")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "energy", "merge": "mean"}, "--merge has no effect: experts are dropped"),
        ({"method": "reap", "group_size": 8}, "--group-size has no effect: experts are drop"),
        ({"method": "hc-smoe", "group_size": 8}, "--group-size has no effect: --grouping ream"),
        ({"refit_lambda": "7"}, "--refit-lambda has no effect: nothing is refitted"),
        ({"alignment": "none", "alignment_tokens": 5}, "--alignment-tokens has no effect"),
    ],
)
def test_an_option_without_an_effect_is_refused(values, message):
    with pytest.raises(UsageError, match=message):
        settings_of(experts=96, **values)
    defaults = {name: getattr(Method(), name) for name in values if name != "method"}
    settings_of(experts=96, **(values | defaults))


def test_every_preset_names_choices_that_exist():
    for preset in PRESETS.values():
        for name, value in preset.items():
            known = options_of(Method)[name].metadata
            assert value in known["choices"] if "choices" in known else value >= known["least"]


def test_slices_are_of_a_share_of_neurons_rounded_to_what_servers_take():
    found = settings_of(keep="75%", method="slices")
    # 75% of 128 x 768 neurons are 230.4 slices of 320
    assert (found.experts, found.method.slices, found.method.width) == (232, 2, 320)
    assert (found.top_k(8), found.width(768), found.method.refit_target) == (
        16,
        320,
        "trajectory",
    )
    even = settings_of(keep="100%", method="slices", slices=3)
    assert (even.experts, even.method.width, even.width(768)) == (384, None, 256)
    assert not even.drops(128)
    assert found.drops(128)
    mix = settings_of(experts=112, method="slices", slices=1, width=640)
    assert (mix.experts, mix.top_k(8), mix.width(768)) == (112, 8, 640)


def test_a_layer_of_many_wide_experts_is_narrowed_where_servers_take_no_more():
    kimi = ExpertLayer(count=384, inner=2048, top_k=8, shared=2048, multiple=128)
    found = settings_of(layer=kimi, keep="50%", method="slices")
    assert (found.method.slices, found.method.width, found.experts) == (2, None, 384)
    # one slice could only be as wide as the shared expert: nothing would be cut
    for more in ({}, {"slices": 2}):
        with pytest.raises(UsageError, match="512 experts"):
            settings_of(layer=kimi, keep="75%", method="slices", **more)
    alone = replace(kimi, shared=0)
    found = settings_of(layer=alone, keep="75%", method="slices")
    assert (found.method.slices, found.method.width, found.experts) == (1, 1792, 328)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"experts": 96, "method": "slices"}, r"--experts 96: .*--width.* --keep"),
        ({"keep": "75%", "method": "slices", "saliency": "ean"}, "--saliency has no effect"),
        ({"keep": "75%", "method": "slices", "slices": 7}, "--slices 7: no width"),
    ],
)
def test_slices_that_cannot_be_are_refused_with_what_would_work(values, message):
    layer = ExpertLayer(count=8, inner=10, multiple=4)
    with pytest.raises(UsageError, match=message):
        settings_of(layer=layer, any_count=True, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"colour": "blue"}, "colour: there is no such option"),
        ({"ram": "much"}, "ram: 'much' is not a size"),
        ({"keep": "3/4"}, "keep: '3/4' is not a share"),
        ({"keep": "0%"}, "keep: '0%' is out of range: a share is above 0% and up to 100%"),
        ({"keep": "120"}, "keep: '120' is out of range"),
        ({"ram": "16"}, "ram: '16' is 16 bytes; write a unit, for example 16GB"),
        ({}, "say how many experts to keep"),
        ({"experts": 3, "keep": 0.5}, "--experts and --keep say the same thing"),
        ({"keep": 1.5}, "--keep 150%"),
        ({"experts": 0}, "--experts 0: at least 1 is needed"),
        ({"experts": "six"}, "--experts six: at least 1 is needed"),
        ({"experts": 6, "method": "luck"}, "--method luck: there are auto, ream, "),
        (
            {"experts": 6, "sequences": "0"},
            "sequences: '0' is neither a number above 0 nor all",
        ),
        ({"experts": 6, "sequences": -1}, "--sequences -1: at least 0 is needed"),
    ],
)
def test_values_that_an_option_does_not_take_are_refused_by_its_name(values, message):
    with pytest.raises(UsageError) as refused:
        check_usage(RunOptions.of(source=Path(), **values))
    assert message in str(refused.value)
