"""The verb `tokens`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ream_stream.calibration.config import CalibrationOptions

from .options import options_for
from .params import FOLDER, NEW_FILE, Verb, exit_statuses, json_option, option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ream_stream.calibration.tokens import Tokens

_SHOWN_TOKENS, _SHOWN_CHARACTERS = 40, 24


@click.command("tokens", cls=Verb, epilog=exit_statuses(0, 1, 2, 12))
@click.argument("checkpoint", type=FOLDER)
@options_for(CalibrationOptions)
@option(
    "Output",
    "--output",
    type=NEW_FILE,
    metavar="FILE",
    help="Write the tokens here, as .safetensors.  [default: only describe them]",
)
@json_option
def make_tokens(
    checkpoint: Path,
    output: Path | None,
    *,
    as_json: bool,
    **values: Any,  # noqa: ANN401 - those of CalibrationOptions
) -> None:
    """Make a token set with the tokenizer of CHECKPOINT, and describe it.

    The file is used by --calibration and --text as it is: no tokenizer is needed then, and
    every run with the same digest is of the same tokens. Each source of a mix is a domain;
    statistics, saliencies and scores are kept by domain.

    Example:

    \b
        ream-stream tokens ./Qwen3-30B-A3B --output mix.safetensors \\
            --calibration code=./src:0.7 --calibration math=problems.jsonl:0.3
        ream-stream tokens ./Qwen3-30B-A3B --calibration mix.safetensors
    """
    from ream_stream import files
    from ream_stream.calibration.packing import read_tokens
    from ream_stream.calibration.token_cache import calibration_of
    from ream_stream.checkpoint.reader import read_config, vocab_size_of
    from ream_stream.errors import UsageError
    from ream_stream.file_access import resolved

    from .console import columns, console, facts, print_json

    if output is not None and (output.suffix.lower() != ".safetensors" or output.exists()):
        raise UsageError(f"--output {output}: give a new file that ends in .safetensors")
    wanted = calibration_of(CalibrationOptions(**values))
    assert wanted is not None  # --calibration is required, and a mix without parts is refused
    vocab_size = vocab_size_of(read_config(checkpoint))
    tokens = read_tokens(wanted, checkpoint, vocab_size=vocab_size)
    if output is not None:
        output = resolved(output.parent) / output.name
        files.make_directory(output.parent)
        files.write_tensors(output, tokens.tensors(), metadata=tokens.metadata())
    known = describe(tokens, _tokenizer(checkpoint))
    if as_json:
        print_json(known)
        return
    shown = console(stderr=False)
    names = ("sequences", "sequence_length", "tokens", "digest")
    shown.print(facts([(name.replace("_", " "), str(known[name])) for name in names]))
    rows = [
        (
            name,
            str(each["sequences"]),
            f"{each['share']:.1%}",
            str(each["tokens"]),
            str(each["distinct_tokens"]),
            repr((each["begins"] or "")[:_SHOWN_CHARACTERS]),
        )
        for name, each in known["domains"].items()
    ]
    heads = ("domain", "sequences", "share", "tokens", "distinct tokens", "begins")
    shown.print(columns(heads, rows))


def describe(tokens: "Tokens", tokenizer: "PreTrainedTokenizerBase | None") -> dict[str, Any]:
    """Return what there is to know of a token set, domain by domain."""
    import torch

    mask_SL = tokens.attention_mask_SL
    domains = {}
    for number, name in enumerate(tokens.domains):
        row_R = (tokens.domain_S == number).nonzero().squeeze(1)
        ids_RL = tokens.input_ids_SL[row_R]
        id_T = ids_RL.flatten() if mask_SL is None else ids_RL[mask_SL[row_R].bool()]
        domains[name] = {
            "sequences": len(row_R),
            "share": len(row_R) / tokens.num_sequences,
            "tokens": len(id_T),
            "distinct_tokens": len(torch.unique(id_T)),
            "begins": tokenizer.decode(id_T[:_SHOWN_TOKENS]) if tokenizer else None,
        }
    return {
        "sequences": tokens.num_sequences,
        "sequence_length": tokens.sequence_length,
        "tokens": tokens.num_tokens,
        "digest": tokens.digest,
        "domains": domains,
    }


def _tokenizer(checkpoint: Path) -> "PreTrainedTokenizerBase | None":
    """Return the checkpoint's tokenizer; None if it has none, which token files do not need."""
    from ream_stream.calibration.packing import load_tokenizer
    from ream_stream.errors import UsageError

    try:
        return load_tokenizer(checkpoint)
    except UsageError:
        return None
