"""The figure of the idea: a teacher's path, a consistency model's jump, two LoRAs that are added.

    python -m tour.idea             writes paper/figures/idea.svg

The paths are computed, not sketched: DDIM in 50 steps by the exact eps of data that is three narrow
Gaussians in one dimension.
"""

from pathlib import Path

import torch
from torch import Tensor

from minilcm.lcm import train_grid
from minilcm.schedule import Schedule, T, make_schedule, x0_from_eps
from minilcm.solver import ddim_step

OUT = Path(__file__).parent.parent / "paper/figures/idea.svg"
MEANS, STD = torch.tensor([-2.1, 0.2, 2.2]), 0.07
NOISES = [-1.8, -1.35, -1.0, -0.65, -0.2, 0.15, 0.62, 0.95, 1.35, 1.8]  # z_T of each path
SHOWN, PAIR = 6, 17  # the path that is explained, and the step at which its training pair begins
GREY, INK, TEACHER, STUDENT, STYLE = "#b9bfc7", "#30363d", "#2563ab", "#d1540f", "#1e8449"


def exact_eps(z: Tensor, t: int, schedule: Schedule) -> Tensor:
    """E[eps | z_t = z] (b,), what a network would learn from this data."""
    alpha, sigma = schedule.at(t, z)
    variance = alpha**2 * STD**2 + sigma**2
    offset = z[:, None] - alpha * MEANS  # (b, 3)
    weight = torch.softmax(-(offset**2) / (2 * variance), dim=1)
    # eps = -sigma d/dz log p_t(z)
    return sigma * (weight * offset).sum(dim=1) / variance


def teacher_paths(z_T: Tensor) -> tuple[list[int], Tensor]:
    """Timesteps 999, 979, ..., 19, 0, and z at them (51, b), from z_T (b,)."""
    schedule, times = make_schedule(), [*train_grid().flip(0).tolist(), 0]
    z = [z_T]
    for t, t_next in zip(times, times[1:]):
        eps = exact_eps(z[-1], t, schedule)
        z.append(ddim_step(x0_from_eps(z[-1], eps, t, schedule), eps, t_next, schedule))
    return times, torch.stack(z)


# ---- pieces of SVG

Point = tuple[float, float]


def line(points: list[Point], color: str, width: float, extra: str = "") -> str:
    at = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{at}" fill="none" stroke="{color}" stroke-width="{width}" {extra}/>'


def dot(point: Point, color: str, radius: float) -> str:
    return f'<circle cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="{radius}" fill="{color}"/>'


def arrow(a: Point, b: Point, color: str, bend: float = 0.0, extra: str = "") -> str:
    """From a to b; its middle is lifted by `bend` pixels."""
    x, y = (a[0] + b[0]) / 2, (a[1] + b[1]) / 2 - 2 * bend
    path = f"M{a[0]:.1f},{a[1]:.1f} Q{x:.1f},{y:.1f} {b[0]:.1f},{b[1]:.1f}"
    tip = f'marker-end="url(#tip{color[1:]})"'
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="3" {tip} {extra}/>'


def text(x: float, y: float, words: str, color: str = INK, anchor: str = "start") -> str:
    """Lines of text, the first with its baseline at y."""
    first, *rest = words.split("\n")
    rows = f'<tspan x="{x:.1f}">{first}</tspan>'
    rows += "".join(f'<tspan x="{x:.1f}" dy="19">{row}</tspan>' for row in rest)
    halo = 'stroke="white" stroke-width="4" paint-order="stroke"'  # legible over lines
    return f'<text y="{y:.1f}" fill="{color}" text-anchor="{anchor}" {halo}>{rows}</text>'


def tau(below: str) -> str:
    return f'<tspan font-style="italic">τ</tspan><tspan font-size="11" dy="4"> {below}</tspan>'


# ---- the two panels


def paths_panel() -> list[str]:
    """z over t: all paths in grey, one of them with its 50 steps, and the jump over it."""
    times, z = teacher_paths(torch.tensor(NOISES))
    left, right, middle, scale = 30.0, 480.0, 214.0, 58.0
    across = [right - t / (T - 1) * (right - left) for t in times]
    paths = [[(x, middle - scale * v) for x, v in zip(across, path)] for path in z.T.tolist()]
    path = paths[SHOWN]
    start, end = path[0], path[-1]
    out = [line(other, GREY, 1.5) for i, other in enumerate(paths) if i != SHOWN]
    out += [line(path, TEACHER, 2), *(dot(point, TEACHER, 2.8) for point in path)]
    for point in (path[PAIR], path[PAIR + 5]):  # two neighbours on the path, k = 100 apart
        to = end[0] - 4, end[1] + 9
        out += [dot(point, STUDENT, 5), arrow(point, to, STUDENT, -30, 'stroke-dasharray="3 5"')]
    out += [arrow(start, (end[0] - 8, end[1] - 5), STUDENT, 66)]
    out += [dot(start, INK, 5), dot(end, INK, 5)]
    out += [
        text(left, 26, "the teacher: 50 small steps", TEACHER),
        text(left, 47, "LCM: one jump, f(z, t)", STUDENT),
        text(right - 4, 246, "trained: two neighbours must\njump to the same end", STUDENT, "end"),
        text(left, 386, "noise, t = 999"),
        text(right, 386, "picture, t = 0", anchor="end"),
    ]
    return out


def weights_panel() -> list[str]:
    """The weights as a plane: W, two deltas, and their sum."""
    w, style, lcm = (610.0, 318.0), (30.0, -258.0), (190.0, -12.0)  # style at lambda1 = 1

    def plus(a: Point, b: Point, lam: float = 1.0) -> Point:
        return a[0] + lam * b[0], a[1] + lam * b[1]

    styled, fast = plus(w, style, 0.8), plus(w, lcm)
    both = plus(styled, lcm)
    out = [line([styled, both, fast], GREY, 1.5, 'stroke-dasharray="5 5"')]
    out += [arrow(w, styled, STYLE), arrow(w, fast, STUDENT), arrow(w, both, INK), dot(w, INK, 5)]
    out += [
        text(w[0] - 14, w[1] + 24, "weights W:\nmany steps"),
        text(styled[0] - 8, styled[1] - 35, "many steps,\nin the style"),
        text(both[0] - 16, both[1] - 35, "4 steps,\nin the style"),
        text(fast[0] + 10, fast[1] + 5, "4 steps"),
        text(w[0] + 6, w[1] - 110, "0.8 " + tau("style"), STYLE, "end"),
        text(w[0] + 126, w[1] + 24, "1.0 " + tau("lcm"), STUDENT, "middle"),
        text(w[0] + 124, w[1] - 96, tau("mix")),
    ]
    return out


def main() -> None:
    tips = "".join(
        f'<marker id="tip{color[1:]}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="5" '
        f'markerHeight="5" orient="auto"><path d="M0,0 L10,5 L0,10 z" fill="{color}"/></marker>'
        for color in (STUDENT, STYLE, INK)
    )
    font = 'font-family="Helvetica, Arial, sans-serif" font-size="15"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 400" {font}>'
    title = "<title>a teacher's path, a consistency model's jump, and two LoRAs added</title>"
    ground = '<rect width="900" height="400" rx="8" fill="white"/>'
    panels = [*paths_panel(), *weights_panel()]
    OUT.write_text("\n".join([head, title, f"<defs>{tips}</defs>", ground, *panels, "</svg>\n"]))
    print(OUT)


if __name__ == "__main__":
    main()
