"""Models by every flag: presets, any config, checkpoints; and checkpoints that can't be used."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from configuration_deepseek.presets import PRESETS, preset
from finetune_deepseek.training.arguments import ModelArguments
from finetune_deepseek.training.loading import make_config, parse_overrides, pretrained_model
from modeling_deepseek import DeepSeekForCausalLM
from tokenization_deepseek import train_tokenizer

ONE_STEP = {"max_steps": 1, "do_train": True, "do_predict": True}
TINY_PRESETS = [name for name in PRESETS if name.startswith("tiny")]


@pytest.fixture
def checkpoint(tmp_path):
    tokenizer = train_tokenizer(["one two birds three", "eins zwei Vögel drei"] * 3, 300)
    DeepSeekForCausalLM(preset("tiny_moe", vocab_size=len(tokenizer))).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("name", TINY_PRESETS)
def test_one_step_of_every_tiny_preset(name, finetune, data, tmp_path):
    results = finetune(output_dir=tmp_path / "out", **(ONE_STEP | data | {"preset": name}))
    assert results["test_samples"] == 3
    assert 4 < results["train_loss"] < 8  # ln(283) = 5.6 for random weights


def test_any_config_of_transformers(finetune, data, tmp_path):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128
    )
    config.save_pretrained(tmp_path / "llama")
    settings = {"preset": None, "config_name": tmp_path / "llama", "config_overrides": "num_hidden_layers=1"}
    finetune(output_dir=tmp_path / "out", **(ONE_STEP | data | settings))
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (saved["model_type"], saved["num_hidden_layers"]) == ("llama", 1)
    # Its checkpoint is read by our class, or with --native by transformers', to the same end.
    settings = {"preset": None, "vocab_size": None, "model_name_or_path": tmp_path / "out", **data}
    settings |= {"do_train": True, "do_eval": True, "max_steps": 1}
    ours = finetune(output_dir=tmp_path / "ours", **settings)
    native = finetune(output_dir=tmp_path / "native", native=True, **settings)
    types = [json.loads((tmp_path / name / "config.json").read_text())["model_type"] for name in ("ours", "native")]
    assert types == ["deepseek", "llama"]
    assert ours["eval_loss"] == pytest.approx(native["eval_loss"], rel=1e-4)
    with pytest.raises(ValueError, match="--native needs --model_name_or_path"):
        finetune(output_dir=tmp_path / "o", native=True, **data)


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    config.pop("auto_map")  # else transformers asks to run the checkpoint's own code
    path.write_text(json.dumps(config))


def drop_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_weights(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda folder: (folder / "config.json").unlink(), "config.json|model_type"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: edit_config(folder, model_type="deepsick"), "deepsick"),
        (lambda folder: edit_config(folder, intermediate_size=50), "size|shape"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (drop_weight, "self_attn.q_proj"),
        (cut_weights, "safetensors|[Hh]eader|buffer"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_one_line(damage, message, checkpoint, finetune, data, tmp_path):
    damage(checkpoint)
    settings = {"preset": None, "model_name_or_path": checkpoint, "tokenizer_name": None}
    with pytest.raises(ValueError, match=message) as error:
        finetune(output_dir=tmp_path / "out", **(ONE_STEP | data | settings))
    assert str(error.value).startswith(f"--model_name_or_path {checkpoint}: ")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").rglob("*"))


def test_tokenizer_of_another_model(checkpoint, finetune, data, tmp_path):
    bigger = train_tokenizer(["one two birds three", "eins zwei Vögel drei", "vier fünf sechs"] * 3, 400)
    bigger.save_pretrained(tmp_path / "bigger")
    settings = {"preset": None, "model_name_or_path": checkpoint, "tokenizer_name": tmp_path / "bigger"}
    with pytest.raises(ValueError, match="The tokenizer has .* tokens, the model .*; name the model's own"):
        finetune(output_dir=tmp_path / "out", **(ONE_STEP | data | settings))


def test_without_a_model(finetune, data, tmp_path):
    with pytest.raises(ValueError, match="No model is named: give --model_name_or_path, --preset or --config_name"):
        finetune(output_dir=tmp_path / "out", preset=None, **data)


def test_a_package_that_a_models_own_code_needs_is_named_in_one_line(tmp_path):
    """Code that a user trusts may import what isn't installed."""
    fields = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}, "architectures": ["OwnForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "own.py").write_text("import absent_package_of_theirs\n\n\nclass OwnConfig:\n    pass\n")
    arguments = ModelArguments(model_name_or_path=str(tmp_path), trust_remote_code=True)
    with pytest.raises(ValueError, match="absent_package_of_theirs") as error:
        pretrained_model(arguments, AutoModelForCausalLM)
    assert str(error.value).startswith(f"--model_name_or_path {tmp_path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "max_position_embeddings=512",
            "max_position_embeddings=512: other flags, the data or the tokenizer make it 50",
        ),
        ("hidden_size=64,vocab_size=10", "vocab_size=10: .* make it 283"),
        ("attention_dropout=0.2", "attention_dropout=0.2: .* make it 0.1"),
    ],
)
def test_an_override_of_what_the_task_or_tokenizer_decides_is_refused(overrides, message):
    tokenizer = train_tokenizer(["one two birds three", "eins zwei Vögel drei"] * 3, 283)
    arguments = ModelArguments(preset="tiny_v3", config_overrides=overrides, attention_dropout=0.1)
    with pytest.raises(ValueError, match=f"^--config_overrides {message}; leave it out there"):
        make_config(arguments, tokenizer, {"max_position_embeddings": 50}, {})
    agreeing = ModelArguments(preset="tiny_v3", config_overrides="max_position_embeddings=50,hidden_size=64")
    config = make_config(agreeing, tokenizer, {"max_position_embeddings": 50}, {})
    assert (config.max_position_embeddings, config.hidden_size) == (50, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a=1,b", "'b' has no value; write name=value,name=value."),
        ("a=1, a=2", "a is there twice; keep one."),
        ("{a: 1", "while parsing a flow mapping"),
        ("a=[", "while parsing a flow node"),
    ],
)
def test_overrides_that_cant_be_read_are_one_line(text, message):
    with pytest.raises(ValueError, match="^--config_overrides ") as error:
        parse_overrides(text)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a=1e-3,b=2,c=silu", '{"a": 1e-3, "b": 2, "c": "silu"}', "{a: 1E-3, b: 2, c: silu}"])
def test_powers_of_ten_in_overrides_are_numbers(text):
    assert parse_overrides(text) == {"a": 0.001, "b": 2, "c": "silu"}
