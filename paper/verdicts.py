"""When has a claim held? One rule a section, in words and in code, side by side; written before the first full run.

Each function takes the section's numbers and says "held", "held in part" or "did not hold". An interval is [mean, low,
high]: "surely" means that the whole of it lies there.
"""


def memory(n: dict) -> str:
    """Held if, on every full-size base, an LCM-LoRA takes half of full distillation's memory or less, and trains the
    report's number of parameters to 1 %.
    """
    held = all(p["share"] <= 0.5 and abs(p["off"]) <= 0.01 for p in n["planned"].values())
    return "held" if held else "did not hold"


def steps(n: dict) -> str:
    """Held if 4 steps reach 0.95 and 2 steps 0.85 of DDIM 50 in prompt accuracy, and 4 steps are surely better than
    every solver, guided or not, at as many evaluations or fewer; in part if 4 steps reach 0.9 and are better, but
    not so surely.
    """
    rows, four = n["rows"], n["rows"]["LCM-LoRA 4"]
    solvers = [r for label, r in rows.items() if r["solver"] and r["evaluations"] <= four["evaluations"]]
    share, two = four["share"][0], rows["LCM-LoRA 2"]["share"][0]
    if share >= 0.95 and two >= 0.85 and all(r["four against it"][1] > 0 for r in solvers):
        return "held"
    return "held in part" if share >= 0.9 and all(r["four against it"][0] > 0 for r in solvers) else "did not hold"


def combination(n: dict) -> str:
    """A style fails if accuracy or style is more than 0.1 below the style LoRA alone at 25 guided steps; styles whose
    LoRA alone is below 0.5 in either have nothing to lose and are not counted. Held if none fails; in part if less
    than half.
    """
    if n["failed"] == 0 < n["measurable"]:
        return "held"
    return "held in part" if 2 * n["failed"] < n["measurable"] else "did not hold"


def base(n: dict) -> str:
    """Held if, on every base, the shipped vector is surely better than none, and a short vector of the old base is not
    surely worse by 0.05 than the same made there; in part if the first only.
    """
    bases = n["bases"].values()
    if not all(b["shipped against none"][1] > 0 for b in bases):
        return "did not hold"
    return "held in part" if any(b["short against there"][2] < -0.05 for b in bases) else "held"


def rank(n: dict) -> str:
    """The report adapts with rank 64 and says that a low rank is enough. Held if some rank of 16 or less is not surely
    worse than the highest by 0.03 in prompt accuracy at 4 steps.
    """
    low = [row for r, row in n["trained"].items() if int(r) <= 16]
    return "held" if any(row["against the highest"][2] >= -0.03 for row in low) else "did not hold"


def solver(n: dict) -> str:
    """Held if the error to the trajectory's end falls to half or less, and one evaluation comes surely nearer to that
    end than any solver in one or two, guided or not; in part if one of the two.
    """
    few = [r for label, r in n["distance"].items() if r["solver"] and r["evaluations"] <= 2]
    both = [n["error left"] <= 0.5, all(r["one step against it"][2] < 0 for r in few)]
    return "held" if all(both) else "held in part" if any(both) else "did not hold"


def recipe(n: dict) -> str:
    """LCM-LoRA simplifies LCM: a fixed w that the network is not told, and no averaged target. Held if no row that
    takes a simplification back is surely better than the baseline at 4 steps.
    """
    back = [row for label, row in n["rows"].items() if row["takes back"]]
    return "did not hold" if any(row["against baseline"][1] > 0 for row in back) else "held"


def fail(n: dict) -> str:
    """A case is flagged, without a judge, if sharpness is off by 15 % or the error to the teacher's end by 25 %, both
    against the good case of the same base, or if the norm of the delta is 0. Held if every case that is surely
    worse is flagged, and no good one; in part if every bad one.
    """
    bad = [c for c in n["cases"].values() if c["against good"][2] < 0]
    missed, alarms = any(not c["flagged"] for c in bad), any(c["flagged"] for c in n["cases"].values() if c["control"])
    return "did not hold" if missed or not bad else "held in part" if alarms else "held"


RULES = {f.__name__: f for f in (memory, steps, combination, base, rank, solver, recipe, fail)}
