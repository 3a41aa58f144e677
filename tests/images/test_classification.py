"""Image classification as a run: learned by heart in a few steps, saved, opened by a pipeline, scored again."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessorPil, pipeline

from configuration_deepseek import DeepSeekConfig, preset
from finetune_deepseek.commands.export import export
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.images.arguments import ImageArguments
from finetune_deepseek.images.pixels import ClassCollator, Pixels, border_colour, most_frequent_size, placed
from finetune_deepseek.images.reading import read_images
from finetune_deepseek.images.task import ImageClassification
from finetune_deepseek.training.run import run_stages
from modeling_deepseek import DeepSeekForCausalLM, DeepSeekForImageClassification
from tests.images.test_reading import save
from tests.recommendation.test_benchmarks import BENCHMARKS, benchmark
from tests.small_runs import flags

SETTINGS = {
    "preset": "tiny_llm",
    "use_cpu": True,
    "disable_tqdm": True,
    "per_device_train_batch_size": 9,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "max_steps": 12,
}
COLOURS = {"red": (200, 30, 30), "green": (30, 190, 40), "blue": (20, 40, 220)}


def run(**settings):
    argv = flags(settings)
    return run_stages(ImageClassification, parse_command("image_classification", ImageArguments, argv))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three images of each of three colours, in every split."""
    draws, files = np.random.default_rng(0), {}
    for split in ("train", "validation", "test"):
        for name, colour in COLOURS.items():
            for number in range(3):
                noise = draws.integers(-20, 20, (8, 10, 3))
                files[f"{split}/{name}/{number}.png"] = Image.fromarray((noise + colour).clip(0, 255).astype(np.uint8))
    return save(tmp_path_factory.mktemp("colours"), files)


@pytest.fixture(scope="module")
def learned(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("learned")
    return output, run(**SETTINGS, data_dir=folder, output_dir=output, rotation=5, shift=1)


def test_colours_are_learned_and_reported(learned):
    output, results = learned
    assert results["test_accuracy"] == results["eval_macro_f1"] == results["baseline_accuracy"] == 1
    lines = [json.loads(line) for line in (output / "generated_predictions.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in lines] == [line["target"] for line in lines]
    assert lines[0]["source"] == "test/blue/0.png"
    with Image.open(output / "confusion_matrix.png") as image:
        assert image.size[0] > 300
    assert (output / "labels.csv").read_text().splitlines()[1].startswith("blue,1.0,1.0,1.0,3")
    assert not (output / "worst_images.png").exists()  # nothing is wrong
    card = ModelCard.load(output / "README.md")
    assert card.data.pipeline_tag == "image-classification"
    assert "AutoModelForImageClassification" in card.text and "generate" not in card.text


def test_the_processor_has_the_training_images_mean_and_what_training_read(learned, folder):
    output, _ = learned
    processor = AutoImageProcessor.from_pretrained(output)
    train = np.stack([np.array(Image.open(path)) for path in sorted(folder.glob("train/*/*.png"))]) / 255
    assert processor.image_mean == pytest.approx(train.mean((0, 1, 2)).tolist())
    assert processor.image_std == pytest.approx(train.std((0, 1, 2)).tolist())
    found = read_images(ImageArguments(data_dir=str(folder)))
    pixels = Pixels({split: pictures for split, (_, pictures) in found.items()}, 5, 7)
    collator = ClassCollator(pixels, processor, {"shift": 3.0}, torch.zeros(3), 0, num_labels=3)
    batch = collator([{"image": pixels.begins["test"], "labels": 0, "row": 0}])
    first = Image.open(folder / "test" / "blue" / "0.png")
    expected = processor(first, size={"height": 5, "width": 7}, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected, atol=1e-5, rtol=1e-5)


def test_a_pipeline_opens_it(learned, folder):
    output, _ = learned
    classify = pipeline("image-classification", model=str(output), device="cpu")
    assert classify(str(folder / "test" / "green" / "1.png"))[0]["label"] == "green"


def test_it_is_scored_again_by_its_own_labels(learned, folder, tmp_path):
    some = save(tmp_path, {"test/red/1.png": Image.new("RGB", (30, 20), COLOURS["red"])})
    settings = {"model_name_or_path": learned[0], "use_cpu": True, "disable_tqdm": True}
    results = run(**settings, data_dir=some, output_dir=tmp_path / "out")
    assert results["test_accuracy"] == 1 and "baseline_accuracy" not in results
    save(tmp_path, {"test/pink/1.png": Image.new("RGB", (3, 3))})
    with pytest.raises(ValueError, match=r"test: 1 label\(s\) that the model can't know, such as 'pink'"):
        run(**settings, data_dir=some, output_dir=tmp_path / "out")


@pytest.mark.parametrize("stem", ["patch", pytest.param("conv_lstm", marks=pytest.mark.slow)])
def test_the_other_stems_and_an_adapter_learn_too(folder, tmp_path, stem):
    base = {**SETTINGS, "data_dir": folder, "stem": stem, "balance": "sampler", "mixup": 0.2}
    run(**base | {"max_steps": 1, "do_train": True}, output_dir=tmp_path / "base")
    results = run(
        **SETTINGS | {"preset": None, "max_steps": 20},
        model_name_or_path=tmp_path / "base",
        data_dir=folder,
        use_peft=True,
        output_dir=tmp_path / "adapter",
    )
    assert results["test_accuracy"] == 1
    again = run(model_name_or_path=tmp_path / "adapter", data_dir=folder, output_dir=tmp_path / "again",
                do_predict=True, use_cpu=True, disable_tqdm=True)  # fmt: skip
    assert again["test_loss"] == pytest.approx(results["test_loss"], rel=1e-4)


def test_a_language_model_lends_its_trunk(folder, tmp_path):
    language = DeepSeekForCausalLM(preset("tiny_llm"))
    language.save_pretrained(tmp_path / "language")
    settings = SETTINGS | {"preset": None, "model_name_or_path": tmp_path / "language", "freeze": "dense"}
    results = run(**settings, data_dir=folder, output_dir=tmp_path / "out")
    assert results["test_accuracy"] == 1
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.attention_direction == "bidirectional" and model.config.vocab_size == 97
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, language.model.layers[1].mlp.up_proj.weight)


def test_balanced_weights_and_mixup_have_the_loss_that_is_written_here():
    task = ImageClassification(ImageArguments(train_file="unread"), seed=0)
    task.labels, task.weights = ["a", "b", "c"], np.array([0.5, 1.0, 2.0])
    logits = torch.tensor([[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]])
    loss = task.loss_function(0.0)
    chances = F.log_softmax(logits, dim=-1)
    expected = -(0.5 * chances[0, 0] + 2.0 * chances[1, 2])
    torch.testing.assert_close(loss({"logits": logits}, torch.tensor([0, 2]), 2), expected / 2)
    shares = torch.tensor([[0.3, 0.7, 0.0], [0.0, 0.0, 1.0]])
    expected = -(0.3 * 0.5 * chances[0, 0] + 0.7 * chances[0, 1] + 2.0 * chances[1, 2])
    torch.testing.assert_close(loss({"logits": logits}, shares, 6), expected / 2)  # Trainer counts six labels
    torch.testing.assert_close(loss({"logits": logits}, shares), expected / 2)


def test_images_are_turned_moved_and_enlarged_about_their_middle():
    dot = torch.zeros(1, 3, 7, 9)
    dot[0, :, 2, 6] = 1  # one above the middle row, two right of the middle column
    where = {
        (0.0, 1.0, 1.0, 2.0): (4, 7),  # right by one, down by two
        (90.0, 1.0, 0.0, 0.0): (1, 3),  # to the left: what was right is above
        (180.0, 1.0, 0.0, 0.0): (4, 2),
        (0.0, 2.0, 0.0, 0.0): (1, 8),
    }
    for place, (row, column) in where.items():
        found = placed(dot, [place], torch.zeros(3))[0, 0]
        assert divmod(int(found.argmax()), 9) == (row, column), place
        assert found.max() == pytest.approx(1, abs=1e-4)
    half = placed(dot, [(0.0, 1.0, 0.5, 0.0)], torch.zeros(3))[0, 0]
    assert half[2, 6].item() == pytest.approx(0.5) and half[2, 7].item() == pytest.approx(0.5)
    moved = placed(torch.ones(1, 3, 4, 4), [(0.0, 1.0, 2.0, 0.0)], torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(moved[0, :, 0, 0], torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(placed(dot, [(0.0, 1.0, 0.0, 0.0)], torch.zeros(3)), dot)


def test_variation_is_drawn_anew_in_each_epoch_and_the_same_when_resumed(folder):
    found = read_images(ImageArguments(data_dir=str(folder)))
    pixels = Pixels({split: pictures for split, (_, pictures) in found.items()}, 8, 10)
    amounts = {"shift": 1.0, "rotation": 9.0, "zoom": 0.2, "flip": 1.0, "noise": 0.1, "mixup": 0.4}
    features = [{"image": number, "labels": number % 3, "number": number} for number in range(4)]

    def batch(epoch):
        processor = type("Processor", (), {"image_mean": [0.0] * 3, "image_std": [1.0] * 3})
        collator = ClassCollator(pixels, processor, amounts, border_colour(pixels, [0, 1]), 5, num_labels=3)
        collator.set_epoch(epoch)
        return collator(features)

    first, again, other = batch(0), batch(0), batch(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["pixel_values"], other["pixel_values"])
    torch.testing.assert_close(first["labels"].sum(1), torch.ones(4))


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_a_new_model_has_room_for_its_images(folder, tmp_path, stem):
    run(
        **SETTINGS | {"max_steps": 1, "do_train": True}, data_dir=folder, output_dir=tmp_path, stem=stem, image_size=64
    )
    config = AutoModelForImageClassification.from_pretrained(tmp_path).config
    assert config.max_position_embeddings == 256  # 16 x 16 tokens, where tiny_llm has 128
    assert (config.patch_size, config.conv_channels, config.conv_pooling) == (4, [32, 64, 128], [1, 2, 2])


def test_sizes():
    assert most_frequent_size([(8, 8)] * 3 + [(9, 7)] * 2) == (8, 8)
    assert most_frequent_size([(448, 896)]) == (112, 224)
    assert most_frequent_size([(10 + n, 20 + n) for n in range(21)]) == (20, 30)


@pytest.mark.parametrize("stem", ["patch", None])
def test_a_head_reads_the_stem_without_a_trunk(folder, tmp_path, stem):
    settings = {**SETTINGS, "data_dir": folder, "max_steps": 1, "do_train": True, "stem": stem}
    run(**settings, config_overrides="num_hidden_layers=0", output_dir=tmp_path / "out")
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "out").config
    assert config.num_hidden_layers == 0 and config.image_stem == (stem or "conv")
    preset("tiny_llm").save_pretrained(tmp_path / "llm")  # a file that leaves the stem open
    again = settings | {"preset": None, "config_name": tmp_path / "llm", "config_overrides": "num_hidden_layers=0"}
    run(**again, output_dir=tmp_path / "again")
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "again").config
    assert config.num_hidden_layers == 0 and config.image_stem == (stem or "conv")


def test_flags_that_clash_are_refused(folder, tmp_path):
    common = {**SETTINGS, "data_dir": folder, "output_dir": tmp_path}
    with pytest.raises(ValueError, match="--stem conv clashes with image_stem patch"):
        run(**common, stem="conv", config_overrides="image_stem=patch")
    with pytest.raises(ValueError, match="--stem conv clashes with image_stem patch"):
        DeepSeekConfig(image_stem="patch").save_pretrained(tmp_path / "patch")
        run(**{**common, "preset": None, "config_name": tmp_path / "patch"}, stem="conv")
    with pytest.raises(ValueError, match="where there is no validation split"):
        run(**common, validation_share=0.5)
    with pytest.raises(ValueError, match="--image_size 1 2 3: give height and width, or one number"):
        ImageArguments(data_dir="x", image_size=[1, 2, 3])


def test_the_auto_class_opens_what_was_trained(learned):
    model = AutoModelForImageClassification.from_pretrained(learned[0])
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"} and model.config.image_stem == "conv"


def test_the_flags_of_the_benchmark_are_known(tmp_path, monkeypatch):
    compare = benchmark(monkeypatch, "compare")
    for settings in compare.systems_of(compare.read_table(BENCHMARKS / "optdigits.yaml")).values():
        argv = compare.flags(settings | {"output_dir": tmp_path, "use_cpu": True}, {"data": "data", "here": "here"})
        (stage,) = parse_command("image_classification", ImageArguments, argv)
        assert stage.data.pixel_max == 16 and stage.training.max_steps == 4000


def test_a_benchmarks_results_by_other_settings_are_refused(tmp_path, monkeypatch):
    compare = benchmark(monkeypatch, "compare")
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "results.md")
    started = []

    def start(command, **_):
        started.append(command)
        seed = command[command.index("--seed") + 1]
        (tmp_path / f"out/one/a_seed_{seed}/all_results.json").write_text('{"score": 0.5}')

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=start, STDOUT=None))
    table = {"name": "one", "title": "One", "text": "", "source": "none.", "task": "t", "common": {"rate": 1},
             "systems": {"a": {"size": None, "width": 2}}, "seeds": [0], "columns": {"score": "score"}}  # fmt: skip
    argv = ["compare.py", str(tmp_path / "one.yaml"), "--data", "d", "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", argv)

    def compared(**changed):
        (tmp_path / "one.yaml").write_text(yaml.safe_dump(table | changed))
        compare.main()

    compared()
    compared(systems={"a": {"width": 2}})  # null is as good as absent
    assert len(started) == 1 and "| a | 0 | 0.500 |" in (tmp_path / "results.md").read_text()
    with pytest.raises(SystemExit, match=r"a_seed_0 was run with other settings: remove it from .*out"):
        compared(common={"rate": 2})
    with pytest.raises(SystemExit, match="a_seed_0 was run with other settings"):
        compared(common={"rate": 2}, seeds=[1, 0])  # of which the first is run
    (tmp_path / "results/one.json").unlink()
    with pytest.raises(SystemExit, match="a_seed_0 was run with other settings"):
        compared(common={"rate": 2})


@pytest.mark.parametrize("stem", ["conv", "conv_lstm"])
def test_a_bundle_has_the_models_logits_and_its_processor(tmp_path, stem):
    torch.manual_seed(0)
    model = DeepSeekForImageClassification(preset("tiny_llm", image_stem=stem, attention_direction="bidirectional"))
    model.eval().save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 9, "width": 7}).save_pretrained(tmp_path / "model")
    export([str(tmp_path / "model"), str(tmp_path / "bundle"), "--to", "bundle"])
    bundle = AutoModelForImageClassification.from_pretrained(tmp_path / "bundle")
    pixels = torch.randn(2, 3, 9, 7)
    torch.testing.assert_close(bundle(pixels).logits, model(pixels).logits)
    assert AutoImageProcessor.from_pretrained(tmp_path / "bundle").size == {"height": 9, "width": 7}
