"""What each task makes of tables as people have them: three rows by hand."""

import gzip
import json

import pandas as pd
import pytest

from finetune_deepseek.classification.task import Classification, ClassificationArguments
from finetune_deepseek.question_answering.task import QuestionAnswering, QuestionAnsweringArguments
from finetune_deepseek.recommendation.arguments import RecommendArguments, RecommendationArguments
from finetune_deepseek.recommendation.prompt_ranking import PromptRanking, PromptRankingArguments
from finetune_deepseek.recommendation.report import RANKS_FILE, read_ranks
from finetune_deepseek.recommendation.requests import read_histories
from finetune_deepseek.recommendation.task import Recommendation
from finetune_deepseek.retrieval.task import Embedding, EmbeddingArguments
from finetune_deepseek.translation.arguments import TranslationArguments
from finetune_deepseek.translation.task import Translation

SQUAD = {"question": "Where?", "context": "Ann saw Ann."}


def load(task_class, arguments_class, **settings):
    task = task_class(arguments_class(**settings), seed=0)
    return task, task.load_splits()


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def lines(*rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


# -- classification --


def labels(path, **settings):
    file = {"train_file": path} if not isinstance(path, dict) else path
    task, splits = load(Classification, ClassificationArguments, **file, **settings)
    fields = task.config_fields(splits, {})
    return fields["problem_type"], splits["train"]["target"][:], list(fields["id2label"].values())


def test_labels_are_their_texts(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\na,01\nb,1\nc,01\n")
    assert labels(path) == ("single_label_classification", ["01", "1", "01"], ["01", "1"])
    path = write(tmp_path / "b.csv", "text,label\na,3.1\nb,3.10\n")
    assert labels(path, problem_type="single_label_classification")[1] == ["3.1", "3.10"]
    with pytest.raises(ValueError, match="b.csv: 'label' has 3.1 and 3.10, two labels or one number; set --pr"):
        labels(path)
    path = write(tmp_path / "c.csv", "text,label\na,3.5\nb,4\n")
    assert labels(path)[:2] == ("regression", [3.5, 4.0])


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_a_gap_makes_no_fractions_of_labels(name, tmp_path):
    frame = pd.DataFrame({"text": ["a", "b", "c"], "label": [0, 1, None]})
    form = {"a.csv": frame.to_csv(index=False), "a.parquet": frame.to_parquet()}
    path = write(tmp_path / name, form.get(name) or frame.to_json(orient="records", lines=True))
    other = write(tmp_path / "b.csv", "text,label\na,0\nb,1\n")
    found = labels({"train_file": path, "validation_file": other})
    assert found == ("single_label_classification", ["0", "1"], ["0", "1"])


def test_a_list_in_a_cell_is_several_labels(tmp_path):
    path = write(tmp_path / "a.csv", 'text,label\na,"[\'warm\', \'cold\']"\nb,"[""warm""]"\nc,[]\n')
    assert labels(path) == ("multi_label_classification", [["cold", "warm"], ["warm"], []], ["cold", "warm"])
    with pytest.raises(ValueError, match="a.csv, row 1, 'label': .* is not one label"):
        labels(path, problem_type="single_label_classification")


# -- embedding --


def test_negatives_of_a_table(tmp_path):
    settings = {"negatives_column": "no"}
    path = write(tmp_path / "a.csv", "query,passage,no\nq,p,12\nr,s,\"['x', 'y']\"\nt,u,\n")
    _, splits = load(Embedding, EmbeddingArguments, train_file=path, **settings)
    assert splits["train"]["negatives"][:] == [["12"], ["x", "y"], []]
    path = write(tmp_path / "a.jsonl", lines({"query": "q", "passage": "p", "no": 12}))
    with pytest.raises(ValueError, match="a.jsonl, row 1: 'no' is '12', not a text or a list of texts"):
        load(Embedding, EmbeddingArguments, train_file=path, **settings)


# -- question answering --


def starts(path, **settings):
    task, splits = load(QuestionAnswering, QuestionAnsweringArguments, train_file=path, **settings)
    return splits["train"]["starts"][:], splits["train"]["answers"][:]


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["Ann"], "answer_start": [8.0]},
        {"text": ["Ann"], "answer_start": ["8"]},
        {"text": "Ann", "answer_start": 8},
        [{"text": "Ann", "answer_start": 8.0}],
    ],
)
def test_the_place_of_an_answer_in_every_form(answers, tmp_path):
    path = write(tmp_path / "a.jsonl", lines(SQUAD | {"answers": answers}))
    assert starts(path) == ([[8]], [["Ann"]])
    path = write(tmp_path / "a.csv", pd.DataFrame([SQUAD | {"answers": answers}]).to_csv(index=False))
    assert starts(path) == ([[8]], [["Ann"]])


@pytest.mark.parametrize("said", ["False", "false", None, 0, 0.0, float("nan"), False])
def test_what_is_not_impossible_keeps_its_answer(said, tmp_path):
    row = SQUAD | {"answers": {"text": ["Ann"], "answer_start": [0]}, "is_impossible": said}
    path = write(tmp_path / "a.jsonl", lines(row))
    assert starts(path, version_2_with_negative=True) == ([[0]], [["Ann"]])
    path = write(tmp_path / "b.jsonl", lines(row | {"is_impossible": "True"}))
    assert starts(path, version_2_with_negative=True) == ([[]], [[]])


def test_other_answers_are_refused(tmp_path):
    for start, message in (("x", "not a number"), (8.5, "answer_start is 8.5, not a whole number")):
        path = write(tmp_path / "a.jsonl", lines(SQUAD | {"answers": {"text": ["Ann"], "answer_start": [start]}}))
        with pytest.raises(ValueError, match=f"a.jsonl, question 1, 'answers': {message}"):
            starts(path)
    row = SQUAD | {"answers": {"text": ["Ann"], "answer_start": [0]}, "is_impossible": "perhaps"}
    with pytest.raises(ValueError, match="is_impossible is 'perhaps', neither true nor false"):
        starts(write(tmp_path / "a.jsonl", lines(row)))


# -- translation --


@pytest.mark.parametrize("streaming", [False, True])
def test_languages_stay_in_their_columns(streaming, tmp_path):
    settings = {"target_lang": "de", "streaming": streaming}
    path = write(tmp_path / "a.csv", "en,de,source\nbird,Vogel,\ntree,Baum,news,\n")
    _, splits = load(Translation, TranslationArguments, train_file=path, **settings)
    assert [(row["source"], row["target"]) for row in sorted(splits["train"], key=str)] == [
        ("bird", "Vogel"), ("tree", "Baum"),
    ]  # fmt: skip
    path = write(tmp_path / "a.jsonl", lines({"de": "x\u2028y", "en": "a"}, {"en": "b"}, {"en": "NA", "de": "null"}))
    _, splits = load(Translation, TranslationArguments, train_file=path, **settings)
    assert {row["target"] for row in splits["train"]} == {"x\u2028y", "null"}


# -- recommendation --


def histories(path, **settings):
    task, splits = load(Recommendation, RecommendationArguments, interactions_file=path, **settings)
    return {row["user"]: row["source"] + [row["target"]] for row in splits["test"]}


INTERACTIONS = "user_id,item_id,timestamp\nu1,i1,1\nu1,i2,2\nu1,i3,3\n"
FORMS = {
    "ends.csv": "user_id,item_id,timestamp\nu1,i3,3,\nu1,i1,1,\nu1,i2,2,\n",
    "semicolons.csv": INTERACTIONS.replace(",", ";"),
    "rows.tsv": INTERACTIONS.replace(",", "\t"),
    "rows.inter": INTERACTIONS.replace(",", "\t").replace("user_id\titem_id", "user_id:token\titem_id:token"),
    "hidden.csv": gzip.compress(INTERACTIONS.encode()),
    "bom.jsonl": "\ufeff" + lines(*({"user_id": "u1", "item_id": f"i{n}", "timestamp": n} for n in (1, 2, 3))),
    "keys.jsonl": lines(
        {"item_id": "i0", "timestamp": 0}, *({"user_id": "u1", "item_id": f"i{n}", "timestamp": n} for n in (1, 2, 3))
    ),
    "bytes.parquet": pd.DataFrame(
        {"user_id": [b"u1"] * 3, "item_id": [b"i1", b"i2", b"i3"], "timestamp": [1, 2, 3]}
    ).to_parquet(),
    "dates.csv": "user_id,item_id,timestamp\nu1,i3,01/03/2024\nu1,i1,31/01/2024\nu1,i2,05/02/2024\n",
    "nanoseconds.csv": "user_id,item_id,timestamp\n"
    + "".join(f"u1,i{n},{1_700_000_000_000_000_000 + n}\n" for n in (3, 1, 2)),
}


@pytest.mark.parametrize("name", FORMS)
def test_interactions_of_every_form(name, tmp_path):
    assert histories(write(tmp_path / name, FORMS[name])) == {"u1": ["i1", "i2", "i3"]}


def test_users_may_be_named_like_nothing(tmp_path):
    rows = "".join(f"{user},i{n},{n}\n" for user in ("NA", "null", "None") for n in (1, 2, 3))
    assert set(histories(write(tmp_path / "a.csv", f"user_id,item_id,timestamp\n{rows}"))) == {"NA", "null", "None"}
    write(tmp_path / RANKS_FILE, "user,target,rank\nNA,x,3\nnull,y,1\n01,z,2\n")
    assert read_ranks(str(tmp_path)).to_dict() == {"NA": 3, "null": 1, "01": 2}


def test_ids_and_times_that_are_none_are_refused_with_their_place(tmp_path):
    rows = [{"user_id": "u", "item_id": [1, 2], "timestamp": 1}]
    with pytest.raises(ValueError, match=r"a.jsonl, row 1: 'item_id' is '\[1, 2\]', not an id"):
        histories(write(tmp_path / "a.jsonl", lines(*rows)))
    latin = "user_id,item_id,timestamp\nu,ö,1\n".encode("latin-1")
    with pytest.raises(ValueError, match="a.csv, line 2: can't be read as UTF-8 text"):
        histories(write(tmp_path / "a.csv", latin))
    text = "user_id,item_id,timestamp\nu,a,05/02/2024\nu,b,03/04/2024\n"
    with pytest.raises(ValueError, match="b.csv: nothing in 'timestamp' says whether"):
        histories(write(tmp_path / "b.csv", text))


def ready(tmp_path, *cells):
    rows = "".join('u{},"{}",x\n'.format(n, cell.replace('"', '""')) for n, cell in enumerate(cells))
    path = write(tmp_path / "test.csv", f"user_id,items,target\n{rows}")
    _, splits = load(Recommendation, RecommendationArguments, test_file=path)
    return splits["test"]["source"][:]


def test_lists_of_items_in_cells(tmp_path):
    assert ready(tmp_path, "[12, 15, 18]", "['a', 'b']", "12 15") == [["12", "15", "18"], ["a", "b"], ["12", "15"]]
    for cell in ("12,15,18", "a|b|c", '[{"item_id": 12}]', "['a' 'b']"):
        with pytest.raises(ValueError, match="test.csv, row 1: 'items' is "):
            ready(tmp_path, cell)


def test_ids_of_two_columns_meet(tmp_path):
    path = write(tmp_path / "test.csv", 'user_id,items,target\n1,"[10, 11]",12.0\n2,"[11, 12]",10.0\n')
    _, splits = load(Recommendation, RecommendationArguments, test_file=path)
    assert splits["test"]["target"][:] == ["12", "10"]


def test_candidates_are_lists_too(tmp_path):
    path = write(tmp_path / "test.csv", 'user_id,items,target,among\n1,"[10, 11]",12,"[12, 13, 13]"\n,1 2,3,13 14\n')
    settings = {"test_file": path, "candidates_column": "among"}
    _, splits = load(PromptRanking, PromptRankingArguments, **settings)
    assert splits["test"]["candidates"][:] == [["12", "13"], ["13", "14"]]
    path = write(tmp_path / "test.csv", "user_id,items,target,among\n1,10 11,12,\n")
    with pytest.raises(ValueError, match="test.csv, row 1: no items in 'among' to rank"):
        load(PromptRanking, PromptRankingArguments, **settings)


# -- recommend --


def served(path, **settings):
    return read_histories(RecommendArguments(history=path, **settings))[0]


def test_histories_to_recommend_for(tmp_path):
    path = write(tmp_path / "a.csv", 'user_id,items\nann,"[1, 2]"\nbob,3 4\n')
    assert served(path) == {"ann": ["1", "2"], "bob": ["3", "4"]}
    path = write(tmp_path / "a.json", '{"ann": [1, 2.0], "bob": ["3"]}')
    assert served(path) == {"ann": ["1", "2"], "bob": ["3"]}
    assert served(write(tmp_path / "b.json", "[1, 2]")) == {"1": ["1", "2"]}
    assert served(write(tmp_path / "c.jsonl", '\ufeff{"user_id": "x\u2028", "items": ["1"]}')) == {"x": ["1"]}


def test_no_history_takes_anothers_place(tmp_path, capsys):
    path = write(tmp_path / "a.csv", "user_id,items\n2,1 2\n,3 4\n5,6\n")
    assert served(path) == {"2": ["1", "2"], "(2)": ["3", "4"], "5": ["6"]}
    assert "1 of 3 rows without a user go by their numbers" in capsys.readouterr().err
    path = write(tmp_path / "b.csv", "user_id,items\nann,1 2\nbob,3\nann,4\n")
    with pytest.raises(ValueError, match="b.csv: 2 histories of user 'ann'; keep one row for each user"):
        served(path)
    with pytest.raises(ValueError, match="c.json: 'ann' is there twice"):
        served(write(tmp_path / "c.json", '{"ann": [1], "ann": [2]}'))
    with pytest.raises(ValueError, match="d.json: holds columns, not lists of items by user"):
        served(write(tmp_path / "d.json", '{"user_id": ["ann"], "items": [["1"]]}'))
    with pytest.raises(ValueError, match="e.json: a list holds what is not an id"):
        served(write(tmp_path / "e.json", '[["1"], ["2"]]'))
