"""Saved models of images in a process without our packages: by its Auto class with trust_remote_code, and by
transformers' pipeline; and what its folder holds."""

from __future__ import annotations

import json

import pytest

STEMS = ["patch", "conv", "conv_lstm"]
WAYS = ["grid", "pyramid", "set"]


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
    assert {"image_heads", "image_stem", "modeling_deepseek"} <= names
    assert not names & {"language_heads", "detection_head", "grid_boxes"}


def save_detectors(folder, ways):
    """Save a detector for each way of prediction, with an image processor; chances and boxes of a picture."""
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, DetrImageProcessorPil

    from configuration_deepseek import preset
    from modeling_deepseek import DeepSeekForObjectDetection

    Image.frombytes("RGB", (24, 16), bytes(7 * i % 256 for i in range(24 * 16 * 3))).save(f"{folder}/colour.png")
    facts = {}
    for way in ways:
        torch.manual_seed(0)
        fields = {"attention_direction": "bidirectional", "id2label": {0: "round", 1: "flat"}, "vocab_size": 1}
        fields |= {"box_stride": 1} if way == "pyramid" else {"box_prediction": way, "num_detection_tokens": 6}
        fields |= {"pad_token_id": None, "initializer_range": 0.2}
        model = DeepSeekForObjectDetection(preset("tiny_v3", image_stem="conv", **fields)).eval()
        model.save_pretrained(f"{folder}/{way}")
        DetrImageProcessorPil(size={"height": 8, "width": 12}, do_pad=False).save_pretrained(f"{folder}/{way}")
        pixels = AutoImageProcessor.from_pretrained(f"{folder}/{way}")(
            Image.open(f"{folder}/colour.png"), return_tensors="pt"
        )
        with torch.no_grad():
            found = model(**pixels)
        facts[way] = [found.logits.softmax(-1)[0].tolist(), found.pred_boxes[0].tolist()]
    return facts


def load_detectors(folder, ways, trust_remote_code):
    """Class, chances, boxes and the pipeline's answers by way."""
    import torch
    import transformers
    from PIL import Image

    trust = {"trust_remote_code": True} if trust_remote_code else {}
    if not trust_remote_code:
        import modeling_deepseek  # noqa: F401 - this alone registers everything
    facts = {}
    for way in ways:
        model = transformers.AutoModelForObjectDetection.from_pretrained(f"{folder}/{way}", **trust)
        processor = transformers.AutoImageProcessor.from_pretrained(f"{folder}/{way}")
        with torch.no_grad():
            found = model(**processor(Image.open(f"{folder}/colour.png"), return_tensors="pt"))
        detect = transformers.pipeline("object-detection", model=f"{folder}/{way}", **trust)
        boxes = detect(f"{folder}/colour.png", threshold=0.005)
        kind = type(model).__module__.split(".")[0]
        facts[way] = [kind, found.logits.softmax(-1)[0].tolist(), found.pred_boxes[0].tolist(), boxes]
    return facts


@pytest.fixture(scope="module")
def detectors(tmp_path_factory, run_client):
    folder = tmp_path_factory.mktemp("detectors")
    return folder, run_client(save_detectors, str(folder), WAYS)


@pytest.mark.parametrize("is_stranger", [False, True])
def test_detectors_are_opened_by_their_auto_class_and_the_pipeline(detectors, run_client, run_stranger, is_stranger):
    folder, saved = detectors
    facts = (run_stranger if is_stranger else run_client)(load_detectors, str(folder), WAYS, is_stranger)
    for way, (package, chances, boxes, found) in facts.items():
        assert package == ("transformers_modules" if is_stranger else "modeling_deepseek")
        for one, other in zip(chances + boxes, saved[way][0] + saved[way][1], strict=True):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
        best = [max(row[:2]) for row in chances]
        assert [one["score"] for one in found] == pytest.approx([score for score in best if score > 0.005])
        assert found and {one["label"] for one in found} <= {"round", "flat"}


def test_a_detectors_folder_names_its_head_alone(detectors):
    folder, _ = detectors
    config = json.loads((folder / "grid" / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_deepseek.DeepSeekConfig",
        "AutoModel": "modeling_deepseek.DeepSeekModel",
        "AutoModelForObjectDetection": "detection_head.DeepSeekForObjectDetection",
    }
    names = {file.stem for file in (folder / "grid").glob("*.py")}
    assert {"detection_head", "grid_boxes", "boxes", "image_model"} <= names
    assert not names & {"language_heads", "image_heads", "embedding_head"}
