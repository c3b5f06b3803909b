"""Two readers of styled pictures: which style is it in, and which name does it show?

The judge of weights/emoji knows four plain styles: of a white-on-blue drawing it cannot tell the name. `open_reader` is
that judge taught further on the art of all styles; `open_classifier` a small network that is taught styles and nothing
else. Both see drawings as the autoencoder decodes them, and say how much of each style's held-out art they get right.
"""

import functools
import random
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from lab import EMOJI, HALF, Prompt, cached, open_lab
from styles import KINDS, split_style
from torch import Tensor, nn
from tqdm import tqdm

from minilcm.art import Art, compose, read_art, split_art
from minilcm.metrics import Judge, load_judge, prompt_accuracy

sys.path.insert(0, str(EMOJI))
from train_clip import degrade  # noqa: E402


class StyleNet(nn.Sequential):
    """Pixels (b, 3, 64, 64) -> logits (b, classes): the styles, and plain for the four sets that the base knows."""

    def __init__(self, styles: tuple[str, ...]):
        widths, layers = (3, 32, 64, 96, 128), []
        for i, o in zip(widths, widths[1:]):
            layers += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.GroupNorm(8, o), nn.SiLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], len(styles) + 1))
        self.classes = [*styles, "plain"]


@torch.no_grad()
def decoded(art: list[Art], looks: int, seed: int) -> tuple[Tensor, list[str], list[str]]:
    """(pixels (n, 3, H, W) through the autoencoder, n styles, n names) of drawings on coloured grounds."""
    lab, rng = open_lab(), random.Random(seed)
    art = [a for a in art for _ in range(looks)]
    pixels = torch.stack([compose(a, 4 * lab.side, rng)[0] for a in art])
    pixels = torch.cat([lab.vae.decode(lab.vae.encode_mean(x)) for x in pixels.split(64)]).clamp(-1, 1)
    return pixels, [a.style if a.style in KINDS else "plain" for a in art], [a.name for a in art]


@functools.cache
def lesson(styles: tuple[str, ...], every: int) -> tuple:
    """(to be taught on, held out), each `decoded`: the base's own art and that of all styles, or every n-th drawing."""
    lab = open_lab()
    seen, held_out = split_art(read_art(EMOJI / "art"), EMOJI / "art/held_out.txt", lab.names)
    for style in styles:
        a, b = split_style(style, lab.names)
        seen, held_out = seen + a, held_out + b
    return decoded(seen[::every], 2, seed=0), decoded(held_out[::every], 2, seed=1)


def taught(net: nn.Module, logits: Callable, x: Tensor, y: Tensor, styles: list[str], steps: int, lr: float) -> None:
    """Train net to find y (n,) in pixels x (n, 3, H, W), styles alike often; degraded a little, as few steps do."""
    order = torch.tensor([sorted(set(styles)).index(s) for s in styles])
    share = 1 / torch.bincount(order)[order].float()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in tqdm(range(steps), desc=f"teaching {type(net).__name__}", disable=None, leave=False):
        index = torch.multinomial(share, 64, replacement=True, generator=generator)
        with torch.autocast("cpu", dtype=HALF, enabled=HALF != torch.float32):
            out = logits(degrade(x[index], generator))
        F.cross_entropy(out.float(), y[index], label_smoothing=0.05).backward()
        optimizer.step(), optimizer.zero_grad(), schedule.step()


def by_style(right: Tensor, styles: list[str]) -> dict[str, Tensor]:
    return {s: right[torch.tensor([s == t for t in styles])].float().mean() for s in dict.fromkeys(styles)}


def open_classifier(styles: tuple[str, ...], steps: int, every: int = 1) -> tuple[StyleNet, dict[str, float]]:
    """(the network, {style: share of its held-out drawings that it finds})."""

    def make() -> dict[str, Tensor]:
        (x, y, _), (x_, y_, _) = lesson(styles, every)
        taught(net, net, x, torch.tensor([net.classes.index(c) for c in y]), y, steps, lr=2e-3)
        with torch.no_grad():
            right = net(x_).argmax(dim=1) == torch.tensor([net.classes.index(c) for c in y_])
        return net.state_dict() | {f"right {s}": v for s, v in by_style(right, y_).items()}

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = StyleNet(styles)
    return opened(net, cached("classifier", [styles, steps, every], make))


def open_reader(styles: tuple[str, ...], steps: int, every: int = 1) -> tuple[Judge, dict[str, float]]:
    """(the judge, taught on all styles, {style: share of its held-out drawings whose name it finds})."""
    lab, judge = open_lab(), load_judge(EMOJI / "judge.safetensors")

    def make() -> dict[str, Tensor]:
        (x, style, names), (x_, style_, names_) = lesson(styles, every)
        with torch.no_grad():
            of_names = judge.text_features(lab.text, lab.names)  # (64, e); the text's side stays as it is
        y = torch.tensor([lab.names.index(n) for n in names])
        judge.text_projection.requires_grad_(False)
        taught(judge, lambda x: 30 * judge.image_features(x) @ of_names.T, x, y, style, steps, lr=5e-4)
        right = prompt_accuracy(judge, lab.text, x_, names_, lab.names)
        return judge.state_dict() | {f"right {s}": v for s, v in by_style(right, style_).items()}

    return opened(judge, cached("reader", [styles, steps, every], make))


def opened(net: nn.Module, tensors: dict[str, Tensor]) -> tuple[nn.Module, dict[str, float]]:
    right = {k.removeprefix("right "): x.item() for k, x in tensors.items() if k.startswith("right ")}
    net.load_state_dict({k: x for k, x in tensors.items() if not k.startswith("right ")})
    return net.eval().requires_grad_(False), right


def of_each(z0: Tensor, f: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """f(pixels, rows) -> (b,) on 64 pictures at a time; latents (prompts, seeds, 4, h, w) -> (prompts, seeds)."""
    z, parts = z0.flatten(0, 1), []
    for i in range(0, len(z), 64):
        pixels = open_lab().vae.decode(z[i : i + 64]).clamp(-1, 1)
        parts.append(f(pixels, slice(i, i + 64)))
    return torch.cat(parts).float().reshape(z0.shape[:2])


@torch.no_grad()
def in_style(net: StyleNet, z0: Tensor, style: str) -> Tensor:
    """Is each picture in the style? Latents (prompts, seeds, 4, h, w) -> (prompts, seeds)."""
    return of_each(z0, lambda pixels, _: net(pixels).argmax(dim=1) == net.classes.index(style))


@torch.no_grad()
def shows(reader: Judge, z0: Tensor, prompts: list[Prompt]) -> Tensor:
    """Does each picture show its prompt's name, in any style? Latents (prompts, seeds, 4, h, w) -> (prompts, seeds)."""
    lab, names = open_lab(), [p.name for p in prompts for _ in range(z0.shape[1])]
    return of_each(z0, lambda x, rows: prompt_accuracy(reader, lab.text, x, names[rows], lab.names))
