"""What servers and converters make of an output's numbers: rules that are known, one by one.

A checkpoint that breaks one is whole and loads in transformers: the kernels or the files of
the named client do not take it, or take it slowly. Each rule names where it was read.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from ream_stream.checkpoint.expert_stack import ExpertStack
from ream_stream.checkpoint.formats import Fp8Block, Int4

from .slice_shape import MOST_EXPERTS, MOST_TOP_K

DIVISOR = 4
"""Divisor of the expert counts that routing kernels of TensorRT-LLM and FlashInfer accept."""

Effect = Literal["works", "slow", "fails"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What rules ask of a checkpoint."""

    experts: int
    """Experts of a layer."""

    top_k: int
    """Experts that a token is routed to."""

    width: int
    """Inner width of an expert."""

    routing_groups: int = 1
    """Number of expert groups in the router; 1 without groups."""

    fp8_block: int = 1
    """Rows of a block that shares an FP8 scale; 1 without blocks."""

    int4_group: int = 1
    """Columns that share a scale of INT4; 1 in other formats."""

    files: tuple[str, ...] = ()
    """Names of the weight files; empty before they are written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What a client takes."""

    clients: tuple[str, ...]
    """Clients it is about, as ``--for`` names them."""

    holds: Callable[[Served], bool]
    """Whether a checkpoint keeps to it."""

    effect: Effect
    """What becomes of one that does not."""

    text: str
    """The same in words, with fields of `Served`: after who and the effect."""

    source: str
    """Where it was read."""

    who: str = ""
    """Who it is about, if `clients` are not their names."""

    def note(self, served: Served) -> str:
        """Return the sentence for a checkpoint that breaks it."""
        values = {name: getattr(served, name) for name in Served.__slots__}
        who = self.who or ", ".join(CLIENT_NAMES[name] for name in self.clients)
        return f"{who}: {self.effect} {self.text.format(**values)}"


CLIENT_NAMES = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "tensorrt-llm": "TensorRT-LLM",
    "llama.cpp": "llama.cpp",
    "transformers": "transformers",
}
"""Names of the clients by the word of ``--for``."""


def _is_power_of_two(count: int) -> bool:
    return count & (count - 1) == 0


RULES: tuple[Rule, ...] = (
    Rule(
        clients=("tensorrt-llm",),
        who="TensorRT-LLM, FlashInfer",
        holds=lambda served: served.experts % DIVISOR == 0,
        effect="fails",
        text="with {experts} experts a layer, their routing kernels take multiples of "
        f"{DIVISOR}",
        source="flashinfer csrc/trtllm_fused_moe_kernel_launcher.cu",
    ),
    Rule(
        clients=("tensorrt-llm",),
        holds=lambda served: served.top_k <= MOST_TOP_K,
        effect="fails",
        text=f"with {{top_k}} experts a token, its kernels take {MOST_TOP_K} at most",
        source="TensorRT-LLM cpp/tensorrt_llm/kernels/moe routing kernels",
    ),
    Rule(
        clients=("sglang",),
        who="SGLang, AITER (ROCm)",
        holds=lambda served: _is_power_of_two(served.experts),
        effect="slow",
        text="with {experts} experts a layer, their fused gates are for powers of two "
        "(SGLang's for 384 too)",
        source="github.com/sgl-project/sglang/pull/6946, github.com/ROCm/aiter/issues/2359",
    ),
    Rule(
        clients=("vllm",),
        holds=lambda served: served.experts % 8 == 0,
        effect="works",
        text="with {experts} experts a layer, but fails to divide them among 8 devices "
        "(expert parallelism)",
        source="github.com/vllm-project/vllm/issues/52435",
    ),
    Rule(
        clients=("vllm", "sglang", "transformers"),
        holds=lambda served: served.experts % served.routing_groups == 0,
        effect="fails",
        text="with {experts} experts a layer, their router divides them into "
        "{routing_groups} equal groups",
        source="github.com/vllm-project/vllm/issues/29439",
    ),
    Rule(
        clients=("vllm", "sglang"),
        holds=lambda served: served.width % served.fp8_block == 0,
        effect="fails",
        text="with experts {width} wide, FP8 scales are for blocks of {fp8_block}",
        source="vllm 0.32 quantization/utils/fp8_utils.py",
    ),
    Rule(
        clients=("vllm",),
        holds=lambda served: (
            served.int4_group == 1 or served.width % max(64, served.int4_group) == 0
        ),
        effect="slow",
        text="with INT4 experts {width} wide, its Marlin kernel takes multiples of 64 and of "
        "the group ({int4_group})",
        source="vllm 0.32 quantization/utils/marlin_utils.py",
    ),
    Rule(
        clients=("llama.cpp",),
        holds=lambda served: served.experts <= MOST_EXPERTS,
        effect="fails",
        text=f"with {{experts}} experts a layer in builds that take {MOST_EXPERTS}; those "
        "since Kimi-K3 take 1024",
        source="llama.cpp src/llama-hparams.h, LLAMA_MAX_EXPERTS",
    ),
    Rule(
        clients=("llama.cpp",),
        holds=lambda served: served.width % 256 == 0,
        effect="works",
        text="with experts {width} wide, but K-quants (Q4_K_M) need multiples of 256: down "
        "projections take the next larger format (Q5_0 for Q4_K), F16 if 32 does not divide "
        "it",
        source="llama.cpp src/llama-quant.cpp, tensor_type_fallback",
    ),
    Rule(
        clients=("llama.cpp",),
        holds=lambda served: all(name.startswith("model") for name in served.files),
        effect="fails",
        text="to convert it, only files named model*.safetensors are read",
        source="llama.cpp conversion/base.py, get_model_part_names",
    ),
)
"""All rules."""


def served(
    stack: ExpertStack, top_k: int, routing_groups: int, files: Collection[str] = ()
) -> Served:
    """Return what rules ask.

    Parameters
    ----------
    stack
        Routed experts of a layer.
    top_k
        Experts that a token is routed to.
    routing_groups
        ``n_group`` of group-limited routers, otherwise 1.
    files
        Names of the weight files, if they are written.
    """
    codec = stack.matrices[0].stored.codec
    return Served(
        experts=stack.count,
        top_k=top_k,
        width=stack.inner,
        routing_groups=routing_groups,
        fp8_block=codec.block[0] if isinstance(codec, Fp8Block) else 1,
        int4_group=codec.group if isinstance(codec, Int4) else 1,
        files=tuple(files),
    )


def broken(served: Served, clients: Collection[str] = tuple(CLIENT_NAMES)) -> Iterator[Rule]:
    """Yield the rules of some clients that a checkpoint breaks."""
    for rule in RULES:
        if not rule.holds(served) and not set(rule.clients).isdisjoint(clients):
            yield rule


def serving_notes(changed: Served, source: Served) -> list[str]:
    """Return a sentence for each rule that an output breaks and its source keeps to."""
    known = set(broken(source))
    return [rule.note(changed) for rule in broken(changed) if rule not in known]
