"""What can be asked for: each option once, with its default, choices and help.

`Method` and `Settings` are the choices that decide the bytes of the output. A field made by
`option` is an option of the command line too, which is generated from it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin

from .errors import UsageError
from .units import parse_numbers, parse_size

THAT_OF_METHOD = "that of --method"


def option(section: str, help: str, *, default: Any = None, **known: Any) -> Any:  # noqa: ANN401
    """Return a field of a dataclass that is an option of the command line.

    Parameters
    ----------
    section
        Where its help lists it.
    help
        Its help.
    default
        Its default; None stands for one that is worked out, which `otherwise` describes.
    known
        ``choices``, all values there are; ``table``, where they have their meaning;
        ``least``, the smallest number; ``parse``, which makes a value of what people write;
        ``metavar``, what help calls the value; ``flag``, a name that is not the field's;
        ``otherwise``, what counts where it is not given; ``required``.
    """
    return field(default=default, metadata={"section": section, "help": help, **known})


def same_option(kind: type, name: str, **changed: Any) -> Any:  # noqa: ANN401
    """Return a field that is the option `name` of another dataclass, apart from `changed`."""
    found = options_of(kind)[name]
    known = {"default": found.default, **found.metadata, **changed}
    return option(known.pop("section"), known.pop("help"), **known)


def options_of(*kinds: type) -> dict[str, Field[Any]]:
    """Return the fields of dataclasses that are options, by name."""
    return {f.name: f for kind in kinds for f in fields(kind) if "section" in f.metadata}


def flag_of(found: Field[Any]) -> str:
    """Return the name of an option on the command line."""
    return str(found.metadata.get("flag") or "--" + found.name.replace("_", "-"))


def given_options(values: Mapping[str, Any], *kinds: type) -> dict[str, Any]:
    """Return values for the fields of dataclasses; text is read as on the command line.

    None leaves a field as it is. Text alone stands for a tuple of it.

    Raises
    ------
    UsageError
        There is no such field, or it takes no such value.
    """
    known = {each.name: each for kind in kinds for each in fields(kind)}
    given = {}
    for name, value in values.items():
        if name not in known:
            raise UsageError(f"{name}: there is no such option")
        if value is not None:
            try:
                given[name] = _read(value, known[name])
            except (TypeError, ValueError) as error:
                raise UsageError(f"{name}: {error}") from error
    return given


def _read(value: Any, found: Field[Any]) -> Any:  # noqa: ANN401
    """Return the value of a field that something stands for."""
    parse = found.metadata.get("parse")
    if parse is not None:
        return parse(value) if isinstance(value, str) else value
    if get_origin(found.type) is tuple:
        several = (value,) if isinstance(value, str | Path) else value
        return tuple(get_args(found.type)[0](each) for each in several)
    is_path = Path in {found.type, *get_args(found.type)}
    return Path(value) if is_path and isinstance(value, str) else value


def check_values(asked: Any) -> None:  # noqa: ANN401
    """Refuse values that an option does not take.

    Raises
    ------
    UsageError
        One sentence about the option and what it takes.
    """
    for each in options_of(type(asked)).values():
        value, known, flag = getattr(asked, each.name), each.metadata, flag_of(each)
        choices, least = known.get("choices"), known.get("least")
        if value is None:
            continue
        if choices is not None and isinstance(value, str) and value not in choices:
            raise UsageError(f"{flag} {value}: there are {', '.join(choices)}")
        if least is not None and (not isinstance(value, int) or value < least):
            raise UsageError(f"{flag} {value}: at least {least} is needed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """Options for ranking, comparing, grouping, aligning and merging experts."""

    saliency: str = option(
        "Method",
        "How experts are ranked.",
        default="reap",
        choices=(
            "reap", "reap-softmax", "reap-squared", "reap-sum", "energy", "frequency", "ean",
        ),
        table="saliency.SALIENCIES",
        otherwise=THAT_OF_METHOD,
    )  # fmt: skip
    similarity: str = option(
        "Method",
        "Weight of tokens in mean outputs; random is a control.",
        default="gated",
        choices=("gated", "plain", "random"),
        table="similarity.SIMILARITIES",
    )
    gate_term: bool = option(
        "Method", "Count the similarity of router columns as half.", default=True
    )
    grouping: str = option(
        "Method",
        "How experts that go are given to those that stay.",
        default="ream",
        choices=("ream", "mc-smoe", "hc-smoe", "none"),
        table="grouping.GROUPINGS",
        otherwise=THAT_OF_METHOD,
    )
    group_size: int = option(
        "Method",
        "Experts a group of ream has at most.",
        default=16,
        least=2,
        otherwise="16; 32 from 512 experts on, or if half or less are kept",
    )
    slices: int = option(
        "Method",
        "Slices that each expert is cut into; slices are then dropped in place of experts, and "
        "the router sends a token to as many times more of them. 0 leaves experts whole.",
        default=0,
        least=0,
        otherwise=THAT_OF_METHOD,
    )
    width: int | None = option(
        "Method",
        "Neurons of a slice, the width of every expert of the output.",
        least=1,
        otherwise="with --slices, chosen for --keep and for what servers take; "
        "docs/concepts/method.md has the rule",
    )
    alignment: str = option(
        "Method",
        "What neurons are matched by.",
        default="both",
        choices=("both", "activations", "weights", "none"),
        table="alignment.ALIGNMENTS",
    )
    merge: str = option(
        "Method",
        "Weights in a merge.",
        default="saliency",
        choices=("saliency", "mean"),
        table="merging.MERGES",
    )
    similarity_tokens: int = option(
        "Method",
        "Tokens on which every expert is run; 0 is all of them.",
        default=4096,
        least=0,
    )
    alignment_tokens: int = option(
        "Method", "Tokens on which neurons are compared.", default=2048, least=1
    )
    refit: str = option(
        "Method",
        "down: refit the down projections of the experts that stay, in closed form, to what "
        "the original layer gives.",
        default="none",
        choices=("none", "down"),
        otherwise=THAT_OF_METHOD,
    )
    refit_experts: str = option(
        "Method",
        "changed: refit merged experts only; the others stay byte copies.",
        default="all",
        choices=("all", "changed"),
    )
    refit_target: str = option(
        "Method",
        "layer: what the original layer gives on the same inputs. trajectory: what it gives "
        "in the original model, which corrects earlier layers too; hidden states take twice "
        "the disk.",
        default="layer",
        choices=("layer", "trajectory"),
        otherwise=THAT_OF_METHOD,
    )
    refit_iterations: int = option(
        "Method", "Iterations of conjugate gradients.", default=2, least=1
    )
    # below 0.3 text unlike the calibration set's suffers
    refit_lambda: tuple[float, ...] = option(
        "Method",
        "Penalties to try; the best on held-back sequences is taken, layer by layer.",
        default=(0.3, 1.0, 3.0),
        parse=parse_numbers,
        metavar="NUMBERS",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Everything but the input files that decides what is written."""

    experts: int
    """Experts to keep in each MoE layer."""

    method: Method
    """Method that chooses and merges the experts."""

    sequential: bool = option(
        "Method",
        "Observe each layer on what the compressed layers before it give.",
        default=True,
    )

    compute_dtype: str = "float32"
    """Dtype of the layers' forward pass: ``bfloat16``, ``float16`` or ``float32``."""

    dtype: str = option(
        "Machine",
        "Keep the format of a quantized checkpoint, or write it as bfloat16.",
        default="keep",
        choices=("keep", "bf16"),
    )
    mtp: str = option(
        "Machine",
        "Multi-token-prediction layers: keep them, compressed as the others, or leave them "
        "out.",
        default="keep",
        choices=("keep", "drop"),
    )
    seed: int = option("Calibration", "Start of every random choice.", default=0, least=0)

    device_kind: str = "cpu"
    """Kind of the device, ``cpu`` or ``cuda``: results are equal only within one kind."""

    observes: bool = False
    """Whether statistics of the source are written in place of a checkpoint."""

    moments: bool = False
    """Whether the statistics that are written have second moments of activations."""

    statistics: str | None = None
    """Digest of the statistics that experts are chosen by; None if the run takes its own."""

    domain_weights: tuple[tuple[str, float], ...] = ()
    """Weights of the statistics' domains; empty for the shares of their tokens."""

    max_shard_bytes: int = option(
        "Machine",
        "Size of an output file, unless one tensor is larger.",
        default=5_000_000_000,
        parse=parse_size,
        metavar="SIZE",
        flag="--max-shard-size",
    )

    @property
    def decodes(self) -> bool:
        """Whether quantized tensors are written as bfloat16."""
        return self.dtype == "bf16"

    @property
    def cuts(self) -> bool:
        """Whether experts are cut into slices."""
        return self.method.slices > 0

    @property
    def runs_layers(self) -> bool:
        """Whether the calibration set is run through the layers."""
        return self.statistics is None

    @property
    def sums_moments(self) -> bool:
        """Whether second moments of activations are summed while layers run."""
        return self.runs_layers and (self.moments or self.cuts)

    def merges(self, num_experts: int) -> bool:
        """Tell whether experts are merged, rather than pruned or all kept."""
        return self.method.grouping != "none" and self.drops(num_experts)

    def drops(self, num_experts: int) -> bool:
        """Tell whether not all experts stay, or not all of their neurons."""
        narrows = self.cuts and self.method.width is not None
        return narrows or self.experts < num_experts * max(1, self.method.slices)

    def refits(self, num_experts: int) -> bool:
        """Tell whether experts are refitted: not if all of them stay."""
        return self.method.refit != "none" and self.drops(num_experts)

    def width(self, inner: int) -> int:
        """Return the inner width of an output expert whose source has width `inner`."""
        return self.method.width or inner // max(1, self.method.slices)

    def top_k(self, top_k: int) -> int:
        """Return how many experts of the output a token is routed to, of `top_k` before."""
        return top_k * max(1, self.method.slices)

    def tracks_original(self, num_experts: int) -> bool:
        """Tell whether the original model's own states are carried beside the others."""
        return self.refits(num_experts) and self.method.refit_target == "trajectory"

    def fields(self) -> dict[str, Any]:
        """Return a flat mapping for fingerprints and the manifest."""
        values = asdict(self)
        # as JSON gives it back
        values["method"]["refit_lambda"] = list(self.method.refit_lambda)
        values["domain_weights"] = [list(each) for each in self.domain_weights]
        for name in ("observes", "moments", "statistics", "domain_weights"):
            if not values[name]:
                del values[name]
        return {**values.pop("method"), **values}


_IDLE: tuple[tuple[Callable[[Method], bool], tuple[str, ...], str], ...] = (
    (
        lambda method: method.grouping == "none",
        (
            *("similarity", "gate_term", "similarity_tokens", "group_size", "merge"),
            *("alignment", "alignment_tokens"),
        ),
        "experts are dropped, not merged",
    ),
    (
        lambda method: method.grouping != "ream",
        ("group_size",),
        "--grouping ream alone has groups of a size",
    ),
    (
        lambda method: method.alignment == "none",
        ("alignment_tokens",),
        "neurons are not matched",
    ),
    (
        lambda method: method.slices > 0,
        ("saliency",),
        "slices are ranked by the error that their loss makes",
    ),
    (
        lambda method: method.refit == "none",
        ("refit_experts", "refit_target", "refit_iterations", "refit_lambda"),
        "nothing is refitted",
    ),
)
"""Conditions under which options of a method have no effect, with the reason."""


def check_idle(method: Method, given: Iterable[str]) -> None:
    """Refuse options that were given, are not at their defaults and have no effect.

    Raises
    ------
    UsageError
        One sentence about the option and why it has none.
    """
    known, usual = options_of(Method), Method()
    for applies, names, reason in _IDLE:
        for name in [name for name in given if name in names and applies(method)]:
            if getattr(method, name) != getattr(usual, name):
                raise UsageError(
                    f"{flag_of(known[name])} has no effect: {reason}; leave it out"
                )
