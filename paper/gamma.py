"""gamma: What does the fresh noise between the steps do?

The paper's sampler makes all noise fresh at every step (Algorithm 3 of 2310.04378); TCD (2402.19159
Algorithm 4) makes a share gamma of it fresh, down to none.
"""

from matplotlib.figure import Figure

from minilcm.metrics import decide, together

from .charts import ABOUT, BLUE, GREY, LIGHT, ORANGE, line, panels
from .pictures import TEACHER, Draw, about, against, pictures
from .setup import Budget, names_of, prompts_of, shipped_lora

STEPS, GAMMAS = (2, 4, 8), (0.0, 0.3, 0.6, 1.0)


def measure(budget: Budget) -> dict:
    prompts = prompts_of(None, budget.names, each=2)
    groups, lora = names_of(prompts), [(shipped_lora(), 1.0)]
    teacher = pictures(prompts, budget.seeds, TEACHER)
    numbers = {"rows": {}, "fresh": {}, "teacher": about(teacher, teacher, groups)}
    for n in STEPS:
        ways = {f"{g:g}": Draw("lcm", n, gamma=g) for g in GAMMAS} | {"the paper's": Draw("lcm", n)}
        found = {g: pictures(prompts, budget.seeds, draw, lora) for g, draw in ways.items()}
        for g, x in found.items():
            row = {"steps": n, "gamma": g} | about(x, teacher, groups)
            numbers["rows"][f"{n} steps, gamma {g}"] = row
        numbers["fresh"][str(n)] = against(found["1"], found["0"], teacher, groups)
    return numbers


def verdict(n: dict) -> dict:
    """All noise fresh, gamma 1, against none, gamma 0, at 4 and at 8 steps. It carries the picture
    away: its end is further from the teacher's than with gamma 0. It mends: 8 steps are more often
    right.
    """
    far, right = [n["fresh"][k]["distance"] for k in ("4", "8")], n["fresh"]["8"]["right"]
    away = together(decide(x, above=1.0) for x in far)
    return {
        "fresh noise carries the picture away from the teacher's": [away, far[1]],
        "fresh noise makes 8 steps right more often": [decide(right, above=0.0), right],
    }


def figure(n: dict) -> Figure:
    far, right = n["fresh"]["8"]["distance"][0], n["fresh"]["8"]["right"][0]
    title = f"With all noise fresh, 8 steps end {far:.2f} times as far from the teacher's end"
    titles = ABOUT | {"right": f"{ABOUT['right']}; dotted: 50 guided steps"}
    xlabel = "gamma, the share of the noise that is fresh"
    fig, axes = panels(titles.values(), f"{title}; {right:+.2f} in being right", xlabel)
    for ax, what in zip(axes, titles):
        for steps, color in zip(STEPS, (LIGHT, BLUE, ORANGE)):
            mine = [n["rows"][f"{steps} steps, gamma {g:g}"][what] for g in GAMMAS]
            line(ax, GAMMAS, mine, f"{steps} steps", color)
        if what != "distance":
            ax.axhline(n["teacher"][what][0], color=GREY, linestyle=":")
    return fig
