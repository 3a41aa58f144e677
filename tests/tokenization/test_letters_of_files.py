"""Letters that a file has as added tokens (LLM, Math, MoE-16B, Coder), and llama.cpp's vectors for those vocabularies.

Their vocabularies lack the signs of the thirteen bytes that UTF-8 never uses, and hold them as added tokens instead:
real letters of texts (ü, ö, ...) are found as such tokens.
"""

import json
import os
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokenization_deepseek import DeepSeekTokenizer, encode_text
from tokenization_deepseek.pre_tokenization import pre_tokenizer
from tokenization_deepseek.tokenization_deepseek import BOS, EOS

LETTERS = "".join(map(chr, [0xC0, 0xC1, *range(0xF5, 0x100)]))
TEXTS = ["über Köln", "À la carte: õ÷ø", f"<think>ÿü{EOS}ö", LETTERS, "Ä ß é 深度 ü\n"]


def save(folder: Path, backend: Tokenizer) -> Path:
    """Both files as the releases have them."""
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "add_bos_token": True, "tokenizer_class": "Llama"}
    decoder = {i: token.__getstate__() for i, token in backend.get_added_tokens_decoder().items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": decoder}))
    return folder


@pytest.fixture(scope="module")
def handmade(tmp_path_factory) -> Path:
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(LETTERS))
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer("coder"), decoders.ByteLevel()
    backend.add_tokens([AddedToken(letter, normalized=False) for letter in LETTERS])
    backend.add_special_tokens([BOS, EOS, AddedToken("<mask>", lstrip=True)])
    return save(tmp_path_factory.mktemp("handmade"), backend)


def test_a_files_letters_load_with_their_ids(handmade):
    tokenizer = DeepSeekTokenizer.from_pretrained(handmade)
    first = 256 - len(LETTERS)
    assert tokenizer.convert_tokens_to_ids(list(LETTERS)) == list(range(first, 256))
    assert tokenizer("üb").input_ids == [256, first + LETTERS.index("ü"), tokenizer.convert_tokens_to_ids("b")]
    assert tokenizer.added_tokens_decoder[258].lstrip


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_letters_back(handmade, text):
    tokenizer = DeepSeekTokenizer.from_pretrained(handmade)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.batch_decode([ids, ids[:1]])[0] == text
    assert tokenizer.convert_tokens_to_string(tokenizer.tokenize(text)) == text
    assert tokenizer.decode(encode_text(tokenizer, text).input_ids, skip_special_tokens=True) == text
    assert "\ufffd" in PreTrainedTokenizerFast.from_pretrained(handmade).decode(ids)  # why we decode ourselves


def test_letters_stay_letters_where_texts_are_data(handmade):
    tokenizer = DeepSeekTokenizer.from_pretrained(handmade)
    letter = tokenizer.convert_tokens_to_ids("ü")
    ids = encode_text(tokenizer, f"ü{EOS}", add_special_tokens=False).input_ids
    assert ids[0] == letter and tokenizer.eos_token_id not in ids


def test_saving_keeps_them_and_new_ones_are_refused(handmade, tmp_path):
    tokenizer = DeepSeekTokenizer.from_pretrained(handmade)
    tokenizer.save_pretrained(tmp_path)
    again = DeepSeekTokenizer.from_pretrained(tmp_path)
    assert again(TEXTS).input_ids == tokenizer(TEXTS).input_ids
    assert again.decode(again.encode(LETTERS, add_special_tokens=False)) == LETTERS
    again.add_tokens(["ü"])  # it has it
    assert len(again) == len(tokenizer)
    for token in ("é", "für", AddedToken("<m>", lstrip=True), AddedToken("ü", rstrip=True)):
        with pytest.raises(ValueError, match="cannot be added"):
            again.add_tokens([token])


# ---- llama.cpp's vocabularies of the released models, with the ids that it expects


@pytest.fixture(scope="module", params=["llm", "coder"])
def vocabulary(request, tmp_path_factory) -> tuple[str, Path, DeepSeekTokenizer]:
    folder = os.environ.get("DEEPSEEK_HF_LLAMA_CPP")
    if not folder:
        pytest.skip("DEEPSEEK_HF_LLAMA_CPP names no folder with llama.cpp's models/ggml-vocab-deepseek-*.gguf")
    gguf = pytest.importorskip("gguf")
    path = Path(folder, f"ggml-vocab-deepseek-{request.param}.gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    normal = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == 1}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(normal, merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer(request.param), decoders.ByteLevel()
    backend.add_tokens(
        [AddedToken(token, special=kind == 3) for token, kind in zip(tokens, types, strict=True) if kind != 1]
    )
    return request.param, path, DeepSeekTokenizer.from_pretrained(save(tmp_path_factory.mktemp("gguf"), backend))


def test_llama_cpps_vectors(vocabulary):
    _, path, tokenizer = vocabulary
    texts = Path(f"{path}.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")[:-1]  # a line ends the last
    expected = [list(map(int, line.split())) for line in Path(f"{path}.out").read_text("utf-8").splitlines()]
    assert len(texts) > 40
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer.decode(ids) == text


def test_the_letters_of_the_released_vocabularies(vocabulary):
    name, _, tokenizer = vocabulary
    first = {"llm": 100002, "coder": 32000}[name]
    assert sorted(tokenizer.convert_tokens_to_ids(list(LETTERS))) == list(range(first, first + 13))
    if name == "llm":
        assert tokenizer.encode("über Köln", add_special_tokens=False) == [100014, 701, 721, 100003, 6621]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == BOS + text
        assert tokenizer.decode(encode_text(tokenizer, text).input_ids) == BOS + text
