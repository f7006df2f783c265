"""Record the scores of RULER's and NoLiMa's own scorers, as `official_scores.json` beside this file.

    python -m tests.recorded.record_official_scores RULER NOLIMA

RULER is a copy of github.com/NVIDIA/RULER, NOLIMA one of github.com/adobe-research/NoLiMa.
`made_up_results` writes a result folder, `export_predictions` its answers in their formats. On these files
run, as they are, RULER's `scripts/eval/evaluate.py`, the functions of NoLiMa's
`evaluation/gather_results.ipynb`, and `_evaluate_response` of its `async_evaluate.py`. Replaced are NeMo's
reader and writer of JSON lines, and NLTK, which RULER's script only loads. Written are scores and hashes of
the files, none of the authors' code.
"""

from __future__ import annotations

import csv
import json
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

from megatron_exact.evaluation.evidence import export_predictions
from megatron_exact.files import sha256_file
from tests.recorded.made_up_results import RULER_LENGTHS, write_made_up_results
from tests.recorded.record_nolima_prompts import Recorder, stub_packages

OUTPUT = Path(__file__).with_name("official_scores.json")


def exported(folder: Path) -> dict[str, str]:
    """The sha256 of each file of an export, by its path below the folder."""
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*.json*"))}


def ruler_scores(checkout: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Score and number of empty answers of each task and length, from their summary.csv."""
    manifest = MagicMock()
    manifest.read_manifest = lambda path: [json.loads(line) for line in Path(path).read_text().splitlines()]
    parts = ["nemo", "collections", "asr", "parts", "utils", "manifest_utils"]
    for end in range(1, len(parts)):
        sys.modules[".".join(parts[:end])] = MagicMock()
    sys.modules[".".join(parts)] = manifest
    sys.modules["nltk"] = MagicMock()
    script = checkout / "scripts" / "eval" / "evaluate.py"
    sys.path.insert(0, str(script.parent))
    found = {}
    for length in RULER_LENGTHS:
        data = folder / "ruler" / str(length)
        sys.argv = [str(script), "--data_dir", str(data)]
        runpy.run_path(str(script), run_name="__main__")
        with open(data / "summary.csv", newline="") as stream:
            rows = {row[0]: row[1:] for row in list(csv.reader(stream))[1:]}
        for task, score, empty in zip(rows["Tasks"], rows["Score"], rows["Nulls"], strict=True):
            found[f"{task}/{length}"] = {"score": float(score), "empty": empty}
    return found


def nolima_scores(checkout: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Result of their notebook, and the metric of each answer by their tester, of each file."""
    stub_packages(Recorder())
    sys.path[:0] = [str(checkout / "evaluation"), str(checkout)]
    from async_evaluate import NoLiMa_Tester  # type: ignore[import-not-found]

    notebook = json.loads((checkout / "evaluation" / "gather_results.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for cell in cells[:2]:  # imports and functions
        exec(compile(cell, "gather_results.ipynb", "exec"), names)
    gathered = {entry["result_name"]: entry for entry in names["gather_results"](str(folder / "nolima"))}
    found = {}
    for name, entry in sorted(gathered.items()):
        content = json.loads(Path(name).read_text())
        tester = SimpleNamespace(metric=content["metric"])
        found[str(Path(name).relative_to(folder))] = {
            "result": float(entry["result"]),
            "metrics": [
                NoLiMa_Tester._evaluate_response(tester, each["response"], each["gold_answers"])
                for each in content["results"]
            ],
        }
    return found


def record(ruler: Path, nolima: Path) -> dict[str, Any]:
    """Everything that the test compares."""
    with tempfile.TemporaryDirectory() as folder:
        results = write_made_up_results(Path(folder) / "results")
        output = Path(folder) / "exported"
        export_predictions(results, output)
        content = {
            "code": {
                "github.com/NVIDIA/RULER": commit_of(ruler),
                "github.com/adobe-research/NoLiMa": commit_of(nolima),
            },
            "files": exported(output),
        }
        content["ruler"] = ruler_scores(ruler, output)
        content["nolima"] = nolima_scores(nolima, output)
    return content


def commit_of(checkout: Path) -> str:
    """The commit of a checkout, or that it is none."""
    found = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "not a git checkout"


if __name__ == "__main__":
    content = record(*(Path(word).resolve() for word in sys.argv[1:3]))
    OUTPUT.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{OUTPUT}: {len(content['ruler'])} cells of RULER, {len(content['nolima'])} files of NoLiMa")
