"""The heads: what they read off the trunk, what they learn from, and how they start from a language model."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from configuration_deepseek import preset
from modeling_deepseek import (
    AutoModelForEmbedding,
    AutoModelForRecommendation,
    DeepSeekForCausalLM,
    DeepSeekForEmbedding,
    DeepSeekForQuestionAnswering,
    DeepSeekForRecommendation,
    DeepSeekForSequenceClassification,
    DeepSeekForTokenClassification,
    DeepSeekModel,
)
from tests.modeling.conftest import labels_for, outputs, tiny, token_ids
from tests.reference.compare import assert_close

AUTO = {
    DeepSeekModel: AutoModel,
    DeepSeekForCausalLM: AutoModelForCausalLM,
    DeepSeekForSequenceClassification: AutoModelForSequenceClassification,
    DeepSeekForTokenClassification: AutoModelForTokenClassification,
    DeepSeekForQuestionAnswering: AutoModelForQuestionAnswering,
    DeepSeekForRecommendation: AutoModelForRecommendation,
    DeepSeekForEmbedding: AutoModelForEmbedding,
}
OWN_WEIGHTS = {
    DeepSeekModel: set(),
    DeepSeekForCausalLM: {"lm_head.weight"},
    DeepSeekForSequenceClassification: {"score.weight"},
    DeepSeekForTokenClassification: {"score.weight", "score.bias"},
    DeepSeekForQuestionAnswering: {"qa_outputs.weight", "qa_outputs.bias"},
    DeepSeekForEmbedding: set(),  # latent pooling has some, see test_embedding.py
    DeepSeekForRecommendation: set(),  # items are scored by the embeddings that they are read by
}


@pytest.fixture(scope="module")
def language_model(name, tmp_path_factory):
    """A saved causal language model and its folder."""
    folder, model = tmp_path_factory.mktemp(name), tiny(name)
    model.save_pretrained(folder)
    return model, folder


def test_from_a_language_model_only_the_head_is_new(language_model, head):
    model, folder = language_model
    loaded, info = AUTO[head].from_pretrained(folder, num_labels=3, output_loading_info=True)
    assert type(loaded) is head
    assert set(info["missing_keys"]) == (set() if head is DeepSeekForCausalLM else OWN_WEIGHTS[head])
    assert set(info["unexpected_keys"]) <= {"lm_head.weight"} and not info["mismatched_keys"]
    ids = token_ids(2, 7)
    assert torch.equal(outputs(loaded.base_model, ids), outputs(model.model, ids))


def test_a_language_model_from_a_bare_trunk_has_a_new_head(name, tmp_path):
    tiny(name, DeepSeekModel).save_pretrained(tmp_path)
    loaded, info = DeepSeekForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    assert torch.equal(outputs(loaded.model, token_ids(1, 5)), outputs(tiny(name, DeepSeekModel), token_ids(1, 5)))


def test_new_heads_are_initialised(language_model, head):
    if head is DeepSeekModel:
        return
    loaded = head.from_pretrained(language_model[1], num_labels=5)
    for key in OWN_WEIGHTS[head] - {"lm_head.weight"}:
        weight = loaded.get_parameter(key)
        assert (weight == 0).all() if key.endswith("bias") else 0.1 < weight.std() < 0.3


def test_another_number_of_labels_needs_leave(tmp_path):
    tiny("tiny_v3", DeepSeekForTokenClassification).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"score.* shape \(3.*asks for \(7.*ignore_mismatched_sizes=True"):
        DeepSeekForTokenClassification.from_pretrained(tmp_path, num_labels=7)
    loaded = DeepSeekForTokenClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert outputs(loaded, token_ids(1, 5)).shape == (1, 5, 7)


def test_sequence_scores_are_read_at_the_last_token(name):
    model = tiny(name, DeepSeekForSequenceClassification)
    ids = token_ids(3, 8)
    ids[0, 5:] = 2  # right padding
    ids[1, :3] = 2  # left padding
    mask = (ids != 2).long()
    with torch.no_grad():
        hidden = model.model(ids, attention_mask=mask).last_hidden_state
        expected = F.linear(hidden[torch.arange(3), torch.tensor([4, 7, 7])], model.score.weight)
    assert_close(outputs(model, ids, attention_mask=mask), expected)
    model.config.pad_token_id = None  # then the mask tells
    assert_close(outputs(model, ids, attention_mask=mask), expected)
    embeds = model.get_input_embeddings()(ids)
    assert_close(outputs(model, inputs_embeds=embeds, attention_mask=mask), expected)


@pytest.mark.parametrize("head", [DeepSeekForSequenceClassification, DeepSeekForRecommendation, DeepSeekForEmbedding])
def test_the_mask_tells_where_a_row_ends_and_not_the_padding_id(name, head):
    """A row may end with the padding's token (many pad with the end of text): padded on any side it reads as alone."""
    model = tiny(name, head, pooling="last_token")
    first = 3 if head is DeepSeekForRecommendation else 0  # of the scores: the padding has none
    for row, filling in (([5, 2, 7, 2], 2), ([5, 6, 7, 8], 9)):
        text = torch.tensor([row])
        with torch.no_grad():
            alone = model(text, attention_mask=torch.ones_like(text)).to_tuple()[0][:, first:]
            for left, right in ((0, 3), (3, 0), (2, 1)):
                padded = F.pad(text, (left, right), value=filling)
                mask = F.pad(torch.ones_like(text), (left, right))
                found = model(padded, attention_mask=mask).to_tuple()[0][:, first:]
                assert_close(found, alone, f"{left} left, {right} right", tolerance=5e-5)


def test_sequence_scores_of_a_batch_without_any_sign_of_padding_are_refused():
    model = tiny("tiny_llm", DeepSeekForSequenceClassification)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="more than one row need config.pad_token_id or an attention_mask"):
        model(token_ids(2, 5))
    assert outputs(model, token_ids(1, 5)).shape == (1, 3)


@pytest.mark.parametrize(
    ("problem", "num_labels", "labels", "loss"),
    [
        ("regression", 1, torch.tensor([0.5, -1.0]), lambda x, y: F.mse_loss(x.squeeze(-1), y)),
        ("regression", 3, torch.randn(2, 3), F.mse_loss),
        ("single_label_classification", 3, torch.tensor([2, 0]), F.cross_entropy),
        ("multi_label_classification", 3, torch.tensor([[1.0, 0, 1], [0, 0, 1]]), F.binary_cross_entropy_with_logits),
    ],
    ids=["regression of one", "regression of three", "one of three", "any of three"],
)
@pytest.mark.parametrize("told", [True, False])
def test_sequence_losses(problem, num_labels, labels, loss, told):
    if not told and problem == "regression" and num_labels > 1:
        pytest.skip("targets of several numbers look like labels")
    model = tiny("tiny_v2_lite", DeepSeekForSequenceClassification, num_labels=num_labels)
    model.config.problem_type = problem if told else None
    with torch.no_grad():
        result = model(token_ids(2, 6), labels=labels)
    torch.testing.assert_close(result.loss, loss(result.logits, labels))


def test_token_loss_leaves_out_what_is_marked(name):
    model, ids = tiny(name, DeepSeekForTokenClassification), token_ids(2, 6)
    labels = ids % 3
    labels[0, 2:] = -100
    with torch.no_grad():
        result = model(ids, labels=labels)
    assert result.logits.shape == (2, 6, 3)
    torch.testing.assert_close(result.loss, F.cross_entropy(result.logits.flatten(0, 1), labels.flatten()))


def test_answer_loss_is_the_mean_over_both_ends(name):
    model, ids = tiny(name, DeepSeekForQuestionAnswering), token_ids(3, 6)
    starts, ends = torch.tensor([1, 0, 9]), torch.tensor([4, 0, 9])  # the third answer lies outside
    with torch.no_grad():
        result = model(ids, start_positions=starts, end_positions=ends)
    assert result.start_logits.shape == result.end_logits.shape == (3, 6)
    by_hand = [F.cross_entropy(result.start_logits[:2], starts[:2]), F.cross_entropy(result.end_logits[:2], ends[:2])]
    torch.testing.assert_close(result.loss, sum(by_hand) / 2)


def test_kinds_of_tokens_are_added_to_their_embeddings(name, tmp_path):
    """Against embeddings made by hand; a checkpoint without kinds gets new ones and keeps the rest."""
    plain, ids = tiny(name, DeepSeekForQuestionAnswering), token_ids(2, 5)
    with pytest.raises(ValueError, match="set config.type_vocab_size or leave token_type_ids"):
        plain(ids, token_type_ids=ids)
    plain.save_pretrained(tmp_path / "plain")
    model = DeepSeekForQuestionAnswering.from_pretrained(tmp_path / "plain", type_vocab_size=3).eval()
    model.save_pretrained(tmp_path / "typed")
    again = DeepSeekForQuestionAnswering.from_pretrained(tmp_path / "typed").eval()
    types = torch.tensor([[0, 2, 1, 1, 0], [2, 0, 0, 1, 2]])
    embeddings = plain.model.embed_tokens(ids)
    with torch.no_grad():
        for given, kinds in ((types, types), (None, torch.zeros_like(types))):
            expected = plain(inputs_embeds=embeddings + model.token_type_embeddings.weight[kinds]).start_logits
            assert_close(again(ids, token_type_ids=given).start_logits, expected)
            found = again(inputs_embeds=again.model.embed_tokens(ids), token_type_ids=given)
            assert_close(found.start_logits, expected)
    first = torch.zeros(2, dtype=torch.long)
    model.train()(ids, token_type_ids=types, start_positions=first, end_positions=first).loss.backward()
    assert (model.token_type_embeddings.weight.grad.norm(dim=1) > 0).all()


def test_heads_return_no_loss_without_labels(model):
    if isinstance(model, DeepSeekModel):
        return
    with torch.no_grad():
        assert model(token_ids(1, 5)).loss is None


def test_one_step_of_training_lowers_the_loss(name, head):
    if head is DeepSeekModel:
        return
    model, ids = tiny(name, head).train(), token_ids(3, 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=3e-5)  # a longer step may change choices of experts or keys
    before = model(ids, **labels_for(model, ids)).loss
    before.backward()
    optimizer.step()
    assert model(ids, **labels_for(model, ids)).loss < before


def test_the_trunk_of_any_head_is_loaded_without_it(head, tmp_path):
    model = tiny("tiny_v3", head)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is DeepSeekModel
    assert set(info["unexpected_keys"]) == OWN_WEIGHTS[head] and not info["missing_keys"]
    ids = token_ids(2, 5)
    assert torch.equal(outputs(loaded, ids), outputs(model.base_model, ids))


def test_accumulated_gradients_of_a_classifier_equal_those_of_the_whole_batch(tmp_path):
    """Trainer divides the loss by the accumulation steps only if the class says that it is a mean."""
    rows = [{"input_ids": [5, 6, 7 + i], "labels": i % 2} for i in range(4)]

    def trained(batch: int, steps: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = DeepSeekForSequenceClassification(preset("tiny_llm"))
        settings = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 1, "use_cpu": True}
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=steps, **settings
        )
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        return model.score.weight.detach()

    torch.testing.assert_close(trained(4, 1), trained(2, 2), rtol=1e-5, atol=1e-7)


UNKNOWN = {
    "tokens": (DeepSeekForCausalLM, {}, lambda ids: {"labels": torch.full_like(ids, -100)}),
    "labelled": (
        DeepSeekForCausalLM,
        {},
        lambda ids: {"labels": torch.full_like(ids, -100), "logits_to_keep": "labelled"},
    ),
    "tokens ahead": (
        DeepSeekForCausalLM,
        {"num_nextn_predict_layers": 1, "mtp_loss_weight": 0.3},
        lambda ids: {"labels": torch.full_like(ids, -100), "num_items_in_batch": torch.tensor(0)},
    ),
    "classes": (DeepSeekForSequenceClassification, {}, lambda ids: {"labels": torch.full((2,), -100)}),
    "token classes": (DeepSeekForTokenClassification, {}, lambda ids: {"labels": torch.full_like(ids, -100)}),
    "no answer": (
        DeepSeekForQuestionAnswering,
        {},
        lambda ids: {"start_positions": torch.tensor([7, -100]), "end_positions": torch.tensor([9, -1])},
    ),
    "items": (
        DeepSeekForRecommendation,
        {},
        lambda ids: {"labels": torch.full_like(ids, -100), "num_items_in_batch": 0},
    ),
    "candidates": (
        DeepSeekForRecommendation,
        {},
        lambda ids: {"labels": torch.full((2,), -100), "candidates": ids[:, :3]},
    ),
    "passages": (
        DeepSeekForEmbedding,
        {},
        lambda ids: {"passage_input_ids": ids, "labels": torch.full((2,), -100)},
    ),
}


@pytest.mark.parametrize("what", UNKNOWN)
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_without_targets_adds_nothing(what, training):
    head, fields, targets = UNKNOWN[what]
    model, ids = tiny("tiny_v3", head, **fields).train(training), token_ids(2, 7)
    loss = model(ids, **targets(ids)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_rows_without_targets_leave_the_mean_of_the_others():
    ids, rows = token_ids(3, 7), torch.tensor([0, 2])
    for head in (DeepSeekForSequenceClassification, DeepSeekForTokenClassification):
        model = tiny("tiny_llm", head)
        targets = labels_for(model, ids)["labels"]
        known = targets.clone()
        known[1] = -100
        assert_close(model(ids, labels=known).loss, model(ids[rows], labels=targets[rows]).loss)
    model = tiny("tiny_llm", DeepSeekForQuestionAnswering)
    starts, ends = torch.tensor([1, 2, 3]), torch.tensor([2, -100, 6])
    found = model(ids, start_positions=starts, end_positions=ends)
    expected = (F.cross_entropy(found.start_logits, starts) + F.cross_entropy(found.end_logits[rows], ends[rows])) / 2
    assert_close(found.loss, expected)
