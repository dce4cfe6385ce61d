"""How an answer of a client is judged, and what the table says of it."""

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools" / "clients"


@pytest.fixture(scope="module")
def tools():
    """Import the modules that import nothing but the standard library."""
    sys.path.insert(0, str(TOOLS))
    try:
        import answers
        import probe
        import tables
    finally:
        sys.path.remove(str(TOOLS))
    return {"answers": answers, "probe": probe, "tables": tables}


def answer(*logprobs, greedy=(7, 8), **more):
    return {"logprobs": [list(logprobs)], "greedy": [list(greedy)], **more}


SAME = answer(-1.0, -2.0, -3.0)


def judge(tools, told, reference=SAME, own=None, model="REAP"):
    return tools["answers"].cell("mixtral", "vllm", model, told, reference, own, ())


def test_equal_scores_are_the_same_and_their_difference_is_told(tools):
    cell = judge(tools, answer(-1.0, -2.0 + 3e-6, -3.0))
    assert (cell.ok, cell.text) == (True, "3e-06")


def test_another_score_of_many_tokens_is_not_the_same(tools):
    cell = judge(tools, answer(-1.0, -2.5, -3.5))
    assert (cell.ok, cell.text) == (False, "5e-01")


def test_few_tokens_after_a_tie_between_experts_are_named_and_let_pass(tools):
    told, reference = [-1.0] * 200, [-1.0] * 200
    told[50:53] = [-1.2, -1.1, -1.05]
    cell = judge(tools, answer(*told), answer(*reference))
    assert (cell.ok, cell.text) == (True, "0e+00 (3 tokens after a tie)")
    told[50:62] = [-1.2] * 12
    assert not judge(tools, answer(*told), answer(*reference)).ok


def test_other_greedy_tokens_from_the_same_scores_are_a_fault(tools):
    cell = judge(tools, answer(-1.0, -2.0, -3.0, greedy=(7, 9)))
    assert (cell.ok, cell.text) == (False, "0e+00, other greedy tokens")


def test_scores_that_are_not_numbers_are_a_fault(tools):
    assert judge(tools, answer(-1.0, float("nan"), float("nan"))).text == "not finite"


def test_eval_has_to_agree_with_the_reference(tools):
    assert not judge(tools, {**SAME, "eval": 0.01}).ok


def test_a_client_that_does_not_load_the_source_tells_nothing_of_outputs(tools):
    source = judge(tools, {"error": "ValueError: no such model"}, model="source")
    assert not source.ok
    assert judge(tools, {"error": "ValueError: no such model"}, own=source).ok


def test_a_client_that_fails_on_an_output_alone_is_a_fault(tools):
    source = judge(tools, SAME, model="source")
    cell = judge(tools, {"error": "KeyError:\n  'experts.31'"}, own=source)
    assert (cell.ok, cell.text) == (False, "KeyError: 'experts.31'")


def test_an_output_may_differ_from_transformers_as_its_source_does(tools):
    source = judge(tools, answer(-1.0, -2.1, -3.1), model="source")
    assert judge(tools, answer(-1.0, -2.15, -3.15), own=source).ok
    assert not judge(tools, answer(-1.0, -2.3, -3.3), own=source).ok


def test_only_the_warnings_that_the_source_has_not_are_told(tools):
    mark = tools["probe"].MARK
    log = f"""loading
{mark}source
WARNING: token 5 of /models/source is unknown
{mark}REAP
WARNING: token 6 of /models/REAP is unknown
done
UserWarning: 4 weights were not used
"""
    found = tools["answers"].sections(log)
    new = tools["answers"].new_warnings(found, "REAP", "source")
    assert new == ["UserWarning: 4 weights were not used"]
    assert tools["answers"].new_warnings(found, "source", "source") == []


def test_the_table_has_a_row_a_source_and_the_reasons_below(tools):
    source = judge(tools, SAME, model="source")
    good, bad = judge(tools, SAME, own=source), judge(tools, {"error": "no"}, own=source)
    lines = tools["tables"].printed(
        [source, good, bad], {"vllm": "0.32.0"}, {"mlx": "no wheel"}
    )
    assert lines == [
        "| source | vllm 0.32.0 |",
        "| --- | --- |",
        "| mixtral | REAP; not REAP |",
        "",
        "- vllm, mixtral, REAP: no",
        "- mlx was not tried: no wheel",
    ]
