"""A knowledge base: passages of a folder or file, kept in an index, and found by words, by vectors, or by both.

    index = PassageIndex.open("runs/index", "notes", retriever)   # made, or brought up to date
    for found in index.search("Where is it?", k=5):
        print(found.score, found.source, found.text)

An index is a folder: `index.json` (what it was made of, and by which model), `passages.jsonl`, and with a model
`embeddings.safetensors`. What words are counted by, and a faiss index, are made anew when an index is opened.
"""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from modeling_deepseek import AutoModelForEmbedding
from modeling_deepseek.whole_folders import current

from ..data.files import json_of, read_text, replaced_folder, write_json, write_text
from ..data.table import read_columns
from ..training.loading import saved_tokenizer, served_model
from ..training.saved import Saved
from ..training.scoring.ranks import best_first
from .arguments import EmbeddingArguments
from .encoding import encode
from .knowledge import MAX_CHARACTERS, OWN_FILES, Knowledge, Passage, read_knowledge
from .lexical import BM25, DEFAULT_WEIGHTS, WORDS_ALONE, fused_scores, part_terms

INDEX_FILE, PASSAGES_FILE, EMBEDDINGS_FILE = OWN_FILES
FORMAT = 2  # 1 had its files in a mapping, whose order said nothing of where their passages stand
# Fields of a config that say nothing about vectors.
OTHER_FIELDS = ("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version")
Mode = Literal["fused", "bm25", "dense"]
MODES = ("fused", "bm25", "dense")


class DamagedIndex(ValueError):
    """An index whose files aren't those that were written."""


@dataclass(frozen=True)
class FoundPassage(Passage):
    """A passage, and why it was found.

    `score` is BM25's, the product of the vectors, or the fused score (`fused_scores`), by the way of searching.
    `evidence` is from 0 to 1: by words the share of the question's words that the passage has (`BM25.share_found`), by
    vectors their cosine, not below 0, and by both the mean of the two.
    """

    score: float
    evidence: float


@dataclass(frozen=True)
class Retriever:
    """An embedding model, its tokenizer, and the weights of BM25, BM25 of parts and its vectors when all are used.

    A model that was trained here may have weights of its own.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    weights: tuple[float, ...] = DEFAULT_WEIGHTS

    @classmethod
    def load(cls, source: str, revision: str = "main") -> "Retriever":
        """From a folder or the Hub, a model or an adapter.

        Raises:
            ValueError: if there is no such model.
        """
        return cls.of(Saved.open("retriever", source, revision))

    @classmethod
    def of(cls, saved: Saved) -> "Retriever":
        """As it was trained: an adapter in its base, with the pooling and prefixes of its training.

        Raises:
            ValueError: if it is no embedding model.
        """
        settings = saved.settings_for("embedding", EmbeddingArguments)
        saved.check_task("embedding", "Embedding")
        model, tokenizer = served_model(saved, AutoModelForEmbedding), saved_tokenizer(saved)
        return cls(model, tokenizer, tuple(settings.get("fusion_weights") or DEFAULT_WEIGHTS))

    def fingerprint(self) -> str:
        """SHA-256 over all that vectors depend on: config fields of the model, its weights, and the tokenizer."""
        config = {k: v for k, v in self.model.config.to_dict().items() if k not in OTHER_FIELDS}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        tokens = backend.to_str() if backend else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        digest.update(tokens.encode())
        return digest.hexdigest()

    def encode(self, texts: list[str], is_query: bool) -> torch.Tensor:
        """[N, D] of length 1."""
        config = self.model.config
        return encode(self.model, self.tokenizer, texts, config.query_prefix if is_query else config.passage_prefix)


# The index -----------------------------------------------------------------------------------------------------------


class PassageIndex:
    """Passages by file, their vectors if there is a retriever, and BM25 over all.

    Args:
        embeddings: [P, D].
        settings: the content of index.json.
        use_faiss: search vectors by faiss in place of torch, with the same results.

    Raises:
        ValueError: if a package isn't installed.
    """

    def __init__(
        self,
        passages: list[Passage],
        embeddings: torch.Tensor | None,
        retriever: Retriever | None,
        settings: dict[str, Any],
        use_faiss: bool = False,
    ) -> None:
        self.passages = passages
        self.embeddings = embeddings
        self.retriever = retriever
        self.settings = settings
        self.bm25 = BM25([passage.text for passage in passages])
        self.faiss = flat_index(embeddings) if use_faiss and embeddings is not None else None

    @cached_property
    def parts(self) -> BM25:
        return BM25([passage.text for passage in self.passages], part_terms)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        knowledge: str | Path | None = None,
        retriever: Retriever | None = None,
        max_characters: int = MAX_CHARACTERS,
        use_faiss: bool = False,
    ) -> "PassageIndex":
        """The index in `folder`, made from `knowledge` or brought up to date with it.

        Files that haven't changed since keep their passages and vectors; files that are gone leave the index. Each
        file that can't be read is reported in a line, and so is an index that is damaged and made anew.

        Args:
            knowledge: a folder or file; None takes the index as it is.
            retriever: makes vectors, and searches by them. An index with vectors needs the one that made them.
            max_characters: of a passage.
            use_faiss: search vectors by faiss.

        Raises:
            ValueError: if the index is damaged and there is no `knowledge` to make it anew from, if it was made by
                another model, tokenizer or length of passages, or if nothing in `knowledge` can be read.
        """
        folder, fingerprint = Path(folder), retriever.fingerprint() if retriever else None
        old = _read_or_drop(folder, is_made_anew=knowledge is not None)
        if old.settings is not None:
            _refuse_another(folder, old.settings, fingerprint, None if knowledge is None else max_characters)
        if knowledge is None:
            if old.settings is None:
                raise ValueError(f"{folder}: no index there; name the knowledge that it is to be made from.")
            return cls(old.passages, old.embeddings, retriever, old.settings, use_faiss)
        found = read_knowledge(Path(knowledge), max_characters, old.files(), old.passages, folder)
        vectors = _vectors_of(found, old.embeddings, retriever) if retriever else None
        settings = {"format": FORMAT, "fingerprint": fingerprint, "max_characters": max_characters}
        index = cls(found.passages, vectors, retriever, settings | {"files": found.files}, use_faiss)
        if old.settings is None or found.new or found.files != old.settings["files"]:
            index.save(folder)
        return index

    def save(self, folder: Path) -> None:
        """Write the index whole; index.json says what the other files must be."""
        with replaced_folder(folder) as beside:
            lines = [json.dumps(asdict(passage), ensure_ascii=False) for passage in self.passages]
            write_text(beside / PASSAGES_FILE, "".join(line + "\n" for line in lines))
            if self.embeddings is not None:
                save_file({"embeddings": self.embeddings.contiguous()}, beside / EMBEDDINGS_FILE)
            written = [path for path in beside.iterdir() if path.is_file()]
            self.settings["written"] = {path.name: file_hash(path) for path in written}
            write_json(beside / INDEX_FILE, self.settings)

    def search(self, question: str, k: int = 5, mode: Mode | None = None) -> list[FoundPassage]:
        """The k best passages, best first; only such that share a word with the question, if words alone decide.

        Args:
            mode: "bm25", "dense" (by vectors), or "fused" (the weighted mean of BM25, BM25 of parts of words and, with
                a retriever, vectors); None is fused with a retriever, else bm25.

        Raises:
            ValueError: if k is less than 1, or the mode needs a retriever.
        """
        if k < 1:
            raise ValueError(f"k={k} must be 1 or more")
        mode = mode or ("fused" if self.retriever else "bm25")
        scores, vectors = self._scores(question, mode, k)
        found = []
        for place in best_first(scores)[:k]:
            if vectors is None and scores[place] <= 0:
                break
            passage, parts = self.passages[place], []
            if mode != "dense":
                parts.append(self.bm25.share_found(question, passage.text))
            if vectors is not None:
                parts.append(min(1.0, max(0.0, float(vectors[place]))))
            found.append(FoundPassage(passage.text, passage.source, float(scores[place]), float(np.mean(parts))))
        return found

    def scores(self, question: str, mode: Mode) -> np.ndarray:
        """[P], by which `search` orders the passages.

        Raises:
            ValueError: if the mode needs a retriever.
        """
        return self._scores(question, mode, len(self.passages))[0]

    def _scores(self, question: str, mode: Mode, k: int) -> tuple[np.ndarray, np.ndarray | None]:
        """[P] by the mode and, where vectors take part, by them; by vectors alone perhaps of the k best only."""
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; use fused, bm25 or dense")
        if mode == "bm25":
            return self.bm25.scores(question), None
        if mode == "dense" and (self.retriever is None or self.embeddings is None):
            raise ValueError("searching by dense needs a retriever, and an index made with it; use bm25")
        vectors = None
        if self.retriever is not None and self.embeddings is not None:
            vectors = self._similarities(question, k if mode == "dense" else len(self.passages))
        if mode == "dense" and vectors is not None:
            return vectors, vectors
        words = [self.bm25.scores(question), self.parts.scores(question)]
        if vectors is None or self.retriever is None:
            return fused_scores(words, WORDS_ALONE), None
        return fused_scores([*words, vectors], self.retriever.weights), vectors

    def _similarities(self, question: str, k: int) -> np.ndarray:
        """[P]; faiss gives -inf to what isn't among the k nearest."""
        assert self.retriever is not None and self.embeddings is not None
        query = self.retriever.encode([question], is_query=True)
        if self.faiss is None:
            return (self.embeddings @ query[0]).numpy()
        similarities = np.full(len(self.passages), -np.inf, dtype=np.float32)
        values, places = self.faiss.search(query.numpy(), min(k, len(self.passages)))
        similarities[places[0]] = values[0]
        return similarities


def flat_index(embeddings: torch.Tensor) -> Any:
    """An exact faiss index of inner products. It is no more than the vectors, so it isn't kept on disk.

    Raises:
        ValueError: if faiss isn't installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ValueError(
            'Searching by faiss needs the package faiss-cpu: pip install "deepseek-hf[faiss]".'
        ) from error
    index = faiss.IndexFlatIP(embeddings.shape[1])
    index.add(embeddings.numpy())
    return index


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Stored(NamedTuple):
    """An index as it lies in its folder; nothing, if there is none."""

    settings: dict[str, Any] | None = None  # index.json
    passages: list[Passage] = []  # noqa: RUF012  nobody writes to it
    embeddings: torch.Tensor | None = None

    def files(self) -> list[dict[str, Any]]:
        """Its files with the places of their passages, which format 1 leaves to be read off the passages."""
        if self.settings is None or self.settings["format"] == FORMAT:
            return [] if self.settings is None else self.settings["files"]
        places: dict[str, list[int]] = {}
        for place, passage in enumerate(self.passages):
            places.setdefault(passage.source.rpartition(":")[0], []).append(place)
        known = self.settings["files"]
        return [
            {"name": name, **known[name], "start": found[0]}
            for name, found in places.items()
            if known.get(name, {}).get("passages") == len(found) == found[-1] - found[0] + 1
        ]


def _read_or_drop(folder: Path, is_made_anew: bool) -> Stored:
    """The index in a folder; a damaged one counts as none, aloud, where it is made anew.

    Raises:
        ValueError: if it is damaged and isn't made anew, or is none of ours.
    """
    try:
        return _read_index(folder)
    except DamagedIndex as error:
        if not is_made_anew:
            raise
        print(f"{error}; it is made anew", file=sys.stderr)
        return Stored()


def _read_index(folder: Path) -> Stored:
    """The index in a folder.

    Raises:
        ValueError: if one of the files is damaged.
    """
    folder = Path(current(folder, INDEX_FILE))
    if not (folder / INDEX_FILE).is_file():
        return Stored()
    try:
        settings = json_of(read_text(str(folder / INDEX_FILE)), INDEX_FILE)
        if not isinstance(settings, dict) or settings.get("format") not in (1, FORMAT):
            raise NotImplementedError
        if missing := {"files", "fingerprint", "max_characters", "written"} - settings.keys():
            raise ValueError(f"{INDEX_FILE} says no {', '.join(sorted(missing))}")
        for name, expected in settings["written"].items():
            if file_hash(folder / name) != expected:
                raise ValueError(f"{name} is not the file that was written")
        columns = read_columns(str(folder / PASSAGES_FILE))
        passages = [Passage(**dict(zip(columns, cells, strict=True))) for cells in zip(*columns.values(), strict=True)]
        has_vectors = EMBEDDINGS_FILE in settings["written"]
        return Stored(settings, passages, load_file(folder / EMBEDDINGS_FILE)["embeddings"] if has_vectors else None)
    except NotImplementedError as error:
        raise ValueError(
            f"{folder}: its {INDEX_FILE} is not of an index of passages, or of a later version; name another folder."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DamagedIndex(
            f"{folder}: the index is damaged ({error}); name the knowledge that it is to be made from again"
        ) from error


def _vectors_of(found: Knowledge, before: torch.Tensor | None, retriever: Retriever) -> torch.Tensor:
    """[P, D], those of passages that were there before as they were."""
    vectors = torch.zeros(len(found.passages), retriever.model.config.hidden_size)
    kept = [(place, old) for place, old in enumerate(found.before) if old is not None]
    if kept and before is not None:
        vectors[[place for place, _ in kept]] = before[[old for _, old in kept]]
    if found.new:
        texts = [found.passages[place].text for place in found.new]
        vectors[found.new] = retriever.encode(texts, is_query=False)
    return vectors


def _refuse_another(folder: Path, old: dict[str, Any], fingerprint: str | None, max_characters: int | None) -> None:
    advice = "name those that made it, or another folder for a new index."
    if old["fingerprint"] != fingerprint:
        if fingerprint is None:
            raise ValueError(f"{folder}: this index has vectors of a model and none is named; {advice}")
        made = "by another model or tokenizer" if old["fingerprint"] else "without a model"
        raise ValueError(f"{folder}: this index was made {made}; {advice}")
    if max_characters is not None and old["max_characters"] != max_characters:
        raise ValueError(
            f"{folder}: its passages have at most {old['max_characters']} characters, not {max_characters}; keep "
            "that, or name another folder for a new index."
        )
