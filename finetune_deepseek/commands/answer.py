"""`deepseek-hf answer`: questions answered from a folder or file of texts, each with the passage that says so."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from ..data.files import json_line, read_lines, write_text
from ..data.ranges import check_ranges
from ..question_answering.answering import Answer, Reader, SentenceReader, answer_questions
from ..retrieval.passage_index import PassageIndex, Retriever
from ..retrieval.reranker import Reranker
from .flags import parse_verb

EXAMPLES = """examples:
  deepseek-hf answer runs/question_answering --knowledge notes "Where does Ann live?"
  deepseek-hf answer --knowledge notes.md "安住在哪里？"
      without a model: the sentence of the best passage that has most words of the question
  deepseek-hf answer runs/question_answering --knowledge notes --input questions.txt --output answers.jsonl
  deepseek-hf answer runs/question_answering --knowledge notes --retriever runs/embedding \\
      --reranker runs/reranker "Where does Ann live?"

A reranker is trained on rows of question, passage and label (no, yes):
  deepseek-hf finetune classification --preset tiny_v3 --data_dir pairs --text_column question \\
      --text_pair_column passage --output_dir runs/reranker"""

NONE = "no answer"

AROUND = 60  # characters shown on each side of an answer


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


def shown(answer: Answer) -> str:
    """An answer as lines for people."""
    lines = [f"{answer.answer or NONE}   (score {answer.score:.2f})"]
    if answer.start is not None and answer.answer:
        end = answer.start + len(answer.answer)
        before, after = answer.passage[: answer.start], answer.passage[end:]
        before = ("…" if len(before) > AROUND else "") + before[-AROUND:]
        after = after[:AROUND] + ("…" if len(after) > AROUND else "")
        text = f"{before}[{answer.answer}]{after}"
    else:
        text = answer.passage[: 2 * AROUND] + ("…" if len(answer.passage) > 2 * AROUND else "")
    if answer.source:
        lines.append(f"  {answer.source}: {' '.join(text.split())}")
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> tuple[str, AnswerArguments]:
    """The model ("" for none) and the arguments.

    Raises:
        ValueError: with one line, for flags that don't fit.
    """
    words = list(argv)
    if words and words[0].startswith("--") and words[0] != "--help":
        words = ["", *words]
    return parse_verb(
        "answer", AnswerArguments, words, '[MODEL] --knowledge PATH [--flag value ...] "QUESTION" ...', EXAMPLES,
        words="questions",
    )  # fmt: skip


def answer(argv: Sequence[str]) -> None:
    """Do what `deepseek-hf answer` is followed by.

    Raises:
        ValueError: with one line, for bad input.
    """
    name, arguments = parse(argv)
    if arguments.output and not Path(arguments.output).parent.is_dir():
        raise ValueError(f"--output {arguments.output}: there is no such folder to write to.")
    questions = arguments.questions or [line for line in read_lines(arguments.input) if line.strip()]
    if not questions:
        raise ValueError("There is no question; write it at the end, in quotes, or name a file by --input.")
    disable_progress_bar()  # the bar of loading weights; ours counts questions
    retriever = Retriever.load(arguments.retriever) if arguments.retriever else None
    reader = Reader.load(name, arguments.model_revision, arguments.dtype, arguments.batch_size) if name else None
    reranker = Reranker.load(arguments.reranker) if arguments.reranker else None
    use_faiss = arguments.vector_search == "faiss"
    index = PassageIndex.open(arguments.index_folder, arguments.knowledge, retriever, use_faiss=use_faiss)
    with tqdm(total=len(questions), desc="answer", unit="question", file=sys.stderr) as bar:
        answers = answer_questions(
            questions, index, reader or SentenceReader(), arguments.k, arguments.mode, reranker, arguments.min_score,
            bar.update,
        )  # fmt: skip
    if arguments.output:
        lines = [json_line(asdict(found)) for found in answers]
        write_text(Path(arguments.output), "".join(lines))
        return
    for found in answers:
        heading = f"{found.question}\n" if len(answers) > 1 else ""
        sys.stdout.buffer.write(f"{heading}{shown(found)}\n".encode())
    sys.stdout.flush()
