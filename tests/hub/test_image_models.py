"""A saved image classifier in a process without our packages: by its Auto class with trust_remote_code, and by
transformers' pipeline; and what its folder holds."""

from __future__ import annotations

import json

import pytest

STEMS = ["patch", "conv", "conv_lstm"]


def save(folder, stems):
    """Save a model for each stem, with an image processor; the logits of a grey picture by stem."""
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, ViTImageProcessorPil

    from configuration_deepseek import preset
    from modeling_deepseek import DeepSeekForImageClassification

    grey = Image.new("L", (9, 9))
    grey.putdata([(7 * i) % 256 for i in range(81)])
    grey.save(f"{folder}/grey.png")
    facts = {}
    for stem in stems:
        torch.manual_seed(0)
        labels = {0: "round", 1: "flat", 2: "other"}
        fields = {"attention_direction": "bidirectional", "id2label": labels, "vocab_size": 1, "pad_token_id": None}
        config = preset("tiny_v3", image_stem=stem, initializer_range=0.2, **fields)
        model = DeepSeekForImageClassification(config).eval()
        model.save_pretrained(f"{folder}/{stem}")
        processor = ViTImageProcessorPil(
            size={"height": 8, "width": 8}, image_mean=[0.3] * 3, image_std=[0.2] * 3, do_convert_rgb=True
        )
        processor.save_pretrained(f"{folder}/{stem}")
        again = AutoImageProcessor.from_pretrained(f"{folder}/{stem}")
        facts[stem] = model(**again(grey, return_tensors="pt")).logits[0].tolist()
    return facts


def load(folder, stems, trust_remote_code):
    """Class, logits and the pipeline's answers by stem."""
    import torch
    import transformers
    from PIL import Image

    trust = {"trust_remote_code": True} if trust_remote_code else {}
    if not trust_remote_code:
        import modeling_deepseek  # noqa: F401 - this alone registers everything
    grey = Image.open(f"{folder}/grey.png")
    facts = {}
    for stem in stems:
        model = transformers.AutoModelForImageClassification.from_pretrained(f"{folder}/{stem}", **trust)
        processor = transformers.AutoImageProcessor.from_pretrained(f"{folder}/{stem}")
        with torch.no_grad():
            logits = model(**processor(grey, return_tensors="pt")).logits[0].tolist()
        classify = transformers.pipeline("image-classification", model=f"{folder}/{stem}", **trust)
        trunk = transformers.AutoModel.from_pretrained(f"{folder}/{stem}", **trust)
        found = classify(f"{folder}/grey.png")
        facts[stem] = [type(model).__module__.split(".")[0], type(trunk).__name__, logits, found]
    return facts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("image_models")


@pytest.fixture(scope="module")
def saved(run_client, folder):
    return run_client(save, str(folder), STEMS)


@pytest.mark.parametrize("is_stranger", [False, True])
def test_auto_classes_and_the_pipeline_open_it(saved, run_client, run_stranger, folder, is_stranger):
    facts = (run_stranger if is_stranger else run_client)(load, str(folder), STEMS, is_stranger)
    for stem, (package, trunk, logits, found) in facts.items():
        assert [package, trunk] == ["transformers_modules" if is_stranger else "modeling_deepseek", "DeepSeekModel"]
        assert logits == pytest.approx(saved[stem], rel=1e-5, abs=1e-6)
        names = ["round", "flat", "other"]
        assert [one["label"] for one in found] == [names[i] for i in sorted(range(3), key=lambda i: -logits[i])]


def test_its_folder_names_the_image_heads_alone(saved, folder):
    config = json.loads((folder / "conv" / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_deepseek.DeepSeekConfig",
        "AutoModel": "modeling_deepseek.DeepSeekModel",
        "AutoModelForImageClassification": "image_heads.DeepSeekForImageClassification",
    }
    names = {file.stem for file in (folder / "conv").glob("*.py")}
    assert {"image_heads", "image_stem", "modeling_deepseek"} <= names and "language_heads" not in names
