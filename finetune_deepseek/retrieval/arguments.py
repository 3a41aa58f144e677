"""What the embedding task is told: which queries and passages, and how a model makes vectors of them."""

from dataclasses import dataclass, field

from ..data.arguments import DataArguments

# Flags that set fields of the model's config.
CONFIG_FLAGS = ("pooling", "query_prefix", "passage_prefix", "matryoshka_sizes", "contrastive_temperature")
# What is fused, in the order of its weights: BM25 of words, BM25 of parts of words, the vectors of a model.
FUSED = ("bm25", "parts", "dense")


@dataclass
class EmbeddingArguments(DataArguments):
    """Which queries and passages, and how the model makes vectors of them."""

    SAVED = ("max_query_length", "max_passage_length", "fusion_weights")
    FIRST = (*DataArguments.FIRST, "query_column", "passage_column", "negatives_column", "pooling")
    EXAMPLES = """examples:
  deepseek-hf finetune embedding --preset tiny_v3 --data_dir questions --query_column question \\
      --passage_column context --output_dir runs/retriever
      a small model from scratch on your questions and passages
  deepseek-hf finetune embedding --model_name_or_path deepseek-ai/DeepSeek-V2-Lite --use_peft --pooling last_token \\
      --data_dir questions --output_dir runs/retriever
      LoRA on a pretrained model"""

    query_column: str = field(default="query", metadata={"help": "Column of the query."})
    passage_column: str = field(default="passage", metadata={"help": "Column of the passage that answers it."})
    negatives_column: str | None = field(
        default=None, metadata={"help": "Column of a passage or a list of passages that don't (hard negatives)."}
    )
    max_query_length: int = field(default=64, metadata={"help": "Longer queries are cut to so many tokens."})
    max_passage_length: int = field(default=256, metadata={"help": "The same for passages."})
    pooling: str | None = field(
        default=None, metadata={"help": "mean, last_token or latent: how tokens become one vector; mean if new."}
    )
    query_prefix: str | None = field(default=None, metadata={"help": "Stands before each query, saved in the model."})
    passage_prefix: str | None = field(default=None, metadata={"help": "The same for passages."})
    matryoshka_sizes: list[int] | None = field(
        default=None, metadata={"help": "Sizes that vectors may be cut to, trained together.", "metavar": "SIZE"}
    )
    contrastive_temperature: float | None = field(
        default=None, metadata={"help": "Divides the products of the vectors in the loss; 0.05 if new."}
    )
    lexical_baselines: bool = field(
        default=True, metadata={"help": "Score TF-IDF, BM25 and the fused ranking beside the model."}
    )
    fusion_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Weights of BM25, BM25 of parts of words and vectors in the fused ranking, saved with the model; "
            "chosen on the validation split (--do_eval) if not given.",
            "metavar": "WEIGHT",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = self.fusion_weights
        if weights is not None and (len(weights) != len(FUSED) or not sum(weights)):
            raise ValueError("--fusion_weights: three numbers are needed, none below 0 and not all 0.")
