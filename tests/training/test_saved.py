"""What a saved thing is: folders and adapters as they are found, moved, damaged, foreign or made for another task."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from configuration_deepseek import preset
from finetune_deepseek.__main__ import guarded
from finetune_deepseek.classification.arguments import ClassificationArguments
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.data.table import read_columns
from finetune_deepseek.question_answering.answering import Reader
from finetune_deepseek.question_answering.arguments import QuestionAnsweringArguments
from finetune_deepseek.recommendation.arguments import RecommendArguments, RecommendationArguments
from finetune_deepseek.recommendation.items.interactions import in_order, read_interactions, sequences
from finetune_deepseek.recommendation.requests import read_histories
from finetune_deepseek.recommendation.serving import history_settings, load
from finetune_deepseek.recommendation.task import Recommendation
from finetune_deepseek.retrieval.arguments import EmbeddingArguments
from finetune_deepseek.retrieval.passage_index import Retriever
from finetune_deepseek.retrieval.reranker import Reranker
from finetune_deepseek.training.arguments import ModelArguments
from finetune_deepseek.training.loading import pretrained_model, served_model
from finetune_deepseek.training.model_card import without_local
from finetune_deepseek.training.run import run_stages
from finetune_deepseek.training.saved import RECORD_FILE, Saved, check_place, fingerprint_of, write
from finetune_deepseek.training.stages.resume import find_checkpoint
from finetune_deepseek.translation.arguments import TranslateArguments, TranslationArguments
from finetune_deepseek.translation.task import Translation
from finetune_deepseek.translation.translator import prompts_of
from modeling_deepseek import (
    AutoModelForEmbedding,
    DeepSeekForCausalLM,
    DeepSeekForEmbedding,
    DeepSeekForQuestionAnswering,
    DeepSeekForSequenceClassification,
    DeepSeekModel,
)
from tests.small_runs import PAIRS, TINY, flags, write_jsonl

IDS = torch.arange(3, 25).reshape(2, 11)
HOSTILE = {
    "task": "translation",
    "source_lang": "en",
    "target_lang": ["de", "--trust_remote_code"],
    "trust_remote_code": True,
    "push_to_hub": True,
    "hub_model_id": "mallory/model",
    "output_dir": "elsewhere",
    "overwrite_output_dir": True,
    "synonyms_file": "/etc/passwd",
}


def model(head=DeepSeekForCausalLM, **fields):
    torch.manual_seed(0)
    return head(preset("tiny_v3", initializer_range=0.2, **fields)).eval()


def record(folder, **content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD_FILE).write_text(json.dumps({"format": 1} | content))
    return str(folder)


@pytest.fixture
def base(tmp_path):
    model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path, monkeypatch):
    """An embedding adapter on a language model in ./base, which its training has given a pooling and a prefix."""
    monkeypatch.chdir(tmp_path)
    changed = DeepSeekForEmbedding.from_pretrained("base", pooling="last_token", query_prefix="q: ")
    config = LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=["o_proj"], init_lora_weights=False)
    wrapped = get_peft_model(changed, config).eval()
    wrapped.save_pretrained("adapter")
    write(tmp_path / "adapter", "embedding", {}, Saved.open(None, "base"), changed.config.to_dict(),
          type(changed).__name__)  # fmt: skip
    expected = wrapped(input_ids=IDS).embeddings.detach()
    return tmp_path / "adapter", expected


# Settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["json", "card"])
def test_only_the_task_s_own_settings_come_out(tmp_path, form, capsys):
    settings = {name: value for name, value in HOSTILE.items() if name != "task"}
    if form == "json":
        record(tmp_path, task="translation", settings=settings)
    else:
        lines = "\n".join(f"  {name}: {json.dumps(value)}" for name, value in HOSTILE.items())
        (tmp_path / "README.md").write_text(f"---\ndeepseek_hf:\n{lines}\n---\n")
    saved = Saved.open(None, str(tmp_path))
    found = saved.settings_for("translation", TranslationArguments)
    assert found == {"source_lang": "en", "target_lang": ["de", "--trust_remote_code"]}
    assert "hub_model_id, output_dir, overwrite_output_dir, push_to_hub, synonyms_file, trust_remote_code in its" in (
        capsys.readouterr().err
    )


def test_a_card_switches_no_flag_on(finetune, data, tmp_path, monkeypatch, capsys):
    """evaluate goes where it goes, runs no foreign code, and takes a list's words for values."""
    finetune(output_dir=tmp_path / "model", max_steps=1, do_train=True, **data)
    (tmp_path / "model" / RECORD_FILE).unlink()
    hostile = HOSTILE | {"target_lang": ["de"], "max_target_length": 24}
    lines = "\n".join(f"  {name}: {json.dumps(value)}" for name, value in hostile.items())
    (tmp_path / "model/README.md").write_text(f"---\ndeepseek_hf:\n{lines}\n---\n")
    seen = []
    monkeypatch.setattr("finetune_deepseek.training.run.run_stages", lambda task, stages: seen.extend(stages))
    argv = ["translation", str(tmp_path / "model"), *flags({"validation_file": data["validation_file"]})]
    assert guarded(argv, "evaluate") == 0, capsys.readouterr().err
    (stage,) = seen
    assert (stage.model.trust_remote_code, stage.training.push_to_hub) == (False, False)
    assert stage.training.output_dir == "runs/evaluate-model" and stage.training.hub_model_id is None
    assert (stage.data.target_lang, stage.data.max_target_length, stage.data.synonyms_file) == (["de"], 24, None)
    smuggled = {"target_lang": ["de", "--trust_remote_code=true", "--output_dir=x"], "source_lang": "en"}
    record(tmp_path / "model", task="translation", settings=smuggled)
    seen.clear()
    assert guarded(argv, "evaluate") == 0, capsys.readouterr().err
    (stage,) = seen
    assert stage.data.target_lang == ["de", "--trust_remote_code=true", "--output_dir=x"]
    assert not stage.model.trust_remote_code and stage.training.output_dir == "runs/evaluate-model"
    seen.clear()
    assert guarded([*argv, "--target_lang=fr", "--output_dir=mine"], "evaluate") == 0  # flags win
    assert (seen[0].data.target_lang, seen[0].training.output_dir) == (["fr"], "mine")


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"max_target_length": "12"}, TranslationArguments, "its setting max_target_length is '12', which is no int"),
        ({"both_directions": 1}, TranslationArguments, "both_directions is 1, which is no bool"),
        ({"source_lang": ["en"]}, TranslationArguments, "source_lang is .'en'., which is no str"),
        ({"preprocess": "shell"}, TranslationArguments, "preprocess is 'shell', which is no "),
        ({"answer_mode": "oracle"}, QuestionAnsweringArguments, "answer_mode is 'oracle'"),
        ({"fusion_weights": [1, "x", 1]}, EmbeddingArguments, "fusion_weights is "),
    ],
)
def test_a_setting_of_another_type_is_refused(tmp_path, settings, arguments, message):
    record(tmp_path, task="t", settings=settings)
    with pytest.raises(ValueError, match=message):
        Saved.open(None, str(tmp_path)).settings_for("t", arguments)


def test_whole_numbers_do_for_floats_and_none_for_options(tmp_path):
    record(tmp_path, settings={"null_score_diff_threshold": 2})
    found = Saved.open(None, str(tmp_path)).settings_for("t", QuestionAnsweringArguments)
    assert found == {"null_score_diff_threshold": 2.0} and type(found["null_score_diff_threshold"]) is float
    record(tmp_path, settings={"stop_text": None})
    assert Saved.open(None, str(tmp_path)).settings_for("t", TranslationArguments) == {"stop_text": None}
    record(tmp_path, settings={"keep_repeats": True, "tie_rule": "item", "context_columns": None})
    found = Saved.open(None, str(tmp_path)).settings_for("t", RecommendationArguments)
    assert found == {"keep_repeats": True, "tie_rule": "item", "context_columns": None}
    record(tmp_path, task="t")
    assert Saved.open(None, str(tmp_path)).settings_for("t", ClassificationArguments) == {}


@pytest.mark.parametrize("template", ["{source:>2000000000}", "{source!r}", "{source.__class__}", "{source[0]}",
                                      "{target_lang:{source}}{source}"])  # fmt: skip
def test_a_prompt_template_has_names_alone(template):
    with pytest.raises(ValueError, match="--prompt_template"):
        TranslationArguments(prompt_template=template)


# Other tasks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_record", [True, False])
def test_a_folder_of_one_task_is_not_taken_by_another(tmp_path, with_record, capsys):
    model(DeepSeekForSequenceClassification, num_labels=2).save_pretrained(tmp_path / "c")
    folder, said = str(tmp_path / "c"), "DeepSeekForSequenceClassification|made for classification"
    if with_record:
        record(tmp_path / "c", task="classification", settings={})
        said = "made for classification"
    for verb, task in [("evaluate", "question_answering"), ("predict", "translation"), ("evaluate", "embedding")]:
        rows = str(write_jsonl(tmp_path / "rows.jsonl", PAIRS))
        argv = [task, folder, "--validation_file", rows, "--test_file", rows, "--use_cpu", "True"]
        assert guarded(argv, verb) == 2
        assert with_record is ("made for classification" in (err := capsys.readouterr().err)), err
    how = TranslateArguments(source_lang="en", target_lang="de")
    for opened in (lambda: prompts_of(folder, how), lambda: Retriever.load(folder), lambda: load(folder)):
        with pytest.raises(ValueError, match=said):
            opened()
    with pytest.raises(ValueError, match="answers no questions; name a question answering model"):
        Reader.load(folder)


def test_heads_are_told_apart_without_a_record(tmp_path):
    for head in (DeepSeekForCausalLM, DeepSeekForEmbedding, DeepSeekForQuestionAnswering, DeepSeekModel):
        model(head).save_pretrained(tmp_path / head.__name__)
    language_model = Saved.open(None, str(tmp_path / "DeepSeekForCausalLM"))
    assert language_model.head == "CausalLM"
    language_model.check_task("translation", "CausalLM")
    language_model.check_task("classification", "SequenceClassification", is_trained=True)
    with pytest.raises(ValueError, match="is a DeepSeekForCausalLM, where classification needs a model for Sequence"):
        language_model.check_task("classification", "SequenceClassification")
    trunk = Saved.open(None, str(tmp_path / "DeepSeekModel"))
    trunk.check_task("translation", "CausalLM", is_trained=True)
    with pytest.raises(ValueError, match="is a DeepSeekModel, where translation needs"):
        trunk.check_task("translation", "CausalLM")
    reader = Saved.open(None, str(tmp_path / "DeepSeekForQuestionAnswering"))
    with pytest.raises(ValueError, match="is a DeepSeekForQuestionAnswering"):
        reader.check_task("classification", "SequenceClassification", is_trained=True)
    with pytest.raises(ValueError, match="DeepSeekForCausalLM, where recommendation needs a model for Recommendation"):
        load(language_model.name)
    with pytest.raises(ValueError, match="where classification needs"):
        Reranker.load(language_model.name)


# Adapters -----------------------------------------------------------------------------------------------------------


def test_an_adapter_brings_its_changes(adapter):
    folder, expected = adapter
    saved = Saved.open(None, str(folder))
    assert saved.changes == {"pooling": "last_token", "query_prefix": "q: "}
    assert (saved.head, saved.task, saved.is_ours) == ("Embedding", "embedding", True)
    assert saved.base.name == "base" or saved.base.folder.resolve() == folder.parent / "base"
    served = served_model(saved, AutoModelForEmbedding)
    assert torch.allclose(served(input_ids=IDS).embeddings, expected, atol=1e-5)
    trained = pretrained_model(ModelArguments(str(folder)), AutoModelForEmbedding, is_trained=True).eval()
    assert torch.allclose(trained(input_ids=IDS).embeddings, expected, atol=1e-5)
    assert sum(p.numel() for p in trained.parameters() if p.requires_grad)


def test_an_adapter_and_its_base_move_together(adapter, tmp_path, monkeypatch):
    folder, expected = adapter
    (tmp_path / "there").mkdir()
    for name in ("base", "adapter"):
        shutil.move(tmp_path / name, tmp_path / "there" / name)
    monkeypatch.chdir("/")
    served = served_model(Saved.open(None, str(tmp_path / "there/adapter")), AutoModelForEmbedding)
    assert torch.allclose(served(input_ids=IDS).embeddings, expected, atol=1e-5)


def test_a_moved_adapter_names_its_base(adapter, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    shutil.move(tmp_path / "adapter", tmp_path / "there/adapter")
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(ValueError, match="there/adapter: its base model base is not there: put it where it was"):
        Retriever.load(str(tmp_path / "there/adapter"))
    model(rms_norm_eps=1e-5).save_pretrained("base")  # another one of that name
    with pytest.raises(ValueError, match="base is another model than the one that the adapter was trained on"):
        Retriever.load(str(tmp_path / "there/adapter"))
    monkeypatch.chdir(tmp_path)
    assert Saved.open(None, str(tmp_path / "there/adapter")).base.folder.resolve() == tmp_path / "base"


def test_the_base_of_an_adapter_is_no_adapter(adapter, tmp_path):
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    shutil.copytree(tmp_path / "adapter", tmp_path / "second")
    (tmp_path / "second" / RECORD_FILE).unlink()
    (tmp_path / "second/adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": str(tmp_path / "adapter")})
    )
    with pytest.raises(ValueError, match="adapter is an adapter itself; merge it into its base first"):
        Saved.open(None, str(tmp_path / "second")).config  # noqa: B018


def test_changes_are_fields_of_the_config_alone(adapter):
    """They can't become arguments of from_pretrained, nor name code or kernels."""
    folder, _ = adapter
    content = json.loads((folder / RECORD_FILE).read_text())
    content["changes"] |= {
        "auto_map": {"AutoModel": "x.Y"},
        "_attn_implementation": "mallory/kernel",
        "dtype": "float64",
    }
    (folder / RECORD_FILE).write_text(json.dumps(content))
    assert Saved.open(None, str(folder)).changes == {"pooling": "last_token", "query_prefix": "q: "}
    content["changes"] |= {"trust_remote_code": True}
    (folder / RECORD_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="trust_remote_code is no field of the config"):
        Retriever.load(str(folder))


def test_prints_tell_models_apart(base, tmp_path):
    before = fingerprint_of(base)
    shutil.copytree(base, tmp_path / "copy")
    (tmp_path / "copy/README.md").write_text("words")
    assert fingerprint_of(tmp_path / "copy") == before
    with (tmp_path / "copy/model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert fingerprint_of(tmp_path / "copy") != before


def test_a_model_and_an_adapter_have_folders_of_their_own(adapter, base, tmp_path, finetune, data):
    folder, _ = adapter
    shutil.copy(base / "model.safetensors", folder)
    with pytest.raises(ValueError, match="it holds an adapter .adapter_config.json. and a model .model.safetensors."):
        Retriever.load(str(folder))
    (folder / "model.safetensors").unlink()
    check_place(folder, is_adapter=True)
    with pytest.raises(ValueError, match="holds an adapter .adapter_config.json.; name another folder for a model"):
        finetune(output_dir=folder, max_steps=1, **data)
    with pytest.raises(ValueError, match="holds a model .model.safetensors.; name another folder for an adapter"):
        check_place(base, is_adapter=True)


def test_an_adapters_base_may_be_named_anew(tmp_path, monkeypatch):
    """A folder in training, on the Hub by now."""
    record(tmp_path / "ad", base={"name": "runs/base", "commit": None, "beside": "../gone", "print": "5e88"})
    config = tmp_path / "ad" / "adapter_config.json"
    for name, where in (("runs/base", "is not there: put it where it was, or correct"), ("me/base", "asked the Hub")):
        config.write_text(json.dumps({"base_model_name_or_path": name}))
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=where):
            patch.setattr("finetune_deepseek.training.saved.download", refuse)
            Saved.open(None, str(tmp_path / "ad")).base  # noqa: B018


def refuse(where, name, *args):
    raise ValueError(f"asked the Hub for {name}")


# Damaged, absent ----------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_one_line(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cases = {
        str(tmp_path / "none"): "none: no such folder",
        str(base / "config.json"): "this is a file",
        record(tmp_path / "later", task="t") and str(tmp_path / "later"): "format 2 isn't read here; update",
        record(tmp_path / "odd", settings=[1]) and str(tmp_path / "odd"): "settings is no mapping",
    }
    (tmp_path / "later" / RECORD_FILE).write_text(json.dumps({"format": 2}))
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            Saved.open("retriever", name)
        assert "\n" not in str(caught.value)
    (base / "config.json").write_text("{")
    with pytest.raises(ValueError, match="--retriever .*base/config.json is damaged"):
        Saved.open("retriever", str(base))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no model there, for it has no config.json and no adapter_config"):
        Saved.open(None, str(tmp_path / "empty")).require_model()


def test_cards_of_others_may_be_broken(base):
    (base / "README.md").write_text("---\ntags: [a\n---\n")
    assert Saved.open(None, str(base)).task is None
    (base / "README.md").write_bytes(b"---\ntitle: \xff\n---\n")
    assert Saved.open(None, str(base)).settings == {}


def test_the_run_writes_the_record(finetune, data, tmp_path):
    finetune(output_dir=tmp_path / "out", max_steps=2, save_steps=1, do_train=True, **data)
    for folder in ("out", "out/checkpoint-2"):
        saved = Saved.open(None, str(tmp_path / folder))
        assert saved.task == "translation" and saved.settings["max_target_length"] == TINY["max_target_length"]
    assert "deepseek_hf" not in (tmp_path / "out/README.md").read_text().split("---")[1].replace("deepseek-hf", "")


# Around a run -------------------------------------------------------------------------------------------------------


def test_a_generation_config_that_cannot_be_saved_is_mended_first(finetune, data, tmp_path, capsys):
    finetune(output_dir=tmp_path / "base", max_steps=1, do_train=True, **data)
    path = tmp_path / "base/generation_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"do_sample": False, "temperature": 0.6, "output_scores": True}))
    settings = {"preset": None, "vocab_size": None, "model_name_or_path": tmp_path / "base", "max_steps": 1, **data}
    finetune(output_dir=tmp_path / "out", **settings)
    assert "generation config: dropped temperature 0.6, output_scores True, without effect" in capsys.readouterr().out
    assert "temperature" not in json.loads((tmp_path / "out/generation_config.json").read_text())
    path.write_text(json.dumps(content | {"use_cache": False, "cache_implementation": "static"}))
    with pytest.raises(
        ValueError, match="generation_config.json can't be saved again; mend it: .*cache_implementation"
    ):
        finetune(output_dir=tmp_path / "refused", **settings)
    assert not list((tmp_path / "refused").rglob("*"))


def test_local_data_sets_are_not_the_card_s(tmp_path):
    (tmp_path / "pairs").mkdir()
    local = str(tmp_path / "pairs")
    assert without_local([local], local) == {"datasets": [], "dataset_name": "pairs"}
    assert without_local(["wmt16"], "wmt16") == {"datasets": ["wmt16"], "dataset_name": "wmt16"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    rows = str(write_jsonl(folder / "rows.jsonl", PAIRS))
    settings = TINY | {"train_file": rows, "max_steps": 3, "save_steps": 1, "save_strategy": "steps"}
    settings |= {"save_total_limit": 3, "output_dir": folder / "out"}
    run_stages(Translation, parse_command("translation", TranslationArguments, flags(settings)))
    return folder / "out"


@pytest.fixture
def interrupted(checkpoints, tmp_path):
    shutil.copytree(checkpoints, tmp_path / "out")
    return tmp_path / "out"


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def blank(path, start, end):
    """Zeros in place of bytes, as a disk gives that lost a page."""
    content = path.read_bytes()
    path.write_bytes(content[:start] + bytes(end - start) + content[end:])


def lose_a_page_amid(path):
    """The file with another large tensor, of whose middle a page is lost."""
    torch.save(torch.load(path) | {"large": torch.ones(600_000)}, path)
    content = path.read_bytes()
    middle = content.index(torch.ones(1000).numpy().tobytes()) + 1_500_000
    blank(path, middle, middle + 4096)
    assert path.read_bytes() != content


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "trainer_state.json").unlink(), "no trainer_state.json"),
        (lambda folder: cut(folder / "trainer_state.json"), "trainer_state.json is damaged"),
        (lambda folder: cut(folder / "optimizer.pt"), "optimizer.pt is damaged"),
        (lambda folder: cut(folder / "rng_state.pth"), "rng_state.pth is damaged"),
        (lambda folder: cut(folder / "model.safetensors"), "model.safetensors is damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (lambda folder: (folder / "optimizer.pt").unlink(), "has no optimizer.pt or optimizer.bin, as --save_only"),
        (lambda folder: (folder / "scheduler.pt").unlink(), "has no scheduler.pt, as --save_only"),
        (lambda folder: blank(folder / "optimizer.pt", 0, 60), "optimizer.pt is damaged"),
        (lambda folder: blank(folder / "optimizer.pt", 100, 400), "optimizer.pt is damaged"),
        (lambda folder: lose_a_page_amid(folder / "optimizer.pt"), "optimizer.pt is damaged"),
    ],
)
def test_the_last_whole_checkpoint_is_taken(interrupted, damage, said, capsys):
    assert find_checkpoint("true", interrupted) == str(interrupted / "checkpoint-3")
    damage(interrupted / "checkpoint-3")
    capsys.readouterr()
    assert find_checkpoint("true", interrupted) == str(interrupted / "checkpoint-2")
    out = capsys.readouterr().out
    assert f"passed over {interrupted / 'checkpoint-3'}: " in out and said in out
    with pytest.raises(ValueError, match=f"--resume_from_checkpoint .*checkpoint-3: .*{said}"):
        find_checkpoint(str(interrupted / "checkpoint-3"), interrupted)
    for number in (1, 2):
        damage(interrupted / f"checkpoint-{number}")
    with pytest.raises(ValueError, match=f"no whole checkpoint in .*; checkpoint-3: .*{said}"):
        find_checkpoint("true", interrupted)


def test_the_folder_of_a_run_is_no_checkpoint(interrupted):
    """It has weights and a state of Trainer, but no optimizer's."""
    with pytest.raises(
        ValueError, match="--resume_from_checkpoint .*out: .* has no optimizer.pt or optimizer.bin, no sch"
    ):
        find_checkpoint(str(interrupted), interrupted)


def test_without_a_checkpoint_the_beginning_is_said(tmp_path, capsys):
    assert find_checkpoint("true", tmp_path) is None
    assert f"no checkpoint in {tmp_path} to go on from" in capsys.readouterr().out
    assert find_checkpoint(None, tmp_path) is find_checkpoint("false", tmp_path) is None


def test_recommend_makes_histories_as_training_did(tmp_path):
    path = tmp_path / "clicks.csv"
    path.write_text("user_id,item_id,timestamp\nu,b,1\nu,a,1\nu,c,2\nu,b,3\n")
    arguments = RecommendArguments(history=str(path))
    assert read_histories(arguments)[0] == {"u": ["b", "a", "c"]}
    record(tmp_path, task="recommendation", settings={"keep_repeats": True, "tie_rule": "item"})
    settings = history_settings(Saved.open(None, str(tmp_path)))
    assert read_histories(arguments, (), settings)[0] == {"u": ["a", "b", "c", "b"]}


def test_recommend_orders_equal_times_as_the_runs_seed_did(tmp_path):
    """By a hash of item and seed: seed 0 stood for every run's."""
    path = tmp_path / "clicks.csv"
    items = [f"i{number}" for number in range(12)]
    path.write_text("user_id,item_id,timestamp\n" + "".join(f"u,{item},1\n" for item in items))
    flags = RecommendationArguments(interactions_file=str(path), tie_rule="random")
    settings = Recommendation(flags, seed=7).settings()
    record(tmp_path, task="recommendation", settings=settings)
    found = history_settings(Saved.open(None, str(tmp_path)))
    ordered, _ = in_order(
        read_interactions(read_columns(str(path)), ("user_id", "item_id", "timestamp"), str(path)), "random", 7
    )
    (history,) = read_histories(RecommendArguments(history=str(path)), (), found)[0].values()
    assert history == sequences(ordered)["u"] != items
    again = Recommendation(RecommendationArguments(interactions_file=str(path), **found), seed=3)
    assert again.settings() == settings  # as evaluate takes them, under its own seed
    assert Recommendation(RecommendationArguments(interactions_file=str(path)), seed=7).settings()["tie_seed"] is None
