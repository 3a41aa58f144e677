"""Object detection as a run: learned in a few steps, saved, opened by a pipeline, scored again; and what it reads."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image, ImageDraw
from transformers import AutoImageProcessor, AutoModelForObjectDetection, YolosConfig, pipeline

from configuration_deepseek import preset
from finetune_deepseek.commands.export import export
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.images.detection import scores
from finetune_deepseek.images.detection.arguments import DetectionArguments
from finetune_deepseek.images.detection.boxes import as_labels, placed_boxes, within
from finetune_deepseek.images.detection.reading import read_objects
from finetune_deepseek.images.detection.task import ObjectDetection
from finetune_deepseek.images.pixels import Place, Variation
from finetune_deepseek.training.run import run_stages
from modeling_deepseek import DeepSeekForCausalLM, DeepSeekForObjectDetection
from tests.images.test_reading import bytes_of, picture, save, write_rows
from tests.recommendation.test_benchmarks import BENCHMARKS, benchmark
from tests.small_runs import flags

COCO = pytest.importorskip("pycocotools.coco", reason='scores: pip install "deepseek-hf[images]"').COCO
COCOeval = pytest.importorskip("pycocotools.cocoeval").COCOeval
SETTINGS = {
    "preset": "tiny_llm",
    "config_overrides": '{"conv_channels": [8, 16], "conv_pooling": [2, 2]}',
    "use_cpu": True,
    "disable_tqdm": True,
    "per_device_train_batch_size": 8,
    "learning_rate": 0.01,
    "max_steps": 60,
}
COLOURS = {"red": (220, 30, 30), "blue": (20, 40, 220)}


def run(**settings):
    argv = flags(settings)
    return run_stages(ObjectDetection, parse_command("object_detection", DetectionArguments, argv))


def scene(draws):
    """A grey image of 24 x 32 pixels with a red square and a blue bar, and its objects."""
    image = Image.new("RGB", (32, 24), (120, 120, 120))
    objects = []
    for name, size in (("red", (8, 8)), ("blue", (12, 4))):
        x, y = int(draws.integers(0, 32 - size[0])), int(draws.integers(0, 24 - size[1]))
        ImageDraw.Draw(image).rectangle((x, y, x + size[0] - 1, y + size[1] - 1), fill=COLOURS[name])
        objects.append(([x, y, *size], name))
    return image, objects


def coco(folder, split, scenes):
    """Write images and their annotations in COCO's format; category 7 is blue, 9 green (without an object), 3 red."""
    numbers = {"blue": 7, "green": 9, "red": 3}
    content = {"images": [], "annotations": [], "categories": [{"id": n, "name": name} for name, n in numbers.items()]}
    for number, (image, objects) in enumerate(scenes, start=100):
        save(folder, {f"{split}/{number}.png": image})
        content["images"].append({"id": number, "file_name": f"{number}.png", "height": 24, "width": 32})
        for box, name in objects:
            content["annotations"].append(
                {"id": len(content["annotations"]), "image_id": number, "category_id": numbers[name], "bbox": box}
            )
    (folder / split / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    draws, folder = np.random.default_rng(0), tmp_path_factory.mktemp("scenes")
    coco(folder, "train", [scene(draws) for _ in range(16)])
    coco(folder, "valid", [scene(draws) for _ in range(3)])
    return coco(folder, "test", [scene(draws) for _ in range(5)])


@pytest.fixture(scope="module")
def learned(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("learned")
    return output, run(**SETTINGS, data_dir=folder, output_dir=output, flip=True, flip_vertical=True, shift=2)


def test_shapes_are_found_and_reported(learned):
    output, results = learned
    assert results["test_map_50"] > 0.4 > 0.3 > results["baseline_map_50"] and results["eval_map_50"] > 0.4
    lines = [json.loads(line) for line in (output / "generated_predictions.jsonl").read_text().splitlines()]
    assert lines[0]["source"] == "100.png" and lines[0]["image_id"] == 100
    best = max(lines[0]["prediction"], key=lambda one: one["score"])
    assert best["category"] in COLOURS and len(best["bbox"]) == 4
    results = json.loads((output / "predictions_coco.json").read_text())
    assert {one["category_id"] for one in results} == {3, 7}
    assert {one["image_id"] for one in results} == {100, 101, 102, 103, 104}
    with Image.open(output / "predictions.png") as image:
        assert image.size[0] > 300
    assert (output / "labels.csv").read_text().startswith("label,map,map_50,map_75,mar_100,objects\nblue,")
    card = ModelCard.load(output / "README.md")
    assert card.data.pipeline_tag == "object-detection" and "category without an object" in card.text
    assert "mAP 50-95" in card.text


def test_a_pipeline_gives_the_boxes_of_the_run(learned, folder):
    output, _ = learned
    detect = pipeline("object-detection", model=str(output), device="cpu")
    line = json.loads((output / "generated_predictions.jsonl").read_text().splitlines()[1])
    found = detect(str(folder / "test" / "101.png"), threshold=0.01)
    expected = sorted(line["prediction"], key=lambda one: -one["score"])
    found = sorted(found, key=lambda one: -one["score"])
    assert [one["label"] for one in found] == [one["category"] for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
        assert one["box"]["xmin"] == pytest.approx(other["bbox"][0], abs=1)


def test_it_is_scored_again_and_refuses_other_categories(learned, folder, tmp_path):
    settings = {"model_name_or_path": learned[0], "use_cpu": True, "disable_tqdm": True, "do_predict": True}
    again = run(**settings, data_dir=folder, output_dir=tmp_path / "out", per_device_eval_batch_size=3)
    for name in ("test_map", "test_map_50", "test_loss"):  # a smaller last batch
        assert again[name] == pytest.approx(learned[1][name], rel=1e-3)
    rows = [{"image": "a.png", "objects": {"bbox": [[1, 1, 4, 4]], "category": ["pink"]}}]
    save(tmp_path, {"a.png": picture(0, (32, 24))})
    file = write_rows(tmp_path / "test.jsonl", rows)
    with pytest.raises(ValueError, match=r"test: 1 label\(s\) that the model can't know, such as 'pink'"):
        run(**settings, test_file=file, output_dir=tmp_path / "out")


def test_an_adapter_and_a_set_learn_too(folder, tmp_path):
    fields = '{"conv_channels": [8, 16], "conv_pooling": [2, 2], "box_prediction": "set", "num_detection_tokens": 6}'
    base = SETTINGS | {"config_overrides": fields, "max_steps": 2, "do_train": True, "data_dir": folder}
    run(**base, output_dir=tmp_path / "base")
    settings = SETTINGS | {"preset": None, "config_overrides": None, "max_steps": 3, "data_dir": folder}
    results = run(**settings, model_name_or_path=tmp_path / "base", use_peft=True, output_dir=tmp_path / "adapter")
    again = run(model_name_or_path=tmp_path / "adapter", data_dir=folder, output_dir=tmp_path / "again",
                do_predict=True, use_cpu=True, disable_tqdm=True)  # fmt: skip
    assert again["test_loss"] == pytest.approx(results["test_loss"], rel=1e-4)


def test_a_language_model_lends_its_trunk_and_transformers_classes_run_alike(folder, tmp_path):
    DeepSeekForCausalLM(preset("tiny_llm", max_position_embeddings=256)).save_pretrained(tmp_path / "language")
    common = SETTINGS | {"preset": None, "config_overrides": None, "max_steps": 1, "data_dir": folder}
    run(**common, model_name_or_path=tmp_path / "language", output_dir=tmp_path / "out")
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "out")
    assert model.config.attention_direction == "bidirectional" and model.config.id2label == {0: "blue", 1: "red"}
    YolosConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[24, 32],
                patch_size=8, num_detection_tokens=5).save_pretrained(tmp_path / "yolos")  # fmt: skip
    results = run(**common, config_name=tmp_path / "yolos", output_dir=tmp_path / "peer")
    assert results["test_loss"] > 0 and results["test_map"] >= 0


def test_a_bundle_has_the_models_boxes(tmp_path):
    torch.manual_seed(0)
    model = DeepSeekForObjectDetection(preset("tiny_v3", image_stem="conv", attention_direction="bidirectional"))
    model.eval().save_pretrained(tmp_path / "model")
    export([str(tmp_path / "model"), str(tmp_path / "bundle"), "--to", "bundle"])
    bundle = AutoModelForObjectDetection.from_pretrained(tmp_path / "bundle")
    pixels = torch.randn(2, 3, 9, 7)
    torch.testing.assert_close(bundle(pixels).logits, model(pixels).logits)


def test_the_processor_makes_of_an_image_what_training_reads(learned, folder):
    processor = AutoImageProcessor.from_pretrained(learned[0])
    assert dict(processor.size) == {"height": 24, "width": 32}
    task = ObjectDetection(DetectionArguments(data_dir=str(folder)), seed=0)
    task.load_splits()
    task._scaled(24, 32)
    task.labels = ["blue", "red"]
    collator = task.collator(processor)
    features = task.features(task.splits["test"], processor, is_training=False).add_column("row", list(range(5)))
    batch = collator([features[0]])
    expected = processor(Image.open(folder / "test" / "100.png"), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected, atol=1e-5, rtol=1e-5)
    target = task.splits["test"][0]["target"][1]
    x, y, width, height = target["bbox"]
    assert target["category"] == "blue" and batch["labels"][0]["class_labels"].tolist() == [1, 0]
    box = [(x + width / 2) / 32, (y + height / 2) / 24, width / 32, height / 24]
    torch.testing.assert_close(batch["labels"][0]["boxes"][1], torch.tensor(box))
    assert batch["size"].tolist() == [[24, 32]]


@pytest.mark.parametrize(
    "place",
    [
        Place(),
        Place(right=3.0, down=-2.0),
        Place(factor=1.5, right=2.0),
        Place(angle=90.0),
        Place(angle=20.0, factor=1.2, down=1.0, is_upside_down=True),
        Place(angle=-15.0, right=4.0, is_mirrored=True),
    ],
)
def test_boxes_go_where_their_pixels_go(place):
    image = torch.zeros(1, 3, 60, 80)
    image[:, :, 22:34, 30:50] = 1
    varied = Variation({"shift": 1.0, "flip": 1.0}, torch.zeros(3)).of(image, [place], [])
    rows, columns = (varied[0, 0] > 0.5).nonzero().unbind(-1)
    seen = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
    found = placed_boxes(torch.tensor([[30.0, 22.0, 50.0, 34.0]]), place, 60, 80)[0]
    assert (found - seen).abs().max() <= 1.3


def test_boxes_are_cut_and_those_left_by_their_image_dropped():
    corners = torch.tensor([[-5.0, 2, 5, 6], [-9.0, 2, 1, 6], [12.0, 3, 15, 5], [2.0, 2, 4, 4]])
    cut, is_kept = within(corners, 8, 10)
    assert is_kept.tolist() == [True, False, False, True] and cut[0].tolist() == [0, 2, 5, 6]
    labels = as_labels(cut[is_kept], torch.tensor([1, 0]), 8, 10)
    torch.testing.assert_close(labels["boxes"][0], torch.tensor([0.25, 0.5, 0.5, 0.5]))


def test_a_score_that_is_no_number_is_behind_all_others():
    found = [{"scores": torch.tensor([torch.nan, 0.3, 0.9]), "labels": torch.arange(3), "boxes": torch.eye(3, 4)}]
    task = object.__new__(ObjectDetection)
    task.processor = SimpleNamespace(post_process_object_detection=lambda *_: found)
    inputs = {"pixel_values": None, "labels": [{"class_labels": torch.tensor([1])}], "size": None}
    inputs |= {"is_annotated": torch.tensor([True])}
    predicted = task.predict_batch(lambda **_: SimpleNamespace(loss=torch.tensor(1.0)), inputs).outputs
    assert predicted[0, :3, 5].tolist() == [2, 1, 0] and predicted[0, 2, 4] == -torch.inf


def test_precision_is_that_of_a_case_by_hand():
    """Two objects; the best prediction is right, the next wrong, the third right at overlaps up to .6."""
    targets = [[{"bbox": [0, 0, 10, 10], "category": "a"}, {"bbox": [20, 20, 10, 10], "category": "a"}], []]
    found = [
        [
            {"bbox": [0, 0, 10, 10], "category": "a", "score": 0.9},
            {"bbox": [20, 20, 10, 6.2], "category": "a", "score": 0.5},
        ],
        [{"bbox": [0, 0, 5, 5], "category": "a", "score": 0.7}],
    ]
    result = scores.summary(scores.measured(found, targets, ["a", "b"]))
    at_half = (51 + 50 * 2 / 3) / 101  # recalls to .5 at precision 1, those beyond at 2 / 3
    at_most = 51 / 101
    assert result["map_50"] == pytest.approx(at_half)
    assert result["map_75"] == pytest.approx(at_most)
    assert result["map"] == pytest.approx((3 * at_half + 7 * at_most) / 10)
    assert result["mar_100"] == pytest.approx((3 * 1 + 7 * 0.5) / 10)
    assert scores.summary(scores.measured([[], []], targets, ["a", "b"]))["map"] == 0
    assert scores.summary(scores.measured([[], []], [[], []], ["a", "b"])) == {}
    table = scores.by_label(scores.measured(found, targets, ["a", "b"]), targets, ["a", "b"])
    assert list(table.index) == ["a"] and table.loc["a", "objects"] == 2


def test_tables_are_read_and_their_faults_named(tmp_path):
    wrong = {"bbox": [[1, 1, 3, 3], [1, 1, 3, 3], [30, 2, 9, 5], [5, 5, 0, 3], [40, 40, 3, 3], [-0.5, 0, 2, 2]],
             "category": ["a", "a", "b", "a", "a", "a"]}  # fmt: skip
    rows = [
        {"file_name": "a.png", "objects": wrong},
        {"file_name": "b.png", "objects": []},
        {"file_name": "c.png", "objects": [{"bbox": [0, 0, 2, 2], "category": "b"}]},
        {"file_name": "none.png", "objects": []},
        {"file_name": "a.png", "objects": None},
        {"file_name": "dot.png", "objects": []},
    ]
    images = {f"{name}.png": picture(number, (32, 24)) for number, name in enumerate("abc")}
    save(tmp_path / "train", images | {"dot.png": picture(4, (1, 1))})
    write_rows(tmp_path / "train" / "metadata.jsonl", rows)
    found = read_objects(DetectionArguments(data_dir=str(tmp_path)))["train"]
    assert [row["source"] for row in found[0]] == [f"metadata.jsonl, row {number}" for number in (1, 2, 3)]
    assert [one["bbox"] for one in found[0]["target"][0]] == [[1, 1, 3, 3], [30, 2, 2, 5], [0, 0, 1.5, 2]]
    faults = {check: len(names) for check, names in found[1].faults.items()}
    assert faults == {"duplicate_boxes": 1, "boxes_outside": 1, "boxes_without_area": 2, "images_without_objects": 1,
                      "broken_images": 1, "without_label": 1, "one_pixel_images": 1}  # fmt: skip
    assert found[1].faults["boxes_without_area"][0] == "metadata.jsonl, row 1: a at 5 5 0 3"


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"bbox": [[1, 2, 3]], "category": ["a"]}, r"row 1: 'objects' has a bbox that is no x, y, width and height"),
        ({"bbox": [[1, 2, 3, float("nan")]], "category": ["a"]}, "no x, y, width and height"),
        ({"bbox": [[1, 2, 3, 4]], "category": []}, "no bbox and category for each object"),
        ({"bbox": [[1, 2, 3, 4]], "category": [None]}, "an object without a category"),
        ([{"box": [1, 2, 3, 4]}], "no bbox and category for each object"),
    ],
)
def test_objects_that_are_none_are_refused(tmp_path, objects, message):
    save(tmp_path, {"a.png": picture()})
    file = write_rows(tmp_path / "train.jsonl", [{"image": "a.png", "objects": objects}])
    with pytest.raises(ValueError, match=message):
        read_objects(DetectionArguments(train_file=file))


def test_annotations_that_are_wrong_are_refused(tmp_path):
    def read(**changes):
        content = {"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 1, "name": "a"}],
                   "annotations": [{"id": 5, "image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2]}]}  # fmt: skip
        (tmp_path / "train.json").write_text(json.dumps(content | changes))
        return read_objects(DetectionArguments(train_file=str(tmp_path / "train.json")))

    with pytest.raises(ValueError, match=r"no row has an image and a label \(a.png: no such file in .*--image_dir"):
        read()
    save(tmp_path, {"a.png": picture()})
    assert read()["train"][0]["target"] == [[{"bbox": [0, 0, 2, 2], "category": "a"}]]
    with pytest.raises(ValueError, match="train.json: annotation 5 names category 2, which isn't there"):
        read(annotations=[{"id": 5, "image_id": 1, "category_id": 2, "bbox": [0, 0, 2, 2]}])
    with pytest.raises(ValueError, match="no 'file_name' where COCO's format has one"):
        read(images=[{"id": 1}])
    crowd = {"id": 5, "image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2], "iscrowd": 1}
    rows, pictures = read(annotations=[crowd])["train"]
    assert rows["target"] == [[]] and rows["crowds"] == [[{"bbox": [0, 0, 2, 2], "category": "a"}]]
    assert pictures.faults == {"crowds": ["a.png: a at 0 0 2 2"], "images_without_objects": ["a.png"]}
    with pytest.raises(ValueError, match="train: 1 of 1 images are from files without annotations"):
        (tmp_path / "train.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "a.png"}]}))
        read_objects(DetectionArguments(train_file=str(tmp_path / "train.json")))


THREE = {  # an object and a crowd of its category; an object; nothing
    "images": [{"id": number, "file_name": f"{number}.png"} for number in (4, 5, 6)],
    "categories": [{"id": 8, "name": "a"}],
    "annotations": [
        {"id": 1, "image_id": 4, "category_id": 8, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0},
        {"id": 2, "image_id": 4, "category_id": 8, "bbox": [10, 0, 20, 20], "area": 400, "iscrowd": 1},
        {"id": 3, "image_id": 5, "category_id": 8, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0},
    ],
}
FOUND = {  # box and score; those of image 4 but the first lie in the crowd
    4: [([0, 0, 10, 10], 0.6), ([10, 0, 10, 10], 0.9), ([12, 2, 12, 12], 0.8)],
    5: [([0, 0, 10, 9], 0.7)],
    6: [([3, 3, 6, 6], 0.65)],
}


def by_pycocotools():
    """mAP of `FOUND`, with the parameters that pycocotools has by itself."""
    truth = COCO()
    truth.dataset = {"info": {}, **THREE}
    truth.createIndex()
    found = [
        {"image_id": image, "category_id": 8, "bbox": box, "score": score}
        for image, boxes in FOUND.items()
        for box, score in boxes
    ]
    evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize("kind", ["coco", "table"])
def test_what_is_found_in_a_crowd_counts_as_pycocotools_counts_it(tmp_path, kind):
    save(tmp_path, {f"{number}.png": picture(number, (32, 24)) for number in (4, 5, 6)})
    if kind == "coco":
        (tmp_path / "test.json").write_text(json.dumps(THREE))
        rows, pictures = read_objects(DetectionArguments(test_file=str(tmp_path / "test.json")))["test"]
    else:
        table = [
            {
                "image": f"{image['id']}.png",
                "objects": [
                    {"bbox": one["bbox"], "category": "a", "iscrowd": one["iscrowd"]}
                    for one in THREE["annotations"]
                    if one["image_id"] == image["id"]
                ],
            }
            for image in THREE["images"]
        ]
        rows, pictures = read_objects(DetectionArguments(test_file=write_rows(tmp_path / "test.jsonl", table)))["test"]
    assert [len(names) for names in pictures.faults.values()] == [1, 1]
    assert set(pictures.faults) == {"crowds", "images_without_objects"}
    predictions = [[{"bbox": box, "category": "a", "score": score} for box, score in own] for own in FOUND.values()]
    task = object.__new__(ObjectDetection)
    task.labels = ["a"]
    found = task.score(predictions, list(rows))
    # In order of score: right (at overlaps up to .9), wrong, right; those in the crowd are none of them.
    at_half = (51 + 50 * 2 / 3) / 101
    assert found["map_50"] == pytest.approx(at_half)
    at_last = 51 * (1 / 3) / 101  # where the third alone is right
    assert found["map"] == pytest.approx((9 * at_half + at_last) / 10)
    stats = by_pycocotools()
    for name, place in (("map", 0), ("map_50", 1), ("map_75", 2), ("mar_100", 8)):
        assert found[name] == pytest.approx(stats[place])


def test_images_without_annotations_are_predicted_and_not_scored(learned, folder, tmp_path):
    content = json.loads((folder / "test" / "_annotations.coco.json").read_text())
    del content["annotations"]
    (tmp_path / "images.json").write_text(json.dumps(content))
    output = tmp_path / "out"
    results = run(model_name_or_path=learned[0], use_cpu=True, disable_tqdm=True, do_predict=True, output_dir=output,
                  test_file=tmp_path / "images.json", image_dir=folder / "test")  # fmt: skip
    assert not any(name in results for name in ("test_map", "test_loss", "baseline_map"))
    lines = [json.loads(line) for line in (output / "generated_predictions.jsonl").read_text().splitlines()]
    known = [json.loads(line) for line in (learned[0] / "generated_predictions.jsonl").read_text().splitlines()]
    assert [len(line["prediction"]) for line in lines] == [len(line["prediction"]) for line in known]
    assert lines[0]["prediction"][0]["bbox"] == pytest.approx(known[0]["prediction"][0]["bbox"], abs=0.02)
    report = json.loads((output / "data_report.json").read_text())["test"]
    assert report["images_without_annotations"]["count"] == 5 and "images_without_objects" not in report


def test_numbered_categories_get_their_names(tmp_path):
    save(tmp_path, {"a.png": picture()})
    rows = [{"image": "a.png", "objects": {"bbox": [[0, 0, 2, 2]], "category": [1]}}]
    file = write_rows(tmp_path / "train.jsonl", rows)
    for names, expected in ((None, "1"), (["x", "y"], "y")):
        rows = read_objects(DetectionArguments(train_file=file, category_names=names))["train"][0]
        assert rows["target"][0][0]["category"] == expected
    with pytest.raises(ValueError, match="has category 1; names are known from 0 to 0"):
        read_objects(DetectionArguments(train_file=file, category_names=["x"]))


def test_names_of_a_parquet_file_are_those_of_its_data_set(tmp_path):
    from datasets import ClassLabel, Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    objects = {"bbox": List(List(Value("float32"))), "category": List(ClassLabel(names=["cat", "dog"]))}
    features = Features({"image": ImageFeature(), "objects": objects})
    row = {"image": {"bytes": bytes_of(picture())}, "objects": {"bbox": [[0, 0, 2, 2]], "category": [1]}}
    Dataset.from_list([row], features=features).to_parquet(tmp_path / "train.parquet")
    rows, pictures = read_objects(DetectionArguments(train_file=str(tmp_path / "train.parquet")))["train"]
    assert rows["target"][0][0]["category"] == "dog" and pictures.empty == ["cat"]


def test_what_boxes_do_not_have_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="--label_smoothing_factor 0.1: boxes have none"):
        run(**SETTINGS, data_dir=folder, output_dir=tmp_path, label_smoothing_factor=0.1)


def test_the_flags_of_the_benchmark_are_known(tmp_path, monkeypatch):
    compare = benchmark(monkeypatch, "compare")
    for settings in compare.systems_of(compare.read_table(BENCHMARKS / "bccd.yaml")).values():
        argv = compare.flags(settings | {"output_dir": tmp_path, "use_cpu": True}, {"data": "data", "here": "here"})
        (stage,) = parse_command("object_detection", DetectionArguments, argv)
        assert stage.data.size == (120, 160) and stage.training.train_minutes == 8
