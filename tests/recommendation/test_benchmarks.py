"""The benchmark of the recommenders: its flags are known, and its tests over seeds say what the ranks say."""

import importlib.util
from pathlib import Path

import pandas as pd
import pytest

from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.recommendation.arguments import RecommendationArguments

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def benchmark(monkeypatch, name):
    """A script of benchmarks/, as it is run."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["lastfm", "ml_100k", "ml_100k_random"])
def test_the_flags_of_the_table_are_known(tmp_path, monkeypatch, name):
    compare = benchmark(monkeypatch, "compare")
    table = compare.read_table(BENCHMARKS / f"{name}.yaml")
    for settings in compare.systems_of(table).values():
        settings = settings | {"output_dir": tmp_path, "use_cpu": True}
        argv = compare.flags(settings, {"data": "data"})
        (stage,) = parse_command("recommendation", RecommendationArguments, argv)
        assert stage.training.load_best_model_at_end and stage.training.metric_for_best_model == "hr@10"
    assert len(table["seeds"]) == 5


def test_means_over_seeds_are_compared(tmp_path, monkeypatch, capsys):
    module = benchmark(monkeypatch, "recommendation_tests")
    monkeypatch.setattr(module, "write_section", lambda name, lines: written.update({name: lines}))
    written = {}
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
    assert f"| {' | '.join(rows[1])} |" in written[f"{tmp_path.name}_tests"]
    assert [row[0] for row in rows] == ["ours, 2 seeds", "SASRec, 2 seeds", "popularity"]
    assert [row[1].split()[0] for row in rows] == ["0.6250", "0.3750", "0.0000"]
    assert rows[1][2].split()[0] == "+0.2500" and rows[2][2].split()[0] == "+0.6250"
    monkeypatch.setattr("sys.argv", ["x", str(tmp_path), "ours", "nobody"])
    with pytest.raises(SystemExit, match="no nobody_seed_N/user_ranks.csv"):
        module.main()
