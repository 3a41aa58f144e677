"""Third stage: training; the model is in its folder when it ends."""

import shutil

from datasets import Dataset

from ..task import Scores
from ..weights.averaging import average_checkpoints
from .build import Built
from .prepare import Prepared


def train(prepared: Prepared, built: Built) -> Scores:
    """Train, average checkpoints if that was asked for, and save the model."""
    args, trainer = prepared.args, built.trainer
    if args.overwrite_output_dir and prepared.checkpoint is None:
        remove_old_checkpoints(prepared)
    metrics = trainer.train(resume_from_checkpoint=prepared.checkpoint).metrics
    rows = built.features["train"]
    if isinstance(rows, Dataset) and prepared.checkpoint is None:
        tokens = metrics["epoch"] * sum(rows["length"])  # without padding
        metrics["train_tokens_per_second"] = round(tokens / metrics["train_runtime"], 1)
    text = ""
    if args.average_checkpoints:
        trainer.accelerator.wait_for_everyone()  # the first process may still be saving the last one
        metrics["averaged_checkpoints"] = average_checkpoints(built.model, prepared.folder, args.average_checkpoints)
        text = f"the model is the mean of {metrics['averaged_checkpoints']} checkpoints"
    trainer.save_model()
    trainer.save_state()
    return Scores(metrics | prepared.count("train"), text=text)


def remove_old_checkpoints(prepared: Prepared) -> None:
    """Those of an earlier run in the same folder, for --overwrite_output_dir."""
    with prepared.args.main_process_first(local=False, desc="removal of old checkpoints"):
        for old in prepared.folder.glob("checkpoint-*"):
            shutil.rmtree(old)
