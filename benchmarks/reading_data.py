"""Train, validation and test files for the tables of question answering and retrieval.

    python benchmarks/reading_data.py --data ../shared/data --output runs/results/reading

A tenth of the training passages, drawn by hash of their text, is validation with all its questions (not for the
retriever). Training questions about a passage of the test file are left out (PolicyQA's dev shares two passages with
its test).

- cmrc: CMRC 2018's trial questions and DRCD's dev (Traditional; the tables convert it) to CMRC's dev
- policyqa: PolicyQA's dev to its test
- retriever: questions and passages of PolicyQA's dev and test and of DRCD's dev, in Simplified Chinese; validation is
  CMRC 2018's trial and dev, a source that training doesn't have, for a retriever is used on others too
"""

import argparse
import gzip
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune_deepseek.question_answering.squad import simplifier

VALIDATION_SHARE = 10  # one passage in so many
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def is_held_out(passage: str) -> bool:
    return int(hashlib.sha256(passage.encode()).hexdigest(), 16) % VALIDATION_SHARE == 0


def write_split(folder: Path, rows: list[Row], test: list[Row], passage: str) -> None:
    tested = {row[passage] for row in test}
    rows = [row for row in rows if row[passage] not in tested]
    write(folder / "train.jsonl", (row for row in rows if not is_held_out(row[passage])))
    write(folder / "validation.jsonl", (row for row in rows if is_held_out(row[passage])))
    if test:
        write(folder / "test.jsonl", test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--output", type=Path, required=True, help="folder for the files")
    arguments = parser.parse_args()
    data, output = arguments.data, arguments.output
    trial, cmrc = (read(data / "cmrc2018" / f"{name}.jsonl.gz") for name in ("trial", "validation"))
    drcd = read(data / "drcd" / "validation.jsonl.gz")
    policies, policies_test = (read(data / "policyqa" / f"{name}.jsonl.gz") for name in ("validation", "test"))
    write_split(output / "cmrc", trial + drcd, cmrc, "context")
    write_split(output / "policyqa", policies, policies_test, "context")
    simplify = simplifier()
    retriever = {"train": policies + policies_test + drcd, "validation": trial + cmrc}
    for split, rows in retriever.items():
        pairs = ({"query": simplify(row["question"]), "passage": simplify(row["context"])} for row in rows)
        write(output / "retriever" / f"{split}.jsonl", pairs)


if __name__ == "__main__":
    main()
