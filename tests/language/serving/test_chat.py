"""`deepseek-hf chat`: lines in, answers alone out, commands, and what a terminal adds."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest

from finetune_deepseek.language.serving.arguments import ChatArguments
from finetune_deepseek.language.serving.chat_format import choose_template
from finetune_deepseek.language.serving.conversation import Conversation
from finetune_deepseek.language.serving.terminal import Terminal
from tests.language.serving.conftest import tiny

EOS = "<｜end▁of▁sentence｜>"
SHORT = ("--max_new_tokens", 60)


def test_a_pipe_gets_the_answers_alone(folders, main, script):
    script([f"one{EOS}", f"two\nthree{EOS}", f"四{EOS}"])
    code, out, err = main("chat", folders / "v3", *SHORT, stdin="hi\n\n/reset\nhow are you\n   \n天气")
    assert (code, out, err) == (0, "one\ntwo\nthree\n四\n", "")


def test_exit_ends_and_an_empty_input_does(folders, main, script):
    script([f"one{EOS}"])
    assert main("chat", folders / "v3", *SHORT, stdin="hi\n/exit\nmore\n") == (0, "one\n", "")
    assert main("chat", folders / "v3", *SHORT) == (0, "", "")


def test_reasoning_is_no_answer_unless_it_is_asked_for(folders, main, script):
    said = f"<think>\nhm\n</think>\n\none{EOS}"
    script([said, said, said])
    shown = ("--show_reasoning", "true")
    assert main("chat", folders / "v3", *SHORT, stdin="hi\n")[1] == "one\n"
    assert main("chat", folders / "v3", *SHORT, *shown, stdin="hi\n")[1] == "<think>\nhm\n</think>\n\none\n"
    assert main("chat", folders / "v3", *SHORT, stdin="/params show_reasoning=true\nhi\n")[1].startswith("<think>\nhm")


def test_what_was_said_before_is_read_again(folders, main, tmp_path):
    alone = main("chat", folders / "v3", "--max_new_tokens", 9, stdin="how\n")[1]
    after = main("chat", folders / "v3", "--max_new_tokens", 9, stdin="hello\nhow\n")[1]
    assert not after.endswith(alone)
    reset = main("chat", folders / "v3", "--max_new_tokens", 9, stdin="hello\n/reset\nhow\n")[1]
    assert reset.endswith(alone)


def test_a_conversation_is_saved_and_loaded(folders, main, script, tmp_path):
    script([f"one{EOS}", f"two{EOS}"])
    path = tmp_path / "talk.json"
    commands = f"/system Be brief.\nhi\n/save {path}\nhow\n/save {path}\n"
    assert main("chat", folders / "v3", *SHORT, stdin=commands)[0] == 0
    messages = json.loads(path.read_text())["messages"]
    assert [(m["role"], m["content"]) for m in messages] == [
        ("system", "Be brief."), ("user", "hi"), ("assistant", "one"), ("user", "how"), ("assistant", "two")
    ]  # fmt: skip
    flags = ("--max_new_tokens", 9)
    loaded = main("chat", folders / "v3", *flags, stdin=f"/load {path}\nseven\n")
    assert loaded[0] == 0 and loaded[2].startswith("4 messages.\n")
    (tmp_path / "rows.json").write_text(json.dumps({"messages": [*messages, {"role": "user", "content": "seven"}]}))
    row = main("generate", folders / "v3", "--input", tmp_path / "rows.json", *flags)[1]
    assert json.loads(row)["completions"][0]["text"] + "\n" == loaded[1]
    assert main("generate", folders / "v3", "--input", path, *flags)[0] == 0


def test_a_loaded_conversation_brings_its_system_message_or_none(folders, main, tmp_path):
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "one"}]
    (tmp_path / "bare.json").write_text(json.dumps(said))
    parts = [{"role": "system", "content": [{"type": "text", "text": "Be kind."}]}, *said]
    (tmp_path / "parts.json").write_text(json.dumps(parts))
    for name, expected in (("bare", said), ("parts", parts)):
        saved = tmp_path / f"{name}_saved.json"
        commands = f"/system Be brief.\n/load {tmp_path / f'{name}.json'}\n/save {saved}\n"
        code, _, err = main("chat", folders / "v3", "--max_new_tokens", 3, stdin=commands)
        assert code == 0 and json.loads(saved.read_text())["messages"] == expected
        assert "the system message from before is dropped" in err
    code, _, err = main("chat", folders / "v3", "--max_new_tokens", 3, stdin=f"/load {tmp_path / 'bare.json'}\n")
    assert code == 0 and err.startswith("2 messages.\n")


def test_several_lines_and_a_leading_slash_are_one_message(folders, main, script, tmp_path):
    script([f"one{EOS}"] * 3)
    path = tmp_path / "talk.json"
    commands = f'"""a\n\nb"""\n"""c"""\n//etc\n/save {path}\n'
    assert main("chat", folders / "v3", *SHORT, stdin=commands)[0] == 0
    said = [m["content"] for m in json.loads(path.read_text())["messages"] if m["role"] == "user"]
    assert said == ["a\n\nb", "c", "/etc"]


def test_settings_are_changed_on_the_way(folders, main):
    drawn = "/params temperature=1.5 top_k=5 seed=3 max_new_tokens=7\n"
    code, out, err = main("chat", folders / "v3", stdin=f"{drawn}hi\n")
    assert code == 0 and "next token: drawn, temperature 1.5, top_k 5, seed 3; max_new_tokens 7\n" in err
    flags = ("--temperature", 1.5, "--top_k", 5, "--seed", 3, "--max_new_tokens", 7)
    assert main("chat", folders / "v3", *flags, stdin="hi\n")[1] == out
    greedy = main("chat", folders / "v3", "--max_new_tokens", 7, stdin="hi\n")[1]
    back = main("chat", folders / "v3", *flags, stdin="/params temperature=null top_k=null\nhi\n")
    assert back[1] == greedy != out and "the likeliest token" in back[2]
    assert "cut at 7 tokens (/params max_new_tokens=N)." in back[2]


FAULTS = {
    "/relaod x": "line 1: no such command: /relaod (did you mean 'reload'?); /help lists them.",
    "/params temprature=1": "line 1: /params temprature=1: write name=value (did you mean 'temperature'?); there is",
    "/params temperature": "line 1: /params temperature: write name=value",
    "/params temperature=warm": "line 1: /params temperature=warm: it takes a number.",
    "/params seed=true": "line 1: /params seed=true: it takes a whole number.",
    "/params max_new_tokens=null": "line 1: /params max_new_tokens=null: it takes a whole number.",
    "/params top_p=3": "line 1: --top_p 3: it must be above 0 and at most 1.",
    "/params thinking=2": "line 1: /params thinking=2: it takes true or false.",
    "/params thinking=true\nhi": "line 2: the conversation: this chat format has no place for thinking=True.",
    "/save": "line 1: /save: name a file.",
    "/save none/a.json": "line 1: /save none/a.json: can't be written (No such file or directory).",
    "/save taken.json": "line 1: /save taken.json: it is there already; name another file.",
    "/load none.json": "line 1: /load none.json: can't be read (No such file or directory).",
    "/load taken.json": "line 1: /load taken.json: the conversation, message 1: no such role: 'critic'",
    "/load broken.json": "line 1: /load broken.json, line 1: broken JSON",
    "/load empty.json": "line 1: /load empty.json: the conversation: an empty conversation",
    "/load other.json": "line 1: /load other.json: the conversation: a conversation is a list of messages, found",
    "/load number.json": "line 1: /load number.json: the conversation: a conversation is a list of messages, found",
    "hi " * 200: "line 1: the message: ",
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_fault_in_a_script_ends_it_with_one_line(text, folders, main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.json").write_text('{"messages": [{"role": "critic", "content": "x"}]}')
    (tmp_path / "broken.json").write_text('{"messages": [')
    (tmp_path / "number.json").write_text("7")
    (tmp_path / "empty.json").write_text('{"messages": []}')
    (tmp_path / "other.json").write_text('{"talk": []}')
    message = FAULTS[text].replace(" (did you mean 'reload'?)", " (did you mean 'load'?)")
    code, out, err = main("chat", folders / "v3", "--max_new_tokens", 5, stdin=f"{text}\nhello\n")
    assert (code, out) == (2, "") and err.splitlines()[-1].startswith(f"deepseek-hf: error: {message}"), err
    assert err.count("error") == 1


def test_bytes_that_are_no_text_are_named_by_line(folders, main):
    code, out, err = main("chat", folders / "v3", stdin=b"\n\xff\n")
    assert (code, out) == (2, "") and err == "deepseek-hf: error: line 2: not UTF-8 text (invalid start byte).\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plain"], "its tokenizer has no chat format; name the one that it was trained on, --chat_template v3 say"),
        (["v3", "--chat_template", "r2"], "--chat_template r2: no such format or file"),
        (["v3", "--temperature", "-1"], "--temperature -1: it must be 0 or more."),
        (
            ["v3", "--use_mtp"],
            "v3 has neither prediction layers nor draft stages (num_nextn_predict_layers) to guess t",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_the_weights_are_read(argv, message, folders, main, monkeypatch):
    monkeypatch.setattr(
        "finetune_deepseek.language.serving.language_model.pretrained_model", lambda *_: pytest.fail("was read")
    )
    code, out, err = main("chat", folders / argv[0], *argv[1:], stdin="hi\n")
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err


def test_a_model_of_another_task_is_said_to_be_one(folders, main, tmp_path):
    shutil.copytree(folders / "v3", tmp_path / "v3")
    (tmp_path / "v3" / "deepseek_hf.json").write_text('{"format": 1, "task": "translation", "settings": {}}')
    code, out, err = main("chat", tmp_path / "v3", "--max_new_tokens", 3, stdin="hi\n")
    assert code == 0 and out and "v3 was trained for translation, not on conversations" in err


def test_the_format_of_a_release_is_named(trained):
    trained = type(trained)(tokenizer_object=trained.backend_tokenizer)
    for name, expected in (("deepseek-ai/DeepSeek-V3.2", "v3.2"), ("deepseek-ai/DeepSeek-V3-Base", "v3 say")):
        with pytest.raises(ValueError, match=rf"has no chat format; .* --chat_template {expected} \(there is coder"):
            choose_template(trained, None, name)


def test_a_format_by_name_or_file_for_a_model_without_one(folders, main, tmp_path):
    named = main("chat", folders / "plain", "--chat_template", "v3", "--max_new_tokens", 5, stdin="hi\n")
    (tmp_path / "own.jinja").write_text((folders / "v3" / "chat_template.jinja").read_text("utf-8"), "utf-8")
    flags = ("--chat_template", tmp_path / "own.jinja", "--max_new_tokens", 5)
    assert named[0] == 0 and main("chat", folders / "plain", *flags, stdin="hi\n")[1] == named[1]


# -- a terminal --


@pytest.fixture
def screen(lm, script, monkeypatch, capfd):
    """A terminal whose streams say that they are one; gives what stands on it after an answer."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    lm.model.generation_config.eos_token_id = lm.tokenizer.convert_tokens_to_ids(EOS)

    def said(answer, **flags):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        terminal = Terminal(Conversation(lm, ChatArguments(max_new_tokens=60, **flags)))
        script([answer + EOS])
        terminal.say("hello")
        return capfd.readouterr().out

    return said


def test_a_terminal_shows_reasoning_dimmed(screen, monkeypatch):
    said = "<think>\nhm\n</think>\n\none"
    assert screen(said) == "\x1b[2mhm\x1b[0m\n\none\n"
    assert screen(said, show_reasoning=False) == "one\n"
    assert screen("<think>\nhm") == "\x1b[2mhm\x1b[0m\n\n"
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        monkeypatch.setenv(name, value)
        assert screen(said) == "<think>\nhm\n</think>\n\none\n"


def test_an_answer_cannot_move_the_cursor(screen):
    assert screen("one\x1b[2Jtwo\x07\tthree\r\n\x9b1m") == "one[2Jtwo\tthree\n1m\n"


class Screen:
    """A process on a pseudo terminal of its own."""

    def __init__(self, *argv):
        code = "import sys; from finetune_deepseek.__main__ import main; sys.exit(main())"
        self.leader, follower = pty.openpty()
        self.child = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, argv)], stdin=follower, stdout=follower, stderr=follower,
            start_new_session=True, env=os.environ | {"TERM": "xterm"}, preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(follower)
        self.rest = ""

    def until(self, text, seconds=60):
        """What is shown up to a text; it has to come."""
        end = time.monotonic() + seconds
        while text not in self.rest and select.select([self.leader], [], [], max(0, end - time.monotonic()))[0]:
            self.rest += os.read(self.leader, 1024).decode("utf-8", "replace")
        assert text in self.rest, self.rest
        before, _, self.rest = self.rest.partition(text)
        return before

    def type(self, keys):
        os.write(self.leader, keys)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo terminals")
def test_a_real_terminal_converses_stops_and_goes_on(trained, tmp_path):
    """A fault ends nothing, Ctrl-C stops an answer that would take minutes, and the next one follows."""
    tiny("tiny_v3", trained, max_position_embeddings=50_000).save_pretrained(tmp_path)
    trained.save_pretrained(tmp_path)
    screen = Screen("chat", tmp_path, "--max_new_tokens", 49_000)
    try:
        screen.until("/help lists the commands")
        for keys, answer in ((b"/relaod\n", "no such command: /relaod"), (b"\x03", "/exit or Ctrl-D ends.")):
            screen.until(">>> ")
            screen.type(keys)
            screen.until(answer)
        screen.until(">>> ")
        screen.type(b"hello\n")
        screen.until("hello\r\n")
        time.sleep(1)
        screen.type(b"\x03")
        assert screen.until(">>> ", 20)
        screen.type(b"/params max_new_tokens=5\nhow\n")
        screen.until("cut at 5 tokens")
        screen.until(">>> ")
        screen.type(b"\x04")
        assert screen.child.wait(30) == 0
    finally:
        if screen.child.poll() is None:
            screen.child.send_signal(signal.SIGKILL)
        os.close(screen.leader)


def _own_terminal():
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
