"""Plan.draw: what is on the picture, and that nothing on it lies on anything else."""

import itertools

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

import tn
from tn.draw_plan import boxes

MLA = tn.network("q: s h n, up: c h n, kv: t c -> s h t", dict(h=16, n=128, c=256, t=4096), cores=("up",))
PLANS = {
    "low_rank": lambda: tn.StructuredLinear(1024, 1024, structure="low_rank", rank=64).plan(2048),
    "btt": lambda: tn.StructuredLinear(1024, 1024, structure="btt", rank=4).plan(4096),
    "tt": lambda: tn.StructuredLinear(1296, 1296, structure="tt", cores=4, rank=16).plan(1024),
    "mla": lambda: tn.plan(MLA, sizes=dict(s=2), goal="flops"),
    "single": lambda: tn.plan(tn.network("x: ... i j -> ... j i", dict(i=3, j=4))),
    "scalar": lambda: tn.plan(tn.network("x: i, y: i ->", dict(i=3))),
    "hyper": lambda: tn.plan(
        tn.network("x: b r, u: i r, v: o r, w: p r -> b i o p", dict(r=2, i=3, o=4, p=5)), sizes=dict(b=7), grad=("u",)
    ),
    "two outputs": lambda: tn.plan(tn.network("x: ... i, a: i r, c: r h -> q: ... h, k: ... r", dict(i=8, r=2, h=4)), rows=5),
    "twice": lambda: tn.plan(tn.network("q: s d, k: t d, q: s e, k: t e, v: t w -> s w", dict(s=9, t=9, d=4, e=4, w=4))),
}


@pytest.mark.parametrize("name", PLANS)
def test_texts_lie_apart_and_inside_the_picture(name, tmp_path):
    figure = PLANS[name]().draw(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 5000
    renderer = FigureCanvasAgg(figure).get_renderer()
    page = figure.bbox
    places = [(text.get_text(), text.get_window_extent(renderer)) for text in figure.axes[0].texts if text.get_text()]
    for (one, a), (other, b) in itertools.combinations(places, 2):
        assert not a.overlaps(b), (one, other)
    for text, place in places:
        assert page.x0 <= place.x0 and place.x1 <= page.x1 and page.y0 <= place.y0 and place.y1 <= page.y1, text


@pytest.mark.parametrize("name", PLANS)
def test_every_value_is_a_box_that_says_what_it_costs(name):
    plan = PLANS[name]()
    made = boxes(plan)
    assert len(made) == len(plan.orders)
    assert len({(box.column, box.row) for box in made}) == len(made)
    ran = {step.out for step in plan.steps}
    for step in plan.tree_steps:
        box = made[step.out]
        if step.out not in ran:
            assert "not computed again" in box.lines[0] or "shared" in box.lines[0]
            continue
        assert box.column > max(made[step.left].column, made[step.right].column)
        assert step.pairing.kind in box.lines[0] and "FLOP" in box.lines[1]
        assert (len(box.lines) == 3) == plan.needs[step.out]
    assert {box.title for box in made if box.kind != "step"} == set(plan.network.names)
    assert any(box.tiled for box in made) == (plan.tile is not None)
