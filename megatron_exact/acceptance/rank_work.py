"""What an acceptance runs on ranks: `torchrun -m megatron_exact.acceptance.rank_work NAME FOLDER`.

Arguments are read from `FOLDER/arguments.json`; each rank writes what it found to `FOLDER/rank<N>.json`.
Training jobs are `pretrain.main` as users start it; only the times of saving and loading and the peak of
memory are noted around it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_exact.acceptance.verdicts import with_finite_numbers
from megatron_exact.files import write_json
from megatron_exact.json_input import parse_json_object, read_json_object
from megatron_exact.training.memory_forecast import GIB

if TYPE_CHECKING:  # the other work needs no numpy
    import numpy as np
    from numpy.typing import NDArray

NULL_DEVICE = "null device"


def machine(*, cpu: bool) -> dict[str, Any]:
    """Describe the machine: kind (`gpu`, `cpu`, or `null` for the device of rehearsals) and versions."""
    import torch

    found: dict[str, Any] = {"kind": "cpu", "gpus": 0, "device": "cpu", "torch": torch.__version__}
    if cpu or not torch.cuda.is_available():
        return found
    properties = torch.cuda.get_device_properties(0)
    bindings: Any = torch.cuda.nccl
    nccl = bindings.version() if torch.distributed.is_nccl_available() else None
    return {
        **found,
        "kind": "null" if NULL_DEVICE in properties.name else "gpu",
        "gpus": torch.cuda.device_count(),
        "device": properties.name,
        "memory_gib": properties.total_memory / GIB,
        "capability": list(torch.cuda.get_device_capability(0)),
        "cuda": torch.version.cuda,
        "nccl": None if nccl is None else ".".join(map(str, nccl)),
    }


def kernels(*, cpu: bool, is_small: bool) -> dict[str, Any]:
    """Compare the kernels with their references."""
    from megatron_exact.acceptance.kernel_checks import FULL, SMALL, measure

    return {"comparisons": measure("cpu" if cpu else "cuda", SMALL if is_small else FULL)}


REPEATS = 10


def collectives(*, cpu: bool, num_elements: int) -> dict[str, Any]:
    """Reduce and gather tensors over all ranks: whether values are right, and the bus bandwidth.

    Bus bandwidth counts what each rank has to send at least: 2 (n - 1) / n of the buffer for an all-reduce,
    (n - 1) / n for an all-gather, as NCCL's own tests do.
    """
    import torch
    import torch.distributed as dist

    if not cpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend="gloo" if cpu else "nccl")
    device = "cpu" if cpu else "cuda"
    rank, world = dist.get_rank(), dist.get_world_size()
    values = torch.full((num_elements,), float(rank + 1), device=device)
    dist.all_reduce(values)
    reduced_right = bool((values == world * (world + 1) / 2).all())
    gathered = torch.empty(world * (num_elements // world), device=device)
    part = torch.full((num_elements // world,), float(rank + 1), device=device)
    dist.all_gather_into_tensor(gathered, part)
    expected = torch.arange(1, world + 1, device=device).repeat_interleave(num_elements // world)
    gathered_right = bool((gathered == expected).all())

    def seconds(call: Callable[[], Any]) -> float:
        for _ in range(3):
            call()
        _wait(device)
        dist.barrier()
        began = time.perf_counter()
        for _ in range(REPEATS):
            call()
        _wait(device)
        return (time.perf_counter() - began) / REPEATS

    num_bytes = 4 * num_elements
    reduce_seconds = seconds(lambda: dist.all_reduce(values))
    gather_seconds = seconds(lambda: dist.all_gather_into_tensor(gathered, part))
    dist.destroy_process_group()
    share = (world - 1) / world
    return {
        "values_are_right": reduced_right and gathered_right,
        "all_reduce_gb_per_second": 2 * share * num_bytes / reduce_seconds / 1e9,
        "all_gather_gb_per_second": share * num_bytes / gather_seconds / 1e9,
    }


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def job(*, argv: Sequence[str]) -> dict[str, Any]:
    """Run a training job; return the peak of memory, the forecast of it, and the times of its checkpoints.

    Raises:
        RuntimeError: the job failed; its own error has been printed.
    """
    import torch

    from megatron_exact.training import pretrain

    found: dict[str, Any] = {"save_seconds": None, "load_seconds": None}
    kept: dict[str, Any] = {}
    stock = pretrain.assemble

    def assemble(job: Any, args: Any, *rest: Any) -> Any:
        import megatron.training.training as driver

        run = stock(job, args, *rest)
        kept.update(job=job, args=args)
        driver.save_checkpoint = _timed(driver.save_checkpoint, "save_seconds", found)
        driver.load_checkpoint = _timed(driver.load_checkpoint, "load_seconds", found)
        return run

    pretrain.assemble = assemble  # type: ignore[assignment]
    try:
        code = pretrain.main([str(word) for word in argv])
    except SystemExit as end:  # Megatron's way to end before the last iteration
        code = int(end.code or 0)
    finally:
        pretrain.assemble = stock
    if code:
        raise RuntimeError(f"the job ended with exit code {code}")
    found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    found["forecast_gib"] = _forecast(kept["job"], kept["args"])
    return found


def _timed(function: Callable[..., Any], name: str, found: dict[str, Any]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = function(*args, **kwargs)
        found[name] = time.perf_counter() - began
        return result

    return timed


def _forecast(job: Any, args: Any) -> float:
    from megatron_exact.model.families import shape_of_megatron_arguments
    from megatron_exact.training.layout import layout_of_arguments
    from megatron_exact.training.memory_forecast import forecast_of_arguments

    layout = layout_of_arguments(args)
    shape = job.model.shape or shape_of_megatron_arguments(args)
    stages = forecast_of_arguments(args, job.options, shape, layout).stages()
    stage = int(os.environ["RANK"]) // (args.world_size // layout.pipeline_parallel)
    return float(stages[stage].total / GIB)


def masking(*, argv: Sequence[str]) -> dict[str, Any]:
    """Run the leak test of a job."""
    from megatron_exact.training.hang_detection import RankWatch
    from megatron_exact.training.masking_check import check_document_masking

    report = check_document_masking([str(word) for word in argv], 3, RankWatch(0))
    _end_process_group()
    return parse_json_object(report.as_json(), "the report of the leak test", "report this fault")


def token_losses(*, argv: Sequence[str], hf: str, device: str) -> dict[str, Any]:
    """Compare the loss of every target of a micro-batch with transformers, document by document.

    Args:
        argv: of a job of one rank that loads the import of `hf`.
        hf: a Hugging Face folder.
        device: of the transformers model, which computes in float32.
    """
    import numpy as np
    import torch

    from megatron_exact.training.hang_detection import RankWatch
    from megatron_exact.training.job import prepare_job
    from megatron_exact.training.masking_check import CheckedModel, segments_of

    model = CheckedModel(prepare_job([str(word) for word in argv], trains=False), RankWatch(0))
    batch = model.micro_batch()
    losses = model.token_losses([batch])
    assert losses is not None  # one rank is every stage
    ours = losses[0].double().numpy()
    mask = batch["loss_mask"].reshape(-1).numpy() > 0
    spans = [(segment.start, segment.end) for segment in segments_of(batch)]
    row = batch["tokens"].shape[1]
    whole_rows = [(start, start + row) for start in range(0, mask.size, row)]
    _end_process_group()
    del model
    torch.cuda.empty_cache()
    right, merged = (_document_losses(Path(hf), batch, cut, device) for cut in (spans, whole_rows))
    difference, control = np.abs(ours - right)[mask], np.abs(ours - merged)[mask]
    return {
        "targets": int(mask.sum()),
        "loss": float(ours[mask].mean()),
        "transformers_loss": float(right[mask].mean()),
        "mean_difference": float(difference.mean()),
        "largest_difference": float(difference.max()),
        "control_mean_difference": float(control.mean()),
    }


def _document_losses(
    hf: Path, batch: dict[str, Any], spans: Sequence[tuple[int, int]], device: str
) -> NDArray[np.float64]:
    """Return what transformers computes at every position, each span alone, in float32.

    Args:
        hf: a Hugging Face folder.
        batch: `tokens` and `labels`, each [b, S].
        spans: (start, end) in the flattened micro-batch.
        device: of the model.
    """
    import numpy as np

    from megatron_exact.scoring import Piece, Scorer

    tokens, labels = (batch[name].reshape(-1).numpy() for name in ("tokens", "labels"))
    longest = max(end - start for start, end in spans)
    scorer = Scorer(hf, longest, device=device, dtype="float32")
    pieces = [Piece(tokens=tokens[start:end], labels=labels[start:end]) for start, end in spans]
    losses = np.full(tokens.size, np.nan)
    for (start, end), found in zip(spans, scorer.losses(pieces, 4 * longest), strict=True):
        losses[start:end] = found
    return losses


def _end_process_group() -> None:
    import torch

    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


WORK: dict[str, Callable[..., dict[str, Any]]] = {
    work.__name__: work for work in (machine, kernels, collectives, job, masking, token_losses)
}


def carry_out(name: str, folder: Path, arguments: dict[str, Any]) -> None:
    """Do a piece of work as the rank that this process is, and write what it found."""
    found = with_finite_numbers(WORK[name](**arguments))
    write_json(folder / f"rank{os.environ.get('RANK', '0')}.json", found)


def main() -> None:
    """Run one piece of work; errors are printed in one line."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    sys.argv = sys.argv[:1]  # Megatron's parser reads it
    arguments = read_json_object(folder / "arguments.json", "run the acceptance again")
    if arguments.get("cpu") or "--cpu" in arguments.get("argv", ()):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    code = 1
    try:
        carry_out(name, folder, arguments)
        code = 0
    except Exception as error:
        import traceback

        from megatron_exact.command_line import describe

        traceback.print_exc()
        print(f"error: {describe(error)}", file=sys.stderr, flush=True)
    if "torch" in sys.modules:
        from megatron_exact.training.job_endings import exit_process

        exit_process(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
