"""The batch scripts with stand-ins for `srun`, `scontrol` and the interpreter, which record their words.

pyxis, which adds the container options to `srun`, was not there: what is checked is what srun is given.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = "examples/slurm"
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "PYTHONPYCACHEPREFIX")
RECORDER = """#!{python}
import json, os, sys
with open(os.path.join({folder!r}, "{name}.jsonl"), "a") as stream:
    stream.write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")
"""
SRUN = """
words = sys.argv[1:]
tasks = int(words[words.index("--ntasks") + 1]) if "--ntasks" in words else 1
import subprocess
program = next(index for index, word in enumerate(words) if word.endswith(".sh"))
codes = [
    subprocess.call(
        words[program:],
        env={**os.environ, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n), "SLURM_NTASKS": str(tasks),
             "SLURM_NODEID": "0", "SLURM_NNODES": "1"},
    )
    for n in range(tasks)
]
sys.exit(max(codes))
"""
SCONTROL = """#!/bin/bash
[[ "$1" == show ]] && echo n1 && exit
echo "JobId=7 JobState=RUNNING Restarts=0 EndTime=2099-01-01T00:00:00 PreemptTime=None"
"""


class Scripts:
    """Runs a batch script as Slurm would, on a node that is this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        self._write("scontrol", SCONTROL)
        recorder = RECORDER.replace("{python}", sys.executable).replace("{folder!r}", repr(str(folder)))
        self._write("srun", recorder.replace("{name}", "srun") + SRUN)
        self._write("python", recorder.replace("{name}", "python"))

    def _write(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def run(self, script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in (*CACHES, "HF_HOME", "TMPDIR", "CUDA_VISIBLE_DEVICES", "PYTHON")
        }
        return subprocess.run(
            ["bash", f"{SCRIPTS}/{script}", *words],
            cwd=ROOT,
            env={
                **kept,
                "PATH": f"{self.bin}:{os.environ['PATH']}",
                "SLURM_SUBMIT_DIR": str(ROOT),
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NODELIST": "n1",
                "PYTHON": str(self.bin / "python"),
                **variables,
            },
            capture_output=True,
            text=True,
        )

    def recorded(self, name: str) -> list[tuple[list[str], dict[str, Any]]]:
        lines = (self.folder / f"{name}.jsonl").read_text().splitlines()
        return [tuple(json.loads(line)) for line in lines]  # type: ignore[misc]


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    return Scripts(tmp_path)


TOKENIZE = ("tokenize.sbatch", "--input", "a.jsonl")
EVALUATE = ("evaluate.sbatch", "evaluate", "--model", "m")
TRAIN = ("train.sbatch", "--pack", "packs/16k")


@pytest.mark.parametrize("script", [TRAIN, EVALUATE, TOKENIZE], ids=lambda words: words[0])
def test_the_container_is_named_to_srun_alone(
    scripts: Scripts, script: tuple[str, ...], tmp_path: Path
) -> None:
    """Image, mounts and folder of work stand before the program, each as one word, spaces and all."""
    run = tmp_path / "run"
    common = {"RUN_DIR": str(run), "GPUS_PER_NODE": "1", "IMAGE": "/images/my image.sqsh"}
    scripts.run(*script, **common, MOUNTS="/data:/data,/work:/work")
    scripts.run(*script, **common)
    scripts.run(*script, RUN_DIR=str(run), GPUS_PER_NODE="1")
    (mounted, _), (default, _), (bare, _) = scripts.recorded("srun")
    image = ["--container-image", "/images/my image.sqsh", "--container-workdir", str(ROOT)]
    assert mounted[:6] == [*image, "--container-mounts", "/data:/data,/work:/work"]
    assert default[:6] == [*image, "--container-mounts", f"{ROOT}:{ROOT}"]
    assert not [word for word in bare if word.startswith("--container")]
    program = next(index for index, word in enumerate(mounted) if word.endswith(".sh"))
    assert program > 5
    assert mounted[6:] == default[6:] == bare
    if script is TRAIN:  # the host's folder, which the mounts bring into the container
        assert bare[bare.index("--save") + 1] == str(run)
        assert (run / "logs" / "7-0").is_dir()


def test_the_image_has_an_interpreter_of_its_own(scripts: Scripts) -> None:
    scripts.run(*EVALUATE, IMAGE="x.sqsh", GPUS_PER_NODE="1", PYTHON="")
    scripts.run(*EVALUATE, GPUS_PER_NODE="1", PYTHON="")
    assert [environment["PYTHON"] for _, environment in scripts.recorded("srun")] == [
        "python",
        ".venv/bin/python",
    ]


def test_caches_go_to_the_node_unless_they_are_set(scripts: Scripts, tmp_path: Path) -> None:
    """In a training job, and in a process of an array."""
    local = str(tmp_path / "local")
    for script in (EVALUATE, TRAIN):
        run = {"RUN_DIR": str(tmp_path / "run"), "GPUS_PER_NODE": "1"}
        scripts.run(*script, **run, NODE_CACHE=local, PYTHONDONTWRITEBYTECODE="1")
        scripts.run(*script, **run, TMPDIR=str(tmp_path), TRITON_CACHE_DIR="/own", HF_HOME="/shared/hf")
    found = [environment for _, environment in scripts.recorded("python")]
    assert len(found) == 4
    for environment in (found[0], found[2]):
        assert all(environment[name].startswith(f"{local}/") for name in CACHES)
        assert len({environment[name] for name in CACHES}) == len(CACHES)
        assert "HF_HOME" not in environment  # data sets of the login node are found
        assert "PYTHONDONTWRITEBYTECODE" not in environment  # or nothing would be kept
    for environment in (found[1], found[3]):
        assert (environment["TRITON_CACHE_DIR"], environment["HF_HOME"]) == ("/own", "/shared/hf")
        cache = f"{tmp_path}/megatron_exact-cache-{os.getuid()}/"
        assert environment["PYTHONPYCACHEPREFIX"].startswith(cache)


def test_bytecode_is_kept_as_the_user_or_the_image_has_it(scripts: Scripts, tmp_path: Path) -> None:
    own = {"PYTHONPYCACHEPREFIX": "/own", "PYTHONDONTWRITEBYTECODE": "1"}
    scripts.run(*EVALUATE, GPUS_PER_NODE="1", TMPDIR=str(tmp_path), **own)
    scripts.run(*EVALUATE, GPUS_PER_NODE="1", TMPDIR=str(tmp_path), IMAGE="x.sqsh")
    (_, environment), (_, in_image) = scripts.recorded("python")
    assert {name: environment[name] for name in own} == own
    assert "PYTHONPYCACHEPREFIX" not in in_image


def test_a_cache_folder_of_somebody_else_is_not_used(scripts: Scripts, tmp_path: Path) -> None:
    """In /tmp anybody can make the folder first; a link stands for one that is not ours."""
    own = tmp_path / f"megatron_exact-cache-{os.getuid()}"
    run = {"GPUS_PER_NODE": "1", "TMPDIR": str(tmp_path)}
    scripts.run(*EVALUATE, **run)
    assert own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o777)
    scripts.run(*EVALUATE, **run)
    assert own.stat().st_mode & 0o777 == 0o700
    own.rename(tmp_path / "elsewhere")
    own.symlink_to(tmp_path / "elsewhere")
    done = scripts.run(*EVALUATE, **run)
    assert f"{own} is not a folder of this user" in done.stderr
    first, second, third = (environment for _, environment in scripts.recorded("python"))
    assert first["TRITON_CACHE_DIR"] == second["TRITON_CACHE_DIR"] == f"{own}/triton"
    new = Path(third["TRITON_CACHE_DIR"]).parent
    assert new.parent == tmp_path
    assert new.name.startswith(f"{own.name}-")
    assert new.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("script", [EVALUATE, TOKENIZE], ids=lambda words: words[0])
@pytest.mark.parametrize("array", [("1", "4", "4"), ("0", "6", "4")], ids=["1-4", "0-6:2"])
def test_an_array_that_does_not_count_from_0_is_refused(
    scripts: Scripts, script: tuple[str, ...], array: tuple[str, str, str]
) -> None:
    first, last, count = array
    names = {
        "SLURM_ARRAY_TASK_ID": last,
        "SLURM_ARRAY_TASK_MIN": first,
        "SLURM_ARRAY_TASK_MAX": last,
        "SLURM_ARRAY_TASK_COUNT": count,
        "GPUS_PER_NODE": "1",
    }
    done = scripts.run(*script, **names)
    assert done.returncode != 0
    assert f"the array is not 0-N (tasks {first} to {last})" in done.stderr
    assert not (scripts.folder / "python.jsonl").exists()
    scripts.run(*script, **names, SHARDS="8")  # a part of an array again
    ((words, _),) = scripts.recorded("python")
    assert words[-1] == f"{last}/8"


def test_a_job_array_does_every_shard_once(scripts: Scripts) -> None:
    """Two nodes of three GPUs; then one of them again."""
    for task in ("0", "1"):
        scripts.run(*EVALUATE, GPUS_PER_NODE="3", SLURM_ARRAY_TASK_ID=task, SLURM_ARRAY_TASK_MAX="1")
    found = scripts.recorded("python")
    assert [words[-2:] for words, _ in found] == [["--shard", f"{n}/6"] for n in range(6)]
    assert [words[:5] for words, _ in found] == [["-m", "megatron_exact", *EVALUATE[1:4]]] * 6
    assert [environment["CUDA_VISIBLE_DEVICES"] for _, environment in found] == list("012012")
    scripts.run(*EVALUATE, GPUS_PER_NODE="3", SLURM_ARRAY_TASK_ID="0", SLURM_ARRAY_TASK_MAX="0", SHARDS="6")
    assert [words[-1] for words, _ in scripts.recorded("python")[6:]] == ["0/6", "1/6", "2/6"]


def test_a_task_of_tokenizing_is_one_process_with_its_cores(scripts: Scripts) -> None:
    array = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MAX": "3", "SLURM_CPUS_PER_TASK": "16"}
    done = scripts.run(*TOKENIZE, "--tasks", "9", **array)
    assert done.returncode == 0, done.stderr
    ((words, environment),) = scripts.recorded("python")
    assert words == [
        *("-m", "megatron_exact", "tokenize-shards", "--workers-per-task", "16"),
        *(*TOKENIZE[1:], "--tasks", "9", "--shard", "2/4"),
    ]
    assert "CUDA_VISIBLE_DEVICES" not in environment
    ((words, _),) = scripts.recorded("srun")
    assert words[:4] == ["--ntasks", "1", "--cpus-per-task", "16"]


def test_a_script_without_arguments_says_what_it_needs(scripts: Scripts) -> None:
    for script, needs in (("evaluate.sbatch", "give a verb"), ("tokenize.sbatch", "give the arguments")):
        done = scripts.run(script)
        assert done.returncode != 0
        assert needs in done.stderr


@pytest.mark.parametrize("script", [TRAIN, EVALUATE, TOKENIZE], ids=lambda words: words[0])
def test_an_interpreter_that_is_not_there_is_named(
    scripts: Scripts, script: tuple[str, ...], tmp_path: Path
) -> None:
    """The one of an image is not looked for on the host."""
    run = {"RUN_DIR": str(tmp_path / "run"), "GPUS_PER_NODE": "1", "PYTHON": "/nowhere/python"}
    done = scripts.run(*script, **run)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("PYTHON is /nowhere/python, which is not there on ")
    assert not (scripts.folder / "srun.jsonl").exists()
    scripts.run(*script, **run, IMAGE="x.sqsh")
    assert scripts.recorded("srun")


@pytest.mark.parametrize("script", [TRAIN, EVALUATE, TOKENIZE], ids=lambda words: words[0])
def test_a_job_from_another_folder_says_where_to_submit_it(
    scripts: Scripts, script: tuple[str, ...], tmp_path: Path
) -> None:
    done = scripts.run(*script, RUN_DIR=str(tmp_path / "run"), SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == f"{tmp_path} has no examples/slurm: submit the job from the checkout\n"
