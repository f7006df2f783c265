"""The one reader of JSON: what it accepts is what json.loads gives, what it refuses is named."""

from __future__ import annotations

import ast
import json
import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_exact import json_input
from megatron_exact.json_input import (
    LARGEST_DEPTH,
    parse_corpus_line,
    parse_json,
    read_json,
    read_json_lines,
    read_json_object,
    require_shape,
)

ROOT = Path(__file__).resolve().parents[2]
WHERE = "record.json"
REMEDY = "make it again"

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def refusal(text: str | bytes, **options: bool) -> str:
    """The one line with which a text is refused."""
    with pytest.raises(ValueError, match=REMEDY) as caught:
        parse_json(text, WHERE, REMEDY, **options)
    message = str(caught.value)
    assert message.startswith(WHERE)
    assert "\n" not in message
    return message


@given(VALUES)
def test_a_sound_text_gives_the_same_value_as_the_plain_reader(value: object) -> None:
    text = json.dumps(value)
    assert parse_json(text, WHERE, REMEDY) == json.loads(text)
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), WHERE, REMEDY) == json.loads(text)
    plain = json.loads(text, parse_int=lambda digits: 0)
    assert parse_corpus_line(text, "text") == plain


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"a": {"b": [1, NaN]}}', ["a.b[1]", "NaN"]),
        ('{"a": -Infinity}', ["a ", "-Infinity"]),
        ('{"loss": 1e999}', ["loss", "1e999", "finite"]),
        ('{"rope_theta": 1' + "0" * 400 + "}", ["rope_theta", "401 digits"]),
        ('{"rope_theta": -1' + "0" * 5000 + "}", ["rope_theta", "digits"]),
        ('{"exposure": {"lower": [0, 1' + "0" * 30 + "]}}", ["exposure.lower[1]", "64 bits"]),
        ('{"n": 9223372036854775808}', ["n ", "9223372036854775808"]),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', ["b ", "'c' twice"]),
        ('{"a": 1, "a": 2}', ["'a' twice"]),
        ('{"a": [1, 2', ["not JSON", "line 1, column"]),
        ("", ["not JSON"]),
        ("[" * 100_000 + "]" * 100_000, [f"more than {LARGEST_DEPTH} deep"]),
        ("[" * 100_000, [f"more than {LARGEST_DEPTH} deep"]),
        ('{"a":' * 3_000 + "1" + "}" * 3_000, [f"more than {LARGEST_DEPTH} deep"]),
        ('{"name": "\\ud800"}', ["surrogate"]),
        (b'{"name": "\xff"}', ["UTF-8", "0xff", "offset 10"]),
        (b"\x00\x01\x02", ["not JSON"]),
    ],
    ids=lambda value: str(value)[:24] if not isinstance(value, list) else "",
)
def test_what_no_record_contains_is_refused_with_its_field(text: str | bytes, named: list[str]) -> None:
    message = refusal(text)
    assert all(part in message for part in named), message
    assert len(message) < 300


def test_the_limits_are_where_they_are_said_to_be() -> None:
    deepest = "[" * LARGEST_DEPTH + "]" * LARGEST_DEPTH
    assert parse_json(deepest, WHERE, REMEDY) == json.loads(deepest)
    assert "deep" in refusal(f"[{deepest}]")
    assert parse_json("[9223372036854775807, -9223372036854775808]", WHERE, REMEDY) == [2**63 - 1, -(2**63)]
    unlimited = 1000000000000000019884624838656  # tokenizer_config.json's model_max_length
    assert parse_json(f"[{unlimited}]", WHERE, REMEDY, wide_integers=True) == [unlimited]
    assert "beyond every float" in refusal("[1" + "0" * 309 + "]", wide_integers=True)
    assert "digits" in refusal("[1" + "0" * 400 + "]", wide_integers=True)
    assert parse_json('["\\ud83d\\ude00"]', WHERE, REMEDY) == ["\U0001f600"]


def test_a_thousand_repeated_keys_take_no_longer_than_others() -> None:
    text = "{" + ", ".join(f'"{i % 100_000}": 1' for i in range(200_000)) + "}"
    began = time.process_time()
    assert "'0' twice" in refusal(text)
    assert time.process_time() - began < 5


def test_files_that_are_no_file_too_large_or_of_another_type_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"record\.json is a FIFO, not a file"):
        read_json(path, REMEDY)  # a plain open() would wait for a writer
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_json(path, REMEDY)
    path.write_text("[1, 2]")
    assert read_json(path, REMEDY) == [1, 2]
    with pytest.raises(ValueError, match="contains a list, not an object"):
        read_json_object(path, REMEDY)
    with pytest.raises(ValueError, match="has 6 bytes, more than the 5"):
        read_json(path, REMEDY, largest_bytes=5)
    with pytest.raises(IsADirectoryError):
        read_json(tmp_path, REMEDY)
    path.write_bytes(b"\xef\xbb\xbf{}")
    assert read_json_object(path, REMEDY) == {}


def test_lines_are_named_by_their_number(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert [value for _, value in read_json_lines(path, REMEDY)] == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1}\n[]\n')
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 2 contains a list"):
        list(read_json_lines(path, REMEDY))
    path.write_text('{"a": 1}\n{"a": NaN}\n')
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 2: a is NaN"):
        list(read_json_lines(path, REMEDY))


def test_a_corpus_line_is_judged_by_the_field_that_is_used() -> None:
    for other in ("1" + "0" * 5_000, "NaN", '{"x": 1, "x": 2}', "1e999"):
        assert parse_corpus_line(f'{{"text": "hello", "score": {other}}}', "text")["text"] == "hello"
        assert parse_corpus_line(f'{{"score": {other}, "text": "hello"}}', "text")["text"] == "hello"
    assert parse_corpus_line('{"id": 1, "id": 2, "text": "hello"}', "text")["text"] == "hello"
    assert parse_corpus_line('{"text": "hello", "meta": {"text": 1, "text": 2}}', "text")["text"] == "hello"
    with pytest.raises(ValueError, match="'text' twice"):
        parse_corpus_line('{"text": "hello", "text": "other"}', "text")
    with pytest.raises(ValueError, match="'text' twice"):
        parse_corpus_line('{"text": "hello", "te\\u0078t": "other"}', "text")
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_corpus_line('{"text": "hello", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "text")


SHAPE = {
    "name": str,
    "rows": int,
    "share": float,
    "parts": [{"id": (str, None), "size?": int}],
    "by": {"*": bool},
}
FITTING = {
    "name": "a",
    "rows": 3,
    "share": 1,
    "parts": [{"id": None, "size": None}, {"id": "x"}],
    "by": {"b": True},
}


def test_a_value_of_the_wanted_shape_passes() -> None:
    require_shape(FITTING, SHAPE)
    require_shape({**FITTING, "more": object()}, SHAPE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 1}, "name is 1, not text"),
        ({"rows": 3.0}, "rows is 3.0, not a whole number"),
        ({"rows": True}, "rows is True, not a whole number"),
        ({"share": "1"}, "share is '1', not a number"),
        ({"share": None}, "share is None, not a number"),
        ({"parts": {}}, "parts is {}, not a list"),
        ({"parts": [{"id": "a"}, 3]}, "parts[1] is 3, not an object"),
        ({"parts": [{}]}, "parts[0].id is missing"),
        ({"parts": [{"id": 3}]}, "parts[0].id is 3"),
        ({"parts": [{"id": "a", "size": "x"}]}, "parts[0].size is 'x', not a whole number"),
        ({"by": {"b": 0}}, "by.b is 0, not true or false"),
        ({"by": []}, "by is [], not an object"),
    ],
)
def test_what_does_not_fit_is_named_by_its_field(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        require_shape({**FITTING, **change}, SHAPE)


# -- the one place ---------------------------------------------------------------------------------

# Files that may read JSON by other means, with the reason.
OTHER_READERS = {
    "megatron_exact/json_input.py": "it is the reader",
    "megatron_exact/folder_lock.py": "4,096 bytes of a lease, every field checked; files.py imports it",
    "megatron_exact/data/encoding_engine.py": "no file: what the tokenizer library wrote from memory",
    "megatron_exact/data/tokenizers.py": "no file: the same text, of 280,000 merges, for its hash",
}
PARSING = {"load", "loads", "JSONDecoder", "safe_load", "decode", "Decoder"}
READERS = {"json", "tomllib", "orjson", "ujson", "simdjson", "msgspec", "yaml"}


def direct_reads(source: str) -> list[int]:
    """Line numbers at which a source parses JSON or TOML by itself."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in READERS and node.attr in PARSING:
                found.append(node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module in READERS:
            found += [node.lineno for name in node.names if name.name in PARSING]
    return found


@pytest.mark.parametrize("folder", ["megatron_exact", "tools"])
def test_json_is_read_through_the_one_reader(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if str(path.relative_to(ROOT)) not in OTHER_READERS
        for line in direct_reads(path.read_text(encoding="utf-8"))
    ]
    assert not found, f"use megatron_exact/json_input.py, or enter the file with its reason: {found}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = ", r"is not TOML \(.*\): remove it"),
        ("a = 1\na = 2", r"is not TOML"),
        ("a.b = [1, nan]", r"a\.b\[1\] is nan, not a finite number: remove it"),
        ("a = inf", r"a is inf, not a finite number"),
        ("a = 9223372036854775808", r"a is an integer beyond int64"),
        ("a = " + "[" * 150 + "]" * 150, r"nested more than 100 deep: remove it"),
        ("a = " + "[" * 100_000, r"is not TOML"),
    ],
)
def test_toml_has_the_same_limits(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        json_input.read_toml(path, "remove it")
    assert str(path) in str(refused.value)
    path.write_text('a = [1, 2.5, "x"]\n[b]\nc = true\n')
    assert json_input.read_toml(path, "remove it") == {"a": [1, 2.5, "x"], "b": {"c": True}}


def test_the_walk_finds_what_it_looks_for() -> None:
    assert direct_reads("import json\nx = json.loads('1')") == [2]
    assert direct_reads("from json import loads") == [1]
    assert direct_reads("import tomllib\ntomllib.load(f)") == [2]
    assert direct_reads("import json\njson.dumps(1)\nfrom json import JSONDecodeError") == []
    own = direct_reads(Path(json_input.__file__).read_text(encoding="utf-8"))
    assert own, "the reader itself is in the list and must be found"
