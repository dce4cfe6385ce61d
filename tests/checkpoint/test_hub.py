"""Checkpoints on the hub, against a server on loopback that speaks its endpoints."""

import json
import os
import shutil
import signal

import pytest
from command_line import compression as words
from crash import Kill, kills, run_in_child
from hub_server import COMMIT, REPO, TOKEN
from huggingface_hub import constants

from ream_stream.__main__ import main
from ream_stream.checkpoint import hub as product
from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.compression.event_log import Log
from ream_stream.errors import InterruptedRunError, ReamStreamError, UsageError
from ream_stream.events import LayerDone


@pytest.fixture(scope="module")
def control(checkpoints, tokens, tmp_path_factory):
    """The output of the same files on the disk."""
    output = tmp_path_factory.mktemp("control") / "output"
    assert main(words(checkpoints("qwen3_moe"), output, tokens)) == 0
    return shards(output)


def shards(output):
    return {path.name: path.read_bytes() for path in output.glob("*.safetensors")}


def test_a_plan_fetches_headers_and_its_digest_is_that_of_the_files(hub, source):
    remote = product.find(REPO)
    assert remote.commit == COMMIT
    folder = product.fetch_headers(remote)
    known = open_checkpoint(folder, with_data=False)
    assert known.digest() == open_checkpoint(source).digest()
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert sum(sizes) < sum(file.size for file in remote.files.values()) / 2
    asked = len(hub.requests)
    product.fetch_headers(remote)
    assert not [path for _, path in hub.requests[asked:] if path.endswith(".safetensors")]


def test_plan_and_dry_run_of_a_checkpoint_on_the_hub(hub, tokens, tmp_path, capsys):
    assert main(["plan", f"{REPO}@main", "--experts", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 3
    assert main(["plan", f"{REPO}@main", "--experts", "4"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "source on the hub: its headers were read, compress fetches the rest" in shown
    assert main(words(REPO, tmp_path / "out", tokens, "--dry-run")) == 0
    assert not (tmp_path / "out").exists()


def test_inspect_of_a_checkpoint_on_the_hub_fetches_its_headers(hub, source, capsys):
    assert main(["inspect", f"{REPO}@main", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(source), "--json"]) == 0
    there = json.loads(capsys.readouterr().out)
    changed = {name for name in there if known[name] != there[name]}
    assert changed == {"path", "headers_only_files"}
    assert main(["inspect", REPO]) == 0
    assert "on the hub: headers and small files were read" in capsys.readouterr().out
    assert main(["inspect", "nobody/nothing"]) == 2


def test_a_checkpoint_is_fetched_and_gives_the_bytes_of_the_same_files_on_disk(
    hub, tokens, tmp_path, control
):
    assert main(words(REPO, tmp_path / "out", tokens)) == 0
    assert shards(tmp_path / "out") == control
    # run again, it is complete: nothing is fetched twice
    sent = dict(hub.sent)
    assert main(words(REPO, tmp_path / "out", tokens)) == 0
    assert {name: hub.sent[name] for name in control} == {n: sent.get(n, 0) for n in control}


def test_streamed_shards_are_there_only_while_they_are_needed(
    hub, source, tokens, tmp_path, control, monkeypatch, capsys
):
    folder = tmp_path / "out" / ".ream-stream" / "streamed"
    most, show = [], Log.show

    def watch(log, event):
        show(log, event)
        most.append({path.name for path in folder.glob("*.safetensors")})

    monkeypatch.setattr(Log, "show", watch)
    assert main(words(REPO, tmp_path / "out", tokens, "--stream")) == 0
    assert "--against" not in capsys.readouterr().err  # there is no source to run
    assert shards(tmp_path / "out") == control
    everything = {path.name for path in source.glob("*.safetensors")}
    assert max(map(len, most)) == 2
    assert set().union(*most) == everything
    assert not folder.exists()
    for name in everything:  # each once, and its header before
        size = (source / name).stat().st_size
        assert hub.sent[name] <= 2 * size


def stop_after_a_layer(monkeypatch, command):
    show = Log.show

    def stop(log, event):
        show(log, event)
        if isinstance(event, LayerDone):
            raise InterruptedRunError("stopped for the test")

    with monkeypatch.context() as patch:
        patch.setattr(Log, "show", stop)
        assert main(command) == 130


def test_a_streamed_run_that_was_stopped_goes_on_to_the_same_bytes(
    hub, tokens, tmp_path, control, monkeypatch
):
    command = words(REPO, tmp_path / "out", tokens, "--stream")
    stop_after_a_layer(monkeypatch, command)
    stop_after_a_layer(monkeypatch, command)
    assert main(command) == 0
    assert shards(tmp_path / "out") == control


SHARD = "model-00002-of-00004.safetensors"


@pytest.mark.crash
def test_a_streamed_run_that_is_killed_goes_on_to_the_same_bytes(
    hub, tokens, tmp_path, control, monkeypatch
):
    def run(name, kill=None):
        command = words(REPO, tmp_path / name, tokens, "--stream")
        return run_in_child(lambda: main(command), tmp_path / "report.json", kill=kill)

    def check(name):
        assert run(name).value == 0
        assert shards(tmp_path / name) == control
        assert not (tmp_path / name / ".ream-stream" / "streamed").exists()

    whole = run("whole")
    assert whole.value == 0
    steps = whole.steps
    near = [kill for kill in kills(steps, thin=True) if "/streamed/" in steps[kill.step].path]
    for kill in near[::4]:
        assert not run(f"{kill.step}", kill).finished
        check(f"{kill.step}")
    # and in the middle of a download: the connection is cut, and the wait is the end
    hub.drop[SHARD] = 1
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    with monkeypatch.context() as patch:
        patch.setattr(product.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        assert not run("cut", Kill(len(steps), "after")).finished
    incoming = tmp_path / "cut" / ".ream-stream" / "streamed" / "incoming"
    assert [path for path in incoming.rglob("*.incomplete") if path.stat().st_size]
    check("cut")


@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["whole", "streamed"])
@pytest.mark.parametrize("fault", ["dropped", "busy", "broken"])
def test_what_goes_wrong_for_a_while_is_tried_again(
    hub, tokens, tmp_path, control, stream, fault
):
    faults = {
        "dropped": lambda: hub.drop.update({SHARD: 2}),
        "busy": lambda: hub.statuses.update({SHARD: [429, 429]}),
        "broken": lambda: hub.statuses.update({SHARD: [500, 503]}),
    }
    faults[fault]()
    assert main(words(REPO, tmp_path / "out", tokens, *stream)) == 0
    assert shards(tmp_path / "out") == control


def test_a_download_that_was_cut_goes_on_where_it_was(hub, source, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    remote = product.find(REPO)
    checkpoint = open_checkpoint(product.fetch_headers(remote), with_data=False)
    streamed = product.streamed(checkpoint, remote, tmp_path / "streamed")
    before, size = hub.sent[SHARD], (source / SHARD).stat().st_size
    hub.drop[SHARD] = 1
    streamed.fetch(tmp_path / "streamed" / SHARD)
    assert size <= hub.sent[SHARD] - before < size + 1024  # a piece that was cut comes again
    assert (tmp_path / "streamed" / SHARD).read_bytes() == (source / SHARD).read_bytes()


def test_a_shard_with_another_digest_is_fetched_again_and_then_refused(
    hub, tokens, tmp_path, capsys, control
):
    hub.wrong[SHARD] = 2  # for the header, which is right, and the first time
    assert main(words(REPO, tmp_path / "out", tokens, "--stream")) == 0
    assert shards(tmp_path / "out") == control
    hub.wrong[SHARD] = 99
    assert main(words(REPO, tmp_path / "two", tokens, "--stream")) == 3
    assert f"{SHARD} is not what {REPO} has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (401, UsageError, "takes a token"),
        (403, UsageError, "has no access"),
        (404, UsageError, "does not exist"),
        (429, ReamStreamError, "answers with status 429"),
        (500, ReamStreamError, "answers with status 500"),
    ],
)
def test_a_hub_that_refuses_has_its_message_and_the_token_is_in_none(
    hub, status, kind, said, capsys
):
    hub.statuses["/api/models"] = [status] * 99
    with pytest.raises(kind, match=said) as caught:
        product.find(REPO)
    assert type(caught.value) is kind
    assert main(["plan", REPO, "--experts", "6"]) == kind.exit_status
    printed = capsys.readouterr()
    assert TOKEN not in printed.out + printed.err + str(caught.value)


def test_the_token_is_sent_and_written_nowhere(hub, tokens, tmp_path, capsys):
    hub.needs_token = True
    assert main(words(REPO, tmp_path / "out", tokens, "--stream")) == 0
    printed = capsys.readouterr()
    assert TOKEN not in printed.out + printed.err
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["whole", "streamed"])
def test_a_branch_that_moved_is_not_mixed_and_its_old_commit_goes_on(
    hub, source, tokens, tmp_path, control, monkeypatch, capsys, stream
):
    command = words(f"{REPO}@main", tmp_path / "out", tokens, *stream)
    stop_after_a_layer(monkeypatch, command)
    was = shutil.copytree(source, tmp_path / "was")
    for path in source.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
    hub.commit = "f" * 40
    assert main(command) == 11
    assert f"commit {COMMIT} and SOURCE is now commit {hub.commit}" in capsys.readouterr().err
    shutil.copytree(was, source, dirs_exist_ok=True)
    hub.commit = COMMIT
    assert main(words(f"{REPO}@{COMMIT}", tmp_path / "out", tokens, *stream)) == 0
    assert shards(tmp_path / "out") == control


def test_a_streamed_shard_with_another_byte_is_fetched_again(
    hub, tokens, tmp_path, control, monkeypatch
):
    command = words(REPO, tmp_path / "out", tokens, "--stream")
    stop_after_a_layer(monkeypatch, command)
    left = sorted((tmp_path / "out" / ".ream-stream" / "streamed").glob("*.safetensors"))
    assert left
    for path in left:
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
    assert main(command) == 0
    assert shards(tmp_path / "out") == control


def test_a_streamed_shard_that_is_written_to_during_the_run_ends_it(
    hub, tokens, tmp_path, control, monkeypatch, capsys
):
    command, show = words(REPO, tmp_path / "out", tokens, "--stream"), Log.show

    def touch(log, event):
        show(log, event)
        if isinstance(event, LayerDone):
            for path in (tmp_path / "out" / ".ream-stream" / "streamed").glob("*-00004-*"):
                data = bytearray(path.read_bytes())
                data[-2] ^= 1
                path.write_bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "show", touch)
        assert main(command) == 3
    assert "was changed while it was being read" in capsys.readouterr().err
    assert main(command) == 0
    assert shards(tmp_path / "out") == control


@pytest.mark.parametrize("text", ["nowhere", "./org/name", "a/b/c", "/org/name"])
def test_what_is_neither_a_folder_nor_a_name_is_wrong_usage(text, capsys):
    assert main(["plan", text, "--experts", "6"]) == 2
    assert "neither a folder nor ORG/NAME" in capsys.readouterr().err


def test_a_folder_is_not_streamed_and_without_a_network_that_is_said(source, capsys):
    assert main(["plan", str(source), "--experts", "6", "--stream"]) == 2
    assert main(["plan", REPO, "--experts", "6"]) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # the library's own
def test_an_output_is_pushed_in_one_commit_and_verified_before(hub, tokens, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(words(hub.folder, output, tokens)) == 0
    (output / "config.json.partial").write_text("{", encoding="utf-8")
    assert main(["push", str(output), REPO]) == 3
    (output / "config.json.partial").unlink()
    wanted = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    # what others put there stays there
    (output / "notes.txt").write_text(TOKEN, encoding="utf-8")
    (output / ".env").write_text(TOKEN, encoding="utf-8")
    (output / "logs").mkdir()
    (output / "logs" / "log.jsonl").write_text("{}", encoding="utf-8")
    capsys.readouterr()
    assert main(["push", str(output), REPO, "--dry-run"]) == 0
    assert {line.split("  ")[0] for line in capsys.readouterr().out.splitlines()} == {*wanted}
    assert not hub.pushed
    assert main(["push", str(output), REPO, "--private", "--revision", "small"]) == 0
    assert f"/{REPO}/commit/{COMMIT}" in capsys.readouterr().out
    assert hub.pushed == wanted
    hub.statuses["/lfs/"] = [503] * 99
    assert main(["push", str(output), REPO]) == 1
    assert "the hub answers with status 503" in capsys.readouterr().err
    commits = [path for method, path in hub.requests if "/commit/" in path]
    assert commits == [f"/api/models/{REPO}/commit/small"]


def test_a_link_that_leads_out_of_the_output_is_not_pushed(hub, tokens, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(words(hub.folder, output, tokens)) == 0
    (tmp_path / "secret").write_text("{}", encoding="utf-8")
    (output / "tokenizer.json").unlink()
    assert main(["push", str(output), REPO]) == 3
    assert "tokenizer.json is missing" in capsys.readouterr().err
    (output / "tokenizer.json").symlink_to(tmp_path / "secret")
    assert main(["push", str(output), REPO]) == 3
    assert "tokenizer.json is a link to" in capsys.readouterr().err
    assert not hub.pushed


def test_an_output_whose_manifest_names_no_documents_is_not_pushed(
    hub, tokens, tmp_path, capsys
):
    output = tmp_path / "out"
    assert main(words(hub.folder, output, tokens)) == 0
    manifest = json.loads((output / "ream_stream.json").read_text(encoding="utf-8"))
    del manifest["documents"]
    (output / "ream_stream.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert main(["push", str(output), REPO]) == 2
    assert "does not name the files beside the shards" in capsys.readouterr().err
    assert not hub.pushed
