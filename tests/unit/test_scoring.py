"""Scores of a pack against one forward pass a target, and what a killed or foreign run leaves behind."""

from __future__ import annotations

import copy
import itertools
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_exact import scoring
from megatron_exact.data import score_files
from megatron_exact.data.indexed import IndexedWriter
from megatron_exact.data.manifest import read_manifest
from megatron_exact.data.rows import Row, RowReader
from megatron_exact.data.score_files import ScoreReader, read_record, verify_scores
from megatron_exact.exposure.confidence import BORDERS, ShortWindows
from megatron_exact.scoring import Piece, ScoreOptions, Scorer, batches, score_pack, score_rows
from megatron_exact.shares import Share
from tests.distributed.hf_models import make_model
from tests.distributed.jobs import VOCABULARY, make_corpus, make_pack

pytestmark = pytest.mark.filterwarnings("ignore:no source has a corpus record")
WINDOWS = ShortWindows(window=16, stride=12)
MODEL = "qwen2 tied, 2 groups"
TOOL = Path(__file__).resolve().parents[2] / "tools" / "score_tokens.py"


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    corpus = make_corpus(tmp_path_factory.mktemp("packs") / "corpus")
    return {policy: make_pack(corpus, policy) for policy in ("concat", "best-fit")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scorer") / "model"
    make_model(MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(model: Path) -> Scorer:
    return Scorer(model, 64, device="cpu", dtype="float32")


@pytest.fixture
def options() -> ScoreOptions:
    return ScoreOptions(windows=WINDOWS, device="cpu", batch_rows=2)


def plain_scores(model: Any, row: Row, border: str) -> dict[str, np.ndarray]:
    """Each supervised target by a forward pass of its own over exactly what it may see."""
    found = {"long": np.zeros(row.tokens.size), "difference": np.zeros(row.tokens.size)}
    context = row.by_context(np.arange(row.tokens.size + 1))
    tokens = torch.from_numpy(row.tokens)
    for begin, end in itertools.pairwise(row.cu_seqlens.tolist()):
        for place in range(begin, end):
            if not row.loss_mask[place]:
                continue
            start = begin  # of the first window that holds the token that decides
            token = min(place + 1, end - 1) if border == "target" else place
            while place >= begin + WINDOWS.window and token >= start + WINDOWS.window:
                start += WINDOWS.stride
            target = torch.tensor(row.labels[place])
            with torch.no_grad():
                long, short = (
                    F.cross_entropy(model(tokens[None, first : place + 1]).logits[0, -1], target).item()
                    for first in (begin, start)
                )
            found["long"][place] = long
            found["difference"][place] = long - short if context[place] > 0 else 0.0
    return found


@pytest.mark.parametrize(
    ("policy", "border"), [("concat", "target"), ("best-fit", "target"), ("concat", "input")]
)
def test_scores_are_those_of_one_pass_a_target(
    policy: str, border: str, packs: dict[str, Path], scorer: Scorer
) -> None:
    windows = replace(WINDOWS, border=border)
    reader = RowReader(packs[policy], "train")
    longest = sorted(range(len(reader)), key=lambda row: -reader.read(row).max_seqlen)
    rows = [longest[0], len(reader) - 1]
    found = score_rows(reader, rows, windows, scorer)
    reference = make_model(MODEL)
    for index, row_id in enumerate(rows):
        for name, expected in plain_scores(reference, reader.read(row_id), border).items():
            np.testing.assert_allclose(found[name][index], expected, atol=2e-5, err_msg=f"{name} {row_id}")
    other = plain_scores(reference, reader.read(rows[0]), BORDERS[border == BORDERS[0]])["difference"]
    assert np.abs(found["difference"][0] - other).max() > 1e-3  # the border matters
    assert np.abs(found["difference"][0]).max() > 0.05  # windows matter
    assert np.count_nonzero(found["difference"][0]) == np.count_nonzero(
        reader.read(rows[0]).by_context(np.arange(65)) > WINDOWS.window
    )


def test_documents_do_not_see_each_other(scorer: Scorer) -> None:
    rng = np.random.default_rng(0)
    pieces = [Piece(tokens=t[:-1], labels=t[1:]) for t in (rng.integers(0, 96, n) for n in (30, 17, 22))]
    before = scorer.losses(pieces, 1000)
    changed = [*pieces[:1], Piece(tokens=pieces[1].tokens[::-1].copy(), labels=pieces[1].labels), pieces[2]]
    after = scorer.losses(changed, 1000)
    assert [np.array_equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True]
    alone = [scorer.losses([piece], 1)[0] for piece in pieces]
    for together, one in zip(before, alone, strict=True):
        np.testing.assert_allclose(together, one, atol=1e-5)


def test_batches_hold_every_piece_once_within_the_budget() -> None:
    lengths = np.random.default_rng(3).integers(1, 100, 200).tolist()
    made = list(batches(lengths, 250))
    assert sorted(index for batch in made for index in batch) == list(range(200))
    for batch in made:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= 250
        assert min(lengths[index] for index in batch) >= 0.5 * longest
    assert list(batches([300], 250)) == [[0]]


def test_a_killed_run_goes_on_and_ends_the_same(
    packs: dict[str, Path],
    model: Path,
    options: ScoreOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scoring, "SHARD_TOKENS", 8 * 64)
    whole = score_pack(packs["concat"], model, tmp_path / "whole", options)
    assert whole.shards("train") > 2
    scored: list[int] = []
    stock = scoring.score_rows

    def dies(reader: RowReader, rows: Any, windows: Any, scorer: Any) -> Any:
        scored.extend(rows)
        if len(scored) > 20:
            raise KeyboardInterrupt
        return stock(reader, rows, windows, scorer)

    monkeypatch.setattr(scoring, "score_rows", dies)
    with pytest.raises(KeyboardInterrupt):
        score_pack(packs["concat"], model, tmp_path / "killed", options)
    manifest = read_manifest(packs["concat"])
    with pytest.raises(ValueError, match=r"is not complete: call megatron-exact score again"):
        ScoreReader(tmp_path / "killed", manifest, "train")
    begun = list(scored)
    scored.clear()
    monkeypatch.setattr(
        scoring, "score_rows", lambda r, rows, *a: (scored.extend(rows), stock(r, rows, *a))[1]
    )
    again = score_pack(packs["concat"], model, tmp_path / "killed", options)
    assert again == whole  # every hash of every array
    assert min(scored) == begun[0] + 16  # two whole shards were there
    assert verify_scores(tmp_path / "killed") > 0


def test_processes_share_the_shards(
    packs: dict[str, Path],
    model: Path,
    options: ScoreOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scoring, "SHARD_TOKENS", 16 * 64)
    whole = score_pack(packs["concat"], model, tmp_path / "whole", options)
    parts = [replace(options, share=Share(index=index, of=3)) for index in range(3)]
    made = [score_pack(packs["concat"], model, tmp_path / "shared", part) for part in parts]
    assert [record.is_complete for record in made] == [False, False, True]
    assert made[-1] == whole


def test_a_damaged_file_of_another_process_is_named(
    packs: dict[str, Path],
    model: Path,
    options: ScoreOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scoring, "SHARD_TOKENS", 16 * 64)
    output, parts = tmp_path / "shared", [replace(options, share=Share(index=i, of=2)) for i in range(2)]
    score_pack(packs["concat"], model, output, parts[0])
    path = output / "train" / "long-00000.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    with pytest.raises(ValueError, match=r"long-00000\.npy cannot be read .*remove it and score again"):
        score_pack(packs["concat"], model, output, parts[1])
    path.unlink()
    assert not score_pack(packs["concat"], model, output, parts[1]).is_complete
    assert score_pack(packs["concat"], model, output, parts[0]).is_complete
    assert path.read_bytes() == whole


def test_scores_come_back_row_by_row(
    packs: dict[str, Path], model: Path, scorer: Scorer, options: ScoreOptions, tmp_path: Path
) -> None:
    score_pack(packs["best-fit"], model, tmp_path / "scores", options)
    manifest = read_manifest(packs["best-fit"])
    reader = copy.deepcopy(ScoreReader(tmp_path / "scores", manifest, "train"))  # as a pickle does
    rows = list(range(manifest.splits["train"].rows))
    expected = score_rows(RowReader(packs["best-fit"], "train"), rows, WINDOWS, scorer)["difference"]
    for row in rows:
        # 11 bits of float16; batches of other sizes
        np.testing.assert_allclose(reader.read(row).difference, expected[row], rtol=1e-3, atol=2e-5)


def test_scores_of_something_else_are_refused(
    packs: dict[str, Path], model: Path, options: ScoreOptions, tmp_path: Path
) -> None:
    output = tmp_path / "scores"
    score_pack(packs["concat"], model, output, options)
    with pytest.raises(ValueError, match=r"scores of the pack .* score this pack"):
        ScoreReader(output, read_manifest(packs["best-fit"]), "train")
    with pytest.raises(ValueError, match="no scores of the validation split"):
        ScoreReader(output, read_manifest(packs["concat"]), "validation")
    with pytest.raises(ValueError, match="contains scores with fingerprint"):
        score_pack(packs["best-fit"], model, output, options)
    other = tmp_path / "other"
    make_model(MODEL, seed=5).save_pretrained(other)
    with pytest.raises(ValueError, match="contains scores with model"):
        score_pack(packs["concat"], other, output, options)
    with pytest.raises(ValueError, match="contains scores with short_border target, not input"):
        score_pack(
            packs["concat"], model, output, replace(options, windows=replace(WINDOWS, border="input"))
        )
    record = json.loads((output / "scores.json").read_text())
    assert record.pop("short_border") == read_record(output).identity()["short_border"] == "target"
    older = tmp_path / "older"
    older.mkdir()
    (older / "scores.json").write_text(json.dumps(record))  # of a version that knew one border
    assert read_record(older).short_border == "input"
    assert "short_border" not in read_record(older).identity()
    with pytest.raises(ValueError, match="no split tests"):
        score_pack(packs["concat"], model, output, ScoreOptions(windows=WINDOWS, splits=("tests",)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    with pytest.raises(ValueError, match="choose another --output"):
        score_pack(packs["concat"], model, tmp_path / "mine", options)


def test_damage_is_found(
    packs: dict[str, Path], model: Path, options: ScoreOptions, tmp_path: Path
) -> None:
    score_pack(packs["concat"], model, tmp_path / "scores", options)
    manifest = read_manifest(packs["concat"])
    path = tmp_path / "scores" / "train" / "difference-00000.npy"
    array = np.load(path)
    array[3, 7] = np.nan
    np.save(path, array)
    with pytest.raises(ValueError, match="sha256"):
        verify_scores(tmp_path / "scores")
    reader = ScoreReader(tmp_path / "scores", manifest, "train")
    reader.read(2)
    with pytest.raises(ValueError, match=r"not finite \(row 3\)"):
        reader.read(3)
    np.save(path, array[:-1])
    with pytest.raises(ValueError, match="is expected: remove it"):
        ScoreReader(tmp_path / "scores", manifest, "train").read(0)
    record = tmp_path / "scores" / "scores.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "format_version": 9}))
    with pytest.raises(ValueError, match="format_version 9"):
        read_record(tmp_path / "scores")
    with pytest.raises(FileNotFoundError, match="make the scores"):
        read_record(tmp_path)


def test_a_loss_that_is_not_finite_is_refused(packs: dict[str, Path], tmp_path: Path) -> None:
    manifest = read_manifest(packs["concat"])
    rows = manifest.splits["train"].rows
    record = score_files.ScoreRecord(
        format_version=1,
        fingerprint=manifest.fingerprint,
        row_tokens=64,
        model={},
        dtype="float32",
        short_window=16,
        short_stride=12,
        shard_rows=rows,
        rows={"train": rows},
        is_complete=False,
    )
    score_files.begin_scores(tmp_path / "scores", record)
    bad = np.zeros((rows, 64))
    bad[4, 2] = 1e6  # beyond float16
    with pytest.raises(ValueError, match="row 4 of the train split has a difference score"):
        score_files.write_shard(
            tmp_path / "scores", record, "train", 0, {"long": np.zeros((rows, 64)), "difference": bad}
        )


def test_scorers_that_cannot_score_are_refused(
    packs: dict[str, Path], scorer: Scorer, options: ScoreOptions, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"no config\.json.*--checkpoint"):
        score_pack(packs["concat"], tmp_path, tmp_path / "scores", options)
    make_model(MODEL, max_position_embeddings=63).save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match="sees 63 tokens"):
        score_pack(packs["concat"], tmp_path / "short", tmp_path / "scores", options)
    with pytest.raises(ValueError, match="the pack has token 100, the scorer 100 of them"):
        scorer.losses([Piece(tokens=np.array([1, 100]), labels=np.array([2]))], 10)
    assert not (tmp_path / "scores").exists()


def test_an_architecture_that_scales_its_logits_is_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.GraniteConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        logits_scaling=0.05,
    )
    transformers.GraniteForCausalLM(config).save_pretrained(tmp_path / "granite")
    with pytest.raises(ValueError, match="scaled or capped"):
        Scorer(tmp_path / "granite", 64, device="cpu", dtype="float32")


def run_tool(monkeypatch: pytest.MonkeyPatch, *argv: Any) -> int:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, argv)])
    return int(runpy.run_path(str(TOOL))["main"]())


def test_the_tool_scores_with_folders_and_checkpoints_alike(
    packs: dict[str, Path],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from megatron_exact.conversion.import_hf import import_hf

    import_hf(model, tmp_path / "imported")
    common = ("--pack", packs["concat"], "--short-window", 16, "--dtype", "float32", "--device", "cpu")
    assert run_tool(monkeypatch, *common, "--model", model, "--output", tmp_path / "a") == 0
    checkpoint = ("--checkpoint", tmp_path / "imported")
    assert run_tool(monkeypatch, *common, *checkpoint, "--output", tmp_path / "b") == 0
    assert run_tool(monkeypatch, "--verify", tmp_path / "b") == 0
    assert "bytes as recorded" in capsys.readouterr().out
    a, b = (read_record(tmp_path / name) for name in "ab")
    assert (a.short_window, a.short_stride) == (16, 12)
    assert a.arrays == b.arrays
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "imported"]


def test_the_tool_says_what_is_missing(packs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for argv, match in (
        (("--output", "x"), "--pack is missing"),
        (("--pack", packs["concat"]), "--output is missing"),
        (("--part", "4/4"), "'4/4' is not a share: give I/N, such as 0/4"),
        (
            ("--pack", packs["concat"], "--output", "x", "--checkpoint", "c", "--processes", 2),
            "--processes with --checkpoint would convert it in each of them",
        ),
        (("--pack", packs["concat"], "--output", "x"), "no scorer: name"),
        (
            ("--pack", packs["concat"], "--output", "x", "--model", "m", "--short-window", 64),
            "scores nothing",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            run_tool(monkeypatch, *argv)


def test_a_doubtful_tokenizer_is_named(tmp_path: Path, packs: dict[str, Path]) -> None:
    from megatron_exact.data.manifest import TokenizerIdentity
    from megatron_exact.data.tokenizers import tokenizer_sha256

    scorer = tmp_path / "scorer"
    scorer.mkdir()
    manifest = read_manifest(packs["concat"])
    assert scoring.doubt_about_tokenizer(manifest, scorer) is None
    (scorer / "tokenizer.json").write_text("{}")
    identity = TokenizerIdentity(
        path="t", kind="x", vocab_size=9, sha256=tokenizer_sha256(scorer / "tokenizer.json")
    )
    assert scoring.doubt_about_tokenizer(replace(manifest, tokenizer=identity), scorer) is None
    (scorer / "tokenizer.json").write_text("{} ")
    doubt = scoring.doubt_about_tokenizer(replace(manifest, tokenizer=identity), scorer)
    assert doubt is not None
    assert "not those of the pack (t)" in doubt


def test_one_document_longer_than_a_row_is_scored_in_every_row(scorer: Scorer, tmp_path: Path) -> None:
    writer = IndexedWriter(f"{tmp_path}/one.bin", f"{tmp_path}/one.idx", VOCABULARY)
    writer.add(np.random.default_rng(1).integers(0, VOCABULARY, 200))
    writer.close()
    pack = make_pack(tmp_path / "one", "concat", validation_fraction=0.0)
    found = score_rows(RowReader(pack, "train"), [0, 1, 2], WINDOWS, scorer)["difference"]
    assert (found[:, : WINDOWS.window] == 0).all()  # the first window of every row's segment
    assert (np.abs(found[:, WINDOWS.window :]) > 0).all()  # the row's last target continues the document
