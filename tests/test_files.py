import errno
import hashlib
import os
import re
import signal

import pytest
import torch
from crash import run_in_child
from safetensors.torch import load_file

from ream_stream import files
from ream_stream.compression.file_lock import lock, lock_holder
from ream_stream.errors import DamagedError, OtherRunError, OverBudgetError
from ream_stream.file_access import FileRange, free_bytes, same_disk


@pytest.fixture
def umask():
    """Set the umask for a test."""
    was = os.umask(0o022)
    yield os.umask
    os.umask(was)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_permissions_are_those_that_the_umask_gives_a_new_file(mask, mode, tmp_path, umask):
    umask(mask)
    source = tmp_path / "source"
    source.write_bytes(b"x")
    source.chmod(0o400)
    files.write_bytes(tmp_path / "bytes", b"x")
    files.write_json(tmp_path / "json", {})
    files.write_tensors(tmp_path / "tensors", {"x": torch.zeros(2)})
    files.copy_file(source, tmp_path / "copy")
    for name in ("bytes", "json", "tensors", "copy"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode, name


def test_size_and_digest_are_those_of_the_file(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(bytes(range(200)))
    parts = [b"head", FileRange(path=source, start=10, stop=150), memoryview(b"tail")]
    written = files.write_stream(tmp_path / "file", parts)
    data = b"head" + bytes(range(10, 150)) + b"tail"
    assert (tmp_path / "file").read_bytes() == data
    assert (written.name, written.size) == ("file", len(data))
    assert written.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("number", [None, errno.EXDEV, errno.EOPNOTSUPP])
def test_a_file_that_the_kernel_does_not_copy_is_copied_all_the_same(
    number, tmp_path, monkeypatch
):
    source, copy, refused = tmp_path / "source", os.copy_file_range, []
    data = bytes(range(251)) * 40_000
    source.write_bytes(data)

    def in_part(*given, **options):
        """Copy less than is asked for, and refuse after a while, or copy nothing more."""
        if len(refused) > 2:
            refused.append(given)
            if number is None:
                return 0
            raise OSError(number, os.strerror(number))
        refused.append(given)
        return copy(given[0], given[1], min(given[2], 100_001), **options)

    monkeypatch.setattr(os, "copy_file_range", in_part)
    parts = [b"head", FileRange(path=source, start=7, stop=len(data)), b"tail"]
    written = files.write_stream(tmp_path / "file", parts)
    wanted = b"head" + data[7:] + b"tail"
    assert (tmp_path / "file").read_bytes() == wanted
    assert written.sha256 == hashlib.sha256(wanted).hexdigest()
    assert len(refused) > 3


def test_the_kernel_copies_from_file_to_file_where_it_can(tmp_path, monkeypatch):
    source, seen, fill = tmp_path / "source", [], files._fill
    source.write_bytes(bytes(10_000_000))
    monkeypatch.setattr(files, "_fill", lambda *given: (seen.append(given), fill(*given))[1])
    files.copy_file(source, tmp_path / "copy")
    assert [len(piece) for _, piece, _ in seen] == [1 << 22, 1 << 22, 10_000_000 - (1 << 23)]
    assert [start for _, _, (_, start) in seen] == [0, 1 << 22, 1 << 23]
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


def test_the_disk_begins_with_a_large_copy_before_its_end(tmp_path, monkeypatch):
    source, synced, fsync = tmp_path / "source", [], os.fsync
    source.write_bytes(bytes(10_000_000))
    monkeypatch.setattr(files, "FLUSH_BYTES", 1)
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), fsync(fd))[1])
    written = files.copy_file(source, tmp_path / "copy")
    # before the last one there were others
    assert len([fd for fd in synced if fd == synced[0]]) > 1
    assert written.sha256 == hashlib.sha256(bytes(10_000_000)).hexdigest()


def test_a_disk_that_fails_before_the_end_of_a_copy_is_an_error(tmp_path, monkeypatch):
    source, fsync, asked = tmp_path / "source", os.fsync, []
    source.write_bytes(bytes(10_000_000))

    def fails_once(descriptor):
        asked.append(descriptor)
        if len(asked) == 1:
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(files, "FLUSH_BYTES", 1)
    monkeypatch.setattr(os, "fsync", fails_once)
    with pytest.raises(OSError, match="Input/output"):
        files.copy_file(source, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_small_safetensors_file_reads_back_with_its_metadata(tmp_path):
    tensors = {"a": torch.arange(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    written = files.write_tensors(tmp_path / "x.safetensors", tensors, {"note": "n"})
    back = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    data = (tmp_path / "x.safetensors").read_bytes()
    assert written.sha256 == hashlib.sha256(data).hexdigest()
    assert b'"note":"n"' in data


def test_a_file_being_written_is_not_under_its_name_and_the_old_one_stays(tmp_path):
    path = tmp_path / "file"
    files.write_bytes(path, b"old")

    def parts():
        yield b"new"
        assert path.read_bytes() == b"old"
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        files.write_stream(path, parts())
    assert path.read_bytes() == b"old"
    files.write_bytes(path, b"again")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_source_cut_while_it_is_read_is_damaged(tmp_path):
    (tmp_path / "source").write_bytes(b"12345")
    part = FileRange(path=tmp_path / "source", start=2, stop=9)
    with pytest.raises(DamagedError, match="ends before byte 9"):
        files.write_stream(tmp_path / "file", [part])
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_over_budget_and_leaves_nothing_under_the_name(
    number, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(files, "_fill", full)
        with pytest.raises(OverBudgetError, match=r"no space left for .*run the same command"):
            files.write_bytes(tmp_path / "file", b"data")
        with pytest.raises(OverBudgetError, match="no space left"):
            files.write_tensors(tmp_path / "file", {"x": torch.zeros(2)})
    assert not (tmp_path / "file").exists()
    files.write_bytes(tmp_path / "file", b"data")
    assert (tmp_path / "file").read_bytes() == b"data"


def test_other_errors_of_the_disk_are_not_called_full(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "_fill", broken)
    with pytest.raises(OSError, match="Input/output error"):
        files.write_bytes(tmp_path / "file", b"data")


def test_a_disk_that_is_really_full_is_over_budget(mounted):
    small_disk = mounted("size=64k")
    with pytest.raises(OverBudgetError, match="no space left"):
        files.write_stream(small_disk / "file", [bytes(50_000)] * 2)
    assert not (small_disk / "file").exists()
    files.write_bytes(small_disk / "file", bytes(50_000))
    assert (small_disk / "file").stat().st_size == 50_000


def test_a_sync_that_the_file_system_lacks_is_no_error_and_a_failed_one_is(
    tmp_path, monkeypatch
):
    def sync(number):
        def fail(_):
            raise OSError(number, os.strerror(number))

        return fail

    monkeypatch.setattr(os, "fsync", sync(errno.EINVAL))
    files.write_bytes(tmp_path / "file", b"data")
    monkeypatch.setattr(os, "fsync", sync(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        files.write_bytes(tmp_path / "other", b"data")
    assert not (tmp_path / "other").exists()


def test_a_folder_is_removed_with_all_in_it_and_a_link_without_what_it_points_to(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("x")
    gone = tmp_path / "gone"
    (gone / "deep").mkdir(parents=True)
    (gone / "deep" / "file").write_text("x")
    (gone / "link").symlink_to(kept)
    files.remove(gone)
    files.remove(gone)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "file").exists()


def test_free_space_is_that_of_the_nearest_folder_there_is(tmp_path):
    assert free_bytes(tmp_path / "not" / "there") > 0


def test_a_lock_tells_its_holder_to_those_who_do_not_want_it(tmp_path):
    path = tmp_path / "lock"
    assert lock_holder(path) is None
    with lock(path):
        assert lock_holder(path).startswith(f"process {os.getpid()} on ")
    assert lock_holder(path) is None
    assert same_disk(tmp_path / "not" / "there", tmp_path)


def test_a_second_process_is_refused_and_told_which_one_holds_the_lock(tmp_path):
    path = tmp_path / "lock"

    def second():
        with pytest.raises(OtherRunError) as caught, lock(path):
            pass
        return str(caught.value)

    with lock(path) as left_by:
        assert left_by is None
        message = run_in_child(second, tmp_path / "report.json").value
    assert f"process {os.getpid()} on " in message
    with lock(path) as left_by:
        assert left_by is None


def test_the_lock_of_a_dead_process_is_taken_over_and_tells_its_number(tmp_path):
    pid = os.fork()
    if pid == 0:
        with lock(tmp_path / "lock"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    with lock(tmp_path / "lock") as left_by:
        assert re.fullmatch(rf"process {pid} on \S+", left_by)


def test_a_lock_whose_run_failed_is_not_taken_for_that_of_a_dead_process(tmp_path):
    with pytest.raises(RuntimeError), lock(tmp_path / "lock"):
        raise RuntimeError
    with lock(tmp_path / "lock") as left_by:
        assert left_by is None
