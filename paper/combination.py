"""combination: Does it add to any style LoRA with no training?

Claim (section 3.2, eq. 3, Fig. 3): tau_mix = lambda1 tau_style + lambda2 tau_lcm draws in the style
in few steps, with no training, for any style LoRA.
"""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from minilcm.metrics import decide, holm, interval, together
from weights.emoji.styles import KINDS, REAL

from .charts import BLUE, GREY, ORANGE, RED, forest, panels
from .pictures import FOUR, SLOW, Found, held_out_art, in_style, pictures, save_sheet
from .setup import TUNE, Budget, names_of, prompts_of, shipped_lora, spread
from .training import style_vector

# style: rank and alpha of its LoRA. Four real emoji sets, two image filters, two bent shapes
SIZES = ((8, 8.0), (32, 8.0), (8, 16.0), (32, 16.0)) * 2
STYLES = dict(zip((*REAL, "blueprint", "halftone", "slim", "swirl"), SIZES))
LAMBDA_STYLE, LAMBDA_LCM = 0.8, 1.0  # of the report's Fig. 3
ALLOWED, FLOOR = 0.1, 0.5  # see `verdict`


def measure(budget: Budget) -> dict:
    numbers, sheet, lost, asked = {"styles": {}, "reader": {}, "mean": {}}, [], [], []
    for style, (rank, alpha) in list(STYLES.items())[:: 4 if budget.quick else 1]:
        vector, prompts = style_vector(budget, style, rank, alpha), prompts_of(style, budget.names)
        less, lcm = (vector, LAMBDA_STYLE), (shipped_lora(), LAMBDA_LCM)
        ways = {"alone": (SLOW, [(vector, 1.0)]), "alone, 0.8": (SLOW, [less])}
        ways |= {"both": (FOUR, [less, lcm]), "lcm": (FOUR, [lcm])}
        ways["equal"] = (FOUR, [(vector, 1.0), lcm])  # the style as strong as it is alone
        found = {way: pictures(prompts, budget.seeds, *how) for way, how in ways.items()}
        row, art = about_style(style, found, names_of(prompts)), held_out_art(style)
        # whether there is something to lose, by pictures on which no loss is measured
        own = pictures(prompts, TUNE, *ways["alone"])
        row["measurable"] = min(x.mean().item() for x in seen_in(own, style).values()) >= FLOOR
        numbers["styles"][style] = row | {"rank, alpha": f"{rank}, {alpha:g}"}
        if row["measurable"]:
            lost.append([seen_in(found[way], style) for way in ("alone", "both")])
            asked += prompts
        reader = {"names": art["name"], "style": in_style(art, [style])}
        numbers["reader"][style] = {what: x.mean().item() for what, x in reader.items()}
        numbers["reader"][style]["lcm"] = row["style"]["lcm"]
        for way, label in (("alone", f"{style} 25 steps"), ("both", f"{style} + lcm, 4 steps")):
            some = spread(list(found[way]["z0"][:, 0]), 5)
            sheet += [(label, z) for z in some]
    for what in ("name", "style") if lost else ():
        alone, both = (torch.cat([x[what] for x in each]) for each in zip(*lost))
        numbers["mean"][what] = interval(alone, both, groups=names_of(asked))
    save_sheet("combination-pictures", sheet, len(some), budget.quick)
    return numbers


def seen_in(found: Found, style: str) -> dict[str, Tensor]:
    return {"name": found["name"], "style": in_style(found, [style])}


def about_style(style: str, found: dict[str, Found], groups: Tensor) -> dict:
    """What each way has of name and style, and where in the sum it is lost."""
    both, alone = (found[way]["sharpness"] for way in ("both", "alone"))
    row = {"kind": KINDS[style], "sharpness": interval(both, alone, True, groups)}
    pairs = {"lost": ("alone", "both"), "lost to lambda1": ("alone", "alone, 0.8")}
    pairs |= {"lost to the vector": ("alone, 0.8", "both"), "lost, equal": ("alone", "equal")}
    for what in ("name", "style"):
        x = {way: seen_in(each, style)[what] for way, each in found.items()}
        row[what] = {way: interval(each, groups=groups) for way, each in x.items()}
        row[what] |= {loss: interval(x[a], x[b], groups=groups) for loss, (a, b) in pairs.items()}
    return row


def verdict(n: dict) -> dict:
    """A style keeps in the sum, 0.8 of it, 4 steps, what it has alone in 25 guided steps, if it
    loses less than 0.1 in the share of pictures with the name, and with the style. Styles that have
    less than 0.5 of either alone, on pictures of another seed, have nothing to lose and are not
    counted. Each style: shown if all keep both; refuted if one surely does not, after Holm's
    correction for the number of losses. On average: by the mean over these styles' prompts. The
    vector takes nothing: each, against 0.8 of the style alone in 25 guided steps. At equal
    strength: each, with lambda1 = 1 in the sum.
    """
    rows = {style: r for style, r in n["styles"].items() if r["measurable"]}

    def kept(loss: str) -> list:
        lost = {f"{k} {what}": r[what][loss] for k, r in rows.items() for what in ("name", "style")}
        surely = [k for k in holm(lost, ALLOWED) if lost[k][0] > ALLOWED]
        word = together(decide(x, below=ALLOWED) for x in lost.values())
        word = "refuted" if surely else "not shown" if word == "refuted" else word
        worst = max(lost, key=lost.get, default=None)
        said = "{:.2f} [{:.2f}, {:.2f}]".format(*lost[worst]) if lost else "nothing"
        return [word, f"{said} lost, {worst}, the worst of {len(lost)} losses"]

    mean = [n["mean"].get(what, [0.0, -1.0, 1.0]) for what in ("name", "style")]
    return {
        "the LCM-LoRA takes no more than 0.1 of each": kept("lost to the vector"),
        "0.8 of each style keeps in 4 steps what it has in 25": kept("lost"),
        "on average styles keep it": [together(decide(x, below=ALLOWED) for x in mean), max(mean)],
        "at equal strength each style keeps what it has": kept("lost, equal"),
    }


def figure(n: dict) -> Figure:
    rows = {k: r for k, r in n["styles"].items() if r["measurable"]} or n["styles"]
    to = ("lost to lambda1", "lost to the vector")
    mean = [sum(r["style"][loss][0] for r in rows.values()) / len(rows) for loss in to]
    title = "Of the style {:+.2f} is lost to lambda1 = 0.8, and {:+.2f} to the LCM-LoRA"
    wanted = {("style", "lost"): RED, ("style", to[0]): ORANGE, ("style", to[1]): BLUE}
    wanted["name", "lost"] = GREY
    titles, said = [" ".join(loss) for loss in wanted], title.format(*mean)
    fig, axes = panels(titles, said, "share of pictures", width=4, height=4, sharey=True)
    for ax, ((what, loss), color) in zip(axes, wanted.items()):
        forest(ax, {k: r[what][loss] for k, r in n["styles"].items()}, (0, ALLOWED), color)
    return fig
