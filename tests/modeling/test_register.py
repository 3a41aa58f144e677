"""What importing us changes in transformers, what `register(native=True)` changes, and scripts that rely on it."""

import json
import math
import subprocess
import sys

import pytest
import torch
import transformers
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    ShadowConfig,
    VeraConfig,
    get_peft_model,
)
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForObjectDetection,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from configuration_deepseek import DeepSeekConfig
from configuration_deepseek.official import to_official
from modeling_deepseek import DeepSeekForCausalLM, register
from modeling_deepseek.register import (
    MODELS_BY_AUTO_CLASS,
    NATIVE_TYPES,
    AutoModelForEmbedding,
    AutoModelForRecommendation,
)
from tests.modeling.conftest import TINY, outputs, tiny, token_ids
from tokenization_deepseek import train_tokenizer

PRESETS = {
    "deepseek_v2": "tiny_v2",
    "deepseek_v3": "tiny_v3_mtp",
    "deepseek_v32": "tiny_v32",
    "deepseek_v4": "tiny_v4",
}
AHEAD = {"tiny_v32": {"num_nextn_predict_layers": 1}}  # as released
AUTO_CLASSES = [
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForEmbedding,
    AutoModelForQuestionAnswering,
    AutoModelForRecommendation,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
]
COMPARE = """
import json
from transformers.models.auto import configuration_auto, modeling_auto
def state():
    configs = {key: configuration_auto.CONFIG_MAPPING[key].__name__ for key in configuration_auto.CONFIG_MAPPING.keys()
               if key.startswith(("deepseek", "llama", "qwen"))}
    models = {}
    for name in dir(modeling_auto):
        mapping = getattr(modeling_auto, name)
        if type(mapping).__name__ == "_LazyAutoMapping":
            models[name] = sorted(config.__name__ for config in mapping._extra_content)
    return {"configs": configs, "models": models, "names": dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}
before = state()
import modeling_deepseek
after = state()
modeling_deepseek.register(native=True); native = state()
modeling_deepseek.register(native=False); undone = state()
print(json.dumps([before, after, native, undone]))
"""


@pytest.fixture
def native():
    """Our classes for published types, for the time of a test."""
    register(native=True)
    yield
    register(native=False)


def published(folder, preset_name, tokenizer=False):
    """A folder as published: official config.json, official keys; returns the model."""
    fields = dict(AHEAD.get(preset_name, {}))
    if tokenizer:
        words = train_tokenizer(["one two birds three", "red green blue seven"] * 3, 300)
        words.save_pretrained(folder)
        fields |= {"vocab_size": len(words), "pad_token_id": words.pad_token_id}
    model = tiny(preset_name, **fields)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(to_official(model.config.to_dict())))
    return model


def test_importing_us_leaves_what_transformers_has():
    child = subprocess.run([sys.executable, "-c", COMPARE], capture_output=True, text=True, check=True)
    before, after, native, undone = json.loads(child.stdout)
    assert set(after["configs"]) - set(before["configs"]) == {"deepseek"}
    assert {key: after["configs"][key] for key in before["configs"]} == before["configs"]
    for name, registered in after["models"].items():
        assert set(registered) - set(before["models"][name]) <= {"DeepSeekConfig"}
    ours = {"deepseek": "DeepSeekForCausalLM", "deepseek_images_and_text": "DeepSeekForImageTextToText"}
    assert after["names"] == before["names"] | ours == native["names"]
    changed = {key for key, word in native["configs"].items() if after["configs"].get(key) != word}
    assert changed == set(NATIVE_TYPES) and {native["configs"][key] for key in changed} == {"DeepSeekConfig"}
    assert native["models"] == after["models"] and undone == after


def test_every_native_type_has_a_checkpoint_here():
    assert set(PRESETS) <= set(NATIVE_TYPES)
    of_images = {AutoModelForImageClassification, AutoModelForObjectDetection, AutoModelForImageTextToText}
    assert set(MODELS_BY_AUTO_CLASS) - set(AUTO_CLASSES) == of_images


@pytest.mark.parametrize("model_type", PRESETS)
@pytest.mark.parametrize("auto_class", AUTO_CLASSES, ids=lambda auto_class: auto_class.__name__)
def test_auto_classes_give_ours(model_type, auto_class, native, tmp_path):
    model = published(tmp_path, PRESETS[model_type])
    assert type(AutoConfig.from_pretrained(tmp_path)) is DeepSeekConfig
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is MODELS_BY_AUTO_CLASS[auto_class]
    assert type(AutoConfig.for_model(model_type)) is DeepSeekConfig
    if auto_class is AutoModelForCausalLM:
        ids = token_ids(2, 7)
        assert torch.equal(outputs(loaded, ids), outputs(model, ids))


# Not V4: its own class takes no other ratios than the released ones, which tiny_v4 has.
@pytest.mark.parametrize("model_type", sorted(PRESETS.keys() - {"deepseek_v4"}))
def test_without_it_and_after_it_they_give_transformers_own(model_type, tmp_path):
    published(tmp_path, PRESETS[model_type])
    for undone in (False, True):
        if undone:
            register(native=True)
            register(native=False)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded).__module__.startswith("transformers.models.")


# Tables by class name and model type ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True], ids=["", "by PEFT"])
@pytest.mark.parametrize("by", ["own type", "native"])
def test_a_plain_trainer_smooths_the_labels_of_the_next_tokens(by, wrapped, request, tmp_path):
    """And not, as for classes that transformers doesn't list, those of the tokens themselves."""
    if by == "native":
        request.getfixturevalue("native")
        published(tmp_path, "tiny_v3_mtp")
    else:
        tiny("tiny_v3").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    if wrapped:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
    arguments = TrainingArguments(tmp_path / "out", label_smoothing_factor=0.2, report_to=[], use_cpu=True)
    ids = token_ids(2, 7)
    with torch.no_grad():
        loss = Trainer(model.eval(), arguments).compute_loss(model, {"input_ids": ids, "labels": ids})
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(loss, F.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.2))


@pytest.mark.parametrize("task", ["text-generation", "text-classification", "token-classification"])
def test_pipelines_know_our_heads(task, tmp_path, caplog):
    words = train_tokenizer(["one two birds three", "red green blue seven"] * 3, 300)
    head = {"text-generation": "CausalLM", "text-classification": "SequenceClassification"}.get(task)
    made = MODELS_BY_AUTO_CLASS[getattr(transformers, f"AutoModelFor{head or 'TokenClassification'}")]
    model = tiny("tiny_llm", made, vocab_size=len(words), pad_token_id=words.pad_token_id)
    with caplog.at_level("ERROR"):
        assert pipeline(task, model=model, tokenizer=words)("one two")
    assert "not supported" not in caplog.text


TARGETS = {
    "tiny_llm": {"q_proj", "v_proj"},
    "tiny_moe": {"q_proj", "v_proj"},
    "tiny_v2_lite": {"q_proj", "kv_a_proj_with_mqa"},
    "tiny_v4": {"wq_b", "wkv"},
    "tiny_v4.1": {"wq_b", "wkv"},
}


@pytest.mark.parametrize("name", TINY)
def test_peft_finds_modules_where_none_are_named(name):
    adapted = get_peft_model(tiny(name), LoraConfig(init_lora_weights=False))
    found = {key.split(".")[-1] for key, part in adapted.named_modules() if hasattr(part, "lora_A")}
    assert found == TARGETS.get(name, {"q_b_proj", "kv_a_proj_with_mqa"})
    attentions = [key for key, part in adapted.named_modules() if key.endswith("self_attn")]
    assert sum(hasattr(part, "lora_A") for part in adapted.modules()) == 2 * len(attentions)


@pytest.mark.parametrize("method", [IA3Config, LNTuningConfig, LoHaConfig, AdaLoraConfig, VeraConfig])
def test_other_methods_of_peft_find_some_too(method):
    settings = {"total_step": 10} if method is AdaLoraConfig else {}
    for name in ("tiny_moe", "tiny_v3"):
        ids, adapted = token_ids(2, 7), get_peft_model(tiny(name), method(**settings))
        adapted(input_ids=ids, labels=ids).loss.backward()
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["tiny_moe", "tiny_v3", "tiny_v32"])
def test_peft_makes_a_smaller_model_of_the_config(name):
    """ShadowPEFT: a copy of fewer layers, of which only the copy learns."""
    adapted, ids = get_peft_model(tiny(name), ShadowConfig(task_type="CAUSAL_LM")), token_ids(2, 7)
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in adapted.parameters() if p.requires_grad)


# Scripts that know only Auto classes --------------------------------------------------------------------------------

ROWS = [
    {"question": "one two", "choices": [" three", " blue"], "answer": 0},
    {"question": "red green", "choices": [" seven", " blue birds"], "answer": 1},
    {"question": "birds", "choices": [" one", " two"], "answer": 1},
]


def choice_of(model, tokenizer, row):
    """The choice whose tokens the model finds likeliest after the question."""

    def likelihood(choice):
        context, whole = (tokenizer(text).input_ids for text in (row["question"], row["question"] + choice))
        logs = outputs(model, torch.tensor([whole])).log_softmax(-1)[0]
        return sum(logs[i - 1, whole[i]].item() for i in range(len(context), len(whole)))

    return max(range(2), key=lambda i: likelihood(row["choices"][i]))


@pytest.mark.slow
def test_lm_eval_on_a_local_task(native, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval 0.4 is not installed")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder, tasks = tmp_path / "model", tmp_path / "tasks"
    tasks.mkdir()
    folder.mkdir()
    model = published(folder, "tiny_v3_mtp", tokenizer=True)
    (tasks / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    (tasks / "local.yaml").write_text(
        "task: local_choice\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    validation: {tasks / 'rows.jsonl'}\n"
        "output_type: multiple_choice\nvalidation_split: validation\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\ndoc_to_choice: "{{choices}}"\n'
        'target_delimiter: ""\nmetric_list:\n  - metric: acc\n'
    )
    harness = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=2)
    assert type(harness.model) is DeepSeekForCausalLM
    results = lm_eval.simple_evaluate(
        model=harness,
        tasks=["local_choice"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = [choice_of(model, tokenizer, row) == row["answer"] for row in ROWS]
    assert results["results"]["local_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))


@pytest.mark.slow
def test_one_step_of_trls_sft_trainer(native, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    folder = tmp_path / "model"
    folder.mkdir()
    before = published(folder, "tiny_v3_mtp", tokenizer=True)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_length=32,
    )
    rows = datasets.Dataset.from_list([{"text": row["question"] + row["choices"][0]} for row in ROWS])
    trainer = trl.SFTTrainer(model=str(folder), args=arguments, train_dataset=rows)
    assert type(trainer.model) is DeepSeekForCausalLM
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    assert not torch.equal(trainer.model.lm_head.weight, before.lm_head.weight)


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_a_folder_whose_classes_stood_in_one_file_opens(tmp_path, trust_remote_code):
    model = tiny("tiny_v3", DeepSeekForCausalLM)
    model.save_pretrained(tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    old = {
        auto_class: name.replace("language_heads", "modeling_deepseek") for auto_class, name in new["auto_map"].items()
    }
    (tmp_path / "config.json").write_text(json.dumps(new | {"auto_map": old}))
    (tmp_path / "language_heads.py").unlink()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust_remote_code)
    assert type(again) is DeepSeekForCausalLM and again.config.auto_map == new["auto_map"]
    ids = token_ids(2, 7)
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)
