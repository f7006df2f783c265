"""Packing: what changes the fingerprint, what is refused, and that nothing half-made is left."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_corpora import (
    Documents,
    ended_documents,
    heavy_tailed_lengths,
    random_documents,
    read_rows_plainly,
    write_corpus,
)

from megatron_exact.data.indexed import CODE_OF_DTYPE, HEADER, MAGIC, VERSION
from megatron_exact.data.manifest import POLICIES, Manifest, fingerprint_of, read_manifest
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.data.rows import RowReader
from megatron_exact.data.verify_pack import verify_pack
from megatron_exact.files import sha256_file
from tests import forked

pytestmark = pytest.mark.filterwarnings(
    "ignore:no source has a corpus record", "ignore:the validation split"
)
BASE = {"row_tokens": 32, "policy": "concat", "seed": 1, "validation_fraction": 0.1}


def documents(count: int = 50, seed: int = 0) -> Documents:
    return ended_documents(random_documents(heavy_tailed_lengths(count, seed), seed))


def pack(root: Path, sources: list[str], name: str = "pack", **changes: Any) -> Manifest:
    return pack_corpora(sources, root / name, PackOptions(**{**BASE, **changes}))


def run_tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return forked.run_tool("pack_corpus.py", *arguments)


def test_each_option_order_byte_and_tokenizer_changes_the_fingerprint(tmp_path: Path) -> None:
    one = write_corpus(tmp_path / "one", documents(seed=1), tokenizer_sha256="a" * 64)
    two = write_corpus(tmp_path / "two", documents(seed=2), tokenizer_sha256="a" * 64)
    changes: dict[str, tuple[list[str], dict[str, Any]]] = {
        "base": ([one, two], {}),
        "order": ([two, one], {}),
        "weights": ([f"1:{one}", f"1:{two}"], {}),
        "other weights": ([f"1:{one}", f"2:{two}"], {}),
        "row_tokens": ([one, two], {"row_tokens": 33}),
        "policy": ([one, two], {"policy": "best-fit"}),
        "seed": ([one, two], {"seed": 2}),
        "fraction": ([one, two], {"validation_fraction": 0.11}),
        "mask": ([one, two], {"mask_cross_document_targets": True}),
        "train_tokens": ([one, two], {"train_tokens": 500}),
        "repeats": ([one, two], {"train_tokens": 500, "allow_repeats": True}),
        "a slice": ([one, two], {"corpus_slice": "1/2"}),
        "another slice": ([one, two], {"corpus_slice": "2/2"}),
    }
    fingerprints = {
        name: pack(tmp_path, sources, name, **options).fingerprint
        for name, (sources, options) in changes.items()
    }
    again = pack(tmp_path, [one, two], "again")
    assert again.fingerprint == fingerprints["base"]
    whole = pack(tmp_path, [one, two], "whole", corpus_slice="1/1")  # the same rows
    assert whole.fingerprint == fingerprints["base"]
    assert "corpus_slice" not in (tmp_path / "whole" / "manifest.json").read_text()

    changed = documents(seed=1)
    longest = max(changed, key=len)
    longest[0] = 1 + longest[0] % 900
    write_corpus(tmp_path / "one", changed, tokenizer_sha256="a" * 64)
    fingerprints["one token"] = pack(tmp_path, [one, two], "token").fingerprint
    write_corpus(tmp_path / "one", documents(seed=1), tokenizer_sha256="b" * 64)
    write_corpus(tmp_path / "two", documents(seed=2), tokenizer_sha256="b" * 64)
    fingerprints["tokenizer"] = pack(tmp_path, [one, two], "tokenizer").fingerprint
    assert len(set(fingerprints.values())) == len(fingerprints)


def test_one_seed_holds_out_the_same_documents_in_every_stage(tmp_path: Path) -> None:
    one = write_corpus(tmp_path / "one", documents(200, 1))
    two = write_corpus(tmp_path / "two", documents(200, 2))
    packs = {
        "short": pack(tmp_path, [one], "short", row_tokens=16, policy="best-fit"),
        "long": pack(tmp_path, [f"1:{two}", f"3:{one}"], "long", row_tokens=64, policy="best-fit"),
    }
    held, trained = {}, {}
    for name, manifest in packs.items():
        index = [Path(source.prefix).name for source in manifest.sources].index("one")
        for split, found in (("validation", held), ("train", trained)):
            load = [
                np.load(tmp_path / name / split / f"segment_{column}.npy")
                for column in ("source", "document")
            ]
            found[name] = set(load[1][load[0] == index].tolist())
    assert held["short"] == held["long"]
    assert len(held["short"]) == 20
    assert not held["short"] & (trained["short"] | trained["long"])


def test_weights_give_exact_counts_in_the_manifest(tmp_path: Path) -> None:
    one = write_corpus(tmp_path / "one", documents(300, 1))
    two = write_corpus(tmp_path / "two", documents(30, 2))
    manifest = pack(tmp_path, [f"2:{one}", f"1:{two}"], validation_fraction=0.0)
    first, second = manifest.splits["train"].sources
    assert second.unused_tokens == 0  # the scarcest source
    longest = max(map(len, documents(300, 1)))
    assert abs(first.tokens - 2 * second.tokens) <= longest / 2 + 1
    assert [source.weight for source in manifest.sources] == [2.0, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_tokens": 0}, "--row-tokens must be at least 1"),
        ({"policy": "bfd"}, "unknown policy 'bfd'"),
        ({"validation_fraction": 1.0}, r"1\.0 is not in \[0, 1\)"),
        ({"validation_fraction": float("nan")}, "nan is not in"),
        ({"train_tokens": 0}, "--train-tokens 0"),
        ({"allow_repeats": True}, "--allow-repeats needs --train-tokens"),
        ({"row_tokens": 100_000}, "train tokens do not fill one row of 100000"),
        ({"row_tokens": 100_000, "policy": "best-fit"}, "train tokens do not fill one row of 100000"),
        ({"row_tokens": 900, "train_tokens": 10}, "raise --train-tokens"),
        ({"train_tokens": 1_000_000}, "should give 1000000 train tokens but"),
    ],
)
def test_bad_options(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    prefix = write_corpus(tmp_path / "c", documents())
    with pytest.raises(ValueError, match=message):
        pack(tmp_path, [prefix], **change)
    assert not (tmp_path / "pack").exists()


def test_an_output_that_exists_is_left_alone(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", documents())
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "mine").write_text("keep")
    with pytest.raises(ValueError, match="exists already"):
        pack(tmp_path, [prefix])
    assert os.listdir(tmp_path / "pack") == ["mine"]


def test_a_validation_split_without_rows_is_said(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [[1] * 30] * 100, tokenizer_sha256="a" * 64)
    with pytest.warns(UserWarning, match="validation split has 30 tokens, too few for one row of 64"):
        manifest = pack(tmp_path, [prefix], row_tokens=64, validation_fraction=0.01)
    split = manifest.splits["validation"]
    assert (split.rows, split.left_out_tokens, split.sources[0].documents) == (0, 30, 1)
    manifest = pack(tmp_path, [prefix], "other", row_tokens=64, policy="best-fit", validation_fraction=0.01)
    assert manifest.splits["validation"].rows == 1  # best-fit pads instead


def test_exit_codes_and_one_line_errors(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", documents())
    common = (
        "--policy",
        "concat",
        "--validation-fraction",
        "0",
        "--seed",
        "1",
        "--output",
        tmp_path / "pack",
    )
    for arguments, message in (
        (("--source", prefix, "--row-tokens", "0", *common), "argument --row-tokens: '0' is not above 0"),
        (("--source", prefix, "--row-tokens", "9999999", *common), "do not fill one row"),
        (("--source", f"1:{prefix}", prefix, "--row-tokens", "8", *common), "have no weight"),
        (("--source", prefix, "--row-tokens", "8"), "--policy, --validation-fraction, --seed, --output"),
        (("--verify", tmp_path / "none"), "none"),
        (("--verify", tmp_path / "none", "--seed", "1"), "--seed with --verify"),
    ):
        done = run_tool(*arguments)
        assert done.returncode not in (0, None)
        shown = done.stderr or done.stdout
        assert message in shown
        assert len(done.stderr.splitlines()) <= 1
        assert not (tmp_path / "pack").exists()
    done = run_tool("--source", prefix, "--row-tokens", "8", *common)
    assert done.returncode == 0
    assert re.search(r"train: \d[\d,]* rows", done.stdout)
    assert done.stderr.count("\n") == 1  # the warning about the tokenizer, nothing else


@pytest.mark.parametrize("policy", POLICIES)
def test_packing_and_inspecting_import_neither_torch_nor_megatron(tmp_path: Path, policy: str) -> None:
    prefix = write_corpus(tmp_path / "c", documents())
    code = f"""
import sys, warnings
warnings.simplefilter("ignore")
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.data.rows import RowReader
from megatron_exact.data.verify_pack import verify_pack
from megatron_exact.data.rows import RowReader
from megatron_exact.data.verify_pack import verify_pack
folder = {str(tmp_path / "pack")!r}
pack_corpora([{prefix!r}], folder, PackOptions(row_tokens=16, policy={policy!r}, seed=1))
RowReader(folder, "train").read(0)
assert all(check.passed for check in verify_pack(folder))
print([name for name in ("torch", "megatron.core", "transformers", "matplotlib") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_killed_while_packing(tmp_path: Path) -> None:
    """Killed when every array is written and the manifest is not: nothing opens, packing again works."""
    prefix = write_corpus(tmp_path / "c", documents())
    code = f"""
import sys, time, warnings
warnings.simplefilter("ignore")
from megatron_exact.data import pack
def stop(*_):
    print("ready", flush=True)
    time.sleep(600)
pack.write_manifest = stop
pack.pack_corpora([{prefix!r}], {str(tmp_path / "out" / "pack")!r}, pack.PackOptions(**{BASE!r}))
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    lease, partial = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert lease == ".pack.lease"
    assert partial.startswith(".pack.partial-")
    for path in (tmp_path / "out" / "pack", tmp_path / "out" / partial):
        with pytest.raises(FileNotFoundError, match="not a packed dataset"):
            read_manifest(path)
    manifest = pack(tmp_path / "out", [prefix])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pack"]
    assert (
        json.loads((tmp_path / "out" / "pack" / "manifest.json").read_text())["fingerprint"]
        == manifest.fingerprint
    )


@pytest.mark.parametrize("options", [{}, {"train_tokens": 1000, "allow_repeats": True}])
def test_a_row_longer_than_everything_is_refused_before_planning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    prefix = write_corpus(tmp_path / "c", documents())
    monkeypatch.setattr("megatron_exact.data.pack.plan_splits", lambda *_: pytest.fail("planned"))
    monkeypatch.setattr("megatron_exact.data.pack.describe_sources", lambda *_: pytest.fail("hashed"))
    with pytest.raises(ValueError, match=r"at most .* do not fill one row"):
        pack(tmp_path, [prefix], row_tokens=1 << 30, **options)


def test_a_whole_number_for_a_fraction(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", documents())
    whole = pack(tmp_path, [prefix], validation_fraction=0)
    assert read_manifest(tmp_path / "pack") == whole
    assert pack(tmp_path, [prefix], "other", validation_fraction=0.0).fingerprint == whole.fingerprint


def test_wanted_and_realised_shares_are_printed(tmp_path: Path) -> None:
    one = write_corpus(tmp_path / "one", [[1] * 10] * 100)
    two = write_corpus(tmp_path / "two", [[2] * 90] * 100)
    common = ("--row-tokens", "8", "--policy", "concat", "--validation-fraction", "0", "--seed", "1")
    sources = ("--source", f"1:{one}", f"1:{two}", "--output", tmp_path / "pack")
    done = run_tool(*common, *sources, "--train-tokens", "240")
    assert done.returncode == 0
    assert "share 57.14% (wanted 50.00%)" in done.stdout  # 120 and 90 tokens
    assert "two gives 42.86% of the train tokens where its weight says 50.00%" in done.stderr
    assert "takes 210 tokens where --train-tokens says 240" in done.stderr


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("how", ["sequences of no token", "no sequence"])
def test_empty_documents_are_counted_and_in_no_split(tmp_path: Path, policy: str, how: str) -> None:
    """Either way that other writers store an empty text; the others keep their numbers."""
    full = documents(40)
    holes = [[], *[part for document in full for part in (document, [])], []]
    prefix = write_corpus(tmp_path / "c", holes)
    if how == "no sequence":
        lengths = np.array([len(document) for document in full], dtype=np.int32)
        boundaries = np.concatenate(([0], np.cumsum([len(document) > 0 for document in holes])))
        index_parts = (
            HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[np.dtype(np.uint16)], len(full), len(holes) + 1),
            lengths.tobytes(),
            ((np.cumsum(lengths, dtype=np.int64) - lengths) * 2).tobytes(),
            boundaries.astype(np.int64).tobytes(),
        )
        (tmp_path / "c.idx").write_bytes(b"".join(index_parts))
    manifest = pack(tmp_path, [prefix], policy=policy, validation_fraction=0.5)
    assert (manifest.sources[0].documents, manifest.sources[0].empty_documents) == (len(holes), 42)
    used = [split.sources[0].documents for split in manifest.splits.values()]
    assert used == [20, 20]  # half of those that have tokens
    for split in manifest.splits:
        reader = RowReader(tmp_path / "pack", split)
        expected = read_rows_plainly(tmp_path / "pack", split, [holes])
        assert len(expected) == len(reader) > 0
        for number, row in enumerate(expected):
            assert reader.read(number).tokens.tolist() == row.tokens
            assert reader.read(number).labels.tolist() == row.labels
    assert [check.detail for check in verify_pack(tmp_path / "pack") if not check.passed] == []
    content = json.loads((tmp_path / "pack" / "manifest.json").read_text())
    content["sources"][0]["empty_documents"] = 41
    content["fingerprint"] = fingerprint_of(content)
    (tmp_path / "pack" / "manifest.json").write_text(json.dumps(content))
    (wrong,) = [check.detail for check in verify_pack(tmp_path / "pack") if not check.passed]
    assert "empty documents" in wrong


def test_the_tool_says_how_many_documents_are_empty(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [[], *documents(30), []])
    done = run_tool(
        *("--source", prefix, "--row-tokens", "64", "--policy", "concat", "--validation-fraction", "0"),
        *("--seed", "1", "--output", tmp_path / "pack"),
    )
    assert done.returncode == 0, done.stderr
    assert "2 of 32 documents are empty (they have no token) and left out" in done.stdout


def train_documents(pack_dir: Path) -> set[tuple[int, int]]:
    """(source, document) of everything in the train split."""
    columns = (np.load(pack_dir / "train" / f"segment_{name}.npy") for name in ("source", "document"))
    return set(zip(*(column.tolist() for column in columns), strict=True))


def plain_slice(prefix: str, document: int, seed: int, slices: int) -> int:
    """The slice of a document in plain Python: SplitMix64 of a key from sha256, its upper half."""
    mask = 2**64 - 1
    text = f"str corpus slice\nint {seed}\nstr {sha256_file(prefix + '.idx')}"
    state = (document + 1) * 0x9E3779B97F4A7C15 + int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)
    state &= mask
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
    state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
    return ((state ^ state >> 31) >> 32) * slices // 2**32 + 1


def test_slices_are_disjoint_and_hold_out_the_same_documents(tmp_path: Path) -> None:
    """A chain of three row lengths over two corpora, one with empty documents."""
    holes = [part for document in documents(150, 2) for part in (document, [])]
    prefixes = [write_corpus(tmp_path / "one", documents(300, 1)), write_corpus(tmp_path / "two", holes)]
    options = {"policy": "best-fit", "validation_fraction": 0.1}
    whole = pack(tmp_path, prefixes, "whole", **options)
    everything, parts = train_documents(tmp_path / "whole"), []
    for number, row_tokens in enumerate((16, 32, 64), start=1):
        name = f"{number}"
        part = pack(tmp_path, prefixes, name, **options, row_tokens=row_tokens, corpus_slice=f"{number}/3")
        parts.append(train_documents(tmp_path / name))
        expected = {
            (source, document)
            for source, document in everything
            if plain_slice(prefixes[source], document, seed=1, slices=3) == number
        }
        assert parts[-1] == expected
        validation = part.splits["validation"]
        assert validation.sources == whole.splits["validation"].sources
        if row_tokens == BASE["row_tokens"]:
            assert validation == whole.splits["validation"]
        assert [check.detail for check in verify_pack(tmp_path / name) if not check.passed] == []
    assert set.union(*parts) == everything
    assert sum(map(len, parts)) == len(everything)
    concat = pack(
        tmp_path, prefixes, "concat", policy="concat", validation_fraction=0.1, corpus_slice="2/3"
    )
    assert train_documents(tmp_path / "concat") <= parts[1]
    used = [use.documents for use in concat.splits["train"].sources]
    assert used == [sum(source == index for source, _ in parts[1]) for index in range(2)]


def test_slices_with_weights_and_repeats(tmp_path: Path) -> None:
    one = write_corpus(tmp_path / "one", documents(300, 1))
    two = write_corpus(tmp_path / "two", documents(300, 2))
    options = {"policy": "best-fit", "corpus_slice": "1/2", "validation_fraction": 0.05}
    for name, more in (
        ("scarcest", {}),
        ("tokens", {"train_tokens": 2000}),
        ("repeats", {"train_tokens": 30_000, "allow_repeats": True}),
    ):
        manifest = pack(tmp_path, [f"1:{one}", f"3:{two}"], name, **options, **more)
        assert [check.detail for check in verify_pack(tmp_path / name) if not check.passed] == [], name
        first, second = (use.tokens for use in manifest.splits["train"].sources)
        assert abs(second / (first + second) - 0.75) < 0.05
        found = train_documents(tmp_path / name)
        prefixes = (one, two)
        assert {plain_slice(prefixes[source], document, 1, 2) for source, document in found} == {1}


def test_slices_that_cannot_be_packed(tmp_path: Path) -> None:
    one = write_corpus(tmp_path / "one", documents(300, 1))
    few = write_corpus(tmp_path / "few", documents(3, 2))
    with pytest.raises(
        ValueError, match=r"one \(slice 1/8\) should give 9000.*use fewer slices, or repeat"
    ):
        pack(tmp_path, [one], corpus_slice="1/8", train_tokens=9000)
    held = {plain_slice(few, document, seed=1, slices=9) for document in range(3)}
    number = min(set(range(1, 10)) - held)
    with pytest.raises(
        ValueError, match=r"few \(slice \d/9\): this slice contains no training document.*fewer slices"
    ):
        pack(tmp_path, [one, few], corpus_slice=f"{number}/9")
    with pytest.raises(ValueError, match=r"use fewer slices than in --corpus-slice 3/50"):
        pack(tmp_path, [one], corpus_slice="3/50", row_tokens=512)
    for text in ("0/3", "4/3", "1", "1/0", "-1/3", "1/3/3", "a/b", "", "1/99999", "1/" + "9" * 5000):
        with pytest.raises(ValueError, match=r"--corpus-slice .*give I/N"):
            pack(tmp_path, [one], corpus_slice=text)
