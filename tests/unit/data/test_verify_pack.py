"""`--verify` passes good packs and names what is wrong with bad ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_corpora import ended_documents, heavy_tailed_lengths, random_documents, write_corpus
from tiny_tokenizers import write_sentencepiece

from megatron_exact.data.manifest import POLICIES, TokenizerIdentity, fingerprint_of, read_manifest
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.data.pack_arrays import write_npy
from megatron_exact.data.tokenizers import identify_tokenizer
from megatron_exact.data.verify_pack import verify_pack
from megatron_exact.files import sha256_file

pytestmark = pytest.mark.filterwarnings(
    "ignore:no source has a corpus record", "ignore:the validation split"
)
WEIGHTED = {"train_tokens": 6000, "allow_repeats": True}


def make_pack(root: Path, *, policy: str = "concat", recorded: bool = True, **options: Any) -> Path:
    sources = []
    for seed in (1, 2):
        documents = ended_documents(random_documents(heavy_tailed_lengths(60, seed), seed))
        sha256 = "a" * 64 if recorded else None
        sources.append(write_corpus(root / f"c{seed}", documents, tokenizer_sha256=sha256))
    if "train_tokens" in options:
        sources = [f"{weight}:{prefix}" for weight, prefix in zip((3, 1), sources, strict=True)]
    arguments = {"row_tokens": 64, "policy": policy, "seed": 1, "validation_fraction": 0.2, **options}
    pack_corpora(sources, root / "pack", PackOptions(**arguments))
    return root / "pack"


def failures(pack: Path, **options: Any) -> dict[str, str]:
    return {check.name: check.detail for check in verify_pack(pack, **options) if not check.passed}


def forge(pack: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit a manifest and give it the fingerprint that fits."""
    path = pack / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    content["fingerprint"] = fingerprint_of(content)
    path.write_text(json.dumps(content))


def forge_array(pack: Path, name: str, change: Callable[[np.ndarray], None]) -> None:
    """Edit an array of the train split and everything that hashes it."""
    path = pack / "train" / f"{name}.npy"
    array = np.load(path)
    change(array)
    write_npy(path, array, array.dtype.str)
    sha256 = sha256_file(path)
    forge(pack, lambda content: content["splits"]["train"]["arrays"].update({path.name: sha256}))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(
    "options", [{}, WEIGHTED, {"train_tokens": 900}, {"mask_cross_document_targets": True}]
)
def test_good_packs_pass(tmp_path: Path, policy: str, recorded: bool, options: dict[str, Any]) -> None:
    pack = make_pack(tmp_path, policy=policy, recorded=recorded, **options)
    checks = list(verify_pack(pack))
    assert [check.name for check in checks if not check.passed] == []
    names = ["manifest", "arrays of train", "arrays of validation", "source ../c1", "source ../c2"]
    assert [check.name for check in checks] == [
        *names,
        "sources",
        "tokenizer",
        "plan of train",
        "plan of validation",
        "tokens",
        "splits",
    ]


def test_moved_sources(tmp_path: Path) -> None:
    pack = make_pack(tmp_path)
    (tmp_path / "moved").mkdir()
    for path in tmp_path.glob("c*"):
        shutil.move(path, tmp_path / "moved")
    assert set(failures(pack)) == {"source ../c1", "source ../c2"}
    assert failures(pack, source_root=tmp_path / "moved") == {}


def test_an_edited_manifest(tmp_path: Path) -> None:
    pack = make_pack(tmp_path)
    path = pack / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 1', '"seed": 2'))
    found = failures(pack)
    assert list(found) == ["manifest"]
    assert "edited or damaged" in found["manifest"]


def test_a_flipped_byte_in_an_array(tmp_path: Path) -> None:
    pack = make_pack(tmp_path)
    path = pack / "validation" / "segment_document.npy"
    data = bytearray(path.read_bytes())
    data[-8] ^= 4
    path.write_bytes(data)
    assert list(failures(pack)) == ["arrays of validation"]


def test_flipped_bytes_in_the_sources(tmp_path: Path) -> None:
    for name, place in (("c1.bin", 10), ("c2.idx", 40)):
        pack = make_pack(tmp_path / name)
        path = tmp_path / name / name
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
        assert list(failures(pack)) == [f"source ../{name[:2]}"]


def test_the_record_is_gone_but_the_hash_is_known(tmp_path: Path) -> None:
    pack = make_pack(tmp_path)
    (tmp_path / "c1.json").unlink()
    assert failures(pack) == {}
    data = bytearray((tmp_path / "c1.bin").read_bytes())
    data[10] ^= 1
    (tmp_path / "c1.bin").write_bytes(data)
    assert list(failures(pack)) == ["source ../c1"]


def test_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    pack = make_pack(tmp_path, recorded=False)
    identity = {"path": "/t", "kind": "sentencepiece", "vocab_size": 500, "sha256": "d" * 64}
    forge(pack, lambda content: content.update(tokenizer=identity))
    found = failures(pack)
    assert list(found) == ["source ../c1", "source ../c2"]
    assert "outside the tokenizer's 500 ids" in found["source ../c1"]


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        (lambda content: content.update(seed=2), "plan of train"),
        (lambda content: content["splits"]["train"].update(left_out_tokens=0), "plan of train"),
        (lambda content: content["splits"]["train"]["exposure"]["counts"].reverse(), "plan of train"),
        (lambda content: content["splits"]["train"].update(next_token=None), "plan of train"),
        (
            lambda content: content["splits"]["validation"].update(supervised_targets=1),
            "plan of validation",
        ),
        (lambda content: content["sources"][0].update(licence="mine"), "source ../c1"),
        (lambda content: content["sources"][1].update(raw_files=[]), "source ../c2"),
        (lambda content: content["tokenizer"].update(sha256="e" * 64), "source ../c1"),
        (lambda content: content["tokenizer"].update(sha256="e" * 64), "tokenizer"),
        (lambda content: content["tokenizer"].update(kind="huggingface"), "tokenizer"),
        (lambda content: content["tokenizer"].update(vocab_size=2000), "tokenizer"),
        (lambda content: content["tokenizer"].update(vocab_size=500), "source ../c1"),
        (lambda content: content.update(tokenizer=None), "tokenizer"),
        (lambda content: content.update(row_tokens=1 << 30), "plan"),
        (lambda content: content.update(sources=[]), "manifest"),
        (lambda content: content["sources"][0].update(weight=0), "manifest"),
        (lambda content: [source.update(weight=0) for source in content["sources"]], "manifest"),
        (lambda content: content["splits"]["train"]["sources"][0].update(unused_tokens=64), "tokens"),
    ],
)
def test_forged_manifests(tmp_path: Path, change: Callable[[dict[str, Any]], None], failing: str) -> None:
    pack = make_pack(tmp_path)
    forge(pack, change)
    assert failing in failures(pack)


def reverse(array: np.ndarray) -> None:
    array[:] = array[::-1].copy()


def name_one_document(array: np.ndarray) -> None:
    array[:] = array[0]


@pytest.mark.parametrize("change", [reverse, name_one_document])
def test_forged_arrays(tmp_path: Path, change: Callable[[np.ndarray], None]) -> None:
    """Other documents in the rows, all hashes made to fit: only making the plan again can tell."""
    pack = make_pack(tmp_path, policy="best-fit")
    forge_array(pack, "segment_document", change)
    found = failures(pack)
    assert "segment_document differs" in found["plan of train"]
    if change is name_one_document:
        assert "tokens" in found  # a token in two rows, or beyond its document


def test_a_document_in_both_splits(tmp_path: Path) -> None:
    pack = make_pack(tmp_path, policy="best-fit")
    columns = ("segment_source", "segment_document", "segment_start", "segment_tokens")
    held = [np.load(pack / "validation" / f"{name}.npy") for name in columns]
    train = [np.load(pack / "train" / f"{name}.npy") for name in columns]
    longest = int(np.argmax(held[3]))
    fits = (train[0] == held[0][longest]) & (train[2] + train[3] <= held[3][longest])
    place = int(np.flatnonzero(fits)[0])

    def smuggle(array: np.ndarray) -> None:
        array[place] = held[1][longest]

    forge_array(pack, "segment_document", smuggle)
    found = failures(pack)
    assert "1 documents are in both splits" in found["splits"]
    assert "train do not lead through their documents" in found["tokens"]


def test_the_tokenizer_itself_changed_or_is_not_there(tmp_path: Path) -> None:
    model = write_sentencepiece(tmp_path / "t.model")
    identity = identify_tokenizer(model)
    documents = [[1 + token % 50 for token in one] for one in random_documents([20] * 30)]
    prefix = write_corpus(tmp_path / "c", documents)
    options = PackOptions(row_tokens=16, policy="concat", seed=1)
    pack_corpora([prefix], tmp_path / "pack", options, tokenizer=TokenizerIdentity(**identity))
    assert failures(tmp_path / "pack") == {}
    model.rename(tmp_path / "away.model")
    details = {check.name: check.detail for check in verify_pack(tmp_path / "pack") if check.passed}
    assert "not checked: tokenizer file is not there" in details["tokenizer"]
    write_sentencepiece(model, bos_id=-1)
    found = failures(tmp_path / "pack")
    assert list(found) == ["tokenizer"]
    model.write_bytes(b"")
    assert "not a SentencePiece model" in failures(tmp_path / "pack")["tokenizer"]


def test_a_flip_that_makes_a_large_id_is_a_changed_file(tmp_path: Path) -> None:
    for recorded in (True, False):
        pack = make_pack(tmp_path / str(recorded))
        root = tmp_path / str(recorded)
        if not recorded:
            (root / "c1.json").unlink()
        data = bytearray((root / "c1.bin").read_bytes())
        data[11] ^= 0x80
        (root / "c1.bin").write_bytes(data)
        assert "sha256" in failures(pack)["source ../c1"]


@pytest.mark.parametrize("number", ["NaN", "1e999"])
def test_a_number_that_is_none_names_the_file(tmp_path: Path, number: str) -> None:
    path = make_pack(tmp_path) / "manifest.json"
    path.write_text(
        path.read_text().replace('"validation_fraction": 0.2', f'"validation_fraction": {number}')
    )
    with pytest.raises(ValueError, match=r"manifest\.json: .*not finite"):
        read_manifest(tmp_path / "pack")


def make_sharded_pack(root: Path, **options: Any) -> Path:
    """A pack of a folder of three shards and a single corpus."""
    for shard in range(3):
        documents = ended_documents(random_documents(heavy_tailed_lengths(30, shard), shard))
        write_corpus(root / "web" / f"0000{shard}", documents, tokenizer_sha256="a" * 64)
    single = ended_documents(random_documents(heavy_tailed_lengths(40, 9), 9))
    sources = [str(root / "web"), write_corpus(root / "code", single, tokenizer_sha256="a" * 64)]
    arguments = {"row_tokens": 64, "policy": "best-fit", "seed": 1, "validation_fraction": 0.2, **options}
    pack_corpora(sources, root / "pack", PackOptions(**arguments))
    return root / "pack"


@pytest.mark.parametrize("policy", POLICIES)
def test_shards_are_proved_one_by_one(tmp_path: Path, policy: str) -> None:
    pack = make_sharded_pack(tmp_path, policy=policy)
    assert failures(pack) == {}
    flip(tmp_path / "web" / "00001.bin", 12)
    assert "00001.bin" in failures(pack)["source ../web"]
    flip(tmp_path / "web" / "00001.bin", 12)
    (tmp_path / "web").rename(tmp_path / "away")
    assert set(failures(pack)) == {"source ../web"}
    (tmp_path / "moved").mkdir()
    (tmp_path / "away").rename(tmp_path / "moved" / "web")
    for path in tmp_path.glob("code.*"):
        shutil.move(path, tmp_path / "moved")
    assert failures(pack, source_root=tmp_path / "moved") == {}


def test_a_shard_that_is_another_one(tmp_path: Path) -> None:
    pack = make_sharded_pack(tmp_path)
    for suffix in ("bin", "idx", "json"):
        shutil.copy(tmp_path / "web" / f"00000.{suffix}", tmp_path / "web" / f"00002.{suffix}")
    assert set(failures(pack)) == {"source ../web"}


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
