"""Figures and README.md out of results/*.json: no result in the report is typed.

report.md is the text, a section under "## name" each, with {{numbers/rows/LCM-LoRA 4/right}}
where a number of its section's JSON belongs, {{table numbers/rows: key; right}} for a row of each
of its entries, and {{gamma/now}} for another section's verdict. Formats: Python's, p (%), v (words
of a list). A number that is not there stops the command; a section whose result is not there, or of
other weights, says so.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from . import setup
from .setup import HERE, content_of, place

UNKNOWN = "not measured on this model yet"
FRONT = HERE.parent / "README.md"


def write_report(claims: dict[str, ModuleType], quick: bool) -> None:
    """README.md and a figure a section, and the front page's table; of a quick run its folder's."""
    results, figures = read_results(place("results", quick), claims), place("figures", quick)
    for name, claim in claims.items():
        (figures / f"{name}.svg").unlink(missing_ok=True)
        if name in results:
            drawing = claim.figure(results[name]["numbers"])
            drawing.savefig(figures / f"{name}.svg", metadata={"Date": None})
    text = assemble((HERE / "report.md").read_text(), claims, results)
    folder, text = (figures, text.replace("figures/", "")) if quick else (HERE, text)
    folder.joinpath("README.md").write_text(text)
    if not quick:
        FRONT.write_text(front_page(FRONT.read_text(), results))
    print(f"report: {len(results)} of {len(claims)} sections, {len(text.split())} words")


def read_results(folder: Path, claims: dict[str, ModuleType]) -> dict[str, dict]:
    """{section: its JSON} of those that were measured on the files that are shipped now."""
    files = {"model": setup.MODEL, "judge": setup.JUDGE, "lcm_lora": setup.LORA}
    now = {name: content_of(path) for name, path in files.items()}.items()
    paths = {name: folder / f"{name}.json" for name in claims}
    results = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    return {name: result for name, result in results.items() if result["weights"].items() <= now}


def assemble(template: str, claims: dict[str, ModuleType], results: dict[str, dict]) -> str:
    """The report: the first part with its table, then a section for each question."""
    now = {name: {"now": UNKNOWN} for name in claims}
    now |= {k: {"now": next(iter(r["verdict"].values()))[0]} for k, r in results.items()}
    hours = sum(r["seconds"] for r in results.values()) / 3600
    first, *parts = re.split(r"^## ", template, flags=re.MULTILINE)
    text = [fill(first, now | {"claims": table(claims, results), "hours": hours})]
    for part in parts:
        name, _, body = part.partition("\n")
        if name in claims:
            body = section(name, claims[name], results.get(name), body)
        text.append(f"## {name}\n{fill(body, now | results.get(name, {}))}")
    return "".join(text).rstrip() + "\n"


def question(claim: ModuleType) -> list[str]:
    """[a section's question, what its docstring says besides]."""
    head, _, rest = claim.__doc__.strip().partition("\n")
    return [head.partition(": ")[2], rest.strip()]


def table(claims: dict[str, ModuleType], results: dict[str, dict]) -> str:
    """A row for each question: its first statement, verdict, number and picture."""
    rows = ["| question | claim | verdict | number | |", "|---|---|---|---|---|"]
    for name, claim in claims.items():
        cells = ["", f"**{UNKNOWN}**", "", ""]
        if name in results:
            statement, (verdict, number) = next(iter(results[name]["verdict"].items()))
            picture = f'<img src="figures/{name}.svg" width="220" alt="{name}">'
            cells = [statement, f"**{verdict}**", form(number), picture]
        rows.append(line([f"[{name}](#{name}): {question(claim)[0]}", *cells]))
    return "\n".join(rows)


def line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def front_page(text: str, results: dict[str, dict]) -> str:
    """The text with a row for each measured statement between its two comments."""
    rows = ["| claim | verdict | number |", "|---|---|---|"]
    for name, result in results.items():
        for statement, (verdict, number) in result["verdict"].items():
            what = f"[{name}](paper/README.md#{name}): {statement}"
            rows.append(line([what, verdict, form(number)]))
    start, end = "<!-- claims, by python -m paper report -->\n", "\n<!-- claims end -->"
    before, _, rest = text.partition(start)
    return before + start + "\n".join(rows) + end + rest.partition(end)[2]


def section(name: str, claim: ModuleType, result: dict | None, body: str) -> str:
    """Question, verdicts, rule and figure, then the section's text; or that there is no result."""
    asked, more = question(claim)
    parts = [f"\n**{asked}**", more]
    if result is None:
        return "\n\n".join([*parts, f"**{UNKNOWN.capitalize()}.**\n\n"])
    verdicts = result["verdict"].items()
    parts.append("\n".join(f"- **{word}**: {what}: {form(n)}" for what, (word, n) in verdicts))
    parts += [f"*Rule.* {result['rule']}", f"![{name}](figures/{name}.svg)", body.strip()]
    hours = f"{result['seconds'] / 3600:.2f} h on {result['processor']}"
    return "\n\n".join([*parts, f"Commit {result['commit']}, {hours}.\n\n"])


def fill(text: str, result: dict) -> str:
    """The text with its numbers. Raises ValueError for one that is not there."""

    def rows(match: re.Match) -> str:
        columns = [column.strip().partition("|") for column in match[2].split(";")]
        found = field(result, match[1]).items()
        entries = [{"key": k, "value": x} | (x if type(x) is dict else {}) for k, x in found]
        return "\n".join(line(form(field(x, k), how) for k, _, how in columns) for x in entries)

    def number(match: re.Match) -> str:
        return form(field(result, match[1]), match[2] or "")

    text = re.sub(r"\{\{table ([^:}]+): ([^}]+)\}\}", rows, text)
    return re.sub(r"\{\{([^}|]+)(?:\|([^}]*))?\}\}", number, text)


def field(result: dict, path: str):
    value = result
    for key in path.strip().split("/"):
        if not isinstance(value, dict) or key not in value:
            raise ValueError(f"report.md: {path.strip()}: no {key!r} in the result; run it again")
        value = value[key]
    return value


def form(value, how: str = "") -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if how == "v":
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, list):
        return "{:.2f} [{:.2f}, {:.2f}]".format(*value)
    return f"{100 * value:.0f} %" if how == "p" else format(value, how)
