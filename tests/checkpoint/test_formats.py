"""Codecs against slow implementations of the definitions, bit for bit; what encoding keeps."""

from dataclasses import dataclass, replace

import numpy as np
import plain_formats as plain
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ream_stream.checkpoint.formats import (
    SCHEMES,
    Fp8Block,
    Fp8Scaled,
    Int4,
    Modules,
    Mxfp4,
    Nvfp4,
    Plain,
    detect,
    named_modules,
    without_gone,
)
from ream_stream.checkpoint.header import torch_dtype
from ream_stream.checkpoint.quantized import is_cache_scale
from ream_stream.errors import DamagedError, UnsupportedModelError

MODELOPT = Nvfp4(
    code_suffix=".weight", outer_suffix=".weight_scale_2", outer_shape=(), divides=False
)
FLAT = Mxfp4(code_suffix=".weight_packed", scale_suffix=".weight_scale", grouped=False)
DEEPSEEK = Mxfp4(
    code_suffix=".weight",
    scale_suffix=".scale",
    grouped=False,
    code_dtype="I8",
    scale_dtype="F8_E8M0",
)
POWERS = Fp8Block(scale_suffix=".scale", scale_dtype="F8_E8M0", power_of_two=True)
CODECS = {
    "fp8-block": Fp8Block(),
    "fp8-block of powers of two": POWERS,
    "fp8-block of bfloat16 scales": Fp8Block(scale_dtype="BF16"),
    "fp8-block of odd blocks": Fp8Block(block=(48, 80), scale_suffix=".weight_scale"),
    "fp8 a row": Fp8Scaled(),
    "fp8 a row, bfloat16": Fp8Scaled(scale_dtype="BF16", scale_rank=1),
    "fp8 a matrix": Fp8Scaled(per_row=False, scale_rank=0),
    "int4": Int4(),
    "int4 in groups of 4": Int4(group=4, scale_dtype="F32", shape_dtype="I32"),
    "mxfp4": Mxfp4(),
    "mxfp4 flat": FLAT,
    "mxfp4 of deepseek": DEEPSEEK,
    "nvfp4": Nvfp4(),
    "nvfp4 of modelopt": MODELOPT,
}
BY_NAME = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
SHAPES = {  # not multiples of the block where the scheme allows that
    "fp8-block": [(576, 7168), (192, 256), (130, 300), (1, 1), (3, 7), (257, 129)],
    "fp8-scaled": [(192, 256), (130, 301), (1, 1)],
    "int4": [(192, 256), (3, 96)],
    "mxfp4": [(192, 256), (3, 96)],
    "nvfp4": [(192, 256), (3, 48)],
}
CASES = [
    pytest.param(codec, shape, id=f"{name}-{shape[0]}x{shape[1]}")
    for name, codec in CODECS.items()
    for shape in SHAPES[codec.scheme]
]


def random_parts(codec, rows, cols, seed=0, nan=False):
    """Draw every byte of the codes, and scales of a size that models have."""
    draw = torch.Generator().manual_seed(seed)
    parts = {}
    for number, part in enumerate(codec.parts(rows, cols)):
        if part.suffix == ".weight_shape":
            parts[part.suffix] = torch.tensor([rows, cols], dtype=torch_dtype(part.dtype))
        elif number == 0:
            dtype = torch_dtype(part.dtype)
            size = (*part.shape[:-1], part.shape[-1] * dtype.itemsize)
            byte = torch.randint(0, 256, size, dtype=torch.uint8, generator=draw)
            if part.dtype == "F8_E4M3" and not nan:
                byte[(byte & 127) == 127] = 0x7E
            parts[part.suffix] = byte.view(dtype)
        elif part.dtype == "U8":
            parts[part.suffix] = torch.randint(
                90, 140, part.shape, dtype=torch.uint8, generator=draw
            )
        else:
            value = torch.rand(part.shape, generator=draw) * 0.05 + 1e-4
            if part.dtype == "F8_E4M3":
                value = value * 400
            elif part.suffix == ".weight_global_scale":
                value = 1 / value
            parts[part.suffix] = value.to(torch_dtype(part.dtype))
    return parts


def expected(codec, parts, cols):
    """What the definition gives, float32."""
    code, *scales = parts.values()
    match codec:
        case Fp8Block():
            return plain.fp8_block(code, scales[0], codec.block)
        case Fp8Scaled():
            return plain.fp8_scaled(code, scales[0])
        case Int4():
            return plain.int4(code, scales[0], cols)
        case Mxfp4():
            return plain.mxfp4(code, scales[0])
        case Nvfp4():
            return plain.nvfp4(code, *scales, divides=codec.divides)


def assert_same_bits(decoded, want):
    """Equal as bits; any NaN is like any other."""
    nan = np.isnan(want)
    assert bool((decoded.isnan().numpy() == nan).all())
    if decoded.dtype == torch.float32:
        got, bits = decoded.numpy().view(np.uint32), want.view(np.uint32)
    else:
        got = decoded.view(torch.uint16).numpy()
        bits = plain.to_bfloat16_bits(want)
    np.testing.assert_array_equal(np.where(nan, 0, got), np.where(nan, 0, bits))


def assert_same_parts(got, want):
    assert list(got) == list(want)
    for suffix, tensor in want.items():
        assert got[suffix].dtype == tensor.dtype, suffix
        assert got[suffix].shape == tensor.shape, suffix
        wrong = plain.bytes_of(got[suffix].reshape(-1)) != plain.bytes_of(tensor.reshape(-1))
        assert not wrong.any(), f"{suffix}: {wrong.sum()} of {wrong.size} bytes differ"


def scales_of(codec, parts):
    return {suffix: parts[suffix] for suffix in list(parts)[1:]}


# decoding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("codec", "shape"), CASES)
def test_decoding_gives_the_bits_of_the_definition(codec, shape, dtype):
    parts = random_parts(codec, *shape, nan=True)
    decoded = codec.decode(parts, *shape, dtype)
    assert decoded.shape == shape
    assert_same_bits(decoded, expected(codec, parts, shape[1]))


def test_every_code_of_e4m3_is_read_right():
    code = torch.arange(256, dtype=torch.uint8).view(1, 256).view(torch.float8_e4m3fn)
    parts = {".weight": code, ".weight_scale": torch.ones(1, 1)}
    decoded = Fp8Scaled().decode(parts, 1, 256, torch.float32)
    assert_same_bits(decoded, plain.E4M3[None])
    assert decoded[0, 0x7E] == 448
    assert decoded[0, 0x01] == 2**-9
    assert decoded[0, 0x7F].isnan()


def test_every_pair_of_scale_and_code_of_mxfp4_is_read_right():
    blocks = torch.arange(16, dtype=torch.uint8).repeat(256, 1, 1) * 17
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1)
    parts = {"_blocks": blocks, "_scales": scales}
    for dtype in (torch.float32, torch.bfloat16):
        decoded = Mxfp4().decode(parts, 256, 32, dtype)
        with np.errstate(over="ignore"):
            assert_same_bits(decoded, plain.mxfp4(blocks, scales))
    assert decoded[255].isnan().all()
    assert decoded[0, 2] == 2.0**-128  # a subnormal of bfloat16


def test_mxfp4_is_read_as_transformers_does():
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    experts, rows, cols = 3, 40, 96
    draw = torch.Generator().manual_seed(1)
    blocks = torch.randint(
        0, 256, (experts, rows, cols // 32, 16), dtype=torch.uint8, generator=draw
    )
    # not 255: it is NaN by the standard, transformers makes it infinite
    scales = torch.randint(0, 255, blocks.shape[:-1], dtype=torch.uint8, generator=draw)
    want = mxfp4.convert_moe_packed_tensors(blocks, scales)  # transposed
    for expert in range(experts):
        parts = {"_blocks": blocks[expert], "_scales": scales[expert]}
        decoded = Mxfp4().decode(parts, rows, cols, torch.bfloat16)
        assert decoded.view(torch.int16).equal(want[expert].T.contiguous().view(torch.int16))


def test_blocks_are_of_the_configured_size_not_of_rows_by_scales():
    # 192 rows, two rows of scales: blocks of 128 and 64 rows, not of 96 and 96
    code = torch.full((192, 128), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)  # 1.0
    parts = {".weight": code, ".weight_scale_inv": torch.tensor([[2.0], [3.0]])}
    decoded = Fp8Block().decode(parts, 192, 128, torch.float32)
    assert decoded[:128].eq(2).all()
    assert decoded[128:].eq(3).all()


def test_the_two_outer_scales_of_nvfp4_go_opposite_ways():
    parts = random_parts(Nvfp4(outer_shape=()), 8, 64)
    parts[".weight_global_scale"] = torch.tensor(64.0)
    other = {
        ".weight": parts[".weight_packed"],
        ".weight_scale": parts[".weight_scale"],
        ".weight_scale_2": torch.tensor(1 / 64),
    }
    divided = Nvfp4(outer_shape=()).decode(parts, 8, 64, torch.float32)
    assert divided.equal(MODELOPT.decode(other, 8, 64, torch.float32))
    # 6 * 448 is the largest a code and a scale can say: so 64 / (6 * 448) is the unit
    assert divided.abs().max() <= 6 * 448 / 64


def test_codes_may_lie_anywhere_in_memory():
    memory = torch.zeros(1 + 130 * 301, dtype=torch.uint8)
    odd = memory[1:].view(130, 301)
    parts = random_parts(Fp8Scaled(), 130, 301)
    odd.copy_(parts[".weight"].view(torch.uint8))
    want = Fp8Scaled().decode(parts, 130, 301, torch.bfloat16)
    parts[".weight"] = odd.view(torch.float8_e4m3fn)
    assert parts[".weight"].data_ptr() % 2 == 1
    assert Fp8Scaled().decode(parts, 130, 301, torch.bfloat16).equal(want)
    parts[".weight"] = parts[".weight"].T.contiguous().T
    assert Fp8Scaled().decode(parts, 130, 301, torch.bfloat16).equal(want)


@BY_NAME
def test_encoding_does_not_depend_on_how_a_matrix_lies_in_memory(codec):
    matrix_RC = codec.decode(random_parts(codec, 96, 128), 96, 128, torch.float32)
    assert_same_parts(codec.encode(matrix_RC.T.contiguous().T), codec.encode(matrix_RC))


@BY_NAME
def test_results_do_not_depend_on_how_rows_are_cut_into_panels(codec, monkeypatch):
    parts = random_parts(codec, 300, 480)
    decoded = codec.decode(parts, 300, 480, torch.float32)
    encoded = codec.encode(decoded)
    monkeypatch.setattr("ream_stream.checkpoint.formats.lookup_tables.PANEL_ELEMENTS", 7 * 480)
    assert codec.decode(parts, 300, 480, torch.float32).equal(decoded)
    assert_same_parts(codec.encode(decoded), encoded)


# encoding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("codec", "shape"), CASES)
def test_encoding_what_was_decoded_with_its_scales_gives_its_bytes(codec, shape, dtype):
    parts = random_parts(codec, *shape)
    decoded = codec.decode(parts, *shape, dtype)
    assert_same_parts(codec.encode(decoded, scales_of(codec, parts)), parts)


def test_nan_codes_stay_nan_when_scales_are_kept():
    parts = random_parts(Fp8Block(), 64, 64, nan=True)
    decoded = Fp8Block().decode(parts, 64, 64, torch.bfloat16)
    assert decoded.isnan().any()
    again = Fp8Block().encode(decoded, scales_of(Fp8Block(), parts))
    assert Fp8Block().decode(again, 64, 64, torch.bfloat16).isnan().equal(decoded.isnan())


@BY_NAME
def test_what_a_kept_scale_cannot_reach_becomes_the_largest_code(codec):
    small = codec.encode(torch.linspace(-1, 1, 9216).view(96, 96))
    decoded = codec.decode(small, 96, 96, torch.float32)
    kept = scales_of(codec, small)
    large = codec.decode(codec.encode(decoded * 100, kept), 96, 96, torch.float32)
    assert large.isfinite().all()
    assert large.max() >= decoded.max()
    assert large.min() <= decoded.min()


@BY_NAME
def test_encoding_is_of_the_planned_dtypes_and_shapes(codec):
    encoded = codec.encode(torch.randn(96, 96))
    planned = codec.parts(96, 96)
    assert [part.suffix for part in planned] == list(encoded)
    for part in planned:
        assert encoded[part.suffix].shape == part.shape
        assert encoded[part.suffix].dtype == torch_dtype(part.dtype)
    shapes = {suffix: tuple(tensor.shape) for suffix, tensor in encoded.items()}
    assert codec.size(shapes) == (96, 96)


@BY_NAME
def test_zeros_stay_zeros(codec):
    encoded = codec.encode(torch.zeros(96, 96))
    assert codec.decode(encoded, 96, 96, torch.bfloat16).eq(0).all()


@BY_NAME
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_values_that_are_not_finite_are_refused(codec, bad):
    matrix = torch.randn(96, 96)
    matrix[70, 70] = bad
    with pytest.raises(ValueError, match="not finite"):
        codec.encode(matrix)


@BY_NAME
@pytest.mark.parametrize("size", [1e-44, 1e-37, 1e-10, 1e10, 1e37])
def test_tiny_and_huge_values_stay_finite(codec, size):
    matrix = torch.randn(96, 96, generator=torch.Generator().manual_seed(0)).clamp(-9, 9) * size
    encoded = codec.encode(matrix)
    decoded = codec.decode(encoded, 96, 96, torch.float32)
    assert decoded.isfinite().all()
    if size > 1e-30:
        error = decoded.double() - matrix.double()
        assert error.norm() < 0.15 * matrix.double().norm()


# scales that are not kept: where the choice gives the stored ones again


@pytest.mark.parametrize("shape", [(256, 384), (130, 300)])
def test_fp8_scales_come_back_within_one_bit_and_codes_exactly(shape):
    codec = Fp8Block()
    parts = random_parts(codec, *shape)
    code = parts[".weight"].view(torch.uint8)
    code[::128, ::128] = 0x7E  # every block uses the code of 448, as any written by this rule
    again = codec.encode(codec.decode(parts, *shape, torch.float32))
    assert again[".weight"].view(torch.uint8).equal(code)
    scale, stored = again[".weight_scale_inv"], parts[".weight_scale_inv"]
    assert (scale.view(torch.int32) - stored.view(torch.int32)).abs().max() <= 1
    rounded = codec.encode(codec.decode(parts, *shape, torch.bfloat16))
    assert rounded[".weight"].view(torch.uint8).equal(code)
    assert (rounded[".weight_scale_inv"] / stored - 1).abs().max() <= 2**-8


def test_fp8_scales_of_powers_of_two_come_back_exactly():
    codec = Fp8Block(power_of_two=True)
    parts = random_parts(codec, 256, 256)
    parts[".weight"].view(torch.uint8)[::128, ::128] = 0x7E
    parts[".weight_scale_inv"] = torch.tensor([[0.25, 2.0**-20], [1.0, 2.0**-9]])
    for dtype in (torch.float32, torch.bfloat16):
        assert_same_parts(codec.encode(codec.decode(parts, 256, 256, dtype)), parts)
    chosen = codec.encode(torch.randn(256, 256))[".weight_scale_inv"]
    assert torch.frexp(chosen).mantissa.eq(0.5).all()


@pytest.mark.parametrize("codec", [Int4(), Nvfp4(), MODELOPT, Mxfp4(), FLAT], ids=str)
def test_4_bit_scales_come_back_exactly_where_the_largest_code_is_used(codec):
    rows, cols = 64, 256
    parts = random_parts(codec, rows, cols, seed=3)
    main = next(iter(parts))
    byte = parts[main].view(torch.uint8).view(rows, -1)
    largest = torch.tensor([0x17, 0x1F] if codec.scheme != "int4" else [0x1F, 0x10, 0x11])
    group = {"int4": 16, "mxfp4": 16, "nvfp4": 8}[codec.scheme]
    byte[:, ::group] = largest[torch.arange(rows) % len(largest)].to(torch.uint8).view(-1, 1)
    if codec.scheme == "int4":  # one extreme a group, 7 or -8 or -7, the others inside
        inside = byte.view(rows, -1, group)[:, :, 1:]
        inside.copy_((inside & 0x77) + 0x33)
    if codec.scheme == "nvfp4":
        parts[".weight_scale"][0, 0] = 448  # the outer scale is made for this
    again = codec.encode(codec.decode(parts, rows, cols, torch.float32))
    assert_same_parts(again, parts)


@pytest.mark.parametrize("codec", [Mxfp4(), FLAT], ids=str)
def test_mxfp4_values_are_kept_by_whichever_scale(codec):
    # a largest code under 4 is as well written with a smaller scale: bytes change, values not
    parts = random_parts(codec, 64, 256)
    main = next(iter(parts))
    parts[main] &= 0x33
    for dtype in (torch.float32, torch.bfloat16):
        decoded = codec.decode(parts, 64, 256, dtype)
        again = codec.encode(decoded)
        assert codec.decode(again, 64, 256, dtype).equal(decoded)
        assert not again[main].equal(parts[main])


@BY_NAME
@given(seed=st.integers(0, 2**32 - 1))
def test_encoding_again_changes_no_value(codec, seed):
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.randn(96, 192, generator=draw) * 0.02
    once = codec.encode(matrix)
    decoded = codec.decode(once, 96, 192, torch.float32)
    again = codec.decode(codec.encode(decoded, scales_of(codec, once)), 96, 192, torch.float32)
    assert again.equal(decoded)


# what encoding loses


def merged(codec, rows, cols):
    """Averages of decoded experts: what is encoded in practice."""
    draw = torch.Generator().manual_seed(5)
    experts = [torch.randn(rows, cols, generator=draw) * 0.02 for _ in range(3)]
    decoded = [codec.decode(codec.encode(e), rows, cols, torch.float32) for e in experts]
    return 0.5 * decoded[0] + 0.3 * decoded[1] + 0.2 * decoded[2]


def matrices(codec):
    draw = torch.Generator().manual_seed(6)
    yield torch.randn(192, 384, generator=draw) * 0.02
    yield merged(codec, 192, 384)
    heavy = torch.randn(192, 384, generator=draw)
    yield heavy**3 * 0.01


@pytest.mark.parametrize("name", [name for name in CODECS if name.startswith("fp8")])
def test_fp8_errors_are_those_of_rounding_once(name):
    codec = CODECS[name]
    for matrix in matrices(codec):
        rows, cols = matrix.shape
        encoded = codec.encode(matrix)
        decoded = codec.decode(encoded, rows, cols, torch.float32)
        ones = {**encoded, ".weight": torch.ones(rows, cols).to(torch.float8_e4m3fn)}
        scale = codec.decode(ones, rows, cols, torch.float32)
        # half a step: 2**-4 of the value, or 2**-10 of the scale under 2**-6 of it; 448 takes
        # what a rounded bfloat16 scale leaves over it
        half_step = torch.maximum(matrix.abs() * 2**-4, scale * 2**-10)
        assert ((decoded - matrix).abs() <= half_step * (1 + 1e-5)).all()
        if codec.scheme == "fp8-block":
            assert (decoded - matrix).norm() < 0.0275 * matrix.norm()


@dataclass(frozen=True)
class Rule:
    """How a scheme's own tools choose a scale, and the values its codes have."""

    group: int
    divisor: float
    table: np.ndarray
    power_of_two: bool = False


GRID = np.concatenate([-plain.E2M1[7:0:-1], plain.E2M1[:8]])
RULES = {
    "int4": Rule(32, 7.5, np.arange(-8, 8).astype(np.float32)),
    "mxfp4": Rule(32, 6.0, GRID, power_of_two=True),
    "nvfp4": Rule(16, 6.0, GRID),
}


@pytest.mark.parametrize("codec", [Int4(), Nvfp4(), MODELOPT, Mxfp4()], ids=str)
def test_4_bit_errors_are_less_than_by_the_usual_rule(codec):
    rule = RULES[codec.scheme]
    for matrix in matrices(codec):
        rows, cols = matrix.shape
        group = matrix.numpy().reshape(rows, -1, rule.group)
        largest = np.abs(group).max(-1, keepdims=True)
        if rule.power_of_two:
            scale = 2.0 ** (np.floor(np.log2(largest)) - 2)
        else:
            scale = largest / rule.divisor
        usual = plain.nearest(group / scale, rule.table) * scale - group
        decoded = codec.decode(codec.encode(matrix), rows, cols, torch.float32)
        assert (decoded - matrix).norm() < np.linalg.norm(usual)


def test_rounding_to_fp4_takes_the_even_code_in_ties():
    middle = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    want = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0])
    matrix = torch.cat([middle, -middle]).repeat(2).view(1, 32)
    kept = {"_scales": torch.full((1, 1), 127, dtype=torch.uint8)}
    decoded = Mxfp4().decode(Mxfp4().encode(matrix, kept), 1, 32, torch.float32)
    assert decoded.equal(torch.cat([want, -want]).repeat(2).view(1, 32))


@given(seed=st.integers(0, 2**32 - 1))
def test_rounding_to_fp4_is_to_the_nearest(seed):
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.rand(4, 32, generator=draw) * 16 - 8
    kept = {"_scales": torch.full((4, 1), 127, dtype=torch.uint8)}
    decoded = Mxfp4().decode(Mxfp4().encode(matrix, kept), 4, 32, torch.float32)
    want = plain.nearest(np.abs(matrix.numpy()), plain.E2M1[:8]) * np.sign(matrix.numpy())
    np.testing.assert_array_equal(decoded.numpy(), want)


def test_one_outer_scale_of_nvfp4_serves_gate_and_up():
    for codec in (Nvfp4(), MODELOPT):
        gate, up = torch.randn(32, 64), torch.randn(32, 64) * 5
        kept = {codec.outer_suffix: codec.outer_scale([gate, up])}
        for matrix in (gate, up):
            encoded = codec.encode(matrix, kept)
            assert encoded[codec.outer_suffix].equal(kept[codec.outer_suffix])
            decoded = codec.decode(encoded, 32, 64, torch.float32)
            assert (decoded - matrix).norm() < 0.12 * matrix.norm()


# against compressed-tensors, where it is installed


def compressed_scheme(ct, **weights):
    return ct.QuantizationScheme(targets=["Linear"], weights=ct.QuantizationArgs(**weights))


def test_int4_is_what_compressed_tensors_reads():
    ct = pytest.importorskip("compressed_tensors.quantization")
    packing = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    scheme = compressed_scheme(ct, num_bits=4, type="int", strategy="group", group_size=32)
    encoded = Int4().encode(torch.randn(24, 96) * 0.02)
    state = {suffix.removeprefix("."): tensor for suffix, tensor in encoded.items()}
    read = packing.PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert read.equal(Int4().decode(encoded, 24, 96, torch.bfloat16))


def test_nvfp4_is_what_compressed_tensors_reads():
    ct = pytest.importorskip("compressed_tensors.quantization")
    packing = pytest.importorskip("compressed_tensors.compressors.nvfp4.base")
    scheme = compressed_scheme(
        ct, num_bits=4, type="float", strategy="tensor_group", group_size=16
    )
    encoded = Nvfp4().encode(torch.randn(24, 96) * 0.02)
    state = {suffix.removeprefix("."): tensor for suffix, tensor in encoded.items()}
    read = packing.NVFP4PackedCompressor.decompress(state, scheme)["weight"]
    assert read.to(torch.bfloat16).equal(Nvfp4().decode(encoded, 24, 96, torch.bfloat16))


def test_fp8_blocks_are_what_compressed_tensors_reads():
    dequantizer = pytest.importorskip(
        "compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer"
    )
    parts = random_parts(Fp8Block(), 130, 300)
    tensors = {f"m{suffix}": tensor for suffix, tensor in parts.items()}
    read = dequantizer.FP8BlockDequantizer(targets=("m",)).process(tensors)["m.weight"]
    assert read.equal(Fp8Block().decode(parts, 130, 300, torch.bfloat16))


# detection


@dataclass(frozen=True)
class Entry:
    dtype: str
    shape: tuple[int, ...]


COMPRESSED = {"quant_method": "compressed-tensors"}
CONFIGS = {
    "fp8-block": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "int4": {
        **COMPRESSED,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "strategy": "group",
                    "group_size": 32,
                    "symmetric": True,
                    "actorder": None,
                },
            }
        },
    },
}


def entries_of(codec, prefix, rows, cols, count=None):
    stack = () if count is None else (count,)
    return {
        prefix + part.suffix: Entry(part.dtype, (*stack, *part.shape))
        for part in codec.parts(rows, cols)
    }


def config_of(codec):
    if isinstance(codec, Fp8Block) and codec.scale_suffix == ".weight_scale":
        weights = {"strategy": "block", "block_structure": list(codec.block)}
        return {**COMPRESSED, "config_groups": {"group_0": {"weights": weights}}}
    if isinstance(codec, Int4):
        config = CONFIGS["int4"]["config_groups"]["group_0"]
        weights = {**config["weights"], "group_size": codec.group}
        return {**COMPRESSED, "config_groups": {"group_0": {**config, "weights": weights}}}
    return CONFIGS.get(codec.scheme)


@pytest.mark.parametrize("count", [None, 5])
@pytest.mark.parametrize(
    "codec", [*CODECS.values(), Plain(), Plain(dtype="F32", suffix="")], ids=str
)
def test_a_scheme_is_found_from_headers(codec, count):
    prefix = "model.layers.3.mlp.experts.7.up_proj"
    entries = entries_of(codec, prefix, 192, 288, count)
    entries[f"{prefix}.input_scale"] = Entry("F32", ())
    entries["model.norm.weight"] = Entry("BF16", (64,))
    found = detect(prefix, entries, config_of(codec))
    assert found.codec == codec
    assert (found.rows, found.cols, found.count) == (192, 288, count)
    assert found.activation == (".input_scale",)
    assert set(found.names().values()) <= set(entries)
    assert type(found.codec) is SCHEMES[codec.scheme]


def test_one_checkpoint_may_mix_schemes():
    fp8, nvfp4 = Fp8Scaled(), Nvfp4()
    entries = {**entries_of(fp8, "a.q_proj", 32, 32), **entries_of(nvfp4, "a.up_proj", 32, 32)}
    config = {
        **COMPRESSED,
        "config_groups": {
            "group_0": {"targets": ["re:.*q_proj"], "weights": {"strategy": "channel"}},
            "group_1": {"targets": ["Linear"], "weights": {"strategy": "tensor_group"}},
        },
    }
    assert detect("a.q_proj", entries, config).codec == fp8
    assert detect("a.up_proj", entries, config).codec == nvfp4


def test_the_group_of_settings_that_names_a_module_goes_before_the_one_of_its_class():
    def group(target, size):
        return {"targets": [target], "weights": {"num_bits": 4, "group_size": size}}

    groups = {
        "a": group("Linear", 32),
        "b": group("re:.*down_proj$", 64),
        "c": group("x.up", 96),
    }
    config = {**COMPRESSED, "config_groups": groups}
    for name, size in {"x.up_proj": 32, "x.down_proj": 64, "x.up": 96}.items():
        codec = Int4(group=size)
        assert detect(name, entries_of(codec, name, 8, 192), config).codec == codec


def test_whether_scales_are_powers_of_two_is_read_from_the_config():
    entries = entries_of(Fp8Block(), "m", 128, 128)
    config = {**CONFIGS["fp8-block"], "scale_fmt": "ue8m0"}
    assert detect("m", entries, config).codec == Fp8Block(power_of_two=True)


@pytest.mark.parametrize(
    ("suffixes", "config", "message"),
    [
        ({".qweight": "I32", ".qzeros": "I32", ".scales": "F16"}, None, "AWQ or GPTQ"),
        ({".weight": "F8_E4M3"}, None, "found there: .weight F8_E4M3"),
        ({}, None, "found there: nothing"),
        ({".weight": "F8_E4M3", ".weight_scale_inv": "F32"}, None, "weight_block_size"),
        (
            {".weight": "F8_E4M3", ".weight_scale_inv": "F32"},
            {"weight_block_size": [128, 0]},
            r"\[128, 0\]",
        ),
        ({".weight": "F8_E5M2", ".weight_scale": "F32"}, None, "F8_E5M2"),
        (
            {".weight_packed": "I32", ".weight_scale": "BF16", ".weight_shape": "I64"},
            None,
            "group_size",
        ),
        (
            {".weight_packed": "I32", ".weight_scale": "BF16", ".weight_shape": "I64"},
            {"config_groups": {"g": {"weights": {"num_bits": 8, "group_size": 32}}}},
            "num_bits=8",
        ),
        (
            {".weight_packed": "I32", ".weight_zero_point": "I32", ".weight_scale": "BF16"},
            CONFIGS["int4"],
            "zero points",
        ),
    ],
)
def test_what_is_not_read_is_refused_with_the_reason(suffixes, config, message):
    entries = {f"m{suffix}": Entry(dtype, (128, 128)) for suffix, dtype in suffixes.items()}
    with pytest.raises(UnsupportedModelError, match=message):
        detect("m", entries, config)


@BY_NAME
def test_shapes_that_do_not_fit_are_damage(codec):
    for part in codec.parts(192, 288):
        entries = entries_of(codec, "m", 192, 288)
        entries[f"m{part.suffix}"] = Entry(part.dtype, (*part.shape, 2, 2))
        with pytest.raises(DamagedError):
            detect("m", entries, config_of(codec))


def test_a_grid_of_scales_that_needs_other_blocks_is_damage():
    entries = entries_of(Fp8Block(block=(96, 128)), "m", 576, 256)
    with pytest.raises(DamagedError, match=r"\(5, 2\)"):
        detect("m", entries, CONFIGS["fp8-block"])


def test_a_slice_of_a_stack_is_coded_like_a_matrix():
    codec = Fp8Block()
    experts = [random_parts(codec, 130, 300, seed=seed) for seed in range(3)]
    stack = {
        suffix: torch.stack([parts[suffix].view(torch.uint8) for parts in experts]).view(dtype)
        for suffix, dtype in {
            ".weight": torch.float8_e4m3fn,
            ".weight_scale_inv": torch.float32,
        }.items()
    }
    for expert, parts in enumerate(experts):
        sliced = {suffix: tensor[expert] for suffix, tensor in stack.items()}
        decoded = codec.decode(sliced, 130, 300, torch.bfloat16)
        assert decoded.equal(codec.decode(parts, 130, 300, torch.bfloat16))


def test_plain_weights_pass_through():
    matrix = torch.randn(5, 7).to(torch.bfloat16)
    encoded = Plain().encode(matrix)
    assert Plain().decode(encoded, 5, 7, torch.bfloat16).equal(matrix)
    wide = replace(Plain(), dtype="F32")
    assert wide.encode(matrix)[".weight"].dtype == torch.float32


# names of modules in descriptions


def described(*experts):
    """Return a description of formats that names some experts wherever one can be named."""
    names = [f"model.layers.1.mlp.experts.{e}.up_proj" for e in experts]
    return {
        "quant_method": "x",
        "version": "0.29.0",
        "weight_block_size": [128, 128],
        "producer": {"name": "modelopt", "versions": ["0.29.0", "1.2"]},
        "modules_to_not_convert": ["lm_head", "mlp.gate", *names],
        "ignore": ["re:.*gate$", *names, "model.layers.0.mlp*"],
        "exclude_modules": [*(f"model.layers.1.mlp.experts.{e}*" for e in experts)],
        "dynamic": {f"re:model\\.layers\\.1\\.mlp\\.experts\\.{e}\\..*": {} for e in experts},
        "quantized_layers": {name: {"quant_algo": "NVFP4"} for name in names},
        "config_groups": {
            "group_0": {"targets": ["Linear", "re:.*self_attn.*"], "weights": {"num_bits": 8}},
            "group_1": {"targets": [*names, "layers.1.self_attn.q_proj"]},
            **({"group_2": {"targets": names[-1:]}} if 7 in experts else {}),
            "group_3": {"targets": []},
        },
        "kv_cache_scheme": None,
        "sparsity_config": {"ignore": names, "targets": []},
    }


NAMES = [
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.mlp.gate.weight",
    *(f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in range(4)),
]


def test_names_of_experts_that_are_gone_are_taken_out_wherever_they_stand():
    before = described(0, 3, 4, 7)
    assert without_gone(before, Modules(NAMES, 4)) == described(0, 3)
    assert before == described(0, 3, 4, 7)
    assert without_gone(before, Modules(NAMES, 8)) == before


def test_every_name_of_a_module_is_found_with_its_key():
    found = set(named_modules({"quantization": described(7)}))
    assert {key for key, name in found if name.endswith("7.up_proj")} == {
        "modules_to_not_convert", "ignore", "quantized_layers", "targets"
    }  # fmt: skip
    assert ("exclude_modules", "model.layers.1.mlp.experts.7*") in found
    assert not any("0.29" in name for _, name in found)


@pytest.mark.parametrize(
    ("name", "is_there"),
    [
        ("model.layers.1.self_attn.q_proj", True),
        ("layers.1.self_attn.q_proj", True),
        ("language_model.model.layers.1.self_attn.q_proj", True),
        ("model.layers.2.self_attn.q_proj", False),
        ("model.layers.1.mlp.experts.3.down_proj", True),
        ("model.layers.1.mlp.experts.4.down_proj", False),
        ("model.layers.1.mlp.experts." + "9" * 5000, False),
        ("re:.*experts\\.4\\..*", False),
        ("re:.*experts\\.(4|5)\\..*", True),
        ("*.experts.10*", False),
        ("*.experts.*", True),
        ("visual", True),
    ],
)
def test_a_module_is_there_or_gone(name, is_there):
    assert (name in Modules(NAMES, 4)) is is_there


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("model.layers.0.self_attn.k_proj.k_scale", True),
        ("model.layers.0.self_attn.v_scale", True),
        ("model.layers.0.self_attn.q_scale", True),
        ("model.layers.0.self_attn.prob_scale", True),
        ("model.layers.0.self_attn.prob_output_scale", True),
        ("model.layers.0.self_attn.k_zero_point", True),
        ("model.layers.0.self_attn.kv_scale", True),
        ("model.layers.0.self_attn.v_proj.output_scale", True),
        ("model.layers.0.self_attn.k_proj.weight_scale", False),
        ("model.layers.0.self_attn.k_norm.weight", False),
        ("model.layers.0.self_attn.k_proj.input_scale", False),
    ],
)
def test_scales_of_the_cache_are_known_by_name(name, is_one):
    assert is_cache_scale(name) is is_one
