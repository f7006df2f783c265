"""Pack question-answer records for tuning: records, chat template, rows whose targets are answers.

Records have the fields of Dolly-15K, on which the paper (EXACT, arXiv 2605.10544) tunes: `instruction`,
`context` (may be empty), `response`. They come from JSON lines on disk, or from the Hub.

One Jinja chat template writes the text around a question, for tuning and for evaluation. transformers
renders it in both places, and in both the prompt is tokenized separately from the answer: tuning sees
exactly the tokens after which a model later has to answer. The answer ends with the EOD, whatever the
template would write after it. A template may close turns with the EOD itself (Qwen2.5-Instruct:
`<|im_end|>`). Then the prompt contains it too, where it ends a turn and not a document: a record is one
document whatever its tokens are, and prompts are not supervised.

`tools/pack_qa.py` writes

    OUTPUT/manifest.json, train/, validation/    the pack, like any other
    OUTPUT/NAME.bin, .idx, .json                 the records as a corpus, one document each
    OUTPUT/NAME.answers.npy                      where each answer begins

Records are packed whole (`best-fit`), each with its own positions and attention; one that is longer than a
row is left out and counted. One process packs a few thousand records per second, so Dolly-15K takes
seconds.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.command_line import progress_bar
from megatron_exact.data.corpus_guard import hash_blocks
from megatron_exact.data.corpus_record import (
    ANSWERS_DTYPE,
    AnswersRecord,
    CorpusRecord,
    answers_path,
    write_corpus_record,
)
from megatron_exact.data.documents import JSON_LINES_SUFFIXES, FileInputs, open_lines
from megatron_exact.data.hf_tokenizer import is_control_token, load_for_rendering
from megatron_exact.data.indexed import IndexedWriter
from megatron_exact.data.manifest import Manifest
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.data.pack_arrays import write_npy
from megatron_exact.data.tokenize import eod_in_text
from megatron_exact.data.tokenizers import CorpusTokenizer, load_tokenizer
from megatron_exact.files import atomic_folder, require_free_folder, sha256_file
from megatron_exact.json_input import parse_corpus_line

DOLLY = "databricks/databricks-dolly-15k"
FIELDS = ("instruction", "context", "response")
DOLLY_LICENCE = "CC BY-SA 3.0"
"""Licence as the data set's card states it."""
SEVERAL_FILES = "records"
MANIFEST = "manifest"
"""`manifest.json` is the pack's, so a corpus beside it has another name."""
DEFAULT_TEMPLATE = Path(__file__).parent / "templates" / "question_answer.jinja"
MODEL_TEMPLATE = "model"
CONTEXT_PLACES = ("before", "after")
PROBE = ("What is asked here", "What is answered there")
RECORDS_A_CALL = 512


@dataclass(frozen=True, kw_only=True)
class QaRecord:
    """One record; its texts are stripped of white space at both ends."""

    location: str
    """File and line, or data set and row, for messages."""
    instruction: str
    """What is asked; not empty."""
    context: str
    """What the question is about; may be empty."""
    response: str
    """The answer; not empty."""

    def question(self, context_place: str) -> str:
        """Return the user's text: instruction and context, the latter `before` or `after`."""
        parts = [self.context, self.instruction]
        if context_place == "after":
            parts.reverse()
        return "\n\n".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class QaInput:
    """Source of records."""

    name: str
    """Name of the corpus, as manifests and run records state it."""
    rows: Iterable[tuple[str, Any]]
    """(location, record to be checked) in order; can be read once."""
    raw_files: list[dict[str, Any]]
    """{`path`, `bytes`, `sha256`} of each file."""
    hub: dict[str, Any] | None = None
    """Data set of the Hub, for the corpus record."""


def qa_files(paths: Sequence[str | Path]) -> QaInput:
    """Open the records of JSON lines files.

    Raises:
        ValueError, FileNotFoundError: a file that cannot be read, or of another kind.
    """
    for path in map(Path, paths):
        if not path.name.lower().endswith(JSON_LINES_SUFFIXES):
            raise ValueError(
                f"{path}: question-answer records are read from {', '.join(JSON_LINES_SUFFIXES)}"
            )
    files = FileInputs(paths)
    name = Path(paths[0]).name.lower().partition(".jsonl")[0] if len(paths) == 1 else ""
    return QaInput(
        name=name if name not in ("", MANIFEST) else SEVERAL_FILES,
        rows=_lines([Path(path) for path in paths]),
        raw_files=files.raw_files(),
    )


def qa_hub(repo: str = DOLLY, *, revision: str | None = None) -> QaInput:
    """Open the records of a data set's `train` split on the Hub, pinned to one commit.

    Args:
        repo: repository of a data set with the fields of Dolly-15K.
        revision: branch, tag or commit; None means the newest. The commit that it refers to is recorded.

    Raises:
        ValueError: `datasets` is not installed, or the Hub cannot be reached.
    """
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            "reading from the Hub needs the package datasets: pip install datasets, or name local files "
            "with --input"
        ) from error
    try:
        commit = huggingface_hub.HfApi().dataset_info(repo, revision=revision).sha
        rows = datasets.load_dataset(repo, split="train", revision=commit)
    except Exception as error:  # the libraries raise many types
        raise ValueError(
            f"{repo} at {revision or 'its newest revision'} cannot be read ({type(error).__name__}): check "
            "the network, or download its .jsonl and name it with --input"
        ) from error
    located = ((f"{repo}:row {number}", row) for number, row in enumerate(rows, 1))
    hub = {"repo": repo, "config": None, "split": "train", "revision": commit}
    return QaInput(name=repo.rpartition("/")[2], rows=located, raw_files=[], hub=hub)


def as_record(location: str, row: Any) -> QaRecord:
    """Check one row.

    Raises:
        ValueError: not an object, a field that is not text, or an empty instruction or response.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{location}: {_kind(row)} is not a record with instruction, context and response")
    texts = {}
    for field in FIELDS:
        text = row.get(field)
        if text is None and field == "context":
            text = ""
        if not isinstance(text, str):
            raise ValueError(f"{location}: {field} is {_kind(text)}, not text")
        texts[field] = text.strip()
        if not texts[field] and field != "context":
            raise ValueError(f"{location}: {field} is empty")
    return QaRecord(location=location, **texts)


def _kind(value: Any) -> str:
    if isinstance(value, NotJson):
        return f"a line that is not JSON ({value.reason})"
    return "missing" if value is None else f"a {type(value).__name__}"


def _lines(paths: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    for path in paths:
        with open_lines(path) as (_, stream):
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                location = f"{path}:{number}"
                try:
                    yield location, parse_corpus_line(line.decode("utf-8"), *FIELDS)
                except ValueError as error:
                    yield location, NotJson(str(error))


class NotJson:
    """A line that is not JSON: a fault of its record, not of the file."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class EncodedRecord:
    """The tokens of one record."""

    ids: NDArray[np.int32]
    """[tokens], what the tokenizer puts at a start, prompt, answer and EOD."""
    first_answer_token: int
    """Number of the first token of the answer."""


class QaTemplate:
    """Renders records with a template and encodes them.

    Attributes:
        text: Jinja source.
        sha256: hash of the source in UTF-8.
        context_place: where a record's context stands in the question.

    Args:
        option: a file with a chat template, or `model` for the tokenizer's own.
        tokenizer: tokenizer of a Hugging Face folder.
        context_place: one of CONTEXT_PLACES.

    Raises:
        ValueError: a tokenizer that transformers cannot load, or a template that cannot be used.
    """

    def __init__(
        self, option: str | Path, tokenizer: CorpusTokenizer, *, context_place: str = "before"
    ) -> None:
        if context_place not in CONTEXT_PLACES:
            raise ValueError(f"context place {context_place!r}: choose {' or '.join(CONTEXT_PLACES)}")
        self._tokenizer = tokenizer
        if tokenizer.kind != "huggingface" or not tokenizer.path.is_dir():
            raise ValueError(
                f"tokenizer {tokenizer.path} is not a Hugging Face folder: question-answer records need "
                "one, because evaluation renders the template with it"
            )
        self._renderer = load_for_rendering(tokenizer.path)[0]  # loaded as in evaluation
        self.context_place = context_place
        self.text = _template_text(option, self._renderer)
        self.sha256 = hashlib.sha256(self.text.encode()).hexdigest()
        self._renderer.chat_template = self.text
        self._control_tokens = sorted(
            token.content
            for token in self._renderer.added_tokens_decoder.values()
            if is_control_token(token.content, special=token.special)
        )
        self._check(str(option))

    def prompt(self, question: str) -> str:
        """Return the text before the answer."""
        return self._render([{"role": "user", "content": question}], add_generation_prompt=True)

    def encode(self, records: Sequence[QaRecord]) -> list[EncodedRecord]:
        """Return the tokens of records in which `fault` found nothing."""
        prompts = [self.prompt(record.question(self.context_place)) for record in records]
        prompt_ids = self._renderer(prompts, add_special_tokens=False)["input_ids"]
        answer_ids = self._tokenizer.backend.encode_batch([record.response for record in records])
        encoded = []
        for text, prompt, answer in zip(prompts, prompt_ids, answer_ids, strict=True):
            begin = self._renderer.bos_token
            # A template may write the start tokens of the tokenizer itself
            is_written = bool(begin) and text.startswith(begin)
            start = [] if is_written else list(self._tokenizer.prefix_ids)
            ids = [*start, *prompt, *answer, self._tokenizer.eod_id]
            encoded.append(
                EncodedRecord(
                    ids=np.array(ids, dtype=np.int32), first_answer_token=len(start) + len(prompt)
                )
            )
        return encoded

    def fault(self, record: QaRecord) -> str | None:
        """Say why a record cannot be used, or None: only the template may write control tokens."""
        text = "\n".join((record.instruction, record.context, record.response))
        for token in self._control_tokens:
            if token in text:
                return f"its text contains the control token {token!r}"
        if self._tokenizer.eod_id in self._tokenizer.backend.encode_batch([record.response])[0]:
            return eod_in_text(self._tokenizer, record.response)
        return None

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        return str(
            self._renderer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def _check(self, name: str) -> None:
        """Render a probe.

        Raises:
            ValueError: the template fails, or does not write the answer behind the prompt.
        """
        question, answer = PROBE
        try:
            prompt = self.prompt(question)
            whole = self._render(
                [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            )
        except Exception as error:  # of jinja2 and of the template itself
            raise ValueError(
                f"--template {name} cannot be rendered ({type(error).__name__}: {error})"
            ) from error
        if question not in prompt or not whole.startswith(prompt + answer):
            raise ValueError(
                f"--template {name} does not write question, prompt and answer one behind the other: its "
                f"prompt is {prompt!r}, and with the answer {whole!r}"
            )
        end = self._tokenizer.eod_token
        closes_turns = whole.removeprefix(prompt + answer).lstrip().startswith(end)
        if end in prompt and not closes_turns:
            raise ValueError(
                f"--template {name} writes the EOD {end!r} before the answer but does not close the answer "
                f"with it ({whole.removeprefix(prompt)!r}): choose by --eod-token what ends its turns"
            )


def _template_text(option: str | Path, renderer: Any) -> str:
    if option == MODEL_TEMPLATE:
        if not isinstance(renderer.chat_template, str):
            raise ValueError(
                "--template model: the tokenizer has no chat template: name a file, or leave the option out"
            )
        return renderer.chat_template
    path = Path(option)
    if not path.is_file():
        raise ValueError(f"--template {option}: no such file; give model or a Jinja chat template")
    text = path.read_text(encoding="utf-8")
    if "messages" not in text:
        raise ValueError(f"--template {option}: not a chat template, since it does not use `messages`")
    return text


@dataclass(frozen=True, kw_only=True)
class QaOptions:
    """Everything that decides a pack of records besides the records and the tokenizer."""

    row_tokens: int
    """Inputs of a row."""
    seed: int
    """Seed of the split and of the order."""
    validation_fraction: float
    """Fraction of the records in the validation split, in [0, 1)."""
    template: str | Path = DEFAULT_TEMPLATE
    """A Jinja chat template, or `model`."""
    context_place: str = "before"
    """Where a record's context stands in the question."""
    skip_invalid: bool = False
    """Leave out invalid records instead of stopping at the first."""


@dataclass(kw_only=True)
class _Count:
    left_out: int = 0
    """Longer than a row."""
    invalid: int = 0
    """Skipped."""


def pack_qa(
    records: QaInput,
    tokenizer_path: str | Path,
    output: str | Path,
    options: QaOptions,
    *,
    licence: str | None = None,
    eod_token: str | None = None,
    force_eod: bool = False,
) -> Manifest:
    """Tokenize and pack records into a new folder, whole or not at all.

    Args:
        records: from `qa_files` or `qa_hub`.
        tokenizer_path: Hugging Face folder, the model's own.
        output: folder that does not exist yet, or is empty.
        options: see QaOptions.
        licence: licence of the records, recorded as it is.
        eod_token: token that ends every answer; None means the tokenizer's eos.
        force_eod: see `load_tokenizer`.

    Raises:
        ValueError: an invalid record (unless skipped), no record that fits into a row, or a template,
            tokenizer or option that cannot be used. Then nothing is written.
    """
    output = Path(output)
    require_free_folder(output)
    pack_options = PackOptions(
        row_tokens=options.row_tokens,
        policy="best-fit",
        seed=options.seed,
        validation_fraction=options.validation_fraction,
        mask_cross_document_targets=True,
    )
    tokenizer = load_tokenizer(tokenizer_path, eod_token=eod_token, force_eod=force_eod)
    template = QaTemplate(options.template, tokenizer, context_place=options.context_place)
    with atomic_folder(output) as folder:
        prefix = folder / records.name
        _write_corpus(prefix, records, tokenizer, template, options, licence)
        return pack_corpora([str(prefix)], folder, pack_options, in_place=True)


def _write_corpus(
    prefix: Path,
    records: QaInput,
    tokenizer: CorpusTokenizer,
    template: QaTemplate,
    options: QaOptions,
    licence: str | None,
) -> None:
    count = _Count()
    starts: list[int] = []
    largest = -1
    bin_path, idx_path = (prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx"))
    writer = IndexedWriter(bin_path, idx_path, tokenizer.vocab_size)
    try:
        with progress_bar("tokenize", None, " records") as bar:
            for batch in batched(_valid(records, template, options, count), RECORDS_A_CALL):
                for encoded in template.encode(batch):
                    if encoded.ids.size > options.row_tokens:
                        count.left_out += 1
                        continue
                    starts.append(encoded.first_answer_token)
                    largest = max(largest, int(encoded.ids.max()))
                    writer.add(encoded.ids)
                bar.update(len(batch))
        if not starts:
            raise ValueError(
                f"no record to pack: {count.left_out} are longer than a row of {options.row_tokens} "
                f"tokens and {count.invalid} invalid"
            )
        writer.close()
    finally:
        writer.abort()
    answers = AnswersRecord(
        sha256=write_answers(prefix, starts),
        template=template.text,
        template_sha256=template.sha256,
        context_place=template.context_place,
        left_out_records=count.left_out,
    )
    record = CorpusRecord(
        raw_files=records.raw_files,
        tokenizer=tokenizer.identity(),
        special_tokens=tokenizer.special_tokens(),
        documents=writer.num_documents,
        tokens=writer.num_tokens,
        skipped=count.invalid,
        dtype=str(np.dtype(writer.dtype)),
        bin_sha256=sha256_file(bin_path),
        idx_sha256=sha256_file(idx_path),
        bin_blocks=hash_blocks(bin_path),
        licence=licence,
        hub=records.hub,
        answers=asdict(answers),
        largest_id=largest,
    )
    write_corpus_record(prefix, record)


def _valid(records: QaInput, template: QaTemplate, options: QaOptions, count: _Count) -> Iterator[QaRecord]:
    """Yield the valid records.

    Raises:
        ValueError: an invalid record, unless these are skipped.
    """
    for location, row in records.rows:
        try:
            record = as_record(location, row)
            fault = template.fault(record)
            if fault is not None:
                raise ValueError(f"{location}: {fault}")
        except ValueError as error:
            if not options.skip_invalid:
                raise ValueError(f"{error}; correct it or leave such out with --skip-invalid") from error
            count.invalid += 1
            if count.invalid == 1:
                warnings.warn(f"left out: {error}; others are counted only", stacklevel=2)
            continue
        yield record


def write_answers(prefix: str | Path, first_answer_tokens: Sequence[int]) -> str:
    """Write `PREFIX.answers.npy`; return its sha256."""
    path = answers_path(prefix)
    write_npy(path, np.array(first_answer_tokens, dtype=np.int32), ANSWERS_DTYPE)
    return sha256_file(path)
