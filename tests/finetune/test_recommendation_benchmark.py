"""The benchmark of the recommenders: its flags are known, and its tests over seeds say what the ranks say."""

import importlib.util
from pathlib import Path

import pandas as pd
import pytest
import yaml

from finetune_deepseek.arguments import parse_command
from finetune_deepseek.recommendation import RecommendationArguments

from .conftest import flags

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_flags_of_the_table_are_known(tmp_path):
    table = yaml.safe_load((BENCHMARKS / "lastfm.yaml").read_text())
    for settings in table["systems"].values():
        settings = table["common"] | settings | {"output_dir": tmp_path, "use_cpu": True}
        settings["config_overrides"] = ",".join(f"{k}={v}" for k, v in settings["config_overrides"].items())
        (stage,) = parse_command("recommendation", RecommendationArguments, flags(settings))
        assert stage.training.load_best_model_at_end and stage.training.metric_for_best_model == "hr@10"
    assert len(table["seeds"]) == 5


def test_means_over_seeds_are_compared(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("tests_over_seeds", BENCHMARKS / "recommendation_tests.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ranks = {"ours": ([1, 1, 40, 1], [1, 30, 40, 1]), "SASRec": ([50, 1, 40, 60], [50, 1, 40, 1])}
    for system, seeds in ranks.items():
        for seed, column in enumerate(seeds):
            folder = tmp_path / f"{system}_seed_{seed}"
            folder.mkdir()
            frame = pd.DataFrame({"user": ["a", "b", "c", "d"], "rank": column, "popularity": [99] * 4})
            frame.sample(frac=1, random_state=seed).to_csv(folder / "user_ranks.csv", index=False)
    monkeypatch.setattr("sys.argv", ["x", str(tmp_path), "ours", "SASRec"])
    module.main()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["ours, 2 seeds", "SASRec, 2 seeds", "popularity"]
    assert [row[1].split()[0] for row in rows] == ["0.6250", "0.3750", "0.0000"]
    assert rows[1][2].split()[0] == "+0.2500" and rows[2][2].split()[0] == "+0.6250"
    monkeypatch.setattr("sys.argv", ["x", str(tmp_path), "ours", "nobody"])
    with pytest.raises(SystemExit, match="no nobody_seed_N/user_ranks.csv"):
        module.main()
