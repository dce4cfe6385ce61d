"""Names that could not be written at the end of a run are refused when it is planned."""

import shutil

import pytest
from tiny_runs import run, settings

from ream_stream.__main__ import main
from ream_stream.compression.finalize import check_names
from ream_stream.errors import OtherRunError, UsageError


def put(source, name):
    path = source / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("README.md/x.txt", "cannot be written beside README.md"),
        ("ream_stream.json/x.txt", "cannot be written beside ream_stream.json"),
        ("model-00001-of-00004.safetensors/x/y.txt", "beside model-00001-of-00004.safetensors"),
        ("README.md.partial", "README.md cannot be written beside README.md.partial"),
        (246 * "n" + ".txt", "too long"),
        (250 * "d" + "/x.txt", None),
        (83 * "\u20ac", "too long"),
        ("caf\udce9.txt", None),
    ],
    ids=ascii,
)
def test_files_of_a_source_that_cannot_be_copied_are_refused_by_a_plan(
    checkpoints, tmp_path, capsys, name, words
):
    source = shutil.copytree(checkpoints("qwen3_moe"), tmp_path / "source")
    put(source, name)
    capsys.readouterr()
    status = main(["plan", str(source), "--experts", "4"])
    said = capsys.readouterr().err
    assert status == (2 if words else 0)
    if words:
        assert words in said
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "taken"), [("config.json", "config.json"), ("a/b/c.txt", "a/b/c.txt")]
)
def test_a_folder_in_the_place_of_a_file_is_another_s(tmp_path, name, taken):
    (tmp_path / taken).mkdir(parents=True)
    with pytest.raises(OtherRunError, match="is a folder, and a file of this name"):
        check_names(tmp_path, [name])


def test_a_file_in_the_place_of_a_folder_is_another_s(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(OtherRunError, match="is a file, and a folder of this name"):
        check_names(tmp_path, ["a/b.txt"])


def test_a_path_longer_than_the_system_s_is_refused(tmp_path):
    with pytest.raises(UsageError, match="too long"):
        check_names(tmp_path, ["/".join(20 * [200 * "d"]) + "/" + 100 * "n"])


def test_names_that_are_not_utf_8_are_carried_over(checkpoints, tmp_path):
    source = shutil.copytree(checkpoints("qwen3_moe"), tmp_path / "source")
    put(source, "caf\udce9.txt")
    output = tmp_path / "out"
    run(source, output, settings())
    assert (output / "caf\udce9.txt").read_text() == "x"
    assert main(["verify", str(output)]) == 0
    assert main(["status", str(output), "--json"]) == 0
    assert main(["report", str(output), "--html", str(tmp_path / "a.html")]) == 0


@pytest.mark.parametrize("place", ["source", "output", "work"])
def test_folders_whose_path_is_not_utf_8_are_refused(checkpoints, tmp_path, capsys, place):
    (tmp_path / "\udce9").mkdir()
    source = checkpoints("qwen3_moe")
    words = {"source": source, "output": tmp_path / "out", "work": tmp_path / "work"}
    words[place] = tmp_path / "\udce9"
    options = ["--experts", "4", "--calibration", str(source / "config.json")]
    options += ["--work-dir", str(words["work"])]
    assert main(["compress", str(words["source"]), str(words["output"]), *options]) == 2
    said = capsys.readouterr().err
    assert "\\xe9: the path is not UTF-8" in said
    assert "\udce9" not in said
