"""Blocks of kernels: the table on disk, what is worth trying, and a whole tuning run on pretended times."""

import json
import threading
import warnings

import pytest
import torch

from tests.kernels.oracle import DEVICE
from tn import operators
from tn.errors import OperatorError
from tn.operators import Offer
from tn_kernels import chain, gated, tuning
from tn_kernels.launch import config, recording

ROW = {"blocks": {"BM": 64, "BN": 32}, "warps": 4, "stages": 2}


def test_a_table_is_read_back(tmp_path):
    file = tmp_path / "deep" / "table.json"
    table = {"gated n8 d8 e8 float16": config(BN=16, BD=32, BE=64, warps=8, stages=3)}
    tuning.store(file, table)
    assert tuning.read(file) == table
    assert [path.name for path in file.parent.iterdir()] == ["table.json"]  # nothing temporary is left


def test_no_table_is_an_empty_one(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.read(tmp_path / "none.json") == {}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"format": 1}',
        json.dumps({"format": 2, "rows": {}}),
        json.dumps({"format": 1, "rows": {"a": {"blocks": {"BM": "64"}, "warps": 4, "stages": 2}}}),
        json.dumps({"format": 1, "rows": {"a": {**ROW, "warps": 0}}}),
        json.dumps({"format": 1, "rows": {"a": {**ROW, "colour": 1}}}),
        json.dumps({"format": 1, "rows": {"a": {**ROW, "blocks": {"BM": 48}}}}),
        json.dumps({"format": 1, "rows": {"a": {**ROW, "stages": True}}}),
        "[" * 100_000,
        json.dumps({"format": 1, "rows": ["a"]}),
        "\udcff",
    ],
)
def test_a_corrupt_table_is_ignored_with_one_warning(text, tmp_path):
    file = tmp_path / "table.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.warns(UserWarning, match="table.json are ignored .*delete the file or tune again"):
        assert tuning.read(file) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.read(file) == {}


def test_a_row_that_fits_no_more_is_ignored(tmp_path, monkeypatch):
    """A row of an older kernel, whose blocks had other names, is never handed to the kernel of today."""
    monkeypatch.setattr(tuning, "device_name", lambda device: "a device")
    monkeypatch.setattr(tuning, "path", lambda device: tmp_path / "table.json")
    old, new = config(BX=16), config(BN=16, BD=32)
    with pytest.warns(UserWarning, match="blocks {'BX': 16} are of another version of the kernel"):
        assert tuning._known(old, new, 0) == new
    assert tuning._known(config(BN=64, BD=64, warps=8), new, 0) == config(BN=64, BD=64, warps=8)
    assert tuning._known(None, new, 0) == new


def test_problems_are_looked_up_by_powers_of_two():
    for n, r in ((1000, 3), (513, 4), (1024, 4)):
        assert tuning.case("k", {"n": n, "r": r}, torch.bfloat16) == "k n1024 r4 bfloat16"


def test_forced_blocks_hold_inside_the_block_only():
    x, a, c = (torch.empty(*shape, device="meta") for shape in ((40, 4, 4), (4, 4, 1, 4), (4, 4, 1, 4)))
    cut = config(BN=16, BI=16, BJ=16, BR=1, BK=16, BL=16, warps=2, stages=1)
    with recording() as calls:
        with tuning.using(chain=cut):
            chain(x, a, c)
        chain(x, a, c)
    forward = [call.config for call in calls if "forward" in call.kernel.__name__]
    assert forward[0] == cut
    assert cut not in forward[2:]


def test_gradients_are_cut_as_the_forward_pass_was():
    """Also in another thread, as autograd's on CUDA, and after the block."""
    x = torch.ones(20, 18, device=DEVICE, requires_grad=True)
    with tuning.using(gated=config(BN=16, BD=16, BE=16)):
        y = gated(x, x.T @ x, x.T @ x)
    seen = []

    def cut_of(kernel, *_):
        seen.append((kernel, tuning.forced(kernel)))
        return config(BN=16, BD=16, BE=16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "cut", cut_of)
        thread = threading.Thread(target=y.sum().backward)
        thread.start()
        thread.join()
    assert seen == [("gated", True)]
    assert x.grad is not None


def test_a_calibration_tunes_gradients_too(monkeypatch):
    asked = []
    monkeypatch.setitem(operators._tuners, "gated", lambda run, operands: asked.append((run, operands)))
    x = torch.ones(20, 18, device=DEVICE, requires_grad=True)
    operators.tune(Offer("gated", lambda x: gated(x, x.T @ x, x.T @ x), ""), [x])
    ((run, operands),) = asked
    requests = []
    token = tuning._requests.set(requests)
    try:
        run(*operands)
    finally:
        tuning._requests.reset(token)
    assert [request.kernel for request in requests] == ["gated", "gated"]  # forward and backward


@pytest.mark.parametrize("rank", [1, 3, 16, 100])
@pytest.mark.parametrize("side", [1, 7, 64, 200])
@pytest.mark.parametrize("width", [2, 4])
def test_every_chain_has_ways_to_cut_that_fit(side, rank, width):
    """Also the widest blocks leave tl.dot at least 16 of everything."""
    from tn_kernels.chain import _heuristic, _space  # late: private, and only this test looks at them

    sizes = (("n", 1000), ("i", side), ("j", side), ("r", rank), ("k", side), ("l", side))
    for weight in (False, True):
        space = _space(sizes, weight, width)
        assert space
        assert len(set(space)) == len(space)
        for cut in (*space, _heuristic(sizes, weight, width)):
            assert min(cut["BN"], cut["BJ"], cut["BL"], cut["BI"] * cut["BR"], cut["BK"] * cut["BR"]) >= 16
            assert cut["BR"] >= rank


def test_tuning_keeps_the_fastest(tmp_path, monkeypatch):
    """On pretended times, so that it runs anywhere: the cut with the smallest blocks is fastest, one does not run."""
    x = torch.ones(64, 64, device=DEVICE)
    before = x.clone()
    monkeypatch.setattr(tuning, "_check_device", lambda operands: None)
    monkeypatch.setattr(tuning, "path", lambda device: tmp_path / "table.json")
    monkeypatch.setattr(tuning, "device_name", lambda device: "pretended")
    tried = []

    def pretended(run, samples):
        cut = tuning._forced.get()["gated"]
        tried.append(cut)
        if cut["BN"] == 32:
            raise OperatorError("out of resource: shared memory")
        return cut["BN"] * cut["BE"] + cut.warps

    monkeypatch.setattr(tuning, "_seconds", pretended)
    best = tuning.tune(lambda x: gated(x, x, x).add_(1), [x])
    (key, cut), *rest = best.items()
    assert not rest
    assert key == "gated n64 d64 e64 float32"
    assert (cut["BN"], cut["BE"], cut.warps) == (64, 32, 4)
    assert len(tried) == len(set(tried)) > 4
    assert tuning.read(tmp_path / "table.json") == best
    assert torch.equal(x, before)


def test_tuning_needs_a_gpu():
    if DEVICE == "cuda":
        pytest.skip("there is one")
    with pytest.raises(OperatorError, match="tuning measures on a CUDA device; the operands are cpu"):
        tuning.tune(lambda x: x, [torch.ones(2)])
