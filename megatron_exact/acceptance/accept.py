"""The checks of an acceptance, one after the other, each with a verdict.

The machine decides what can be concluded. A GPU runs everything; a CPU runs what has values, but its speeds
and its memory say nothing about a cluster; the device of rehearsals (`tests/cuda`) has no speed either.
What means nothing on a machine is `not run`, with the reason.

Everything needed is made on the spot: a tiny random Llama model in Hugging Face's format (or `--hf`), its
import, packs of random documents. Work that touches the device happens in processes of its own
(`rank_work`), started by a `Launch`, so that a fault of one check cannot end the others.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from megatron_exact.acceptance.verdicts import Check, as_json, compared, not_run
from megatron_exact.command_line import describe
from megatron_exact.files import write_json, write_text
from megatron_exact.json_input import read_json_lines, read_json_object
from megatron_exact.rehearsal.rehearse import last_error, make_example_pack
from megatron_exact.training.memory_forecast import Cluster
from megatron_exact.training.recipes import find_recipe
from megatron_exact.training.run_record import RUN_RECORD

TINY_MODEL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
"""Sizes that 2 and 4 ranks divide; weights so large that attention matters before training."""
ROW_TOKENS, ROWS = 256, 64
"""Of the tiny model's pack."""
MEDIAN_DOCUMENT_TOKENS = 40
ITERATIONS = 3
BOUNDS = {"fp32": {"loss": 2e-6, "grad_norm": 1e-5}, "bf16": {"loss": 2e-3, "grad_norm": 1.6e-2}}
"""Agreement of layouts, relative; those of docs/exactness.md."""
TOKEN_BOUNDS = {"fp32": 1e-4, "bf16": 0.03}
"""Mean difference of a target's loss from transformers in float32, nats."""
LEAST_MFU = Cluster.assumed_mfu / 2
MEMORY_BOUND = 0.1
"""The formula is within 3 % of torch's allocator with the local layers (docs/rehearsal.md); kernels of
Transformer Engine keep other tensors."""
TIMEOUT_SECONDS = 900
COLLECTIVE_ELEMENTS = 1 << 26
SMALL_COLLECTIVE_ELEMENTS = 1 << 16


class WorkFailedError(RuntimeError):
    """A piece of work on ranks did not end well."""


class Launch(Protocol):
    """Runs a function of `rank_work.WORK` on ranks."""

    def __call__(
        self, work: str, folder: Path, *, ranks: int, is_full_size: bool = False, **arguments: Any
    ) -> list[dict[str, Any]]:
        """Return what each rank found.

        Args:
            work: name of the function.
            folder: for logs and results, made here.
            ranks: how many.
            is_full_size: whether the job has the size of a recipe.
            arguments: of the function.

        Raises:
            WorkFailedError: a rank failed, or time is up.
        """


def launch_with_torchrun(
    work: str, folder: Path, *, ranks: int, is_full_size: bool = False, **arguments: Any
) -> list[dict[str, Any]]:
    """Run a piece of work under torchrun on this machine; see `Launch`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "arguments.json", arguments)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
        *("-m", "megatron_exact.acceptance.rank_work", work, str(folder)),
    ]
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1", **os.environ}
    log = folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait(TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            text = f"did not end within {TIMEOUT_SECONDS} s (the whole log: {log})"
            raise WorkFailedError(text) from None
        finally:
            if process.poll() is None:  # torchrun ends its ranks
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(60)
                process.kill()
                process.wait()
    if code:
        raise WorkFailedError(f"{last_error(log, code)} (the whole log: {log})")
    return [read_json_object(folder / f"rank{rank}.json", "run it again") for rank in range(ranks)]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to accept."""

    output: Path
    """Folder of results and logs."""
    cpu: bool = False
    """Leave GPUs alone."""
    ranks: int | None = None
    """Ranks of the largest job; None for all GPUs, 2 on a CPU."""
    hf: Path | None = None
    """A real model for the leak test and the comparison with transformers; None for the tiny one."""
    recipe: str = "llama3.1_8b_16k"
    """Whose layers are timed."""
    stack_layers: int = 4
    """How many of them."""
    rehearsal: Path | None = None
    """JSON of `rehearse` on the arguments of the timed job."""
    only: tuple[str, ...] = ()
    """Names in GROUPS; empty for all."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What the timed job of a recipe's layers found."""

    ranks: list[dict[str, Any]]
    """Memory and times of saving, of each rank."""
    throughput: list[dict[str, Any]]
    """throughput.jsonl."""


@dataclass(kw_only=True)
class Site:
    """The machine, and what the checks share."""

    options: Options
    launch: Launch
    machine: dict[str, Any]
    checkpoint: Path
    """Import of the tiny model."""
    tiny: Path
    """The tiny model in Hugging Face's format."""
    pack: Path
    """Rows for it."""
    reference: list[dict[str, Any]] = field(default_factory=list)
    """losses.jsonl of the tiny model on one rank, once a check has made it."""
    stack: Stack | Exception | None = None
    """What the timed job found, or why it failed; None before it has run."""

    @property
    def kind(self) -> str:
        """`gpu`, `cpu` or `null`."""
        return str(self.machine["kind"])

    @property
    def ranks(self) -> int:
        """Ranks of the largest job."""
        return self.options.ranks or (2 if self.kind == "cpu" else int(self.machine["gpus"]))

    @property
    def dtype(self) -> str:
        """Of the jobs."""
        return "fp32" if self.kind == "cpu" else "bf16"

    @property
    def runtime(self) -> list[str]:
        """Flags of the machine."""
        return ["--cpu"] if self.kind == "cpu" else ["--bf16"]

    def folder(self, name: str) -> Path:
        """Folder of one piece of work."""
        return self.options.output / name.replace(" ", "_")

    def tiny_job(self, name: str, *flags: str, checkpoint: Path | None = None) -> list[str]:
        """Return the arguments of a job of the tiny model; its records are in `folder(name) / run`.

        Args:
            name: of the job.
            flags: further ones.
            checkpoint: another start than the tiny model.
        """
        return [
            *("--pack", str(self.pack), "--pretrained-checkpoint", str(checkpoint or self.checkpoint)),
            *("--token-weighting", "exact", "--lr", "1e-3", "--lr-decay-style", "constant"),
            *("--global-batch-size", "8", "--train-iters", str(ITERATIONS), "--eval-iters", "0"),
            *("--log-interval", "1", "--run-dir", str(self.folder(name) / "run")),
            *self.runtime,
            *flags,
        ]

    def losses(self, name: str) -> list[dict[str, Any]]:
        """Return the records of a job."""
        return read_records(self.folder(name) / "run" / "losses.jsonl")

    def one_rank(self) -> list[dict[str, Any]]:
        """Return the records of the tiny model on one rank; the job runs once."""
        if not self.reference:
            name = "one rank"
            self.launch("job", self.folder(name), ranks=1, argv=self.tiny_job(name))
            self.reference = self.losses(name)
        return self.reference


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a job's records.

    Raises:
        ValueError: there are none.
    """
    lines = [line for _, line in read_json_lines(path, "run the acceptance again")]
    if not lines:
        raise ValueError(f"{path} is empty: the job has written no records, see its log")
    return lines


def relative_difference(ours: float, theirs: float) -> float:
    """Return |ours - theirs| / |theirs|; infinite unless both are finite."""
    if not (math.isfinite(ours) and math.isfinite(theirs)):
        return math.inf
    return abs(ours - theirs) / abs(theirs)


# ----------------------------------------------------------------------------------------------------
# The checks.

SPEEDS = {
    "cpu": "a CPU's speed says nothing about a GPU's",
    "null": "the device of a rehearsal computes nothing",
}
"""Kind of machine -> why no speed is reported."""
OPTIONAL = ("transformer-engine", "flash-attn", "apex", "nvidia-nccl-cu13", "triton")
PROJECT = "megatron-exact"


def check_versions(site: Site) -> Iterator[Check]:
    """Are the installed packages those that the project asks for?"""
    from packaging.requirements import Requirement
    from packaging.version import Version

    for text in importlib.metadata.requires(PROJECT) or ():
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        version = _version(needed.name)
        # NVIDIA's torch calls itself 2.13.0a0+commit, which sorts before 2.13
        base = None if version is None else Version(version).base_version
        yield compared(
            f"version of {needed.name}",
            base is not None and needed.specifier.contains(base, prereleases=True),
            value=version or "missing",
            bound=str(needed.specifier) or "any",
            reason="install the version that pyproject.toml asks for",
        )
    versions = {name: _version(name) for name in OPTIONAL}
    machine = {**site.machine, **versions, "python": platform.python_version()}
    site.machine.update(machine)
    if site.kind != "gpu":
        yield not_run("GPU software", {"cpu": "no GPU is used", "null": SPEEDS["null"]}[site.kind])
        return
    told = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    yield compared(
        "GPU software",
        tuple(site.machine["capability"]) >= (8, 0),
        value=f"{site.machine['device']}, CUDA {site.machine['cuda']}, NCCL {site.machine['nccl']}, {told}",
        bound="compute capability 8.0 or more",
        reason="the flash kernels need an Ampere GPU or newer",
        measured=machine,
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_kernels(site: Site) -> Iterator[Check]:
    """Does every kernel agree with a plain formula in float64?"""
    is_small = site.kind != "gpu"
    (found,) = site.launch(
        "kernels", site.folder("kernels"), ranks=1, cpu=site.kind == "cpu", is_small=is_small
    )
    for one in found["comparisons"]:
        name = f"kernel: {one['name']}"
        if "reason" in one:
            yield not_run(name, one["reason"])
            continue
        error, control, bound = float(one["error"]), float(one["control"]), one["bound"]
        # with NaN in the kernel's values its difference from the control is NaN, too
        proves = control > bound or not math.isfinite(error)
        yield compared(
            name,
            error <= bound and proves,
            value=f"{error:.1e}",
            bound=f"<= {bound:g} of the largest value; control {control:.1e}",
            reason=f"differs by {error:.2g} from the reference, bound {bound:g}"
            if proves
            else f"the negative control differs by {control:.2g} only: the check proves nothing",
            measured=one,
        )


def check_masking(site: Site) -> Iterator[Check]:
    """Does a document of a packed row see another?"""
    checkpoint = site.checkpoint if site.options.hf is None else _import(site, site.options.hf)
    argv = site.tiny_job("leak test", checkpoint=checkpoint)
    (found,) = site.launch("masking", site.folder("leak test"), ranks=1, argv=argv)
    largest = max(float(one["difference"]) for one in found["checks"] if not one["is_control"])
    yield compared(
        "documents are kept apart",
        found["passed"],
        value=f"{largest:.1e} nats",
        bound="bounds of check-masking, controls exceed them",
        reason=" ".join(found["explanation"]),
        measured=found,
    )


def check_transformers(site: Site) -> Iterator[Check]:
    """Is the loss of every target the one that transformers computes?"""
    hf = site.options.hf or site.tiny
    checkpoint = site.checkpoint if site.options.hf is None else _import(site, hf)
    argv = site.tiny_job("transformers", checkpoint=checkpoint)
    device = "cuda" if site.kind == "gpu" else "cpu"
    (found,) = site.launch(
        "token_losses", site.folder("transformers"), ranks=1, argv=argv, hf=str(hf), device=device
    )
    bound = TOKEN_BOUNDS[site.dtype]
    difference, control = (float(found[key]) for key in ("mean_difference", "control_mean_difference"))
    proves = control > bound or not math.isfinite(difference)
    yield compared(
        f"loss against transformers ({'random weights' if site.options.hf is None else hf.name})",
        difference <= bound and proves,
        value=f"{difference:.1e} nats a target",
        bound=f"<= {bound:g}; without boundaries {control:.2g}",
        reason=f"a mean difference of {difference:.3g} nats"
        if proves
        else "rows without boundaries have the same losses: the check proves nothing",
        measured=found,
    )


def _import(site: Site, hf: Path) -> Path:
    from megatron_exact.conversion.import_hf import import_hf

    checkpoint = site.options.output / "imported"
    if not checkpoint.is_dir():
        import_hf(hf, checkpoint)
    return checkpoint


TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
TP4 = ("--tensor-model-parallel-size", "4", "--sequence-parallel")
PP2 = ("--pipeline-model-parallel-size", "2")
CP2 = ("--context-parallel-size", "2", "--transformer-impl", "local")
SHARDED = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "TP2 SP": (2, TP2),
    "PP2": (2, PP2),
    "DP2, distributed optimizer": (2, SHARDED),
    "CP2": (2, CP2),
    "TP4 SP": (4, TP4),
    "TP2 SP PP2": (4, (*TP2, *PP2)),
    "CP2 TP2 SP": (4, (*CP2, *TP2)),
    "TP4 SP DP2, distributed optimizer": (8, (*TP4, *SHARDED)),
    "TP2 SP PP2 DP2, distributed optimizer": (8, (*TP2, *PP2, *SHARDED)),
}
"""Name -> ranks, flags."""


def check_layouts(site: Site) -> Iterator[Check]:
    """Do loss and gradient norm agree between the layouts that this machine can run?"""
    bounds = BOUNDS[site.dtype]
    for name, (ranks, flags) in LAYOUTS.items():
        title = f"layout {name}"
        if ranks > site.ranks:
            yield not_run(title, f"needs {ranks} {'ranks' if site.kind == 'cpu' else 'GPUs'}")
            continue
        reference = site.one_rank()
        try:
            site.launch("job", site.folder(title), ranks=ranks, argv=site.tiny_job(title, *flags))
        except WorkFailedError as error:
            yield _failed(title, error)
            continue
        lines = site.losses(title)
        differences = {
            key: max(relative_difference(a[key], b[key]) for a, b in zip(lines, reference, strict=True))
            for key in bounds
        }
        same_targets = [line["bucket_targets"] for line in lines] == [
            line["bucket_targets"] for line in reference
        ]
        yield compared(
            title,
            same_targets and all(differences[key] <= bounds[key] for key in bounds),
            value=", ".join(f"{key} {value:.1e}" for key, value in differences.items()),
            bound=", ".join(f"{key} <= {value:g}" for key, value in bounds.items()),
            reason="other losses or gradients than on one rank"
            if same_targets
            else "other targets than on one rank",
            measured=differences,
        )


def check_collectives(site: Site) -> Iterator[Check]:
    """Do collectives give the right values, and how fast?"""
    names = ("values of collectives", "bandwidth of collectives")
    if site.ranks < 2:
        for name in names:
            yield not_run(name, "one rank has nobody to talk to")
        return
    elements = COLLECTIVE_ELEMENTS if site.kind == "gpu" else SMALL_COLLECTIVE_ELEMENTS
    found = site.launch(
        "collectives",
        site.folder("collectives"),
        ranks=site.ranks,
        cpu=site.kind == "cpu",
        num_elements=elements,
    )
    yield compared(
        names[0],
        all(one["values_are_right"] for one in found),
        value=f"{site.ranks} ranks",
        bound="exact",
        reason="an all-reduce or an all-gather gave wrong values",
    )
    if site.kind != "gpu":
        yield not_run(names[1], {**SPEEDS, "cpu": "gloo on a CPU: NCCL needs GPUs"}[site.kind])
        return
    slowest = {
        key: min(one[key] for one in found)
        for key in ("all_reduce_gb_per_second", "all_gather_gb_per_second")
    }
    reduce, gather = slowest.values()
    yield Check(
        name=names[1],
        verdict="pass",
        value=f"all-reduce {reduce:.0f}, all-gather {gather:.0f} GB/s of bus bandwidth",
        bound=f"none: {site.ranks} GPUs, {4 * elements >> 20} MiB",
        measured=slowest,
    )


def check_resume(site: Site) -> Iterator[Check]:
    """Does a job resume from its own checkpoint as if it had not stopped?"""
    name = "resume"
    save = site.folder(name) / "run"
    reference = site.one_rank()
    flags = ("--save", str(save), "--load", str(save), "--save-interval", str(ITERATIONS - 1))
    words = site.tiny_job(name, *flags)
    first = [*words, "--exit-interval", str(ITERATIONS - 1)]
    site.launch("job", site.folder(name) / "first", ranks=1, argv=first)
    site.launch("job", site.folder(name) / "second", ranks=1, argv=words)
    resumed, whole = site.losses(name)[-1], reference[-1]
    bounds = BOUNDS[site.dtype]
    differences = {key: relative_difference(resumed[key], whole[key]) for key in bounds}
    is_there = resumed["iteration"] == whole["iteration"]
    # a job that finds no checkpoint starts over and reaches the same losses
    has_resumed = bool(read_json_object(save / RUN_RECORD, "run the acceptance again").get("resumes"))
    yield compared(
        "resume from a checkpoint",
        has_resumed and is_there and all(differences[key] <= bounds[key] for key in bounds),
        value=", ".join(f"{key} {value:.1e}" for key, value in differences.items()),
        bound=", ".join(f"{key} <= {value:g}" for key, value in bounds.items()),
        reason="the resumed step differs from that of the job that did not stop"
        if has_resumed
        else f"{save / RUN_RECORD} has no resume: the second job found no checkpoint and started over",
        measured=differences,
    )


STACK = "layer stack"
STACK_ITERATIONS, STACK_INTERVAL = 15, 5
STACK_MICRO_BATCHES = 4


def stack_arguments(site: Site) -> list[str]:
    """Return the arguments of the timed job, without pack and folders: some layers of the recipe's model.

    The model is the recipe's but for the number of layers. The layout keeps the recipe's tensor-parallel
    size where there are as many GPUs, and drops its pipeline; the other GPUs are data-parallel.
    """
    from megatron_exact.model.families import preset
    from megatron_exact.model.shapes import megatron_flags

    recipe = find_recipe(site.options.recipe)
    shape = replace(preset(recipe.preset), num_layers=site.options.stack_layers)
    tensor = math.gcd(recipe.layout.tensor_parallel, site.ranks)
    replicas = site.ranks // tensor
    layout = replace(
        recipe.layout,
        tensor_parallel=tensor,
        pipeline_parallel=1,
        virtual_pipeline=1,
        sequence_parallel=tensor > 1,
        distributed_optimizer=replicas > 1,
    )
    batch = layout.micro_batch_rows * replicas * STACK_MICRO_BATCHES
    flags = [word for flag, value in layout.flags() for word in (flag, value) if word is not None]
    return [
        *megatron_flags(shape),
        *flags,
        *("--seq-length", str(recipe.row_tokens), "--bf16", "--token-weighting", "exact"),
        *("--global-batch-size", str(batch), "--lr", "1e-5", "--lr-decay-style", "constant"),
        *("--eval-iters", "0"),
    ]


def _run_stack(site: Site) -> Stack:
    """Run the timed job once; where it fails, every check that needs it fails with the same error."""
    if site.stack is None:
        try:
            site.stack = _timed_job(site)
        except Exception as error:
            site.stack = error
    if isinstance(site.stack, Exception):
        raise site.stack
    return site.stack


def _stack_common(site: Site) -> list[str]:
    """Return the arguments of both starts of the timed job, but for its end and its folders."""
    interval = STACK_INTERVAL if site.kind == "gpu" else 1
    pack = site.folder(STACK) / "pack"
    return [*stack_arguments(site), "--pack", str(pack), "--log-interval", str(interval)]


def _timed_job(site: Site) -> Stack:
    """Run the timed job: times, memory, and on a GPU a checkpoint that is written."""
    from megatron_exact.model.families import preset

    recipe = find_recipe(site.options.recipe)
    iterations = STACK_ITERATIONS if site.kind == "gpu" else 2
    arguments = stack_arguments(site)
    write_text(site.options.output / "stack_arguments.txt", " ".join(arguments) + "\n")
    batch = int(arguments[arguments.index("--global-batch-size") + 1])
    folder = site.folder(STACK)
    make_example_pack(
        folder,
        row_tokens=recipe.row_tokens,
        vocabulary=preset(recipe.preset).vocab_size,
        rows=batch * (iterations + 1),
    )
    argv = [*_stack_common(site), "--train-iters", str(iterations), "--run-dir", str(folder / "run")]
    if site.kind == "gpu":
        argv += ["--save", str(folder / "checkpoint"), "--save-interval", str(iterations)]
    ranks = site.launch("job", folder, ranks=site.ranks, is_full_size=True, argv=argv)
    return Stack(ranks=ranks, throughput=read_records(folder / "run" / "throughput.jsonl"))


def check_throughput(site: Site) -> Iterator[Check]:
    """How many tokens a second, and which share of the peak, do a recipe's layers reach?"""
    name = f"speed of {site.options.stack_layers} layers of {site.options.recipe}"
    if site.kind != "gpu":
        yield not_run(name, SPEEDS[site.kind])
        return
    last = _run_stack(site).throughput[-1]
    mfu = last["mfu"]
    value = f"{last['tokens_per_second']:,.0f} tokens/s, {last['model_tflops']:.0f} model TFLOP/s a GPU"
    if mfu is None:
        yield Check(
            name=name,
            verdict="pass",
            value=value,
            bound="none: the device's peak is unknown",
            measured=last,
        )
        return
    yield compared(
        name,
        mfu >= LEAST_MFU,
        value=f"{value}, MFU {mfu:.1%}",
        bound=f"MFU >= {LEAST_MFU:.0%}",
        reason=f"an MFU of {mfu:.1%}: preflight assumes {Cluster.assumed_mfu:.0%}; look for a missing "
        "Transformer Engine or Apex, throttled clocks, or slow links",
        measured=last,
    )


def check_memory(site: Site) -> Iterator[Check]:
    """Does the job take the memory that the formula, and a rehearsal, forecast?"""
    names = ("memory against the formula", "memory against the rehearsal")
    if site.kind == "cpu":
        for name in names:
            yield not_run(name, "a CPU's allocator is not a GPU's")
        return
    ranks = _run_stack(site).ranks
    peak, forecast = (max(rank[key] for rank in ranks) for key in ("peak_gib", "forecast_gib"))
    remedy = "set --reserve-gib of preflight so that the forecast covers it"
    yield _memory(names[0], peak, forecast, remedy if peak > forecast else "less is needed than forecast")
    if site.options.rehearsal is None:
        yield not_run(
            names[1],
            "no --rehearsal: on a machine without a GPU, megatron-exact rehearse --json FILE --world-size "
            f"{site.ranks} with the arguments in stack_arguments.txt",
        )
        return
    rehearsed = rehearsed_peak_gib(site.options.rehearsal)
    yield _memory(names[1], peak, rehearsed, "were its arguments those in stack_arguments.txt?")


def rehearsed_peak_gib(path: Path) -> float:
    """Return the highest peak of all ranks in the JSON of `rehearse`.

    Raises:
        ValueError: another file.
    """
    try:
        ranks = read_json_object(path, "rehearse again")["ranks"]
        return max(float(rank["peak_allocated_gib"]) for rank in ranks)
    except (KeyError, TypeError):
        raise ValueError(f"--rehearsal {path} has no ranks: give the file of `rehearse --json`") from None


def _memory(name: str, peak: float, forecast: float, remedy: str) -> Check:
    return compared(
        name,
        abs(peak - forecast) <= MEMORY_BOUND * forecast,
        value=f"{peak:.2f} GiB",
        bound=f"{forecast:.2f} GiB within {MEMORY_BOUND:.0%}",
        reason=f"{peak / forecast - 1:+.1%} from {forecast:.2f} GiB: {remedy}",
        measured={"peak_gib": peak, "forecast_gib": forecast},
    )


def check_checkpoint_speed(site: Site) -> Iterator[Check]:
    """How fast is a checkpoint of the layer stack written and read?"""
    name = "speed of checkpoints"
    if site.kind != "gpu":
        yield not_run(
            name,
            "the tiny checkpoint of a CPU is too small to time"
            if site.kind == "cpu"
            else SPEEDS[site.kind],
        )
        return
    stack = _run_stack(site)
    folder = site.folder(STACK)
    save = folder / "checkpoint"
    words = ["--train-iters", str(STACK_ITERATIONS + 1), "--load", str(save)]
    again = site.launch("job", folder / "second", ranks=site.ranks, argv=[*_stack_common(site), *words])
    num_bytes = sum(file.stat().st_size for file in save.rglob("*") if file.is_file())
    size = num_bytes / 1e9
    write = max(rank["save_seconds"] for rank in stack.ranks)
    read = max(rank["load_seconds"] for rank in again)
    yield Check(
        name=name,
        verdict="pass",
        value=f"{size:.1f} GB: written at {size / write:.2f}, read at {size / read:.2f} GB/s",
        bound="none: it is read from the page cache where that holds it",
        measured={"bytes": num_bytes, "write_seconds": write, "read_seconds": read},
    )


GROUPS: dict[str, Callable[[Site], Iterator[Check]]] = {
    "versions": check_versions,
    "kernels": check_kernels,
    "masking": check_masking,
    "transformers": check_transformers,
    "layouts": check_layouts,
    "resume": check_resume,
    "collectives": check_collectives,
    "throughput": check_throughput,
    "memory": check_memory,
    "checkpoint-speed": check_checkpoint_speed,
}
"""Name for `--only` -> the checks, in the order in which they run."""


def accept(
    options: Options,
    *,
    launch: Launch = launch_with_torchrun,
    on_check: Callable[[Check], object] = lambda check: None,
) -> list[Check]:
    """Run the checks and write `accept.json` into the output folder, again after each group.

    A check that raises an error fails with its text, and the next group runs.

    Args:
        options: what to accept.
        launch: how work is started on ranks.
        on_check: called with each verdict.

    Raises:
        ValueError: an unknown group or recipe, a file that is not a rehearsal, or an output folder in use.
    """
    unknown = [name for name in options.only if name not in GROUPS]
    if unknown:
        raise ValueError(f"--only {unknown[0]} is not a group of checks: choose one of {', '.join(GROUPS)}")
    find_recipe(options.recipe)
    if options.rehearsal is not None:
        rehearsed_peak_gib(options.rehearsal)
    output = options.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty: choose another --output")
    began = time.time()
    output.mkdir(parents=True, exist_ok=True)
    site = _prepare(replace(options, output=output.resolve()), launch)
    checks: list[Check] = []
    names = [name for name in GROUPS if name in options.only or not options.only]
    for name in names:
        for one in _checks_of(name, site):
            checks.append(one)
            on_check(one)
        record = as_json(checks, site.machine, complete=name == names[-1])
        write_json(output / "accept.json", {**record, "seconds": round(time.time() - began, 1)})
    return checks


def _checks_of(name: str, site: Site) -> Iterator[Check]:
    """Yield the verdicts of a group; an error is a failure and ends the group."""
    try:
        yield from GROUPS[name](site)
    except Exception as error:
        yield _failed(name, error)


def _failed(name: str, error: Exception) -> Check:
    is_explained = isinstance(error, WorkFailedError | ValueError | OSError)
    text = describe(error) if is_explained else f"{type(error).__name__}: {describe(error)}"
    return Check(name=name, verdict="fail", reason=text)


def _prepare(options: Options, launch: Launch) -> Site:
    """Look at the machine and make the tiny model, its import and its pack."""
    from megatron_exact.conversion.import_hf import import_hf

    (machine,) = launch("machine", options.output / "machine", ranks=1, cpu=options.cpu)
    tiny, checkpoint = options.output / "tiny_hf", options.output / "tiny_checkpoint"
    _make_tiny_model(tiny)
    import_hf(tiny, checkpoint)
    pack = make_example_pack(
        options.output / "pack",
        row_tokens=ROW_TOKENS,
        vocabulary=int(TINY_MODEL["vocab_size"]),
        rows=ROWS,
        median_document_tokens=MEDIAN_DOCUMENT_TOKENS,
    )
    return Site(
        options=options, launch=launch, machine=machine, checkpoint=checkpoint, tiny=tiny, pack=pack
    )


def _make_tiny_model(folder: Path) -> None:
    """Write a random Llama model in Hugging Face's format, float32."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    config = transformers.LlamaConfig(**TINY_MODEL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).float()
    model.save_pretrained(folder)
