"""A save that is killed before any of its renames: the folder opens as before it or as after it, never as a mix."""

import json
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from configuration_deepseek import preset
from finetune_deepseek.checkpoints.export import export_native
from finetune_deepseek.data.files import replaced_folder
from finetune_deepseek.recommend import Recommender, load
from finetune_deepseek.recommendation.items.catalogue import catalogue_tokenizer
from finetune_deepseek.retrieval import PassageIndex
from finetune_deepseek.training.arguments import ModelArguments
from finetune_deepseek.training.loading import pretrained_model
from modeling_deepseek import DeepSeekForCausalLM, DeepSeekForRecommendation, whole_folders
from tokenization_deepseek import train_tokenizer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a process is forked for each kill")
TEXTS = ["one two three", "eins zwei drei", "un deux trois"]
IDS = torch.tensor([[5, 6, 7, 8]])


def killed_at(step, save):
    """Do `save` in a process that dies, without any cleaning up, before its rename number `step`; whether it died."""
    child = os.fork()
    if child == 0:
        count, replace = 0, os.replace

        def counted(*args, **kwargs):
            nonlocal count
            count += 1
            if count == step:
                os._exit(9)
            return replace(*args, **kwargs)

        os.replace = counted
        try:
            save()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def each_kill(folder, tmp_path, save):
    """The folder as it lies after a kill before each rename, one after the other, and at last after a whole save."""
    for step in range(1, 200):
        place = tmp_path / f"killed-{step}" / folder.name
        if folder.exists():
            shutil.copytree(folder, place)
        else:
            place.parent.mkdir()
        died = killed_at(step, lambda place=place: save(place))
        yield place
        if not died:
            return


def tiny(seed, **fields):
    torch.manual_seed(seed)
    return DeepSeekForCausalLM(preset("tiny_v3", vocab_size=300, **fields)).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def is_one_of(found, *expected):
    places = [place for place, one in enumerate(expected) if found.shape == one.shape and torch.equal(found, one)]
    assert places, "neither as before nor as after"
    return places[0]


@pytest.fixture(autouse=True)
def linked_or_copied(request, monkeypatch):
    if getattr(request, "param", None) == "no links":

        def refuse(*args):
            raise OSError("no links here")

        monkeypatch.setattr(whole_folders.os, "link", refuse)


@pytest.mark.parametrize(
    ("old_size", "new_size", "fields", "linked_or_copied"),
    [
        ("60KB", "60KB", {}, "links"),  # shards of the same names
        ("60KB", "60KB", {"rms_norm_eps": 1e-2}, "links"),  # a config that loads with either's weights
        ("60KB", "1GB", {"rms_norm_eps": 1e-2}, "links"),
        ("1GB", "60KB", {"rms_norm_eps": 1e-2}, "no links"),
    ],
    indirect=["linked_or_copied"],
)
def test_a_model(old_size, new_size, fields, linked_or_copied, tmp_path):
    old, new = tiny(0), tiny(1, **fields)
    folder = tmp_path / "model"
    old.save_pretrained(folder, max_shard_size=old_size)
    (folder / "notes.txt").write_text("kept")
    seen = []
    for place in each_kill(folder, tmp_path, lambda place: new.save_pretrained(place, max_shard_size=new_size)):
        opened = [cls.from_pretrained(place) for cls in (DeepSeekForCausalLM, AutoModelForCausalLM)]
        found = {is_one_of(logits(model), logits(old), logits(new)) for model in opened}
        assert len(found) == 1 and (place / "notes.txt").read_text() == "kept"
        assert opened[0].config.rms_norm_eps == (old, new)[found.copy().pop()].config.rms_norm_eps
        seen += found
        if found == {1}:  # the next save is not misled by what the killed one has left
            shutil.copytree(place, copy := place.with_name("copy"))
            old.save_pretrained(copy)
            assert is_one_of(logits(DeepSeekForCausalLM.from_pretrained(copy)), logits(old)) == 0
            assert whole_folders.WORD not in json.loads((copy / "config.json").read_text())
    assert seen == sorted(seen) and set(seen) == {0, 1} and len(seen) > 2
    assert not [path for path in place.iterdir() if path.name.startswith("_")]


def test_a_new_folder_comes_whole(tmp_path):
    for place in each_kill(tmp_path / "model", tmp_path, tiny(0).save_pretrained):
        assert not place.exists() or not any(place.iterdir()) or DeepSeekForCausalLM.from_pretrained(place)
    assert os.listdir(place.parent) == ["model"]


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no second file system")
def test_a_link_to_an_empty_folder_on_another_file_system(tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        (tmp_path / "link").symlink_to(folder)
        assert os.stat(folder).st_dev != os.stat(tmp_path).st_dev
        with replaced_folder(tmp_path / "link") as beside:
            (beside / "config.json").write_text("{}")
        assert os.listdir(folder) == ["config.json"] and os.listdir(tmp_path) == ["link"]


def test_who_may_read_a_folder_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine").chmod(0o700)
    with replaced_folder(tmp_path / "mine") as beside:
        assert stat.S_IMODE(beside.stat().st_mode) == 0o700
        (beside / "config.json").write_text("{}")
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o700


def tokenizers():
    old, new = train_tokenizer(TEXTS * 9, 300), train_tokenizer(["vier fünf sechs sieben"] * 9, 290)
    new.model_max_length = 77
    new.chat_template = "{{ messages }}"
    return old, new


def as_saved(tokenizer):
    return tokenizer("one fünf")["input_ids"], tokenizer.model_max_length, tokenizer.chat_template


def test_a_tokenizer(tmp_path):
    old, new = tokenizers()
    folder = tmp_path / "tokenizer"
    old.save_pretrained(folder)
    before = as_saved(AutoTokenizer.from_pretrained(folder))
    new.save_pretrained(tmp_path / "new")
    after = as_saved(AutoTokenizer.from_pretrained(tmp_path / "new"))
    seen = [
        (before, after).index(as_saved(AutoTokenizer.from_pretrained(place)))
        for place in each_kill(folder, tmp_path, new.save_pretrained)
    ]
    assert seen == sorted(seen) and set(seen) == {0, 1}


def test_a_model_with_its_tokenizer_and_what_lies_beside_them(tmp_path):
    """As a run saves them, over an earlier run: all of one save, or all of the other."""
    models, pair = (tiny(0), tiny(1, rms_norm_eps=1e-2)), tokenizers()

    def save(place, which):
        with replaced_folder(place) as beside:
            models[which].save_pretrained(beside)
            pair[which].save_pretrained(beside)
            (beside / "catalogue").mkdir()
            (beside / "catalogue" / "items.json").write_text(str(which))

    folder = tmp_path / "run"
    save(folder, 0)
    expected = [as_saved(AutoTokenizer.from_pretrained(folder))]
    save(tmp_path / "new", 1)
    expected.append(as_saved(AutoTokenizer.from_pretrained(tmp_path / "new")))
    for place in each_kill(folder, tmp_path, lambda place: save(place, 1)):
        which = is_one_of(logits(AutoModelForCausalLM.from_pretrained(place)), *map(logits, models))
        assert as_saved(AutoTokenizer.from_pretrained(place)) == expected[which]
        items = Path(whole_folders.current(place, "catalogue")) / "catalogue" / "items.json"
        assert items.read_text() == str(which)
        if which:  # saving one part alone goes by the latest save of the others
            pair[0].save_pretrained(place)
            assert as_saved(AutoTokenizer.from_pretrained(place)) == expected[0]
            assert is_one_of(logits(AutoModelForCausalLM.from_pretrained(place)), *map(logits, models)) == 1


def test_an_export_is_whole_or_can_be_done_again(tmp_path):
    source = tmp_path / "source"
    tiny(0).save_pretrained(source)
    tokenizers()[0].save_pretrained(source)
    for place in each_kill(tmp_path / "export", tmp_path, lambda place: export_native(source, place)):
        if not place.exists() or not any(place.iterdir()):
            export_native(source, place)
        names = {path.name for path in place.iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


def test_an_index_of_passages(tmp_path):
    (tmp_path / "notes").mkdir()
    for name in ("one", "two"):
        (tmp_path / "notes" / f"{name}.txt").write_text(f"The first text of {name}.")
    before = PassageIndex.open(tmp_path / "index", tmp_path / "notes").passages
    (tmp_path / "notes/two.txt").write_text("Another text.")
    seen = []
    for place in each_kill(tmp_path / "index", tmp_path, lambda place: PassageIndex.open(place, tmp_path / "notes")):
        seen.append(PassageIndex.open(place).passages == before)
        assert PassageIndex.open(place, tmp_path / "notes").search("another")[0].source == "two.txt:1"
    assert seen == sorted(seen, reverse=True) and set(seen) == {True, False}


def text_recommender(items):
    torch.manual_seed(0)
    config = preset("tiny_v3", vocab_size=300, num_items=1, item_text_length=8)
    recommender = Recommender(DeepSeekForRecommendation(config), catalogue_tokenizer([]), tokenizers()[0])
    recommender.add_items(dict.fromkeys(items, "one two"))
    return recommender


def test_a_recommender(tmp_path):
    models = [text_recommender(items) for items in (["a"], ["b", "c"])]
    models[0].save(tmp_path / "model")
    for place in each_kill(tmp_path / "model", tmp_path, models[1].save):
        opened = load(str(place))
        assert len(opened.items) == opened.model.config.num_items
        assert opened.items[1:] in (["a"], ["b", "c"])


def test_an_adapter(tmp_path):
    """Opened as `finetune` and `evaluate` open it."""
    base = tmp_path / "base"
    tiny(0).save_pretrained(base)

    def adapter(alpha):
        torch.manual_seed(alpha)
        config = LoraConfig(target_modules=["o_proj"], r=2, lora_alpha=alpha, init_lora_weights=False)
        return get_peft_model(DeepSeekForCausalLM.from_pretrained(base), config).eval()

    def save(model, place):
        with replaced_folder(place) as beside:
            model.save_pretrained(beside)

    models = [adapter(1), adapter(99)]
    save(models[0], tmp_path / "model")
    for place in each_kill(tmp_path / "model", tmp_path, lambda place: save(models[1], place)):
        opened = pretrained_model(ModelArguments(model_name_or_path=str(place)), AutoModelForCausalLM)
        is_one_of(logits(opened.eval()), *map(logits, models))


def test_the_two_packages_hold_one_file():
    """Each travels to the Hub without the other."""
    import tokenization_deepseek

    one, other = (Path(package).parent / "whole_folders.py" for package in (
        whole_folders.__file__, tokenization_deepseek.__file__))  # fmt: skip
    assert one.read_bytes() == other.read_bytes()
