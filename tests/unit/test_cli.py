"""The console script: every verb answers at once, and says what to do when it is typed wrongly."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_exact import cli
from megatron_exact.cli import SUBJECTS, VERBS, Verb
from megatron_exact.exposure import TAU_ROW_FRACTION
from megatron_exact.exposure.confidence import ROW_FRACTION

ROOT = Path(__file__).parents[2]
OWN_TOOLS = {
    *(
        "run_demo",
        "run_real_demo",
        "run_evaluate_demo",
        "run_miniature",
        "run_miniature_demo",
        "train_miniature_base",
    ),
    "write_miniature_corpus",
}
"""Demos of a checkout: they are not verbs."""
PASSES_ON = {"check-masking", "fine-tune", "preflight", "rehearse", "stages", "train"}
"""Verbs that hand what they do not know to a job."""
HEAVY = ("torch", "megatron", "transformers", "tokenizers", "matplotlib", "pyarrow", "lm_eval", "datatrove")
BAD_ARGUMENTS = {
    "check-masking": ("--documents", "0"),
    "fine-tune": ("--nproc-per-node", "0"),
    "preflight": ("--world-size", "0"),
    "rehearse": ("--world-size", "0"),
    "stages": ("--nproc-per-node", "0"),
}
"""What a verb refuses by itself; the others do not know --no-such-option."""
ANSWERS = """
import contextlib, io, json, sys
from megatron_exact.cli import call
found = {}
for verb, *bad in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as helped:
        try:
            code = call([verb, "--help"])
        except SystemExit as end:
            code = end.code
    assert code == 0, (verb, code)
    assert helped.getvalue().startswith(f"usage: megatron-exact {verb} "), helped.getvalue()
    error = ""
    try:
        call([verb, *bad])
    except (ValueError, OSError) as raised:
        error = str(raised)
    found[verb] = [error, sorted({name.partition(".")[0] for name in sys.modules})]
print(json.dumps(found))
"""


def errors_and_modules(*questions: tuple[str, ...]) -> dict[str, tuple[str, set[str]]]:
    """By verb, its error on bad arguments, and the top-level modules once it has also been asked for help.

    One process answers all questions: what a verb imports is there for those after it, too.
    """
    command = [sys.executable, "-c", ANSWERS, json.dumps(questions)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    return {verb: (error, set(modules)) for verb, (error, modules) in answers.items()}


def test_help_and_bad_arguments_answer_without_torch() -> None:
    answers = errors_and_modules(
        *((verb, *BAD_ARGUMENTS.get(verb, ("--no-such-option",))) for verb in VERBS)
    )
    assert list(answers) == list(VERBS)
    for verb, (error, modules) in answers.items():
        assert error.count("\n") == 0, verb
        assert "--" in error, verb
        assert not modules & set(HEAVY), verb


def test_the_measurement_would_see_torch() -> None:
    """A checkpoint is looked at with torch: the same process, after an argument that is not bad."""
    answers = errors_and_modules(("verify-checkpoint", "--checkpoint", "nowhere"))
    assert "torch" in answers["verify-checkpoint"][1]


def test_helps_say_the_default_share_of_a_row() -> None:
    """It is typed there, since the modules of the constants import numpy."""
    assert TAU_ROW_FRACTION == ROW_FRACTION == 4
    for verb in ("stages", "score"):
        assert "(default: a quarter of the row" in " ".join(VERBS[verb].parser(verb).format_help().split())


def run(*words: str, module: str = "megatron_exact") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, cwd=ROOT)


def test_the_overview_names_every_verb_and_fits_a_terminal() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    listed = [line.split()[0] for line in lines if re.match(r"  [a-z]", line)]
    assert listed == list(VERBS)
    assert [line for line in lines if re.fullmatch("[a-z]+", line)] == [name.lower() for name in SUBJECTS]
    nothing = run()
    assert (nothing.returncode, nothing.stdout, nothing.stderr) == (2, "", done.stdout)


def test_the_version_names_what_a_bug_report_needs() -> None:
    done = run("--version")
    assert done.returncode == 0
    others = r"megatron-core 0\.19\.2, torch \S+, transformers \S+, Python 3\.\S+"
    assert re.fullmatch(rf"megatron-exact \d+\.\d+\.\d+ \({others}\)\n", done.stdout)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("pakc", "did you mean pack"),
        ("import", "did you mean import-hf?"),
        ("pack_corpus", "did you mean pack?"),
        ("run_stages.py", "did you mean stages?"),
        ("fine_tune", "did you mean fine-tune?"),
        ("zzz", "unknown verb 'zzz' (see megatron-exact --help)"),
        ("--pack", "comes before the verb"),
        ("\x1b[2K", "unknown verb '\\x1b[2K'"),
    ],
)
def test_an_unknown_verb_names_the_nearest(
    typed: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.call([typed]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


def test_an_error_names_what_was_typed() -> None:
    by_module, by_tool = (
        subprocess.run([sys.executable, *words, "--policy", "x"], capture_output=True, text=True, cwd=ROOT)
        for words in (("-m", "megatron_exact", "pack"), ("tools/pack_corpus.py",))
    )
    assert by_module.returncode == by_tool.returncode == 1
    assert by_module.stderr.endswith("(see python -m megatron_exact pack --help)\n")
    assert by_tool.stderr.endswith("(see pack_corpus.py --help)\n")
    assert by_module.stderr.partition(" (see ")[0] == by_tool.stderr.partition(" (see ")[0]


def test_every_tool_is_a_verb_in_a_few_lines() -> None:
    files = {path.stem: path for path in (ROOT / "tools").glob("*.py")}
    assert {verb.tool for verb in VERBS.values()} - {None} == set(files) - OWN_TOOLS
    for verb in VERBS.values():
        if verb.tool is not None:
            source = files[verb.tool].read_text()
            assert len(source.splitlines()) <= 10, verb.tool
            imports = [
                ast.unparse(node) for node in ast.parse(source).body if isinstance(node, ast.ImportFrom)
            ]
            assert imports == [
                "from megatron_exact.command_line import run_tool",
                f"from megatron_exact.commands.{verb.module} import {verb.function} as main",
            ]


def example_commands(verb: Verb) -> list[list[str]]:
    """Words of the commands of the verb's help, continued lines joined, whichever verb they call."""
    parser = verb.parser(f"megatron-exact {verb.name}")
    text = ((parser.epilog or "") % {"prog": parser.prog}).replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        command = re.match(r"  +(?:.*; do )?megatron-exact (.*?)(?: & done.*| {2,}[(#].*)?$", line)
        if command is not None:
            found.append(shlex.split(command[1].replace("$n", "0")))
    return found


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_the_examples_of_a_help_use_options_that_exist(verb: Verb) -> None:
    commands = example_commands(verb)
    assert any(name == verb.name for name, *_ in commands)
    for name, *words in commands:
        parser = VERBS[name].parser(name)
        for action in parser._actions:
            action.required = False  # `...` stands for what the line leaves out
        _, unknown = parser.parse_known_args([word for word in words if word != "..."])
        if name not in PASSES_ON:
            assert [word for word in unknown if word.startswith("-")] == []


def test_an_option_that_an_example_invents_is_noticed() -> None:
    _, unknown = VERBS["pack"].parser("pack").parse_known_args(["--source", "a", "--rows", "4"])
    assert unknown == ["--rows", "4"]
