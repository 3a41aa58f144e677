"""V4.1's model of images and text: against its formulas, whole; in batches, in generation, in training, saved."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from modeling_deepseek import DeepSeekForCausalLM, DeepSeekForImageTextToText
from modeling_deepseek.transformers_names import CACHE_WORD
from tests.modeling.test_dspark import DRAFTS
from tests.modeling.test_shared_model import model_of, official_twins
from tests.modeling.test_vision_tower import VISION
from tests.reference.compare import TOLERANCE, assert_close
from tests.reference.shared_model import ENGRAM, shared_model
from tests.reference.vision_tower import aligner, places, tower, under

IMAGE, PAD = 96, 2
SMALL, TALL = (2, 3), (5, 2)  # in patches; one token, and two rows of one
PLACES = {SMALL: 4, TALL: 6}  # counted by hand
FIELDS = {**ENGRAM, "vision_config": VISION, "eos_token_id": None}


def seen(*parts: int | tuple[int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """What the model takes for one row of tokens and images."""
    ids = [token for part in parts for token in ([IMAGE] * PLACES[part] if isinstance(part, tuple) else [part])]
    grids = [part for part in parts if isinstance(part, tuple)]
    row = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if not grids:
        return row
    patches = torch.randn(sum(map(math.prod, grids)), 12, generator=torch.Generator().manual_seed(seed))
    return row | {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, *grid] for grid in grids])}


def batch(rows: list[dict[str, torch.Tensor]], side: str = "left") -> dict[str, torch.Tensor]:
    """The rows as one batch, padded on a side."""
    width = max(row["input_ids"].shape[1] for row in rows)
    joined = {}
    for name, blank in (("input_ids", PAD), ("attention_mask", 0)):
        gaps = [(width - row[name].shape[1], 0)[:: 1 if side == "left" else -1] for row in rows]
        joined[name] = torch.cat(
            [nn.functional.pad(row[name], gap, value=blank) for row, gap in zip(rows, gaps, strict=True)]
        )
    for name in ("pixel_values", "image_grid_thw"):
        joined[name] = torch.cat([row[name] for row in rows if name in row])
    return joined


ROWS = [seen(5, SMALL, 40, TALL, 7, seed=1), seen(8, 9), seen(SMALL, SMALL, 30, seed=2), seen(7, 5, TALL, 6, seed=3)]


@pytest.fixture(scope="module")
def model():
    return model_of(DeepSeekForImageTextToText, **FIELDS)


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs, use_cache=False).logits


def test_outputs_and_gradients_are_those_of_the_formulas():
    model, row = model_of(DeepSeekForImageTextToText, **FIELDS), ROWS[0]
    twins, weights = official_twins(model)
    given, found = [], row["pixel_values"].double().split([math.prod(grid) for grid in (SMALL, TALL)])
    for (height, width), patches in zip((SMALL, TALL), found, strict=True):
        tokens = aligner(tower(patches, under(weights, "vision."), VISION, width), under(weights, "aligner."),
                         height, width, 3)  # fmt: skip
        given += places(tokens, weights, 1)
    ids = row["input_ids"][0].tolist()
    where = [i for i, token in enumerate(ids) if token == IMAGE]
    expected = shared_model(ids, weights, model.config.to_dict(), dict(zip(where, given, strict=True)))
    ours = model(**row, use_cache=False).logits[0]
    assert_close(ours, expected, "logits")
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7))
    (ours * direction).sum().backward()
    (expected * direction).sum().backward()
    for key, parameter in model.named_parameters():
        if ".indexer." not in key:  # it chooses, and a choice has no gradient
            assert_close(
                parameter.grad, twins[key].grad, key, tolerance=10 * TOLERANCE
            )  # of small ones, through five layers


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_with_other_numbers_of_images_are_read_as_if_alone(model, side):
    together = logits(model, **batch(ROWS, side))
    for row, ours in zip(ROWS, together, strict=True):
        alone = logits(model, **row)[0]
        assert_close(ours[-len(alone) :] if side == "left" else ours[: len(alone)], alone)


def test_packed_rows_are_read_as_if_alone(model):
    rows = [ROWS[0], ROWS[3]]
    joined = {
        name: torch.cat([row[name] for row in rows], dim=int("ids" in name)) for name in rows[0] if "mask" not in name
    }
    positions = torch.cat([torch.arange(row["input_ids"].shape[1]) for row in rows])[None]
    assert_close(
        logits(model, **joined, position_ids=positions)[0], torch.cat([logits(model, **row)[0] for row in rows])
    )


def test_later_images_change_nothing_before_them(model):
    row = ROWS[0]
    other = {**row, "pixel_values": torch.cat((row["pixel_values"][:6], torch.randn(10, 12)))}
    before, after = logits(model, **row)[0], logits(model, **other)[0]
    assert_close(after[:7], before[:7])  # the seventh is where the second image starts, which no pixel changes
    assert (after[7:] - before[7:]).abs().amax(dim=1).min() > 1e-3


# Generation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_what_follows_images_does_not_hang_on_the_cache_or_the_batch(model, changes):
    arguments = {"max_new_tokens": 5, "do_sample": False}
    rows = ROWS[3:] if "prompt_lookup_num_tokens" in changes else ROWS
    got = model.generate(**batch(rows), **arguments, **changes)[:, -5:]
    beams = {name: number for name, number in changes.items() if name == "num_beams"}
    for row, ours in zip(rows, got, strict=True):
        assert torch.equal(model.generate(**row, **arguments, **beams, use_cache=False)[0, -5:], ours)


def test_every_sequence_of_a_row_sees_the_row_s_images(model):
    torch.manual_seed(0)
    arguments = {
        "max_new_tokens": 3,
        "output_scores": True,
        "return_dict_in_generate": True,
        "do_sample": True,
        "top_k": 0,
    }
    several = model.generate(**batch(ROWS), **arguments, num_return_sequences=2).scores[0]
    alone = torch.cat([model.generate(**row, **arguments).scores[0] for row in ROWS])
    assert set(alone.isinf().nonzero()[:, 1].tolist()) == {IMAGE}
    finite = alone.isfinite()
    for ours in (several[::2], several[1::2]):
        assert_close(ours[finite], alone[finite])


def test_no_place_of_an_image_is_generated():
    model = model_of(DeepSeekForImageTextToText, **FIELDS)
    model.lm_head.register_forward_hook(lambda module, given, scores: scores.index_fill(-1, torch.tensor(IMAGE), 99.0))
    found = model.generate(**ROWS[0], max_new_tokens=4, do_sample=False)[0, -4:]
    assert IMAGE not in found.tolist()


def test_tokens_that_the_caller_suppresses_stay_so(model):
    first = model.generate(**ROWS[0], max_new_tokens=1, do_sample=False)[0, -1].item()
    assert model.generate(**ROWS[0], max_new_tokens=1, do_sample=False, suppress_tokens=[first])[0, -1] != first


def test_an_assistant_sees_the_images_too(model):
    assistant = model_of(DeepSeekForImageTextToText, **{**FIELDS, "index_n_heads": 10})
    arguments = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**ROWS[0], **arguments)
    assert torch.equal(model.generate(**ROWS[0], **arguments, assistant_model=assistant), expected)


def test_a_chat_goes_on_with_its_cache_and_another_image(model):
    before = model.generate(**ROWS[0], max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    turn = seen(8, SMALL, 9, seed=4)
    images = {name: torch.cat((ROWS[0][name], turn[name])) for name in ("pixel_values", "image_grid_thw")}
    ids = torch.cat((before.sequences, turn["input_ids"]), dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(
        model.generate(**inputs, cache=getattr(before, CACHE_WORD), max_new_tokens=4, do_sample=False), expected
    )


# Bad input -----------------------------------------------------------------------------------------------------------

ROW = ROWS[3]
WRONG = {
    "a token too many": (
        {"input_ids": torch.cat((ROW["input_ids"], torch.tensor([[IMAGE]])), 1), "attention_mask": None},
        "row 0 of input_ids has 1 image tokens (id 96) together, but the images that stand there have 0 places",
    ),
    "a token too few": (
        {"input_ids": torch.cat((ROW["input_ids"][:, :2], ROW["input_ids"][:, 3:]), 1), "attention_mask": None},
        "row 0 of input_ids has 5 image tokens (id 96) together, but the images that stand there have 6 places",
    ),
    "no image": (
        {"pixel_values": None, "image_grid_thw": None},
        "row 0 of input_ids has 6 image tokens (id 96) together, but the images that stand there have 0 places",
    ),
    "no place": (
        {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": None},
        "1 images were given, but input_ids have image tokens (id 96) for 0",
    ),
    "no grid": ({"image_grid_thw": None}, "give pixel_values and image_grid_thw together"),
    "a film": ({"image_grid_thw": torch.tensor([[2, 5, 1]])}, "image_grid_thw=[[2, 5, 1]] must hold 1, height and"),
    "a grid of two": (
        {"image_grid_thw": torch.tensor([[5, 2]])},
        "image_grid_thw=[[5, 2]] must have shape [images, 3]",
    ),
    "a grid of reals": ({"image_grid_thw": torch.tensor([[1.0, 5.0, 2.0]])}, "must have shape [images, 3], of whole"),
    "another size": (
        {"image_grid_thw": torch.tensor([[1, 4, 2]])},
        "pixel_values has shape (10, 12), but image_grid_thw=[[1, 4, 2]] asks for (8, 12)",
    ),
    "embeddings": ({"input_ids": None, "inputs_embeds": torch.zeros(1, 9, 32)}, "images need input_ids"),
}


@pytest.mark.parametrize("what", WRONG)
def test_images_and_places_that_do_not_fit(model, what):
    changes, says = WRONG[what]
    with pytest.raises(ValueError) as refused:
        model(**{**ROW, **changes})
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_tower_that_no_config_describes_is_refused():
    with pytest.raises(ValueError, match="vision_config=None describes no vision tower; set its fields: num_hidden"):
        model_of(DeepSeekForImageTextToText)


# Training ------------------------------------------------------------------------------------------------------------


def test_labels_at_places_of_images_are_left_out(model):
    inputs = batch(ROWS, "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    without = labels.masked_fill(labels == IMAGE, -100)
    assert model(**inputs, labels=labels).loss == model(**inputs, labels=without).loss


def test_labels_that_were_counted_at_places_of_images_are_told(model, caplog):
    inputs, count = batch(ROWS, "right"), torch.tensor(9)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    model(**inputs, labels=labels, num_items_in_batch=count)
    assert "counted them" not in caplog.text
    model(**inputs, labels=inputs["input_ids"], num_items_in_batch=count)
    assert "set labels to -100 where input_ids are image_token_id" in caplog.text


def test_blocks_run_anew_have_the_gradients_of_blocks_that_kept_all():
    model, inputs = model_of(DeepSeekForImageTextToText, **FIELDS).train(), batch(ROWS, "right")

    def gradients():
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    kept = gradients()
    model.gradient_checkpointing_enable()
    again = gradients()
    assert kept.keys() == again.keys() and "vision.blocks.0.attn.wqkv.weight" in kept and "image_newline" in kept
    for name, gradient in kept.items():
        assert_close(again[name], gradient, name)


def test_among_several_processes_a_batch_without_images_has_gradients_everywhere(monkeypatch):
    model = model_of(DeepSeekForImageTextToText, **FIELDS).train()
    expected = model(**ROWS[1], labels=ROWS[1]["input_ids"], use_cache=False).loss
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    loss = model(**ROWS[1], labels=ROWS[1]["input_ids"], use_cache=False).loss
    loss.backward()
    assert loss == expected
    eyes = {name: p.grad for name, p in model.named_parameters() if name.startswith(("vision", "aligner", "image_"))}
    assert len(eyes) == 26 and all(gradient is not None and not gradient.any() for gradient in eyes.values())


def test_draft_stages_learn_and_guess_behind_images():
    drafts = {
        **DRAFTS,
        "dspark_target_layer_ids": [1, 2],
        "dspark_n_routed_experts": 4,
        "dspark_num_experts_per_tok": 2,
        "mtp_loss_weight": 0.3,
    }
    model = model_of(DeepSeekForImageTextToText, **FIELDS, **drafts)
    inputs = batch(ROWS, "right")
    outputs = model.train()(**inputs, labels=inputs["input_ids"], use_cache=False)
    outputs.loss.backward()
    assert outputs.mtp_loss > 0 and model.model.layers[5].main_proj.weight.grad.any()
    arguments = {"max_new_tokens": 6, "do_sample": False}
    expected = model.eval().generate(**ROWS[0], **arguments)
    assert torch.equal(model.generate(**ROWS[0], **arguments, use_mtp=True), expected)


# Saved ---------------------------------------------------------------------------------------------------------------


def test_a_saved_folder_opens_whole_and_as_the_language_model_alone(model, tmp_path):
    model.save_pretrained(tmp_path)
    whole, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(whole) is DeepSeekForImageTextToText and not any(info.values())
    assert torch.equal(logits(whole, **ROWS[0]), logits(model, **ROWS[0]))
    alone, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(alone) is DeepSeekForCausalLM and not any(info.values())
    assert torch.equal(logits(alone, **ROWS[1]), logits(model, **ROWS[1]))
    alone.save_pretrained(tmp_path / "alone")
    with pytest.raises(
        ValueError, match=r"26 weights of the model are not in the checkpoint, the first is aligner\.w1"
    ):
        DeepSeekForImageTextToText.from_pretrained(tmp_path / "alone")


def test_half_precision_is_near(model):
    """Of what stands at the places; behind it, other entries may be chosen."""
    half = model_of(DeepSeekForImageTextToText, **FIELDS).bfloat16()
    row = {name: ROWS[0][name] for name in ("input_ids", "pixel_values", "image_grid_thw")}
    assert_close(half.image_embeds(**row).float(), model.image_embeds(**row), tolerance=0.03)
