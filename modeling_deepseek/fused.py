"""Backward passes written by hand, for training: where autograd would make many small operations, or keep a large
array for no need.

Each class says in its docstring which plain code it stands for; that code stays where it is used, and serves wherever
`is_trained` says no: inference, GPUs, compiled or exported graphs, torch.func, tensors that are distributed. None of
them can be differentiated twice. Letters: B batch, H heads, S tokens, W head width, N tokens of all sequences, P pairs
of a token and an expert, E experts, D hidden width, I inner width of a feed-forward, V vocabulary.
"""

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .products import goes_by_onednn, outer_product, padded, product

BLOCK = 64  # queries that CausalAttention treats at once
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


def full(x: torch.Tensor) -> torch.dtype:
    """The type to add up in: float32, or that of x if it has more bits."""
    return torch.promote_types(x.dtype, torch.float32)


class RMSNorm(Function):
    """`DeepSeekRMSNorm`: x / sqrt(mean(x^2) + eps) * weight.

    With n = x / sqrt(...) and g = grad * weight, the gradient of x is (g - n mean(g n)) / sqrt(...).
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=full(x)).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x * scale  # in the type of scale
        ctx.save_for_backward(normed, scale, weight)
        ctx.dtype = x.dtype
        return weight * normed.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        normed, scale, weight = ctx.saved_tensors
        by_normed = grad * normed
        grad_weight = by_normed.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        mean = by_normed.mul_(weight).mean(-1, keepdim=True)
        grad_x = torch.addcmul((grad * weight).to(normed.dtype), normed, mean, value=-1).mul_(scale)
        return grad_x.to(ctx.dtype), grad_weight, None


Pairs = tuple[torch.Tensor, torch.Tensor]


def rotate(pairs: Pairs, cos: torch.Tensor, sin: torch.Tensor, out: Pairs) -> None:
    """Write the rotated pairs into `out`."""
    (first, second), (new_first, new_second) = pairs, out
    torch.mul(first, cos, out=new_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=new_second).addcmul_(first, sin)


def pairs_of(x: torch.Tensor, interleaved: bool) -> Pairs:
    """[..., W] -> the first members of all pairs and the second ones, [..., W / 2] each."""
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return first, second


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
        by_head = grad_x.transpose(1, 2)
        by_head[..., :nope] = grad[..., :nope]
        rotate(pairs_of(grad[..., nope:], False), cos, -sin, pairs_of(by_head[..., nope:], ctx.interleaved))
        return grad_x, None, None, None


class CausalAttention(Function):
    """softmax(q k^T * scaling) v where token i sees tokens up to i; by blocks of queries, whose weights are kept.

    A block meets only the keys that some query of it sees, so that about half of the products remain.
    """

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """[B, H, S, W], [B, H, S, W], [B, H, S, value width] -> [B, S, H, value width]."""
        batch, heads, length, _ = query.shape
        query, key, value = (states.flatten(0, 1) for states in (query, key, value))
        output = query.new_empty(batch, length, heads, value.shape[-1])
        mask = query.new_full((BLOCK, length), float("-inf"))
        blocks = []
        for start in range(0, length, BLOCK):
            end = min(start + BLOCK, length)
            unseen = mask.triu(start + 1)[: end - start, :end]
            scores = torch.baddbmm(unseen, query[:, start:end], key[:, :end].transpose(1, 2), alpha=scaling)
            blocks.append(torch.softmax(scores, -1, out=scores))
            mixed = torch.bmm(scores, value[:, :end])
            output[:, start:end] = mixed.unflatten(0, (batch, heads)).transpose(1, 2)
        ctx.save_for_backward(query, key, value, *blocks)
        ctx.scaling, ctx.heads = scaling, (batch, heads)
        return output

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, grad: torch.Tensor):  # type: ignore[override]  # once_differentiable has no types
        query, key, value, *blocks = ctx.saved_tensors
        grad = grad.transpose(1, 2).flatten(0, 1)
        grad_query, grad_key, grad_value = (torch.empty_like(states) for states in (query, key, value))
        beta = 0  # the last block, which is the first here, sees all keys and overwrites; the others add
        for start in range((len(blocks) - 1) * BLOCK, -1, -BLOCK):
            weights, own = blocks.pop(), grad[:, start : start + BLOCK]
            seen = weights.shape[-1]
            grad_value[:, :seen].baddbmm_(weights.transpose(1, 2), own, beta=beta)
            grad_scores = torch.bmm(own, value[:, :seen].transpose(1, 2)).mul_(weights)
            grad_scores.addcmul_(weights, grad_scores.sum(-1, keepdim=True), value=-1)
            grad_query[:, start : start + BLOCK] = torch.bmm(grad_scores, key[:, :seen]).mul_(ctx.scaling)
            rows = query[:, start : start + BLOCK]
            grad_key[:, :seen].baddbmm_(grad_scores.transpose(1, 2), rows, beta=beta, alpha=ctx.scaling)
            beta = 1
        return *(states.unflatten(0, ctx.heads) for states in (grad_query, grad_key, grad_value)), None


class Linear(Function):
    """`nn.Linear` without a bias, with the products of products.py."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, grad: torch.Tensor):  # type: ignore[override]  # once_differentiable has no types
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        return product(grad, weight.T) if needs_x else None, outer_product(grad, x) if needs_weight else None


def clamped(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> Pairs:
    """gate at most L, and up within -L and L, as `layers.gated` has it."""
    return (gate, up) if limit is None else (gate.clamp(max=limit), up.clamp(-limit, limit))


def through_silu(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, silu: torch.Tensor, limit: float | None
) -> Pairs:
    """The gradients of gate and up from that of silu(gate) * up, clamped, which is overwritten."""
    inner_gate, inner_up = clamped(gate, up, limit)
    grad_gate, grad_up = torch.ops.aten.silu_backward(grad * inner_up, inner_gate), grad.mul_(silu)
    if limit is not None:
        grad_gate, grad_up = grad_gate.masked_fill_(gate > limit, 0.0), grad_up.masked_fill_(up.abs() > limit, 0.0)
    return grad_gate, grad_up


class SwiGLU(Function):
    """`DeepSeekMLP` with SiLU and without biases; only the products with gate and up are kept."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, gate_proj, up_proj, down_proj, limit: float | None = None) -> torch.Tensor:
        gate, up = product(x, gate_proj), product(x, up_proj)
        ctx.save_for_backward(x, gate, up, gate_proj, up_proj, down_proj)
        ctx.limit = limit
        gate, up = clamped(gate, up, limit)
        return product(nn.functional.silu(gate).mul_(up), down_proj)

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, grad: torch.Tensor):  # type: ignore[override]  # once_differentiable has no types
        x, gate, up, gate_proj, up_proj, down_proj = ctx.saved_tensors
        needs_x, needs_gate, needs_up, needs_down, *_ = ctx.needs_input_grad
        inner_gate, inner_up = clamped(gate, up, ctx.limit)
        silu = nn.functional.silu(inner_gate)
        grad_down = outer_product(grad, silu * inner_up) if needs_down else None
        grad_gate, grad_up = through_silu(product(grad, down_proj.T), gate, up, silu, ctx.limit)
        grad_x = product(grad_gate, gate_proj.T).add_(product(grad_up, up_proj.T)) if needs_x else None
        grad_gate_proj = outer_product(grad_gate, x) if needs_gate else None
        return grad_x, grad_gate_proj, outer_product(grad_up, x) if needs_up else None, grad_down, None


def products(rows: torch.Tensor, weights: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Each expert's rows, so many of [P, in], times its matrix in [E, out, in] -> [P, out]."""
    pairs = [pair for pair in zip(rows.split(counts), weights.unbind(), strict=True) if len(pair[0])]
    return torch.cat([product(*pair) for pair in pairs]) if pairs else rows.new_empty(0, weights.shape[1])


def outer_products(grad: torch.Tensor, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """[P, out], [P, in] -> [E, out, in], the sum over each expert's rows of their outer products."""
    return torch.stack([outer_product(*own) for own in zip(grad.split(counts), rows.split(counts), strict=True)])


class SortedExperts(Function):
    """`DeepSeekExperts` with SiLU, for pairs of a token and an expert that are sorted by expert.

    With a = silu(gate) * up and an expert's output w (a down^T), the gradient of a routing weight w is the dot product
    of a and (grad down), so that no output is kept. Rows that fill up an expert's are of the last token and weigh 0.
    """

    @staticmethod
    def forward(ctx, x, top_k_weights, gate_up_proj, down_proj, order, counts, limit=None) -> torch.Tensor:
        """[N, D], [N, K], weights of the experts, [P] pairs (token * K + choice), numbers of each expert -> [N, D]."""
        if goes_by_onednn(x[: len(order) // len(counts)], gate_up_proj[0]):
            order, counts = padded(order, counts, top_k_weights.numel())
        tokens = (order // top_k_weights.shape[-1]).clamp_(max=len(x) - 1)
        weights = nn.functional.pad(top_k_weights.flatten(), (0, 1)).index_select(0, order).unsqueeze(-1)
        joined = products(x.index_select(0, tokens), gate_up_proj, counts)  # [P, 2 I]
        gate, up = joined.chunk(2, dim=-1)
        gate, up = clamped(gate, up, limit)
        inner = nn.functional.silu(gate).mul_(up).mul_(weights)
        ctx.save_for_backward(x, weights, gate_up_proj, down_proj, order, tokens, joined)
        ctx.counts, ctx.choices, ctx.limit = counts, top_k_weights.shape, limit
        return sum_by_token(products(inner, down_proj, counts), tokens, x)

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, grad: torch.Tensor):  # type: ignore[override]  # once_differentiable has no types
        x, weights, gate_up_proj, down_proj, order, tokens, joined = ctx.saved_tensors
        needs_x, needs_choice, needs_gate_up, needs_down, *_ = ctx.needs_input_grad
        gate, up = joined.chunk(2, dim=-1)
        inner_gate, inner_up = clamped(gate, up, ctx.limit)
        silu = nn.functional.silu(inner_gate)
        inner, grad_outputs = silu * inner_up, grad.index_select(0, tokens)
        grad_inner = products(grad_outputs, down_proj.mT, ctx.counts)
        grad_weights = grad_x = grad_gate_up = grad_down = None
        if needs_choice:
            found = (grad_inner * inner).sum(-1, dtype=weights.dtype)
            by_pair = weights.new_zeros(ctx.choices.numel() + 1).index_put_((order,), found)
            grad_weights = by_pair[:-1].view(ctx.choices)
        if needs_down:
            grad_down = outer_products(grad_outputs, inner.mul_(weights), ctx.counts)
        if needs_x or needs_gate_up:
            grad_joined = torch.cat(through_silu(grad_inner.mul_(weights), gate, up, silu, ctx.limit), dim=-1)
        if needs_gate_up:
            grad_gate_up = outer_products(grad_joined, x.index_select(0, tokens), ctx.counts)
        if needs_x:
            grad_x = sum_by_token(products(grad_joined, gate_up_proj.mT, ctx.counts), tokens, x)
        return grad_x, grad_weights, grad_gate_up, grad_down, None, None, None


def sum_by_token(outputs: torch.Tensor, tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[P, D], [P] -> [N, D], added up in float32 at least."""
    total = torch.zeros_like(like, dtype=full(like))
    return total.index_add_(0, tokens, outputs.to(total.dtype)).to(like.dtype)


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
