"""Prompts to completions, in batches of like length; each completion as if it were alone (see sampling.py)."""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ...training.batches import batches_with_room
from .language_model import LanguageModel
from .sampling import Finite, Sampling, settled

BATCHES = 8  # of a window: prompts are sorted by length among so many batches, and written when all of them are done
TAIL = 16  # tokens before a stop text's own that decoding may need to see


class Completion(NamedTuple):
    """A text that a model wrote; `tokens` counts its end of text too."""

    text: str
    finish_reason: Literal["stop", "length"]  # ended by the model or a stop text, or by max_new_tokens or positions
    tokens: int


class Job(NamedTuple):
    """A prompt to be continued once (with beams, as often as asked)."""

    place: int  # of the prompt in the input, from 0
    number: int  # of the completion among the prompt's, from 0
    ids: Sequence[int]


class StopTexts(StoppingCriteria):
    """Ends a row in whose completion a stop text stands."""

    def __init__(self, lm: LanguageModel, stops: Sequence[str], prompt_length: int):
        self.lm, self.stops, self.prompt_length = lm, stops, prompt_length
        self.tail = max(len(stop.encode()) for stop in stops) + TAIL

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """[B, S + N] ids -> [B] whether a row is done."""
        tails = input_ids[:, self.prompt_length :][:, -self.tail :].tolist()
        texts = [self.lm.tokenizer.decode(tail, skip_special_tokens=True) for tail in tails]
        return torch.tensor([any(stop in text for stop in self.stops) for text in texts], device=input_ids.device)


@dataclass
class Generator:
    """Continues prompts with one model under one set of settings.

    Args:
        batch_size: completions that are written at once.
        report: is told how many of them a batch has finished.
    """

    lm: LanguageModel
    sampling: Sampling
    batch_size: int = 32
    report: Callable[[int], Any] = lambda count: None
    tokens: int = 0  # written so far
    seconds: float = 0.0
    ends: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.ends = frozenset(self.lm.ends)

    @property
    def copies(self) -> int:
        """How many rows of a batch a prompt has; beams give their completions by themselves."""
        return 1 if self.sampling.num_beams > 1 else self.sampling.num_return_sequences

    @property
    def window(self) -> int:
        """Prompts that are sorted by length among themselves."""
        return max(1, BATCHES * self.batch_size // self.copies)

    def check_lengths(self, prompts: Sequence[Sequence[int]], names: Sequence[str]) -> None:
        """Refuse prompts that leave no room.

        Raises:
            ValueError: with the name and length of the first, and how many there are.
        """
        limit = self.lm.max_positions
        long = [n for n, ids in enumerate(prompts) if limit and len(ids) >= limit]
        if long:
            others = f" (and {len(long) - 1:,} others)" if len(long) > 1 else ""
            raise ValueError(
                f"{names[long[0]]}: {len(prompts[long[0]]):,} tokens leave no room in the model's {limit:,} "
                f"positions{others}; shorten the prompt."
            )

    def completions(self, prompts: Sequence[Sequence[int]], start: int = 0) -> Iterator[list[Completion]]:
        """The completions of each prompt from number `start` on, in order.

        Windows lie alike wherever one starts, so that what goes on where another run ended has the same batches.

        Raises:
            ValueError: if scores are no numbers, or a batch doesn't fit into memory.
        """
        size = self.window
        for first in range(start - start % size, len(prompts) if start < len(prompts) else 0, size):
            jobs = [
                Job(place, number, prompts[place])
                for place in range(first, min(first + size, len(prompts)))
                for number in range(self.copies)
            ]
            found = self._window(jobs)
            yield from (found[place] for place in sorted(found) if place >= start)

    def _window(self, jobs: Sequence[Job]) -> dict[int, list[Completion]]:
        written: dict[int, list[Completion]] = {}
        lengths, most = [len(job.ids) for job in jobs], self.sampling.max_new_tokens
        for batch, room in batches_with_room(lengths, self.batch_size, most, self.lm.max_positions):
            begun = time.perf_counter()
            for number, completions in zip(batch, self._batch([jobs[number] for number in batch], room), strict=True):
                written[number] = completions
            self.seconds += time.perf_counter() - begun
            self.report(len(batch))
        found: dict[int, list[Completion]] = {job.place: [] for job in jobs}
        for number, job in enumerate(jobs):
            found[job.place] += written[number]
        return found

    def _batch(self, jobs: Sequence[Job], room: int) -> list[list[Completion]]:
        length = max(len(job.ids) for job in jobs)
        ids = torch.tensor([[self.lm.pad] * (length - len(job.ids)) + [*job.ids] for job in jobs])
        mask = torch.tensor([[0] * (length - len(job.ids)) + [1] * len(job.ids) for job in jobs])
        finite, sampling = Finite(), self.sampling
        processors = sampling.processors([sampling.stream(job.place + 1, job.number) for job in jobs])
        stops = [StopTexts(self.lm, sampling.stop, length)] if sampling.stop else []
        try:
            output = self.lm.generate(
                ids,
                mask,
                generation_config=settled(self.lm.defaults, sampling, self.lm.pad, self.lm.ends, room),
                logits_processor=LogitsProcessorList([finite, *processors]),
                stopping_criteria=StoppingCriteriaList(stops),
            )
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"--batch_size {self.batch_size}: the device's memory doesn't hold {len(jobs)} texts of {length:,} "
                "tokens and more; lower it."
            ) from error
        if (broken := finite.first(len(jobs))) is not None:
            raise self.lm.broken(f"prompt {jobs[broken].place + 1}")
        found = [self._completion(row) for row in output[:, length:].tolist()]
        self.tokens += sum(completion.tokens for completion in found)
        each = len(found) // len(jobs)
        return [found[number * each : (number + 1) * each] for number in range(len(jobs))]

    def _completion(self, ids: list[int]) -> Completion:
        """What a row of new ids says: up to its end of text or first stop text, and without what fills it behind."""
        end = next((place for place, token in enumerate(ids) if token in self.ends), None)
        ids = ids if end is None else ids[: end + 1]
        text = self._decode(ids)
        if any(stop in text for stop in self.sampling.stop):
            count = 1 + bisect_left(range(len(ids)), True, key=lambda last: self._stops_in(ids[: last + 1]))
            cut = min(place for stop in self.sampling.stop if (place := text.find(stop)) >= 0)
            return Completion(text[:cut], "stop", min(count, len(ids)))
        return Completion(text, "length" if end is None else "stop", len(ids))

    def _decode(self, ids: Sequence[int]) -> str:
        return self.lm.tokenizer.decode(ids, skip_special_tokens=True)

    def _stops_in(self, ids: Sequence[int]) -> bool:
        text = self._decode(ids)
        return any(stop in text for stop in self.sampling.stop)
