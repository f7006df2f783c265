"""Shares of the inputs, the job file, and the tasks as datatrove really runs and submits them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import SENTENCES, write_sentencepiece

from megatron_exact.commands import corpora
from megatron_exact.data.corpus_record import check_corpus, read_corpus_record
from megatron_exact.data.indexed import IndexedTokens
from megatron_exact.data.shard_job import (
    ShardJob,
    SlurmOptions,
    begin_job,
    check_job,
    missing_shards,
    require_safe_word,
    run_local,
    shard_prefix,
    split_inputs,
    submit_slurm,
)
from megatron_exact.data.tokenize import tokenize_corpus

TOOL = Path(__file__).parents[3] / "tools" / "tokenize_shards.py"


@pytest.fixture
def job(tmp_path: Path) -> ShardJob:
    """Five files of growing size, two tasks."""
    inputs = []
    for number in range(5):
        path = tmp_path / f"{number}.jsonl"
        texts = [f"file {number} line {n} " + SENTENCES[n] for n in range(10 * number + 3)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        inputs.append(str(path))
    tokenizer = write_sentencepiece(tmp_path / "tiny.model")
    output = tmp_path / "out"
    return ShardJob(inputs=tuple(inputs), tokenizer=str(tokenizer), output=str(output), tasks=2)


def documents_of(prefix: Path) -> list[list[int]]:
    corpus = IndexedTokens(prefix)
    return [corpus.read(n, 0, int(corpus.document_tokens[n])).tolist() for n in range(len(corpus))]


def check_shards(job: ShardJob) -> None:
    """Every document of every input stands once, in the order of its task's share."""
    shares = split_inputs([Path(path).stat().st_size for path in job.inputs], job.tasks)
    for task, share in enumerate(shares):
        check_corpus(shard_prefix(job.output, task))
        whole = Path(job.output).parent / f"expected{task}"
        tokenize_corpus([job.inputs[n] for n in share], job.tokenizer, whole)
        assert documents_of(shard_prefix(job.output, task)) == documents_of(whole)
    assert missing_shards(job.output) == []


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=60), st.data())
def test_shares_are_balanced_and_hold_every_input_once(sizes: list[int], data: st.DataObject) -> None:
    tasks = data.draw(st.integers(1, len(sizes)))
    shares = split_inputs(sizes, tasks)
    assert sorted(number for share in shares for number in share) == list(range(len(sizes)))
    assert all(share and share == sorted(share) for share in shares)
    loads = [sum(sizes[number] for number in share) for share in shares]
    assert max(loads) <= sum(sizes) / tasks + max(sizes)
    assert split_inputs(sizes, tasks) == shares


def test_more_tasks_than_files_are_refused() -> None:
    with pytest.raises(ValueError, match="3 tasks for 2 input files: files are not split"):
        split_inputs([5, 5], 3)


def test_tasks_one_by_one_and_again(job: ShardJob) -> None:
    begin_job(job)
    assert missing_shards(job.output) == [0, 1]
    job(None, 1, 2)
    assert missing_shards(job.output) == [0]
    before = shard_prefix(job.output, 1).with_suffix(".bin").stat().st_mtime_ns
    for rank in (1, 0):
        job(None, rank, 2)
    assert shard_prefix(job.output, 1).with_suffix(".bin").stat().st_mtime_ns == before
    check_shards(job)


def test_processes_of_a_job_array_make_a_share_each(
    job: ShardJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without datatrove; the second one says which shards are there, and a third call makes nothing."""
    monkeypatch.setitem(sys.modules, "datatrove", None)

    def tokenize(*words: object) -> str:
        command = ["--input", *job.inputs, "--tokenizer", job.tokenizer, "--output", job.output]
        corpora.tokenize_shards([str(word) for word in (*command, "--tasks", 2, *words)])
        return capsys.readouterr().out

    assert "--shard 1/2 is finished; still missing: --shard 0/2" in tokenize("--shard", "1/2")
    assert missing_shards(job.output) == [0]
    before = shard_prefix(job.output, 1).with_suffix(".bin").stat().st_mtime_ns
    assert "2 shards, a source for megatron-exact pack; 115 documents" in tokenize("--shard", "0/2")
    assert "2 shards, a source for megatron-exact pack" in tokenize("--shard", "1/2")
    assert shard_prefix(job.output, 1).with_suffix(".bin").stat().st_mtime_ns == before
    check_shards(job)
    slurm = ("--executor", "slurm", "--slurm-partition", "p", "--slurm-time", "1")
    with pytest.raises(ValueError, match="both make a job array: leave one of them out"):
        tokenize("--shard", "0/2", *slurm)


def test_a_shard_that_was_removed_is_made_again(job: ShardJob) -> None:
    """datatrove has marked its task as finished, which must not keep it from running."""
    begin_job(job)
    run_local(job, 1)
    before = shard_prefix(job.output, 1).with_suffix(".bin").read_bytes()
    for suffix in (".bin", ".idx", ".json"):
        shard_prefix(job.output, 1).with_suffix(suffix).unlink()
    assert missing_shards(job.output) == [1]
    run_local(job, 1)
    assert missing_shards(job.output) == []
    assert shard_prefix(job.output, 1).with_suffix(".bin").read_bytes() == before


def test_another_job_in_the_same_folder_is_refused(job: ShardJob, tmp_path: Path) -> None:
    begin_job(job)
    begin_job(replace(job, workers_per_task=3, licence="CC0-1.0"))
    for changed, name in (
        (replace(job, tasks=3), "tasks"),
        (replace(job, text_key="body"), "text_key"),
        (replace(job, add_bos=False), "add_bos"),
        (replace(job, inputs=job.inputs[::-1]), "inputs"),
    ):
        with pytest.raises(ValueError, match=rf"shards\.json describes another job, {name} differs"):
            begin_job(changed)
    os.utime(job.inputs[0], ns=(0, 0))
    with pytest.raises(ValueError, match="inputs differs"):
        check_job(job)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.idx").touch()
    with pytest.raises(ValueError, match=r"contains corpora but no shards\.json"):
        begin_job(replace(job, output=str(tmp_path / "other")))


def test_bad_jobs_are_refused_before_any_task(job: ShardJob) -> None:
    for changed, reason in (
        (replace(job, inputs=(*job.inputs, "/missing.jsonl")), "does not exist"),
        (replace(job, tasks=6), "6 tasks for 5 input files"),
        (replace(job, eod_token="nothing"), "not one token"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=reason):
            begin_job(changed)
        assert not Path(job.output).exists()


def tool_command(job: ShardJob, *arguments: object) -> list[str]:
    words = [TOOL, "--input", *job.inputs, "--tokenizer", job.tokenizer, "--output", job.output]
    return [sys.executable, *map(str, words), *map(str, arguments)]


def test_the_tool_on_this_machine_and_again_after_a_failure(job: ShardJob) -> None:
    with open(job.inputs[1], "a") as stream:
        stream.write("bad\n")
    command = tool_command(job, "--tasks", 2, "--workers", 2)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {job.inputs[1]}:14: invalid JSON")
    assert len(missing_shards(job.output)) >= 1
    command = tool_command(job, "--tasks", 2, "--workers", 2, "--workers-per-task", 2, "--skip-invalid")
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "skip_invalid differs" in refused.stderr
    shutil.rmtree(job.output)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 shards, a source for" in done.stdout
    records = [read_corpus_record(shard_prefix(job.output, task)) for task in range(2)]
    assert sum(record.documents for record in records if record) == 115
    assert sum(record.skipped for record in records if record) == 1
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "all 2 tasks have already been completed" in again.stderr


FAKE_COMMANDS = {
    "sbatch": 'for last; do :; done; cp "$last" "$FAKE/script.$(ls $FAKE | wc -l)"; echo Submitted job 7\n',
    "srun": 'while [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done; exec "$@"\n',
    "scontrol": "echo localhost\n",
}


def test_the_script_for_slurm_runs_the_tasks(
    job: ShardJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With commands that stand in for SLURM's: what is submitted is read, then run as an array would."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "fake").mkdir()
    for name, body in FAKE_COMMANDS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}")
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("FAKE", str(tmp_path / "fake"))
    begin_job(job)
    options = SlurmOptions(partition="cpu", time="01:00:00", account="lab", memory_gb_per_cpu=3)
    script = submit_slurm(replace(job, workers_per_task=2), 8, options)
    text = script.read_text()
    for line in (
        "#SBATCH --array=0-1%2",
        "#SBATCH --cpus-per-task=2",
        "#SBATCH --mem-per-cpu=3G",
        "#SBATCH --partition=cpu",
        "#SBATCH --time=01:00:00",
        "#SBATCH --account=lab",
    ):
        assert line in text.splitlines(), text
    assert "qos" not in text
    assert (tmp_path / "fake" / "script.0").read_text() == text
    for task in ("0", "1"):
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": task, "SLURM_NODELIST": "localhost"}
        done = subprocess.run(
            ["bash", script], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    check_shards(job)


@pytest.mark.parametrize("word", ["a b", "x;rm", "$(id)", "`id`", "a\nb", "", "a'b", "a\\b"])
def test_words_that_a_shell_would_read_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match="would go into a batch script"):
        require_safe_word(word, "--slurm-partition")
    with pytest.raises(ValueError, match="--slurm-job-name"):
        SlurmOptions(partition="cpu", time="1:00", job_name=word)


def test_a_folder_that_others_can_write_is_refused(job: ShardJob) -> None:
    folder = Path(job.output) / ".tasks"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(ValueError, match="can be written by others"):
        submit_slurm(job, 1, SlurmOptions(partition="cpu", time="1:00"))


def test_a_missing_datatrove_says_what_to_install(job: ShardJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datatrove", None)
    with pytest.raises(ValueError, match="needs the package datatrove: pip install"):
        submit_slurm(job, 1, SlurmOptions(partition="cpu", time="1:00"))
