"""Checkpoint folders in the official layout: what transformers' classes write we read, and the other way round."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from modeling_deepseek import DeepSeekForCausalLM
from tests.parity.pairs import EAGER, Pair, token_ids
from tests.reference.compare import assert_close


@pytest.fixture
def warnings(caplog):
    """What transformers warns of."""
    logger = transformers_logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.WARNING)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_official_checkpoint_is_read_whole(pair: Pair, warnings):
    model, info = DeepSeekForCausalLM.from_pretrained(pair.folder, output_loading_info=True)
    assert not any(info.values()), info
    assert not warnings.messages
    assert model.config.model_type == "deepseek"
    assert model.config.source_model_type == pair.native.config.model_type
    ours, native = model.state_dict(), pair.native.state_dict()
    assert ours.keys() == native.keys()
    assert all(torch.equal(ours[name], native[name]) for name in native)


def test_transformers_reads_what_we_save(pair: Pair, tmp_path, warnings):
    pair.ours.save_pretrained(tmp_path)
    official = load_file(pair.folder / "model.safetensors")
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == official.keys()
    assert all(torch.equal(written[name], official[name]) for name in official)

    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "deepseek"
    pair.native.config.save_pretrained(tmp_path)
    native, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **EAGER)
    assert type(native) is type(pair.native)
    assert not any(info.values()), info
    ids = token_ids(pair)
    with torch.no_grad():
        assert_close(pair.ours(ids).logits, native.eval()(ids).logits, "logits")


def test_our_own_folder_gives_equal_outputs(pair: Pair, tmp_path, warnings):
    pair.ours.save_pretrained(tmp_path)
    model, info = DeepSeekForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **EAGER)
    assert not any(info.values()), info
    assert not warnings.messages
    ids = token_ids(pair)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, pair.ours(ids).logits)
