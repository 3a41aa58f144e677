"""`deepseek-hf answer`: questions answered from a folder or file of texts, each with the passage that says so."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.arguments import check_path
from ..data.files import json_line, read_lines, write_text
from ..data.hub import check_named, check_source
from ..question_answering.arguments import AnswerArguments
from .parsing.verbs import parse_verb

if TYPE_CHECKING:
    from ..question_answering.answering import Answer

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


def shown(answer: "Answer") -> str:
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
    check_path("knowledge", arguments.knowledge, "file or folder")
    if name:
        check_source(name)
    for flag in ("retriever", "reranker"):
        if getattr(arguments, flag):
            check_named(flag, getattr(arguments, flag))
    # Imported here, since torch and transformers take seconds and bad input needs neither.
    from tqdm import tqdm
    from transformers.utils.logging import disable_progress_bar

    from ..question_answering.answering import Reader, SentenceReader, answer_questions
    from ..retrieval.passage_index import PassageIndex, Retriever
    from ..retrieval.reranker import Reranker

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
