"""Graphs that run without Python: torch.export's and torch.jit's, of every preset, for batches of other sizes too."""

import io

import pytest
import torch
from torch import nn

from modeling_deepseek.indexer import select_keys
from tests.modeling.conftest import SEEING_AHEAD, TINY, tiny, token_ids
from tests.reference.compare import assert_close


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(ids, attention_mask=mask, use_cache=False).logits


def batch(rows, length, seed=0):
    """Tokens, and a mask that leaves out the first three of the second row."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1, :3] = 0
    return token_ids(rows, length, seed=seed), mask


@pytest.mark.parametrize(("name", "strict"), [*((name, False) for name in TINY), ("tiny_v32", True)])
@torch.no_grad()
def test_torch_export(name, strict, request):
    if strict:  # by the same tracer as torch.compile
        request.getfixturevalue("native_compiles")
    model, free = Logits(tiny(name)), {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    shape = (3, 12)
    if name not in SEEING_AHEAD:  # how many entries there are hangs on the length
        free, shape = {}, (2, 9)
    exported = torch.export.export(model, batch(2, 9), dynamic_shapes=(free, free), strict=strict).module()
    other = batch(*shape, seed=1)
    assert_close(exported(*other), model(*other))


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_a_saved_trace(name):
    model, file = Logits(tiny(name)), io.BytesIO()
    torch.jit.save(torch.jit.trace(model, batch(2, 9), check_trace=False), file)
    file.seek(0)
    traced, other = torch.jit.load(file), batch(2, 12, seed=1)
    assert_close(traced(*other), model(*other))


def test_a_trace_selects_the_keys_that_the_model_does():
    """Of equal scores the later ones, of zeros of either sign too."""
    scores = torch.tensor([[0.0, 2.0, -0.0, 2.0, 0.0, -1.0], [-torch.inf, 1.0, 1.0, 1.0, -torch.inf, 0.0]])
    traced = torch.jit.trace(lambda scores: select_keys(scores, 3), scores, check_trace=False)
    for found in (traced(scores), select_keys(scores, 3)):
        assert found.sort(-1).values.tolist() == [[1, 3, 4], [1, 2, 3]]
