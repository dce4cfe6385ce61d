"""What settings say of a model: what is merged, and which counts give a usable one."""

import pytest

from ream_stream.settings import Method, Settings


@pytest.mark.parametrize(
    ("grouping", "experts", "merged"),
    [("ream", 6, True), ("ream", 8, False), ("none", 6, False)],
)
def test_experts_are_merged_where_some_go_and_are_not_dropped(grouping, experts, merged):
    settings = Settings(experts=experts, method=Method(grouping=grouping))
    assert settings.merges(8) is merged
