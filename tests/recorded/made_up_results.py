"""Made-up answers to RULER and NoLiMa, for the scorers of their authors and for ours."""

from __future__ import annotations

import itertools
from pathlib import Path

from megatron_exact.evaluation.result_folders import Cell, Example, text_sha256, write_cell
from megatron_exact.evaluation.ruler_questions import TASKS
from megatron_exact.evaluation.suites.nolima import NoLiMa
from megatron_exact.evaluation.suites.ruler import Ruler
from megatron_exact.files import write_json

RULER_LENGTHS = (1024, 4096)
NOLIMA_LENGTHS = (250, 1000)
METRICS = {
    "needle_set": "contains",
    "needle_set_hard": "EM",
    "needle_set_MC": "lastline_EM",
    "needle_set_w_CoT": "lastline_contains",
}
"""One NoLiMa set for each of their metrics."""
WORDS = ("amber", "Birch", "CEDAR", "48213", "d0-44-af", "elm oak", "fir")


def ruler_answers(references: list[str], number: int) -> str:
    """An answer of one of twelve kinds: right, partly right, wrong, and written in odd ways."""
    half = references[: len(references) // 2]
    kinds = (
        ", ".join(references),
        "",
        " \t\n ",
        "\x00".join(references),
        ", ".join(references).upper(),
        " and ".join(half) or "none of them",
        "".join(references),  # one behind the other
        references[0][:-1],
        "\x1f\x07",
        f"Answer: {references[-1].lower()}\nQuestion:",
        "x" + "x".join(references) + "x",
        references[0].replace("-", "\x01"),
    )
    return kinds[number % len(kinds)]


def nolima_answers(reference: str, number: int) -> str:
    """An answer of one of ten kinds, which the four metrics tell apart."""
    kinds = (
        reference,
        f"  {reference}\n",
        f"{reference}.",
        f"Because of the house.\n{reference}",
        f"{reference}\nis the name.",
        "",
        "\n\n",
        reference.lower(),
        f"Perhaps {reference} or Otto\n",
        f"{reference[:-1]}",
    )
    return kinds[number % len(kinds)]


def write_made_up_results(folder: Path) -> Path:
    """Write a result folder with eleven tasks of RULER and four sets of NoLiMa."""
    ruler, nolima = Ruler(), NoLiMa()
    options = {"protocol": "official"}
    suites = {
        "ruler": {"options": options},
        "nolima": {"options": {**options, "metrics": METRICS, "placements": 4}},
    }
    write_json(folder / "results.json", {"model": {"name": "made-up"}, "suites": suites})
    for place, (task, length) in enumerate(itertools.product(TASKS, RULER_LENGTHS)):
        examples = []
        for number in range(9):
            count = 1 + (number + place) % 5
            references = [WORDS[(number + step) % len(WORDS)] for step in range(count)]
            answer = ruler_answers(references, number + place)
            examples.append(
                Example(
                    id=f"{task}-{number:04d}",
                    prompt_sha256=text_sha256(task, str(number)),
                    prompt_tokens=length - 100,
                    prediction=answer,
                    references=tuple(references),
                    score=ruler.score(answer, references),
                )
            )
        write_cell(folder, Cell(suite="ruler", task=task, length=length), examples)
    record = suites["nolima"]["options"]
    for place, (task, length) in enumerate(itertools.product(METRICS, NOLIMA_LENGTHS)):
        examples = []
        grid = itertools.product(
            ("0401_T01_C02_onehop", "0408_T10_C01_twohop"), ("a.txt", "b.txt"), range(4)
        )
        for number, (question, book, step) in enumerate(grid):
            references = [("Yuki", "Stuart", "Veronica")[(number + place) % 3]]
            answer = nolima_answers(references[0], 3 * number + place)
            examples.append(
                Example(
                    id=f"{question}@{book}@{step}",
                    prompt_sha256=text_sha256(task, str(number)),
                    prompt_tokens=length + 300,
                    prediction=answer,
                    references=tuple(references),
                    score=nolima.score_by_record(task, answer, references, record),
                    depth=100 * step / 3,
                    question=question,
                    book=book,
                )
            )
        write_cell(folder, Cell(suite="nolima", task=task, length=length), examples)
    return folder
