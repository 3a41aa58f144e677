"""Routers: which experts a token goes to, and with what weight.

    logits = x W^T                         float32, [N, E]
    scores = softmax, sigmoid or sqrt(softplus) of logits
    choice = scores with what the method adds or masks; the top K of choice are taken
    weight = the scores of those taken, normalised or scaled

| generation       | scores  | method              | choice                                                       |
|------------------|---------|---------------------|--------------------------------------------------------------|
| MoE-16B, V2-Lite | softmax | greedy              | scores                                                       |
| V2, V2.5         | softmax | group_limited_greedy| scores in the topk_group groups with the best expert, else 0 |
| V3, R1           | sigmoid | noaux_tc            | scores + bias in the topk_group groups with the best sum of  |
|                  |         |                     | their two best, else -inf                                    |
| V4               | sqrt of softplus | noaux_tc   | scores + bias; one group                                     |
| V4, first layers | same    | -                   | what a table has for the token's id; weights as before       |
| V4.1             | same    | noaux_tc            | scores + bias, another bias for tokens of images; one group  |

DeepSeekMoE (arXiv 2401.06066, eq. 3-5), DeepSeek-V2 (2405.04434, section 2.2.2), DeepSeek-V3 (2412.19437, eq. 12-16),
DeepSeek-V4's report, section 2.1.
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from .layers import Float32Buffers, without_autocast
from .weight_names import CheckpointError


def keep_best_groups(choice: torch.Tensor, num_groups: int, top_groups: int, best: int, fill: float) -> torch.Tensor:
    """Replace by `fill` what lies outside of the best groups of experts.

    Args:
        choice: [N, E], experts of a group side by side.
        num_groups, top_groups: groups there are, and groups to keep.
        best: a group is ranked by the sum of so many of its best experts.
        fill: the value outside.
    """
    if top_groups == num_groups:
        return choice
    grouped = choice.unflatten(-1, (num_groups, -1))  # [N, G, E / G]
    group_scores = grouped.topk(best, dim=-1).values.sum(-1)  # [N, G]
    best_groups = group_scores.topk(top_groups, dim=-1, sorted=False).indices
    # Of numbers, for a saved trace of torch.jit can't be read where a boolean is scattered.
    is_left_out = torch.ones_like(group_scores).scatter(-1, best_groups, 0.0).bool()
    return grouped.masked_fill(is_left_out.unsqueeze(-1), fill).flatten(-2)


def choose_greedy(router: nn.Module, scores: torch.Tensor) -> torch.Tensor:
    """The scores themselves."""
    return scores


def choose_group_limited(router: nn.Module, scores: torch.Tensor) -> torch.Tensor:
    """Scores inside of the groups with the best expert."""
    return keep_best_groups(scores, router.n_group, router.topk_group, best=1, fill=0.0)


def choose_with_bias(router: nn.Module, scores: torch.Tensor) -> torch.Tensor:
    """Scores plus correction bias inside of the groups with the best pair. The bias only chooses, it never weighs."""
    return choose_by(router, scores + router.e_score_correction_bias)


def choose_by(router: nn.Module, biased: torch.Tensor) -> torch.Tensor:
    """What is biased already, inside of the groups with the best pair."""
    return keep_best_groups(biased, router.n_group, router.topk_group, best=2, fill=float("-inf"))


def sqrt_softplus(logits: torch.Tensor) -> torch.Tensor:
    """sqrt(log(1 + e^x)). Below the least normal number it stays there, for the root of 0 has no gradient."""
    return F.softplus(logits).clamp_min(torch.finfo(logits.dtype).tiny).sqrt()


SCORING_FUNCTIONS = {
    "softmax": partial(torch.softmax, dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": sqrt_softplus,
}
CHOICES = {
    "greedy": choose_greedy,
    "group_limited_greedy": choose_group_limited,
    "noaux_tc": choose_with_bias,
}


class DeepSeekTopKRouter(Float32Buffers):
    """The gate of a mixture-of-experts layer. `weight` is [E, D]; with noaux_tc also `e_score_correction_bias` [E]."""

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.score = SCORING_FUNCTIONS[config.scoring_func]
        self.choose = CHOICES[config.topk_method]
        self.n_group, self.topk_group = config.n_group, config.topk_group
        # V2's released code leaves a single weight as it is, and scales only weights that it does not normalise; V3's
        # formula (eq. 13) normalises and scales all.
        is_softmax = config.scoring_func == "softmax"
        self.normalize = config.norm_topk_prob and (not is_softmax or self.top_k > 1)
        scales = not is_softmax or not self.normalize
        self.routed_scaling_factor = config.routed_scaling_factor if scales else 1.0
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.hold_choice(config)

    def hold_choice(self, config) -> None:
        """Register what the choice needs beside the scores."""
        if config.topk_method == "noaux_tc":
            # float32 even in a bfloat16 model: there an update of 0.001 to a bias near 1 is lost.
            bias = torch.zeros(config.n_routed_experts, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", bias)

    def chosen(self, scores: torch.Tensor, input_ids: torch.Tensor | None) -> torch.Tensor:
        """[N, E] -> indices of the chosen experts [N, K]."""
        return self.choose(self, scores).topk(self.top_k, dim=-1, sorted=False).indices

    def forward(
        self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[N, D] -> router logits [N, E] (float32), weights [N, K] (float32), expert indices [N, K].

        Args:
            input_ids: N token ids in any shape; read where tokens of images, or of one id, have a choice of their own.
        """
        with without_autocast(hidden_states):
            # float32: rounded scores flip the choice of experts
            logits = F.linear(hidden_states.float(), self.weight.float())
            scores = self.score(logits)
            indices = self.chosen(scores, input_ids)
            weights = scores.gather(-1, indices)
            if self.normalize:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
            return logits, weights * self.routed_scaling_factor, indices

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> top {self.top_k} of {self.weight.shape[0]}"


class DeepSeekImageRouter(DeepSeekTopKRouter):
    """The gate with a bias of their own, `e_score_correction_bias_vl` [E], for the tokens of images."""

    def hold_choice(self, config) -> None:
        """Register both biases."""
        super().hold_choice(config)
        self.image = config.image_token_id
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias_vl", bias)

    def chosen(self, scores: torch.Tensor, input_ids: torch.Tensor | None) -> torch.Tensor:
        """As above; without ids every token is text."""
        if input_ids is None:
            return super().chosen(scores, None)
        is_image = (input_ids == self.image).flatten().unsqueeze(-1)
        bias = torch.where(is_image, self.e_score_correction_bias_vl, self.e_score_correction_bias)
        return choose_by(self, scores + bias).topk(self.top_k, dim=-1, sorted=False).indices


class DeepSeekHashRouter(DeepSeekTopKRouter):
    """Experts by the token's id, out of the frozen table `tid2eid` [V, K]; the weights are learned as elsewhere."""

    def hold_choice(self, config) -> None:
        """Register the table. A checkpoint brings its own; a new model takes neighbours, all experts equally often."""
        first = 7919 * torch.arange(config.vocab_size)  # a prime, so that neighbouring ids go apart
        table = (first.unsqueeze(-1) + torch.arange(self.top_k)) % config.n_routed_experts
        self.register_buffer("tid2eid", table)

    def chosen(self, scores: torch.Tensor, input_ids: torch.Tensor | None) -> torch.Tensor:
        """[N, E] -> what the table has for N token ids, [N, K].

        Raises:
            ValueError: without ids; on a CPU for an id that the table hasn't.
        """
        if input_ids is None:
            raise ValueError("hash layers choose experts by the token's id: give input_ids, not inputs_embeds")
        ids = input_ids.flatten()
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere the look would wait
            self.refuse_unknown(ids)
        return self.tid2eid[ids].long()

    def refuse_unknown(self, ids: torch.Tensor) -> None:
        """Raise ValueError for ids outside of the table."""
        least, largest = (int(x) for x in torch.aminmax(ids)) if ids.numel() else (0, 0)
        rows = self.tid2eid.shape[0]
        if least < 0 or largest >= rows:
            wrong = least if least < 0 else largest
            raise ValueError(f"token id {wrong} has no row in tid2eid, whose ids are 0 to {rows - 1}; add its row")


def refuse_bad_tables(model: nn.Module) -> None:
    """Raise CheckpointError for a hash layer whose table names experts that aren't there, as a damaged file's may."""
    for name, module in model.named_modules():
        if isinstance(module, DeepSeekHashRouter) and not module.tid2eid.is_meta:
            least, largest = (int(x) for x in torch.aminmax(module.tid2eid))
            experts = module.weight.shape[0]
            if least < 0 or largest >= experts:
                wrong = least if least < 0 else largest
                raise CheckpointError(
                    f"{name}.tid2eid names expert {wrong}, but n_routed_experts={experts}; copy the checkpoint again"
                )
