"""The storage schemes of weights, slowly and straight from their definitions, with numpy."""

import math

import numpy as np
import torch


def e4m3(code):
    """Value of one FP8 e4m3 code: sign, 4 bits of exponent with bias 7, 3 of mantissa."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def e2m1(code):
    """Value of one FP4 e2m1 code: sign, 2 bits of exponent with bias 1, 1 of mantissa."""
    sign = -1.0 if code & 8 else 1.0
    exponent, mantissa = (code >> 1) & 3, code & 1
    if exponent == 0:
        return sign * mantissa / 2
    return sign * (1 + mantissa / 2) * 2.0 ** (exponent - 1)


E4M3 = np.array([e4m3(code) for code in range(256)], dtype=np.float32)
E2M1 = np.array([e2m1(code) for code in range(16)], dtype=np.float32)
E8M0 = np.array([2.0 ** (b - 127) for b in range(255)] + [math.nan], dtype=np.float32)


def to_bfloat16_bits(value):
    """Round float32 to bfloat16, to nearest, ties to even; return its 16 bits."""
    bits = value.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(value), 0x7FC0, rounded).astype(np.uint16)


def bytes_of(tensor):
    """A tensor's bytes as numpy, in its shape with bytes as last axis where it has several."""
    return tensor.contiguous().view(torch.uint8).numpy()


def floats_of(tensor):
    """A tensor as float32 numpy; float8, and exponents, by definition and not by torch."""
    if tensor.dtype == torch.float8_e4m3fn:
        return E4M3[tensor.view(torch.uint8).numpy()]
    if tensor.dtype in {torch.uint8, torch.float8_e8m0fnu}:
        return E8M0[tensor.view(torch.uint8).numpy()]
    return tensor.to(torch.float32).numpy()


def fp8_block(weight, scale, block):
    """Repeat scales over their blocks, crop, multiply."""
    wide = np.repeat(np.repeat(floats_of(scale), block[0], 0), block[1], 1)
    return floats_of(weight) * wide[: weight.shape[0], : weight.shape[1]]


def fp8_scaled(weight, scale):
    """One scale a row, or one for all."""
    scale = floats_of(scale)
    return floats_of(weight) * (scale.reshape(-1, 1) if scale.size > 1 else scale.reshape(()))


def nibbles(packed):
    """Codes of two a byte, the lower half first."""
    byte = bytes_of(packed)
    return np.stack([byte & 15, byte >> 4], -1).reshape(byte.shape[0], -1)


def groups(value, scale):
    """Multiply groups of columns by their scales, in float32."""
    rows, count = scale.shape
    product = value.reshape(rows, count, -1).astype(np.float32) * scale[..., None]
    return product.reshape(rows, -1)


def mxfp4(blocks, scales):
    """FP4 times powers of two; 255 means NaN."""
    rows = scales.shape[0]
    return groups(E2M1[nibbles(blocks.reshape(rows, -1))], floats_of(scales))


def nvfp4(packed, scale, outer, *, divides):
    """FP4 times the group's scale times, or divided by, the matrix's."""
    outer = np.float32(outer.item())
    scale = floats_of(scale)
    return groups(E2M1[nibbles(packed)], scale / outer if divides else scale * outer)


def int4(packed, scale, cols):
    """Bits 4k to 4k + 3 of a word hold its k-th code, which is offset by 8."""
    word = packed.numpy().astype(np.int64) & 0xFFFFFFFF
    code = np.stack([(word >> (4 * k)) & 15 for k in range(8)], -1)
    value = code.reshape(packed.shape[0], -1)[:, :cols] - 8
    return groups(value, floats_of(scale))


def nearest(value, table):
    """Round to the nearest value of a sorted table; ties go to the even code."""
    distance = np.abs(value[..., None] - table)
    least = distance.min(-1, keepdims=True)
    tied = distance == least
    even = tied & (np.arange(len(table)) % 2 == 0)
    return table[np.where(even.any(-1), even.argmax(-1), tied.argmax(-1))]
