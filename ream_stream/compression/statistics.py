"""Statistics of a source that an earlier run kept, for a compression to choose experts by.

Letters in shapes: I inner.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ream_stream.calibration.tokens import Tokens, from_file
from ream_stream.checkpoint.reader import Checkpoint
from ream_stream.errors import DamagedError, OtherRunError, UsageError
from ream_stream.file_access import FileRange, digest, is_inside, read_own_json, regular_size
from ream_stream.files import Written
from ream_stream.method.saliency import RoutedSums, domain_factors
from ream_stream.method.similarity import LogitGram
from ream_stream.model.batch_store import BatchStore
from ream_stream.planning.plan import Plan
from ream_stream.planning.statistics_layout import (
    HIDDEN,
    LOGIT_GRAM,
    MOMENTS,
    POSITION,
    SCORE,
    sums_name,
)
from ream_stream.settings import Method, Settings

from .manifest import STATISTICS
from .observer import SumsByDomain, TokenSample
from .source_record import sample_of

FORMAT = 1

TOKENS = "tokens.safetensors"
"""File of the calibration set."""


@dataclass(kw_only=True, slots=True)
class StoredLayer:
    """Statistics of one layer; they are `Observed`."""

    sums: SumsByDomain
    """Sums of routed tokens, by domain."""

    sample: TokenSample | None
    """Tokens that experts are compared on; None if they are not compared."""

    gram: LogitGram | None
    """Inner products of the router's logit columns; None if they are not compared."""

    moments: BatchStore | None = field(repr=False)
    """Second moments (I, I) by expert, domains weighted and added up; None without them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """Statistics in a folder; from `open_statistics`."""

    folder: Path
    """Folder of the statistics."""

    digest: str
    """Digest of all that they are, hex."""

    fingerprint: Mapping[str, Any]
    """Settings of the observation, and digests of source and calibration set."""

    source: Mapping[str, Any]
    """Commit and samples of the shards of the source."""

    read: Mapping[str, Mapping[str, str]]
    """SHA-256 of the tensors that were read of each source file, by layer."""

    layers: Mapping[int, Written]
    """Files by layer."""

    tokens: Tokens
    """Calibration set."""

    def check_source(self, source: Checkpoint) -> None:
        """Refuse a source that the statistics are not of, as far as can be told at once.

        Raises
        ------
        UsageError
            It is another one.
        """
        commit, samples = self.source["commit"], self.source["samples"]
        same = source.digest() == self.fingerprint["source"]
        if source.fetch is not None or not samples:
            same = same and source.commit == commit
        elif not source.cut_files():
            same = same and all(
                path.name in samples
                and sample_of(path) == samples[path.name]["sample"]
                and path.stat().st_size == samples[path.name]["size"]
                for path in source.files()
            )
        if not same:
            raise UsageError(
                f"--statistics {self.folder}: they are not of {source.folder}, whose headers "
                "or weights are others: observe it, or give the SOURCE that was observed"
            )

    def check_read(self, index: int, read: Mapping[str, Mapping[str, str]]) -> None:
        """Refuse a layer whose tensors are not those that were observed.

        Raises
        ------
        OtherRunError
            They have other bytes.
        """
        then, now = self.read.get(str(index)), read[str(index)]
        if then != now:
            raise OtherRunError(
                f"layer {index} of the source is not what the statistics in {self.folder} are "
                "of, its bytes are others: observe the source again"
            )

    def settings(self, asked: Settings, weights: tuple[tuple[str, float], ...]) -> Settings:
        """Return settings of a compression by these statistics.

        Parameters
        ----------
        asked
            Settings without them.
        weights
            Domains with their weights; empty for the shares of their tokens.

        Raises
        ------
        UsageError
            They do not hold what is asked for.
        """
        then, method = self.fingerprint, asked.method
        kept = then["similarity_tokens"]
        if method.similarity_tokens not in {kept, Method().similarity_tokens}:
            raise UsageError(
                f"--similarity-tokens {method.similarity_tokens}: the statistics hold a sample "
                f"of {kept or 'all'}; leave it out"
            )
        if asked.cuts and not then.get("moments"):
            raise UsageError(
                f"--slices {method.slices}: slices need second moments of activations, which "
                f"the statistics in {self.folder} do not hold: observe with --moments"
            )
        unknown = sorted({name for name, _ in weights} - {*self.tokens.domains})
        if unknown:
            raise UsageError(
                f"--weights: {unknown[0]} is no domain of the statistics, there are "
                f"{', '.join(self.tokens.domains)}"
            )
        return replace(
            asked,
            method=replace(method, similarity_tokens=kept),
            sequential=False,
            compute_dtype=then["compute_dtype"],
            statistics=self.digest,
            domain_weights=weights,
        )

    def check_layers(self, plan: Plan) -> None:
        """Refuse a plan with an MoE layer that was not observed.

        Raises
        ------
        UsageError
            There is one: a multi-token-prediction layer.
        """
        for layer in plan.moe_layers:
            if layer.keys.index not in self.layers:
                raise UsageError(
                    f"--statistics {self.folder}: layer {layer.keys.index} was not observed; "
                    "give --mtp drop, as there"
                )

    @contextmanager
    def layer(
        self, index: int, settings: Settings, device: torch.device
    ) -> Iterator[StoredLayer]:
        """Open the statistics of a layer for the length of the block.

        Parameters
        ----------
        index
            Position of the layer.
        settings
            Settings of the compression, with the weights of the domains.
        device
            Where the token sample goes.

        Raises
        ------
        DamagedError
            The file is not the one that was written.
        """
        told = self.layers[index]
        path = self.folder / told.name
        whole = FileRange(path=path, start=0, stop=told.size)
        if regular_size(path) != told.size or digest([whole]) != told.sha256:
            raise DamagedError(f"{path} is damaged: observe the source again")
        with safe_open(path, framework="pt") as file:
            sums_D = self._sums(file)
            factors = _factors(settings, [*self.tokens.domains], sums_D)
            count = len(sums_D[0].count_E)
            sums = SumsByDomain(self.tokens, count)
            sums.domains = {
                name: each if factor == 1 else each.scaled(factor)
                for name, each, factor in zip(self.tokens.domains, sums_D, factors, strict=True)
                if factor
            }
            sample = gram = None
            if settings.merges(count):
                sample, gram = _compared(file, count, settings, device)
            kept = _Moments(file.get_slice(MOMENTS), factors) if settings.cuts else None
            yield StoredLayer(sums=sums, sample=sample, gram=gram, moments=kept)

    def _sums(self, file: Any) -> list[RoutedSums]:  # noqa: ANN401 - safetensors has no types
        tensors = {name: file.get_tensor(sums_name(name)) for name in RoutedSums.NAMES}
        return [
            RoutedSums.from_tensors({name: each[number] for name, each in tensors.items()})
            for number in range(len(self.tokens.domains))
        ]


def open_statistics(folder: Path) -> Statistics:
    """Open statistics that are complete, and make sure that all files are there.

    Raises
    ------
    UsageError
        There are none, or they are not finished.
    DamagedError
        They are not what was written.
    """
    path = folder / STATISTICS
    if not path.is_file():
        raise UsageError(
            f"--statistics {folder}: there are no finished statistics in it, which "
            "ream-stream observe SOURCE STATISTICS makes"
        )
    try:
        value = read_own_json(path)
        if value["format"] != FORMAT:
            raise OtherRunError(f"{path} is of format {value['format']!r}, not {FORMAT}")
        sha256 = statistics_digest(
            {k: v for k, v in value.items() if k not in {"format", "sha256"}}
        )
        if value["sha256"] != sha256:
            raise ValueError("its content does not have its checksum")  # noqa: TRY301
        layers = {int(index): Written(**told) for index, told in value["layers"].items()}
        tokens = Written(**value["tokens"])
        for told in (*layers.values(), tokens):
            if not is_inside(told.name) or regular_size(folder / told.name) != told.size:
                raise ValueError(f"{told.name} is missing or cut")  # noqa: TRY301
        read = from_file(folder / TOKENS, domains=value["domains"])
        if read.digest != value["fingerprint"]["calibration"]:
            raise ValueError(f"{TOKENS} holds other tokens")  # noqa: TRY301
        return Statistics(
            folder=folder,
            digest=sha256,
            fingerprint=value["fingerprint"],
            source=value["source"],
            read=value["read"],
            layers=layers,
            tokens=read,
        )
    except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
        raise DamagedError(
            f"{path}: the statistics are damaged ({error}): observe the source again"
        ) from error


class _Moments:
    """Second moments of a layer's experts in a file, domains weighted and added up."""

    def __init__(self, slices: Any, factors: list[float]) -> None:  # noqa: ANN401
        self._slices, self._factors = slices, factors

    def put(self, number: int, tensor: Tensor) -> None:
        """Refuse: they are only read."""
        raise NotImplementedError

    def drop(self, number: int) -> None:
        """Refuse: they are only read."""
        raise NotImplementedError

    def get(self, number: int) -> Tensor:
        """Return the sum of an expert, (I, I) float32."""
        total: Tensor | None = None
        for domain, factor in enumerate(self._factors):
            if factor:
                own_II = self._slices[domain, number]
                own_II = own_II if factor == 1 else own_II * factor
                total = own_II if total is None else total + own_II
        assert total is not None
        return total


def _factors(settings: Settings, names: list[str], sums: list[RoutedSums]) -> list[float]:
    """Return how many times the tokens of each domain count."""
    if not settings.domain_weights:
        return [1.0] * len(names)
    weights = dict(settings.domain_weights)
    tokens = [each.tokens.item() for each in sums]
    return domain_factors(tokens, [weights.get(name, 0.0) for name in names])


def _compared(
    file: Any,  # noqa: ANN401 - safetensors has no types
    count: int,
    settings: Settings,
    device: torch.device,
) -> tuple[TokenSample, LogitGram | None]:
    """Return what experts are compared by."""
    position_n = file.get_tensor(POSITION)
    rows = int((position_n >= 0).sum())
    sample = TokenSample(position_n[:rows])
    sample.hidden_nH = file.get_tensor(HIDDEN)[:rows].to(device)
    sample.score_nE = file.get_tensor(SCORE)[:rows].to(device)
    if not settings.method.gate_term:
        return sample, None
    gram = LogitGram(count, device=device)
    gram.gram_EE.copy_(file.get_tensor(LOGIT_GRAM))
    return sample, gram


def statistics_digest(value: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest of statistics, format and digest left out, hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
