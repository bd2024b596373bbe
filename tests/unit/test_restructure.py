"""tn.restructure on any model: which layers, from scratch or projected, all or nothing, there and back, on disk and in a new process."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

import tn
import zoo

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_embd=16, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=16, **SMALL)).eval()


def vit() -> nn.Module:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=5, **SMALL)).eval()


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


MODELS = {"gpt2": gpt2, "llama": llama, "vit": vit}
BATCHES = {"gpt2": torch.arange(10)[None], "llama": torch.arange(10)[None], "vit": torch.linspace(-1, 1, 3 * 256).reshape(1, 3, 16, 16)}
CHOSEN = {  # model, layers → how many
    ("gpt2", "ffn"): 4, ("gpt2", "attn"): 4, ("gpt2", "all_but_last"): 8,
    ("llama", "ffn"): 6, ("llama", "attn"): 8, ("llama", "all_but_last"): 14, ("llama", "head"): 1, ("llama", "all"): 15,
    ("vit", "ffn"): 4, ("vit", "attn"): 8, ("vit", "all_but_last"): 12, ("vit", "head"): 1, ("vit", "all"): 13,
}  # fmt: skip


@pytest.mark.parametrize(("name", "layers"), CHOSEN, ids=str)
def test_roles_in_models_of_transformers(name, layers):
    model = MODELS[name]()
    report = tn.restructure(model, structure="low_rank", rank=2, layers=layers)
    assert len(report.changes) == CHOSEN[name, layers]
    assert model(BATCHES[name]).logits.isfinite().all()


def test_roles_by_the_older_paths_of_vit():
    class Old(nn.Module):
        def __init__(self):
            super().__init__()
            block = nn.ModuleDict({
                "attention": nn.ModuleDict({
                    "attention": nn.ModuleDict({"query": nn.Linear(4, 4), "key": nn.Linear(4, 4), "value": nn.Linear(4, 4)}),
                    "output": nn.ModuleDict({"dense": nn.Linear(4, 4)}),
                }),
                "intermediate": nn.ModuleDict({"dense": nn.Linear(4, 8)}),
                "output": nn.ModuleDict({"dense": nn.Linear(8, 4)}),
            })  # fmt: skip
            self.layer = nn.ModuleList([block])
            self.classifier = nn.Linear(4, 2)

    for layers, count in (("attn", 4), ("ffn", 2), ("head", 1)):
        assert len(tn.restructure(Old(), structure="low_rank", layers=layers).changes) == count


@pytest.mark.parametrize("name", MODELS)
def test_full_rank_projection_keeps_the_outputs_and_densify_restores_them(name):
    model = MODELS[name]()
    before = model(BATCHES[name]).logits
    keys = {key: value.shape for key, value in model.state_dict().items()}
    report = tn.restructure(model, structure="low_rank", rank=16, layers="all_but_last", init="project")
    assert max(change.error for change in report.changes) < 1e-5
    assert torch.allclose(model(BATCHES[name]).logits, before, atol=1e-4)
    tn.densify(model)
    assert torch.allclose(model(BATCHES[name]).logits, before, atol=1e-4)
    assert {key: value.shape for key, value in model.state_dict().items()} == keys


def test_a_tied_head_is_refused_and_nothing_is_replaced():
    for name in ("gpt2",):
        model = MODELS[name]()
        for layers in ("all", "head"):
            with pytest.raises(tn.StructureError, match="'lm_head' shares a parameter with another one"):
                tn.restructure(model, structure="btt", layers=layers)
            assert not any(isinstance(m, tn.StructuredLinear) for m in model.modules())


@pytest.mark.parametrize("structure", ["btt", "monarch", "tt", "blast", "kronecker", "block_diagonal", "einsum2", "btt_norm"])
def test_every_family_projects_in_place(structure):
    model = mlp()
    report = tn.restructure(model, structure=structure, init="project")
    assert [c.path for c in report.changes] == ["0", "2"] and all(0 < c.error < 1 for c in report.changes)
    assert torch.equal(model[0].bias, mlp()[0].bias)
    assert model(torch.randn(3, 12)).isfinite().all()


def test_projection_for_the_inputs_a_layer_sees():
    batches = [torch.randn(64, 12) * torch.logspace(0, -2, 12) for _ in range(3)]
    wrong = {}
    for kind in ("plain", "aware"):
        model, original = mlp(), mlp()
        tn.restructure(model, structure="low_rank", rank=3, layers="0", init="project", inputs=batches if kind == "aware" else None)
        wrong[kind] = sum(float((model[0](x) - original[0](x)).detach().square().sum()) for x in batches)
    assert wrong["aware"] < 0.9 * wrong["plain"]
    with pytest.raises(tn.StructureError, match="no batch of inputs reaches layer '0'"):
        tn.restructure(mlp(), structure="low_rank", layers="0", init="project", inputs=[])


def test_report_says_what_changed():
    report = tn.restructure(mlp(), structure="einsum2", init="project", measure=8)
    text = str(report)
    assert all(word in text for word in ("parameters", "kFLOP a row", "predicted", "measured", "error", "ν", "2 layers"))
    change = report.changes[0]
    assert change.parameters_before == 12 * 16 + 16 and change.flops_before == 2 * 12 * 16
    assert change.flops_after == 2 * tn.structures.get("einsum2").build(12, 16).macs
    assert change.measured[0] > 0 and change.predicted[1] > 0


def test_times_are_of_equal_passes_and_taken_without_side_effects():
    model, calls = mlp(), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    report = tn.restructure(model, structure="btt", layers=["0"])
    assert not calls and torch.equal(torch.get_rng_state(), drawn_after(state))
    (change,) = report.changes
    plans = (tn.StructuredLinear(12, 16).network, model[0].network)
    assert change.predicted == tuple(tn.plan(net, rows=128).forward_seconds for net in plans)
    assert all(seconds > 0 for seconds in change.measured)
    assert tn.restructure(mlp(), structure="btt", measure=None).changes[0].measured is None


def drawn_after(state: torch.Tensor) -> torch.Tensor:
    """The random state when the one new layer of these sizes was made."""
    torch.set_rng_state(state)
    tn.StructuredLinear(12, 16, structure="btt")
    return torch.get_rng_state()


def test_experts_cost_what_a_row_uses():
    model = nn.Sequential(nn.Linear(64, 64))
    (change,) = tn.restructure(model, structure="btt_moe", rank=8, layers="all").changes
    with pytest.raises(tn.StructureError, match="no gated layer .* has run"):  # timing it was no pass of the model
        tn.balance_loss(model)
    assert change.flops_after == tn.flops(model, torch.zeros(1, 64)) == 2 * (2 * 1024 + 8 * 64)


def test_a_layer_alone_is_told_what_to_do():
    with pytest.raises(tn.StructureError, match="a layer cannot replace itself"):
        tn.restructure(nn.Linear(4, 4), structure="btt")
    with pytest.raises(tn.StructureError, match="layer '0' has no weight yet; call the model once"):
        tn.restructure(nn.Sequential(nn.LazyLinear(4)), structure="btt", layers="all")


def test_ranks_budgets_and_several_globs():
    model = mlp()
    tn.restructure(model, structure="low_rank", rank={"0": 2, "*": 3}, layers=["0", "[24]"])
    assert [model[i].rank for i in (0, 2, 4)] == [2, 3, 3]
    model = mlp()
    tn.restructure(model, structure="low_rank", match="params", budget=0.5)
    assert all(model[i].built.parameters <= 0.5 * model[i].in_features * model[i].out_features for i in (0, 2))
    with pytest.raises(tn.StructureError, match="rank for '7' matches none"):
        tn.restructure(mlp(), structure="low_rank", rank={"7": 2})
    with pytest.raises(tn.StructureError, match="layers is 3, expected one of all, all_but_last"):
        tn.restructure(mlp(), structure="low_rank", layers=3)
    with pytest.raises(tn.StructureError, match="unknown layer 'x'"):
        tn.restructure(mlp(), structure="low_rank", layers=["0", "x"])


@pytest.mark.parametrize(
    ("options", "damage", "message"),
    [
        (dict(init="project"), "nan", "layer '2': weight is nan at"),
        (dict(init="project", budget=0.5), "nan", "layer '2': weight is nan at"),
        (dict(init="projekt"), None, "unknown init 'projekt': did you mean 'project'"),
        (dict(rank=99), None, "layer '0': low_rank rank 99 is more than 12"),
        (dict(inputs=[torch.zeros(1, 12)]), None, "inputs are for init='project'"),
        (dict(blocks=2), None, "low_rank takes only rank, got blocks=2"),
        (dict(), "shape", "layer '2': weight has shape (5, 7), expected (16, 16)"),
        (dict(init="project"), "dims", "layer '2': weight has shape (2, 3, 4), expected (16, 16)"),
        (dict(layers=["0", 3]), None, "layers has 3 in it, expected globs over paths"),
        (dict(measure=0), None, "measure is 0, expected a number of rows ≥ 1, or None"),
    ],
)
def test_all_or_nothing(options, damage, message):
    model = mlp()
    if damage == "nan":
        with torch.no_grad():
            model[2].weight[3, 4] = float("nan")
    elif damage:
        model[2].weight = nn.Parameter(torch.ones((5, 7) if damage == "shape" else (2, 3, 4)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(tn.TnError) as error:
        tn.restructure(model, structure="low_rank", **options)
    assert message in str(error.value)
    assert all(torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k, v in model.state_dict().items()) and len(before) == 6


def test_zoo_models_go_by_their_own_roles():
    model = zoo.create("gpt-tiny", layers=1)
    report = tn.restructure(model, structure="btt", layers="ffn", init="project")
    assert len(report.changes) == 2 and all(change.error < 1 for change in report.changes)
    assert {m.tn_role for m in model.modules() if isinstance(m, tn.StructuredLinear) and m.structure == "btt"} == {
        "mlp.in",
        "mlp.out",
    }


def test_frozen_layers_stay_frozen_and_state_dicts_round_trip():
    model = mlp()
    model[0].weight.requires_grad_(False)
    tn.restructure(model, structure="monarch", init="project")
    assert not model[0].first.requires_grad and model[0].bias.requires_grad and model[2].first.requires_grad
    other = mlp()
    tn.restructure(other, structure="monarch")
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 12)
    with torch.no_grad():  # plans depend on which gradients are needed, and sums on the plan
        assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("name", MODELS)
def test_save_pretrained_writes_the_structure_and_a_fresh_model_reads_it(name, tmp_path):
    model = MODELS[name]()
    tn.restructure(model, structure="btt", rank=2, layers="ffn", init="project")
    tn.restructure(model, structure="blast", layers="attn")
    want = model(BATCHES[name]).logits
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tn_structure.json").read_text())
    assert {entry["structure"] for entry in saved["layers"].values()} == {"btt", "blast"}
    fresh = tn.load_restructured(MODELS[name](), tmp_path)
    assert torch.equal(fresh(BATCHES[name]).logits, want)
    fresh.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "tn_structure.json").read_text() == (tmp_path / "tn_structure.json").read_text()
    copied = copy.deepcopy(model)
    assert copied.save_pretrained.__self__ is copied
    assert torch.equal(pickle.loads(pickle.dumps(model))(BATCHES[name]).logits, want)


def test_a_new_process_reads_it_without_pickle(tmp_path):
    model = llama()
    tn.restructure(model, structure="tt", rank=3, layers="all", init="project")
    model.save_pretrained(tmp_path)
    torch.save(model(BATCHES["llama"]).logits, tmp_path / "want.pt")
    code = f"""
import sys, torch, tn
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=16, **{SMALL!r})).eval()
tn.load_restructured(model, {str(tmp_path)!r})
want = torch.load({str(tmp_path / "want.pt")!r}, weights_only=True)
assert torch.allclose(model(torch.arange(10)[None]).logits, want, atol=1e-6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_any_module_is_saved_and_read_back(tmp_path):
    model = mlp()
    tn.restructure(model, structure="btt_norm", rank=2, layers="all")
    tn.save_restructured(model, tmp_path)
    fresh = tn.load_restructured(mlp(), tmp_path)
    x = torch.randn(3, 12)
    assert torch.equal(fresh(x), model(x)) and repr(fresh) == repr(model)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "tn_structure.json").unlink(), "tn_structure.json does not exist"),
        (lambda d: (d / "tn_structure.json").write_text("{"), "is damaged"),
        (lambda d: (d / "tn_structure.json").write_text('{"format": 9}'), "is not in format 1"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors does not exist"),
        (lambda d: _edit(d, "2", "rank", 1), "of shape"),
        (lambda d: _edit(d, "2", "structure", "bbt"), "layer '2': unknown structure 'bbt'"),
        (lambda d: _edit(d, "2", "in_features", 17), "layer '2' maps 16 → 16, the folder's 17 → 16"),
        (lambda d: _edit(d, "2", "colour", 1), "unexpected keyword argument 'colour'"),
    ],
)
def test_damaged_folders_change_nothing(damage, message, tmp_path):
    model = mlp()
    tn.restructure(model, structure="btt", rank=2)
    tn.save_restructured(model, tmp_path)
    damage(tmp_path)
    fresh = mlp()
    with pytest.raises(tn.TnError) as error:
        tn.load_restructured(fresh, tmp_path)
    assert message in str(error.value)
    assert all(isinstance(fresh[i], nn.Linear) for i in (0, 2, 4)) and torch.equal(fresh[0].weight, mlp()[0].weight)


def _edit(folder, layer: str, field: str, value: object) -> None:
    file = folder / "tn_structure.json"
    saved = json.loads(file.read_text())
    saved["layers"][layer][field] = value
    file.write_text(json.dumps(saved))


def test_a_budget_is_spread_by_singular_values():
    flat, steep = torch.eye(32), torch.diag(torch.logspace(0, -3, 32))
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with torch.no_grad():
        for layer, weight in zip(model, (flat, steep), strict=True):
            layer.weight.copy_(weight)
    even = copy.deepcopy(model)
    report = tn.restructure(model, structure="low_rank", layers="all", init="project", budget=0.6)
    assert sum(p.numel() for layer in model for name, p in layer.named_parameters() if name != "bias") <= 0.6 * 2 * 32 * 32
    assert model[0].rank > model[1].rank  # few values make the steep one
    alike = tn.restructure(even, structure="low_rank", layers="all", init="project", match="params", budget=0.6)
    lost, lost_alike = (sum(change.error**2 for change in found.changes) for found in (report, alike))
    assert lost < lost_alike


def test_budgets_that_cannot_be_spread_are_refused():
    for options, message in (
        (dict(structure="btt", budget=1e-3), "rank 1 everywhere takes"),
        (dict(structure="blast", budget=0.5), "two cores with one rank"),
        (dict(structure="btt", budget=0.5, rank=2), "leave out rank=2"),
        (dict(structure="btt", budget=-1), "positive fraction"),
    ):
        model = nn.Sequential(nn.Linear(32, 32))
        with pytest.raises(tn.StructureError, match=message):
            tn.restructure(model, layers="all", init="project", **options)
        assert isinstance(model[0], nn.Linear)
