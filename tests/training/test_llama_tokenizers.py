"""LLM, Math and Coder are published as Llama, with a tokenizer of DeepSeek's: it is opened by our class."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from finetune_deepseek.training.loading import saved_tokenizer
from finetune_deepseek.training.saved import Saved
from tokenization_deepseek import DeepSeekTokenizer
from tokenization_deepseek.pre_tokenization import pre_tokenizer
from tokenization_deepseek.tokenization_deepseek import BOS, EOS

LETTERS = "".join(map(chr, [0xC0, 0xC1, *range(0xF5, 0x100)]))


@pytest.fixture(params=[BOS, {"__type": "AddedToken", "content": BOS}, "<s>"], ids=["text", "object", "another"])
def folder(request, tmp_path):
    """A tokenizer as the releases have it, and one that begins texts otherwise, beside a config of Llama's."""
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(LETTERS))
    backend = Tokenizer(models.BPE({char: number for number, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer("coder"), decoders.ByteLevel()
    backend.add_tokens([AddedToken(letter, normalized=False) for letter in LETTERS])
    backend.add_special_tokens([BOS, EOS, "<s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": request.param, "eos_token": EOS, "add_bos_token": True, "legacy": True}
    config |= {"tokenizer_class": "LlamaTokenizerFast", "unk_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return tmp_path


def test_texts_begin_with_bos_and_letters_come_back(folder):
    tokenizer, text = saved_tokenizer(Saved.open(None, str(folder))), "über Köln"
    if "<s>" in (folder / "tokenizer_config.json").read_text():
        assert not isinstance(tokenizer, DeepSeekTokenizer)
        return
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == text
    assert AutoTokenizer.from_pretrained(folder).decode(ids[1:]) != text  # why


def test_a_tokenizer_without_a_model_is_told_by_its_bos_too(folder):
    is_ours = "<s>" not in (folder / "tokenizer_config.json").read_text()
    (folder / "config.json").unlink()
    assert isinstance(saved_tokenizer(Saved.open(None, str(folder))), DeepSeekTokenizer) == is_ours
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    assert not isinstance(saved_tokenizer(Saved.open(None, str(folder))), DeepSeekTokenizer)


def test_an_adapter_goes_by_its_base(folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    is_ours = "<s>" not in (folder / "tokenizer_config.json").read_text()
    assert isinstance(saved_tokenizer(Saved.open(None, str(adapter))), DeepSeekTokenizer) == is_ours
