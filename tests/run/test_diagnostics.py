"""What is measured at a save, zero for the exact answer only, on Gaussian data; log; plot."""

import json

import pytest
import torch
from PIL import Image
from test_lcm import M_NULL, M_W, M, W, affine_student, fixed_point
from tiny import random_tau, tiny_unet

from minilcm.__main__ import main, parse
from minilcm.data.pictures import contact_sheet, draw_sheet
from minilcm.generate import noise
from minilcm.lcm import draw, f_theta, lcd_loss
from minilcm.lora import add_lora, get_tau
from minilcm.merge import delta, delta_norms
from minilcm.model.unet import Cond
from minilcm.run.diagnostics import (
    INDICES,
    append_metrics,
    consistency_along_trajectory,
    few_step_columns,
    few_steps,
    guided_trajectory,
    loss_by_band,
    loss_by_index,
    read_metrics,
)
from minilcm.run.plot import draw_run
from minilcm.schedule import add_noise
from minilcm.solver import sample_ddim, trailing_grid

SHAPE = (3, 4, 8, 8)


def mean_cond(m: float, b: int = SHAPE[0]) -> Cond:
    return Cond(torch.full((b, 1, 1), m))


COND, NULL_COND = mean_cond(M), mean_cond(M_NULL)


@pytest.fixture(scope="module")
def teacher(gaussian):
    """The exact network for data N(cond, s^2)."""
    return lambda z_t, t, cond, w: gaussian._replace(m=cond.context.reshape(-1, 1, 1, 1)).eps(
        z_t, t
    )


@pytest.fixture(scope="module")
def trajectory(teacher, schedule):
    z_T, _ = noise(range(SHAPE[0]), SHAPE[1:])
    return guided_trajectory(teacher, z_T, COND, NULL_COND, schedule, W)


@pytest.fixture(scope="module")
def perfect(gaussian, schedule):
    """The student whose f is the teacher's 50 DDIM steps guided by W: lcd_loss's fixed point."""
    return affine_student(schedule, *fixed_point(gaussian, M_W))


def wrong_students(gaussian, schedule):
    """f of another scale, of w off by one, of an unguided teacher, and no f: the denoiser."""
    p, q = fixed_point(gaussian, M_W)
    return {
        "scale": affine_student(schedule, p, 1.02 * q),
        "w": affine_student(schedule, *fixed_point(gaussian, M + (W - 1) * (M - M_NULL))),
        "unguided": affine_student(schedule, *fixed_point(gaussian, M)),
        "denoiser": lambda z_t, t, cond, w: gaussian._replace(m=M_W).eps(z_t, t),
    }


# ---- fixed noise


def test_fixed_noise_is_the_same_at_every_save_and_batch():
    """Image i has seed i, as sample.py draws it in any batch; the noise that follows is not z_T."""
    z_T, generators = noise(range(SHAPE[0]), SHAPE[1:])
    for i in range(len(z_T)):
        g = torch.Generator().manual_seed(i)
        assert torch.equal(z_T[i], torch.randn(SHAPE[1:], generator=g))
        assert torch.equal(g.get_state(), generators[i].get_state())
    assert torch.equal(z_T[:2], noise(range(2), SHAPE[1:])[0])


# ---- the loss


def test_loss_by_index_is_lcd_loss_at_the_index(gaussian, schedule, teacher, perfect):
    """Each number is lcd_loss at n with the same generator; zero at the fixed point; repeatable."""
    z0 = M + gaussian.s * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    args = z0, COND, NULL_COND, schedule
    student = wrong_students(gaussian, schedule)["scale"]
    losses = loss_by_index(student, teacher, perfect, *args, W)
    assert tuple(losses) == INDICES == (0, 5, 11, 16, 22, 27, 33, 38, 44, 49)
    for n, loss in losses.items():
        _, w, eps = draw(SHAPE, torch.Generator().manual_seed(0), (W, W))
        expected = lcd_loss(student, teacher, perfect, *args, torch.tensor([n] * 3), w, eps)
        assert loss == expected.item() > 3e-3
    assert losses == loss_by_index(student, teacher, perfect, *args, W)
    assert max(loss_by_index(perfect, teacher, perfect, *args, W).values()) < 1e-6
    for other in (W - 1, W + 1):  # another guidance: not the fixed point
        assert min(loss_by_index(perfect, teacher, perfect, *args, other).values()) > 1e-3


def test_loss_by_index_shows_where_it_is_wrong(gaussian, schedule, teacher, perfect):
    """f off at one index: the loss is off there; k = 100 takes its target 5 indices below."""
    z0 = M + gaussian.s * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    p, q = fixed_point(gaussian, M_W)
    p[11] += 0.1
    off = affine_student(schedule, p, q)
    losses = loss_by_index(off, teacher, off, z0, COND, NULL_COND, schedule, W)
    assert losses.pop(11) == pytest.approx(0.1 - 1e-3, abs=1e-3) and max(losses.values()) < 1e-6
    long, long_off = (
        loss_by_index(perfect, teacher, x, z0, COND, NULL_COND, schedule, W, k=100)
        for x in (perfect, off)
    )
    assert [n for n in INDICES if long[n] != long_off[n]] == [16]


def test_loss_by_band_is_the_variance_of_the_noise(gaussian, schedule):
    """For the exact network E (eps_hat - eps)^2 = Var(eps | z_t) = alpha^2 s^2 / V_t, averaged over
    the band; for one that says 0 it is 1, at every t: nothing is weighted. cond reaches the
    network.
    """
    b = 50  # every second timestep of a band: 1, 3, ..., 99
    z0 = M + gaussian.s * torch.randn((b, 4, 16, 16), generator=torch.Generator().manual_seed(1))
    seen = []

    def network(z_t, t, cond, w):
        seen.append(t)
        return gaussian._replace(m=cond.context.reshape(-1, 1, 1, 1)).eps(z_t, t)

    losses = loss_by_band(network, z0, mean_cond(M, b), schedule)
    assert list(losses) == list(range(0, 1000, 100))
    assert torch.equal(torch.cat(seen), torch.arange(1, 1000, 2))
    for start, loss in losses.items():
        t = torch.arange(start + 1, start + 100, 2)
        alpha, _, v = gaussian.at(torch.zeros(50, 1), t)
        assert loss == pytest.approx((alpha**2 * gaussian.s**2 / v).mean().item(), rel=0.03)
    nothing = loss_by_band(
        lambda z_t, t, cond, w: torch.zeros_like(z_t), z0, mean_cond(M, b), schedule
    )
    assert len(set(nothing.values())) == 1 and nothing[0] == pytest.approx(1, abs=0.01)
    assert max(loss_by_band(network, z0, mean_cond(M_NULL, b), schedule).values()) > 1.2 * max(
        losses.values()
    )


# ---- the teacher's trajectory


def test_guided_trajectory_is_the_teachers_ddim(gaussian, schedule, trajectory, teacher):
    """51 points: z_T, then guided DDIM, closed steps for N(M_W, s^2); last, sample_ddim's z0.

    (z_t - alpha m_w) / (z_start - alpha m_w) = (alpha' alpha s^2 + sigma' sigma) / V.
    """
    z_T, _ = noise(range(SHAPE[0]), SHAPE[1:])
    assert trajectory.shape == (51, *SHAPE) and torch.equal(trajectory[0], z_T)
    data = gaussian._replace(m=M_W)
    torch.testing.assert_close(
        trajectory[-1], sample_ddim(data.eps, z_T, schedule, trailing_grid(50)), rtol=0, atol=1e-4
    )
    for n in (0, 1, 25, 49):
        t, t_end = 20 * n + 19, max(20 * n - 1, 0)
        z_start, z_end = trajectory[49 - n].double(), trajectory[50 - n].double()
        alpha, sigma, v = data.at(z_start, t)
        alpha_end, sigma_end, _ = data.at(z_start, t_end)
        factor = (alpha_end * alpha * data.s**2 + sigma_end * sigma) / v
        torch.testing.assert_close(
            z_end,
            alpha_end * M_W + factor * (z_start - alpha * M_W),
            rtol=0,
            atol=1e-4,
            check_dtype=False,
        )
    short = guided_trajectory(teacher, z_T, COND, NULL_COND, schedule, W, steps=20)
    torch.testing.assert_close(
        short[-1], sample_ddim(data.eps, z_T, schedule, trailing_grid(20)), rtol=0, atol=1e-4
    )


def test_self_consistency_vanishes_for_the_exact_f_only(gaussian, schedule, trajectory, perfect):
    """Both errors are 0 at every index at the fixed point, and at none for an f of another scale, w
    off by one, no guidance, or the denoiser, which a network that was not distilled has.
    """
    for errors in consistency_along_trajectory(perfect, trajectory, COND, schedule, W):
        assert tuple(errors) == INDICES and max(errors.values()) < 2e-5
    for name, student in wrong_students(gaussian, schedule).items():
        neighbours, end = consistency_along_trajectory(student, trajectory, COND, schedule, W)
        assert min(neighbours.values()) > 5e-4 and min(end.values()) > 5e-3, name

        def f(z_t, t):
            return f_theta(z_t, student(z_t, torch.tensor([t]), COND, None), t, schedule)

        gap = f(trajectory[49 - 22], 459) - f(trajectory[50 - 22], 439)
        gap = gap.square().flatten(1).mean(dim=1).sqrt()  # (b,), over each image
        assert neighbours[22] == pytest.approx(gap.square().mean().sqrt().item(), rel=1e-3)


def test_self_consistency_is_between_neighbours(gaussian, schedule, trajectory):
    """An f off by 0.1 at index 11 alone is inconsistent there by 0.1 and nowhere else; off at 10,
    its neighbour below, likewise; off at 12 nothing is seen at 11. The distance to the end is 0.1
    where f itself is off.
    """
    for at, seen in ((11, True), (10, True), (12, False)):
        p, q = fixed_point(gaussian, M_W)
        p[at] += 0.1
        neighbours, end = consistency_along_trajectory(
            affine_student(schedule, p, q), trajectory, COND, schedule, W
        )
        assert neighbours.pop(11) == pytest.approx(0.1 if seen else 0, abs=1e-4)
        assert end.pop(11) == pytest.approx(0.1 if at == 11 else 0, abs=1e-4)
        assert max(neighbours.values()) < 1e-4 and max(end.values()) < 1e-4


def test_the_ode_itself_is_nearly_consistent(gaussian, schedule, trajectory):
    """The exact f differs from 50 DDIM steps by their error: less than the denoiser does."""
    data = gaussian._replace(m=M_W)

    def ode(z_t, t, cond, w):
        return data.eps_of_f(z_t, t)

    def denoiser(z_t, t, cond, w):
        return data.eps(z_t, t)

    neighbours, end = consistency_along_trajectory(ode, trajectory, COND, schedule, W)
    worse, worse_end = consistency_along_trajectory(denoiser, trajectory, COND, schedule, W)
    assert all(
        neighbours[n] < worse[n] / 10 and end[n] < worse_end[n] / 4 for n in INDICES if n >= 5
    )
    exact = data.ode(trajectory[0].double(), 999, 0)
    assert (
        end[49] == pytest.approx((exact - trajectory[-1]).square().mean().sqrt().item(), rel=0.3)
        and end[49] > 0.01
    )


# ---- distance to the teacher


def test_one_step_of_the_exact_flow_is_the_teacher(gaussian, schedule, trajectory, perfect):
    """Distance 0 in one step; 2 and 4 steps add noise, whose part is known.

    z0 <- p_t + q_t (alpha z0 + sigma eps)

    Students that are wrong are as far off in one step as their p and q say.
    """
    p, q = fixed_point(gaussian, M_W)
    _, distance = few_step_columns(perfect, perfect, trajectory, COND, schedule, W)
    assert list(distance) == [1, 2, 4] and distance[1] < 1e-4
    for steps, grid in ((2, [499]), (4, [759, 499, 259])):
        _, generators = noise(range(SHAPE[0]), SHAPE[1:])
        z0 = trajectory[-1].double()
        for t in grid:
            eps = torch.stack([torch.randn(SHAPE[1:], generator=g) for g in generators])
            z0 = p[(t - 19) // 20] + q[(t - 19) // 20] * add_noise(z0, eps, t, gaussian.schedule)
        expected = (z0 - trajectory[-1]).square().mean().sqrt().item()
        assert distance[steps] == pytest.approx(expected, rel=1e-3) and expected > 0.1
    wrong = wrong_students(gaussian, schedule)["scale"]
    _, off = few_step_columns(wrong, perfect, trajectory, COND, schedule, W)
    assert off[1] == pytest.approx(
        (0.02 * q[49] * trajectory[0]).square().mean().sqrt().item(), rel=1e-2
    )


def test_without_variance_every_number_of_steps_is_the_teacher(gaussian, schedule):
    """Data that is one point, s = 0: f is the point from everywhere; unguided, w 0.9 off."""
    point = gaussian._replace(s=0.0)

    def teacher(z_t, t, cond, w):
        return point._replace(m=cond.context.reshape(-1, 1, 1, 1)).eps(z_t, t)

    def student(z_t, t, cond, w):
        return point._replace(m=M + w[:, None, None, None] * (M - M_NULL)).eps(z_t, t)

    z_T, _ = noise(range(SHAPE[0]), SHAPE[1:])
    trajectory = guided_trajectory(teacher, z_T, COND, NULL_COND, schedule, W)
    # the schedule ends at alpha_bar_0 = 0.99915: a little noise is left in the teacher's z0
    trajectory[-1] = M_W
    _, distance = few_step_columns(student, student, trajectory, COND, schedule, W)
    assert max(distance.values()) < 1e-4
    _, far = few_step_columns(student, student, trajectory, COND, schedule, 0.0)
    assert list(far.values()) == pytest.approx([W * (M - M_NULL)] * 3, rel=1e-4)


# ---- the sheet


def test_columns_of_the_sheet(gaussian, schedule, trajectory, perfect):
    """Base, student 1, 2, 4, teacher, all from the same z_T; the base is the teacher's network, not
    guided, and 4 LCM steps of it.
    """
    base = wrong_students(gaussian, schedule)["denoiser"]
    columns, _ = few_step_columns(perfect, base, trajectory, COND, schedule, W)
    names = [
        "base, 4 steps",
        "student, 1 step",
        "student, 2 steps",
        "student, 4 steps",
        "teacher, 50 DDIM",
    ]
    assert list(columns) == names
    assert torch.equal(columns[names[0]], few_steps(base, trajectory[0], COND, schedule, W, 4))
    for steps, name in zip((1, 2, 4), names[1:]):
        assert torch.equal(
            columns[name], few_steps(perfect, trajectory[0], COND, schedule, W, steps)
        )
    assert torch.equal(columns[names[4]], trajectory[-1])
    torch.testing.assert_close(columns[names[1]], columns[names[4]], rtol=0, atol=1e-4)


def test_sheet_has_a_row_a_prompt_and_a_column_a_label(monkeypatch):
    """Prompt i's picture j is at row i, column j, labelled by both, each on its own line."""
    columns = {
        f"c{j}": torch.stack([torch.full((4, 8, 8), 0.1 * (3 * i + j)) for i in range(2)])
        for j in range(3)
    }
    seen = []

    def spy(images, labels, count):
        seen.extend(labels)
        return contact_sheet(images, labels, count)

    monkeypatch.setattr("minilcm.data.pictures.contact_sheet", spy)
    sheet = draw_sheet(columns, ["cat", "dog"], lambda z0: z0[:, :3].repeat(1, 1, 16, 16))
    assert seen == ["c0\ncat", "c1\ncat", "c2\ncat", "c0\ndog", "c1\ndog", "c2\ndog"]
    assert sheet.size == (3 * 136, 2 * (128 + 2 * 13 + 6 + 8))
    for i in range(2):
        for j in range(3):
            level = round((0.1 * (3 * i + j) + 1) * 127.5)
            assert abs(sheet.getpixel((136 * j + 60, 168 * i + 60))[0] - level) <= 1


# ---- the LoRA


@pytest.mark.parametrize("rank, lora_alpha", [(1, 1.0), (3, 1.5), (4, 8.0), (16, 2.0)])
def test_delta_norms_are_those_of_the_whole_delta(rank, lora_alpha):
    """||dW||_F of merge.delta over a block's modules, Linear and conv, lora_alpha != rank."""
    tau = random_tau(tiny_unet(), 5, rank, lora_alpha)
    assert {down.ndim for _, down, _ in tau.values()} == {2, 4}
    assert {down.shape[2:] for _, down, _ in tau.values() if down.ndim == 4} == {(1, 1), (3, 3)}
    squares = {}
    for path, parts in tau.items():
        block = "middle_block" if path.startswith("middle_block") else ".".join(path.split(".")[:2])
        squares[block] = squares.get(block, 0) + delta(*parts).double().square().sum().item()
    norms = delta_norms(tau)
    assert norms == pytest.approx(
        {block: square**0.5 for block, square in squares.items()}, rel=1e-5
    )
    assert {block.split(".")[0] for block in norms} == {
        "input_blocks",
        "middle_block",
        "output_blocks",
    }
    order = (
        [f"input_blocks.{i}" for i in range(99)]
        + ["middle_block"]
        + [f"output_blocks.{i}" for i in range(99)]
    )
    assert list(delta_norms(dict(reversed(tau.items())))) == [
        block for block in order if block in norms
    ]
    single = {path: parts for path, parts in tau.items() if parts[1].ndim == 4}
    assert sum(x**2 for x in delta_norms(single).values()) < 0.95 * sum(
        x**2 for x in norms.values()
    )


def test_delta_norms_start_at_zero():
    """B = 0 at the start: exactly 0 in every block, no NaN; the parameters stay trainable."""
    unet = tiny_unet()
    add_lora(unet, 4)
    tau = get_tau(unet)
    assert set(delta_norms(tau).values()) == {0.0}
    assert all(up.requires_grad and down.requires_grad for up, down, _ in tau.values())


# ---- the log


def record(step: int, **more) -> dict:
    indices = {n: 0.1 / (1 + step) for n in INDICES}
    blocks = {
        "input_blocks.1": 0.1 * step,
        "middle_block": 0.2 * step,
        "output_blocks.10": 0.3 * step,
    }
    far = {steps: 1 / (steps + step) for steps in (1, 2, 4)}
    measured = {"loss_by_index": indices, "self_consistency": indices, "to_end": indices}
    return {
        "step": step,
        "loss": 1 / (1 + step),
        "fixed_loss": 2 / (3 + step),
        **measured,
        "to_teacher": far,
        "delta_norms": blocks,
    } | more


def test_log_round_trip(tmp_path):
    """What was appended is read: by step, int indices, blocks' names; one line of JSON each."""
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_metrics(path, record(step))
    assert read_metrics(path) == [record(1), record(2), record(3)]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_log_survives_a_torn_line(tmp_path):
    """Killed after any byte of the third line: two records are read, the next append is whole."""
    whole = tmp_path / "whole.jsonl"
    for step in (1, 2):
        append_metrics(whole, {"step": step, "loss": 0.5})
    start = whole.stat().st_size
    append_metrics(whole, {"step": 33, "loss": 0.25})
    data, path = whole.read_bytes(), tmp_path / "metrics.jsonl"
    for cut in range(start, len(data)):
        path.write_bytes(data[:cut])
        assert [r["step"] for r in read_metrics(path)] == [1, 2]
        append_metrics(path, {"step": 3, "loss": 0.125})
        assert path.read_bytes() == data[:start] + b'{"step": 3, "loss": 0.125}\n'
    path.write_bytes(data[: start // 4])  # nothing but a torn line
    assert read_metrics(path) == []


def test_log_of_a_resumed_run(tmp_path):
    """Steps 2 and 3 written again after a resume: the later ones count, in order of steps."""
    path = tmp_path / "metrics.jsonl"
    for step, loss in ((1, 0.9), (2, 0.8), (3, 0.7), (2, 0.6), (3, 0.5), (4, 0.4)):
        append_metrics(path, {"step": step, "loss": loss})
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [
        (1, 0.9),
        (2, 0.6),
        (3, 0.5),
        (4, 0.4),
    ]


@pytest.mark.parametrize("line", [b"{", b"[1]", b"{}", b"null", b"\xff"])
def test_a_spoiled_log_is_refused(tmp_path, line):
    """A whole line that is no record, and no file: one line that says where."""
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(ValueError, match="metrics.jsonl: no such file"):
        read_metrics(path)
    append_metrics(path, {"step": 1})
    with open(path, "ab") as f:
        f.write(line + b"\n")
    with pytest.raises(ValueError, match="metrics.jsonl: line 2 is not a record of a step"):
        read_metrics(path)


# ---- the plot


def test_plot_writes_a_picture(tmp_path, capsys):
    """plot RUN: six panels as RUN/plot.png; a log without measures gives one; an old plot goes."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -e .[plot]")
    log, out = tmp_path / "metrics.jsonl", tmp_path / "plot.png"
    append_metrics(log, {"step": 1, "loss": 0.5})
    main(parse(["plot", str(tmp_path)]))
    small = Image.open(out).size
    for step in (10, 20, 30):
        append_metrics(log, record(step))
    main(parse(["plot", str(tmp_path)]))
    assert Image.open(out).format == "PNG" and Image.open(out).width > 1.5 * small[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "plot.png"]
    assert capsys.readouterr().out == f"{out}\n" * 2


def test_plot_shows_what_was_measured():
    """One line a save by index and block, one a number of steps by step; titles, axis labels and a
    legend; log axes for losses and distances, where the lines hold the numbers of the records.
    """
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -e .[plot]")
    records = [
        {"step": 5, "loss": 0.7},
        record(10),
        record(20),
        {"step": 25, "loss": 0.6},
        record(30),
    ]
    figure = draw_run(records, "runs/lcm")
    *axes, colorbar = figure.axes
    assert (
        len(axes) == 6 and "step" in colorbar.get_ylabel() and figure.get_suptitle() == "runs/lcm"
    )
    assert all(ax.get_title() and ax.get_xlabel() and ax.get_ylabel() for ax in axes)
    loss, *saves, far = axes
    assert list(loss.lines[0].get_xdata()) == [5, 10, 20, 25, 30]
    assert list(loss.lines[0].get_ydata()) == [r["loss"] for r in records]
    assert list(loss.lines[1].get_xdata()) == [10, 20, 30]
    assert list(loss.lines[1].get_ydata()) == [records[i]["fixed_loss"] for i in (1, 2, 4)]
    for ax, key in zip(saves, ("loss_by_index", "self_consistency", "to_end", "delta_norms")):
        assert len(ax.lines) == 3 and len({line.get_color() for line in ax.lines}) == 3
        for line, saved in zip(ax.lines, (records[1], records[2], records[4])):
            assert list(line.get_xdata(orig=True)) == list(saved[key])
            assert list(line.get_ydata()) == list(saved[key].values())
    assert [ax.get_yscale() for ax in axes] == ["log", "log", "log", "log", "linear", "log"]
    assert [text.get_text() for text in far.get_legend().get_texts()] == [
        "1 step",
        "2 steps",
        "4 steps",
    ]
    assert list(far.lines[1].get_ydata()) == [1 / 12, 1 / 22, 1 / 32]


def test_plot_of_a_diffusion_run():
    """Loss by band of timesteps and norms of the LoRA: three panels, none of the teacher."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -e .[plot]")
    bands = {start: 0.5 for start in range(0, 1000, 100)}
    figure = draw_run(
        [{"step": 1, "loss": 0.5, "loss_by_band": bands, "delta_norms": {"middle_block": 0.1}}],
        "run",
    )
    assert [ax.get_title() for ax in figure.axes[:-1]] == [
        "Training loss",
        "Loss by timestep",
        "Size of the LoRA's change",
    ]


def test_plot_errors(tmp_path, monkeypatch):
    """No log, nothing in it, no matplotlib: one line each, no picture."""
    with pytest.raises(ValueError, match="metrics.jsonl: no such file"):
        main(parse(["plot", str(tmp_path)]))
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "matplotlib.figure", None)
        append_metrics(tmp_path / "metrics.jsonl", record(1))
        with pytest.raises(ValueError, match="plot needs matplotlib: pip install -e") as caught:
            main(parse(["plot", str(tmp_path)]))
        assert "\n" not in str(caught.value)
    (tmp_path / "metrics.jsonl").write_text('{"step"')
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -e .[plot]")
    with pytest.raises(ValueError, match="no complete record"):
        main(parse(["plot", str(tmp_path)]))
    assert not (tmp_path / "plot.png").exists()
