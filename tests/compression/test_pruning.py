"""Experts, layers and weights left out: each model equals one that is whole, and in which they are passed over."""

from functools import partial

import pytest
import torch
from torch import nn

from finetune_deepseek.compression.calibration import Calibration
from finetune_deepseek.compression.experts import expert_use, kept_experts, mixture_layers, prune_experts
from finetune_deepseek.compression.layers import changes_by_layer, prune_layers
from finetune_deepseek.compression.rebuilding import with_experts_apart, with_experts_fused
from finetune_deepseek.compression.sparsity import KeepZeros, has_pattern, make_sparse, pattern_of, sparse_linears
from modeling_deepseek import DeepSeekForCausalLM, DeepSeekForSequenceClassification
from tests.checkpoints.conftest import logits_of, tiny
from tests.modeling.test_dspark import DRAFTS
from tests.reference.compare import assert_close

WITH_EXPERTS = ("tiny_moe", "tiny_v2", "tiny_v3", "tiny_v4")
FIELDS = {"tiny_v2": {"num_experts_per_tok": 2}, "tiny_v3": {"n_routed_experts": 16, "n_group": 4}}


class Loss:
    """In place of a trainer."""

    def compute_loss(self, model, batch):
        return model(**batch).loss


def calibration(rows: int = 2, length: int = 9, padding: int = 0) -> Calibration:
    """Rows of random ids, the padding at the right end of the first."""
    ids = torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding:
        mask[0, -padding:] = 0
    return Calibration(
        Loss(), [{"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}]
    )


def reloaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def passed_over(router: nn.Module, kept: list[int]) -> None:
    """Let a router choose none but these experts."""
    others = torch.ones(router.weight.shape[0], dtype=torch.bool)
    others[kept] = False
    score = router.score
    router.score = lambda logits: score(logits.masked_fill(others, -torch.inf))
    for bias in ("e_score_correction_bias", "e_score_correction_bias_vl"):
        if hasattr(router, bias):
            getattr(router, bias)[others] = -torch.inf


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_a_model_with_fewer_experts_is_one_whose_router_passes_the_others_over(name, tmp_path):
    model = tiny(name, **FIELDS.get(name, {}))
    pruned, kept = prune_experts(model, 0.5, calibration())
    assert pruned.config.n_routed_experts == model.config.n_routed_experts // 2
    for layer, module in mixture_layers(model).items():
        passed_over(module.gate, kept[layer])
    torch.testing.assert_close(logits_of(pruned), logits_of(model), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits_of(reloaded(pruned, tmp_path)), logits_of(pruned))


def test_prediction_layers_lose_experts_by_their_own_use():
    pruned, kept = prune_experts(tiny("tiny_moe", num_nextn_predict_layers=1), 0.25, calibration())
    assert set(map(len, kept.values())) == {6} and "model.layers.3.mlp" in kept
    assert pruned.config.mtp_loss_weight == 0  # as before
    stages = {**DRAFTS, "dspark_target_layer_ids": [1, 4], "dspark_n_routed_experts": 4, "mtp_loss_weight": 0.0}
    pruned, kept = prune_experts(tiny("tiny_v4.1", **stages, dspark_num_experts_per_tok=2), 0.25, calibration())
    assert [len(numbers) for numbers in kept.values()] == [6] * 5 + [3] * 3
    assert pruned.config.n_routed_experts == 6 and pruned.config.dspark_n_routed_experts == 3


def test_the_use_of_experts_is_the_sum_of_their_weights_over_tokens_without_padding():
    model, padded = tiny("tiny_moe"), calibration(rows=1, length=9, padding=3)
    seen = []
    layer = next(iter(mixture_layers(model).values()))
    handle = layer.gate.register_forward_hook(lambda module, args, output: seen.append(output))
    use = next(iter(expert_use(model, padded).values()))
    handle.remove()
    _, weights, indices = seen[0]
    expected = torch.zeros(8, dtype=torch.float64)
    for token in range(6):
        for weight, expert in zip(weights[token], indices[token], strict=True):
            expected[expert] += weight.double()
    torch.testing.assert_close(use, expected)


def test_experts_are_kept_by_group_and_the_first_of_equal_ones():
    use = torch.tensor([0.0, 3, 1, 1, 9, 8, 7, 9])
    assert kept_experts(use, groups=2, dropped=2).tolist() == [1, 2, 4, 7]
    assert kept_experts(use, groups=1, dropped=5).tolist() == [4, 5, 7]


@pytest.mark.parametrize(
    "name, fields, share, message",
    [
        ("tiny_llm", {}, 0.5, "no routed experts"),
        ("tiny_moe", {}, 0.1, "of 8 experts this is none; the least share is 0.125"),
        ("tiny_v3", {}, 0.5, "leaves too few: .*num_experts_per_tok"),
        ("tiny_v4", {"num_hash_layers": 1}, 0.5, "hash layers"),
    ],
)
def test_experts_that_cannot_go(name, fields, share, message):
    with pytest.raises(ValueError, match=message):
        prune_experts(tiny(name, **fields), share, calibration())


def test_experts_that_no_number_speaks_for():
    model = tiny("tiny_moe")
    model.model.layers[1].mlp.gate.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="say nothing of the experts in model.layers.1.mlp"):
        prune_experts(model, 0.5, calibration())


@pytest.mark.parametrize("name", ["tiny_v3", "tiny_v4", "tiny_llm"])
def test_a_model_with_fewer_layers_is_one_whose_layers_give_what_they_get(name, tmp_path):
    model = tiny(name)
    pruned, dropped = prune_layers(model, 2, calibration())
    assert len(dropped) == 2 and pruned.config.num_hidden_layers == model.config.num_hidden_layers - 2
    for layer in dropped:
        model.model.layers[layer].register_forward_hook(lambda module, args, output: args[0])
    torch.testing.assert_close(logits_of(pruned), logits_of(model), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits_of(reloaded(pruned, tmp_path)), logits_of(pruned))


def test_the_layer_that_changes_least_goes_and_lists_by_layer_follow():
    model = tiny("tiny_v3", num_nextn_predict_layers=1, head=DeepSeekForCausalLM)
    first = model.model.layers[0]
    for part in (first.self_attn.o_proj, first.mlp.down_proj):
        part.weight.data.mul_(1e-4)
    assert changes_by_layer(model, calibration(padding=2))[0] < 1e-3
    pruned, dropped = prune_layers(model, 1, calibration())
    assert dropped == [0] and pruned.config.first_k_dense_replace == 0 and pruned.config.layer_specs is None
    assert [spec.feed_forward for spec in pruned.config.specs] == ["moe", "moe"]
    assert pruned.generate(torch.tensor([[5, 6]]), max_new_tokens=2, min_new_tokens=2).shape == (1, 4)


def test_draft_stages_read_the_layers_that_they_read_before():
    model = tiny("tiny_v4", **{**DRAFTS, "mtp_loss_weight": 0.0, "num_hidden_layers": 5})
    ids = torch.randint(3, 300, (1, 9), generator=torch.Generator().manual_seed(2))
    pruned, dropped = prune_layers(model, 2, calibration())
    targets = [target - sum(layer < target for layer in dropped) for target in (1, 3)]
    assert not {1, 3} & set(dropped) and pruned.config.dspark_target_layer_ids == targets
    for layer in dropped:
        model.model.layers[layer].register_forward_hook(lambda module, args, output: args[0])
    ours, expected = (one(ids, output_draft_states=True).draft_states for one in (pruned, model))
    assert_close(ours, expected)
    with pytest.raises(ValueError, match="of which 2 can go"):
        prune_layers(tiny("tiny_v4", **{**DRAFTS, "num_hidden_layers": 5}), 3, calibration())


def test_a_row_of_layers_that_fields_cannot_say_is_listed():
    model = tiny("tiny_moe", moe_layer_freq=2, num_hidden_layers=4, first_k_dense_replace=0)
    middle = model.model.layers[2]
    for part in (middle.self_attn.o_proj, middle.mlp.shared_experts.down_proj):
        part.weight.data.zero_()
    middle.mlp.experts.down_proj.data.zero_()
    pruned, dropped = prune_layers(model, 1, calibration())
    assert dropped == [2]
    assert [spec.feed_forward for spec in pruned.config.specs] == ["moe", "dense", "dense"]


def test_more_layers_than_can_go():
    with pytest.raises(ValueError, match="--prune-layers 3: the model has 3 layers, of which 2 can go"):
        prune_layers(tiny("tiny_llm"), 3, calibration())


def test_two_of_four_weights_stay_by_size_times_input():
    weight = torch.tensor([[1.0, -2, 3, 4], [5, 0.1, -0.2, 0.3], [1, 1, 1, 1]])
    norms = torch.tensor([10.0, 1, 1, 0])
    assert pattern_of(weight, norms).int().tolist()[:2] == [[1, 0, 1, 0], [1, 0, 1, 0]]
    assert pattern_of(weight, norms).sum(-1).tolist() == [2, 2, 2]
    assert pattern_of(weight, torch.zeros(4)).int().tolist()[:2] == [[0, 0, 1, 1], [1, 0, 0, 1]]  # nothing came in


@pytest.mark.parametrize("head", [DeepSeekForCausalLM, DeepSeekForSequenceClassification])
def test_all_rows_of_decoder_layers_get_the_pattern_and_nothing_else(head):
    model = tiny("tiny_v3", head)
    batches = calibration()
    if head is DeepSeekForSequenceClassification:
        batches.batches[0]["labels"] = torch.tensor([0, 1])
    sparse, share = make_sparse(model, batches)
    before, zeros = model.state_dict(), 0
    for name, weight in sparse.state_dict().items():
        changed = (weight != before[name]).sum().item()
        zeros += changed
        in_pattern = ".layers." in name and ("_proj" in name) and weight.shape[-1] % 4 == 0
        assert has_pattern(weight) == in_pattern or not changed, name
        assert changed == (weight.numel() // 2 if in_pattern else 0), name
    assert share == pytest.approx(zeros / sum(weight.numel() for weight in sparse.parameters()))


def test_the_norms_are_those_of_what_comes_in():
    model, batches = tiny("tiny_llm"), calibration()
    seen = {}
    linear = model.model.layers[0].mlp.down_proj
    handle = linear.register_forward_hook(lambda module, args, output: seen.update(rows=args[0].flatten(0, 1)))
    sparse, _ = make_sparse(model, batches)
    model(**batches.batches[0])
    handle.remove()
    matters = linear.weight.abs() * seen["rows"].norm(dim=0)
    expected = matters.unflatten(-1, (-1, 4)).sort(-1).indices[..., 2:].sort(-1).values
    kept = sparse.model.layers[0].mlp.down_proj.weight.ne(0).unflatten(-1, (-1, 4))
    assert torch.equal(kept.nonzero()[:, 2].view(expected.shape), expected)


def test_weights_that_are_no_numbers_get_no_pattern():
    model = tiny("tiny_llm")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        make_sparse(model, calibration())


def test_training_keeps_the_pattern():
    sparse, _ = make_sparse(tiny("tiny_moe"), calibration())
    keep = KeepZeros(sparse)
    assert len(keep.kept) == len(sparse_linears(sparse)) + 4  # and two tensors of experts in each of two layers
    with torch.no_grad():
        for weight in sparse.parameters():
            weight.add_(1.0)
    keep.on_optimizer_step()
    assert all(has_pattern(weight) for weight, _ in keep.kept)


@pytest.mark.parametrize("name", ["tiny_moe", "tiny_v4"])
def test_experts_apart_compute_what_fused_ones_do_and_have_the_same_files(name, tmp_path):
    model = tiny(name)
    apart = with_experts_apart(model)
    torch.testing.assert_close(logits_of(apart), logits_of(model), rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, with_experts_fused(apart).state_dict().values(), model.state_dict().values()))
    model.save_pretrained(tmp_path / "fused")
    other = partial(type(model).from_pretrained, tmp_path / "fused")
    assert torch.equal(logits_of(other(fused_experts=False).eval()), logits_of(apart))
    assert torch.equal(logits_of(reloaded(apart, tmp_path / "apart")), logits_of(apart))
