"""What settings say of a model, and that each option stands once."""

import importlib
import pkgutil
from collections.abc import Mapping

import pytest

import ream_stream.method
from ream_stream.errors import UsageError
from ream_stream.planning.settings_check import check_settings
from ream_stream.settings import Method, Settings, options_of

NO_OPTIONS = {"PRECONDITIONERS"}
"""Tables of the method that a run does not choose in."""


@pytest.mark.parametrize(
    ("grouping", "experts", "merged"),
    [("ream", 6, True), ("ream", 8, False), ("none", 6, False)],
)
def test_experts_are_merged_where_some_go_and_are_not_dropped(grouping, experts, merged):
    settings = Settings(experts=experts, method=Method(grouping=grouping))
    assert settings.merges(8) is merged


def test_the_choices_of_an_option_are_the_keys_of_its_table_and_no_table_is_without_one():
    tables = {}
    for found in pkgutil.iter_modules(ream_stream.method.__path__):
        module = importlib.import_module(f"ream_stream.method.{found.name}")
        for name, value in vars(module).items():
            public = name.isupper() and not name.startswith("_") and name not in NO_OPTIONS
            if public and isinstance(value, Mapping):
                tables[f"{found.name}.{name}"] = tuple(value)
    fields = [field.metadata for field in options_of(Method).values()]
    assert tables == {each["table"]: each["choices"] for each in fields if "table" in each}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"saliency": "luck"}, "--saliency luck: there are reap, "),
        ({"group_size": 1}, "--group-size 1: at least 2 is needed"),
        ({"refit_iterations": 0}, "--refit-iterations 0: at least 1 is needed"),
        ({"group_size": 2}, "--group-size 2: 3 groups of at most 2 cannot hold 8 experts"),
    ],
)
def test_a_method_that_does_not_work_is_refused_by_the_name_of_its_option(fields, message):
    with pytest.raises(UsageError) as refused:
        check_settings(Settings(experts=3, method=Method(**fields)), 8)
    assert message in str(refused.value)


def test_a_dtype_of_the_output_that_there_is_not_is_refused():
    with pytest.raises(UsageError, match="--dtype bfloat16: there are keep, bf16"):
        check_settings(Settings(experts=3, method=Method(), dtype="bfloat16"), 8)
