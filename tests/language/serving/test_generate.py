"""`deepseek-hf generate`: what it reads, what it writes, how it goes on, what it refuses."""

import json
import shutil

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model

from modeling_deepseek import DeepSeekForCausalLM, DeepSeekForEmbedding, DeepSeekModel
from modeling_deepseek.drafting import LayerDrafter
from tests.language.serving.conftest import tiny

SHORT = ("--max_new_tokens", 5)
HELLO = [{"role": "user", "content": "hello"}]
TALK = [*HELLO, {"role": "assistant", "content": "how"}, {"role": "user", "content": "you"}]


def rows(out):
    return [json.loads(line) for line in out.splitlines()]


def texts(out):
    return [[completion["text"] for completion in row["completions"]] for row in rows(out)]


def written(folders, name, ids, count=5, dtype=torch.float32):
    """What transformers writes behind these ids."""
    model = DeepSeekForCausalLM.from_pretrained(folders / name, dtype=dtype)
    found = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=2)
    return found[0, len(ids) :]


def test_words_lines_and_rows_are_the_same_prompts(folders, main, trained, tmp_path):
    prompts = ["hello", "how are", "", "天气"]
    (tmp_path / "a.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    frame = pd.DataFrame({"prompt": prompts, "id": ["a", "b", "c", "d"]})
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    code, out, err = main("generate", folders / "plain", "--input", tmp_path / "a.txt", *SHORT)
    assert code == 0 and "4/4" in err and "the likeliest token" in err and "chat format" not in err
    expected = [[trained.decode(written(folders, "plain", trained(p).input_ids), skip_special_tokens=True)]
                for p in prompts]  # fmt: skip
    assert texts(out) == expected
    first = rows(out)[0]
    assert first == {"row": 1, "prompt": "hello", "completions": [
        {"text": expected[0][0], "finish_reason": "length", "tokens": 5}]}  # fmt: skip
    assert texts(main("generate", folders / "plain", *prompts, *SHORT)[1]) == expected
    assert texts(main("generate", folders / "plain", *SHORT, stdin="\n".join(prompts) + "\n")[1]) == expected
    for name in ("a.parquet", "a.jsonl"):
        out = main("generate", folders / "plain", "--input", tmp_path / name, *SHORT)[1]
        assert texts(out) == expected and [row["id"] for row in rows(out)] == ["a", "b", "c", "d"]


def test_tokens_are_guessed_by_the_layers_that_the_model_has(trained, main, tmp_path, monkeypatch):
    trained.save_pretrained(tmp_path)
    model = tiny("tiny_v3_mtp", trained)
    model.save_pretrained(tmp_path)
    guess, counts = LayerDrafter.guess, []
    monkeypatch.setattr(LayerDrafter, "guess", lambda *args: counts.append(1) or guess(*args))
    expected = main("generate", tmp_path, "hello", "seven", "--max_new_tokens", 6)[1]
    code, out, err = main("generate", tmp_path, "hello", "seven", "--max_new_tokens", 6, "--use_mtp")
    assert (code, out) == (0, expected) and counts and "next token: the likeliest token, guessed ahead." in err, err
    model.model.layers, model.config.num_nextn_predict_layers = model.model.layers[:3], 0
    model.save_pretrained(tmp_path)  # without them, whatever config.json says
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 2}))
    code, out, err = main("generate", tmp_path, "hello", "--use_mtp")
    assert (code, out) == (2, "") and "no prediction layers to guess by; leave use_mtp out" in err.splitlines()[-1]


def test_a_chat_format_is_used_where_there_is_one(folders, main, trained):
    code, out, err = main("generate", folders / "v3", "hello", *SHORT)
    assert code == 0 and "prompts go through the chat format; --raw continues them as they stand." in err
    ids = trained.apply_chat_template(HELLO, add_generation_prompt=True)["input_ids"]
    assert texts(out) == [[trained.decode(written(folders, "v3", ids), skip_special_tokens=True)]]
    raw = main("generate", folders / "v3", "--raw", "hello", *SHORT)  # a switch takes no prompt for its value
    expected = trained.decode(written(folders, "v3", trained("hello").input_ids), skip_special_tokens=True)
    assert texts(raw[1]) == [[expected]] and "chat format" not in raw[2]
    assert main("generate", folders / "v3", "--raw", "true", "hello", *SHORT)[1] == raw[1]
    named = main("generate", folders / "plain", "--chat_template", "v2", "hello", *SHORT)
    assert "prompts go through" in named[2]
    assert texts(main("generate", folders / "v3", "hello", "--system", "Be brief.", *SHORT)[1]) != texts(out)


def test_conversations_are_gone_on_with(folders, main, trained, tmp_path):
    path = tmp_path / "talks.parquet"
    begun = [*HELLO, {"role": "assistant", "content": "how are"}]
    pd.DataFrame({"messages": [TALK, begun]}).to_parquet(path)
    code, out, err = main("generate", folders / "v3.1", "--input", path, *SHORT)
    assert code == 0 and "prompts go" not in err
    ids = trained.apply_chat_template(
        TALK, add_generation_prompt=True, chat_template=_template(folders, "v3.1")
    )["input_ids"]  # fmt: skip
    open_ids = trained(
        "<｜begin▁of▁sentence｜><｜User｜>hello<｜Assistant｜></think>how are", add_special_tokens=False
    )
    expected = [written(folders, "v3.1", part) for part in (ids, open_ids.input_ids)]
    assert texts(out) == [[trained.decode(part, skip_special_tokens=True)] for part in expected]
    assert rows(out)[1]["messages"] == begun
    thinks = main("generate", folders / "v3.1", "--input", path, "--thinking", *SHORT)
    assert thinks[0] == 0 and texts(thinks[1])[0] != texts(out)[0]
    as_text = tmp_path / "talks.csv"
    pd.DataFrame({"talk": ["hello"], "messages": [json.dumps(TALK)]}).to_csv(as_text, index=False)
    assert texts(main("generate", folders / "v3.1", "--input", as_text, *SHORT)[1])[0] == texts(out)[0]
    assert rows(main("generate", folders / "v3.1", "--input", as_text, "--column", "talk", *SHORT)[1])[0]["prompt"]


def _template(folders, name):
    return (folders / name / "chat_template.jinja").read_text(encoding="utf-8")


REFUSED = {
    "empty conversation": ([], "row 1: an empty conversation"),
    "unknown role": ([{"role": "critic", "content": "x"}], "message 1: no such role: 'critic'; there is system,"),
    "no content": ([*HELLO, {"role": "assistant"}], "row 1, message 2: it has no content"),
    "no message": (["hello"], "row 1, message 1: expected {"),
    "number": (7, "row 1: 'messages' is int, neither a text nor a conversation (a list)."),
    "nothing": (None, "row 1: 'messages' is empty; write a prompt, or leave the row out."),
    "no place": ([{"role": "developer", "content": "x"}], "row 1: this chat format has no role developer."),
    "part": ([{"role": "user", "content": [{"type": "image"}]}], "row 1: this chat format has no place for a part of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_conversation_is_refused_with_its_row(name, folders, main, tmp_path):
    value, message = REFUSED[name]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": value}) + "\n" + json.dumps({"messages": HELLO}) + "\n")
    code, out, err = main("generate", folders / "v3", "--input", path, *SHORT)
    assert (code, out) == (2, "") and message in err and str(path) in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["v3", "--raw", "--chat", "x"], "--raw and --chat say the opposite"),
        (["v3", "--raw", "x", "--system", "y"], "--system has no effect with --raw"),
        (["v3", "x", "--thinking", "true"], "prompt 1: this chat format has no place for thinking=True."),
        (["v2", "x", "--chat_template", "v4.x"], "--chat_template v4.x: no such format or file"),
        (
            ["plain", "x", "--chat"],
            "its tokenizer has no chat format; name the one that it was trained on, --chat_temp",
        ),
        (["v3", "x", "--num_beams", "2", "--top_p", "0.5"], "--top_p draws, --num_beams doesn't"),
        (["v3", "x", "--num_beams", "2", "--num_return_sequences", "3"], "2 beams have no more than 2 completions"),
        (["v3", "x", "--use_mtp"], "v3 has neither prediction layers nor draft stages (num_nextn_predict_layers) to"),
        (
            ["v3", "x", "--use_mtp", "--num_beams", "2"],
            "--use_mtp guesses how one text goes on, --num_beams writes se",
        ),
        (["v3", "x", "--do_sample", "false", "--top_k", "2"], "--top_k has no effect with --do_sample false"),
        (["v3", "x", "--top_p", "0"], "--top_p 0: it must be above 0 and at most 1."),
        (["v3", "x", "--stop", ""], "--stop '': an empty text is everywhere"),
        (["v3", "x", "--device", "tpu:7"], "--device tpu:7: "),
        (["v3", "x", "--input", "a.txt"], "two places for prompts"),
        (["v3", "--input", "none.txt"], "--input none.txt: no such file"),
        (["v3", "x", "--output", "none/a.jsonl"], "there is no such folder to write to"),
        (["v3", "x", "--column", "y"], "--column names a column of a table"),
        (["v3"], "There is no prompt; write it behind the model, in quotes, or name a file by --input."),
        (["v3", "--stop", "a", "swallowed"], "There is no prompt"),
        (["v3", "x", "--output", "."], "--output .: this is a folder; name a file in it."),
        (["v3", "--raw", "word " * 200], "prompt 1: 602 tokens leave no room in the model's 128 positions; shorten"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(argv, message, folders, main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = main("generate", folders / argv[0], *argv[1:])
    assert (code, out) == (2, "") and message in err, err
    assert [line for line in err.splitlines() if "error" in line] == err.splitlines()[-1:]


def test_a_table_without_prompts_names_its_columns(folders, main, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("promt,other\nhello,1\n")
    err = main("generate", folders / "plain", "--input", path)[2]
    assert "no column 'prompt'; it has promt, other. Set --column (did you mean 'promt'?)." in err
    path.write_text("prompt,other\nhello,1\n,2\n")
    assert "row 2: 'prompt' is empty; write a prompt" in main("generate", folders / "plain", "--input", path)[2]


def test_other_models_are_refused_by_name(folders, main, trained, tmp_path):
    trained.save_pretrained(tmp_path / "embedding")
    shutil.copytree(tmp_path / "embedding", tmp_path / "trunk")
    config = tiny("tiny_v3", trained).config
    DeepSeekForEmbedding(config).save_pretrained(tmp_path / "embedding")
    DeepSeekModel(config).save_pretrained(tmp_path / "trunk")
    shutil.copytree(tmp_path / "trunk", tmp_path / "bert")
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}')
    for name, kind in (("embedding", "DeepSeekForEmbedding"), ("trunk", "DeepSeekModel"), ("bert", "BertForMaskedLM")):
        code, out, err = main("generate", tmp_path / name, "hello")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"it is a {kind}, which writes no text; name a language model" in err
    assert "(deepseek-hf answer --retriever uses this one)" in main("generate", tmp_path / "embedding", "x")[2]


def test_an_adapter_writes_what_it_does_on_its_base(folders, main, trained, tmp_path):
    base = DeepSeekForCausalLM.from_pretrained(folders / "v3")
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["o_proj", "gate_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    ids = trained("hello").input_ids
    expected = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=5, do_sample=False, pad_token_id=2)
    code, out, err = main("generate", tmp_path / "adapter", "--raw", "hello", *SHORT)
    assert code == 0, err
    assert texts(out) == [[trained.decode(expected[0, len(ids) :], skip_special_tokens=True)]]
    assert texts(out) != texts(main("generate", folders / "v3", "--raw", "hello", *SHORT)[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_writes_what_transformers_does(folders, main, trained, dtype):
    code, out, err = main("generate", folders / "v3", "--raw", "hello", "--dtype", dtype, *SHORT)
    assert code == 0, err
    expected = written(folders, "v3", trained("hello").input_ids, dtype=getattr(torch, dtype))
    assert texts(out) == [[trained.decode(expected, skip_special_tokens=True)]]
    code, answer, err = main("chat", folders / "v3", "--dtype", dtype, *SHORT, stdin="hello\n")
    ids = trained.apply_chat_template(HELLO, add_generation_prompt=True)["input_ids"]
    expected = written(folders, "v3", ids, dtype=getattr(torch, dtype))
    assert code == 0 and answer.strip() == trained.decode(expected, skip_special_tokens=True).strip()


def test_standard_output_that_nobody_reads_is_no_fault(folders, main, monkeypatch):
    def closed(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("finetune_deepseek.language.serving.generation_run.show", closed)
    monkeypatch.setattr("os.dup2", lambda *_: None)
    code, _, err = main("generate", folders / "plain", "hello", *SHORT)
    assert code == 1 and "Broken pipe" not in err


# -- a file that is half written --

MANY = [f"{word} {number}" for number, word in enumerate(["hello", "how are you", "天气", "seven"] * 3)]


def command(folders, path, *more):
    flags = ("--temperature", 1.0, "--num_return_sequences", 2, "--batch_size", 1, *SHORT, *more)
    return ("generate", folders / "v3", "--input", path / "in.txt", "--output", path / "out.jsonl", *flags)


def test_a_run_that_was_killed_anywhere_is_gone_on_with(folders, main, tmp_path):
    (tmp_path / "in.txt").write_text("\n".join(MANY), encoding="utf-8")
    out = tmp_path / "out.jsonl"
    assert main(*command(folders, tmp_path))[:2] == (0, "")
    whole = out.read_bytes()
    assert [row["row"] for row in rows(whole.decode())] == [*range(1, 13)]
    ends = [place + 1 for place, byte in enumerate(whole) if byte == 10]
    cuts = [0, *ends, *(end - 1 for end in ends), ends[3] + 1, ends[2] + whole[ends[2] :].index("天".encode()) + 1]
    for cut in cuts:
        out.write_bytes(whole[:cut])
        code, _, err = main(*command(folders, tmp_path))
        assert (code, out.read_bytes()) == (0, whole), cut
        done = sum(end <= cut for end in ends)
        assert (f"{done} of 12 prompts are there; going on behind them" in err) == bool(done)
    settings = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    assert settings["temperature"] == 1 and settings["model"] == "v3" and settings["dtype"] == "float32"


def test_a_file_of_other_settings_or_prompts_is_refused(folders, main, tmp_path):
    (tmp_path / "in.txt").write_text("hello\nhow", encoding="utf-8")
    out, path = tmp_path / "out.jsonl", tmp_path / "in.txt"
    assert main(*command(folders, tmp_path))[0] == 0
    before = out.read_bytes()

    def refused(message, *more):
        code, _, err = main(*command(folders, tmp_path, *more))
        assert code == 2 and message in err and "--overwrite" in err, err
        assert out.read_bytes() == before

    refused("it was begun with temperature 1.0, now it is 0.5; name another file", "--temperature", 0.5)
    refused('it was begun with system null, now it is "x"', "--system", "x")
    refused("it was begun with chat_format", "--raw")
    path.write_text("hello\nwhat", encoding="utf-8")
    refused("out.jsonl, line 2: it isn't of this input's prompt 2")
    path.write_text("hello\nhow\nare", encoding="utf-8")  # more prompts than before are gone on with
    assert main(*command(folders, tmp_path))[0] == 0 and len(rows(out.read_text())) == 3
    path.write_text("hello", encoding="utf-8")
    before = out.read_bytes()
    code, _, err = main(*command(folders, tmp_path))
    assert code == 2 and "3 lines, but there are 1 prompts" in err and out.read_bytes() == before
    assert main(*command(folders, tmp_path, "--overwrite", "--temperature", 0.5))[0] == 0
    assert len(rows(out.read_text())) == 1


def test_a_file_that_somebody_else_wrote_is_left_alone(folders, main, tmp_path):
    (tmp_path / "in.txt").write_text("hello")
    (tmp_path / "out.jsonl").write_text("notes\n")
    code, _, err = main(*command(folders, tmp_path))
    assert code == 2 and "out.jsonl.settings.json, which would say how to go on, isn't" in err
    assert (tmp_path / "out.jsonl").read_text() == "notes\n"
    (tmp_path / "out.jsonl").write_text("")
    assert main(*command(folders, tmp_path))[0] == 0


@pytest.mark.parametrize("row", ['{"prompt": "%s"}', '{"messages": [{"role": "user", "content": "%s"}]}'])
def test_half_a_character_is_named_by_its_row(row, folders, main, tmp_path):
    (tmp_path / "in.jsonl").write_text("\n".join([row % "hello", row % r"cut \ud83d"]))
    code, _, err = main("generate", folders / "v3", "--input", tmp_path / "in.jsonl")
    assert code == 2 and "in.jsonl, row 2: it holds half of a character" in err and err.count("\n") == 1


def test_prompts_are_never_written_over(folders, main, tmp_path, monkeypatch):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "hello"}\n')
    monkeypatch.chdir(tmp_path)
    code, _, err = main("generate", folders / "v3", "--input", path, "--output", "in.jsonl", "--overwrite")
    assert code == 2 and "in.jsonl: it is the --input; name another file." in err
    assert path.read_text() == '{"prompt": "hello"}\n'


def test_a_model_that_was_trained_on_is_another(folders, main, trained, tmp_path):
    shutil.copytree(folders / "v3", tmp_path / "v3")
    (tmp_path / "in.txt").write_text("hello")
    assert main(*command(tmp_path, tmp_path))[0] == 0
    tiny("tiny_v3", trained, initializer_range=0.3).save_pretrained(tmp_path / "v3")
    code, _, err = main(*command(tmp_path, tmp_path))
    assert code == 2 and "it was begun with weights" in err


def test_a_model_of_another_task_gets_the_text_though_its_tokenizer_has_a_format(folders, main, tmp_path):
    shutil.copytree(folders / "v3", tmp_path / "v3")
    raw = main("generate", folders / "v3", "--raw", "hello", *SHORT)[1]
    for task, expected in (("translation", True), ("conversation", False)):
        (tmp_path / "v3" / "deepseek_hf.json").write_text(json.dumps({"format": 1, "task": task, "settings": {}}))
        assert (main("generate", tmp_path / "v3", "hello", *SHORT)[1] == raw) == expected
    assert main("generate", tmp_path / "v3", "--chat", "hello", *SHORT)[1] != raw


def test_the_chat_format_of_a_release_that_brings_none_is_offered(folders, main, tmp_path):
    released = tmp_path / "DeepSeek-V3.2"
    shutil.copytree(folders / "plain", released)
    for more, is_offered in ((), True), (("--raw",), False):
        code, _, err = main("generate", released, "hello", "--max_new_tokens", 2, *more)
        assert code == 0 and ("; --chat_template v3.2 has its release's" in err) == is_offered
    assert "--chat_template" not in main("generate", folders / "plain", "hello", "--max_new_tokens", 2)[2]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_a_model_with_another_tokenizer_or_generation_config_is_another(name, folders, main, tmp_path):
    shutil.copytree(folders / "v3", tmp_path / "v3")
    (tmp_path / "in.txt").write_text("hello")
    argv = ("generate", tmp_path / "v3", "--input", tmp_path / "in.txt", "--output", tmp_path / "out.jsonl", *SHORT)
    assert main(*argv)[0] == main(*argv)[0] == 0
    content = json.loads((tmp_path / "v3" / name).read_text())
    (tmp_path / "v3" / name).write_text(json.dumps(content | {"more": 1}))
    code, _, err = main(*argv)
    assert code == 2 and "out.jsonl: it was begun with weights " in err


@pytest.mark.parametrize("asked", [{"prompt_lookup_num_tokens": 2}, {"dola_layers": "low"}, {"max_time": 0.001},
                                   {"token_healing": True}, {"penalty_alpha": 0.6, "top_k": 4}])  # fmt: skip
def test_ways_of_generating_that_no_call_expects_are_left_out_aloud(asked, folders, main, tmp_path):
    shutil.copytree(folders / "plain", tmp_path / "asks")
    path = tmp_path / "asks/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | asked))
    plain = main("generate", folders / "plain", "hello", "how are you", *SHORT)
    found = main("generate", tmp_path / "asks", "hello", "how are you", *SHORT)
    assert found[:2] == plain[:2] and plain[0] == 0
    name, value = next(iter(asked.items()))
    assert f"its generation_config.json asks for {name} {value}, which is not followed" in found[2]


@pytest.mark.parametrize("asked", [{"stop_strings": ["x", 5]}, {"stop_strings": 5}, {"eos_token_id": "2"}])
def test_ends_of_texts_that_are_none_are_refused(asked, folders, main, tmp_path):
    shutil.copytree(folders / "plain", tmp_path / "asks")
    path = tmp_path / "asks/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | asked))
    code, out, err = main("generate", tmp_path / "asks", "hello", *SHORT)
    name, value = next(iter(asked.items()))
    assert (code, out) == (2, "") and f": {name} {value!r} in its generation_config.json is no " in err
