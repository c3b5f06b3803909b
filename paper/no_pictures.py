"""no_pictures: Can it be distilled without the pictures that the base was trained on?

Who distils a checkpoint seldom has its training pictures (luosiallen/latent-consistency-model#55).
Instead the teacher can draw its own, guided, 25 steps each, as `train.py --data prompts.txt` does.
(About 0.5 h, of which 0.4 training.)
"""

from matplotlib.figure import Figure

from .charts import three
from .setup import Budget
from .training import as_good, compare, runs_of, short

ROWS = {"the art": "art", "half of each": "half", "the teacher's own pictures": "teacher"}


def measure(budget: Budget) -> dict:
    rows = {k: runs_of(short(budget)._replace(data=data), budget) for k, data in ROWS.items()}
    return {"rows": compare(rows, budget)}


def verdict(n: dict) -> dict:
    """As good as on the art: less than 0.05 below in being right at 4 steps, and less than 5 %
    further from the teacher's end at one.
    """
    _, half, own = ROWS
    rows = {label: n["rows"][label]["against"] for label in (own, half)}
    return {
        f"{label} in place of the art: as good": [as_good(row), row["1"]["distance"]]
        for label, row in rows.items()
    }


def figure(n: dict) -> Figure:
    far = n["rows"]["the teacher's own pictures"]["against"]["1"]["distance"][0]
    title = f"Distilled on the teacher's own pictures one step ends {far:.2f} times as far away"
    return three(n["rows"], title)
