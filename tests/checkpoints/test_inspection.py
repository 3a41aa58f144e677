"""`deepseek-hf inspect` says what a checkpoint is without loading a weight."""

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from configuration_deepseek import preset
from finetune_deepseek.__main__ import main
from finetune_deepseek.checkpoints.cache_size import cached_width
from finetune_deepseek.checkpoints.checkpoint import official_weights
from finetune_deepseek.checkpoints.export import export_native
from finetune_deepseek.checkpoints.inspection import (
    active_parameters,
    count_parameters,
    inspect_checkpoint,
)
from finetune_deepseek.commands.inspect import size
from finetune_deepseek.training.arguments import LoraArguments
from finetune_deepseek.training.weights.lora import apply_lora, census
from modeling_deepseek import DeepSeekForCausalLM, DeepSeekForImageClassification
from tests.checkpoints.conftest import header


@pytest.fixture
def said(capsys, monkeypatch):
    """What `deepseek-hf inspect` prints."""

    def run(*argv) -> str:
        monkeypatch.setattr(sys, "argv", ["deepseek-hf", "inspect", *map(str, argv)])
        code = main()
        output = capsys.readouterr()
        return output.out if code == 0 else output.err

    return run


@pytest.mark.parametrize("name", ["tiny_llm", "tiny_moe", "tiny_v2_lite", "tiny_v2", "tiny_v3", "tiny_v32"])
def test_counts_are_those_of_the_model(saved, name):
    model, folder = saved(name)
    found = inspect_checkpoint(folder)
    groups = {group: counts for group, counts in census(model).items() if counts.total}
    bias = sum(buffer.numel() for key, buffer in model.named_buffers() if key.endswith("e_score_correction_bias"))
    expected = {group: counts.total for group, counts in groups.items()}
    expected["norms, other"] += bias  # a buffer, which the census doesn't count
    assert found.parameters == expected
    assert found.active == sum(counts.active for counts in groups.values()) + bias
    assert found.weights == "match the config" and found.head == "ForCausalLM"
    assert found.memory["as stored"] == found.memory["float32"] == 4 * found.total


def test_mechanisms_cache_and_positions(saved):
    found = inspect_checkpoint(saved("tiny_v3")[1])
    assert list(found.layers) == ["0", "1-2"]
    assert found.layers["0"] == "mla (4 heads, latent 16 + rotary 8, query latent 24), dense (width 48)"
    assert "moe (3 of 8 experts, 2 of 4 groups, 1 shared, width 20, sigmoid noaux_tc)" in found.layers["1-2"]
    assert found.cache_per_token == 2 * 3 * (16 + 8)
    assert found.generation == "DeepSeek-V3, R1 or V3.1" and found.model_type == "deepseek_v3"
    assert found.positions == "128 (rotary theta 10000)"
    assert cached_width("mha", preset("tiny_llm")) == 2 * 2 * 8


def test_prediction_layers_and_fp8(saved, tmp_path):
    _, folder = saved("tiny_v3_mtp")
    export_native(folder, tmp_path / "fp8", dtype="fp8")
    found, before = inspect_checkpoint(tmp_path / "fp8"), inspect_checkpoint(folder)
    copies = 2 * 2 * 330 * 32
    assert found.parameters["mtp"] == before.parameters["mtp"] + copies
    assert found.active == before.active and found.weights == "match the config"
    assert found.stored["float8_e4m3fn"] > found.stored["float32"] > 0  # scales and correction bias
    assert before.memory["fp8"] < before.memory["bfloat16"]


def test_a_healthy_tokenizer(saved):
    assert {line.partition(":")[0] for line in inspect_checkpoint(saved("tiny_v3")[1]).tokenizer} == {"ok"}


def test_what_is_wrong_with_a_tokenizer(saved):
    _, folder = saved("tiny_v3", bos_token_id=7, vocab_size=280)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"pad_token": "<｜end▁of▁sentence｜>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ bos_token }}hi")
    lines = inspect_checkpoint(folder).tokenizer
    for warning in (
        "tokens for 280 rows of embeddings",
        "padding is <｜end▁of▁sentence｜>, which also ends a text",
        "bos id 0, 7 in config.json",
        "chat template with 2 BOS",
    ):
        assert any(line.startswith("warning: ") and line.endswith(warning) for line in lines), (warning, lines)
    assert "ok: BOS <｜begin▁of▁sentence｜> is not put before a text" in lines
    (folder / "tokenizer.json").unlink()
    assert inspect_checkpoint(folder).tokenizer[0].startswith("warning: no tokenizer that this package opens")


def test_a_model_of_images_needs_no_tokenizer(tmp_path):
    config = preset("tiny_llm", image_stem="patch", num_channels=1, patch_size=2)
    DeepSeekForImageClassification(config).save_pretrained(tmp_path)
    assert inspect_checkpoint(str(tmp_path)).tokenizer == ["ok: none; the model takes images"]


def test_no_weight_is_read(saved, monkeypatch):
    _, folder = saved("tiny_v3")

    class Headers:
        """An open file whose tensors can't be read."""

        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)
            self.offset_keys, self.get_slice = self.file.offset_keys, self.file.get_slice

    monkeypatch.setattr("finetune_deepseek.checkpoints.tensors.safe_open", Headers)
    assert inspect_checkpoint(folder).total > 0


def test_the_command(saved, said, tmp_path):
    model, folder = saved("tiny_v3")
    text = said(folder)
    assert f"{folder}: DeepSeek-V3, R1 or V3.1 (deepseek_v3), ForCausalLM" in text
    assert "79,592, 60,392 active per token" in text and "144 bytes per token" in text
    assert json.loads(said(folder, "--json"))["parameters"]["attention"] == 18_432
    apply_lora(model, LoraArguments(use_peft=True, lora_r=3)).save_pretrained(tmp_path / "adapter")
    adapter = said(tmp_path / "adapter")
    assert "LORA adapter, rank 3, alpha 32" in adapter and "experts" in adapter and "attention" in adapter
    assert "usage: deepseek-hf inspect" in help_of(said)


def help_of(said) -> str:
    with pytest.raises(SystemExit):
        said("--help")
    return "usage: deepseek-hf inspect"


def test_bad_input(saved, said, tmp_path):
    _, folder = saved("tiny_v3")
    assert "unexpected argument '--jsn' (did you mean '--json'?)" in said(folder, "--jsn")
    assert said(tmp_path / "absent").startswith(f"deepseek-hf: error: {tmp_path / 'absent'}: ")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert f"{path} is damaged" in said(folder)
    path.unlink()
    assert "holds no weights" in said(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_vl"}))
    assert "config.json has model_type 'deepseek_vl' (DeepSeek-VL), which DeepSeekConfig cannot read" in said(folder)


@pytest.mark.parametrize(
    "index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": null}', "[]"]
)
def test_an_index_that_is_none(saved, said, index):
    _, folder = saved("tiny_v3")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    assert f"{folder / 'model.safetensors.index.json'} is damaged" in said(folder)


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("id2label", ["a"], "id2label=['a'] must map numbers to labels"),
        ("num_hidden_layers", 3.0, "num_hidden_layers=3.0 is a float that does not fit int"),
        (
            "rope_parameters",
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2, "original_max_position_embeddings": 0},
            "original_max_position_embeddings=0 must be positive",
        ),
    ],
)
def test_a_broken_field_is_told_with_its_folder(saved, said, field, value, line):
    _, folder = saved("tiny_v3")
    config = json.loads((folder / "config.json").read_text()) | {field: value}
    (folder / "config.json").write_text(json.dumps(config))
    said_of_it = said(folder)
    assert f"deepseek-hf: error: {folder}: " in said_of_it and line in said_of_it


COMMAND = """
import sys
from finetune_deepseek.__main__ import guarded
assert guarded([sys.argv[1]], "inspect") == 0
sys.exit("torch" in sys.modules)
"""


@pytest.mark.parametrize("name", ["tiny_llm", "tiny_v2", "tiny_v3.2"])
def test_a_description_needs_no_torch(saved, tmp_path, name):
    """Which takes several times as long as all the rest."""
    _, folder = saved(name)
    export_native(folder, tmp_path / "native", dtype="bf16", max_shard_size="200KB")
    for source in (folder, tmp_path / "native"):
        subprocess.run([sys.executable, "-c", COMMAND, str(source)], check=True, stdout=subprocess.DEVNULL)


def test_an_adapter_needs_no_torch(saved, tmp_path):
    model, _ = saved("tiny_v3")
    apply_lora(model, LoraArguments(use_peft=True, lora_r=3)).save_pretrained(tmp_path / "adapter")
    command = [sys.executable, "-c", COMMAND, str(tmp_path / "adapter")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def test_weights_that_do_not_match_are_said(saved):
    _, folder = saved("tiny_v3")
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 4}
    (folder / "config.json").write_text(json.dumps(config))
    assert "weight model.layers.3.self_attn.q_a_proj.weight is missing" in inspect_checkpoint(folder).weights


def test_sizes():
    assert [size(999), size(1_300_000), size(671_000_000_000)] == ["999 bytes", "1.3 MB", "671 GB"]


def test_a_release_s_size():
    """V2-Lite: 15.7 billion parameters, 2.4 of them active per token, embeddings left out (its model card)."""
    config = preset("v2_lite")
    with torch.device("meta"):
        weights = official_weights(DeepSeekForCausalLM(config))
    counts = count_parameters(weights, config)
    assert round(sum(counts.values()) / 1e8) == 157
    assert 2.4e9 < active_parameters(counts, config) - counts["embeddings"] < 2.5e9


@pytest.mark.parametrize("name", ["tiny_v3", "tiny_v3_mtp", "tiny_v2_lite"])
@pytest.mark.parametrize(("dtype", "word"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp8", "fp8")])
def test_sizes_are_those_of_an_export(saved, tmp_path, name, dtype, word):
    _, folder = saved(name)
    export_native(folder, tmp_path / "out", dtype=dtype)
    written = header(tmp_path / "out")
    sizes = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
    count = sum(sizes[kind] * math.prod(shape) for kind, shape in written.values())
    assert inspect_checkpoint(folder).memory[word] == count
