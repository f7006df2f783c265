"""The start-up of a job at its real size, in one process a rank: shapes are real, values do not exist.

A rank of the job runs `pretrain.main` unchanged as far as its first forward pass; two things are pretended.
Communication is upstream's own `--fake-process-group`: the world has its real size, every collective
returns at once and moves nothing. The device is torch's meta device, which knows shapes and dtypes and has
no memory, so that an 8B model with its optimizer costs a second. Only the batch is real, read from a pack.

What the cluster has and this does not show: Transformer Engine's layers (the local spec is built, see
tests/gpu for the other), and what a value would do.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.testing._internal.distributed.fake_pg  # registers the backend

from megatron_exact.model import context_parallel, cpu_kernels, loss_head
from megatron_exact.training.cpu_runtime import FACTORIES
from tests.distributed import ranks

GPUS_PER_NODE = 8
ONE_TILE = ("--loss-head-tokens", "1M", "--loss-head-columns", "1M")
"""Tiles only say how the work is cut; each would cost a second of Python here."""


class _FirstForwardIsOver(SystemExit):
    """What was to be seen has been seen."""


def dry_run(
    argv: Sequence[str],
    simulated: Sequence[int],
    *,
    world_size: int,
    folder: Path,
    patch: Callable[[], None] | None = None,
) -> tuple[ranks.Ended, list[dict[str, Any]]]:
    """Start a job on some ranks of its world, as far as the first forward pass.

    Args:
        argv: of `megatron_exact.training.pretrain`.
        simulated: numbers of these ranks.
        world_size: of the job.
        folder: receives the output.
        patch: called in each rank first.

    Returns:
        How the ranks ended, and what each of those that ended well has found (`_describe`).
    """
    results = [folder / f"found{number}.json" for number in simulated]

    def start() -> int:
        from megatron_exact.training import pretrain

        index = int(os.environ["RANK"])
        _become_rank(simulated[index], world_size)
        _pretend(results[index])
        if patch is not None:
            patch()
        return pretrain.main([*argv, *ONE_TILE, "--cpu"])

    ended = ranks.run_ranks(len(simulated), start, folder)
    return ended, [json.loads(path.read_text()) for path in results if path.is_file()]


def _become_rank(number: int, world_size: int) -> None:
    """The variables of torchrun on nodes of eight GPUs."""
    local_world = min(world_size, GPUS_PER_NODE)
    os.environ.update(
        RANK=str(number),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(number % local_world),
        LOCAL_WORLD_SIZE=str(local_world),
    )
    torch.cuda.device_count = lambda: local_world  # type: ignore[assignment]


def _pretend(result: Path) -> None:
    """Replace devices and messages, and end the job after its first forward pass."""
    import megatron.training.training as driver
    from megatron.core.utils import get_attr_wrapped_model

    from megatron_exact.training import pretrain, run, substitutions
    from megatron_exact.training.hang_detection import RankWatch

    device = _MetaDevice()
    parts: dict[str, Any] = {}
    cpu_kernels.CACHED_ELEMENTS = loss_head.CACHED_ELEMENTS = 2**62  # blocks only help a real cache
    RankWatch.start = lambda watch: None  # type: ignore[method-assign]  # there are no others
    stock_prepare = pretrain.prepare_job
    stock_setup, stock_warm_up = substitutions._stock_setup, driver.set_jit_fusion_options
    stock_next, stock_provide = run.next_packed_batch, run.TrainingRun.provide_datasets
    stock_forward = run.TrainingRun.forward_step

    def prepare_job(argv: Sequence[str], **kwargs: Any) -> Any:
        job = stock_prepare(argv, **kwargs)  # which refuses the flag to users
        return dataclasses.replace(job, argv=[*job.argv, "--fake-process-group"])

    pretrain.prepare_job = prepare_job

    stock_local_tokens = context_parallel.local_tokens

    def local_tokens(*args: Any) -> Any:
        with torch.device("cpu"):  # of boundaries, which are read on the host
            return stock_local_tokens(*args)

    context_parallel.local_tokens = local_tokens  # type: ignore[assignment]
    context_parallel._rotate = lambda rotary, states, *_: states  # reads boundaries on the host, too

    def setup(*args: Any, **kwargs: Any) -> Any:
        with device.active():
            parts["model"], parts["optimizer"], parts["scheduler"] = stock_setup(*args, **kwargs)
        return parts["model"], parts["optimizer"], parts["scheduler"]

    def warm_up(*args: Any, **kwargs: Any) -> Any:
        with device.active():
            return stock_warm_up(*args, **kwargs)

    def provide_datasets(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _reads_rows():
            return stock_provide(self, *args, **kwargs)

    def next_packed_batch(*args: Any, **kwargs: Any) -> Any:
        with _reads_rows():
            return stock_next(*args, **kwargs)

    def forward_step(self: Any, iterator: Any, model: Any) -> Any:
        batch = next_packed_batch(
            iterator, micro_batch_size=self.args.micro_batch_size, row_tokens=self.manifest.row_tokens
        )
        run.next_packed_batch = lambda *_, **__: device.take(batch)
        decoder = get_attr_wrapped_model(model, "decoder")
        if decoder.input_tensor is not None:  # from the pipeline stage before
            decoder.set_input_tensor(decoder.input_tensor.to("meta"))
        with device.active():
            output, loss_function = stock_forward(self, iterator, model)
            loss = None if loss_function is None else loss_function(output)
        result.write_text(json.dumps(_describe(self.args, parts, output, loss)))
        raise _FirstForwardIsOver(0)

    provide_datasets.is_distributed = True  # type: ignore[attr-defined]
    substitutions._stock_setup, driver.set_jit_fusion_options = setup, warm_up
    run.TrainingRun.provide_datasets = provide_datasets  # type: ignore[method-assign]
    run.TrainingRun.forward_step = forward_step  # type: ignore[method-assign]
    torch.distributed.all_gather_object = _all_say_the_same
    torch.distributed.broadcast_object_list = lambda *_, **__: None


@contextmanager
def _reads_rows() -> Iterator[None]:
    """Every tensor-parallel rank reads the rows, which nobody would send it."""
    from megatron.core import parallel_state

    with mock.patch.object(parallel_state, "get_tensor_model_parallel_rank", return_value=0):
        yield


def _all_say_the_same(found: list[Any], mine: Any, group: Any = None) -> None:
    found[:] = [mine] * len(found)


class _MetaDevice:
    """While it is active, CUDA is the meta device, and so is what names no device.

    The CPU runtime has made CUDA the CPU; this goes in front of it.
    """

    def __init__(self) -> None:
        self._is_active = False
        for name in FACTORIES:
            setattr(torch, name, self._moved(getattr(torch, name)))
        self._replace_methods(torch.Tensor.to, torch.Tensor.type)

    @contextmanager
    def active(self) -> Iterator[None]:
        """For the time of a `with`."""
        self._is_active = True
        try:
            with torch.device("meta"):
                yield
        finally:
            self._is_active = False

    def take(self, batch: Any) -> Any:
        """A PackedBatch on the device; its boundaries stay, because they are read on the host."""
        targets = batch.targets
        if targets is not None:
            targets = _on_meta(targets, [field.name for field in dataclasses.fields(targets)])
        return _on_meta(dataclasses.replace(batch, targets=targets), ("tokens", "position_ids", "labels"))

    def _moved(self, factory: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            if self._is_active and _is_cuda(kwargs.get("device")):
                kwargs["device"] = "meta"
            return factory(*args, **kwargs)

        return make

    def _replace_methods(self, stock_to: Any, stock_type: Any) -> None:
        def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self._is_active and args and _is_cuda(args[0]):
                args = ("meta", *args[1:])
            if self._is_active and _is_cuda(kwargs.get("device")):
                kwargs["device"] = "meta"
            return stock_to(tensor, *args, **kwargs)  # type: ignore[no-any-return]

        def type_(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            # the optimizer compares with 'torch.cuda.BFloat16Tensor'
            found = stock_type(tensor, *args, **kwargs)
            return f"torch.cuda.{found.rpartition('.')[2]}" if isinstance(found, str) else found

        torch.Tensor.to = to  # type: ignore[method-assign,assignment]
        torch.Tensor.type = type_  # type: ignore[method-assign,assignment]


def _is_cuda(device: Any) -> bool:
    if isinstance(device, int):
        return not isinstance(device, bool)
    return str(device).startswith("cuda")


def _on_meta(value: Any, names: Sequence[str]) -> Any:
    moved = {name: getattr(value, name) for name in names}
    return dataclasses.replace(
        value, **{name: None if part is None else part.to("meta") for name, part in moved.items()}
    )


def _describe(args: Any, parts: dict[str, Any], output: Any, loss: Any) -> dict[str, Any]:
    """What the rank has built and computed, for the test process."""
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.utils import get_attr_wrapped_model

    model = get_attr_wrapped_model(parts["model"][0], "decoder", return_model_obj=True)
    embedding = model.embedding.word_embeddings if model.pre_process else None
    layers = model.decoder.layers
    batch_rows = args.global_batch_size
    moments = [samples * batch_rows for samples in (0, args.lr_warmup_iters, args.train_iters)]
    return {
        "chunks": len(parts["model"]),
        "pipeline_rank": parallel_state.get_pipeline_model_parallel_rank(),
        "tensor_rank": parallel_state.get_tensor_model_parallel_rank(),
        "data_ranks": parallel_state.get_data_parallel_world_size(),
        "rows_a_step": get_num_microbatches() * args.micro_batch_size * args.data_parallel_size,
        "iterations": args.train_iters,
        "layers": [layer.layer_number for layer in layers],
        "attention": sorted({type(layer.self_attention.core_attention).__name__ for layer in layers}),
        "vocabulary": embedding and [embedding.vocab_start_index, embedding.vocab_end_index],
        "parameters": {
            name: [list(parameter.shape), str(parameter.dtype), parameter.device.type]
            for name, parameter in model.named_parameters()
        },
        "optimized": sum(
            part.numel() for group in parts["optimizer"].param_groups for part in group["params"]
        ),
        "learning_rates": [_learning_rate(parts, samples) for samples in moments],
        "weight_decays": sorted({group["weight_decay"] for group in parts["optimizer"].param_groups}),
        "output": [list(output.shape), str(output.dtype)],
        "loss": loss and [list(loss[0].shape), str(loss[0].dtype), str(loss[1].dtype)],
    }


def _learning_rate(parts: dict[str, Any], samples: int) -> float:
    """After so many rows."""
    parts["scheduler"].num_steps = samples
    (rate,) = {parts["scheduler"].get_lr(group) for group in parts["optimizer"].param_groups}
    return float(rate)
