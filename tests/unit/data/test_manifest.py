"""The manifest: read back whole, any edit noticed, the same on every machine."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_corpora import write_corpus

from megatron_exact.data.manifest import (
    POLICIES,
    SPLITS,
    Manifest,
    TokenizerIdentity,
    fingerprint_of,
    finish_manifest,
    read_manifest,
)
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.data.pack_arrays import verify_arrays

pytestmark = pytest.mark.filterwarnings(
    "ignore:no source has a corpus record", "ignore:the validation split"
)
FIXED_DOCUMENTS = [[1 + (7 * d + t) % 900 for t in range(1 + (d * d) % 23)] for d in range(40)]
TOKENIZER = TokenizerIdentity(path="/opt/tok", kind="sentencepiece", vocab_size=1000, sha256="a" * 64)
# Fixed documents, options and tokenizer: these change only if the meaning of a pack changes.
GOLDEN = {
    "concat": "02df030244b3e1f00a25d9eebc0b33c5445c72dac4c69c9b3b64a92436bed1d7",
    "best-fit": "3e1259eee481a3f4c17ea686d5e99ba8c850ec189cbd19df08b2c5bd07f04843",
}


def pack_fixed(root: Path, policy: str = "concat", **changes: Any) -> Manifest:
    prefix = write_corpus(root / "c", FIXED_DOCUMENTS)
    options = {"row_tokens": 16, "policy": policy, "seed": 5, "validation_fraction": 0.2, **changes}
    return pack_corpora([prefix], root / "pack", PackOptions(**options), tokenizer=TOKENIZER)


@pytest.mark.parametrize("policy", POLICIES)
def test_golden_fingerprint(tmp_path: Path, policy: str) -> None:
    assert pack_fixed(tmp_path, policy).fingerprint == GOLDEN[policy]


def test_fingerprint_by_hand(tmp_path: Path) -> None:
    """What a reader without this package would compute."""
    fingerprint = pack_fixed(tmp_path).fingerprint
    content = json.loads((tmp_path / "pack" / "manifest.json").read_text())
    del content["fingerprint"], content["tokenizer"]["path"]
    for source in content["sources"]:
        for name in ("prefix", "raw_files", "licence", "largest_id", "bin_sample_sha256"):
            del source[name]
    content.pop("document_tokens", None)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode("ascii")).hexdigest() == fingerprint


def test_read_back_whole(tmp_path: Path) -> None:
    manifest = pack_fixed(tmp_path)
    assert read_manifest(tmp_path / "pack") == manifest
    assert verify_arrays(tmp_path / "pack") > 0
    assert manifest.sources[0].prefix == "../c"
    assert manifest.source_prefix(0, tmp_path / "pack", None) == (tmp_path / "c").resolve()
    assert manifest.tokenizer_path(tmp_path / "pack") == Path("/opt/tok")


def test_contract_of_the_json(tmp_path: Path) -> None:
    pack_fixed(tmp_path)
    content = json.loads((tmp_path / "pack" / "manifest.json").read_text())
    assert {"format_version", "row_tokens", "policy", "seed", "tokenizer", "sources", "splits"} < set(
        content
    )
    assert set(content["tokenizer"]) == {"path", "kind", "vocab_size", "sha256"}
    source = {"prefix", "weight", "documents", "tokens", "idx_sha256", "bin_bytes", "bin_sha256"}
    described = {"raw_files", "licence", "shards", "largest_id", "bin_sample_sha256"}
    assert set(content["sources"][0]) == source | described
    assert content["sources"][0]["largest_id"] == max(map(max, FIXED_DOCUMENTS))
    assert list(content["splits"]) == list(SPLITS)
    counts = {"rows", "segments", "tokens", "padding_tokens", "left_out_tokens", "supervised_targets"}
    for name in SPLITS:
        split = content["splits"][name]
        assert counts | {"exposure", "arrays", "next_token", "sources"} == set(split)
        assert split["exposure"]["lower"] == [0, 8]
        files = sorted(path.name for path in (tmp_path / "pack" / name).iterdir())
        assert sorted(split["arrays"]) == files


def test_place_time_and_names_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pack_fixed(tmp_path / "one")
    (tmp_path / "two" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "two" / "deeper")
    prefix = write_corpus(Path("../other"), FIXED_DOCUMENTS)
    tokenizer = TokenizerIdentity(path="/elsewhere", kind="sentencepiece", vocab_size=1000, sha256="a" * 64)
    options = PackOptions(row_tokens=16, policy="concat", seed=5, validation_fraction=0.2)
    second = pack_corpora([prefix], "p", options, tokenizer=tokenizer)
    assert second.fingerprint == first.fingerprint
    assert second.sources[0].prefix == "../../other"
    shutil.move(tmp_path / "one", tmp_path / "three")
    assert read_manifest(tmp_path / "three" / "pack").fingerprint == first.fingerprint


def edits(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Path of every leaf of a JSON value."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from edits(value, (*path, key))
    elif isinstance(content, list) and content:
        for index, value in enumerate(content):
            yield from edits(value, (*path, index))
    else:
        yield path


def test_every_edited_value_is_noticed(tmp_path: Path) -> None:
    pack_fixed(tmp_path)
    path = tmp_path / "pack" / "manifest.json"
    text = path.read_text()
    described = {
        ("tokenizer", "path"),
        *(
            ("sources", 0, name)
            for name in ("prefix", "raw_files", "licence", "largest_id", "bin_sample_sha256")
        ),
    }
    edited = 0
    for leaf in edits(json.loads(text)):
        content = json.loads(text)
        parent = content
        for key in leaf[:-1]:
            parent = parent[key]
        value = parent[leaf[-1]]
        changed = {
            int: lambda v: v + 1,
            float: lambda v: v / 2,
            bool: lambda v: not v,
            str: lambda v: v + "0",
        }
        parent[leaf[-1]] = changed.get(type(value), lambda _: 1)(value)  # type: ignore[no-untyped-call]
        path.write_text(json.dumps(content))
        if leaf in described:
            continue
        with pytest.raises(ValueError):  # noqa: PT011  (any of: fingerprint, format, type)
            read_manifest(tmp_path / "pack")
        edited += 1
    assert edited > 40


def test_an_edited_count_says_so(tmp_path: Path) -> None:
    pack_fixed(tmp_path)
    path = tmp_path / "pack" / "manifest.json"
    content = json.loads(path.read_text())
    content["splits"]["train"]["exposure"]["counts"][1] -= 1
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="it was edited or damaged, pack the corpus again"):
        read_manifest(tmp_path / "pack")


def test_layout_of_the_json_does_not_matter(tmp_path: Path) -> None:
    manifest = pack_fixed(tmp_path)
    path = tmp_path / "pack" / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(dict(sorted(content.items(), reverse=True))))
    assert read_manifest(tmp_path / "pack") == manifest
    assert fingerprint_of(content) == manifest.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("splits"), "lacks splits"),
        (lambda content: content["sources"][0].pop("tokens"), r"sources\[0\] lacks tokens"),
        (lambda content: content["splits"].pop("validation"), "has splits"),
        (lambda content: content.update(format_version=99), "format_version 99"),
        (lambda content: content.update(extra=1), "unknown extra"),
    ],
)
def test_damaged_manifests(tmp_path: Path, change: Any, message: str) -> None:
    pack_fixed(tmp_path)
    path = tmp_path / "pack" / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path / "pack")


def test_no_manifest_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a packed dataset"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="a list, not an object"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="format_version None"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("place", [-1, 0, 20])
def test_a_flipped_byte_in_an_array_is_noticed(tmp_path: Path, place: int) -> None:
    manifest = pack_fixed(tmp_path)
    for name in SPLITS:
        for file in manifest.splits[name].arrays:
            path = tmp_path / "pack" / name / file
            good = path.read_bytes()
            bad = bytearray(good)
            bad[place] ^= 1
            path.write_bytes(bad)
            with pytest.raises(ValueError, match=f"{file} has sha256"):
                verify_arrays(tmp_path / "pack")
            path.write_bytes(good)
    assert verify_arrays(tmp_path / "pack", manifest) > 0


def test_a_missing_array_is_noticed(tmp_path: Path) -> None:
    pack_fixed(tmp_path)
    (tmp_path / "pack" / "validation" / "segment_start.npy").unlink()
    with pytest.raises(ValueError, match=r"segment_start\.npy is missing"):
        verify_arrays(tmp_path / "pack")


def test_finish_manifest_keeps_exact_numbers(tmp_path: Path) -> None:
    manifest = pack_fixed(tmp_path, validation_fraction=0.1 + 0.2)
    again = read_manifest(tmp_path / "pack")
    assert again.validation_fraction == 0.1 + 0.2
    fields = {name: getattr(again, name) for name in Manifest.__dataclass_fields__}
    del fields["format_version"], fields["fingerprint"]
    assert finish_manifest(**fields) == manifest
