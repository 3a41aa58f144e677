"""What language modelling is told: which documents, how they are packed, what is counted and shown."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ..data.arguments import FORMATS, DataArguments


@dataclass
class LanguageModelingArguments(DataArguments):
    """Which documents, how they are packed, and what is counted of held-out ones."""

    FIRST = (*DataArguments.FIRST, "document_separator", "streaming", "max_seq_length")
    SAVED: ClassVar[tuple[str, ...]] = ("max_seq_length",)
    EXAMPLES = """examples:
  deepseek-hf pretrain --train_file corpus.txt --document_separator blank_line --validation_share 0.05 \\
      --preset tiny_v3 --output_dir runs/small
      a small model from random weights; its tokenizer is trained on the text
  deepseek-hf pretrain --dataset_name HuggingFaceFW/fineweb-edu --dataset_config_name sample-10BT --streaming \\
      --tokens_budget 100000000 --model_name_or_path deepseek-ai/DeepSeek-V2-Lite --output_dir runs/continued
      a pretrained model goes on, with data that are read as they are used
  deepseek-hf evaluate language_modeling runs/small --validation_file other.txt
      perplexity and bits per byte of other text"""

    train_file: list[str] | None = field(
        default=None,
        metadata={"help": ".txt, .text or .md (see --document_separator), or " + FORMATS, "metavar": "FILE"},
    )
    text_column: str = field(default="text", metadata={"help": "Column of the documents; text files have none."})
    document_separator: str = field(
        default="file",
        metadata={
            "help": "Where documents of a text file end: file (each is one), line, blank_line, or the line that "
            "stands between two, such as <|endoftext|>."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read training data as they are used, in their order."},
    )
    validation_share: float | None = field(
        default=None,
        metadata={
            "help": "Without validation data, hold out this share at the end of the training documents, of a single "
            "document the end of its text."
        },
    )
    max_seq_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a block, and of a window of evaluation; without it 1024, or the model's positions."
        },
    )
    packing: Literal["sequential", "best_fit"] = field(
        default="sequential",
        metadata={"help": "Fill blocks in the documents' order, or so that few documents are cut."},
    )
    tokens_budget: int | None = field(
        default=None, metadata={"help": "Train on so many tokens, in place of --max_steps; whole blocks are counted."}
    )
    eval_stride: int | None = field(
        default=None,
        metadata={
            "help": "Tokens between the beginnings of two windows of evaluation; less than --max_seq_length - 1 gives "
            "each token more of its past."
        },
    )
    max_continuations: int = field(
        default=20, metadata={"help": "Texts of the test split that are continued; 0 for none."}
    )
    prompt_tokens: int = field(default=32, metadata={"help": "Tokens that a continuation begins with."})
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens of a continuation, at most."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.names_data:
            raise ValueError("Name data by --dataset_name, --data_dir, or --train_file and the like.")
        if self.streaming and self.validation_share:
            raise ValueError(
                "--validation_share needs to know where the data end; with --streaming name a validation file."
            )
        if self.validation_share and self.validation_file:
            raise ValueError("--validation_share is for data without --validation_file; keep one of the two.")
        if not self.document_separator.strip():
            raise ValueError(
                "--document_separator is empty: write file, line, blank_line, or the line between documents."
            )
