"""Which templates `--template` takes: a template that loses the question would cost every score."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_exact.evaluation.prompts import Prompts, read_template
from tests.unit.evaluation_suites.small_evaluation import small_tokenizer

GOOD = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_template_that_writes_the_question_is_taken(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(GOOD)
    tokenizer = small_tokenizer()
    template = read_template(str(tmp_path / "t.jinja"), tokenizer)
    assert (template.kind, template.text) == ("file", GOOD)
    assert tokenizer.chat_template is None  # looking at it changed nothing
    assert Prompts(tokenizer, template).render("Why?") == "<user>Why?\n<assistant>"
    tokenizer.chat_template = GOOD
    assert read_template("model", tokenizer).text == GOOD


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{# messages #}fixed text", "leaves out what is asked"),
        ("{% for m in messages %}{{ m['nope'].x }}{% endfor %}", r"cannot be rendered \(UndefinedError: "),
        ("{% for m in messages %}", r"cannot be rendered \(TemplateSyntaxError: "),
        ("{{ messages[-1]['content'] }}", "leaves out what is asked"),
        ("{{ messages[0]['content'] }}", "cannot be rendered|leaves out what is asked"),
        ("nothing", "it never names `messages`"),
    ],
)
def test_a_template_that_cannot_ask_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_template(str(path), small_tokenizer())
    assert str(error.value).startswith(f"--template {path}")
    if "messages" in text:
        tokenizer = small_tokenizer()
        tokenizer.chat_template = text
        with pytest.raises(ValueError, match=message):
            read_template("model", tokenizer)


def test_a_template_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_bytes(b"\xff\xfe messages")
    with pytest.raises(ValueError, match=rf"--template {path} is not UTF-8"):
        read_template(str(path), small_tokenizer())
