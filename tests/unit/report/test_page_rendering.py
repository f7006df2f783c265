"""One page, two renderings: what a user's file says is shown as it is, never read as markup."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from megatron_exact.report.page import (
    Block,
    Bullets,
    Code,
    CodeBlock,
    Details,
    Faint,
    Figure,
    Heading,
    Note,
    Page,
    Paragraph,
    Strong,
    Table,
    html_page,
    markdown_page,
    one_line,
    plain_text,
    text_html,
    write_page,
)

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title></style><!-- ",
    "![a](https://evil.example/x.png)",
    "[a](javascript:alert(1))",
    "[a]: https://evil.example",
    "a | b ` c ``",
    "# no heading",
    "1. no list",
    "- no list",
    "> no quotation",
    "**not strong** _nor this_ ~~nor~~",
    "&lt;b&gt; &#60;",
    "\u202eright to left\x00\x1b",
    "---",
    "a\n\n# b",
    "\\`\\",
]
special = st.text(alphabet="`*_[]()<>!#&;:-+=~|$\\\"' ab1.\n\t\x07", max_size=30)


def texts(markdown: str) -> list[tuple[str, str]]:
    """(kind, text) of everything inline that a reader of GitHub's tables would see."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(markdown)
    found: list[tuple[str, str]] = []
    for token in tokens:
        if token.type == "inline":
            kinds = {child.type for child in token.children or []}
            words = "".join(child.content for child in token.children or [])
            found.append(("+".join(sorted(kinds - {"text", "text_special"})), words))
        elif token.content and token.type != "inline":
            found.append((token.type, token.content))
    return found


class Reader(HTMLParser):
    """Tags, attributes and visible text of an HTML page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if not self.tags or self.tags[-1] not in ("style", "title"):
            self.text += data


def everywhere(text: str, file: str = "figure.png") -> list[Block]:
    """Blocks of every kind that show a text."""
    table = Table(head=["a", text], body=[[text, (text, Code(text))], ["x", Faint(text)]], caption=text)
    return [
        Heading(text=text),
        Paragraph(text=(text, Strong(text))),
        Note(text=text),
        Bullets(items=[text, (Code(text), text)]),
        CodeBlock(text=text),
        table,
        Figure(file=file, alt=text, caption=text),
        Details(summary=text, blocks=[table]),
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "figure.png").write_bytes(b"\x89PNG made up")
    return tmp_path


@settings(deadline=None)
@given(special)
def test_markdown_shows_any_text_as_it_is(text: str) -> None:
    shown = one_line(text).strip()
    for block in (Paragraph(text=text), Note(text=text), Heading(text=text), Bullets(items=[text])):
        markdown = markdown_page(Page(title="t", blocks=[block])).split("\n", 2)[2]
        assert [one for one in texts(markdown) if one[1]] == ([("", shown)] if shown else []), markdown


@settings(deadline=None)
@given(special)
def test_markdown_tables_show_any_text_as_it_is(text: str) -> None:
    page = Page(title="t", blocks=[Table(head=["a", "b"], body=[[text, "x"]])])
    shown = one_line(text).strip()
    cells = texts(markdown_page(page))[3:]
    assert cells == [("", shown), ("", "x")]


@settings(deadline=None)
@given(special, special)
def test_neighbours_do_not_make_markup_together(one: str, other: str) -> None:
    shown = one_line(one + other).strip()
    markdown = markdown_page(Page(title="t", blocks=[Paragraph(text=(f"a{one}", f"{other}b"))]))
    assert texts(markdown)[1:] == [("", f"a{one_line(one)}{one_line(other)}b")], shown


def test_the_reader_of_markdown_would_see_markup() -> None:
    assert texts("a <b>") == [("html_inline", "a <b>")]
    assert texts("![a](b)") == [("image", "a")]


@settings(deadline=None)
@given(special)
def test_html_shows_any_text_as_it_is(text: str) -> None:
    read = Reader(f"<p>{text_html(text)}</p>")
    assert (read.tags, read.text) == (["p"], one_line(text).strip())


@pytest.mark.parametrize("text", HOSTILE)
def test_html_takes_nothing_from_a_name(text: str, folder: Path) -> None:
    html = html_page(Page(title=text, blocks=everywhere(text)), folder)
    harmless = html_page(Page(title="x", blocks=everywhere("x" * len(one_line(text)))), folder)
    read, other = Reader(html), Reader(harmless)
    assert read.tags == other.tags
    assert [name for name, _ in read.attributes] == [name for name, _ in other.attributes]
    assert one_line(text).strip() in re.sub(r"\s+", " ", read.text)
    assert "\x00" not in html
    assert "\u202e" not in html


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_takes_nothing_from_a_name(text: str) -> None:
    markdown = markdown_page(Page(title=text, blocks=everywhere(text)))
    allowed = {
        "",
        "image",
        "code_inline",
        "strong_close+strong_open",
        "em_close+em_open",
        "fence",
        "html_block",
    }
    kinds = {kind for kind, _ in texts(markdown)}
    assert kinds <= allowed, kinds
    tags = re.findall(r"(?<!\\)<(\w+)", re.sub(r"`[^`]*`|```.*?```", "", markdown, flags=re.DOTALL))
    assert set(tags) <= {"details", "summary"}, tags


def test_a_page_is_readable_by_machines_and_stands_alone(folder: Path) -> None:
    blocks = [*everywhere("words"), Heading(text="words"), Heading(text="part", level=3)]
    html = html_page(Page(title="A page", blocks=blocks), folder)
    read = Reader(html)
    attributes: list[tuple[str, Any]] = read.attributes
    ids = [value for name, value in attributes if name == "id"]
    links = [value for name, value in attributes if name == "href"]
    assert len(ids) == len(set(ids))
    assert links == ["#words", "#words-4"]  # sections; two captions of the same words stand between
    assert set(links) <= {f"#{name}" for name in ids}
    assert ("lang", "en") in attributes
    assert ("name", "viewport") in attributes
    sources = [value for name, value in attributes if name == "src"]
    assert sources == ["data:image/png;base64," + base64.b64encode(b"\x89PNG made up").decode()]
    assert not re.search(r"https?:|//|@import|url\(|<script|<link", html)
    assert html.count("<th scope=") == html.count("<th ")
    assert 'scope="col"' in html
    assert 'scope="row"' in html
    labels = [value for name, value in attributes if name == "aria-labelledby"]
    assert set(labels) <= set(ids)


def test_both_files_are_written(folder: Path) -> None:
    page = Page(title="T", blocks=[Paragraph(text="words"), Figure(file="figure.png", alt="bars")])
    markdown, html = write_page(folder, page, name="page")
    assert markdown.read_text() == "# T\n\nwords\n\n![bars](figure.png)\n"
    assert html.read_text() == html_page(page, folder)


def test_a_missing_figure_leaves_no_page(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_page(tmp_path, Page(title="T", blocks=[Figure(file="none.png", alt="")]))
    assert list(tmp_path.iterdir()) == []


def test_markdown_reads_as_plain_text() -> None:
    table = Table(head=["rule", "delta"], body=[["EXACT", "+1.0 [+0.5, +1.5]"], ["none", Faint("not run")]])
    page = Page(title="T", blocks=[table, Bullets(items=["a", "b"]), CodeBlock(text="x = 1\n\ny = 2")])
    assert markdown_page(page) == (
        "# T\n\n"
        "| rule  |             delta |\n"
        "| ----- | ----------------: |\n"
        "| EXACT | +1.0 [+0.5, +1.5] |\n"
        "| none  |         *not run* |\n\n"
        "* a\n* b\n\n```\nx = 1\n\ny = 2\n```\n"
    )


def test_a_table_is_even() -> None:
    with pytest.raises(ValueError, match="a row of 1 cells in a table of 2 columns"):
        Table(head=["a", "b"], body=[["x"]])


def test_plain_text() -> None:
    assert plain_text(("a ", Code("b"), Strong(" c"))) == "a b c"


def test_spaces_at_the_ends_of_strong_text_stay_outside_its_marks() -> None:
    texts = [(Strong("Paired: "), "yes"), ("a", Strong("  b"), "c", Strong("d"))]
    page = markdown_page(Page(title="t", blocks=[Paragraph(text=text) for text in texts]))
    assert page.splitlines()[2::2] == ["**Paired:** yes", "a **b**c**d**"]
