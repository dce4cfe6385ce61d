"""The files around the package agree with each other and with what they name."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from hypothesis.internal.conjecture.providers import HypothesisProvider
from packaging.requirements import Requirement

import ream_stream
from ream_stream.untrusted import parse_yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

TOP_LEVEL = {
    ".ci",
    ".dockerignore",
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Dockerfile",
    "LICENSE",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "benchmarks",
    "compose.yaml",
    "constraints.txt",
    "docs",
    "pyproject.toml",
    "ream_stream",
    "tests",
    "tools",
}
FACES = ("README.md", "CONTRIBUTING.md")
OTHERS = ("SECURITY.md",)
DOCS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
PAGES = (*FACES, *OTHERS, *DOCS)


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tracked():
    """Return what git knows: a checkout also holds caches and things being written."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, check=True)
    return listed.stdout.decode().splitlines()


def make_targets():
    return set(re.findall(r"^([a-z-]+):(?!=)", text("Makefile"), re.MULTILINE))


def code_of(page):
    """Return what stands in backticks and in fenced blocks of a page of Markdown."""
    content = text(page)
    fenced = re.findall(r"^```\w*\n(.*?)^```", content, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`]+)`", re.sub(r"(?ms)^```.*?^```", "", content))
    return [line for block in [*fenced, *inline] for line in block.splitlines()]


def test_the_top_level_is_exactly_what_it_should_be(tracked):
    assert {name.partition("/")[0] for name in tracked} == TOP_LEVEL


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text(page))
    home = (ROOT / page).parent
    assert [link for link in links if not (home / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_path_a_page_names_exists(page):
    words = [word for line in code_of(page) for word in line.split()]
    folders = tuple(f"{name}/" for name in TOP_LEVEL if (ROOT / name).is_dir())
    paths = [word for word in words if word.startswith(folders) or word in TOP_LEVEL]
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", [*PAGES, ".ci/run"])
def test_every_make_target_a_page_names_exists(page):
    lines = code_of(page) if page.endswith(".md") else text(page).splitlines()
    # options (a dash) and variables (capitals) are not targets
    named = {
        word
        for line in lines
        if (found := re.search(r"^(?:within )?make( [a-z].*)?$", line.strip()))
        for word in (found[1] or "").split()
        if re.fullmatch(r"[a-z][a-z-]*", word)
    }
    assert named or page in (*OTHERS, *DOCS)
    assert named <= make_targets()


def test_every_make_target_says_what_it_does():
    described = set(re.findall(r"^([a-z-]+):[^=\n]*## \w", text("Makefile"), re.MULTILINE))
    assert described == make_targets()
    phony = re.search(r"^\.PHONY: (.*)$", text("Makefile"), re.MULTILINE)[1]
    assert set(phony.split()) == described


def test_every_file_the_image_is_built_from_exists_and_is_sent_to_the_builder():
    copies = re.findall(r"^COPY (.+) \S+$", text("Dockerfile"), re.MULTILINE)
    sources = {source for line in copies for source in line.split()}
    sent = {line[1:] for line in text(".dockerignore").splitlines() if line.startswith("!")}
    assert sources == sent
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_the_image_runs_the_command_itself_as_a_user_with_a_fixed_number():
    lines = text("Dockerfile").splitlines()
    (script,) = PROJECT["project"]["scripts"]
    # in the shell form, signals would go to a shell
    assert f'ENTRYPOINT ["{script}"]' in lines
    assert any(re.fullmatch(r"USER [1-9]\d*", line) for line in lines)


def test_the_image_keeps_the_rules_that_need_no_engine_to_check():
    lines = [line for line in text("Dockerfile").splitlines() if line and line[0] != "#"]
    instructions = [line.split()[0] for line in lines if not line.startswith(" ")]
    # the base has a version, nothing is fetched by ADD, one process is the command itself
    (base,) = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert re.fullmatch(r"[a-z/]+:\d+\.\d+[\w.-]*", base)
    assert "ADD" not in instructions
    for name in ("ENTRYPOINT", "CMD", "USER", "WORKDIR", "STOPSIGNAL"):
        assert instructions.count(name) == 1, name
    for name in ("ENTRYPOINT", "CMD"):
        (line,) = [line for line in lines if line.startswith(name)]
        assert line.removeprefix(name).strip().startswith("["), "signals would go to a shell"
    assert "STOPSIGNAL SIGTERM" in lines
    # what is installed is not run as root, and no secret is built in
    assert instructions.index("USER") > max(
        number for number, name in enumerate(instructions) if name == "RUN"
    )
    assert not re.search(r"(?i)(token|password|secret)\s*=", "\n".join(lines))
    # a read-only root file system: all that is written goes to volumes or HOME in one
    (volumes,) = [line for line in lines if line.startswith("VOLUME")]
    assert {"/model", "/out", "/work"} <= set(re.findall(r'"([^"]+)"', volumes))
    assert "HOME=/work" in text("Dockerfile")
    assert all("--no-cache-dir" in line for line in lines if "pip install" in line)


def test_the_services_of_compose_are_built_and_run_as_the_image_is_made():
    compose = parse_yaml(text("compose.yaml"))
    dockerfile = text("Dockerfile")
    arguments = set(re.findall(r"^ARG (\w+)", dockerfile, re.MULTILINE))
    volumes = set(re.findall(r'"(/\w+)"', re.search(r"^VOLUME.*$", dockerfile, re.M)[0]))
    assert set(compose["services"]) == {"ream-stream", "gpu", "gpus"}
    for service in compose["services"].values():
        assert service["build"]["context"] == "."
        assert set(service["build"]["args"]) == arguments
        mounted = {volume.rsplit(":", 1)[0] if volume.endswith(":ro") else volume
                   for volume in service["volumes"]}  # fmt: skip
        assert volumes <= {each.rpartition(":")[2] for each in mounted}
        assert service["user"].startswith("${")
    for name, count in (("gpu", 1), ("gpus", "all")):
        gpu = compose["services"][name]
        assert gpu["build"]["args"]["PIP_EXTRA_INDEX_URL"] == ""
        (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
        assert device["count"] == str(count)
    assert compose["services"]["gpus"]["entrypoint"][-2:] == ["-m", "ream_stream"]


def test_the_script_of_ci_can_be_run():
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111 == 0o111


def requirement_key(requirement):
    return requirement.name.lower().replace("_", "-")


def test_the_pins_are_within_the_ranges_of_the_project():
    lines = text("constraints.txt").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    version = {requirement_key(pin): str(pin.specifier).removeprefix("==") for pin in pins}
    needed = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
    assert {requirement_key(need) for need in needed} <= set(version)
    outside = [need for need in needed if version[requirement_key(need)] not in need.specifier]
    assert outside == []


def test_development_tools_are_pinned():
    extra = PROJECT["project"]["optional-dependencies"]["dev"]
    assert [line for line in extra if "==" not in line] == []


def test_the_version_is_the_same_everywhere():
    assert ream_stream.__version__ == PROJECT["project"]["version"]
    assert f"\n## {ream_stream.__version__}" in text("CHANGELOG.md")


PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "torch.load", "allow_pickle"}


def names_in(node):
    """Return the names a node of a syntax tree imports, reaches or passes."""
    match node:
        case ast.Import():
            return {alias.name for alias in node.names}
        case ast.ImportFrom():
            return {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        case ast.Attribute():
            return {ast.unparse(node)}
        case ast.keyword():
            return {node.arg}
    return set()


def test_nothing_of_the_package_reads_pickles():
    for path in sorted((ROOT / "ream_stream").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not names_in(node) & PICKLES, f"{path}:{node.lineno}"


def test_only_the_demo_checkpoint_has_large_files(tracked):
    shipped = "ream_stream/cli/demo/tiny-moe/"
    large = [name for name in tracked if (ROOT / name).stat().st_size > 1_000_000]
    assert [name for name in large if not name.startswith(shipped)] == []


def test_every_data_file_of_the_package_is_packaged(tracked):
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["ream_stream"]
    package = ROOT / "ream_stream"
    packaged = {path for pattern in patterns for path in package.glob(pattern)}
    data = [ROOT / name for name in tracked if name.startswith("ream_stream/")]
    assert [path for path in data if path.suffix != ".py" and path not in packaged] == []


def test_inputs_drawn_do_not_depend_on_the_modules_imported_so_far():
    assert list(HypothesisProvider(None)._local_constants) == []


def test_modules_and_functions_stay_small_and_the_package_has_few_of_them_at_its_top():
    package = ROOT / "ream_stream"
    large = []
    for path in sorted(package.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if source.count("\n") > 400:
            large.append(path.name)
        functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
        large += [f"{path.name}: {f.name}" for f in functions if f.end_lineno - f.lineno >= 60]
    assert large == []
    assert len(list(package.glob("*.py"))) <= 10
    assert len(list(package.glob("*/__init__.py"))) <= 8
