"""What is said of programs that read an output."""

import json
import re
from pathlib import Path

from ream_stream.model.families import FAMILIES, REFUSED
from ream_stream.planning.clients import CLIENTS, next_steps

QWEN = {"model_type": "qwen3_moe"}


def test_only_clients_that_were_tested_with_the_family_are_told():
    told = {use: (command, tested) for use, command, tested in next_steps("out", QWEN)}
    assert told["serve with vLLM"] == ("vllm serve out", "tested with 0.32.0 on the CPU")
    assert told["convert with llama.cpp"][1].startswith("tested with ")
    assert list(next_steps("out", {"model_type": "jamba"})) == []


def test_a_quantized_checkpoint_is_tested_in_its_own_format_alone():
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    told = {use for use, _, _ in next_steps("out", QWEN | {"quantization_config": blocks})}
    assert told == {"convert with llama.cpp"}
    for other in ({**blocks, "weight_block_size": [64, 64]}, {"quant_method": "gptq"}):
        assert list(next_steps("out", QWEN | {"quantization_config": other})) == []


def test_a_folder_is_quoted_as_the_shell_or_python_needs_it():
    told = {use: command for use, command, _ in next_steps("it's here", QWEN)}
    assert told["serve with vLLM"] == "vllm serve 'it'\"'\"'s here'"
    assert told["quantize with llm-compressor"].startswith('oneshot(model="it\'s here", ')


def test_of_a_name_on_the_hub_only_servers_that_take_one_are_told():
    told = list(next_steps("me/it", QWEN, on_hub=True, revision="half"))
    assert [command for _, command, _ in told] == ["vllm serve me/it --revision half"]


def test_every_tested_family_is_a_supported_one_and_its_version_is_known():
    for client in CLIENTS:
        assert set(client.tested) <= FAMILIES.keys() - REFUSED.keys()
        assert client.tested
        assert client.version


def test_what_counts_as_tested_is_what_the_kept_table_has_for_all_methods():
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "clients.json"
    table = json.loads(path.read_text(encoding="utf-8"))["printed"]
    heads, _, *rows = [line.strip("| ").split(" | ") for line in table if line[:2] == "| "]
    for client in filter(lambda each: each.matrix, CLIENTS):
        column = next(n for n, head in enumerate(heads) if head.startswith(client.matrix))
        # a cell has the methods, the largest difference in nats and that of the source
        cells = {row[0]: re.match(r"[\w, ]+: (\S+) \(", row[column]) for row in rows}
        close = [name for name, cell in cells.items() if cell and float(cell[1]) <= 1e-3]
        assert set(client.tested) == {name for name in close if name in FAMILIES}, client.name
        fp8 = {name.removesuffix(" FP8") for name in close if name.endswith(" FP8")}
        assert set(client.tested_fp8) == fp8, client.name
