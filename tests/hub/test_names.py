"""A model that isn't there: said in one line, after one question to the Hub at most."""

from __future__ import annotations

import socket
import threading
from types import SimpleNamespace

import pytest

# By what is named: the verb's words before the name and after it.
VERBS = {
    "finetune": (["translation", "--output_dir", "out", "--model_name_or_path"], []),
    "evaluate": (["classification"], []),
    "predict": (["question_answering"], []),
    "translate": ([], []),
    "answer": ([], ["--knowledge", ".", "Who?"]),
    "recommend": ([], ["--history", "clicks.json"]),
    "export": ([], ["out", "--to", "native"]),
    "inspect": ([], []),
}


def say(verbs, names):
    """Each verb's line on the model of its own name."""
    import contextlib
    import io
    from pathlib import Path

    from finetune_deepseek.__main__ import guarded

    Path("clicks.json").write_text('["a", "b"]')
    said = {}
    for verb, (before, after) in verbs.items():
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
            code = guarded([*before, names[verb], *after], verb)
        lines = [line for line in err.getvalue().splitlines() if "deepseek-hf: error" in line]
        said[verb] = [code, *lines]
    return said


def asked(hub, name):
    return [request for request in hub.requests if name in request]


def test_a_name_that_the_hub_does_not_have_is_asked_for_once(hub, run_client):
    names = {verb: f"alice/absent-{verb}" for verb in VERBS}
    said = run_client(say, VERBS, names, hub=hub)
    for verb, (code, line) in said.items():
        assert code == 2 and f"{names[verb]}: no such folder, and no such model on the Hub" in line
        assert len(asked(hub, names[verb])) == 1, verb


def test_what_can_be_no_id_is_not_asked_for(hub, run_client, tmp_path):
    (tmp_path / "translation").mkdir()
    names = dict.fromkeys(VERBS, f"{tmp_path}/translatoin")
    names |= {"translate": "./absent", "export": "a/b/c", "inspect": "~/absent", "recommend": r"runs\absent"}
    before = len(hub.requests)
    said = run_client(say, VERBS, names, hub=hub)
    for verb, (code, line) in said.items():
        near = " (did you mean 'translation'?)" if "translatoin" in names[verb] else ""
        assert code == 2 and f"{names[verb]}: no such folder{near}; an id on the Hub is written owner/name." in line
    assert len(hub.requests) == before


def data_set(name):
    from finetune_deepseek.__main__ import guarded

    return guarded(["translation", "--preset", "tiny_v3", "--output_dir", "out", "--dataset_name", name])


def test_a_data_set_is_asked_for_once(hub, run_client):
    assert run_client(data_set, "alice/absent-set", hub=hub) == 2
    assert len(asked(hub, "absent-set")) == 1


@pytest.fixture
def dead_hub():
    """A server that hangs up on everyone, and the number of its visitors."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        hub = SimpleNamespace(endpoint=f"http://127.0.0.1:{server.getsockname()[1]}", visitors=0)

        def hang_up():
            while True:
                try:
                    server.accept()[0].close()
                except OSError:  # closed, the test is over
                    return
                hub.visitors += 1

        threading.Thread(target=hang_up, daemon=True).start()
        yield hub


def test_a_hub_that_does_not_answer_is_tried_once(dead_hub, run_client):
    names = {verb: f"alice/absent-{verb}" for verb in VERBS}
    said = run_client(say, VERBS, names, hub=dead_hub)
    for verb, (code, line) in said.items():
        assert code == 2 and f"{names[verb]}: no such folder, and the Hub can't be asked for a model of" in line
    assert dead_hub.visitors == len(VERBS)


def in_a_home(variable, place, path):
    """The line of a run on a file, whose rows `datasets` keeps in a cache that can't be made."""
    import contextlib
    import io
    import os

    os.environ[variable] = place
    from finetune_deepseek.__main__ import guarded

    flags = ["--preset", "tiny_v3", "--train_file", path, "--target_lang", "de", "--output_dir", "out"]
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        guarded(["translation", *flags])
    return err.getvalue().splitlines()[-1]


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_DATASETS_CACHE"])
def test_a_cache_that_cannot_be_written_is_named_with_its_variable(variable, run_client, tmp_path):
    (tmp_path / "rows.csv").write_text("en,de\none,eins\n")
    place = str(tmp_path / "rows.csv" / "home")  # not even root makes a folder in a file
    line = run_client(in_a_home, variable, place, str(tmp_path / "rows.csv"))
    assert line.endswith(f"; the cache {place} can't be written: set {variable} to a folder that can")
