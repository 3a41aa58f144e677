"""Muon: orthogonal steps on the matrices, AdamW on the rest, in one optimizer that Trainer can save and schedule."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from configuration_deepseek import preset
from finetune_deepseek.training.weights.muon import Muon, muon_groups, orthogonalized
from modeling_deepseek import DeepSeekForCausalLM


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (3, 6, 10)], ids=str)
def test_singular_values_become_one(shape):
    """The vectors stay: U S V' becomes about U V'."""
    torch.manual_seed(0)
    matrix = torch.randn(*shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalized(matrix).float()
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.25
    cosine = torch.nn.functional.cosine_similarity(found.flatten(-2), (u @ v).flatten(-2), dim=-1)
    assert (cosine > 0.97).all()


def a_model():
    torch.manual_seed(0)
    return DeepSeekForCausalLM(preset("tiny_v3", vocab_size=50))


def test_groups_hold_every_parameter_once():
    model = a_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {"model.layers.0.self_attn.o_proj.weight", "lm_head.weight"}
    groups = muon_groups(model, decayed, weight_decay=0.1)
    assert len(muon_groups(model, decayed, weight_decay=0.0)) == len(groups) == 4  # as before, whatever the decay
    found = {(g["muon"], g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in groups}
    assert sum(len(group) for group in found.values()) == len(names)
    assert found[True, 0.1] == {"model.layers.0.self_attn.o_proj.weight"}
    assert found[False, 0.1] == {"lm_head.weight"}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= found[False, 0.0]
    assert any(name.endswith("experts.gate_up_proj") for name in found[True, 0.0])


def test_a_step_by_hand():
    """The rest takes AdamW's own step; a matrix moves by lr * 0.2 sqrt(longer side) along U V' and decays."""
    matrix, vector = torch.nn.Parameter(torch.randn(4, 6)), torch.nn.Parameter(torch.randn(5))
    before, twin = matrix.detach().clone(), torch.nn.Parameter(vector.detach().clone())
    groups = [{"params": [matrix], "muon": True, "weight_decay": 0.5}, {"params": [vector], "muon": False}]
    optimizer = Muon(groups, lr=0.01, betas=(0.9, 0.95))
    other = torch.optim.AdamW([twin], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        matrix.grad, vector.grad = torch.randn(4, 6), torch.randn(5)
        twin.grad = vector.grad.clone()
        if not optimizer.state:
            direction = orthogonalized(matrix.grad * (0.05 + 0.95 * 0.05)).float()
        optimizer.step()
        other.step()
        if len(optimizer.state) == 2 and direction is not None:
            torch.testing.assert_close(matrix, before * (1 - 0.005) - 0.01 * 0.2 * 6**0.5 * direction)
            direction = None
    torch.testing.assert_close(vector, twin)


def test_kernels_of_convolutions_are_a_matrix_from_window_to_channels():
    """Not a stack of 3 x 3 matrices; of each group by itself, where there are groups."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv1d(8, 4, 2, groups=2), torch.nn.Linear(4, 4))
    model.experts = torch.nn.Parameter(torch.randn(2, 5, 6))
    groups = muon_groups(model, {"0.weight"}, weight_decay=0.5)
    weights = dict(model.named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.grad = torch.randn_like(weight)
    Muon(groups, lr=0.01).step()
    shapes = {"0.weight": (8, 27), "1.weight": (2, 2, 8), "2.weight": (4, 4), "experts": (2, 5, 6)}
    for name, shape in shapes.items():
        moved = (before[name] * (0.995 if name == "0.weight" else 1) - weights[name].detach()).view(shape)
        u, _, v = torch.linalg.svd(weights[name].grad.view(shape), full_matrices=False)
        values = torch.linalg.svdvals(moved) / (0.01 * 0.2 * max(shape[-2:]) ** 0.5)
        assert values.min() > 0.6 and values.max() < 1.25
        assert (torch.nn.functional.cosine_similarity(moved.flatten(-2), (u @ v).flatten(-2), dim=-1) > 0.95).all()


def test_a_state_of_before_is_refused_where_there_are_kernels():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(4, 4))
    optimizer = Muon(muon_groups(model, set(), weight_decay=0.0), lr=0.01)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["convolution"]
    with pytest.raises(ValueError, match="train from its weights anew, without --resume_from_checkpoint"):
        optimizer.load_state_dict(state)


def take_steps(model, optimizer, seeds):
    for seed in seeds:
        ids = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(seed))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("is_older", [False, True])
def test_state_goes_on_after_loading(is_older):
    def new_optimizer(model):
        return Muon(muon_groups(model, set(), 0.0), lr=0.01)

    whole, half = a_model(), a_model()
    take_steps(whole, new_optimizer(whole), range(4))
    optimizer = new_optimizer(half)
    take_steps(half, optimizer, range(2))
    resumed = new_optimizer(half)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"] if is_older else []:
        del group["convolution"]
    resumed.load_state_dict(saved)
    take_steps(half, resumed, range(2, 4))
    for one, other in zip(whole.parameters(), half.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def steps_of_one(process, processes, folder):
    """Two steps with the same gradients in every process; each saves its weights. Without matrices, too."""
    file = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=file, rank=process, world_size=processes)
    model = a_model()
    optimizer = Muon(muon_groups(model, set(), 0.0), lr=0.01, processes=processes)
    take_steps(model, optimizer, range(2))
    save_file({name: value.detach() for name, value in model.named_parameters()}, folder / f"{process}.safetensors")
    vector = torch.nn.Parameter(torch.zeros(3))
    vector.grad = torch.ones(3)
    Muon([{"params": [vector], "muon": False}], lr=0.01, processes=processes).step()
    assert vector.max() < 0
    torch.distributed.destroy_process_group()


def test_processes_share_the_work_and_step_as_one(tmp_path):
    torch.multiprocessing.spawn(steps_of_one, (2, tmp_path), nprocs=2)
    alone = a_model()
    take_steps(alone, Muon(muon_groups(alone, set(), 0.0), lr=0.01), range(2))
    first, second = (load_file(tmp_path / f"{process}.safetensors") for process in range(2))
    for name, parameter in alone.named_parameters():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], parameter.detach())


def test_by_flag_and_resumed(finetune, data, tmp_path):
    settings = {"do_train": True, "optim": "muon", "max_steps": 6, "save_steps": 3, "weight_decay": 0.1, **data}
    finetune(output_dir=tmp_path / "whole", **settings)
    finetune(output_dir=tmp_path / "again", resume_from_checkpoint=tmp_path / "whole" / "checkpoint-3", **settings)
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert "muon, learning rate 0.01" in (tmp_path / "whole" / "README.md").read_text()


@pytest.mark.parametrize("knows", [True, False])
def test_a_slow_bfloat16_is_said(knows, finetune, data, tmp_path, monkeypatch, capsys):
    """Where the processor lacks it, the iterations run in float32 too."""
    monkeypatch.setattr("finetune_deepseek.training.weights.muon.multiplies_bfloat16", lambda: knows)
    monkeypatch.setattr("finetune_deepseek.training.stages.show.multiplies_bfloat16", lambda: knows)
    assert orthogonalized(torch.randn(3, 4)).dtype == (torch.bfloat16 if knows else torch.float32)
    finetune(output_dir=tmp_path / "out", do_train=True, max_steps=1, bf16=True, use_cpu=True, **data)
    assert ("--bf16 false is several times as fast" in capsys.readouterr().out) is not knows
