"""Masks are made without waiting for the device: how often a forward looks at numbers, and that graphs tell documents
apart too."""

from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import StaticCache

from tests.modeling.conftest import tiny, token_ids
from tests.modeling.test_graphs import Logits
from tests.reference.compare import assert_close


class Looks(TorchDispatchMode):
    """Counts what would wait for a device: `if tensor`, `int(tensor)`, `.item()`, `.tolist()`."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        plain = torch.Tensor.tolist

        def counted(tensor):
            self.count += 1
            return plain(tensor)

        self.patch = mock.patch.object(torch.Tensor, "tolist", counted)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.stop()
        return super().__exit__(*error)


def positions_of(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


ONES = torch.ones(2, 9, dtype=torch.long)
PADDED = ONES.clone().index_fill_(1, torch.tensor([0, 1]), 0)
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, -1)
PROMPTS = {
    "nothing told": ({}, 0),
    "all tokens": ({"attention_mask": ONES, "position_ids": positions_of(ONES)}, 1),
    "padding": ({"attention_mask": PADDED, "position_ids": positions_of(PADDED)}, 1),
    "documents and a mask": ({"attention_mask": ONES, "position_ids": PACKED}, 2),  # the second is transformers'
}


@pytest.mark.parametrize("prompt", PROMPTS)
@torch.no_grad()
def test_a_prompt_looks_once_at_most(prompt):
    model, (arguments, looks) = tiny("tiny_llm"), PROMPTS[prompt]
    with Looks() as seen:
        model(token_ids(2, 9), use_cache=False, **arguments)
    assert seen.count == looks


@torch.no_grad()
def test_a_prompt_in_both_directions_on_a_static_cache_looks_at_no_number():
    """The first after other tokens, for the count of these stands on the device."""
    model = tiny("tiny_llm", attention_direction="prefix")
    ids, blocks = token_ids(2, 9), torch.zeros(2, 4, dtype=torch.long)
    blocks[:, 3] = -1
    whole = torch.cat((torch.full((2, 5), -1), blocks), dim=1)
    cache = StaticCache(config=model.config, max_cache_len=12)
    model(ids[:, :5], cache=cache, block_sequence_ids=torch.full((2, 5), -1))
    with Looks() as seen:
        found = model(ids[:, 5:], cache=cache, block_sequence_ids=blocks).logits
    assert seen.count == 0
    assert_close(found, model(ids, use_cache=False, block_sequence_ids=whole).logits[:, 5:])


class WithPositions(Logits):
    def forward(self, ids, mask, positions):
        return self.model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


@pytest.mark.usefixtures("native_compiles")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_a_graph_tells_documents_apart(implementation):
    model, ids = tiny("tiny_llm"), token_ids(2, 9)
    model.set_attn_implementation(implementation)
    told = WithPositions(model)
    exported = torch.export.export(told, (ids, ONES, positions_of(ONES))).module()
    compiled = torch.compile(told, backend="eager", fullgraph=True)
    for mask, positions in ((ONES, PACKED), (PADDED, positions_of(PADDED)), (ONES, positions_of(ONES))):
        expected, seen = told(ids, mask, positions), mask.bool()
        for graph in (exported, compiled):
            assert_close(graph(ids, mask, positions)[seen], expected[seen])
