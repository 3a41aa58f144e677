"""The training path end to end: three rows, a definite outcome."""

import json

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV2Config, DeepseekV2ForCausalLM

from finetune_deepseek.training import run as run_module
from finetune_deepseek.training.task import CausalCollator
from tests.small_runs import PAIRS, write_jsonl

LEARNED = {"max_steps": 40}  # enough for the three rows by heart


def losses(folder):
    """Step and loss of each logged training step."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


def predictions(folder):
    lines = (folder / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def weights(folder):
    return load_file(folder / "model.safetensors")


def continue_prompt(model, tokenizer, prompt):
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """One run that learned the three rows, shared by the tests that look at its folder."""
    from finetune_deepseek.commands.parsing.runs import parse_command
    from finetune_deepseek.translation.task import Translation
    from tests.small_runs import TINY, flags

    folder = tmp_path_factory.mktemp("learned")
    path = str(write_jsonl(folder / "rows.jsonl", PAIRS))
    files = {f"{split}_file": path for split in ("train", "validation", "test")}
    argv = flags(TINY | LEARNED | files | {"output_dir": folder / "model"})
    stages = parse_command("translation", Translation.arguments_class, argv)
    return folder / "model", run_module.run_stages(Translation, stages), files


def test_three_rows_are_learned(learned):
    folder, results, _ = learned
    assert results["test_exact_match"] == results["eval_exact_match"] == 1.0
    assert results["test_chrf2"] == 100  # BLEU wants longer texts than these
    assert results["baseline_exact_match"] == 1.0  # the test rows are the training rows here
    assert results["train_samples"] == 3
    assert results["parameters_trainable_share"] == 1.0
    assert json.loads((folder / "all_results.json").read_text()) == results
    # In the order of the file, with the untouched source and reference.
    assert [(line["source"], line["target"], line["prediction"]) for line in predictions(folder)] == [
        (source, target, target) for source, target in PAIRS
    ]


def test_output_folder_is_complete(learned):
    folder, _, _ = learned
    names = {path.name for path in folder.iterdir()}
    assert {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"),
        *("train_results.json", "eval_results.json", "test_results.json", "all_results.json", "trainer_state.json"),
        *("generated_predictions.jsonl", "loss_plot.png"),
    } <= names
    assert not [name for name in names if name.startswith(".")]
    assert (folder / "loss_plot.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "config.json").read_text()).get("use_cache", True) is True


def test_saved_model_is_loaded_by_the_auto_classes(learned):
    folder, _, _ = learned
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert continue_prompt(model.eval(), tokenizer, "de: two birds\n") == "zwei Vögel"


def test_card_is_valid_and_says_the_scores(learned):
    folder, results, _ = learned
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.language == ["en", "de"]
    assert card.data.license == "apache-2.0"
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "sacrebleu": round(results["test_bleu"], 4),
        "chrf": round(results["test_chrf2"], 4),
        "exact_match": 1.0,
    }
    assert results["test_bleu_signature"].replace("|", r"\|") in card.text
    assert results["test_data_hash"] in card.text
    assert "<!--" not in card.text
    assert str(folder.parent) not in card.content


def test_predict_alone_gives_the_same_and_keeps_the_training_results(learned, finetune):
    folder, results, files = learned
    again = finetune(
        preset=None, vocab_size=None, output_dir=folder, model_name_or_path=folder, do_predict=True, **files
    )
    assert again["test_exact_match"] == 1.0
    assert "train_loss" not in again
    kept = json.loads((folder / "all_results.json").read_text())
    assert kept["train_loss"] == results["train_loss"]


def test_beams(learned, finetune, tmp_path):
    folder, _, files = learned
    settings = {"model_name_or_path": folder, "do_predict": True, "generation_num_beams": 3}
    assert finetune(preset=None, output_dir=tmp_path / "beams", **settings, **files)["test_exact_match"] == 1.0


def test_lora_learns_beside_an_unchanged_base(learned, finetune, tmp_path):
    folder, _, _ = learned
    before = weights(folder)
    path = str(write_jsonl(tmp_path / "upper.jsonl", [("one", "EINS"), ("three", "DREI")]))
    out = tmp_path / "adapter"
    results = finetune(
        preset=None,
        vocab_size=None,
        output_dir=out,
        model_name_or_path=folder,
        train_file=path,
        test_file=path,
        use_peft=True,
        lora_target=["all"],
        lora_r=4,
        adapter_off_check=folder / "generated_predictions.jsonl",
        max_steps=40,
    )
    assert results["test_exact_match"] == 1.0
    assert results["adapter_off_equal"] == 3
    assert results["parameters_trainable"] < results["parameters_total"] / 2
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(folder).items())
    assert not (out / "model.safetensors").exists()
    # LoRA weights only: no copy of the embeddings.
    assert all("lora_" in name for name in load_file(out / "adapter_model.safetensors"))

    model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    assert continue_prompt(model, tokenizer, "de: three\n") == "DREI"
    with model.disable_adapter():
        assert continue_prompt(model, tokenizer, "de: three\n") == "drei"
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "peft" and "lora" in card.data.tags
    assert card.data.base_model is None  # a folder of this machine is no Hub id

    # The adapter's folder is a model to evaluate, and to go on from.
    again = {"preset": None, "vocab_size": None, "model_name_or_path": out, "train_file": path, "test_file": path}
    assert finetune(output_dir=tmp_path / "again", do_predict=True, **again)["test_exact_match"] == 1.0
    more = finetune(output_dir=tmp_path / "more", max_steps=1, learning_rate=1e-6, **again)
    assert more["test_exact_match"] == 1.0
    assert more["parameters_trainable"] == results["parameters_trainable"]


def test_adapter_off_check_reads_whatever_a_prediction_holds(learned, finetune, tmp_path):
    folder, _, files = learned
    path = tmp_path / "lines.jsonl"
    lines = [line | {"note": "a\u2028b\x85c"} for line in predictions(folder)]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    settings = {"preset": None, "model_name_or_path": folder, "use_peft": True, "max_steps": 1, **files}
    assert finetune(output_dir=tmp_path / "out", adapter_off_check=path, **settings)["adapter_off_equal"] == 3


def test_adapter_off_check_of_other_prompts_says_so(learned, finetune, tmp_path):
    """The base was asked by its own template; by another its outputs differ though the adapter is off."""
    folder, _, files = learned
    settings = {"preset": None, "model_name_or_path": folder, "use_peft": True, "max_steps": 1, **files}
    path = folder / "generated_predictions.jsonl"
    with pytest.raises(ValueError, match=r"the base was asked by 'de: one\\n', this run asks by 'one =>'"):
        finetune(output_dir=tmp_path / "out", adapter_off_check=path, prompt_template="{source} =>", **settings)


def test_adapter_off_check_fails_on_a_difference(learned, finetune, tmp_path):
    folder, _, files = learned
    path = tmp_path / "other.jsonl"
    lines = [line | {"prediction": "vier"} for line in predictions(folder)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"preset": None, "model_name_or_path": folder, "use_peft": True, "max_steps": 1, **files}
    with pytest.raises(ValueError, match="3 of 3 outputs differ .* first 'vier' before and 'eins' now"):
        finetune(output_dir=tmp_path / "out", adapter_off_check=path, **settings)
    with pytest.raises(ValueError, match="expected lines with `prompt` and `prediction`"):
        finetune(
            output_dir=tmp_path / "out", adapter_off_check=files["test_file"], overwrite_output_dir=True, **settings
        )


@pytest.mark.parametrize("use_peft", [False, True])
def test_resumed_run_equals_the_uninterrupted(use_peft, learned, finetune, tmp_path):
    folder, _, files = learned
    settings = {"max_steps": 6, "save_steps": 3, "save_total_limit": 3, "per_device_train_batch_size": 2, **files}
    if use_peft:
        settings |= {"preset": None, "model_name_or_path": folder, "use_peft": True, "lora_target": ["all"]}
    whole = finetune(output_dir=tmp_path / "whole", do_train=True, do_predict=True, **settings)
    resumed = finetune(
        output_dir=tmp_path / "resumed",
        do_train=True,
        do_predict=True,
        resume_from_checkpoint=tmp_path / "whole" / "checkpoint-3",
        **settings,
    )
    assert losses(tmp_path / "whole") == losses(tmp_path / "resumed")
    assert len(losses(tmp_path / "whole")) == 6
    name = "adapter_model.safetensors" if use_peft else "model.safetensors"
    expected, found = (load_file(tmp_path / run / name) for run in ("whole", "resumed"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert whole["test_loss"] == resumed["test_loss"]


def test_resume_true_takes_the_last_checkpoint_or_starts(finetune, data, tmp_path):
    settings = {"output_dir": tmp_path / "out", "do_train": True, "resume_from_checkpoint": "true", **data}
    finetune(max_steps=2, **settings)
    finetune(max_steps=3, save_steps=1, **settings)
    assert [step for step, _ in losses(tmp_path / "out")] == [1, 2, 3]
    with pytest.raises(ValueError, match="no checkpoint there"):
        finetune(max_steps=3, **(settings | {"resume_from_checkpoint": tmp_path}))


@pytest.mark.parametrize("use_peft", [False, True])
def test_best_model_is_restored_and_stops_early(use_peft, learned, finetune, tmp_path):
    folder, _, files = learned
    # The first step of the warm-up has rate 0, and the next ones wreck the model: the first evaluation is the best.
    results = finetune(
        preset=None,
        model_name_or_path=folder,
        use_peft=use_peft,
        output_dir=tmp_path / "out",
        learning_rate=0.3,
        warmup_steps=3,
        lr_scheduler_type="constant_with_warmup",
        max_steps=6,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        early_stopping_patience=2,
        metric_for_best_model="loss",
        **files,
    )
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    best = tmp_path / "out" / f"checkpoint-{state['best_global_step']}"
    history = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    assert state["best_global_step"] < state["global_step"] < 6
    assert history[state["global_step"]] > 1.1 * history[state["best_global_step"]]
    assert results["eval_loss"] == pytest.approx(history[state["best_global_step"]], rel=1e-6)
    name = "adapter_model.safetensors" if use_peft else "model.safetensors"
    kept, saved = load_file(best / name), load_file(tmp_path / "out" / name)
    assert all(torch.equal(kept[key], saved[key]) for key in kept)


def test_published_checkpoint_gets_this_packages_classes(learned, finetune, data, tmp_path):
    """Else PEFT would rewrite the dense target to the experts, and the tokenizer would lose its BOS."""
    tokenizer = AutoTokenizer.from_pretrained(learned[0])
    config = DeepseekV2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4,
        num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=16, first_k_dense_replace=1,
        experts_implementation="eager",
    )  # fmt: skip
    published = tmp_path / "published"
    DeepseekV2ForCausalLM(config).save_pretrained(published)
    tokenizer.save_pretrained(published)
    settings = json.loads((published / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}
    (published / "tokenizer_config.json").write_text(json.dumps(settings))

    output = tmp_path / "adapter"
    lora = {"use_peft": True, "lora_target": ["dense", "shared"], "max_steps": 1}
    finetune(**data, **lora, model_name_or_path=published, preset=None, output_dir=output)
    adapted = set(load_file(output / "adapter_model.safetensors"))
    assert {name.split(".mlp.")[1].split(".lora")[0] for name in adapted} == {
        f"{where}{name}_proj" for where in ("", "shared_experts.") for name in ("gate", "up", "down")
    }
    assert AutoTokenizer.from_pretrained(output)("one")["input_ids"][0] == tokenizer.bos_token_id


def test_cpu_threads_are_set_and_checked(finetune, data, tmp_path):
    try:
        finetune(**data, cpu_threads=2, max_steps=1, output_dir=tmp_path / "model")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    with pytest.raises(ValueError, match="--cpu_threads 0: it must be 1 or more"):
        finetune(**data, cpu_threads=0, output_dir=tmp_path / "none")


def test_head_may_begin_as_a_copy_of_the_embeddings(finetune, data, tmp_path):
    untied = {"config_overrides": "tie_word_embeddings=false", "max_steps": 1, "learning_rate": 1e-9}
    for name, expected in (("copy", True), ("random", False)):
        finetune(**data, **untied, head_from_embeddings=expected, output_dir=tmp_path / name)
        found = weights(tmp_path / name)
        close = torch.allclose(found["lm_head.weight"], found["model.embed_tokens.weight"], atol=1e-6)
        assert close == expected, name


def test_streaming_equals_reading_whole_in_its_first_step(finetune, data, tmp_path):
    shuffled = {"train_sampling_strategy": "random", "max_steps": 1, "do_train": True, "do_predict": True, **data}
    whole = finetune(output_dir=tmp_path / "whole", **shuffled)
    streamed = finetune(output_dir=tmp_path / "streamed", streaming=True, **shuffled)
    assert streamed["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-5)  # one batch of all three rows
    assert "baseline_bleu" not in streamed
    with pytest.raises(ValueError, match="give --max_steps"):
        finetune(output_dir=tmp_path / "endless", streaming=True, **data)


def test_stages_run_in_order_and_report_together(data, tmp_path):
    from finetune_deepseek.commands.parsing.runs import parse_command
    from finetune_deepseek.translation.task import Translation
    from tests.small_runs import TINY, flags

    path = tmp_path / "two.yaml"
    common = {name: value for name, value in TINY.items() if name not in ("preset", "vocab_size")} | data
    path.write_text(
        json.dumps(  # JSON is YAML
            common
            | {
                "max_steps": 1,
                "stages": [
                    {"preset": "tiny_v3", "vocab_size": 300},
                    {
                        "name": "adapter",
                        "model_name_or_path": "{output_dir}",
                        "use_peft": True,
                        "adapter_off_check": "{output_dir}/generated_predictions.jsonl",
                    },
                ],
            }
        )
    )
    stages = parse_command(
        "translation", Translation.arguments_class, [str(path), *flags({"output_dir": tmp_path / "o"})]
    )
    run_module.run_stages(Translation, stages)
    results = json.loads((tmp_path / "o" / "all_results.json").read_text())
    assert {"test_exact_match", "baseline_exact_match", "adapter_exact_match", "adapter_off_equal"} <= set(results)
    assert (tmp_path / "o" / "adapter" / "adapter_model.safetensors").is_file()


def test_collator_pads_rows_right_and_prompts_left():
    batch = CausalCollator(pad_token_id=9)(
        [
            {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "prompt_ids": [1], "row": 4},
            {"input_ids": [5, 6], "labels": [-100, 6], "prompt_ids": [5, 7], "row": 0},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [5, 6, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, 6, -100]]
    assert batch["prompt_ids"].tolist() == [[9, 1], [5, 7]]
    assert batch["prompt_mask"].tolist() == [[0, 1], [1, 1]]
    assert batch["row"].tolist() == [4, 0]


def test_an_equal_run_leaves_no_more_rows_in_the_cache(finetune, data, tmp_path, monkeypatch):
    """Another folder for its results is no reason to keep what it made of the rows once more."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    counts = []
    for number in range(3):
        finetune(output_dir=tmp_path / f"out{number}", max_steps=1, **data)
        counts.append(len([*(tmp_path / "cache").rglob("*.arrow")]))
    assert counts[0] == counts[1] == counts[2] > 0
