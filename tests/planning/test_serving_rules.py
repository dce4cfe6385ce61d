"""Rules of servers and converters: each is broken by the number it is about, and told."""

import re
from dataclasses import replace

import pytest

from ream_stream.planning.serving_rules import (
    CLIENT_NAMES,
    RULES,
    Served,
    broken,
    serving_notes,
)

GOOD = Served(experts=64, top_k=8, width=768)
"""What all clients take as it is."""

BREAKS = {
    "multiples of 4": ("tensorrt-llm", "fails", {"experts": 62}),
    "32 at most": ("tensorrt-llm", "fails", {"top_k": 33}),
    "powers of two": ("sglang", "slow", {"experts": 96}),
    "8 devices": ("vllm", "works", {"experts": 60}),
    "equal groups": ("vllm", "fails", {"experts": 64, "routing_groups": 3}),
    "blocks of 128": ("vllm", "fails", {"width": 320, "fp8_block": 128}),
    "Marlin": ("vllm", "slow", {"width": 96, "int4_group": 32}),
    "LLAMA": ("llama.cpp", "fails", {"experts": 1024}),
    "K-quants": ("llama.cpp", "works", {"width": 320}),
    "model*.safetensors": ("llama.cpp", "fails", {"files": ("mtp.safetensors",)}),
}


def test_a_checkpoint_that_keeps_to_all_rules_is_told_nothing():
    assert list(broken(GOOD)) == []


@pytest.mark.parametrize("name", BREAKS)
def test_a_rule_is_broken_by_what_it_is_about(name):
    client, effect, values = BREAKS[name]
    served = replace(GOOD, **values)
    told = {rule.note(served): rule for rule in broken(served, [client])}
    matching = [n for n, rule in told.items() if name in n + rule.source]
    assert len(matching) == 1
    assert told[matching[0]].effect == effect
    assert re.match(rf"[\w., ()-]+: {effect} \w+", matching[0])


def test_every_rule_has_a_number_that_breaks_it():
    found = {
        rule for _, _, values in BREAKS.values() for rule in broken(replace(GOOD, **values))
    }
    assert found == set(RULES)


def test_every_rule_is_of_known_clients_and_says_where_it_was_read():
    for rule in RULES:
        assert set(rule.clients) <= CLIENT_NAMES.keys()
        assert rule.source


def test_only_the_rules_of_the_named_client_are_asked():
    served = replace(GOOD, experts=62)
    assert {rule.clients for rule in broken(served, ["llama.cpp"])} == set()
    assert {rule.clients for rule in broken(served, ["sglang"])} == {("sglang",)}


def test_what_the_source_breaks_too_is_no_news():
    source = replace(GOOD, experts=60)
    assert serving_notes(replace(GOOD, experts=44), source) == []
    assert len(serving_notes(replace(GOOD, experts=44), GOOD)) == 2
    assert serving_notes(GOOD, source) == []


@pytest.mark.parametrize(("width", "fits"), [(256, True), (384, False), (768, True)])
def test_k_quants_take_widths_of_256(width, fits):
    notes = serving_notes(replace(GOOD, width=width), GOOD)
    assert (notes == []) is fits
