"""Trainer with generation at evaluation, whole-or-nothing saving and this package's options.

Generation happens inside Trainer's evaluation: `FinetuneTrainer.prediction_step` generates from left-padded prompts
beside the loss on the full rows, and returns row numbers in place of labels, so that scores see the references' own
text. The loss of a split is a sum over all of its rows (eval_loss.py), never a mean of batches' means.
"""

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import GenerationConfig, PrinterCallback, ProgressCallback, Seq2SeqTrainer
from transformers.trainer_utils import SchedulerType, get_last_checkpoint
from transformers.training_args import ParallelMode

from modeling_deepseek import DeepSeekForCausalLM, DeepSeekForRecommendation

from ..data.files import finite, replaced_folder
from ..data.words import nearest_match
from .arguments import MUON
from .batches import ResumableStream, RowSampler, TokenBatchSampler
from .callbacks import EpochCallback, Progress, TimeLimitCallback, without_bars
from .optimization import (
    MULTI_STEP,
    add_l1_gradient,
    follow_the_clock,
    l1_norm,
    multi_step_schedule,
    smooth_labels,
    wsd_settings,
)
from .scoring.eval_loss import LossOfSplit
from .task import Task, prefixed
from .trainer_arguments import TrainingArguments
from .weights.balance import BalanceExperts
from .weights.muon import Muon, muon_groups


@contextmanager
def scored_as_it_is(model: Any, args: TrainingArguments) -> Iterator[None]:
    """Let Trainer take a model of few bits, which it refuses to train, where it is only scored.

    Raises:
        ValueError: where it is to be trained, or an adapter on it.
    """
    is_small = bool(getattr(model, "is_quantized", False))
    if is_small and args.do_train:
        raise ValueError(
            "--model_name_or_path: neither weights of so few bits are trained nor adapters on them; train the model "
            "that they were made from, and compress the result."
        )
    if is_small:
        model.is_quantized = False
    try:
        yield
    finally:
        if is_small:
            model.is_quantized = True


class FinetuneTrainer(Seq2SeqTrainer):
    """Seq2SeqTrainer for decoder-only models, with whole-or-nothing saving and this package's model card.

    Evaluation reports the loss as the mean over all that counts in the split, and of text the perplexity.
    """

    model: Any
    args: TrainingArguments

    def __init__(
        self,
        *,
        generation_config: GenerationConfig | None,
        save_beside: Callable[[Path], None],
        is_language_model: bool,
        task: Task,
        **kwargs: Any,
    ) -> None:
        with scored_as_it_is(kwargs["model"], kwargs["args"]):
            super().__init__(**kwargs)
        self.task = task
        self.drawn_from: str | None = None  # the checkpoint whose random numbers come next
        self.is_finite: torch.Tensor | None = None  # whether this step's losses are; looked at once in a step
        self.args.logging_nan_inf_filter = False  # it would look at each loss, and hide what isn't a number
        bare = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        self.can_skip_prompts = is_language_model and isinstance(bare, DeepSeekForCausalLM)
        if isinstance(bare, DeepSeekForRecommendation):
            self.model_accepts_loss_kwargs = True  # our batches have no label for a history's first item
        if self.pop_callback(PrinterCallback if self.args.disable_tqdm else ProgressCallback):  # not a notebook's own
            self.add_callback(Progress(self.args.train_minutes))
        self.clock = TimeLimitCallback(self.args.train_minutes) if self.args.train_minutes else None
        if self.clock:
            self.add_callback(self.clock)
        self.balance = BalanceExperts(bare, self.args.router_bias_update) if self.args.router_bias_update else None
        if self.balance:
            self.add_callback(self.balance)
        if is_language_model and self.args.label_smoothing_factor:
            self.label_smoother = None
            hook = partial(smooth_labels, factor=self.args.label_smoothing_factor)
            self.model.register_forward_hook(hook, with_kwargs=True)
        if isinstance(self.model, PeftModel):
            # The vocabulary is never resized here, so a LoRA on embeddings needs no copy of them in the adapter.
            self.model.save_pretrained = partial(self.model.save_pretrained, save_embedding_layers=False)  # type: ignore
        self.generation = generation_config
        # Evaluations during training follow its course, for which greedy decoding is enough, and a few times faster.
        self.greedy = copy.deepcopy(generation_config)
        if self.greedy is not None:
            self.greedy.num_beams, self.greedy.length_penalty = 1, 1.0
        self.epochs = EpochCallback(None, self.data_collator)
        self.add_callback(self.epochs)
        self.save_beside = save_beside
        self.card: Callable[[Path], None] = lambda folder: None  # writes README.md; set when there is what it says

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As Trainer's.

        Raises:
            ValueError: with one line, if the state is that of other weights than are trained now.
        """
        try:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"--resume_from_checkpoint {checkpoint}: its optimizer was of other trained weights ({error}): "
                "--freeze or the like was another, or an earlier version saved it, which trained what no loss "
                f"reaches. To begin anew with its weights, --model_name_or_path {checkpoint}."
            ) from error

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.can_skip_prompts and model.training:
            is_smoothed = self.args.label_smoothing_factor > 0  # by a hook that reads the logits
            inputs = inputs | {"logits_to_keep": "labelled" if is_smoothed else "loss"}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list, device: Any) -> Any:
        """As Trainer's, which leaves out labels of -100; where labels are numbers, no classes, this is one of them."""

        def counted(batch: dict[str, Any]) -> dict[str, Any]:
            labels = batch.get("labels")
            if isinstance(labels, torch.Tensor) and labels.is_floating_point():
                return batch | {"labels": torch.zeros_like(labels)}
            return batch

        return super()._get_num_items_in_batch([*map(counted, batch_samples)], device)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):  # type: ignore[no-untyped-def]
        """Adds the rows' losses to the split's, and returns None in place of a batch's loss, new tokens [B, T] or the
        task's outputs, and row numbers [B]."""
        inputs = self._prepare_inputs(inputs)
        prompt_ids, prompt_mask, rows = (inputs.pop(name, None) for name in ("prompt_ids", "prompt_mask", "row"))
        with torch.no_grad(), self.compute_loss_context_manager():
            predicted = self.task.predict_batch(model, inputs)
        if predicted.sums is not None:
            parts = (predicted.sums, predicted.counts, predicted.bytes)
            known = tuple(part for part in parts if part is not None)
            self.loss_of_split.add(*self.accelerator.gather_for_metrics(known))
            self.loss_of_split.is_text, self.loss_of_split.unit = predicted.is_text, predicted.unit
        if predicted.outputs is not None:
            return None, predicted.outputs, rows
        if prediction_loss_only or not self.args.predict_with_generate or prompt_ids is None:
            return None, None, None
        generation = self.greedy if self.is_in_train else self.generation
        generated = self.model.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            generation_config=generation,
            tokenizer=self.processing_class,  # by which stop texts are found, a model's own too
        )
        return None, generated[:, prompt_ids.shape[1] :], rows

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.loss_of_split = LossOfSplit()
        # Each reading of data takes a seed; a run that is resumed after an evaluation must find training's as it was.
        with torch.random.fork_rng(devices=[]):
            output: Any = super().evaluation_loop(*args, **kwargs)
        scores = self.loss_of_split.scores()
        if output.predictions is not None and (loss := self.task.split_loss(output.predictions)) is not None:
            scores["loss"] = loss
        output.metrics.update(prefixed(kwargs["metric_key_prefix"], scores))
        return output

    def _regularized_weights(self) -> list[torch.nn.Parameter]:
        """The trained weights that weight decay and L1 take hold of: all but norms and biases."""
        names = set(self.get_decay_parameter_names(self.model))
        return [p for name, p in self.model.named_parameters() if name in names and p.requires_grad]

    def _has_replicas(self) -> bool:
        """Whether the processes train copies of the whole model (DDP), rather than parts of one."""
        is_divided = self.is_fsdp_enabled or self.is_deepspeed_enabled or self.accelerator.parallelism_config
        return self.args.parallel_mode is ParallelMode.DISTRIBUTED and not is_divided

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        if is_new and self.args.optim == MUON:
            args, names = self.args, self.get_decay_parameter_names(self.model)
            self.optimizer = Muon(
                muon_groups(self.model, names, args.weight_decay),
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                processes=args.world_size if self._has_replicas() else 1,
            )
        optimizer = super().create_optimizer(model)
        if is_new and self.args.l1:
            # The weights are looked up at each step, for sharding replaces them.
            optimizer.register_step_pre_hook(lambda *_: add_l1_gradient(self._regularized_weights(), self.args.l1))
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.args.lr_scheduler_type == MULTI_STEP:
            optimizer = optimizer or self.optimizer
            assert optimizer is not None
            self.lr_scheduler = multi_step_schedule(optimizer, self.args, num_training_steps)
        else:
            try:
                if self.args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
                    self.args.lr_scheduler_kwargs = wsd_settings(self.args, num_training_steps)
                super().create_scheduler(num_training_steps, optimizer)
            except TypeError as error:  # wrong or missing names
                raise ValueError(
                    f"--lr_scheduler_type {SchedulerType(self.args.lr_scheduler_type).value} with "
                    f"--lr_scheduler_kwargs {json.dumps(self.args.lr_scheduler_kwargs or {})}: {error}."
                ) from error
        if self.clock:
            warmup_steps = self.args.get_warmup_steps(num_training_steps) if self.args.warmup_steps >= 1 else 0
            follow_the_clock(cast(LambdaLR, self.lr_scheduler), self.clock, num_training_steps, warmup_steps)
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.args.l1 and "loss" in logs:
            logs["l1_penalty"] = self.args.l1 * l1_norm(self._regularized_weights())
        if self.balance and "loss" in logs:
            logs["expert_max_violation"] = self.balance.max_violation.item()
        # JSON, which the log is saved as, has no word for these.
        lost = {name: logs.pop(name) for name, value in list(logs.items()) if finite(value) is None}
        super().log(logs, start_time)
        logs |= lost

    def _load_rng_state(self, checkpoint: Any) -> None:
        super()._load_rng_state(checkpoint)
        self.drawn_from = checkpoint if isinstance(self.train_dataset, ResumableStream) else None

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.drawn_from is not None:  # the reading of a stream that goes on has taken a seed
            super()._load_rng_state(self.drawn_from)
            self.drawn_from = None
        loss = super().training_step(*args, **kwargs)
        self.is_finite = self.is_finite & loss.isfinite() if self.is_finite is not None else loss.isfinite()
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's norm of a step's gradients, just before the weights change by them.

        Raises:
            FloatingPointError: if it, or a loss that it comes of, isn't finite.
        """
        norm = super()._get_grad_norm(*args, **kwargs)
        is_finite, self.is_finite = cast(torch.Tensor, self.is_finite), None
        if self.accelerator.scaler is None:  # all processes have the same norm, and stop together
            is_finite = is_finite & torch.as_tensor(norm, device=is_finite.device).isfinite()
        else:  # it leaves out the steps whose gradients overflow
            is_finite = self.accelerator.gather(is_finite)
        if not is_finite.all():
            raise FloatingPointError(self._why_stopped())
        return norm

    def _why_stopped(self) -> str:
        step, checkpoint = self.state.global_step + 1, get_last_checkpoint(str(self.args.output_dir))
        good = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        return (
            f"step {step}: the loss or its gradient is not a finite number, so training has stopped; {good}. "
            f"Lower --learning_rate ({self.args.learning_rate:g}) or raise --warmup_steps, and look at the data."
        )

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        name = (self.args.metric_for_best_model or "loss").removeprefix("eval_")
        known = [key.removeprefix("eval_") for key, value in metrics.items() if isinstance(value, float)]
        if f"eval_{name}" not in metrics:
            raise ValueError(
                f"--metric_for_best_model {name}: evaluation gives no such number{nearest_match(name, known)}; there "
                f"is {', '.join(sorted(known))}."
            )
        # The first one would leave infinity for the best.
        return math.isfinite(metrics[f"eval_{name}"]) and super()._determine_best_metric(metrics, trial)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = train_dataset or self.train_dataset
        if not isinstance(rows, Dataset) or self.args.train_sampling_strategy == "sequential":
            return super()._get_train_sampler(train_dataset)
        args, weights = self.args, self.task.row_weights(rows)
        seed = args.seed if args.data_seed is None else args.data_seed
        if args.tokens_per_batch:
            sizes = rows["sizes"] if "sizes" in rows.column_names else [[(1, length)] for length in rows["length"]]
            found: Any = TokenBatchSampler(
                sizes, args.tokens_per_batch, seed, args.process_index, args.world_size, weights
            )
        else:
            lengths = rows["length"] if args.train_sampling_strategy == "group_by_length" else None
            group = args.train_batch_size * args.gradient_accumulation_steps
            found = RowSampler(len(rows), seed, lengths, group, weights)
        self.epochs.parts[0] = found
        return found

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # Evaluation rows are sorted by length already; Trainer's own choice would shuffle them.
        return torch.utils.data.SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:  # Trainer calls it in every process, and one writes
            return super()._save(output_dir, state_dict)
        # Trainer switches config.use_cache off for its own forwards; a saved model should generate fast.
        config: Any = self.model.config
        use_cache, config.use_cache = config.use_cache, True
        try:
            with replaced_folder(Path(output_dir or self.args.output_dir or "")) as folder, without_bars():
                super()._save(str(folder), state_dict)
                self.save_beside(folder)
        finally:
            config.use_cache = use_cache

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:  # a half-written checkpoint would be resumed from
            folder = Path(str(self._get_output_dir(trial=trial))) / f"checkpoint-{self.state.global_step}"
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        if self.is_world_process_zero():
            self.card(Path(str(self.args.output_dir)))
