"""The run of `deepseek-hf compress`: score, prune, recover, make numbers smaller, write, open again, score again.

Both scores are those of `deepseek-hf evaluate` on the same data; the second is of the folder that was written, which
takes its place when all is done, so that nothing half-made lies there.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel

from modeling_deepseek.pretrained import DeepSeekPreTrainedModel
from modeling_deepseek.whole_folders import model_files, writing_beside

from ..checkpoints.export import copy_files
from ..checkpoints.shards import new_destination
from ..data.files import finite, write_bytes, write_json
from ..training.run import measured
from ..training.saved import Saved
from ..training.stages.build import Built, build, save_beside
from ..training.stages.prepare import Prepared, prepare
from ..training.stages.screen import screen
from ..training.stages.train import train
from ..training.trainer_arguments import Stage
from .calibration import calibration_of
from .card import table_of, write_card
from .numbers import check_torchao, write_smaller
from .sparsity import KeepZeros
from .ways import Ways

REPORT_FILE = "compression.json"
# Of a run: the model, the folder that it writes to, and flags of training -> its arguments.
MakeStage = Callable[..., Stage]


def compress(task_class: Any, make_stage: MakeStage, ways: Ways, saved: Saved, destination: str) -> dict[str, Any]:
    """Write a smaller model, and give what is told of it: the content of compression.json.

    Args:
        make_stage: makes the arguments of a run of the task.
        saved: the model.
        destination: a folder that doesn't exist or is empty.

    Raises:
        ValueError: with one line, for what can't be done; the destination is then as it was.
    """
    check_compressible(saved)
    if ways.numbers:
        check_torchao()
    with new_destination(destination) as place, tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        work = Path(scratch)
        prepared, built = opened(task_class, make_stage(saved.name, work / "before"))
        before, _ = scores_of(prepared, built)
        model, told = pruned(prepared, built, ways)
        write_model(model, prepared, built, saved, work / "pruned")
        folder = work / "pruned"
        if ways.recover_steps:
            folder = recovered(task_class, make_stage, ways, saved, work)
        with writing_beside(destination) as beside:
            write_smaller(type(model), folder, Path(beside), ways.numbers, stored_type(saved, prepared.stage))
            prepared, built = opened(task_class, make_stage(beside, work / "after"))
            after, files = scores_of(prepared, built)
            save_beside(prepared, built.model, Path(beside))  # with what the scores have chosen
            for name, content in files.items():
                write_bytes(Path(beside) / name, content if isinstance(content, bytes) else content.encode("utf-8"))
            report = {
                "ways": ways.words(),
                **told,
                **{"bytes_before": size_of(saved.folder), "bytes_after": size_of(Path(beside))},
                **{"before": before, "after": after},
            }
            write_json(Path(beside) / REPORT_FILE, report)
            write_card(prepared, built, report, saved, place, Path(beside))
    print(table_of(report))
    print(f"everything is in {place}; next: deepseek-hf evaluate {prepared.task.name} {place}")
    return report


def check_compressible(saved: Saved) -> None:
    """Refuse what isn't a whole model of ours.

    Raises:
        ValueError: naming it.
    """
    saved.require_model()
    if saved.is_adapter:
        raise ValueError(
            f"{saved.where} is an adapter: merge it into its base first, by deepseek-hf export BASE MERGED --to "
            f"bundle --merge-adapter {saved.name}"
        )
    if not saved.is_ours:
        kind = saved.config.get("model_type")
        raise ValueError(f"{saved.where}: a model of model_type {kind!r} is none of this package's; name another.")
    if "quantization_config" in saved.config and saved.config.get("deepseek_format"):
        raise ValueError(f"{saved.where}: its numbers are small already; name the model that it was made from.")


def opened(task_class: Any, stage: Stage, is_trained: bool = False) -> tuple[Prepared, Built]:
    """Data, model and trainer of a run, without a word on the screen; one that isn't trained scores the validation
    rows, or else the test rows.

    Raises:
        ValueError: if there are no rows to score by.
    """
    with screen(is_shown=False):
        prepared = prepare(task_class, stage)
        args = prepared.args
        if not is_trained:
            prepared.task.check_saved(stage.model.saved, False)
            args.do_train, args.do_predict = False, args.do_predict and not args.do_eval
            if not (args.do_eval or args.do_predict):
                raise ValueError(
                    "there are no rows to score by: give --validation_file or --test_file, or a data set with them."
                )
        return prepared, build(prepared)


def scores_of(prepared: Prepared, built: Built) -> tuple[dict[str, Any], dict[str, Any]]:
    """Its sizes and scores, and the files that belong to them."""
    numbers, files = dict(built.sizes), dict[str, Any]()
    for _, scores in measured(prepared, built):
        numbers |= finite(scores.numbers)
        files |= scores.files
    return numbers, files


def pruned(prepared: Prepared, built: Built, ways: Ways) -> tuple[Any, dict[str, Any]]:
    """The model with what is to go left out, and what has gone.

    Raises:
        ValueError: for what doesn't fit the model.
    """
    if isinstance(built.model, PeftModel) or not isinstance(built.model, DeepSeekPreTrainedModel):
        raise ValueError(f"{prepared.stage.model.model_name_or_path}: it is opened as no whole model of this package.")
    if not ways.prunes:
        return built.model.eval(), {}
    return ways.pruned(built.model, calibration_of(prepared, built, ways.calibration_rows))


def write_model(model: Any, prepared: Prepared, built: Built, saved: Saved, folder: Path) -> None:
    """Write a model with all that it needs beside its weights."""
    folder.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.use_cache = saved.config.get("use_cache", True)
    model.save_pretrained(folder)
    copy_files(saved.folder, folder)
    built.tokenizer.save_pretrained(folder)
    save_beside(prepared, model, folder)


def recovered(task_class: Any, make_stage: MakeStage, ways: Ways, saved: Saved, work: Path) -> Path:
    """Train what pruning has left; zeros of the pattern stay."""
    flags = {"do_train": True, "max_steps": ways.recover_steps, "save_strategy": "no"}
    stage = make_stage(work / "pruned", work / "recovered", **flags)
    prepared, built = opened(task_class, stage, is_trained=True)
    if ways.sparsity:
        built.trainer.add_callback(KeepZeros(built.model))
    train(prepared, built)
    copy_files(saved.folder, work / "recovered")
    return work / "recovered"


def stored_type(saved: Saved, stage: Stage) -> str:
    """The type that weights are written in: what --dtype says, else as they were."""
    is_said = "dtype" in stage.given
    return stage.model.dtype if is_said else saved.config.get("dtype") or saved.config.get("torch_dtype") or "auto"


def size_of(folder: Path) -> int:
    """Bytes of the weight files; of a model on the Hub, whose weights lie elsewhere in the cache, of what is there."""
    return sum(path.stat().st_size for path in model_files(folder))
