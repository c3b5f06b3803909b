"""Does the picture show what the prompt says? A judge reads its name and its style.

Then: how sure a share is, how far two sets of pictures are apart, and how sharp a picture is.

The emoji model's judge was taught on the art (`weights/emoji/train_judge.py`) and has nothing in
common with the text tower that conditions the UNet.
"""

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn

SIZE = 96  # of the pictures that the judge looks at


class Judge(nn.Module):
    """CLIP's ResNet (2103.00020), small, with two linear classifiers on its features."""

    def __init__(self, names: list[str], styles: list[str], width: int = 24, dim: int = 256):
        super().__init__()
        self.visual = ModifiedResNet([1, 2, 2, 1], dim, heads=8, image_size=SIZE, width=width)
        self.name, self.style = nn.Linear(dim, len(names)), nn.Linear(dim, len(styles))
        self.names, self.styles = names, styles

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (b, 3, H, W) in [-1, 1] -> (b, dim)."""
        if pixels.shape[-2:] != (SIZE, SIZE):
            pixels = F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True)
        return self.visual(pixels)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (b, 3, H, W) in [-1, 1] -> logits of the names (b, n) and of the styles (b, s)."""
        h = self.features(pixels)
        return self.name(h), self.style(h)


def picked(logits: Tensor, words: list[str], choices: list[str] | None = None) -> list[str]:
    """The likeliest word of each row of logits (b, len(words)); only among `choices`, if given."""
    index = [words.index(word) for word in (choices or words)]
    return [words[index[i]] for i in logits[:, index].argmax(dim=1).tolist()]


@torch.no_grad()
def accuracy(
    judge: Judge,
    pixels: Tensor,
    names: list[str],
    styles: list[str] | None = None,
    choices: list[str] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(does the judge see its own name in each picture, among all that it knows; and its own style,
    among `choices`).

    pixels (b, 3, H, W) in [-1, 1], names and styles of length b -> (b,) bool each; without styles
    the second is None.
    """
    parts = [judge(part.clamp(-1, 1)) for part in pixels.split(64)]
    of_names, of_styles = (torch.cat(x) for x in zip(*parts))
    name = torch.tensor([a == b for a, b in zip(picked(of_names, judge.names), names)])
    if styles is None:
        return name, None
    return name, torch.tensor(
        [a == b for a, b in zip(picked(of_styles, judge.styles, choices), styles)]
    )


# ---- how sure a mean is


def interval(
    x: Tensor,
    y: Tensor | None = None,
    ratio: bool = False,
    groups: Tensor | None = None,
    draws: int = 2000,
) -> list[float]:
    """[mean, low, high] of x (prompts, seeds), of x - y, or with `ratio` of mean(x) / mean(y): 95 %
    bootstrap, seed 0.

    `groups` (prompts,) numbers what is drawn with replacement, by default each prompt: pictures of
    one group are not independent, so they are drawn together, with all their seeds. x and y are
    drawn in pairs. Efron (1979).
    """
    groups = torch.arange(len(x)) if groups is None else groups.unique(return_inverse=True)[1]
    n = int(groups.max()) + 1
    rows = torch.randint(0, n, (draws, n), generator=torch.Generator().manual_seed(0))
    size = torch.bincount(groups).double()  # (n,)

    def means(v: Tensor) -> Tensor:
        total = torch.zeros(n, dtype=torch.float64).index_add(0, groups, v.double().mean(dim=1))
        return total[rows].sum(dim=1) / size[rows].sum(dim=1)  # (draws,)

    point, drawn = x.mean(), means(x)
    if y is not None:
        drawn, point = (
            (drawn / means(y), point / y.mean()) if ratio else (drawn - means(y), point - y.mean())
        )
    return [
        round(v, 4)
        for v in (point.item(), drawn.quantile(0.025).item(), drawn.quantile(0.975).item())
    ]


def wilson(k: int, n: int) -> list[float]:
    """[share, low, high] of k in n, 95 %; unlike a bootstrap's it has a width for none or all of n.
    Wilson (1927).
    """
    # (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),  p = k / n,  z = 1.96
    z = 1.96
    middle, half = (k + z**2 / 2) / (n + z**2), z / (n + z**2) * (k * (n - k) / n + z**2 / 4) ** 0.5
    return [k / n, middle - half, middle + half]


# ---- of pictures


def psnr(pixels: Tensor, other: Tensor) -> Tensor:
    """Peak signal to noise ratio in dB of two batches (b, 3, H, W) in [-1, 1] -> (b,)."""
    # 10 log10(peak^2 / mean squared error), with the peak 1 of a range [0, 1]
    return -10 * ((pixels - other) / 2).square().flatten(1).mean(dim=1).log10()


def sharpness(pixels: Tensor) -> Tensor:
    """Mean absolute Laplacian of the inner grey levels: (b, 3, H, W) in [-1, 1] -> (b,)."""
    # x[i - 1, j] + x[i + 1, j] + x[i, j - 1] + x[i, j + 1] - 4 x[i, j]
    laplace = pixels.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]  # (1, 1, 3, 3)
    return F.conv2d(pixels.mean(dim=1, keepdim=True), laplace).abs().mean(dim=(1, 2, 3))  # (b,)
