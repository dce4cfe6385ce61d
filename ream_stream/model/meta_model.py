"""A model class without data, and how its parts are found and filled.

Private names of transformers used here are its key mapping and the context that
`from_pretrained` builds models in; tests/model/test_streamed_model.py is the contract.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.monkey_patching import patch_output_recorders

from ream_stream.errors import DamagedError, ReamStreamError, UnsupportedModelError

from .experts import WITHOUT_FLAGS, StreamedExperts
from .mtp import Wiring, lengthen

ALIASES = {"kimi_k2": "deepseek_v3"}
"""Model types with transformers' name for them: the published code is the same."""

NAMES_CODE = frozenset(
    {
        "auto_map",
        # transformers fetches kernels by the name of a repository
        *("attn_implementation", "_attn_implementation"),
        *("experts_implementation", "_experts_implementation"),
    }
)
"""Keys of a config that name code: files of the checkpoint or of a hub repository."""

_LABELS = frozenset({"num_labels", "id2label", "label2id"})
"""Keys that transformers expands to label tables; no causal model has labels."""

MAX_COMPUTED_BYTES = 1_000_000_000
"""Largest tables that a model computes, such as frequencies; known models need megabytes."""

MAX_COUNT = 1 << 24
_COUNT = re.compile(r"(?:^|_)(?:n|num)_|(?:layer|head|expert|group|block)s?$|depth$")
_LAYERS = re.compile(r"layers?$|depth$")


def build_skeleton(
    config: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    mtp: Wiring | None = None,
) -> PreTrainedModel:
    """Build the model class of a config on the meta device, its computed buffers filled.

    Parameters
    ----------
    config
        config.json.
    dtype, device
        Of the buffers, and of what parameters will be.
    mtp
        How a multi-token-prediction layer is wired that is to be behind the decoder's last.

    Raises
    ------
    UnsupportedModelError
        transformers cannot make a model of the config.
    """
    with trusting("transformers cannot build the model of config.json"):
        return _build(config, dtype, device, mtp)


@contextmanager
def trusting(what: str) -> Iterator[None]:
    """Turn whatever code raises that trusts the values of a config into one error.

    transformers checks few of them: what a value of another type, or one out of its range,
    ends in is of any kind. It may decorate a function too.

    Raises
    ------
    UnsupportedModelError
        What `what` says, and why.
    """
    try:
        yield
    except (ReamStreamError, MemoryError, OSError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:500]
        raise UnsupportedModelError(f"{what}: {type(error).__name__}: {reason}") from error


def check_sizes(config: Mapping[str, Any], tensors: int) -> None:
    """Refuse numbers of things for which memory or time would have no bounds.

    Parameters
    ----------
    config
        config.json, or a part of it.
    tensors
        Those of the checkpoint; every layer has some.

    Raises
    ------
    DamagedError
        One is too large.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_sizes(value, tensors)
        if type(value) is not int or key in _LABELS:
            continue
        if _LAYERS.search(key) and value > max(tensors, 1000):
            raise DamagedError(
                f"config.json says {key} is {value}, the checkpoint has {tensors} tensors"
            )
        if _COUNT.search(key) and value > MAX_COUNT:
            raise DamagedError(f"config.json says {key} is {value}, which is not plausible")


def _build(
    config: Mapping[str, Any], dtype: torch.dtype, device: torch.device, mtp: Wiring | None
) -> PreTrainedModel:
    values = _without_code(config)
    # how weights are stored is read from headers
    values.pop("quantization_config", None)
    kind_of_config: Any = CONFIG_MAPPING[
        ALIASES.get(config["model_type"], config["model_type"])
    ]
    # JSON has no infinity: transformers writes it as an object
    loaded = kind_of_config.from_dict(kind_of_config._decode_special_floats(values))
    parts = [getattr(loaded, key, None) for key in loaded.sub_configs]
    for part in [loaded, *filter(None, parts)]:
        part.dtype = dtype
    text = loaded.get_text_config(decoder=True)
    if mtp is not None:
        lengthen(text, mtp)
    kind: Any = AutoModelForCausalLM._model_mapping.get(type(loaded), None)
    if text is not loaded:
        # of a wrapper the whole class, so that every tensor has its place
        kind = AutoModelForImageTextToText._model_mapping.get(type(loaded), kind)
    if kind is None:
        raise UnsupportedModelError(f"{type(loaded).__name__} is of no model that gives logits")
    with ExitStack() as stack:
        for context in kind.get_init_context(dtype, False, False, None):
            stack.enter_context(context)
        model = kind(loaded)
        if mtp is not None:
            path, decoder = find_decoder(model)
            decoder[-1].next_token = mtp.joins(type(final_norm(model, path)), text)
        patch_output_recorders(model)
    _fill_computed(model, device)
    skeleton: PreTrainedModel = model.eval()
    return skeleton


def _fill_computed(model: PreTrainedModel, device: torch.device) -> None:
    """Fill the buffers that a model computes and no checkpoint holds."""
    computed = sum(buffer.nbytes for _, buffer in model.named_non_persistent_buffers())
    if computed > MAX_COMPUTED_BYTES:
        raise DamagedError(f"the model of config.json computes tables of {computed} bytes")
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, leaf = name.rpartition(".")
        empty = torch.empty_like(buffer, device="cpu")
        model.get_submodule(path)._buffers[leaf] = empty
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # drawing numbers on meta takes a second
    # fills nothing but the buffers above
    model.initialize_weights()  # type: ignore[no-untyped-call]
    move_buffers(model, device)


def move_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Move what a model has computed for itself, such as angles, to a device."""
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = buffer.to(device)


@contextmanager
def restored(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put back attributes, parameters and buffers of modules that the block replaces."""
    before = [
        (module, dict(vars(module)), dict(module._parameters), dict(module._buffers))
        for module in modules
    ]
    try:
        yield
    finally:
        for module, attributes, parameters, buffers in before:
            for now, then in (
                (vars(module), attributes),
                (module._parameters, parameters),
                (module._buffers, buffers),
            ):
                now.clear()
                now.update(then)  # type: ignore[arg-type]


def _without_code(value: Any) -> Any:  # noqa: ANN401 - JSON is of any type
    """Return a config without what makes transformers fetch or run somebody's code."""
    if isinstance(value, Mapping):
        return {k: _without_code(v) for k, v in value.items() if k not in NAMES_CODE | _LABELS}
    return [_without_code(each) for each in value] if isinstance(value, list) else value


def text_part(model: PreTrainedModel, layers_path: str) -> tuple[str, ...]:
    """Return what the names of all that text goes through begin with: of a wrapper a part."""
    if model.config.get_text_config(decoder=True) is model.config:
        return ("",)
    whole: Any = model
    parts = [whole.get_input_embeddings(), whole.get_output_embeddings()]
    paths = [path_of(model, part) for part in parts if part is not None]
    return (layers_path.rpartition(".")[0] + ".", *(path + "." for path in paths))


def places(
    model: PreTrainedModel, names: Iterable[str]
) -> Iterator[tuple[str, str, str, WeightConverter | None]]:
    """Yield, for each checkpoint tensor, where transformers loads it, by its own mapping.

    Yields
    ------
    tuple
        The tensor's name; that of its parameter or buffer, which need not be the model's; and
        if it is changed while loading, the pattern of its name and what changes it.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    for name in sorted(names):
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if target not in state and name in state:
            target, pattern = name, None
        converter = next((c for c in converters if pattern in c.source_patterns), None)
        yield name, target, pattern or "", converter


def key_targets(
    model: PreTrainedModel, names: Iterable[str], within: tuple[str, ...]
) -> dict[str, str]:
    """Return, for each checkpoint tensor the model has, the name of its parameter or buffer.

    What is joined from several tensors while loading, one above the other, has several names.
    Only targets that begin with one of `within` count.

    Raises
    ------
    UnsupportedModelError
        A tensor is changed while loading in a way that is not read.
    """
    state = model.state_dict()
    targets, order = {}, {}
    for name, target, pattern, converter in places(model, names):
        if target not in state or not target.startswith(within):
            continue
        if converter is not None and ".experts." not in target:
            steps = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
            order[name] = converter.source_patterns.index(pattern)
            if steps != [(Concatenate, 0)]:
                raise UnsupportedModelError(
                    f"{name} is changed while loading; not supported yet"
                )
        targets[name] = target
    # the names of one target in the order in which they are joined
    return {name: targets[name] for name in sorted(targets, key=lambda n: order.get(n, 0))}


def find_decoder(model: PreTrainedModel) -> tuple[str, Sequence[nn.Module]]:
    """Return the list of decoder layers and its path."""
    kinds = set(model._no_split_modules or ())
    lists = [
        (path, list(module))
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and type(module[0]).__name__ in kinds
    ]
    # a wrapper has others: its vision tower's come first, without experts
    for path, layers in sorted(lists, key=lambda found: not _has_experts(found[1])):
        return path, layers
    raise UnsupportedModelError(f"{type(model).__name__} has no list of decoder layers")


def final_norm(model: PreTrainedModel, layers_path: str) -> nn.Module:
    """Return the norm of what leaves the last decoder layer."""
    return model.get_submodule(layers_path.rpartition(".")[0] + ".norm")


def _has_experts(layers: Sequence[nn.Module]) -> bool:
    return any(
        parameter.dim() == 3 and name.endswith("down_proj")
        for layer in layers
        for name, parameter in layer.named_parameters()
    )


def passes_selection(model: PreTrainedModel, decoder: Sequence[nn.Module]) -> bool:
    """Tell whether layers return, beside hidden states, which tokens attention looked at.

    Raises
    ------
    UnsupportedModelError
        A layer uses what another one selected.
    """
    if type(decoder[0]).__name__ != "GlmMoeDsaDecoderLayer":
        return False
    config: Any = model.config
    if set(config.indexer_types) != {"full"}:
        raise UnsupportedModelError(
            "layers use the tokens that other layers selected (indexer_types of config.json "
            "are not all 'full'): not supported"
        )
    return True


def mixes_states(module: nn.Module) -> bool:
    """Tell whether a module joins the states of a token, of which layers pass on several."""
    return type(module).__name__.endswith("HyperConnection")


def states_axis(layer: nn.Module) -> tuple[int, ...]:
    """Return the axis of states between tokens and width that a layer passes on, if any."""
    mixing: list[Any] = [child for child in layer.children() if mixes_states(child)]
    return tuple(int(module.hc_mult) for module in mixing[:1])


def find_fused_experts(layer: nn.Module) -> tuple[str, nn.Module]:
    """Return the module of a layer that holds all routed experts, and its path."""
    for path, module in layer.named_modules():
        if isinstance(module, StreamedExperts):
            return path, module
        down = getattr(module, "down_proj", None)
        if isinstance(down, nn.Parameter) and down.dim() == 3:
            known = type(module).__name__ in WITHOUT_FLAGS
            if not known and getattr(module, "has_post_expert_norm", True):
                raise UnsupportedModelError(
                    f"{type(module).__name__} does not run experts as transformers' own "
                    "grouped product does"
                )
            return path, module
    raise UnsupportedModelError("a layer has expert tensors but no experts module")


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    """Return the path of a module in a model."""
    paths: Iterator[str] = (path for path, found in model.named_modules() if found is wanted)
    return next(paths)


def get_tensor(model: nn.Module, target: str) -> Tensor:
    """Return a parameter or buffer by its path."""
    path, _, leaf = target.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), leaf)
    return tensor


def put_tensor(model: nn.Module, target: str, value: Tensor) -> None:
    """Replace a parameter or buffer by its path."""
    path, _, leaf = target.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value


def drop_tensors(model: nn.Module, targets: Iterable[str]) -> None:
    """Replace parameters and buffers by tensors without data."""
    for target in targets:
        put_tensor(model, target, get_tensor(model, target).to("meta"))


def dtype_of(model: PreTrainedModel, target: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a parameter has in a model run in `dtype`: some stay float32."""
    plan = model._get_dtype_plan(dtype)
    own = get_tensor(model, target).dtype
    return next((plan[part] for part in plan if part in target), own)
