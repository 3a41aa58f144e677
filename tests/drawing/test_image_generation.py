"""Image generation as a run: learned by heart, drawn again by the verb, guided, scored; bad input in one line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_deepseek.commands.draw import draw
from finetune_deepseek.commands.export import export
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.drawing import Drawer, image_tokens
from finetune_deepseek.drawing.arguments import ImageGenerationArguments
from finetune_deepseek.drawing.captions import check_captioned, read_captioned
from finetune_deepseek.drawing.measures import Images, measured, psnr, spread
from finetune_deepseek.drawing.prompts import CaptionCollator
from finetune_deepseek.drawing.sheet import sheet
from finetune_deepseek.drawing.task import ImageGeneration
from finetune_deepseek.training.run import run_stages
from modeling_deepseek import DeepSeekForCausalLM
from tests.images.test_reading import picture, save, write_rows
from tests.small_runs import flags
from tokenization_deepseek import train_tokenizer

SETTINGS = {
    "preset": "tiny_v3",
    "vocab_size": 300,
    "use_cpu": True,
    "disable_tqdm": True,
    "per_device_train_batch_size": 3,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "max_steps": 120,
    "num_drawn": 3,
}
ROWS = [
    {"image": [0, 255, 0, 255, 0, 255], "caption": "a bar", "chinese": "条"},
    {"image": [255, 255, 255, 0, 0, 0], "caption": "a floor", "chinese": "地"},
    {"image": [0, 0, 0, 255, 255, 255], "caption": "a roof", "chinese": "顶"},
]


def rows_of(rows):
    return [row | {"image": np.array(row["image"]).reshape(2, 3).tolist()} for row in rows]


def run(**settings):
    return run_stages(ImageGeneration, parse_command("image_generation", ImageGenerationArguments, flags(settings)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        write_rows(folder / f"{split}.jsonl", rows_of(ROWS))
    return folder


@pytest.fixture(scope="module")
def learned(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("learned")
    return output, run(**SETTINGS, data_dir=data, output_dir=output, caption_column=["caption", "chinese"])


def test_images_are_learned_scored_and_drawn(learned):
    output, results = learned
    assert results["test_bits_per_token"] == pytest.approx(results["test_loss"] / np.log(2))
    assert results["test_loss"] < 0.1
    assert results["test_copies"] == results["test_drawn"] == 3
    lines = [json.loads(line) for line in (output / "generated_predictions.jsonl").read_text().splitlines()]
    assert [line["source"] for line in lines] == ["a bar", "地", "a roof"]
    colours = image_tokens.load(output).colours
    drawn = [colours[line["prediction"]][:, 0].tolist() for line in lines]
    assert drawn == [row["image"] for row in ROWS]
    assert Image.open(output / "drawn.png").size[1] > 2 * 128 * 2 / 3
    assert json.loads((output / "drawn.json").read_text())["captions"] == [line["source"] for line in lines]
    assert "Drawer.open" in (output / "README.md").read_text()


def test_the_verb_draws_what_each_caption_says_in_both_languages(learned, tmp_path, capsys):
    output, _ = learned
    path = tmp_path / "sheet.png"
    draw([str(output), "a bar", "地", "--temperature", "0", "--enlarge", "1", "--output", str(path)])
    assert f"2 images: {path}" in capsys.readouterr().out
    picture = np.array(Image.open(path))[..., 0]
    assert picture.shape == (2 * 4 + 2, 3 + 4)  # two images of 2 x 3, gaps of 2
    assert picture[2:4, 2:5].ravel().tolist() == ROWS[0]["image"]
    assert picture[6:8, 2:5].ravel().tolist() == ROWS[1]["image"]


def test_batches_guidance_and_seeds(learned, capsys):
    drawer = Drawer.open(str(learned[0]))
    captions = ["a bar", "a floor", "a roof and much more than was ever asked for"]
    several, alone = drawer.images(captions, temperature=0), drawer.images(captions[1:2], temperature=0)
    assert several.shape == (3, 2, 3, 3) and (several[1] == alone[0]).all()
    guided = [drawer.images(texts, temperature=0, guidance_scale=3.0) for texts in (captions, captions[1:2])]
    assert (guided[0][1] == guided[1][0]).all()
    drawn = [drawer.images(captions * 4, temperature=30.0, seed=seed) for seed in (0, 0, 1)]
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()
    with pytest.raises(ValueError, match="caption 2: it is empty"):
        drawer.images(["a bar", " "])
    drawer.most = len(drawer.tokenizer("a bar")["input_ids"])
    found = [drawer.images([text], temperature=0) for text in ("a bar of chocolate", "a bar")]
    said = capsys.readouterr().err
    assert (found[0] == found[1]).all() and said.count(f"caption 1 has more than {drawer.most} tokens") == 1


def test_guidance_is_what_its_formula_says(learned):
    """One step by hand: g (log p(token | caption) - log p(token)) + log p(token), over the whole vocabulary."""
    drawer = Drawer.open(str(learned[0]))
    model, tokenizer = drawer.model, drawer.tokenizer
    prompt = [*tokenizer("a roof")["input_ids"], drawer.first - 1]
    with torch.no_grad():
        seen, unseen = (model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in (prompt, prompt[-1:]))
    for scale in (1.0, 4.0):
        expected = (scale * (seen - unseen) + unseen)[drawer.first : drawer.first + 2].argmax()
        image = drawer.images(["a roof"], temperature=0, guidance_scale=scale)
        assert drawer.tokens.encode(image)[0, 0] == expected


def test_a_folder_draws_by_transformers_alone(learned):
    """Its generation config says how: exactly the tokens of an image, whatever the prompt."""
    output, _ = learned
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    inputs = tokenizer("a house<｜image｜>", return_tensors="pt")
    ids = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert len(ids) == 6 and all("image▁" in token for token in tokenizer.convert_ids_to_tokens(ids.tolist()))


def test_scores_are_the_same_by_batches_of_one_and_in_another_run(learned, data, tmp_path):
    output, results = learned
    again = run(
        model_name_or_path=output, test_file=data / "test.jsonl", output_dir=tmp_path, use_cpu=True, num_drawn=0,
        per_device_eval_batch_size=1, do_predict=True, caption_column=["caption", "chinese"], max_caption_length=64,
    )  # fmt: skip
    assert again["test_loss"] == pytest.approx(results["test_loss"], rel=1e-4)
    predicted = run(
        model_name_or_path=output,
        test_file=data / "test.jsonl",
        output_dir=tmp_path / "drawn",
        use_cpu=True,
        num_drawn=2,
    )
    assert predicted["test_drawn"] == 2 and (tmp_path / "drawn/drawn.png").is_file()  # no training images beside


def test_a_language_model_gets_image_tokens_and_training_goes_on(data, tmp_path):
    tokenizer = train_tokenizer(["a bar, a floor, a roof"], 300)
    from configuration_deepseek import preset

    names = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = DeepSeekForCausalLM(preset("tiny_v3_mtp", vocab_size=len(tokenizer), mtp_loss_weight=0.1, **names))
    model.save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    settings = SETTINGS | {"preset": None, "vocab_size": None, "max_steps": 2, "learning_rate": 0.001, "save_steps": 1}
    settings = {name: value for name, value in settings.items() if value is not None}
    whole = run(**settings, model_name_or_path=tmp_path / "text", data_dir=data, output_dir=tmp_path / "whole")
    resumed = run(
        **settings, model_name_or_path=tmp_path / "text", data_dir=data, output_dir=tmp_path / "resumed",
        resume_from_checkpoint=tmp_path / "whole/checkpoint-1",
    )  # fmt: skip
    assert resumed["test_loss"] == pytest.approx(whole["test_loss"], rel=1e-5)
    assert DeepSeekForCausalLM.from_pretrained(tmp_path / "whole").config.vocab_size == len(tokenizer) + 3
    adapted = run(
        **settings | {"max_steps": 1}, model_name_or_path=tmp_path / "whole", data_dir=data,
        output_dir=tmp_path / "adapter", use_peft=True,
    )  # fmt: skip
    image = Drawer.open(str(tmp_path / "adapter")).images(["a bar"])
    assert image.shape == (1, 2, 3, 3) and adapted["parameters_trainable_share"] < 0.9
    export([str(tmp_path / "whole"), str(tmp_path / "bundle"), "--to", "bundle"])
    moved, own = (Drawer.open(str(tmp_path / name)).images(["a bar"]) for name in ("bundle", "whole"))
    assert (moved == own).all()


def test_codes_are_learned_saved_and_drawn(tmp_path):
    files = {
        f"train/{name}/{number}.png": picture(number, (8, 8)) for number, name in enumerate(("ant", "bee", "cat"))
    }
    save(tmp_path / "data", files)
    settings = SETTINGS | {"max_steps": 1, "codes": 4, "codes_steps": 3, "image_tokens": "codes"}
    run(**settings, data_dir=tmp_path / "data", output_dir=tmp_path / "out")
    drawer = Drawer.open(str(tmp_path / "out"))
    assert drawer.tokens.grid == (2, 2) and drawer.images(["ant", "bee"]).shape == (2, 8, 8, 3)


# Rows


def arguments(**settings):
    return ImageGenerationArguments(**settings)


def test_captions_of_folders_and_what_is_left_out(tmp_path):
    files = {
        "train/birds/1.png": picture(0), "train/birds/1.txt": b"a  bird\n", "train/birds/2.png": picture(1),
        "train/3.png": picture(2), "train/birds/4.png": b"no image", "train/birds/5.png": picture(3, (1, 1)),
        "train/birds/6.png": picture(0), "test/birds/7.png": picture(0), "test/birds/8.png": picture(4, mode="LA"),
    }  # fmt: skip
    found = read_captioned(arguments(data_dir=[str(save(tmp_path, files))]))
    (train, pictures), (test, others) = found["train"], found["test"]
    assert train["captions"] == [["a bird"], ["birds"], ["birds"]]
    assert {check: len(names) for check, names in pictures.faults.items()} == {
        "without_caption": 1, "broken_images": 1, "one_pixel_images": 1,
    }  # fmt: skip
    report = check_captioned({"train": train, "test": test}, {"train": pictures, "test": others})
    counts = {check: found["count"] for check, found in report["test"].items() if check != "rows"}
    assert counts == {"converted_images": 1, "duplicate_images": 0, "images_in_train": 1}
    assert report["train"]["duplicate_images"]["count"] == 1


def test_captions_that_are_cut_are_counted(data, tmp_path):
    run(**SETTINGS | {"max_steps": 1, "num_drawn": 0}, data_dir=data, output_dir=tmp_path, max_caption_length=3)
    report = json.loads((tmp_path / "data_report.json").read_text())
    assert report["train"]["long_captions"]["count"] >= 2  # BOS, letters


def test_captions_of_a_file_stand_for_values(tmp_path):
    (tmp_path / "names.json").write_text(json.dumps({"a bar": ["bar", "条"], "a roof": ["roof"]}))
    path = write_rows(tmp_path / "rows.jsonl", rows_of(ROWS))
    rows, pictures = read_captioned(arguments(train_file=[path], captions_file=str(tmp_path / "names.json")))["train"]
    assert rows["captions"] == [["bar", "条"], ["roof"]] and rows["target"] == ["a bar", "a roof"]
    assert rows["source"] == ["bar", "roof"]
    assert pictures.faults == {"without_caption": ["rows.jsonl, row 2: a floor"]}
    (tmp_path / "names.json").write_text('{"a bar": "bar"}')
    with pytest.raises(ValueError, match="--captions_file .*names.json: expected"):
        read_captioned(arguments(train_file=[path], captions_file=str(tmp_path / "names.json")))
    (tmp_path / "names.json").write_text('{"a bar": ["bar"], "a bar": ["pole"]}')
    with pytest.raises(ValueError, match="--captions_file .*names.json.*a bar"):
        read_captioned(arguments(train_file=[path], captions_file=str(tmp_path / "names.json")))


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"image": None, "caption": "x"}], {}, "no row has an image and a caption .*row 1: no image"),
        ([{"image": [[1, 2]], "caption": " "}], {}, "no row has an image and a caption"),
        ([{"image": [[1, 2]]}], {}, "caption"),
        ([{"picture": [[1, 2]], "caption": "x"}], {}, "image_column"),
        ([{"image": [[1, 2]], "caption": "x"}], {"caption_dropout": 0, "guidance_scale": 2}, "--guidance_scale needs"),
        ([{"image": [[1, 2]], "caption": "x"}], {"image_size": [1, 2, 3]}, "--image_size 1 2 3"),
        ([{"image": [[1, 2]], "caption": "x"}], {"validation_share": 0.5}, "one image only"),
        ([{"image": [[1, 2]], "caption": "x"}], {"image_size": 300}, "90000 tokens"),
        (
            [{"image": [[1, 2]], "caption": "x"}],
            {"image_tokens": "codes", "codes": 9, "image_size": 4},
            "fewer squares",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(rows, settings, message, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    settings = SETTINGS | {"max_steps": 1} | settings
    if settings.get("image_size") == 300:  # a model of transformers' own, whose positions stay
        config = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
                  "num_attention_heads": 1, "max_position_embeddings": 64}  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config))
        settings = {**settings, "preset": None, "config_name": tmp_path}
        del settings["preset"]
    with pytest.raises(ValueError, match=message) as error:
        run(**settings, train_file=path, output_dir=tmp_path / "out")
    assert "\n" not in str(error.value)


def test_other_tokens_than_the_models_are_refused(learned, data, tmp_path):
    common = {"model_name_or_path": learned[0], "test_file": data / "test.jsonl", "output_dir": tmp_path}
    with pytest.raises(ValueError, match="--image_tokens codes: this model draws by palette"):
        run(**common, image_tokens="codes", use_cpu=True)
    with pytest.raises(ValueError, match="draws 2 x 3 pixels"):
        run(**common, image_size=4, use_cpu=True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--output", "x.png"], "There is no caption"),
        (["a bar"], "--output: name the image file"),
        (["a bar", "--output", "nowhere/x.png"], "no such folder"),
        (["a bar", "--output", "x.txt"], ".txt is no image"),
        (["a bar", "--output", "x.png", "--number", "0"], "--number 0"),
    ],
)
def test_the_verb_refuses_in_one_line(argv, message, learned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        draw([str(learned[0]), *argv])


# Batches and measures


def test_training_rows_get_a_caption_of_their_own_or_none():
    tokenizer = train_tokenizer(["a"], 300)
    rows = [{"prompts": [[1, 5, 9], [1, 6, 7, 9]], "image_ids": [20, 21], "number": number} for number in range(400)]
    batch = CaptionCollator(tokenizer, 0.25, 0)(rows)
    starts = batch["input_ids"][:, 1]
    bare, first, second = ((batch["input_ids"][:, 0] == 9), starts == 5, starts == 6)
    assert 60 < bare.sum() < 140 and (bare | first | second).all() and 100 < first.sum() < 200
    assert ((batch["labels"] != -100).sum(1) == 2).all() and (
        batch["labels"][bare][:, 1:3] == torch.tensor([20, 21])
    ).all()
    assert (batch["labels"][first][:, 3:5] == torch.tensor([20, 21])).all()
    scored = CaptionCollator(tokenizer, 0.25, 0)([row | {"row": 0} for row in rows])
    assert (scored["input_ids"][:, 1] == 5).all()  # no draws


def test_measures_by_hand():
    train = Images(np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]]), ["a", "a", "b"])
    drawn = Images(np.array([[3.0, 4.0], [0.0, 2.0], [0.0, 4.0]]), ["a", "b", "b"])
    numbers, places = measured(drawn, train, drawn)
    assert places.tolist() == [1, 2, 2] or places.tolist() == [1, 2, 1]  # the last is as near to both
    assert numbers["copies"] == 1 and numbers["nearest_distance"] == pytest.approx((0 + 1 + 3) / 3)
    assert numbers["spread"] == 2.0 and numbers["real_spread"] == 5.0 and "read" not in numbers
    assert spread(Images(np.zeros((1, 2)), ["a"])) is None
    pixels = Images.of(np.full((1, 2, 2, 3), 255, dtype=np.uint8), ["a"], 16).pixels
    assert np.linalg.norm(pixels) == pytest.approx(32)  # four pixels of 16
    black = np.zeros((1, 1, 1, 3), dtype=np.uint8)
    assert psnr(black, black + 255) == pytest.approx(0) and psnr(black, black) is None


def test_a_support_vector_machine_reads_what_was_asked_for():
    draws = np.random.default_rng(0)
    pixels = draws.normal(0, 0.1, (40, 2)) + np.arange(40)[:, None] % 2
    train = Images(pixels, [str(number % 2) for number in range(40)])
    drawn = Images(np.array([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.1]]), ["0", "1", "0", "0"])
    numbers, _ = measured(drawn, train, train)
    assert numbers["read"] == 0.75 and numbers["real_read"] == 1


def test_a_sheet_has_every_image_at_its_place():
    found = np.array(sheet([[np.full((1, 1, 3), 1, np.uint8), np.full((1, 1, 3), 2, np.uint8)],
                            [np.full((1, 1, 3), 3, np.uint8)]], 2))[..., 0]  # fmt: skip
    assert found.shape == (10, 10)
    assert [found[2, 2], found[2, 6], found[6, 2], found[6, 6], found[0, 0]] == [1, 2, 3, 255, 255]
