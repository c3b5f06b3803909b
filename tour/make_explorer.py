"""Draw all that explorer.html shows, from the shipped weights: sheets of pictures and data.js.

    python -m tour.make_explorer         some four minutes on two cores, into tour/explorer/

A sheet KIND_PROMPT.webp has a row for each seed and a column for each choice of its panel, in the
order in which `main` draws them. The UNet computes in the same number format as sample.py's; a
second run on the same machine writes the same bytes.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minilcm.data.pictures import to_images
from minilcm.files.checkpoint import Model, load_model
from minilcm.files.lora_file import read_tau
from minilcm.generate import generate, timesteps
from minilcm.lcm import f_theta
from minilcm.lora import Tau
from minilcm.merge import combine, merge_into
from minilcm.model.precision import default_dtype
from minilcm.model.unet import Cond
from minilcm.schedule import make_schedule
from minilcm.solver import EpsFn, guided_eps

HERE = Path(__file__).parent
WEIGHTS = HERE.parent / "weights/emoji"
PROMPTS = {  # name: background; a style's word goes between them
    "cat face": "",
    "rocket": ", on a blue background",
    "pizza": "",
    "penguin": ", on a pink background",
    "castle": ", on a green background",
    "mushroom": "",
}
SEEDS = [0, 1, 2, 3]
STEPS = 4  # of the first panel
EVALUATIONS = (2, 4, 8, 16)  # of the network: steps of LCM, twice the guided steps of the others
SOLVERS = ("ddim", "dpmpp")
GAMMAS, GAMMA_STEPS = (0.0, 0.3, 0.6, 1.0), (2, 4, 8)
LAMBDAS = (0.0, 0.5, 0.8, 1.0, 1.4)
STYLES = ("blueprint", "papercut")

Point = tuple[Tensor, Tensor]  # z_t and f(z_t, t), both (b, 4, h, w)
Way = tuple[list[Point], Tensor]  # every point of a sampler's path, and the z0 in which it ends


class Studio:
    """The model, its LoRA in the weights or not, and all prompts and seeds in one batch."""

    def __init__(self, model: Model):
        self.unet, self.vae, self.text, config = model
        self.base = {name: weight.clone() for name, weight in self.unet.named_parameters()}
        side = config.size // self.vae.factor
        self.shape, self.w = (4, side, side), config.guidance - 1
        self.seeds, self.schedule = SEEDS * len(PROMPTS), make_schedule()

    def set_lora(self, taus: list[Tau], lambdas: list[float]) -> None:
        """The weights are the base's plus sum_i lambda_i tau_i."""
        self.unet.load_state_dict(self.base)
        merge_into(self.unet, combine(taus, lambdas))

    def cond(self, style: str = "") -> Cond:
        """Of every prompt, a row for each seed."""
        prompts = [f"{name}{style}{background}" for name, background in PROMPTS.items()]
        return self.text.encode([prompt for prompt in prompts for _ in SEEDS])

    def eps_fn(self, cond: Cond, guided: bool = False) -> EpsFn:
        def unet(z_t: Tensor, t: int | Tensor, cond: Cond) -> Tensor:
            return self.unet(z_t, torch.as_tensor(t).expand(len(z_t)), cond)

        null_cond = self.text.null_cond(len(self.seeds)) if guided else None
        return guided_eps(unet, cond, null_cond, self.w if guided else 0)

    def path(self, eps_fn: EpsFn, sampler: str, steps: int) -> Way:
        points = []

        def record(z_t: Tensor, t: int) -> Tensor:
            output = eps_fn(z_t, t)
            points.append((z_t, f_theta(z_t, output, t, self.schedule)))
            return output

        return points, generate(record, self.seeds, self.shape, sampler, steps)

    def write_sheets(self, kind: str, columns: list[Tensor]) -> None:
        """KIND_PROMPT.webp from latents (prompts x seeds, 4, h, w), one for each column."""
        images = [to_images(self.vae.decode(z)) for z in tqdm(columns, desc=kind)]
        width, height = images[0][0].size
        for p in range(len(PROMPTS)):
            sheet = Image.new("RGB", (width * len(columns), height * len(SEEDS)))
            for column, drawn in enumerate(images):
                for row in range(len(SEEDS)):
                    picture = drawn[p * len(SEEDS) + row]
                    sheet.paste(picture, (column * width, row * height))
            sheet.save(HERE / f"explorer/{kind}_{p}.webp", quality=80, method=6)


def plane_of(trajectory: Tensor) -> tuple[Callable[[Tensor], list[float]], float]:
    """(z -> its two coordinates, the share of the variance in them): the two leading directions of
    a path (n, 4, h, w), about its mean; the path ends to the right of its start, and its middle is
    above both.
    """
    flat = trajectory.flatten(1).double()
    mean = flat.mean(dim=0)
    _, s, directions = torch.linalg.svd(flat - mean, full_matrices=False)
    x, y = directions[:2]
    x = x * (x @ (flat[-1] - flat[0])).sign()
    y = y * (y @ (2 * flat[len(flat) // 2] - flat[0] - flat[-1])).sign()

    def project(z: Tensor) -> list[float]:
        away = z.flatten().double() - mean
        return [round((away @ x).item(), 2), round((away @ y).item(), 2)]

    return project, (s[:2].square().sum() / s.square().sum()).item()


def in_plane(i: int, teacher: Tensor, paths: dict[tuple[str, int], Way]) -> dict:
    """Picture i's paths, the teacher's of (51, b, 4, h, w) and the samplers', in one plane."""
    project, share = plane_of(teacher[:, i])
    one = {"share": round(share, 3), "teacher": [project(z) for z in teacher[:, i]]}
    for (sampler, n), (points, z0) in paths.items():
        jumps = [project(z[i]) + (project(f[i]) if sampler == "lcm" else []) for z, f in points]
        one[f"{sampler}{n}"] = [*jumps, project(z0[i])]
    return one


def rms(z: Tensor) -> list[float]:
    """Of each row (b, 4, h, w)."""
    return [round(x, 3) for x in z.square().flatten(1).mean(dim=1).sqrt().tolist()]


@torch.no_grad()
def main() -> None:
    studio = Studio(load_model(WEIGHTS / "model.safetensors", default_dtype("cpu")))
    tau_lcm = read_tau(WEIGHTS / "lcm_lora.safetensors")
    cond = studio.cond()

    # ---- without the LoRA: the teacher's path, the solvers, and the LCM sampler
    guided = studio.eps_fn(cond, guided=True)
    points, end = studio.path(guided, "ddim", 50)
    teacher = torch.stack([z for z, _ in points] + [end])  # (51, b, 4, h, w)
    paths = {(s, n): studio.path(guided, s, n // 2) for n in EVALUATIONS for s in SOLVERS}
    off, _ = studio.path(studio.eps_fn(cond), "lcm", STEPS)

    # ---- with it
    studio.set_lora([tau_lcm], [1.0])
    for n in EVALUATIONS:
        paths["lcm", n] = studio.path(studio.eps_fn(cond), "lcm", n)
    on, _ = paths["lcm", STEPS]
    by_gamma = {}
    for steps in GAMMA_STEPS:
        for gamma in GAMMAS:
            how = studio.seeds, studio.shape, "lcm", steps
            by_gamma[steps, gamma] = generate(studio.eps_fn(cond), *how, gamma=gamma)

    (HERE / "explorer").mkdir(exist_ok=True)
    studio.write_sheets("steps", [z for points in (on, off) for pair in points for z in pair])
    samplers = [paths[s, n][1] for s in ("lcm", *SOLVERS) for n in EVALUATIONS]
    studio.write_sheets("samplers", [*samplers, end])
    studio.write_sheets("gamma", list(by_gamma.values()))

    # ---- lambda1 tau_style + lambda2 tau_lcm
    for style in STYLES:
        taus = read_tau(WEIGHTS / f"{style}.safetensors"), tau_lcm
        styled, drawn = studio.cond(f", {style} style"), []
        for lambda1, lambda2 in tqdm([(a, b) for a in LAMBDAS for b in LAMBDAS], desc=style):
            studio.set_lora(taus, [lambda1, lambda2])
            drawn.append(generate(studio.eps_fn(styled), studio.seeds, studio.shape, "lcm", STEPS))
        studio.write_sheets(style, drawn)

    # ---- the numbers
    data = {
        "prompts": [name + background for name, background in PROMPTS.items()],
        "seeds": SEEDS,
        "timesteps": timesteps("lcm", STEPS),
        "evaluations": EVALUATIONS,
        "gammas": GAMMAS,
        "gammaSteps": GAMMA_STEPS,
        "lambdas": LAMBDAS,
        "styles": STYLES,
        # RMS of z0 minus the end of the teacher's path, for each prompt and seed
        "distance": {f"{s}{n}": rms(z0 - end) for (s, n), (_, z0) in paths.items()},
        "gammaDistance": [rms(z0 - end) for z0 in by_gamma.values()],
        "paths": [in_plane(i, teacher, paths) for i in range(len(studio.seeds))],
    }
    text = json.dumps(data, separators=(",", ":"))
    (HERE / "explorer/data.js").write_text(f"const DATA = {text};\n")


if __name__ == "__main__":
    main()
