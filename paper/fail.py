"""fail: Can its failures be recognised?

What people do wrong is done here, in forty and more settings, mild and bad, beside good ones. Which
are visibly bad is judged blind, on numbered sheets (figures/fail-blind-1.png and on), three times;
numbers that need neither a judge nor labels are held against that.
"""

import json
import random
import re
from statistics import mean

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from minilcm.lora import ATTENTION
from minilcm.merge import combine, delta_norms
from minilcm.metrics import decide, holm

from .charts import BLUE, GREEN, GREY, ORANGE, RED, panels
from .combination import STYLES
from .pictures import FOUR, TEACHER, Base, Draw, Vectors, pictures, rms, save_sheet
from .setup import HERE, Budget, Vector, W, prompts_of, shipped_lora, spread
from .training import far, long, short, style_vector, train

LABELS = HERE / "labels.json"  # {"lcm_lora": content, "votes": {number on the sheets: [0, 1, 0]}}
EACH, SHEET = 4, 60  # pictures of a setting that are judged, and on a sheet


def settings(budget: Budget) -> dict[str, tuple[Draw, Vectors, Base | None]]:
    """{label: how it draws}. Labels that differ in their numbers only are a family."""
    lcm, rows = shipped_lora(), {}
    own = [(lcm, 1.0)]
    for lam in (0.0, 0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 8.0):
        rows[f"lambda2 {lam:g}"] = (FOUR, [(lcm, lam)], None)
    rows |= {f"{n} steps": (Draw("lcm", n), own, None) for n in (1, 2, 8)}
    for w in (0.5, 1.0, 2.0, 3.0, 6.0):
        rows[f"guidance {1 + w:g} beside it"] = (Draw("lcm", 4, w), own, None)
    for sampler, n in (("ddim", 2), ("ddim", 4), ("dpmpp", 4), ("ddim", 25)):
        rows[f"{sampler} {n} with it"] = (Draw(sampler, n), own, None)
        rows[f"{sampler} {n}, guided, with it"] = (Draw(sampler, n, W), own, None)
        rows[f"{sampler} {n}, guided"] = (Draw(sampler, n, W), [], None)
    order, shuffled = torch.Generator().manual_seed(0), {}
    for k, (up, *rest) in lcm.tau.items():
        shuffled[k] = (up[torch.randperm(len(up), generator=order)], *rest)
    attention = {k: x for k, x in lcm.tau.items() if k.endswith(ATTENTION)}
    others = {k: x for k, x in lcm.tau.items() if k not in attention}
    parts = {"attention only": attention, "attention left out": others, "rows shuffled": shuffled}
    alone = {label: Vector([label, lcm.key], tau) for label, tau in parts.items()}
    alone |= {f"short recipe, step {step}": v for step, v in train(long(budget)).at.items()}
    rows |= {label: (FOUR, [(vector, 1.0)], None) for label, vector in alone.items()}
    for style in ("blob", "blueprint"):
        vector = style_vector(budget, style, *STYLES[style])
        for lam in (0.8, 1.5, 2.5):  # the style comes first, see `measure`
            rows[f"{lam:g} {style} beside it"] = (FOUR, [(vector, lam), *own], None)
    base = train(far(budget)).end
    there = train(short(budget)._replace(data="styles"), base).end
    rows["far base, the shipped vector"] = (FOUR, own, base)
    rows["far base, its own vector"] = (FOUR, [(there, 1.0)], base)
    rows["far base's vector on the old"] = (FOUR, [(there, 1.0)], None)
    return dict(list(rows.items())[:: 8 if budget.quick else 1])


def measure(budget: Budget) -> dict:
    prompts, seeds, rows, shown = prompts_of(None, budget.names)[::2], budget.seeds[:1], {}, []
    whole = sum(norm**2 for norm in delta_norms(shipped_lora().tau).values())
    for label, (draw, vectors, base) in settings(budget).items():
        # with a style beside the vector the good ones have it, too, and no style is asked for
        style = [(vectors[0][0], 1.0)] if len(vectors) > 1 else []
        good = pictures(prompts, seeds, TEACHER, style, base)
        x = pictures(prompts, seeds, draw, vectors, base)
        tau = combine([v.tau for v, _ in vectors], [lam for _, lam in vectors])
        norm = sum(norm**2 for norm in delta_norms(tau).values()) / whole
        rows[label] = {
            "bad": "",  # no votes yet
            "sharpness off": (x["sharpness"].mean() / good["sharpness"].mean()).log().abs().item(),
            "contrast off": (x["z0"].std() / good["z0"].std()).log().abs().item(),
            "distance": rms(x["z0"], good["z0"]).mean().item(),
            "norm off": abs(norm**0.5 - 1) if vectors else 0.0,
            "judged wrong": 1 - x["name" if style else "right"].mean().item(),
        }
        shown += [(label, z) for z in spread(list(x["z0"][:, 0]), EACH)]
    random.Random(0).shuffle(shown)
    for i in range(0, len(shown), SHEET):
        sheet = [(str(i + j), z) for j, (_, z) in enumerate(shown[i : i + SHEET])]
        save_sheet(f"fail-blind-{i // SHEET + 1}", sheet, 10, budget.quick)
    return {"settings": rows, "detectors": with_labels(rows, [label for label, _ in shown])}


def with_labels(rows: dict[str, dict], shown: list[str]) -> dict[str, list[float]]:
    """Say of each setting whether it is bad, by the votes; {number: area under its ROC}, or {}."""
    labels = json.loads(LABELS.read_text()) if LABELS.exists() else {"lcm_lora": None}
    numbered = {str(i) for i in range(len(shown))}
    if labels["lcm_lora"] != shipped_lora().key or labels["votes"].keys() != numbered:
        return {}
    detectors = [key for key in next(iter(rows.values())) if key != "bad"]
    for label, row in rows.items():
        votes = [v for i, each in labels["votes"].items() if shown[int(i)] == label for v in each]
        row["bad"] = mean(votes) > 0.5
    bad = [row["bad"] for row in rows.values()]
    families = [re.sub(r"[\d.]+", "", label) for label in rows]
    of_kind = [{f for f, b in zip(families, bad) if b == kind} for kind in (True, False)]
    if min(map(len, of_kind)) < 5:  # too few to draw from
        return {}
    return {k: area([row[k] for row in rows.values()], bad, families) for k in detectors}


def area(score: list[float], bad: list[bool], families: list[str]) -> list[float]:
    """[area under the ROC, low, high], by a 95 % bootstrap over the families of settings."""
    score, bad, g = torch.tensor(score), torch.tensor(bad), torch.Generator().manual_seed(0)
    difference = score[bad][:, None] - score[~bad]  # (bad, good)
    above = (difference.sign().double() + 1) / 2  # is the bad one's score above? 0.5 if it is equal
    known = sorted(set(families))
    which, n = torch.tensor([known.index(f) for f in families]), len(known)
    picked = torch.randint(0, n, (2000, n), generator=g)
    often = F.one_hot(picked, n).sum(dim=1)[:, which].double()  # (draws, settings)
    weight = often[:, bad, None] * often[:, None, ~bad]  # (draws, bad, good)
    total = weight.sum(dim=(1, 2))
    drawn = ((weight * above).sum(dim=(1, 2)) / total)[total > 0]
    return [above.mean().item(), drawn.quantile(0.025).item(), drawn.quantile(0.975).item()]


def verdict(n: dict) -> dict:
    """Bad: most votes of three blind judgments of four pictures. A number recognises the bad ones
    if the area under its ROC is above 0.8 (0.5 is chance). Without a judge: one of sharpness and
    contrast off the 50 guided steps', distance to their end, norm of the delta off the shipped
    one's; the best of these four, after Holm's correction. Intervals are over families of settings,
    of which there must be five that have bad ones and five that have good ones.
    """
    found = dict(n["detectors"])
    if not found:
        return {"a number shows which settings are bad": ["not shown", "no labels"]}
    judged, best = found.pop("judged wrong"), max(found, key=lambda k: found[k][0])
    word = decide(found[best], above=0.8)
    word = "not shown" if word == "shown" and best not in holm(found, 0.8) else word
    return {
        f"a number shows which settings are bad ({best})": [word, found[best]],
        "the judge's accuracy shows it": [decide(judged, above=0.8), judged],
    }


def figure(n: dict) -> Figure:
    rows, found = n["settings"], n["detectors"]
    best = max(found, key=lambda k: found[k][0]) if found else "distance"
    said = f"{best} {found[best][0]:.2f} of the area under its ROC" if found else "no labels yet"
    titles = [f"{best}; red: visibly bad", "ROC"]
    fig, (a, b) = panels(titles, f"{len(rows)} settings, good and bad: {said}", width=5, height=7)
    y, colors = range(len(rows))[::-1], [RED if r.get("bad") else BLUE for r in rows.values()]
    a.barh(y, [row[best] for row in rows.values()], color=colors)
    a.set_yticks(y, list(rows), fontsize=6)
    a.set(ylim=(-1, len(rows)))
    for place, (key, color) in enumerate(zip(found, (BLUE, ORANGE, GREEN, GREY, RED)), 2):
        ordered = sorted(rows.values(), key=lambda row: -row[key])
        bad = torch.tensor([row["bad"] for row in ordered]).double()
        hits, alarms = (v.cumsum(0) / v.sum() for v in (bad, 1 - bad))
        b.step(alarms, hits, where="post", color=color)
        at, i = f"{key}: {found[key][0]:.2f}", place * len(bad) // 8
        b.annotate(at, (alarms[i], hits[i]), fontsize=8, color=color)
    b.set(xlabel="good ones flagged", ylabel="bad ones flagged")
    return fig
