"""What a comparison with the original means, in words: a rule of thumb with its basis.

The bands are of one small checkpoint and one published card. They say what is usual, not
what a task needs: docs/how-to/read-an-evaluation.md.
"""

from dataclasses import dataclass

from .metrics import Against


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """Outputs that are about equally far from their original."""

    divergence: float
    """Largest KL divergence of the band, nats a token."""

    agreement: float
    """Smallest share of positions at which both rank the same token first."""

    verdict: str
    """Description of the loss."""

    usual_for: str
    """Measured outputs in this band."""


BANDS = (
    Band(
        divergence=0.01,
        agreement=0.96,
        verdict="nearly the same",
        usual_for="an eighth of the experts removed by energy and refitted",
    ),
    Band(
        divergence=0.06,
        agreement=0.90,
        verdict="a small loss",
        usual_for="a quarter of the experts removed by one of the better methods",
    ),
    Band(
        divergence=0.16,
        agreement=0.84,
        verdict="a clear loss",
        usual_for="a quarter of the experts merged by REAM on the built-in checkpoint",
    ),
    Band(
        divergence=0.51,
        agreement=0.70,
        verdict="a large loss",
        usual_for="half of the experts removed by one of the better methods, or the published "
        "card of GLM-5.3-504B (REAP: .357 with 192 of 256 experts, .506 with 168)",
    ),
    Band(
        divergence=float("inf"),
        agreement=0.0,
        verdict="a severe loss",
        usual_for="half of the experts removed by REAM or REAP on the built-in checkpoint",
    ),
)
"""Bands from the smallest loss to the largest; the last holds all the rest."""


def band_of(against: Against) -> Band:
    """Return the first band that both the divergence and the agreement of tops fit in."""
    divergence, agreement = against.divergence.value, against.agreement.value
    return next(
        band
        for band in BANDS
        if not (divergence > band.divergence or agreement < band.agreement)
    )
