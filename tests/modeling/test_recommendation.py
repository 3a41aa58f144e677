"""The recommender: its losses against slow plain ones, its scores, what it recommends, and what it refuses."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModel, Trainer, TrainingArguments

import modeling_deepseek.recommendation_head as home
from configuration_deepseek import preset
from modeling_deepseek import DeepSeekForRecommendation, DeepSeekModel
from modeling_deepseek.item_losses import gbce_loss, item_loss, sampled_softmax_loss, softmax_loss
from modeling_deepseek.item_ranking import top_k
from modeling_deepseek.recommendation_head import loss_name
from tests.modeling.conftest import TINY, tiny, token_ids
from tests.reference import item_losses as reference
from tests.reference.compare import assert_close, assert_same_gradients

PADDING = 2  # of the tiny presets
ITEMS = 97


@pytest.fixture
def positions():
    """Hidden states [N, D], targets [N], item embeddings [V, D] and negatives [M], some equal to targets."""
    torch.manual_seed(0)
    targets = torch.tensor([1, 5, 5, 11, 0])
    return torch.randn(5, 6), targets, torch.randn(13, 6), torch.tensor([5, 9, 0, 1, 9, 12, 7])


def leaves(hidden, items):
    """The same tensors twice, each for its own gradient."""
    made = [(t.clone().requires_grad_(), t.clone().requires_grad_()) for t in (hidden, items)]
    return {"hidden": made[0], "items": made[1]}


def test_softmax_equals_the_plain_one(positions):
    hidden, targets, items, _ = positions
    pairs = leaves(hidden, items)
    ours, theirs = ([pair[side] for pair in pairs.values()] for side in (0, 1))
    loss = softmax_loss(ours[0], targets, ours[1], PADDING)
    assert_same_gradients(loss, reference.softmax(theirs[0], targets, theirs[1], PADDING), pairs)
    softmax_loss(ours[0], targets, ours[1], PADDING).backward()
    assert (ours[1].grad[PADDING] == 0).all()


def test_sampled_softmax_equals_the_plain_one(positions):
    hidden, targets, items, negatives = positions
    counts = torch.rand(7) + 0.1
    pairs = leaves(hidden, items)
    ours, theirs = ([pair[side] for pair in pairs.values()] for side in (0, 1))
    loss = sampled_softmax_loss(ours[0], targets, ours[1], negatives, counts.log())
    assert_same_gradients(
        loss, reference.sampled_softmax(theirs[0], targets, theirs[1], negatives, counts.tolist()), pairs
    )


def test_gbce_equals_the_plain_one(positions):
    hidden, targets, items, negatives = positions
    pairs = leaves(hidden, items)
    ours, theirs = ([pair[side] for pair in pairs.values()] for side in (0, 1))
    loss = gbce_loss(ours[0], targets, ours[1], negatives, 12, 0.75)
    assert_same_gradients(loss, reference.gbce(theirs[0], targets, theirs[1], negatives, 12, 0.75), pairs)


def test_every_item_once_as_negative_gives_the_full_softmax(positions):
    hidden, targets, items, _ = positions
    every = torch.tensor([item for item in range(13) if item != PADDING])
    got = sampled_softmax_loss(hidden, targets, items, every, 0.0)
    assert_close(got, softmax_loss(hidden, targets, items, PADDING))


def test_the_correction_makes_the_estimate_right_for_any_distribution(positions):
    """The mean over many samples of the sum in the denominator is the whole sum, however items are drawn."""
    hidden, targets, items, _ = positions
    q = torch.rand(13) + 0.05
    q[PADDING] = 0
    q /= q.sum()
    negatives = torch.multinomial(q, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    got = sampled_softmax_loss(hidden, targets, items, negatives, (len(negatives) * q[negatives]).log())
    assert_close(got, softmax_loss(hidden, targets, items, PADDING), tolerance=0.01)


def test_negatives_are_never_the_padding(monkeypatch):
    drawn = []
    monkeypatch.setattr(torch, "randint", lambda high, size, device: drawn.append(high) or torch.arange(size[0]))
    seen = []
    monkeypatch.setattr(
        "modeling_deepseek.item_losses.sampled_softmax_loss", lambda *args: seen.append(args) or torch.tensor(0.0)
    )
    item_loss("sampled_softmax", torch.zeros(1, 4), torch.tensor([1]), torch.zeros(9, 4), PADDING, 8, 0.5)
    assert drawn == [8] and seen[0][3].tolist() == [0, 1, 3, 4, 5, 6, 7, 8] and seen[0][4] == 0.0


def test_the_loss_is_the_mean_over_next_items(name):
    model, ids = tiny(name, DeepSeekForRecommendation), token_ids(3, 9)
    ids[1, 6:] = PADDING
    labels = ids.masked_fill(ids == PADDING, -100)
    labels[0, 0] = -100
    with torch.no_grad():
        result = model(ids, labels=labels)
        hidden = model.model(ids, attention_mask=(ids != PADDING).long()).last_hidden_state
        scores = F.linear(hidden[:, :-1], model.model.embed_tokens.weight)
        scores[..., PADDING] = float("-inf")
        expected = F.cross_entropy(scores.flatten(0, 1), labels[:, 1:].flatten())
        summed = model(ids, labels=labels, num_items_in_batch=4).loss
    assert_close(result.loss, expected)
    assert_close(summed, expected * (labels[:, 1:] != -100).sum() / 4)
    assert_close(result.logits[1, 3:], F.linear(hidden[1, 5], model.model.embed_tokens.weight)[3:])
    assert (result.logits[:, PADDING] == torch.finfo(torch.float32).min).all()


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_plain_trainer_learns_from_whole_histories_as_the_model_does(accumulated, tmp_path):
    """Histories of four have three next items each, though four labels; padding as a label is none."""
    model = tiny("tiny_llm", DeepSeekForRecommendation)
    ids = token_ids(4, 5)
    ids[:, 4] = PADDING
    rows = [{"input_ids": row, "labels": row} for row in ids]
    expected = model(ids, labels=ids.masked_fill(ids == PADDING, -100)).loss
    expected.backward()
    norm = torch.stack([weight.grad.norm() for weight in model.parameters()]).norm()
    arguments = TrainingArguments(
        tmp_path,
        per_device_train_batch_size=4 // accumulated,
        gradient_accumulation_steps=accumulated,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    model.zero_grad()
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-4)
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_the_loss_is_chosen_by_the_size_of_the_catalogue(monkeypatch):
    chosen = []
    monkeypatch.setattr(home, "item_loss", lambda name, *args: chosen.append((name, args[4])) or torch.tensor(0.0))
    ids = token_ids(1, 4)
    for fields in ({}, {"vocab_size": home.FULL_SOFTMAX_ITEMS + 1}, {"item_loss": "gbce", "num_item_negatives": 7}):
        tiny("tiny_llm", DeepSeekForRecommendation, **fields)(ids, labels=ids)
    assert chosen == [("softmax", 512), ("sampled_softmax", 512), ("gbce", 7)]


@pytest.mark.parametrize("loss", ["softmax", "sampled_softmax", "gbce"])
def test_every_loss_learns_a_cycle_of_items(loss):
    torch.manual_seed(0)
    fields = {"item_loss": loss, "num_item_negatives": 20, "initializer_range": 0.1, "hidden_size": 16}
    model = DeepSeekForRecommendation(preset("tiny_llm", vocab_size=11, pad_token_id=0, **fields)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    rows = torch.stack([torch.arange(start, start + 8) % 10 + 1 for start in range(10)])
    for _ in range(60):
        output = model(rows, labels=rows)
        assert output.logits is None  # while training
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    items, _ = model.recommend([3, 4, 5], k=1)
    assert items.tolist() == [6] and model.training


def test_untied_scores_have_a_head_of_their_own(tmp_path):
    model = tiny("tiny_v3", DeepSeekForRecommendation, tie_item_embeddings=False)
    ids = token_ids(2, 5)
    with torch.no_grad():
        last = model.model(ids).last_hidden_state[:, -1]
        assert_close(model(ids).logits[:, 3:], model.item_head(last)[:, 3:])
    model.save_pretrained(tmp_path)
    again = DeepSeekForRecommendation.from_pretrained(tmp_path)
    assert torch.equal(again.item_head.weight, model.item_head.weight)
    model.resize_token_embeddings(101, mean_resizing=False)
    assert model(ids).logits.shape == (2, 101)


def test_a_catalogue_without_padding_gets_item_0_for_it():
    config = preset("tiny_llm", pad_token_id=None)
    assert DeepSeekForRecommendation(config).config.pad_token_id == 0


def test_an_adapter_on_the_embeddings_counts_in_the_scores_too():
    model, ids = tiny("tiny_llm", DeepSeekForRecommendation), token_ids(2, 5)
    plain = model(ids).logits[:, 3:].detach()
    adapted = get_peft_model(model, LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False)).eval()
    with torch.no_grad():
        before = adapted(input_ids=ids).logits[:, 3:]
        merged = adapted.merge_and_unload()
        assert_close(merged(ids).logits[:, 3:], before)
    assert (before - plain).abs().max() > 0.1


# -- recommend --


@pytest.fixture(scope="module", params=TINY)
def recommender(request):
    return tiny(request.param, DeepSeekForRecommendation)


def test_recommendations_are_the_best_scores_without_the_history(recommender):
    history = [5, 7, 90, 7]
    with torch.no_grad():
        scores = recommender(torch.tensor([history])).logits[0]
    order = [item for item in scores.argsort(descending=True).tolist() if item not in (*history, PADDING)]
    items, best = recommender.recommend(history, k=6)
    assert items.tolist() == order[:6]
    torch.testing.assert_close(best, scores[items])
    with_seen, _ = recommender.recommend(history, k=96, exclude_seen=False)
    assert set(history) <= set(with_seen.tolist()) and PADDING not in with_seen.tolist()


def test_several_users_at_once_get_what_each_gets_alone(recommender):
    histories = [[5, 7, 90], [40], [3, 4, 5, 6, 7, 8]]
    items, best = recommender.recommend(histories, k=4)
    padded = torch.full((3, 6), PADDING)
    for row, history in enumerate(histories):
        padded[row, : len(history)] = torch.tensor(history)
        alone, score = recommender.recommend(history, k=4)
        assert items[row].tolist() == alone.tolist()
        torch.testing.assert_close(best[row], score)
    assert torch.equal(recommender.recommend(padded, k=4)[0], items)


def test_a_filter_is_numbers_or_booleans(recommender):
    items, best = recommender.recommend([5, 7], k=3, filter=[5, 9, 11])
    assert sorted(items.tolist()) == [PADDING, 9, 11] and best[-1] == float("-inf")
    mask = torch.zeros(2, ITEMS, dtype=torch.bool)
    mask[0, [9, 11]] = True
    mask[1, 30] = True
    items, _ = recommender.recommend([[5, 7], [6]], k=2, filter=mask)
    assert sorted(items[0].tolist()) == [9, 11] and items[1].tolist() == [30, PADDING]


def test_a_history_longer_than_the_model_reads_is_cut_but_excluded_whole():
    model = tiny("tiny_llm", DeepSeekForRecommendation, max_position_embeddings=4)
    history = [10, 11, 12, 13, 14, 15]
    items, _ = model.recommend(history, k=90)
    assert not set(history) & set(items.tolist())
    short, _ = model.recommend(history[-4:], k=92)
    assert [item for item in short.tolist() if item not in history] == items.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"history": []}, "history 0 is empty"),
        ({"history": [[3], []]}, "history 1 is empty"),
        ({"history": [3, 97]}, "history 0 has the item number 97, but items are numbered 0 to 96"),
        ({"history": [[3], [-1]]}, "history 1 has the item number -1"),
        ({"history": [PADDING]}, "2 is the padding"),
        ({"history": [3], "k": 0}, "k=0 must be 1 or more"),
        ({"history": [3], "filter": []}, "the filter leaves no item to recommend; widen it"),
        ({"history": [3], "filter": [PADDING]}, "the filter leaves no item"),
        ({"history": [3], "filter": [100]}, "the filter names items outside of 0 to 96"),
        ({"history": [3], "filter": [True, False]}, "the filter has 2 entries, the model 97 items"),
        ({"history": [[4], [3]], "filter": [3]}, "nothing is left to recommend for row 1"),
    ],
)
def test_what_cant_be_recommended_is_one_line(arguments, message):
    model = tiny("tiny_llm", DeepSeekForRecommendation)
    with pytest.raises(ValueError, match=message) as error:
        model.recommend(**arguments)
    assert "\n" not in str(error.value)


def test_top_k_leaves_the_scores_as_they_are():
    scores = torch.tensor([[9.0, 1.0, 3.0, 2.0]])
    items, best = top_k(scores, 10, 0, excluded=torch.tensor([[2, 0]]))
    assert items.tolist() == [[3, 1, 0]] and best.tolist() == [[2.0, 1.0, float("-inf")]]
    assert scores.tolist() == [[9.0, 1.0, 3.0, 2.0]]


# -- loading --


def test_overwriting_top_k_gives_the_same():
    torch.manual_seed(0)
    scores, seen = torch.randn(3, 30), torch.randint(30, (3, 4))
    items, best = top_k(scores, 5, 0, seen)
    found, values = top_k(scores.clone(), 5, 0, seen, overwrite=True)
    assert torch.equal(items, found) and torch.equal(best, values)


def test_last_states_make_the_scores(recommender):
    history = torch.tensor([[1, 5, 3], [4, PADDING, PADDING]])
    with torch.no_grad():
        scores = recommender.last_states(history) @ recommender.item_embeddings().T
        expected = recommender(input_ids=history).logits
    scores[:, PADDING] = expected[:, PADDING]
    torch.testing.assert_close(scores, expected)


def test_a_large_catalogue_takes_the_sampled_softmax_by_itself_and_learns():
    torch.manual_seed(0)
    config = preset("tiny_llm", vocab_size=60_000, pad_token_id=0, hidden_size=16, num_attention_heads=2)
    model = DeepSeekForRecommendation(config).train()
    assert loss_name(model.config) == "sampled_softmax"
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    history = torch.tensor([[5, 50_000, 7, 59_999]])
    losses = []
    for _ in range(2):
        torch.manual_seed(1)  # the same negatives
        loss = model(input_ids=history, labels=history).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]


def test_the_trunk_of_a_recommender_says_what_it_lacks(tmp_path):
    tiny("tiny_llm", DeepSeekForRecommendation).save_pretrained(tmp_path)
    for load in (AutoModel.from_pretrained, DeepSeekModel.from_pretrained):
        with pytest.warns(UserWarning, match=r"holds a DeepSeekForRecommendation, .* use DeepSeekForRec") as caught:
            load(tmp_path)
        assert len([w for w in caught if "trunk" in str(w.message)]) == 1
        assert all("\n" not in str(w.message) for w in caught)


def test_other_folders_say_nothing(tmp_path):
    tiny("tiny_llm").save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DeepSeekModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"item_loss": "softmx"}, "item_loss has the unknown word 'softmx'; did you mean 'softmax'"),
        ({"num_item_negatives": 0}, "num_item_negatives=0 must be positive"),
        ({"gbce_calibration": 2.0}, "gbce_calibration=2.0 must be between 0 and 1"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        preset("tiny_llm", **fields)


def test_scores_under_autocast():
    model = DeepSeekForRecommendation(preset("tiny_llm", vocab_size=30, pad_token_id=0)).eval()
    history = torch.tensor([[3, 5, 8]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=history).logits
    assert logits.dtype == torch.float32 and logits[0, 0] == torch.finfo(torch.float32).min
    assert_close(logits[:, 1:].float(), model(input_ids=history).logits[:, 1:], tolerance=0.05)


@pytest.mark.parametrize("autocast", [False, True])
def test_scores_in_half_precision_do_not_tie(autocast):
    """In bfloat16 some two thousand different scores are left of ten thousand; the order is that of exact products."""
    torch.manual_seed(0)
    model = DeepSeekForRecommendation(preset("tiny_llm", vocab_size=10_000, pad_token_id=0)).eval()
    model = model if autocast else model.bfloat16()
    history, candidates = torch.tensor([[5, 9, 30], [7, 8, 9]]), torch.arange(1, 1001).expand(2, -1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = model(history).logits[:, 1:]
        some = model(history, candidates=candidates).logits
        exact = model.last_states(history).double() @ model.item_embeddings()[1:].double().T
        best = model.recommend(history, k=10, exclude_seen=False)[0]
    assert all(len(row.unique()) > 9990 for row in scores) and all(len(row.unique()) > 997 for row in some)
    assert torch.equal(scores.argsort(stable=True)[:, -10:], exact.argsort(stable=True)[:, -10:])
    assert torch.equal(some.argmax(1), exact[:, :1000].argmax(1))
    assert torch.equal(best, exact.topk(10).indices + 1)


def test_an_adapter_on_a_head_of_its_own_counts_in_the_scores():
    model = tiny("tiny_llm", DeepSeekForRecommendation, tie_item_embeddings=False)
    ids = token_ids(2, 5)
    before = model(ids).logits
    adapted = get_peft_model(model, LoraConfig(target_modules=["item_head"], init_lora_weights=False)).eval()
    with torch.no_grad():
        found = adapted(input_ids=ids).logits
        assert (found - before)[:, 3:].abs().max() > 1e-2
        adapted.merge_adapter()
        assert_close(found[:, 3:], adapted(input_ids=ids).logits[:, 3:])


@pytest.mark.parametrize("form", ["bfloat16", "autocast"])
def test_losses_over_items_multiply_in_float32(form):
    """In bfloat16 the products alone were off by a hundredth of the loss."""
    generator = torch.Generator().manual_seed(0)
    hidden, items = (torch.randn(size, 16, generator=generator) for size in (20, 50))
    targets, negatives = torch.randint(3, 50, (2, 20), generator=generator)
    if form == "bfloat16":
        hidden, items = hidden.bfloat16(), items.bfloat16()
    exact = (hidden.double(), targets, items.double())
    with torch.autocast("cpu", enabled=form == "autocast"):
        found = [
            softmax_loss(hidden, targets, items, PADDING),
            sampled_softmax_loss(hidden, targets, items, negatives, 0.0),
            gbce_loss(hidden, targets, items, negatives, 49, 0.7),
        ]
    expected = [
        reference.softmax(*exact, PADDING),
        reference.sampled_softmax(*exact, negatives, [1.0] * 20),
        reference.gbce(*exact, negatives, 49, 0.7),
    ]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32 and float(ours) == pytest.approx(float(theirs), rel=1e-5)
