"""RULER (arXiv 2404.06654), eleven of its thirteen tasks; the other two need sets of questions.

`--ruler-protocol official`, the default, sends what NVIDIA's generators make (`ruler_questions.py`); with
`--ruler-data` the examples are those that their `prepare.py` wrote. The start of the answer follows the
prompt's last character, whatever a chat template would make of it. Each cell has a seed, so that no cell
depends on what ran before it.

`lm-eval` calls lm-eval's generators, one cell at a time. They have `vt` as it was before May 2025 and `cwe`
without its worked example; published numbers exist of both kinds. Around them stands what they lack: a seed
for each cell; a prompt that fits its window with the answer's start, the template and the generated
tokens (they leave out some of them); an error where a window is too short for a task (they loop for ever);
essays without a download. The size of a needle task's haystack is found by bisection here; theirs grows
essays by 500 words at a time, which leaves a window of 1,024 tokens half empty.
"""

from __future__ import annotations

import contextlib
import io
import random
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_exact.evaluation.prompts import Document, Prompts, cell_seed, read_text_file, sentences
from megatron_exact.evaluation.result_folders import text_sha256
from megatron_exact.evaluation.ruler_questions import (
    TASKS,
    VT_EXAMPLE_TOKENS,
    VT_HOPS,
    Essays,
    RulerTask,
    official_questions,
)
from megatron_exact.evaluation.suites.suite import (
    GeneratedSuite,
    SuiteOption,
    SuiteOptions,
    protocol_parser,
    register,
)
from megatron_exact.files import sha256_file
from megatron_exact.json_input import parse_json_object, read_json_lines, require_shape

OFFICIAL, LM_EVAL = "official", "lm-eval"
PROTOCOLS = (OFFICIAL, LM_EVAL)
ESSAYS_DATASET = "baber/paul_graham_essays"
MIN_FILL = 0.5
"""Share of the window that lm-eval's prompts must fill on average; its vt and cwe grow in coarse steps."""
DATA_FILE = "validation.jsonl"
CONTROL = re.compile(r"[\x00-\x1f]")
SLACK_TOKENS = 4
VT_DRAWS = 30
"""Draws of the smallest question of `vt`, of which the longest has to fit: its names differ in tokens."""


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
        _require_vt_example(counter, vt_utils)
        plain = _Counter(counter.prompts, 0)
        example = vt_utils.sys_vartrack_w_noise_random(
            tokenizer=plain, num_samples=1, max_seq_length=VT_EXAMPLE_TOKENS, incremental=5
        )[0]
        _require_vt(length, counter, vt_utils, f"{example['input']} {' '.join(example['outputs'])}\n\n")
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


def _require_vt_example(counter: _Counter, vt_utils: Any) -> None:
    """Upstream draws again and again, for ever, where its smallest example does not fit."""
    plain = _Counter(counter.prompts, 0)
    example = len(plain(vt_utils.generate_input_output(5, 1, VT_HOPS, is_icl=True)[0]).input_ids)
    _require("vt (its worked example)", VT_EXAMPLE_TOKENS, example + 60)
    vt_utils.generate_input_output(10, 1, VT_HOPS)  # keeps the draws, and so the prompts, of older results


def _require_vt(length: int, counter: _Counter, vt_utils: Any, example: str) -> None:
    """The same for its smallest question behind this worked example, as upstream counts them."""
    states = random.getstate(), np.random.get_state()
    smallest = max(
        len(counter(f"{text} {answers}").input_ids)
        for text, answers in (vt_utils.generate_input_output(10, 1, VT_HOPS) for _ in range(VT_DRAWS))
    )
    random.setstate(states[0])
    np.random.set_state(states[1])
    _require("vt", length, smallest + len(counter(example).input_ids) + TASKS["vt"].generation_tokens)


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


def _lm_eval_documents(
    task: str, length: int, samples: int, seed: int, prompts: Prompts, essays: str | None
) -> list[Document]:
    """Make the examples of one cell, again and a little smaller where they are too long."""
    spec = TASKS[task]
    extra = prompts.overhead() + SLACK_TOKENS + (spec.generation_tokens if task == "fwe" else 0)
    if spec.needles:  # their generator counts no start of the answer
        extra += _prefix_tokens(spec, prompts)
    for _ in range(5):
        with _quiet_upstream(seed):
            made = _generate(task, length, samples, _Counter(prompts, extra), essays)
        documents = [_document(task, number, item, prompts) for number, item in enumerate(made)]
        longest = max(document["prompt_tokens"] for document in documents) + spec.generation_tokens
        if longest <= length:
            break
        extra += longest - length + SLACK_TOKENS
    else:
        raise ValueError(f"{task} does not fit into {length:,} tokens ({longest:,}): choose longer windows")
    filled = np.mean([document["prompt_tokens"] for document in documents]) + spec.generation_tokens
    if filled < MIN_FILL * length:
        raise ValueError(
            f"{task} fills only {filled:,.0f} of {length:,} tokens, since its haystack grows in steps: "
            "choose longer windows or leave out the task"
        )
    return documents


# files of NVIDIA's prepare.py


def data_file(folder: Path, task: str, length: int) -> Path:
    """Return the file of a cell: `FOLDER/<length>/data/<task>/validation.jsonl`, as by their run.sh.

    `data` may be missing, and for a folder of one length the length as well.

    Raises:
        ValueError: none of them is there.
    """
    places = (f"{length}/data", str(length), ".")
    found = [folder / place / task / DATA_FILE for place in places]
    there = next((path for path in found if path.is_file()), None)
    if there is None:
        raise ValueError(
            f"{folder} has neither {length}/data/{task}/{DATA_FILE} nor {task}/{DATA_FILE}: name the "
            "folder into which NVIDIA's prepare.py wrote, or leave out the task or the length"
        )
    return there


def _prepared_documents(path: Path, task: str, samples: int | None) -> list[Document]:
    """Read the first `samples` examples of a file; None for all."""
    remedy = "write it again with NVIDIA's prepare.py"
    documents: list[Document] = []
    for place, row in read_json_lines(path, remedy):
        if len(documents) == samples:
            break
        try:
            require_shape(row, {"input": str, "outputs": [str], "answer_prefix?": str})
            if not all(row["outputs"]):
                raise ValueError("an empty text in outputs, which every answer would contain")
            if not row["outputs"]:
                raise ValueError("outputs is empty")
        except ValueError as error:
            raise ValueError(f"{place} is not an example of RULER ({error}): {remedy}") from error
        documents.append(
            {
                "id": f"{task}-{len(documents):04d}",
                "input": row["input"],
                "prefix": row.get("answer_prefix") or "",
                "outputs": row["outputs"],
            }
        )
    if not documents or len(documents) < (samples or 0):
        raise ValueError(f"{path} has {len(documents):,} examples: give fewer --samples")
    return documents


class Ruler(GeneratedSuite):
    """RULER as a suite."""

    name = "ruler"
    title = "RULER"
    tasks = tuple(TASKS)
    options = (
        SuiteOption(
            flag="--ruler-protocol",
            parse=protocol_parser(PROTOCOLS),
            default=OFFICIAL,
            metavar="P",
            help="RULER: official, as NVIDIA's repository makes it, or lm-eval (%(default)s)",
        ),
        SuiteOption(
            flag="--essays",
            parse=Path,
            metavar="FILE",
            help="RULER: a text, or NVIDIA's PaulGrahamEssays.json, instead of the essays of the Hub",
        ),
        SuiteOption(
            flag="--ruler-words",
            parse=Path,
            metavar="FILE",
            help="RULER: NVIDIA's english_words.json, for cwe in windows from about 100K on",
        ),
        SuiteOption(
            flag="--ruler-data",
            parse=Path,
            metavar="DIR",
            help="RULER: examples that NVIDIA's prepare.py wrote, instead of ones made here",
        ),
    )
    default_samples = 500
    """As in RULER's paper and in EXACT's."""

    def check(self, options: SuiteOptions) -> None:
        """Raise ValueError for options that do not go together."""
        if options["ruler_data"] is not None:
            for name in ("essays", "ruler_words"):
                if options[name] is not None:
                    flag = "--" + name.replace("_", "-")
                    raise ValueError(f"{flag} has no effect on --ruler-data: leave it out")
        if options["ruler_protocol"] != OFFICIAL:
            for name in ("ruler_data", "ruler_words"):
                if options[name] is not None:
                    flag = "--" + name.replace("_", "-")
                    raise ValueError(f"{flag} is for --ruler-protocol {OFFICIAL}: leave it out")

    def record(self, options: SuiteOptions) -> dict[str, Any]:
        """Protocol, samples, seed, generated tokens of every task, metric."""
        return {
            "protocol": options["ruler_protocol"],
            "samples": self._samples(options),
            "seed": options.seed,
            "generation_tokens": {name: task.generation_tokens for name, task in TASKS.items()},
            "metric": "string match, all references",
        }

    def sources(self, task: str, options: SuiteOptions) -> dict[str, str]:
        """The essays, where the haystack is made of them, more words, or the files of `--ruler-data`."""
        if options["ruler_data"] is not None:
            return {
                f"{task}/{length}/{DATA_FILE}": sha256_file(data_file(options["ruler_data"], task, length))
                for length in options.lengths
            }
        essays = self._essays(task, options)
        found = {} if essays is None else {"essays": text_sha256(essays)}
        if task == "cwe" and options["ruler_words"] is not None:
            found["more words"] = text_sha256("\n".join(self._more_words(options)))
        return found

    def generation_tokens(self, task: str) -> int:
        """As in RULER's paper."""
        return TASKS[task].generation_tokens

    def delimiter(self, task: str) -> str:
        """As lm-eval puts it; the official start of an answer brings its own white space."""
        return TASKS[task].delimiter

    def starts_are_raw(self, options: SuiteOptions) -> bool:
        """Officially they are."""
        return bool(options["ruler_protocol"] == OFFICIAL)

    def window(self, length: int, options: SuiteOptions) -> int:
        """One token more under the official protocol, which does not count the BOS."""
        return length + int(self.starts_are_raw(options))

    def make_examples(
        self, task: str, length: int, options: SuiteOptions, prompts: Prompts
    ) -> list[Document]:
        """Make or read the examples of one cell."""
        seed = cell_seed(options.seed, self.name, task, length)
        if options["ruler_data"] is not None:
            return _prepared_documents(
                data_file(options["ruler_data"], task, length), task, self._samples(options)
            )
        essays, samples = self._essays(task, options), options.effective_samples
        assert samples is not None
        if options["ruler_protocol"] == LM_EVAL:
            return _lm_eval_documents(task, length, samples, seed, prompts, essays)
        if essays is not None and not essays.split():
            raise ValueError(f"{task} needs essays: name a text with --essays")
        encode = partial(prompts.tokenizer.encode, add_special_tokens=False)
        questions = official_questions(
            task,
            length,
            samples,
            random.Random(seed),
            lambda question: len(encode(prompts.render(question.text) + question.start)),
            lambda question: len(encode(question.text + question.start)),
            essays=None if essays is None else Essays(essays),
            more_words=self._more_words(options),
        )
        return [
            {
                "id": f"{task}-{number:04d}",
                "input": question.text,
                "prefix": question.start,
                "outputs": question.answers,
            }
            for number, question in enumerate(questions)
        ]

    def _samples(self, options: SuiteOptions) -> int | None:
        """`--samples`, and without it all examples of a file."""
        return options.samples if options["ruler_data"] is not None else options.effective_samples

    def _more_words(self, options: SuiteOptions) -> list[str]:
        path: Path | None = options["ruler_words"]

        def read() -> list[str]:
            assert path is not None
            content = parse_json_object(
                read_text_file(path, "--ruler-words"), str(path), "fetch it with git lfs"
            )
            words = [word for word in content.values() if isinstance(word, str) and word]
            if len(words) != len(content) or not words:
                raise ValueError(f"--ruler-words {path} has values that are not words: fetch it again")
            return words

        words: list[str] = [] if path is None else options.once("more words", read)
        return words

    def _essays(self, task: str, options: SuiteOptions) -> str | None:
        if not TASKS[task].needs_essays or options["ruler_data"] is not None:
            return None

        def read() -> str:
            if options["essays"] is not None:
                return _essay_text(options["essays"])
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
        """String match: the share of the references that the answer contains, whatever their case."""
        text = CONTROL.sub("\n", prediction.strip()).strip().lower()
        return sum(reference.lower() in text for reference in references) / len(references)


def _essay_text(path: Path) -> str:
    """A text file, or the `text` of NVIDIA's JSON file."""
    text = read_text_file(path, "--essays")
    if path.suffix != ".json":
        return text
    found = parse_json_object(text, str(path), "give NVIDIA's PaulGrahamEssays.json or a text").get("text")
    if not isinstance(found, str):
        raise ValueError(f"--essays {path} has no text: give NVIDIA's PaulGrahamEssays.json or a text file")
    return found


register(Ruler())
