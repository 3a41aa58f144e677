"""Backward passes written by hand, for training: where autograd would make many small operations, or keep a large
array for no need.

Each class says in its docstring which plain code it stands for; that code stays where it is used, and serves wherever
`is_trained` says no: inference, GPUs, compiled or exported graphs, torch.func, tensors that are distributed. None of
them can be differentiated twice. Letters: B batch, H heads, S tokens, W head width, N tokens of all sequences, P pairs
of a token and an expert, E experts, D hidden width, I inner width of a feed-forward, V vocabulary.
"""

from functools import wraps

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .products import goes_by_onednn, outer_product, padded, plain_outer_product, product

Pairs = tuple[torch.Tensor, torch.Tensor]
BLOCK = 32  # queries that meet their keys at once
SCORES, ROWS = 2**22, 256  # logits that LinearCrossEntropy holds at once, but no fewer rows than these


def is_plain(*tensors: torch.Tensor) -> bool:
    """Whether autograd alone may follow what happens to these tensors: no compiler, tracer or transform does."""
    return (
        not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and not torch._C._are_functorch_transforms_active()
        and all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in tensors)
    )


def is_trained(module: nn.Module, *tensors: torch.Tensor) -> bool:
    """Whether a module in training works on plain tensors of a CPU.

    It doesn't ask for gradients: a forward that is checkpointed is first run without them, and is to round alike.
    """
    return module.training and is_plain(*tensors) and all(tensor.device.type == "cpu" for tensor in tensors)


def is_trained_as_it_is(module: nn.Module, *tensors: torch.Tensor) -> bool:
    """`is_trained`, and no autocast changes the tensors' types on their way into products."""
    return is_trained(module, *tensors) and not torch.is_autocast_enabled("cpu")


def without_autocast(backward):
    """Keep a caller's autocast from changing types in a backward pass; the context costs what a small product does."""

    @wraps(backward)
    def run(*given):
        if not torch.is_autocast_enabled("cpu"):
            return backward(*given)
        with torch.autocast("cpu", enabled=False):
            return backward(*given)

    return run


def full(x: torch.Tensor) -> torch.dtype:
    """The type to add up in: float32, or that of x if it has more bits."""
    return torch.promote_types(x.dtype, torch.float32)


def divided_by_rms(x: torch.Tensor, eps: float) -> Pairs:
    """n = x / sqrt(mean(x^2) + eps), and the factor on x, both in `full` type."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=full(x)).square_()
    scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * scale, scale


def through_rms(grad: torch.Tensor, normed: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> Pairs:
    """The gradients of x and weight from that of n * weight.

    With g = grad * weight, the gradient of x is (g - n mean(g n)) / sqrt(mean(x^2) + eps).
    """
    by_normed = grad * normed
    grad_weight = by_normed.flatten(0, -2).sum(0).to(weight.dtype)
    mean = (by_normed @ weight.to(by_normed.dtype)).div_(len(weight)).unsqueeze(-1)
    return torch.addcmul((grad * weight).to(normed.dtype), normed, mean, value=-1).mul_(scale), grad_weight


class RMSNorm(Function):
    """`DeepSeekRMSNorm`: x / sqrt(mean(x^2) + eps) * weight."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        normed, scale = divided_by_rms(x, eps)
        ctx.save_for_backward(normed, scale, weight)
        ctx.dtype = x.dtype
        return weight * normed.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        grad_x, grad_weight = through_rms(grad, *ctx.saved_tensors)
        return grad_x.to(ctx.dtype), grad_weight if ctx.needs_input_grad[1] else None, None


def rotate(pairs: Pairs, cos: torch.Tensor, sin: torch.Tensor, out: Pairs) -> None:
    """Write the rotated pairs into `out`."""
    (first, second), (new_first, new_second) = pairs, out
    torch.mul(first, cos, out=new_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=new_second).addcmul_(first, sin)


def pairs_of(x: torch.Tensor, interleaved: bool) -> Pairs:
    """[..., W] -> the first members of all pairs and the second ones, [..., W / 2] each."""
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return first, second


def are_numbers(x: torch.Tensor) -> bool:
    """Whether the memory of neighbours on the last axis can be read as one complex number."""
    *steps, last = x.stride()
    return last == 1 and x.storage_offset() % 2 == 0 and not any(step % 2 for step in steps)


def rotate_alike(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, interleaved: bool):
    """Write x, rotated, into `out`, whose pairs stand as those of x do.

    Neighbours are taken for one complex number, whose product takes a quarter of the time.
    """
    if interleaved and are_numbers(x) and are_numbers(out):
        numbers, rotated = (torch.view_as_complex(y.unflatten(-1, (-1, 2))) for y in (x, out))
        torch.mul(numbers, torch.complex(cos, sin), out=rotated)
    else:
        rotate(pairs_of(x, interleaved), cos, sin, pairs_of(out, interleaved))


def by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, S, H W] -> [B, H, S, W], the same memory."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class RotatedTail(Function):
    """[B, S, H, W] -> [B, H, S, W], the last channels rotated by `apply_rotary`, the others as they are."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
        x = x.transpose(1, 2)
        nope = x.shape[-1] - 2 * cos.shape[-1]
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        out[..., :nope] = x[..., :nope]
        rotate(pairs_of(x[..., nope:], interleaved), cos, sin, pairs_of(out[..., nope:], False))
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.nope = interleaved, nope
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        (cos, sin), nope = ctx.saved_tensors, ctx.nope
        grad_x = torch.empty_like(grad.transpose(1, 2), memory_format=torch.contiguous_format)
        turned = grad_x.transpose(1, 2)
        turned[..., :nope] = grad[..., :nope]
        rotate(pairs_of(grad[..., nope:], False), cos, -sin, pairs_of(turned[..., nope:], ctx.interleaved))
        return grad_x, None, None, None


def attend_by_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, heads: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """softmax(q k^T * scaling) v where token i sees tokens up to i, a block of queries after the other: [B H, S, W]
    twice, [B H, S, value width] -> [B, S, H, value width], and the weights of each block.

    A block meets only the keys that some query of it sees, so that about half of the products remain.
    """
    length = query.shape[1]
    output = query.new_empty(len(query) // heads, length, heads, value.shape[-1])
    mask = query.new_full((min(BLOCK, length), length), float("-inf"))
    blocks = []
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        unseen = mask.triu(start + 1)[: end - start, :end]
        scores = torch.baddbmm(unseen, query[:, start:end], key[:, :end].mT, alpha=scaling)
        blocks.append(torch.softmax(scores, -1, out=scores))
        output[:, start:end] = torch.bmm(scores, value[:, :end]).unflatten(0, (-1, heads)).transpose(1, 2)
    return output, blocks


def attend_back(grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks, scaling):
    """The gradients of query, key and value of `attend_by_blocks` from that of its output."""
    grad = grad.transpose(1, 2).flatten(0, 1)
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for start, weights in zip(range(0, query.shape[1], BLOCK), blocks, strict=True):
        seen, rows = weights.shape[-1], slice(start, start + BLOCK)
        grad_value[:, :seen] += torch.bmm(weights.mT, grad[:, rows])
        grad_weights = torch.bmm(grad[:, rows], value[:, :seen].mT)
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(scaling)
        grad_query[:, rows] = torch.bmm(grad_scores, key[:, :seen])
        grad_key[:, :seen] += torch.bmm(grad_scores.mT, query[:, rows])
    return grad_query, grad_key, grad_value


class CausalAttention(Function):
    """softmax(q k^T * scaling) v where token i sees tokens up to i; the weights of all blocks are kept."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """[B, H, S, W], [B, H, S, W], [B, H, S, value width] -> [B, S, H, value width]."""
        ctx.scaling, ctx.heads = scaling, query.shape[:2]
        query, key, value = (states.flatten(0, 1) for states in (query, key, value))
        output, blocks = attend_by_blocks(query, key, value, scaling, ctx.heads[1])
        ctx.save_for_backward(query, key, value, *blocks)
        return output

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad: torch.Tensor):  # type: ignore[override]  # once_differentiable has no types
        query, key, value, *blocks = ctx.saved_tensors
        grads = attend_back(grad, query, key, value, blocks, ctx.scaling)
        return *(states.unflatten(0, ctx.heads) for states in grads), None


class LatentAttention(Function):
    """From the projections of queries and latents to the mixed values, as latent attention expands them.

    It stands for the norm of the latents, their up-projection, both rotations, the keys put together and
    `CausalAttention`. Widths of a head: n without position, r rotated, v of values; R of the latent.
    """

    @staticmethod
    def forward(ctx, query, rows, norm, up, cos, sin, widths: tuple[int, int, bool], eps: float, scaling: float):
        """[B, S, H (n + r)], [B, S, R + r], [R], [H (n + v), R], angles [B or 1, S, r / 2], (H, n, whether pairs are
        interleaved) -> [B, S, H v]."""
        heads, nope, interleaved = widths
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        latent, rope = rows[..., : len(norm)], rows[..., len(norm) :].unsqueeze(1)
        normed, scale = divided_by_rms(latent, eps)
        expanded = by_head(product(normed * norm, up), heads)
        queries = by_head(query, heads)
        query, key = queries.new_empty(queries.shape), queries.new_empty(queries.shape)
        query[..., :nope], key[..., :nope] = queries[..., :nope], expanded[..., :nope]
        rotate_alike(queries[..., nope:], cos, sin, query[..., nope:], interleaved)
        rotated = rope.new_empty(rope.shape)
        rotate_alike(rope, cos, sin, rotated, interleaved)
        key[..., nope:] = rotated
        query, key, value = (x.flatten(0, 1) for x in (query, key, expanded[..., nope:]))
        output, blocks = attend_by_blocks(query, key, value, scaling, heads)
        ctx.save_for_backward(norm, up, cos, sin, normed, scale, query, key, value, *blocks)
        ctx.widths, ctx.scaling = widths, scaling
        return output.flatten(2)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad: torch.Tensor):  # type: ignore[override]  # once_differentiable has no types
        norm, up, cos, sin, normed, scale, query, key, value, *blocks = ctx.saved_tensors
        heads, nope, interleaved = ctx.widths
        grads = attend_back(grad.unflatten(-1, (heads, -1)), query, key, value, blocks, ctx.scaling)
        by_query, by_key, by_value = (x.unflatten(0, (-1, heads)) for x in grads)
        rotary, values = by_key.shape[-1] - nope, by_value.shape[-1]
        batch, length, latents = normed.shape
        grad_query = grad.new_empty(batch, length, heads * (nope + rotary))
        grad_up_rows = grad.new_empty(batch, length, heads * (nope + values))
        grad_rows = grad.new_empty(batch, length, latents + rotary)
        queries, expanded = by_head(grad_query, heads), by_head(grad_up_rows, heads)
        queries[..., :nope] = by_query[..., :nope]
        expanded[..., :nope], expanded[..., nope:] = by_key[..., :nope], by_value
        rotate_alike(by_query[..., nope:], cos, -sin, queries[..., nope:], interleaved)
        by_rope = by_key[..., nope:].sum(1, keepdim=True)
        rotate_alike(by_rope, cos, -sin, grad_rows[..., latents:].unsqueeze(1), interleaved)
        grad_up = outer_product(grad_up_rows, normed * norm) if ctx.needs_input_grad[3] else None
        by_latent = product(grad_up_rows, up.T)
        grad_rows[..., :latents], grad_norm = through_rms(by_latent, normed, scale, norm)
        return grad_query, grad_rows, grad_norm, grad_up, None, None, None, None, None


class Linear(Function):
    """`nn.Linear` without a bias, with the products of products.py."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad: torch.Tensor):  # type: ignore[override]  # once_differentiable has no types
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        return product(grad, weight.T) if needs_x else None, outer_product(grad, x) if needs_weight else None


def clamped(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> Pairs:
    """gate at most L, and up within -L and L, as `layers.gated` has it."""
    return (gate, up) if limit is None else (gate.clamp(max=limit), up.clamp(-limit, limit))


def through_silu(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, silu: torch.Tensor, limit: float | None, out: Pairs
) -> None:
    """Write the gradients of gate and up from that of silu(gate) * up, clamped, into `out`, the last may be `grad`."""
    inner_gate, inner_up = clamped(gate, up, limit)
    grad_gate, grad_up = out
    torch.ops.aten.silu_backward.grad_input(grad * inner_up, inner_gate, grad_input=grad_gate)
    torch.mul(grad, silu, out=grad_up)
    if limit is not None:
        grad_gate.masked_fill_(gate > limit, 0.0)
        grad_up.masked_fill_(up.abs() > limit, 0.0)


class SwiGLU(Function):
    """`DeepSeekMLP` with SiLU and without biases; the products with gate and up are kept, and silu(gate)."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, gate_proj, up_proj, down_proj, limit: float | None = None) -> torch.Tensor:
        gate, up = product(x, gate_proj), product(x, up_proj)
        inner_gate, inner_up = clamped(gate, up, limit)
        silu = nn.functional.silu(inner_gate)
        ctx.save_for_backward(x, gate, up, silu, gate_proj, up_proj, down_proj)
        ctx.limit = limit
        return product(silu * inner_up, down_proj)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad: torch.Tensor):  # type: ignore[override]  # once_differentiable has no types
        x, gate, up, silu, gate_proj, up_proj, down_proj = ctx.saved_tensors
        needs_x, needs_gate, needs_up, needs_down, *_ = ctx.needs_input_grad
        grad_down = outer_product(grad, silu * clamped(gate, up, ctx.limit)[1]) if needs_down else None
        grad_gate, grad_up = torch.empty_like(gate), product(grad, down_proj.T)
        through_silu(grad_up, gate, up, silu, ctx.limit, out=(grad_gate, grad_up))
        grad_x = product(grad_gate, gate_proj.T).add_(product(grad_up, up_proj.T)) if needs_x else None
        grad_gate_proj = outer_product(grad_gate, x) if needs_gate else None
        return grad_x, grad_gate_proj, outer_product(grad_up, x) if needs_up else None, grad_down, None


class SortedExperts(Function):
    """`DeepSeekExperts` with SiLU, for pairs of a token and an expert that are sorted by expert; one expert after the
    other, whose rows are then still in the processor's cache when the next product asks for them.

    With a = silu(gate) * up and an expert's output w (a down^T), the gradient of a routing weight w is the dot product
    of a and (grad down), so that no output is kept. Rows that fill up an expert's are of the last token and weigh 0.
    """

    @staticmethod
    def forward(ctx, x, top_k_weights, gate_up_proj, down_proj, order, counts, limit=None) -> torch.Tensor:
        """[N, D], [N, K], weights of the experts, [P] pairs (token * K + choice), numbers of each expert -> [N, D]."""
        by_onednn = goes_by_onednn(x[: len(order) // len(counts)], gate_up_proj[0])
        if by_onednn:
            order, counts = padded(order, counts, top_k_weights.numel())
        multiply = product if by_onednn else nn.functional.linear  # never oneDNN for rows of any number
        tokens = (order // top_k_weights.shape[-1]).clamp_(max=len(x) - 1)
        weights = nn.functional.pad(top_k_weights.flatten(), (0, 1)).index_select(0, order).unsqueeze(-1)
        total = torch.zeros_like(x, dtype=full(x))
        kept: list[torch.Tensor] = []
        for own, weight, gate_up, down in of_experts(counts, tokens, weights, gate_up_proj, down_proj):
            joined = multiply(x.index_select(0, own), gate_up)  # [p, 2 I]
            gate, up = clamped(*pairs_of(joined, False), limit)
            silu = nn.functional.silu(gate)
            total.index_add_(0, own, multiply((silu * up).mul_(weight), down).to(total.dtype))
            kept += joined, silu
        ctx.save_for_backward(x, weights, gate_up_proj, down_proj, order, tokens, *kept)
        ctx.counts, ctx.choices, ctx.limit, ctx.by_onednn = counts, top_k_weights.shape, limit, by_onednn
        return total.to(x.dtype)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad: torch.Tensor):  # type: ignore[override]  # once_differentiable has no types
        x, weights, gate_up_proj, down_proj, order, tokens, *kept = ctx.saved_tensors
        needs_x, needs_choice, needs_gate_up, needs_down, *_ = ctx.needs_input_grad
        grad_x = torch.zeros_like(x, dtype=full(x)) if needs_x else None
        grad_gate_up = torch.empty_like(gate_up_proj) if needs_gate_up else None
        grad_down = torch.empty_like(down_proj) if needs_down else None
        found = weights.new_empty(len(order), 1)
        multiply = product if ctx.by_onednn else nn.functional.linear
        outer = outer_product if ctx.by_onednn else plain_outer_product
        experts = of_experts(ctx.counts, tokens, weights, gate_up_proj, down_proj, found, kept[::2], kept[1::2])
        for expert, (own, weight, gate_up, down, found_own, joined, silu) in enumerate(experts):
            gate, up = pairs_of(joined, False)
            inner, grad_outputs = silu * clamped(gate, up, ctx.limit)[1], grad.index_select(0, own)
            grad_inner = multiply(grad_outputs, down.mT)
            if needs_choice:
                torch.sum(grad_inner * inner, -1, keepdim=True, dtype=weights.dtype, out=found_own)
            if grad_down is not None:
                outer(grad_outputs, inner.mul_(weight), out=grad_down[expert])
            if grad_x is None and grad_gate_up is None:
                continue
            grad_joined = torch.empty_like(joined)
            through_silu(grad_inner.mul_(weight), gate, up, silu, ctx.limit, out=pairs_of(grad_joined, False))
            if grad_gate_up is not None:
                outer(grad_joined, x.index_select(0, own), out=grad_gate_up[expert])
            if grad_x is not None:
                grad_x.index_add_(0, own, multiply(grad_joined, gate_up.mT).to(grad_x.dtype))
        grad_weights = None
        if needs_choice:
            by_pair = weights.new_zeros(ctx.choices.numel() + 1).index_put_((order,), found.squeeze(-1))
            grad_weights = by_pair[:-1].view(ctx.choices)
        return None if grad_x is None else grad_x.to(x.dtype), grad_weights, grad_gate_up, grad_down, None, None, None


def of_experts(counts: list[int], tokens, weights, gate_up_proj, down_proj, *more):
    """What one expert has of each, after the other's; of what is a list already, its own member."""
    own_tokens, own_weights, *others = (
        part if isinstance(part, list) else part.split(counts) for part in (tokens, weights, *more)
    )
    return zip(own_tokens, own_weights, gate_up_proj.unbind(), down_proj.unbind(), *others, strict=True)


class LinearCrossEntropy(Function):
    """Sum of the cross entropies of hidden W^T against labels, whose logits are never whole.

    The gradient is computed in the forward, some rows at a time, while their logits are there.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """[N, D], [V, D], [N] with -100 where there is nothing to learn -> float32 sum."""
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=full(weight)) if needs_weight else None
        total = hidden.new_zeros((), dtype=full(hidden))
        for kept in (labels != -100).nonzero().squeeze(1).split(max(ROWS, SCORES // len(weight))):
            rows, targets = hidden[kept], labels[kept].unsqueeze(1)
            log_p = product(rows, weight).log_softmax(-1, dtype=total.dtype)
            total -= log_p.gather(1, targets).sum()
            grad = log_p.exp_().scatter_add_(1, targets, torch.full_like(targets, -1, dtype=log_p.dtype))
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[kept] = product(grad, weight.T)
            if grad_weight is not None:
                grad_weight += outer_product(grad, rows)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.dtype)
        return grad_hidden, grad_weight, None
