"""Tokens per second in training, side by side with transformers' own DeepSeek-V3.

    python benchmarks/training_speed.py --size tiny 60m

Both models are one and the same: it is asserted first that logits, loss and every gradient agree to 1e-5 in float32.
A step is forward, backward, clipping and fused AdamW; the systems take turns (A B C A B C), and a round's ratio is
native's CPU time over a system's in that round. Besides ours as the Trainer runs it, there is ours with one part of
modeling_deepseek/fused.py or products.py off at a time, which says what that part brings. Operator calls are aten's,
as the profiler counts them; peak memory is that of a process of its own, which loads the model and takes three steps.
The tables go into docs/results.md.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from compare import machine_lines, write_section
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from modeling_deepseek import DeepSeekForCausalLM, attention_core, layers, moe, products, rope

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "num_hidden_layers": 4, "hidden_size": 112, "intermediate_size": 320, "num_attention_heads": 4,
        "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 64, "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 28, "v_head_dim": 28, "n_routed_experts": 8, "moe_intermediate_size": 96,
        "num_experts_per_tok": 2, "vocab_size": 65,
    },
    "60m": {
        "num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 16,
        "num_key_value_heads": 16, "q_lora_rank": 384, "kv_lora_rank": 256, "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64, "v_head_dim": 64, "n_routed_experts": 16, "moe_intermediate_size": 192,
        "num_experts_per_tok": 4, "vocab_size": 8192,
    },
}  # fmt: skip
BATCHES = {"tiny": (12, 64), "60m": (4, 256)}
STEPS = {"tiny": 8, "60m": 1}  # of one system in its turn
READ = 28 * 2**20  # bytes of a block that is freed before the first step
CLASSES = {"native": DeepseekV3ForCausalLM, "ours": DeepSeekForCausalLM}


def never(*given: Any) -> bool:
    return False


# What is switched off: (module, its variable, the value that does so).
PARTS: dict[str, tuple[Any, str, Any]] = {
    "attention": (attention_core, "LONGEST", 0),
    "experts": (moe, "is_trained_as_it_is", never),
    "norms": (layers, "is_trained", never),
    "rotation": (rope, "is_trained", never),
    "feed-forwards": (layers, "is_plain_silu", never),
    "oneDNN": (products, "has_onednn", never),
}


def save_weights(size: str, folder: str) -> None:
    torch.manual_seed(0)
    config = DeepseekV3Config(
        **SIZES[size], first_k_dense_replace=1, n_shared_experts=1, n_group=1, topk_group=1, norm_topk_prob=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, max_position_embeddings=512,
        bos_token_id=0, eos_token_id=1, pad_token_id=None, num_nextn_predict_layers=0,
    )  # fmt: skip
    DeepseekV3ForCausalLM(config).save_pretrained(folder)


def free_a_block() -> None:
    """What reading a data set does: glibc hands blocks back to the system that are larger than any it has seen freed,
    and steps of a process that has read nothing wait for thousands of pages, ours for more of them."""
    torch.empty(READ, dtype=torch.uint8)


def token_ids(size: str) -> torch.Tensor:
    return torch.randint(0, SIZES[size]["vocab_size"], BATCHES[size], generator=torch.Generator().manual_seed(1))


def load(system: str, folder: str) -> torch.nn.Module:
    return CLASSES[system].from_pretrained(folder, dtype=torch.float32).train()


def forward(model: torch.nn.Module, ids: torch.Tensor, keeps_logits: bool) -> Any:
    kept = {} if keeps_logits else {"logits_to_keep": "loss"}
    return model(input_ids=ids, labels=ids, use_cache=False, **kept)


def relative(ours: torch.Tensor, native: torch.Tensor) -> float:
    return ((ours - native).abs().max() / native.abs().max()).item()


def largest_difference(native: torch.nn.Module, ours: torch.nn.Module, ids: torch.Tensor) -> float:
    """Of logits, loss and gradients, each relative to its largest number.

    Raises:
        AssertionError: if it is above 1e-5.
    """
    results = []
    for model, keeps_logits in ((native, True), (ours, False)):
        loss = forward(model, ids, keeps_logits).loss
        loss.backward()
        with torch.no_grad():
            logits = forward(model, ids, True).logits
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"logits": logits, "loss": loss.detach(), **gradients})
        model.zero_grad()
    theirs, own = results
    assert own.keys() == theirs.keys()
    differences = {name: relative(own[name], theirs[name]) for name in own}
    worst = max(differences, key=differences.__getitem__)
    assert differences[worst] <= 1e-5, f"{worst} differs by {differences[worst]:.1e}"
    return differences[worst]


def stepper(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[bool], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(keeps_logits: bool) -> None:
        forward(model, ids, keeps_logits).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


@contextlib.contextmanager
def without(part: str | None) -> Iterator[None]:
    if part is None:
        yield
    else:
        with mock.patch.object(*PARTS[part]):
            yield


def systems_of(native: torch.nn.Module, ours: torch.nn.Module, ids: torch.Tensor) -> dict[str, Callable[[], None]]:
    native_step, our_step = stepper(native, ids), stepper(ours, ids)

    def run(part: str | None, keeps_logits: bool) -> None:
        with without(part):
            our_step(keeps_logits)

    return {
        "transformers": lambda: native_step(True),
        "ours": lambda: run(None, False),
        "ours, logits kept": lambda: run(None, True),
        **{f"ours without {part}": lambda part=part: run(part, False) for part in PARTS},  # type: ignore[misc]
    }


def cpu_seconds(step: Callable[[], None], steps: int) -> float:
    begin = time.process_time()
    for _ in range(steps):
        step()
    return (time.process_time() - begin) / steps


def operator_calls(step: Callable[[], None]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))


def product_rate() -> float:
    """Billions of operations per second in a product of two matrices, the best of five."""
    x = torch.randn(1024, 1024)
    return 2 * 1.024**3 / min(cpu_seconds(lambda: torch.mm(x, x), 2) for _ in range(5))


def peak_megabytes(system: str, size: str, folder: str) -> float:
    """Of a process that takes three steps, as it is started by `main`."""
    command = [sys.executable, __file__, "--size", size, "--peak", system, folder]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(run.stdout.split()[-1])


def print_peak(system: str, size: str, folder: str) -> None:
    free_a_block()
    step = stepper(load(system, folder), token_ids(size))
    for _ in range(3):
        step(system == "native")
    status = Path("/proc/self/status").read_text()  # resource's number is handed on from the process that starts this
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def measure(size: str, rounds: int) -> list[str]:
    """The lines of one size's table."""
    with tempfile.TemporaryDirectory() as folder:
        save_weights(size, folder)
        native, ours, ids = load("native", folder), load("ours", folder), token_ids(size)
        difference = largest_difference(native, ours, ids)
        systems = systems_of(native, ours, ids)
        free_a_block()
        for step in systems.values():
            step()
        rate, seconds = product_rate(), {name: [] for name in systems}  # type: dict[str, list[float]]
        for _ in range(rounds):
            for name, step in systems.items():
                seconds[name].append(cpu_seconds(step, STEPS[size]))
        rates = rate, product_rate()
        calls = {name: operator_calls(step) for name, step in systems.items()}
        peaks = {"transformers": peak_megabytes("native", size, folder), "ours": peak_megabytes("ours", size, folder)}
    tokens, void = ids.numel(), "; void, for they differ by more than a fifth" * (max(rates) > 1.2 * min(rates))
    lines = [
        f"**{size}**: batches of {BATCHES[size][0]} x {BATCHES[size][1]}; logits, loss and gradients differ by "
        f"{difference:.0e} at most; products ran at {rates[0]:.0f} GF/s before and {rates[1]:.0f} after{void}.",
        "",
        "| system | ms a step, median | least | tokens/s | times transformers' speed, median (least to most) "
        "| operator calls | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, own in seconds.items():
        ratios = [theirs / mine for theirs, mine in zip(seconds["transformers"], own, strict=True)]
        median, peak = statistics.median(own), f"{peaks[name]:.0f}" if name in peaks else ""
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        cells = (
            f"{1e3 * median:.1f} | {1e3 * min(own):.1f} | {tokens / median:.0f} | {spread} | {calls[name]} | {peak}"
        )
        lines.append(f"| {name} | {cells} |")
        print(lines[-1], flush=True)
    return [*lines, ""]


def heading(size: str, rounds: int) -> list[str]:
    return [
        f"## Training, tokens per second, {size}",
        "A V3-shaped model as transformers' DeepseekV3ForCausalLM and as ours, float32, one thread, CPU time of a",
        f"step (forward, backward, clipping, fused AdamW); {rounds} rounds in which the systems took turns. Ours",
        'keeps no logits (`logits_to_keep="loss"`, as the Trainer asks); "without": one part is off. Without oneDNN',
        "products go by MKL, as transformers' do, which uses half of this processor's vector units (products.py).",
        "A block of 28 MiB is freed before, as by a process that has read its data.",
        "",
        f"Command: `python benchmarks/training_speed.py --size {size}`",
        *(f"- {line}" for line in machine_lines("other work on both cores.", ("torch", "transformers"))),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", nargs=2, metavar=("SYSTEM", "FOLDER"), help="print the peak memory of one system")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        print_peak(arguments.peak[0], arguments.size[0], arguments.peak[1])
        return
    for size in arguments.size:
        lines = measure(size, arguments.rounds)
        write_section(f"training_speed_{size}", [*heading(size, arguments.rounds), *lines[:-1]])


if __name__ == "__main__":
    main()
