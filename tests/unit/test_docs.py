"""What the documents quote is what the code says."""

from __future__ import annotations

import ast
import functools
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_exact.lineage import configuration_page
from megatron_exact.training.flags_page import flags_page

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("*/README.md")),
    *sorted((ROOT / "examples").glob("**/README.md")),
]
PASSES_ON = {"preflight", "check_document_masking", "run_stages"}  # to the training entry


def test_the_page_of_flags_is_up_to_date() -> None:
    assert (ROOT / "docs" / "flags.md").read_text() == flags_page()


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
    spoken += [path.read_text() for path in (ROOT / "examples").rglob("*.sbatch")]
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)`", page, flags=re.MULTILINE)
    assert len(messages) > 10
    for message in messages:
        assert any(message in text for text in spoken), message


BLOCK = re.compile(r"^```\w*\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"\s*([A-Z_]+=\S+ )*(python|torchrun|sbatch|hf) ")


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


def has_option(tool: Path, option: str) -> bool:
    """Whether the text of a tool names an option, whole or one of several (`--{regime}-lengths`)."""
    names = re.findall(r'"((?:--)?[a-z{][a-z{}-]*)"', tool.read_text())
    patterns = [re.sub(r"\{\w+\}", "[a-z]+", name.removeprefix("--")) for name in names]
    return any(
        pattern != "[a-z]+" and re.fullmatch(pattern, option.removeprefix("--")) for pattern in patterns
    )


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
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
GENERATED = {"configuration.md", "flags.md"}
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
}


@functools.cache
def known_options() -> frozenset[str]:
    """All options that the sources spell out; Megatron's stand in docs/flags.md."""
    sources = [*(ROOT / "megatron_exact").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    sources += [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").rglob("*.s[hb]*")]
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
        for words, _ in placed_commands(page.read_text())
        for name in paths_of(words, WRITES)
        if not (name.startswith("/") or name.isupper())
    }
    assert {"tokens/corpus", "packs/long", "runs/exact", "exposure.png", "report"} <= written
    sources = [path.relative_to(ROOT) for path in sorted((ROOT / "megatron_exact").rglob("*.py"))]
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_an_option_that_no_tool_has_is_noticed() -> None:
    assert has_option(ROOT / "tools" / "compare_runs.py", "--trained-lengths")
    assert has_option(ROOT / "tools" / "compare_runs.py", "--baseline")
    assert not any(has_option(tool, "--nonsense") for tool in (ROOT / "tools").glob("*.py"))
