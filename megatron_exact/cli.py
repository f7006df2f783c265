"""`megatron-exact VERB`: the table of verbs, the overview, and the page `docs/cli.md`.

A verb is one line of the table. The modules behind it are imported when it is called, so that an overview,
a help or a bad argument answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_exact import __version__
from megatron_exact.command_line import ToolParser, run_tool

NAME = "megatron-exact"


@dataclass(frozen=True)
class Verb:
    """One verb of the command line."""

    name: str
    """What the user types."""
    module: str
    """Module of `megatron_exact.commands` that has the function of the verb, and its parser."""
    tool: str | None
    """File in `tools/` that takes the same options."""
    summary: str
    """One line of the overview."""

    @property
    def function(self) -> str:
        """Name of the function that runs the verb; its parser is made by `<function>_parser`."""
        return self.name.replace("-", "_")

    def run(self, words: Sequence[str], prog: str) -> int:
        """Run the verb on its arguments; return the exit code.

        Raises:
            ValueError, OSError: what the user has to know: cause, value and remedy.
        """
        code: int | None = getattr(self._import(), self.function)(words, prog=prog)
        return code or 0

    def parser(self, prog: str) -> ToolParser:
        """Return the parser of the verb."""
        parser: ToolParser = getattr(self._import(), f"{self.function}_parser")(prog)
        return parser

    def _import(self) -> object:
        return importlib.import_module(f"megatron_exact.commands.{self.module}")


SUBJECTS: dict[str, tuple[Verb, ...]] = {
    "Corpora": (
        Verb("tokenize", "corpora", "tokenize_corpus", "tokenize text into a Megatron corpus"),
        Verb("tokenize-shards", "corpora", "tokenize_shards", "tokenize many files, here or on SLURM"),
    ),
    "Packs": (
        Verb("plan", "exposures", "plan_exposure", "predict packs and exposure from lengths alone"),
        Verb("pack", "packs", "pack_corpus", "pack corpora into rows, or verify a pack"),
        Verb("pack-qa", "packs", "pack_qa", "pack question-answer records for fine-tuning"),
        Verb("inspect", "exposures", "inspect_pack", "show exposure, weights and lengths of a pack"),
        Verb("score", "packs", "score_tokens", "score targets for the confidence rules"),
    ),
    "Checkpoints": (
        Verb("import-hf", "conversions", "import_hf", "Hugging Face folder to checkpoint"),
        Verb("export-hf", "conversions", "export_hf", "checkpoint to Hugging Face folder"),
        Verb("verify-checkpoint", "conversions", "verify_checkpoint", "verify a checkpoint, or an export"),
        Verb(
            "seal-checkpoint", "conversions", "seal_checkpoint", "write integrity.json of older checkpoints"
        ),
    ),
    "Training": (
        Verb("accept", "acceptances", "accept", "does this machine compute what it should, and how fast?"),
        Verb("preflight", "runs", "preflight", "will a run start, fit and find its checkpoints?"),
        Verb("rehearse", "runs", "rehearse", "run a job's CUDA code at full size, without a GPU"),
        Verb(
            "check-masking", "runs", "check_document_masking", "verify that documents do not see each other"
        ),
        Verb("train", "train", None, "check a job, then start its ranks with torchrun"),
        Verb("stages", "runs", "run_stages", "train a chain of stages in all arms"),
        Verb("status", "runs", "show_status", "how runs are doing, from their files"),
        Verb("fine-tune", "runs", "fine_tune_qa", "tune the arms on question-answer records"),
    ),
    "Evaluation": (
        Verb("evaluate", "evaluations", "evaluate_model", "RULER, NoLiMa or standard QA on a model"),
        Verb("probe", "evaluations", "probe_evidence", "effect of evidence at a distance"),
        Verb(
            "verify-results", "evaluations", "verify_results", "verify results, and recompute their scores"
        ),
        Verb(
            "export-predictions",
            "evaluations",
            "export_predictions",
            "answers for the authors' own scorers",
        ),
        Verb("compare", "evaluations", "compare_runs", "compare evaluated models in pairs"),
        Verb("report", "evaluations", "write_report", "tables and figures of the paper, with your numbers"),
    ),
    "Experiments": (
        Verb("experiment", "experiments", "run_experiment", "one file: from text to a row of Table 1"),
        Verb("plan-power", "experiments", "plan_power", "how many seeds and examples show an effect"),
    ),
}
VERBS = {verb.name: verb for verbs in SUBJECTS.values() for verb in verbs}


def overview(prog: str = NAME) -> str:
    """Return the list of verbs."""
    lines = ["Effective-context weighted continued pretraining on Megatron-Core.", ""]
    lines += [f"usage: {prog} VERB [options]", f"       {prog} VERB --help", f"       {prog} --version"]
    for subject, verbs in SUBJECTS.items():
        lines += ["", subject.lower(), *(f"  {verb.name:<19}{verb.summary}" for verb in verbs)]
    return "\n".join(lines) + "\n"


def versions() -> str:
    """Return one line with our version and those that a bug report needs."""
    found = []
    for name in ("megatron-core", "torch", "transformers"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} missing")
    return f"{NAME} {__version__} ({', '.join(found)}, Python {platform.python_version()})"


def call(words: Sequence[str], prog: str = NAME) -> int:
    """Run a command line; return the exit code, 2 where there is no such verb.

    Raises:
        ValueError, OSError: as the verb.
    """
    if not words:
        print(overview(prog), end="", file=sys.stderr)
        return 2
    name, *others = words
    if name in ("-h", "--help", "help"):
        print(overview(prog), end="")
        return 0
    if name == "--version":
        print(versions())
        return 0
    if name in VERBS:
        return VERBS[name].run(others, f"{prog} {name}")
    print(f"error: {unknown(name)} (see {prog} --help)", file=sys.stderr)
    return 2


def unknown(name: str) -> str:
    """Return what is wrong with a name that is not a verb, and which verbs it may mean."""
    if name.startswith("-"):
        return f"{name[:40]!r} comes before the verb: name the verb first"
    tools = {verb.tool: verb.name for verb in VERBS.values() if verb.tool is not None}
    spelled = name.replace("_", "-").removesuffix(".py").lower()
    meant = tools.get(spelled.replace("-", "_"))  # somebody who knows the file in tools/
    near = [meant] if meant else [verb for verb in VERBS if verb.startswith(f"{spelled}-")]
    near = near or difflib.get_close_matches(spelled, VERBS, n=3)
    return f"unknown verb {name[:40]!r}" + (f": did you mean {' or '.join(near)}?" if near else "")


def run(prog: str = NAME) -> None:
    """Run the command line of this process, as the console script does, and exit."""
    run_tool(lambda: call(sys.argv[1:], prog))


PAGE_HEAD = f"""\
# Command line

Made by `python -m megatron_exact.cli --page > docs/cli.md`.

`{NAME} VERB [options]` is installed with the package and works from any folder. `python -m
megatron_exact VERB` is the same, and so are the scripts in `tools/` of a checkout.

A help and a bad argument answer without loading torch. Exit codes: 0, 1 for an error (one line that says
cause, value and remedy) or a check that failed, 2 for an unknown verb, 130 after ^C, 143 after SIGTERM.
`MEGATRON_EXACT_TRACEBACK=1` shows the traceback of an error.
"""


def page() -> str:
    """Return the text of `docs/cli.md`, made from the parsers."""
    lines = [PAGE_HEAD, "| verb | does | in `tools/` |", "|---|---|---|"]
    for verb in VERBS.values():
        tool = f"`{verb.tool}.py`" if verb.tool else ""
        lines.append(f"| [`{verb.name}`](#{verb.name}) | {verb.summary} | {tool} |")
    for subject, verbs in SUBJECTS.items():
        lines += ["", f"## {subject}"]
        for verb in verbs:
            lines += ["", *_section(verb)]
    return "\n".join(lines) + "\n"


def _section(verb: Verb) -> Iterator[str]:
    """Yield the lines of one verb: what it does, its options, examples."""
    parser = verb.parser(f"{NAME} {verb.name}")
    yield f"### {verb.name}"
    for paragraph in (parser.description or "").split("\n\n"):
        is_list = any(line.startswith(" ") for line in paragraph.splitlines())
        yield from ("", "```text", paragraph, "```") if is_list else ("", _plain(paragraph))
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if verb.name == "train" and group.title == "megatron_exact":
            yield from ("", "The options of a job stand in [flags.md](flags.md).")
        elif actions:
            title = "option" if group.title in ("options", "positional arguments") else group.title
            yield from ("", f"| {title} | meaning |", "|---|---|")
            for action in actions:
                yield f"| {_spelled(parser, action)} | {_plain(_meaning(parser, action))} |"
    examples = (parser.epilog or "") % {"prog": parser.prog}
    yield from ("", "```text", examples.rstrip("\n"), "```")


def _spelled(parser: ToolParser, action: argparse.Action) -> str:
    """Return how an option is written, in backticks; a second spelling with underscores is left out."""
    values = parser._get_formatter()._format_args(action, action.dest.upper()) if action.nargs != 0 else ""
    if not action.option_strings:
        return f"`{values}`"
    names = [name for name in action.option_strings if "_" not in name]
    shown = (
        "{" + ",".join(map(str, action.choices)) + "}" if action.choices and not action.metavar else values
    )
    return f"`{', '.join(names)}{' ' + shown if shown else ''}`".replace("|", "\\|")


def _meaning(parser: ToolParser, action: argparse.Action) -> str:
    """Return the help of an option in one line, and whether it must be given."""
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    required = "required" if action.required and action.option_strings else ""
    return " ".join("; ".join(filter(None, (text, required))).split())


def _plain(text: str) -> str:
    """Return a text whose characters Markdown would take for tags and cells are escaped."""
    return text.replace("<", "&lt;").replace("|", "\\|")


if __name__ == "__main__":
    if sys.argv[1:] == ["--page"]:
        print(page(), end="")
    else:
        run(f"python -m {NAME.replace('-', '_')}")
