"""Encoding writes nothing that threads share, and BOS and EOS go one way."""

import copy
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import PreTrainedTokenizerFast

from tokenization_deepseek import CHAT_TEMPLATES, DeepSeekTokenizer, encode_text
from tokenization_deepseek.tokenization_deepseek import BOS, EOS

LONG = "Die Straße überquert den Fluß; 12,5 Kilometer östlich von Köln. 深度求索"


@pytest.fixture
def both(trained, tmp_path) -> tuple[DeepSeekTokenizer, PreTrainedTokenizerFast]:
    """Ours, and transformers' own class on the same file."""
    trained.add_eos_token = True
    trained.save_pretrained(tmp_path)
    return trained, PreTrainedTokenizerFast.from_pretrained(tmp_path)


SHAPES = {
    "one": ("The cheque", None),
    "pair": ("The cheque of 1234", "dollars"),
    "rows": ([LONG, "", "a b"], None),
    "pairs": ([LONG, "a"], ["b", LONG]),
    "tuples": ([(LONG, "a"), ("b", "")], None),
    "words": (["The", "cheque", ""], None),
    "rows of words": ([["The", "cheque"], [], ["a", "b", "c"]], None),
    "pairs of words": ([["The", "cheque"], ["a"]], [["b"], [LONG, "c"]]),
}
CALLS = [
    {},
    {"add_special_tokens": False},
    {"padding": True, "pad_to_multiple_of": 8},
    {"padding": "max_length", "max_length": 60, "padding_side": "right"},
    {"truncation": True, "max_length": 7},
    {"truncation": "only_first", "max_length": 12, "stride": 3, "return_overflowing_tokens": True, "padding": True},
    {"truncation": True, "max_length": 6, "return_overflowing_tokens": True, "add_special_tokens": False},
]
ALL = {"return_offsets_mapping": True, "return_special_tokens_mask": True, "return_token_type_ids": True}


@pytest.mark.parametrize("options", CALLS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_call_gives_what_transformers_gives(both, shape, options):
    text, pair = SHAPES[shape]
    if options.get("truncation") == "only_first" and ("words" in shape or "pairs" in shape or "tuples" in shape):
        options = options | {"truncation": "longest_first"}
    answers = [
        tokenizer(text, pair, is_split_into_words="words" in shape, **options, **ALL, return_length=True)
        for tokenizer in both
    ]
    assert dict(answers[0]) == dict(answers[1])
    for ours, theirs in zip(answers[0].encodings, answers[1].encodings, strict=True):
        assert (ours.tokens, ours.word_ids, ours.sequence_ids) == (theirs.tokens, theirs.word_ids, theirs.sequence_ids)


def test_bad_calls_are_refused_as_by_transformers(both):
    for tokenizer in both:
        with pytest.raises(BaseException, match="stride"):
            tokenizer("a b c d e f", truncation=True, max_length=5, stride=9, return_overflowing_tokens=True)


def test_eight_threads_share_a_tokenizer(trained):
    """BOS lost or doubled, another thread's padding or truncation, text read for control tokens."""
    trained.chat_template = CHAT_TEMPLATES["v3"]
    calls = [
        lambda t, i: t(f"{BOS}{i} a"),
        lambda t, i: t(f"{i} a"),
        lambda t, i: t([f"{i}", "a b c d e"], padding=True),
        lambda t, i: t([f"{i} a b c d e f g", "a"], truncation=True, max_length=4),
        lambda t, i: t(f"{i}<think>{EOS}", split_special_tokens=True),
        lambda t, i: t([f"{i}", "a"], padding="max_length", max_length=12, padding_side="right"),
        lambda t, i: encode_text(t, f"{i}<｜User｜>"),
        lambda t, i: t.apply_chat_template(
            [{"role": "user", "content": f"{EOS}{i}"}, {"role": "assistant", "content": f"<|EOT|>{i}"}],
            return_assistant_tokens_mask=True,
        ),
    ]
    numbers = range(150)
    alone = [[dict(call(copy.deepcopy(trained), number)) for number in numbers[:10]] for call in calls]
    with ThreadPoolExecutor(8) as pool:
        runs = [pool.submit(lambda c: [dict(c(trained, number % 10)) for number in numbers], call) for call in calls]
        for run, expected in zip(runs, alone, strict=True):
            assert run.result() == expected * 15


def test_encoding_leaves_the_tokenizer_as_it_was(trained):
    before = trained.backend_tokenizer.to_str()
    trained([BOS + "a", "b<think>"], padding=True, truncation=True, max_length=3, split_special_tokens=True)
    trained.apply_chat_template([{"role": "user", "content": EOS}])
    encode_text(trained, "<think>", padding="max_length", max_length=9)
    assert trained.backend_tokenizer.to_str() == before
    assert not trained.backend_tokenizer.encode_special_tokens


def test_settings_in_the_file_wait_for_a_call_that_asks(trained, tmp_path):
    expected = trained("a b c d").input_ids
    trained.backend_tokenizer.enable_truncation(2)
    trained.backend_tokenizer.enable_padding(length=9)
    trained.save_pretrained(tmp_path)
    assert DeepSeekTokenizer.from_pretrained(tmp_path)("a b c d").input_ids == expected


# ---- one way for BOS and EOS


@pytest.fixture
def ends(trained) -> DeepSeekTokenizer:
    trained.add_eos_token = True
    return trained


WRITTEN = ["", BOS, EOS, BOS + EOS]


@pytest.mark.parametrize(("first", "second"), list(itertools.product(WRITTEN, WRITTEN)))
def test_ids_dont_depend_on_the_other_rows(ends, first, second):
    def wrap(edge: str, text: str) -> str:
        return (BOS if BOS in edge else "") + text + (EOS if EOS in edge else "")

    texts = [wrap(first, "a b"), wrap(second, "c d e")]
    options = {"return_special_tokens_mask": True}
    batch = ends(texts, **options)
    for i, (text, bare) in enumerate(zip(texts, ["a b", "c d e"], strict=True)):
        alone, plain = ends(text, **options), ends(bare, **options)
        assert {name: rows[i] for name, rows in batch.items()} == dict(alone) == dict(plain)
    assert ends(*texts).input_ids.count(0) == 1 + (BOS in second)  # the pair's second text is amidst
    assert ends(*texts).input_ids.count(1) == 1 + (EOS in first)


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_window_has_its_own_bos_and_eos(ends, side):
    ends.truncation_side = side
    options = {
        "truncation": True,
        "max_length": 6,
        "return_overflowing_tokens": True,
        "return_special_tokens_mask": True,
    }
    windows = ends(BOS + "a b c d e f g h" + EOS, **options)
    assert len(windows.input_ids) > 1
    for ids, mask in zip(windows.input_ids, windows.special_tokens_mask, strict=True):
        assert (ids[0], ids[-1]) == (0, 1) and ids.count(0) == ids.count(1) == 1
        assert mask == [1] + [0] * (len(ids) - 2) + [1]
    assert dict(windows) == dict(ends("a b c d e f g h", **options))


def test_only_the_flag_cuts(trained):
    assert trained("a" + EOS).input_ids == [0, trained.convert_tokens_to_ids("a"), 1]  # add_eos_token is false
    assert trained(f"{BOS}{BOS}a").input_ids[:3] == [0, 0, trained.convert_tokens_to_ids("a")]
    assert trained(BOS + "a", add_special_tokens=False).input_ids[0] == 0
