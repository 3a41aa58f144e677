"""User and context features as tokens: against a slow plain layout, padding, what is learned, and what is refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from configuration_deepseek import DeepSeekConfig, preset
from modeling_deepseek import DeepSeekForRecommendation
from tests.modeling.conftest import tiny, token_ids
from tests.reference import side_features as reference
from tests.reference.compare import assert_close, assert_same_gradients

PADDING = 2  # of the tiny presets
USERS = {"gender": ["F", "M"], "age": ["young", "old"]}  # age 1, 2; gender 3, 4
CONTEXTS = {"weekday": ["Mo", "Tu", "We"], "device": ["phone"]}  # device 5, weekday 6, 7, 8
BOTH = {"user_features": USERS, "context_features": CONTEXTS}
KINDS = {"both": BOTH, "users": {"user_features": USERS}, "contexts": {"context_features": CONTEXTS}}


def given(fields, rows=3, length=5, seed=0):
    """Random numbers of values, 0 too, as the model takes them."""
    generator, made = torch.Generator().manual_seed(seed), {}
    first = 1 + 4 * ("user_features" in fields)
    if "user_features" in fields:
        picked = [torch.randint(0, 3, (rows,), generator=generator) for _ in range(2)]
        made["user_features"] = torch.stack((picked[0], (picked[1] + 2) * picked[1].gt(0)), -1)
    if "context_features" in fields:
        device = torch.randint(0, 2, (rows, length), generator=generator) * first
        day = torch.randint(0, 4, (rows, length), generator=generator)
        made["context_features"] = torch.stack((device, (day + first) * day.gt(0)), -1)
    return made


def of_row(features, row, length=None):
    """One row as the reference takes it."""
    plain = {}
    if "user_features" in features:
        plain["user"] = features["user_features"][row].tolist()
    if "context_features" in features:
        plain["contexts"] = features["context_features"][row, :length].tolist()
    return plain


@pytest.fixture(params=KINDS)
def fields(request):
    return KINDS[request.param]


def test_values_are_numbered_by_name_and_loading_keeps_that(tmp_path):
    model = tiny("tiny_llm", DeepSeekForRecommendation, **BOTH)
    side = model.side_features
    assert side.user_numbers == {"age": {"young": 1, "old": 2}, "gender": {"F": 3, "M": 4}}
    assert side.context_numbers == {"device": {"phone": 5}, "weekday": {"Mo": 6, "Tu": 7, "We": 8}}
    assert list(side.user_numbers) == ["age", "gender"] and side.values.weight.shape == (9, model.config.hidden_size)
    assert not side.values.weight[0].any() and side.values.weight[1:].any(-1).all()
    model.save_pretrained(tmp_path)
    again = DeepSeekForRecommendation.from_pretrained(tmp_path)
    ids, features = token_ids(3, 5), given(BOTH)
    assert again.side_features.context_numbers == side.context_numbers and again.config.user_features == USERS
    assert torch.equal(again(ids, **features).logits, model(ids, **features).logits)
    items = model.recommend([5, 7], user_features=[1, 4], context_features=[5, 7])
    assert torch.equal(again.recommend([5, 7], user_features=[1, 4], context_features=[5, 7])[1], items[1])


def test_without_such_columns_nothing_is_built():
    model = tiny("tiny_llm", DeepSeekForRecommendation)
    assert not hasattr(model, "side_features") and not any("side" in key for key in model.state_dict())


def test_scores_and_gradients_equal_the_plain_ones(name, fields):
    model, twin = (tiny(name, DeepSeekForRecommendation, **fields).train() for _ in range(2))
    ids, features = token_ids(3, 5), given(fields)
    loss = model(ids, labels=ids, **features).loss
    expected, last = 0, []
    for row, history in enumerate(ids):
        scores = reference.scores(twin, history, **of_row(features, row))
        scores = scores.index_fill(1, torch.tensor([PADDING]), float("-inf"))
        expected = expected + F.cross_entropy(scores[:-1], history[1:], reduction="sum") / 12
        last.append(scores[-1])
    with torch.no_grad():
        assert_close(model.eval()(ids, **features).logits[:, 3:], torch.stack(last)[:, 3:])
    leaves = {
        key: (weight, dict(twin.named_parameters())[key])
        for key, weight in model.named_parameters()
        if "side_features" in key or "embed_tokens" in key or "layers.0.input_layernorm" in key
    }
    assert {"side_features.values.weight", "side_features.kinds.weight"} <= set(leaves)
    assert_same_gradients(loss, expected, leaves)


def test_padding_on_either_side_changes_nothing(name, fields):
    model, ids, features = tiny(name, DeepSeekForRecommendation, **fields), token_ids(3, 5), given(fields)
    lengths = (5, 2, 3)
    for side in ("right", "left"):
        padded = torch.full((3, 6), PADDING)
        batch = dict(features)
        if "context_features" in fields:
            batch["context_features"] = torch.zeros(3, 6, 2, dtype=torch.long)
        for row, length in enumerate(lengths):
            place = slice(length) if side == "right" else slice(6 - length, 6)
            padded[row, place] = ids[row, :length]
            if "context_features" in fields:
                batch["context_features"][row, place] = features["context_features"][row, :length]
        with torch.no_grad():
            logits = model(padded, **batch).logits
            for row, length in enumerate(lengths):
                alone = {key: part[row : row + 1, :length] for key, part in features.items()}
                assert_close(logits[row, 3:], model(ids[row : row + 1, :length], **alone).logits[0, 3:], side)


def test_features_that_are_not_given_count_as_none(fields):
    model, ids = tiny("tiny_v3", DeepSeekForRecommendation, **fields), token_ids(2, 4)
    none = {key: torch.zeros_like(part) for key, part in given(fields, 2, 4).items()}
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(model(ids, **none).logits, logits)
        embeds = model.read_items(ids)
        assert_close(model(inputs_embeds=embeds).logits[:, 3:], logits[:, 3:])
        assert_close(model(inputs_embeds=embeds, **none).logits[:, 3:], logits[:, 3:])
        other = model(ids, **given(fields, 2, 4)).logits
    assert (other - logits)[:, 3:].abs().max() > 0.01


@pytest.mark.parametrize("loss", ["softmax", "sampled_softmax", "gbce"])
def test_every_loss_reaches_the_table(loss, fields):
    model = tiny("tiny_llm", DeepSeekForRecommendation, item_loss=loss, num_item_negatives=9, **fields).train()
    ids, features = token_ids(3, 5), given(fields)
    model(ids, labels=ids, **features).loss.backward()
    used = torch.cat([part.flatten() for key, part in features.items() if key == "user_features"] or [ids[:0, 0]])
    if "context_features" in fields:  # that of the last interaction is not learned from
        used = torch.cat((used, features["context_features"][:, :-1].flatten()))
    moved = model.side_features.values.weight.grad.abs().sum(-1) > 0
    assert moved.nonzero().flatten().tolist() == [number for number in used.unique().tolist() if number]
    assert (model.side_features.kinds.weight.grad.abs().sum(-1) > 0).all()


def test_candidates_are_scored_and_learned_with_features():
    model, ids, features = tiny("tiny_v3", DeepSeekForRecommendation, **BOTH), token_ids(3, 5), given(BOTH)
    candidates = torch.tensor([[4, 9, 7], [5, 6, PADDING], [8, 3, 11]])
    with torch.no_grad():
        every = model(ids, **features).logits
        assert_close(model(ids, candidates=candidates, **features).logits, every.gather(1, candidates))
    model.train()(ids, candidates=candidates, labels=torch.tensor([0, 1, 2]), **features).loss.backward()
    assert model.side_features.values.weight.grad.any()


def test_items_of_text_stand_among_features():
    model = tiny("tiny_llm", DeepSeekForRecommendation, num_items=1, item_text_length=4, **BOTH)
    model.add_items([[5, 9], [41], [7, 8, 20], [60, 61]])
    ids, features = torch.tensor([[1, 3, 2]]), given(BOTH, 1, 3)
    with torch.no_grad():
        expected = reference.scores(model, ids[0], **of_row(features, 0))
        assert_close(model(ids, **features).logits[0, 1:], expected[-1, 1:])
    loss = model.train()(ids, labels=ids, **features).loss
    loss.backward()
    assert model.side_features.values.weight.grad.any() and model.item_texts.projection.weight.grad.any()


def learn(fields, rows, features, steps=50):
    """The share of rows whose last item a small model finds after learning them."""
    torch.manual_seed(0)
    model = DeepSeekForRecommendation(
        preset("tiny_llm", vocab_size=11, pad_token_id=0, initializer_range=0.1, **fields)
    )
    optimizer = torch.optim.Adam(model.train().parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(rows, labels=rows, **features).loss.backward()
        optimizer.step()
    request = {}
    if "user_features" in features:
        request["user_features"] = features["user_features"]
    if "context_features" in features:
        request["context_features"] = features["context_features"][:, :-1]
    items, _ = model.recommend(rows[:, :-1], k=1, exclude_seen=False, **request)
    return (items[:, 0] == rows[:, -1]).float().mean().item()


def test_what_decides_the_next_item_is_learned_of_users_alone_and_of_contexts_alone():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1, 6, (12, 4), generator=generator).repeat(2, 1)
    kinds = torch.arange(24) // 12
    rows[:, -1] = 7 + kinds  # each history goes on in both ways
    assert learn({}, rows, {}) <= 0.5
    assert learn({"user_features": {"kind": ["a", "b"]}}, rows, {"user_features": kinds[:, None] + 1}) == 1
    day = torch.zeros(24, 4, 1, dtype=torch.long)
    day[:, 2, 0] = kinds + 1
    assert learn({"context_features": {"kind": ["a", "b"]}}, rows, {"context_features": day}) == 1


# -- recommend --


def test_several_users_get_what_each_gets_alone():
    model = tiny("tiny_llm", DeepSeekForRecommendation, **BOTH)
    histories, users = [[5, 7, 90], [40], [3, 4, 5, 6]], [[1, 3], [0, 0], [2, 4]]
    contexts = [[5, 6], [0, 8], [5, 0]]
    items, best = model.recommend(histories, k=4, user_features=users, context_features=contexts)
    for row, history in enumerate(histories):
        alone, scores = model.recommend(history, 4, user_features=users[row], context_features=contexts[row])
        assert items[row].tolist() == alone.tolist()
        torch.testing.assert_close(best[row], scores)
    whole = [[[0, 6], [5, 0], [5, 6]], [[0, 8]], [[0, 0], [0, 0], [5, 7], [5, 0]]]
    items, best = model.recommend(histories, k=4, user_features=users, context_features=whole)
    logits = model(torch.tensor([histories[0]]), user_features=torch.tensor(users[:1]),
                   context_features=torch.tensor(whole[:1])).logits  # fmt: skip
    torch.testing.assert_close(best[0], logits[0, items[0]])
    padded = torch.zeros(3, 4, 2, dtype=torch.long)
    for row, part in enumerate(whole):
        padded[row, : len(part)] = torch.tensor(part)
    assert torch.equal(model.recommend(histories, 4, user_features=users, context_features=padded)[1], best)


def test_the_limit_counts_items_and_contexts_are_cut_with_them():
    model = tiny("tiny_llm", DeepSeekForRecommendation, max_position_embeddings=4, **BOTH)
    history = [10, 11, 12, 13, 14, 15]
    contexts = [[5, 6], [0, 7], [0, 8], [5, 7], [0, 6], [5, 8]]
    _, best = model.recommend(history, k=3, exclude_seen=False, user_features=[1, 3], context_features=contexts)
    _, same = model.recommend(
        history[-4:], k=3, exclude_seen=False, user_features=[1, 3], context_features=contexts[-4:]
    )
    torch.testing.assert_close(best, same)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"user_features": [1]}, r"user_features has shape \[1, 1\], expected \[1, 2\]: .* age, gender"),
        ({"user_features": [3, 1]}, "3 is no value of 'age', whose values are numbered 1 to 2, and 0 is none"),
        ({"context_features": [5, 9]}, "9 is no value of 'weekday', whose values are numbered 6 to 8"),
        ({"context_features": [[5, 6]]}, r"context_features has shape \[1, 2\], expected \[2, 2\]"),
        ({"history": [[3], [4]], "context_features": [[5, 6]]}, "has 1 entries for 2 histories"),
    ],
)
def test_features_that_dont_fit_are_one_line(arguments, message):
    model = tiny("tiny_llm", DeepSeekForRecommendation, **BOTH)
    with pytest.raises(ValueError, match=message) as error:
        model.recommend(**{"history": [3, 4]} | arguments)
    assert "\n" not in str(error.value)


def test_forward_refuses_what_it_cant_lay_out():
    model, ids = tiny("tiny_llm", DeepSeekForRecommendation, **BOTH), token_ids(2, 4)
    with pytest.raises(ValueError, match=r"user_features has shape \[2, 3\], but this model and batch take \[2, 2\]"):
        model(ids, user_features=torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"one that says which items are padding, \[2, 4\]"):
        model(ids, attention_mask=torch.ones(2, 1, 4, 4))
    cache = model(ids, use_cache=True).cache
    with pytest.raises(ValueError, match="can't go on from a cache"):
        model(ids, cache=cache)
    plain = tiny("tiny_llm", DeepSeekForRecommendation)
    for call in (plain, plain.recommend):
        with pytest.raises(ValueError, match="this model reads no user or context features"):
            call(ids, user_features=torch.zeros(2, 2, dtype=torch.long))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"gender": []}, r"user_features\['gender'\] has no values; name those that are known"),
        ({"gender": ["F", "M", "F"]}, r"user_features\['gender'\] has the value 'F' twice; leave one out"),
    ],
)
def test_columns_that_say_nothing_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        DeepSeekConfig(user_features=columns)


def test_an_adapter_keeps_the_table():
    model, ids, features = tiny("tiny_llm", DeepSeekForRecommendation, **BOTH), token_ids(3, 5), given(BOTH)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["side_features"])
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        before = adapted(input_ids=ids, **features).logits[:, 3:]
        assert_close(adapted.merge_and_unload()(ids, **features).logits[:, 3:], before)
