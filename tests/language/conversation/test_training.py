"""Runs on three conversations: the loss by hand, packed and separate, two processes, LoRA, resume, replies."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from finetune_deepseek.commands.finetune import score
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.language.conversation.arguments import ConversationArguments
from finetune_deepseek.language.conversation.masks import Encoder
from finetune_deepseek.language.conversation.task import Conversation, Found
from finetune_deepseek.language.conversation.templates import trained_template
from finetune_deepseek.training.run import run_stages
from modeling_deepseek import DeepSeekForCausalLM
from tests.small_runs import flags
from tokenization_deepseek import DeepSeekTokenizer
from tokenization_deepseek.answer_parsing import FORMS
from tokenization_deepseek.response_templates import response_template

from .conftest import CHATS, OURS, turn, write


def sums_by_hand(model, tokenizer, chats, **settings):
    """The summed loss and the number of trained tokens, one conversation at a time, by log_softmax and picking."""
    encode = Encoder(tokenizer, ConversationArguments(train_file="unread", **settings))
    total, count = 0.0, 0
    for chat in chats:
        made = encode(chat, [])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([made.input_ids])).logits[0]
        shares = logits.double().log_softmax(-1)
        for place, label in enumerate(made.labels):
            if label >= 0:
                total -= shares[place - 1, label].item()
                count += 1
    return total, count


def with_template(tokenizer, name):
    trained_template(tokenizer, name)
    return tokenizer


def opened(folder):
    return DeepSeekForCausalLM.from_pretrained(folder).eval(), DeepSeekTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("train_on", ["assistant", "all", "last"])
def test_the_loss_is_the_one_by_hand(tmp_path, converse, train_on):
    """Three conversations in batches of two."""
    results = converse(per_device_eval_batch_size=2, train_on=train_on)
    total, count = sums_by_hand(*opened(tmp_path / "out"), CHATS, train_on=train_on)
    assert results["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert results["test_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.slow
def test_two_processes_find_the_loss_of_one(tmp_path, converse):
    alone = converse(max_steps=1)
    path = str(tmp_path / "rows.jsonl")
    settings = OURS | {
        **{"output_dir": tmp_path / "two", "validation_file": path, "model_name_or_path": tmp_path / "out"},
        **{"preset": None, "vocab_size": None, "per_device_eval_batch_size": 1, "ddp_backend": "gloo"},
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "finetune_deepseek", "finetune", "conversation", *flags(settings)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "two" / "eval_results.json").read_text())
    assert found["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("preset", ["tiny_llm", "tiny_v2", "tiny_v3", "tiny_v3.2"])
def test_packed_is_as_separate(tmp_path, tokenizer, preset):
    """Loss and gradients of three conversations in one row, against a batch of three, as the collators make them."""
    from configuration_deepseek import preset as config_of

    path = write(tmp_path / "rows.jsonl", CHATS)
    torch.manual_seed(0)
    model = DeepSeekForCausalLM(config_of(preset, vocab_size=len(tokenizer), router_aux_loss_coef=0.0)).train()
    found = {}
    for packing in (True, False):
        made = Conversation(ConversationArguments(train_file=[path], packing=packing, max_seq_length=128), 0)
        splits = made.load_splits()
        made.prepare_model(model, tokenizer)
        features = made.features(splits["train"], tokenizer, is_training=True)
        assert len(features) == (1 if packing else 3)
        batch = made.collator(tokenizer)(list(features))
        model.zero_grad()
        outputs = model(**batch)
        targets = batch["labels"][:, 1:]
        loss = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), targets, reduction="sum")
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found[packing] = loss.item(), (targets >= 0).sum().item(), grads
    assert found[True][1] == found[False][1]
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-5)
    for name, grad in found[True][2].items():
        assert torch.allclose(grad, found[False][2][name], atol=1e-5), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_of_padding_changes_nothing(tmp_path, tokenizer, side):
    made = Conversation(ConversationArguments(train_file=[write(tmp_path / "rows.jsonl", CHATS)]), 0)
    splits = made.load_splits()
    trained_template(tokenizer, None)
    tokenizer.padding_side = side
    batch = made.collator(tokenizer)(list(made.features(splits["train"], tokenizer, is_training=True)))
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        assert mask.tolist() == sorted(mask.tolist(), reverse=True) and mask.sum() > 3
        assert set(labels[mask == 0].tolist()) <= {-100}
        assert ids[0] == tokenizer.bos_token_id


def test_packing_trains_and_lowers_the_loss(tmp_path, converse, capsys):
    results = converse(packing=True, max_seq_length=128, max_steps=30)
    assert "packed into 1 rows of 128 tokens" in capsys.readouterr().out
    assert results["eval_loss"] < 1.5


def test_three_conversations_are_learned_by_heart(tmp_path, converse):
    """As the user's control tokens are text, the answer to them is learned like any other."""
    results = converse(max_steps=80, max_replies=3, max_new_tokens=24, answer_pattern="(.+)")
    assert results["eval_loss"] < 0.1
    lines = (tmp_path / "out" / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    for line, chat in zip(map(json.loads, lines), CHATS, strict=True):
        assert (line["source"], line["target"]) == (chat[-2]["content"].strip(), chat[-1]["content"])
        assert line["prediction"] == line["target"]
    assert results["test_answer_accuracy"] == 1 and results["baseline_answer_accuracy"] == pytest.approx(1 / 3)


def test_evaluate_and_predict_read_what_was_trained(tmp_path, converse, capsys):
    trained = converse(train_on="last", thinking="drop", chat_template="v3.1", max_steps=3)
    path = str(tmp_path / "rows.jsonl")
    for verb, flag in (("evaluate", "do_eval"), ("predict", "do_predict")):
        split = {"do_eval": "validation", "do_predict": "test"}[flag]
        argv = [f"--{split}_file={path}", f"--output_dir={tmp_path / verb}", "--use_cpu=True", "--disable_tqdm=True"]
        score(verb, flag, ["conversation", str(tmp_path / "out"), *argv])
    evaluated = json.loads((tmp_path / "evaluate" / "eval_results.json").read_text())
    assert evaluated["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-6)
    predicted = json.loads((tmp_path / "predict" / "test_results.json").read_text())
    assert predicted["test_loss"] == pytest.approx(trained["test_loss"], rel=1e-6)
    tokenizer = DeepSeekTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.response_template == response_template(FORMS["v3.1"])
    assert "</think>" in tokenizer.apply_chat_template([turn("user", "x")], tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("settings", [{"use_peft": True, "lora_target": ["attention", "experts"]},
                                      {"train_last_n_layers": 1}])  # fmt: skip
def test_adapters_and_last_layers(tmp_path, converse, settings):
    converse(output_dir=tmp_path / "base")
    results = converse(**settings, preset=None, vocab_size=None, model_name_or_path=tmp_path / "base", max_steps=8)
    base, tokenizer = opened(tmp_path / "base")
    before = sums_by_hand(base, tokenizer, CHATS)
    if "use_peft" in settings:
        model = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    else:
        model = DeepSeekForCausalLM.from_pretrained(tmp_path / "out").eval()
    total, count = sums_by_hand(model, tokenizer, CHATS)
    assert total < before[0] and results["eval_loss"] == pytest.approx(total / count, rel=1e-4)
    assert results["parameters_trainable_share"] < 1


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, converse):
    whole = converse(max_steps=4, save_strategy="steps", save_steps=2, per_device_train_batch_size=2)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    again = converse(
        output_dir=tmp_path / "again", max_steps=4, per_device_train_batch_size=2, resume_from_checkpoint=checkpoint
    )
    assert again["eval_loss"] == whole["eval_loss"]
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("out", "again")]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_a_model_that_sees_ahead_is_refused(converse):
    with pytest.raises(ValueError, match="attention_direction prefix: conversations are learned by a causal model"):
        converse(config_overrides="attention_direction=prefix")


def test_answers_that_stand_where_generation_puts_something_else_are_said(converse, tokenizer, capsys):
    """R1's prompt opens the thought, which answers without one don't follow."""
    converse(chat_template="r1-think", max_steps=1)
    out = capsys.readouterr().out
    line = (
        "train: 3 of 3 last answers stand behind '<｜Assistant｜>', where generation has '<｜Assistant｜><think>\\n'"
    )
    assert f"{line}: generate by --thinking false, or mend their reasoning_content" in out
    thinking = [[*chat[:-1], chat[-1] | {"reasoning_content": "hm"}] for chat in CHATS]
    for template, rows, said in (
        ("r1-think", thinking, False), ("v3", CHATS, False), ("v2", CHATS, False), ("v3.1", CHATS, False),
        ("v3.1", thinking, True), ("coder", CHATS, False), ("v4", CHATS, False),
    ):  # fmt: skip
        found, made = Found(), Encoder(with_template(tokenizer, template), ConversationArguments(train_file="unread"))
        found.headers.update(header for chat in rows if (header := made(chat, []).header))
        found.sizes = {"conversations": len(rows)}
        lines = list(found.header_lines("train", tokenizer))
        assert len(lines) == said, (template, lines)
        assert not said or "generate by --thinking true" in lines[0]


def test_self_instruct_is_read_whole_and_learned(tmp_path, capsys):
    """The data set's own files, in Alpaca's layout: every row is kept, and a few steps beat equal shares."""
    folder = Path(os.environ.get("DEEPSEEK_HF_DATA", "")) / "self_instruct"
    if not folder.is_dir():
        pytest.skip("DEEPSEEK_HF_DATA names no folder with self_instruct")
    settings = OURS | {
        **{"train_file": folder / "seed.jsonl.gz", "test_file": folder / "user_oriented.jsonl.gz"},
        **{"output_dir": tmp_path / "out", "max_steps": 6, "max_predict_samples": 20, "max_replies": 1},
    }
    results = run_stages(Conversation, parse_command("conversation", ConversationArguments, flags(settings)))
    assert results["train_samples"] == 175 and results["test_samples"] == 20
    assert results["test_loss"] < math.log(300)
    assert "seed.jsonl.gz: 175 conversation(s), layout alpaca" in capsys.readouterr().out
