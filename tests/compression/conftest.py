"""What tests of runs share."""

import pytest

pytest.register_assert_rewrite("killed_runs")


@pytest.fixture(scope="module")
def crash_source(tmp_path_factory):
    """Give the checkpoint of runs that are killed; not to be changed."""
    # it imports transformers, which not every test needs
    from killed_runs import write_source

    return write_source(tmp_path_factory.mktemp("source"))
