"""What training minimises, and its course where Trainer has no option for it: step schedule, label smoothing, L1.

Letters: B batch, T tokens of a row, V vocabulary.
"""

import json
from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_utils import SchedulerType

from .arguments import MULTI_STEP
from .trainer_arguments import TrainingArguments

IGNORED_LABEL = -100  # torch's cross entropy leaves it out


# -- the learning rate --


def multi_step_share(step: int, warmup_steps: int, milestones: Iterable[int], factor: float) -> float:
    """The share of the peak learning rate at a step: a linear warm-up, then `factor` for each milestone passed."""
    if step < warmup_steps:
        return step / warmup_steps
    return factor ** sum(step >= milestone for milestone in milestones)


def multi_step_schedule(optimizer: torch.optim.Optimizer, args: TrainingArguments, num_training_steps: int) -> Any:
    """The schedule of DeepSeek LLM (arXiv 2401.02954, section 2.3): 31.6% of the peak after 80% of training, 10%
    after 90%.

    Raises:
        ValueError: for a milestone after the last step, which would never be reached.
    """
    milestones = [round(num_training_steps * m) if m < 1 else int(m) for m in args.lr_milestones]
    if max(milestones) >= num_training_steps:
        raise ValueError(
            f"--lr_milestones {' '.join(f'{m:g}' for m in args.lr_milestones)}: step {max(milestones)} is never "
            f"reached, training ends at step {num_training_steps}; give earlier steps, or shares of all steps below 1."
        )
    warmup_steps = args.get_warmup_steps(num_training_steps)
    share = partial(multi_step_share, warmup_steps=warmup_steps, milestones=milestones, factor=args.lr_factor)
    return LambdaLR(optimizer, share)


def wsd_settings(args: TrainingArguments, num_training_steps: int) -> dict[str, Any]:
    """What the schedule warmup_stable_decay is told: `num_decay_steps`, at least one, and --lr_scheduler_kwargs.

    Raises:
        ValueError: for warm-up and decay of more steps than there are, between which the rate would jump.
    """
    decay = {"num_decay_steps": max(round(args.lr_decay_share * num_training_steps), 1)}
    settings = decay | cast(dict, args.lr_scheduler_kwargs or {})
    warmup_steps, decay_steps = args.get_warmup_steps(num_training_steps), settings["num_decay_steps"]
    if warmup_steps + decay_steps > num_training_steps:
        raise ValueError(
            f"--lr_scheduler_type warmup_stable_decay: {num_training_steps} steps don't hold {warmup_steps} of "
            f"warm-up (--warmup_steps) and {decay_steps} of decay (--lr_decay_share); lower one, or train longer."
        )
    return settings


def follow_the_clock(scheduler: LambdaLR, clock: Any, num_training_steps: int, warmup_steps: int) -> None:
    """Let a schedule run by the share of time that has passed, in place of steps; a warm-up in steps stays.

    Args:
        clock: has `share`, from 0 to 1.

    Raises:
        ValueError: for a schedule that isn't a function of the step.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ValueError("--train_minutes: this --lr_scheduler_type isn't a function of the step; choose another.")

    def by_time(share_at: Any) -> Any:
        return lambda step: share_at(
            step if step < warmup_steps else max(warmup_steps, round(clock.share * num_training_steps))
        )

    scheduler.lr_lambdas = [by_time(share_at) for share_at in scheduler.lr_lambdas]


# -- the loss --


def target_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token loss in nats, summed over each row's target tokens [B], and the number of these [B].

    Args:
        logits: [B, T, V].
        labels: [B, T], not shifted, -100 where there is no target.
    """
    targets = labels[:, 1:].to(logits.device)
    losses = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED_LABEL, reduction="none"
    )
    return losses.sum(1), (targets != IGNORED_LABEL).sum(1)


def smoothing_term(
    scores: torch.Tensor, targets: torch.Tensor, num_targets: torch.Tensor | int | None = None
) -> torch.Tensor:
    """What label smoothing (arXiv 1512.00567, section 7) by 1 adds to the loss; by e, it is e times this.

        (1 - e) nll + e mean_v(-log p_v) = nll + e (score_target - mean_v score_v)

    since the normaliser of the softmax cancels.

    Args:
        scores: [N, V] logits that predict `targets` [N].
        num_targets: divide the sum by this instead of N.
    """
    scores = scores.float()
    terms = scores.gather(1, targets.unsqueeze(1)).squeeze(1) - scores.mean(1)
    return terms.sum() / (len(terms) if num_targets is None else num_targets)


def smooth_labels(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any, factor: float
) -> Any:
    """A forward hook that smooths the labels of a causal language model while it trains.

    Trainer's own label smoothing shifts the labels only for classes that transformers lists, and keeps them from the
    model, which then adds no loss of its own.
    """
    if model.training and kwargs.get("labels") is not None:
        targets = kwargs["labels"][:, 1:].to(outputs.logits.device)
        is_target = targets != IGNORED_LABEL
        only_labelled = kwargs.get("logits_to_keep") == "labelled"
        scores = outputs.logits[0] if only_labelled else outputs.logits[:, :-1][is_target]
        term = smoothing_term(scores, targets[is_target], kwargs.get("num_items_in_batch"))
        outputs.loss = outputs.loss + factor * term.to(outputs.loss.device)
    return outputs


# -- L1 --


def l1_norm(parameters: Iterable[torch.nn.Parameter]) -> float:
    return sum(parameter.detach().abs().sum().item() for parameter in parameters)


@torch.no_grad()
def add_l1_gradient(parameters: Iterable[torch.nn.Parameter], factor: float) -> None:
    """Add the gradient of `factor` times the L1 norm, just before the optimizer's step.

    There, rather than in the loss, it counts once, however many micro-batches and processes make a step, is not
    clipped, and leaves the reported loss comparable.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.add_(parameter.sign(), alpha=factor)


# -- the report --


def recipe(args: TrainingArguments, config: Any) -> dict[str, str]:
    """Optimizer, schedule and regularization in words, for the census and the model card."""
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if schedule == MULTI_STEP:
        schedule += f": times {args.lr_factor:g} at each of {' '.join(f'{m:g}' for m in args.lr_milestones)}"
    if schedule == SchedulerType.WARMUP_STABLE_DECAY.value and not args.lr_scheduler_kwargs:
        schedule += f": falls in the last {args.lr_decay_share:.0%} of all steps"
    if args.lr_scheduler_kwargs:
        schedule += f" {json.dumps(args.lr_scheduler_kwargs)}"
    warmup = f"{args.warmup_steps:g} steps" if args.warmup_steps >= 1 else f"{args.warmup_steps:.3g} of all steps"
    regularization = {
        "weight decay": args.weight_decay,
        "L1": args.l1,
        "router bias update": args.router_bias_update,
        "label smoothing": args.label_smoothing_factor,
        "attention dropout": getattr(config, "attention_dropout", 0.0),
        "hidden dropout": getattr(config, "hidden_dropout", 0.0),
        "early stopping after evaluations without gain:": args.early_stopping_patience,
    }
    optimizer = f"{getattr(args.optim, 'value', args.optim)}{f' ({args.optim_args})' if args.optim_args else ''}"
    return {
        "optimizer": f"{optimizer}, learning rate {args.learning_rate:g}",
        "schedule": f"{schedule}, warm-up {warmup}",
        "regularization": ", ".join(f"{name} {value:g}" for name, value in regularization.items() if value) or "none",
    }
