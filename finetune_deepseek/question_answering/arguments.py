"""What question answering is told: which questions and how passages are read; and what `answer` is."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..data.arguments import DataArguments
from ..data.ranges import check_ranges

NBEST_FILE = "nbest_predictions.json"


@dataclass
class QuestionAnsweringArguments(DataArguments):
    """Which questions, and how passages are read."""

    SAVED = (
        *("answer_mode", "version_2_with_negative", "null_score_diff_threshold", "question_placement"),
        *("max_seq_length", "doc_stride", "max_question_length", "max_answer_length"),
        *("characters_apart", "convert_to_simplified", "mark_matches"),
    )
    FIRST = (*DataArguments.FIRST, "answer_mode", "version_2_with_negative", "max_seq_length")
    RECIPE = Path(__file__).with_name("recipe.yaml")
    EXAMPLES = """examples:
  deepseek-hf finetune question_answering
      the built-in recipe: facts about territories that training didn't see, into runs/question_answering
  deepseek-hf finetune question_answering --preset tiny_v3 --train_file train-v2.0.json \\
      --validation_file dev-v2.0.json --version_2_with_negative --output_dir runs/squad
      a small model from scratch on SQuAD 2
  deepseek-hf finetune question_answering --model_name_or_path deepseek-ai/DeepSeek-V2-Lite --use_peft \\
      --answer_mode generative --dataset_name rajpurkar/squad --output_dir runs/written
      LoRA on a pretrained model that writes its answers"""

    answer_mode: Literal["extractive", "generative"] = field(
        default="extractive", metadata={"help": "Point at the answer in the passage, or write it."}
    )
    version_2_with_negative: bool = field(
        default=False, metadata={"help": "Some questions have no answer, as in SQuAD 2."}
    )
    null_score_diff_threshold: float = field(
        default=0.0, metadata={"help": "Give no answer where its score is above the best answer's by more than this."}
    )
    n_best_size: int = field(default=20, metadata={"help": f"Answers kept per question, in {NBEST_FILE}."})
    max_answer_length: int = field(default=30, metadata={"help": "Tokens of an answer; a written one's end included."})
    max_seq_length: int = field(
        default=384, metadata={"help": "Tokens of question and passage together; a longer passage is read in windows."}
    )
    doc_stride: int = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Tokens that neighbouring windows share; a third of --max_seq_length if not given."},
    )
    max_question_length: int = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Tokens of a question. Longer ones are cut; 64, or a fourth of --max_seq_length if less."},
    )
    question_placement: Literal["first", "both"] = field(
        default="first", metadata={"help": "The question before the passage, or before and after it."}
    )
    attention_direction: Literal["causal", "prefix", "bidirectional"] | None = field(
        default=None,
        metadata={
            "help": "What a token sees. Without it a saved model's own, else causal; to write answers random weights "
            "get prefix, the prompt seeing itself whole."
        },
    )
    characters_apart: bool = field(
        default=True, metadata={"help": "One token or more for each Chinese character, so that answers end with one."}
    )
    convert_to_simplified: bool = field(
        default=False, metadata={"help": "Convert Traditional Chinese to Simplified, by OpenCC."}
    )
    mark_matches: bool = field(
        default=False,
        metadata={
            "help": "Tell the model which tokens are the passage's, and which of them the question has too: from "
            "random weights few questions don't teach that."
        },
    )
    score_by: Literal["auto", "words", "characters"] = field(
        default="auto",
        metadata={"help": "SQuAD's scores or CMRC's for Chinese; auto takes those if most answers are Chinese."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.doc_stride is None:
            self.doc_stride = self.max_seq_length // 3
        if self.max_question_length is None:
            self.max_question_length = max(1, min(64, self.max_seq_length // 4))
        if self.doc_stride >= self.max_seq_length:
            raise ValueError(
                f"--doc_stride {self.doc_stride}: it must be below --max_seq_length {self.max_seq_length}."
            )
        if self.null_score_diff_threshold and not self.version_2_with_negative:
            raise ValueError("--null_score_diff_threshold has no effect without --version_2_with_negative; add it.")
        wrong = {"extractive": "prefix", "generative": "bidirectional"}[self.answer_mode]
        if self.attention_direction == wrong:
            raise ValueError(f"--attention_direction {wrong} can't be used with --answer_mode {self.answer_mode}.")
        if self.mark_matches and self.answer_mode != "extractive":
            raise ValueError(f"--mark_matches can't be used with --answer_mode {self.answer_mode}; leave it out.")

    @property
    def is_embedded(self) -> bool:
        return not self.names_data


@dataclass
class AnswerArguments:
    """What to ask, where to look, and how to read."""

    knowledge: str | None = field(
        default=None,
        metadata={"help": "Folder or file of texts (.txt, .md, .rst) and tables (json, jsonl, csv, parquet)."},
    )
    index: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the index; it is brought up to date with --knowledge, which may be left out if the "
            "index is there. Without it, a hidden folder beside the knowledge."
        },
    )
    input: str | None = field(default=None, metadata={"help": "UTF-8 file with one question per line."})
    output: str | None = field(default=None, metadata={"help": "File for one JSON object per question."})
    k: int = field(default=5, metadata={"help": "Passages that are read for a question."})
    mode: Literal["bm25", "dense", "fused"] | None = field(
        default=None,
        metadata={
            "help": "Find passages by words, by vectors, or by words, parts of words and vectors; fused with "
            "--retriever, else bm25."
        },
    )
    retriever: str | None = field(
        default=None, metadata={"help": "Embedding model for dense and fused: a folder or a Hub id."}
    )
    vector_search: Literal["torch", "faiss"] = field(
        default="torch", metadata={"help": "What compares vectors; the results are the same."}
    )
    reranker: str | None = field(
        default=None, metadata={"help": "Classifier of question and passage that puts the passages in order."}
    )
    min_score: float = field(default=0.1, metadata={"help": "An answer with a lower score, from 0 to 1, is none."})
    batch_size: int = field(default=8, metadata={"help": "Passages that are read at once."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32", metadata={"help": "Type of the weights; auto takes the checkpoint's."}
    )
    questions: list[str] = field(default_factory=list, init=False)  # the words that are no flags

    def __post_init__(self) -> None:
        if not self.knowledge and not self.index:
            raise ValueError("--knowledge: name the folder or file to answer from.")
        check_ranges(self)
        if self.mode == "dense" and not self.retriever:
            raise ValueError("--mode dense needs --retriever, an embedding model.")
        if self.vector_search == "faiss" and not self.retriever:
            raise ValueError("--vector_search faiss needs --retriever, an embedding model.")
        if self.mode == "bm25" and self.retriever:
            raise ValueError("--retriever has no effect with --mode bm25; leave one of them out.")

    @property
    def index_folder(self) -> Path:
        if self.index:
            return Path(self.index)
        knowledge = Path(self.knowledge or "").resolve()
        return knowledge.with_name(f".{knowledge.name}.{'vectors' if self.retriever else 'words'}.index")
