"""Does the picture show what the prompt says? A judge reads its name and its style.

Then: how sure a share is, how far two sets of pictures are apart, and how sharp a picture is.

The emoji model's judge was taught on the art (`weights/emoji/train_judge.py`) and has nothing in
common with the text tower that conditions the UNet.
"""

import math
from collections.abc import Iterable

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
    """(does the judge see the name that was asked for in each picture, among all that it knows; and
    the style that was asked for, among `choices`).

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


# {runs: Student's t of runs - 1 degrees of freedom at 97.5 %, over the normal's 1.96}
STUDENT = {2: 6.483, 3: 2.195, 4: 1.624, 5: 1.417}


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

    x (runs, prompts, seeds) is of several training runs, two to five, and y of the same or of one:
    groups and runs are both drawn, groups for the mean of all runs, and runs for the mean of all
    groups. The mean of R runs drawn with replacement has (R - 1) / R of the variance it should
    have, and for so few runs Student's t takes the normal's place: what a draw owes to its runs is
    stretched by sqrt(R / (R - 1)) and by t / 1.96.
    """
    groups = torch.arange(x.shape[-2]) if groups is None else groups
    groups = groups.unique(return_inverse=True)[1]
    n, runs = int(groups.max()) + 1, len(x) if x.ndim == 3 else 1
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, n, (draws, n), generator=generator)
    some = torch.randint(0, runs, (runs, draws), generator=generator)
    size = torch.bincount(groups).double()  # (n,)

    def means(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of all runs and groups, (); of the drawn groups, and of the drawn runs, (draws,) each."""
        v = v.double().mean(dim=-1).expand(runs, -1)  # (runs, prompts)
        total = torch.zeros(n, dtype=torch.float64).index_add(0, groups, v.mean(dim=0))
        drawn_groups = total[rows].sum(dim=-1) / size[rows].sum(dim=-1)
        return v.mean(), drawn_groups, v.mean(dim=1)[some].mean(dim=0)

    point, by_groups, by_runs = means(x)
    if y is not None:
        compare = torch.div if ratio else torch.sub
        point, by_groups, by_runs = map(compare, (point, by_groups, by_runs), means(y))
    stretch = STUDENT[runs] * (runs / (runs - 1)) ** 0.5 if runs > 1 else 0.0
    drawn = by_groups + stretch * (by_runs - point)
    return [
        round(v, 4)
        for v in (point.item(), drawn.quantile(0.025).item(), drawn.quantile(0.975).item())
    ]


def decide(interval: list[float], above: float | None = None, below: float | None = None) -> str:
    """Is a number above a bound (or below one)? "shown" if its whole interval is, "refuted" if none
    of it, else "not shown".

    Of a difference, above=0 asks for superiority and above=-margin for non-inferiority.
    """
    _, low, high = interval
    if below is not None:
        return "shown" if high < below else "refuted" if low > below else "not shown"
    return "shown" if low > above else "refuted" if high < above else "not shown"


def together(verdicts: Iterable[str]) -> str:
    """The verdict on all of them: refuted if one is, shown if every one is."""
    found = set(verdicts)
    return "refuted" if "refuted" in found else "shown" if found == {"shown"} else "not shown"


def holm(intervals: dict[str, list[float]], bound: float = 0.0, runs: int = 1) -> list[str]:
    """Whose number differs from `bound`, with a chance of at most 5 % of any false alarm. Holm
    (1979).

    The standard error of each is its interval's half width / 1.96, the p-value a normal's; for
    three `runs` that of Student's t of two degrees of freedom, whose tails are wider. `runs` is 1
    or 3.
    """
    p = {}
    for name, (mean, low, high) in intervals.items():
        z = abs(mean - bound) / max((high - low) / 3.92, 1e-12)
        p[name] = math.erfc(z / 2**0.5)
        if runs == 3:
            t = z * STUDENT[3]
            p[name] = 1 - t / (2 + t**2) ** 0.5
    differ = []
    for i, name in enumerate(sorted(p, key=p.get)):
        if p[name] > 0.05 / (len(p) - i):
            break
        differ.append(name)
    return differ


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
