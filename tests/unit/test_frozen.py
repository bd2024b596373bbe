"""tn.frozen: the same values, merged again whenever a core changes, and gone outside the block."""

import copy

import pytest
import torch

import tn


def layer_of(structure: str = "btt", **options: int) -> tn.StructuredLinear:
    torch.manual_seed(0)
    return tn.StructuredLinear(64, 48, structure=structure, **options).eval()


@pytest.mark.parametrize("rows", [0, 1, 5, 100, 600])
@pytest.mark.parametrize("structure", ["dense", "low_rank", "btt", "monarch", "blast", "tt", "kronecker", "block_diagonal"])
def test_frozen_layers_give_the_same(structure, rows):
    layer, x = layer_of(structure), torch.randn(2, rows, 64)
    with torch.no_grad():
        want = layer.double()(x.double())
        layer.float()
        with tn.frozen(layer) as same:
            assert same is layer
            for _ in range(2):
                assert torch.allclose(layer(x).double(), want, rtol=1e-4, atol=1e-5)
    assert layer._merged is None


def merged(layer: tn.StructuredLinear) -> torch.Tensor:
    """The matrix a frozen layer keeps; the test fails if it keeps none."""
    ((matrix, _),) = layer._merged.matrices.values()
    return matrix


def test_every_way_of_changing_a_core_is_noticed():
    layer, x = layer_of(rank=6), torch.randn(3, 64)  # a high rank, so that one product wins
    other = {name: value + 1 for name, value in copy.deepcopy(layer.state_dict()).items()}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    first = layer.first

    def assign() -> None:
        first.data = torch.randn_like(first)

    def step() -> None:
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    with torch.no_grad(), tn.frozen(layer):
        layer(x)
        before = merged(layer)
        for change in (lambda: first.mul_(2.0), lambda: layer.load_state_dict(other), assign, step):
            change()
            with tn.backend("planned"):
                got = layer(x)
            assert merged(layer) is not before
            before = merged(layer)
            assert torch.allclose(got, x @ layer.to_dense().mT + layer.bias, rtol=1e-4, atol=1e-3)
        first.data.mul_(3.0)  # nothing can notice this
        layer(x)
        assert merged(layer) is before
        layer.refresh()
        layer(x)
        assert merged(layer) is not before


@pytest.mark.parametrize(
    ("width", "rank", "rows", "one"),
    [(512, 1, 1, True), (512, 1, 16, False), (512, 4, 1, True), (512, 4, 64, False), (512, 16, 16, True), (1024, 1, 1, False),
     (1024, 4, 16, False), (1024, 16, 1, True), (1024, 16, 16, True)],
)  # fmt: skip
def test_one_product_runs_where_it_was_measured_to_be_faster(width, rank, rows, one):
    """Layers timed both ways, 1.3 to 3 times apart (LOG.md, 2026-11-20); many small calls cost more than their arithmetic."""
    layer = tn.StructuredLinear(width, width, structure="btt", rank=rank).eval()
    with torch.no_grad(), tn.frozen(layer):
        layer(torch.zeros(2000, width))  # what is decided for other numbers of rows does not count
        layer(torch.zeros(rows, width))
        assert layer._merged.wins[torch.float32, torch.device("cpu"), rows.bit_length()] is one


def test_gradients_and_training_mode_see_the_cores():
    layer, x = layer_of(rank=6), torch.randn(3, 64)
    with tn.frozen(layer):
        layer(x).sum().backward()
        assert layer.first.grad is not None and not layer._merged.matrices
        layer.train()
        with torch.no_grad():
            layer(x)
        assert not layer._merged.matrices
    with pytest.raises(tn.OperatorError, match="training mode; call model.eval"), tn.frozen(layer):
        pass


def test_half_precision_merges_in_fp32():
    layer, x = layer_of(rank=6).to(torch.bfloat16), torch.randn(3, 64, dtype=torch.bfloat16)
    wide = copy.deepcopy(layer).float()
    with torch.no_grad(), tn.frozen(layer):
        layer(x)
        assert torch.allclose(merged(layer), wide.to_dense().to(torch.bfloat16), rtol=2**-7)


def test_replaced_parameters_and_given_ones_are_used():
    layer, x = layer_of(rank=6), torch.randn(3, 64)
    zeros = {name: torch.zeros_like(value) for name, value in layer.state_dict().items()}
    with torch.no_grad(), tn.frozen(layer):
        assert layer(x).abs().max() > 0
        assert torch.func.functional_call(layer, zeros, (x,)).abs().max() == 0
        assert layer(x).abs().max() > 0
        layer.first = torch.nn.Parameter(torch.zeros_like(layer.first))
        assert torch.equal(layer(x), layer.bias.expand(3, -1))


def test_nested_blocks_share_what_they_keep_and_copies_leave_it():
    layer, x = layer_of(rank=6), torch.randn(3, 64)
    with torch.no_grad(), tn.frozen(layer):
        layer(x)
        with tn.frozen(layer):
            layer.first.data.zero_()
            layer.refresh()
        assert torch.equal(layer(x), layer.bias.expand(3, -1))
        assert copy.deepcopy(layer)._merged is None
        with pytest.raises(tn.OperatorError, match="input is torch.int64"):
            layer(torch.arange(64)[None])
    assert layer._merged is None


def test_layers_made_in_inference_mode_run():
    with torch.inference_mode():
        layer, x = layer_of(rank=6), torch.randn(3, 64)
        want = layer(x)
        with tn.frozen(layer):
            assert torch.allclose(layer(x), want, atol=1e-5)
