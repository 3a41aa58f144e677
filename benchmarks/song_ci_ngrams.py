"""Song ci by n-grams of characters (Witten-Bell, interpolated; nltk), beside the models of song_ci_language.yaml.

    pip install nltk
    python benchmarks/song_ci_ngrams.py --data ../shared/data

The order is chosen on the validation poems. Characters seen once in training are one class of unknown ones, of which
each costs the class and one of as many as there are: those seen once, and all other characters of `HAN`. Each poem's
end is counted, as for the models.
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path

from compare import RESULTS, machine_lines, number, write_section, write_whole
from nltk.lm import Vocabulary, WittenBellInterpolated
from nltk.util import everygrams, ngrams, pad_sequence

from finetune_deepseek.data.table import read_columns

HAN = 20_992  # CJK Unified Ideographs, U+4E00 to U+9FFF
ORDERS = (2, 3, 4)
BEGIN, END = "<s>", "</s>"


def poems(folder: Path, split: str) -> list[str]:
    return [text for text in read_columns(str(folder / f"{split}.jsonl.gz"))["text"] if text.strip()]


def padded(text: str, order: int) -> list[str]:
    """The characters of a poem, with its end and what an n-gram sees before its first."""
    return [*pad_sequence([*text, END], order, pad_left=True, left_pad_symbol=BEGIN)]


def fitted(texts: list[str], order: int) -> WittenBellInterpolated:
    vocabulary = Vocabulary([*Counter("".join(texts)).elements(), *[END] * len(texts), BEGIN, BEGIN], unk_cutoff=2)
    model = WittenBellInterpolated(order, vocabulary=vocabulary)
    # Padding is context only: no n-gram ends in it.
    counted = (
        [gram for gram in everygrams(model.vocab.lookup(padded(text, order)), max_len=order) if gram[-1] != BEGIN]
        for text in texts
    )
    model.counts.update(counted)
    return model


def bits_per_byte(model: WittenBellInterpolated, texts: list[str], num_unknown: int) -> float:
    bits = 0.0
    for text in texts:
        for gram in ngrams(model.vocab.lookup(padded(text, model.order)), model.order):
            bits -= math.log2(model.unmasked_score(gram[-1], gram[:-1]))
            bits += math.log2(num_unknown) * (gram[-1] == model.vocab.unk_label)
    return bits / sum(len(text.encode("utf-8")) for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    folder = parser.parse_args().data / "song_ci_zh"
    train = poems(folder, "train")
    counts = Counter("".join(train))
    num_unknown = HAN - sum(count > 1 for count in counts.values())
    found = {}
    for order in ORDERS:
        model = fitted(train, order)
        found[order] = {
            split: bits_per_byte(model, poems(folder, split), num_unknown) for split in ("validation", "test")
        }
        print(order, found[order], flush=True)
    best = min(found, key=lambda order: found[order]["validation"])
    lines = ["## Song ci by n-grams of characters", "", "| order | validation, bits per byte | test, bits per byte |"]
    lines += ["|---|---|---|"]
    lines += [f"| {n} | {number(row['validation'])} | {number(row['test'])} |" for n, row in found.items()]
    lines += ["", f"By validation: order {best}, {number(found[best]['test'])} bits per byte of the test poems.", ""]
    lines += ["Command: `python benchmarks/song_ci_ngrams.py --data DATA`"]
    lines += [f"- {line}" for line in machine_lines("one core.", ("nltk",))]
    write_section("song_ci_ngrams", lines)
    record = RESULTS.with_name("results") / "song_ci_ngrams.json"
    write_whole(record, json.dumps({"orders": found, "best": best}, indent=1) + "\n")


if __name__ == "__main__":
    main()
