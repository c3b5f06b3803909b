"""tour/lcm_lora.py: its formulas are the package's on the same numbers; it draws its figure."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from minilcm import lcm, merge, solver
from minilcm import schedule as door
from minilcm.model.unet import Cond

SCRIPT = Path(__file__).parents[2] / "tour/lcm_lora.py"
TINY = {
    "WIDTH, LAYERS": "16, 2",
    "BATCH": 48,
    "TEACHER_STEPS, LCM_STEPS, STYLE_STEPS": "3, 3, 3",
    "POINTS": 200,
}
T = torch.tensor([0, 19, 259, 999])
B = len(T)


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    """The script's names after it ran in tiny numbers, and where it wrote its figure."""
    source = SCRIPT.read_text()
    for name, value in TINY.items():
        source, found = re.subn(rf"^{name} = .*", f"{name} = {value}", source, flags=re.M)
        assert found == 1, name
    names = {"__file__": str(tmp_path_factory.mktemp("tour") / "lcm_lora.py")}
    with torch.random.fork_rng():
        exec(compile(source, SCRIPT, "exec"), names)
    return names


@pytest.fixture(scope="module")
def z(tour):
    """Points (b, 2), noise like them and classes (b,)."""
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(B, 2, generator=generator), torch.randn(B, 2, generator=generator)
    return *points, torch.tensor([0, 1, 2, 1])


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def as_unet(tour, tau):
    """The script's network as the package calls one, (z_t (b, 2, 1, 1), t, cond, w) -> eps_hat."""

    def network(z_t, t, cond, w=None):
        c = cond.context[:, 0, 0].long()
        return tour["eps_net"](z_t.flatten(1), t, c, tau).view_as(z_t)

    return network


def cond_of(c):
    return Cond(c.float().view(-1, 1, 1))


def test_schedule_and_noise(tour, z, schedule):
    assert torch.equal(tour["alpha"].flatten(), schedule.alpha)
    assert torch.equal(tour["sigma"].flatten(), schedule.sigma)
    same(tour["add_noise"](*z[:2], T), door.add_noise(*z[:2], T, schedule))


@pytest.fixture
def drawn(tour, monkeypatch):
    """What the losses draw, filled as they run: (z0, eps, t) of add_noise, classes of eps_net."""
    drawn, add_noise, eps_net = {"c": []}, tour["add_noise"], tour["eps_net"]

    def spy_noise(z0, eps, t):
        drawn.update(z0=z0, eps=eps, t=t)
        return add_noise(z0, eps, t)

    def spy_net(z_t, t, c, tau):
        drawn["c"].append(c)
        return eps_net(z_t, t, c, tau)

    monkeypatch.setitem(tour, "add_noise", spy_noise)
    monkeypatch.setitem(tour, "eps_net", spy_net)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        yield drawn


def test_diffusion_loss(tour, drawn, schedule):
    tau = tour["tau_style"]
    ours = tour["diffusion_loss"](0.5, tau)
    (c,) = drawn["c"]

    def eps_fn(z_t, t):
        return tour["eps_net"](z_t, t, c, tau)

    z0, eps, t = drawn["z0"], drawn["eps"], drawn["t"]
    same(ours, door.diffusion_loss(eps_fn, z0, t, eps, schedule, snr_gamma=None))
    kept = c != tour["NULL"]
    assert not kept.all() and torch.equal(c[kept], tour["letters"][kept])
    assert len(t.unique()) > 4 and abs(eps.std() - 1) < 0.3


def test_guidance(tour, z):
    z_t, _, c = z
    null = torch.full_like(c, tour["NULL"])
    for w in (0, 2.5):
        eps_fn = solver.guided_eps(as_unet(tour, tour["NO_LORA"]), cond_of(c), cond_of(null), w)
        theirs = eps_fn(z_t.view(B, 2, 1, 1), T).flatten(1)
        same(tour["guided_eps"](z_t, T, c, w), theirs)


def test_ddim_step(tour, z, schedule):
    z_t, eps_hat, _ = z
    t_end = (T - 60).clamp(min=0)
    x0 = door.x0_from_eps(z_t, eps_hat, T, schedule)
    same(
        tour["ddim_step"](z_t, eps_hat, T, t_end),
        solver.ddim_step(x0, eps_hat, t_end, schedule),
    )


def test_f(tour, z, schedule):
    """Boundary scalings and x0; at t = 0 the identity, bitwise. At t = 1 c_skip still shows."""
    z_t, _, c = z
    tau = tour["tau_lcm"]
    for t in (T, torch.tensor([1, 1, 2, 3])):
        theirs = lcm.f_theta(z_t, tour["eps_net"](z_t, t, c, tau), t, schedule)
        torch.testing.assert_close(tour["f"](z_t, t, c, tau), theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(tour["f"](z_t, T, c, tau)[0], z_t[0])


def test_grids(tour):
    assert torch.equal(tour["GRID"], lcm.train_grid())
    for steps in (1, 2, 4, 8, 50):
        grid = tour["ddim_grid"](steps)
        assert grid == [*solver.trailing_grid(steps), 0]


def test_algorithm_1(tour, drawn, schedule):
    """Loss and gradients, with a LoRA that is not zero: student on, teacher off, target on."""
    ups = [(B + 0.1).detach().requires_grad_() for B, _ in tour["lcm_lora"]]
    tau = [B @ A.detach() for B, (_, A) in zip(ups, tour["lcm_lora"])]
    ours = tour["lcd_loss"](tau)
    z0, eps, c = drawn["z0"], drawn["eps"], drawn["c"][0]
    n = (drawn["t"] + 1) // 20 - 1
    on, off = as_unet(tour, tau), as_unet(tour, tour["NO_LORA"])
    four, w = (len(c), 2, 1, 1), torch.full((len(c),), float(tour["W"]))
    conds = cond_of(c), cond_of(torch.full_like(c, tour["NULL"]))
    pictures = z0.view(four), *conds, schedule, n, w, eps.view(four)
    theirs = lcm.lcd_loss(on, off, on, *pictures, k=tour["K"])
    same(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(x, ups, retain_graph=True) for x in (ours, theirs))):
        same(a, b)
    assert len(n.unique()) > 4 and abs(eps.std() - 1) < 0.3


def test_lora_is_a_change_of_low_rank_and_begins_as_none(tour):
    for B, A in tour["new_lora"](2):
        assert not B.any() and A.any()
    lora = [(torch.randn(16, 2), torch.randn(2, 16)) for _ in tour["hidden"]]
    for ours, (B, A) in zip(tour["tau_of"](lora), lora):
        same(ours, merge.delta(B, A, lora_alpha=2))


def test_the_sum_is_the_package_s(tour):
    """tau_mix is what merge.combine of the two LoRA does, where alpha is the rank."""
    pairs = tour["style_lora"], tour["lcm_lora"]
    taus = [{str(i): (B, A, len(A)) for i, (B, A) in enumerate(pair)} for pair in pairs]
    mix = merge.combine(taus, [tour["lambda1"], tour["lambda2"]])
    for i, ours in enumerate(tour["tau_mix"]):
        same(ours, merge.delta(*mix[str(i)]))


def test_samplers(tour, z, schedule):
    """From the same noise to the same points; between jumps both draw from the same stream."""
    z_T, _, c = z
    tau = tour["tau_mix"]

    def eps_fn(z_t, t):
        return tour["eps_net"](z_t, t, c, tau)

    ours = tour["sample_ddim"](z_T, c, 5, tau=tau)[-1]
    same(ours, solver.sample_ddim(eps_fn, z_T, schedule, solver.trailing_grid(5)))
    with torch.random.fork_rng():
        for steps in (1, 2, 3, 4):
            torch.manual_seed(steps)
            ours = tour["sample_lcm"](z_T, c, steps, tau)[-1]
            torch.manual_seed(steps)
            same(
                ours,
                lcm.sample_lcm(
                    eps_fn, z_T, schedule, lcm.lcm_grid(steps), [torch.default_generator] * B
                ),
            )


def test_miss(tour):
    """A letter moved sideways by x letters' heights misses by 2 / pi of x: the mean over directions
    of |cos|. Italic data misses the upright, but not the italic.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        c = tour["asked"]
        moved = tour["draw_data"](c) + torch.tensor([10 * tour["HEIGHT"], 0])
        assert tour["miss"](moved) == pytest.approx(1000 * 2 / torch.pi, rel=0.05)
        slant = tour["SLANT"]
        italic = tour["draw_data"](c, slant)
        assert tour["miss"](italic, slant) < 0.8 * tour["miss"](italic)


def test_it_draws_its_figure(tour):
    with Image.open(Path(tour["__file__"]).with_suffix(".png")) as picture:
        assert picture.size == tour["SIZE"]
        assert len(picture.convert("RGB").getcolors(10**6)) > 50
    assert SCRIPT.with_suffix(".png").stat().st_size < 300_000


def test_it_stands_alone():
    """At most 300 lines; torch, Pillow and the standard library."""
    lines = SCRIPT.read_text().splitlines()
    assert len(lines) <= 300
    imports = [line.split()[1].split(".")[0] for line in lines if re.match("(import|from) ", line)]
    assert set(imports) == {"math", "pathlib", "torch", "PIL"}
