"""The text around a question: one Jinja chat template for tuning and for evaluation.

transformers renders it in both places, and in both the prompt is tokenized apart from the answer: tuning
sees the very tokens behind which a model later has to answer. The answer ends with the EOD, whatever the
template would write behind it.

A chat template may close turns with the EOD itself (Qwen2.5-Instruct: `<|im_end|>`). Then the prompt holds
it too, where it ends a turn and no document: a record is one document whatever its tokens are, and nothing
in a prompt is supervised.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.encoding import eod_in_text
from megatron_exact.data.hf_tokenizer import is_control_token, load_for_rendering
from megatron_exact.data.qa_records import QaRecord
from megatron_exact.data.tokenizers import CorpusTokenizer

DEFAULT_TEMPLATE = Path(__file__).parent / "templates" / "question_answer.jinja"
MODEL_TEMPLATE = "model"
CONTEXT_PLACES = ("before", "after")
PROBE = ("What is asked here", "What is answered there")


@dataclass(frozen=True, kw_only=True)
class EncodedRecord:
    """The tokens of one record."""

    ids: NDArray[np.int32]
    """[tokens]: what the tokenizer puts at a start, prompt, answer, EOD."""
    first_answer_token: int
    """Where the answer begins."""


class QaTemplate:
    """Writes records as a template says.

    Attributes:
        text: Jinja source.
        sha256: of its UTF-8 bytes.
        context_place: where a record's context stands in the question.

    Args:
        option: a file with a chat template, or `model` for the tokenizer's own.
        tokenizer: with the rule for whole documents, of a Hugging Face folder.
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
        self._renderer = _load_renderer(tokenizer)
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
        """What stands before the answer."""
        return self._render([{"role": "user", "content": question}], add_generation_prompt=True)

    def encode(self, records: list[QaRecord]) -> list[EncodedRecord]:
        """Tokens of records that `fault` finds no fault in."""
        prompts = [self.prompt(record.question(self.context_place)) for record in records]
        prompt_ids = self._renderer(prompts, add_special_tokens=False)["input_ids"]
        answer_ids = self._tokenizer.backend.encode_batch([record.response for record in records])
        encoded = []
        for text, prompt, answer in zip(prompts, prompt_ids, answer_ids, strict=True):
            start = [] if self._writes_start(text) else list(self._tokenizer.prefix_ids)
            ids = [*start, *prompt, *answer, self._tokenizer.eod_id]
            encoded.append(
                EncodedRecord(
                    ids=np.array(ids, dtype=np.int32), first_answer_token=len(start) + len(prompt)
                )
            )
        return encoded

    def fault(self, record: QaRecord) -> str | None:
        """Why a record cannot be used, None if it can: control tokens are the template's alone."""
        text = "\n".join((record.instruction, record.context, record.response))
        for token in self._control_tokens:
            if token in text:
                return f"its text contains the control token {token!r}"
        if self._tokenizer.eod_id in self._tokenizer.backend.encode_batch([record.response])[0]:
            return eod_in_text(self._tokenizer, record.response)
        return None

    def _writes_start(self, prompt: str) -> bool:
        """Whether the template itself writes what the tokenizer puts at a start."""
        begin = self._renderer.bos_token
        return bool(begin) and prompt.startswith(begin)

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


def _load_renderer(tokenizer: CorpusTokenizer) -> Any:
    """The same tokenizer as evaluation loads it."""
    if tokenizer.kind != "huggingface" or not tokenizer.path.is_dir():
        raise ValueError(
            f"tokenizer {tokenizer.path} is no Hugging Face folder: question-answer records need one, "
            "because evaluation renders the template with it"
        )
    return load_for_rendering(tokenizer.path)[0]


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
        raise ValueError(f"--template {option}: no chat template: it never names `messages`")
    return text
