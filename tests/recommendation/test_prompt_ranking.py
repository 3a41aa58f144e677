"""Ranking candidates by prompt: the cache, what is learned, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import finetune_deepseek
from configuration_deepseek import preset
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.recommendation import prompt_ranking
from finetune_deepseek.recommendation.items.titles import read_titles, with_titles
from finetune_deepseek.recommendation.prompt_ranking import (
    Prompt,
    PromptCollator,
    PromptRanking,
    PromptRankingArguments,
    candidate_scores,
    rank,
)
from finetune_deepseek.training.run import run_stages
from modeling_deepseek import DeepSeekForCausalLM
from tests.small_runs import flags
from tokenization_deepseek import train_tokenizer

from .test_recommendation import RING, SMALL, item

EXAMPLE = Path(finetune_deepseek.__file__).parent / "examples" / "prompt_ranking.yaml"
TEXTS = [
    f"Chosen so far, oldest first: {item(n)}; would {item(n + 1)} be chosen next? Answer: yes no" for n in range(9)
]
SCORINGS = ("yes_no", "likelihood")
FEW = SMALL | {"max_length": 2, "vocab_size": 400, "num_candidates": 5}


def prompted(argv=(), **settings):
    return run_stages(
        PromptRanking, parse_command("prompt_ranking", PromptRankingArguments, [*argv, *flags(settings)])
    )


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300, "v3")


def tiny(tokenizer, name):
    torch.manual_seed(0)
    size, tokens = len(tokenizer), {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if name == "llama":
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=size, initializer_range=0.3, **shape, **tokens)).eval()
    return DeepSeekForCausalLM(
        preset(name, vocab_size=size, initializer_range=0.3, max_position_embeddings=256, **tokens)
    ).eval()


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("name", ["tiny_llm", "tiny_v3", "tiny_v32", "llama"])
def test_the_cache_changes_nothing(name, scoring, tokenizer, monkeypatch):
    """Two users of unlike histories and numbers of candidates, in passes of one candidate and of all, against a whole
    prompt read per candidate."""
    model, prompt = tiny(tokenizer, name), Prompt(PromptRankingArguments(scoring=scoring), tokenizer)
    histories = [[item(1), item(2), "a much longer title"], [item(7)]]
    candidates = [[item(3), "yes", "no title of this length is there"], [item(8), item(9)]]
    rows = [
        {"prefix_ids": prompt.history(h), "suffix_ids": prompt.candidates(c)}
        for h, c in zip(histories, candidates, strict=True)
    ]
    batch = PromptCollator(0, prompt.is_question)(rows)
    answers = prompt.answers if prompt.is_question else None
    fast = candidate_scores(model, **batch, answers=answers)
    monkeypatch.setattr(prompt_ranking, "ROWS_PER_PASS", 2)
    torch.testing.assert_close(candidate_scores(model, **batch, answers=answers), fast, rtol=1e-4, atol=1e-4)
    assert fast.shape == (2, 3) and fast[1, 2] == float("-inf")
    for user, row in enumerate(rows):
        for place, suffix in enumerate(row["suffix_ids"]):
            whole = torch.tensor([row["prefix_ids"] + suffix])
            with torch.no_grad():
                logits = model(whole, use_cache=False).logits[0].log_softmax(-1)
            if answers:
                plain = logits[-1, answers[0]] - logits[-1, answers[1]]
            else:
                start = len(row["prefix_ids"])
                plain = sum(logits[at - 1, whole[0, at]] for at in range(start, whole.shape[1]))
            torch.testing.assert_close(fast[user, place], plain, rtol=1e-4, atol=1e-4)
    found = rank(model, tokenizer, histories[0], candidates[0], scoring)
    assert [score for _, score in found] == sorted((float(s) for s in fast[0]), reverse=True)[:3] or found
    best = candidates[0][int(fast[0].argmax())]
    assert found[0][0] == best


@pytest.mark.parametrize("adapter_on_the_head", [False, True])
def test_odds_in_bfloat16_dont_tie(adapter_on_the_head, tokenizer):
    """The states are autocast's; the product with the two tokens is one of float64 of them, within float32."""
    model, prompt = tiny(tokenizer, "tiny_llm"), Prompt(PromptRankingArguments(), tokenizer)
    if adapter_on_the_head:
        config = LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
        model = get_peft_model(model, config).eval()
    candidates = [f"the {number} {number * 7} songs" for number in range(98)]
    row = {"prefix_ids": prompt.history([item(1)]), "suffix_ids": prompt.candidates(candidates)}
    states, head = [], model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, args, __: states.append(args[0][:, -1]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = candidate_scores(model, **PromptCollator(0, True)([row]), answers=prompt.answers)[0]
    handle.remove()
    weight = head.get_base_layer().weight + head.get_delta_weight("default") if adapter_on_the_head else head.weight
    yes, no = (torch.cat(states[1:]).double() @ weight[list(prompt.answers)].double().T).unbind(-1)
    torch.testing.assert_close(scores.double(), yes - no, rtol=1e-4, atol=1e-5)
    assert len(set(scores.tolist())) > 90


def test_a_batch_doesnt_change_the_rank_of_a_lost_target(tokenizer):
    """Two candidates, then five; the first user's target is among neither."""
    task = PromptRanking(PromptRankingArguments(train_file="unread"), 0)
    model, task.prompt = tiny(tokenizer, "tiny_llm"), Prompt(task.arguments, tokenizer)
    rows = [
        {"prefix_ids": task.prompt.history([item(1)]), "suffix_ids": task.prompt.candidates(list(map(item, chosen))),
         "target": target} for chosen, target in (((2, 3), -1), ((2, 3, 4, 5, 6), 1))
    ]  # fmt: skip
    collate = task.collator(tokenizer)
    both, alone = (task.predict_batch(model, collate(part)) for part in (rows, rows[:1]))
    assert both.outputs[0, 0] == alone.outputs[0, 0] == 3
    assert both.counts.tolist() == [0, 1] and sorted(both.outputs[0, 1:].tolist()) == [-1, -1, -1, 0, 1]


def test_a_prompt_is_what_the_template_says(tokenizer):
    template = "Liked: {history}. Then {candidate}? Say"
    prompt = Prompt(PromptRankingArguments(prompt_template=template, max_length=2), tokenizer)
    prefix, suffix = prompt.history(["a", "b", "c"]), prompt.candidates(["{history}"])[0]
    assert tokenizer.decode(prefix, skip_special_tokens=True) == "Liked: b; c. Then"
    assert tokenizer.decode(suffix).startswith(" {history}? Say")
    yes, no = ([*suffix, answer] for answer in prompt.answers)
    assert yes != no and prompt.answers[0] != prompt.answers[1]
    shared = tokenizer.decode(prompt.shared)
    assert " yes".startswith(shared + tokenizer.decode(prompt.answers[0]))
    assert " no".startswith(shared + tokenizer.decode(prompt.answers[1]))


def write_endings(path, users=24):
    """Each user has some of nine plain items, and then all three good ones."""
    rows = []
    for user in range(users):
        items = [f"plain {(user * 2 + step) % 9}" for step in range(3)] + [f"good {(user + n) % 3}" for n in range(3)]
        rows += [f"u{user},{name},{step}" for step, name in enumerate(items)]
    path.write_text("user_id,item_id,timestamp\n" + "\n".join(rows))
    return path


@pytest.mark.parametrize("scoring", SCORINGS)
def test_what_comes_next_is_learned(scoring, tmp_path):
    path = write_endings(tmp_path / "rows.csv")
    results = prompted(
        **FEW, max_steps=30, negatives=2, interactions_file=path, scoring=scoring, output_dir=tmp_path / "out"
    )
    assert results["test_ndcg@10"] > 0.9  # by chance .59
    assert results["test_ranking_signature"] == "ranking of 5 drawn (seed 42) candidates per user, ties against us"
    assert {"transitions_hr@10", "above_item_knn_ndcg@10_p", "eval_mrr", "test_mrr"} <= set(results)
    lines = [json.loads(line) for line in (tmp_path / "out/generated_predictions.jsonl").read_text().splitlines()]
    for line in lines:
        assert sorted(line["prediction"]["order"]) == list(range(5)) and line["target"] in line["candidates"]
        assert line["candidates"][line["prediction"]["order"][line["prediction"]["rank"] - 1]] == line["target"]
        assert not set(line["candidates"]) & set(line["source"]) and len(set(line["candidates"])) == 5
    card = (tmp_path / "out/README.md").read_text()
    assert "AutoModelForCausalLM" in card and "Chosen so far" in card
    if scoring == "yes_no":
        lora = {"use_peft": True, "lora_target": ["attention"], "max_steps": 1, "max_train_samples": 2}
        again = {"model_name_or_path": tmp_path / "out", "use_cpu": True, "disable_tqdm": True, "max_length": 2}
        few = prompted(**again, **lora, num_candidates=5, interactions_file=path, output_dir=tmp_path / "lora")
        assert few["train_samples"] == 2 and few["parameters_trainable_share"] < 0.5
        assert (tmp_path / "lora/adapter_model.safetensors").is_file()


def test_rows_learn_the_answer_or_the_title(tokenizer):
    for scoring in SCORINGS:
        made = PromptRanking(PromptRankingArguments(scoring=scoring, negatives=2, examples_per_history=2), seed=0)
        made.every_item = [item(n) for n in range(RING)]
        made.titles = with_titles(made.every_item, {})[0]
        rows = [{"source": made.every_item[:4]}]
        features = made.features({"source": [row["source"] for row in rows]}, tokenizer, is_training=True)
        kept = [[label for label in row if label != -100] for row in features["labels"]]
        if scoring == "yes_no":
            yes, no = made.prompt.answers
            assert kept == [[yes], [no], [no], [yes], [no], [no]]
        else:
            assert kept == made.prompt.candidates([item(2), item(3)])
        for ids, labels in zip(features["input_ids"], features["labels"], strict=True):
            assert ids[-1] == labels[-1] and len(ids) == len(labels)


def test_given_candidates_and_titles(tmp_path, capsys):
    rows = [
        {"items": ["1", "2"], "target": "3", "list": ["3", "4", "3"]},
        {"items": [], "target": "3", "list": ["3"]},
        {"items": ["2"], "target": "9", "list": ["1", "4", "3"]},
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "train.jsonl").write_text('{"items": ["1", "2", "3", "4"]}\n' * 4)
    (tmp_path / "titles.csv").write_text("item_id,title\n1,red fox\n2,blue  bird\n3,green frog\n")
    results = prompted(
        **FEW | {"max_steps": 1}, data_dir=tmp_path, titles_file=tmp_path / "titles.csv", candidates_column="list",
        output_dir=tmp_path / "out",
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "2 of 5 items have no title; their ids stand in" in out
    assert "1 of 2 targets aren't among their candidates; they rank last" in out
    assert "left out 1 of 3 rows without history or target" in out
    assert results["test_ranking_signature"] == "ranking of 2 to 3 given candidates per user, ties against us"
    lines = [json.loads(line) for line in (tmp_path / "out/generated_predictions.jsonl").read_text().splitlines()]
    assert [line["candidates"] for line in lines] == [["3", "4"], ["1", "4", "3"]]
    assert lines[1]["prediction"]["rank"] == 4 and sorted(lines[0]["prediction"]["order"]) == [0, 1]
    ranks = np.genfromtxt(tmp_path / "out/user_ranks.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    assert ranks["transitions"].tolist() == [1, 4]  # 3 follows 2 in training, 4 doesn't
    (tmp_path / "test.jsonl").write_text(json.dumps({"items": ["1"], "target": "3", "list": []}))
    with pytest.raises(ValueError, match="test.jsonl, row 1: no items in 'list' to rank"):
        prompted(**FEW, data_dir=tmp_path, candidates_column="list", output_dir=tmp_path / "b")


def test_titles_of_a_file(tmp_path):
    path = tmp_path / "titles.jsonl"
    path.write_text('{"id": 5, "name": "a\\n b"}\n{"id": 5, "name": "other"}\n{"id": null, "name": "x"}\n')
    assert read_titles(str(path), "id", "name") == {"5": "a b"}
    assert with_titles(["5", "6"], {"5": "a b"}) == ({"5": "a b", "6": "6"}, 1)
    with pytest.raises(ValueError, match="no column 'title'; it has id, name. Set --title_column"):
        read_titles(str(path), "id", "title")
    path.write_text('{"id": 5, "name": ""}')
    with pytest.raises(ValueError, match="no row has an item and a title"):
        read_titles(str(path), "id", "name")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_template": "{candidate} {history}"}, "it needs {history} once, then {candidate} once"),
        ({"prompt_template": "{history}"}, "it needs {history} once"),
        ({"num_candidates": 1}, "--num_candidates 1: it must be 2 or more"),
        ({"negatives": 0}, "--negatives 0"),
        ({"sasrec": True}, "--sasrec: train it"),
        ({"items_file": "x.csv"}, "--items_file: titles for the prompt come in by --titles_file"),
        ({"candidates_column": "x"}, "--candidates_column is of files of histories"),
        ({"compare_with": ["x"]}, "--compare_with: ranks of other runs"),
    ],
)
def test_bad_flags_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        PromptRankingArguments(**settings)


def test_what_cant_rank_is_one_line(tokenizer):
    model = tiny(tokenizer, "tiny_llm")
    with pytest.raises(ValueError, match="ranking needs the titles of a history, and candidates"):
        rank(model, tokenizer, [], ["a"])
    model.config.attention_direction = "prefix"
    with pytest.raises(ValueError, match="attention_direction 'prefix' can't rank by prompt"):
        rank(model, tokenizer, ["a"], ["b"])


def test_the_example_runs_small(tmp_path):
    small = {"max_steps": 1, "max_train_samples": 6, "max_eval_samples": 4, "max_predict_samples": 4}
    quiet = {"output_dir": tmp_path, "use_cpu": True, "disable_tqdm": True}
    results = prompted([str(EXAMPLE), *flags(quiet | small | {"num_train_epochs": 1})])
    assert results["test_samples"] == 4 and "above_popularity_ndcg@10" in results
