"""What an output is used with next: commands of servers, converters and quantizers.

A client counts as tested with a family where an output and its source gave the same
log-probabilities in it, or a quantizer took the output as it takes the source; each was
tried by hand with floats, so nothing counts for quantized checkpoints.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ream_stream.checkpoint.reader import QUANTIZATION_KEYS
from ream_stream.untrusted import shell_words

UNTESTED = "not tested for this family"
"""What is said of a client that was not tried with a family, or with its quantized format."""


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
    """Model types that were tested."""


CLIENTS = (
    Client(
        name="vLLM",
        use="serve",
        command="vllm serve {model}",
        takes_hub=True,
        version="0.32.0 on the CPU",
        tested=(
            "qwen3_moe", "qwen2_moe", "mixtral", "granitemoe", "gpt_oss", "glm4_moe", "dots1",
        ),
    ),
    Client(
        name="SGLang",
        use="serve",
        command="python -m sglang.launch_server --model-path {model}",
        takes_hub=True,
    ),
    Client(
        name="MLX",
        use="serve",
        command="mlx_lm.server --model {model}",
        version="mlx-lm 0.32.2",
        tested=("qwen3_moe", "mixtral", "deepseek_v3"),
    ),
    Client(
        name="llama.cpp",
        use="convert",
        command="python convert_hf_to_gguf.py {model} --outfile model.gguf",
        version="its converter of October 2026, in f32",
        tested=(
            "qwen3_moe", "qwen2_moe", "mixtral", "granitemoe", "minimax_m2", "deepseek_v3",
        ),
    ),
    Client(
        name="llama.cpp",
        use="quantize",
        command="llama-quantize model.gguf model-Q4_K_M.gguf Q4_K_M",
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
    is_cut: bool = False,
    on_hub: bool = False,
    revision: str | None = None,
) -> Iterator[tuple[str, str, str]]:
    """Yield what an output may be used with: purpose and client, command, what was tested.

    Parameters
    ----------
    model
        Folder of the output, or its name on the hub.
    config
        Its config.json.
    is_cut
        Whether it has slices of experts, which no client was tried with.
    on_hub, revision
        Whether `model` is a name on the hub: only what takes one is told then; its branch.
    """
    branch = "" if revision is None else f" --revision {shell_words([revision])}"
    floats = not any(config.get(key) for key in QUANTIZATION_KEYS)
    for client in CLIENTS:
        if on_hub and not client.takes_hub:
            continue
        is_tested = floats and not is_cut and config.get("model_type") in client.tested
        named = model if client.is_python else shell_words([model])
        yield (
            f"{client.use} with {client.name}",
            client.command.format(model=named) + branch,
            f"tested with {client.version}"
            if is_tested
            else "not tested with slices"
            if is_cut
            else UNTESTED,
        )
