"""`plan_exposure.py` as a process: what it prints is what packing then does."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from small_corpora import heavy_tailed_lengths, random_documents, write_corpus

from tests import forked

LENGTHS = heavy_tailed_lengths(300)
GRID = ("--row-tokens", "64,128", "--policy", "concat,best-fit")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpora")
    write_corpus(root / "web", random_documents(LENGTHS))
    write_corpus(root / "math", random_documents(heavy_tailed_lengths(80, 2)))
    np.save(root / "web.npy", np.array(LENGTHS))
    return root


def run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return forked.run_tool(name, *arguments)


def test_prediction_equals_inspection_of_the_real_pack(corpora: Path, tmp_path: Path) -> None:
    options = ("--validation-fraction", "0.1", "--seed", "3", "--train-tokens", "2000")
    sources = (f"2:{corpora / 'web'}", f"1:{corpora / 'math'}")
    weighting = ("--tau", "20", "--alpha", "0.3", "--gamma", "0.7")
    figure = tmp_path / "f.png"
    done = run(
        "plan_exposure.py", "--source", *sources, *options, *GRID, *weighting, "--json", "--plot", figure
    )
    assert (done.returncode, done.stderr) == (0, "")
    content = json.loads(done.stdout)
    assert content["sources"] == [str(corpora / "web"), str(corpora / "math")]
    assert content["options"]["train_tokens"] == 2000
    assert figure.read_bytes().startswith(b"\x89PNG")
    cells = content["cells"]
    assert [(cell["row_tokens"], cell["policy"]) for cell in cells] == [
        (64, "concat"), (64, "best-fit"), (128, "concat"), (128, "best-fit"),
    ]  # fmt: skip
    for cell in cells[1:3]:
        pack = tmp_path / f"{cell['row_tokens']}"
        policy = ("--row-tokens", str(cell["row_tokens"]), "--policy", cell["policy"], "--output", pack)
        assert run("pack_corpus.py", "--source", *sources, *options, *policy).returncode == 0
        inspected = json.loads(run("inspect_pack.py", pack, *weighting, "--json").stdout)
        assert cell["exact"]
        for key in ("buckets", "tail"):
            assert cell[key] == inspected[key]
        lengths = inspected["lengths"]
        for key, value in lengths["truncation"].items():
            if key in cell:
                assert cell[key] == value, key
        assert cell["padding_tokens"] == lengths["padding"]["tokens"]
        assert cell["padding_share"] == lengths["padding"]["share"]
        assert cell["left_out_tokens"] == lengths["left_out_tokens"]


def test_tables_say_what_is_exact(corpora: Path) -> None:
    for source, extra, marks in (
        ("web", (), ["=", "="]),
        ("web", ("--expected",), ["~", "="]),
        ("web", ("--expected", "--validation-fraction", "0.2"), ["~", "~"]),
        ("web.npy", (), ["~", "="]),
        ("web.npy", ("--sample-of-documents", "3000"), ["~", "~"]),
        ("web.idx", (), ["=", "="]),
    ):
        done = run("plan_exposure.py", "--source", corpora / source, "--row-tokens", "64", *extra)
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert [line.split()[3] for line in lines[4:6]] == marks, done.stdout
        reasons = [line for line in lines if line.startswith("~ ")]
        assert len(reasons) == ("~" in marks), done.stdout
        assert not reasons or ("--expected" if extra[:1] == ("--expected",) else "web.npy") in reasons[0]


def test_rows_that_are_too_long_are_named(corpora: Path) -> None:
    arguments = ("--source", corpora / "web", "--row-tokens", "64,16M", "--policy", "concat")
    done = run("plan_exposure.py", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    (note,) = [line for line in done.stdout.splitlines() if line.startswith("left out: ")]
    assert "do not fill one row of 16,777,216" in note
    content = json.loads(run("plan_exposure.py", *arguments, "--json").stdout)
    assert [cell["row_tokens"] for cell in content["cells"]] == [64]
    assert [(cell["row_tokens"], cell["policy"]) for cell in content["skipped"]] == [(1 << 24, "concat")]


def test_tables_are_printed_before_the_figure(corpora: Path, tmp_path: Path) -> None:
    """A figure that cannot be written costs the figure alone."""
    (tmp_path / "file").touch()
    figure = tmp_path / "file" / "f.png"
    done = run("plan_exposure.py", "--source", corpora / "web", *GRID, "--plot", figure)
    assert done.returncode == 1
    assert "share of targets" in done.stdout


def test_mixes(corpora: Path) -> None:
    sources = ("--source", corpora / "web", corpora / "math", "--mix", "6:24", "1:3")
    done = run("plan_exposure.py", *sources, *GRID, "--json")
    assert [cell["mix"] for cell in json.loads(done.stdout)["cells"]] == [[6, 24]] * 4 + [[1, 3]] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no source"),
        (("--source", "{nothing}"), "nothing.idx is missing"),
        (("--source", "{nothing.npy}"), "No such file"),
        (("--source", "2:{web}", "{math}"), "give all of them one or none"),
        (("--source", "{web}", "{math}", "--mix", "1:2:3"), "has 3 weights for 2 sources"),
        (("--source", "1:{web}", "2:{math}", "--mix", "1:2"), "give one of the two"),
        (("--source", "{web}", "--policy", "first-fit"), "unknown policy 'first-fit'"),
        (("--source", "{web}", "--row-tokens", "4K,0"), "is not above 0"),
        (("--source", "{web}", "--row-tokens", "4K,,8K"), "is not a whole number"),
        (("--source", "{web}", "--row-tokens", "1M"), "do not fill one row"),
        (("--source", "{web}", "--row-tokens", "64", "--tau", "65"), "tau 65 is above the row length 64"),
        (("--source", "{web}", "--row-tokens", "64", "--tau", "row/0"), "neither tokens"),
        (("--source", "{web}", "--row-tokens", "64", "--alpha", "x"), "could not convert"),
        (("--source", "{web}", "--row-tokens", "64", "--alpha", "-1"), "alpha is -1"),
        (("--source", "{web}", "--row-tokens", "64", "--gamma", "nan"), "gamma is nan"),
        (("--source", "{web}", "--validation-fraction", "1"), "not in [0, 1)"),
        (("--source", "{web}", "--allow-repeats"), "--allow-repeats needs --train-tokens"),
        (("--source", "{web}", "--row-tokens", "64", "--train-tokens", "1M"), "--allow-repeats"),
        (("--source", "{web}", "--sample-of-documents", "10"), "needs a sample"),
        (("--source", "{bad.txt}"), "a length of -2"),
        (("--source", "{web}", "{math}", "--mix", "1:1", "1:2", "1:3", "1:4"), "8 policies and mixes"),
        (("--source", "{web}", "--row-tokens", "64", "--weight-unit", "documents"), "needs weights"),
        (("--source", "{web}", "--row-tokens", "64", "--plot", "{f.txt}"), "does not end in .png"),
        (("--source", "{web}", "--row-tokens", "64", "--plot", "{figure}"), "does not end in .png"),
        (("--source", "{empty.csv}"), "contains no lengths"),
    ],
)
def test_bad_input(corpora: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (corpora / "bad.txt").write_text("5\n-2\n")
    (corpora / "empty.csv").write_text("length,count\n")
    filled = [part.replace("{", f"{corpora}/").replace("}", "") for part in arguments]
    figure = tmp_path / "f.png"
    done = run("plan_exposure.py", "--plot", figure, *filled)
    assert done.returncode != 0
    assert done.stdout == ""
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not figure.exists()


def test_help_teaches() -> None:
    done = run("plan_exposure.py", "--help")
    assert done.returncode == 0
    for word in ("examples:", "exact", "expected", "--mix 6:24:32 1:3:6", "row/4"):
        assert word in done.stdout
