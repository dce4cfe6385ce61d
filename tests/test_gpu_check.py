"""The check of a GPU, on the processor and with tiny shapes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_check_of_a_gpu_runs_and_prints_a_table_and_one_object(tmp_path):
    kept = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "tools/gpu_check"), "--device", "cpu", "--quick"]
    done = subprocess.run(
        [*command, "--json", str(kept)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    *rows, last = done.stdout.splitlines()
    result = json.loads(last)
    assert json.loads(kept.read_text(encoding="utf-8")) == result
    assert result["passed"] is True
    assert result["card"] is None
    assert len(rows) == len(result["found"])
    found = {each["name"]: each for each in result["found"]}
    checked = {name for name, each in found.items() if each["passed"]}
    assert checked == {
        *(
            f"{what}: {method}, float32, processor and device"
            for what in ("statistics", "layers with the same groups")
            for method in ("REAP", "energy, refitted")
        ),
        "batches halved where the device is out of memory",
    }
    # of one device and itself there is no difference
    assert found["statistics: REAP, float32, processor and device"]["value"] == 0
    for name in ("Qwen3-30B", "DeepSeek-V3, FP8"):
        for phase in ("observe", "propagate"):
            assert found[f"{phase}, {name}, looped products"]["value"] > 0
    for name in ("hidden states written", "hidden states read", "whole run"):
        assert found[name]["value"] > 0
    assert found["whole run, peak of device memory"]["value"] is None
