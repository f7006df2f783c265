"""SIGKILL at every step, again and again, and by the clock: the bytes are those of a run never killed."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killed_runs import FORK_WARNING, OPTIONS, contents, names, run_and_die, write_inputs
from tiny_tokenizers import SENTENCES, write_sentencepiece

from megatron_exact.data.corpus_record import check_corpus
from megatron_exact.data.tokenize import tokenize_corpus
from megatron_exact.data.tokenize_journal import kept_work

pytestmark = pytest.mark.filterwarnings(FORK_WARNING)


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("tokenizers") / "tiny.model")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_inputs(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, inputs: list[Path], spm: Path) -> list[bytes]:
    prefix = tmp_path_factory.mktemp("expected") / "c"
    tokenize_corpus(inputs, spm, prefix, skip_invalid=True)
    check_corpus(prefix)
    return contents(prefix)


def test_killed_at_every_step_that_the_disk_sees(
    tmp_path: Path, inputs: list[Path], spm: Path, expected: list[bytes]
) -> None:
    """SIGKILL before step 1, 2, ... until a run ends by itself; the last steps are the final renames."""
    resumed = 0
    for moment in range(1, 10_000):
        prefix = tmp_path / f"{moment}" / "c"
        if moment % 6 != 1 and moment < 150:  # the middle of a run is much alike
            continue
        code = run_and_die(inputs, spm, prefix, moment, after=moment % 4 < 2)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        if (prefix.parent / "c.idx").exists():
            check_corpus(prefix)  # what opens is whole
        if (prefix.parent / "c.idx").exists() and kept_work(prefix) is None:  # only an empty folder is left
            with pytest.raises(ValueError, match="exists already"):
                tokenize_corpus(inputs, spm, prefix, **OPTIONS)
        else:
            summary = tokenize_corpus(inputs, spm, prefix, **OPTIONS)
            resumed += summary.resumed_documents > 0
        assert contents(prefix) == expected, moment
        assert names(prefix.parent) == ["c.bin", "c.idx", "c.json"]
    else:
        pytest.fail("the run never ended")
    assert moment > 160
    assert resumed > 20


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again(
    tmp_path: Path, inputs: list[Path], spm: Path, expected: list[bytes], seed: int
) -> None:
    generator = random.Random(seed)
    prefix = tmp_path / "c"
    for _ in range(200):
        moment = generator.randrange(20, 120)
        code = run_and_die(inputs, spm, prefix, moment, after=generator.random() < 0.5)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        if (
            prefix.with_suffix(".idx").exists() and kept_work(prefix) is None
        ):  # while it gave back its lease
            with pytest.raises(ValueError, match="exists already"):
                tokenize_corpus(inputs, spm, prefix, **OPTIONS)
            break
    else:
        pytest.fail("no progress")
    assert contents(prefix) == expected
    assert names(tmp_path) == ["c.bin", "c.idx", "c.json"]


PROGRAM = """
import sys
from megatron_exact.data.tokenize import tokenize_corpus
if __name__ == "__main__":
    *inputs, tokenizer, prefix = sys.argv[1:]
    tokenize_corpus(inputs, tokenizer, prefix, workers=2, skip_invalid=True, batch_bytes=2000,
                    journal_bytes=8000)
"""


def test_a_pool_of_workers_killed_at_random_moments(tmp_path: Path, spm: Path, inputs: list[Path]) -> None:
    """The whole program by the clock, with workers that are busy and results under way."""
    (tmp_path / "program.py").write_text(PROGRAM)
    big = tmp_path / "big.jsonl"
    big.write_text("".join(json.dumps({"text": "".join(SENTENCES[: n % 90])}) + "\n" for n in range(1500)))
    prefix = tmp_path / "out" / "c"
    command = [sys.executable, tmp_path / "program.py", *inputs, big, spm, prefix]
    generator = random.Random(7)
    kills = 0
    for _ in range(4):
        with subprocess.Popen(command, cwd=tmp_path) as process:
            while process.poll() is None and kept_work(prefix) is None:
                time.sleep(0.01)
            time.sleep(generator.uniform(0, 0.25))
            process.kill()
        if process.returncode == 0:
            break
        kills += 1
    assert kills > 0
    subprocess.run(command, cwd=tmp_path, check=True)
    whole = tmp_path / "whole"
    tokenize_corpus([*inputs, big], spm, whole, skip_invalid=True)
    assert [*contents(prefix)[:2]] == [*contents(whole)[:2]]
    check_corpus(prefix)
