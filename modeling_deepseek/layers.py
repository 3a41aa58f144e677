"""The small parts of a block: RMSNorm, the SwiGLU feed-forward, buffers that stay float32."""

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from transformers.activations import ACT2FN, SiLUActivation

from .fused import Linear, RMSNorm, SwiGLU, is_trained, is_trained_as_it_is
from .products import goes_by_onednn


def is_traced() -> bool:
    """Whether this call makes a graph that is to run without Python: by torch.export, or torch.jit.trace."""
    is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.6 hasn't the first
    return torch.jit.is_tracing() or is_exporting()


def without_autocast(x: torch.Tensor) -> AbstractContextManager:
    """What keeps autocast from changing types on the device of x: nothing where it is off, for entering takes time."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def has_hooks(module: nn.Module) -> bool:
    """Whether something listens to the calls of the module, or stands in for them."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    of_all = (_global_forward_hooks, _global_forward_pre_hooks, _global_backward_hooks, _global_backward_pre_hooks)
    return any(hooks) or "forward" in vars(module) or any(of_all)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module is a Linear whose weight alone says what it does: no wrapper, hook or replaced forward."""
    return (
        type(module) is nn.Linear
        and type(module.weight) in (nn.Parameter, torch.Tensor)
        and not module.weight.is_meta
        and module.bias is None
        and not has_hooks(module)
    )


def project(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """linear(x), in training by faster products where there are any."""
    if is_trained_as_it_is(linear, x) and is_plain_linear(linear):
        weight = cast(torch.Tensor, linear.weight)
        if goes_by_onednn(x, weight):
            return Linear.apply(x, weight)
    return linear(x)


def is_plain_silu(activation: nn.Module) -> bool:
    return type(activation) in (nn.SiLU, SiLUActivation) and not has_hooks(activation)


class DeepSeekRMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    The division is done in float32; V1 to V3.2 multiply by the weight after casting back to the input's type.
    """

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., width], in the input's type."""
        if is_trained(self, hidden_states, self.weight):
            return RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.variance_epsilon}"


def is_plain_norm(module: nn.Module) -> bool:
    """Whether the module is a norm whose weight alone says what it does, as `is_plain_linear`."""
    return type(module) is DeepSeekRMSNorm and not has_hooks(module)


class DeepSeekFloat32RMSNorm(DeepSeekRMSNorm):
    """As V4 has it: multiplied by the weight in float32 too, and rounded once."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., width], in the input's type."""
        return (self.weight.float() * unit_rms(hidden_states.float(), self.variance_epsilon)).to(hidden_states.dtype)


def norm_of(config) -> DeepSeekRMSNorm:
    """The norm over the hidden width, of the config's kind."""
    kind = DeepSeekFloat32RMSNorm if config.norms_in_float32 else DeepSeekRMSNorm
    return kind(config.hidden_size, config.rms_norm_eps)


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, which stays, in float32."""
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)


def unit_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, the factor in float32."""
    return x * inverse_rms(x, eps).to(x.dtype)


class Float32Buffers(nn.Module):
    """Base of modules whose buffers stay float32: `.to(bfloat16)` or `.half()` of the model casts weights only."""

    def _apply(self, fn, recurse=True):
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.dtype != kept[name].dtype:
                self._buffers[name] = kept[name].to(buffer.device)
        return self


def gated(act_fn, gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> torch.Tensor:
    """act(gate) * up; with a limit L (V4: 10) gate is at most L, and up within -L and L."""
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return act_fn(gate) * up


def embedded(table: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """[B, S] token ids -> [B, S, D].

    Raises:
        ValueError: for an id without a row; on an accelerator its own error comes, since a look would wait for it.
    """
    if is_traced() or torch.compiler.is_compiling():
        return table(input_ids)
    try:
        return table(input_ids)
    except IndexError:
        rows = table.weight.shape[0]
        wrong = input_ids[(input_ids < 0) | (input_ids >= rows)]
        if not wrong.numel():
            raise
        raise ValueError(
            f"input_ids hold {int(wrong[0])}, but the model's tokens are 0 to {rows - 1} (vocab_size={rows}); give "
            "ids of its own tokenizer, or resize_token_embeddings"
        ) from None


class DeepSeekMLP(nn.Module):
    """SwiGLU feed-forward (arXiv 2002.05202): down(act(gate(x)) * up(x)). Dense layers and shared experts."""

    def __init__(self, config, intermediate_size: int | None = None, may_have_bias: bool = True):
        super().__init__()
        width, bias = intermediate_size or config.intermediate_size, config.mlp_bias and may_have_bias
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=bias)
        self.act_fn, self.limit = ACT2FN[config.hidden_act], config.swiglu_limit

    def forward(self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None = None) -> torch.Tensor:
        """[..., D] -> [..., D]; input_ids are for hash layers alone."""
        parts = self.gate_proj, self.up_proj, self.down_proj
        is_plain = is_plain_silu(self.act_fn) and all(map(is_plain_linear, parts))
        if is_plain and is_trained_as_it_is(self, hidden_states):
            return SwiGLU.apply(hidden_states, *(part.weight for part in parts), self.limit)
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        return self.down_proj(gated(self.act_fn, gate, up, self.limit))
