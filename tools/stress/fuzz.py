"""Feed mutated files to the parsers of what comes from elsewhere, for a bounded time.

Each input is a valid file with some bytes or JSON values changed, cut, doubled or put where
another belongs. It must be read or refused with one of the project's own errors, in seconds and
in the memory of a few times its size. One that is not is kept with temporary files.

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
import signal
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))

from hub_server import REPO, serving

from ream_stream import file_access, files, untrusted
from ream_stream.calibration import chats, datasets, mix, readers, text
from ream_stream.calibration.chat_templates import ChatRenderer
from ream_stream.calibration.chats import Chat, ChatError
from ream_stream.checkpoint import header, hub, hub_answers, reader, source_card
from ream_stream.checkpoint.header import read_header
from ream_stream.checkpoint.reader import INDEX, open_checkpoint
from ream_stream.cli.status import gather
from ream_stream.compression import event_log, journal
from ream_stream.compression.journal import Journal, LayerRecord
from ream_stream.compression.source_record import ShardRecord, SourceRecord
from ream_stream.compression.workspace import workspace_of
from ream_stream.errors import ReamStreamError
from ream_stream.model import hidden_states
from ream_stream.model.hidden_states import HiddenStates, HiddenWriter
from ream_stream.planning.schedule import Schedule, Solver

try:
    import atheris
except ImportError:  # no wheel for every system, and no dependency
    atheris = None

SECONDS = 10
"""Time of the processor that an input may take in this process."""

ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2**31, 2**62, 2**64, 10**400, 1.5, 1e308, "", "a", "../a", "/", "\0",
    "\ud800", "x" * 300, [], {}, [[]], [None], {"": {}}, ["a", 1], "model.safetensors",
    "\x1b[2J", "{{ 1 / 0 }}", "{{ 9 ** 9 ** 9 }}", "{% for m in messages %}{{ m }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
)  # fmt: skip
_INSTRUMENTED = (
    *(
        chats,
        datasets,
        mix,
        readers,
        text,
        header,
        hub,
        hub_answers,
        reader,
        source_card,
        event_log,
    ),
    *(file_access, journal, untrusted, hidden_states),
)


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
CHAT = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]},
        {"role": "assistant", "content": "2"},
        {"from": "gpt", "value": "3"},
    ],
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] | trim }}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
)
MIX = {
    "code": {"source": "mix.txt", "weight": 0.7},
    "math": {"source": "mix.txt", "weight": "1", "field": "problem"},
}
CARD = {"license": "mit", "language": ["en", "de"], "tags": ["a"], "license_link": "http://a"}
LOG = [
    {"event": "command", "time": "2026-01-01T00:00:00+00:00", "command": "a", "directory": "/"},
    {"event": "started", "time": "2026-01-01T00:00:00+00:00", "layers": 3, "committed": 0},
    {
        "event": "layer done", "time": "2026-01-01T00:00:01+00:00", "layer": 0,
        "seconds": {"observe": 1.0}, "peak_anonymous_bytes": 1, "read_bytes": 1,
        "written_bytes": 1, "left_seconds": 2.0, "anonymous_bytes": 1,
    },
]  # fmt: skip
STATES = (3, 2, 4)
_HEAD, _BODY = b"---\n", b"\n---\n# A model\n"


class Target(NamedTuple):
    """A parser, a valid document of what it reads, and how that is put into a file."""

    document: Any
    encode: Callable[[Any], bytes]
    path: Path
    parse: Callable[[], object]
    decode: Callable[[bytes], Any] = json.loads
    """Undoes `encode`, where a changed file is to be changed further."""
    seal: Callable[[bytes], bytes] | None = None
    """Gives a file the checksum that its content has; done to half of the changed ones."""


def _json_lines(value: Any) -> bytes:  # noqa: ANN401
    lines = value if isinstance(value, list) else [value]
    return b"".join(_dump(line) + b"\n" for line in lines)


def _of_json_lines(data: bytes) -> list[Any]:
    return [json.loads(line) for line in data.splitlines()]


def _front_matter(value: Any) -> bytes:  # noqa: ANN401
    return _HEAD + _dump(value) + _BODY


def _template(value: Any) -> bytes:  # noqa: ANN401
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else _dump(value)


class Parsers:
    """The parsers, each with a valid document and a way to feed it a changed one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._patch = pytest.MonkeyPatch()
        self._stack = contextlib.ExitStack()
        self._stack.callback(self._patch.undo)
        self.targets: Mapping[str, Target] = {
            **self._checkpoint(folder / "checkpoint"),
            **self._run(folder / "run"),
            **self._texts(folder / "texts"),
            "hub": self._hub(folder / "hub"),
        }
        for name, target in self.targets.items():
            target.path.write_bytes(self.valid(name))
            target.parse()  # it is valid; and what is made once is made

    def close(self) -> None:
        """End what serves the parsers."""
        self._stack.close()

    def _checkpoint(self, folder: Path) -> dict[str, Target]:
        folder.mkdir()
        shard = folder / "model-1.safetensors"
        shard.write_bytes(header_bytes(HEADER))
        (folder / "config.json").write_bytes(_dump(CONFIG))
        (folder / INDEX).write_bytes(_dump(WEIGHT_MAP))

        def opened() -> object:
            return open_checkpoint(folder)

        return {
            "header": Target(
                HEADER, header_bytes, shard, lambda: read_header(shard),
                lambda data: json.loads(data[8:].rstrip(b"\0")),
            ),
            "config": Target(CONFIG, _dump, folder / "config.json", opened),
            "index": Target(WEIGHT_MAP, _dump, folder / INDEX, opened),
            "card": Target(
                CARD, _front_matter, folder / "README.md",
                lambda: source_card.source_metadata(folder),
                lambda data: json.loads(data.removeprefix(_HEAD).removesuffix(_BODY)),
            ),
        }  # fmt: skip

    def _run(self, folder: Path) -> dict[str, Target]:
        self.workspace = workspace = workspace_of(folder, None)
        files.make_directory(workspace.data)
        written = files.write_bytes(workspace.statistics(0), b"12")
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
        workspace.claim(saved)
        store = workspace.hidden(1)
        writer = HiddenWriter(store, STATES, torch.float32, 2)
        writer.write(0, torch.zeros(2, *STATES[1:]))
        writer.write(1, torch.zeros(1, *STATES[1:]))
        writer.publish()

        def states() -> None:
            opened = HiddenStates(store, STATES, torch.float32, 2)
            opened.read(0)
            opened.read(1)

        return {
            "journal": Target(
                json.loads(workspace.journal.read_bytes()), _dump, workspace.journal,
                lambda: journal.load(workspace.journal), seal=sealed,
            ),
            "log": Target(
                LOG, _json_lines, workspace.log, lambda: gather(workspace), _of_json_lines
            ),
            "zarr": Target(
                json.loads((store / "zarr.json").read_bytes()), _dump,
                store / "zarr.json", states,
            ),
        }  # fmt: skip

    def _texts(self, folder: Path) -> dict[str, Target]:
        folder.mkdir()
        (folder / "mix.txt").write_text("text", encoding="utf-8")
        records = mix.Part(name="chats", source=str(folder / "chats.jsonl"))
        template, list_of_parts = folder / "template.jinja", folder / "mix.yaml"

        def shown(chat: Chat) -> str:
            return json.dumps([chat.messages, chat.tools])

        def documents() -> list[str]:
            return list(datasets.open_documents(records, field="messages", render=shown))

        def rendered() -> str:
            content = template.read_bytes().decode(errors="replace")
            tokenizer: Any = SimpleNamespace(
                name_or_path="it", chat_template=content, special_tokens_map={"bos_token": "B"},
                get_chat_template=lambda **_: content,
            )  # fmt: skip
            renderer._tokenizer = tokenizer
            return renderer(Chat([{"role": "user", "content": "a"}]))

        renderer = ChatRenderer(SimpleNamespace())  # type: ignore[arg-type]
        return {
            "chats": Target(CHAT, _json_lines, Path(records.source), documents),
            "template": Target(TEMPLATE, _template, template, rendered, bytes.decode),
            "mix": Target(
                MIX, _dump, list_of_parts, lambda: mix.parts_of([str(list_of_parts)])
            ),
        }  # fmt: skip

    def _hub(self, folder: Path) -> Target:
        folder.mkdir()
        (folder / "config.json").write_bytes(_dump(CONFIG))
        (folder / "model.safetensors").write_bytes(header_bytes(HEADER))
        server = self._stack.enter_context(serving(folder, folder / "home", self._patch))
        self._patch.setattr(hub, "WAIT_SECONDS", 0.0)
        answer = self.folder / "answer.json"

        def found() -> object:
            server.answer = answer.read_bytes()
            return hub.find(REPO)

        return Target(server.info(), _dump, answer, found)

    def feed(self, name: str, data: bytes) -> None:
        """Let a parser read a file with these bytes; raise what is no refusal."""
        target = self.targets[name]
        target.path.write_bytes(data)
        try:
            _guarded(target.parse, data)
        finally:
            target.path.write_bytes(self.valid(name))

    def valid(self, name: str) -> bytes:
        """Return the file that is changed."""
        return self.targets[name].encode(self.targets[name].document)

    def change(self, name: str, data: bytes, draw: random.Random) -> bytes:
        """Change a file: half of the time a value of it."""
        changed, target = None, self.targets[name]
        if draw.random() < 0.5:
            with contextlib.suppress(ValueError, RecursionError):
                changed = target.encode(mutate_json(target.decode(data), draw))
        changed = changed or mutate_bytes(data, draw)
        return target.seal(changed) if target.seal and draw.random() < 0.5 else changed


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
    """Parse; raise unless it is read or refused, in time and in little memory."""

    def end(*_: object) -> NoReturn:
        raise TimeoutError(f"more than {SECONDS} s for an input of {len(data)} bytes")

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    tracemalloc.start()
    try:
        parse()
    except (ReamStreamError, ChatError):
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    if peak > 1_000_000 + 100 * len(data):
        raise MemoryError(f"{peak} bytes for an input of {len(data)}")


def guided(parsers: Parsers, asked: argparse.Namespace) -> NoReturn:
    """Feed what atheris makes, from inputs that reached new lines; end the process."""
    names, counts = list(parsers.targets), collections.Counter[str]()
    end = time.monotonic() + asked.seconds

    def feed(data: bytes) -> None:
        if time.monotonic() > end:
            tell(counts, asked.seconds)
            sys.stdout.flush()
            parsers.close()
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

    for module in _INSTRUMENTED:
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
        for name in parsers.targets:
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
        with contextlib.closing(parsers):
            if atheris is not None:
                guided(parsers, asked)
            return drawn(parsers, asked)


if __name__ == "__main__":
    sys.exit(main())
