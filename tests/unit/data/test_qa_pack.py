"""Packs of question-answer records: supervised are the answers and their EOD, and nothing else."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qa_examples import PlainRecord, Record, encode_plainly, make_records, write_records
from small_corpora import plain_bucket
from tiny_tokenizers import BEGIN, END, write_huggingface
from tokenizers import AddedToken
from transformers import AutoTokenizer

from megatron_exact.data.corpus_record import scan_tokens
from megatron_exact.data.dataset import PackedDataset
from megatron_exact.data.indexed import IndexedTokens
from megatron_exact.data.manifest import Manifest, read_manifest
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.data.qa_pack import DEFAULT_TEMPLATE, QaOptions, pack_qa, qa_files
from megatron_exact.data.rows import RowReader
from megatron_exact.data.verify_pack import verify_pack
from tests import forked

ROW_TOKENS = 256
OPTIONS: dict[str, Any] = {"row_tokens": ROW_TOKENS, "seed": 5, "validation_fraction": 0.2}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_huggingface(tmp_path_factory.mktemp("tokenizer") / "model")


@pytest.fixture(scope="module")
def packed(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qa")
    make(folder, tokenizer, make_records())
    return folder / "pack"


def make(folder: Path, tokenizer: Path, records: list[Record], **changes: Any) -> Manifest:
    path = write_records(folder / "records.jsonl", records)
    options = QaOptions(**{**OPTIONS, **changes})
    return pack_qa(qa_files([path]), tokenizer, folder / "pack", options, licence="CC0-1.0")


def problems_of(pack: Path, plain: list[PlainRecord]) -> list[str]:
    """How the rows differ from the records taken one by one; every record must be there once."""
    missing = {tuple(record.ids): record for record in plain}
    assert len(missing) == len(plain)
    problems = []
    for split in ("train", "validation"):
        for sample in PackedDataset(pack, split, shuffle=False):
            tokens, labels, mask = (sample[k].tolist() for k in ("tokens", "labels", "loss_mask"))
            for start, end in pairwise(sample["cu_seqlens"].unique_consecutive().tolist()):
                record = missing.pop(tuple(tokens[start:end]), None)
                if record is None:  # padding, the last segment of a row
                    if any(mask[start:end]) or any(tokens[start:end]) or end != ROW_TOKENS:
                        problems.append(f"row {sample['row_id']} holds no record at {start}")
                    continue
                wanted = [*record.is_target[1:], False]
                if mask[start:end] != wanted:
                    problems.append(f"mask of the record at {start} of row {sample['row_id']}")
                following = [*record.ids[1:], 0]
                if labels[start:end] != [
                    token if is_target else 0 for token, is_target in zip(following, wanted, strict=True)
                ]:
                    problems.append(f"labels of the record at {start} of row {sample['row_id']}")
    return problems + ["a record is missing"] * bool(missing)


@pytest.fixture(scope="module")
def plain(tokenizer: Path) -> list[PlainRecord]:
    return [encode_plainly(tokenizer, record) for record in make_records()]


def test_rows_hold_the_records_and_supervise_their_answers(packed: Path, plain: list[PlainRecord]) -> None:
    assert problems_of(packed, plain) == []


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_mask_off_by_one_would_be_seen(
    packed: Path, plain: list[PlainRecord], monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    opened = RowReader.__init__

    def shifted(self: RowReader, *arguments: Any, **named: Any) -> None:
        opened(self, *arguments, **named)
        assert self._first_target is not None
        self._first_target = self._first_target + shift

    monkeypatch.setattr(RowReader, "__init__", shifted)
    assert problems_of(packed, plain)


def test_counts_are_those_of_the_targets_by_effective_context(
    packed: Path, plain: list[PlainRecord]
) -> None:
    manifest = read_manifest(packed)
    by_record = np.zeros(len(manifest.splits["train"].exposure.counts), dtype=np.int64)
    for record in plain:
        for position, is_target in enumerate(record.is_target):
            by_record[plain_bucket(position, ROW_TOKENS)] += is_target
    total = np.zeros_like(by_record)
    for name, split in manifest.splits.items():
        counted = np.zeros_like(by_record)
        for sample in PackedDataset(packed, name, shuffle=False):
            buckets = sample["target_buckets"][sample["loss_mask"] > 0]
            counted += np.bincount(buckets, minlength=counted.size)
        assert counted.tolist() == list(split.exposure.counts)
        assert counted.sum() == split.supervised_targets > 0
        total += counted
    assert total.tolist() == by_record.tolist()


def test_the_manifest_says_what_is_supervised_and_how_it_was_written(packed: Path) -> None:
    content = json.loads((packed / "manifest.json").read_text())
    assert content["policy"] == "best-fit"
    assert content["mask_cross_document_targets"] is True
    assert content["supervision"]["targets"] == "answers"
    assert content["supervision"]["template"] == DEFAULT_TEMPLATE.read_text()
    assert content["sources"][0]["licence"] == "CC0-1.0"
    assert content["sources"][0]["raw_files"][0]["path"] == "records.jsonl"
    assert content["sources"][0]["prefix"] == "records"


def test_an_ordinary_pack_knows_nothing_of_it(tmp_path: Path, packed: Path) -> None:
    """Their fingerprints are fixed in test_manifest.py."""
    for name in ("records.bin", "records.idx"):
        shutil.copy(packed / name, tmp_path / name)
    with pytest.warns(UserWarning, match="no source has a corpus record"):
        pack_corpora(
            [str(tmp_path / "records")],
            tmp_path / "pack",
            PackOptions(row_tokens=64, policy="best-fit", seed=1),
        )
    assert "supervision" not in json.loads((tmp_path / "pack" / "manifest.json").read_text())
    assert len(list((tmp_path / "pack" / "train").iterdir())) == 5


def test_the_same_records_give_the_same_pack_anywhere(
    packed: Path, tokenizer: Path, tmp_path: Path
) -> None:
    again = make(tmp_path, tokenizer, make_records())
    assert again.fingerprint == read_manifest(packed).fingerprint
    assert make(tmp_path / "pack", tokenizer, make_records(), seed=6).fingerprint != again.fingerprint


def failures(pack: Path) -> list[str]:
    return [check.detail for check in verify_pack(pack) if not check.passed]


def test_verify_proves_a_pack_where_it_is_moved(packed: Path, tmp_path: Path) -> None:
    assert failures(packed) == []
    shutil.copytree(packed, tmp_path / "moved")
    assert failures(tmp_path / "moved") == []


@pytest.mark.parametrize("damage", ["answers", "arrays", "both"])
def test_verify_sees_damage(packed: Path, tmp_path: Path, damage: str) -> None:
    pack = tmp_path / "pack"
    shutil.copytree(packed, pack)
    files = {"answers": pack / "records.answers.npy", "arrays": pack / "train" / "segment_first_target.npy"}
    for name, path in files.items():
        if damage in (name, "both"):
            array = np.load(path)
            array[0] += 1
            np.save(path, array)
    assert failures(pack)


def test_an_answer_array_of_another_plan_is_seen(packed: Path, tmp_path: Path) -> None:
    """With all hashes made to agree, the plan made again still differs."""
    from megatron_exact.data.manifest import fingerprint_of
    from megatron_exact.files import sha256_file, write_json

    pack = tmp_path / "pack"
    shutil.copytree(packed, pack)
    path = pack / "train" / "segment_first_target.npy"
    path.write_bytes(path.read_bytes()[:-4] + b"\x02\0\0\0")
    content = json.loads((pack / "manifest.json").read_text())
    content["splits"]["train"]["arrays"][path.name] = sha256_file(path)
    content["fingerprint"] = fingerprint_of(content)
    write_json(pack / "manifest.json", content)
    assert any("segment_first_target differs" in detail for detail in failures(pack))


def test_records_longer_than_a_row_are_left_out_and_counted(tokenizer: Path, tmp_path: Path) -> None:
    records = make_records()
    records[7]["response"] = "The quick reader reads two pages. " * 60
    manifest = make(tmp_path, tokenizer, records)
    assert manifest.supervision is not None
    assert manifest.supervision.left_out_records == 1
    assert manifest.sources[0].documents == len(records) - 1
    with pytest.raises(ValueError, match="no record to pack: 60 are longer than a row of 8"):
        make(tmp_path / "pack", tokenizer, records, row_tokens=8)
    assert sorted(path.name for path in (tmp_path / "pack").glob(".*")) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response": "  "}, "response is empty"),
        ({"instruction": None}, "instruction is missing, not text"),
        ({"context": 3}, "context is a int, not text"),
        ({"context": f"quoting {END} here"}, "contains the control token"),
    ],
)
def test_bad_records(tokenizer: Path, tmp_path: Path, change: Record, message: str) -> None:
    records = make_records()
    records[3].update(change)
    with pytest.raises(ValueError, match=rf"records.jsonl:4: .*{message}.*--skip-invalid"):
        make(tmp_path, tokenizer, records)
    assert not (tmp_path / "pack").exists()
    with pytest.warns(UserWarning, match="records.jsonl:4"):
        manifest = make(tmp_path, tokenizer, records, skip_invalid=True)
    assert manifest.sources[0].documents == len(records) - 1
    assert json.loads((tmp_path / "pack" / "records.json").read_text())["counts"]["skipped"] == 1


def test_a_line_that_is_no_json(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(make_records()[0]) + "\n{oops\n")
    with pytest.raises(ValueError, match=r"records.jsonl:2: a line that is not JSON"):
        pack_qa(qa_files([path]), tokenizer, tmp_path / "pack", QaOptions(**OPTIONS))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no chat template", "does not use `messages`"),
        ("{{ messages[0]['content'] }}{% for %}", "cannot be rendered"),
        ("{{ messages[-1]['content'] }}", "does not write question, prompt and answer"),
        (
            "{% for m in messages %}{{ m['content'] }}"
            "{% if m['role'] == 'user' %}{{ eos_token }}{% endif %}{% endfor %}",
            "writes the EOD",
        ),
    ],
)
def test_bad_templates(tokenizer: Path, tmp_path: Path, template: str, message: str) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(template)
    with pytest.raises(ValueError, match=message):
        make(tmp_path, tokenizer, make_records(), template=path)


def test_a_template_that_writes_the_start_itself(tokenizer: Path, tmp_path: Path) -> None:
    """No second BOS, as in evaluation; and its control tokens are single tokens."""
    path = tmp_path / "template.jinja"
    path.write_text("{{ bos_token }}" + DEFAULT_TEMPLATE.read_text())
    make(tmp_path, tokenizer, make_records(), template=path)
    row = PackedDataset(tmp_path / "pack", "train", shuffle=False)[0]
    begin, other = row["tokens"].tolist()[:2]
    assert (begin, BEGIN) == (0, "<|begin|>")
    assert other != begin


CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_whose_turns_end_with_the_eos(tmp_path: Path) -> None:
    """Qwen2.5-Instruct: the eos closes the turns of the prompt, and only the last one ends a document."""
    folder = write_huggingface(
        tmp_path / "model",
        template=None,
        eos="<|im_end|>",
        added=(AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)),
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHATML}))
    records = make_records()
    make(tmp_path, folder, records, template="model", row_tokens=ROW_TOKENS)
    upstream = AutoTokenizer.from_pretrained(folder)
    plain = []
    for record in records:
        question = "\n\n".join(filter(None, (record["context"].strip(), record["instruction"].strip())))
        text = upstream.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        prompt = upstream.encode(text, add_special_tokens=False)
        answer = upstream.encode(record["response"].strip(), add_special_tokens=False)
        assert prompt.count(upstream.eos_token_id) == 2
        ids = [*prompt, *answer, upstream.eos_token_id]
        plain.append(PlainRecord(ids, [False] * len(prompt) + [True] * (len(answer) + 1)))
    assert problems_of(tmp_path / "pack", plain) == []
    assert [check.name for check in verify_pack(tmp_path / "pack") if not check.passed] == []
    # negative control: an EOD inside an answer is still an error
    corpus = IndexedTokens(tmp_path / "pack" / "records")
    ids = np.fromfile(corpus.bin_path, corpus.dtype)
    ids[int(corpus.document_tokens[0]) - 2] = upstream.eos_token_id
    ids.tofile(corpus.bin_path)
    starts = np.load(f"{corpus.prefix}.answers.npy")
    error = scan_tokens(corpus, None, upstream.eos_token_id, None, starts)
    assert "document 0 has, before its end, the EOD" in str(error)


def test_where_the_context_stands(tokenizer: Path, tmp_path: Path) -> None:
    records = make_records()
    make(tmp_path, tokenizer, records, context_place="after")
    swapped = [
        {**r, "instruction": f"{r['instruction']}\n\n{r['context']}", "context": ""} for r in records
    ]
    assert problems_of(tmp_path / "pack", [encode_plainly(tokenizer, r) for r in swapped]) == []


@pytest.mark.parametrize("options", [{"policy": "concat"}, {"policy": "best-fit"}])
def test_other_ways_to_pack_records_are_refused(
    packed: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"packed whole, by megatron-exact pack-qa"):
        pack_corpora(
            [str(packed / "records")],
            tmp_path / "out",
            PackOptions(row_tokens=ROW_TOKENS, seed=1, **options),
        )
    short = PackOptions(row_tokens=16, policy="best-fit", seed=1, mask_cross_document_targets=True)
    with pytest.raises(ValueError, match="the longest question-answer record has"):
        pack_corpora([str(packed / "records")], tmp_path / "out", short)


def test_records_and_other_text_are_not_mixed(packed: Path, tmp_path: Path) -> None:
    for suffix in ("bin", "idx"):
        shutil.copy(packed / f"records.{suffix}", tmp_path / f"other.{suffix}")
    options = PackOptions(
        row_tokens=ROW_TOKENS, policy="best-fit", seed=1, mask_cross_document_targets=True
    )
    with pytest.raises(ValueError, match="other text: pack them apart"):
        pack_corpora([str(packed / "records"), str(tmp_path / "other")], tmp_path / "out", options)


def test_the_tool(tokenizer: Path, tmp_path: Path) -> None:
    path = write_records(tmp_path / "records.jsonl", make_records())
    words = ("--input", path, "--tokenizer", tokenizer, "--row-tokens", 128, "--output", tmp_path / "pack")
    serial = {"TOKENIZERS_PARALLELISM": "false"}  # its threads do not survive a fork
    done = forked.run_tool("pack_qa.py", *words, environment=serial)
    assert done.returncode == 0, done.stderr
    assert "60 records; left out: 0 longer than a row, 0 invalid" in done.stdout
