"""The chapters of the tour say what the code is, and what they tell a reader to do works."""

import ast
import importlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from tiny import ROOT

import sample
import train
from minilcm.__main__ import parse as parse_minilcm
from tour import check, make

TOUR = ROOT / "tour"
CHAPTERS = [path for path in make.chapters() if path.name[:2].isdigit()]
MEASURED = json.loads((TOUR / "figures/numbers.json").read_text())
ANSWERS = Path(__file__).parent / "answers.py"

# ---- what is filled in


def test_code_and_numbers_are_those_of_today():
    """Else it exits with the stale chapters, or the weights that are not those measured."""
    make.main(["--check"])


def test_a_stale_chapter_is_noticed(tmp_path, monkeypatch):
    """Changed code, a changed number and another model's weights: each named, exit 1."""
    shutil.copytree(TOUR, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(make, "HERE", tmp_path)
    for name, old, new in (
        ("01_noise.md", "alpha * z0 + sigma", "alpha * z0 + alpha"),
        ("03_blur.md", "-->0.017<", "-->0.018<"),
    ):
        text = (tmp_path / name).read_text()
        assert text.count(old) == 1 + (name[0:2] == "01")  # there also in "Break it"
        (tmp_path / name).write_text(text.replace(old, new, 1))
    measured = MEASURED | {"weights": MEASURED["weights"] | {"model.safetensors": "0"}}
    (tmp_path / "figures/numbers.json").write_text(json.dumps(measured))
    with pytest.raises(SystemExit) as stop:
        make.main(["--check"])
    told = str(stop.value)
    assert "01_noise.md is stale" in told and "03_blur.md is stale" in told
    assert "model.safetensors has changed" in told and "02_" not in told
    make.main([])
    assert (tmp_path / "03_blur.md").read_text() == (TOUR / "03_blur.md").read_text()


@pytest.mark.parametrize(
    "marker", ["minilcm.lcm.no_such", "minilcm.none.f", 'minilcm.lcm.huber "a - b" "no such line"']
)
def test_a_symbol_that_is_gone_is_named(marker):
    with pytest.raises(ValueError, match="no such|there is no minilcm"):
        make.filled(f"<!-- code: {marker} -->\n```python\n```\n", MEASURED)


def test_a_number_of_another_page_is_the_one_there():
    """The number after a text; a page that no longer says so is named."""
    text = "<!-- = said('{}', 'LCM-LoRA, 1 steps') -->?<!-- . -->"
    there = (ROOT / "weights/emoji/README.md").read_text().split("LCM-LoRA, 1 steps: ")[1].split()
    assert f"-->{there[0]}<!--" in make.filled(text.format("weights/emoji/README.md"), MEASURED)
    with pytest.raises(ValueError, match="README.md has no number after 'LCM-LoRA, 1 steps'"):
        make.filled(text.format("README.md"), MEASURED)


def figures(folder: Path, monkeypatch, numbers: list[int]) -> dict:
    """Draw the figures of these chapters into the folder; their numbers."""
    pytest.importorskip("matplotlib")
    from tour import panels

    monkeypatch.setattr(panels, "HERE", folder)
    monkeypatch.setattr(make, "HERE", folder)
    (folder / "figures").mkdir()
    make.measure(numbers)
    for i in numbers:
        assert (folder / f"figures/{i:02d}.png").stat().st_size > 5000
    return json.loads((folder / "figures/numbers.json").read_text())


def test_figures_have_the_numbers_in_the_text(tmp_path, monkeypatch):
    """Of two that take few seconds, to 2 %: other processors round otherwise."""
    drawn = figures(tmp_path, monkeypatch, [2, 6])
    assert drawn.pop("weights") == MEASURED["weights"] and len(drawn) == 2

    def leaves(x, path=""):
        if not isinstance(x, dict | list):
            return {path: x}
        items = x.items() if isinstance(x, dict) else enumerate(x)
        return {k: v for key, y in items for k, v in leaves(y, f"{path}/{key}").items()}

    committed = leaves({chapter: MEASURED[chapter] for chapter in drawn})
    assert leaves(drawn) == pytest.approx(committed, rel=0.02, abs=1e-6)


def test_the_figure_of_full_size(tmp_path, monkeypatch):
    """Parameters of the official UNets and of their LCM-LoRAs, and bytes."""
    full = figures(tmp_path, monkeypatch, [10])["full_size"]
    assert full == MEASURED["full_size"]
    assert full["SD-V1.5"]["unet"] == 859_520_964 and full["SD-V1.5"]["lora"] == 67_252_224
    assert full["SDXL"]["lora"] == 196_751_360
    assert full["SDXL"]["lora_gb"] == round(2 * 2.567463684 + 16 * 0.19675136, 2)


@pytest.mark.parametrize("path", make.chapters(), ids=lambda path: path.stem)
def test_a_page_renders(path):
    """No line begins with a number's comment, which would end the paragraph (CommonMark 4.6); code
    fences and <details> are closed; every link and picture leads to a file, every anchor to a
    heading; every test it names exists.
    """
    text = path.read_text()
    assert not re.search(r"^ {0,3}<!-- =", text, re.M)
    assert text.count("```") % 2 == 0 and text.count("<details>") == text.count("</details>")
    tests = "".join(x.read_text() for x in (ROOT / "tests").rglob("test_*.py"))
    assert all(f"def {name}(" in tests for name in re.findall(r"\btest_\w+(?!\w|\.py)", text))
    for link in re.findall(r"\]\(([^)#\s]*(?:#[^)\s]*)?)\)", text):
        file, _, anchor = link.partition("#")
        if not file.startswith("http"):
            target = path.parent / file if file else path
            assert target.exists(), link
            heads = re.findall(r"^#+ (.*)", target.read_text(), re.M) if anchor else []
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads]
            assert not anchor or anchor in slugs, link


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_chapter_has_all_parts(path):
    """A question, a figure of at most 150 kB, something to predict and break, two exercises."""
    text, number = path.read_text(), int(path.name[:2])
    assert "**Question: " in text and f"(figures/{number:02d}.png)" in text
    assert (TOUR / f"figures/{number:02d}.png").stat().st_size <= 150_000
    assert "\n## Predict before you run\n" in text and "<details><summary>Answer" in text
    asked = re.findall(r"- \*\*(\d+[ab])\*\* `(\w+)\(", text)
    pair = [f"{number}a", f"{number}b"]
    assert asked == [(n, name) for name, n in check.NUMBERS.items() if n in pair] != []


def test_links_go_both_ways():
    """A docstring that names a chapter is of a function whose code the chapter shows."""
    found = 0
    for path in sorted((ROOT / "minilcm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                for number in re.findall(r"\(tour/(\d\d)\)", ast.get_docstring(node) or ""):
                    (chapter,) = TOUR.glob(f"{number}_*.md")
                    assert f"code: minilcm.{path.stem}.{node.name}" in chapter.read_text()
                    found += 1
    assert found == 9


COMMAND = re.compile(r"^python (sample\.py|train\.py|-m minilcm) (.*)", re.M)


@pytest.mark.parametrize("path", make.chapters(), ids=lambda path: path.stem)
def test_commands_are_understood(path):
    """Every flag of every command for a script or for `python -m minilcm` exists."""
    text = path.read_text().replace("\\\n", " ")
    commands = [
        x for block in re.findall(r"```bash\n(.*?)```", text, re.S) for x in block.splitlines()
    ]
    commands += re.findall(r"`(python .*?)`", text)
    parsers = {"sample.py": sample.parse, "train.py": train.parse, "-m minilcm": parse_minilcm}
    for command in " ; ".join(commands).replace("do ", "; ").replace("$n", "4").split(";"):
        for script, flags in COMMAND.findall(command.strip()):
            parsers[script](shlex.split(flags, comments=True))


# ---- break it

BREAK = re.compile(
    r"[Ii]n\s+`([\w/.]+)`:\n\n```diff\n-(.*)\n\+(.*)\n```\n\n`pytest -n 0 (\S+)` fails"
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the package and its tests, to be broken."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("minilcm", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", folder)
    return folder


def run_tests(folder: Path, nodes: list[str]) -> None:
    """In a forked process, which has torch already: exits with pytest's code."""
    os.chdir(folder)
    sys.dont_write_bytecode = True
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(f"{ROOT}/"):
            del sys.modules[name]
    importlib.invalidate_caches()
    # setup.cfg's pythonpath puts the copy's folders before those of the tests that run here
    how = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    os._exit(pytest.main([*how, *nodes]))


def code_of(folder: Path, nodes: list[str]) -> int:
    """pytest's exit code: 0, all passed; 1, some failed; above, they could not be run."""
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(folder, nodes))
    process.start()
    process.join()
    return process.exitcode


def test_the_tests_pass_before_anything_is_broken(copy):
    assert code_of(copy, [BREAK.search(path.read_text())[4] for path in CHAPTERS]) == 0


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_breaking_it_fails_the_test_that_is_named(copy, path):
    """The one line is in the file once; with the other in its place the test runs and fails."""
    file, old, new, node = BREAK.search(path.read_text()).groups()
    text = (copy / file).read_text()
    assert text.count(f"\n{old}\n") == 1
    try:
        (copy / file).write_text(text.replace(f"\n{old}\n", f"\n{new}\n"))
        assert code_of(copy, [node]) == 1
    finally:
        (copy / file).write_text(text)


# ---- exercises


def test_right_answers_are_right(capsys):
    with pytest.raises(SystemExit) as stop:
        check.main(str(ANSWERS))
    lines = capsys.readouterr().out.splitlines()
    assert not stop.value.code and len(lines) == 20
    assert all(line.endswith(": right") for line in lines), lines


@pytest.mark.parametrize("path", [[], ["no_such.py"]])
def test_without_answers_it_says_what_to_give(path):
    with pytest.raises(SystemExit, match="give the one with your answers"):
        check.main(*path)


@pytest.mark.parametrize("name", check.EXERCISES)
def test_wrong_answers_are_not(name):
    """What returns 0, nothing, or raises is told apart from what is right, in one line."""

    def fails(*args):
        raise RuntimeError("oops")

    for wrong in (lambda *args: 0, lambda *args: None, fails):
        told = check.verdict(name, wrong)
        assert "right" not in told and "\n" not in told and name in told
