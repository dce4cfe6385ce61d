"""What an output is used with next: commands of servers, converters and quantizers.

A client counts as tested with a family where `make test-clients` found that outputs of it
have the same log-probabilities in the client as in transformers, whatever the method
(docs/reference/clients.md); llm-compressor was tried by hand.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ream_stream.checkpoint.reader import QUANTIZATION_KEYS
from ream_stream.untrusted import shell_words


@dataclass(frozen=True, kw_only=True, slots=True)
class Client:
    """A program that reads checkpoints."""

    name: str
    """Name of the program."""

    use: str
    """Purpose: ``serve``, ``convert`` or ``quantize``."""

    command: str
    """Command line, or call in Python, with ``{model}`` for a folder or a name on the hub."""

    is_python: bool = False
    """Whether `command` is a call in Python."""

    takes_hub: bool = False
    """Whether ``{model}`` may be a name on the hub."""

    version: str = ""
    """Version that was tested; empty if none was."""

    tested: tuple[str, ...] = ()
    """Model types that were tested, in floats."""

    tested_fp8: tuple[str, ...] = ()
    """Model types that were tested with FP8 in blocks of 128."""

    matrix: str = ""
    """Name of the client in the kept table; empty if it is not in it."""


CLIENTS = (
    Client(
        name="vLLM",
        use="serve",
        command="vllm serve {model}",
        takes_hub=True,
        version="0.32.0 on the CPU",
        tested=(
            "qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3",
            "glm4_moe", "gpt_oss", "granitemoe", "dots1",
        ),
        matrix="vllm",
    ),
    Client(
        name="MLX",
        use="serve",
        command="mlx_lm.server --model {model}",
        version="mlx-lm 0.32.2",
        tested=(
            "qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3",
            "glm4_moe", "granitemoe", "dots1", "minimax_m2",
        ),
        matrix="mlx",
    ),
    Client(
        name="llama.cpp",
        use="convert",
        command="python convert_hf_to_gguf.py {model} --outfile model.gguf",
        version="its converter of October 2026, in f32",
        tested=(
            "qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "deepseek_v3", "glm4_moe",
            "granitemoe", "dots1", "minimax_m2",
        ),
        tested_fp8=("qwen3_moe",),
        matrix="llama.cpp",
    ),
    Client(
        name="llama.cpp",
        use="quantize",
        command="llama-quantize model.gguf model-Q4_K_M.gguf Q4_K_M",
        version="its sources of October 2026",
        tested=("qwen3_moe",),
    ),
    Client(
        name="llm-compressor",
        use="quantize",
        is_python=True,
        command="oneshot(model={model!r}, recipe=QuantizationModifier(targets='Linear', "
        "scheme='FP8_DYNAMIC', ignore=['lm_head', 're:.*gate$']))",
        version="0.14.0.1, FP8_DYNAMIC and W4A16",
        tested=("qwen3_moe",),
    ),
)  # fmt: skip
"""All clients, those that serve a checkpoint as it is first."""


def next_steps(
    model: str,
    config: Mapping[str, Any],
    *,
    on_hub: bool = False,
    revision: str | None = None,
) -> Iterator[tuple[str, str, str]]:
    """Yield what an output may be used with: purpose and client, command, version tested.

    Clients that were not tested with its family and format are left out.

    Parameters
    ----------
    model
        Folder of the output, or its name on the hub.
    config
        Its config.json.
    on_hub, revision
        Whether `model` is a name on the hub: only what takes one is told then; its branch.
    """
    branch = "" if revision is None else f" --revision {shell_words([revision])}"
    for client in CLIENTS:
        if _is_tested(client, config) and (client.takes_hub or not on_hub):
            named = model if client.is_python else shell_words([model])
            command = client.command.format(model=named) + branch
            yield f"{client.use} with {client.name}", command, f"tested with {client.version}"


def _is_tested(client: Client, config: Mapping[str, Any]) -> bool:
    described = [config[key] for key in QUANTIZATION_KEYS if config.get(key)]
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    if not described:
        tested = client.tested
    elif len(described) == 1 and blocks.items() <= dict(described[0]).items():
        tested = client.tested_fp8
    else:
        tested = ()
    return config.get("model_type") in tested
