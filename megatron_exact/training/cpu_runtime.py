"""Answers the CUDA calls of Megatron's training driver on a machine without a GPU.

Megatron's driver asserts CUDA and names it in some seventy places; this file is the whole difference
between a cluster and a laptop. It is imported only where there is no GPU or `--cpu` was given. It replaces
functions instead of wrapping torch operations, so no operation costs more: factory functions that name a
CUDA device make a CPU tensor, moves to CUDA return the same tensor, streams and events do nothing. gloo
replaces NCCL through Megatron's own `--distributed-backend`, and `model/cpu_kernels.py` replaces fused
kernels.

Each comment below names the place in Megatron that needs the replacement (megatron-core 0.19.2).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)
"""torch functions that Megatron calls with device='cuda' or torch.cuda.current_device()."""

_installed = False


def install() -> None:
    """Install all replacements, once in a process."""
    global _installed
    if _installed:
        return
    _installed = True
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # arguments.py asks for it with TP
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # core/jit.py compiles small functions, seconds a process
    if "torch._dynamo" in sys.modules:  # it has read the variable already
        torch._dynamo.config.disable = True
    _hide_gpu_libraries()
    _replace_tensor_placement()
    _replace_device_queries()
    _replace_streams()
    _replace_random_state()
    _replace_fused_kernels()
    _keep_freed_memory()


def _hide_gpu_libraries() -> None:
    """Let Megatron take its own Adam, gradient norm and scaling, as where neither library is installed.

    It takes those of Transformer Engine or Apex wherever they can be imported, and they run on a GPU alone
    (core/optimizer/{__init__,optimizer,clip_grads}.py, training/utils/common_utils.py). What was imported
    before, as tests do that build Transformer Engine's layers, stays, without its optimizers.
    """
    is_loaded = "transformer_engine" in sys.modules
    hidden: dict[str, Any] = dict.fromkeys(("apex", "amp_C"))
    hidden["transformer_engine.pytorch.optimizers" if is_loaded else "transformer_engine"] = None
    sys.modules.update(hidden)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)  # current_device() is an int


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


def _replace_tensor_placement() -> None:
    # `with torch.device(...)` acts on a list of functions that torch makes at its first use: with the
    # stock ones in it, a model built on the meta device stays there, and from_pretrained works
    from torch.utils._device import _device_constructors

    _device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    stock_to, stock_type = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # rotary_pos_embedding.py moves inv_freq, data loaders move batches
        if args and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return stock_to(self, *args, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # optimizer.py, distrib_optimizer.py and clip_grads.py compare with 'torch.cuda.FloatTensor'
        result = stock_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.") if isinstance(result, str) else result

    def cuda(self: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return self  # training.py moves the model, batch.py the rows

    def pin_memory(self: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return self  # data_samplers.py

    replacements = {"to": to, "type": type_, "cuda": cuda, "pin_memory": pin_memory}
    for name, method in replacements.items():
        setattr(torch.Tensor, name, method)


def _always(value: Any) -> Callable[..., Any]:
    """Return a new function that returns `value` whatever its arguments.

    It must be new, because torch._dynamo does not accept one function object under two names.
    """
    return lambda *_, **__: value


def _replace_device_queries() -> None:
    properties = types.SimpleNamespace(
        major=9, minor=0, name="cpu", total_memory=0, multi_processor_count=1
    )
    answers: dict[str, Any] = {
        "is_available": True,  # initialize.py "Megatron requires CUDA."
        # initialize.py wants a device for every local rank and calls set_device(local_rank)
        "device_count": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "current_device": 0,  # an int: update_seqlen_stats_from_cu_seqlens formats it
        "set_device": None,
        "synchronize": None,  # timers.py, p2p_communication.py
        "empty_cache": None,  # training.py after loading
        "memory_stats": {},  # training.py training_log
        "memory_allocated": 0,  # common_utils.py report_memory
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "reset_peak_memory_stats": None,
        "get_device_capability": (9, 0),  # arguments.py grouped GEMM check
        "get_device_properties": properties,
        "get_device_name": "cpu",
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, _always(answer))
    # async_utils.py and filesystem_async.py ask torch.accelerator
    torch.accelerator.is_available = _always(False)
    torch.accelerator.current_device_index = _always(0)


class _NoStream:
    """A stream or event on which everything has already happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name in {"wait_stream", "synchronize", "wait_event", "record_event", "record", "wait"}:
            return lambda *_, **__: None
        raise AttributeError(name)


def _replace_streams() -> None:
    # training.py builds the model wrapper on a side stream; param_and_grad_buffer.py overlaps on one
    cuda: Any = torch.cuda
    cuda.Stream = _NoStream
    cuda.Event = _NoStream
    cuda.current_stream = lambda *_: _NoStream()
    cuda.default_stream = lambda *_: _NoStream()
    cuda.stream = lambda *_: contextlib.nullcontext()


def _replace_random_state() -> None:
    # checkpointing.py stores and restores it; tensor_parallel/random.py forks it for dropout
    import megatron.core.tensor_parallel.random as tensor_parallel_random

    def get_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    cuda: Any = torch.cuda
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.manual_seed_all = _always(None)
    cuda.get_rng_state = get_state
    cuda.set_rng_state = set_state
    tensor_parallel_random._get_cuda_rng_state = get_state
    tensor_parallel_random._set_cuda_rng_state = set_state


def _replace_fused_kernels() -> None:
    # Megatron calls Transformer Engine's fused kernels by these names; ours are for the CPU
    import megatron.core.models.common.embeddings.rope_utils as rope_utils
    import megatron.core.optimizer as optimizers
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.transformer.mlp as mlp

    from megatron_exact.model import cpu_kernels

    rope_utils.fused_apply_rotary_pos_emb = cpu_kernels.rotate_row
    rope_utils.fused_apply_rotary_pos_emb_thd = cpu_kernels.rotate_segments
    mlp.bias_swiglu_impl = cpu_kernels.bias_swiglu
    clip_grads.l2_norm_impl = cpu_kernels.l2_norm_of_tensors
    clip_grads.multi_tensor_scale_impl = cpu_kernels.scale_tensors
    stock_build = optimizers._get_megatron_optimizer_based_on_param_groups

    def build(*args: Any, **kwargs: Any) -> Any:
        built = stock_build(*args, **kwargs)
        cpu_kernels.fuse_adam(built.optimizer)
        return built

    optimizers._get_megatron_optimizer_based_on_param_groups = build


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory, so that not every step pays for the page faults of its tensors."""
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        c_library = ctypes.CDLL(None)
        for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**26)):
            c_library.mallopt(option, value)


CPU_ARGUMENTS: tuple[str, ...] = (
    "--distributed-backend",
    "gloo",
    "--transformer-impl",
    "local",
    "--use-cpu-initialization",
    # kernels of Apex and Transformer Engine that a CPU does not have
    "--no-persist-layer-norm",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-dropout-fusion",
    # loader processes would compete with the ranks for the same cores
    "--num-workers",
    "0",
    # an iteration may take minutes
    "--log-interval",
    "1",
)
"""Megatron flags that a CPU job starts from; the user's come later and win."""
