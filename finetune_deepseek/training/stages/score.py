"""Fourth stage: the scored splits' predictions and their scores, as values."""

from collections.abc import Iterator

from ..task import Scores, prefixed
from .build import PROMPTS, Built, write_record
from .predictions import data_hash
from .prepare import Prepared


def score_validation(prepared: Prepared, built: Built) -> Iterator[Scores]:
    """The validation split's scores, then what is chosen by them."""
    yield Scores(built.trainer.evaluate(metric_key_prefix="eval") | prepared.count("validation", "eval"))
    chosen = prepared.task.after_evaluation()
    if prepared.args.do_train and built.trainer.is_world_process_zero():
        write_record(prepared, built.model, prepared.folder)  # with what is chosen
    yield chosen


def score_test(prepared: Prepared, built: Built) -> Iterator[Scores]:
    """The test split's scores beside its baseline's, with the predictions; then the task's report on them."""
    output = built.trainer.predict(built.features["test"], metric_key_prefix="test")
    results = (output.metrics or {}) | prepared.count("test")
    if PROMPTS in built.features:
        output = built.trainer.predict(built.features[PROMPTS], metric_key_prefix=PROMPTS)
    if output.predictions is None:  # predict_with_generate is off
        yield Scores(results)
        return
    by_row = sorted(built.scorer.predictions(output).items())
    predictions = [prediction for _, prediction in by_row]
    rows = [built.examples[number] for number, _ in by_row]
    lines = [row | {"prediction": prediction} for row, prediction in zip(rows, predictions, strict=True)]
    results |= prefixed("test", prepared.task.score(predictions, rows)) | {"test_data_hash": data_hash(rows)}
    yield Scores(results, lines=lines)
    train = prepared.splits.get("train")
    baseline = prepared.task.baseline(train, rows)
    if baseline is not None:
        yield Scores(prefixed("baseline", prepared.task.score(baseline, rows)))
    if built.trainer.is_world_process_zero():
        yield prepared.task.report(predictions, rows, train)


def score_adapter_off(prepared: Prepared, built: Built) -> Scores:
    """Generate the base model's predictions again with the adapter switched off; a difference is a fault."""
    path, rows = prepared.stage.lora.adapter_off_check, prepared.off_rows
    built.trainer.compute_metrics = None  # these rows have their own numbers
    with built.model.disable_adapter():
        found = built.scorer.predictions(built.trainer.predict(built.features["adapter-off"], metric_key_prefix="off"))
    expected = [row["prediction"] for row in rows]
    differing = [number for number in range(len(rows)) if found[number] != expected[number]]
    equal = {"adapter_off_equal": len(rows) - len(differing)}
    if not differing:
        return Scores(equal, text=f"adapter switched off: all {len(rows):,} outputs equal those in {path}")
    number = differing[0]
    fault = (
        f"--adapter_off_check {path}: {len(differing)} of {len(rows)} outputs differ with the adapter off, "
        f"first {expected[number]!r} before and {found[number]!r} now."
    )
    return Scores(equal | {"adapter_off_different": len(differing)}, fault=fault)
