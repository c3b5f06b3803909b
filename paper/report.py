"""Figures and README.md out of results/*.json: no result in the report is typed.

report.md is the text, with {{steps/numbers/rows/LCM-LoRA 4/right|i}} where a number of steps.json
belongs, and {{table steps/numbers/rows: key; evaluations; right|i}} for a row of each of its
entries. Formats: Python's, or i (value and interval), p (%), h (hours), v (a list in words). A
field that is not there stops the command.
"""

import json
import re
from pathlib import Path
from types import ModuleType

from .setup import HERE, place


def write_report(claims: dict[str, ModuleType], quick: bool) -> None:
    """README.md and a figure a claim; of a quick run into its folder. ValueError: no result."""
    results, figures = read_results(place("results", quick)), place("figures", quick)
    for name, claim in claims.items():
        if name not in results:
            raise ValueError(f"no result of {name}; python -m paper {name}{' --quick' * quick}")
        claim.figure(results[name]["numbers"]).savefig(figures / f"{name}.png", dpi=110)
    text = fill((HERE / "report.md").read_text(), results)
    folder, text = (figures, text.replace("](figures/", "](")) if quick else (HERE, text)
    folder.joinpath("README.md").write_text(text)
    print(f"report: {len(claims)} figures, {len(text.split())} words")


def read_results(folder: Path) -> dict:
    """{claim, or claim-seed1: its JSON}, all hours, and whether another seed's verdicts agree."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    results["hours"] = sum(r["seconds"] for r in results.values()) / 3600
    for name in [stem.removesuffix("-seed1") for stem in results if stem.endswith("-seed1")]:
        stands = results[f"{name}-seed1"]["verdict"] == results[name]["verdict"]
        results[f"{name}-seed1"]["stands"] = "stands" if stands else "does not stand"
    return results


def fill(text: str, results: dict) -> str:
    """The text with its numbers. Raises ValueError for a field that is not there."""

    def table(match: re.Match) -> str:
        columns = [column.strip().partition("|") for column in match[2].split(";")]
        lines = []
        for key, row in field(results, match[1]).items():
            row = {"row": row | {"key": key}}
            cells = [form(field(row, f"row/{name}"), how) for name, _, how in columns]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    text = re.sub(r"\{\{table ([^:}]+): ([^}]+)\}\}", table, text)
    return re.sub(
        r"\{\{([^}|]+)(?:\|([^}]*))?\}\}", lambda m: form(field(results, m[1]), m[2] or ""), text
    )


def field(results: dict, path: str):
    value = results
    for key in path.strip().split("/"):
        if not isinstance(value, dict) or key not in value:
            raise ValueError(
                f"report.md: {path.strip()}: no {key!r} in the results; run the section again"
            )
        value = value[key]
    return value


def form(value, how: str) -> str:
    if how == "i":
        return "{:.2f} [{:.2f}, {:.2f}]".format(*value)
    if how == "p":
        return f"{100 * (value[0] if isinstance(value, list) else value):.0f} %"
    if how == "v":
        return ", ".join(map(str, value)) or "none"
    return f"{value / 3600:.2f}" if how == "h" else format(value, how)
