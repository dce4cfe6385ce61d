"""The page about an output: its numbers, that it needs nothing else, and how it looks."""

import base64
import json
import re
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import tiny_runs
import torch
from tiny_runs import settings, some_tokens

from ream_stream.__main__ import main
from ream_stream.cli.demo import CHECKPOINT
from ream_stream.cli.report.facts import gather
from ream_stream.cli.report.figures import bars, ranges
from ream_stream.cli.report.maps import heat_map, layer_map, merges
from ream_stream.cli.report.page import page as page_of
from ream_stream.compression.event_log import read_events
from ream_stream.compression.workspace import Workspace

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Give a folder with an output of two domains, and its evaluation and comparison."""
    folder = tmp_path_factory.mktemp("report")
    for name in ("code", "math"):
        (folder / f"{name}.txt").write_text(f"Some words of {name}: 1 + 1 = 2.\n" * 60)
    size = ["--sequences", "6", "--sequence-length", "32", "--threads", "1"]
    parts = [w for n in ("code", "math") for w in ("--calibration", f"{n}={folder / n}.txt")]
    words = ["compress", str(CHECKPOINT), str(folder / "out"), "--experts", "24", *parts, *size]
    assert main([*words, "--method", "ream", "--group-size", "4"]) == 0
    (folder / "eval.json").write_text(json.dumps(EVALUATION))
    (folder / "comparison.json").write_text(json.dumps(COMPARISON))
    (folder / "sweep.json").write_text(json.dumps(SWEEP))
    return folder


MEAN = {"value": 0.25, "stderr": None}
EVALUATION = {
    "perplexity": 12.5,
    "predicted": 90,
    "accuracy": MEAN,
    "against": {"perplexity": 11.0},
    "difference": {"nats": 0.125, "stderr": 0.001},
    "divergence": MEAN,
    "agreement": {"value": 0.875, "stderr": 0.01},
    "layers": [{"own": 0.1, "inside": 0.2, "total": 0.3}] * 4,
}
SCORES = {
    "perplexity": [12.0, 0.5],
    "nats more": [0.5, 0],
    "divergence": None,
    "same top": [1, 0],
}
POINTS = [
    {"name": "<b>", "mix": "", "experts": n, "output_bytes": n * 10**9, "nats more": [0.5, 0]}
    for n in (16, 24)
]
COMPARISON = {
    "kind": "comparison",
    "summary": [{"name": "<b>", "scores": {"all": SCORES}}],
    "curve": {"points": POINTS, "recommended": 0, "rule": "a rule"},
}
SWEEP = {
    "kind": "sweep",
    "axes": ["general", "code"],
    "original": [60.0, 50.0],
    "points": [
        {"name": "ream", "mix": "a", "point": [50.0, 40.0], "on front": True},
        {"name": "ream", "mix": "b", "point": [40.0, 45.0], "on front": True},
    ],
    "hypervolume": {"ream": 17.0},
}


def words_of(folder):
    results = [
        w
        for name in ("eval", "comparison", "sweep")
        for w in ("--results", f"{folder}/{name}.json")
    ]
    return ["report", str(folder / "out"), *results, "--html", str(folder / "page.html")]


@pytest.fixture(scope="module")
def page(made):
    assert main(words_of(made)) == 0
    return (made / "page.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Gathers what a page refers to, and checks that its tags are closed."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.links += [v for k, v in attributes if k in {"src", "href", "srcset", "data"}]
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.links += [v for k, v in attributes if k in {"src", "href"}]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(page):
    reader = Reader()
    reader.feed(page)
    return reader


def test_the_page_refers_to_nothing_outside_itself(page):
    reader = read(page)
    assert reader.open == []
    assert reader.links
    assert all(link.startswith("data:image/png;base64,") for link in reader.links)
    assert set(re.findall(r"https?://[^\s\"<]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<script|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_the_page_tells_what_is_known(made, page):
    text = " ".join(read(page).text)
    manifest = json.loads((made / "out/ream_stream.json").read_text())
    for layer in manifest["layers"]:
        for group in layer["groups"]:
            if len(group) > 1:
                assert f"{group[0]} took in {', '.join(map(str, group[1:]))}" in text
    for words in (
        "87.5%",
        "12.500",
        "17.00",
        "On code alone",
        "16 experts by <b>; a rule",
        "alignment gain",
        "code, math",
    ):
        assert words in text
    # names are text, whatever is in them
    assert "<b>" in text
    assert "&lt;b&gt;" in page


def test_the_page_tells_what_refitting_came_to(checkpoints, tmp_path):
    source = checkpoints("qwen3_moe", torch.float32)
    wanted = settings(grouping="none", refit="down")
    done = tiny_runs.run(source, tmp_path / "out", wanted, some_tokens(20, 24))
    assert main(["report", str(done.output), "--html", str(tmp_path / "report.html")]) == 0
    text = " ".join(read((tmp_path / "report.html").read_text(encoding="utf-8")).text)
    for layer in done.manifest["layers"]:
        assert layer["refitted"]["penalty"] is not None
        assert f"{layer['refitted']['error_before']:.2%}" in text
        assert f"{layer['refitted']['remaining_error']:.0%}" in text


def test_the_numbers_are_those_of_the_output_and_its_log(made, capsys):
    assert main([*words_of(made), "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    manifest = json.loads((made / "out/ream_stream.json").read_text())
    assert [layer["saliency"] for layer in known["layers"]] == [
        layer["saliency"] for layer in manifest["layers"]
    ]
    first = known["layers"][0]
    assert first["domains"].keys() == {"code", "math"}
    assert sum(first["routed"]) == 6 * 32 * 4  # tokens times top-k
    assert first["domain_correlation"].keys() == {"code, math"}
    absorbed = {e for group in first["groups"] for e in group[1:]}
    assert {each["expert"] for each in first["aligned"]} == absorbed
    assert all(each["least"] < each["kept"] for each in first["aligned"])
    assert [row[n] for n, row in enumerate(first["similarity"])] == [1.0] * 32
    assert known["plan"]["memory_bytes"] > known["run"]["peak_anonymous_bytes"] > 0
    assert known["run"]["starts"] == 1
    assert known["sizes"]["output_bytes"] == sum(
        path.stat().st_size for path in (made / "out").glob("*.safetensors")
    ) - sum(header(path) for path in (made / "out").glob("*.safetensors"))
    assert known["evaluation"] == EVALUATION


def header(path):
    """Return the bytes of a safetensors file before its data."""
    with path.open("rb") as file:
        return 8 + struct.unpack("<Q", file.read(8))[0]


def test_without_its_work_folder_an_output_is_still_told(made, tmp_path):
    shutil.copytree(
        made / "out", tmp_path / "out", ignore=shutil.ignore_patterns(".ream-stream")
    )
    assert main(["report", str(tmp_path / "out"), "--html", str(tmp_path / "a.html")]) == 0
    text = " ".join(read((tmp_path / "a.html").read_text()).text)
    assert "the work folder has no log" in text
    assert "Similarity of experts" not in text


def test_a_file_that_is_no_result_and_a_folder_that_is_no_output_are_refused(made, tmp_path):
    other = tmp_path / "other.json"
    other.write_text("{}")
    words = ["report", str(made / "out"), "--html", str(tmp_path / "a.html")]
    assert main([*words, "--results", str(other)]) == 2
    assert main(["report", str(tmp_path), "--html", str(tmp_path / "a.html")]) == 3
    assert not (tmp_path / "a.html").exists()


ODD = [
    "3", "null", "[]", '"text"', "{}", "\0\0\0", "\xff\xfe", 2000 * "[",
    '{"event": 3, "time": "t"}',
    '{"event": "layer done", "time": "t"}', '{"event": "finished", "time": "t", "seconds": 3}',
    '{"event": "layer done", "time": "t", "layer": "x", "seconds": {}, "read_bytes": 0, '
    '"peak_anonymous_bytes": 0, "written_bytes": 0}',
    '{"event": "step", "time": "t", "anonymous_bytes": NaN}',
    '{"event": "step", "time": "t", "left_seconds": 1e999}',
    '{"event": "step", "time": 5}', '{"event": "command", "time": "t", "command": 3}',
    '{"event": "step", "time": "t", "anonymous_bytes": ' + 400 * "9" + "}",
    '{"event": "step", "time": "t", "time": "u"}', 10_000_000 * "x",
]  # fmt: skip


def test_odd_lines_of_a_log_are_passed_over(made, tmp_path, capsys):
    workspace = Workspace(output=made / "out", work=made / "out/.ream-stream")
    before = workspace.log.read_bytes()
    events = list(read_events(workspace.log))
    try:
        odd = "\n".join(ODD).encode("latin-1")
        workspace.log.write_bytes(odd + b"\n" + before + odd)
        assert list(read_events(workspace.log)) == events
        assert main(["status", str(made / "out")]) == 0
        html = tmp_path / "a.html"
        assert main(["report", str(made / "out"), "--html", str(html)]) == 0
    finally:
        workspace.log.write_bytes(before)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "3", '{"perplexity": "x"}', '{"perplexity": 3, "accuracy": []}',
        '{"kind": "comparison"}', '{"kind": "comparison", "summary": []}',
        '{"kind": "sweep", "points": 3}', '{"kind": "comparison", "summary": [3]}',
        '{"kind": ["sweep"]}', 2000 * "[",
    ],
)  # fmt: skip
def test_results_that_are_none_are_one_sentence(made, tmp_path, capsys, text):
    results = tmp_path / "results.json"
    results.write_text(text, encoding="utf-8")
    words = ["report", str(made / "out"), "--html", str(tmp_path / "a.html")]
    assert main([*words, "--results", str(results)]) in {2, 3}
    said = capsys.readouterr().err
    assert said.startswith(f"error: {results}")
    assert said.count("\n") == 1
    assert not (tmp_path / "a.html").exists()


def test_times_of_a_run_that_was_cut_are_added_up(made):
    workspace = Workspace(output=made / "out", work=made / "out/.ream-stream")
    lines = workspace.log.read_text().splitlines()
    events = list(read_events(workspace.log))
    log = made / "log.jsonl"
    log.write_text("\n".join([*lines, lines[-1][:20], "[]"]))
    assert list(read_events(log)) == events
    run = gather(workspace, [])["run"]
    done = [each for each in events if each["event"] == "layer done"]
    observed = sum(each["seconds"]["observe"] for each in done)
    assert run["seconds_by_phase"]["observe"] == pytest.approx(observed)


def test_a_heat_map_is_an_image_whose_opacity_is_the_value():
    # a filter byte before each row; 31 is the highest level, and what is beyond it
    assert cells_of(heat_map(np.array([[0.0, 1.0], [0.5, 2.0]]), "cells")) == [
        0,
        0,
        31,
        0,
        16,
        31,
    ]
    # of many experts neighbors are one cell
    many = np.kron(np.array([[0.0, 1.0], [1.0, 0.0]]), np.ones((200, 200)))
    assert len(cells_of(heat_map(many, "cells"))) == 100 * 101


def cells_of(picture):
    """Return the bytes of the rows of a picture's image."""
    png = base64.b64decode(picture.partition("base64,")[2].partition('"')[0])
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    start = png.index(b"IDAT")
    size = struct.unpack(">I", png[start - 4 : start])[0]
    return list(zlib.decompress(png[start + 4 : start + 4 + size]))


def test_a_map_of_layers_has_a_row_a_layer_a_second_color_and_says_what_is_pointed_at():
    cells, second = (
        np.array([[0.0, 1.0], [1.0, 1.0]]),
        np.array([[False, True], [False, False]]),
    )
    drawn = layer_map(cells, "t", layers=[3, 9], second=second, said=["one", "<two>"])
    assert cells_of(drawn) == [0, 0, 31 + 32, 0, 31, 31]
    assert "<title>one</title>" in drawn
    assert "<title>&lt;two&gt;</title>" in drawn
    assert ">9</text>" in drawn
    assert ElementTree.fromstring(drawn).tag.endswith("svg")


def test_merges_are_an_arc_a_member_a_color_a_group_and_a_cross_for_the_dropped():
    drawn = merges([[1, 0, 3], [4, 2]], [5], 6)
    assert [title.partition("</title>")[0] for title in drawn.split("<title>")[1:]] == [
        "1 took in 0, 3", "4 took in 2", "5 was dropped",
    ]  # fmt: skip
    assert drawn.count("Q") == 3
    assert drawn.count("<circle") == 2
    ElementTree.fromstring(drawn)


def test_bars_and_ranges_say_their_numbers():
    drawn = bars([2.0, 1.0], "x", "y", marked={1}, said=["first", "a & b"])
    assert "<title>a &amp; b</title>" in drawn
    assert drawn.count('class="bar second"') == 1
    rows = [("code", -0.25, 0.1), ("a name that is much longer than its place", 0.5, None)]
    drawn = ranges(rows, "nats")
    assert "<title>code: -0.2500 +- 0.1000</title>" in drawn
    assert "…</text>" in drawn
    ElementTree.fromstring(drawn)


def large(layers, experts, kept):
    """Return the facts of an output that nobody has made."""
    drawn = np.random.default_rng(0)

    def layer(number):
        saliency = drawn.lognormal(size=experts).tolist()
        order = sorted(range(experts), key=lambda expert: -saliency[expert])
        groups = [[expert] for expert in order[:kept]]
        for place, expert in enumerate(order[kept:]):
            groups[place % kept].append(expert)
        return {
            "index": number, "saliency": saliency, "kept": sorted(order[:kept]),
            "kept_share": 0.5 + number / 1000, "groups": groups, "dropped": [], "domains": {},
            "domain_correlation": {}, "aligned": [], "seconds": None,
            "similarity": drawn.random((experts, experts)).astype("float32"),
            "routed": saliency,
            "refit": {"penalty": 1.0, "error_before": 0.02, "remaining_error": 0.1},
        }  # fmt: skip

    return {
        "output": "out", "source": "org/Model", "scanned": True, "plan": {}, "run": {},
        "verification": {
            "findings": [{"ok": False, "message": "a shard is gone", "is_note": False}]
        },
        "made": {
            "versions": {}, "settings": {"grouping": "ream", "saliency": "reap"},
            "experts_before": experts, "experts_after": kept, "command": None,
        },
        "sizes": {"output_bytes": 3, "source_bytes": 4, "files": 1},
        "layers": [layer(number) for number in range(layers)],
        "evaluation": None, "comparison": None, "sweep": None,
    }  # fmt: skip


def test_what_was_measured_goes_into_the_model_card_if_it_is_asked_for(made, tmp_path, capsys):
    output = shutil.copytree(made / "out", tmp_path / "out")
    words = ["report", str(output), "--html", str(tmp_path / "a.html"), "--card"]
    assert main(words) == 2
    assert "--card: nothing was measured" in capsys.readouterr().err
    assert main([*words, "--results", str(made / "eval.json")]) == 0
    text = (output / "README.md").read_text()
    assert "| all | 90 | 12.500 | 11.000 | +0.1250 | 87.5% |" in text
    assert main(["verify", str(output)]) == 0
    (output / "README.md").write_text("mine")
    assert main([*words, "--results", str(made / "eval.json")]) == 2
    assert (output / "README.md").read_text() == "mine"


def test_hundreds_of_layers_stay_a_page_that_a_browser_opens():
    page = page_of(large(240, 512, 384))
    reader = read(page)
    assert len(page) < 2_000_000
    assert reader.open == []
    told = " ".join(" ".join(reader.text).split())
    assert "org/Model: 512 to 384 experts a layer" in told
    assert "Not whole: 1 of 1 findings are bad. a shard is gone" in told
    assert re.search(r"The \d+ of 240 layers that kept the least of their saliency", told)
    # all of them are in maps and table, the worst have pictures of their own
    assert "layer 240: 384 of 512 stay" in page
    assert told.count("Layer 1: 512 to 384") == 1
    assert "Layer 240: 512" not in told


def test_a_verdict_comes_first_of_what_verify_and_eval_found(made, page, tmp_path, capsys):
    text = " ".join(" ".join(read(page).text).split())
    assert "tiny-moe: 32 to 24 experts a layer" in text.partition("Quality")[0]
    assert "Headers and documents only" in text.partition("Quality")[0]
    assert "Perplexity 11.00 to 12.50 (+13.6%), 0.1250 nats a token more" in text
    capsys.readouterr()
    assert main(["verify", str(made / "out"), "--json"]) == 0
    (tmp_path / "verify.json").write_text(capsys.readouterr().out)
    html = tmp_path / "a.html"
    words = ["report", str(made / "out"), "--results", str(tmp_path / "verify.json")]
    assert main([*words, "--html", str(html)]) == 0
    told = html.read_text()
    assert "Whole and consistent, by " in told
    assert "Headers and documents only" not in told
    assert "Quality is not measured here" in told


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [1440, 390])
@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_a_browser_shows_the_page_without_scrolling_sideways(made, page, width, scheme):
    """In a frame: a window of chromium is never narrower than 500 pixels."""
    probe = made / f"probe-{width}-{scheme}.html"
    probe.write_text(
        f'<body style="margin:0"><iframe src="page.html" style="border:0;width:{width}px;'
        'height:3000px"></iframe>'
    )
    shot = probe.with_suffix(".png")
    done = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            f"--blink-settings=preferredColorScheme={scheme}",
            *("--window-size=1440,3000", f"--screenshot={shot}"),
            probe.as_uri(),
        ],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert shot.is_file(), done.stderr.decode()
    levels, across, down = grays(shot)
    assert (across, down) == (1440, 3000)
    paper = levels[10][width - 4]
    assert paper < 60 if scheme == 0 else paper > 200
    ink = sum(abs(level - paper) > 80 for row in levels for level in row[: width - 16])
    assert ink > 20_000
    # nothing reaches into the margin on the right
    assert all(abs(row[width - 8] - paper) < 40 for row in levels)


def grays(path):
    """Return the rows of a PNG of chromium as the green of each pixel, and its size."""
    data = path.read_bytes()
    place, body = 8, b""
    while place < len(data):
        size = struct.unpack(">I", data[place : place + 4])[0]
        kind, chunk = data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        if kind == b"IHDR":
            across, down, depth, color = struct.unpack(">IIBB", chunk[:10])
            assert (depth, color in {2, 6}) == (8, True)
            pixel = 3 if color == 2 else 4
        body += chunk if kind == b"IDAT" else b""
        place += 12 + size
    raw, stride = zlib.decompress(body), across * pixel
    rows, last = [], bytes(stride)
    for number in range(down):
        start = number * (stride + 1)
        last = unfilter(raw[start], raw[start + 1 : start + 1 + stride], last, pixel)
        rows.append(last[1::pixel])
    return rows, across, down


def unfilter(kind, row, above, pixel):
    """Undo a row's filter (PNG, section 9)."""
    out = bytearray(row)
    for n in range(len(out)):
        left = out[n - pixel] if n >= pixel else 0
        corner = above[n - pixel] if n >= pixel else 0
        if kind == 1:
            out[n] = (out[n] + left) & 255
        elif kind == 2:
            out[n] = (out[n] + above[n]) & 255
        elif kind == 3:
            out[n] = (out[n] + (left + above[n]) // 2) & 255
        elif kind == 4:
            guess = left + above[n] - corner
            near = min((left, above[n], corner), key=lambda v: abs(guess - v))
            out[n] = (out[n] + near) & 255
    return bytes(out)
