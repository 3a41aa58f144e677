"""`deepseek-hf pretrain`: what is read, what is trained on, what is counted, and what is refused."""

import gzip
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from finetune_deepseek.__main__ import guarded
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.language import documents as documents_module
from finetune_deepseek.language.documents import document_ids, load_documents
from finetune_deepseek.language.task import LanguageModeling, evenly
from finetune_deepseek.language.windows import windows
from finetune_deepseek.training import trainer as trainer_module
from finetune_deepseek.training.run import run_stages
from modeling_deepseek import DeepSeekForCausalLM
from tests.small_runs import flags
from tokenization_deepseek import DeepSeekTokenizer, train_tokenizer

TEXTS = ["One bird sings.", "", "Zwei Vögel singen, und noch ein dritter kommt dazu.", "三只鸟在唱歌。", "   ", "Four"]
FULL = [text for text in TEXTS if text.strip()]
TINY = {
    "preset": "tiny_v3", "vocab_size": 300, "use_cpu": True, "disable_tqdm": True, "max_seq_length": 16,
    "per_device_train_batch_size": 2, "learning_rate": 0.01, "logging_steps": 1, "max_steps": 1,
    "max_continuations": 2, "max_new_tokens": 4, "prompt_tokens": 6,
}  # fmt: skip


def write(path: Path, texts=TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "rows.jsonl")


def run(folder, **settings):
    argv = flags(TINY | {"output_dir": folder} | settings)
    return run_stages(LanguageModeling, parse_command("language_modeling", LanguageModeling.arguments_class, argv))


def arguments(**settings):
    return LanguageModeling.arguments_class(**settings)


# -- reading --


def texts_of(**settings):
    return [row["text"] for row in load_documents(arguments(**settings))["train"]]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("separator", "expected"),
    [
        ("file", ["One\r\nbird\n\n \n##\nsings\u2028on.\n"]),
        ("line", ["One", "bird", "##", "sings\u2028on."]),
        ("blank_line", ["One\r\nbird", "##\nsings\u2028on."]),
        ("##", ["One\r\nbird\n\n ", "sings\u2028on."]),
    ],
)
def test_a_text_file_is_what_its_separator_says(separator, expected, streaming, tmp_path):
    path = tmp_path / "corpus.txt.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbfOne\r\nbird\n\n \n##\nsings\xe2\x80\xa8on.\n"))
    assert texts_of(train_file=str(path), document_separator=separator, streaming=streaming) == expected


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    write(tmp_path / "a.jsonl")
    pq.write_table(pa.table({"body": TEXTS, "other": range(len(TEXTS))}), tmp_path / "a.parquet")
    with gzip.open(tmp_path / "a.json.gz", "wt", encoding="utf-8") as file:
        json.dump([{"text": text} for text in TEXTS], file)
    (tmp_path / "a.txt").write_text("\n<s>\n".join(TEXTS), encoding="utf-8")
    (tmp_path / "a.txt.zst").write_bytes(pa.compress("\n<s>\n".join(TEXTS).encode(), "zstd", asbytes=True))
    for name, settings in (
        *(("a.jsonl", {}), ("a.parquet", {"text_column": "body"}), ("a.json.gz", {})),
        *(("a.txt", {"document_separator": "<s>"}), ("a.txt.zst", {"document_separator": "<s>"})),
    ):
        for streaming in (False, True):
            assert texts_of(train_file=str(tmp_path / name), streaming=streaming, **settings) == FULL, name


def test_a_folder_may_hold_several_files_of_a_split(tmp_path):
    for number, text in enumerate(FULL[:3]):
        write(tmp_path / f"train-{number}.jsonl", [text])
    (tmp_path / "dev.txt").write_text(FULL[3])
    found = load_documents(arguments(data_dir=str(tmp_path)))
    assert found["train"]["text"] == FULL[:3] and found["validation"]["text"] == [FULL[3]]


@pytest.mark.parametrize(
    ("texts", "share", "train", "validation"),
    [
        (FULL, 0.3, FULL[:3], FULL[3:]),
        (FULL[:2], 0.9, FULL[:1], FULL[1:2]),
        (["0123456789"], 0.2, ["01234567"], ["89"]),
    ],
)
def test_a_share_is_held_out(texts, share, train, validation, tmp_path):
    found = load_documents(arguments(train_file=str(write(tmp_path / "a.jsonl", texts)), validation_share=share))
    assert found["train"]["text"] == train and found["validation"]["text"] == validation


# -- tokens and blocks --


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(FULL, 300)


def test_a_document_has_a_token_in_front_and_one_at_the_end(tokenizer):
    (ids,) = document_ids(tokenizer, [f"one{tokenizer.eos_token}two"])
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[1:-1]  # what looks like a control token is text
    assert tokenizer.decode(ids[1:-1]) == f"one{tokenizer.eos_token}two"
    other = train_tokenizer(FULL, 300, add_bos_token=False)
    other.bos_token = None
    assert document_ids(other, ["a"])[0][0] == other.eos_token_id


def test_a_tokenizer_of_characters():
    found = train_tokenizer(["春眠不觉晓", "a-b\n\nab\n"], 600, "characters")
    for text in ("春眠 ab\n", "\n\n  ba-"):
        ids = found.encode(text, add_special_tokens=False)
        assert len(ids) == len(text) and found.decode(ids) == text
    assert found.decode(found.encode("é晚", add_special_tokens=False)) == "é晚"  # by bytes, where it is new


@pytest.mark.parametrize("packing", ["sequential", "best_fit"])
def test_streamed_blocks_are_those_of_data_read_whole(packing, rows, tokenizer, monkeypatch):
    monkeypatch.setattr(documents_module, "CHUNK", 2)
    monkeypatch.setattr("finetune_deepseek.language.task.CHUNK", 2)
    made = []
    for streaming in (False, True):
        task = LanguageModeling(
            arguments(train_file=str(rows), streaming=streaming, packing=packing, max_seq_length=8), 0
        )
        made.append(task.features(task.load_splits()["train"], tokenizer, is_training=True))
    whole, stream = made
    columns = ("input_ids", "pieces", "length")
    expected = sorted(tuple(map(str, (row[name] for name in columns))) for row in whole)
    blocks = iter(stream)
    for _ in range(2):  # passes
        once = [next(blocks) for _ in expected]
        assert sorted(tuple(map(str, (row[name] for name in columns))) for row in once) == expected
    assert task.load_splits()["train"].take(1) is not None


def test_a_stream_goes_on_at_every_block(rows, tokenizer, monkeypatch):
    monkeypatch.setattr(documents_module, "CHUNK", 2)
    task = LanguageModeling(arguments(train_file=str(rows), streaming=True, max_seq_length=8), 0)

    def stream():
        return task.features(task.load_splits()["train"], tokenizer, is_training=True)

    first, read = stream(), []
    for block, _ in zip(first, range(60), strict=False):
        read.append(block)
    for place in range(50):
        source = stream()
        for _, _ in zip(range(place + 3), source, strict=False):
            pass  # a loader reads ahead
        position = json.loads(json.dumps(source.position(place)))
        other = stream()
        other.go_on(position)
        assert [block for block, _ in zip(other, range(5), strict=False)] == read[place : place + 5], place
    assert position["passes"] > 0 and position["chunk"] > 0


# -- what is counted --


def test_windows_by_hand():
    assert [*windows(5, 3)] == [(0, 3, 1), (2, 5, 3)]
    assert [*windows(6, 3)] == [(0, 3, 1), (2, 5, 3), (4, 6, 5)]
    assert [*windows(6, 4, 1)] == [(0, 4, 1), (1, 5, 4), (2, 6, 5)]
    assert [*windows(2, 4)] == [(0, 2, 1)] and [*windows(1, 4)] == []
    for length in range(2, 30):
        for size in range(2, 9):
            for stride in range(1, size):
                counted = [n for _, end, first in windows(length, size, stride) for n in range(first, end)]
                assert counted == [*range(1, length)]
    with pytest.raises(ValueError, match="a stride of 4 tokens: give 1 to 3"):
        [*windows(9, 4, 4)]


def nats_by_hand(folder, text, size):
    """Each token by a forward over what its window has before it: windows begin every size - 1 tokens."""
    model, tokenizer = DeepSeekForCausalLM.from_pretrained(folder).eval(), DeepSeekTokenizer.from_pretrained(folder)
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    nats = []
    for place in range(1, len(ids)):
        start = (place - 1) // (size - 1) * (size - 1)
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:place]])).logits[0, -1].double()
        nats.append(-logits.log_softmax(-1)[ids[place]].item())
    return nats


def test_perplexity_and_bits_per_byte_by_hand(rows, tmp_path):
    held = write(tmp_path / "held.jsonl", FULL[:3])  # of 15, 52 and 21 bytes
    results = run(tmp_path / "out", train_file=rows, validation_file=held, per_device_eval_batch_size=4)
    nats = [nat for text in FULL[:3] for nat in nats_by_hand(tmp_path / "out", text, 16)]
    size = 15 + 52 + 21
    assert [len(text.encode()) for text in FULL[:3]] == [15, 52, 21]
    assert results["eval_loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert results["eval_perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)
    assert results["eval_bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / size, rel=1e-5)
    again = run(tmp_path / "again", model_name_or_path=tmp_path / "out", preset=None, vocab_size=None, max_steps=None,
                validation_file=held, do_eval=True, eval_stride=1)  # fmt: skip
    assert again["eval_loss"] != results["eval_loss"]
    whole = run(tmp_path / "whole", model_name_or_path=tmp_path / "out", preset=None, vocab_size=None, max_steps=None,
                validation_file=held, do_eval=True, max_seq_length=100)  # fmt: skip
    nats = [nat for text in FULL[:3] for nat in nats_by_hand(tmp_path / "out", text, 1000)]
    assert whole["eval_loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)


@pytest.mark.slow
def test_two_processes_count_and_train_as_one(rows, tmp_path):
    settings = TINY | {"train_file": rows, "validation_file": rows, "per_device_eval_batch_size": 2, "do_eval": True}
    alone = run(tmp_path / "one", **settings | {"per_device_train_batch_size": 4, "do_train": True})
    settings |= {"output_dir": tmp_path / "two", "ddp_backend": "gloo", "do_train": True}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, more in (("two", {}), ("stream", {"streaming": True, "max_steps": 3})):
        command = [
            *launch,
            "-m",
            "finetune_deepseek",
            "pretrain",
            *flags(settings | more | {"output_dir": tmp_path / name}),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "two" / "eval_results.json").read_text())
    assert found["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-4)
    assert found["eval_bits_per_byte"] == pytest.approx(alone["eval_bits_per_byte"], rel=1e-4)


# -- runs --


def test_one_step_gives_a_model_a_card_and_continuations(rows, tmp_path, capsys):
    files = {f"{split}_file": rows for split in ("train", "validation", "test")}
    results = run(tmp_path / "out", **files)
    assert {"test_perplexity", "test_bits_per_byte", "eval_loss", "train_loss"} <= set(results)
    assert results["train_documents"] == 4 and results["train_characters"] == sum(map(len, FULL))
    assert results["train_bytes"] == sum(len(text.encode()) for text in FULL)
    out = capsys.readouterr().out
    assert "4 document(s), 2 without text left out" in out and "blocks of 16" in out and "% padding" in out
    lines = [json.loads(line) for line in (tmp_path / "out/generated_predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all({"source", "target", "prediction"} <= set(line) for line in lines)
    assert FULL[0].startswith(lines[0]["source"] + lines[0]["target"])
    card = (tmp_path / "out/README.md").read_text()
    assert "bits per byte" in card and "license: apache-2.0" in card and "4 document(s)" in card
    assert json.loads((tmp_path / "out/deepseek_hf.json").read_text())["settings"] == {"max_seq_length": 16}


def test_the_verbs_of_a_saved_model(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quiet = ["--use_cpu", "True", "--disable_tqdm", "True"]
    assert guarded(flags(TINY | {"train_file": rows, "output_dir": "base"}), "pretrain") == 0
    assert guarded(["language_modeling", "base", f"--validation_file={rows}", *quiet], "evaluate") == 0
    assert guarded(["language_modeling", "base", f"--test_file={rows}", "--max_new_tokens=3", *quiet], "predict") == 0
    assert "eval_bits_per_byte" in json.loads(Path("runs/evaluate-base/all_results.json").read_text())
    assert Path("runs/predict-base/generated_predictions.jsonl").read_text().count("\n") == 4
    adapter = TINY | {"preset": None, "vocab_size": None, "model_name_or_path": "base", "use_peft": True}
    assert guarded(flags(adapter | {"train_file": rows, "output_dir": "lora"}), "pretrain") == 0
    assert guarded(["language_modeling", "lora", f"--validation_file={rows}", *quiet], "evaluate") == 0
    assert capsys.readouterr().err.count("error") == 0


def test_a_model_learns_three_documents_by_heart(tmp_path):
    path = write(tmp_path / "rows.jsonl", FULL[:3])
    lengths = {"max_seq_length": 64, "max_new_tokens": 30, "prompt_tokens": 4, "max_continuations": 3}
    results = run(tmp_path / "out", train_file=path, test_file=path, max_steps=60, **lengths)
    assert results["test_perplexity"] < 1.2
    for line in map(json.loads, (tmp_path / "out/generated_predictions.jsonl").read_text().splitlines()):
        assert line["prediction"] == line["target"].strip()


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "settings",
    [{}, {"streaming": True}, {"streaming": True, "gradient_accumulation_steps": 2, "dataloader_num_workers": 1}],
    ids=["whole", "streamed", "by a worker"],
)
def test_a_killed_run_goes_on_to_the_same_bytes(settings, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "CHUNK", 2)
    settings = {
        "train_file": rows,
        "max_steps": 9,
        "save_steps": 1,
        "hidden_dropout": 0.1,
        "do_train": True,
    } | settings
    run(tmp_path / "whole", **settings)
    original = trainer_module.FinetuneTrainer.training_step

    def dying(self, *args, **kwargs):
        if self.state.global_step == 7:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.FinetuneTrainer, "training_step", dying)
    with pytest.raises(Killed):
        run(tmp_path / "killed", **settings)
    monkeypatch.setattr(trainer_module.FinetuneTrainer, "training_step", original)
    run(tmp_path / "killed", **settings, resume_from_checkpoint="true")
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == resumed


def test_a_budget_of_tokens_says_how_many_steps(rows, tmp_path):
    run(tmp_path / "out", train_file=rows, max_steps=None, tokens_budget=100, streaming=True)
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    assert state["global_step"] == 4  # of 2 blocks of 16 tokens


def test_bfloat16_gives_about_the_same_scores(rows, tmp_path):
    found = [
        run(tmp_path / str(bf16), train_file=rows, validation_file=rows, bf16=bf16)["eval_bits_per_byte"]
        for bf16 in (False, True)
    ]
    assert found[0] == pytest.approx(found[1], rel=0.01)


def test_a_loss_that_is_no_number_ends_the_run(rows, tmp_path, capsys):
    argv = flags(TINY | {"train_file": rows, "output_dir": tmp_path / "out", "learning_rate": 1e30, "max_steps": 9})
    assert guarded(argv, "pretrain") == 2
    assert "is not a finite number, so training has stopped" in capsys.readouterr().err


def test_documents_that_are_there_twice_are_counted(tmp_path, capsys):
    train, held = write(tmp_path / "a.jsonl", ["x y", "z", " x y\n"]), write(tmp_path / "b.jsonl", ["z", "new \ufffd"])
    results = run(tmp_path / "out", train_file=train, validation_file=held)
    report = json.loads((tmp_path / "out/data_report.json").read_text())
    assert report["train"]["duplicate_documents"] == {"count": 1, "examples": ["x y"]}
    assert report["validation"]["documents_in_train"] == {"count": 1, "examples": ["z"]}
    assert report["validation"]["replacement_characters"]["count"] == 1 and "documents_in_train" not in report["train"]
    assert "document is in the training split" in capsys.readouterr().out and results["train_documents"] == 3


def test_a_run_goes_on_with_other_batches(rows, tmp_path, monkeypatch):
    """Where a stream is counts rows, not steps: three of two, then one of four and one of two."""
    seen, original = [], documents_module.BlockStream.go_on
    monkeypatch.setattr(
        documents_module.BlockStream, "go_on", lambda self, position: seen.append(position) or original(self, position)
    )
    settings = {"train_file": rows, "streaming": True, "save_steps": 1}
    run(tmp_path / "out", **settings, max_steps=3)
    more = {"resume_from_checkpoint": "true", **settings}
    run(tmp_path / "out", **more, max_steps=4, per_device_train_batch_size=4)
    run(tmp_path / "out", **more, max_steps=5)
    assert [position["after"] for position in seen] == [6, 10]


def test_evenly():
    assert evenly([0, 1, 2, 3, 4], 3) == [0, 2, 4] and evenly([5, 6], 3) == [5, 6] and evenly([], 3) == []


# -- bad input: one line that says what, where, and what to do --


def line_of(capsys, settings, verb="pretrain"):
    assert guarded(flags(settings), verb) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    return line


@pytest.mark.parametrize(
    ("content", "settings", "expected"),
    [
        ('{"body": "x"}\n', {}, "rows.jsonl: no column 'text'; it has body. Set --text_column."),
        ('{"text": 5}\n', {}, "'text' is '5', not a text"),
        ('{"text": ""}\n', {}, "rows.jsonl: no document has text."),
        ("", {}, "rows.jsonl: the file is empty."),
        ('{"text": "x y z"}\n', {"max_seq_length": 500}, "--max_seq_length 500: the model has 128 positions"),
        ('{"text": "x y z"}\n', {"max_seq_length": 1}, "--max_seq_length 1: it must be 2 or more"),
        ('{"text": "x y z"}\n', {"eval_stride": 16, "validation_file": "rows"}, "--eval_stride 16: give less than"),
        ('{"text": "x y z"}\n', {"streaming": True, "max_steps": None}, "so give --max_steps or --tokens_budget"),
        ('{"text": "x y z"}\n', {"streaming": True, "validation_share": 0.1}, "name a validation file"),
        ('{"text": "x y z"}\n', {"tokens_budget": 5}, "--tokens_budget and --max_steps both say when to stop"),
        ('{"text": "x y z"}\n', {"packing": "random"}, "invalid choice: 'random'"),
        (
            '{"text": "x y z"}\n',
            {"config_overrides": "attention_direction=bidirectional"},
            "each token would see the next",
        ),
    ],
)
def test_bad_input_is_one_line(content, settings, expected, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(content)
    path = tmp_path / "rows.jsonl"
    settings |= {"validation_file": path} if "validation_file" in settings else {}
    line = line_of(capsys, TINY | {"train_file": path, "output_dir": tmp_path / "out"} | settings)
    assert expected in line


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0", "can't be read as UTF-8 text"),
        (b"a\0b\n", "holds zero bytes, so it is no text"),
        (b"\n \n\n", "no document has text."),
        (b"", "the file is empty."),
    ],
)
@pytest.mark.parametrize("separator", ["file", "blank_line", "line"])
def test_bad_texts_are_one_line(content, expected, separator, tmp_path, capsys):
    (tmp_path / "corpus.txt").write_bytes(content)
    settings = {"train_file": tmp_path / "corpus.txt", "document_separator": separator, "output_dir": tmp_path / "out"}
    line = line_of(capsys, TINY | settings)
    assert "corpus.txt" in line and (expected in line or "no documents" in line)


@pytest.mark.parametrize("streaming", [False, True])
def test_half_a_character_is_named_by_its_row(streaming, tmp_path):
    path = tmp_path / "cut.jsonl"
    path.write_text('{"text": "whole \\ud83d\\ude00"}\n{"text": "half \\ud83d"}\n')
    with pytest.raises(ValueError, match=r"cut.jsonl, row 2: the text holds half of a character") as error:
        load_documents(arguments(train_file=[str(path)], streaming=streaming))
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_an_end_is_refused(rows, tmp_path, capsys):
    tokenizer = train_tokenizer(FULL, 300)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = json.loads((tmp_path / "tokenizer/tokenizer_config.json").read_text())
    config |= {"bos_token": None, "eos_token": None, "tokenizer_class": "PreTrainedTokenizerFast"}  # none of ours
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    settings = {"train_file": rows, "tokenizer_name": tmp_path / "tokenizer", "output_dir": tmp_path / "out"}
    assert "this tokenizer has no eos_token" in line_of(capsys, TINY | settings)


def test_little_held_out_text_is_said(rows, tmp_path, capsys):
    held = write(tmp_path / "held.jsonl", ["Hi"])
    results = run(tmp_path / "out", train_file=rows, validation_file=held, max_seq_length=64)
    assert results["eval_samples"] == 1
    assert "less than a block of 64: their score says little" in capsys.readouterr().out


def test_a_data_set_is_read_by_its_columns(tmp_path, monkeypatch):
    data = {"train": Dataset.from_dict({"content": FULL, "id": [1, 2, 3, 4]})}
    monkeypatch.setattr("finetune_deepseek.data.sources.open_hub", lambda name, config, streaming: {
        split: rows.to_iterable_dataset() if streaming else rows for split, rows in data.items()
    })  # fmt: skip
    for streaming in (False, True):
        assert texts_of(dataset_name="a/b", text_column="content", streaming=streaming) == FULL
        with pytest.raises(ValueError, match=r"a/b, split train: no column 'text'; it has content, id"):
            texts_of(dataset_name="a/b", streaming=streaming)
