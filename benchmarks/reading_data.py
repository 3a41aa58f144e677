"""Train, validation and test files for the tables of question answering and retrieval.

    python benchmarks/reading_data.py --data ../shared/data --output runs/results/reading

A tenth of the training passages, drawn by hash of their text, is validation with all its questions. Training questions
about a passage of the test file are left out (PolicyQA's dev shares two passages with its test).

- cmrc: CMRC 2018's trial questions and DRCD's dev (Traditional; the tables convert it) to CMRC's dev
- policyqa: PolicyQA's dev to its test
- retriever: questions and passages of all of these, in Simplified Chinese and English, without a test file
"""

import argparse
import gzip
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune_deepseek.squad import simplifier

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
    pairs = [(row["question"], row["context"]) for row in trial + cmrc + policies + policies_test]
    pairs += [(simplify(row["question"]), simplify(row["context"])) for row in drcd]
    write_split(output / "retriever", [{"query": q, "passage": p} for q, p in pairs], [], "passage")


if __name__ == "__main__":
    main()
