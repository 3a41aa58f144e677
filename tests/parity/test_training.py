"""Loss and the gradient of every parameter against transformers."""

import pytest
import torch
from transformers import PreTrainedModel

from tests.parity.pairs import Pair, padding, pair_of, token_ids
from tests.reference.compare import assert_close


def batch(pair: Pair) -> dict[str, torch.Tensor]:
    """Three rows padded on the right, with labels on the tokens after the third."""
    mask = padding("right")
    ids = token_ids(pair).masked_fill(mask == 0, pair.native.config.pad_token_id)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def test_loss_per_item_of_a_larger_batch(pair: Pair):
    for count in (29, torch.tensor(29)):
        ours, native = (model(**batch(pair), num_items_in_batch=count).loss for model in (pair.ours, pair.native))
        assert_close(ours, native, f"loss per {count!r} items")


def gradients(model: PreTrainedModel, arguments: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
    """The loss, and name -> gradient of every parameter but the indexer's, which choose and never weigh."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if ".indexer." not in name]
    names, parameters = zip(*named, strict=True)
    loss = model(**arguments).loss
    return loss, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_loss_and_gradient_of_every_parameter(pair: Pair):
    native_loss, native = gradients(pair.native, batch(pair))
    for implementation in ("eager", "sdpa"):
        pair.ours.set_attn_implementation(implementation)
        loss, ours = gradients(pair.ours, batch(pair))
        pair.ours.set_attn_implementation("eager")
        assert_close(loss, native_loss, f"loss, {implementation}")
        assert ours.keys() == native.keys()
        for name in native:
            assert_close(ours[name], native[name], f"gradient of {name}, {implementation}")


@pytest.mark.parametrize("name", ["llm_gqa", "v2_groups", "v3"])
def test_gradient_checkpointing_changes_nothing(name: str):
    pair = pair_of(name)
    model = pair.ours.train()  # transformers recomputes only while training; nothing drops out here
    loss, plain = gradients(model, batch(pair))
    model.activation_checkpointing_enable({"use_reentrant": False})
    recomputed_loss, recomputed = gradients(model, batch(pair))
    model.activation_checkpointing_disable()
    model.eval()
    assert_close(recomputed_loss, loss, "loss")
    for key in plain:
        assert_close(recomputed[key], plain[key], f"gradient of {key}")
