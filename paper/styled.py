"""A reader of styled pictures: which style is it in, and which name does it show?

The judge of weights/emoji knows four plain styles: of a white line on blue it cannot tell the name. This network is
taught both on the art of all styles, as the autoencoder decodes it, and says how much of their held-out art it reads.
"""

import random
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from lab import EMOJI, HALF, Prompt, cached, decode, open_lab, sharpness
from styles import KINDS, split_style
from torch import Tensor, nn
from tqdm import tqdm

from minilcm.data.emoji import Art, compose, read_art, split_art

sys.path.insert(0, str(EMOJI))
from train_clip import degrade  # noqa: E402


class Reader(nn.Module):
    """Pixels (b, 3, 64, 64) in [-1, 1] -> (logits of styles (b, s), logits of names (b, n)).

    Of the styles one is "plain", for the four sets that the base knows.
    """

    def __init__(self, styles: list[str], names: list[str]):
        super().__init__()
        layers = []
        for i, o in zip((3, 32, 64, 128), (32, 64, 128, 256)):  # 64 -> 32 -> 16 -> 8 -> 4 points across
            layers += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.GroupNorm(8, o), nn.SiLU()]
            layers += [nn.Conv2d(o, o, 3, padding=1), nn.GroupNorm(8, o), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Dropout(0.2))
        self.style, self.name = nn.Linear(256, len(styles)), nn.Linear(256 * 16, len(names))
        self.styles, self.names = styles, names

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(pixels)  # (b, 256, 4, 4)
        return self.style(h.mean(dim=(2, 3))), self.name(rearrange(h, "b c h w -> b (c h w)"))


class Lesson(NamedTuple):
    """Drawings on coloured grounds, through the autoencoder; what they are, as indices."""

    pixels: Tensor  # (n, 3, 64, 64) uint8
    style: Tensor  # (n,)
    name: Tensor  # (n,)


@torch.no_grad()
def decoded(art: list[Art], styles: list[str], looks: int, seed: int) -> Lesson:
    lab, rng, pixels = open_lab(), random.Random(seed), []
    art = [a for a in art for _ in range(looks)]
    for i in tqdm(range(0, len(art), 64), desc="drawings", disable=None, leave=False):
        x = torch.stack([compose(a, 4 * lab.side, rng)[0] for a in art[i : i + 64]])
        x = decode(lab.vae, lab.vae.encode_mean(x))
        pixels.append(((x + 1) * 127.5).round().byte())
    style = [styles.index(a.style if a.style in KINDS else "plain") for a in art]
    return Lesson(torch.cat(pixels), torch.tensor(style), torch.tensor([lab.names.index(a.name) for a in art]))


def lessons(styles: list[str], every: int) -> tuple[Lesson, Lesson]:
    """(to be taught on, held out): the base's own art and that of all styles, or every n-th drawing of it."""

    def make() -> dict[str, Tensor]:
        names = open_lab().names
        seen, held_out = split_art(read_art(EMOJI / "art"), EMOJI / "art/held_out.txt", names)
        for style in styles[:-1]:
            a, b = split_style(style, names)
            seen, held_out = seen + a, held_out + b
        both = decoded(seen[::every], styles, 2, seed=0), decoded(held_out[::every], styles, 2, seed=1)
        return {f"{k}{i}": x for i, lesson in enumerate(both) for k, x in lesson._asdict().items()}

    kept = cached("lessons", [styles, every], make)
    return tuple(Lesson(*(kept[f"{k}{i}"] for k in Lesson._fields)) for i in range(2))


def to_pixels(x: Tensor) -> Tensor:
    return x.float() / 127.5 - 1


def teach(net: Reader, lesson: Lesson, steps: int, batch: int = 64, lr: float = 2e-3) -> None:
    """Cross-entropy of style and name; all styles alike often; half of the pictures degraded, as few steps do."""
    share = 1 / torch.bincount(lesson.style)[lesson.style].float()
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in tqdm(range(steps), desc="teaching the reader", disable=None, leave=False):
        index = torch.multinomial(share, batch, replacement=True, generator=generator)
        x = to_pixels(lesson.pixels[index])
        x[::2] = degrade(x[::2], generator)
        with torch.autocast("cpu", dtype=HALF, enabled=HALF != torch.float32):
            style, name = net(x)
        loss = F.cross_entropy(style.float(), lesson.style[index], label_smoothing=0.05)
        loss = loss + F.cross_entropy(name.float(), lesson.name[index], label_smoothing=0.05)
        loss.backward()
        optimizer.step(), optimizer.zero_grad(), schedule.step()


@torch.no_grad()
def read(net: Reader, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(logits of styles less that of plain (b, s), names picked (b,) as indices)."""
    logits = [net(x) for x in pixels.split(64)]
    style, name = (torch.cat(x) for x in zip(*logits))
    return style - style[:, [net.styles.index("plain")]], name.argmax(dim=1)


def open_reader(
    styles: tuple[str, ...], steps: int, every: int = 1
) -> tuple[Reader, dict[str, float], dict[str, float]]:
    """(the network, {style: share of its held-out drawings that look more like it than plain}, {style: share whose name
    it finds}).
    """
    classes = [*styles, "plain"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Reader(classes, open_lab().names)

        def make() -> dict[str, Tensor]:
            teach(net.train(), lessons(classes, every)[0], steps)
            return net.state_dict()

        net.load_state_dict(cached("reader", [classes, steps, every], make))
    net.eval().requires_grad_(False)
    held_out = lessons(classes, every)[1]
    style, name = read(net, to_pixels(held_out.pixels))
    found, named = {}, {}
    for i, s in enumerate(classes):
        mine = held_out.style == i
        found[s] = (style[mine, i] > 0).float().mean().item()
        named[s] = (name[mine] == held_out.name[mine]).float().mean().item()
    return net, found, named


@torch.no_grad()
def read_latents(net: Reader, z0: Tensor, styles: list[str], prompts: list[Prompt]) -> tuple[Tensor, Tensor, Tensor]:
    """(does each show its prompt's name, does it look more like one of the styles than plain, sharpness).

    Latents (prompts, seeds, 4, h, w) -> (prompts, seeds).
    """
    pixels = decode(open_lab().vae, z0.flatten(0, 1))
    style, name = read(net, pixels)
    names = torch.tensor([net.names.index(p.name) for p in prompts]).repeat_interleave(z0.shape[1])
    inside = (style[:, [net.styles.index(s) for s in styles]] > 0).any(dim=1)
    return tuple(x.float().reshape(z0.shape[:2]) for x in (name == names, inside, sharpness(pixels)))
