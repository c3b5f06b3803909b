"""no_pictures: Can it be distilled without the pictures that the base was trained on?

Who distils a checkpoint seldom has its training pictures (luosiallen/latent-consistency-model#55).
Instead the teacher can draw its own, guided, 25 steps each, as `train.py --data prompts.txt` does.
"""

from matplotlib.figure import Figure

from .charts import three
from .setup import Budget
from .training import as_good, compare, learned, runs_of, short

ROWS = {"the art": "art", "half of each": "half", "the teacher's own pictures": "teacher"}


def measure(budget: Budget) -> dict:
    rows = {k: runs_of(short(budget)._replace(data=data), budget) for k, data in ROWS.items()}
    return {"rows": compare(rows, budget, "the art")}


def verdict(n: dict) -> dict:
    """As good as on the art: less than 0.1 below in being right, and 10 % in sharpness, at 4 steps;
    and at one step it ends nearer to the teacher's end than halfway from the art's to no LoRA.
    Nothing is compared unless the art's beats no LoRA in distance at one step.
    """
    rows, (_, half, own) = n["rows"], ROWS
    return {
        f"{own} in place of the art: as good": as_good(rows, rows[own]["against"]),
        f"{half} in place of the art: as good": as_good(rows, rows[half]["against"]),
        "on the art it beats no LoRA in distance at 1 step": learned(rows),
    }


def figure(n: dict) -> Figure:
    far = n["rows"]["the teacher's own pictures"]["against"]["1"]["distance"][0]
    title = f"Distilled on the teacher's own pictures one step ends {far:.2f} times as far away"
    return three(n["rows"], title)
