"""An embedding model as the module of a SentenceTransformer, which MTEB and others evaluate and use.

    SentenceTransformer(modules=[SentenceModule.from_model(model, tokenizer)], prompts=prompts(model.config))
    write_modules("runs/retriever")
    SentenceTransformer("runs/retriever", trust_remote_code=True)   # it asks so for modules of other packages

Texts become tokens as in encoding.py; the prompts `query` and `document` are the model's prefixes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from configuration_deepseek import DeepSeekConfig
from modeling_deepseek import DeepSeekForEmbedding

from ..data.files import write_json
from ..training.saved import Saved
from .encoding import token_ids
from .passage_index import Retriever

try:
    from sentence_transformers import __version__
    from sentence_transformers.base.modules import InputModule
except ImportError as error:
    raise ImportError(
        'sentence-transformers is not installed: pip install "deepseek-hf[sentence-transformers]"'
    ) from error


def prompts(config: DeepSeekConfig) -> dict[str, str]:
    """The prefixes under sentence-transformers' names: `encode_query` and `encode_document` look for them."""
    return {"query": config.query_prefix, "document": config.passage_prefix}


class SentenceModule(InputModule):  # type: ignore[misc]
    """`sentence_embedding` [B, D] of texts."""

    save_in_root = True

    def __init__(self, model: DeepSeekForEmbedding, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.max_seq_length = model.config.max_position_embeddings

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Token ids and mask, [B, S] each."""
        rows, _ = token_ids(self.tokenizer, inputs, prompt or "", self.max_seq_length)
        texts = [torch.tensor(row) for row in rows]
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        return {
            "input_ids": pad_sequence(texts, batch_first=True, padding_value=pad),
            "attention_mask": pad_sequence([torch.ones_like(text) for text in texts], batch_first=True),
        }

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        output = self.model(input_ids=features["input_ids"], attention_mask=features["attention_mask"])
        return features | {"sentence_embedding": output.embeddings}

    def get_embedding_dimension(self) -> int:
        return self.model.config.hidden_size

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        self.model.save_pretrained(output_path)
        self.tokenizer.save_pretrained(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> "SentenceModule":
        retriever = Retriever.load(model_name_or_path)
        return cls(retriever.model, retriever.tokenizer)


def write_modules(folder: str | Path) -> None:
    """Write beside a saved embedding model what SentenceTransformer(folder, trust_remote_code=True) opens it by."""
    saved = Saved.open(None, str(folder)).require_model()
    config = DeepSeekConfig.from_dict(saved.config)
    kind = "finetune_deepseek.sentence_module.SentenceModule"  # a name that stays, whatever room this file is in
    write_json(
        Path(folder) / "config_sentence_transformers.json",
        {
            "__version__": {"sentence_transformers": __version__},
            "prompts": prompts(config),
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    write_json(Path(folder) / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": kind}])  # type: ignore[arg-type]
