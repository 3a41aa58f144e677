"""`deepseek-hf answer`: what is found, read, put in order, doubted and refused."""

import gc
import io
import json
import math
import sys

import pytest
import torch

from configuration_deepseek import preset
from finetune_deepseek import __main__ as command
from finetune_deepseek.data.words import pair_text
from finetune_deepseek.question_answering.answering import Reader, SentenceReader, answer_questions
from finetune_deepseek.question_answering.windows import Encoder, Passage
from finetune_deepseek.retrieval.lexical import BM25
from finetune_deepseek.retrieval.passage_index import PassageIndex, Retriever
from finetune_deepseek.retrieval.reranker import Reranker
from modeling_deepseek import DeepSeekForEmbedding, DeepSeekForRecommendation, DeepSeekForSequenceClassification
from tokenization_deepseek import train_tokenizer

from .test_question_answering import PASSAGES, ROWS, learn

pytest.importorskip("bm25s", reason="bm25s is not installed")

QUESTIONS, ANSWERS = [row[2] for row in ROWS], [row[3] for row in ROWS]


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """Folders with an extractive and a generative model that learned the four rows."""
    folder = tmp_path_factory.mktemp("readers")
    for mode in ("extractive", "generative"):
        (folder / mode).mkdir()
        learn(folder / mode, answer_mode=mode, max_answer_length=12)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([text for row in ROWS for text in row[1:3]], 400, "v3")


@pytest.fixture
def knowledge(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    for name, passage in zip(("people.txt", "animals.md"), PASSAGES, strict=True):
        (folder / name).write_text(passage, encoding="utf-8")
    (folder / "sea.txt").write_text("海是蓝色的。山是绿色的。", encoding="utf-8")
    return folder


@pytest.fixture
def main(monkeypatch, capfd):
    """Run `deepseek-hf answer ...`; gives exit code, standard output, standard error."""

    def run(*argv, stdin=""):
        monkeypatch.setattr(sys, "argv", ["deepseek-hf", "answer", *map(str, argv)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capfd.readouterr()
        code = command.main()
        return code, *capfd.readouterr()

    return run


@pytest.mark.parametrize("mode", ["extractive", "generative"])
def test_questions_are_answered_from_their_passages(readers, knowledge, main, tmp_path, mode):
    output = tmp_path / "answers.jsonl"
    argv = (readers / mode / "out", "--knowledge", knowledge, "--min_score", 0, "--output", output)
    code, out, err = main(*argv, *QUESTIONS)
    assert (code, out) == (0, "") and "4/4" in err
    found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [line["question"] for line in found] == QUESTIONS
    assert [line["answer"] for line in found] == ANSWERS
    for line in found:
        assert line["passage"][line["start"] :].startswith(line["answer"])
        assert line["source"] == ("people.txt:1" if line["passage"] == PASSAGES[0] else "animals.md:1")
        assert line["score"] == pytest.approx(line["evidence"] * line["confidence"])
        assert 0 < line["confidence"] <= 1


def test_without_a_model_a_sentence_answers(knowledge, main):
    code, out, _ = main("--knowledge", knowledge, "Where does Bob live?", "山是什么颜色？")
    first, second = out.split("山是什么颜色？\n")
    assert code == 0 and "Bob lives in Oslo." in first and "people.txt:1: Ann lives in Rome. [Bob" in first
    assert second.startswith("山是绿色的。") and "sea.txt:1" in second
    assert main("--knowledge", knowledge, stdin="Bob?\n\n")[1].startswith("Bob lives in Oslo.")


def test_parts_of_words_are_fused_without_a_model(knowledge, main):
    assert "Cid has a red fox." in main("--knowledge", knowledge, "--mode", "fused", "--min_score", 0, "foxes")[1]


def test_thin_evidence_is_no_answer(knowledge, main, tmp_path):
    code, out, _ = main("--knowledge", knowledge, "Quantum chromodynamics?")
    assert (code, out) == (0, "no answer   (score 0.00)\n")
    question = "Which parliament sat in deepest Antarctica nowadays, and why?"
    assert main("--knowledge", knowledge, question)[1].startswith("no answer")
    assert not main("--knowledge", knowledge, question, "--min_score", 0)[1].startswith("no answer")


def test_the_share_of_words_found():
    passages = ["red fox", "red bird", "blue sea"]
    bm25 = BM25(passages)

    def weight(count):
        return math.log(1 + (3 - count + 0.5) / (count + 0.5))

    assert bm25.share_found("red moon", "red fox") == pytest.approx(weight(2) / (weight(2) + weight(0)), rel=1e-6)
    assert bm25.share_found("fox red fox", "red fox") == pytest.approx(1)
    assert bm25.share_found("?!", "red fox") == bm25.share_found("moon", "red fox") == 0


@pytest.mark.parametrize("problem", ["two", "regression", "multi_label_classification"])
def test_a_reranker_puts_passages_in_order(knowledge, tokenizer, tmp_path, problem):
    torch.manual_seed(0)
    fields = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.3}
    kind = {"num_labels": 2} if problem == "two" else {"num_labels": 1, "problem_type": problem}
    model = DeepSeekForSequenceClassification(preset("tiny_v3", **fields, **kind)).eval()
    model.save_pretrained(tmp_path / "reranker")
    tokenizer.save_pretrained(tmp_path / "reranker")
    reranker = Reranker.load(str(tmp_path / "reranker"))
    question = "Where does Bob live? 海"
    scores = reranker.scores(question, PASSAGES, batch_size=2)
    for passage, score in zip(PASSAGES, scores, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(pair_text(question, passage), return_tensors="pt")).logits[0]
        plain = {"two": logits.softmax(-1)[-1], "regression": logits[0].clamp(0, 1)}.get(problem, logits[0].sigmoid())
        assert score == pytest.approx(plain.item(), abs=1e-5)
    index = PassageIndex.open(tmp_path / "index", knowledge)
    (best,) = answer_questions([question], index, SentenceReader(), reranker=reranker, min_score=0)
    passages = [passage.text for passage in index.search(question, 5)]
    scores = reranker.scores(question, passages)
    assert len(passages) == 2 and best.evidence == pytest.approx(max(scores), abs=1e-6)
    assert best.passage == passages[scores.index(max(scores))]


@pytest.mark.parametrize("mode", ["dense", "fused"])
def test_vectors_find_too(knowledge, tokenizer, main, tmp_path, mode):
    torch.manual_seed(0)
    fields = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    DeepSeekForEmbedding(preset("tiny_v3", **fields)).save_pretrained(tmp_path / "retriever")
    tokenizer.save_pretrained(tmp_path / "retriever")
    index = PassageIndex.open(tmp_path / "index", knowledge, Retriever.load(str(tmp_path / "retriever")))
    for found in index.search("Where is Bob?", 2, mode):
        share = index.bm25.share_found("Where is Bob?", found.text)
        vectors = index.retriever.encode(["Where is Bob?"], True) @ index.retriever.encode([found.text], False).T
        cosine = max(0.0, vectors.item())
        assert found.evidence == pytest.approx(cosine if mode == "dense" else (share + cosine) / 2, abs=1e-5)
    argv = ("--knowledge", knowledge, "--retriever", tmp_path / "retriever", "--mode", mode, "--min_score", 0)
    code, out, _ = main(*argv, "--index", tmp_path / "index", "Where does Bob live?")
    assert code == 0 and "(score 0." in out
    if mode == "fused":  # what a retriever is used for without --mode
        plain = (word for word in argv if word not in ("--mode", "fused"))
        assert main(*plain, "--index", tmp_path / "index", "Where does Bob live?")[:2] == (0, out)
    pytest.importorskip("faiss", reason="faiss is not installed")
    assert main(*argv, "--vector_search", "faiss", "--index", tmp_path / "index", "Where does Bob live?")[:2] == (
        0,
        out,
    )
    _, _, error = main("--knowledge", knowledge, "--index", tmp_path / "index", "Where?")
    assert "this index has vectors of a model and none is named" in error


def test_the_index_is_kept_and_brought_up_to_date(knowledge, main):
    assert "3 new" in main("--knowledge", knowledge, "Bob?")[2]
    (knowledge / "people.txt").write_text("Bob lives in Bergen.", encoding="utf-8")
    (knowledge / "bad.txt").write_bytes(b"\xff\xfe\x00")
    code, out, err = main("--knowledge", knowledge, "Where does Bob live?")
    assert code == 0 and out.startswith("Bob lives in Bergen.")
    assert "left out bad.txt" in err and "3 passages of 3 files (1 new; 1 files left out)" in err
    assert (knowledge.parent / ".notes.words.index").is_dir()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--knowledge", "{notes}"], "There is no question"),
        (["--k", "3", "Where?"], "--knowledge: name the folder or file"),
        (["--knowledge", "{notes}/none", "Where?"], "no such file or folder"),
        (["--knowledge", "{notes}", "--k", "0", "Where?"], "--k 0: it must be 1 or more"),
        (["--knowledge", "{notes}", "--min_score", "2", "Where?"], "--min_score 2: it must be from 0 to 1"),
        (["--knowledge", "{notes}", "--mode", "dense", "Where?"], "--mode dense needs --retriever"),
        (["--knowledge", "{notes}", "--vector_search", "faiss", "Where?"], "--vector_search faiss needs --retriever"),
        (
            ["--knowledge", "{notes}", "--mode", "bm25", "--retriever", "x", "Where?"],
            "--retriever has no effect with --mode bm25",
        ),
        (["--knowledge", "{notes}", " "], "question 1 is empty"),
        (
            ["--knowledge", "{notes}", "--knowlege", "x"],
            "unexpected argument '--knowlege' (did you mean '--knowledge'?)",
        ),
        (["{notes}/no", "--knowledge", "{notes}", "Where?"], "no"),
        (["--knowledge", "{notes}", "--reranker", "{notes}", "Where?"], "--reranker"),
    ],
)
def test_bad_input_is_one_line(knowledge, main, argv, message):
    code, out, err = main(*(word.replace("{notes}", str(knowledge)) for word in argv))
    *_, error = err.strip().splitlines()
    assert (code, out) == (2, "") and error.startswith("deepseek-hf: error: ") and message in error


@pytest.mark.parametrize(
    ("kind", "use"),
    [
        (DeepSeekForSequenceClassification, "goes to --reranker"),
        (DeepSeekForEmbedding, "goes to --retriever"),
        (DeepSeekForRecommendation, "goes to deepseek-hf recommend"),
    ],
)
def test_another_model_is_no_reader(knowledge, tokenizer, main, tmp_path, kind, use):
    kind(preset("tiny_llm", vocab_size=len(tokenizer), pad_token_id=0)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    code, _, err = main(tmp_path / "model", "--knowledge", knowledge, "Where?")
    assert code == 2 and f"is a {kind.__name__}, which answers no questions" in err and use in err


def test_a_reader_gives_the_same_alone_and_in_batches(readers):
    pairs = [(question, passage) for question in QUESTIONS for passage in PASSAGES]
    for mode in ("extractive", "generative"):
        reader = Reader.load(str(readers / mode / "out"), batch_size=3)
        together = reader(pairs)
        for pair, (text, confidence) in zip(pairs, together, strict=True):
            ((alone, alone_confidence),) = reader([pair])
            assert text == alone and confidence == pytest.approx(alone_confidence, rel=1e-4)


@pytest.mark.parametrize("mode", ["extractive", "generative"])
def test_a_reader_keeps_nothing_of_what_it_has_read(readers, mode):
    reader = Reader.load(str(readers / mode / "out"))
    reader([(QUESTIONS[0], PASSAGES[0])])
    gc.collect()
    kept = sum(type(it) is Passage for it in gc.get_objects())
    for number in range(3):
        reader([(QUESTIONS[0], f"{PASSAGES[0]} {number}")])
    gc.collect()
    assert sum(type(it) is Passage for it in gc.get_objects()) == kept
    assert not hasattr(reader.task, "layout") and not getattr(reader.task.reader, "examples", None)


def test_a_reader_leaves_standard_output_alone_and_notes_on_standard_error(readers, monkeypatch, capsys):
    """Two that read at the same time would each put back what the other had put there."""
    reader, seen, encode = Reader.load(str(readers / "generative" / "out")), [], Encoder.passage
    monkeypatch.setattr(Encoder, "passage", lambda self, text: (seen.append(sys.stdout), encode(self, text))[1])
    capsys.readouterr()
    here = sys.stdout
    reader([(QUESTIONS[0], PASSAGES[0] * 200)])
    assert seen and all(stdout is here for stdout in seen)
    out, err = capsys.readouterr()
    assert out == "" and "cut 1 of 1 passages to --max_seq_length" in err


def test_what_a_model_would_return_beside_its_ids_changes_nothing(readers):
    reader, pairs = Reader.load(str(readers / "generative" / "out")), [(QUESTIONS[0], PASSAGES[0])]
    before = reader(pairs)
    config = reader.model.generation_config
    config.output_scores = config.output_hidden_states = config.return_dict_in_generate = True
    config.num_return_sequences = 2
    assert reader(pairs) == before
