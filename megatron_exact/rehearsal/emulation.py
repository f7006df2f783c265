"""Values for the null device: small operations are computed on the CPU, in the device's own memory.

The device's memory is host memory, so a CUDA tensor and a CPU tensor can share it without a copy. A
`TorchDispatchMode` sees every torch operation on the device, in forward and backward. The operation is
computed on the CPU and then also runs unchanged on the null device: the caching allocator, workspaces,
launches, waits and errors are those of torch's CUDA code, and only the values are the CPU's.

An operation with more elements than the limit is not computed. Its small results, and small tensors that it
writes to, get a fixed value (1, for integers 0), so that what controls a job is deterministic. Large
activations contain whatever was in their memory; sums of them are 1. Without a limit, a small model has the
numbers of a CPU and runs CUDA's code.

This cannot show the numbers of a CUDA kernel, speed, or errors of a kernel at run time.
"""

from __future__ import annotations

import contextlib
import enum
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_exact.rehearsal.device import NullDevice
from megatron_exact.rehearsal.host_kernels import HOST_KERNELS
from megatron_exact.rehearsal.observations import Records, current_place

DEVICE, HOST = "cuda", "cpu"


_Mode: Any = TorchDispatchMode  # it is not typed


class FreshMemory(enum.Enum):
    """Content of newly allocated memory."""

    KEPT = "kept"
    """Unchanged: zeros at first, later the values of freed tensors, as on a GPU."""
    ZEROS = "zeros"
    """Zeros, if a tensor is small enough to be computed."""
    NAN = "nan"
    """NaN, and the largest integers, which expose reads of memory that was never written."""


class _Kind(enum.Enum):
    METADATA = enum.auto()
    """Views and other operations that only change a tensor's description; they run unchanged."""
    MAKES_ROOM = enum.auto()
    """`empty` and its variants."""
    COMPUTES = enum.auto()
    """Everything else."""
    SIZED_BY_VALUES = enum.auto()
    """The size of the result depends on values, so the host waits for the device."""
    COMPOSITE = enum.auto()
    """Composed of other operations; seen whole in inference mode, where `reshape` may view or copy."""


METADATA = {
    "aten::_unsafe_view",
    "aten::resize_",
    "aten::set_",
    "aten::record_stream",
    "aten::_local_scalar_dense",
    "aten::is_pinned",
    "aten::_pin_memory",
    "aten::_has_compatible_shallow_copy_type",
}
MAKES_ROOM = {
    "aten::empty",
    "aten::empty_strided",
    "aten::empty_like",
    "aten::new_empty",
    "aten::new_empty_strided",
}
SIZED_BY_VALUES = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::equal",
}
LEFT_ALONE = ("c10d::", "_c10d_functional::", "profiler::", "prim::")
TRANSFERS = {"aten::copy_", "aten::_to_copy", "aten::_foreach_copy_"}
ACCEPTS_HOST_INDEX = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put"}


@dataclass(frozen=True)
class _Operation:
    """Fixed properties of a torch operation."""

    name: str
    kind: _Kind
    written: tuple[int | str, ...]
    """Arguments that it writes to: positions, or names of keyword arguments."""
    returns_written: bool
    """Whether its results are those arguments."""
    is_random: bool
    host_kernel: Callable[..., Any] | None
    """A CPU version that torch lacks."""


_operations: dict[Any, _Operation] = {}
_entered: Emulation | None = None


def entered() -> Emulation | None:
    """Return the emulation that is active in this process, in any of its threads."""
    return _entered


def _describe(function: Any) -> _Operation:
    schema = function._schema
    name = schema.name
    returns = schema.returns
    is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    is_view = is_view or torch.Tag.inplace_view in function.tags
    written: list[int | str] = []
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(argument.name if argument.kwarg_only else place)
    kind = _Kind.COMPUTES
    if is_view or name in METADATA or name.startswith(LEFT_ALONE):
        kind = _Kind.METADATA
    elif name in MAKES_ROOM:
        kind = _Kind.MAKES_ROOM
    elif name in SIZED_BY_VALUES:
        kind = _Kind.SIZED_BY_VALUES
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), composite):
        kind = _Kind.COMPOSITE
    return _Operation(
        name=name,
        kind=kind,
        written=tuple(written),
        returns_written=bool(written)
        and all(r.alias_info is not None and r.alias_info.is_write for r in returns),
        is_random=torch.Tag.nondeterministic_seeded in function.tags,
        host_kernel=HOST_KERNELS.get(name),
    )


def on_host(tensor: Tensor) -> Tensor:
    """Return a CPU tensor that shares the memory of a tensor of the null device."""
    storage = tensor.untyped_storage()
    num_bytes = storage.nbytes()
    if num_bytes == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    shared = torch._C._construct_storage_from_data_pointer(
        storage.data_ptr(), torch.device(HOST), num_bytes
    )
    host = torch.empty(0, dtype=tensor.dtype).set_(
        shared, tensor.storage_offset(), tensor.size(), tensor.stride()
    )
    host = torch._conj(host) if tensor.is_conj() else host  # bits of the tensor, not of its memory
    return torch._neg_view(host) if tensor.is_neg() else host


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield all tensors among arguments, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


class Emulation(_Mode):  # type: ignore[misc]
    """Computes and records the operations of torch on the null device while it is active.

    Args:
        device: of this process.
        records: receives the counts.
        limit: largest number of elements of an operation that is computed; None for no limit.
        fresh: content of new memory.
    """

    def __init__(
        self,
        device: NullDevice,
        records: Records,
        *,
        limit: int | None = None,
        fresh: FreshMemory = FreshMemory.KEPT,
    ) -> None:
        super().__init__()
        self.device = device
        self.records = records
        self.limit = math.inf if limit is None else limit
        self.fresh = fresh
        self._outer: list[Emulation | None] = []  # of each time it is entered: itself, for a composite one
        device.on_synchronisation(records.synchronised)
        # a copy is computed as any operation is; what is too large is left undone in C, too
        device.copy_at_most(None if limit is None else 8 * limit)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # dynamo is off; the wrapper would cost as much as the operation

    def __enter__(self) -> Emulation:
        global _entered
        torch._tensor_str._str = _printed_from_host  # type: ignore[assignment]
        super().__enter__()
        self._outer.append(_entered)
        _entered = self
        return self

    def __exit__(self, *args: Any) -> None:
        global _entered
        _entered = self._outer.pop()
        super().__exit__(*args)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(tensors_in(args))
        if kwargs:
            tensors += tensors_in(kwargs.values())
        on_device = [tensor for tensor in tensors if tensor.device.type == DEVICE]
        wanted = kwargs.get("device")
        makes = wanted is not None and torch.device(wanted).type == DEVICE
        if not on_device and not makes:
            return function(*args, **kwargs)
        operation = _operations.get(function)
        if operation is None:
            operation = _operations[function] = _describe(function)
        if operation.kind is _Kind.COMPOSITE:
            with self:
                return function.decompose(*args, **kwargs)
        before = self.device.launches()
        try:
            if operation.kind is _Kind.METADATA:
                return function(*args, **kwargs)
            self.records.calls[operation.name] += 1
            self._note_mixed_devices(operation, tensors, on_device)
            if operation.kind is _Kind.MAKES_ROOM:
                return self._filled(function(*args, **kwargs))
            if operation.kind is _Kind.SIZED_BY_VALUES or _is_sized_by_values(operation, args, kwargs):
                return self._compute_shape(operation, function, args, kwargs)
            return self._run(operation, function, args, kwargs, tensors)
        except Exception as error:
            place = current_place()
            self.records.refused[f"{operation.name}: {str(error).splitlines()[0][:200]}", place] += 1
            raise
        finally:
            launched = self.device.launches() - before
            self.records.launches += launched
            if launched:
                self.records.launches_by_operation[operation.name] += launched

    def call_extension(
        self,
        name: str,
        function: Callable[..., Any],
        host_kernel: Callable[..., Any] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call a function of a C++ extension as if it were a torch operation; torch never sees it.

        Args:
            name: the name under which it is counted.
            function: function of the extension; runs unchanged.
            host_kernel: its CPU version; its in-place results are written to the device's memory.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
        """
        tensors = [*tensors_in(args), *tensors_in(kwargs.values())]
        if not any(tensor.device.type == DEVICE for tensor in tensors):
            return function(*args, **kwargs)
        self.records.calls[name] += 1
        computed = None
        if sum(tensor.numel() for tensor in tensors) > self.limit:
            self.records.skipped[name] += 1
        elif host_kernel is None:
            self.records.not_computed[name, "no CPU version of it is known"] += 1
        else:
            try:
                computed = (host_kernel(*_to_host(args), **_to_host(kwargs)),)
            except (NotImplementedError, ValueError) as error:
                self.records.not_computed[name, str(error)] += 1
        before = self.device.launches() - self.records.launches
        result = function(*args, **kwargs)  # its calls of torch are operations, counted on their own
        launched = self.device.launches() - self.records.launches - before
        self.records.launches += launched
        self.records.launches_by_operation[name] += launched
        if computed is not None:
            return self._stored(result, computed[0])
        self._fix(tensors_in([result]))
        return result

    def _run(
        self,
        operation: _Operation,
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: Sequence[Tensor],
    ) -> Any:
        size = sum(tensor.numel() for tensor in tensors)
        if size > self.limit or (not tensors and _made_elements(operation, args) > self.limit):
            result = function(*args, **kwargs)
            self.records.skipped[operation.name] += 1
            self._fix_small(operation, result, args, kwargs)
            return result
        computed = self._compute(operation, function, args, kwargs)
        kept = [(tensor, on_host(tensor).clone()) for tensor in self._written(operation, args, kwargs)]
        result = function(*args, **kwargs)  # launches, workspaces, errors: all as on a GPU
        for tensor, value in kept:  # in case it copied, on the null device, what no kernel had computed
            on_host(tensor).copy_(value)
        if computed is None:
            self._fix_small(operation, result, args, kwargs)
            return result
        if operation.returns_written:
            return result
        return self._stored(result, computed[0])

    def _compute(
        self,
        operation: _Operation,
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any] | None:
        """Run the operation on the CPU; return None if the CPU does not support it."""
        host_args, host_kwargs = _to_host(args), _to_host(kwargs)
        kernel = operation.host_kernel or function
        try:
            if not operation.is_random:
                return (kernel(*host_args, **host_kwargs),)
            with _random_numbers(host_kwargs):
                return (kernel(*host_args, **host_kwargs),)
        except (RuntimeError, NotImplementedError, IndexError, ValueError, TypeError) as error:
            self.records.not_computed[operation.name, str(error).splitlines()[0][:200]] += 1
            return None

    def _compute_shape(
        self, operation: _Operation, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run an operation whose result's size depends on values, on the CPU alone."""
        self.records.synchronisations[operation.name, current_place()] += 1
        result = function(*_to_host(args), **_to_host(kwargs))
        if operation.returns_written:
            return args[0]
        return _map(result, lambda tensor: self._on_device(tensor))

    def _stored(self, result: Any, computed: Any) -> Any:
        """Return the result on the device, with the values of the CPU's result."""
        if isinstance(result, Tensor) and isinstance(computed, Tensor):
            if result.device.type != DEVICE:  # a copy to the host
                if computed.data_ptr() != result.data_ptr():
                    result.copy_(computed)
                return result
            if result.shape != computed.shape:
                return self._on_device(computed)
            on_host(result).copy_(computed)
            return result
        if isinstance(result, list | tuple):
            return type(result)(
                self._stored(one, other) for one, other in zip(result, computed, strict=True)
            )
        return computed if not isinstance(result, Tensor) else result

    def _on_device(self, computed: Tensor) -> Tensor:
        made = torch.empty_strided(computed.size(), computed.stride(), dtype=computed.dtype, device=DEVICE)
        on_host(made).copy_(computed)
        return made

    def _written(
        self, operation: _Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Tensor]:
        """Return the tensors of the device that the operation writes to."""
        found = [
            kwargs.get(place) if isinstance(place, str) else args[place] if place < len(args) else None
            for place in operation.written
        ]
        return [tensor for tensor in tensors_in(found) if tensor.device.type == DEVICE]

    def _fix_small(
        self, operation: _Operation, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Give small results of an operation that is not computed a fixed value."""
        results = [result] if isinstance(result, Tensor) else result
        found = list(tensors_in(results if isinstance(results, list | tuple) else ()))
        self._fix([*found, *self._written(operation, args, kwargs)])

    def _fix(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if tensor.device.type == DEVICE and tensor.numel() <= self.limit:
                is_number = tensor.dtype.is_floating_point or tensor.dtype == torch.bool
                on_host(tensor).fill_(1 if is_number else 0)

    def _filled(self, made: Tensor) -> Tensor:
        if self.fresh is FreshMemory.KEPT or made.numel() > self.limit or made.device.type != DEVICE:
            return made
        if self.fresh is FreshMemory.ZEROS:
            on_host(made).zero_()
        elif made.dtype.is_floating_point:
            on_host(made).fill_(math.nan)
        elif made.dtype != torch.bool:
            on_host(made).fill_(torch.iinfo(made.dtype).max)
        return made

    def _note_mixed_devices(
        self, operation: _Operation, tensors: Sequence[Tensor], on_device: Sequence[Tensor]
    ) -> None:
        if len(tensors) == len(on_device) or not on_device or operation.name in TRANSFERS:
            return
        if any(tensor.device.type == HOST and tensor.dim() > 0 for tensor in tensors):
            self.records.mixed_devices[operation.name, current_place()] += 1


@contextlib.contextmanager
def _random_numbers(host_kwargs: dict[str, Any]) -> Iterator[None]:
    """Let the CPU draw from the state of the device's generator, which the real call then advances."""
    given = host_kwargs.get("generator")
    source = given if given is not None else torch.cuda.default_generators[torch.cuda.current_device()]
    if given is not None:
        host_kwargs["generator"] = None
    host = torch.default_generator
    before = host.get_state()
    host.manual_seed((source.initial_seed() * 1_000_003 + source.get_offset()) % 2**63)
    try:
        yield
    finally:
        host.set_state(before)


_stock_str: Any = torch._tensor_str._str


def _printed_from_host(tensor: Any, **kwargs: Any) -> str:
    """The text of a tensor.

    torch leaves every mode to make one, and would select elements by what no kernel wrote.
    """
    if isinstance(tensor, Tensor) and tensor.device.type == DEVICE:
        return f"{_stock_str(on_host(tensor.detach()), **kwargs)} on {tensor.device}"
    return str(_stock_str(tensor, **kwargs))


def _is_sized_by_values(operation: _Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether an index is a mask, or a repetition a tensor, whose values a GPU must read first."""
    if operation.name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    if operation.name not in ACCEPTS_HOST_INDEX:
        return False
    return any(index.dtype in (torch.bool, torch.uint8) for index in tensors_in(args[1]))


def _made_elements(operation: _Operation, args: tuple[Any, ...]) -> int:
    """Return the number of elements that a factory function creates."""
    if operation.name == "aten::scalar_tensor":  # its argument is a value
        return 1
    first = args[0] if args else ()
    if isinstance(first, list | tuple) and all(isinstance(size, int) for size in first):
        return math.prod(first)
    sizes = [abs(value) for value in args if isinstance(value, int | float)]  # arange, linspace
    return int(max(sizes, default=0))


def _to_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return on_host(value) if value.device.type == DEVICE else value
    if isinstance(value, torch.device):
        return torch.device(HOST) if value.type == DEVICE else value
    if isinstance(value, list | tuple):
        return type(value)(_to_host(part) for part in value)
    if isinstance(value, dict):
        return {name: _to_host(part) for name, part in value.items()}
    return value


def _map(value: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(_map(part, function) for part in value)
    return value
