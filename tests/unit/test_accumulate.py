"""tn.accumulate: gradients as of the plain loop, cores merged once, and everything that must not pass in silence."""

import copy
import gc
import threading
import warnings
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tn
from tn.accumulate import _Leaf
from tn.merging import choose, split


def layer_of(structure: str = "tt", width: int = 256, **options: int) -> tn.StructuredLinear:
    torch.manual_seed(0)
    return tn.StructuredLinear(width, width, structure=structure, **({"rank": 32} | options if structure == "tt" else options))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def loop(model: torch.nn.Module, batches: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of the plain loop."""
    model.zero_grad()
    for x in batches:
        model(x).square().mean().backward()
    found = gradients(model)
    model.zero_grad()
    return found


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], bound: float = 1e-6) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name] - want[name]).norm() <= bound * want[name].norm(), name


@pytest.fixture
def merges(monkeypatch) -> list[tuple[str, ...]]:
    """The groups of cores that were merged, in order."""
    made: list[tuple[str, ...]] = []
    plain = _Leaf.__init__

    def counted(self, block, names, cores, merge) -> None:
        made.append(names)
        plain(self, block, names, cores, merge)

    monkeypatch.setattr(_Leaf, "__init__", counted)
    return made


@pytest.mark.parametrize("needs_input", [False, True])
@pytest.mark.parametrize(
    ("structure", "options"),
    [
        ("tt", {}),
        ("tt", {"cores": 3}),
        ("tt", {"cores": 4, "rank": 8}),
        ("low_rank", {"rank": 200}),
        ("btt", {"rank": 16}),
        ("monarch", {}),
        ("kronecker", {}),
        ("blast", {}),
        ("dense", {}),
    ],
)
def test_gradients_are_those_of_the_plain_loop(structure, options, needs_input):
    layer, xs = layer_of(structure, **options).double(), torch.randn(4, 64, 256, dtype=torch.float64)
    xs.requires_grad_(needs_input)
    want = loop(layer, xs) | ({"x": xs.grad} if needs_input else {})
    xs.grad = None
    with tn.accumulate(layer, batches=4):
        for x in xs:
            layer(x).square().mean().backward()
    same(gradients(layer) | ({"x": xs.grad} if needs_input else {}), want, 1e-12)
    assert layer._hoisted is None


def test_float32_to_one_millionth_with_one_merge(merges):
    layer, xs = layer_of(width=512), torch.randn(16, 64, 512)
    want = loop(layer, xs)
    with tn.accumulate(layer, batches=16):
        for x in xs:
            layer(x).square().mean().backward()
    same(gradients(layer), want)
    assert merges == [("first", "second")]


def test_a_merge_of_some_cores(merges):
    """Where a full merge does not pay, two of three cores are merged; any dynamic axes, a diagonal, an axis on three tensors."""
    spec = "x: ... i, a: i r h, b: r s h, c: s o -> ... h o"
    layer = tn.Contraction(spec, sizes=dict(i=512, r=64, s=4, h=3, o=512), cores=("a", "b", "c")).double()
    xs = torch.randn(6, 32, 512, dtype=torch.float64)
    want = loop(layer, xs)
    with tn.accumulate(layer, batches=64):
        for x in xs:
            layer(x).square().mean().backward()
    assert merges == [("a", "b")]
    same(gradients(layer), want, 1e-12)


def test_splits_keep_the_value():
    net = tn.network("x: ... (b i), a: b i r, c: b r o, d: o q -> ... (b q)", dict(b=2, i=3, r=4, o=5, q=6), cores=("a", "c", "d"))
    operands = [torch.randn(7, 6, dtype=torch.float64), *(torch.randn(net.shape(name), dtype=torch.float64) for name in net.cores)]
    want = tn.compile(net)(*operands)
    for groups in ((("a", "c"),), (("c", "d"),), (("a", "c", "d"),)):
        (merge,), rest = split(net, groups)
        given = dict(zip(net.names, operands, strict=True))
        merged = tn.compile(merge)(*(given[name] for name in merge.names))
        left = [given.get(name, merged) for name in rest.names]
        assert torch.allclose(tn.compile(rest)(*left), want, rtol=1e-12, atol=1e-12)


def test_merging_is_chosen_by_the_number_of_batches():
    net = layer_of(width=512).network
    found = [choose(net, net.cores, (("...", 128),), batches, torch.float32, torch.device("cpu")) for batches in (1, 16)]
    assert found[1] is not None and found[1].seconds < (found[0].seconds if found[0] else 1.0)
    thin = layer_of("low_rank", rank=4).network
    assert choose(thin, thin.cores, (("...", 128),), 1000, torch.float32, torch.device("cpu")) is None


def test_gradients_are_added_to_those_there_are():
    layer, xs = layer_of(), torch.randn(2, 64, 256)
    want = loop(layer, xs[[0, 1, 1]])
    layer(xs[0]).square().mean().backward()
    with tn.accumulate(layer):
        for _ in range(2):
            layer(xs[1]).square().mean().backward()
    same(gradients(layer), want)


def test_step_inside_is_refused_for_this_model_only():
    layer, other = layer_of(), torch.nn.Linear(2, 2)
    mine, theirs = (torch.optim.SGD(model.parameters(), lr=0.1) for model in (layer, other))
    other(torch.ones(1, 2)).sum().backward()
    with tn.accumulate(layer):
        layer(torch.randn(64, 256)).sum().backward()
        theirs.step()
        with pytest.raises(tn.OperatorError, match="step after the block"):
            mine.step()
    mine.step()
    before = layer.first.grad
    with pytest.raises(tn.OperatorError, match="step after the block"), tn.accumulate(layer):
        mine.step()
    mine.step()  # the hook is gone
    assert layer.first.grad is before


def test_an_exception_drops_what_waits():
    layer = layer_of()
    with pytest.raises(KeyError), tn.accumulate(layer):
        layer(torch.randn(64, 256)).sum().backward()
        assert layer.first.grad is not None
        raise KeyError
    assert layer.first.grad is None and layer._hoisted is None
    layer(torch.randn(64, 256)).sum().backward()  # the hooks are gone too
    assert layer.first.grad is not None


def test_an_exception_keeps_gradients_from_elsewhere():
    layer = layer_of()
    with pytest.raises(KeyError), tn.accumulate(layer):
        (layer(torch.randn(64, 256)).sum() + 3 * layer.first.sum()).backward()
        raise KeyError
    assert torch.equal(layer.first.grad, torch.full_like(layer.first, 3.0))
    assert layer.second.grad is None


def test_backward_after_the_block_is_refused():
    layer = layer_of()
    with tn.accumulate(layer):
        late = layer(torch.randn(64, 256)).sum()
    with pytest.raises(tn.OperatorError, match="run its backward pass inside"):
        late.backward()
    assert layer.first.grad is None


@pytest.mark.parametrize("cut", ["None", "zeros"])
@pytest.mark.parametrize("before_backward", [False, True])
def test_zero_grad_inside_starts_anew_or_is_refused(cut, before_backward):
    layer, xs = layer_of(), torch.randn(3, 64, 256)
    want = loop(layer, xs[1:])
    none = cut == "None"

    def run() -> None:
        with tn.accumulate(layer):
            layer(xs[0]).square().mean().backward()
            if not before_backward:
                layer.zero_grad(set_to_none=none)
            for number, x in enumerate(xs[1:]):
                loss = layer(x).square().mean()
                if before_backward and number == 0:
                    layer.zero_grad(set_to_none=none)
                loss.backward()

    if none:
        run()
        same(gradients(layer), want)
    else:
        with pytest.raises(tn.OperatorError, match="set_to_none=True"):
            run()


def test_zero_grad_last_leaves_nothing():
    layer = layer_of()
    with tn.accumulate(layer):
        layer(torch.randn(64, 256)).sum().backward()
        layer.zero_grad()
    assert layer.first.grad is None


def test_clearing_some_cores_and_clipping_inside_are_refused():
    layer = layer_of()
    with pytest.raises(tn.OperatorError, match="'second' was not"), tn.accumulate(layer):
        layer(torch.randn(64, 256)).sum().backward()
        layer.first.grad = None
    layer.zero_grad()
    with pytest.raises(tn.OperatorError, match="changed in place"), tn.accumulate(layer):
        layer(torch.randn(64, 256)).sum().backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)


def test_frozen_and_tied_cores_and_cores_used_elsewhere():
    first, second = layer_of(), layer_of()
    second.second = first.second
    first.first.requires_grad_(False)
    model, xs = torch.nn.Sequential(first, torch.nn.Tanh(), second), torch.randn(3, 64, 256)

    def run(block) -> dict[str, torch.Tensor]:
        model.zero_grad()
        with block:
            for x in xs:
                (model(x).square().mean() + first.second.square().sum()).backward()
        return gradients(model)

    want = run(tn.backend("planned"))
    got = run(tn.accumulate(model))
    assert "0.first" not in got
    same(got, want)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with tn.accumulate(model):
        assert not model(xs[0]).requires_grad
        x = xs[0].clone().requires_grad_()
        model(x).sum().backward()
    assert x.grad is not None and gradients(model).keys() == want.keys()


def test_calls_without_gradients_and_reference_calls(merges):
    layer, x = layer_of().eval(), torch.randn(64, 256)
    want = layer(x)
    with torch.no_grad():
        alone = layer(x)  # its plan may be another one than with gradients
    with tn.accumulate(layer):
        with torch.no_grad():
            assert torch.equal(layer(x), alone)
        with tn.backend("einsum"):
            assert torch.allclose(layer(x), want, atol=1e-4)
        with pytest.raises(tn.SizeError):
            layer(torch.randn(64, 255))
        tn.trace(layer, x)
        assert merges == []
        assert torch.allclose(layer(x), want, atol=1e-4)
        assert merges == [("first", "second")]


def test_a_changed_core_is_merged_again_and_gradients_are_of_the_values_of_then(merges):
    layer, xs = layer_of().double(), torch.randn(4, 64, 256, dtype=torch.float64)
    twin = copy.deepcopy(layer)

    def run(model: torch.nn.Module) -> None:
        loss = model(xs[0]).square().mean()
        with torch.no_grad():
            model.first.mul_(2.0)
        model(xs[1]).square().mean().backward()
        loss.backward() if model is layer else None
        model.first.data.mul_(0.5)
        model.refresh()
        model(xs[2]).square().mean().backward()

    with tn.accumulate(layer):
        run(layer)
    assert len(merges) == 3
    run(twin)
    with torch.no_grad():
        twin.first.mul_(1.0)  # the loss of before the change, which the plain loop refuses to differentiate after it
    twin(xs[0]).square().mean().backward()
    same(gradients(layer), gradients(twin), 1e-12)


def test_asking_for_other_gradients_leaves_the_cores_alone():
    layer, xs = layer_of().double(), torch.randn(2, 64, 256, dtype=torch.float64, requires_grad=True)
    want = loop(layer, xs[:1])
    with tn.accumulate(layer):
        torch.autograd.grad(layer(xs[1]).sum(), xs)  # must not count
        with pytest.raises(RuntimeError, match="not have been used"):
            torch.autograd.grad(layer(xs[1]).sum(), [layer.first])
        layer(xs[0]).square().mean().backward()
    same(gradients(layer), want, 1e-12)

    def penalty() -> None:
        (slope,) = torch.autograd.grad(layer(xs[0]).square().sum(), xs, create_graph=True)
        slope.square().mean().backward()

    layer.zero_grad()
    penalty()
    want = gradients(layer)
    layer.zero_grad()
    with tn.accumulate(layer):
        penalty()
    same(gradients(layer), want, 1e-12)
    with warnings.catch_warnings(), pytest.raises(tn.OperatorError, match="create_graph=True"), tn.accumulate(layer):
        warnings.simplefilter("ignore", UserWarning)  # torch's, that this makes reference cycles
        layer(xs[0]).square().mean().backward(create_graph=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints(reentrant):
    layer, xs = layer_of().double(), torch.randn(2, 64, 256, dtype=torch.float64, requires_grad=True)
    want = loop(layer, xs)
    with tn.accumulate(layer):
        for x in xs:
            checkpoint(layer, x, use_reentrant=reentrant).square().mean().backward()
    same(gradients(layer), want, 1e-12)


def test_autocast_merges_in_float32(merges):
    layer, xs = layer_of(), torch.randn(3, 64, 256)
    want = loop(layer.double(), xs.double())
    layer.float()
    with tn.accumulate(layer):
        for x in xs:
            with torch.autocast("cpu", torch.bfloat16):
                loss = layer(x).square().mean()
            loss.backward()
    assert merges and all(grad.dtype is torch.float32 for grad in gradients(layer).values())
    same({name: grad.double() for name, grad in gradients(layer).items()}, want, 2e-2)


def test_functional_calls_and_transforms_run_as_without_the_block(merges):
    layer, x = layer_of().double(), torch.randn(64, 256, dtype=torch.float64)
    values = {name: value.detach().clone() * 2 for name, value in layer.named_parameters()}

    def loss(given: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(layer, given, (x,)).square().mean()

    want = torch.func.grad(loss)(values)
    with tn.accumulate(layer):
        same(torch.func.grad(loss)(values), want, 1e-12)
        assert merges == []


def test_nested_blocks_end_with_the_outer_one():
    layer, xs = layer_of(), torch.randn(2, 64, 256)
    want = loop(layer, xs)
    with tn.accumulate(layer):
        with tn.accumulate(layer):
            layer(xs[0]).square().mean().backward()
        assert not layer.first.grad.any()
        layer(xs[1]).square().mean().backward()
    same(gradients(layer), want)


def test_threads_share_the_merge(merges):
    layer, xs = layer_of().double(), torch.randn(4, 64, 256, dtype=torch.float64)
    want = loop(layer, xs)
    with tn.accumulate(layer):
        workers = [threading.Thread(target=lambda x=x: layer(x).square().mean().backward()) for x in xs]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    same(gradients(layer), want, 1e-12)
    assert merges == [("first", "second")]


def test_nothing_is_kept_after_the_block(monkeypatch):
    kept = []
    plain = _Leaf.__init__

    def noted(self, *arguments) -> None:
        plain(self, *arguments)
        kept.append(weakref.ref(self.tensor))

    monkeypatch.setattr(_Leaf, "__init__", noted)
    layer = layer_of()
    gc.disable()  # no cycle may hold the merged tensors until the collector comes
    try:
        with tn.accumulate(layer):
            layer(torch.randn(64, 256)).sum().backward()
            layer(torch.randn(64, 256))
        assert [reference() for reference in kept] == [None]
    finally:
        gc.enable()


def test_sharded_models_are_refused_by_name():
    class FullyShardedDataParallel(torch.nn.Module):
        """Stands for torch's, which needs a process group."""

    model = torch.nn.Sequential(layer_of(), FullyShardedDataParallel())
    with pytest.raises(tn.OperatorError, match=r"FullyShardedDataParallel \(module '1'\).*no_sync"), tn.accumulate(model):
        pass


@pytest.mark.parametrize("batches", [0, True, 2.0, "16"])
def test_bad_arguments(batches):
    with pytest.raises(tn.OperatorError, match="expected an integer ≥ 1"), tn.accumulate(layer_of(), batches=batches):
        pass
    with pytest.raises(tn.OperatorError, match=r"takes a torch\.nn\.Module, got a list"), tn.accumulate([layer_of()]):
        pass


def test_copies_made_inside_are_plain_layers():
    layer = layer_of()
    with tn.accumulate(layer):
        layer(torch.randn(64, 256)).sum()
        assert copy.deepcopy(layer)._hoisted is None


def test_a_core_that_is_frozen_before_the_end_keeps_what_was_gathered():
    layer = tn.StructuredLinear(64, 64, structure="tt", rank=8, dtype=torch.float64)
    x = torch.randn(4, 64, dtype=torch.float64)
    layer(x).square().mean().backward()
    wanted = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    with tn.accumulate(layer, batches=1000):
        layer(x).square().mean().backward()
        layer.requires_grad_(False)
    for parameter, want in zip(layer.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, want)
        assert not parameter.requires_grad
