"""Which slices there can be: what formats, config.json and servers take."""

from fractions import Fraction

import pytest

from ream_stream.errors import UsageError
from ream_stream.planning.serving_limits import check_served
from ream_stream.planning.slice_shape import ExpertLayer, slice_width


@pytest.mark.parametrize(
    ("count", "inner", "top_k", "known", "share", "width"),
    [
        (128, 768, 8, {}, "75%", 320),  # 336: steps of 64
        (128, 768, 8, {}, "50%", 320),  # 288 is as near to 256: the wider one
        (128, 768, 8, {}, "100%", 384),
        (128, 64, 8, {}, "75%", 28),
        (128, 64, 8, {}, "50%", 24),
        (128, 1408, 8, {"shared": 1408}, "75%", 704),  # divisors of the shared width alone
        (256, 2048, 8, {"shared": 2048, "multiple": 128}, "50%", 1024),
        (32, 2880, 4, {"multiple": 32}, "75%", 1280),  # 1260
    ],
)
def test_a_width_is_near_the_rule_and_within_what_there_can_be(
    count, inner, top_k, known, share, width
):
    layer = ExpertLayer(count=count, inner=inner, top_k=top_k, **known)
    part = Fraction(share.rstrip("%")) / 100
    assert slice_width(layer, 2, part, any_count=False) == width


def test_what_servers_do_not_take_is_refused_unless_any_count_is_given():
    kimi = ExpertLayer(count=384, inner=2048, top_k=8, shared=2048, multiple=128)
    with pytest.raises(UsageError, match=r"75% of 384 experts of 2048 .* 512 experts"):
        slice_width(kimi, 2, Fraction(3, 4), any_count=False)
    assert slice_width(kimi, 2, Fraction(3, 4), any_count=True) == 1024
    with pytest.raises(UsageError, match="516 experts a layer are more than the 512"):
        check_served(516, 384, 1)
    with pytest.raises(UsageError, match="40 experts a token are more than the 32"):
        check_served(512, 384, 1, 40)
