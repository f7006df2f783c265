"""Bad input to a training job: one line, exit code not 0, nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_exact.data.indexed import IndexedTokens, IndexedWriter
from megatron_exact.data.manifest import TokenizerIdentity
from megatron_exact.data.pack import PackOptions, pack_corpora
from tests.distributed import jobs, ranks


def refused(pack: Path, tmp_path: Path, *extra: Any, rule: str = "exact") -> str:
    """Run a job that must be refused; its one line of error."""
    run = tmp_path / "run"
    argv = jobs.command(pack, rule, 1, "--save", run, "--save-interval", 1, *extra)
    ended = ranks.train(1, argv, tmp_path / "output")
    assert ended.codes == [1], ended.outputs[0][-2000:]
    errors = [line for line in ended.outputs[0].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in ended.outputs[0]
    assert not run.exists()
    return errors[0]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--seq-length", 128), ("--seq-length 128", "64")),
        (("--seq-length=128",), ("--seq-length 128", "64")),
        (("--exact-tau", 65), ("tau 65", "row length 64", "choose tau")),
        (("--exact-tau", 40), ("tau 40", "no tail", "32")),
        (("--exact-tau", 0), ("tau", "> 0")),
        (("--exact-alpha", -0.1), ("alpha", "-0.1")),
        (("--exact-alpha", "nan"), ("alpha", "nan")),
        (("--exact-gamma", "inf"), ("gamma", "inf")),
        (("--load", "nowhere"), ("--load nowhere", "no checkpoint")),
        (("--pretrained-checkpoint", "nowhere"), ("nowhere", "no checkpoint")),
        (("--reset-attention-mask",), ("reset-attention-mask", "pack")),
        (("--reset-position-ids",), ("reset-position-ids",)),
        (("--eod-mask-loss",), ("eod-mask-loss", "--mask-cross-document-targets")),
        (("--data-path", "x"), ("data-path", "--pack")),
        (("--attention-dropout", 0.1), ("--attention-dropout 0.1", "--attention-dropout 0")),
        (("--normalization", "LayerNorm"), ("normalization", "RMSNorm")),
        (("--window-size", "16,0"), ("--window-size", "effective context")),
        (("--apply-layernorm-1p",), ("--apply-layernorm-1p", "no supported model family")),
        (("--check-for-spiky-loss",), ("--check-for-spiky-loss", "stock loss")),
        (("--use-distributed-optimizer", "--optimizer", "sgd"), ("--optimizer sgd", "use adam")),
        (("--eval-global-batch-size", 4), ("--eval-global-batch-size", "batch of training")),
        (("--token-weigthing", "exact"), ("--token-weigthing", "--help")),
        (("--attention-backend", "unfused"), ("attention-backend", "documents apart")),
        (("--eval-iters", 1000), ("--eval-iters 1000", "validation rows")),
        (("--dataloader-type", "cyclic"), ("dataloader-type", "order")),
        (("--context-parallel-size", 3), ("rows of 64 tokens", "6 spans", "multiple of 6")),
        (
            ("--tensor-model-parallel-size", 3),
            ("1 ranks (GPUs)", "TP 3", "num_attention_heads 4", "choose 1"),
        ),
        (("--global-batch-size", 3, "--micro-batch-size", 2), ("--global-batch-size 3", "multiple of 2")),
        (("--global-batch-size", 0), ("--global-batch-size 0",)),
        (("--qk-timing", "--num-layers", 1), ("--num-layers 1", "nothing would be timed")),
        (
            ("--confidence-kappa", 0.5),
            ("exact does not read --confidence-kappa 0.5 (read by sparse,", "drop"),
        ),
        (("--cp-comm-type", "a2a"), ("--cp-comm-type", "gathers keys and values")),
    ],
    ids=lambda value: " ".join(map(str, value)) if str(value[0]).startswith("--") else "",
)
def test_flags_that_contradict_the_pack_or_the_method(
    extra: tuple[Any, ...], words: tuple[str, ...], pack: Path, tmp_path: Path
) -> None:
    error = refused(pack, tmp_path, *extra)
    assert all(word in error for word in words), error


def test_what_megatron_itself_refuses_is_one_line_too(pack: Path, tmp_path: Path) -> None:
    flags = ("--recompute-granularity", "selective", "--recompute-method", "uniform")
    error = refused(pack, tmp_path, *flags)
    assert "Megatron does not accept these flags: recompute method is not yet supported" in error
    assert "(given: --recompute-method uniform)" in error


def test_unknown_rule_and_missing_pack(pack: Path, tmp_path: Path) -> None:
    assert "exact-normalized" in refused(pack, tmp_path, rule="exactly")
    assert "manifest.json is missing" in refused(tmp_path / "no-pack", tmp_path)


def test_vocabulary_that_tensor_parallel_ranks_cannot_share(pack: Path, tmp_path: Path) -> None:
    argv = jobs.command(pack, "none", 1, "--vocab-size", 97, "--tensor-model-parallel-size", 2)
    ended = ranks.train(2, argv, tmp_path)
    assert all(ended.codes)
    assert "error: a vocabulary of 97 does not divide by --tensor-model-parallel-size 2" in ended.outputs[0]


@pytest.fixture
def own_pack(pack: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage, beside the original so that its sources are found."""
    copy = pack.parent / f"copy-{tmp_path.name}"
    shutil.copytree(pack, copy)
    return copy


def test_a_manifest_edited_by_hand(own_pack: Path, tmp_path: Path) -> None:
    path = own_pack / "manifest.json"
    content = json.loads(path.read_text())
    content["splits"]["train"]["exposure"]["counts"][-1] += 1
    path.write_text(json.dumps(content))
    assert "edited or damaged" in refused(own_pack, tmp_path)


def test_an_array_with_a_flipped_byte(own_pack: Path, tmp_path: Path) -> None:
    path = own_pack / "train" / "segment_start.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    error = refused(own_pack, tmp_path)
    assert "segment_start.npy" in error
    assert "damaged" in error


def test_a_truncated_bin(pack: Path, corpus: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(corpus.with_suffix(suffix), tmp_path / f"docs{suffix}")
    whole = (tmp_path / "docs.bin").read_bytes()
    (tmp_path / "docs.bin").write_bytes(whole[:-2])
    ended = ranks.train(1, jobs.command(pack, "none", 1, "--source-root", tmp_path), tmp_path / "output")
    assert ended.codes == [1]
    assert "truncated" in ended.outputs[0]
    (tmp_path / "docs.bin").write_bytes(whole)
    ranks.train(1, jobs.command(pack, "none", 1, "--source-root", tmp_path), tmp_path / "output").check()


def test_another_tokenizer_than_the_packs(corpus: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    path = tmp_path / "tokenizer.json"
    Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(path))
    identity = TokenizerIdentity(
        path="elsewhere", kind="huggingface", vocab_size=jobs.VOCABULARY, sha256="0" * 64
    )
    pack = corpus.parent / "with-tokenizer"
    options = PackOptions(row_tokens=jobs.ROW_TOKENS, policy="concat", seed=3)
    pack_corpora([str(corpus)], pack, options, tokenizer=identity)
    error = refused(pack, tmp_path, "--tokenizer-model", path)
    assert "which made the pack" in error
    assert "use the same one" in error
    assert "--vocab-size 95 is below the 96 ids" in refused(pack, tmp_path, "--vocab-size", 95)
    # a model may have more rows than the tokenizer has ids
    wider = jobs.command(pack, "none", 1, "--vocab-size", jobs.VOCABULARY + 2)
    ranks.train(1, wider, tmp_path / "wider").check()


def test_a_missing_source_is_seen_before_training(corpus: Path, tmp_path: Path) -> None:
    """Also one that the first rows do not need."""
    for name in ("a", "b"):
        for suffix in (".bin", ".idx"):
            shutil.copy(corpus.with_suffix(suffix), tmp_path / f"{name}{suffix}")
    with open(tmp_path / "b.bin", "r+b") as tokens:  # another corpus: a copy would be refused
        first = tokens.read(1)[0]
        tokens.seek(0)
        tokens.write(bytes([first ^ 1]))
    pack = tmp_path / "pack"
    options = PackOptions(row_tokens=jobs.ROW_TOKENS, policy="concat", seed=3)
    with pytest.warns(UserWarning, match="no source has a corpus record"):
        pack_corpora([f"20:{tmp_path / 'a'}", f"1:{tmp_path / 'b'}"], pack, options)
    (tmp_path / "b.bin").unlink()
    assert "b.bin is missing" in refused(pack, tmp_path)


def test_a_corpus_of_the_same_size_but_another_order(pack: Path, corpus: Path, tmp_path: Path) -> None:
    """Number of documents, of tokens and of bytes agree; only the index tells."""
    source = IndexedTokens(corpus)
    writer = IndexedWriter(tmp_path / "docs.bin", tmp_path / "docs.idx", jobs.VOCABULARY)
    for document in reversed(range(len(source))):
        writer.add(source.read(document, 0, int(source.document_tokens[document])))
    writer.close()
    assert "docs.idx has sha256" in refused(pack, tmp_path, "--source-root", tmp_path)


def test_tokens_arrive_as_the_corpus_holds_them(corpus: Path) -> None:
    """The fixture itself: the last id ends every document."""
    tokens = np.fromfile(corpus.with_suffix(".bin"), dtype=np.uint16)
    assert tokens.max() == jobs.VOCABULARY - 1
