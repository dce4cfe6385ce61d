"""How far rounding takes apart two sums of the same terms, in whatever order they are added.

A sum of n products in arithmetic of unit roundoff u is off by at most n u times the sum of
their absolute values (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
Where terms cancel, that is many times the rounding of the sum itself: a bound relative to the
sum holds for most draws only.
"""

FLOAT32 = 2.0**-24
FLOAT64 = 2.0**-53


def bound(terms: int, absolute, unit: float = FLOAT32):
    """Bound the error of a sum from the number of its terms and the sum of their sizes."""
    return terms * unit * absolute


def root_bound(error, root):
    """Bound what an error under a square root does to the root.

    sqrt(x + e) - sqrt(x) is at most sqrt(e), and at most e / sqrt(x).
    """
    return error / root.clamp(min=error**0.5)
