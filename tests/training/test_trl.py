"""TRL's trainers on our models, full and with an adapter: they learn, and sample through the cache."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from configuration_deepseek import preset
from modeling_deepseek import DeepSeekForCausalLM
from tokenization_deepseek import DeepSeekTokenizer, train_tokenizer

trl = pytest.importorskip("trl", reason="TRL isn't installed")

TEXTS = ["Ann lives in Ulm.", "Bob lives in Bonn.", "Where does Ann live?", "Tom likes tea and cake."]
COMMON = {"per_device_train_batch_size": 2, "max_steps": 2, "report_to": "none", "use_cpu": True, "logging_steps": 1}
LORA = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_b_proj", "kv_b_proj", "o_proj"], r=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(TEXTS, 300, "v3")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    DeepSeekForCausalLM(preset("tiny_v3", vocab_size=len(tokenizer), **ids)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def trained(trainer, config, folder, tmp_path, rows, adapter=None, **arguments):
    """The log of the first step, and the names of the weights that two steps moved."""
    options = {name: arguments.pop(name) for name in [*arguments] if name in config.__dataclass_fields__}
    run = trainer(
        model=DeepSeekForCausalLM.from_pretrained(folder),
        args=config(output_dir=str(tmp_path), **COMMON, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=DeepSeekTokenizer.from_pretrained(folder),
        peft_config=adapter,
        **arguments,
    )
    before = {name: weight.clone() for name, weight in run.model.named_parameters() if weight.requires_grad}
    run.train()
    after = dict(run.model.named_parameters())
    return run.state.log_history[0], [name for name in before if not torch.equal(before[name], after[name])]


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "adapter"])
def test_supervised_fine_tuning(folder, tmp_path, adapter):
    pairs = zip(TEXTS, TEXTS[1:] + TEXTS[:1], strict=True)
    rows = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in pairs]
    log, moved = trained(trl.SFTTrainer, trl.SFTConfig, folder, tmp_path, rows, adapter, max_length=64)
    assert log["loss"] == pytest.approx(5.69, abs=0.2) and moved  # near the logarithm of the vocabulary


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "adapter"])
def test_direct_preference(folder, tmp_path, adapter):
    rows = [{"prompt": TEXTS[2], "chosen": TEXTS[0], "rejected": text} for text in (TEXTS[1], TEXTS[3])] * 2
    log, moved = trained(trl.DPOTrainer, trl.DPOConfig, folder, tmp_path, rows, adapter, max_length=64)
    assert log["loss"] == pytest.approx(0.6931, abs=1e-3) and moved  # log 2: policy and reference are still equal


def test_group_relative_policy_samples_from_the_model(folder, tmp_path):
    seen = []

    def reward(completions, **columns):
        seen.extend(completions)
        return [float(len(text)) for text in completions]

    rows = [{"prompt": text} for text in TEXTS]
    options = {"num_generations": 2, "max_completion_length": 8}
    log, _ = trained(trl.GRPOTrainer, trl.GRPOConfig, folder, tmp_path, rows, LORA, reward_funcs=reward, **options)
    assert len(seen) >= 4 and log["reward"] == pytest.approx(sum(map(len, seen[:2])) / 2)
