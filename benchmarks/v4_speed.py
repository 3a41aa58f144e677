"""V4 beside transformers' own DeepSeek-V4: decode from long caches, prefill, memory of the cache, training.

    python benchmarks/v4_speed.py

Both models hold the same weights, float32, one thread; they take turns, and a round's ratio is native's CPU time over
ours in that round. Transformers fills a cache of 16k tokens in about a quarter of an hour, so both decode from caches
of random numbers, one and the same (`transplanted`); at 2k tokens it is asserted that transformers' own cache is ours,
transplanted. Logits are compared at each step: where two entries or experts score alike to the last digits a row may
choose the other one, and differs visibly from then on, so that the median row of the first step is asserted and the
worst told. The table goes into docs/results.md.
"""

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from compare import machine_lines, write_section
from training_speed import cpu_seconds, relative
from transformers import DynamicCache
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4ForCausalLM

from finetune_deepseek.checkpoints.cache_size import cache_bytes
from modeling_deepseek import DeepSeekForCausalLM, cache_compressed

# V4-Flash with each width an eighth to a half, all kinds of layers, 70 m parameters.
SIZE: dict[str, Any] = {
    "num_hidden_layers": 8, "hidden_size": 512, "num_attention_heads": 32, "head_dim": 128, "q_lora_rank": 256,
    "o_groups": 8, "o_lora_rank": 128, "index_n_heads": 16, "index_head_dim": 64, "index_topk": 512,
    "sliding_window": 128, "compress_ratios": [0, 0, 4, 128, 4, 128, 4, 128, 0], "num_hash_layers": 1,
    "n_routed_experts": 16, "num_experts_per_tok": 4, "n_shared_experts": 1, "moe_intermediate_size": 192,
    "vocab_size": 8192, "max_position_embeddings": 32768, "partial_rotary_factor": 0.25,
    "rope_parameters": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 2048,
                        "beta_fast": 32.0, "beta_slow": 1.0},
    "num_nextn_predict_layers": 0, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
PREFILL, TRAINED = 2048, (4, 256)
STEPS = 2  # of decoding, in a turn
PARTS = ["4096", "16384", "training", "prefill"]
Model = torch.nn.Module


def both_models(folder: str) -> tuple[Model, Model]:
    torch.manual_seed(0)
    native = DeepseekV4ForCausalLM(DeepseekV4Config(**SIZE)).float()
    generator = torch.Generator().manual_seed(2)
    for name, table in native.named_buffers():
        if name.endswith("tid2eid"):
            table.copy_(torch.rand(len(table), SIZE["n_routed_experts"], generator=generator).topk(4).indices)
    native.save_pretrained(folder)
    return native.eval(), DeepSeekForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def token_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, SIZE["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


def transplanted(ours: DynamicCache, native: Model, model: Model) -> DynamicCache:
    """Our cache after a multiple of 128 tokens as transformers' own: no block is open there."""
    theirs = DynamicCache(config=native.config)
    for own, layer, decoder in zip(theirs.layers, ours.layers, model.model.layers, strict=True):
        keys = layer.rolls["keys"][:, 1 - SIZE["sliding_window"] :].unsqueeze(1).clone()
        own.lazy_initialization(keys, keys)
        own.keys = own.values = keys
        own.cumulative_length = layer.seen
        for name, entries in layer.entries.items():
            count = layer.seen // layer.ratio
            content, gate = layer.rolls[name].chunk(2, dim=-1)
            own.compressed_kv[name], own.entry_count[name] = entries.data[:, :count].clone(), count
            own.buffer_kv[name], own.buffer_gate[name] = content[:, :0], gate[:, :0]
            part = decoder.self_attn.compressor if name == "compressor" else decoder.self_attn.indexer.compressor
            if part.span > part.ratio:
                last, width = slice(-part.ratio, None), part.width
                own.overlap_kv[name] = content[:, last, :width].clone()
                own.overlap_gate[name] = (gate[:, last] + part.ape)[..., :width].clone()
    return theirs


def assert_same_cache(one: DynamicCache, other: DynamicCache) -> None:
    """Raise AssertionError if two of transformers' caches differ by more than 1e-4 of the largest number."""
    for a, b in zip(one.layers, other.layers, strict=True):
        assert relative(a.keys, b.keys) < 1e-4
        for word in ("compressed_kv", "overlap_kv", "overlap_gate"):
            for name, tensor in getattr(a, word, {}).items():
                assert relative(tensor, getattr(b, word)[name]) < 1e-4, (word, name)


def held_bytes(cache: DynamicCache) -> int:
    """Of whole tensors, those that slices are of among them."""
    tensors = [rows for layer in cache.layers for rows in layer.rolls.values()]
    tensors += [entries.data for layer in cache.layers for entries in layer.entries.values()]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def cell(seconds: list[list[float]], tokens: int) -> str:
    """Native and ours per token, and their ratio: medians, least to most."""
    ratios = sorted(theirs / own for theirs, own in zip(*seconds, strict=True))
    theirs, own = (1e3 * statistics.median(one) / tokens for one in seconds)
    return f"{theirs:.3g} | {own:.3g} | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def in_turns(steps: tuple[Callable[[], Any], ...], rounds: int) -> list[list[float]]:
    """CPU seconds of each, round by round."""
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for own, step in zip(seconds, steps, strict=True):
            own.append(cpu_seconds(step, 1))
    return seconds


def prefill_line(native: Model, ours: Model, rounds: int) -> tuple[str, str]:
    ids, asked = token_ids(1, PREFILL), {"use_cache": True, "logits_to_keep": 1}
    a, b = native(ids, **asked), ours(ids, **asked)
    difference = relative(b.logits, a.logits)
    assert difference < 1e-5
    cache = getattr(a, "cache", None) or a.past_key_values
    assert_same_cache(cache, transplanted(b.cache, native, ours))
    seconds = in_turns((lambda: native(ids, **asked), lambda: ours(ids, **asked)), rounds)
    line = f"| prefill of {PREFILL} tokens | 1 | {cell(seconds, PREFILL)} | {difference:.0e} |"
    return line, memory_line(b.cache, ours.config)


class Decoding:
    """One model, its cache, and the next tokens of so many rows."""

    def __init__(self, model: Model, cache: DynamicCache, ids: torch.Tensor):
        self.model, self.cache, self.ids, self.at = model, cache, ids, 0
        self.logits: list[torch.Tensor] = []

    def __call__(self) -> None:
        for _ in range(STEPS):
            ids = self.ids[:, self.at : self.at + 1]
            self.logits.append(self.model(ids, past_key_values=self.cache, use_cache=True).logits)
            self.at += 1


def decode_line(native: Model, ours: Model, filled: DynamicCache, batch: int, rounds: int) -> str:
    tokens, mine = filled.get_seq_length(), copy.deepcopy(filled)
    mine.batch_repeat_interleave(batch)
    ids = token_ids(batch, STEPS * (rounds + 1))
    theirs = Decoding(native, transplanted(mine, native, ours), ids)
    own = Decoding(ours, mine, ids)
    theirs(), own()
    seconds = in_turns((theirs, own), rounds)
    differences = [relative(b, a) for a, b in zip(theirs.logits, own.logits, strict=True)]
    first = [relative(b, a) for a, b in zip(theirs.logits[0], own.logits[0], strict=True)]  # of each row
    assert statistics.median(first) < 1e-4, first
    told = f"{statistics.median(differences):.0e}, worst {max(differences):.0e}"
    return f"| decode after {tokens} tokens | {batch} | {cell(seconds, STEPS * batch)} | {told} |"


def training_line(native: Model, ours: Model, rounds: int) -> str:
    ids = token_ids(*TRAINED)
    losses = {}

    def step(model: Model, **kept: Any) -> None:
        loss = model(ids, labels=ids, use_cache=False, **kept).loss
        losses[model] = loss.detach()
        loss.backward()
        model.zero_grad()

    native.train(), ours.train()
    steps = (lambda: step(native), lambda: step(ours, logits_to_keep="loss"))
    [one() for one in steps]
    seconds, difference = in_turns(steps, rounds), relative(losses[ours], losses[native])
    assert difference < 1e-5
    batch, length = TRAINED
    return f"| training, {batch} x {length} tokens | {batch} | {cell(seconds, ids.numel())} | {difference:.0e} |"


def random_cache(ours: Model, tokens: int) -> DynamicCache:
    """A cache of one row after so many tokens, a multiple of 128, of random numbers as normed rows have."""
    cache = DynamicCache(config=ours.config)
    for layer, decoder in zip(cache.layers, ours.model.layers, strict=True):
        attention = decoder.self_attn
        rolls, entries = {"keys": torch.randn(1, SIZE["sliding_window"] + 7, SIZE["head_dim"])}, {}
        parts = {"compressor": getattr(attention, "compressor", None)}
        parts["indexer"] = getattr(getattr(attention, "indexer", None), "compressor", None)
        for name, part in parts.items():
            if part is not None:
                inner = part.width * (2 if part.span > part.ratio else 1)
                rolls[name] = torch.randn(1, part.keep + cache_compressed.SPARE, 2 * inner)
                entries[name] = cache_compressed.Entries()
                entries[name].append(torch.randn(1, tokens // part.ratio, part.width), 0)
                layer.ratio = part.ratio
        layer.rolls, layer.entries, layer.seen, layer.is_initialized = rolls, entries, tokens, True
        layer.kept_for = {name: rows.shape[1] - cache_compressed.SPARE for name, rows in rolls.items()}
    return cache


def memory_line(cache: DynamicCache, config: Any) -> str:
    """Bytes held against the formula's, which is of bfloat16, while this cache is float32."""
    tokens, layers = cache.get_seq_length(), cache.layers
    pending = sum(rows.nbytes for layer in layers for name, rows in layer.rolls.items() if name != "keys")
    formula = 2 * (cache_bytes(config, tokens) - pending) + pending  # pending rows are float32 in either
    held = held_bytes(cache)
    return f"After {tokens} tokens the cache holds {held / 2**20:.2f} MiB, {held / formula:.3f} of the formula."


def measure(parts: list[str], rounds: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        native, ours = both_models(folder)
    lines, memory = [], ""
    for tokens, batch in ((4096, 1), (4096, 8), (16384, 8), (16384, 1)):
        if str(tokens) in parts:
            with torch.no_grad():
                lines.append(decode_line(native, ours, random_cache(ours, tokens), batch, rounds))
            print(lines[-1], flush=True)
    if "training" in parts:
        lines.append(training_line(native, ours, rounds))
        print(lines[-1], flush=True)
    if "prefill" in parts:
        with torch.no_grad():
            line, memory = prefill_line(native.eval(), ours.eval(), rounds)
        lines.append(line)
        print(line, memory, flush=True)
    return [*lines, "", memory]


def heading(rounds: int) -> list[str]:
    return [
        "## V4 beside transformers' own",
        "A V4-Flash-shaped model of 70 m parameters (8 layers: 2 swa, 3 csa, 3 hca; 32 heads of 128, 512 entries",
        "chosen, 16 experts of which 4, 4 streams) as transformers' DeepseekV4ForCausalLM and as ours, the same",
        f"weights, float32, one thread, CPU time; {rounds} rounds in turns. Of",
        "ratios: median, least to most. Decoding starts from random caches. Logits (training: the loss)",
        "differ by so much of the largest; a row whose scores tie to the last digits chooses another entry or expert.",
        "",
        "Command: `python benchmarks/v4_speed.py`",
        *(f"- {line}" for line in machine_lines("other work on both cores.", ("torch", "transformers"))),
        "",
        "| what | rows | transformers, ms a token | ours, ms a token | times its speed | logits differ by |",
        "|---|---|---|---|---|---|",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="fewer are printed alone")
    arguments = parser.parse_args()
    rounds, parts = arguments.rounds, arguments.parts
    torch.set_num_threads(1)
    lines = measure(parts, rounds)
    if len(parts) < len(PARTS):
        return
    write_section("v4_speed", [*heading(rounds), *lines])


if __name__ == "__main__":
    main()
