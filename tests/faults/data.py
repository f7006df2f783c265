"""Faults of corpora, packs and text: what a tool is given from outside."""

from __future__ import annotations

import gzip
import json
import operator
import os
import signal
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_exact.data.indexed import HEADER
from megatron_exact.data.manifest import fingerprint_of
from tests.faults import matrix
from tests.faults.kit import PACKING, Kit
from tests.faults.matrix import Row, refused

Damage = Callable[[Path], object]


def _pack(_: Kit, folder: Path) -> Sequence[Any]:
    return ("pack_corpus.py", *PACKING, "--source", folder / "c", "--output", folder / "new")


def _inspect(_: Kit, folder: Path) -> Sequence[Any]:
    return ("inspect_pack.py", folder / "pack")


def _verify(_: Kit, folder: Path) -> Sequence[Any]:
    return ("pack_corpus.py", "--verify", folder / "pack")


def _tokenize(name: str) -> Callable[[Kit, Path], Sequence[Any]]:
    def command(kit: Kit, folder: Path) -> Sequence[Any]:
        into = ("--tokenizer", kit.hf, "--workers", 1, "--output-prefix", folder / "new")
        return ("tokenize_corpus.py", "--input", folder / name, *into)

    return command


# -- .idx and .bin ---------------------------------------------------------------------------------


def _idx(change: Callable[[bytearray, int], object]) -> Damage:
    """Change the bytes of `c.idx`; the change also gets the number of its sequences."""

    def damage(folder: Path) -> None:
        path = folder / "c.idx"
        data = bytearray(path.read_bytes())
        change(data, HEADER.unpack_from(data)[3])
        path.write_bytes(data)

    return damage


def _put(place: Callable[[int], int], form: str, value: int) -> Damage:
    return _idx(lambda data, count: struct.pack_into(form, data, place(count), value))


def _lengths(_: int) -> int:
    return HEADER.size


def _offsets(count: int) -> int:
    return HEADER.size + 4 * count


def _boundaries(count: int) -> int:
    return HEADER.size + 12 * count


def _truncate(name: str, size: int) -> Damage:
    """Cut a file to a size, or by one if that is negative."""

    def damage(folder: Path) -> None:
        path = folder / name
        os.truncate(path, size if size >= 0 else path.stat().st_size + size)

    return damage


def _append(name: str, data: bytes) -> Damage:
    def damage(folder: Path) -> None:
        with open(folder / name, "ab") as stream:
            stream.write(data)

    return damage


def _replace(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


def _fifo(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def _folder(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return damage


def _link(name: str, target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return damage


def _flip(name: str, place: int) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)

    return damage


def corpus_row(name: str, fault: str, words: str, damage: Damage, **options: Any) -> Row:
    """A damaged corpus that is packed."""
    return refused(name, fault, words, _pack, damage=damage, material=lambda kit: kit.corpus, **options)


CORPORA = [
    corpus_row(
        "idx-negative-sequences",
        "`.idx` that says -1 sequences",
        "its header asks for",
        _put(lambda _: 18, "<q", -1),
    ),
    corpus_row(
        "idx-overflowing-sequences",
        "`.idx` that says 2^61 sequences, whose bytes overflow 64 bits",
        "its header asks for",
        _put(lambda _: 18, "<Q", 1 << 61),
    ),
    corpus_row(
        "idx-no-boundaries",
        "`.idx` of 0 document boundaries",
        "its header asks for",
        _put(lambda _: 26, "<q", 0),
    ),
    corpus_row(
        "idx-negative-boundaries",
        "`.idx` of -5 document boundaries",
        "its header asks for",
        _put(lambda _: 26, "<q", -5),
    ),
    corpus_row(
        "idx-first-pointer",
        "`.idx` whose first pointer is 2",
        "do not lie back to back",
        _put(_offsets, "<q", 2),
    ),
    corpus_row(
        "idx-pointer-outside",
        "`.idx` with a pointer far outside of the `.bin`",
        "do not lie back to back",
        _put(lambda count: _offsets(count) + 80, "<q", 1 << 50),
    ),
    corpus_row(
        "idx-pointer-negative",
        "`.idx` with a negative pointer",
        "do not lie back to back",
        _put(lambda count: _offsets(count) + 80, "<q", -8),
    ),
    corpus_row(
        "idx-length-negative",
        "`.idx` with a negative length",
        "tokens: the index is damaged",
        _put(lambda _: HEADER.size + 40, "<i", -3),
    ),
    corpus_row(
        "idx-length-huge",
        "`.idx` with a length of 2^31 - 1",
        "truncated or belongs",
        _put(lambda _: HEADER.size + 40, "<i", (1 << 31) - 1),
    ),
    corpus_row(
        "idx-boundary-outside",
        "`.idx` with a document boundary beyond its sequences",
        "tokens: the index is damaged",
        _put(lambda count: _boundaries(count) + 80, "<q", 1 << 40),
    ),
    corpus_row(
        "idx-boundary-backwards",
        "`.idx` whose boundaries go backwards",
        "tokens: the index is damaged",
        _put(lambda count: _boundaries(count) + 80, "<q", 3),
    ),
    corpus_row("idx-cut", "`.idx` cut by 8 bytes", "its header asks for", _truncate("c.idx", -8)),
    corpus_row("idx-empty", "empty `.idx`", "is not a Megatron index", _truncate("c.idx", 0)),
    corpus_row(
        "idx-longer", "`.idx` with 3 bytes too many", "its header asks for", _append("c.idx", b"abc")
    ),
    corpus_row("idx-magic", "`.idx` of another format", "is not a Megatron index", _flip("c.idx", 0)),
    corpus_row("idx-version", "`.idx` of version 2", "version 2", _put(lambda _: 9, "<Q", 2)),
    corpus_row("idx-floats", "`.idx` of float tokens", "dtype code 6", _put(lambda _: 17, "<B", 6)),
    corpus_row("idx-dtype", "`.idx` of an unknown dtype", "dtype code 99", _put(lambda _: 17, "<B", 99)),
    corpus_row("idx-fifo", "a FIFO in place of the `.idx`", "is missing", _fifo("c.idx")),
    corpus_row("idx-folder", "a folder in place of the `.idx`", "is missing", _folder("c.idx")),
    corpus_row("bin-fifo", "a FIFO in place of the `.bin`", "is missing", _fifo("c.bin")),
    corpus_row("bin-cut", "`.bin` cut by one token", "truncated or belongs", _truncate("c.bin", -2)),
    corpus_row(
        "bin-longer", "`.bin` with one token too many", "truncated or belongs", _append("c.bin", b"ab")
    ),
    corpus_row(
        "bin-gone", "`.bin` deleted", "c.bin is missing", lambda folder: (folder / "c.bin").unlink()
    ),
    corpus_row(
        "bin-device", "`.bin` that is a link to /dev/zero", "is missing", _link("c.bin", "/dev/zero")
    ),
]


# -- records and manifests -------------------------------------------------------------------------


def _json(name: str, change: Callable[[Any], object]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text())
        changed = change(content)
        path.write_text(json.dumps(content if changed is None else changed))

    return damage


def _text(name: str, old: str, new: str) -> Damage:
    """Put other words into a text file, which must contain the old ones."""

    def damage(folder: Path) -> None:
        path = folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return damage


def _signed(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the manifest and sign it again, as whoever can compute a hash can."""

    def damage(folder: Path) -> None:
        path = folder / "pack" / "manifest.json"
        content = json.loads(path.read_text())
        change(content)
        content["fingerprint"] = fingerprint_of(content)
        path.write_text(json.dumps(content))

    return damage


MANIFEST = "pack/manifest.json"
DEEP = b"[" * 100_000 + b"]" * 100_000


def pack_row(name: str, fault: str, words: str, damage: Damage) -> Row:
    """A damaged pack that is inspected."""
    return refused(name, fault, words, _inspect, damage=damage, material=lambda kit: kit.packed)


def verify_row(name: str, fault: str, words: str, damage: Damage) -> Row:
    """A damaged pack that `pack_corpus.py --verify` looks at."""
    material = operator.attrgetter("packed")
    return refused(name, fault, words, _verify, damage=damage, material=material, sign=matrix.FAILED)


PACKS = [
    pack_row(
        "manifest-edited",
        "manifest with an edited number",
        "edited or damaged",
        _json(MANIFEST, lambda content: content["splits"]["train"].update(rows=7)),
    ),
    pack_row(
        "manifest-junk", "manifest of binary junk", "manifest.json", _replace(MANIFEST, bytes(range(256)))
    ),
    pack_row("manifest-empty", "empty manifest", "manifest.json", _truncate(MANIFEST, 0)),
    pack_row("manifest-cut", "manifest cut in half", "manifest.json", _truncate(MANIFEST, 700)),
    pack_row("manifest-list", "manifest that is a list", "manifest.json", _replace(MANIFEST, b"[]")),
    pack_row("manifest-deep", "manifest nested 100,000 deep", "manifest.json", _replace(MANIFEST, DEEP)),
    pack_row(
        "manifest-twice",
        "manifest with a key twice",
        "manifest.json",
        _text(MANIFEST, '"seed": 1', '"seed": 2, "seed": 1'),
    ),
    pack_row(
        "manifest-nan", "manifest with NaN", "manifest.json", _text(MANIFEST, '"seed": 1', '"seed": NaN')
    ),
    pack_row(
        "manifest-400-digits",
        "manifest with an integer of 400 digits where a fraction belongs",
        "manifest.json",
        _text(MANIFEST, '"validation_fraction": 0.2', f'"validation_fraction": {10**400}'),
    ),
    pack_row(
        "manifest-5000-digits",
        "manifest with an integer of 5,000 digits",
        "manifest.json",
        _text(MANIFEST, '"seed": 1', f'"seed": {"1" * 5000}'),
    ),
    pack_row(
        "manifest-version",
        "manifest of format_version 99",
        "99",
        _signed(lambda content: content.update(format_version=99)),
    ),
    pack_row(
        "manifest-negative-rows",
        "manifest of -1 rows, signed again",
        "row",
        _signed(lambda content: content["splits"]["train"].update(rows=-1)),
    ),
    pack_row(
        "manifest-exposure-huge",
        "manifest whose exposure begins at 10^30, signed again",
        "exposure",
        _signed(lambda content: content["splits"]["train"]["exposure"]["lower"].__setitem__(-1, 10**30)),
    ),
    pack_row(
        "manifest-seed-text",
        "manifest whose seed is a text, signed again",
        "seed",
        _signed(lambda content: content.update(seed="1")),
    ),
    pack_row(
        "manifest-row-tokens-float",
        "manifest whose rows have 64.5 tokens, signed again",
        "row_tokens",
        _signed(lambda content: content.update(row_tokens=64.5)),
    ),
    verify_row(
        "manifest-path-traversal",
        "manifest whose source is `../../../../etc/passwd`, signed again",
        "etc/passwd",
        _signed(lambda content: content["sources"][0].update(prefix="../../../../../../../etc/passwd")),
    ),
    verify_row(
        "manifest-absolute-path",
        "manifest whose source is `/dev/zero`, signed again",
        "/dev/zero",
        _signed(lambda content: content["sources"][0].update(prefix="/dev/zero")),
    ),
    verify_row(
        "manifest-control-characters",
        "manifest whose source has ESC and a newline in its name, signed again",
        "is missing",
        _signed(lambda content: content["sources"][0].update(prefix="a\x1b[31m\nb")),
    ),
    pack_row("manifest-fifo", "a FIFO in place of the manifest", "manifest.json", _fifo(MANIFEST)),
    pack_row(
        "manifest-device",
        "a manifest that links to /dev/zero",
        "manifest.json",
        _link(MANIFEST, "/dev/zero"),
    ),
]


def _npy(change: Callable[[Path], object]) -> Damage:
    """Change an array and sign the manifest with its new hash."""
    name = "pack/train/segment_start.npy"

    def damage(folder: Path) -> None:
        from megatron_exact.files import sha256_file

        change(folder / name)
        digest = sha256_file(folder / name)

        def sign(content: dict[str, Any]) -> None:
            for arrays in _dictionaries(content["splits"]["train"]):
                for key, value in arrays.items():
                    if "segment_start" in key:
                        arrays[key] = digest if isinstance(value, str) else {**value, "sha256": digest}

        _signed(sign)(folder)

    return damage


def _dictionaries(content: Any) -> list[dict[str, Any]]:
    if not isinstance(content, dict):
        return []
    return [content, *(inner for value in content.values() for inner in _dictionaries(value))]


class Planted:
    """Unpickling this leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch /tmp/megatron-exact-was-executed",))


def _save_object(path: Path) -> None:
    array = np.load(path)
    np.save(path, np.array([Planted()] * array.size, dtype=object), allow_pickle=True)


def _resave(convert: Callable[[Any], Any]) -> Damage:
    return _npy(lambda path: np.save(path, convert(np.load(path))))


ARRAYS = [
    verify_row(
        "npy-objects",
        "`.npy` of Python objects, hash and signature fitting",
        "segment_start",
        _npy(_save_object),
    ),
    verify_row(
        "npy-flipped",
        "`.npy` with a flipped bit",
        "segment_start",
        _flip("pack/train/segment_start.npy", -5),
    ),
    verify_row(
        "npy-cut",
        "`.npy` cut in the middle, signed again",
        "segment_start",
        _npy(lambda path: os.truncate(path, 400)),
    ),
    verify_row(
        "npy-floats",
        "`.npy` of float64, signed again",
        "segment_start",
        _resave(lambda array: array.astype(float)),
    ),
    verify_row(
        "npy-two-dimensions",
        "`.npy` of two dimensions, signed again",
        "segment_start",
        _resave(lambda array: array[:, None]),
    ),
    verify_row(
        "npy-shorter",
        "`.npy` without its last element, signed again",
        "segment",
        _resave(lambda array: array[:-1]),
    ),
    verify_row(
        "npy-outside",
        "`.npy` with a start outside of its document, signed again",
        "differs from what these sources",
        _resave(lambda array: array + 10**6),
    ),
    verify_row(
        "npy-gone",
        "`.npy` deleted",
        "segment_start",
        lambda folder: (folder / "pack/train/segment_start.npy").unlink(),
    ),
    verify_row(
        "npy-fifo", "a FIFO in place of the `.npy`", "segment_start", _fifo("pack/train/segment_start.npy")
    ),
    verify_row(
        "npy-header",
        "`.npy` whose header says 2^60 elements, signed again",
        "segment_start",
        _npy(
            lambda path: path.write_bytes(
                path.read_bytes()[:10]
                + b"{'descr': '<i8', 'fortran_order': False, 'shape': (1152921504606846976,), }".ljust(117)
                + b"\n"
                + path.read_bytes()[128:]
            )
        ),
    ),
    verify_row(
        "corpus-token-changed", "a token of the corpus changed after packing", "c.bin", _flip("c.bin", 100)
    ),
    verify_row(
        "corpus-replaced",
        "the corpus replaced by another of equal size",
        "c.bin",
        lambda folder: (folder / "c.bin").write_bytes((folder / "c.bin").read_bytes()[::-1]),
    ),
    verify_row(
        "corpus-index-exchanged",
        "two lengths of the index exchanged after packing",
        "c.idx",
        _idx(
            lambda data, count: data.__setitem__(
                slice(HEADER.size, HEADER.size + 8),
                data[HEADER.size + 4 : HEADER.size + 8] + data[HEADER.size : HEADER.size + 4],
            )
        ),
    ),
    verify_row(
        "record-gone-wrong",
        "corpus record that lacks a field",
        "c.json",
        _text("c.json", '"tokens"', '"tokenz"'),
    ),
    verify_row("record-deep", "corpus record nested 100,000 deep", "c.json", _replace("c.json", DEEP)),
]


# -- text ------------------------------------------------------------------------------------------


def _jsonl_gz(folder: Path) -> None:
    data = gzip.compress((folder / "a.jsonl").read_bytes())
    (folder / "a.jsonl.gz").write_bytes(data[: len(data) // 2])


def _zst(folder: Path) -> None:
    import zstandard

    data = zstandard.ZstdCompressor().compress((folder / "a.jsonl").read_bytes())
    (folder / "a.jsonl.zst").write_bytes(data[: len(data) // 2])


def _parquet(folder: Path, columns: dict[str, list[Any]] | None = None) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "a.parquet"
    pq.write_table(pa.table(columns or {"text": ["one document", "another"] * 50}), path)
    return path


def _cut_parquet(folder: Path) -> None:
    path = _parquet(folder)
    os.truncate(path, path.stat().st_size // 2)


def _flip_parquet(folder: Path) -> None:
    path = _parquet(folder)
    data = bytearray(path.read_bytes())
    data[8:60] = bytes(52)
    path.write_bytes(data)


def text_row(name: str, fault: str, words: str, file: str, damage: Damage) -> Row:
    """Damaged text that is tokenised."""
    return refused(name, fault, words, _tokenize(file), damage=damage, material=lambda kit: kit.text)


def _line(line: bytes) -> Damage:
    return _append("a.jsonl", line + b"\n")


TEXTS = [
    text_row("gz-cut", "`.jsonl.gz` cut in half", "a.jsonl.gz", "a.jsonl.gz", _jsonl_gz),
    text_row(
        "gz-not",
        "`.jsonl.gz` that is no gzip file",
        "a.jsonl.gz",
        "a.jsonl.gz",
        _replace("a.jsonl.gz", b"plain\n" * 40),
    ),
    text_row("zst-cut", "`.jsonl.zst` cut in half", "a.jsonl.zst", "a.jsonl.zst", _zst),
    text_row("parquet-cut", "parquet cut in half", "a.parquet", "a.parquet", _cut_parquet),
    text_row(
        "parquet-damaged-page", "parquet with zeros in a page", "a.parquet", "a.parquet", _flip_parquet
    ),
    text_row(
        "parquet-other-column",
        "parquet without the text column",
        "text",
        "a.parquet",
        lambda folder: _parquet(folder, {"body": ["a"]}),
    ),
    text_row(
        "parquet-numbers",
        "parquet whose text column has numbers",
        "text",
        "a.parquet",
        lambda folder: _parquet(folder, {"text": [1, 2]}),
    ),
    text_row(
        "jsonl-not-utf8",
        "a line that is not UTF-8",
        "a.jsonl:201",
        "a.jsonl",
        _line(b'{"text": "\xff\xfe"}'),
    ),
    text_row("jsonl-not-json", "a line that is not JSON", "a.jsonl:201", "a.jsonl", _line(b'{"text": "a"')),
    text_row(
        "jsonl-deep",
        "a line nested 100,000 deep",
        "a.jsonl:201",
        "a.jsonl",
        _line(b'{"text": "a", "b": ' + DEEP + b"}"),
    ),
    text_row("jsonl-list", "a line that is a list", "a.jsonl:201", "a.jsonl", _line(b"[1]")),
    text_row("jsonl-no-text", "a line without text", "a.jsonl:201", "a.jsonl", _line(b'{"body": "a"}')),
    text_row(
        "jsonl-number", "a line whose text is a number", "a.jsonl:201", "a.jsonl", _line(b'{"text": 5}')
    ),
    text_row(
        "jsonl-surrogate",
        "a line with half a surrogate pair",
        "a.jsonl:201",
        "a.jsonl",
        _line(b'{"text": "\\ud800"}'),
    ),
    text_row("jsonl-fifo", "a FIFO as input", "f.jsonl", "f.jsonl", _fifo("f.jsonl")),
    text_row(
        "jsonl-device", "a link to /dev/zero as input", "z.jsonl", "z.jsonl", _link("z.jsonl", "/dev/zero")
    ),
    text_row(
        "jsonl-folder", "a folder named like a file as input", "d.jsonl", "d.jsonl", _folder("d.jsonl")
    ),
    text_row("jsonl-gone", "a missing input", "nowhere.jsonl", "nowhere.jsonl", lambda _: None),
    text_row("jsonl-empty", "an empty input", "is empty", "e.jsonl", _replace("e.jsonl", b"")),
]

# -- what happens to the tools ---------------------------------------------------------------------


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + matrix.MOST_SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def _slow_packer(folder: Path) -> Callable[[], None]:
    """Let a packer stop before its manifest, until `folder/go` exists."""

    def first() -> None:
        from megatron_exact.data import pack

        stock = pack.write_manifest

        def write_manifest(*arguments: Any) -> None:
            (folder / "there").touch()
            wait_for(folder / "go")
            stock(*arguments)

        pack.write_manifest = write_manifest

    return first


def _slow_tokenizer(folder: Path) -> Callable[[], None]:
    """Let a tokeniser stop in the middle of its documents, until `folder/go` exists."""

    def first() -> None:
        from megatron_exact.data import indexed

        stock = indexed.GrowingCorpus.add

        def add(*arguments: Any, **options: Any) -> Any:
            (folder / "there").touch()
            wait_for(folder / "go")
            return stock(*arguments, **options)

        indexed.GrowingCorpus.add = add

    return first


def _packing(kit: Kit, folder: Path) -> Sequence[Any]:
    return ("pack_corpus.py", *PACKING, "--source", kit.packed / "c", "--output", folder / "new")


def _tokenizing(kit: Kit, folder: Path) -> Sequence[Any]:
    into = ("--tokenizer", kit.hf, "--workers", 1, "--output-prefix", folder / "new")
    return ("tokenize_corpus.py", "--input", kit.text / "a.jsonl", *into)


def _same_pack(kit: Kit, folder: Path) -> None:
    """The new pack is that of the kit."""
    for name in ("train/segment_start.npy", "validation/segment_start.npy"):
        assert (folder / "new" / name).read_bytes() == (kit.packed / "pack" / name).read_bytes()
    fingerprints = [
        json.loads((pack / "manifest.json").read_text())["fingerprint"]
        for pack in (folder / "new", kit.packed / "pack")
    ]
    assert fingerprints[0] == fingerprints[1]


def _same_corpus(kit: Kit, folder: Path) -> None:
    """The new corpus is that of the kit."""
    for suffix in (".bin", ".idx"):
        assert (folder / f"new{suffix}").read_bytes() == (kit.corpus / f"c{suffix}").read_bytes()


@dataclass(frozen=True, kw_only=True)
class Work:
    """A tool at work."""

    name: str
    """In rows."""
    command: Callable[[Kit, Path], Sequence[Any]]
    """Whole command."""
    slow: Callable[[Path], Callable[[], None]]
    """Stops it in the middle."""
    same: Callable[[Kit, Path], None]
    """Compares with an undisturbed run."""
    leaves: tuple[str, ...]
    """Files when it is done."""


PACKER = Work(name="packer", command=_packing, slow=_slow_packer, same=_same_pack, leaves=("new",))
TOKENIZER = Work(
    name="tokeniser",
    command=_tokenizing,
    slow=_slow_tokenizer,
    same=_same_corpus,
    leaves=("new.bin", "new.idx", "new.json"),
)


def _names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(set(os.listdir(folder)) - {"there", "go", "output.txt"}))


def signalled(work: Work, name: str, code: int, leaves: str) -> Row:
    """A tool that gets a signal in the middle, and is started again."""

    def run(kit: Kit, folder: Path) -> None:
        output = folder / "out"
        output.mkdir()
        tool, *arguments = work.command(kit, output)

        def stop(child: int) -> None:
            wait_for(folder / "there")
            os.kill(child, signal.Signals[name])

        ended = matrix.run_tool(tool, arguments, folder, first=work.slow(folder), while_running=stop)
        assert ended.code == code, ended.output
        assert "Traceback" not in ended.output
        assert not set(work.leaves) & set(os.listdir(output))
        again = matrix.run_tool(tool, arguments, folder)
        assert again.code == 0, again.output
        assert _names(output) == work.leaves
        work.same(kit, output)

    return Row(
        name=f"{work.name}-{name}",
        fault=f"{name} to the {work.name} in the middle of its work, then the same command",
        holds="nothing half-written under its name; the second run makes the same bytes",
        seen=f"exit {code}, {leaves}; then exit 0, the bytes of an undisturbed run, nothing else left",
        run=run,
    )


def two_at_once(work: Work) -> Row:
    """Two tools that write one output."""

    def run(kit: Kit, folder: Path) -> None:
        output = folder / "out"
        output.mkdir()
        tool, *arguments = work.command(kit, output)

        def second(_: int) -> None:
            wait_for(folder / "there")
            other = folder / "other"
            other.mkdir()
            matrix.check_refusal(matrix.run_tool(tool, arguments, other), "is in use by process")
            (folder / "go").touch()

        ended = matrix.run_tool(tool, arguments, folder, first=work.slow(folder), while_running=second)
        assert ended.code == 0, ended.output
        assert _names(output) == work.leaves
        work.same(kit, output)

    return Row(
        name=f"{work.name}-twice",
        fault=f"two {work.name}s at once into one output",
        holds="the second is refused in one line; the first is undisturbed",
        seen="second: exit 1, `is in use by process`; first: exit 0, the bytes of a run alone",
        run=run,
    )


def full_disk(work: Work, size: int) -> Row:
    """A tool on a disk that is full, and again with room."""

    def run(kit: Kit, folder: Path) -> None:
        output = folder / "out"
        output.mkdir()
        tool, *arguments = work.command(kit, output)
        ended = matrix.run_tool(tool, arguments, folder, first=lambda: matrix.limit_files(size))
        matrix.check_refusal(ended, "new")
        assert not set(work.leaves) & set(os.listdir(output))
        again = matrix.run_tool(tool, arguments, folder)
        assert again.code == 0, again.output
        assert _names(output) == work.leaves
        work.same(kit, output)

    return Row(
        name=f"{work.name}-full-disk",
        fault=f"no file of the {work.name} can grow beyond {size:,} bytes",
        holds="one line that names the file; the same command works once there is room",
        seen="exit 1, the file's name; then exit 0, the bytes of an undisturbed run",
        run=run,
    )


def on_tmpfs(work: Work, options: str, fault: str, words: str) -> Row:
    """A tool that writes into a file system that takes nothing."""

    def run(kit: Kit, folder: Path) -> None:
        kit.corpus, kit.packed  # noqa: B018  # made before
        with matrix.mounted(folder / "out", options) as output:
            tool, *arguments = work.command(kit, output)
            ended = matrix.run_tool(tool, arguments, folder)
            matrix.check_refusal(ended, words)
            assert not set(work.leaves) & set(os.listdir(output))

    name = f"{work.name}-{'read-only' if 'ro' in options.split(',') else 'tmpfs-full'}"
    return Row(
        name=name,
        fault=f"{work.name} into {fault}",
        holds=matrix.REFUSED,
        seen=f"exit 1: `{words}`",
        run=run,
    )


TOOLS = [
    *(
        signalled(work, name, code, leaves)
        for work, leaves in ((PACKER, "no pack"), (TOKENIZER, "no corpus under its name"))
        for name, code in (("SIGKILL", -9), ("SIGTERM", 143), ("SIGINT", 130))
    ),
    two_at_once(PACKER),
    two_at_once(TOKENIZER),
    full_disk(PACKER, 1000),
    full_disk(TOKENIZER, 1000),
    on_tmpfs(PACKER, "size=8k", "a file system of 8 KiB", "No space left on device"),
    on_tmpfs(TOKENIZER, "size=8k", "a file system of 8 KiB", "No space left on device"),
    on_tmpfs(PACKER, "ro", "a read-only file system", "Read-only file system"),
    on_tmpfs(TOKENIZER, "ro", "a read-only file system", "Read-only file system"),
]

ROWS = [*matrix.quick(CORPORA), *PACKS, *ARRAYS, *matrix.quick(TEXTS), *TOOLS]
