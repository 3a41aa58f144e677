"""Self-speculation: the model's own prediction layers or draft stages guess tokens, and one forward of it checks them.

`generate(..., use_mtp=True)` asks for it. transformers' assisted generation checks, crops the cache of what was wrong,
and samples by rejection, so that greedily the same tokens come and otherwise tokens of the same distribution (arXiv
2211.17192). Here is what guesses, for one sequence of which the trunk has read T tokens, and token T is known:

    prediction layers (mtp.py)    layer d reads states and token i + d of every i: token T + d, from its last row
    draft stages (dspark.py)      the last contexts and token T: tokens T + 1 .. T + b, after each other

Letters: S tokens of the trunk's last forward, s of them to be read here, D hidden width, V vocabulary.
"""

import copy
from typing import Any

import torch
from transformers.cache_utils import DynamicCache
from transformers.generation.candidate_generator import CandidateGenerator

from .configuration_deepseek import DeepSeekConfig


class SelfDrafter(CandidateGenerator):
    """What both have: states of checked tokens, and how a token is chosen."""

    requires_model_outputs = True
    model_kwargs_overrides = {"output_draft_states": True}

    def __init__(self, model: Any, generation_config: Any, logits_processor: Any):
        self.model, self.processor = model, logits_processor
        self.do_sample = generation_config.do_sample
        self.most = generation_config.num_assistant_tokens or model.config.vocab_size
        self.threshold = generation_config.assistant_confidence_threshold or 0.0
        self.states: torch.Tensor | None = None

    def get_candidates(  # type: ignore[override]  # the words of who asks in this mode
        self,
        input_ids: torch.Tensor,
        model_kwargs: dict[str, Any] | None = None,
        model_outputs: Any = None,
        is_first_iteration: bool = False,
        n_last_matches: int = 0,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ids [1, T + 1] -> the same with guesses behind them, and the logits [1, guesses, V] these were chosen by;
        in the first iteration, where the trunk has not read the prompt, none.

        Args:
            model_outputs: of the trunk's last forward; n_last_matches: how many guesses of it were right.
        """
        if is_first_iteration:
            return input_ids, None
        new = model_outputs.draft_states
        if self.states is not None:
            new = new[:, : n_last_matches + 1]
        mask = (model_kwargs or {}).get("attention_mask")
        guessed, logits = self.guess(input_ids, new, None if mask is None else mask[:, : mask.shape[1] - 1])
        if guessed.shape[1] == 0:
            return input_ids, None
        return torch.cat((input_ids, guessed), dim=1), logits

    def guess(
        self, input_ids: torch.Tensor, new: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Guesses [1, count] and logits [1, count, V].

        Args:
            new: [1, s, ...] states that are not in `states` yet; mask: [1, T], 0 at padding.
        """
        raise NotImplementedError

    def remember(self, new: torch.Tensor, count: int) -> torch.Tensor:
        """States before and new ones [1, s, ...]; the last `count` are kept for the next time."""
        states = new if self.states is None else torch.cat((self.states, new), dim=1)
        self.states = states[:, max(states.shape[1] - count, 0) :]
        return states

    def choose(self, ids: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids so far, logits [1, V] -> the next token [1, 1], and the logits after `generate`'s processors."""
        logits = self.processor(ids, logits.float())
        if self.do_sample:
            return torch.multinomial(logits.softmax(-1), 1), logits
        return logits.argmax(-1, keepdim=True), logits

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """Nothing: how many tokens are guessed is the model's matter."""


class StageDrafter(SelfDrafter):
    """By draft stages. They know how sure they are: nothing is guessed from the first token on that is less likely to
    be right than `assistant_confidence_threshold`."""

    def guess(self, input_ids, new, mask):
        """As above."""
        trunk, last, ids = self.model.model, self.model.model.draft_stages[-1], input_ids
        context = self.remember(trunk.draft_context(new), self.model.config.sliding_window)
        context, count = self.states, self.states.shape[1]
        anchor = torch.tensor([[count - 1]], device=ids.device)
        mask = None if mask is None else mask[:, -count:]
        states = trunk.draft(context, trunk.embed_tokens(ids[:, -1:]), anchor, mask)[:, 0]  # [1, b, D]
        scores, chosen_by, odds = self.model.lm_head(last.shared_head(states)).float(), [], []
        for j in range(min(states.shape[1], self.most)):
            bias, markov = last.markov_head(ids[:, -1])
            odds.append(last.confidence_head(states[:, j], markov))
            token, logits = self.choose(ids, scores[:, j] + bias)
            ids = torch.cat((ids, token), dim=1)
            chosen_by.append(logits)
        is_sure = torch.stack(odds, dim=1).sigmoid() >= self.threshold
        sure = int(is_sure.int().cumprod(-1).sum())
        return ids[:, input_ids.shape[1] :][:, :sure], torch.stack(chosen_by, dim=1)[:, :sure]


class LayerDrafter(SelfDrafter):
    """By prediction layers, one token each. All of them read the same rows and have a cache, of which the rows that
    stood on guesses are taken back: the last layer's token of such a row may have been wrong."""

    def __init__(self, model: Any, generation_config: Any, logits_processor: Any):
        super().__init__(model, generation_config, logits_processor)
        config = model.config
        self.layers = list(model.model.layers[config.num_hidden_layers :])
        self.cache = cache_of_predictions(config)

    def guess(self, input_ids, new, mask):
        """As above."""
        trunk, config, ids, chosen_by = self.model.model, self.model.config, input_ids, []
        if new.shape[1] >= ids.shape[1] and self.states is None:
            raise ValueError("use_mtp: prediction layers read token ids; give input_ids, not inputs_embeds")
        spare = len(self.layers) - 1
        states = self.remember(new, spare)
        count, seen = states.shape[1], self.cache.get_seq_length()
        embeds = trunk.embed_tokens(ids[:, -count:])
        positions = torch.arange(seen, seen + count, device=ids.device).unsqueeze(0)
        common = {
            "attention_mask": trunk.mask_of(
                embeds, None if mask is None else mask[:, -seen - count :], positions, self.cache
            ),
            "position_ids": positions,
            "position_embeddings": trunk.rotary_emb(embeds, positions),
            "cache": self.cache,
        }
        for layer in self.layers:
            state = layer(states, trunk.embed_tokens(ids[:, -count:]), **common)
            predicted = layer.predicted(state)
            token, logits = self.choose(ids, self.model.lm_head(predicted[:, -1]))
            ids = torch.cat((ids, token), dim=1)
            chosen_by.append(logits)
            states = predicted if config.predictions_read_norm else state
        for layer in self.cache.layers[-len(self.layers) :]:
            layer.crop(-min(spare, count))
        most = min(self.most, len(self.layers))
        return ids[:, input_ids.shape[1] :][:, :most], torch.stack(chosen_by, dim=1)[:, :most]


def cache_of_predictions(config: DeepSeekConfig) -> DynamicCache:
    """A cache with a layer for each prediction layer, at its place. Masks ask the first layer of a cache how long it
    is, so the first prediction layer's stands in the places of the trunk's too."""
    first, count = config.num_hidden_layers, config.num_nextn_predict_layers
    deeper = copy.copy(config)
    deeper.num_hidden_layers = first + count
    deeper.layer_specs = [list(config.prediction_spec)] * (first + count)
    if config.compress_ratios is not None:
        deeper.compress_ratios = [0] * (first + count)
    cache = DynamicCache(config=deeper)
    cache.layers[:first] = [cache.layers[first]] * first
    return cache


DRAFTERS = {"add": LayerDrafter, "mhc": LayerDrafter, "dspark": StageDrafter, "dspark_shifted": StageDrafter}
