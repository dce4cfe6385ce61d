"""What is said of programs that read an output."""

from pathlib import Path

from ream_stream.model.families import FAMILIES, REFUSED
from ream_stream.planning.clients import CLIENTS, UNTESTED, next_steps


def test_a_client_is_called_tested_for_the_families_that_it_was_tested_with_alone():
    told = {use: (command, tested) for use, command, tested in next_steps("out", QWEN)}
    assert told["serve with vLLM"] == ("vllm serve out", "tested with 0.32.0 on the CPU")
    assert told["serve with SGLang"][1] == UNTESTED
    assert told["convert with llama.cpp"][1].startswith("tested with ")
    other = {use: tested for use, _, tested in next_steps("out", {"model_type": "jamba"})}
    assert set(other.values()) == {UNTESTED}
    assert other.keys() == told.keys()


QWEN = {"model_type": "qwen3_moe"}


def test_nothing_counts_as_tested_for_quantized_checkpoints():
    config = QWEN | {"quantization_config": {"quant_method": "fp8"}}
    assert {tested for _, _, tested in next_steps("out", config)} == {UNTESTED}


def test_a_folder_is_quoted_as_the_shell_or_python_needs_it():
    told = {use: command for use, command, _ in next_steps("it's here", QWEN)}
    assert told["serve with vLLM"] == "vllm serve 'it'\"'\"'s here'"
    assert told["quantize with llm-compressor"].startswith('oneshot(model="it\'s here", ')


def test_of_a_name_on_the_hub_only_servers_that_take_one_are_told():
    told = list(next_steps("me/it", QWEN, on_hub=True, revision="half"))
    assert [command for _, command, _ in told] == [
        "vllm serve me/it --revision half",
        "python -m sglang.launch_server --model-path me/it --revision half",
    ]


def test_every_tested_family_is_a_supported_one_and_its_version_is_known():
    for client in CLIENTS:
        assert set(client.tested) <= FAMILIES.keys() - REFUSED.keys()
        assert bool(client.tested) == bool(client.version)


def test_the_page_has_the_table_of_the_code():
    page = Path(__file__).parents[2] / "docs" / "how-to" / "use-an-output.md"
    listed = [
        line for line in page.read_text(encoding="utf-8").splitlines() if line.count("| ") >= 3
    ]
    for client, row in zip(CLIENTS, listed[1:], strict=True):
        families = ", ".join(f"`{name}`" for name in client.tested)
        told = [client.version or "not tested", families]
        assert row.strip("| ").split(" | ") == [
            f"{client.name}, {client.use}",
            *filter(None, told),
        ]
