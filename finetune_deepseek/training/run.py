"""The one training path: prepare, build, train, score, write, show; each stage is a file of stages/.

Each takes what those before returned. Whatever can be refused is, before the first step; what is measured is written
at once, and shown when all is written. A `Task` (task.py) supplies rows, features, a collator and scores.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..data.files import write_json
from .stages.build import Built, build
from .stages.folders import RESULTS_FILE, check_all_output_dirs, read_results
from .stages.prepare import Prepared, prepare
from .stages.score import score_adapter_off, score_test, score_validation
from .stages.screen import screen
from .stages.show import show, show_plan
from .stages.train import train
from .stages.write import Results
from .task import Scores, Task, prefixed
from .trainer_arguments import Stage


def measured(prepared: Prepared, built: Built) -> Iterator[tuple[str | None, Scores]]:
    """What the run measures, part by part, each as soon as it is known."""
    if prepared.args.do_train:
        yield "train", train(prepared, built)
    if prepared.args.do_eval:
        yield from (("eval", scores) for scores in score_validation(prepared, built))
    if prepared.args.do_predict:
        yield from (("test", scores) for scores in score_test(prepared, built))
    if prepared.off_rows:
        yield None, score_adapter_off(prepared, built)


def run(task_class: type[Task], stage: Stage) -> dict[str, Any]:
    """Do one run as its flags say, and return its results (the content of all_results.json).

    Raises:
        ValueError: with one line, for everything in the arguments or the data that can't work; and when all is
            written, if a check failed.
    """
    prepared = prepare(task_class, stage)
    built = build(prepared)
    show_plan(prepared, built)
    results = Results(prepared, built)
    built.trainer.card = results.write_card
    for part, scores in measured(prepared, built):
        results.add(part, scores)
    try:
        show(results)
    finally:
        if stage.training.push_to_hub:
            built.trainer.push_to_hub()
    if results.faults:
        raise ValueError(results.faults[0])
    return results.numbers


def run_stages(task_class: type[Task], stages: list[Stage]) -> dict[str, Any]:
    """Run every stage; a named stage's results also go into the first folder's all_results.json, `name_...`."""
    results: dict[str, Any] = {}
    folder = Path(stages[0].training.output_dir or "")
    check_all_output_dirs(stages)
    for number, stage in enumerate(stages, start=1):
        with screen(is_shown=stage.training.process_index == 0):
            if len(stages) > 1:
                print(f"\n=== stage {number} of {len(stages)}: {stage.training.output_dir} ===")
            stage_results = run(task_class, stage)
        if stage.name:
            own = {key.removeprefix("test_").removeprefix(f"{stage.name}_"): v for key, v in stage_results.items()}
            stage_results = prefixed(stage.name, own)
        results |= stage_results
        if number > 1 and stage.training.process_index == 0:
            write_json(folder / RESULTS_FILE, read_results(folder) | results)
    return results
