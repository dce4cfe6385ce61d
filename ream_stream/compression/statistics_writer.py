"""Statistics of a source, written for later compressions.

A folder of them has a file for each MoE layer (`planning.statistics_layout`), the calibration
set, and as the last file that is written a manifest with digests and whose they are. Nothing
in it depends on times or places: the same observation gives the same bytes.

Letters in shapes: I inner.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ream_stream import files
from ream_stream.calibration.tokens import Tokens
from ream_stream.checkpoint.shards import Content
from ream_stream.errors import NumbersError
from ream_stream.files import Written
from ream_stream.method.saliency import RoutedSums
from ream_stream.model.batch_store import BatchStore
from ream_stream.model.finite import is_finite
from ream_stream.planning.plan import LayerPlan, Plan
from ream_stream.planning.statistics_layout import (
    HIDDEN,
    LOGIT_GRAM,
    MOMENTS,
    POSITION,
    SCORE,
    sums_name,
)

from .journal import Journal
from .manifest import STATISTICS
from .observer import Observed
from .statistics import FORMAT, TOKENS, statistics_digest


def statistics_content(
    layer: LayerPlan, observed: Observed, moments: BatchStore | None
) -> Callable[[str], Content]:
    """Return a function that gives each tensor of a layer's statistics, by name.

    Parameters
    ----------
    layer
        The layer, whose shard lays out the file.
    observed
        What was observed of the whole calibration set.
    moments
        Second moments (I, I) by expert, domain after domain; None if they are not kept.
    """
    shapes = {tensor.name: tensor.shape for shard in layer.shards for tensor in shard.tensors}
    domains, index = list(observed.sums.domains.values()), layer.keys.index
    sums = {sums_name(name): name for name in RoutedSums.NAMES}
    sample, gram = observed.sample, observed.gram
    assert sample is not None
    assert gram is not None

    def checked() -> Iterator[Tensor]:
        assert moments is not None
        for number in range(shapes[MOMENTS][0] * shapes[MOMENTS][1]):
            moments_II = moments.get(number)
            if not is_finite(moments_II):
                raise NumbersError(f"layer {index}: second moments are not finite")
            yield moments_II

    def content(name: str) -> Content:
        if name in sums:
            return torch.stack([getattr(each, sums[name]) for each in domains])
        if name == MOMENTS:
            return checked()
        if name == LOGIT_GRAM:
            return gram.gram_EE
        value, empty = {
            POSITION: (sample.position_n, -1),
            HIDDEN: (sample.hidden_nH, 0),
            SCORE: (sample.score_nE.float(), 0),
        }[name]
        filled = value.new_full(shapes[name], empty)
        filled[: len(value)] = value
        return filled

    return content


def write_tokens(tokens: Tokens, folder: Path) -> Written:
    """Write the calibration set."""
    # names of domains are in the manifest: of two entries of metadata the order is chance
    return files.write_tensors(folder / TOKENS, tokens.tensors())


def write_statistics(plan: Plan, tokens: Tokens, folder: Path, journal: Journal) -> None:
    """Write the manifest that makes statistics complete.

    Parameters
    ----------
    plan, tokens
        Plan of the observation, and its calibration set.
    folder
        Folder of the statistics.
    journal
        Journal with all layers, and outside of them the calibration set.
    """
    (written,) = journal.outside
    value = {
        "fingerprint": journal.fingerprint,
        "source": {
            "commit": plan.source.commit,
            "samples": {
                name: {"size": each.size, "sample": each.sample}
                for name, each in journal.source.shards.items()
            },
        },
        "read": journal.read,
        "layers": {
            str(record.index): asdict(shard)
            for record in journal.layers
            for shard in record.shards
        },
        "tokens": asdict(written),
        "domains": tokens.domains,
    }
    files.write_json(
        folder / STATISTICS, {"format": FORMAT, "sha256": statistics_digest(value), **value}
    )
