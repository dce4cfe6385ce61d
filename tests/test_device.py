"""Choosing a device and what to compute in."""

import pytest
import torch

from ream_stream.device import choose_device, compute_dtype, has_bf16_products
from ream_stream.errors import UsageError

CPU = torch.device("cpu")


def test_auto_is_a_device_that_is_here():
    assert choose_device("auto").type in {"cpu", "cuda"}
    assert choose_device("cpu") == CPU


def test_a_word_that_is_no_device_is_told_in_one_sentence():
    with pytest.raises(UsageError, match=r"^--device foo is no device; use auto, cpu or cuda$"):
        choose_device("foo")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_here_is_refused():
    with pytest.raises(UsageError, match="--device cuda: "):
        choose_device("cuda")


def test_auto_computes_in_the_checkpoint_s_dtype_only_where_that_is_fast():
    wanted = torch.bfloat16 if has_bf16_products(CPU) else torch.float32
    assert compute_dtype("auto", torch.bfloat16, CPU) == wanted
    assert compute_dtype("checkpoint", torch.bfloat16, CPU) == torch.bfloat16
    assert compute_dtype("float32", torch.bfloat16, CPU) == torch.float32
    assert has_bf16_products(torch.device("cuda"))
