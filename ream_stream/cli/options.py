"""What a compression can be asked for, and the settings it comes to.

`plan` and `compress` take the same options. The names of methods are written
here again because their tables import torch, which every ``--help`` would wait
for; tests/cli/test_cli.py compares them with the tables.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ream_stream.calibration.mix import MIXES
from ream_stream.errors import UsageError
from ream_stream.settings import REFIT_EXPERTS, REFIT_TARGETS, REFITS, Method, Settings

from .params import F, Penalties, Percent, Size, option, together

if TYPE_CHECKING:
    from ream_stream.checkpoint.hub import Remote

CHOICES: Mapping[str, tuple[str, ...]] = {
    "saliency": (
        "reap", "reap-softmax", "reap-squared", "reap-sum", "energy", "frequency", "ean",
    ),
    "similarity": ("gated", "plain", "random"),
    "grouping": ("ream", "mc-smoe", "hc-smoe", "none"),
    "alignment": ("both", "activations", "weights", "none"),
    "merge": ("saliency", "mean"),
}  # fmt: skip
"""Keys of the method's tables, in their order."""

PRESETS: Mapping[str, Mapping[str, str]] = {
    "ream": {"grouping": "ream", "saliency": "reap"},
    "reap": {"grouping": "none", "saliency": "reap"},
    "mc-smoe": {"grouping": "mc-smoe", "saliency": "frequency"},
    "hc-smoe": {"grouping": "hc-smoe", "saliency": "frequency"},
    "energy": {"grouping": "none", "saliency": "energy", "refit": "down"},
}
"""What ``--method`` stands for; an option given beside it counts more."""

_MANY_EXPERTS = 512
_FOLDER = click.Path(file_okay=False, path_type=Path)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """The values of the options, as parsed; None means that the default is worked out."""

    source: Path
    output: Path | None
    experts: int | None
    keep: Fraction | None
    any_count: bool
    method: str
    saliency: str | None
    grouping: str | None
    group_size: int | None
    similarity: str
    gate_term: bool
    similarity_tokens: int
    alignment: str
    alignment_tokens: int
    merge: str
    refit: str | None
    refit_experts: str
    refit_target: str
    refit_iterations: int
    refit_lambda: tuple[float, ...]
    sequential: bool
    calibration: tuple[str, ...]
    mix: str | None
    text_field: str
    min_characters: int
    sequences: int
    sequence_length: int
    seed: int
    device: str
    compute_dtype: str
    threads: int | None
    ram: int | None
    dtype: str
    mtp: str
    vram: int | None
    disk: int | None
    max_shard_size: int
    work_dir: Path | None
    remote: "Remote | None" = None
    """Where shards are streamed from; SOURCE then has their headers."""


def settings_for(
    options: RunOptions, num_experts: int, *, compute_dtype: str, device_kind: str
) -> Settings:
    """Return the settings that the options come to for a source.

    Parameters
    ----------
    options
        What was asked for.
    num_experts
        Experts of a source layer.
    compute_dtype, device_kind
        What ``--compute-dtype`` and ``--device`` mean on this machine.
    """
    experts = kept_experts(options, num_experts)
    preset = PRESETS[options.method]
    return Settings(
        experts=experts,
        method=Method(
            saliency=options.saliency or preset["saliency"],
            similarity=options.similarity,
            gate_term=options.gate_term,
            grouping=options.grouping or preset["grouping"],
            group_size=(
                default_group_size(experts, num_experts)
                if options.group_size is None
                else options.group_size
            ),
            alignment=options.alignment,
            merge=options.merge,
            similarity_tokens=options.similarity_tokens,
            alignment_tokens=options.alignment_tokens,
            refit=options.refit or preset.get("refit", "none"),
            refit_experts=options.refit_experts,
            refit_target=options.refit_target,
            refit_iterations=options.refit_iterations,
            refit_lambda=options.refit_lambda,
        ),
        sequential=options.sequential,
        compute_dtype=compute_dtype,
        dtype="bfloat16" if options.dtype == "bf16" else "source",
        mtp=options.mtp,
        seed=options.seed,
        device_kind=device_kind,
        max_shard_bytes=options.max_shard_size,
    )


def check_usage(options: RunOptions) -> None:
    """Refuse what is wrong whatever the source is.

    Raises
    ------
    UsageError
        Options are missing, exclude each other, or would write to the source.
    """
    if (options.experts is None) == (options.keep is None):
        raise UsageError("say how many experts to keep: either --experts or --keep")
    source = options.source.resolve()
    for folder in (options.output, options.work_dir):
        if folder is not None and (target := folder.resolve()).is_relative_to(source):
            raise UsageError(f"{target} is in SOURCE, which is never written to")


def kept_experts(options: RunOptions, num_experts: int) -> int:
    """Return how many experts a layer keeps; a share is rounded down.

    Raises
    ------
    UsageError
        The share is less than one expert.
    """
    if options.keep is None:
        return options.experts or 0
    experts = int(options.keep * num_experts)
    if experts < 1:
        raise UsageError(
            f"--keep {float(100 * options.keep):g}%: of {num_experts} experts that is none"
        )
    return experts


def default_group_size(experts: int, num_experts: int) -> int:
    """Return the paper's C: 16, or 32 for very many experts or where half of them go."""
    return 32 if num_experts >= _MANY_EXPERTS or 2 * experts <= num_experts else 16


def run_options(*, calibration_required: bool) -> Callable[[F], F]:
    """Return a decorator that gives a command all options of `RunOptions` but the folders."""
    method, machine = "Method", "Machine"
    count = click.IntRange(min=1)
    options = [
        option("Experts", "--experts", type=count, help="Experts to keep in each MoE layer."),
        option(
            "Experts",
            "--keep",
            type=Percent(),
            metavar="PERCENT",
            help="The same as a share, such as 75%; rounded down to whole experts.",
        ),
        option(
            "Experts",
            "--any-count",
            is_flag=True,
            help="Keep a number of experts too that is not a multiple of 4, which the kernels "
            "of some servers refuse.",
        ),
        option(
            method,
            "--method",
            type=click.Choice(list(PRESETS)),
            default="ream",
            show_default=True,
            help="A known method: sets --grouping, --saliency and --refit. reap drops experts, "
            "energy does so and refits those that stay, the others merge them.",
        ),
        _choice(method, "grouping", help="How experts that go are given to those that stay."),
        _choice(method, "saliency", help="How experts are ranked."),
        option(
            method,
            "--group-size",
            type=click.IntRange(min=2),
            help="Experts a group of ream has at most.  [default: 16; 32 from 512 experts on, "
            "or if half or less are kept]",
        ),
        _choice(
            method,
            "similarity",
            default="gated",
            help="Weight of tokens in mean outputs; random is a control.",
        ),
        option(
            method,
            "--gate-term/--no-gate-term",
            default=True,
            show_default=True,
            help="Count the similarity of router columns as half.",
        ),
        option(
            method,
            "--similarity-tokens",
            type=click.IntRange(min=0),
            default=4096,
            show_default=True,
            help="Tokens on which every expert is run; 0 is all of them.",
        ),
        _choice(method, "alignment", default="both", help="What neurons are matched by."),
        option(
            method,
            "--alignment-tokens",
            type=count,
            default=2048,
            show_default=True,
            help="Tokens on which neurons are compared.",
        ),
        _choice(method, "merge", default="saliency", help="Weights in a merge."),
        *refit_options(),
        option(
            method,
            "--sequential/--no-sequential",
            default=True,
            show_default=True,
            help="Observe each layer on what the compressed layers before it give.",
        ),
        *calibration_options(required=calibration_required),
        *machine_options(),
        option(
            machine,
            "--ram",
            type=Size(auto=True),
            default="auto",
            show_default=True,
            help="Host memory to stay within, such as 16GB; auto is 80% of what is free.",
        ),
        option(
            machine,
            "--vram",
            type=Size(auto=True),
            default="auto",
            show_default=True,
            help="GPU memory to stay within; auto is 90% of what is free. A size given to plan "
            "where there is no GPU plans for one.",
        ),
        option(
            machine,
            "--disk",
            type=Size(auto=True),
            default="auto",
            show_default=True,
            help="What output and work folder may hold together; auto is what is free.",
        ),
        option(
            machine,
            "--threads",
            type=count,
            help="Processor threads to use.  [default: torch's own choice]",
        ),
        option(
            machine,
            "--dtype",
            type=click.Choice(["keep", "bf16"]),
            default="keep",
            show_default=True,
            help="Keep the format of a quantized checkpoint, or write it as bfloat16.",
        ),
        option(
            machine,
            "--mtp",
            type=click.Choice(["keep", "drop"]),
            default="keep",
            show_default=True,
            help="Multi-token-prediction layers: keep them, compressed as the others, or leave "
            "them out.",
        ),
        option(
            machine,
            "--max-shard-size",
            type=Size(),
            default="5GB",
            show_default=True,
            help="Size of an output file, unless one tensor is larger.",
        ),
        option(
            machine,
            "--work-dir",
            type=_FOLDER,
            metavar="DIR",
            help="Where the journal and hidden states go.  [default: OUTPUT/.ream-stream]",
        ),
    ]
    return together(options)


def calibration_options(*, required: bool) -> list[Callable[[F], F]]:
    """Return the options that say what the model is run on."""
    section, count = "Calibration", click.IntRange(min=1)
    return [
        option(
            section,
            "--calibration",
            multiple=True,
            required=required,
            metavar="SOURCE",
            help="Text, records (.jsonl, .json, .csv, .parquet), a folder, tokens "
            "(.safetensors) or a data set (hf:OWNER/NAME/PATTERN). A mix of several: "
            "NAME=SOURCE:WEIGHT for each, or a .yaml file."
            + ("" if required else " Without it only its size counts."),
        ),
        option(
            section,
            "--mix",
            type=click.Choice(list(MIXES)),
            help="One of the paper's mixes: weights of sources called general, math and code.",
        ),
        option(
            section,
            "--text-field",
            default="text",
            show_default=True,
            help="Field of each record that holds the text, or the messages of a chat.",
        ),
        option(
            section,
            "--min-characters",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="Leave out shorter documents.",
        ),
        option(
            section,
            "--sequences",
            type=count,
            default=3072,
            show_default=True,
            help="Sequences to fill with text.",
        ),
        option(
            section,
            "--sequence-length",
            type=click.IntRange(min=2),
            default=512,
            show_default=True,
            help="Tokens of each.",
        ),
        option(
            section,
            "--seed",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="Start of every random choice.",
        ),
    ]


def refit_options() -> list[Callable[[F], F]]:
    """Return the options that say whether the experts that stay make up for the others."""
    method = "Method"
    return [
        option(
            method,
            "--refit",
            type=click.Choice(REFITS),
            help="down: refit the down projections of the experts that stay, in closed form, "
            "to what the original layer gives.  [default: that of --method]",
        ),
        option(
            method,
            "--refit-experts",
            type=click.Choice(REFIT_EXPERTS),
            default="all",
            show_default=True,
            help="changed: refit merged experts only; the others stay byte copies.",
        ),
        option(
            method,
            "--refit-target",
            type=click.Choice(REFIT_TARGETS),
            default="layer",
            show_default=True,
            help="layer: what the original layer gives on the same inputs. trajectory: what it "
            "gives in the original model, which corrects earlier layers too; hidden states "
            "take twice the disk.",
        ),
        option(
            method,
            "--refit-iterations",
            type=click.IntRange(min=1),
            default=3,
            show_default=True,
            help="Iterations of conjugate gradients.",
        ),
        option(
            method,
            "--refit-lambda",
            type=Penalties(),
            default="0.3,1,3",
            show_default=True,
            help="Penalties to try; the best on held-back sequences is taken, layer by layer.",
        ),
    ]


def machine_options() -> list[Callable[[F], F]]:
    """Return the options that say where layers are run, and in what."""
    return [
        option(
            "Machine",
            "--device",
            default="auto",
            show_default=True,
            help="auto, cpu, cuda or cuda:N.",
        ),
        option(
            "Machine",
            "--compute-dtype",
            type=click.Choice(["auto", "checkpoint", "float32"]),
            default="auto",
            show_default=True,
            help="What layers are run in; auto is float32 where bf16 is slow.",
        ),
    ]


def _choice(
    section: str, name: str, *, help: str, default: str | None = None
) -> Callable[[F], F]:
    return option(
        section,
        f"--{name}",
        type=click.Choice(CHOICES[name]),
        default=default,
        show_default=default is not None,
        help=help if default else f"{help}  [default: that of --method]",
    )
