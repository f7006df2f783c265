"""RULER (arXiv 2404.06654): eleven of its thirteen tasks; the two that need question sets are left out.

The examples are made by lm-eval's own generators, called one cell at a time. Around them stands what a
trustworthy run needs and they lack: a seed for each cell; a prompt that fits its window together with the
answer's prefix, the template and the generated tokens (upstream leaves out some of them for every task, so
that the longest windows would be cut in silence); an error where a window is too short for a task (upstream
loops for ever); essays without a download.

Two deliberate differences. The size of a needle task's haystack is found by bisection; upstream grows
essays by 500 words at a time, which leaves a window of 1,024 tokens half empty or with four words in it.
And essays are cut into sentences by `prompts.sentences`, not by NLTK's punkt model, a download of its own:
it decides at which full stops a needle may stand.
"""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_exact.evaluation.prompts import Document, Prompts, cell_seed, read_text_file, sentences
from megatron_exact.evaluation.result_folders import text_sha256
from megatron_exact.evaluation.suites.suite import GeneratedSuite, SuiteOption, SuiteOptions, register

ESSAYS_DATASET = "baber/paul_graham_essays"
MIN_FILL = 0.5
"""Share of the window that prompts must fill on average; upstream's vt and cwe grow in coarse steps."""
VT_EXAMPLE_TOKENS = 500
VT_HOPS = 4
FWE_WORD_LENGTH = 6
SLACK_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class RulerTask:
    """What tells one task from another."""

    generation_tokens: int
    """Tokens that the model may write; of RULER's paper."""
    delimiter: str = " "
    """Between the text and the start of the answer."""
    needles: dict[str, Any] = field(default_factory=dict)
    """Arguments of the needle generator; empty for the tasks without needles."""

    @property
    def needs_essays(self) -> bool:
        """Whether the haystack is made of essays."""
        return self.needles.get("type_haystack") == "essay"


def _niah(haystack: str, keys: str, values: str, **numbers: int) -> RulerTask:
    types = {"type_haystack": haystack, "type_needle_k": keys, "type_needle_v": values}
    return RulerTask(generation_tokens=128, needles={**types, **numbers})


TASKS: dict[str, RulerTask] = {
    "niah_single_1": _niah("repeat", "words", "numbers"),
    "niah_single_2": _niah("essay", "words", "numbers"),
    "niah_single_3": _niah("essay", "words", "uuids"),
    "niah_multikey_1": _niah("essay", "words", "numbers", num_needle_k=4),
    "niah_multikey_2": _niah("needle", "words", "numbers"),
    "niah_multikey_3": _niah("needle", "uuids", "uuids"),
    "niah_multivalue": _niah("essay", "words", "numbers", num_needle_v=4),
    "niah_multiquery": _niah("essay", "words", "numbers", num_needle_q=4),
    "vt": RulerTask(generation_tokens=30),
    "cwe": RulerTask(generation_tokens=120, delimiter="\n\n"),
    "fwe": RulerTask(generation_tokens=50),
}


class _Counter:
    """Stands in for a tokenizer in upstream's generators, which ask for nothing but a length."""

    def __init__(self, prompts: Prompts, extra: int) -> None:
        self.prompts, self.extra = prompts, extra

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=range(self.prompts.count(text) + self.extra))


def essay_words(text: str, length: int) -> list[str]:
    """The words of the essays, from the start again until no window of `length` tokens can use them up."""
    words = text.split()
    return words * (1 + (length + 500) // len(words))


def _prefix_tokens(spec: RulerTask, prompts: Prompts) -> int:
    key = "8a1c4f63-52d7-4e0b-9f36-0d2be57a91c4" if spec.needles["type_needle_k"] == "uuids" else "old-word"
    keys = ", ".join([key] * spec.needles.get("num_needle_q", 1))
    prefix = f" The special magic numbers for {keys} mentioned in the provided text are"
    return prompts.count("word" + prefix) - prompts.count("word")


def _document(task: str, number: int, item: dict[str, Any], prompts: Prompts) -> Document:
    rendered = prompts.render(item["input"], item["gen_prefix"], TASKS[task].delimiter)
    return {
        "id": f"{task}-{number:04d}",
        "input": item["input"],
        "prefix": item["gen_prefix"],
        "outputs": list(item["outputs"]),
        "prompt_tokens": prompts.count(rendered),
    }


def _generate(
    task: str, length: int, samples: int, counter: _Counter, essays: str | None
) -> Sequence[dict[str, Any]]:
    from lm_eval.tasks.ruler import cwe_utils, fwe_utils, vt_utils

    if task == "vt":
        _require_vt(length, counter, vt_utils)
        plain = _Counter(counter.prompts, 0)
        example = vt_utils.sys_vartrack_w_noise_random(
            tokenizer=plain, num_samples=1, max_seq_length=VT_EXAMPLE_TOKENS, incremental=5
        )[0]
        made = vt_utils.sys_vartrack_w_noise_random(
            tokenizer=counter, num_samples=samples, max_seq_length=length, icl_example=example
        )
    elif task == "cwe":
        _require_cwe(length, counter, cwe_utils)
        made = cwe_utils.sys_word_pair_random(num_samples=samples, max_seq_length=length, tokenizer=counter)
    elif task == "fwe":
        _require(task, length, len(counter(fwe_utils.TEMPLATE).input_ids) + length // 4)
        made = fwe_utils.sys_kwext(tokenizer=counter, max_seq_length=length, num_samples=samples)
    else:
        made = _needle_examples(task, length, samples, counter, essays)
    if len(made) != samples:
        raise ValueError(f"{task} does not fit into {length:,} tokens: choose longer windows")
    return made  # type: ignore[no-any-return]


def _needle_examples(
    task: str, length: int, samples: int, counter: _Counter, essays: str | None
) -> list[dict[str, Any]]:
    """Needle tasks: upstream makes each example, the size of its haystack is searched here."""
    from lm_eval.tasks.ruler import niah_utils, prepare_niah

    needles = {"num_needle_k": 1, "num_needle_v": 1, "num_needle_q": 1, **TASKS[task].needles}
    needles["num_needle_k"] = max(needles["num_needle_k"], needles["num_needle_q"])
    kind, values = needles["type_haystack"], needles["type_needle_v"]
    if kind == "essay" and not (essays and essays.split()):
        raise ValueError(f"{task} needs essays: name a text with --essays")
    haystack = essay_words(essays or "", length) if kind == "essay" else prepare_niah.get_haystack(kind)
    limit = length - TASKS[task].generation_tokens

    def draw(size: int) -> tuple[str, list[str], str] | None:
        made = prepare_niah.generate_input_output(size, haystack, template=niah_utils.TEMPLATE, **needles)
        return made if len(counter(made[0]).input_ids) <= limit else None

    smallest = needles["num_needle_k"] * needles["num_needle_v"]
    size, too_large = smallest, length
    step = max(1, length // 200) if kind == "essay" else 1
    while too_large - size > step:
        middle = (size + too_large) // 2
        size, too_large = (middle, too_large) if draw(middle) else (size, middle)
    is_single = needles["num_needle_q"] * needles["num_needle_v"] == 1
    examples: list[dict[str, Any]] = []
    while len(examples) < samples:
        # the numbers of tokens of random words differ: what does not fit is drawn again a little smaller
        drawn = next((made for used in range(size, smallest - 1, -step) if (made := draw(used))), None)
        if drawn is None:
            break
        text, answers, query = drawn
        noun, verb = (values[:-1], "is") if is_single else (values, "are")
        prefix = f"The special magic {noun} for {query} mentioned in the provided text {verb}"
        examples.append({"input": text, "outputs": answers, "gen_prefix": prefix})
    return examples


def _require(task: str, length: int, needed: int) -> None:
    if needed > length:
        raise ValueError(
            f"{task} needs about {needed:,} tokens, the window has {length:,}: choose longer windows"
        )


def _require_vt(length: int, counter: _Counter, vt_utils: Any) -> None:
    """Upstream draws again and again, for ever, where its smallest example does not fit."""
    plain = _Counter(counter.prompts, 0)
    example = len(plain(vt_utils.generate_input_output(5, 1, VT_HOPS, is_icl=True)[0]).input_ids)
    _require("vt (its worked example)", VT_EXAMPLE_TOKENS, example + 60)
    smallest = len(counter(vt_utils.generate_input_output(10, 1, VT_HOPS)[0]).input_ids)
    _require("vt", length, smallest + VT_EXAMPLE_TOKENS + counter.extra + 60)


def _require_cwe(length: int, counter: _Counter, cwe_utils: Any) -> None:
    parts = cwe_utils.generate_input_output(10, length)
    smallest = len(counter(f"{parts[0]}\n{parts[1]} {' '.join(parts[2])}").input_ids)
    _require("cwe", length, smallest * 9 // 8 + TASKS["cwe"].generation_tokens)


@contextlib.contextmanager
def _quiet_upstream(seed: int) -> Iterator[None]:
    """Upstream's modules with seeds set, own sentences, no download, and nothing printed; all put back."""
    import nltk

    find = nltk.data.find
    nltk.data.find = lambda *_, **__: None  # importing the module would download the punkt model
    try:
        from lm_eval.tasks.ruler import cwe_utils, prepare_niah
    finally:
        nltk.data.find = find
    states = random.getstate(), np.random.get_state(), cwe_utils.RNG.getstate()
    cut, bars = prepare_niah.cached_sent_tokenize, io.StringIO()
    prepare_niah.cached_sent_tokenize = sentences
    try:
        random.seed(seed)
        np.random.seed(seed % (1 << 32))
        cwe_utils.RNG.seed(seed)
        with contextlib.redirect_stdout(bars), contextlib.redirect_stderr(bars):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        cwe_utils.RNG.setstate(states[2])
        prepare_niah.cached_sent_tokenize = cut


class Ruler(GeneratedSuite):
    """RULER as a suite."""

    name = "ruler"
    title = "RULER"
    tasks = tuple(TASKS)
    options = (
        SuiteOption(
            flag="--essays",
            parse=Path,
            metavar="FILE",
            help="RULER: a text instead of the essays of the Hub",
        ),
    )
    default_samples = 500
    """As in RULER's paper and in EXACT's."""

    def record(self, options: SuiteOptions) -> dict[str, Any]:
        """Samples, seed, generated tokens of every task, metric."""
        return {
            "samples": options.effective_samples,
            "seed": options.seed,
            "generation_tokens": {name: task.generation_tokens for name, task in TASKS.items()},
            "metric": "string match, all references",
        }

    def sources(self, task: str, options: SuiteOptions) -> dict[str, str]:
        """The essays, where the haystack is made of them."""
        essays = self._essays(task, options)
        return {} if essays is None else {"essays": text_sha256(essays)}

    def generation_tokens(self, task: str) -> int:
        """As in RULER's paper."""
        return TASKS[task].generation_tokens

    def delimiter(self, task: str) -> str:
        """As upstream puts it."""
        return TASKS[task].delimiter

    def make_examples(
        self, task: str, length: int, options: SuiteOptions, prompts: Prompts
    ) -> list[Document]:
        """Make the examples of one cell, again and a little smaller where they are too long."""
        spec, samples, essays = TASKS[task], options.effective_samples, self._essays(task, options)
        assert samples is not None
        extra = prompts.overhead() + SLACK_TOKENS + (spec.generation_tokens if task == "fwe" else 0)
        if spec.needles:  # their generator counts no start of the answer
            extra += _prefix_tokens(spec, prompts)
        for _ in range(5):
            with _quiet_upstream(cell_seed(options.seed, self.name, task, length)):
                made = _generate(task, length, samples, _Counter(prompts, extra), essays)
            documents = [_document(task, number, item, prompts) for number, item in enumerate(made)]
            longest = max(document["prompt_tokens"] for document in documents) + spec.generation_tokens
            if longest <= length:
                break
            extra += longest - length + SLACK_TOKENS
        else:
            raise ValueError(
                f"{task} does not fit into {length:,} tokens ({longest:,}): choose longer windows"
            )
        filled = np.mean([document["prompt_tokens"] for document in documents]) + spec.generation_tokens
        if filled < MIN_FILL * length:
            raise ValueError(
                f"{task} fills only {filled:,.0f} of {length:,} tokens, since its haystack grows in steps: "
                "choose longer windows or leave out the task"
            )
        return documents

    def _essays(self, task: str, options: SuiteOptions) -> str | None:
        if not TASKS[task].needs_essays:
            return None

        def read() -> str:
            if options["essays"] is not None:
                return read_text_file(options["essays"], "--essays")
            import datasets

            try:
                return " ".join(datasets.load_dataset(ESSAYS_DATASET, split="train")["text"])
            except Exception as error:  # whatever the Hub's client raises without a network
                raise ValueError(
                    f"RULER's essays cannot be downloaded ({type(error).__name__}): "
                    "name a text with --essays"
                ) from error

        text: str = options.once("essays", read)
        return text

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """String match: the share of the references that the answer holds, whatever their case."""
        from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

        return float(string_match_all(postprocess_pred([prediction]), [list(references)]))


register(Ruler())
