"""Process groups of the null device: other ranks are real processes over gloo, or absent.

They replace NCCL, which is not available. `use_for_all_groups` makes torch use one of two kinds, whose
tensors are on the null device and whose transport reads its memory as host memory:

`RealRanks`: the other ranks are processes; gloo moves real values, synchronously.

`AbsentRanks`: this is the only process of a job of any size. Every absent rank is assumed to have the same
values as this one. So a sum is this rank's value times the number of ranks, a maximum is its own value, and
a gather repeats its value. Buffers for data from another pipeline stage, or from the source of a broadcast,
stay unchanged.

Both count calls and bytes; the bytes of a call are those of the larger of a rank's buffers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

from megatron_exact.rehearsal.emulation import on_host
from megatron_exact.rehearsal.observations import Records

BACKEND = "null_device"
UNCHANGED_ALONE = (dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.AVG)
"""Reductions of equal values that return the value itself."""


_ProcessGroup: Any = dist.ProcessGroup  # its stubs describe overloads that no class in Python could have


class CountedGroup(_ProcessGroup):  # type: ignore[misc]
    """The common part of both kinds of group: description, counting, and calls for several tensors.

    Args:
        rank: of this process in the group.
        size: of the group.
        records: where calls are counted.
    """

    def __init__(self, rank: int, size: int, records: Records) -> None:
        super().__init__(rank, size)
        self._rank, self._size, self._records = rank, size, records

    def size(self) -> int:
        """Return the number of ranks."""
        return self._size

    def rank(self) -> int:
        """Return this process's rank."""
        return self._rank

    def getBackendName(self) -> str:
        """Return the name for logs."""
        return BACKEND

    @property
    def pg_name(self) -> str:
        """Return the name under which torch registered the group."""
        return c10d._world.pg_names[self]

    @property
    def group_name(self) -> str:
        """Return the same as `pg_name`, under the name that newer code uses."""
        return self.pg_name

    def allreduce_coalesced(self, tensors: Sequence[Tensor], options: Any = None) -> Any:
        """Reduce several tensors."""
        return self.allreduce(tensors, options)

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], tensors: Sequence[Tensor], options: Any = None
    ) -> Any:
        """Gather several tensors."""
        for output, tensor in zip(outputs, tensors, strict=True):
            self.all_gather_single(output, tensor)
        return _ended()

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], tensors: Sequence[Tensor], options: Any = None
    ) -> Any:
        """Reduce and scatter several tensors."""
        for output, tensor in zip(outputs, tensors, strict=True):
            self.reduce_scatter_single(output, tensor, options)
        return _ended()

    def _count(self, name: str, *buffers: Any) -> None:
        num_bytes = max((_bytes(buffer) for buffer in buffers), default=0)
        description = str(getattr(self, "group_desc", "") or "undefined")
        description = description.lower().removesuffix("_group")
        self._records.communicated(name, f"{description}, {self._size} ranks", num_bytes)


def _bytes(buffer: Any) -> int:
    if isinstance(buffer, Tensor):
        return buffer.numel() * buffer.element_size()
    return sum(_bytes(part) for part in buffer)


def _host(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return on_host(tensor) if tensor.is_cuda else tensor


def _ended() -> Any:
    future: Any = torch.futures.Future()
    future.set_result(None)
    bindings: Any = torch._C._distributed_c10d
    return bindings._create_work_from_future(future)


class AbsentRanks(CountedGroup):
    """A group in which only this process exists.

    Args:
        limit: values of longer tensors are left as they are; None for no limit.
    """

    def __init__(self, rank: int, size: int, records: Records, limit: int | None) -> None:
        super().__init__(rank, size, records)
        self._limit = math.inf if limit is None else limit

    def _is_small(self, tensor: Tensor) -> bool:
        return tensor.numel() <= self._limit

    def _reduce_alone(self, tensor: Tensor, operation: Any) -> None:
        if self._size == 1 or not self._is_small(tensor):
            return
        if operation == dist.ReduceOp.SUM:
            _host(tensor).mul_(self._size)
        elif not any(operation == kept for kept in UNCHANGED_ALONE):  # `in` would ask the other side
            raise NotImplementedError(f"absent ranks have no answer to {operation}")

    def _copy(self, to: Tensor, source: Tensor) -> None:
        if self._is_small(to) and to.data_ptr() != source.data_ptr():
            _host(to).copy_(_host(source))

    def allreduce(self, tensors: Sequence[Tensor], options: Any = None) -> Any:
        """Reduce in place."""
        self._count("all_reduce", tensors)
        for tensor in tensors:
            self._reduce_alone(tensor, options.reduceOp)
        return _ended()

    def reduce(self, tensors: Sequence[Tensor], options: Any = None) -> Any:
        """Reduce to one rank."""
        self._count("reduce", tensors)
        for tensor in tensors:
            self._reduce_alone(tensor, options.reduceOp)
        return _ended()

    def broadcast(self, tensors: Sequence[Tensor], options: Any = None) -> Any:
        """Leave the buffer unchanged."""
        self._count("broadcast", tensors)
        return _ended()

    def allgather(self, outputs: Any, inputs: Sequence[Tensor], options: Any = None) -> Any:
        """Repeat this rank's tensor for every rank."""
        self._count("all_gather", outputs, inputs)
        for parts, tensor in zip(outputs, inputs, strict=True):
            for part in parts:
                self._copy(part, tensor)
        return _ended()

    def all_gather_single(self, output: Tensor, tensor: Tensor, options: Any = None) -> Any:
        """Gather into one tensor."""
        self._count("all_gather", output)
        for part in output.detach().flatten().chunk(self._size):
            self._copy(part, tensor.detach().flatten())
        return _ended()

    def reduce_scatter(self, outputs: Any, inputs: Any, options: Any = None) -> Any:
        """Return this rank's part of the sum."""
        self._count("reduce_scatter", inputs)
        for output, parts in zip(outputs, inputs, strict=True):
            self._copy(output, parts[self._rank])
            self._reduce_alone(output, options.reduceOp)
        return _ended()

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, options: Any = None) -> Any:
        """Return this rank's part of the sum of one tensor."""
        self._count("reduce_scatter", tensor)
        self._copy(output.detach().flatten(), tensor.detach().flatten().chunk(self._size)[self._rank])
        self._reduce_alone(output, options.reduceOp)
        return _ended()

    def gather(self, outputs: Any, inputs: Sequence[Tensor], options: Any = None) -> Any:
        """Repeat this rank's tensor for every rank at the root."""
        self._count("gather", inputs)
        for parts, tensor in zip(outputs, inputs, strict=False):
            for part in parts:
                self._copy(part, tensor)
        return _ended()

    def scatter(self, outputs: Sequence[Tensor], inputs: Any, options: Any = None) -> Any:
        """Return this rank's part if it is the root."""
        self._count("scatter", outputs)
        for output, parts in zip(outputs, inputs, strict=False):
            self._copy(output, parts[self._rank])
        return _ended()

    def send(self, tensors: Sequence[Tensor], to: int, tag: int = 0) -> Any:
        """Do nothing: nobody receives."""
        self._count("send", tensors)
        return _ended()

    def recv(self, tensors: Sequence[Tensor], source: int, tag: int = 0) -> Any:
        """Leave the buffer unchanged."""
        self._count("recv", tensors)
        return _ended()

    def barrier(self, options: Any = None, **_: Any) -> Any:
        """Do nothing: nobody is missing."""
        self._count("barrier")
        return _ended()


class RealRanks(CountedGroup):
    """A group of processes, each with a null device; gloo moves what they send.

    Args:
        store: of the group alone.
        timeout: of gloo.
    """

    def __init__(self, rank: int, size: int, records: Records, store: Any, timeout: timedelta) -> None:
        super().__init__(rank, size, records)
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout)

    def _all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [_host(tensor) for tensor in tensors]

    def allreduce(self, tensors: Sequence[Tensor], options: Any = None) -> Any:
        """Reduce in place; gloo has no mean, so the sum is divided here."""
        self._count("all_reduce", tensors)
        for tensor in self._all(tensors):
            self._reduce(tensor, options.reduceOp)
        return _ended()

    def _reduce(self, tensor: Tensor, operation: Any) -> None:
        is_mean = operation == dist.ReduceOp.AVG
        options: Any = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.SUM if is_mean else operation
        whole = tensor.contiguous()
        self._gloo.allreduce([whole], options).wait()
        if is_mean:
            whole.div_(self._size)
        if whole is not tensor:
            tensor.copy_(whole)

    def reduce(self, tensors: Sequence[Tensor], options: Any = None) -> Any:
        """Reduce; every rank gets the result."""
        return self.allreduce(tensors, options)

    def broadcast(self, tensors: Sequence[Tensor], options: Any = None) -> Any:
        """Broadcast from the root."""
        self._count("broadcast", tensors)
        for tensor in self._all(tensors):
            whole = tensor.contiguous()
            self._gloo.broadcast([whole], options).wait()
            if whole is not tensor:
                tensor.copy_(whole)
        return _ended()

    def allgather(self, outputs: Any, inputs: Sequence[Tensor], options: Any = None) -> Any:
        """Gather the tensors of all ranks."""
        self._count("all_gather", outputs, inputs)
        for parts, tensor in zip(outputs, self._all(inputs), strict=True):
            self._gather_into(self._all(parts), tensor)
        return _ended()

    def _gather_into(self, parts: Sequence[Tensor], tensor: Tensor) -> None:
        received = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts]
        self._gloo.allgather([received], [tensor.contiguous()]).wait()
        for part, got in zip(parts, received, strict=True):
            part.copy_(got)

    def all_gather_single(self, output: Tensor, tensor: Tensor, options: Any = None) -> Any:
        """Gather into one tensor."""
        self._count("all_gather", output)
        self._gather_into(_host(output).flatten().chunk(self._size), _host(tensor).flatten())
        return _ended()

    def reduce_scatter(self, outputs: Any, inputs: Any, options: Any = None) -> Any:
        """Return this rank's part of the sum."""
        self._count("reduce_scatter", inputs)
        for output, parts in zip(outputs, inputs, strict=True):
            whole = torch.stack(self._all(parts))
            self._reduce(whole, options.reduceOp)
            _host(output).copy_(whole[self._rank])
        return _ended()

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, options: Any = None) -> Any:
        """Reduce one tensor, which stays unchanged unless the output is a part of it."""
        self._count("reduce_scatter", tensor)
        whole = _host(tensor).flatten().clone()
        self._reduce(whole, options.reduceOp)
        _host(output).flatten().copy_(whole.chunk(self._size)[self._rank])
        return _ended()

    def send(self, tensors: Sequence[Tensor], to: int, tag: int = 0) -> Any:
        """Send to a rank; gloo has copied the tensor when this returns."""
        self._count("send", tensors)
        return self._gloo.send([tensor.contiguous() for tensor in self._all(tensors)], to, tag)

    def recv(self, tensors: Sequence[Tensor], source: int, tag: int = 0) -> Any:
        """From a rank, straight into the device's memory."""
        self._count("recv", tensors)
        return self._gloo.recv(self._all(tensors), source, tag)

    def barrier(self, options: Any = None, **_: Any) -> Any:
        """Wait for everybody."""
        self._count("barrier")
        self._gloo.barrier().wait()
        return _ended()


_make: Callable[[Any], CountedGroup] | None = None


def use_for_all_groups(records: Records, *, are_absent: bool, limit: int | None = None) -> None:
    """Make every process group of this process one of the null device, whatever backend is asked for.

    Args:
        records: where calls are counted.
        are_absent: whether this is the only process of the job.
        limit: for absent ranks.
    """
    global _make

    def make(options: Any) -> CountedGroup:
        rank, size = options.group_rank, options.group_size
        if are_absent:
            return AbsentRanks(rank, size, records, limit)
        return RealRanks(rank, size, records, options.store, options.timeout)

    def create(options: Any, _: Any) -> CountedGroup:
        assert _make is not None
        return _make(options)

    if _make is None:
        dist.Backend.register_backend(BACKEND, create, extended_api=True, devices=["cpu", "cuda"])
        _replace_backend_names(are_absent=are_absent)
    _make = make


def _replace_backend_names(*, are_absent: bool) -> None:
    stock_init, stock_new = dist.init_process_group, dist.new_group

    def init_process_group(*_: Any, **kwargs: Any) -> Any:
        kwargs["backend"] = BACKEND
        kwargs.pop("device_id", None)
        if are_absent:
            kwargs["store"] = torch._C._distributed_c10d.HashStore()
        return stock_init(**kwargs)

    def new_group(*args: Any, **kwargs: Any) -> Any:
        kwargs["backend"] = BACKEND
        kwargs.pop("pg_options", None)
        kwargs.pop("device_id", None)
        return stock_new(*args, **kwargs)

    modules: tuple[Any, ...] = (dist, c10d)
    for module in modules:
        module.init_process_group = init_process_group
        module.new_group = new_group
        module.get_backend = lambda group=None: "nccl"  # whose code is rehearsed
