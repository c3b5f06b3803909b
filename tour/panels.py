"""What the chapters' figures share: the model, its teacher's path, and parts of a figure."""

import functools
import random
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from minilcm.data.emoji import compose, read_art
from minilcm.data.pictures import to_images
from minilcm.files.checkpoint import load_model
from minilcm.files.lora_file import read_recipe, read_tau
from minilcm.generate import noise
from minilcm.lora import Tau
from minilcm.merge import combine, merge_into
from minilcm.model.unet import UNet
from minilcm.run.diagnostics import guided_trajectory
from minilcm.schedule import make_schedule
from minilcm.solver import guided_eps

HERE = Path(__file__).parent
EMOJI = HERE.parent / "weights/emoji"
WEIGHTS = [EMOJI / f"{x}.safetensors" for x in ("model", "lcm_lora", "blueprint")]
SCHEDULE, SHAPE = make_schedule(), (4, 16, 16)
RECIPE = read_recipe(WEIGHTS[1])  # of the shipped LCM-LoRA
W, K, PSI_STEPS = float(RECIPE["w"]), int(RECIPE["k"]), int(RECIPE.get("psi_steps", 1))
NAMES = ["rocket", "penguin", "cactus", "cat face", "pizza", "red apple"]  # seeds 0 to 5
BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#d1540f", "#1e8449", "0.45"


# ---- the model


@functools.cache
def shipped():
    return load_model(WEIGHTS[0])


@functools.cache
def lcm_lora() -> Tau:
    return read_tau(WEIGHTS[1])


@functools.cache
def adapted(taus=("lcm",), lambdas: tuple[float, ...] = (1.0,)) -> UNet:
    """A copy of the UNet with sum_i lambda_i tau_i in its weights."""
    files = {"lcm": WEIGHTS[1], "blueprint": WEIGHTS[2]}
    unet = load_model(WEIGHTS[0])[0]
    merge_into(unet, combine([read_tau(files[name]) for name in taus], list(lambdas)))
    return unet


def eps_of(unet: UNet, prompts: list[str], w: float = 0.0):
    text = shipped()[2]
    return guided_eps(unet, text.encode(prompts), text.null_cond(len(prompts)), w)


def network(unet: UNet):
    """(z_t, t, cond, w) -> eps_hat, as lcm.py and diagnostics.py call it."""
    return lambda z_t, t, cond, w: unet(z_t, t, cond)


@functools.cache
def teacher_path() -> Tensor:
    """50 guided DDIM steps for NAMES: (51, 6, 4, 16, 16); [49 - n] is at t = 20 n + 19."""
    unet, _, text, _ = shipped()
    z_T, _ = noise(range(len(NAMES)), SHAPE)
    conds = text.encode(NAMES), text.null_cond(len(NAMES))
    return guided_trajectory(network(unet), z_T, *conds, SCHEDULE, W)


@functools.cache
def drawing(name: str = "rocket") -> Tensor:
    """A drawing of the art the model was trained on, encoded: z0 (1, 4, 16, 16)."""
    art = [a for a in read_art(EMOJI / "art/noto.tar") if a.name == name]
    pixels, _ = compose(art, 128, random.Random(0))
    return shipped()[1].encode_mean(pixels)


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


# ---- drawing


def figure(title: str, width: float, height: float) -> Figure:
    fig = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    fig.suptitle(title, fontsize=12)
    return fig


def show(ax, z0: Tensor, label: str = "", side: str = "") -> None:
    """One latent (4, 16, 16), decoded; `label` above it, `side` at its left."""
    ax.imshow(to_images(shipped()[1].decode(z0[None]))[0])
    ax.set_title(label, fontsize=9, pad=3)
    ax.set_ylabel(side, fontsize=9)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def name_line(ax, x: float, y: float, words: str, color: str) -> None:
    """A label at the line itself, in place of a legend."""
    ax.annotate(words, (x, y), (4, 3), textcoords="offset points", color=color, fontsize=9)


def save(fig: Figure, number: int) -> None:
    """In 256 colours, without a date: the same bytes each time."""
    path = HERE / f"figures/{number:02d}.png"
    fig.savefig(path, dpi=100, metadata={"Software": None})
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
