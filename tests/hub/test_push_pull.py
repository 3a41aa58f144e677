"""Our model, heads, tokenizer, adapter, a Trainer run and the translation command, pushed to a Hub and loaded again.

One process pushes; a process of ours and a stranger (trust_remote_code, none of our packages) load every revision.
"""

from __future__ import annotations

import pytest

TEXTS = ["A cat sat.", "Eine Katze saß.", "一只猫坐着。", "def f(x):\n    return x**2  # 🐈"]


def outputs(model):
    """All tensors that the model gives for one fixed row, concatenated."""
    import torch

    with torch.no_grad():
        result = model.eval()(input_ids=torch.arange(3, 14)[None], use_cache=False)
    return torch.cat([value.flatten() for value in result.to_tuple() if torch.is_tensor(value)])


def run_the_command(folder):
    """`finetune translation` on a private data set of the Hub, then LoRA on what it pushed; the folders' outputs."""
    from datasets import Dataset, DatasetDict
    from peft import AutoPeftModelForCausalLM

    from finetune_deepseek.commands.finetune import finetune
    from modeling_deepseek import DeepSeekForCausalLM

    rows = [{"translation": {"en": f"cat {n}", "de": f"Katze {n}", "fr": f"chat {n}"}} for n in range(6)]
    splits = DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:2])})
    splits.push_to_hub("alice/pairs", private=True)
    common = ["--dataset_name", "alice/pairs", "--max_steps", "1", "--use_cpu", "--disable_tqdm", "true"]
    common += ["--max_target_length", "8", "--push_to_hub", "--hub_private_repo", "true"]
    full, lora = f"{folder}/full", f"{folder}/lora"
    model = ["--preset", "tiny_v2_lite", "--vocab_size", "300", "--hub_model_id", "alice/translator"]
    finetune(["translation", *common, *model, "--target_lang", "de", "--output_dir", full])
    adapter = ["--model_name_or_path", "alice/translator", "--use_peft", "--hub_model_id", "alice/translator-fr"]
    finetune(["translation", *common, *adapter, "--target_lang", "fr", "--output_dir", lora])
    return {
        "command": outputs(DeepSeekForCausalLM.from_pretrained(full)),
        "command's adapter": outputs(AutoPeftModelForCausalLM.from_pretrained(lora)),
    }


def push_all(folder):
    """Push model, heads, tokenizer, adapter and a Trainer run; what each computed goes to `folder`."""
    import torch
    from datasets import Dataset
    from huggingface_hub import HfApi
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    import modeling_deepseek
    from configuration_deepseek import preset
    from tokenization_deepseek import DeepSeekTokenizer, train_tokenizer

    torch.manual_seed(0)
    api, expected, facts = HfApi(), {}, {}
    tokenizer = train_tokenizer(TEXTS * 3, vocab_size=320, add_bos_token=True, chat_template="v3")
    config = preset("tiny_v3")
    config.vocab_size = len(tokenizer)

    model = modeling_deepseek.DeepSeekForCausalLM(config)
    expected["model v1"] = outputs(model)
    model.push_to_hub("alice/model", commit_message="Push the model")
    tokenizer.push_to_hub("alice/model")
    api.create_tag("alice/model", tag="v1")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["kv_b_proj", "o_proj"], init_lora_weights=False)
    based = modeling_deepseek.DeepSeekForCausalLM.from_pretrained("alice/model", revision="v1")
    adapted = get_peft_model(based, lora, revision="v1")
    expected["adapter"] = outputs(adapted)
    adapted.push_to_hub("alice/adapter")

    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    expected["model branch"] = outputs(model)
    api.create_branch("alice/model", branch="wide head")
    facts["branch"] = model.push_to_hub("alice/model", revision="wide head").oid
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    expected["model main"] = outputs(model)
    facts["main"] = model.push_to_hub("alice/model").oid

    for head in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
        classifier = getattr(modeling_deepseek, f"DeepSeekFor{head}")(config)
        expected[head] = outputs(classifier)
        classifier.push_to_hub(f"alice/{head}", private=True)

    rows = [{"input_ids": list(range(row, row + 8)), "labels": list(range(row, row + 8))} for row in range(3, 9)]
    arguments = TrainingArguments(
        output_dir=f"{folder}/run",
        hub_model_id="alice/run",
        push_to_hub=True,
        hub_private_repo=True,
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    trained = modeling_deepseek.DeepSeekForCausalLM(config)
    before = outputs(trained)
    trainer = Trainer(trained, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    trainer.push_to_hub(commit_message="End of training")
    expected["run"] = outputs(trained)
    facts["training moved by"] = (expected["run"] - before).abs().max().item()
    facts["run"] = [commit.title for commit in api.list_repo_commits("alice/run")]

    expected |= run_the_command(folder)
    cards = {name: api.model_info(f"alice/{name}") for name in ("translator", "translator-fr")}
    facts["cards"] = {name: [card.library_name, card.card_data.base_model] for name, card in cards.items()}
    names = ("model", "run", "QuestionAnswering", "translator", "translator-fr")
    facts["private"] = {name: api.model_info(f"alice/{name}").private for name in names}

    torch.save(expected, f"{folder}/expected.pt")

    def error_of(load, name, **kwargs):
        try:
            load(f"alice/{name}", cache_dir=f"{folder}/nobody", token=False, **kwargs)
        except OSError as error:
            return str(error)

    facts["errors"] = [
        error_of(modeling_deepseek.DeepSeekForCausalLM.from_pretrained, "run"),
        error_of(modeling_deepseek.DeepSeekForCausalLM.from_pretrained, "nothing"),
        error_of(modeling_deepseek.DeepSeekForCausalLM.from_pretrained, "model", revision="v9"),
        error_of(DeepSeekTokenizer.from_pretrained, "nothing"),
    ]
    facts["ids"] = [tokenizer(text).input_ids for text in TEXTS]
    chat = [{"role": "user", "content": "A cat"}]
    facts["chat"] = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return facts


def pull_all(folder, trust_remote_code, branch_commit):
    """Load all that `push_all` pushed, by the Auto classes; returns differences, homes of the classes, ids."""
    import torch
    import transformers
    from peft import AutoPeftModelForCausalLM, PeftModel

    trust = {"trust_remote_code": True} if trust_remote_code else {}
    if not trust_remote_code:
        import modeling_deepseek  # noqa: F401 - this alone registers everything

    expected = torch.load(f"{folder}/expected.pt")
    differences, homes = {}, {}

    def load(name, head="CausalLM", **kwargs):
        auto = getattr(transformers, f"AutoModelFor{head}")
        model = auto.from_pretrained(f"alice/{name}", **trust, **kwargs)
        homes[name] = type(model).__module__.partition(".")[0]
        return model

    def compare(what, name, model):
        differences[what] = (outputs(model) - expected[name]).abs().max().item()

    compare("tag", "model v1", load("model", revision="v1"))
    compare("branch", "model branch", load("model", revision="wide head"))
    compare("commit", "model branch", load("model", revision=branch_commit))
    compare("main", "model main", load("model"))
    compare("run", "run", load("run"))
    for head in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
        compare(head, head, load(head, head))
    compare("adapter on its base", "adapter", PeftModel.from_pretrained(load("model", revision="v1"), "alice/adapter"))
    compare("adapter alone", "adapter", AutoPeftModelForCausalLM.from_pretrained("alice/adapter", **trust))
    compare("command", "command", load("translator"))
    adapted = AutoPeftModelForCausalLM.from_pretrained("alice/translator-fr", **trust)
    compare("command's adapter", "command's adapter", adapted)

    tokenizer = transformers.AutoTokenizer.from_pretrained("alice/model", revision="v1", **trust)
    chat = [{"role": "user", "content": "A cat"}]
    return {
        "differences": differences,
        "homes": sorted(set(homes.values())),
        "ids": [tokenizer(text).input_ids for text in TEXTS],
        "texts": [tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) for text in TEXTS],
        "chat": tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
        "run's tokenizer": transformers.AutoTokenizer.from_pretrained("alice/run", **trust)(TEXTS[0]).input_ids,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("expected"))


@pytest.fixture(scope="module")
def pushed(hub, run_client, folder):
    return run_client(push_all, folder, hub=hub)


@pytest.fixture(scope="module", params=["ours", "stranger"])
def pulled(request, pushed, hub, run_client, run_stranger, folder):
    run = run_client if request.param == "ours" else run_stranger
    facts = run(pull_all, folder, request.param == "stranger", pushed["branch"], hub=hub)
    home = "modeling_deepseek" if request.param == "ours" else "transformers_modules"
    assert facts["homes"] == [home]
    return facts


def test_every_revision_gives_equal_outputs_back(pulled):
    names = ["tag", "branch", "commit", "main", "run", "SequenceClassification", "TokenClassification"]
    names += ["QuestionAnswering", "adapter on its base", "adapter alone", "command", "command's adapter"]
    assert pulled["differences"] == dict.fromkeys(names, 0.0)


def test_the_tokenizer_gives_equal_ids_and_texts_back(pushed, pulled):
    assert pulled["ids"] == pushed["ids"]
    assert pulled["texts"] == TEXTS
    assert pulled["chat"] == pushed["chat"]
    assert pulled["run's tokenizer"] == pushed["ids"][0]


def test_trainer_pushes_every_save_and_the_end(pushed):
    assert pushed["training moved by"] > 0
    assert pushed["run"][0] == "End of training"
    assert pushed["run"][-1] == "initial commit"
    assert len(pushed["run"]) >= 3


def test_visibility_is_as_asked_for(pushed):
    private = ["run", "QuestionAnswering", "translator", "translator-fr"]
    assert pushed["private"] == {"model": False, **dict.fromkeys(private, True)}


def test_the_command_pushes_with_its_card(pushed, hub):
    assert pushed["cards"] == {"translator": ["transformers", None], "translator-fr": ["peft", "alice/translator"]}
    files = hub.repos["models", "alice/translator"].commit_at("main").files
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)


def test_the_code_is_pushed_beside_the_weights(pushed, hub):
    files = hub.repos["models", "alice/model"].commit_at("main").files
    code = {path for path in files if path.endswith(".py")}
    assert {"language_heads.py", "modeling_deepseek.py", "configuration_deepseek.py"} <= code
    assert "register.py" not in code
    assert b"class DeepSeekForCausalLM(" in hub.read("alice/model", "language_heads.py")


def test_what_is_private_or_missing_is_an_oserror_that_names_it(pushed):
    for error, name in zip(pushed["errors"], ["alice/run", "alice/nothing", "v9", "alice/nothing"], strict=True):
        assert error is not None and name in error, name
