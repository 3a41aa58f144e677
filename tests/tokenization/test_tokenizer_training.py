"""Training: ids, sizes, cuts by generation, bad input."""

import json

import pytest

from tokenization_deepseek import CHAT_TEMPLATES, control_tokens, train_tokenizer
from tokenization_deepseek.pre_tokenization import PATTERNS, pre_tokenizer
from tokenization_deepseek.tokenization_deepseek import BOS, EOS, PAD, SPECIAL_TOKENS
from tokenization_deepseek.training import MIN_VOCAB_SIZE


def pieces(generation: str, text: str) -> list[str]:
    return [text[a:b] for _, (a, b) in pre_tokenizer(generation).pre_tokenize_str(text)]


def test_v3_cuts_are_those_of_the_released_file(released):
    backend = released.backend_tokenizer
    assert json.loads(pre_tokenizer("v3").__getstate__()) == json.loads(backend.pre_tokenizer.__getstate__())


@pytest.mark.parametrize(
    "generation, text, expected",
    [
        ("llm", "ab 12345\r\n你好,x", ["ab", " ", "1", "2", "3", "4", "5", "\r", "\n", "你好", ",", "x"]),
        ("llm", " Straße über_ab!! ", [" Stra", "ß", "e", " ü", "ber", "_", "ab", "!!", " "]),
        ("coder", "ab 12345\n你好 x+=1", ["ab", " ", "1", "2", "3", "4", "5", "\n", "你好", " x", "+=", "1"]),
        ("coder", "если 你a(b)", ["если", " ", "你", "a", "(", "b", ")"]),
        ("v3", "ab 12345\n\n你好,x", ["ab", " ", "123", "45", "\n\n", "你好", ",x"]),
        ("v3", " Straße, カタカナ漢字한국!!\n", [" Straße", ",", " ", "カタカナ漢字", "한국", "!!\n"]),
    ],
)
def test_cuts_by_generation(generation, text, expected):
    assert pieces(generation, text) == expected


@pytest.mark.parametrize("generation", PATTERNS)
def test_merges_stay_inside_the_cuts(generation):
    lines = ["in 1234 in 1234, 你好世界! x=1;\n"] * 8
    tokenizer = train_tokenizer(lines, 2000, generation, add_bos_token=False)
    for token in set(tokenizer.tokenize(lines[0])):
        text = tokenizer.convert_tokens_to_string([token])
        assert any(text in piece for piece in pieces(generation, lines[0]))
    digits = [t for t in tokenizer.get_vocab() if t.isdecimal()]
    assert max(map(len, digits)) == (3 if generation == "v3" else 1)


def test_special_tokens_come_first_and_bos_eos_pad_as_in_v3(trained):
    assert trained.convert_ids_to_tokens(list(range(len(SPECIAL_TOKENS)))) == list(SPECIAL_TOKENS)
    assert (trained.bos_token_id, trained.eos_token_id, trained.pad_token_id) == (0, 1, 2)
    assert (trained.bos_token, trained.eos_token, trained.pad_token) == (BOS, EOS, PAD)
    assert {t.content: t.special for t in trained.added_tokens_decoder.values()} == SPECIAL_TOKENS


@pytest.mark.parametrize("vocab_size", [MIN_VOCAB_SIZE, 300, 333])
def test_vocabulary_sizes_are_met(corpus, vocab_size):
    tokenizer = train_tokenizer(iter(corpus), vocab_size)
    assert len(tokenizer) == vocab_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(vocab_size))
    for text in [*corpus, "日本語 ☃ unseen", *SPECIAL_TOKENS]:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_larger_vocabulary_gives_fewer_tokens_and_stops_where_the_corpus_ends(corpus):
    small, large, endless = (train_tokenizer(corpus, size) for size in (280, 400, 50_000))
    assert len(small(corpus[1]).input_ids) > len(large(corpus[1]).input_ids)
    assert 400 < len(endless) < 50_000


def test_training_twice_gives_the_same(corpus):
    first, second = (train_tokenizer(corpus, 400).get_vocab() for _ in range(2))
    assert first == second


def test_options_arrive(corpus):
    tokenizer = train_tokenizer(
        corpus, 300, add_bos_token=False, add_eos_token=True, chat_template="v3.1", model_max_length=9
    )
    assert tokenizer("").input_ids == [1] and tokenizer.model_max_length == 9
    assert tokenizer.chat_template == CHAT_TEMPLATES["v3.1"]
    assert train_tokenizer(corpus, 300)("").input_ids == [0]


@pytest.mark.parametrize(("generation", "word"), [("llm", "v2"), ("coder", "coder"), ("v3", "v3")])
def test_a_tokenizer_has_the_chat_template_of_its_generation(corpus, generation, word):
    assert train_tokenizer(corpus, 300, generation).chat_template == CHAT_TEMPLATES[word]
    assert train_tokenizer(corpus, 300, generation, chat_template=None).chat_template is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": MIN_VOCAB_SIZE - 1}, "vocab_size 275 is too small: 256 bytes and 20 special tokens take 276"),
        ({"texts": "one string"}, "texts is one string"),
        ({"texts": ["a", None]}, r"texts\[1\] is NoneType, not a string"),
        ({"texts": []}, "no text to train on"),
        ({"texts": ["", ""]}, "no text to train on"),
        ({"generation": "v2"}, "generation 'v2' has no pre-tokenizer; choose one of llm, coder, v3"),
        ({"chat_template": "v9"}, "no chat template 'v9'; choose own or one of coder, v2, v2.5, v3, r1"),
    ],
)
def test_bad_input_is_refused_in_one_line(corpus, change, message):
    with pytest.raises(ValueError, match=message) as error:
        train_tokenizer(**({"texts": corpus, "vocab_size": 300} | change))
    assert "\n" not in str(error.value)


def test_marks_of_the_chat_template_are_tokens_that_decoding_keeps(corpus):
    tokenizer = train_tokenizer(corpus, 320, chat_template="v4.1")
    marks = ["｜DSML｜", "<｜System｜>", "<｜title｜>", "<｜latest_reminder｜>"]
    assert None not in tokenizer.convert_tokens_to_ids(marks) and set(marks) <= set(control_tokens(tokenizer))
    chat = [{"role": "system", "content": "<｜System｜>"}, {"role": "user", "content": "｜DSML｜"}]
    ids = tokenizer.apply_chat_template(chat)["input_ids"]
    system, dsml = tokenizer.convert_tokens_to_ids(["<｜System｜>", "｜DSML｜"])
    assert ids.count(system) == 1 and dsml not in ids
    assert "".join(marks) == tokenizer.decode(tokenizer.convert_tokens_to_ids(marks), skip_special_tokens=True)
    with pytest.raises(ValueError, match="vocab_size 277 is too small: 256 bytes and 30 special tokens take 286"):
        train_tokenizer(corpus, 277, chat_template="v4.1")
    assert len(train_tokenizer(corpus, 277)) == 277
