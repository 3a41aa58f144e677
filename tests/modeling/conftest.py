"""Tiny models of every preset under every head, for the tests of the model class as transformers sees it."""

from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from configuration_deepseek import PRESETS, preset
from modeling_deepseek import (
    DeepSeekForCausalLM,
    DeepSeekForEmbedding,
    DeepSeekForQuestionAnswering,
    DeepSeekForRecommendation,
    DeepSeekForSequenceClassification,
    DeepSeekForTokenClassification,
    DeepSeekModel,
)

TINY = [name for name in PRESETS if name.startswith("tiny_")]
SEEING_AHEAD = [name for name in TINY if PRESETS[name].get("compress_ratios") is None]  # entries are of the past
HEADS = [
    DeepSeekModel,
    DeepSeekForCausalLM,
    DeepSeekForSequenceClassification,
    DeepSeekForTokenClassification,
    DeepSeekForRecommendation,
    DeepSeekForEmbedding,
    DeepSeekForQuestionAnswering,
]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Call V4.1 slow under the heads that read the trunk's last states as they read V4's."""
    for item in items:
        chosen = getattr(getattr(item, "callspec", None), "params", {})
        if chosen.get("name") == "tiny_v4.1" and chosen.get("head") in HEADS[2:]:
            item.add_marker(pytest.mark.slow)


def tiny(name: str, head: type[PreTrainedModel] = DeepSeekForCausalLM, **overrides) -> PreTrainedModel:
    """A model with weights large enough that attention and routing differ between tokens, in eval mode."""
    torch.manual_seed(0)
    model = head(preset(name, **{"initializer_range": 0.2, "num_labels": 3, "eos_token_id": None, **overrides})).eval()
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.uniform_(-0.2, 0.2)
    return model


def token_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random tokens of the tiny vocabulary, special ones excluded."""
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


def labels_for(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the model's head learns from, for tokens [B, S]; empty for the trunk."""
    rows = torch.arange(ids.shape[0])
    return {
        DeepSeekModel: {},
        DeepSeekForCausalLM: {"labels": ids},
        DeepSeekForSequenceClassification: {"labels": rows % 3},
        DeepSeekForTokenClassification: {"labels": ids % 3},
        DeepSeekForRecommendation: {"labels": ids},
        DeepSeekForEmbedding: {"passage_input_ids": ids.flip(1), "labels": rows},
        DeepSeekForQuestionAnswering: {"start_positions": rows % 2, "end_positions": rows % 2 + 1},
    }[type(model)]


@torch.no_grad()
def outputs(model: PreTrainedModel, ids: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
    """What the model says of its input, as one tensor: [B, S, ...], or [B, labels] for whole sequences."""
    result = model(input_ids=ids, **kwargs)
    if isinstance(model, DeepSeekForQuestionAnswering):
        return torch.stack((result.start_logits, result.end_logits), dim=-1)
    if isinstance(model, DeepSeekForRecommendation):
        return result.logits[:, 3:]  # the padding is among those before, and has the lowest number there is
    if isinstance(model, DeepSeekForEmbedding):
        return result.embeddings
    return result.last_hidden_state if isinstance(model, DeepSeekModel) else result.logits


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Models this small only wait for each other on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=HEADS, ids=lambda head: head.__name__, scope="session")
def head(request: pytest.FixtureRequest) -> type[PreTrainedModel]:
    """Each head class."""
    return request.param


@pytest.fixture(params=TINY, scope="session")
def name(request: pytest.FixtureRequest) -> str:
    """Each tiny preset's name."""
    return request.param


@pytest.fixture(scope="session")
def model(name: str, head: type[PreTrainedModel]) -> PreTrainedModel:
    """Each tiny preset under each head; shared, so tests leave it as it was."""
    return tiny(name, head)


@pytest.fixture(scope="session")
def causal(name: str) -> DeepSeekForCausalLM:
    """Each tiny language model; shared, so tests leave it as it was."""
    return tiny(name)


@pytest.fixture(scope="session")
def native_compiles():
    """Skips where a model of transformers breaks the graph by itself, as on torch 2.6."""
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    native = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))
    try:
        torch.compile(native, backend="eager", fullgraph=True)(token_ids(1, 4) % 8, use_cache=False)
    except torch._dynamo.exc.Unsupported as error:
        pytest.skip(f"torch {torch.__version__} finds no whole graph in transformers' own Llama: {str(error)[:80]}")
    finally:
        torch._dynamo.reset()
