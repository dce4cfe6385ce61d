"""A hub that answers what no hub should: nothing of it becomes a path, a size or memory."""

import tracemalloc

import pytest
from command_line import compression as words
from hub_server import REPO, serving

from ream_stream.__main__ import main
from ream_stream.checkpoint import hub as product
from ream_stream.checkpoint import hub_answers
from ream_stream.errors import DamagedError

SHARD = "model-00002-of-00004.safetensors"


def outside(tmp_path):
    """Return what is written beside the folders that a run and the cache have."""
    return {path.name for path in tmp_path.iterdir()} - {"home", "remote", "out"}


@pytest.fixture
def described(hub, monkeypatch):
    """Give the description of the repository, to be changed."""
    info = hub.info()
    monkeypatch.setattr(hub, "info", lambda: info)
    return info


@pytest.mark.parametrize(
    "sha",
    [
        "../../../evil",
        "main",
        "a" * 39,
        "A" * 40,
        "a" * 41,
        "a" * 40 + "\n",
        "",
        None,
        7,
        ["a"],
    ],
)
def test_a_commit_is_forty_hexadecimal_digits(described, tmp_path, capsys, sha):
    described["sha"] = sha
    assert main(["plan", REPO, "--experts", "6"]) == 3
    assert "which is no hash" in capsys.readouterr().err
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    "names",
    [
        ["../../evil.json"],
        ["/etc/evil.json"],
        ["a/../evil.json"],
        ["a//evil.json"],
        ["./evil.json"],
        ["a\\evil.json"],
        ["evil\n.json"],
        ["evil\x1b[2J.json"],
        ["evil\u202e.json"],
        ["evil\udcff.json"],
        ["evil" * 80],
        ["a/" * 600 + "evil"],
        [""],
        [7],
        ["Tokenizer.json"],
        ["\u00e9.json", "e\u0301.json"],
        ["config.json/evil"],
    ],
    ids=ascii,
)
def test_names_that_no_folder_should_hold_are_refused(described, tmp_path, capsys, names):
    described["siblings"] += [{"rfilename": name, "size": 1} for name in names]
    assert main(["plan", REPO, "--experts", "6"]) == 3
    said = capsys.readouterr().err
    assert "error: the hub lists" in said
    assert said.rstrip("\n").isprintable()
    assert not (tmp_path / "home").exists()


def test_a_repository_of_very_many_files_is_refused(described, monkeypatch):
    monkeypatch.setattr(hub_answers, "MAX_FILES", 20)
    described["siblings"] += [{"rfilename": f"{n}.json", "size": 1} for n in range(20)]
    with pytest.raises(DamagedError, match="more than 20 files"):
        product.find(REPO)


@pytest.mark.parametrize("size", [-1, 1 << 62, 1.5, "12", None, True, [1]])
def test_sizes_are_whole_numbers_that_a_disk_could_have(described, size):
    described["siblings"][-1] |= {"size": size}
    with pytest.raises(DamagedError, match="tells no size of"):
        product.find(REPO)


@pytest.mark.parametrize("digest", ["../../evil", "a" * 63, "A" * 64, None, 7])
def test_digests_are_those_of_sha_256(described, digest):
    sibling = next(each for each in described["siblings"] if "lfs" in each)
    sibling["lfs"]["sha256"] = digest
    with pytest.raises(DamagedError, match="tells no SHA-256 of"):
        product.find(REPO)


def test_a_shard_larger_than_the_disk_is_refused_before_it_is_fetched(
    hub,
    described,
    tokens,
    tmp_path,
    capsys,
):
    sibling = next(each for each in described["siblings"] if each["rfilename"] == SHARD)
    sibling["size"] = sibling["lfs"]["size"] = 10**18
    assert main(words(REPO, tmp_path / "out", tokens)) == 12
    assert "to fetch" in capsys.readouterr().err
    assert hub.sent[SHARD] < 1 << 20


@pytest.mark.parametrize(
    "answer",
    [
        b"[" * 100_000,
        b"not JSON",
        b"[]",
        b"3",
        b'{"sha": 3, "siblings": 3}',
        b'{"id": "org/name", "siblings": [{"rfilename": "a", "lfs": 3}]}',
        b'{"id": "org/name", "siblings": [3]}',
        b'{"id": ["org/name"], "lastModified": 3}',
    ],
    ids=lambda answer: answer[:40],
)
def test_an_answer_of_another_form_has_a_sentence(hub, capsys, answer):
    hub.answer = answer
    assert main(["plan", REPO, "--experts", "6"]) == 3
    assert "hub answers" in capsys.readouterr().err


def test_an_answer_of_a_hundred_megabytes_is_not_read(hub, capsys):
    hub.answer = b" " * 100_000_000
    tracemalloc.start()
    try:
        assert main(["plan", REPO, "--experts", "6"]) == 3
        assert tracemalloc.get_traced_memory()[1] < 200_000_000  # the server's own is half
    finally:
        tracemalloc.stop()
    assert "answers with '100000000' bytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "change", "stream"),
    [
        ("tokenizer.json", "longer", ()),
        ("tokenizer.json", "endless", ("--stream",)),
        (SHARD, "shorter", ("--stream",)),
        (SHARD, "longer", ()),
    ],
)
def test_a_file_of_another_length_than_told_is_refused(
    hub,
    source,
    tokens,
    tmp_path,
    stream,
    name,
    change,
):
    data = (source / name).read_bytes()
    change = {"longer": data + b" ", "shorter": data[:-1], "endless": b" " * (3 << 20)}[change]
    hub.bodies[name] = change
    assert main(words(REPO, tmp_path / "out", tokens, *stream)) in {1, 3}
    assert not (tmp_path / "out" / "ream_stream.json").exists()
    hub.bodies.clear()
    assert main(words(REPO, tmp_path / "out", tokens, *stream)) == 0


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Repo-Commit": "../../../evil"},
        {"X-Repo-Commit": "f" * 40},
        {"ETag": '"../../../evil"'},
        {"X-Linked-ETag": "../../../evil"},
        {"ETag": f'"{"a" * 300}"'},
        {"Content-Encoding": "gzip"},
    ],
    ids=str,
)
def test_headers_that_would_be_paths_are_refused(
    hub,
    tokens,
    tmp_path,
    headers,
):
    hub.headers = headers
    assert main(words(REPO, tmp_path / "out", tokens)) == 3
    assert not list(tmp_path.rglob("*evil*"))
    assert not outside(tmp_path)


def test_a_redirection_to_another_server_does_not_carry_the_token(
    hub,
    source,
    tokens,
    tmp_path,
):
    with (
        pytest.MonkeyPatch.context() as patch,
        serving(source, tmp_path / "other", patch) as other,
    ):
        patch.undo()  # the first one is asked
        hub.elsewhere = other.url.replace("127.0.0.1", "localhost")
        hub.needs_token = True
        assert main(words(REPO, tmp_path / "out", tokens, "--stream")) == 0
        assert any("/resolve/" in path for path in hub.authorized)
        assert any(SHARD in path for _, path in other.requests)
        assert not other.authorized
