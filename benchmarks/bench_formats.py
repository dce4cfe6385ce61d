"""Print what codecs do in a second and what encoding loses; figures for docs and commits.

Run on an otherwise idle machine, or take the best of many rounds::

    python benchmarks/bench_formats.py --threads 2 --rounds 10

Speed is parameters a second, the best round. Errors are root mean squares of
the difference over those of the matrix; ``usual`` is the error by the rule that
the scheme's own tools have for scales, with rounding to nearest and nothing else.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ream_stream.checkpoint.formats import Codec, Fp8Block, Fp8Scaled, Int4, Mxfp4, Nvfp4

MODELOPT = Nvfp4(
    code_suffix=".weight", outer_suffix=".weight_scale_2", outer_shape=(), divides=False
)
CODECS: dict[str, Codec] = {
    "fp8 128x128": Fp8Block(),
    "fp8 a row": Fp8Scaled(),
    "int4 groups of 32": Int4(),
    "mxfp4": Mxfp4(),
    "nvfp4": Nvfp4(),
    "nvfp4 modelopt": MODELOPT,
}
SHAPES = ((576, 7168), (192, 256))
"""Of the error's matrices: rows that are no multiple of a block of 128."""
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
SIGNED = torch.cat([-E2M1.flip(0)[:-1], E2M1])


def main() -> None:
    """Measure every codec."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--cols", type=int, default=7168)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    speeds(given)
    errors()


def speeds(given: argparse.Namespace) -> None:
    """Print parameters a second, codecs in turn so that all meet the same load."""
    draw = torch.Generator().manual_seed(0)
    matrix = (torch.randn(given.rows, given.cols, generator=draw) * 0.02).to(given.device)
    works: dict[tuple[str, str], Callable[[], object]] = {}
    for name, codec in CODECS.items():
        parts = codec.encode(matrix)
        works[name, "decode"] = lambda codec=codec, parts=parts: codec.decode(
            parts, given.rows, given.cols, torch.bfloat16
        )
        works[name, "encode"] = lambda codec=codec: codec.encode(matrix)
    best: dict[tuple[str, str], float] = {}
    for _ in range(given.rounds):
        for key, work in works.items():
            best[key] = min(best.get(key, 1e9), seconds(work))
    print(
        f"{given.rows} x {given.cols}, {given.threads} threads, best of {given.rounds} rounds"
    )
    rows = []
    for name in CODECS:
        rates = [matrix.numel() / best[name, what] / 1e9 for what in ("decode", "encode")]
        rows.append([name, *(f"{rate:.2f}" for rate in rates)])
    table(["format", "decoded, G/s", "encoded, G/s"], rows)


def table(heads: list[str], rows: list[list[str]]) -> None:
    """Print a table as Markdown."""
    for row in [heads, ["---"] * len(heads), *rows]:
        print("| " + " | ".join(row) + " |")
    print()


def seconds(work: Callable[[], object]) -> float:
    """Time one call, to the end of what it queued."""
    start = time.perf_counter()
    result = work()
    last = next(iter(result.values())) if isinstance(result, dict) else result
    if isinstance(last, Tensor) and last.device.type != "cpu":
        last.view(torch.uint8).flatten()[0].item()
    return time.perf_counter() - start


def errors() -> None:
    """Print relative errors on Gaussian, heavy-tailed and merged matrices."""
    rows = []
    for name, codec in CODECS.items():
        for shape in SHAPES:
            draw = torch.Generator().manual_seed(1)
            experts = [torch.randn(*shape, generator=draw) * 0.02 for _ in range(3)]
            decoded = [
                codec.decode(codec.encode(expert), *shape, torch.float32) for expert in experts
            ]
            cases = [
                experts[0],
                experts[0] ** 3,
                0.5 * decoded[0] + 0.3 * decoded[1] + 0.2 * decoded[2],
            ]
            told = [f"{relative(codec, m):.4f} / {usual(codec, m):.4f}" for m in cases]
            rows.append([name, f"{shape[0]} x {shape[1]}", *told])
    print("relative error, ours / usual")
    table(["format", "shape", "Gaussian", "its cube", "merged of three"], rows)


def relative(codec: Codec, matrix: Tensor) -> float:
    """Return the error of encoding and decoding."""
    decoded = codec.decode(codec.encode(matrix), *matrix.shape, torch.float32)
    return float((decoded - matrix).norm() / matrix.norm())


def usual(codec: Codec, matrix: Tensor) -> float:
    """Return the error of rounding to nearest under the scheme's usual, unrounded scales."""
    if codec.scheme.startswith("fp8"):
        block = (128, 128) if codec.scheme == "fp8-block" else (1, matrix.shape[1])
        # zeros beyond the edge change neither a block's largest magnitude nor the error
        over = (-matrix.shape[0] % block[0], -matrix.shape[1] % block[1])
        padded = torch.nn.functional.pad(matrix, (0, over[1], 0, over[0]))
        grid = padded.view(padded.shape[0] // block[0], block[0], -1, block[1])
        scale = grid.abs().amax((1, 3), keepdim=True) / 448
        rounded = (grid / scale).to(torch.float8_e4m3fn).float() * scale
        return float((rounded - grid).norm() / matrix.norm())
    group = matrix.view(matrix.shape[0], -1, 16 if codec.scheme == "nvfp4" else 32)
    largest = group.abs().amax(-1, keepdim=True)
    table = SIGNED
    if codec.scheme == "mxfp4":
        scale = torch.exp2(torch.floor(torch.log2(largest)) - 2)
    elif codec.scheme == "nvfp4":
        scale = largest / 6
    else:
        scale, table = largest / 7.5, torch.arange(-8.0, 8.0)
    middle = (table[1:] + table[:-1]) / 2
    rounded = table[torch.bucketize(group / scale, middle)] * scale
    return float((rounded - group).norm() / matrix.norm())


if __name__ == "__main__":
    main()
