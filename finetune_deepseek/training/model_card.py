"""Fills the model card template (model_card.md) from a run.

The template is itself a valid card. A `<!-- slot -->` comment marks where a text goes; it takes the place of the
comment and of what stands behind it on the same line.
"""

import platform
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel

from .optimization import recipe
from .saved import Saved, differences, numbered
from .trainer_arguments import Stage
from .weights.freezing import trained_weights

TEMPLATE = Path(__file__).parents[1] / "model_card.md"
SLOT = re.compile(r"<!-- (\w+) -->[^\n]*")
GENERATION = """output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""
PACKAGES = ("deepseek-hf", "torch", "transformers", "peft", "datasets", "sacrebleu")


def fill(template: str, slots: dict[str, str]) -> str:
    """The template with each slot's text; a slot without one keeps what the template says."""
    return SLOT.sub(lambda match: slots.get(match[1]) or match[0], template)


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def base_model(stage: Stage, model: Any) -> str | None:
    """The Hub id of the model that was fine-tuned; None for random weights and local folders."""
    name = stage.model.model_name_or_path
    if isinstance(model, PeftModel):
        name = model.peft_config[model.active_adapter].base_model_name_or_path
    return None if not name or Path(name).exists() else name


def shown_folder(folder: str) -> str:
    """A folder as code on any system can name it; of an absolute one the rest is nobody else's business."""
    path = Path(folder)
    return path.name if path.is_absolute() else path.as_posix()


def results_table(task_card: dict[str, Any], results: dict[str, Any]) -> str:
    """Scores on the test split beside the baseline's, else those on the validation split."""
    labels = {name: label for name, (_, label) in task_card["metrics"].items()} | {"perplexity": "perplexity"}
    split = "test" if any(f"test_{name}" in results for name in labels) else "eval"
    rows = [
        [label, number(results[f"{split}_{name}"]), number(results.get(f"baseline_{name}"))]
        for name, label in labels.items()
        if f"{split}_{name}" in results
    ]
    if not rows:
        return ""
    where = f"{results.get(f'{split}_samples', '?')} rows of the {'test' if split == 'test' else 'validation'} split."
    return where + "\n\n" + table(["metric", "model", task_card["baseline"]], rows)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def eval_results(task_card: dict[str, Any], results: dict[str, Any]) -> list[EvalResult]:
    """The test scores for the card's model-index."""
    return [
        EvalResult(
            task_type=task_card["pipeline_tag"],
            task_name=task_card["title"],
            dataset_type=task_card["datasets"][0] if task_card["datasets"] else "local",
            dataset_name=task_card["dataset_name"],
            dataset_split="test",
            metric_type=metric_type,
            metric_name=label,
            metric_value=round(results[f"test_{name}"], 4),
        )
        for name, (metric_type, label) in task_card["metrics"].items()
        if results.get(f"test_{name}") is not None
    ]


def opening(model: Any, name: str, head: str, base: Saved | None) -> dict[str, str]:
    """`imports` and `opening`: the lines that open a model, or an adapter in its base as training has changed that."""
    if not isinstance(model, PeftModel) or base is None:
        auto_class = f"AutoModelFor{head}"
        where = "transformers" if hasattr(transformers, auto_class) else "modeling_deepseek"
        return {
            "imports": f"from {where} import {auto_class}",
            "opening": f'model = {auto_class}.from_pretrained("{name}")',
        }
    model_class = type(model.get_base_model())
    is_ours = model_class.__module__.startswith("modeling_deepseek")
    opener = model_class.__name__ if is_ours else f"AutoModelFor{head}"
    changes = numbered(differences(base.config, model.config.to_dict()))
    changes.pop("label2id", None)  # follows from id2label
    options = "".join(f", {field}={value!r}" for field, value in changes.items())
    return {
        # Not AutoPeftModel: it knows nothing of the changes, and may take another class than training did.
        "imports": f"from {'modeling_deepseek' if is_ours else 'transformers'} import {opener}\n"
        "from peft import PeftModel",
        "opening": f'base = {opener}.from_pretrained("{shown_folder(base.name)}"{options})\n'
        f'model = PeftModel.from_pretrained(base, "{name}")',
    }


def without_local(datasets: list[str], dataset_name: str) -> dict[str, Any]:
    """The card's `datasets` and `dataset_name`: folders of this machine are no data sets of the Hub, which would
    refuse them, and where they lie is nobody else's business."""
    shown = Path(dataset_name).name if Path(dataset_name).exists() else dataset_name
    return {"datasets": [name for name in datasets if not Path(name).exists()], "dataset_name": shown}


def usage(model: Any, name: str, task_card: dict[str, Any], base: Saved | None) -> str:
    """Python lines that load the model or adapter and use it."""
    lines = {"name": name} | opening(model, name, task_card.get("head", "CausalLM"), base)
    if "code" in task_card:
        return "```python\n" + task_card["code"].format(**lines) + "\n```"
    return f"""```python
import modeling_deepseek
import tokenization_deepseek
{lines["imports"]}
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
{lines["opening"]}
inputs = tokenizer({task_card["prompt"]!r}, return_tensors="pt")
{task_card.get("usage", GENERATION)}
```"""


def protocol(
    task_card: dict[str, Any], stage: Stage, model: Any, results: dict[str, Any], splits: dict[str, Any]
) -> str:
    """Everything needed to compare a number honestly."""
    args = stage.training
    signatures = [results[key] for key in sorted(results) if key.startswith("test_") and key.endswith("_signature")]
    sizes = {split: f"{len(rows):,}" if isinstance(rows, Dataset) else "streamed" for split, rows in splits.items()}
    rows = [
        ["data", f"{task_card['dataset_name']}: {', '.join(f'{split} {size}' for split, size in sizes.items())}"],
        ["test rows, SHA-256", results.get("test_data_hash", "-")],
        ["preprocessing", task_card["preprocessing"]],
        ["metric signatures", "<br>".join(signatures) or "-"],
        ["prediction", task_card.get("prediction", f"{args.generation_num_beams or 1} beam(s), no sampling")],
        ["seed", args.seed],
        ["parameters", f"{results['parameters_total']:,} in all, {results['parameters_active']:,} active per token, "
                       f"{results['parameters_trainable']:,} trained"],
        ["trained weights", trained_weights(model, args)],
        *map(list, recipe(args, model.config).items()),
        ["epochs", number(results.get("epoch"))],
        ["wall time in seconds", results.get("wall_time_seconds", "-")],
        ["versions", ", ".join([f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in PACKAGES)])],
    ]  # fmt: skip
    # A cell holds one line, and a bar would end it.
    return table(["", ""], [[str(cell).replace("|", r"\|").replace("\n", r"\n") for cell in row] for row in rows])


def write(
    task_card: dict[str, Any],
    stage: Stage,
    model: Any,
    results: dict[str, Any],
    splits: dict[str, Any],
    folder: Path,
    write_text: Callable[[Path, str], None],
) -> None:
    """Write README.md into `folder`.

    Args:
        task_card: what `Task.card_data` gives: `title`, `pipeline_tag`, `language`, `datasets` (Hub ids),
            `dataset_name`, `metrics` {result name: (Hub's metric id, label)}, `prompt`, `preprocessing`, `data` and
            `data_checks` (Markdown), `baseline` (its name), and for a task without
            generation `head` (as in AutoModelFor...), `usage` (the Python lines after `inputs`) and `prediction` (how
            its outputs become predictions). `code` takes the place of all lines for use, {name} being the
            model, {imports} and {opening} what opens it. `summary` and `scores` (Markdown) take the places of what
            else follows from the run.
        results: the run's results so far.
        splits: the text rows by split.
    """
    is_adapter = isinstance(model, PeftModel)
    task_card = task_card | without_local(task_card["datasets"], task_card["dataset_name"])
    name = stage.training.hub_model_id or shown_folder(stage.training.output_dir or "")
    opened = stage.model.saved if stage.model.model_name_or_path else None
    base = base_model(stage, model)
    scores = eval_results(task_card, results)
    card = ModelCard(TEMPLATE.read_text(encoding="utf-8"), ignore_metadata_errors=False)
    template = card.data.to_dict()
    card.data = ModelCardData(
        **template
        | {
            "library_name": "peft" if is_adapter else template["library_name"],
            "pipeline_tag": task_card["pipeline_tag"],
            # Random weights are the run's own; a fine-tuned model keeps its base's license, which is not ours to say.
            "license": None if stage.model.model_name_or_path else template["license"],
            "tags": [*template["tags"], *(["lora"] if is_adapter else [])],
            "language": task_card["language"],
            "base_model": base,
            "datasets": task_card["datasets"] or None,
            "metrics": list(dict.fromkeys(metric for metric, _ in task_card["metrics"].values())),
            "model_name": Path(name).name,
            "eval_results": scores or None,
        }
    )
    origin = f"`{base}`" if base else "a local model" if stage.model.model_name_or_path else "random weights"
    kind = "A LoRA adapter" if is_adapter else "A model"
    card.text = fill(
        card.text,
        {
            "title": Path(name).name,
            "summary": task_card.get("summary")
            or f"{kind} for {task_card['title']}, trained from {origin} with deepseek-hf.",
            "usage": usage(model, name, task_card, opened and (opened.base or opened)),
            "results": task_card.get("scores") or results_table(task_card, results) or "No split was scored.",
            "data": "\n\n".join(
                filter(None, [task_card["data"].strip() or task_card["dataset_name"], task_card.get("data_checks")])
            ),
            "protocol": protocol(task_card, stage, model, results, splits),
        },
    )
    write_text(folder / "README.md", str(card))
