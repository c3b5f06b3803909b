"""Which style is a picture in? A small network trained on the art of all styles, as the autoencoder decodes it.

The judge of weights/emoji was taught names and hardly knows styles; this one is taught styles and nothing else.
"""

import random

import torch
import torch.nn.functional as F
from lab import EMOJI, cached, open_lab
from styles import KINDS, split_style
from torch import Tensor, nn
from tqdm import tqdm

from minilcm.art import compose, read_art, split_art


class StyleNet(nn.Sequential):
    """Pixels (b, 3, 64, 64) -> logits (b, classes): the styles, and plain for the four sets that the base knows."""

    def __init__(self, styles: tuple[str, ...]):
        widths, layers = (3, 32, 64, 96, 128), []
        for i, o in zip(widths, widths[1:]):
            layers += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.GroupNorm(8, o), nn.SiLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], len(styles) + 1))
        self.classes = [*styles, "plain"]


@torch.no_grad()
def decoded(art: list, looks: int, seed: int) -> tuple[Tensor, list[str]]:
    """(pixels (n, 3, H, W) through the autoencoder, n classes) of drawings on coloured grounds."""
    lab, rng = open_lab(), random.Random(seed)
    pixels = torch.stack([compose(a, 4 * lab.side, rng)[0] for a in art for _ in range(looks)])
    pixels = torch.cat([lab.vae.decode(lab.vae.encode_mean(x)) for x in pixels.split(64)]).clamp(-1, 1)
    return pixels, [a.style if a.style in KINDS else "plain" for a in art for _ in range(looks)]


def all_art(styles: tuple[str, ...]) -> tuple[list, list]:
    lab = open_lab()
    seen, held_out = split_art(read_art(EMOJI / "art"), EMOJI / "art/held_out.txt", lab.names)
    for style in styles:
        a, b = split_style(style, lab.names)
        seen, held_out = seen + a, held_out + b
    return seen, held_out


def open_classifier(styles: tuple[str, ...], steps: int, every: int = 1) -> tuple[StyleNet, dict[str, float]]:
    """(the network, {style: share of its held-out drawings that it finds}); of all drawings or `every` n-th."""
    with torch.random.fork_rng():
        return train_classifier(styles, steps, every)


def train_classifier(styles: tuple[str, ...], steps: int, every: int) -> tuple[StyleNet, dict[str, float]]:
    torch.manual_seed(0)
    net = StyleNet(styles)

    def make() -> dict[str, Tensor]:
        seen, held_out = all_art(styles)
        (x, y), (x_, y_) = decoded(seen[::every], 2, 0), decoded(held_out[::every], 2, 1)
        y, y_ = (torch.tensor([net.classes.index(c) for c in classes]) for classes in (y, y_))
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        share = 1 / torch.bincount(y, minlength=len(net.classes)).clamp(min=1)[y]  # classes alike often
        for _ in tqdm(range(steps), desc="style classifier", disable=None, leave=False):
            index = torch.multinomial(share.float(), 64, replacement=True)
            batch = torch.where(torch.rand(64, 1, 1, 1) < 0.5, x[index], x[index].flip(3))
            F.cross_entropy(net(batch), y[index], label_smoothing=0.05).backward()
            optimizer.step(), optimizer.zero_grad(), schedule.step()
        with torch.no_grad():
            found = net(x_).argmax(dim=1) == y_
        right = torch.tensor([found[y_ == i].float().mean().nan_to_num() for i in range(len(net.classes))])
        return net.state_dict() | {"held out": right}

    tensors = cached("style-classifier", [styles, steps, every], make)
    right = dict(zip(net.classes, tensors.pop("held out").tolist()))
    net.load_state_dict(tensors)
    return net.eval(), right


@torch.no_grad()
def in_style(net: StyleNet, z0: Tensor, style: str) -> Tensor:
    """Latents (prompts, seeds, 4, h, w) -> is each picture in the style? (prompts, seeds)."""
    z = z0.flatten(0, 1)
    picked = torch.cat([net(open_lab().vae.decode(part).clamp(-1, 1)).argmax(dim=1) for part in z.split(64)])
    return (picked == net.classes.index(style)).float().reshape(z0.shape[:2])
