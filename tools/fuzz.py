"""Feed mutated files to the parsers of what comes from elsewhere, for a bounded time.

Each input is a valid file with some bytes or JSON values changed, cut, doubled or put where
another belongs. It must be read or refused with one of the project's own errors, in the memory
of a few times its size. What was drawn for one that is not is kept with temporary files.

    python tools/fuzz.py --seconds 60 --seed 1
"""

import argparse
import collections
import json
import random
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ream_stream import durable, journal
from ream_stream.checkpoint.header import read_header
from ream_stream.checkpoint.source import INDEX, open_checkpoint
from ream_stream.errors import ReamStreamError
from ream_stream.journal import Journal, LayerRecord, Workspace

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


def header_bytes(header: Any) -> bytes:  # noqa: ANN401
    """Return a file of a header, with the data of its first tensors."""
    raw = json.dumps(header).encode("utf-8", "surrogatepass")
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


class Parsers:
    """The parsers, each with a valid document and a way to feed it a changed one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shard = folder / "model-1.safetensors"
        self.workspace = Workspace(output=folder, work=folder)
        written = durable.write_bytes(folder / "statistics-00000.safetensors", b"12")
        record = LayerRecord(
            index=0, shards=(written,), hidden="hidden-00001", statistics=written,
            saliency=(0.5, 1.0), groups=((0, 1),), excluded=(3,),
        )  # fmt: skip
        saved = Journal(
            fingerprint={"seed": 0}, machine={"threads": 1}, files=("a",), layers=[record]
        )
        journal.save(self.workspace, saved)
        self.journal: Any = json.loads(self.workspace.journal.read_bytes())

    def header(self, draw: random.Random) -> bytes:
        """Feed the header parser; return what it was fed."""
        data = self._changed(HEADER, header_bytes, draw)
        self.shard.write_bytes(data)
        _guarded(lambda: read_header(self.shard), data)
        return data

    def checkpoint(self, draw: random.Random) -> bytes:
        """Feed the parser of config and index."""
        documents = {"config.json": CONFIG, INDEX: WEIGHT_MAP}
        self.shard.write_bytes(header_bytes(HEADER))
        changed = draw.choice(list(documents))
        for name, document in documents.items():
            data = _dump(document)
            if name == changed:
                fed = data = self._changed(document, _dump, draw)
            (self.folder / name).write_bytes(data)
        _guarded(lambda: open_checkpoint(self.folder), fed)
        return fed

    def saved(self, draw: random.Random) -> bytes:
        """Feed the parser of the journal; half of the time with its right checksum."""

        def dump(value: Any) -> bytes:  # noqa: ANN401
            if isinstance(value, dict) and draw.random() < 0.5:
                fields = set(Journal.__dataclass_fields__)
                if fields <= set(value):
                    value = {**value, "sha256": journal.digest(value)}
            return _dump(value)

        data = self._changed(self.journal, dump, draw)
        self.workspace.journal.write_bytes(data)
        _guarded(lambda: journal.load(self.workspace), data)
        return data

    @staticmethod
    def _changed(
        document: Any,  # noqa: ANN401
        dump: Callable[[Any], bytes],
        draw: random.Random,
    ) -> bytes:
        if draw.random() < 0.5:
            return mutate_bytes(dump(document), draw)
        return dump(mutate_json(document, draw))


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


def main() -> int:
    """Fuzz; return 1 if an input was neither read nor refused."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--seconds", type=float, default=60.0)
    options.add_argument("--seed", type=int, default=0)
    asked = options.parse_args()
    draw, counts = random.Random(asked.seed), collections.Counter[str]()
    end = time.monotonic() + asked.seconds
    with tempfile.TemporaryDirectory() as folder:
        parsers = Parsers(Path(folder))
        feeds = {"header": parsers.header, "config and index": parsers.checkpoint}
        feeds["journal"] = parsers.saved
        while time.monotonic() < end:
            for name, feed in feeds.items():
                state = draw.getstate()
                try:
                    feed(draw)
                except Exception as error:  # noqa: BLE001 - whatever is no refusal is a find
                    print(f"{name}: {error!r} with --seed {asked.seed}, input {counts[name]}")
                    Path(tempfile.gettempdir(), "fuzz-find.txt").write_text(
                        f"{name}\n{state}\n", encoding="utf-8"
                    )
                    return 1
                counts[name] += 1
    for name, count in counts.items():
        print(f"{name}: {count} inputs read or refused")
    print(f"all: {counts.total()} inputs in {asked.seconds:g} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
