"""Fixtures of the parity tests: every row of cases.py as a pair of models, on one thread."""

import pytest
import torch

from tests.parity.cases import CASES
from tests.parity.pairs import Pair, pair_of


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Models this small only wait for each other on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=CASES, scope="module")
def pair(request: pytest.FixtureRequest) -> Pair:
    """A native causal language model and ours, loaded from its checkpoint."""
    return pair_of(request.param)
