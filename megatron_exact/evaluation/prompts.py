"""What a model is given: the template around an example, and its length in the model's own tokens.

A base model gets the text itself, a model after QA-SFT the template that it was tuned with. Which of the
two is never guessed: a missing template costs a tuned model most of its score without any error. The counts
are those of lm-eval's Hugging Face backend: special tokens as the tokenizer puts them at a start, but no
second BOS where the template writes one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_exact.evaluation.text_files import read_text_file
from megatron_exact.files import sha256_file

NO_TEMPLATE = "none"
MODEL_TEMPLATE = "model"
PROBE = ("What is asked here?", "What is answered")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


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


def tokenizer_sha256(model: Path) -> str:
    """One hash for the tokenizer files of a model folder.

    Raises:
        ValueError: a folder without a tokenizer.
    """
    found = [model / name for name in TOKENIZER_FILES if (model / name).is_file()]
    if not found:
        raise ValueError(f"{model} holds no tokenizer: copy tokenizer.json beside the weights")
    lines = "".join(f"{path.name} {sha256_file(path)}\n" for path in found)
    return hashlib.sha256(lines.encode()).hexdigest()


class Prompts:
    """Renders and counts as the engine will."""

    def __init__(self, tokenizer: Any, template: Template) -> None:
        """`tokenizer` of transformers; its chat template is replaced by the given one."""
        self.tokenizer = tokenizer
        self.template = template
        if template.text is not None:
            tokenizer.chat_template = template.text

    def render(self, text: str, prefix: str = "", delimiter: str = " ") -> str:
        """The prompt for a text; `prefix` is the start of the answer, which the model continues."""
        if self.template.text is None:
            return f"{text}{delimiter}{prefix}" if prefix else text
        messages = [{"role": "user", "content": text}]
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
