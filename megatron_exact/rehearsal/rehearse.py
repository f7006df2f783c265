"""Rehearse a job: start it at full size on the null device, as one rank or one rank a pipeline stage.

A process with the null device imports Megatron and forks one rank after another. Each runs the whole job;
its other ranks are absent. A rehearsed step has fewer micro-batches than a real one: enough to fill the
pipeline, at least two. Neither the peak nor the counts of a micro-batch depend on how many follow.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_exact.command_line import describe, one_line, positive_int, progress_bar
from megatron_exact.data.indexed import IndexedWriter
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.files import write_json
from megatron_exact.json_input import read_json_object
from megatron_exact.rehearsal import device
from megatron_exact.rehearsal.session import RankResult, import_job_code, rehearse_rank
from megatron_exact.training.job import chosen_recipe, expand_recipe
from megatron_exact.training.job_flags import flag_value, has_flag
from megatron_exact.training.memory_forecast import GIB

STOCK = ("--loss-head", "stock")
"""Megatron's own logits and cross-entropy on the same job."""
DEFAULT_VOCABULARY = 32_768
MEDIAN_DOCUMENT_TOKENS = 600
"""Median document length of an example pack, lognormal with a deviation of 1.1: the mean is 1,100."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a job that a rehearsal needs before Megatron reads the arguments."""

    row_tokens: int
    """Inputs of a row."""
    vocabulary: int
    """Token ids of the pack are below this."""
    tensor_parallel: int
    """Ranks."""
    pipeline_parallel: int
    """Ranks."""
    context_parallel: int
    """Ranks."""
    is_interleaved: bool
    """Whether a rank has several parts of the pipeline."""
    micro_batch_rows: int
    """Rows of a micro-batch."""
    batch_rows: int | None
    """Rows of a step of the job; None if no flag says."""

    def replicas(self, world_size: int) -> int:
        """Return the number of data-parallel ranks.

        Raises:
            ValueError: the world does not divide.
        """
        model = self.tensor_parallel * self.pipeline_parallel * self.context_parallel
        replicas, rest = divmod(world_size, model)
        if rest or not replicas:
            raise ValueError(
                f"--world-size {world_size} does not divide by TP x PP x CP = {model}: change it"
            )
        return replicas

    def rehearsed_rows(self, world_size: int) -> int:
        """Return the number of rows of a rehearsed step."""
        a_pass = self.micro_batch_rows * self.replicas(world_size)
        passes = max(2, self.pipeline_parallel * (2 if self.is_interleaved else 1))
        rows = a_pass * passes
        return rows if self.batch_rows is None else min(rows, self.batch_rows)


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Results of a rehearsal; `as_json` is the contract of tools/rehearse.py."""

    recipe: str | None
    """Name of the job's recipe, if it has one."""
    world_size: int
    """Of the job."""
    ranks: list[RankResult]
    """Results of the rehearsed ranks."""
    stock: list[RankResult]
    """Results of the same ranks with Megatron's own loss path; empty unless requested."""
    failures: list[str]
    """A line for each rank whose job failed."""
    layers: str
    """Which kernels the memory is that of."""

    def as_json(self) -> dict[str, Any]:
        """Return the results as JSON."""
        found: dict[str, Any] = {
            "recipe": self.recipe,
            "world_size": self.world_size,
            "layers": self.layers,
            "ranks": [asdict(rank) for rank in self.ranks],
            "preflight_gib": max((rank.forecast_gib for rank in self.ranks), default=None),
        }
        if self.stock:
            found["stock_loss_path"] = [asdict(rank) for rank in self.stock]
        if self.failures:
            found["failures"] = self.failures
        return found

    def largest_gib(self) -> float:
        """Return the highest peak of all rehearsed ranks."""
        return max((rank.peak_reserved_gib for rank in self.ranks), default=0.0)


def sizes_of(argv: Sequence[str]) -> Sizes:
    """Read the sizes from the arguments of a run, in which a recipe is expanded.

    Raises:
        ValueError: no length of rows, neither by flag nor by a pack.
    """
    from megatron_exact.data.manifest import read_manifest
    from megatron_exact.model.families import preset

    def number(flag: str, default: int) -> int:
        value = flag_value(argv, flag)
        return default if value is None else positive_int(value)

    pack, name = flag_value(argv, "--pack"), flag_value(argv, "--preset")
    row_tokens = flag_value(argv, "--seq-length")
    if pack is None and row_tokens is None:
        raise ValueError("--pack and --seq-length are missing: name a pack, or the tokens of a row")
    vocabulary = preset(name).vocab_size if name is not None else number("--vocab-size", DEFAULT_VOCABULARY)
    batch = flag_value(argv, "--global-batch-size")
    return Sizes(
        row_tokens=positive_int(row_tokens)
        if row_tokens is not None
        else read_manifest(str(pack)).row_tokens,
        vocabulary=vocabulary,
        tensor_parallel=number("--tensor-model-parallel-size", 1),
        pipeline_parallel=number("--pipeline-model-parallel-size", 1),
        context_parallel=number("--context-parallel-size", 1),
        is_interleaved=any(has_flag(argv, f"--num-{word}") for word in INTERLEAVING),
        micro_batch_rows=number("--micro-batch-size", 1),
        batch_rows=None if batch is None else positive_int(batch),
    )


INTERLEAVING = ("virtual-stages-per-pipeline-rank", "layers-per-virtual-pipeline-stage")
NOT_REHEARSED = (
    "--save",
    "--load",
    "--pretrained-checkpoint",
    "--run-dir",
    "--tensorboard-dir",
    "--async-save",
    "--save-interval",
    "--save-minutes",
    "--keep-last",
    "--keep-every",
)
"""Flags that a rehearsal drops: it reads no checkpoint, and saves to a folder of its own."""


def without_folders(argv: Sequence[str]) -> list[str]:
    """Return the arguments without those that name folders of the run."""
    kept: list[str] = []
    is_left_out = False
    for word in argv:
        if word.startswith("--"):
            is_left_out = word.partition("=")[0] in NOT_REHEARSED
        if not is_left_out:
            kept.append(word)
    return kept


def rehearsed_command(argv: Sequence[str], sizes: Sizes, world_size: int, iterations: int) -> list[str]:
    """Return what is added to a run's arguments: a short schedule, and a save at its end without waiting.

    The first iteration is a warm-up: the optimizer makes its states at its end.
    """
    return [
        *without_folders(argv),
        *("--global-batch-size", str(sizes.rehearsed_rows(world_size))),
        *("--train-iters", str(iterations + 1), "--lr-warmup-iters", "0"),
        *("--save-interval", str(iterations + 1)),  # to a folder for each rank
        *("--eval-iters", "0", "--rank-timeout-seconds", "0"),
    ]


def rehearse(
    argv: Sequence[str],
    *,
    world_size: int,
    ranks: Sequence[int] | None,
    iterations: int = 1,
    with_stock: bool = False,
    log_folder: Path | None = None,
    card_gib: float = 0.0,
) -> Rehearsal:
    """Rehearse some ranks of a job.

    Args:
        argv: of `megatron_exact.training.pretrain`; `--pack` may be missing.
        world_size: of the job.
        ranks: which ones; None for the first rank of each pipeline stage.
        iterations: measured ones; the last is reported.
        with_stock: also with Megatron's own loss path.
        log_folder: receives what the ranks print; a temporary one if None, kept where a rank fails.
        card_gib: memory of a card. The device has that of an H100 at least: a job that does not fit a
            smaller card still shows what it takes.

    Raises:
        ValueError: no compiler, a machine with GPUs, or sizes that do not divide.
    """
    device.activate(memory_bytes=max(device.H100_BYTES, int(card_gib * GIB)))
    recipe = chosen_recipe(argv)
    words = expand_recipe(argv)
    sizes = sizes_of(words)
    if ranks is None:
        a_stage = world_size // sizes.pipeline_parallel
        ranks = range(0, world_size, a_stage)
    wrong = [rank for rank in ranks if not 0 <= rank < world_size]
    if wrong:
        raise ValueError(
            f"--rank {wrong[0]} is not a rank of --world-size {world_size}: choose 0 to {world_size - 1}"
        )
    import_job_code()
    logs = log_folder or Path(tempfile.mkdtemp(prefix="rehearsal-"))
    logs.mkdir(parents=True, exist_ok=True)
    found: dict[bool, list[RankResult]] = {False: [], True: []}
    failures = []
    with tempfile.TemporaryDirectory(prefix="rehearsal-pack-") as folder:
        command = rehearsed_command(words, sizes, world_size, iterations)
        if flag_value(words, "--pack") is None:
            rows = sizes.rehearsed_rows(world_size) * (iterations + 1)
            pack = make_example_pack(
                Path(folder), row_tokens=sizes.row_tokens, vocabulary=sizes.vocabulary, rows=rows
            )
            command += ["--pack", str(pack)]
        passes = (False, True) if with_stock else (False,)
        bar = progress_bar("ranks", len(passes) * len(ranks), "rank")
        for is_stock in passes:
            for rank in ranks:
                name = f"rank{rank}{'-stock' if is_stock else ''}"
                flags = [*command, *(STOCK if is_stock else ())]
                flags += ["--save", str(Path(folder) / name)]
                outcome = _in_fork(flags, rank, world_size, logs / name)
                if isinstance(outcome, RankResult):
                    found[is_stock].append(outcome)
                else:
                    failures.append(f"rank {rank}: {outcome} (the whole log: {logs / name}.log)")
                bar.update()
        bar.close()
    return Rehearsal(
        recipe=flag_value(argv, "--recipe") if recipe is not None else None,
        world_size=world_size,
        ranks=found[False],
        stock=found[True],
        failures=failures,
        layers=installed_layers(),
    )


def installed_layers() -> str:
    """Say whose layers and kernels a rehearsal here has, which its forecast is for, too.

    A node of a cluster has Transformer Engine and Apex, and `preflight` forecasts for these.
    """
    from importlib.metadata import version
    from importlib.util import find_spec

    from megatron_exact.rehearsal.build import transformer_engine_libraries
    from megatron_exact.training.runtime import APEX_KERNEL

    if transformer_engine_libraries():
        text = f"Transformer Engine {version('transformer-engine')}, cuDNN's workspace left out"
    else:
        text = "Megatron's local ones; Transformer Engine is not installed, a GPU node would have it"
    if find_spec(APEX_KERNEL) is None:
        text += "; no Apex, so each weight gradient takes a buffer of its own"
    return text


def make_example_pack(
    folder: Path,
    *,
    row_tokens: int,
    vocabulary: int,
    rows: int,
    seed: int = 0,
    median_document_tokens: int = MEDIAN_DOCUMENT_TOKENS,
) -> Path:
    """Write a corpus of random tokens, in documents as long as those of the web, and pack it.

    Args:
        folder: folder of both, created if missing.
        row_tokens: number of inputs in a row.
        vocabulary: number of token ids.
        rows: smallest number of training rows.
        seed: seed of lengths and tokens.
        median_document_tokens: median of the documents' lengths.

    Returns:
        The folder of the pack.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    prefix = folder / "documents"
    writer = IndexedWriter(f"{prefix}.bin", f"{prefix}.idx", vocabulary)
    wanted = (rows + 1) * row_tokens + 1
    while writer.num_tokens < wanted:
        length = int(np.clip(generator.lognormal(np.log(median_document_tokens), 1.1), 2, 4 * row_tokens))
        writer.add(generator.integers(0, vocabulary, length))
    writer.close()
    options = PackOptions(row_tokens=row_tokens, policy="concat", seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this corpus has no tokenizer
        pack_corpora([str(prefix)], folder / "pack", options)
    return folder / "pack"


def _in_fork(argv: Sequence[str], rank: int, world_size: int, path: Path) -> RankResult | str:
    """Run a rank in a process of its own; return its result, or its last error."""
    log, result = path.with_suffix(".log"), path.with_suffix(".json")
    result.unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        code = 1
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            write_json(result, asdict(rehearse_rank(argv, rank, world_size)))
            code = 0
        except BaseException as error:
            print(f"error: {describe(error)}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) == 0 and result.is_file():
        return RankResult(**read_json_object(result, "rehearse again"))
    return last_error(log, os.waitstatus_to_exitcode(status))


def last_error(log: Path, code: int) -> str:
    """Return the first `error:` line of a log, else how the process ended."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    errors = [line.partition("error: ")[2] for line in lines if line.startswith("error: ")]
    return one_line(errors[0])[:600] if errors else f"ended with exit code {code}"


def format_rehearsal(found: Rehearsal, *, memory_gib: float) -> str:
    """The table of a rehearsal, and whether it fits.

    Args:
        found: the rehearsal.
        memory_gib: of a card, less its reserve.
    """
    lines = ["null device: allocations, launches and messages are real, kernels are not"]
    lines += [f"layers: {found.layers}", ""]
    head = f"{'rank':<6}{'stage':<7}{'allocated':>11}{'reserved':>10}{'forecast':>10}"
    lines.append(
        f"{head}{'launches':>10}{'waits':>7}  GiB; launches and waits of the host in one iteration"
    )
    for name, group in (("", found.ranks), ("stock loss path", found.stock)):
        lines += [name] if name and group else []
        for rank in group:
            lines.append(
                f"{rank.rank:<6}{rank.pipeline_stage:<7}{rank.peak_allocated_gib:>11.2f}"
                f"{rank.peak_reserved_gib:>10.2f}{rank.forecast_gib:>10.2f}{rank.kernel_launches:>10,}"
                f"{rank.host_synchronisations:>7,}"
            )
    for rank in found.ranks:
        peaks = ", ".join(f"{name} {peak:.2f}" for name, peak in rank.phase_peaks_gib.items())
        lines += ["", f"rank {rank.rank}, {rank.micro_batches} micro-batches; GiB at most: {peaks}"]
        for name, (calls, num_bytes) in rank.collectives.items():
            lines.append(f"  {name:<64}{calls:>6,} calls{num_bytes / 2**20:>12,.1f} MiB")
        for pair, calls in rank.attention_plans.items():
            lines.append(f"  attention planned by cuDNN for segments x longest {pair:<19}{calls:>6,} calls")
        for name, times in rank.mixed_devices.items():
            lines.append(f"  MIXED DEVICES: {name}, {times} times")
    lines += ["", *(f"FAILED  {failure}" for failure in found.failures)]
    fits = found.largest_gib() <= memory_gib
    if not fits:
        lines.append(f"FAILED  {found.largest_gib():.1f} GiB do not fit into {memory_gib:.1f} GiB")
    lines.append("the job runs and fits" if fits and not found.failures else "the rehearsal failed")
    return "\n".join(lines)
