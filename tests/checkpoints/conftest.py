"""Tiny checkpoints with a tokenizer, and a process that has none of our packages."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from configuration_deepseek import preset
from modeling_deepseek import DeepSeekForCausalLM
from tests.checkpoints import llama
from tokenization_deepseek import DeepSeekTokenizer, train_tokenizer

GENERATIONS = {"tiny_llm": "llm", "tiny_moe": "llm", "tiny_v2_lite": "llm", "tiny_v2": "llm"}
VOCAB_SIZE = 330
STRANGER = """
import json, sys
for name in ("configuration_deepseek", "modeling_deepseek", "tokenization_deepseek", "finetune_deepseek"):
    sys.modules[name] = None
import torch, transformers
torch.set_num_threads(1)
folders, out = json.loads(sys.argv[1])
answers = {}
for name, folder in folders.items():
    architecture = json.load(open(folder + "/config.json"))["architectures"][0]
    auto = "AutoModelFor" + architecture.partition("For")[2]
    model, info = getattr(transformers, auto).from_pretrained(
        folder, output_loading_info=True, trust_remote_code=name == "bundle", attn_implementation="eager",
        experts_implementation="eager", dtype=torch.float32,
    )
    ids = torch.arange(3, 16)[None] * 7 % 58 + 3
    with torch.no_grad():
        logits = model.eval()(ids).logits
    info = {key: sorted(map(str, value)) for key, value in info.items() if value}
    answers[name] = (type(model).__name__, info, logits)
torch.save(answers, out)
"""
IDS = torch.arange(3, 16)[None] * 7 % 58 + 3


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Models this small only wait for each other on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory):
    """The module, built if it isn't installed."""
    try:
        return llama.llama_cpp(tmp_path_factory.mktemp("llama_cpp"))
    except llama.CannotBuild as reason:
        pytest.skip(str(reason))


@functools.cache
def tokenizer_of(generation: str) -> DeepSeekTokenizer:
    texts = ["A cat sat.", "Eine Katze saß.", "一只猫坐着。", "def f(x):\n    return x**2  # 1234"] * 3
    return train_tokenizer(texts, 320, generation, chat_template="v3")


def tiny(name: str, head: type[PreTrainedModel] = DeepSeekForCausalLM, **fields: Any) -> PreTrainedModel:
    """A model with weights large enough that attention and routing differ between tokens, in eval mode."""
    torch.manual_seed(0)
    model = head(
        preset(name, **{"vocab_size": VOCAB_SIZE, "initializer_range": 0.2, "num_labels": 3, **fields})
    ).eval()
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith("e_score_correction_bias"):
                value.uniform_(-0.2, 0.2)
            elif "norm" in key:
                value.add_(0.3 * torch.randn(value.shape))
    return model


def save_tiny(folder: Path, name: str, head: type[PreTrainedModel] = DeepSeekForCausalLM, **fields: Any):
    """Save a tiny model with its tokenizer; gives the model and the folder."""
    model = tiny(name, head, **fields)
    model.save_pretrained(folder)
    tokenizer_of(GENERATIONS.get(name, "v3")).save_pretrained(folder)
    return model, folder


@pytest.fixture
def saved(tmp_path) -> Callable[..., tuple[PreTrainedModel, Path]]:
    """`save_tiny` to the folder "source" of the test."""
    return functools.partial(save_tiny, tmp_path / "source")


def header(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> type and shape of all weights of a folder."""
    entries = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  no mapping
                entry = file.get_slice(name)
                entries[name] = (entry.get_dtype(), tuple(entry.get_shape()))
    return entries


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return tensors


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS % model.config.vocab_size).logits


def ask_stranger(folders: dict[str, Path], scratch: Path) -> dict[str, tuple]:
    """Class, loading info and logits of each folder's model, in a process that cannot import our packages; remote code
    is trusted for the name "bundle" only."""
    out = scratch / "answers.pt"
    argument = json.dumps([{name: str(folder) for name, folder in folders.items()}, str(out)])
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_HOME": str(scratch / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-P", "-c", STRANGER, argument], cwd=scratch, env=env, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return torch.load(out)
