"""What a model is given: texts that a user names, the template around an example, examples on disk.

A base model gets the text itself, a model after QA-SFT the template that it was tuned with. Which of the
two is never guessed: a missing template costs a tuned model most of its score without any error. The counts
are those of lm-eval's Hugging Face backend: special tokens as the tokenizer puts them at a start, but no
second BOS where the template writes one.

Generated examples are cached, so that both arms of a comparison and a restart share one generation. The
content would come out the same without the cache, because every cell has a seed of its own: the cache saves
time, it is not what pairs two runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_exact.files import write_text
from megatron_exact.json_input import parse_json_object

NO_TEMPLATE = "none"
MODEL_TEMPLATE = "model"
PROBE = ("What is asked here?", "What is answered")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
CACHE_FORMAT = 1
Document = dict[str, Any]
"""One generated example: see `suites.suite.GeneratedSuite.make_examples`."""


def read_text_file(path: Path, option: str) -> str:
    """The text of a file.

    Args:
        path: of the file.
        option: that names it, such as `--essays`.

    Raises:
        ValueError: it is no file, or not UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"{option} {path}: no such file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {path} is not UTF-8 ({error.reason} at byte {error.start})") from error


def sentences(text: str) -> list[str]:
    """Cut a text behind every `.`, `!` or `?` that white space follows."""
    return [part for part in SENTENCE_END.split(text) if part]


@dataclass(frozen=True, kw_only=True)
class Template:
    """What stands around the text of an example."""

    kind: str
    """`none`: nothing; `model`: the tokenizer's own chat template; `file`: the user's."""
    text: str | None
    """Jinja source of a chat template, as `transformers` renders it; None for `none`."""

    def record(self) -> dict[str, Any]:
        """For results.json: the whole template and its sha256."""
        digest = None if self.text is None else hashlib.sha256(self.text.encode()).hexdigest()
        return {"kind": self.kind, "text": self.text, "sha256": digest}


def read_template(option: str, tokenizer: Any) -> Template:
    """The template that `--template` names.

    Args:
        option: `none`, `model` or a file with a Jinja chat template.
        tokenizer: of transformers.

    Raises:
        ValueError: a tokenizer without a template of its own, or a template that cannot be rendered or
            leaves out what is asked.
    """
    template = _named_template(option, tokenizer)
    if template.text is not None:
        _check_rendering(option, template, tokenizer)
    return template


def _named_template(option: str, tokenizer: Any) -> Template:
    if option == NO_TEMPLATE:
        return Template(kind="none", text=None)
    if option == MODEL_TEMPLATE:
        if not isinstance(tokenizer.chat_template, str):
            raise ValueError(
                "--template model: the tokenizer has no chat template: name the file of the template that "
                "the model was tuned with, or none for a base model"
            )
        return Template(kind="model", text=tokenizer.chat_template)
    path = Path(option)
    if not path.is_file():
        raise ValueError(f"--template {option}: no such file; give none, model or a Jinja chat template")
    text = read_text_file(path, "--template")
    if "messages" not in text:
        raise ValueError(f"--template {option}: no chat template: it never names `messages`")
    return Template(kind="file", text=text)


def _check_rendering(option: str, template: Template, tokenizer: Any) -> None:
    """Render a question, alone and with the start of an answer.

    Raises:
        ValueError: it fails, or the question or the answer's start is not in the prompt.
    """
    question, start = PROBE
    before = tokenizer.chat_template
    try:
        prompts = Prompts(tokenizer, template)
        alone = prompts.render(question)
        begun = prompts.render(question, start) if question in alone else ""
    except Exception as error:  # of jinja2, of transformers, and whatever the template itself raises
        raise ValueError(
            f"--template {option} cannot be rendered ({type(error).__name__}: {error}): give the template "
            "that the model was tuned with"
        ) from error
    finally:
        tokenizer.chat_template = before
    if question not in begun or not begun.endswith(start):
        raise ValueError(
            f"--template {option} leaves out what is asked or the start of the answer: its prompt for "
            f"{question!r} is {alone!r}, and with the start {start!r} it is {begun!r}"
        )


class Prompts:
    """Renders and counts as the engine will."""

    def __init__(self, tokenizer: Any, template: Template) -> None:
        """`tokenizer` of transformers; its chat template is replaced by the given one."""
        self.tokenizer = tokenizer
        self.template = template
        if template.text is not None:
            tokenizer.chat_template = template.text

    def render(self, text: str, prefix: str = "", delimiter: str = " ", system: str = "") -> str:
        """The prompt for a text; `prefix` is the start of the answer, which the model continues.

        A system message needs a template: without one the text stands alone.
        """
        if self.template.text is None:
            return plain_prompt(text, prefix, delimiter)
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        if prefix:
            messages.append({"role": "assistant", "content": prefix})
        rendered = self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not prefix,
            continue_final_message=bool(prefix),
        )
        return str(rendered)

    def count(self, prompt: str) -> int:
        """Tokens of a rendered prompt."""
        bos = self.tokenizer.bos_token
        if bos and prompt.startswith(bos):
            return len(self.tokenizer.encode(prompt, add_special_tokens=False))
        return len(self.tokenizer.encode(prompt))

    def overhead(self) -> int:
        """Tokens that the template adds to a text."""
        word = "word"
        return self.count(self.render(word)) - self.count(word)


def require_system(prompts: Prompts, system: str, remedy: str) -> None:
    """Raise ValueError, with a remedy, for a template that cannot take a system message or drops it."""
    if not system or prompts.template.text is None:
        return
    try:
        rendered = prompts.render(PROBE[0], system=system)
    except Exception as error:  # of jinja2, and whatever the template itself raises
        raise ValueError(
            f"the chat template takes no system message ({type(error).__name__}: {error}): {remedy}"
        ) from error
    if system not in rendered:
        raise ValueError(f"the chat template leaves out the system message {system!r}: {remedy}")


def plain_prompt(text: str, prefix: str, delimiter: str) -> str:
    """A text and the start of its answer, as a model without a chat template is given them."""
    return f"{text}{delimiter}{prefix}" if prefix else text


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/megatron-exact/examples`, or under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "megatron-exact" / "examples"


def cached_documents(
    cache: Path, key: Mapping[str, Any], make: Callable[[], list[Document]]
) -> list[Document]:
    """The documents of a key, made if they are not there; a damaged entry is made again."""
    identity = json.dumps({"format": CACHE_FORMAT, **key}, sort_keys=True)
    path = cache / f"{hashlib.sha256(identity.encode()).hexdigest()}.jsonl"
    with contextlib.suppress(OSError, ValueError):
        lines = path.read_text(encoding="utf-8").splitlines()
        parsed = [parse_json_object(line, str(path), "it is made again") for line in lines[1:]]
        if parsed and lines[0] == identity and parsed[-1] == {"documents": len(lines) - 2}:
            return parsed[:-1]
    documents = make()
    body = [json.dumps(document) for document in documents]
    write_text(path, "\n".join([identity, *body, json.dumps({"documents": len(body)})]) + "\n")
    return documents


def cell_seed(seed: int, *names: object) -> int:
    """A seed of 64 bits for one cell: no cell depends on what ran before it."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
