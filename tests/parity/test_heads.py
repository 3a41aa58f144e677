"""Classification heads against transformers' own."""

import pytest
import torch

from modeling_deepseek import DeepSeekForSequenceClassification
from tests.parity.cases import CASES
from tests.parity.pairs import Pair, padding, pair_of, token_ids
from tests.reference.compare import assert_close

# In transformers DeepSeek-V2 has no class for tokens, V3.2 none for tokens and sequences.
MISSING = {"SequenceClassification": ("deepseek_v32",), "TokenClassification": ("deepseek_v2", "deepseek_v32")}
HEADS = [
    (name, head)
    for head, missing in MISSING.items()
    for name, (model_type, _) in CASES.items()
    if model_type not in missing
]


@pytest.fixture(params=HEADS, ids=lambda row: f"{row[0]}-{row[1]}", scope="module")
def headed(request) -> Pair:
    return pair_of(*request.param)


def padded(pair: Pair, side: str) -> dict[str, torch.Tensor]:
    """A batch padded on one side, with labels of the head's shape."""
    mask = padding(side)
    ids = token_ids(pair).masked_fill(mask == 0, pair.native.config.pad_token_id)
    labels = torch.randint(0, 2, mask.shape, generator=torch.Generator().manual_seed(3)).masked_fill(mask == 0, -100)
    per_token = type(pair.ours).__name__.endswith("TokenClassification")
    return {"input_ids": ids, "attention_mask": mask, "labels": labels if per_token else labels.clamp(min=0)[:, 0]}


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_scores_and_loss(headed: Pair, side: str):
    batch = padded(headed, side)
    ours, native = (model(**batch) for model in (headed.ours, headed.native))
    seen = batch["attention_mask"].bool() if ours.logits.ndim == 3 else slice(None)
    assert_close(ours.logits[seen], native.logits[seen], "scores")
    assert_close(ours.loss, native.loss, "loss")


def test_gradient_of_every_parameter(headed: Pair):
    gradients = []
    for model in (headed.ours, headed.native):
        parameters = dict(model.named_parameters())
        loss = model(**padded(headed, "right")).loss
        gradients.append(dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True)))
    ours, native = gradients
    assert ours.keys() == native.keys()
    for name in native:
        assert_close(ours[name], native[name], f"gradient of {name}")


def test_head_checkpoint_is_read_whole(headed: Pair):
    assert not any(headed.info.values()), headed.info


@pytest.mark.parametrize("name", ["llm_gqa", "v2_groups", "v3"])
def test_causal_checkpoint_leaves_only_the_head_new(name: str):
    pair = pair_of(name)
    model, info = DeepSeekForSequenceClassification.from_pretrained(pair.folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"}
    assert all(
        torch.equal(tensor, pair.native.state_dict()[f"model.{key}"])
        for key, tensor in model.model.state_dict().items()
    )
