"""What a container's limit leaves, from files laid out as the kernel does."""

import pytest

from ream_stream.host_memory import cgroup_rooms


def lay_out(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{text}\n")


@pytest.fixture
def membership(tmp_path):
    def write(text):
        path = tmp_path / "cgroup"
        path.write_text(text)
        return path

    return write


def test_the_second_version_counts_what_is_used_but_for_cached_files(tmp_path, membership):
    root = tmp_path / "fs"
    stat = "anon 300\nfile 500\nfile_mapped 100"
    lay_out(root / "job", memory_max=1000, memory_current=850, memory_stat=stat)
    assert cgroup_rooms(membership("0::/job\n"), root) == [1000 - 850 + 500]


def test_limits_of_outer_groups_count_too_and_max_is_none(tmp_path, membership):
    root = tmp_path / "fs"
    lay_out(root / "a" / "b", memory_max="max", memory_current=10, memory_stat="file 0")
    lay_out(root / "a", memory_max=700, memory_current=200, memory_stat="file 50")
    assert cgroup_rooms(membership("0::/a/b\n"), root) == [550]


def test_in_a_container_the_group_seen_is_the_root(tmp_path, membership):
    root = tmp_path / "fs"
    lay_out(root, memory_max=400, memory_current=100, memory_stat="file 1")
    # the path is that of the host, and does not exist inside
    assert cgroup_rooms(membership("0::/docker/123\n"), root) == [301]


def test_the_first_version_has_a_folder_of_its_own(tmp_path, membership):
    folder = tmp_path / "fs" / "memory" / "job"
    folder.mkdir(parents=True)
    for name, text in (
        ("memory.limit_in_bytes", "900"),
        ("memory.usage_in_bytes", "600"),
        ("memory.stat", "cache 7\ntotal_cache 200"),
    ):
        (folder / name).write_text(text)
    text = "5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n"
    assert cgroup_rooms(membership(text), tmp_path / "fs") == [500]


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path, membership):
    root = tmp_path / "fs"
    lay_out(root, memory_max=100, memory_current=150, memory_stat="file 20")
    assert cgroup_rooms(membership("0::/\n"), root) == [0]


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert cgroup_rooms(tmp_path / "none", tmp_path) == []
