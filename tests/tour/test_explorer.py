"""The explorer: its pictures are the shipped model's, and each control changes what it should."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ROOT

from minilcm.data.pictures import to_images
from minilcm.files.checkpoint import load_model
from minilcm.files.lora_file import read_tau
from minilcm.generate import generate, noise
from minilcm.lcm import lcm_grid, sample_lcm
from minilcm.merge import combine, merge_into
from tour.make_explorer import (
    EVALUATIONS,
    LAMBDAS,
    SEEDS,
    STYLES,
    WEIGHTS,
    plane_of,
)

TOUR = ROOT / "tour"
SAMPLED = {"lcm", "ddim", "dpmpp"}
GAMMAS = {f"gamma{i}" for i in range(4)}
ALL = {"z", "f", "teacher", "end", "plot", "plane", "mixed", *SAMPLED, *GAMMAS}


@pytest.fixture(scope="module")
def data():
    text = (TOUR / "explorer/data.js").read_text()
    return json.loads(text.removeprefix("const DATA = ").removesuffix(";\n"))


# ---- what is drawn


def place(kind: str, column: int, row: int) -> np.ndarray:
    """(128, 128, 3) of the rocket's sheet."""
    box = (128 * column, 128 * row, 128 * (column + 1), 128 * (row + 1))
    return np.array(Image.open(TOUR / f"explorer/{kind}_1.webp").convert("RGB").crop(box), float)


@torch.no_grad()
@pytest.mark.parametrize(
    "kind, column, lambdas",
    [
        ("samplers", EVALUATIONS.index(4), (0, 1)),
        ("blueprint", LAMBDAS.index(1.4) * len(LAMBDAS) + LAMBDAS.index(0.5), (1.4, 0.5)),
    ],
)
def test_the_sheets_are_of_the_shipped_weights(data, kind, column, lambdas):
    """Four steps of seed 2, drawn again, are their place in the sheet, but for WebP's losses."""
    unet, vae, text, _ = load_model(WEIGHTS / "model.safetensors")
    files = "blueprint.safetensors", "lcm_lora.safetensors"
    merge_into(unet, combine([read_tau(WEIGHTS / file) for file in files], lambdas))
    style = ", blueprint style" if kind == "blueprint" else ""
    cond = text.encode([data["prompts"][1].replace("rocket", f"rocket{style}")])
    pixels = generate(lambda z_t, t: unet(z_t, t, cond), [2], (4, 16, 16), decode=vae.decode)
    drawn = np.array(to_images(pixels)[0], float)
    db = 10 * np.log10(255**2 / np.square(drawn - place(kind, column, SEEDS.index(2))).mean())
    assert db > 25  # of another seed, or the lambdas exchanged: below 15


def test_every_column_has_its_place(data):
    """A sheet for each kind and prompt, as large as its choices; 6 MB of them at most."""
    columns = {"steps": 4 * 4, "samplers": 3 * 4 + 1, "gamma": 3 * 4}
    columns |= {style: len(LAMBDAS) ** 2 for style in STYLES}
    sheets = {path.stem: path for path in (TOUR / "explorer").glob("*.webp")}
    n = len(data["prompts"])
    assert sheets.keys() == {f"{kind}_{p}" for kind in columns for p in range(n)}
    for kind, count in columns.items():
        for p in range(n):
            size = Image.open(sheets[f"{kind}_{p}"]).size
            assert size == (128 * count, 128 * len(data["seeds"]))
    assert sum(path.stat().st_size for path in sheets.values()) < 6e6
    assert len(data["paths"]) == n * len(data["seeds"])


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_gamma_is_the_share_of_fresh_noise(schedule, gamma):
    """Of data that is one point c, z_t ~ N(alpha c, sigma^2) at every step, whatever gamma; and the
    noise found at t is in the next z_t' as much as z_s has of it, s = (1 - gamma) t'.
    """
    c, seen = 2.0, []

    def eps_fn(z_t, t):
        alpha, sigma = schedule.at(t, z_t)
        seen.append((t, (z_t - alpha * c) / sigma))
        return seen[-1][1]

    z_T, generators = noise([0], (4, 64, 64))
    alpha, sigma = schedule.at(999, z_T)
    z0 = sample_lcm(eps_fn, alpha * c + sigma * z_T, schedule, lcm_grid(3), generators, gamma)
    for (_, eps), (t, eps_next) in zip(seen, seen[1:]):
        s = int((1 - gamma) * t)
        snr_s, snr_t = (schedule.alpha[x] / schedule.sigma[x] for x in (s, t))
        kept = (eps * eps_next).mean() / eps.square().mean()
        assert eps_next.std().item() == pytest.approx(1, abs=0.03)
        assert kept.item() == pytest.approx((snr_t / snr_s).item(), abs=0.03)
    alpha, sigma = schedule.at(0, z_T)
    torch.testing.assert_close(z0, alpha * c + sigma * seen[-1][1], atol=1e-4, rtol=0)


def test_two_directions_hold_a_path_in_a_plane():
    """Distances in the plane are those of the path; it runs to the right and bends upwards."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(64, 2, generator=generator, dtype=torch.float64))
    s = torch.linspace(0, 1, 51, dtype=torch.float64)
    for x_sign, y_sign in ((1, 1), (-1, 1), (1, -1)):
        flat = torch.stack([9 * x_sign * s, 4 * y_sign * s * (1 - s)], dim=1)  # (51, 2)
        trajectory = (flat @ q.T + 3).reshape(51, 4, 4, 4)
        project, share = plane_of(trajectory)
        at = torch.tensor([project(z) for z in trajectory], dtype=torch.float64)
        assert share == pytest.approx(1)
        torch.testing.assert_close(torch.cdist(at, at), torch.cdist(flat, flat), atol=0.02, rtol=0)
        assert at[-1, 0] > at[0, 0] and at[25, 1] > at[[0, -1], 1].max()


# ---- what is shown


@pytest.fixture
def explorer(page):
    page.goto((TOUR / "explorer.html").as_uri())
    return page


def shown(page) -> dict[str, str]:
    """{id: its picture} of everything that is drawn, when all of it is there."""
    page.evaluate("Promise.all(Object.values(sheets).map((sheet) => sheet.decode()))")
    pairs = "[one.id, one.toDataURL?.() ?? one.outerHTML]"
    return page.eval_on_selector_all(
        "canvas, svg", f"all => Object.fromEntries(all.map((one) => {pairs}))"
    )


def test_each_control_changes_what_it_should(explorer):
    """And nothing else; from the keyboard, where there is a key for it."""
    before = shown(explorer)
    assert before.keys() == ALL and len(set(before.values())) == len(ALL) - 1  # one teacher
    radio, slider = "[name={}][value='{}']".format, "[name={}]".format
    for change, changed in [
        (lambda: explorer.select_option("select", "2"), ALL),
        (lambda: explorer.check(radio("seed", 2)), ALL),
        (lambda: explorer.press(radio("seed", 2), "ArrowRight"), ALL),
        (lambda: explorer.press(slider("step"), "ArrowRight"), {"z", "f"}),
        (lambda: explorer.press("[name=lora]", "Space"), {"z", "f"}),
        (lambda: explorer.press(slider("price"), "ArrowRight"), {*SAMPLED, "plot"}),
        (lambda: explorer.check(radio("gammaSteps", 0)), GAMMAS),
        (lambda: explorer.check(radio("style", 1)), {"plane", "mixed"}),
        (lambda: explorer.press(slider("lambda1"), "ArrowLeft"), {"plane", "mixed"}),
        (lambda: explorer.press(slider("lambda2"), "ArrowLeft"), {"plane", "mixed"}),
        (lambda: explorer.locator("#plane").tap(position={"x": 5, "y": 5}), {"plane", "mixed"}),
        (lambda: explorer.locator("#plane").hover(position={"x": 5, "y": 99}), {"plane", "mixed"}),
    ]:
        change()
        after = shown(explorer)
        assert {name for name in ALL if before[name] != after[name]} == changed
        before = after


def test_a_sheet_that_comes_late_is_not_drawn(explorer):
    """Another prompt was chosen meanwhile."""
    drawn = shown(explorer)
    explorer.evaluate(
        """async () => {
            const come = [], late = {decode: () => new Promise((done) => come.push(done))};
            sheets["explorer/steps_2.webp"] = late;
            for (state.prompt of [2, 1]) render();
            delete sheets["explorer/steps_2.webp"];
            for (const done of come) done();
        }"""
    )
    assert shown(explorer) == drawn


def test_each_picture_is_from_its_place(explorer):
    """Of the sheet, in the order in which make_explorer draws."""
    chosen = {"step": 2, "price": 2, "gammaSteps": 2, "lambda1": 4, "lambda2": 1, "seed": 3}
    explorer.evaluate(f"Object.assign(state, {json.dumps(chosen)}), render()")
    expected = {"f": ("steps", 2 * 2 + 1), "lcm": ("samplers", 2), "ddim": ("samplers", 4 + 2)}
    expected |= {"dpmpp": ("samplers", 8 + 2), "teacher": ("samplers", 12)}
    expected |= {"gamma1": ("gamma", 2 * 4 + 1), "mixed": ("blueprint", 4 * 5 + 1)}
    urls = shown(explorer)
    for name, (kind, column) in expected.items():
        png = base64.b64decode(urls[name].partition(",")[2])
        painted = np.array(Image.open(io.BytesIO(png)).convert("RGB"), float)
        assert np.abs(painted - place(kind, column, 3)).mean() < 2, name
    whole = Image.open(io.BytesIO(base64.b64decode(urls["plane"].partition(",")[2])))
    cell = whole.convert("RGB").crop((64 * 4 + 8, 64 * 3 + 8, 64 * 5 - 8, 64 * 4 - 8))
    there = Image.fromarray(place("blueprint", 21, 3).astype(np.uint8)).resize((64, 64))
    there = there.crop((8, 8, 56, 56))
    assert np.abs(np.array(cell, float) - np.array(there, float)).mean() < 10


def test_the_plane_is_under_the_pointer(explorer, data):
    """lambda1 to the right, lambda2 up; the sliders and the words follow."""
    box = explorer.locator("#plane").bounding_box()
    for i, lambda1 in enumerate(data["lambdas"]):
        j = len(data["lambdas"]) - 1 - i
        x, y = box["width"] * (i + 0.5) / 5, box["height"] * (4.5 - j) / 5
        explorer.locator("#plane").hover(position={"x": x, "y": y})
        assert explorer.text_content("#l1") == f"{lambda1:g}"
        assert explorer.text_content("#l2") == f"{data['lambdas'][j]:g}"
        assert explorer.input_value("[name=lambda2]") == str(j)


def test_what_is_said_is_equal_evaluations(explorer, data):
    """n steps of LCM, n/2 guided steps of the others, and the distances of data.js."""
    for i, n in enumerate(EVALUATIONS):
        explorer.locator("[name=price]").fill(str(i))
        for name, count in (("lcm", f"{n} step"), ("ddim", f"{n // 2} guided step")):
            says = explorer.text_content(f"#{name}-says")
            away = data["distance"][f"{name}{n}"]
            mean = f"(on average {sum(away) / len(away):.2f})"
            assert says.startswith(count) and says.endswith(mean)
            assert f"{n} evaluations, {away[len(data['seeds']) + 1]:.2f} from the teacher" in says


def test_it_can_be_read_by_everyone(explorer):
    """Alternative texts, names of controls, a focus that is seen, light and dark, 360 pixels."""
    for name in ALL:
        label = explorer.get_attribute(f"#{name}", "aria-label")
        assert "rocket" in label if name != "plot" else "LCM-LoRA ends" in label
    assert explorer.get_attribute("[name=step]", "aria-valuetext") == "1 of 4, t = 999"
    unnamed = "[...document.querySelectorAll('input, select')].filter((x) => !x.labels.length)"
    assert explorer.evaluate(f"{unnamed}.length") == 0
    controls = explorer.evaluate("Object.keys(state)")
    for name in ["a link", *controls]:
        explorer.keyboard.press("Tab")
        style = explorer.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert style == "solid"
        at = explorer.evaluate("document.activeElement.name")
        assert at == name or name == "a link"
    assert explorer.evaluate("document.documentElement.scrollWidth") <= 360
    grounds = set()
    for scheme in ("light", "dark"):
        explorer.emulate_media(color_scheme=scheme)
        grounds.add(explorer.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2
