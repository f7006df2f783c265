"""What the documents quote is what the code says."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from megatron_exact.lineage import configuration_page
from megatron_exact.training.flags_page import flags_page

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/README.md"))]
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


def commands(page: Path) -> list[list[str]]:
    """Words of the commands in a page's blocks of code, continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"\s*(python|torchrun) ", line)]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_an_option_that_no_tool_has_is_noticed() -> None:
    assert has_option(ROOT / "tools" / "compare_runs.py", "--trained-lengths")
    assert has_option(ROOT / "tools" / "compare_runs.py", "--baseline")
    assert not any(has_option(tool, "--nonsense") for tool in (ROOT / "tools").glob("*.py"))
