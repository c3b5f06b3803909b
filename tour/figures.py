"""The chapters' figures, and the numbers in their titles and texts, by the shipped model.

    python -m tour.make --figures

A function a chapter: it draws tour/figures/NN.png and returns the numbers. All start from fixed
seeds and are computed in float32, which differs between processors in the last digits only.
"""

import torch
from torch import Tensor

from minilcm.files.checkpoint import load_model
from minilcm.files.identify import sd15_config, sdxl_config
from minilcm.files.lora_file import read_tau
from minilcm.generate import generate, noise
from minilcm.lcm import f_theta, train_grid
from minilcm.lora import target_paths
from minilcm.merge import factorise, merge_into, reduce_rank
from minilcm.metrics import sharpness
from minilcm.model.unet import Cond, UNet, emoji
from minilcm.run.diagnostics import consistency_along_trajectory, loss_by_index
from minilcm.schedule import add_noise, x0_from_eps
from minilcm.solver import ddim_step, guided_eps, sample_ddim, trailing_grid

from .panels import (
    BLUE,
    GREEN,
    GREY,
    NAMES,
    ORANGE,
    PSI_STEPS,
    SCHEDULE,
    SHAPE,
    WEIGHTS,
    K,
    W,
    adapted,
    drawing,
    eps_of,
    figure,
    lcm_lora,
    name_line,
    network,
    rms,
    save,
    shipped,
    show,
    teacher_path,
)

# ---- a function a chapter


def noise_and_schedule() -> dict:
    z0, (eps, _) = drawing(), noise([0], SHAPE)
    times = [0, 199, 399, 599, 799, 999]
    fig = figure("Noise takes over smoothly; even t = 999 keeps 7 % of the picture", 8.4, 4)
    grid = fig.add_gridspec(2, len(times), height_ratios=[1.15, 1])
    ax = fig.add_subplot(grid[0, :])
    ax.plot(SCHEDULE.alpha, color=BLUE)
    ax.plot(SCHEDULE.sigma, color=ORANGE)
    name_line(ax, 480, 0.55, "alpha: share of the picture", BLUE)
    name_line(ax, 130, 0.27, "sigma: share of the noise", ORANGE)
    ax.set(xlabel="t", xlim=(0, 999), ylim=(0, 1.03), xticks=times)
    for i, t in enumerate(times):
        z_t = add_noise(z0, eps, t, SCHEDULE)[0]
        mixed = f"{SCHEDULE.alpha[t]:.2f} z0 + {SCHEDULE.sigma[t]:.2f} eps"
        show(fig.add_subplot(grid[1, i]), z_t, mixed)
    save(fig, 1)
    return {"half": int((SCHEDULE.sigma > SCHEDULE.alpha).nonzero()[0])}


def guidance_and_ode() -> dict:
    unet, z_T = shipped()[0], noise([0], SHAPE)[0]
    paths = {}
    for w in (0.0, 3.0, 12.0):
        points, eps_fn = [], eps_of(unet, NAMES[:1], w)

        def record(z_t, t):
            points.append(z_t)
            return eps_fn(z_t, t)

        z0 = sample_ddim(record, z_T, SCHEDULE, trailing_grid(50))
        paths[w] = torch.cat([*points, z0])  # (51, 4, 16, 16)
    toward = paths[3.0][-1] - paths[0.0][-1]
    fig = figure("One noise, three strengths of guidance: three paths, three ends", 8.4, 3)
    grid = fig.add_gridspec(1, 4, width_ratios=[2.2, 1, 1, 1])
    ax = fig.add_subplot(grid[0])
    times = [*range(999, 0, -20), 0]
    for (w, path), color in zip(paths.items(), (GREY, BLUE, ORANGE)):
        along = ((path - paths[0.0]) * toward).sum(dim=(1, 2, 3)) / toward.square().sum()
        ax.plot(times, along, ".-", color=color, markersize=3, linewidth=1)
        at = (900, along[11] + 0.12) if w > 3 else (480, along[26] - 0.13 * (w == 3))
        name_line(ax, *at, f"w = {w:g}", color)
        show(fig.add_subplot(grid[1 + list(paths).index(w)]), path[-1], f"w = {w:g}")
    ax.set(xlabel="t", ylabel="away from the path with w = 0", xlim=(1010, -20))
    save(fig, 2)
    ends = {f"w{w:g}": rms(path[-1] - paths[0.0][-1]) for w, path in paths.items()}
    return ends | {"largest": paths[12.0][-1].abs().max().item()}


def blur() -> dict:
    unet, (z_T, _) = shipped()[0], noise(range(48), SHAPE)
    eps_fn = eps_of(unet, ["rocket"] * 48)
    answers = sample_ddim(eps_fn, z_T, SCHEDULE, trailing_grid(15))
    guesses = x0_from_eps(z_T, eps_fn(z_T, 999), 999, SCHEDULE)
    mean, mean_guess = answers.mean(dim=0), guesses.mean(dim=0)
    fig = figure(
        "One evaluation at t = 999 does not draw a rocket: it guesses their mean", 8.4, 3.5
    )
    axes = fig.subplots(2, 6)
    labels = "a rocket", "another", "another", "mean of 48\nrockets"
    labels += "x0 by one\nevaluation", "mean of 48\nsuch x0"
    for ax, z0, label in zip(axes[0], [*answers[:3], mean, guesses[0], mean_guess], labels):
        show(ax, z0, label)
    eps = noise([1], SHAPE)[0]
    for ax, t in zip(axes[1], [999, 799, 599, 399, 199, 19]):
        z_t = add_noise(drawing(), eps, t, SCHEDULE)
        x0 = x0_from_eps(z_t, eps_of(unet, ["rocket"])(z_t, t), t, SCHEDULE)
        show(ax, x0[0], f"x0 at t = {t}")
    save(fig, 3)
    sharp = []  # of four jumps without and with the LCM-LoRA
    for net in (unet, adapted()):
        z0 = generate(eps_of(net, ["rocket"] * 8), range(8), SHAPE)
        sharp.append(sharpness(shipped()[1].decode(z0)).mean().item())
    return {
        "guess_to_mean": rms(guesses - mean),
        "mean_guess_to_mean": rms(mean_guess - mean),
        "answer_to_mean": rms(answers - mean),
        "answer_to_answer": rms(answers[1:] - answers[:-1]),
        "sharpness": sharp[0] / sharp[1],
    }


def one_jump() -> dict:
    path, (base, _, text, _) = teacher_path(), shipped()
    cond, null_cond = text.encode(NAMES), text.null_cond(len(NAMES))

    def guided(z_t: Tensor, t: Tensor | int, cond: Cond, w: Tensor | float) -> Tensor:
        return guided_eps(base, cond, null_cond, W)(z_t, t)

    networks = {"base": network(base), f"base, w = {W:g}": guided, "LCM-LoRA": network(adapted())}
    fig = figure("Where the points of one path jump to: from t = 999 none reaches its end", 8.4, 6)
    grid = fig.add_gridspec(4, 6, height_ratios=[1, 1, 1, 1.1])
    ax = fig.add_subplot(grid[3, :])
    found = {}
    for row, (which, net) in enumerate(networks.items()):
        for i, n in enumerate((49, 39, 29, 19, 9, 0)):
            t, z_t = int(train_grid()[n]), path[49 - n]
            jump = f_theta(z_t, net(z_t, t, cond, W), t, SCHEDULE)[0]
            top = "" if row else f"f from t = {t}"
            show(fig.add_subplot(grid[row, i]), jump, top, which * (i == 0))
        end = consistency_along_trajectory(net, path, cond, SCHEDULE, W)[1]
        color = (GREY, BLUE, ORANGE)[row]
        ax.plot([20 * n + 19 for n in end], list(end.values()), "o-", color=color, markersize=3)
        name_line(ax, 880, end[44] + (0.05, 0.05, -0.25)[row], which, color)
        found[which.replace(f", w = {W:g}", ", guided")] = end[49]
    ax.set(xlim=(1010, 0), ylim=(0, None), xlabel="t", ylabel="distance of f\nfrom the end")
    save(fig, 4)
    z0 = path[-1]
    return found | {"other": rms(z0 - drawn_again()), "teacher": rms(z0)}


def drawn_again() -> Tensor:
    """The teacher's answers for NAMES from six other seeds."""
    eps_fn = eps_of(shipped()[0], NAMES, W)
    return generate(eps_fn, range(100, 106), SHAPE, "ddim", 15, schedule=SCHEDULE)


def algorithm_1() -> dict:
    unet, student, text = shipped()[0], adapted(), shipped()[2]
    z0, eps, t = drawing(), noise([2], SHAPE)[0], 699
    cond, null_cond = text.encode(["rocket"]), text.null_cond(1)
    z_start = add_noise(z0, eps, t, SCHEDULE)
    f_start = f_theta(z_start, student(z_start, t, cond), t, SCHEDULE)
    z_end, t_end = z_start, t
    for i in range(1, PSI_STEPS + 1):
        eps_w = guided_eps(unet, cond, null_cond, W)(z_end, t_end)
        x0, t_end = x0_from_eps(z_end, eps_w, t_end, SCHEDULE), t - i * K // PSI_STEPS
        z_end = ddim_step(x0, eps_w, t_end, SCHEDULE)
    f_end = f_theta(z_end, student(z_end, t_end, cond), t_end, SCHEDULE)
    fig = figure(
        "Two neighbours should jump to one picture; the loss hardly tells how well they do",
        8.4,
        4.2,
    )
    grid = fig.add_gridspec(2, 5, height_ratios=[1, 1.2])
    row = [z0, z_start, z_end, f_start, f_end]
    labels = (
        "z0, from the data",
        f"z_start, t = {t}",
        f"z_end, t = {t_end}",
        "f(z_start)",
        "f(z_end)",
    )
    for i, (z, label) in enumerate(zip(row, labels)):
        show(fig.add_subplot(grid[0, i]), z[0], label)
    ax = fig.add_subplot(grid[1, :])
    batch = torch.cat([drawing(name) for name in NAMES])
    conds, found = (text.encode(NAMES), text.null_cond(len(NAMES))), {}
    for which, net, color in (
        ("before training", unet, GREY),
        ("the shipped LoRA", student, ORANGE),
    ):
        nets = network(net), network(unet), network(net)
        loss = loss_by_index(*nets, batch, *conds, SCHEDULE, W, K, PSI_STEPS)
        ax.plot([20 * n + 19 for n in loss], list(loss.values()), "o-", color=color, markersize=3)
        n = 44 if net is unet else 33
        name_line(ax, 20 * n + 19, loss[n], which, color)
        found[which.split()[-1]] = sum(loss.values()) / len(loss)
    ax.set(xlabel="t_start", ylabel=f"loss, k = {K}", xlim=(1010, 0), ylim=(0, None))
    save(fig, 5)
    return found


def low_rank() -> dict:
    tau = lcm_lora()
    most = max(len(down) for _, down, _ in tau.values())
    kept = []  # share of ||dW||^2 that the first r directions hold, by module
    for up, down, lora_alpha in tau.values():
        s = factorise(up, down, lora_alpha)[1].square()
        kept.append(torch.nn.functional.pad(s.cumsum(0) / s.sum(), (0, most - len(s)), value=1.0))
    middle = torch.stack(kept).median(dim=0).values
    fig = figure(
        "A few directions hold most of what distillation changed (pizza in 4 steps)", 8.4, 2.9
    )
    grid = fig.add_gridspec(1, 5, width_ratios=[2, 1, 1, 1, 1])
    ax = fig.add_subplot(grid[0])
    for line in kept:
        ax.plot(range(1, most + 1), line, color="0.85", linewidth=0.5)
    ax.plot(range(1, most + 1), middle, color=BLUE)
    name_line(ax, 12, middle[11] - 0.22, f"median of {len(tau)} layers", BLUE)
    ax.set(xlabel="rank kept", ylabel="share of ||dW||^2", xlim=(1, most), ylim=(0, 1.02))
    for i, rank in enumerate((0, 1, 4, most)):
        unet = load_model(WEIGHTS[0])[0]
        merge_into(unet, reduce_rank(tau, rank)[0] if rank else {})
        z0 = generate(eps_of(unet, NAMES[4:5]), [4], SHAPE)
        show(fig.add_subplot(grid[1 + i]), z0[0], f"rank {rank}" if rank else "no LoRA")
    save(fig, 6)
    trained = sum(up.numel() + down.numel() for up, down, _ in tau.values())
    total = sum(x.numel() for x in shipped()[0].parameters())
    return {f"rank{r}": middle[r - 1].item() for r in (1, 4, 8)} | {
        "trained": trained,
        "unet": total,
    }


def three_roles() -> dict:
    scales = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
    fig = figure("One UNet: at scale 0 the base, at scale 1 the student", 8.4, 3.3)
    axes = fig.subplots(2, len(scales))
    for i, scale in enumerate(scales):
        unet = adapted(lambdas=(scale,))
        for row, steps in enumerate((1, 4)):
            z0 = generate(eps_of(unet, NAMES[1:2]), [1], SHAPE, steps=steps)
            side = f"{steps} step{'s' * (steps > 1)}" if i == 0 else ""
            show(axes[row, i], z0[0], "" if row else f"scale {scale:g}", side)
    save(fig, 7)
    return {}


def adding() -> dict:
    style, tau, overlap = read_tau(WEIGHTS[2]), lcm_lora(), [0.0, 0.0, 0.0]
    for path in style:  # <dW1, dW2>, ||dW1||^2, ||dW2||^2, summed over all layers
        (B1, A1, a1), (B2, A2, a2) = style[path], tau[path]
        d1, d2 = (
            a / len(A) * B.flatten(1) @ A.flatten(1) for B, A, a in ((B1, A1, a1), (B2, A2, a2))
        )
        for i, (x, y) in enumerate(((d1, d2), (d1, d1), (d2, d2))):
            overlap[i] += (x * y).sum().item()
    across, down = (0.0, 0.5, 0.8, 1.2, 2.5), (0.0, 0.5, 1.0, 2.0)
    fig = figure("cat face, blueprint style: one LoRA brings style, one firm lines", 6.6, 5.7)
    axes = fig.subplots(len(down), len(across))
    for i, lambda2 in enumerate(down):
        for j, lambda1 in enumerate(across):
            unet = adapted(("blueprint", "lcm"), (lambda1, lambda2))
            z0 = generate(eps_of(unet, ["cat face, blueprint style"]), [7], SHAPE)
            side = f"lambda2 = {lambda2:g}" if j == 0 else ""
            show(axes[i, j], z0[0], "" if i else f"lambda1 = {lambda1:g}", side)
            adapted.cache_clear()
    save(fig, 8)
    return {
        "cosine": overlap[0] / (overlap[1] * overlap[2]) ** 0.5,
        "style_norm": overlap[1] ** 0.5,
        "lcm_norm": overlap[2] ** 0.5,
    }


def few_steps() -> dict:
    names, counts = 4 * NAMES, (1, 2, 4, 8)
    seeds, eps_fn = range(len(names)), eps_of(adapted(), names)
    end = generate(eps_of(shipped()[0], names, W), seeds, SHAPE, "ddim", 50)
    fig = figure("More steps with fresh noise (gamma 1) lead away from the teacher's end", 8.4, 5)
    grid = fig.add_gridspec(3, 5, width_ratios=[1.9, 1, 1, 1, 1])
    ax, found = fig.add_subplot(grid[:, 0]), {}
    for row, (gamma, color) in enumerate(((0.0, BLUE), (0.3, GREEN), (1.0, ORANGE))):
        distances = []
        for i, steps in enumerate(counts):
            z0 = generate(eps_fn, seeds, SHAPE, steps=steps, gamma=gamma)
            label = "" if row else f"{steps} step{'s' * (steps > 1)}"
            show(fig.add_subplot(grid[row, 1 + i]), z0[3], label, f"gamma {gamma:g}" * (i == 0))
            distances.append(rms(z0 - end))
        ax.plot(counts, distances, "o-", color=color, markersize=3)
        name_line(ax, 5, distances[3] + (-0.025, -0.1, 0.03)[row], f"gamma {gamma:g}", color)
        found[f"g{gamma:g}"] = distances
    ax.set(xlabel="steps", ylabel="distance from the end of the teacher's 50 steps", xticks=counts)
    ax.set_ylim(0.4, 0.75)
    save(fig, 9)
    return found


def full_size() -> dict:
    """GB of weights, gradients and Adam's moments, without activations: 2 bytes a frozen number;
    4 a trained one, and 12 more for its gradient and moments. A full LCM also keeps its target in
    float32 and its teacher.
    """
    families = {
        "emoji": (emoji(), 32),
        "SD-V1.5": (sd15_config().unet, 64),
        "SDXL": (sdxl_config().unet, 64),
    }
    found = {}
    for name, (config, rank) in families.items():
        with torch.device("meta"):
            unet = UNet(config)
        base = sum(x.numel() for x in unet.parameters())
        shapes = [unet.get_submodule(path).weight.shape for path in target_paths(unet)]
        lora = sum(rank * (s[0] + s[1:].numel()) for s in shapes)
        found[name] = {
            "unet": base,
            "lora": lora,
            "lora_gb": (2 * base + 16 * lora) / 1e9,
            "full_gb": (16 + 4 + 2) * base / 1e9,
        }
    fig = figure("A LoRA is trained with one UNet in memory, a full LCM with three", 8.4, 2.6)
    ax = fig.subplots()
    for i, (name, row) in enumerate(found.items()):
        for j, (way, color) in enumerate((("full", GREY), ("lora", ORANGE))):
            gb, what = row[f"{way}_gb"], "full LCM" if way == "full" else "LCM-LoRA"
            ax.barh(-i - 0.38 * j, gb, 0.34, color=color)
            size = f"{gb:.1f}" if gb > 1 else f"{gb:.2f}"
            ax.text(gb * 1.06, -i - 0.38 * j, f"{what}: {size} GB", va="center", fontsize=9)
    ax.set(xscale="log", xlim=(0.01, 400), xlabel="GB of weights, gradients and moments")
    ax.set_yticks([-i - 0.19 for i in range(len(found))], list(found))
    save(fig, 10)
    return found


CHAPTERS = [noise_and_schedule, guidance_and_ode, blur, one_jump, algorithm_1]
CHAPTERS += [low_rank, three_roles, adding, few_steps, full_size]
