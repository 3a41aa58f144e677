"""The headline model of Multi30k decoded: the length penalty by validation, and sacreBLEU on detokenised text.

    python benchmarks/compare.py benchmarks/multi30k_headline.yaml --data ../shared/data --output runs/results
    python benchmarks/multi30k_decoding.py runs/results/multi30k_headline/ours_seed_1 --data ../shared/data

Beam 5 on the validation set with each length penalty; the best by tokenised BLEU then decodes the test set, once. The
model writes text as Moses prepares it, so that sacreBLEU and chrF2 of raw text are those of its detokenised output
against the raw references, both without case. The table goes into docs/results.md.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import sacrebleu
from compare import number, write_section
from sacremoses import MosesDetokenizer

from finetune_deepseek.data.table import read_columns

PENALTIES = (0.6, 1.0, 1.4)
PREDICTIONS = "generated_predictions.jsonl"


def decode(verb: str, model: Path, data: str, penalty: float, threads: int) -> Path:
    """Run `deepseek-hf evaluate` or `predict`; the folder of its results, which stays for the next call."""
    folder = model.with_name(f"{model.name}_{verb}_{penalty:g}")
    if not (folder / "all_results.json").is_file():
        flags = {"data_dir": f"{data}/multi30k_en_de", "output_dir": folder, "cpu_threads": threads,
                 "generation_num_beams": 5, "generation_length_penalty": penalty, "tokenized_bleu": True,
                 "nearest_pair_baseline": False, "data_checks": "off", "overwrite_output_dir": True,
                 "per_device_eval_batch_size": 128}  # fmt: skip
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "finetune_deepseek", verb, "translation", str(model), *words]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return folder


def raw_scores(folder: Path, data: str) -> dict[str, str]:
    """Scores of the detokenised test output, with the interval of BLEU by bootstrap and the signatures."""
    detokenize = MosesDetokenizer(lang="de").detokenize
    found = [detokenize(text.split()) for text in read_columns(str(folder / PREDICTIONS))["prediction"]]
    pairs = read_columns(f"{data}/multi30k_en_de/test_2016_flickr.jsonl.gz")["translation"]
    raw = [pair["de"] for pair in pairs]
    bleu, chrf = sacrebleu.BLEU(lowercase=True), sacrebleu.CHRF(lowercase=True)
    score = bleu.corpus_score(found, [raw], n_bootstrap=1000)
    return {
        "bleu": f"{score.score:.2f} ± {score._ci:.2f}",  # sacrebleu shows it in texts only
        "chrf2": f"{chrf.corpus_score(found, [raw]).score:.2f}",
        "signatures": f"`{bleu.get_signature()}`, `{chrf.get_signature()}`",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the headline run")
    parser.add_argument("--data", required=True, help="folder of the data sets")
    parser.add_argument("--cpu_threads", type=int, default=1)
    arguments = parser.parse_args()
    given = (arguments.model, arguments.data)
    tried = {}
    for penalty in PENALTIES:
        folder = decode("evaluate", *given, penalty, arguments.cpu_threads)
        tried[penalty] = json.loads((folder / "all_results.json").read_text())["eval_bleu_tokenized"]
        print(f"length penalty {penalty:g}: validation {tried[penalty]:.2f}", flush=True)
    best = max(tried, key=tried.__getitem__)
    folder = decode("predict", *given, best, arguments.cpu_threads)
    results = json.loads((folder / "all_results.json").read_text())
    raw = raw_scores(folder, arguments.data)
    lines = [
        "### The headline run decoded",
        "Beam 5, the length penalty by tokenised BLEU on validation ("
        + ", ".join(f"{penalty:g}: {score:.2f}" for penalty, score in tried.items())
        + "). Raw scores are those of the detokenised output against the raw references, without case; ± is half of "
        "the 95 % bootstrap interval.",
        "",
        "| length penalty | tokenised BLEU | sacreBLEU, raw without case | chrF2, raw without case | test loss |",
        "|---|---|---|---|---|",
        f"| {best:g} | {number(results['test_bleu_tokenized'])} | {raw['bleu']} | {raw['chrf2']} | "
        f"{number(results['test_loss'])} |",
        "",
        "Command: `python benchmarks/multi30k_decoding.py runs/results/multi30k_headline/ours_seed_1 --data DATA`.",
        f"Signatures: {raw['signatures']}.",
    ]
    write_section("multi30k_headline_decoding", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
