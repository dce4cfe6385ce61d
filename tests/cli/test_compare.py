"""The verbs `compare` and `sweep`."""

import json

from command_line import call

from ream_stream.cli.demo import CHECKPOINT


def test_compare_and_sweep_write_their_results_and_do_nothing_twice(capsys, tmp_path):
    for name in ("general", "math", "code"):
        (tmp_path / f"{name}.txt").write_text(f"Some words of {name}, 1 + 1 = 2.\n" * 60)
    names = ("general", "math", "code")
    size = ("--sequences", 10, "--sequence-length", 16, "--max-tokens", 64)
    words = [CHECKPOINT, "--seeds", 1, "--threads", 1, *size]
    for option in ("--calibration", "--text"):
        words += [w for n in names for w in (option, f"{n}={tmp_path / n}.txt")]
    folder = tmp_path / "compared"
    sizes = ("--keep", "50%,75%,0.76")
    command = ("compare", *words, *sizes, "--methods", "reap", "--output", folder)
    status, out, err = call(capsys, *command, "--json")
    known = json.loads(out)
    assert status == 0
    assert [(each["name"], each["experts"]) for each in known["summary"]] == [
        ("original", None), ("reap", 16), ("reap", 24),
    ]  # fmt: skip
    assert len(known["curve"]["points"]) == 2
    assert (folder / "sizes.svg").read_text().startswith("<svg")
    assert "recommended: " in (folder / "comparison.md").read_text()
    assert json.loads((folder / "comparison.json").read_text()) == known
    assert "trial 2 of 3: reap, seed 0" in err
    status, out, err = call(capsys, *command)
    assert (status, err) == (0, "")
    assert "kept" in out
    assert "nats a token more (the smallest that loses at most" in out
    assert call(capsys, "compare", *words, *sizes, "--methods", "none")[0] == 2
    for wrong in ((), ("--experts", 24, *sizes)):
        status, _, err = call(capsys, "compare", *words, *wrong)
        assert (status, "by one of --experts and --keep" in err) == (2, True)

    mixes = ("--mixes", "general-50-math-50-code-00,general-00-math-30-code-70")
    folder = tmp_path / "swept"
    words += ["--experts", 24]
    command = ("sweep", *words, "--methods", "reap", *mixes, "--output", folder)
    known = json.loads(call(capsys, *command, "--json")[1])
    assert known["axes"] == list(names)
    assert len(known["points"]) == 2
    assert "hypervolume" in call(capsys, *command)[1]
    assert (folder / "sweep.svg").read_text().startswith("<svg")
    assert known["curve"] is None
    assert not (folder / "sizes.svg").exists()
    assert call(capsys, "sweep", *words, "--mixes", "paper")[0] == 2
