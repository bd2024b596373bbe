"""Doors to opt_einsum, cotengra and quimb: paths, reports, trees, backends and networks, both ways."""

import cotengra
import numpy as np
import opt_einsum
import pytest
import quimb.tensor as qtn
import torch
from opt_einsum.contract import PathInfo

import tn
from tn.bridge.paths import to_pairs, to_path

EQUATION = "ab,bc,cde,d->ae"
OPERANDS = [torch.randn(shape, dtype=torch.float64) for shape in ((4, 5), (5, 6), (6, 3, 7), (3,))]
WANT = torch.einsum(EQUATION, *OPERANDS)


def _tree() -> cotengra.ContractionTree:
    return cotengra.einsum_tree(EQUATION, *[t.shape for t in OPERANDS], optimize="greedy")


ORDERS = {
    "None": None,
    "True": True,
    "False": False,
    "auto": "auto",
    "auto-hq": "auto-hq",
    "optimal": "optimal",
    "greedy": "greedy",
    "dp": "dp",
    "numpy's pair": ("greedy", 1000),
    "path": [(0, 1), (0, 1), (0, 1)],
    "all at once": [(0, 1, 2, 3)],
    "one at a time": [(2,), (0, 1), (0, 1, 2)],
    "opt_einsum's path": opt_einsum.contract_path(EQUATION, *OPERANDS)[0],
    "opt_einsum's info": opt_einsum.contract_path(EQUATION, *OPERANDS)[1],
    "numpy's path": np.einsum_path(EQUATION, *[t.numpy() for t in OPERANDS], optimize="greedy")[0],
    "ours": tn.contract_path(EQUATION, *OPERANDS),
    "RandomGreedy": opt_einsum.RandomGreedy(max_repeats=4),
    "DynamicProgramming": opt_einsum.DynamicProgramming(),
    "BranchBound": opt_einsum.BranchBound(),
    "HyperOptimizer": cotengra.HyperOptimizer(methods=["greedy"], max_repeats=4, parallel=False, progbar=False),
    "AutoOptimizer": cotengra.AutoOptimizer(),
    "OptimalOptimizer": cotengra.OptimalOptimizer(),
    "tree": _tree(),
    "function": lambda inputs, output, sizes, memory_limit=None: [(0, 1)] * 3,
}


@pytest.mark.parametrize("name", ORDERS)
def test_every_kind_of_order(name):
    torch.testing.assert_close(tn.einsum(EQUATION, *OPERANDS, optimize=ORDERS[name]), WANT)
    arrays = [t.numpy() for t in OPERANDS]
    np.testing.assert_allclose(tn.einsum(EQUATION, *arrays, optimize=ORDERS[name]), WANT.numpy(), rtol=1e-12)
    words = [array.astype("longdouble") for array in arrays]
    np.testing.assert_allclose(tn.einsum(EQUATION, *words, optimize=ORDERS[name]).astype("f8"), WANT.numpy(), rtol=1e-12)


@pytest.mark.parametrize("path", [[(0, 1), (0, 1), (0, 1)], [(2, 3), (1, 2), (0, 1)], [(0, 3), (0, 1), (0, 1)]])
def test_a_given_path_is_the_one_that_runs(path):
    assert tn.contract_path(EQUATION, *OPERANDS, optimize=path).path == path
    assert to_path(to_pairs(path, 4), 4) == path


def test_an_optimizer_is_asked_once():
    asked = []

    def search(inputs, output, sizes, memory_limit=None):
        asked.append((inputs, output, sizes))
        return [(0, 1)] * 3

    for _ in range(3):
        tn.einsum(EQUATION, *OPERANDS, optimize=search)
    assert len(asked) == 1
    inputs, output, sizes = asked[0]
    assert [len(term) for term in inputs] == [2, 2, 3, 1] and len(output) == 2 and sorted(sizes.values()) == [3, 4, 5, 6, 7]


def test_contract_path_is_opt_einsums_report():
    info = tn.contract_path(EQUATION, *OPERANDS)
    assert isinstance(info, PathInfo)
    path, again = info
    assert path == info.path == info[0] and again is info is info[1] and len(info) == 2
    theirs = opt_einsum.contract_path(EQUATION, *OPERANDS, optimize=path)[1]
    assert (info.opt_cost, info.naive_cost, info.largest_intermediate) == (theirs.opt_cost, theirs.naive_cost, theirs.largest_intermediate)
    assert "Complete contraction:  ab,bc,cde,d->ae" in str(info)
    torch.testing.assert_close(opt_einsum.contract(EQUATION, *OPERANDS, optimize=path), WANT)
    shapes = tn.contract_path(EQUATION, *[t.shape for t in OPERANDS], shapes=True)
    assert shapes.path == path


@pytest.mark.parametrize("equation", ["ab,bc->ac", "aab,bc->c", "ab,ab,b->a", "a,b,c->abc", "abc,bd,cd->", "ab,cb->ca"])
def test_backend_of_opt_einsum(equation):
    operands = [torch.randn([dict(a=2, b=3, c=4, d=5)[letter] for letter in term]) for term in equation.split("->")[0].split(",")]
    arrays = [t.numpy() for t in operands]
    want = torch.einsum(equation, *operands)
    torch.testing.assert_close(opt_einsum.contract(equation, *operands, backend="tn"), want)
    np.testing.assert_allclose(opt_einsum.contract(equation, *arrays, backend="tn"), want.numpy(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cotengra.einsum(equation, *operands, implementation=(tn.einsum, tn.tensordot)), want)


@pytest.mark.parametrize("axes", [0, 1, 2, ([0], [1]), ([1, 2], [1, 0]), (2, 0), ([-1], [-2])])
def test_tensordot(axes):
    a, b = np.random.default_rng(0).standard_normal((2, 4, 4, 4, 4)).reshape(2, 4, 4, 4, 4)[:, :, :, :, 0]
    got = tn.tensordot(a, b, axes)
    np.testing.assert_allclose(got, np.tensordot(a, b, axes), rtol=1e-12)
    np.testing.assert_allclose(tn.tensordot(torch.from_numpy(a), torch.from_numpy(b), axes=axes).numpy(), got, rtol=1e-12)


def test_from_cotengra_runs_the_whole_tree():
    tree = _tree()
    plan = tn.from_cotengra(tree, grad=["t0"])
    assert plan.path == tuple(map(tuple, tree.get_ssa_path())) and plan.grad == ("t0",)
    assert plan.tree.contraction_cost() == tree.contraction_cost()
    torch.testing.assert_close(tn.compile(plan)(*OPERANDS), WANT)
    assert tn.Plan.from_json(plan.to_json()) == plan


def test_from_cotengra_takes_any_index():
    inputs, output = [(0, "k0,1"), ("k0,1", ("x", 2)), (("x", 2), 0, "hyper"), ("hyper",)], (0, "hyper")
    sizes = {0: 2, "k0,1": 3, ("x", 2): 4, "hyper": 5}
    tree = cotengra.array_contract_tree(inputs, output, sizes, optimize="greedy", canonicalize=False)
    plan = tn.from_cotengra(tree)
    assert plan.network.output.axes[1] == "hyper"
    arrays = [torch.randn([sizes[index] for index in term], dtype=torch.float64) for term in inputs]
    torch.testing.assert_close(tn.compile(plan)(*arrays), torch.einsum("ab,bc,cah,h->ah", *arrays))


def test_from_cotengra_refuses():
    with pytest.raises(TypeError, match="got a list, expected a cotengra.ContractionTree"):
        tn.from_cotengra([(0, 1)])
    sliced = _tree()
    sliced.remove_ind_("b")
    with pytest.raises(tn.PlanError, match=r"sliced over b; plans have no slices: tree.unslice_all\(\)"):
        tn.from_cotengra(sliced)
    with pytest.raises(tn.PlanError, match="incomplete"):
        tn.from_cotengra(cotengra.ContractionTree([["a", "b"], ["b", "c"]], ["a", "c"], dict(a=2, b=2, c=2)))


NETWORKS = {
    "matrix product": ("x: b i, w: i o -> b o", dict(i=3, o=4), ("w",)),
    "hyperaxis": ("x: b r, u: i r, v: o r -> b i o", dict(r=2, i=3, o=4), ("u", "v")),
    "grouped": ("x: ... (i j), a: i j r k, c: k i r l -> ... (k l)", dict(i=2, j=3, r=2, k=4, l=3), ("a", "c")),
    "a tensor twice": ("x: b i, w: i j, x: b j -> b", dict(i=3, j=3), ("w",)),
    "diagonal": ("x: i i j -> j i", dict(i=3), ()),
    "scalar": ("s:, x: b -> b", {}, ("s",)),
    "width one": ("x: b 1 i, w: i -> b", {}, ()),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_to_quimb_and_back(name, kind):
    spec, sizes, cores = NETWORKS[name]
    net = tn.network(spec, sizes, cores=cores)
    full = {**dict.fromkeys(net.axes, 2), **sizes}
    shapes = [[int(np.prod([full[axis] for axis in dim])) for dim in net.term(n).dims] for n in net.names]
    tensors = {n: torch.randn(shape, dtype=torch.float64) for n, shape in zip(net.names, shapes, strict=True)}
    want = tn.contract(spec, *tensors.values()) if not sizes else tn.compile(net)(*tensors.values())
    given = tensors if kind == "torch" else {n: t.numpy() for n, t in tensors.items()}
    tags = {net.names[0]: ["layers.0.proj"]}
    quimb = net.to_quimb(given, tags=tags)
    assert len(quimb.tensor_map) == len(net.spec.operands) and "layers.0.proj" in quimb.tags
    value = quimb.contract(output_inds=net.output.axes, preserve_tensor=True).data
    np.testing.assert_allclose(np.asarray(value).reshape(want.shape), want.numpy(), rtol=1e-10)
    found = tn.from_quimb(quimb, output=net.output.axes)
    back, data = found
    assert back.names == net.names and set(back.cores) == set(net.cores) and back.dynamic == (("...",) if "..." in net.axes else ())
    assert [term.axes for term in back.spec.operands] == [term.axes for term in net.spec.operands] and back.output.axes == net.output.axes
    assert found.tags[net.names[0]][0] == net.names[0] and "layers.0.proj" in found.tags[net.names[0]]
    again = tn.compile(back)(*(torch.as_tensor(t) for t in data.values()))
    torch.testing.assert_close(again.reshape(want.shape), want)
    assert back.to_quimb(data).ind_map.keys() == quimb.ind_map.keys()


def test_from_quimb_reads_what_quimb_makes():
    state = qtn.MPS_rand_state(6, 4, seed=1)
    net, tensors = tn.from_quimb(state)
    assert net.names == tuple(f"I{i}" for i in range(6)) and set(net.output.axes) == {f"k{i}" for i in range(6)}
    dense = tn.compile(net)(*map(torch.from_numpy, tensors.values()))
    np.testing.assert_allclose(dense.numpy(), state.to_dense(net.output.axes).reshape([2] * 6), rtol=1e-10)
    norm = state.H & state
    net, tensors = tn.from_quimb(norm)
    assert len(net.names) == 12
    np.testing.assert_allclose(tn.contract(str(net.spec), *tensors.values()), 1.0, rtol=1e-10)
    norm.equalize_norms_(1.0)
    assert norm.exponent != 0
    net, tensors = tn.from_quimb(norm)
    np.testing.assert_allclose(tn.contract(str(net.spec), *tensors.values()), 1.0, rtol=1e-10)


def test_quimb_doors_refuse():
    net = tn.network("x: b r, u: i r, v: o r -> b i o", cores=(), sizes=dict(r=2))
    tensors = [torch.ones(3, 2)] * 3
    with pytest.raises(tn.SpecError, match=r"indices \['r'\] are on three or more tensors"):
        tn.from_quimb(net.to_quimb(tensors))
    with pytest.raises(tn.SpecError, match="unknown index 'bb': did you mean 'b'"):
        tn.from_quimb(net.to_quimb(tensors), output=("bb",))
    with pytest.raises(TypeError, match=r"got a dict, expected a quimb.tensor.TensorNetwork"):
        tn.from_quimb({})
    with pytest.raises(tn.SpecError, match="has no tensors"):
        tn.from_quimb(qtn.TensorNetwork([]))
    with pytest.raises(tn.SpecError, match="network has 3 tensors"):
        net.to_quimb(tensors[:2])
    with pytest.raises(tn.SpecError, match="tensor 'v' is missing"):
        net.to_quimb(dict(x=tensors[0], u=tensors[0]))
    with pytest.raises(tn.SpecError, match="unknown tensor 'w'"):
        net.to_quimb(dict(w=tensors[0]))
    with pytest.raises(tn.SpecError, match="unknown tensor 'w'"):
        net.to_quimb(tensors, tags=dict(w=["layer"]))
    with pytest.raises(tn.SizeError, match="axis 'r' has size 3"):
        net.to_quimb([torch.ones(3, 3)] * 3)
