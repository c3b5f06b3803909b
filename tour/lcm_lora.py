"""LCM-LoRA (arXiv 2311.05556), the whole of it in one file: torch, Pillow, and points in a plane.

    python tour/lcm_lora.py        prints a table and draws tour/lcm_lora.png

Read it from top to bottom. A teacher learns to write the letters L, C and M out of noise, slowly.
A LoRA learns to do it in a few jumps. Another LoRA, which never sees the first, learns italics. At
the end the two are added, and italics come in a few jumps, though nothing was trained for that.
A "picture" is a point here, and the UNet a small MLP. A test holds its formulas to minilcm's.
"""

import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

WIDTH, LAYERS = 128, 4  # of the MLP
BATCH = 512
TEACHER_STEPS, LCM_STEPS, STYLE_STEPS = 4000, 4000, 600  # of training
RANK = 32  # of each LoRA
K = 60  # timesteps that a step of the teacher skips; the paper's 20 takes longer to train
W = 0.3  # guidance that is distilled; much more would pull points off their letters
POINTS = 2000  # of each letter, to measure with
torch.manual_seed(0)
torch.set_num_threads(1)  # such small matrices gain nothing from a second core

# ---- 1. Data: each class is a letter, each example a point of its strokes ------------------------
# A diffusion model knows a distribution only from its examples. Ours is the ink of three letters.

HEIGHT, BRUSH, SLANT, NULL = 4.0, 0.1, 0.5, 3  # NULL is the class "none": an empty prompt
LETTERS = [
    torch.tensor([(-5.6, 2.0), (-5.6, -2.0), (-3.4, -2.0)]),
    torch.tensor([(1.6 * math.cos(i / 5) - 0.4, 2 * math.sin(i / 5)) for i in range(5, 28)]),
    torch.tensor([(2.0, -2.0), (2.4, 2.0), (4.0, -1.0), (5.6, 2.0), (6.0, -2.0)]),
]


def draw_data(c, slant=0.0):
    """Points z0 (b, 2) on the letters c (b,). slant > 0 makes them italic."""
    z0 = torch.empty(len(c), 2)
    for letter, corners in enumerate(LETTERS):
        start, stroke = corners[:-1], corners[1:] - corners[:-1]
        n = int((c == letter).sum())
        i = torch.multinomial(stroke.norm(dim=1), n, replacement=True)  # long strokes, more ink
        z0[c == letter] = start[i] + torch.rand(n, 1) * stroke[i]
    z0 += BRUSH * torch.randn_like(z0)
    return torch.stack([z0[:, 0] + slant * z0[:, 1], z0[:, 1]], dim=1)


# ---- 2. Noise: z_t = alpha z0 + sigma eps --------------------------------------------------------
# Stable Diffusion's schedule. At t = 999 hardly any data is left; t = 0 is almost clean.

T = 1000
alpha_bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, T) ** 2, dim=0)
alpha, sigma = alpha_bar.sqrt()[:, None], (1 - alpha_bar).sqrt()[:, None]  # (T, 1)


def add_noise(z0, eps, t):
    return alpha[t] * z0 + sigma[t] * eps  # DDPM (2006.11239) eq. 4


# ---- 3. The network: eps_hat, its guess of the noise in z_t --------------------------------------
# One MLP for all classes and all noise levels. `tau` changes the weights of the hidden layers. This
# is all that a LoRA does: W x becomes (W + tau) x. No change is tau = 0.

Z_WAVES = 0.4 * 12 ** (torch.arange(8) / 7)  # frequencies: sines let an MLP draw sharp strokes
T_WAVES = 100 ** (torch.arange(16) / 15)
first, last = nn.Linear(2 + 2 * (2 * 8 + 16) + 4, WIDTH), nn.Linear(WIDTH, 2)
hidden = [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
network = nn.ModuleList([first, *hidden, last])
NO_LORA = [0.0] * LAYERS


def eps_net(z_t, t, c, tau=NO_LORA):
    """(b, 2): the noise in z_t (b, 2) at timesteps t, an int or (b,), for classes c (b,)."""
    t = torch.as_tensor(t).expand(len(z_t))[:, None] / T
    waves = torch.cat([(z_t[:, :, None] * Z_WAVES).flatten(1), t * T_WAVES], dim=1)  # (b, 32)
    h = first(torch.cat([z_t, waves.sin(), waves.cos(), torch.eye(4)[c]], dim=1))
    for layer, change in zip(hidden, tau):
        h = h + nn.functional.silu(h) @ (layer.weight + change).T + layer.bias  # (b, WIDTH)
    return last(nn.functional.silu(h))


def diffusion_loss(slant, tau):
    z0, eps, t = draw_data(letters, slant), torch.randn(BATCH, 2), torch.randint(T, (BATCH,))
    c = torch.where(torch.rand(BATCH) < 0.1, NULL, letters)  # guidance will need "no letter", too
    # L = E ||eps_hat - eps||^2, DDPM eq. 14
    return (eps_net(add_noise(z0, eps, t), t, c, tau) - eps).square().mean()


def train(parameters, loss_fn, steps):
    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.99))
    for step in range(steps):
        rate = 2e-3 * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = rate  # warm-up, then a cosine
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()


letters = torch.arange(BATCH) % 3
train(network.parameters(), lambda: diffusion_loss(0.0, NO_LORA), TEACHER_STEPS)
network.requires_grad_(False)  # from here on it never changes

# ---- 4. The teacher draws: DDIM, many small steps ------------------------------------------------
# The network says in which direction the noise lies. Follow it a little, ask again: this solves an
# ODE whose path leads from noise to data. One large step instead leads to the mean of all points
# that could have become this noise: a blur.


def guided_eps(z_t, t, c, w, tau=NO_LORA):
    """Away from what it would draw without a prompt. Costs a second evaluation."""
    eps_cond = eps_net(z_t, t, c, tau)
    if w == 0:
        return eps_cond
    # eps_cond + w (eps_cond - eps_null), 2310.04378 section 4.2; others call 1 + w the scale
    return eps_cond + w * (eps_cond - eps_net(z_t, t, torch.full_like(c, NULL), tau))


def ddim_step(z_start, eps_hat, t_start, t_end):
    x0 = (z_start - sigma[t_start] * eps_hat) / alpha[t_start]
    # Psi: z_end = alpha' x0 + sigma' eps_hat, DDIM (2010.02502) eq. 12
    return alpha[t_end] * x0 + sigma[t_end] * eps_hat


def ddim_grid(steps):
    return [T * i // steps - 1 for i in range(steps, 0, -1)] + [0]  # 4 steps: 999 749 499 249 0


@torch.no_grad()
def sample_ddim(z_T, c, steps, w=0.0, tau=NO_LORA):
    """The points passed on the way, from z_T (b, 2) to the sample: a list of steps + 1."""
    path, grid = [z_T], ddim_grid(steps)
    for t_start, t_end in zip(grid, grid[1:]):
        eps_hat = guided_eps(path[-1], t_start, c, w, tau)
        path.append(ddim_step(path[-1], eps_hat, t_start, t_end))
    return path


# ---- 5. LCM-LoRA: learn to jump ------------------------------------------------------------------
# A consistency function f maps every point of a path to the path's end. At t = 0 that is the point
# itself, and any two neighbours on a path must have the same f. These two facts are the whole
# training: the truth enters at t = 0 and is handed up the path, from neighbour to neighbour.

GRID = torch.arange(1, 51) * 20 - 1  # t = 19, 39, ..., 999


def f(z_t, t, c, tau):
    s = 10.0 * torch.as_tensor(t)[..., None]
    c_skip, c_out = 0.25 / (s**2 + 0.25), s / (s**2 + 0.25).sqrt()  # (1, 0) at t = 0
    x0 = (z_t - sigma[t] * eps_net(z_t, t, c, tau)) / alpha[t]
    # f = c_skip z_t + c_out x0, 2310.04378 eq. 9: the identity at t = 0, whatever the network says
    return c_skip * z_t + c_out * x0


def lcd_loss(tau):
    """Algorithm 1 of 2310.04378. The three networks of the paper are one here: the student has the
    LoRA, the teacher has not, and the target is the student without a gradient."""
    z0, c, eps = draw_data(letters), letters, torch.randn(BATCH, 2)
    t_start = GRID[torch.randint(50, (BATCH,))]
    t_end = (t_start - K).clamp(min=0)
    z_start = add_noise(z0, eps, t_start)
    f_start = f(z_start, t_start, c, tau)
    with torch.no_grad():
        # the neighbour on the teacher's path: one guided DDIM step that skips K timesteps
        z_end = ddim_step(z_start, guided_eps(z_start, t_start, c, W), t_start, t_end)
        f_end = f(z_end, t_end, c, tau)
    # pseudo-Huber: sqrt(d^2 + c^2) - c
    return ((f_start - f_end).square() + 1e-3**2).sqrt().sub(1e-3).mean()


def new_lora(rank):
    """LoRA (2106.09685): a change of low rank, tau = B A. [(B, A)] for each hidden layer, B (WIDTH,
    rank), A (rank, WIDTH). A is random and B is 0: training starts from the teacher itself."""
    down = [nn.Linear(WIDTH, rank, bias=False).weight for _ in hidden]
    return [(torch.zeros(WIDTH, rank, requires_grad=True), A) for A in down]


def tau_of(lora):
    return [B @ A for B, A in lora]


lcm_lora = new_lora(RANK)
train(sum(lcm_lora, ()), lambda: lcd_loss(tau_of(lcm_lora)), LCM_STEPS)  # sum: (B, A, B, A, ...)


@torch.no_grad()
def sample_lcm(z_T, c, steps, tau):
    """Jump; noise it again, less each time; jump again: 2310.04378 Algorithm 3."""
    path = [z_T]
    for i in range(steps):
        t = GRID.flip(0)[i * 50 // steps]  # four steps: 999 759 499 259
        if i > 0:
            path.append(add_noise(path[-1], torch.randn(z_T.shape), t))
        path.append(f(path[-1], t, c, tau))
    return path


# ---- 6. Style, and the sum -----------------------------------------------------------------------
# A style LoRA is trained as usual: the diffusion loss on italic letters, from the same teacher, no
# word of consistency. Both LoRA change the same weights, so their changes can be added, which is
# eq. 3 of 2311.05556. Nothing is trained after that.

style_lora = new_lora(RANK)
train(sum(style_lora, ()), lambda: diffusion_loss(SLANT, tau_of(style_lora)), STYLE_STEPS)
tau_lcm, tau_style = tau_of(lcm_lora), tau_of(style_lora)
lambda1, lambda2 = 0.8, 1.0  # as in the paper's figure 3
# tau_mix = lambda1 tau_style + lambda2 tau_lcm
tau_mix = [lambda1 * s + lambda2 * j for s, j in zip(tau_style, tau_lcm)]

# ---- 7. Did it work? -----------------------------------------------------------------------------
# The loss says little; look at the points. How far must they be moved, on average, to lie as the
# data does? (The sliced Wasserstein distance: seen from one side, sorting both tells.)

asked = torch.arange(3 * POINTS) % 3
data = {slant: draw_data(asked, slant) for slant in (0.0, SLANT)}
side = torch.arange(32) / 32 * math.pi
SIDES = torch.stack([side.cos(), side.sin()])  # (2, 32)


def miss(z, slant=0.0):
    """Distance of samples z of the letters `asked` from the data, in % of a letter's height."""
    # (POINTS, 3, 32): the points of each letter as seen from each side, sorted
    a, b = ((points.view(-1, 3, 2) @ SIDES).sort(dim=0)[0] for points in (z, data[slant]))
    return 100 / HEIGHT * (a - b).abs().mean().item()


def row(name, sampler, evaluations, slant=0.0):
    paths = {n: sampler(n) for n in evaluations}
    cells = [f"{miss(paths[n][-1], slant):6.1f}" if n in paths else 6 * " " for n in COLUMNS]
    print(f"{name:<34}" + "".join(cells))
    return paths


z_T = torch.randn(3 * POINTS, 2)
COLUMNS, FEW, EVEN = (1, 2, 4, 8, 100), (1, 2, 4, 8), (2, 4, 8, 100)
floor = miss(draw_data(asked))
print(f"distance from the data, % of a letter's height; between two draws of the data: {floor:.1f}")
print(f"{'evaluations of the network':<34}" + "".join(f"{n:6}" for n in COLUMNS))
ddim = row("DDIM", lambda n: sample_ddim(z_T, asked, n), FEW)
guided = row("guided DDIM, the teacher", lambda n: sample_ddim(z_T, asked, n // 2, W), EVEN)
lcm = row("LCM-LoRA", lambda n: sample_lcm(z_T, asked, n, tau_lcm), FEW)
print("distance from italic data")
row("LCM-LoRA", lambda n: lcm[n], FEW, SLANT)
row("style, DDIM", lambda n: sample_ddim(z_T, asked, n, 0, tau_style), FEW, SLANT)
style = row("style, guided", lambda n: sample_ddim(z_T, asked, n // 2, W, tau_style), EVEN, SLANT)
mix = row("both, added", lambda n: sample_lcm(z_T, asked, n, tau_mix), FEW, SLANT)

# ---- 8. The figure -------------------------------------------------------------------------------

SIZE, SCALE, UNIT, LIFT = (1800, 1190), 2, 38, 285  # drawn SCALE times as large: smooth edges
INK, GREY = (40, 44, 52), (110, 116, 124)
COLORS = [(0, 114, 178), (213, 94, 0), (0, 158, 115)]  # told apart by colour-blind readers, too
image = Image.new("RGB", (SIZE[0] * SCALE, SIZE[1] * SCALE), "white")
pen = ImageDraw.Draw(image, "RGBA")


def write(x, y, words, size, color=INK, anchor="ma"):
    pen.text((x * SCALE, y * SCALE), words, color, ImageFont.load_default(size * SCALE), anchor)


def place(x, y, z, t):
    """Points z (b, 2) at timestep t as pixels: data about (x, y), and noise above it."""
    return [(SCALE * (x + UNIT * a), SCALE * (y - UNIT * b - LIFT * t / T)) for a, b in z.tolist()]


def dots(x, y, z, t, radius, opacity, ring=None):
    for i, (a, b) in enumerate(place(x, y, z, t)):
        box = (a - radius * SCALE, b - radius * SCALE, a + radius * SCALE, b + radius * SCALE)
        pen.ellipse(box, (*COLORS[i % 3], opacity), ring, 3)


def panel(x, y, title, note, path, slant=0.0, times=None):
    """The samples; given the path's timesteps, also how thirty points come there from noise."""
    top = y - 175 - (LIFT + 35 if times else 0)
    write(x, top, title, 30)
    write(x, top + 38, f"{note} {miss(path[-1], slant):.1f} %", 22, GREY)
    dots(x, y, path[-1][:3000], 0, 1.5, 110)
    if times:
        dots(x, y, path[0][:1500], T, 1.5, 50)
        for i, way in enumerate(zip(*(place(x, y, z[:30], t) for z, t in zip(path, times)))):
            pen.line(way, (*COLORS[i % 3], 200), 2 * SCALE, "curve")
        dots(x, y, path[0][:30], T, 4, 255)
        dots(x, y, path[-1][:30], 0, 6, 255, "white")
        dots(x, y, guided[100][-1][:30], 0, 9, 0, GREY)


write(60, 34, "LCM-LoRA jumps where its teacher walks, and adds to a style", 50, INK, "la")
write(60, 102, "Noise above, data below. Rings: where the teacher's paths end.", 22, GREY, "la")
write(60, 134, f"Off by: % of a letter's height; data drawn again: {floor:.1f}", 22, GREY, "la")
panel(310, 690, "Teacher: 100 evaluations", "off by", guided[100], times=ddim_grid(50))
panel(900, 690, "DDIM: 1 evaluation", "lands on the mean, off by", ddim[1], times=ddim_grid(1))
panel(1490, 690, "LCM-LoRA: 1 evaluation", "jumps, off by", lcm[1], times=ddim_grid(1))
panel(310, 1060, "Style LoRA: 100 evaluations", "off by", style[100], SLANT)
panel(900, 1060, "LCM-LoRA: 4 evaluations", "off by", lcm[4])
panel(1490, 1060, "Their sum: 4 evaluations", "nothing trained, off by", mix[4], SLANT)
write(605, 1025, "+", 60)
write(1195, 1025, "=", 60)
image.resize(SIZE, Image.LANCZOS).quantize(255).save(Path(__file__).with_suffix(".png"))
