"""Equal load of the experts without a loss: the bias of V3's router, moved after each step.

arXiv 2408.15664, and DeepSeek-V3, arXiv 2412.19437, section 2.1.2:

    b_e <- b_e + gamma sign(mean over the experts of their tokens - tokens of e)

The tokens are those of the whole step: all micro-batches and processes, padding left out. The bias only chooses
experts, it never weighs them, and is a buffer of the model, so that it is saved and resumed with it. V4.1 has a second
one for the tokens of images, which is moved by their load alone, and the first by that of the others. The tokens of
draft stages (dspark.py) are their blocks', of which none counts as padding or as an image's.
"""

from typing import Any, cast

import torch
from torch import nn
from transformers import TrainerCallback

from modeling_deepseek.dspark import DraftStage
from modeling_deepseek.routers import DeepSeekImageRouter, DeepSeekTopKRouter

BIAS, IMAGE_BIAS = "e_score_correction_bias", "e_score_correction_bias_vl"


class BalanceExperts(TrainerCallback):
    """Counts the tokens of each expert in training forwards, and moves the biases at the end of each step.

    Args:
        speed: gamma; V3 was trained with 0.001.

    Raises:
        ValueError: for a model without such routers.
    """

    def __init__(self, model: nn.Module, speed: float) -> None:
        self.speed, self.pad = speed, getattr(model.config, "pad_token_id", None)
        self.is_token: torch.Tensor | None = None  # [N], which tokens of this forward aren't padding
        self.image = getattr(model.config, "image_token_id", None)
        self.is_image: torch.Tensor | None = None  # [N], which are of images
        self.routers = [
            module
            for module in model.modules()
            if isinstance(module, DeepSeekTopKRouter) and hasattr(module, "e_score_correction_bias")
        ]
        if not self.routers:
            raise ValueError(
                f"--router_bias_update {speed:g}: no router of this model has a bias that chooses; leave it out, or "
                'take topk_method "noaux_tc" and this package\'s classes.'
            )
        self.drafting = {
            router for stage in model.modules() if isinstance(stage, DraftStage) for router in stage.modules()
        }
        # of each router, and again of those that use a bias for images
        self.biases = [(router, BIAS) for router in self.routers]
        images = [router for router in self.routers if isinstance(router, DeepSeekImageRouter)]
        self.biases += [(router, IMAGE_BIAS) for router in images if router not in self.drafting]
        self.counts = [torch.zeros_like(cast(torch.Tensor, getattr(router, name))) for router, name in self.biases]
        self.max_violation = torch.zeros(())  # of the latest step, mean over the layers: busiest expert / mean - 1
        model.register_forward_pre_hook(self._see_tokens, with_kwargs=True)
        for number, (router, name) in enumerate(self.biases):
            router.register_forward_hook(lambda *call, number=number, name=name: self._count(number, name, *call))

    def _see_tokens(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.is_token = None if ids is None or self.pad is None else (ids != self.pad).flatten()
        self.is_image = None if ids is None or self.image is None else (ids == self.image).flatten()

    def _count(self, number: int, name: str, router: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        if not router.training or (name == IMAGE_BIAS and self.is_image is None):  # without ids all are text
            return
        chosen = outputs[2]  # [N, K]
        weights = torch.ones_like(chosen, dtype=torch.float32)
        for is_counted in () if router in self.drafting else (self.is_token, self._is_of(name)):
            if is_counted is not None and len(is_counted) == len(chosen):
                weights = weights * is_counted.unsqueeze(-1).to(weights.device)
        self.counts[number] = self.counts[number].to(chosen.device).scatter_add(0, chosen.flatten(), weights.flatten())

    def _is_of(self, name: str) -> torch.Tensor | None:
        """[N], which tokens a bias chooses for; `None`: all."""
        return self.is_image if self.is_image is None or name == IMAGE_BIAS else ~self.is_image

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        together = torch.cat(self.counts)  # one after the other, for layers may have different numbers of experts
        if args.world_size > 1:
            torch.distributed.all_reduce(together)
        counts = together.split([len(count) for count in self.counts])
        for (router, name), count in zip(self.biases, counts, strict=True):
            bias = cast(torch.Tensor, getattr(router, name))
            bias.add_(torch.sign(count.mean() - count).to(bias.device), alpha=self.speed)
        busiest = [count.amax() / count.mean().clamp(min=1) for count in counts[: len(self.routers)]]
        self.max_violation = torch.stack(busiest).mean() - 1
        self.counts = [torch.zeros_like(count) for count in self.counts]
