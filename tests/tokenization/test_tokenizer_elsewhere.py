"""What we save, opened by others: AutoTokenizer with our class registered, and a process without our package."""

import copy
import json
import subprocess
import sys

import pytest
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from configuration_deepseek import preset
from modeling_deepseek import DeepSeekModel
from tokenization_deepseek import CHAT_TEMPLATES, DeepSeekTokenizer, train_tokenizer
from tokenization_deepseek.answer_parsing import FORMS
from tokenization_deepseek.response_templates import response_template
from tokenization_deepseek.tokenization_deepseek import BOS

TEXTS = ["hi", "深度求索 12345 é ", "<｜User｜>Straße<｜Assistant｜>\n", " a , b ."]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "你好"}]
TOOLS = [{"type": "function", "function": {"name": "get", "description": "", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "get", "arguments": {"c": "北京", "n": [1.5, None]}}}
CALLED = {"role": "assistant", "content": "", "reasoning_content": "so", "tool_calls": [CALL]}
CALLS = [[CHAT[0], CALLED, {"role": "tool", "content": "rain"}, CHAT[1]], CHAT]  # a batch
CALLING = {"chat_template": CHAT_TEMPLATES["v3.2"], "return_assistant_tokens_mask": True, "padding": True}

CHILD = """
import json, sys
for name in ("configuration_deepseek", "modeling_deepseek", "tokenization_deepseek", "finetune_deepseek"):
    sys.modules[name] = None
from transformers import AutoTokenizer
texts, chat, calls, tools, template, folders = json.loads(sys.argv[1])
as_text = json.loads(json.dumps(calls[0]))
function = as_text[1]["tool_calls"][0]["function"]
function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
options, masked = {"tools": tools, "chat_template": template}, {"return_assistant_tokens_mask": True, "padding": True}
answers = {}
for name, (folder, trust) in folders.items():
    tokenizer = AutoTokenizer.from_pretrained(folder, **({"trust_remote_code": True} if trust else {}))
    answers[name] = {
        "class": type(tokenizer).__name__,
        "ids": [tokenizer(text).input_ids for text in texts],
        "pair": tokenizer("a", "b").input_ids,
        "decoded": [tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) for text in texts],
        "padded": tokenizer(texts, padding=True).input_ids,
        "chat": tokenizer.apply_chat_template(chat)["input_ids"],
        "length": tokenizer.model_max_length,
        "calls": (batch := tokenizer.apply_chat_template(calls, **options, **masked))["input_ids"],
        "masks": batch["assistant_masks"],
        "given_as_text": trust and tokenizer.apply_chat_template(as_text, **options)["input_ids"],
        "parsed": tokenizer.parse_response(f"so</think>yes{tokenizer.eos_token}", prefix="<think>"),
        "double": tokenizer("<｜begin▁of▁sentence｜>hi").input_ids.count(tokenizer.bos_token_id),
        "thoughts": tokenizer.apply_chat_template([{"role": "user", "content": "<think>"}])["input_ids"].count(
            tokenizer.convert_tokens_to_ids("<think>")
        ),
    }
json.dump(answers, open("answers.json", "w"))
"""


def answers_of(tokenizer: DeepSeekTokenizer) -> dict:
    return {
        "ids": [tokenizer(text).input_ids for text in TEXTS],
        "pair": tokenizer("a", "b").input_ids,
        "decoded": TEXTS,
        "padded": tokenizer(TEXTS, padding=True).input_ids,
        "chat": tokenizer.apply_chat_template(CHAT)["input_ids"],
        "length": tokenizer.model_max_length,
        "calls": tokenizer.apply_chat_template(CALLS, tools=TOOLS, **CALLING)["input_ids"],
        "masks": tokenizer.apply_chat_template(CALLS, tools=TOOLS, **CALLING)["assistant_masks"],
    }


@pytest.fixture(scope="module")
def tokenizers(released_bos, trained_once) -> dict[str, DeepSeekTokenizer]:
    trained = copy.deepcopy(trained_once)
    trained.model_max_length = 99
    trained.add_eos_token = True
    trained.chat_template = CHAT_TEMPLATES["v3.1"]
    trained.response_template = response_template(FORMS["v3.1"])
    released = copy.deepcopy(released_bos)
    released.response_template = response_template(FORMS["v3"])
    return {"released": released, "trained": trained}


@pytest.fixture(scope="module")
def stranger(tokenizers, tmp_path_factory) -> dict[str, dict]:
    """The answers of one process that cannot import our packages."""
    root = tmp_path_factory.mktemp("stranger")
    folders = {}
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(root / name)
        # beside the files of a model whose type and code the process doesn't know
        config = {"model_type": "deepseek", "auto_map": {"AutoConfig": "configuration_deepseek.DeepSeekConfig"}}
        (root / name / "config.json").write_text(json.dumps(config))
        folders[name] = (str(root / name), False)
    DeepSeekTokenizer.register_for_auto_class()
    try:
        tokenizers["trained"].save_pretrained(root / "remote")
    finally:
        DeepSeekTokenizer._auto_class = None
    folders["remote"] = (str(root / "remote"), True)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps([TEXTS, CHAT, CALLS, TOOLS, CALLING["chat_template"], folders])],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=root,
        env={"HF_HOME": str(root / "home"), "PATH": "", "PYTHONIOENCODING": "utf-8", "HF_HUB_OFFLINE": "1"},
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return json.loads((root / "answers.json").read_text())


@pytest.mark.parametrize("name", ["released", "trained"])
def test_stock_transformers_gives_the_same_without_remote_code(stranger, tokenizers, name):
    answers = stranger[name]
    assert answers["class"] == "TokenizersBackend"
    assert answers["parsed"] == {"role": "assistant", "reasoning_content": "so", "content": "yes"}
    for key, expected in answers_of(tokenizers[name]).items():
        assert answers[key] == expected, key


def test_our_class_travels_when_asked_to(stranger, tokenizers):
    answers = stranger["remote"]
    assert answers["class"] == "DeepSeekTokenizer" and (answers["double"], answers["thoughts"]) == (1, 0)
    for key, expected in answers_of(tokenizers["trained"]).items():
        assert answers[key] == expected, key
    assert answers["parsed"] == {"role": "assistant", "reasoning_content": "so", "content": "yes"}
    assert answers["given_as_text"] == answers["calls"][0]  # the longer one of the batch


def test_auto_tokenizer_gives_our_class_once_registered(trained, tmp_path):
    class ThrowAwayConfig(PreTrainedConfig):
        model_type = "deepseek_throw_away"

    AutoConfig.register("deepseek_throw_away", ThrowAwayConfig)
    AutoTokenizer.register(ThrowAwayConfig, tokenizer_class=DeepSeekTokenizer)
    trained.save_pretrained(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is DeepSeekTokenizer  # a folder with the tokenizer only
    ThrowAwayConfig().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is DeepSeekTokenizer
    assert tokenizer(BOS + "hi").input_ids == trained("hi").input_ids
    assert AutoTokenizer.from_pretrained(tmp_path, add_bos_token=False)("").input_ids == []


@pytest.mark.parametrize("template", sorted(CHAT_TEMPLATES))
def test_sentence_transformers_own_module_reads_our_templates(template, tmp_path):
    """It takes a template that names a part's type for one that wants contents as lists of parts."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Pooling, Transformer

    tokenizer = train_tokenizer(["one two birds three", "red green blue"] * 3, 300)
    tokenizer.chat_template = CHAT_TEMPLATES[template]
    tokenizer.save_pretrained(tmp_path)
    fields = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    DeepSeekModel(preset("tiny_v3", **fields)).save_pretrained(tmp_path)
    model = sentence_transformers.SentenceTransformer(modules=[Transformer(str(tmp_path)), Pooling(32)])
    assert model.encode(["one two", "three"]).shape == (2, 32)
    assert model.encode([[{"role": "user", "content": "one two"}]]).shape == (1, 32)
