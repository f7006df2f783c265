"""Every command of docker/README.md, in an environment laid out as docker/Dockerfile lays it out.

Two environments stand in for the base image and for ours over it: the first sees torch and what torch
needs, the second, made with `--system-site-packages`, the packages of docker/requirements.txt and this
project. Packages are links to those of the environment that runs the tests. No container engine runs.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.distributed import jobs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).resolve().parents[2]
PROJECT = "megatron-exact"
TRAINS = "torchrun --nproc-per-node 8 -m megatron_exact.training.pretrain --pack /packs/16k ..."
CHECKS = "torchrun --nproc-per-node 2 tools/check_document_masking.py <the arguments of the run>"
ACCEPTS = "megatron-exact accept --output /out/accepted"
HELPS = "python tools/pack_corpus.py --help"
SUBMITS = "sbatch --nodes 2 examples/slurm/train.sbatch --pack packs/16k ..."


def readme_commands() -> list[str]:
    """The commands of the README's blocks; of `docker run` what runs inside the image."""
    found = []
    for block in re.findall(r"```\n(.*?)```", (ROOT / "docker" / "README.md").read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = [word for word in line.split() if "=" not in word or word.startswith("-")]
            if words[:2] == ["docker", "run"]:
                image = next(
                    n for n, word in enumerate(words) if re.fullmatch(r"megatron-exact(:\w+)?", word)
                )
                words = words[image + 1 :]
            text = " ".join(words)
            found.append(shlex.join(shlex.split(text)) if '"' in text else text)
    return found


def tops(found: Distribution) -> set[str]:
    """Names of a package directly in site-packages."""
    return {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}


def needs(name: str, found: set[str]) -> set[str]:
    """A package and all that it needs."""
    if canonicalize_name(name) not in found:
        found.add(canonicalize_name(name))
        for text in distribution(name).requires or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                needs(needed.name, found)
    return found


class Image:
    """The two environments, and the variables that the Dockerfile sets."""

    def __init__(self, folder: Path) -> None:
        self.base, self.ours = folder / "base", folder / "ours"
        pinned = {
            canonicalize_name(line.partition("==")[0])
            for line in (ROOT / "docker" / "requirements.txt").read_text().splitlines()
            if "==" in line and not line.startswith("#")
        }
        of_image = {
            top
            for found in distributions()
            for top in tops(found)
            if canonicalize_name(found.name) in (pinned | {PROJECT}) - needs("torch", set())
        }
        base_packages, our_packages = folder / "base-packages", folder / "our-packages"
        for path in (base_packages, our_packages):
            path.mkdir()
        site = Path(distribution("torch").locate_file(""))
        for entry in site.iterdir():
            if entry.name.startswith(("__editable__", "__editable___", "__pycache__")):
                continue
            (our_packages if entry.name in of_image else base_packages).joinpath(entry.name).symlink_to(
                entry
            )
        venv = ["-m", "venv", "--without-pip"]
        subprocess.run([sys.executable, *venv, self.base], check=True)
        subprocess.run(
            [self.base / "bin" / "python", *venv, "--system-site-packages", self.ours], check=True
        )
        self._see(self.base, base_packages)
        # an environment made inside another takes that one's base for its system: name both
        self._see(self.ours, our_packages, base_packages, ROOT)
        stock = self.base / "bin" / "torchrun"  # as pip writes it
        stock.write_text(f"#!{self.base}/bin/python\nfrom torch.distributed.run import main\nmain()\n")
        stock.chmod(0o755)
        ours = self.ours / "bin" / "megatron-exact"  # the same, of the project's entry point
        ours.write_text(f"#!{self.ours}/bin/python\nfrom megatron_exact.cli import run\nrun()\n")
        ours.chmod(0o755)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
            "PYTHONPYCACHEPREFIX": os.environ.get("PYTHONPYCACHEPREFIX", str(folder / "pycache")),
            "OMP_NUM_THREADS": "1",
            "VIRTUAL_ENV": str(self.ours),
            "PATH": f"{self.ours}/bin:{self.base}/bin:{os.environ['PATH']}",
        }

    @staticmethod
    def _see(environment: Path, *folders: Path) -> None:
        site = next((environment / "lib").glob("python*/site-packages"))
        (site / "linked.pth").write_text("".join(f"{folder}\n" for folder in folders))

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", command], cwd=ROOT, env=self.environment, capture_output=True, text=True
        )


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return Image(tmp_path_factory.mktemp("image"))


def test_the_readme_has_no_command_that_is_not_tried_here() -> None:
    engine = ("docker build", "enroot import")
    rest = [command for command in readme_commands() if not command.startswith(engine)]
    # tests/unit/examples/test_slurm_scripts.py checks the words that srun gets for a container
    assert sorted(rest) == sorted([TRAINS, CHECKS, ACCEPTS, HELPS, SUBMITS])


def test_the_commands_of_the_image(image: Image, tmp_path: Path) -> None:
    pack = jobs.make_pack(jobs.make_corpus(tmp_path / "docs"), "concat")
    arguments = shlex.join(str(word) for word in jobs.command(pack, "exact", 2, "--cpu"))
    stock = image.run(f"{image.base}/bin/torchrun --nproc-per-node 1 -m megatron_exact.training.pretrain")
    assert "No module named" in stock.stderr  # the base image's, by which ranks started first
    recipes = re.sub(r"\\\n", " ", (ROOT / "docker" / "Dockerfile").read_text()).splitlines()
    (writes_torchrun,) = (line for line in recipes if line.startswith("RUN printf"))
    assert image.run(writes_torchrun.removeprefix("RUN ")).returncode == 0
    help_of_build = image.run("python -m megatron_exact.training.pretrain --help")
    assert help_of_build.returncode == 0, help_of_build.stderr[-3000:]
    helps = image.run(HELPS)
    assert "--row-tokens" in helps.stdout, helps.stderr
    words = TRAINS.replace("--nproc-per-node 8", "--nproc-per-node 2").replace(
        "--pack /packs/16k ...", arguments
    )
    trained = image.run(f"{words} --run-dir {tmp_path / 'run'}")
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert (tmp_path / "run" / "losses.jsonl").read_text().count("\n") == 2
    checked = image.run(CHECKS.replace("<the arguments of the run>", arguments))
    assert checked.returncode == 0, (checked.stdout + checked.stderr)[-3000:]


def test_the_acceptance_of_the_image(image: Image, tmp_path: Path) -> None:
    """The groups that need one rank; tests/distributed/test_acceptance.py has the others."""
    done = image.run(f"{ACCEPTS.replace('/out', str(tmp_path))} --only versions kernels")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert (tmp_path / "accepted" / "accept.json").is_file()
