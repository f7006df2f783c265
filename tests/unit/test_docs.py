"""What the documents quote is what the code says."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import shlex
import shutil
import subprocess
import unicodedata
from pathlib import Path

import pytest
import yaml

import megatron_exact
from megatron_exact import cli
from megatron_exact.cli import VERBS
from megatron_exact.data.indexed import HEADER
from megatron_exact.exposure import bucket_lower_bounds, exact_weights
from megatron_exact.lineage import configuration_page
from megatron_exact.training.flags_page import flags_page

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "docker" / "README.md",  # by name: demos write such pages into the checkout, too
    *sorted((ROOT / "examples").glob("**/README.md")),
]
PASSES_ON = {"preflight", "rehearse", "check_document_masking", "run_stages"}  # to the training entry


def test_the_page_of_flags_is_up_to_date() -> None:
    assert (ROOT / "docs" / "flags.md").read_text() == flags_page()


def test_the_page_of_the_command_line_is_up_to_date() -> None:
    assert (ROOT / "docs" / "cli.md").read_text() == cli.page()


def test_the_page_of_the_configuration_is_up_to_date() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == configuration_page()


def test_every_message_of_the_troubleshooting_page_is_one_of_ours() -> None:
    sources = [*(ROOT / "megatron_exact").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    spoken = [
        node.value
        for path in sources
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    spoken += [path.read_text() for path in (ROOT / "examples" / "slurm").iterdir()]
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)`", page, flags=re.MULTILINE)
    assert len(messages) > 10
    for message in messages:
        assert any(message in text for text in spoken), message


BLOCK = re.compile(r"^```\w*\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"\s*([A-Z_]+=\S+ )*(python|torchrun|sbatch|hf|megatron-exact) ")


def commands(page: Path) -> list[list[str]]:
    """Words of the commands in a page's blocks of code, continued lines joined."""
    return [words for words, _ in placed_commands(page.read_text())]


def placed_commands(text: str) -> list[tuple[list[str], str]]:
    """Words of each command of a page, with the page's text before its block."""
    found = []
    arrays: dict[str, str] = {}
    for block in BLOCK.finditer(text):
        code = block[1].replace("\\\n", " ")
        arrays |= dict(re.findall(r"^(\w+)=\(([^)]*)\)", code, flags=re.MULTILINE))
        for line in code.splitlines():
            for name, content in arrays.items():
                line = line.replace(f'"${{{name}[@]}}"', " ".join(content.split()))
            if COMMAND.match(line):
                found.append((shlex.split(line, comments=True), text[: block.start()]))
    return found


TOOLS = {verb.tool: verb for verb in VERBS.values()}


def has_option(tool: Path, option: str) -> bool:
    """Whether a tool has an option: its parser, else its text, whole or one of several (`--{side}-x`)."""
    if tool.stem in TOOLS:
        return option in options_of(tool.stem)
    names = re.findall(r'"((?:--)?[a-z{][a-z{}-]*)"', tool.read_text())
    patterns = [re.sub(r"\{\w+\}", "[a-z]+", name.removeprefix("--")) for name in names]
    return any(
        pattern != "[a-z]+" and re.fullmatch(pattern, option.removeprefix("--")) for pattern in patterns
    )


@functools.cache
def options_of(tool: str) -> frozenset[str]:
    """Options of the parser that a tool shares with its verb."""
    actions = TOOLS[tool].parser(tool)._actions
    return frozenset(spelling for action in actions for spelling in action.option_strings)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_verbs_and_options_that_exist(page: Path) -> None:
    for words in commands(page):
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words[0] != "megatron-exact" or words[1].startswith("--"):
            continue
        verb = VERBS[words[1]]
        if verb.tool is None or verb.tool in PASSES_ON or verb.name == "fine-tune":
            continue
        for option in words[2:]:
            if option.startswith("--"):
                assert option.split("=")[0] in options_of(verb.tool), f"{verb.name} has no {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_tools_and_options_that_exist(page: Path) -> None:
    for words in commands(page):
        for position, word in enumerate(words):
            if not re.fullmatch(r"(tools|benchmarks)/\w+\.py", word):
                continue
            tool = ROOT / word
            assert tool.is_file(), word
            if tool.stem in PASSES_ON:
                continue
            for option in words[position + 1 :]:
                if option.startswith("--"):
                    assert has_option(tool, option.split("=")[0]), f"{word} has no {option}"


GENERATED = {"cli.md", "configuration.md", "flags.md"}
READS = {
    *("--input", "--tokenizer", "--source", "--verify", "--pack", "--hf", "--checkpoint", "--load"),
    *("--pretrained-checkpoint", "--start", "--model", "--items", "--filler", "--nolima-data", "--arm"),
    *("--baseline", "--treatment", "--comparison", "--confidence-scores"),
}
WRITES = {"--output", "--output-prefix", "--save", "--plot", "--local-dir"}
READS_ITS_FIRST_WORD = {"tools/inspect_pack.py"}


def paths_of(words: list[str], options: set[str]) -> list[str]:
    """Values of some options of a command, without the labels and weights before paths."""
    found = []
    for position, word in enumerate(words):
        if word in options:
            for value in words[position + 1 :]:
                if value.startswith("-"):
                    break
                found.append(re.sub(r"^(\w+=|[\d.]+:)", "", value))
        elif word in READS_ITS_FIRST_WORD and options is READS:
            found += [value for value in words[position + 1 : position + 2] if not value.startswith("-")]
    return found


def unexplained_paths(text: str) -> list[str]:
    """Paths that commands of a page read although nothing made them and no sentence before names them."""
    made: list[Path] = []
    missing = []
    for words, before in placed_commands(text):
        made += map(Path, paths_of(words, WRITES))  # --load of a run's own folder is what resumes it
        for name in paths_of(words, READS):
            path = Path(name)
            known = any(path == other or path.is_relative_to(other) for other in made)
            prose = BLOCK.sub("", before)
            if not (
                known or (ROOT / path).exists() or f"`{name}`" in prose or name.isupper() or name == "..."
            ):
                missing.append(name)
    return missing


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name not in GENERATED],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_commands_read_what_the_page_made_or_names(page: Path) -> None:
    assert unexplained_paths(page.read_text()) == []


def test_a_path_that_nothing_makes_is_noticed() -> None:
    step = "```\ntorchrun train.py --pack packs/a --load runs/a --save runs/a\n```\n"
    assert unexplained_paths(step) == ["packs/a"]
    assert unexplained_paths("Given `packs/a`:\n" + step) == []
    made = "```\npython tools/pack_corpus.py --source 2:README.md --output packs/a\n```\n"
    assert unexplained_paths(made + step) == []
    assert unexplained_paths(step + made) == ["packs/a"]


OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
OF_OTHERS = {
    *("--local-dir", "--exclude"),  # hf download
    *(
        "--build-arg",
        "--file",
        "--gpus",
        "--ipc",
        "--rm",
        "--tag",
        "--ulimit",
        "--user",
        "--volume",
    ),  # docker
    "--strict",  # mypy
    "--echo-word",  # of the suite that docs/extending.md shows
}


@functools.cache
def known_options() -> frozenset[str]:
    """All options that the sources spell out; Megatron's stand in docs/flags.md."""
    sources = [*(ROOT / "megatron_exact").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    sources += [
        *(ROOT / "benchmarks").glob("*.py"),
        *(ROOT / "examples").rglob("*.py"),
        *(ROOT / "examples").rglob("*.s[hb]*"),
    ]
    sources.append(ROOT / "docs" / "flags.md")
    found = {option for path in sources for option in OPTION.findall(path.read_text())}
    return frozenset(found | OF_OTHERS)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name not in GENERATED],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_options_that_a_page_names_exist(page: Path) -> None:
    assert set(OPTION.findall(page.read_text())) - known_options() == set()


def test_git_ignores_what_the_commands_of_the_pages_write(tmp_path: Path) -> None:
    written = {
        name
        for page in PAGES
        if page.name not in GENERATED
        for words, _ in placed_commands(page.read_text())
        for name in paths_of(words, WRITES)
        if not (name.startswith("/") or name.isupper())
    }
    assert {"tokens/corpus", "packs/long", "runs/exact", "exposure.png", "report"} <= written
    sources = [path.relative_to(ROOT) for path in sorted((ROOT / "megatron_exact").rglob("*.py"))]
    sources += [path.relative_to(ROOT) for path in sorted((ROOT / "examples").rglob("*.py"))]
    sources += [Path("docs/miniature/margin.png"), Path("tests/unit/report/x.py"), Path("README.md")]
    shutil.copy(ROOT / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)

    def ignored(paths: list[str]) -> list[str]:
        found = subprocess.run(
            ["git", "check-ignore", "--stdin"],
            cwd=tmp_path,
            input="\n".join(paths),
            stdout=subprocess.PIPE,
            text=True,
        )
        return found.stdout.splitlines()

    made = [name if name.endswith(".png") else f"{name}/x" for name in sorted(written)]
    assert ignored(made) == made, "add what is missing to .gitignore, anchored"
    assert ignored([str(path) for path in sources]) == []


IN_TEXT = re.compile(r"`(python tools/[^`]+)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_inside_a_sentence_or_a_table_exist(page: Path) -> None:
    for command in IN_TEXT.findall(BLOCK.sub("", page.read_text())):
        name, *words = shlex.split(command)[1:]
        assert (ROOT / name).is_file(), name
        for word in words:
            if word.startswith("--") and Path(name).stem not in PASSES_ON:
                assert has_option(ROOT / name, word.split("=")[0]), f"{name} has no {word}"


# --------------------------------------------------------------------------------------------------
# The site, without MkDocs: its pages, links, anchors and the names of its Python API.


def outside_pages() -> dict[str, str]:
    """Pages of the site that live outside docs/, from the hooks that add them."""
    tree = ast.parse((ROOT / "docs" / "build_hooks.py").read_text())
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and [ast.unparse(name) for name in node.targets] == ["OUTSIDE"]
    )
    found: dict[str, str] = ast.literal_eval(table)
    return found


def nav_pages(entry: object) -> list[str]:
    """Pages of a part of the navigation, in its order."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    assert isinstance(parts, list | type({}.values()))
    return [page for part in parts for page in nav_pages(part)]


def test_every_page_is_in_the_navigation_once() -> None:
    configuration = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    inside = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(nav_pages(configuration["nav"])) == sorted([*inside, *outside_pages().values()])
    assert all((ROOT / source).is_file() for source in outside_pages())


HEADING = re.compile(r"^#{1,6} (.+?)\s*$", flags=re.MULTILINE)
API_NAME = re.compile(r"^::: ([\w.]+)$", flags=re.MULTILINE)
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)")


def slug(heading: str) -> str:
    """Anchor of a heading, as Python-Markdown and GitHub make it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_text).strip().lower())


def anchors(text: str) -> set[str]:
    """All anchors of a page."""
    code_free = BLOCK.sub("", text)
    return {slug(heading) for heading in HEADING.findall(code_free)} | set(API_NAME.findall(code_free))


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links of a page that lead nowhere: to no file, to no anchor, or out of the site."""
    broken = []
    for path, anchor in LINK.findall(re.sub(r"`[^`\n]*`", "", BLOCK.sub("", text))):
        target = (page.parent / path).resolve() if path else page
        in_site = target.is_relative_to(ROOT / "docs") or str(target.relative_to(ROOT)) in outside_pages()
        page_in_site = page.is_relative_to(ROOT / "docs") or str(page.relative_to(ROOT)) in outside_pages()
        if (
            not target.exists()
            or (page_in_site and not in_site)
            or (anchor and anchor not in anchors(text if target == page else target.read_text()))
        ):
            broken.append(f"{path}#{anchor}" if anchor else path)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text()) == []


def test_a_broken_link_is_noticed() -> None:
    page = ROOT / "docs" / "design.md"
    good = "[a](training.md#resume) [b](../README.md) [c](images/row.svg) "
    good += "[d](api.md#megatron_exact.data.rows.Row)"
    assert broken_links(page, f"# T\n{good} [e](#t) [f](https://example.org/nothing)\n") == []
    bad = "[a](nowhere.md) [b](training.md#nothing) [c](../Makefile) [d](#nothing) ![e](images/none.svg)"
    named = ["nowhere.md", "training.md#nothing", "../Makefile", "#nothing", "images/none.svg"]
    assert broken_links(page, bad) == named
    assert broken_links(page, f"`{bad}`\n```\n{bad}\n```\n") == []


def is_defined(name: str) -> bool:
    """Whether a dotted name of the package is a top-level name of a module, found without importing it."""
    module, _, attribute = name.rpartition(".")
    base = ROOT / module.replace(".", "/")
    source = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    if not source.is_file():
        return False
    names = set()
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return attribute in names


def test_the_python_api_names_what_exists() -> None:
    names = API_NAME.findall((ROOT / "docs" / "api.md").read_text())
    assert len(names) > 20
    assert [name for name in names if not is_defined(name)] == []
    assert not is_defined("megatron_exact.exposure.nothing")
    assert not is_defined("megatron_exact.nothing.exact_weights")


FILE = re.compile(r"`(?:pytest (?:-m slow )?)?([\w./-]+\.py)\b")
OF_MEGATRON = {"tools/preprocess_data.py"}


@functools.cache
def sources() -> frozenset[str]:
    """Python files of the repository."""
    folders = ("megatron_exact", "tools", "tests", "benchmarks", "examples", "docs", "docker")
    found = [path for name in folders for path in (ROOT / name).rglob("*.py")]
    return frozenset(f"/{path.relative_to(ROOT)}" for path in found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = set(FILE.findall(page.read_text())) - OF_MEGATRON
    exist = {name for name in named if any(path.endswith(f"/{name}") for path in sources())}
    exist |= {name for name in named if (page.parent / name).is_file()}
    assert named - exist == set()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == megatron_exact.__version__
    assert f"## {megatron_exact.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    title = citation["references"][0]["title"]
    assert title in (ROOT / "docs" / "citation.md").read_text()


def test_the_documentation_is_built_with_exact_versions() -> None:
    lines = (ROOT / "docs" / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert len(pins) > 10
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)


# --------------------------------------------------------------------------------------------------
# Numbers that pages repeat.


def test_the_exposure_of_the_tutorial_is_what_the_formula_gives() -> None:
    """Counts of the page give its weights and shares; the drawn row has the same."""
    page = (ROOT / "docs" / "tutorial.md").read_text()
    lines = re.findall(
        r"^(\d+)-\d+ (\*?) +([\d,]+) +([\d.]+)% +([\d.]+) +([\d.]+)%$", page, flags=re.MULTILINE
    )
    lower = [int(line[0]) for line in lines]
    counts = [int(line[2].replace(",", "")) for line in lines]
    assert lower == bucket_lower_bounds(512).tolist()
    assert [bool(line[1]) for line in lines] == [edge >= 128 for edge in lower]
    weights = exact_weights(counts, lower, tau=128)
    assert [line[4] for line in lines] == [f"{weight:.4f}" for weight in weights]
    mass = weights * counts
    assert [line[3] for line in lines] == [f"{100 * count / sum(counts):.2f}" for count in counts]
    assert [line[5] for line in lines] == [f"{100 * part / mass.sum():.2f}" for part in mass]
    specification = importlib.util.spec_from_file_location("draw_row", ROOT / "docs/images/draw_row.py")
    assert specification is not None
    assert specification.loader is not None
    draw_row = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(draw_row)
    assert list(draw_row.COUNTS) == counts
    picture = (ROOT / "docs" / "images" / "row.svg").read_text()
    drawn = sorted(set(draw_row.row_weights()[1].tolist()))
    assert len(drawn) == 3
    assert all(f">{weight:.3f}<" in picture for weight in drawn[1:])


def test_the_totals_of_the_formats_are_right() -> None:
    page = (ROOT / "docs" / "formats.md").read_text()
    documents = 5172
    index = HEADER.size + 12 * documents + 8 * (documents + 1)
    assert f"= {index:,}." in page
    arrays = 5 * 128 + 8 * (1101 + 1) + (2 + 8 + 8 + 4) * 4862
    assert f"= {arrays:,} bytes." in page


def test_an_option_that_no_tool_has_is_noticed() -> None:
    assert has_option(ROOT / "tools" / "compare_runs.py", "--trained-lengths")
    assert has_option(ROOT / "tools" / "compare_runs.py", "--baseline")
    assert not any(has_option(tool, "--nonsense") for tool in (ROOT / "tools").glob("*.py"))


def test_each_row_of_the_table_of_a_job_is_a_test_on_a_real_slurm() -> None:
    rows = re.findall(
        r"^\|.*\| `(test_\w+)` \|$", (ROOT / "docs" / "cluster.md").read_text(), flags=re.MULTILINE
    )
    source = ROOT / "tests" / "slurm" / "test_job_endings.py"
    tests = [
        node.name
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert len(rows) > 10
    assert sorted(rows) == sorted(tests)
