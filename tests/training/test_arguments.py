"""The command line and the YAML file: who wins, what is refused, and in which words."""

import pytest

from finetune_deepseek import TASKS
from finetune_deepseek.__main__ import guarded
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.training.loading import parse_overrides
from finetune_deepseek.training.stages.folders import check_output_dir
from finetune_deepseek.translation.task import Translation


def parse(*argv: str, recipe=None):
    return parse_command("translation", Translation.arguments_class, list(argv), recipe)


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_command_line_wins_over_yaml_and_yaml_over_defaults(yaml_file, tmp_path):
    path = yaml_file(f"output_dir: {tmp_path}\npreset: tiny_v3\nlearning_rate: 3e-4\nseed: 5\nuse_peft: true\n")
    (stage,) = parse(path, "--seed", "7", "--use_peft", "false")
    assert stage.training.learning_rate == 3e-4
    assert stage.training.seed == 7
    assert stage.lora.use_peft is False
    assert stage.training.save_total_limit == 2
    assert {"learning_rate", "seed", "preset"} <= stage.given
    assert "save_total_limit" not in stage.given


def test_yaml_lists_mappings_and_nulls(yaml_file, tmp_path):
    text = "output_dir: {}\nuse_peft: true\nlora_target: [attention, head]\nmax_train_samples: null\n"
    path = yaml_file(text.format(tmp_path) + "preset: tiny_v3\nconfig_overrides: {hidden_size: 48}\nmax_steps: -1\n")
    (stage,) = parse(path)
    assert stage.lora.lora_target == ["attention", "head"]
    assert stage.data.max_train_samples is None
    assert parse_overrides(stage.model.config_overrides) == {"hidden_size": 48}


def test_overrides_take_yaml_types():
    assert parse_overrides("hidden_size=64,hidden_act=silu,tie_word_embeddings=true,rope_theta=1.5") == {
        "hidden_size": 64,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "rope_theta": 1.5,
    }
    with pytest.raises(ValueError, match="'hidden_size' has no value"):
        parse_overrides("hidden_size")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", r"config.yaml: unknown key 'learning_rat' \(did you mean 'learning_rate'\?\)"),
        ("stages:\n- zzzzz: 1", "unknown key 'zzzzz'."),
        ("a: [1,\nb: 2", "config.yaml, line 2: not valid YAML"),
        ("seed: 1\nmax_steps: 3\nseed: 2\n", "config.yaml, line 3: not valid YAML: seed is there twice"),
        ("- a\n- b", "found list"),
        ("", "found NoneType"),
        ("stages: 3", "`stages` must be a list"),
        ("stages: [{}, {}]", "needs a `name` of its own"),
    ],
)
def test_bad_yaml_is_one_line(yaml_file, text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(yaml_file(text), "--output_dir=x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora_tarket", "all"], r"unknown flag --lora_tarket \(did you mean '--lora_target'\?\)"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--dtype", "float31"], "invalid choice: 'float31'"),
        (["--seed", "1", "stray"], "unexpected argument 'stray'"),
        (["missing.yaml"], "missing.yaml: can't be read"),
        (["--preset=tiny_v3", "--config_name=x"], "--preset and --config_name both name a model"),
        (["--model_name_or_path=x", "--config_overrides=a=1"], "a pretrained model has its shape"),
        (["--use_peft", "--lora_r=0"], "--lora_r 0"),
        (["--use_peft", "--lora_dropout=1"], "--lora_dropout 1:"),
        (["--lora_target=all"], "--lora_target has no effect without --use_peft"),
        (["--early_stopping_patience=2"], "add --eval_strategy"),
        (["--source_lang=zh"], "are both 'zh'"),
        (["--prompt_template=x"], r"it needs \{source\}"),
        (["--prompt_template={source} {lang}"], "no other name in braces"),
        (["--prompt_template={source"], "expected '}'"),
        (["--max_train_samples=0"], "--max_train_samples 0"),
        (["--dataset_name=x", "--train_file=y"], "three ways to name data"),
    ],
)
def test_bad_flags_are_one_line(argv, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(*argv, "--output_dir=x")
    assert "\n" not in str(error.value)


def test_output_dir_is_needed():
    with pytest.raises(ValueError, match="--output_dir is missing"):
        parse("--preset=tiny_v3")


def test_stages_share_keys_and_know_the_output_dir(yaml_file):
    path = yaml_file(
        "source_lang: en\nseed: 3\nstages:\n- preset: tiny_v3\n"
        '- {name: adapter, model_name_or_path: "{output_dir}", use_peft: true, target_lang: de, seed: 4}\n'
    )
    first, second = parse(path, "--output_dir=out", "--hub_model_id=me/model")
    assert (first.name, first.training.output_dir, first.training.seed) == (None, "out", 3)
    assert (second.name, second.training.output_dir, second.training.seed) == ("adapter", "out/adapter", 4)
    assert second.model.model_name_or_path == "out"
    assert (first.training.hub_model_id, second.training.hub_model_id) == ("me/model", "me/model-adapter")


def test_recipe_is_taken_only_without_model_and_data():
    assert len(parse("--output_dir=x", "--seed=1", recipe=Translation.arguments_class.RECIPE)) == 2
    assert len(parse("--output_dir=x", "--preset=tiny_v3", recipe=Translation.arguments_class.RECIPE)) == 1
    assert len(parse("--output_dir=x", "--train_file=x.json", recipe=Translation.arguments_class.RECIPE)) == 1


def test_learning_rate_default_follows_the_kind_of_run():
    def rate(*argv):
        return parse("--output_dir=x", *argv)[0].training.learning_rate

    assert rate("--preset=tiny_v3") == 1e-3
    assert rate("--model_name_or_path=x") == 2e-5
    assert rate("--model_name_or_path=x", "--use_peft") == 2e-4
    assert rate("--preset=tiny_v3", "--learning_rate=0.5") == 0.5


def test_help_is_short_and_help_all_is_whole(capsys):
    lengths = []
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as end:
            parse(flag)
        assert end.value.code == 0
        text = capsys.readouterr().out
        lengths.append(text.count("\n"))
        assert "--lora_target" in text and "--prompt_template" in text
        assert ("--torch_compile" in text) == (flag == "--help_all")
    assert lengths[0] < 280 < lengths[1]


def test_output_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    (stage,) = parse(f"--output_dir={tmp_path}/file", "--preset=tiny_v3")
    with pytest.raises(ValueError, match="can't make this folder"):
        check_output_dir(stage.training)


def test_checkpoints_of_an_earlier_run_are_not_mixed_in(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    for flag, is_refused in (("--do_train", True), ("--overwrite_output_dir", False), ("--do_predict", False)):
        argv = ["--do_train", flag] if flag == "--overwrite_output_dir" else [flag]
        (stage,) = parse(f"--output_dir={tmp_path}", "--preset=tiny_v3", *argv)
        if is_refused:
            with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
                check_output_dir(stage.training)
        else:
            check_output_dir(stage.training)
    assert (tmp_path / "checkpoint-3").is_dir()


def test_the_command_ends_with_one_line_and_code_2(capsys, monkeypatch):
    assert guarded(["translatoin"]) == 2
    assert capsys.readouterr().err == (
        f"deepseek-hf: error: unknown task 'translatoin' (did you mean 'translation'?); there is {', '.join(TASKS)}.\n"
    )
    assert guarded([]) == 0
    assert "deepseek-hf finetune translation" in capsys.readouterr().out
    monkeypatch.setenv("DEEPSEEK_HF_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown task"):
        guarded(["translatoin"])


def test_the_opposite_of_a_flag_has_a_text_of_its_own(capsys):
    with pytest.raises(SystemExit):
        guarded(["--help"], "recommend")
    text = " ".join(capsys.readouterr().out.split())
    assert (
        text.count("Leave out the items of the history.") == 1
        and "--no_exclude_seen Switch --exclude_seen off." in text
    )
    with pytest.raises(SystemExit):
        guarded(["recommendation", "--help_all"])
    assert "--no_baselines Switch --baselines off." in " ".join(capsys.readouterr().out.split())
