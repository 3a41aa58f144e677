"""How the next token is chosen, so that a completion depends on its seed and prompt and on no other in the batch.

transformers' sampling draws for a whole batch from one stream of random numbers. Here each completion has its own
stream, made from the seed, the prompt's number and the completion's; `generate` is told to take the likeliest token
after `Draw` has left only the drawn one. What is left to depend on the batch is rounding: a matrix product of other
shape may differ in the last bits, which changes a token where two are as good as equal.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ...training.task import ONLY_IDS
from .arguments import SAMPLING, TalkArguments

STEPS = 2**24  # numbers between 0 and 1 that float32 tells apart
# In transformers' order, and when each does something.
WARPERS: tuple[tuple[str, Callable[[Any], LogitsProcessor], Callable[[Any], bool]], ...] = (
    ("temperature", TemperatureLogitsWarper, lambda value: value != 1),
    ("top_k", TopKLogitsWarper, lambda value: value > 0),
    ("top_p", TopPLogitsWarper, lambda value: value < 1),
    ("min_p", MinPLogitsWarper, lambda value: value > 0),
)


@dataclass(frozen=True)
class Sampling:
    """The settings in effect; None for those of `SAMPLING` that aren't used."""

    do_sample: bool
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float
    max_new_tokens: int
    stop: tuple[str, ...]
    seed: int
    num_beams: int = 1
    num_return_sequences: int = 1
    use_mtp: bool = False

    @classmethod
    def of(cls, arguments: TalkArguments, defaults: GenerationConfig) -> "Sampling":
        """The flags, and for those that aren't given what the model's generation_config.json has.

        transformers' own top_k of 50 isn't taken: without a flag and an entry there, nothing is cut off.
        """
        num_beams = getattr(arguments, "num_beams", 1)
        given = {name: getattr(arguments, name) for name in SAMPLING}
        do_sample = arguments.do_sample
        if do_sample is None:
            do_sample = any(value is not None for value in given.values()) or bool(defaults.do_sample)
        do_sample = do_sample and num_beams == 1 and given["temperature"] != 0
        drawn = {name: getattr(defaults, name, None) if value is None else value for name, value in given.items()}
        penalty = arguments.repetition_penalty or defaults.repetition_penalty or 1.0
        own = defaults.stop_strings or []
        return cls(
            do_sample=do_sample,
            **(drawn if do_sample else dict.fromkeys(SAMPLING)),
            repetition_penalty=penalty,
            max_new_tokens=arguments.max_new_tokens,
            stop=tuple(dict.fromkeys([*(arguments.stop or ()), *([own] if isinstance(own, str) else own)])),
            seed=arguments.seed,
            num_beams=num_beams,
            num_return_sequences=getattr(arguments, "num_return_sequences", 1),
            use_mtp=arguments.use_mtp,
        )

    def processors(self, streams: Sequence[random.Random]) -> LogitsProcessorList:
        """What `generate` puts the scores through, behind the model's own; one stream for each row of the batch."""
        if not self.do_sample:
            return LogitsProcessorList()
        values = [(getattr(self, name), make, acts) for name, make, acts in WARPERS]
        warpers = [make(value) for value, make, acts in values if value is not None and acts(value)]
        return LogitsProcessorList([*warpers, Draw(streams)])

    def stream(self, *place: int) -> random.Random:
        """The random numbers of one completion, by its place: prompt and number, or turn."""
        return random.Random(" ".join(map(str, (self.seed, *place))))

    @property
    def shown(self) -> str:
        """The settings in a line for people."""
        found = {name: getattr(self, name) for name in SAMPLING if getattr(self, name) is not None}
        how = "beam search" if self.num_beams > 1 else "drawn" if self.do_sample else "the likeliest token"
        found |= {"seed": self.seed} if self.do_sample else {}
        found |= {"num_beams": self.num_beams} if self.num_beams > 1 else {}
        found |= {"repetition_penalty": self.repetition_penalty} if self.repetition_penalty != 1 else {}
        guessed = ["guessed ahead"] if self.use_mtp else []
        return ", ".join([how, *(f"{name} {value}" for name, value in found.items()), *guessed])


class Draw(LogitsProcessor):
    """Leaves one token of each row, drawn by the scores with the row's own random numbers, one for each place in the
    text: a place that is guessed, and then checked, is drawn alike."""

    def __init__(self, streams: Sequence[random.Random]):
        self.streams, self.first = streams, -1
        self.numbers: list[list[list[float]]] = []  # of each place from the first one on, [B, 1]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[B, V] scores; 0 for the drawn token and minus infinity for all others."""
        shares = scores.softmax(-1)
        sums = shares.cumsum(-1)
        self.first = input_ids.shape[1] if self.first < 0 else self.first
        place = input_ids.shape[1] - self.first
        while len(self.numbers) <= place:
            self.numbers.append([[stream.randrange(STEPS) / STEPS] for stream in self.streams])
        points = torch.tensor(self.numbers[place], dtype=sums.dtype, device=sums.device) * sums[:, -1:]
        found = torch.searchsorted(sums, points, right=True).clamp(max=sums.shape[-1] - 1)
        # Rounding at the upper end, or of a parallel sum, may point to a token that was ruled out.
        found = torch.where(shares.gather(1, found) > 0, found, shares.argmax(-1, keepdim=True))
        return torch.full_like(scores, -torch.inf).scatter(1, found, 0.0)


class Finite(LogitsProcessor):
    """Notes which rows ever had scores that are no numbers, without waiting for the device."""

    def __init__(self) -> None:
        self.broken: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[B, V] scores, as they are."""
        found = ~(scores < torch.inf).all(-1)
        self.broken = found if self.broken is None else self.broken | found
        return scores

    def first(self, count: int) -> int | None:
        """The first of `count` prompts, each with as many rows, that had such scores."""
        rows = [] if self.broken is None else self.broken.view(count, -1).any(1).nonzero().flatten().tolist()
        return rows[0] if rows else None


def settled(
    defaults: GenerationConfig, sampling: Sampling, pad: int, ends: Sequence[int], room: int, is_output: bool = False
) -> GenerationConfig:
    """The model's own generation config with these settings in place of its own.

    Args:
        pad: the id that fills rows; ends: those that end a text; room: tokens that the positions leave.
        is_output: `generate` then gives its cache beside the ids.
    """
    changes = dict.fromkeys((*SAMPLING, "max_length", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"))
    changes |= ONLY_IDS | {"do_sample": False, "num_beams": sampling.num_beams}
    changes |= {"return_dict_in_generate": is_output, "use_mtp": sampling.use_mtp or None}
    changes |= {"num_return_sequences": sampling.num_return_sequences if sampling.num_beams > 1 else 1}
    changes |= {
        "repetition_penalty": sampling.repetition_penalty,
        "pad_token_id": pad,
        "eos_token_id": list(ends) or None,
    }
    changes |= {"max_new_tokens": min(sampling.max_new_tokens, room)}
    return GenerationConfig.from_dict(defaults.to_dict() | changes)
