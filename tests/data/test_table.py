"""Reading rows of files: every form gives the same cells, and what can't be read is refused with its place."""

import gzip
import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_deepseek.data.files import json_of, read_json
from finetune_deepseek.data.table import ROWS, batches, read_columns

ROWS_OF = {"id": ["u1", "u2"], "text": ["one, two\nthree", 'a "b"']}


def read(folder, name, content, **options):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_columns(str(folder / name), **options)


def refused(folder, name, content):
    with pytest.raises(ValueError) as error:
        read(folder, name, content)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{folder}/", "")


def zst(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


FRAME = pd.DataFrame(ROWS_OF)
FORMS = {
    "rows.csv": FRAME.to_csv(index=False),
    "semicolons.csv": FRAME.to_csv(index=False, sep=";"),
    "tabs.csv": FRAME.to_csv(index=False, sep="\t"),
    "bars.csv": FRAME.to_csv(index=False, sep="|"),
    "returns.csv": FRAME.to_csv(index=False, lineterminator="\r\n"),
    "bom.csv": "\ufeff" + FRAME.to_csv(index=False),
    "rows.tsv": FRAME.to_csv(index=False, sep="\t"),
    "lines.jsonl": FRAME.to_json(orient="records", lines=True),
    "bom.jsonl": "\ufeff" + FRAME.to_json(orient="records", lines=True),
    "lines.json": FRAME.to_json(orient="records", lines=True),
    "list.json": FRAME.to_json(orient="records"),
    "indented.json": FRAME.to_json(orient="records", indent=2),
    "columns.json": FRAME.to_json(),
    "indented_columns.json": FRAME.to_json(indent=2),
    "objects.json": "\n".join(json.dumps(row, indent=1) for row in FRAME.to_dict("records")),
    "rows.parquet": FRAME.to_parquet(),
    "packed.csv.gz": gzip.compress(FRAME.to_csv(index=False).encode()),
    "hidden.csv": gzip.compress(FRAME.to_csv(index=False).encode()),
    "packed.jsonl.zst": zst(FRAME.to_json(orient="records", lines=True).encode()),
    "packed.parquet.gz": gzip.compress(FRAME.to_parquet()),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_cells(name, tmp_path):
    assert read(tmp_path, name, FORMS[name]) == ROWS_OF


def test_a_delimiter_at_the_end_of_rows_shifts_nothing(tmp_path):
    text = "user_id,item_id,timestamp,rating\nu1,i7,1500000000,5,\nu2,i8,1500000001,4,\n"
    assert read(tmp_path, "a.csv", text) == {
        "user_id": ["u1", "u2"],
        "item_id": ["i7", "i8"],
        "timestamp": ["1500000000", "1500000001"],
        "rating": ["5", "4"],
    }
    # In the form of R the first cell is a name of the row, and nothing says so.
    assert refused(tmp_path, "b.csv", "en,de\n1,a,b\n") == (
        "b.csv, row 1: 3 cells in a table of 2 columns; mend the row or the header."
    )
    assert refused(tmp_path, "c.csv", "en,de\na,b,\nc,d,news\n").startswith("c.csv, row 2: 3 cells")
    assert refused(tmp_path, "d.csv", "en,de\na,b\nc\n").startswith("d.csv, row 2: 1 cells")


def test_cells_of_csv_stay_texts(tmp_path):
    text = 'a,b\n01,NA\n3.10,null\n1e5,None\n," x"\n'
    assert read(tmp_path, "a.csv", text) == {"a": ["01", "3.10", "1e5", None], "b": ["NA", "null", "None", " x"]}


def test_recboles_heads_lose_their_types_and_quotes_are_letters(tmp_path):
    text = 'user_id:token\titem:list:token_seq\tcity:name\n"u\t1 2\tx\n'
    assert read(tmp_path, "a.inter", text) == {"user_id": ['"u'], "item:list": ["1 2"], "city:name": ["x"]}


def test_only_a_line_feed_ends_a_json_line(tmp_path):
    rows = [{"text": f"a{sign}b"} for sign in "\u2028\u2029\x85\x0b\x0c\x1c"]
    text = "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert read(tmp_path, "a.jsonl", text) == {"text": [row["text"] for row in rows]}


def test_a_key_may_be_absent_from_any_row(tmp_path):
    text = '{"a": 1}\n{"b": 2}\n' + '{"a": 3}\n' * ROWS + '{"c": 4}\n'
    columns = read(tmp_path, "a.jsonl", text)
    assert list(columns) == ["a", "b", "c"] and {len(cells) for cells in columns.values()} == {ROWS + 3}
    assert columns["a"][:3] == [1, None, 3] and columns["b"][:2] == [None, 2]
    assert columns["c"][-2:] == [None, 4] and columns["a"][-1] is None
    assert read(tmp_path, "a.jsonl", text, limit=2) == {"a": [1, None], "b": [None, 2]}


def test_integers_of_any_size_are_exact(tmp_path):
    assert read(tmp_path, "a.jsonl", f'{{"a": {2**70 + 1}}}\n{{"a": 1}}') == {"a": [2**70 + 1, 1]}


def test_a_file_comes_in_parts(tmp_path):
    (tmp_path / "a.csv").write_text("a\n" + "".join(f"{n}\n" for n in range(ROWS + 1)))
    assert [len(part["a"]) for part in batches(str(tmp_path / "a.csv"))] == [ROWS, 1]
    (tmp_path / "b.csv").write_text("a,b\n")
    assert list(batches(str(tmp_path / "b.csv"))) == [{"a": [], "b": []}]


REFUSED = {
    "latin.csv": (
        "a,b\nx,y\nx,ö\n".encode("latin-1"),
        "latin.csv, line 3: can't be read as UTF-8 text (byte 0xf6",
    ),
    "utf16.csv": ("a,b\n".encode("utf-16"), "utf16.csv, line 1: can't be read as UTF-8 text (byte 0xff at 1)"),
    "bare.csv": ("a,b\n".encode("utf-16-le"), "bare.csv, line 1: holds zero bytes, as UTF-16 does"),
    "open.csv": ('a,b\n1,2\n3,"4\n5,6\n', "open.csv, row 2: broken quotes or line ends"),
    "twice.csv": ("a,b,a\n1,2,3\n", "twice.csv: two columns are named 'a'"),
    "plain.csv.gz": ("a,b\n1,2\n", "plain.csv.gz: can't be unpacked"),
    "plain.csv.zst": ("a,b\n1,2\n", "plain.csv.zst: can't be unpacked"),
    "cut.csv.gz": (gzip.compress(b"a,b\n1,2\n" * 1000)[:40], "cut.csv.gz: can't be unpacked"),
    "empty.jsonl": ("", "empty.jsonl: the file is empty"),
    "word.json": ("5", "word.json, object 1: expected an object in braces, found '5'"),
    "list.json": ('[{"a": 1}, 5]', "list.json, row 2: expected an object in braces, found '5'"),
    "broken.json": ('[{"a": 1},\n {"a" 2}]', "broken.json, line 2: broken JSON: Expecting ':' delimiter (column 7)"),
    "broken.jsonl": ('{"a": 1}\n\n{"a" 2}\n', "broken.jsonl, line 3: broken JSON: Expecting ':' delimiter (column 6)"),
    "latin.jsonl": ('{"a": 1}\n{"a": "ö"}'.encode("latin-1"), "latin.jsonl, line 2: can't be read as UTF-8 text"),
    "no.parquet": ("no parquet", "no.parquet: "),
    "rows.xml": ("<a/>", "rows.xml: unknown ending; use .json, .jsonl, .csv"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cant_be_read_is_refused_with_its_place(name, tmp_path):
    content, message = REFUSED[name]
    assert refused(tmp_path, name, content).startswith(message)


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("rows.jsonl", '{"a": 1, "b": 2}\n{"a": 1, "b": 2, "a": 3}\n', "line 2"),
        ("list.json", '[{"a": 1}, {"b": [{"a": 2}]},\n {"b": {"a": 3, "a": 3}}]', "row 3"),
        ("one.json", '{\n "b": 1, "a": 1,\n "a": 1}', "object 1"),
        ("objects.json", '{"a":\n1}\n{"a": 1,\n"b": 2, "a": 1}', "object 2"),
    ],
)
def test_a_key_that_a_row_has_twice_is_refused(name, content, where, tmp_path):
    """Of two values the last was taken, whichever is right."""
    assert refused(tmp_path, name, content) == f"{name}, {where}: 'a' is there twice; rename or remove one."


def test_two_columns_of_one_name_in_parquet_are_refused(tmp_path):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([3])], names=["a", "a"]), sink)
    told = refused(tmp_path, "rows.parquet", sink.getvalue().to_pybytes())
    assert told == "rows.parquet: two columns are named 'a'; rename one."


def test_class_numbers_of_a_parquet_file_are_read_by_their_names(tmp_path):
    from datasets import ClassLabel, Dataset, Features, List, Value

    kinds = ClassLabel(names=["cat", "dog"])
    features = Features({"one": kinds, "several": List(kinds), "number": Value("int64")})
    columns = {"one": [1, 0, None], "several": [[0, 1], [], [1]], "number": [1, 0, 7]}
    Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "rows.parquet"))
    names = {"one": ["dog", "cat", None], "several": [["cat", "dog"], [], ["dog"]], "number": [1, 0, 7]}
    assert read_columns(str(tmp_path / "rows.parquet")) == names
    table = pq.read_table(tmp_path / "rows.parquet")
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"huggingface": '{"info": {"features": {"one": 3}}}'}), sink)
    told = refused(tmp_path, "broken.parquet", sink.getvalue().to_pybytes())
    assert told.startswith("broken.parquet: datasets can't read the types that its schema names: ")


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("lines.jsonl", '{"a": 1}\n{"a": DEEP}\n', "lines.jsonl, line 2"),
        ("first.jsonl", '{"a": DEEP}\n{"a": 1}\n', "first.jsonl, line 1"),
        ("list.json", '[{"a": 1},\n {"a": DEEP}]', "list.json, row 2"),
        ("one.json", '{"a": DEEP}', "one.json, object 1"),
        ("bare.json", "DEEP", "bare.json, row 1"),
    ],
)
def test_json_that_nests_too_deep_is_refused_with_its_place(name, content, where, tmp_path):
    message = refused(tmp_path, name, content.replace("DEEP", DEEP))
    assert message == f"{where}: lists or objects inside each other, too deep to be read; write it flatter."


def test_files_of_json_that_nest_too_deep_are_refused(tmp_path):
    (tmp_path / "deep.json").write_text(DEEP)
    with pytest.raises(ValueError, match="^it: lists or objects inside each other, too deep to be read.$"):
        json_of(DEEP, "it")
    with pytest.raises(ValueError, match="deep.json is damaged .lists or objects inside each other"):
        read_json(tmp_path / "deep.json")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_one_line_end_belongs_to_the_separator_and_all_others_to_the_document(end, tmp_path):
    lines = ["one", "", "", "<end>", "", "two", "<end>", "three", ""]
    (tmp_path / "a.txt").write_bytes((end.join(lines) + end).encode())
    texts = [text for part in batches(str(tmp_path / "a.txt"), separator="<end>") for text in part["text"]]
    assert texts == [f"one{end}{end}", f"{end}two", f"three{end}"]
