"""The passage index: splitting, searching, what persists, what is refused, and files that can't be read."""

import json
import os
import sys
import time

import pytest
import torch

from configuration_deepseek import preset
from finetune_deepseek.retrieval.knowledge import split_text
from finetune_deepseek.retrieval.lexical import DEFAULT_WEIGHTS, fused_scores
from finetune_deepseek.retrieval.passage_index import PassageIndex, Retriever
from modeling_deepseek import DeepSeekForEmbedding
from tokenization_deepseek import train_tokenizer

pytest.importorskip("bm25s", reason="bm25s is not installed")

FOX, BIRD, SEA = "The red fox runs.", "A bird sits in the tree.", "海是蓝色的水。"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([FOX, BIRD, SEA] * 3, 300)


def made(tokenizer, seed=0, **fields):
    torch.manual_seed(seed)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    return Retriever(DeepSeekForEmbedding(preset("tiny_v3", **ids, **fields)).eval(), tokenizer)


@pytest.fixture(scope="module")
def retriever(tokenizer):
    return made(tokenizer)


@pytest.fixture
def knowledge(tmp_path):
    """A folder with a text, one below it, and a table."""
    folder = tmp_path / "notes"
    (folder / "more").mkdir(parents=True)
    (folder / "fox.txt").write_text(f"\n\n{FOX}\n", encoding="utf-8")
    (folder / "more/bird.md").write_text(BIRD, encoding="utf-8")
    (folder / "sea.jsonl").write_text(json.dumps({"text": SEA}, ensure_ascii=False), encoding="utf-8")
    return folder


def found(index, question, **kwargs):
    return [(passage.text, passage.source) for passage in index.search(question, **kwargs)]


def test_text_is_split_at_paragraphs_then_sentences_then_anywhere():
    text = "One.\nstill one.\n\n \nTwo. Three! 四。五？\n\n" + "x" * 25
    assert list(split_text(text)) == [(1, "One.\nstill one.\nTwo. Three! 四。五？\n" + "x" * 25)]
    pieces = list(split_text(text, 12))
    assert [piece for _, piece in pieces] == [
        "One.",
        "still one.",
        "Two. Three!",
        "四。五？",
        "x" * 12,
        "x" * 12,
        "x",
    ]
    assert [line for line, _ in pieces] == [1, 2, 5, 5, 7, 7, 7]
    assert list(split_text(" \n\n ")) == []


def test_bm25_finds_passages_with_their_sources(knowledge, tmp_path):
    index = PassageIndex.open(tmp_path / "index", knowledge)
    assert found(index, "Where is the FOX?", k=1) == [(FOX, "fox.txt:3")]
    assert found(index, "蓝色", k=3) == [(SEA, "sea.jsonl:1")]
    assert found(index, "bird", k=9) == [(BIRD, "more/bird.md:1")]
    assert found(index, "zebra") == []
    assert index.search("fox")[0].score > 0


def test_vectors_find_what_they_are_nearest_to(knowledge, tmp_path, retriever):
    index = PassageIndex.open(tmp_path / "index", knowledge, retriever)
    texts = [passage.text for passage in index.passages]
    similar = retriever.encode(texts, is_query=False) @ retriever.encode(["fox"], is_query=True)[0]
    by_vectors = index.search("fox", k=3, mode="dense")
    assert [passage.text for passage in by_vectors] == [texts[place] for place in similar.argsort(descending=True)]
    assert by_vectors[0].score == pytest.approx(similar.max().item(), rel=1e-4)
    words = [index.bm25.scores("fox"), index.parts.scores("fox")]
    expected = fused_scores([*words, similar.numpy()], retriever.weights)
    fused = index.search("fox", k=3)
    assert {p.text: p.score for p in fused} == pytest.approx(dict(zip(texts, expected, strict=True)), rel=1e-4)
    assert index.scores("fox", "fused") == pytest.approx(expected, rel=1e-4)


def test_without_vectors_parts_of_words_are_fused(knowledge, tmp_path):
    index = PassageIndex.open(tmp_path / "index", knowledge)
    assert found(index, "birds", mode="bm25") == []
    assert found(index, "birds", mode="fused")[0] == (BIRD, "more/bird.md:1")
    assert index.search("bird in a tree", mode="fused")[0].score == pytest.approx(1)
    assert found(index, "?", mode="fused") == []


@pytest.mark.parametrize("mode", ["dense", "fused"])
def test_faiss_finds_what_torch_finds(knowledge, tmp_path, retriever, mode):
    pytest.importorskip("faiss", reason="faiss is not installed")
    plain = PassageIndex.open(tmp_path / "index", knowledge, retriever)
    index = PassageIndex.open(tmp_path / "index", knowledge, retriever, use_faiss=True)
    assert index.faiss.ntotal == 3
    for k in (1, 2, 9):
        expected = plain.search("Where is the fox?", k, mode)
        results = index.search("Where is the fox?", k, mode)
        assert [passage.source for passage in results] == [passage.source for passage in expected]
        assert [p.score for p in results] == pytest.approx([p.score for p in expected], rel=1e-5)


def test_without_faiss_one_line_says_what_to_install(knowledge, tmp_path, retriever, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match="needs the package faiss-cpu: pip install"):
        PassageIndex.open(tmp_path / "index", knowledge, retriever, use_faiss=True)


def test_an_index_is_opened_again_as_it_was(knowledge, tmp_path, retriever):
    first = PassageIndex.open(tmp_path / "index", knowledge, retriever)
    again = PassageIndex.open(tmp_path / "index", retriever=retriever)
    assert again.passages == first.passages and torch.equal(again.embeddings, first.embeddings)
    assert again.search("fox", k=3) == first.search("fox", k=3)


def test_only_what_changed_is_read_and_encoded_again(knowledge, tmp_path, tokenizer, monkeypatch, capsys):
    retriever = made(tokenizer)
    PassageIndex.open(tmp_path / "index", knowledge, retriever)
    encoded = []
    plain = Retriever.encode
    monkeypatch.setattr(
        Retriever, "encode", lambda self, texts, is_query: encoded.append(texts) or plain(self, texts, is_query)
    )
    PassageIndex.open(tmp_path / "index", knowledge, retriever)
    assert encoded == []
    (knowledge / "fox.txt").write_text("A blue fox.", encoding="utf-8")
    (knowledge / "a.txt").write_text("Green grass.", encoding="utf-8")
    (knowledge / "more/bird.md").unlink()
    capsys.readouterr()
    index = PassageIndex.open(tmp_path / "index", knowledge, retriever)
    assert encoded == [["Green grass.", "A blue fox."]]
    assert "3 passages of 3 files (2 new; 0 files left out)" in capsys.readouterr().err
    fresh = PassageIndex.open(tmp_path / "fresh", knowledge, retriever)
    assert index.passages == fresh.passages
    torch.testing.assert_close(index.embeddings, fresh.embeddings, rtol=1e-4, atol=1e-5)
    assert found(index, "bird", mode="bm25") == []


def test_another_model_or_tokenizer_is_refused(knowledge, tmp_path, tokenizer, retriever):
    PassageIndex.open(tmp_path / "index", knowledge, retriever)
    PassageIndex.open(tmp_path / "index", knowledge, made(tokenizer))  # the same weights, made again
    others = [
        made(tokenizer, seed=1),
        made(tokenizer, query_prefix="q: "),
        Retriever(retriever.model, train_tokenizer(["other words"] * 3, len(tokenizer))),
    ]
    for other in others:
        for source in (knowledge, None):
            with pytest.raises(ValueError, match="index was made by another model or tokenizer; name those"):
                PassageIndex.open(tmp_path / "index", source, other)
    with pytest.raises(ValueError, match="has vectors of a model and none is named"):
        PassageIndex.open(tmp_path / "index", knowledge)
    PassageIndex.open(tmp_path / "words", knowledge)
    with pytest.raises(ValueError, match="was made without a model"):
        PassageIndex.open(tmp_path / "words", knowledge, retriever)
    with pytest.raises(ValueError, match="at most 1000 characters, not 99"):
        PassageIndex.open(tmp_path / "words", knowledge, max_characters=99)


def test_files_that_cant_be_read_are_a_line_each(knowledge, tmp_path, capsys):
    (knowledge / "broken.jsonl").write_text('{"text": "a"}\n{"text": ', encoding="utf-8")
    (knowledge / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (knowledge / "picture.png").write_bytes(b"\x89PNG")
    (knowledge / "empty.txt").write_text(" \n")
    (knowledge / "table.csv").write_text("a,b\n1,2\n")
    (knowledge / ".hidden.txt").write_text("secret")
    index = PassageIndex.open(tmp_path / "index", knowledge)
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("left out") or "files left out" in line]
    assert [line.partition(":")[0] for line in lines[:-1]] == [
        f"left out {name}" for name in ("broken.jsonl", "empty.txt", "latin.txt", "picture.png", "table.csv")
    ]
    assert "can't be read as UTF-8 text (byte 3)" in lines[2] and "it has a, b" in lines[4]
    assert lines[-1] == "3 passages of 3 files (3 new; 5 files left out)"
    assert len(index.passages) == 3


def test_what_cant_be_opened_or_searched_is_one_line(knowledge, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/picture.png").write_bytes(b"\x89PNG")
    for source, message in (
        (tmp_path / "none", "no such file or folder"),
        (tmp_path / "empty", "there are no files"),
        (tmp_path / "bad", "none of its 1 files can be read"),
        (None, "no index there; name the knowledge"),
    ):
        with pytest.raises(ValueError, match=message):
            PassageIndex.open(tmp_path / "index", source)
        assert not (tmp_path / "index").exists()
    index = PassageIndex.open(tmp_path / "index", knowledge / "fox.txt")
    assert found(index, "fox") == [(FOX, "fox.txt:3")]
    for wrong, message in (
        ({"k": 0}, "k=0 must be"),
        ({"mode": "dense"}, "needs a retriever"),
        ({"mode": "x"}, "unk"),
    ):
        with pytest.raises(ValueError, match=message):
            index.search("fox", **wrong)
    (tmp_path / "index/passages.jsonl").write_text("")
    with pytest.raises(ValueError, match="the index is damaged .passages.jsonl is not the file that was written"):
        PassageIndex.open(tmp_path / "index")
    (tmp_path / "index/index.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="index.json is not of an index of passages"):
        PassageIndex.open(tmp_path / "index", knowledge)


def test_a_damaged_index_is_made_anew_from_the_knowledge_that_is_named(knowledge, tmp_path, capsys):
    first = PassageIndex.open(tmp_path / "index", knowledge)
    for name in ("passages.jsonl", "index.json"):
        (tmp_path / "index" / name).write_text("{")
        capsys.readouterr()
        assert PassageIndex.open(tmp_path / "index", knowledge).passages == first.passages
        assert "the index is damaged" in (said := capsys.readouterr().err) and "it is made anew" in said
        assert PassageIndex.open(tmp_path / "index").passages == first.passages


@pytest.mark.parametrize("place", ["notes", "notes/index", "notes/more/index"])
def test_an_index_in_what_it_is_of_is_no_part_of_it(place, knowledge, tmp_path):
    first = PassageIndex.open(tmp_path / place, knowledge).passages
    left = tmp_path / place / "_saving-0123abcd"  # by a save that was killed
    left.mkdir()
    (left / "passages.jsonl").write_text('{"text": "Old."}')
    assert PassageIndex.open(tmp_path / place, knowledge).passages == first
    (tmp_path / place / "index.json").write_text("{")
    assert PassageIndex.open(tmp_path / place, knowledge).passages == first and len(first) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text elsewhere")
def test_a_file_name_that_is_not_utf8_is_shown_by_escapes(tmp_path):
    (tmp_path / "notes").mkdir()
    with open(os.fsencode(tmp_path) + b"/notes/caf\xe9.txt", "w") as file:
        file.write(FOX)
    for _ in range(2):
        assert found(PassageIndex.open(tmp_path / "index", tmp_path / "notes"), "fox") == [(FOX, "caf\\xe9.txt:1")]


def test_half_of_a_character_leaves_its_file_out(knowledge, tmp_path, capsys):
    (knowledge / "half.jsonl").write_text('{"text": "whole"}\n{"text": "cut \\ud83d"}\n')
    assert len(PassageIndex.open(tmp_path / "index", knowledge).passages) == 3
    assert "left out half.jsonl: half.jsonl:2 holds half of a character" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["files", "fingerprint", "max_characters", "written"])
def test_an_index_that_lacks_a_field_is_damaged(field, knowledge, tmp_path, capsys):
    first = PassageIndex.open(tmp_path / "index", knowledge).passages
    path = tmp_path / "index/index.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != field}))
    assert PassageIndex.open(tmp_path / "index", knowledge).passages == first
    assert f"index.json says no {field}" in capsys.readouterr().err


@pytest.mark.parametrize("first_format", [1, 2])
def test_an_update_neither_loses_passages_nor_keeps_old_ones(first_format, tmp_path, retriever):
    texts = {"a/b.txt": "Slash.", "a-b.txt": "Dash, a long one. " * 99}

    def write():
        for name, text in texts.items():
            (tmp_path / "notes" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "notes" / name).write_text(text, encoding="utf-8")

    write()
    PassageIndex.open(tmp_path / "index", tmp_path / "notes", retriever)
    if first_format == 1:  # as the version before wrote it
        path = tmp_path / "index/index.json"
        settings = json.loads(path.read_text())
        files = {file.pop("name"): file for file in settings["files"]}
        for file in files.values():
            del file["start"]
        path.write_text(json.dumps(settings | {"format": 1, "files": files}, sort_keys=True))
    for change in ({"c.txt": "New."}, {"a-b.txt": "Dash, edited."}, {"a/b.txt": "Slash, edited. " * 99}):
        texts |= change
        write()
        index = PassageIndex.open(tmp_path / "index", tmp_path / "notes", retriever)
        fresh = PassageIndex.open(tmp_path / f"fresh-{len(texts[list(change)[0]])}", tmp_path / "notes", retriever)
        assert index.passages == fresh.passages
        torch.testing.assert_close(index.embeddings, fresh.embeddings, rtol=1e-4, atol=1e-5)
    assert PassageIndex.open(tmp_path / "index", retriever=retriever).passages == fresh.passages


def test_a_retriever_is_loaded_from_its_folder(tmp_path, retriever):
    retriever.model.save_pretrained(tmp_path)
    retriever.tokenizer.save_pretrained(tmp_path)
    loaded = Retriever.load(str(tmp_path))
    assert loaded.fingerprint() == retriever.fingerprint() and loaded.weights == DEFAULT_WEIGHTS
    with pytest.raises(ValueError, match="--retriever .*no such folder"):
        Retriever.load(str(tmp_path / "none"))


@pytest.mark.parametrize("text", ["word\n" * 1_500_000, "One. " * 1_500_000], ids=["lines", "sentences"])
def test_a_long_text_without_an_empty_line_is_split_in_a_moment(text):
    began = time.process_time()
    found = list(split_text(text))
    assert time.process_time() - began < 5  # over 10 where each passage is counted from the beginning
    assert sum(piece.count("o") + piece.count("O") for _, piece in found) == 1_500_000
    if "\n" in text:
        lengths = [piece.count("word") for _, piece in found]
        assert [line for line, _ in found] == [1 + sum(lengths[:place]) for place in range(len(found))]


def test_another_index_inside_the_knowledge_is_none_of_it(knowledge, tokenizer, capsys):
    """Whatever its folder is named, and also where its mark can't be read; files of such names alone are knowledge."""
    PassageIndex.open(knowledge / "kept", knowledge)
    (knowledge / "more/passages.jsonl").write_text(json.dumps({"text": "A whale sings."}))
    capsys.readouterr()
    for mark in (None, "{broken"):
        if mark:
            (knowledge / "kept/index.json").write_text(mark)
        index = PassageIndex.open(knowledge.parent / f"other{bool(mark)}", knowledge)
        assert [passage.source for passage in index.passages].count("fox.txt:3") == 1
        assert not any(passage.source.startswith("kept/") for passage in index.passages)
        assert found(index, "whale") == [("A whale sings.", "more/passages.jsonl:1")]
        err = capsys.readouterr().err
        assert f"left out {knowledge / 'kept'}: an index of passages" in err
