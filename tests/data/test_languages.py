"""Languages by whatever name data have for them, against langcodes-like tables written here by hand."""

import json
import re
import unicodedata

import pytest
from huggingface_hub import ModelCard

from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.data.languages import (
    LETTERS,
    bleu_tokenizer,
    code,
    foreign_script,
    has_spaces,
    hub_codes,
    letters,
)
from finetune_deepseek.data.pair_checks import in_other_script
from finetune_deepseek.training.run import run_stages
from finetune_deepseek.translation.augmentation import Words
from finetune_deepseek.translation.task import Translation
from tests.small_runs import TINY, flags

# name, code of ISO 639-1, sacrebleu's tokenizer, whether it has spaces, a letter of its script if that isn't Latin
TABLE = """
    en en 13a yes -        eng_Latn en 13a yes -     english en 13a yes -      pt_BR pt 13a yes -     deu de 13a yes -
    ger de 13a yes -       zh zh zh no 中            zh-CN zh zh no 中         ZH zh zh no 中         zho zh zh no 中
    chi zh zh no 中        zho_Hans zh zh no 中      zho_Hant zh zh no 中      zh_Hant_TW zh zh no 中 cmn zh zh no 中
    Chinese zh zh no 中    yue_Hant yue zh no 中     ja ja char no か          jpn_Jpan ja char no か jpn ja char no か
    ko ko char yes 한      kor_Hang ko char yes 한   kor ko char yes 한        th th char no ไ
    tha_Thai th char no ไ
    lao_Laoo lo char no -  khm_Khmr km char no -     mya_Mymr my char no -     rus_Cyrl ru 13a yes д  ukr uk 13a yes д
    arb_Arab ar 13a yes ع  pes_Arab fa 13a yes ع     hin_Deva hi 13a yes क     npi_Deva ne 13a yes क  heb he 13a yes ש
    ell_Grek el 13a yes λ  srp_Cyrl sr 13a yes д     sr sr 13a yes -           sr-Latn sr 13a yes -   fra fr 13a yes -
"""
NAMES = re.findall(r"(\S+) (\S+) (\S+) (\S+) (\S+)", TABLE)


@pytest.mark.parametrize("row", NAMES, ids=[row[0] for row in NAMES])
def test_a_language_by_any_name(row):
    name, expected, tokenizer, spaces, letter = row
    assert code(name) == expected
    assert bleu_tokenizer(name) == tokenizer
    assert has_spaces(name) == (spaces == "yes")
    assert bool(re.fullmatch(f"[{letters(name)}]", letter)) if letter != "-" else not letters(name)


def test_letters_are_those_of_unicode():
    words = {"Cyrl": "CYRILLIC", "Arab": "ARABIC", "Deva": "DEVANAGARI", "Grek": "GREEK", "Hebr": "HEBREW",
             "Thai": "THAI", "Hans": "CJK"}  # fmt: skip
    for script, word in words.items():
        pattern = re.compile(f"[{LETTERS[script]}]")
        own = [c for c in map(chr, range(0x250, 0xFFFF)) if c.isalpha() and pattern.match(c)]
        assert own and sum(word in unicodedata.name(c, "") for c in own) > 0.85 * len(own), script


def test_a_column_that_is_no_language():
    assert code("source_text") == "source_text" and bleu_tokenizer("source_text") == "13a"
    assert has_spaces("source_text") and not letters("source_text")


def test_a_card_names_codes():
    assert hub_codes(["english", "zh-CN", "zho_Hans", "deu"]) == ["en", "zh", "de"]
    assert hub_codes(["source_text", "jpn_Jpan"]) == ["ja"] and hub_codes(["question"]) is None


def test_a_run_on_columns_of_three_letters(tmp_path):
    """Its card has the Hub's codes, its BLEU the tokenizer for Chinese."""
    rows = [{"eng_Latn": f"{n} birds", "zho_Hans": f"{n}只鸟"} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {f"{split}_file": tmp_path / "rows.jsonl" for split in ("train", "test")}
    settings = TINY | files | {"source_lang": "eng_Latn", "target_lang": "zho_Hans", "max_steps": 1}
    argv = flags(settings | {"output_dir": tmp_path / "out"})
    results = run_stages(Translation, parse_command("translation", Translation.arguments_class, argv))
    assert "|tok:zh|" in results["test_bleu_signature"]
    assert ModelCard.load(tmp_path / "out" / "README.md").data.language == ["en", "zh"]


def test_swapped_sides_are_seen_by_codes_of_three_letters():
    pairs = [("Good morning", "早上好"), ("早上好", "Good morning")]
    for names in (("en", "zh"), ("eng_Latn", "zho_Hans"), ("english", "cmn")):
        assert list(in_other_script(pairs, *names)) == pairs[1:]
    assert foreign_script("zho_Hans", "zho_Hant") is None and foreign_script("srp", "eng") is None
    assert list(in_other_script([("дом", "house")], "sr", "en")) == []


def test_chinese_is_augmented_by_character():
    assert Words("zho_Hans", {}).split("早上好") == Words("zh", {}).split("早上好") != ["早上好"]
