"""Mixture of experts (DeepSeekMoE, arXiv 2401.06066): routed experts chosen per token, plus shared experts for all.

Experts are stored fused, one tensor per projection for all of them, and run by transformers' experts interface
(`experts_implementation`: eager, batched_mm, grouped_mm, ...). Checkpoints hold them one by one; see
checkpoint_keys.py. Letters: N tokens, E experts, K experts per token, D hidden width, I expert width.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, use_experts_implementation

from .checkpoint_keys import fuse_expert_keys
from .fused import SortedExperts, is_trained_as_it_is
from .layers import DeepSeekMLP, gated, is_plain_silu, is_traced
from .routers import DeepSeekHashRouter, DeepSeekImageRouter, DeepSeekTopKRouter


def sorted_pairs(top_k_index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, list[int]]:
    """[N, K] expert indices -> the pairs (token * K + choice) of one expert side by side, [P], and how many each
    expert has. Those of an index of E (expert parallelism's "elsewhere") are left out."""
    expert_of_pair, order = top_k_index.flatten().sort(stable=True)
    counts = torch.bincount(expert_of_pair, minlength=num_experts)[:num_experts].tolist()
    return order[: sum(counts)], counts


def grouped_mm(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' implementation of that word; training on a CPU goes by `SortedExperts`, which is faster there."""
    weights = experts.gate_up_proj, experts.down_proj
    if is_plain_silu(experts.act_fn) and is_trained_as_it_is(experts, hidden_states, top_k_weights, *weights):
        order, counts = sorted_pairs(top_k_index, experts.num_experts)
        rows = hidden_states.to(weights[0].dtype)
        output = SortedExperts.apply(rows, top_k_weights, *weights, order, counts, experts.limit)
        return output.to(hidden_states.dtype)
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden_states, top_k_index, top_k_weights)


EXPERTS_FUNCTIONS = ExpertsInterface()
EXPERTS_FUNCTIONS["grouped_mm"] = grouped_mm


@use_experts_implementation(experts_interface=EXPERTS_FUNCTIONS)
class DeepSeekExperts(nn.Module):
    """The routed experts of one layer: SwiGLU e is down_proj[e] (act(gate) * up), gate and up in gate_up_proj[e]."""

    def __init__(self, config):
        super().__init__()
        experts, width, expert_width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts = experts
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * expert_width, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, expert_width))
        self.act_fn, self.limit = ACT2FN[config.hidden_act], config.swiglu_limit

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[..., 2 I] -> [..., I]; transformers' implementations call it by this name."""
        gate, up = gate_up.chunk(2, dim=-1)
        return gated(self.act_fn, gate, up, self.limit)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Eager form: a loop over the experts that some token chose; in a graph that is to leave Python, over none.

        Args:
            hidden_states: [N, D].
            top_k_index: [N, K] expert indices; an index of E (expert parallelism's "elsewhere") is skipped.
            top_k_weights: [N, K].

        Returns:
            [N, D], the weighted sum over each token's experts.
        """
        if is_traced():
            return self.forward_of_all(hidden_states, top_k_index, top_k_weights)
        order, counts = sorted_pairs(top_k_index, self.num_experts)
        tokens, weights = order // top_k_index.shape[-1], top_k_weights.flatten()[order].unsqueeze(-1)
        chunks = hidden_states[tokens].split([count for count in counts if count])
        chosen = [expert for expert, count in enumerate(counts) if count]
        outputs = torch.cat([self.one_expert(x, expert) for x, expert in zip(chunks, chosen, strict=True)])
        return torch.zeros_like(hidden_states).index_add(0, tokens, (outputs * weights).to(hidden_states.dtype))

    def forward_of_all(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As `forward`, with every token through every expert: no shape hangs on who chose whom."""
        elsewhere = self.num_experts
        weights = top_k_weights.new_zeros(hidden_states.shape[0], elsewhere + 1)
        weights = weights.scatter_add(1, top_k_index, top_k_weights)[:, :elsewhere]  # [N, E]
        inner = self._apply_gate(hidden_states @ self.gate_up_proj.transpose(1, 2))  # [E, N, I]
        outputs = inner @ self.down_proj.transpose(1, 2)  # [E, N, D]
        return (outputs * weights.T.unsqueeze(-1)).sum(0).to(hidden_states.dtype)

    def one_expert(self, hidden_states: torch.Tensor, expert: int) -> torch.Tensor:
        """[n, D] -> [n, D] through one expert."""
        return F.linear(self._apply_gate(F.linear(hidden_states, self.gate_up_proj[expert])), self.down_proj[expert])

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # Trainer's resume and load_best_model_at_end hand a checkpoint with one tensor per expert to load_state_dict,
        # past transformers' conversion; unfused keys would leave the experts untouched.
        fuse_expert_keys(state_dict, prefix, self.num_experts)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class DeepSeekLinearExperts(nn.ModuleList):
    """The same as a SwiGLU of linear layers for each expert, `3.gate_proj` and so on: what changes linear layers, as
    quantization does, finds them."""

    def __init__(self, config):
        width, experts = config.moe_intermediate_size, range(config.n_routed_experts)
        super().__init__(DeepSeekMLP(config, width, may_have_bias=False) for _ in experts)
        self.num_experts = config.n_routed_experts

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As `DeepSeekExperts.forward`; in a graph that is to leave Python every token goes through every expert."""
        if is_traced():
            weights = top_k_weights.new_zeros(hidden_states.shape[0], self.num_experts + 1)
            weights = weights.scatter_add(1, top_k_index, top_k_weights)
            parts = [expert(hidden_states) * weights[:, e, None] for e, expert in enumerate(self)]
            return torch.stack(parts).sum(0).to(hidden_states.dtype)
        order, counts = sorted_pairs(top_k_index, self.num_experts)
        tokens, weights = order // top_k_index.shape[-1], top_k_weights.flatten()[order].unsqueeze(-1)
        chunks = hidden_states[tokens].split(counts)
        chosen = [expert(rows) for rows, expert in zip(chunks, self, strict=True) if len(rows)]
        weighed = (torch.cat(chosen) * weights).to(hidden_states.dtype)
        return torch.zeros_like(hidden_states).index_add(0, tokens, weighed)


class DeepSeekMoE(nn.Module):
    """Routed experts by the gate's choice, plus the shared experts (one SwiGLU of their joint width)."""

    def __init__(self, config):
        super().__init__()
        self.gate = self.router_class(config)(config)
        self.experts = (DeepSeekExperts if config.fused_experts else DeepSeekLinearExperts)(config)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = DeepSeekMLP(config, config.shared_expert_width)

    def router_class(self, config) -> type[DeepSeekTopKRouter]:
        """The router of such a layer."""
        has_images = config.image_token_id is not None and config.topk_method == "noaux_tc"
        return DeepSeekImageRouter if has_images else DeepSeekTopKRouter

    def forward(self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None = None) -> torch.Tensor:
        """[B, S, D], and for hash layers token ids [B, S] -> [B, S, D]."""
        tokens = hidden_states.flatten(0, -2)  # [N, D]
        _, weights, indices = self.gate(tokens, input_ids)
        output = self.experts(tokens, indices, weights).view_as(hidden_states)
        return output if self.shared_experts is None else output + self.shared_experts(hidden_states)


class DeepSeekHashMoE(DeepSeekMoE):
    """The same, with the experts of a token chosen by its id (V4's first layers)."""

    def router_class(self, config) -> type[DeepSeekTopKRouter]:
        """As above."""
        return DeepSeekHashRouter
