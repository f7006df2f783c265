"""The loss head: from hidden states to the cross-entropy of every target, without keeping the logits.

Megatron's head has `[tokens, vocabulary]` logits in the model's dtype and in float32: at 16,384 tokens and
151,936 columns 15 GB, the peak of the last pipeline stage. This one has a tile of them at a time (`Tiles`):
one matrix product of some tokens with some vocabulary columns, used while it is in the cache and
overwritten by the next one. Forward keeps three numbers a token (online softmax: Milakov and Gimelshein
2018, arXiv 1805.02867, algorithm 3); backward recomputes every tile. The price is one more product of that
size, four instead of three; a CPU wins most of it back, because the softmax of a tile happens in its cache.
Two shortcuts are for CPUs alone. Without instructions for bfloat16 the operands of a tile are widened to
float32 (`low_precision`). And in float32 no logit is computed twice: where the caller says what the
gradients of the losses will be, forward makes the gradients while it has the logits, and keeps them until
backward (`gradients_in_forward`).

Losses are returned token by token as by Megatron's head, so weights, mask and division stay where they are.
The hook is `GPTModel.forward(output_processor=...)` (megatron/core/models/gpt/gpt_model.py).

Only the true columns of the vocabulary are computed: rows that pad the output weight, whose number depends
on tensor parallelism, neither enter the softmax nor get a gradient. Tensor parallelism costs two
all-reduces in forward ([N] and [2, N]) and one of the hidden states' gradient in backward; sequence
parallelism gathers the hidden states in both directions and reduces and scatters their gradient, as
Megatron's output layer does.

b = micro-batch size, S = tokens of a row on this context-parallel rank, N = b * S, h = hidden size, C =
vocabulary columns computed on this rank (its true ones), T x B = one tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_exact.low_precision import multiplies_slowly
from megatron_exact.model.shapes import Tiles

WIDENED_ROWS = 256
"""Most tokens of a tile whose operands are widened: a float32 tile of 2,048 columns has 2 MiB."""
FORWARD_TOKENS = 256
"""Least tokens of a tile with all columns for gradients in forward: each tile reads and writes the whole
gradient of the weight."""
FACTORS_BOUND = 1e-6
"""Relative difference of expected and true gradients of the losses; float32 rounds within 1.2e-7."""
CACHED_ELEMENTS = 2**18
"""On a CPU the softmax takes this many logits at a time: 1 MiB of float32, half of a usual L2 cache."""


class _Workspace:
    """The buffers of one pass, allocated once: new ones for each tile would cost page faults each time."""

    def __init__(self, hidden: Tensor, num_columns: int, tiles: Tiles) -> None:
        self._is_widened = multiplies_slowly(hidden)
        self._rounded_to = hidden.dtype
        self.tokens = min(tiles.tokens, hidden.shape[0], WIDENED_ROWS if self._is_widened else tiles.tokens)
        self.columns = min(tiles.columns, num_columns)
        self._logits = self.operand(hidden[:0]).new_empty(self.tokens * self.columns)
        self._product = self._transposed = hidden.new_empty(0)  # made where they are needed
        self._single = self._logits
        if self._logits.dtype != torch.float32:
            rows = min(self.tokens, self._rows_at_a_time(self.columns))
            self._single = hidden.new_empty(rows * self.columns, dtype=torch.float32)

    def _rows_at_a_time(self, columns: int) -> int:
        """Rows of a matrix whose values fit a CPU's cache; on a GPU one kernel takes them all."""
        return self._logits.numel() if self._logits.is_cuda else max(1, CACHED_ELEMENTS // columns)

    def operand(self, values: Tensor) -> Tensor:
        """Return hidden states or weights in the dtype in which they are multiplied."""
        return values.float() if self._is_widened else values

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Operands [t, h] and [c, h] -> their products [t, c], rounded to the dtype of the model."""
        tile = torch.mm(hidden, weight.t(), out=_view(self._logits, hidden.shape[0], weight.shape[0]))
        if self._is_widened:
            for rows in _slices(tile.shape[0], self._rows_at_a_time(tile.shape[1])):
                tile[rows] = tile[rows].to(self._rounded_to)
        return tile

    def in_float32(self, tile: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of rows of a tile and their values, which are the tile's own or a float32 copy."""
        for rows in _slices(tile.shape[0], self._rows_at_a_time(tile.shape[1])):
            part = tile[rows]
            if tile.dtype != torch.float32:
                part = _view(self._single, *part.shape).copy_(part)
            yield rows, part

    def room_for_transpose(self, tile: Tensor) -> Tensor | None:
        """Return a buffer [c, t] for the transpose of a tile [t, c], or None where it would gain nothing.

        In half precision a CPU reads a tile across its rows more slowly, the more so the larger the hidden
        size is.
        """
        if tile.is_cuda or tile.dtype == torch.float32:
            return None
        if self._transposed.numel() < tile.numel():
            self._transposed = torch.empty_like(self._logits)
        return _view(self._transposed, tile.shape[1], tile.shape[0])

    def add_product(self, into: Tensor, left: Tensor, right: Tensor) -> None:
        """Compute into += left @ right with the sum in float32."""
        if left.dtype == torch.float32:
            into.addmm_(left, right)
            return
        if self._product.numel() < into.numel():
            self._product = left.new_empty(into.numel())
        product = torch.mm(left, right, out=_view(self._product, *into.shape))
        self.add(into, product)

    def add(self, into: Tensor, other: Tensor) -> None:
        """Compute into += other of another dtype, which a CPU copies first."""
        for rows in _slices(into.shape[0], self._rows_at_a_time(into.shape[1])):
            into[rows] += other[rows]


def _view(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: rows * columns].view(rows, columns)


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(length, start + size))


def softmax_statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what the cross-entropy of every token needs from its logits.

    Args:
        hidden: [N, h].
        weight: [C, h], same dtype.
        targets: int64 [N], column of the target; values outside 0 ... C - 1 are another rank's.
        tiles: sizes of a tile.

    Returns:
        The largest logit (-inf without columns), the sum of exp(logit - largest), and the target's logit
        (0 if another rank's); each float32 [N].
    """
    num_tokens, num_columns = hidden.shape[0], weight.shape[0]
    largest, total, target_logit = hidden.new_zeros((3, num_tokens), dtype=torch.float32)
    largest.fill_(-torch.inf)
    if num_columns == 0:
        return largest, total, target_logit
    workspace = _Workspace(hidden, num_columns, tiles)
    tile_largest, tile_total = hidden.new_empty((2, workspace.tokens), dtype=torch.float32)
    for columns in _slices(num_columns, workspace.columns):
        block = workspace.operand(weight[columns])
        for tokens in _slices(num_tokens, workspace.tokens):
            here, there = (part[: tokens.stop - tokens.start] for part in (tile_largest, tile_total))
            tile = workspace.logits(workspace.operand(hidden[tokens]), block)
            index, is_inside = _target_in_tile(targets[tokens], columns)
            target_logit[tokens] += torch.where(is_inside, tile.gather(1, index), 0.0).squeeze(1)
            for rows, logits in workspace.in_float32(tile):
                torch.amax(logits, 1, out=here[rows])
                torch.sum(logits.sub_(here[rows, None]).exp_(), 1, out=there[rows])
            new = torch.maximum(largest[tokens], here)
            total[tokens] *= torch.exp(largest[tokens] - new)
            total[tokens] += there * torch.exp(here - new)
            largest[tokens] = new
    return largest, total, target_logit


def accumulate_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_sums: Tensor,
    factors: Tensor,
    tiles: Tiles,
    *,
    weight_gradient: Tensor | None,
) -> Tensor:
    """Compute the gradients of sum(factors * cross-entropy) from recomputed logits.

    The columns are the outer loop, so that each block of the weight's gradient is finished once.

    Args:
        hidden: [N, h].
        weight: [C, h], same dtype.
        targets: int64 [N], as for `softmax_statistics`.
        log_sums: float32 [N], log(sum(exp(logit))) over the columns of all ranks.
        factors: float32 [N], gradient of each token's loss.
        tiles: sizes of a tile.
        weight_gradient: [C, h] of any floating dtype, the gradient of the weight is added to it; None
            where it is not needed.

    Returns:
        The gradient of `hidden` from these columns, float32 [N, h].
    """
    hidden_gradient = torch.zeros_like(hidden, dtype=torch.float32)
    num_tokens, num_columns = hidden.shape[0], weight.shape[0]
    if num_tokens == 0 or num_columns == 0:
        return hidden_gradient
    workspace = _Workspace(hidden, num_columns, tiles)
    block_sum = None  # of a weight gradient to which tiles must not be added one by one
    if weight_gradient is not None and {hidden.dtype, weight_gradient.dtype} != {torch.float32}:
        block_sum = hidden.new_empty((workspace.columns, hidden.shape[1]), dtype=torch.float32)
    for columns in _slices(num_columns, workspace.columns):
        block = workspace.operand(weight[columns])
        into = None if weight_gradient is None else weight_gradient[columns]
        if block_sum is not None:
            into = block_sum[: columns.stop - columns.start].zero_()
        for tokens in _slices(num_tokens, workspace.tokens):
            operand = workspace.operand(hidden[tokens])
            tile = workspace.logits(operand, block)
            target = _target_in_tile(targets[tokens], columns)
            turned = None if into is None else workspace.room_for_transpose(tile)
            for rows, part in workspace.in_float32(tile):
                _replace_by_gradient(part, target, log_sums[tokens], factors[tokens], rows)
                if tile.dtype != torch.float32:
                    tile[rows] = part
                if turned is not None:
                    turned[:, rows] = tile[rows].t()
            workspace.add_product(hidden_gradient[tokens], tile, block)
            if into is not None:
                workspace.add_product(into, tile.t() if turned is None else turned, operand)
        if weight_gradient is not None and into is not None and block_sum is not None:
            workspace.add(weight_gradient[columns], into)
    return hidden_gradient


def has_gradients_in_forward(hidden: Tensor, num_columns: int, tiles: Tiles) -> bool:
    """Return whether `gradients_in_forward` is used: in float32 on a CPU, where memory allows it.

    What it keeps until backward, the gradient of the weight, is at most as large as one tile or as the
    logits that Megatron's head would keep.

    Args:
        hidden: [N, h].
        num_columns: rows of the output weight on this rank.
        tiles: sizes of a tile.
    """
    if hidden.device.type != "cpu" or hidden.dtype != torch.float32 or num_columns == 0:
        return False
    elements = max(tiles.tokens * tiles.columns, hidden.shape[0] * num_columns)
    return num_columns * hidden.shape[1] <= elements


def gradients_in_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    factors: Tensor,
    tiles: Tiles,
    *,
    num_columns: int,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute logits once: what the losses need, and the gradients of sum(factors * cross-entropy).

    A tile has all columns of fewer tokens, so that the softmax of a token is known before its logits are
    overwritten: as many logits as otherwise, or those of `FORWARD_TOKENS`. This saves the fourth matrix
    product and every second exponential.

    Args:
        hidden: float32 [N, h].
        weight: float32 [rows, h], of which the first C are columns of the vocabulary.
        targets: int64 [N], as for `softmax_statistics`.
        factors: float32 [N], gradient of each token's loss.
        tiles: sizes of a tile, of which only the number of logits is used.
        num_columns: C, at least 1.
        group: the ranks that share the vocabulary, all of which call this; None for a single one.

    Returns:
        Of all ranks, log(sum(exp(logit))) and the target's logit, each [N]; from these columns, the
        gradients of `hidden` and of `weight`, shaped like them.
    """
    num_tokens, columns = hidden.shape[0], weight[:num_columns]
    tokens_of_tile = min(num_tokens, max(FORWARD_TOKENS, tiles.tokens * tiles.columns // weight.shape[0]))
    log_sums, target_logit = hidden.new_empty((2, num_tokens))
    hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight)
    buffer = hidden.new_empty(tokens_of_tile * num_columns)
    for tokens in _slices(num_tokens, tokens_of_tile):
        operand = hidden[tokens]
        tile = torch.mm(operand, columns.t(), out=_view(buffer, operand.shape[0], num_columns))
        index, is_inside = _target_in_tile(targets[tokens], slice(0, num_columns))
        here = torch.where(is_inside, tile.gather(1, index), 0.0).squeeze(1)
        largest, total = hidden.new_empty((2, operand.shape[0]))
        for rows in _slices(operand.shape[0], max(1, CACHED_ELEMENTS // num_columns)):
            torch.amax(tile[rows], 1, out=largest[rows])
            torch.sum(tile[rows].sub_(largest[rows, None]).exp_(), 1, out=total[rows])
        local = largest.clone()
        largest, total, target_logit[tokens] = _over_ranks(largest, total, here, group)
        log_sums[tokens] = largest + total.log()
        # The tile is exp(logit - local). Scaling it and taking the target away would pass over it twice
        share = (factors[tokens] * torch.exp(local - largest) / total)[:, None]
        of_target, index = factors[tokens, None] * is_inside, index.squeeze(1)
        torch.mm(tile, columns, out=hidden_gradient[tokens])
        hidden_gradient[tokens].mul_(share).addcmul_(of_target, columns[index], value=-1)
        weight_gradient[:num_columns].addmm_(tile.t(), operand * share)
        weight_gradient.index_add_(0, index, operand * of_target, alpha=-1)
    return log_sums, target_logit, hidden_gradient, weight_gradient


def _over_ranks(
    largest: Tensor, total: Tensor, target_logit: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Combine what `softmax_statistics` returns over the ranks that share the vocabulary."""
    if group is None:
        return largest, total, target_logit
    local = largest.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack([total * torch.exp(local - largest), target_logit])
    dist.all_reduce(sums, group=group)
    return largest, *sums


def _common_factor(true: Tensor, expected: Tensor) -> Tensor | None:
    """Return the number s with true = s * expected, each [N]; None if there is none."""
    largest = expected.abs().argmax()
    factor = true[largest] / expected[largest]
    is_close = (true - factor * expected).abs() <= FACTORS_BOUND * true.abs()  # False for NaN
    return factor if bool(is_close.all()) else None


def _replace_by_gradient(
    logits: Tensor, target: tuple[Tensor, Tensor], log_sums: Tensor, factors: Tensor, rows: slice
) -> None:
    """Replace the logits of some rows of a tile by factor * (softmax - one-hot target), in place."""
    index, is_inside = target
    logits.sub_(log_sums[rows, None]).exp_()
    logits.scatter_add_(1, index[rows], -is_inside[rows].float())
    logits.mul_(factors[rows, None])


def _target_in_tile(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Return the index of each target inside these columns, and whether it is inside; both [t, 1].

    A target outside gets some valid index: selecting the tokens instead would wait for the device.
    """
    is_inside = (targets >= columns.start) & (targets < columns.stop)
    index = (targets - columns.start).clamp_(0, columns.stop - columns.start - 1)
    return index[:, None], is_inside[:, None]


UNSUPPORTED_BY_TILED_HEAD: tuple[tuple[str, Any, str], ...] = (
    ("mtp_num_layers", None, "drop --mtp-num-layers"),
    ("mup_output_mult", 1.0, "drop --use-mup"),
    ("label_smoothing", 0.0, "drop the label smoothing"),
    ("defer_embedding_wgrad_compute", False, "drop --defer-embedding-wgrad-compute"),
    ("fp8_output_proj", False, "drop --fp8-output-proj"),
)
"""TransformerConfig field, the only supported value (a field that this version lacks has it), remedy."""


def check_tiled_head_supports(transformer: Any) -> None:
    """Check that the tiled head computes what Megatron's would compute with this TransformerConfig.

    Raises:
        ValueError: an option that it does not support; names its value and the remedy.
    """
    for field, supported, remedy in UNSUPPORTED_BY_TILED_HEAD:
        value = getattr(transformer, field, supported)
        if value != supported and (value or supported):
            raise ValueError(
                f"{field} = {value} is not supported by the tiled loss head: {remedy}, or use "
                "--loss-head stock"
            )


class TiledLossHead:
    """The `output_processor` of `GPTModel.forward`; returns the losses, float32 [b, S].

    Args:
        vocabulary: true columns; the output layer may have more, so that they divide by its ranks.
        tiles: sizes of a tile.
    """

    def __init__(self, *, vocabulary: int, tiles: Tiles | None = None) -> None:
        self.vocabulary = vocabulary
        self.tiles = tiles or Tiles()

    def __call__(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        labels: Tensor | None,
        config: Any,
        expected_factors: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Compute the losses from the arguments that Megatron passes on the last pipeline stage.

        Args:
            hidden_states, output_layer, output_weight, labels, config: Megatron's.
            expected_factors: as for `tiled_token_losses`.

        Raises:
            ValueError: no labels, or an output layer or configuration that this head does not support.
        """
        check_tiled_head_supports(config)
        if labels is None:
            raise ValueError(
                "the tiled loss head was called without labels: it never has all logits; call the "
                "model without output_processor to get them"
            )
        if output_layer.bias is not None:
            raise ValueError(
                "an output layer with bias is not supported by the tiled loss head: build it without, "
                "or use --loss-head stock"
            )
        return tiled_token_losses(
            hidden_states,
            output_layer.weight if output_weight is None else output_weight,  # tied: the embedding's
            labels,
            vocabulary=self.vocabulary,
            tiles=self.tiles,
            group=output_layer.tp_group,
            sequence_parallel=output_layer.sequence_parallel,
            expected_factors=expected_factors,
        )


def tiled_token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocabulary: int,
    tiles: Tiles,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    expected_factors: Tensor | None = None,
) -> Tensor:
    """Compute the cross-entropy of every target over a vocabulary that is split over a group of ranks.

    The gradient of the weight goes straight into `weight.main_grad` where Megatron's data-parallel wrapper
    has put one, in its dtype, without being rounded to the model's first.

    Args:
        hidden: [S, b, h]; with sequence parallelism this rank's share of S.
        weight: this rank's rows of the output weight, equally many on every rank, same dtype.
        labels: int64 [b, S], the same on all ranks of the group.
        vocabulary: true columns over all ranks.
        tiles: sizes of a tile.
        group: the tensor-parallel ranks; None for a single rank.
        sequence_parallel: whether `hidden` is split along S.
        expected_factors: float32 [b, S], what the gradients of the losses will be, times any number. It is
            a guess: a right one saves time (`has_gradients_in_forward`), a wrong one has no effect.

    Returns:
        Losses in nats, float32 [b, S]; NaN for a label outside the vocabulary.

    Raises:
        ValueError: shapes that do not fit.
    """
    num_ranks = 1 if group is None else group.size()
    sequence_parallel = sequence_parallel and num_ranks > 1
    tokens = hidden.shape[0] * (num_ranks if sequence_parallel else 1)
    if (hidden.shape[1], tokens) != tuple(labels.shape) or hidden.shape[2] != weight.shape[1]:
        raise ValueError(
            f"hidden states {list(hidden.shape)} fit neither labels {list(labels.shape)} nor the output "
            f"weight {list(weight.shape)}, or not both, on {num_ranks} ranks: [S, b, h] for [b, S], [V, h]"
        )
    if not 0 < vocabulary <= weight.shape[0] * num_ranks:
        raise ValueError(
            f"a vocabulary of {vocabulary} needs as many rows of the output weight, which has "
            f"{weight.shape[0]} on each of {num_ranks} ranks: give the model's own size"
        )
    losses: Tensor = _TiledCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden,
        weight,
        labels,
        vocabulary,
        tiles,
        group if num_ranks > 1 else None,
        sequence_parallel,
        expected_factors if torch.is_grad_enabled() else None,
    )
    return losses


class _TiledCrossEntropy(torch.autograd.Function):
    """The losses and their gradient; saves its inputs and one number a token for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        vocabulary: int,
        tiles: Tiles,
        group: dist.ProcessGroup | None,
        sequence_parallel: bool,
        expected_factors: Tensor | None,
    ) -> Tensor:
        gathered = _gather(hidden, group) if sequence_parallel else hidden
        first = weight.shape[0] * (0 if group is None else group.rank())
        num_columns = max(0, min(weight.shape[0], vocabulary - first))
        targets = labels.t().reshape(-1)  # in the order of hidden [S, b]
        rows, columns = gathered.reshape(-1, hidden.shape[2]), weight[:num_columns]
        ctx.expected = None
        # One answer on all ranks, which have to call the same collectives
        has_columns = vocabulary > weight.shape[0] * (0 if group is None else group.size() - 1)
        is_early = has_columns and has_gradients_in_forward(rows, weight.shape[0], tiles)
        if expected_factors is not None and is_early and all(ctx.needs_input_grad[:2]):
            factors = expected_factors.t().reshape(-1)
            log_sums, target_logit, *gradients = gradients_in_forward(
                rows, weight, targets - first, factors, tiles, num_columns=num_columns, group=group
            )
            ctx.expected = (factors, *gradients)
        else:
            largest, total, target_logit = _over_ranks(
                *softmax_statistics(rows, columns, targets - first, tiles), group
            )
            log_sums = largest + total.log()
        ctx.save_for_backward(hidden, weight, targets, log_sums)
        ctx.first, ctx.num_columns = first, num_columns
        ctx.tiles, ctx.group, ctx.sequence_parallel = tiles, group, sequence_parallel
        # A target outside the vocabulary has no logit on any rank; without NaN its loss would look normal
        is_unknown = (targets < 0) | (targets >= vocabulary)
        losses = (log_sums - target_logit).masked_fill(is_unknown, torch.nan)
        return losses.view(labels.shape[1], labels.shape[0]).t().contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_sums = ctx.saved_tensors
        gathered = _gather(hidden, ctx.group) if ctx.sequence_parallel else hidden
        factors = grad_losses.t().reshape(-1).float()
        expected, ctx.expected = ctx.expected, None  # a second backward computes its logits
        common = None if expected is None else _common_factor(factors, expected[0])
        into, returned = None, None
        if expected is not None and common is not None:
            _, hidden_gradient, made = expected
            if common != 1:
                hidden_gradient.mul_(common)
                made.mul_(common)
            into, returned = _weight_gradient(weight, made)
            if into is not made:
                into.add_(made)
            del made
        else:
            if ctx.needs_input_grad[1]:
                into, returned = _weight_gradient(weight)
            hidden_gradient = accumulate_gradients(
                gathered.reshape(-1, hidden.shape[2]),
                weight[: ctx.num_columns],
                targets - ctx.first,
                log_sums,
                factors,
                ctx.tiles,
                weight_gradient=None if into is None else into[: ctx.num_columns],
            )
        del expected
        # Rounded before it is summed over ranks, as Megatron's output layer does
        reduced = hidden_gradient.to(hidden.dtype).view(gathered.shape)
        del hidden_gradient, gathered
        if ctx.sequence_parallel:
            share = torch.empty_like(hidden)
            dist.reduce_scatter_tensor(share, reduced, group=ctx.group)
            reduced = share
        elif ctx.group is not None:
            dist.all_reduce(reduced, group=ctx.group)
        return (reduced, returned, None, None, None, None, None, None)


def _gather(hidden: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gather all ranks' shares of [S, b, h], in order."""
    assert group is not None, "sequence parallelism has a group"
    whole = hidden.new_empty((hidden.shape[0] * group.size(), *hidden.shape[1:]))
    dist.all_gather_into_tensor(whole, hidden.contiguous(), group=group)
    return whole


def _weight_gradient(weight: Tensor, made: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the tensor to which the gradient of the weight is added, and the one that autograd gets.

    Both are `made`, a gradient that is complete, or zeros, where there is no `main_grad`.

    Megatron's hook (megatron/core/distributed/distributed_data_parallel.py) adds what autograd gives to
    `main_grad`, unless `grad_added_to_main_grad` says that it has been added. It still needs a tensor of
    the weight's shape: an expanded zero takes the memory of one element, while all activations exist.
    """
    if not hasattr(weight, "main_grad") or not hasattr(weight, "grad_added_to_main_grad"):
        gradient = torch.zeros_like(weight) if made is None else made
        return gradient, gradient
    weight.grad_added_to_main_grad = True
    return weight.main_grad, weight.new_zeros(1).expand_as(weight)
