"""What the questions share: prompts, pictures from fixed seeds, short training runs, a cache."""

import json

import pytest
import torch
from PIL import Image
from tiny import random_tau, tiny_unet

from minilcm import lcm
from minilcm.data.emoji import STYLES, Cache, read_art
from minilcm.files.checkpoint import load_model
from minilcm.files.lora_file import read_recipe
from minilcm.lora import add_lora, get_tau
from minilcm.merge import merge_into
from minilcm.objective import loss_of, make_networks, without_w
from minilcm.solver import sample_ddim, trailing_grid
from paper import __main__ as command
from paper import pictures, setup, solver, training
from weights.emoji import styles

PROMPTS = [
    setup.Prompt("pizza, sepia style", "pizza", "sepia"),
    setup.Prompt("red apple, noto style", "red apple", "noto"),
]


# ---- set-up


def test_w_is_the_shipped_models():
    """The paper's w: what the shipped LCM-LoRA has distilled in, 1 less than the model's own
    guidance scale, and what teacher and short recipes have; budgets do not change it.
    """
    assert setup.W == float(read_recipe(setup.EMOJI / "lcm_lora.safetensors")["w"])
    assert setup.W == load_model(setup.EMOJI / "model.safetensors").config.guidance - 1
    assert pictures.TEACHER == ("ddim", 50, setup.W, None) and pictures.FOUR.w == 0
    assert pictures.SLOW == ("ddim", 25, setup.W, None)
    assert solver.EXACT == ("ddim", 100, setup.W, None)
    for budget in (setup.QUICK, setup.FULL):
        objective = training.objective_of(training.short(budget))
        assert objective.kind == "lcm" and objective.w_range == (setup.W, setup.W)
        assert objective.k == 300 and objective.psi_steps == 3


@pytest.mark.parametrize("most", [6, 64])
def test_some_prompts_are_spread_over_all_names(most):
    """64 of the 300 names at most, in two of the styles that the base saw them in; more styles or
    fewer names leave the others as they are.
    """
    one, two = (setup.prompts_of(None, most, each) for each in (1, 2))
    names = setup.shipped().config.names
    assert len({p.name for p in one}) == len(one) == most and two[:most] == one
    assert all(a.name == b.name and a.style != b.style for a, b in zip(two, two[most:]))
    assert names.index(one[-1].name) >= 300 - 300 // most - 5
    seen = {(a.name, a.style) for a in setup.art_of(None)[0]}
    assert {(p.name, p.style) for p in two} <= seen
    assert all(p.text.startswith(f"{p.name}, {p.style} style, on a") for p in two)


def test_prompts_in_a_new_style_ask_for_what_was_drawn_in_it():
    for style, art in (("blob", setup.art_of("blob")), ("slim", setup.art_of("slim"))):
        prompts, drawn = setup.prompts_of(style, 64), {a.name for part in art for a in part}
        assert len(prompts) == 64 and {p.name for p in prompts} <= drawn
        assert {p.style for p in prompts} == {style}
        assert not any("black background" in p.text for p in prompts)


def test_prompts_of_one_name_have_one_number():
    prompts = setup.prompts_of(None, 6, each=2)
    assert setup.names_of(prompts).tolist() == [0, 1, 2, 3, 4, 5] * 2


def test_a_part_is_made_once(tmp_path, monkeypatch):
    """The same key: read; another: made."""
    monkeypatch.setattr(setup, "CACHE", tmp_path)
    made = []

    def make():
        made.append(1)
        return {"x": torch.ones(2)}

    for key in ("a", "a", "b"):
        assert torch.equal(setup.cached("part", key, make)["x"], torch.ones(2))
    assert len(made) == 2 and len(list(tmp_path.iterdir())) == 2


def test_another_judge_looks_at_the_same_pictures(tmp_path, monkeypatch):
    """What is drawn and trained is kept, what it finds is not; another model makes all anew."""
    monkeypatch.setattr(setup, "CACHE", tmp_path)
    made = []

    def names_made() -> list[str]:
        made.clear()
        for name in ("trained", "drawn", "pictures", "held-out"):
            setup.cached(name, "a", lambda: made.append(name) or {"x": torch.ones(1)})
        return made

    assert len(names_made()) == 4 and names_made() == []
    for constant, anew in (("JUDGE", ["pictures", "held-out"]), ("MODEL", [])):
        other = tmp_path / f"{constant}.safetensors"
        other.write_bytes(b"another")
        monkeypatch.setattr(setup, constant, other)
        assert names_made() == (anew or ["trained", "drawn", "pictures", "held-out"])


def test_a_claim_takes_as_long_as_if_nothing_had_been_kept(tmp_path, monkeypatch):
    """A part read from the cache counts with what it took when made; one made now counts once."""

    def measure(budget):
        setup.spent["kept from another day"] = 1000.0
        setup.spent["made now"] = 200.0
        setup.spent_now.append(200.0)
        setup.used["model"] = "a hash"
        return {"planned": {"a": {"times": 3.0, "off": 0.0}}}

    clock = iter([0.0, 207.0])
    monkeypatch.setattr(setup, "CACHE", tmp_path)
    monkeypatch.setattr(command.memory, "measure", measure)
    monkeypatch.setattr(command.time, "perf_counter", lambda: next(clock))
    setup.used["lcm_lora"] = "of the section before"
    command.measure_claim("memory", quick=True)
    result = json.loads((tmp_path / "quick/memory.json").read_text())
    assert result["seconds"] == 1207 and result["weights"] == {"model": "a hash"}


def test_a_result_is_of_a_commit(monkeypatch):
    """Nothing is measured while the code differs from its commit."""
    monkeypatch.setattr(command, "git", lambda *argv: " M paper/steps.py")
    with pytest.raises(ValueError, match="commit first: .* paper/steps.py is not"):
        command.measure_claim("steps", quick=False)


# ---- pictures


def test_changed_leaves_no_trace():
    """Inside: other weights and sum_i lambda_i tau_i. After it, or an error: all bits as before."""
    unet, vector = setup.shipped().unet, setup.shipped_lora()
    before = {k: x.clone() for k, x in unet.state_dict().items()}
    base = pictures.Base("moved", {k: x + 1e-3 for k, x in before.items()})
    with pytest.raises(KeyboardInterrupt):
        with pictures.changed(unet, base, [(vector, 0.25), (vector, 0.5)]):
            inside = {k: x.clone() for k, x in unet.state_dict().items()}
            raise KeyboardInterrupt
    assert all(torch.equal(x, before[k]) for k, x in unet.state_dict().items())
    expected = {k: x.clone() for k, x in base.weights.items()}
    merge_into(expected, vector.tau, 0.75)
    assert all(torch.allclose(x, expected[k], atol=1e-6) for k, x in inside.items())


def test_what_a_drawing_costs():
    """A guided step evaluates the network twice."""
    how = (("ddim", 4, 3.0), ("ddim", 4), ("lcm", 4), ("lcm", 4, 0.0, 0.5))
    assert [pictures.Draw(*x).evaluations for x in how] == [8, 4, 4, 4]


def by_hand(w: float, steps: int, seed: int) -> torch.Tensor:
    """z0 of PROMPTS by guided DDIM, one picture at a time."""
    model, z0 = setup.shipped(), []
    network = without_w(model.unet, setup.HALF)
    for i, prompt in enumerate(PROMPTS):
        z_T = torch.randn(
            1, *model.shape, generator=torch.Generator().manual_seed(100_003 * seed + i)
        )

        def eps_fn(z_t, t, text=prompt.text):
            t = torch.tensor([t])
            eps = network(z_t, t, model.text.encode([text])).float()
            return eps + w * (eps - network(z_t, t, model.text.null_cond(1)).float())

        z0.append(sample_ddim(eps_fn, z_T, setup.SCHEDULE, trailing_grid(steps)))
    return torch.cat(z0)


def test_pictures_are_drawn_from_their_own_seeds():
    """z0[i, j] has prompt i, the noise of the j-th seed's i-th picture, and guidance w."""
    for w in (0.0, 3.0):
        z0 = pictures.drawn(PROMPTS, (0, 2), pictures.Draw("ddim", 3, w))
        for j, seed in enumerate((0, 2)):
            torch.testing.assert_close(z0[:, j], by_hand(w, 3, seed), rtol=0.05, atol=0.05)
    assert pictures.rms(by_hand(0.0, 3, 0), by_hand(3.0, 3, 0)).min() > 0.2


def test_no_two_pictures_of_a_seed_have_the_same_noise(monkeypatch):
    """Also where they are drawn in several batches of 64; another seed's noise is another."""
    asked = []

    def remember(eps_fn, seeds, shape, *how, **more):
        asked.extend(seeds)
        return torch.zeros(len(seeds), *shape)

    monkeypatch.setattr(pictures, "generate", remember)
    pictures.drawn(PROMPTS * 65, (0, 1), pictures.FOUR)
    assert len(asked) == len(set(asked)) == 260


def test_gamma_reaches_the_sampler():
    """1 draws nearly as the paper's sampler, 0 draws no noise: another picture."""
    ways = [pictures.Draw("lcm", 2, 0.0, gamma) for gamma in (None, 1.0, 0.0)]
    all_fresh, one, none = (pictures.drawn(PROMPTS, (0,), way) for way in ways)
    assert pictures.rms(all_fresh, one).max() < 0.1 < pictures.rms(all_fresh, none).min()


def test_what_is_measured_has_a_row_a_prompt_and_a_column_a_seed(monkeypatch):
    """Each picture is held against its own prompt's name, its style against the base's four."""
    x = pictures.pictures(PROMPTS, (0, 2, 4), pictures.FOUR)
    assert x["right"].shape == x["sharpness"].shape == (2, 3) and x["features"].shape[:2] == (2, 3)
    assert all(
        (y == torch.stack([x["right"]] * 2)).all() for y in [pictures.over_runs([x, x])["right"]]
    )
    judge = setup.shipped().judge
    alone = judge(pictures.decode(x["z0"][1, 2:3]))
    torch.testing.assert_close(alone[1][0], x["styles"][1, 2], rtol=1e-3, atol=1e-3)
    assert x["name"][1, 2] == float(judge.names[alone[0].argmax()] == PROMPTS[1].name)


def test_right_is_the_name_in_the_style_of_the_bases_four(monkeypatch):
    """A style that the base has not seen is not asked of a picture to be right."""

    def picked(logits, words, choices=None):
        return ["noto", "fluent", "noto"] if choices else ["pizza", "pizza", "rocket"]

    monkeypatch.setattr(pictures, "picked", picked)
    z0 = torch.zeros(3, *setup.shipped().shape)
    for styles_asked, right in ((["noto"] * 3, [1, 0, 0]), (["sepia"] * 3, [1, 1, 0])):
        found = pictures.measure(z0, ["pizza"] * 3, styles_asked)
        assert found["right"].tolist() == right and found["name"].tolist() == [1, 1, 0]


def test_runs_are_compared_in_pairs():
    """x - y of every prompt's pictures; sharpness and distance as shares of y's."""
    x, y = (
        {"right": torch.ones(3, 4, 2) * a, "sharpness": torch.ones(3, 4, 2) * b}
        for a, b in ((1, 2), (0, 4))
    )
    x["z0"], y["z0"] = (torch.full((3, 4, 2, 1, 1, 1), v) for v in (3.0, 2.0))
    teacher = {"z0": torch.ones(4, 2, 1, 1, 1), "sharpness": torch.ones(4, 2)}
    found = pictures.against(x, y, teacher, torch.arange(4))
    assert found == {"right": [1, 1, 1], "sharpness": [0.5] * 3, "distance": [2, 2, 2]}
    assert pictures.about(x, teacher, torch.arange(4))["distance"] == [2, 2, 2]


def test_a_style_is_held_against_the_bases_four():
    """What the judge makes of other new styles does not count, unless any of several will do."""
    words = setup.shipped().judge.styles
    logits = torch.zeros(2, 3, len(words))
    looks = [["sepia", "noto", "negative"], ["blob", "twemoji", "sepia"]]
    for i, row in enumerate(looks):
        for j, style in enumerate(row):
            logits[i, j, words.index(style)] = 2
    logits[0, 1, words.index("sepia")] = 1
    logits[0, 2, words.index("sepia")] = 1  # after negative, but before the four
    logits[..., words.index("twemoji")] += 0.5  # what looks like nothing else looks like this
    found = {"styles": logits}
    assert pictures.in_style(found, ["sepia"]).tolist() == [[1, 0, 1], [0, 0, 1]]
    assert pictures.in_style(found, ["sepia", "blob"]).tolist() == [[1, 0, 1], [1, 0, 1]]
    assert set(STYLES) < set(words)


def test_the_judge_is_judged_on_drawings_it_has_not_seen():
    """As many as are held out of a style."""
    assert pictures.held_out_art("blob")["right"].shape == (len(setup.art_of("blob")[1]),)


# ---- training


def some_data(shape=(4, 8, 8)) -> Cache:
    art = read_art(setup.HERE / "art/blob.tar")[:8]
    mean = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    return Cache(mean, torch.full_like(mean, 0.1), art, ["pink"] * 8, 32)


def test_a_recipe_is_what_it_says():
    """L2 and c_skip change the formulas inside, and nothing outside."""
    a, b, t = torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([0, 999])
    assert lcm.huber(a, b).item() == pytest.approx(2, abs=1e-2)
    with training.as_asked(training.Recipe(distance="l2", c_skip=False)):
        assert lcm.huber(a, b).item() == 4
        c_skip, c_out = lcm.boundary_scalings(t)
        assert c_skip.tolist() == [0, 0] and c_out.tolist() == [1, 1]
    assert (
        lcm.huber(a, b).item() == pytest.approx(2, abs=1e-2) and lcm.boundary_scalings(t)[0][0] == 1
    )


def test_the_averaged_target_lags_behind(monkeypatch):
    """target_ema = 0 is the student itself, as without an average; 0.95 soon gives other losses."""
    monkeypatch.setattr(training, "training_data", lambda data, drawings: some_data())

    def losses(target_ema: float | None) -> list[float]:
        recipe = training.Recipe(steps=5, batch=4, lr=0.3, target_ema=target_ema)
        return training.train_now(recipe)["loss"].tolist()

    live, zero, averaged = (losses(x) for x in (None, 0.0, 0.95))
    assert live == zero
    assert averaged[0] == live[0] and averaged[-1] != live[-1]


def test_the_averaged_target_is_not_the_student():
    """It stays where it was when the student moves, and follows by update_ema."""
    unet = tiny_unet()
    objective = training.objective_of(training.Recipe(rank=4))
    nets = training.averaged_target(make_networks(objective, unet, setup.HALF), unet)
    inputs = torch.zeros(1, 4, 8, 8), torch.tensor([500]), pictures.conds_of(PROMPTS[:1])[0], None
    before = nets.target(*inputs)
    for up, _, _ in get_tau(unet).values():
        up.data.fill_(0.1)
    assert torch.equal(nets.target(*inputs), before) and not torch.equal(
        nets.student(*inputs), before
    )
    lcm.update_ema(nets.target_unet, unet, ema_rate=0.0)
    assert torch.equal(nets.target(*inputs), nets.student(*inputs))


def test_a_run_keeps_its_marks(monkeypatch):
    """A LoRA at step 0 does nothing; at the end it is what was trained; the second call reads the
    first's; on another base it is another one.
    """
    monkeypatch.setattr(training, "training_data", lambda data, drawings: some_data())
    recipe = training.Recipe(steps=3, batch=2, rank=4, marks=(0, 1))
    made = training.train(recipe)
    assert sorted(made.at) == [0, 1, 3] and made.loss.shape == (3,) and made.end is made.at[3]
    assert all(not up.any() for up, _, _ in made.at[0].tau.values())
    assert all(up.any() for up, _, _ in made.end.tau.values())
    again = training.train(recipe).end
    assert all(
        torch.equal(a, b) for p in again.tau for a, b in zip(again.tau[p][:2], made.end.tau[p][:2])
    )
    tuned = training.train(training.Recipe("diffusion", None, steps=2, batch=2, lr=1e-2)).end
    assert set(tuned.weights) == dict(setup.shipped().unet.named_parameters()).keys()
    there = training.train(recipe, tuned)
    assert there.end.key != made.end.key and there.loss[0] != made.loss[0]


def test_the_loss_is_that_of_the_recipe(monkeypatch):
    """The first loss of a run is loss_of on the first batch, with the recipe's w and k."""
    monkeypatch.setattr(training, "training_data", lambda data, drawings: some_data())
    model = setup.shipped()
    for recipe in (
        training.Recipe(steps=1, batch=2, rank=4),
        training.Recipe(steps=1, batch=2, rank=4, w=(0.0, 0.0), k=20, psi_steps=1),
    ):
        z0, captions, _, generator = next(training.art_batches(some_data(), 2, 0))
        objective = training.objective_of(recipe)
        assert objective.w_range == recipe.w and objective.k == recipe.k
        nets = make_networks(objective, load_model(setup.MODEL).unet, setup.HALF)
        conds = model.text.encode(captions), model.text.null_cond(2)
        assert training.train_now(recipe)["loss"][0] == loss_of(
            objective, nets, z0, *conds, generator
        )


def test_the_teacher_draws_what_the_art_would_show():
    """The same names, styles and colours; half of each takes every other one."""
    art, own, half = (training.training_data(data, 4) for data in ("art", "teacher", "half"))
    assert art.art == own.art == half.art and art.color == half.color
    assert art.color == own.color and not own.std.any() and not torch.equal(own.mean, art.mean)
    for i, other in enumerate((art, own)):
        assert torch.equal(half.mean[i::2], other.mean[i::2])
        assert torch.equal(half.std[i::2], other.std[i::2])
    z0 = pictures.drawn(setup.said(art.art, art.color), (5,), pictures.Draw("ddim", 25, 3.0))
    assert torch.equal(own.mean, z0[:, 0])


def test_runs_have_seeds_of_their_own(monkeypatch):
    monkeypatch.setattr(training, "train", lambda recipe: training.Trained({0: recipe.seed}, None))
    assert training.runs_of(training.Recipe(), setup.FULL) == [[(seed, 1.0)] for seed in (0, 1, 2)]


def test_a_tau_is_kept_whole():
    """lora_alpha too, which is not the rank."""
    unet = tiny_unet()
    add_lora(unet, 4, 2.0)
    tau = random_tau(unet, 3, 4, 2.0)
    for path, (up, down, _) in get_tau(unet).items():
        up.data.copy_(tau[path][0])
        down.data.copy_(tau[path][1])
    kept = training.to_tau(training.trained_weights(unet))
    assert kept.keys() == tau.keys()
    assert all(torch.equal(a, b) for p in tau for a, b in zip(kept[p][:2], tau[p][:2]))
    assert {lora_alpha for _, _, lora_alpha in kept.values()} == {2.0}


# ---- styles


@pytest.mark.parametrize("style", styles.PROCESSED)
def test_styles_keep_what_they_should(style):
    """Size and kind of picture stay, the drawing changes; far from it all stays empty."""
    image = Image.new("RGBA", (96, 96), (0, 0, 0, 0))
    image.paste((230, 120, 40, 255), (24, 24, 72, 72))
    image.paste((250, 250, 250, 255), (40, 30, 60, 40))
    image.paste((10, 60, 30, 255), (30, 50, 66, 64))
    out = styles.PROCESSED[style][1](image)
    assert out.size == image.size and out.mode == "RGBA"
    assert out.tobytes() != image.tobytes() and out.getpixel((2, 2))[3] == 0


def test_a_shadow_does_not_come_back_on_the_other_side():
    """papercut of a square at the right and lower edges: nothing at the left and at the top."""
    image = Image.new("RGBA", (64, 64))
    image.paste((200, 40, 40, 255), (32, 32, 64, 64))
    alpha = styles.PROCESSED["papercut"][1](image).getchannel("A")
    assert (
        alpha.crop((0, 0, 16, 64)).getextrema() == alpha.crop((0, 0, 64, 16)).getextrema() == (0, 0)
    )
    assert alpha.getpixel((62, 62)) == 255


def test_all_styles_have_drawings():
    """Sixteen, of four kinds; those held out are not trained on."""
    assert len(styles.KINDS) == 16 and set(styles.KINDS.values()) == {
        "colour",
        "line",
        "texture",
        "shape",
    }
    for style in ("outline", *styles.REAL):
        seen, held_out = setup.art_of(style)
        assert {a.style for a in seen + held_out} == {style} and len(held_out) >= 8
        assert not {a.image.tobytes() for a in seen} & {a.image.tobytes() for a in held_out}
