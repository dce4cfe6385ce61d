"""Feed mutated files to the parsers of what comes from elsewhere, for a bounded time.

Each input is a valid file with some bytes or JSON values changed, cut, doubled or put where
another belongs. It must be read or refused with one of the project's own errors, in the memory
of a few times its size. One that is not is kept with temporary files.

    python tools/stress/fuzz.py --seconds 60 --seed 1

Where atheris is installed it chooses what is changed further, by the lines of the parsers
that an input reaches; otherwise each input is a change of the valid file.
"""

import argparse
import collections
import contextlib
import inspect
import json
import os
import random
import shutil
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import ModelInfo

from ream_stream import files
from ream_stream.checkpoint import header, hub, hub_answers, reader
from ream_stream.checkpoint.header import read_header
from ream_stream.checkpoint.reader import INDEX, open_checkpoint
from ream_stream.compression import journal
from ream_stream.compression.journal import Journal, LayerRecord
from ream_stream.compression.source_record import ShardRecord, SourceRecord
from ream_stream.compression.workspace import Workspace
from ream_stream.errors import ReamStreamError
from ream_stream.planning.schedule import Schedule, Solver

try:
    import atheris
except ImportError:  # no wheel for every system, and no dependency
    atheris = None

ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2**31, 2**62, 2**64, 10**400, 1.5, 1e308, "", "a", "../a", "/", "\0",
    "\ud800", "x" * 300, [], {}, [[]], [None], {"": {}}, ["a", 1], "model.safetensors",
)  # fmt: skip


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """Change a few bytes, or cut, double or drop a piece."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at, length = draw.randrange(len(out) + 1), draw.choice((1, 2, 8, 64))
        match draw.randrange(5):
            case 0:
                out[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                del out[at : at + length]
            case 2:
                out[at:at] = out[at : at + length]
            case 3:
                out[at:at] = draw.choice((b"[", b"{", b'"', b"9" * 30, b"\xff", b"\0", b"e9"))
            case _:
                out = out[:at] or out
    return bytes(out)


def mutate_json(value: Any, draw: random.Random) -> Any:  # noqa: ANN401
    """Put something odd in a random place of a JSON document."""
    if draw.random() < 0.2 or not isinstance(value, dict | list) or not value:
        return draw.choice(ODD)
    if isinstance(value, list):
        at = draw.randrange(len(value))
        return [*value[:at], mutate_json(value[at], draw), *value[at + 1 :]]
    key = draw.choice(list(value))
    changed = {**value, key: mutate_json(value[key], draw)}
    if draw.random() < 0.1:
        del changed[key]
    return changed


def header_bytes(value: Any) -> bytes:  # noqa: ANN401
    """Return a file of a header, with the data of its first tensors."""
    raw = json.dumps(value).encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + bytes(28)


HEADER = {
    "__metadata__": {"format": "pt"},
    "model.a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "model.b": {"dtype": "BF16", "shape": [3, 2], "data_offsets": [16, 28]},
}
WEIGHT_MAP = {"weight_map": dict.fromkeys(("model.a", "model.b"), "model-1.safetensors")}
CONFIG = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "text_config": {"auto_map": {"A": "b.C"}},
}

REPOSITORY = {
    "id": "org/name",
    "sha": "0123456789abcdef" * 2 + "01234567",
    "siblings": [
        {"rfilename": "code/model.py", "size": 7, "blobId": "0" * 40},
        {"rfilename": "a.safetensors", "size": 9, "lfs": {"sha256": "ab" * 32, "size": 9}},
    ],
}


class Parsers:
    """The parsers, each with a valid document and a way to feed it a changed one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shard = folder / "model-1.safetensors"
        self.workspace = Workspace(output=folder, work=folder)
        written = files.write_bytes(folder / "statistics-00000.safetensors", b"12")
        record = LayerRecord(
            index=0, shards=(written,), hidden="hidden-00001", statistics=written,
            saliency=(0.5, 1.0), groups=((0, 1),), excluded=(3,),
        )  # fmt: skip
        solver = Solver(preconditioner="blocks", gathered=False, column_blocks=1)
        schedule = Schedule(
            batch_sequences=4, expert_blocks=1, resident_experts=0, solver=solver, threads=1
        )
        saved = Journal(
            fingerprint={"seed": 0}, schedule=schedule, files=("a",), layers=[record],
            source=SourceRecord(
                shards={"a": ShardRecord(size=3, modified=1, changed=2, sample="ab")},
                others={"b": written},
            ),
            read={"0": {"a": "ab"}},
        )  # fmt: skip
        journal.save(self.workspace.journal, saved)
        self.documents: dict[str, Any] = {
            "header": HEADER,
            "config": CONFIG,
            "index": WEIGHT_MAP,
            "hub": REPOSITORY,
            "journal": json.loads(self.workspace.journal.read_bytes()),
        }

    def feed(self, name: str, data: bytes) -> None:
        """Let a parser read a file with these bytes; raise what is no refusal."""
        if name == "header":
            self.shard.write_bytes(data)
            _guarded(lambda: read_header(self.shard), data)
        elif name == "journal":
            self.workspace.journal.write_bytes(data)
            _guarded(lambda: journal.load(self.workspace.journal), data)
        elif name == "hub":
            _guarded(lambda: hub.described("org/name", lambda: _model_info(data)), data)
        else:
            self.shard.write_bytes(header_bytes(HEADER))
            (self.folder / "config.json").write_bytes(_dump(CONFIG))
            (self.folder / INDEX).write_bytes(_dump(WEIGHT_MAP))
            (self.folder / ("config.json" if name == "config" else INDEX)).write_bytes(data)
            _guarded(lambda: open_checkpoint(self.folder), data)

    def valid(self, name: str) -> bytes:
        """Return the file that is changed."""
        document = self.documents[name]
        return header_bytes(document) if name == "header" else _dump(document)

    def change(self, name: str, data: bytes, draw: random.Random) -> bytes:
        """Change a file; a journal half of the time with its right checksum."""
        changed = None
        if draw.random() < 0.5:
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(data[8:].rstrip(b"\0") if name == "header" else data)
                value = mutate_json(value, draw)
                changed = header_bytes(value) if name == "header" else _dump(value)
        changed = changed or mutate_bytes(data, draw)
        return sealed(changed) if name == "journal" and draw.random() < 0.5 else changed


def _model_info(data: bytes) -> ModelInfo:
    """Do with an answer of the hub what its library does."""
    return ModelInfo(**json.loads(data))


def sealed(data: bytes) -> bytes:
    """Return a journal with the checksum that its content has; others as they are."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(data)
        if isinstance(value, dict) and set(Journal.__dataclass_fields__) <= set(value):
            return _dump({**value, "sha256": journal.digest(value)})
    return data


def _dump(value: Any) -> bytes:  # noqa: ANN401
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _guarded(parse: Callable[[], object], data: bytes) -> None:
    """Parse; raise unless it is read or refused, in little memory."""
    tracemalloc.start()
    try:
        parse()
    except ReamStreamError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    if peak > 1_000_000 + 100 * len(data):
        raise MemoryError(f"{peak} bytes for an input of {len(data)}")


def guided(parsers: Parsers, asked: argparse.Namespace) -> NoReturn:
    """Feed what atheris makes, from inputs that reached new lines; end the process."""
    names, counts = list(parsers.documents), collections.Counter[str]()
    end = time.monotonic() + asked.seconds

    def feed(data: bytes) -> None:
        if time.monotonic() > end:
            tell(counts, asked.seconds)
            sys.stdout.flush()
            shutil.rmtree(parsers.folder)
            os._exit(0)
        if data:
            name = names[data[0] % len(names)]
            parsers.feed(name, data[1:])
            counts[name] += 1

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        draw = random.Random(seed)
        if not data or draw.random() < 0.5:
            return bytes(atheris.Mutate(data, most))
        name = names[data[0] % len(names)]
        return (data[:1] + parsers.change(name, data[1:], draw))[:most]

    for module in (header, hub_answers, reader, journal):
        for value in vars(module).values():
            if inspect.isfunction(value) and value.__module__ == module.__name__:
                atheris.instrument_func(value)
    corpus = parsers.folder / "corpus"
    corpus.mkdir()
    for number, name in enumerate(names):
        (corpus / name).write_bytes(bytes([number]) + parsers.valid(name))
    found = f"-artifact_prefix={tempfile.gettempdir()}/fuzz-"
    options = [found, f"-seed={asked.seed or 1}", "-max_len=20000", "-rss_limit_mb=0"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], feed, custom_mutator=mutate)
    atheris.Fuzz()
    raise AssertionError("atheris ends the process")


def drawn(parsers: Parsers, asked: argparse.Namespace) -> int:
    """Feed changes of the valid files; return 1 if one was neither read nor refused."""
    draw, counts = random.Random(asked.seed), collections.Counter[str]()
    end = time.monotonic() + asked.seconds
    while time.monotonic() < end:
        for name in parsers.documents:
            data = parsers.change(name, parsers.valid(name), draw)
            try:
                parsers.feed(name, data)
            except Exception as error:  # noqa: BLE001 - whatever is no refusal is a find
                print(f"{name}: {error!r} with --seed {asked.seed}, input {counts[name]}")
                Path(tempfile.gettempdir(), "fuzz-find").write_bytes(data)
                return 1
            counts[name] += 1
    tell(counts, asked.seconds)
    return 0


def tell(counts: collections.Counter[str], seconds: float) -> None:
    """Print how many inputs each parser was fed."""
    for name, count in counts.items():
        print(f"{name}: {count} inputs read or refused")
    print(f"all: {counts.total()} inputs in {seconds:g} s")


def main() -> int:
    """Fuzz; return 1 if an input was neither read nor refused."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--seconds", type=float, default=60.0)
    options.add_argument("--seed", type=int, default=0)
    asked = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parsers = Parsers(Path(folder))
        if atheris is not None:
            guided(parsers, asked)
        return drawn(parsers, asked)


if __name__ == "__main__":
    sys.exit(main())
