"""The stand-in Hub itself, checked with the stock clients: huggingface_hub, datasets, transformers, PEFT.

Nothing of ours is used here, so a failure in the other files of this folder is not the server's.
"""

from __future__ import annotations

import pytest


def commit_and_read_back(folder):
    """What huggingface_hub does with a model repository; returns the facts that the tests below look at."""
    from pathlib import Path

    from huggingface_hub import CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def error_of(call, *args, **kwargs):
        try:
            call(*args, **kwargs)
        except HfHubHTTPError as error:
            kinds = (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError)
            name = next((kind.__name__ for kind in kinds if isinstance(error, kind)), "HfHubHTTPError")
            return [error.response.status_code, name]
        except ValueError as error:
            return str(error)
        return None

    def read(revision, path, **kwargs):
        return Path(hf_hub_download(repo, path, revision=revision, **kwargs)).read_text()

    api, repo, facts = HfApi(), "alice/first", {}
    facts["user"] = api.whoami()["name"]
    facts["url"] = str(api.create_repo(repo))
    api.create_repo(repo, exist_ok=True)
    facts["created twice"] = error_of(api.create_repo, repo)

    folder = Path(folder)
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "README.md").write_text("---\ntags: [tiny]\nlibrary_name: transformers\n---\n# Card\n")
    (folder / "sub" / "deep" / "a b+c%41.txt").write_text("odd name")
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 40)
    first = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Add all").oid
    facts["unchanged folder's commit is the old one"] = (
        api.upload_folder(repo_id=repo, folder_path=folder).oid == first
    )

    api.create_tag(repo, tag="v1", tag_message="one")
    api.create_branch(repo, branch="try/this")
    second = api.upload_file(
        repo_id=repo, path_or_fileobj=b"on a branch", path_in_repo="new.txt", revision="try/this"
    ).oid
    third = api.upload_file(repo_id=repo, path_or_fileobj=b"on main", path_in_repo="new.txt").oid
    facts["texts"] = [read(revision, "new.txt") for revision in ("try/this", "main", second, third)]
    facts["at the tag"] = error_of(read, "v1", "new.txt")
    facts["branch's history"] = [commit.title for commit in api.list_repo_commits(repo, revision="try/this")]

    refs = api.list_repo_refs(repo)
    facts["refs"] = sorted(ref.name for ref in refs.branches + refs.tags)
    facts["tag's commit is the first"] = refs.tags[0].target_commit == first
    facts["files"] = sorted(api.list_repo_files(repo))
    facts["top of the tree"] = sorted(entry.path for entry in api.list_repo_tree(repo))
    facts["tree below sub"] = sorted(entry.path for entry in api.list_repo_tree(repo, "sub", recursive=True))
    paths = api.get_paths_info(repo, ["weights.bin", "sub", "nothing"])
    facts["paths"] = sorted((entry.path, bool(getattr(entry, "lfs", None))) for entry in paths)
    info = api.model_info(repo)
    facts["info"] = [info.sha == third, info.private, info.tags, info.library_name, info.card_data.to_dict()]
    facts["found"] = [model.id for model in api.list_models(author="alice", search="fir")]

    local = Path(snapshot_download(repo, revision="v1"))
    facts["snapshot"] = {str(p.relative_to(local)): p.stat().st_size for p in local.rglob("*") if p.is_file()}
    facts["snapshot's bytes"] = (local / "weights.bin").read_bytes() == (folder / "weights.bin").read_bytes()

    api.create_commit(repo, [CommitOperationDelete("sub/")], commit_message="Remove sub")
    facts["after delete"] = sorted(api.list_repo_files(repo))
    facts["delete twice"] = error_of(api.create_commit, repo, [CommitOperationDelete("sub/")], commit_message="again")
    facts["stale parent"] = error_of(
        api.upload_file, repo_id=repo, path_or_fileobj=b"x", path_in_repo="x", parent_commit=first
    )
    api.delete_tag(repo, tag="v1")
    api.delete_branch(repo, branch="try/this")
    facts["refs at the end"] = [ref.name for ref in api.list_repo_refs(repo).branches + api.list_repo_refs(repo).tags]

    api.create_repo("alice/secret", private=True)
    api.upload_file(repo_id="alice/secret", path_or_fileobj=b"hidden", path_in_repo="a.txt")
    facts["private, to its owner"] = Path(hf_hub_download("alice/secret", "a.txt")).read_text()
    fresh = {"cache_dir": "another"}  # else the client falls back to what it has already
    facts["errors"] = {
        "private, nobody": error_of(hf_hub_download, "alice/secret", "a.txt", token=False, **fresh),
        "private, bob": error_of(hf_hub_download, "alice/secret", "a.txt", token="hf_bob", **fresh),
        "wrong token": error_of(api.whoami, token="hf_wrong"),
        "wrong token on a file": error_of(hf_hub_download, repo, "new.txt", token="hf_wrong", **fresh),
        "missing repo": error_of(api.model_info, "alice/nothing"),
        "missing revision": error_of(read, "nowhere", "new.txt"),
        "missing file": error_of(read, "main", "nothing.txt"),
        "commit to a missing branch": error_of(
            api.upload_file, repo_id=repo, path_or_fileobj=b"x", path_in_repo="x", revision="nowhere"
        ),
        "bob writes": error_of(
            HfApi(token="hf_bob").upload_file, repo_id=repo, path_or_fileobj=b"x", path_in_repo="x"
        ),
        "bob creates for alice": error_of(HfApi(token="hf_bob").create_repo, "alice/other"),
        "nobody creates": error_of(HfApi(token=False).create_repo, "alice/other"),
    }
    facts["broken card"] = error_of(
        api.upload_file, repo_id=repo, path_or_fileobj=b"---\na: [\n---\n", path_in_repo="README.md"
    )
    api.update_repo_settings("alice/secret", private=False)
    facts["no longer private"] = Path(hf_hub_download("alice/secret", "a.txt", token=False, **fresh)).read_text()
    api.delete_repo("alice/secret")
    facts["deleted"] = error_of(api.model_info, "alice/secret")
    return facts


@pytest.fixture(scope="module")
def facts(hub, run_client, tmp_path_factory):
    return run_client(commit_and_read_back, str(tmp_path_factory.mktemp("folder")), hub=hub)


def test_creating_a_repository_twice_is_a_conflict(facts, hub):
    assert facts["user"] == "alice"
    assert facts["url"] == f"{hub.endpoint}/alice/first"
    assert facts["created twice"] == [409, "HfHubHTTPError"]


def test_each_revision_gives_its_own_content(facts):
    assert facts["texts"] == ["on a branch", "on main", "on a branch", "on main"]
    assert facts["at the tag"] == [404, "EntryNotFoundError"]
    assert facts["branch's history"] == ["Upload new.txt with huggingface_hub", "Add all", "initial commit"]
    assert facts["refs"] == ["main", "try/this", "v1"]
    assert facts["tag's commit is the first"]
    assert facts["refs at the end"] == ["main"]


def test_listings_agree_with_what_was_committed(facts):
    odd = "sub/deep/a b+c%41.txt"
    assert facts["files"] == ["README.md", "new.txt", odd, "weights.bin"]
    assert facts["top of the tree"] == ["README.md", "new.txt", "sub", "weights.bin"]
    assert facts["tree below sub"] == ["sub/deep", odd]
    assert facts["paths"] == [["sub", False], ["weights.bin", True]]
    assert facts["after delete"] == ["README.md", "new.txt", "weights.bin"]
    card = {"tags": ["tiny"], "library_name": "transformers"}
    assert facts["info"] == [True, False, ["tiny"], "transformers", card]
    assert facts["found"] == ["alice/first"]


def test_a_snapshot_has_the_bytes_of_its_revision(facts):
    assert facts["snapshot"] == {"README.md": 55, "sub/deep/a b+c%41.txt": 8, "weights.bin": 10240}
    assert facts["snapshot's bytes"]


def test_unchanged_files_are_neither_committed_nor_uploaded_again(facts, hub):
    assert facts["unchanged folder's commit is the old one"]
    assert sum(request.startswith("PUT /storage/") for request in hub.requests) == 1


def test_refusals_carry_the_code_that_clients_look_for(facts):
    missing_repo = "RepositoryNotFoundError"
    assert facts["errors"] == {
        "private, nobody": [401, missing_repo],
        "private, bob": [404, missing_repo],
        "wrong token": [401, "HfHubHTTPError"],
        "wrong token on a file": [401, "HfHubHTTPError"],
        "missing repo": [404, missing_repo],
        "missing revision": [404, "RevisionNotFoundError"],
        "missing file": [404, "EntryNotFoundError"],
        "commit to a missing branch": [404, "RevisionNotFoundError"],
        "bob writes": [403, "HfHubHTTPError"],
        "bob creates for alice": [403, "HfHubHTTPError"],
        "nobody creates": [401, "HfHubHTTPError"],
    }
    assert facts["delete twice"] == [404, "EntryNotFoundError"]
    assert facts["stale parent"] == [412, "HfHubHTTPError"]
    assert "isn't YAML" in facts["broken card"]
    assert facts["private, to its owner"] == facts["no longer private"] == "hidden"
    assert facts["deleted"] == [404, missing_repo]


def push_and_load_stock_classes():
    """A tiny stock model, tokenizer, adapter and data set, pushed and loaded again; returns what differs."""
    import torch
    from datasets import Dataset, load_dataset
    from huggingface_hub import HfApi
    from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TokenizersBackend

    rows = {"text": ["one", "two", "three"], "label": [0, 1, 0]}
    Dataset.from_dict(rows).push_to_hub("alice/rows")
    data = load_dataset("alice/rows", split="train")
    streamed = list(load_dataset("alice/rows", split="train", streaming=True))

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model, ids = LlamaForCausalLM(config).eval(), torch.arange(12)[None]
    before = model(ids).logits
    model.push_to_hub("alice/llama")
    HfApi().create_tag("alice/llama", tag="v1")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    TokenizersBackend(tokenizer_object=words, unk_token="<unk>").push_to_hub("alice/llama")

    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained("alice/llama", revision="v1"),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False),
    ).eval()
    adapted_logits = adapted(ids).logits
    adapted.push_to_hub("alice/llama-lora")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.push_to_hub("alice/llama", commit_message="Double the head")

    def difference(loaded, expected):
        return (loaded.eval()(ids).logits - expected).abs().max().item()

    base = AutoModelForCausalLM.from_pretrained("alice/llama", revision="v1")
    return {
        "rows": [data.to_dict() == rows, [row["text"] for row in streamed]],
        "tokens": AutoTokenizer.from_pretrained("alice/llama")("two one").input_ids,
        "differences": {
            "tag": difference(base, before),
            "main": difference(AutoModelForCausalLM.from_pretrained("alice/llama"), model(ids).logits),
            "adapter on the tag": difference(PeftModel.from_pretrained(base, "alice/llama-lora"), adapted_logits),
        },
        "tag and main differ by": (before - model(ids).logits).abs().max().item(),
        "adapter's own base": AutoPeftModelForCausalLM.from_pretrained("alice/llama-lora")
        .peft_config["default"]
        .base_model_name_or_path,
    }


def test_stock_transformers_peft_and_datasets_push_and_load(hub, run_client):
    facts = run_client(push_and_load_stock_classes, hub=hub)
    assert facts["rows"] == [True, ["one", "two", "three"]]
    assert facts["tokens"] == [2, 1]
    assert facts["differences"] == {"tag": 0.0, "main": 0.0, "adapter on the tag": 0.0}
    assert facts["tag and main differ by"] > 0.01
    assert facts["adapter's own base"] == "alice/llama"
