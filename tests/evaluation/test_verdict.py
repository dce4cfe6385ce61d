"""What a comparison is said to mean."""

from itertools import pairwise
from pathlib import Path

import pytest

from ream_stream.evaluation.metrics import Against, Evaluation, Mean
from ream_stream.evaluation.verdict import BANDS, band_of

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "read-an-evaluation.md"


def against(divergence, agreement):
    one = Mean(total_S=(2.0, 2.0), count_S=(1, 1))
    return Against(
        original=Evaluation(loss=one, accuracy=one),
        loss=one,
        divergence=Mean(total_S=(divergence, divergence), count_S=(1, 1)),
        agreement=Mean(total_S=(agreement, agreement), count_S=(1, 1)),
    )


# divergences and agreements of docs/concepts/quality.md
@pytest.mark.parametrize(
    ("divergence", "agreement", "verdict"),
    [
        (0.0, 1.0, "nearly the same"),
        (0.0485, 0.9450, "a small loss"),
        (0.0519, 0.9033, "a small loss"),
        (0.1324, 0.8491, "a clear loss"),
        (0.2921, 0.7703, "a large loss"),
        (0.9670, 0.5805, "a severe loss"),
        # the worse of the two decides
        (0.0, 0.8, "a large loss"),
        (0.3, 1.0, "a large loss"),
        (float("inf"), 0.0, "a severe loss"),
    ],
)
def test_the_worse_of_divergence_and_agreement_decides_the_band(divergence, agreement, verdict):
    assert band_of(against(divergence, agreement)).verdict == verdict


def test_bands_go_from_the_smallest_loss_to_the_largest():
    for one, other in pairwise(BANDS):
        assert one.divergence < other.divergence
        assert one.agreement > other.agreement


def test_the_page_has_the_bands_of_the_code():
    rows = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines()]
    listed = {row[0].removeprefix("| "): row[1:] for row in rows if len(row) == 4}
    for band in BANDS[:-1]:
        divergence, agreement, usual_for = listed[band.verdict]
        assert float(divergence) == band.divergence
        assert agreement == f"{band.agreement:.0%}"
        assert usual_for.removesuffix(" |") == band.usual_for
    assert f"| {BANDS[-1].verdict} | | | {BANDS[-1].usual_for} |" in PAGE.read_text()
