"""What classification is told: which texts, and what to predict for them."""

from dataclasses import dataclass, field
from typing import Literal

from ..data.arguments import DataArguments

MULTI_LABEL = "multi_label_classification"  # transformers' word


@dataclass
class ClassificationArguments(DataArguments):
    """Which texts, and what to predict for them."""

    FIRST = (*DataArguments.FIRST, "text_column", "label_column", "problem_type", "max_length")
    EXAMPLES = """examples:
  deepseek-hf finetune classification --preset tiny_v3 --data_dir song_ci_zh --label_column author \\
      --most_frequent_labels 20 --output_dir runs/authors
      who wrote the poem: a small model from scratch on your files
  deepseek-hf finetune classification --model_name_or_path deepseek-ai/DeepSeek-V2-Lite --use_peft \\
      --dataset_name fancyzhx/ag_news --balance weights --output_dir runs/news
      LoRA on a pretrained model and a data set of the Hub"""

    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    text_pair_column: str | None = field(
        default=None,
        metadata={"help": "Column of a second text, read behind the first: question and passage for a reranker."},
    )
    label_column: str = field(default="label", metadata={"help": "Column of the label, the labels or the number."})
    problem_type: Literal["auto", "single_label_classification", "multi_label_classification", "regression"] = field(
        default="auto",
        metadata={
            "help": "auto takes lists for several labels, fractions for regression, all else for one label, which is "
            "its text: 01 is not 1."
        },
    )
    label_separator: str | None = field(
        default=None, metadata={"help": "What stands between several labels in one text, as csv files have them."}
    )
    most_frequent_labels: int | None = field(
        default=None, metadata={"help": "Leave out rows whose label isn't among the training rows' N most frequent."}
    )
    balance: Literal["none", "weights", "sampler"] = field(
        default="none",
        metadata={
            "help": "Against unequal classes: weigh the loss by them, or draw rows of each class equally often."
        },
    )
    max_length: int = field(default=256, metadata={"help": "Tokens of a text. Longer ones are cut, and counted."})
    tfidf_baseline: bool = field(
        default=True, metadata={"help": "Score TF-IDF + a linear model beside the model (--do_predict)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.names_data:
            raise ValueError("Name data by --dataset_name, --data_dir, or --train_file and the like.")
        if self.label_separator and self.problem_type not in ("auto", MULTI_LABEL):
            raise ValueError(f"--label_separator separates several labels, but --problem_type is {self.problem_type}.")
