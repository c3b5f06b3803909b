"""2 steps: how good are 1 to 8 steps, at equal network evaluations?

Claim (abstract, Fig. 2): pictures of high quality in very few steps, 1 to 4.
"""

import torch
from matplotlib.figure import Figure

from minilcm.metrics import interval

from .charts import BLUE, GREY, LIGHT, ORANGE, SAMPLERS, line, panels
from .pictures import (
    FOUR,
    SOLVERS,
    TEACHER,
    Draw,
    Vectors,
    drawn,
    held_out_art,
    pictures,
    rms,
    save_sheet,
)
from .setup import Budget, W, pairs, prompts_of, shipped_lora

CONTENT = {
    "living": "cactus, sunflower, evergreen tree, mushroom, penguin, cat face, dog face, frog, "
    "tropical fish, octopus, snail, butterfly, lady beetle",
    "food": "pizza, red apple, banana, strawberry, carrot, hamburger, soft ice cream, doughnut, "
    "birthday cake, hot beverage, cherries, watermelon, grapes, pineapple, lemon",
    "tools and toys": "umbrella, guitar, soccer ball, basketball, balloon, wrapped gift, key, "
    "scissors, light bulb, alarm clock, crown, t shirt, trophy, camera, television, mobile phone, "
    "hammer, bomb, bell, drum, gem stone, locked",
    "places and signs": "rocket, sailboat, automobile, bicycle, airplane, house, fire, rainbow, "
    "star, snowman without snow, red heart, ghost, skull, robot",
}
CATEGORY = {name: category for category, names in CONTENT.items() for name in names.split(", ")}
SHOWN = (
    "LCM-LoRA 1",
    "LCM-LoRA 2",
    "LCM-LoRA 4",
    "LCM sampler, no LoRA, 4",
    "DDIM 2",
    "DDIM, no guidance, 4",
    "DPM-Solver++ 2",
    "DPM-Solver++, no guidance, 4",
)


def samplers(counts: tuple[int, ...]) -> dict[str, tuple[Draw, Vectors]]:
    """{label: how it draws, in so many steps}: LCM with and without the LoRA, solvers, guidance."""
    lora = [(shipped_lora(), 1.0)]
    rows = {f"LCM-LoRA {n}": (Draw("lcm", n), lora) for n in counts}
    rows |= {f"LCM sampler, no LoRA, {n}": (Draw("lcm", n), []) for n in counts}
    for sampler, label in SOLVERS.items():
        rows |= {f"{label} {n}": (Draw(sampler, n, W), []) for n in counts}
        rows |= {f"{label}, no guidance, {n}": (Draw(sampler, n), []) for n in counts}
    return rows


def about(label: str, draw: Draw) -> dict:
    """What a row of `samplers` is; a solver is a rival of the LCM-LoRA at as many evaluations."""
    sampler = label.rstrip("0123456789").rstrip(" ,")
    return {
        "sampler": sampler,
        "solver": draw.sampler in SOLVERS and draw != TEACHER,
        "evaluations": draw.evaluations,
    }


def measure(budget: Budget) -> dict:
    prompts = prompts_of("all", budget.prompts)
    counts = (2, 4) if budget.quick else (1, 2, 3, 4, 6, 8)
    rows = samplers(counts)
    teacher = pictures(prompts, budget.seeds, TEACHER)
    four = pictures(prompts, budget.seeds, FOUR, [(shipped_lora(), 1.0)])
    held = torch.tensor([p.held_out for p in prompts])
    groups = pairs(prompts)
    art = held_out_art(None, 2 * budget.looks)
    sharp, content = art["sharpness"].mean().item(), [CATEGORY[p.name] for p in prompts]
    # which prompts
    by_content = {c: torch.tensor([mine == c for mine in content]) for c in dict.fromkeys(content)}
    numbers = {"prompts": len(prompts), "seeds": len(budget.seeds), "rows": {}}
    numbers["art"] = {"right": art["right"].mean().item(), "sharpness": sharp}
    for label, (draw, vectors) in {"DDIM 50": (TEACHER, []), **rows}.items():
        x = pictures(prompts, budget.seeds, draw, vectors)
        numbers["rows"][label] = about(label, draw) | {
            "steps": draw.steps,
            "right": interval(x["right"], groups=groups),
            "share": interval(x["right"], teacher["right"], ratio=True, groups=groups),
            "seen": interval(x["right"][~held], groups=groups[~held]),
            "held out": interval(x["right"][held], groups=groups[held]),
            "four against it": interval(four["right"], x["right"], groups=groups),
            "distance": interval(rms(x["z0"], teacher["z0"]), groups=groups),
            "sharpness": [v / sharp for v in interval(x["sharpness"][held], groups=groups[held])],
            "content": {
                c: interval(x["right"][i], groups=groups[i]) for c, i in by_content.items()
            },
        }
    reach = [n for n in counts if numbers["rows"][f"LCM-LoRA {n}"]["share"][0] >= 0.9]
    numbers["fewest"] = min(reach, default="none")
    eight = list(range(0, len(prompts), max(1, len(prompts) // 8)))[:8]
    some = {label: rows[label] for label in SHOWN if label in rows}
    sheet = {
        f"{label} ({how[0].evaluations} ev.)": drawn(prompts, budget.seeds, *how)[eight, 0]
        for label, how in some.items()
    }
    save_sheet("steps", sheet, [prompts[i].name for i in eight], budget)
    return numbers


def verdict(n: dict) -> str:
    """Held if 4 steps reach 0.95 and 2 steps 0.85 of DDIM 50 in prompt accuracy, and 4 steps are
    surely better than every solver, guided or not, at as many evaluations or fewer; in part if 4
    steps reach 0.9 and are better, but not so surely.
    """
    rows, four = n["rows"], n["rows"]["LCM-LoRA 4"]
    solvers = [
        r for label, r in rows.items() if r["solver"] and r["evaluations"] <= four["evaluations"]
    ]
    share, two = four["share"][0], rows["LCM-LoRA 2"]["share"][0]
    if share >= 0.95 and two >= 0.85 and all(r["four against it"][1] > 0 for r in solvers):
        return "held"
    return (
        "held in part"
        if share >= 0.9 and all(r["four against it"][0] > 0 for r in solvers)
        else "did not hold"
    )


def figure(n: dict) -> Figure:
    fig, (a, b, c) = panels(
        3, "Quality by network evaluations; a guided step of DDIM or DPM-Solver++ costs two"
    )
    rows = n["rows"]
    for sampler, (color, mark) in SAMPLERS.items():
        mine = [r for r in rows.values() if r["sampler"] == sampler and r["steps"] < 50]
        x = [r["evaluations"] for r in mine]
        line(a, x, [r["right"] for r in mine], sampler, color, mark)
        b.plot([r["sharpness"][0] for r in mine], [r["right"][0] for r in mine], mark, color=color)
        for r in mine[:1] + mine[1:][-1:]:
            at = r["sharpness"][0], r["right"][0]
            b.annotate(r["evaluations"], at, xytext=(4, 3), textcoords="offset points", fontsize=7)
    best, label = rows["DDIM 50"], "DDIM 50 (100 evaluations)"
    a.axhline(best["right"][0], color=ORANGE, linestyle=":", label=label)
    b.plot(best["sharpness"][0], best["right"][0], "*", color=ORANGE, markersize=11)
    b.axvline(1, color="0.4", linestyle=":")
    a.set(xlabel="network evaluations", ylabel="prompt accuracy", title="shows what was asked for")
    title = "right and sharp: up and to the right; the art at 1,\nnumbers are evaluations"
    b.set(xlabel="sharpness, of the art's", ylabel="prompt accuracy", title=title)
    a.legend(fontsize=7)
    few = ("LCM-LoRA 1", "LCM-LoRA 2", "LCM-LoRA 4", "DDIM 50")
    for i, (label, color) in enumerate(zip(few, (GREY, LIGHT, BLUE, ORANGE))):
        if label in rows:
            content = rows[label]["content"]
            line(
                c,
                [j + 0.2 * i - 0.3 for j in range(len(content))],
                list(content.values()),
                label,
                color,
                "o",
            )
            c.set_xticks(range(len(content)), content, fontsize=8)
    c.set(title="by content", ylabel="prompt accuracy")
    c.legend(fontsize=7)
    return fig
