"""sample.py on a tiny model: same seed, same bytes; what the files say; a line for each mistake."""

import dataclasses
import io
import itertools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import CONFIG, ROOT, png, random_tau, tiny_unet, write_model

import sample
from minilcm.data.pictures import read_image, to_images
from minilcm.files import lora_file
from minilcm.files.checkpoint import load_model
from minilcm.files.lora_file import read_tau, write_tau
from minilcm.files.safetensors_file import sha256
from minilcm.generate import SAMPLERS, generate
from minilcm.lcm import guidance_embedding, lcm_grid, sample_lcm
from minilcm.lora import ATTENTION
from minilcm.merge import merge_into
from minilcm.model.tiny_vae import TinyDecoder
from minilcm.model.unet import Cond, UNet
from minilcm.schedule import add_noise, make_schedule
from minilcm.solver import guided_eps, sample_ddim, trailing_grid


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder: a model, LoRAs `lcm` (all targets) and `style` (attention only), a picture."""
    folder = tmp_path_factory.mktemp("files")
    write_model(folder / "model.safetensors")
    write_tau(folder / "lcm.safetensors", random_tau(tiny_unet(), 1, 2, 3.0, size=0.1), {})
    write_tau(
        folder / "style.safetensors", random_tau(tiny_unet(), 2, 3, 1.0, ATTENTION, size=0.3), {}
    )
    Image.linear_gradient("L").convert("RGB").save(folder / "picture.png")
    return folder


@pytest.fixture
def draw(files, tmp_path):
    """draw(*flags) runs sample.py and gives {file name: bytes} of its folder, ordered by name."""
    count = itertools.count()

    def run(*flags: str, loras=("lcm.safetensors",), out: str = "") -> dict[str, bytes]:
        out = out or f"{tmp_path}/out{next(count)}/"
        argv = ["--model", str(files / "model.safetensors"), "--device", "cpu", "--out", out]
        argv += [x for lora in loras for x in ("--lora", str(files / lora))]
        sample.main(sample.parse([*argv, *flags]))
        return {
            p.name: p.read_bytes()
            for p in sorted((Path(out).parent if out.endswith(".png") else Path(out)).iterdir())
        }

    return run


def only(pictures: dict[str, bytes]) -> bytes:
    (data,) = pictures.values()
    return data


def levels(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data))).astype(int)


def lines_in(data: bytes) -> list[str]:
    return Image.open(io.BytesIO(data)).text["parameters"].split("\n")


def same_picture(a: bytes, b: bytes) -> bool:
    return np.array_equal(levels(a), levels(b))


# ---- what is drawn


def test_ctrl_c_keeps_what_is_drawn(draw, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the third of four pictures: the first two are written, as they would have been."""
    whole, calls = draw("pizza", "--count", "4", "--steps", "1"), itertools.count(1)

    def interrupted(*args, **more):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return sample_lcm(*args, **more)

    monkeypatch.setitem(SAMPLERS, "lcm", SAMPLERS["lcm"]._replace(sample=interrupted))
    with pytest.raises(SystemExit) as stopped:
        draw("pizza", "--count", "4", "--steps", "1", out=f"{tmp_path}/stopped/")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "stopped").iterdir()}
    assert stopped.value.code == 1 and len(kept) == 2 and kept.items() <= whole.items()
    assert "stopped after 2 of 4 pictures" in capsys.readouterr().out


@pytest.mark.parametrize(
    "sampler, dtype",
    [("lcm", "float32"), ("lcm", "bfloat16"), ("ddim", "float32"), ("dpmpp", "bfloat16")],
)
def test_same_seed_same_bytes_alone_or_among_others(draw, sampler, dtype):
    """Two runs give the same files; picture i of six (two prompts, three each) has the bytes of a
    run of its prompt alone with --seed seed + i; all six differ.
    """
    prompts = ("cat face", "a rocket")
    flags = ("--sampler", sampler, "--dtype", dtype, "--steps", "3")
    six = draw(*prompts, "--count", "3", "--seed", "7", *flags)
    assert six == draw(*prompts, "--count", "3", "--seed", "7", *flags)
    assert len(set(six.values())) == 6
    for i in (0, 2, 4):  # the text tower's batch must not show either
        assert only(draw(prompts[i // 3], "--seed", str(7 + i), *flags)) == list(six.values())[i]


@pytest.mark.parametrize("sampler", ["lcm", "dpmpp"])
def test_a_batch_draws_what_single_pictures_are(draw, sampler):
    """Four pictures of two prompts in batches of three, the second filled up, in float32."""
    flags = ("--count", "2", "--seed", "7", "--sampler", sampler, "--steps", "3")
    flags = ("cat face", "a rocket", "--dtype", "float32", *flags)
    single, batch = draw(*flags), draw(*flags, "--batch", "3")
    assert single.keys() == batch.keys() and len(batch) == 4
    for name in single:
        assert abs(levels(single[name]) - levels(batch[name])).max() <= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_picture_of_a_batch_does_not_depend_on_the_others(draw, tmp_path, dtype):
    """Of four pictures in batches of three, the second filled up, one has the bytes that its prompt
    and seed alone give with --batch 3. --again knows the batch; the recipe tells it, but not 1.
    """
    flags = ("--dtype", dtype, "--guidance", "1.5", "--steps", "2")
    four = draw(*"abcd", "--seed", "7", "--batch", "3", *flags, out=f"{tmp_path}/four/")
    for i, name in ((1, "0001_b_seed8.png"), (3, "0003_d_seed10.png")):
        data = four[name]
        assert only(draw("abcd"[i], "--seed", str(7 + i), "--batch", "3", *flags)) == data
        again = ["--again", f"{tmp_path}/four/{name}", "--out", f"{tmp_path}/{i}.png"]
        sample.main(sample.parse(again))
        assert (tmp_path / f"{i}.png").read_bytes() == data
        assert lines_in(data)[-1].endswith(", Batch size: 3")
    assert "Batch size" not in lines_in(only(draw("a", *flags)))[-1]


def test_the_last_seeds_in_a_batch(draw):
    """The rows that fill a batch up have seeds that exist."""
    flags = ("a", "--seed", str(2**64 - 1), "--dtype", "float32")
    drawn, alone = only(draw(*flags, "--batch", "3")), only(draw(*flags))
    assert abs(levels(drawn) - levels(alone)).max() <= 1


@pytest.mark.parametrize("w_dim", [None, 256])
def test_on_cuda(fake_cuda, monkeypatch, w_dim):
    """Dry run in float16, guided and as a full LCM: seven pictures, of which four fit at a time."""
    cfg = dataclasses.replace(CONFIG.unet, w_dim=w_dim)
    unet = fake_cuda(lambda: UNet(cfg), torch.float16)
    monkeypatch.setattr(sample, "resident", lambda module, device: nullcontext())
    # without data there is no .tolist()
    way = SAMPLERS["lcm"]._replace(grid=lambda steps, strength: [999, 499])
    monkeypatch.setitem(SAMPLERS, "lcm", way)
    row = 32 * 2 * cfg.channels[0] * 8 * 8  # bytes
    free = 2 * 5 * row if w_dim else 2 * 2 * 5 * row
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 2 * free))
    seen = []
    monkeypatch.setattr(
        sample,
        "generate",
        lambda eps_fn, seeds, **how: seen.append(seeds) or generate(eps_fn, seeds, **how),
    )
    args = sample.parse(["pizza", "--count", "7", "--guidance", "2", "--seed", "2"])
    args.device = "cuda"
    cond = Cond(torch.randn(1, 77, cfg.context_dim))
    latents = sample.draw_all(args, unet, cond, cond, dict(shape=(4, 8, 8), steps=2))
    assert [(z0.shape, z0.device.type) for z0 in latents] == [((1, 4, 8, 8), "cpu")] * 7
    assert args.batch == 4 and seen == [[4, 5, 2, 3], [8, 9, 6, 7]]


def test_the_picture_is_the_pipeline_by_hand(draw, files):
    """File -> LoRA merged -> prompt encoded -> noise of the seed -> LCM or guided DDIM -> decoded
    -> PNG: the same levels as these calls made here, in float32.
    """
    unet, vae, text, _ = load_model(files / "model.safetensors")
    merge_into(unet, read_tau(files / "lcm.safetensors"), 0.7)
    cond, null_cond = text.encode(["rocket"]), text.encode([""])
    for sampler, w in (("lcm", 0.0), ("ddim", 2.0)):
        generator = torch.Generator().manual_seed(5)
        z_T = torch.randn(1, 4, 8, 8, generator=generator)
        eps_fn = guided_eps(unet, cond, null_cond, w)
        with torch.no_grad():
            if sampler == "lcm":
                z0 = sample_lcm(eps_fn, z_T, make_schedule(), lcm_grid(3), [generator])
            else:
                z0 = sample_ddim(eps_fn, z_T, make_schedule(), trailing_grid(3))
            expected = np.array(to_images(vae.decode(z0))[0]).astype(int)
        flags = ("--steps", "3", "--seed", "5", "--dtype", "float32", "--sampler", sampler)
        drawn = levels(only(draw("rocket", *flags, loras=["lcm.safetensors:0.7"])))
        assert abs(drawn - expected).max() <= 1


def test_files_and_what_they_say(draw):
    """Names sort in the order of drawing; the PNG's text is prompt, negative and recipe."""
    flags = "--count 2 --seed 41 --negative rocket".split()
    pictures = draw("pizza", "Cat face, on a pink background", *flags)
    assert list(pictures) == [
        "0000_pizza_seed41.png",
        "0001_pizza_seed42.png",
        "0002_cat-face-on-a-pink-background_seed43.png",
        "0003_cat-face-on-a-pink-background_seed44.png",
    ]
    prompt, negative, recipe = lines_in(pictures["0002_cat-face-on-a-pink-background_seed43.png"])
    assert prompt == "Cat face, on a pink background" and negative == "Negative prompt: rocket"
    assert recipe.startswith(
        "Steps: 4, Sampler: lcm, CFG scale: 1, Seed: 43, Size: 32x32, "
        "Model: model, Lora: lcm:1, Version: "
    )
    mixed = only(draw("pizza", loras=["lcm.safetensors:0.5", "style.safetensors:-2"]))
    assert "Lora: lcm:0.5, style:-2," in lines_in(mixed)[1]
    plain = only(draw("pizza", "--sampler", "ddim", "--steps", "2", loras=[]))
    assert (
        lines_in(plain)[0] == "pizza"
        and "Sampler: ddim, CFG scale: 3," in lines_in(plain)[1]
        and "Lora: none" in lines_in(plain)[1]
    )


def test_many_pictures_sort_in_the_order_of_their_seeds(draw):
    """`ls` shows the order of drawing also past ten pictures, and where seeds get a digit more."""
    names = list(draw("pizza", "--count", "12", "--seed", "95", "--steps", "1"))
    assert [int(re.search(r"seed(\d+)", name)[1]) for name in names] == list(range(95, 107))


def test_out_as_one_file(draw, tmp_path):
    """--out FILE.png in a folder not there yet is that file, with the bytes a folder would get."""
    path = tmp_path / "a/new: folder/my pizza.png"
    assert draw("pizza", out=str(path)) == {"my pizza.png": only(draw("pizza"))}


def test_out_without_a_slash_is_a_folder(draw, tmp_path):
    assert list(draw("pizza", out=str(tmp_path / "x/y"))) == ["0000_pizza_seed0.png"]


def test_earlier_pictures_are_kept(draw, tmp_path):
    """A second run in the folder, even of prompt and seed, counts on; other files are left."""
    out = f"{tmp_path}/x/"
    first = draw("pizza", "--count", "2", out=out)
    (tmp_path / "x/0007_notes.txt").write_text("mine")
    again = draw("pizza", "rocket", "--steps", "1", out=out)
    assert list(again) == [
        "0000_pizza_seed0.png",
        "0001_pizza_seed1.png",
        "0002_pizza_seed0.png",
        "0003_rocket_seed1.png",
        "0007_notes.txt",
    ]
    assert {name: again[name] for name in first} == first


def test_size(draw):
    """--size WxH is width by height."""
    assert levels(only(draw("pizza", "--size", "64x32"))).shape == (32, 64, 3)


def test_sheet(draw, tmp_path):
    """--sheet adds one picture with all of them, a row for each prompt, each of their pixels a
    square of 8 x 8, in a folder of its own; its text is the command line, quoted.
    """
    pictures = draw("pizza", "rocket", "--count", "2", "--sheet", str(tmp_path / "new/sheet.png"))
    sheet = np.array(Image.open(tmp_path / "new/sheet.png")).astype(int)
    assert len(pictures) == 4
    tall = sheet.shape[0] // 2
    for i, data in enumerate(pictures.values()):
        x, y = i % 2 * (256 + 8) + 4, i // 2 * tall + 4
        cell = sheet[y : y + 256, x : x + 256]
        assert np.array_equal(cell, levels(data).repeat(8, axis=0).repeat(8, axis=1))
    text = Image.open(tmp_path / "new/sheet.png").text["parameters"]
    assert shlex.split(text)[-1] == str(tmp_path / "new/sheet.png") and " pizza rocket " in text


def test_sheet_of_one_picture_a_prompt(draw, tmp_path):
    """Six in a row then."""
    draw(*"abcdefg", "--steps", "1", "--sheet", str(tmp_path / "sheet.png"))
    assert Image.open(tmp_path / "sheet.png").width == 6 * (256 + 8)


@pytest.mark.parametrize(
    "sampler, line, evaluations",
    [
        ("lcm", "lcm, 4 steps at t = 999 759 499 259, guidance 1, float32 on cpu", 4),
        ("lcm --steps 2", "lcm, 2 steps at t = 999 499, guidance 1, float32 on cpu", 2),
        ("lcm --guidance 2", "lcm, 4 steps at t = 999 759 499 259, guidance 2, float32 on cpu", 8),
        (
            "lcm --timesteps 800,20 --gamma 0.3",
            "lcm, 2 steps at t = 800 20, gamma 0.3, guidance 1, float32 on cpu",
            2,
        ),
        ("ddim --steps 4", "ddim, 4 steps at t = 999 749 499 249, guidance 3, float32 on cpu", 8),
        ("ddim", "ddim, 25 steps at t = 999 959 919 ... 39, guidance 3, float32 on cpu", 50),
        ("dpmpp --steps 2", "dpmpp, 2 steps at t = 999 499, guidance 3, float32 on cpu", 4),
    ],
)
def test_the_grid_is_printed(draw, capsys, sampler, line, evaluations):
    """LoRA, timesteps and guidance of a run are told before it starts; then how often the network
    was asked, how long that took, and each file's path.
    """
    draw("pizza", "--dtype", "float32", "--sampler", *sampler.split())
    out = capsys.readouterr().out.splitlines()
    out = [x for x in out if not x.startswith("note: ")]
    assert out[0] == "LCM-LoRA added: lcm, times 1" and out[1] == line and len(out) == 4
    assert re.fullmatch(rf"{evaluations} network evaluations, \d+\.\d\d s", out[2])
    assert out[3].endswith("0000_pizza_seed0.png")


def test_default_steps(draw, capsys):
    """lcm 4, ddim 25, dpmpp 20 steps, as --help says."""
    for sampler, steps in (("lcm", 4), ("ddim", 25), ("dpmpp", 20)):
        draw("pizza", "--sampler", sampler)
        assert f"{sampler}, {steps} steps" in capsys.readouterr().out


# ---- the recipe


def test_again_draws_the_same_file(draw, files, tmp_path):
    """--again FILE.png gives the file itself, byte for byte, whatever it was drawn with; flags
    beside it change what they name.
    """
    picture, style = str(files / "picture.png"), "style.safetensors:-0.3"
    for i, (flags, loras) in enumerate(
        (
            (["pizza"], ["lcm.safetensors"]),
            (["pizza", "rocket", "--count", "2", "--seed", "7"], ["lcm.safetensors", style]),
            (["a 'b' \"c\" $HOME; d", "--sampler", "ddim", "--steps", "3"], []),
            (
                ["pizza", "--image", picture, "--strength", "0.4", "--steps", "2"],
                ["lcm.safetensors"],
            ),
            (["pizza", "--timesteps", "800,120,3", "--gamma", "0.3"], ["lcm.safetensors"]),
            (["pizza", "--gamma", "0", "--image", picture], ["lcm.safetensors"]),
            (["pizza", "--image", picture, "--timesteps", "300,20"], ["lcm.safetensors"]),
            (["--guidance", "1.7", "--negative=-a b", "--size", "64x32", "--", "-x"], [style]),
        )
    ):
        drawn = draw("--dtype", "float32", *flags, loras=loras, out=f"{tmp_path}/first{i}/")
        for name, data in drawn.items():
            out = tmp_path / f"again{i}/{name}"
            path = str(tmp_path / f"first{i}" / name)
            sample.main(sample.parse(["--again", path, "--out", str(out)]))
            assert out.read_bytes() == data
    sample.main(sample.parse(["--again", path, "--seed", "5", "--out", f"{tmp_path}/seed/"]))
    assert [x.name for x in (tmp_path / "seed").iterdir()] == ["0000_x_seed5.png"]
    with pytest.raises(SystemExit, match="leave out 'pizza'"):
        sample.parse(["pizza", "--again", path])


def test_steps_and_timesteps_take_each_others_place_with_again(draw, files, tmp_path):
    """A picture drawn again by --timesteps forgets its --steps and --strength, and the other way
    round; its gamma stays.
    """
    image = "--image", str(files / "picture.png"), "--dtype", "float32", "--gamma", "0.5"
    by_steps = ["--steps", "2", "--strength", "0.4"]
    by_timesteps = ["--timesteps", "399,199"]  # the same
    for i, (was, now) in enumerate(((by_steps, by_timesteps), (by_timesteps, by_steps))):
        draw("pizza", *image, *was, out=f"{tmp_path}/{i}.png")
        again = ["--again", f"{tmp_path}/{i}.png", *now, "--out", f"{tmp_path}/again{i}.png"]
        sample.main(sample.parse(again))
        texts = Image.open(f"{tmp_path}/again{i}.png").text
        assert ("Timesteps: 399 199" in texts["parameters"]) == (now == by_timesteps)
        assert ("--timesteps=399,199" in texts["command"]) == (now == by_timesteps)
        assert ("--steps=2" in texts["command"]) == (now == by_steps)
        assert "Gamma: 0.5" in texts["parameters"] and "Steps: 2," in texts["parameters"]
        assert same_picture(*((tmp_path / f"{x}{i}.png").read_bytes() for x in ("", "again")))


def test_flags_beside_again_take_the_place_of_those_inside(draw, files, tmp_path, monkeypatch):
    """Another --lora is not added to the picture's, another --image is no other file, and another
    --sampler brings its own steps and guidance.
    """
    monkeypatch.chdir(tmp_path)
    picture, style = str(files / "picture.png"), str(files / "style.safetensors")
    draw("pizza", "--gamma", "0.5", "--image", picture, "--strength", "0.3", out="first.png")

    def again(*flags: str) -> list[str]:
        (tmp_path / "x.png").unlink(missing_ok=True)
        sample.main(sample.parse(["--again", "first.png", "--out", "x.png", *flags]))
        return shlex.split(Image.open("x.png").text["command"])[2:-2]

    words = again("--lora", f"{style}:0.5")
    assert [x for x in words if "lora" in x] == [f"--lora={style}:0.5"] and "--gamma=0.5" in words
    Image.open(picture).rotate(90).save("turned.png")
    words = again("--image", "turned.png")
    assert "--image=turned.png" in words and "--strength=0.5" in words and "--gamma=0.5" in words
    words = again("--sampler=ddim", f"--lora={style}:0", "--strength=1")
    assert {"--sampler=ddim", "--steps=25", f"--lora={style}:0.0"} < {*words}
    assert not any("gamma" in x or x == "--guidance=1.0" for x in words)
    assert again("--sampler", "lcm", "--seed", "3") == again("--seed=3")
    with pytest.raises(SystemExit, match="unrecognized arguments: --lo"):  # it would be added
        again("--lo", style)


def test_gamma_and_timesteps_reach_the_sampler(draw, monkeypatch):
    """As `sample_lcm` gets them: a wrong gamma would be a picture of another kind, not an error."""
    seen = []

    def sampled(eps_fn, z_T, schedule, grid, **more):
        seen.append((grid, more["gamma"]))
        return sample_lcm(eps_fn, z_T, schedule, grid, **more)

    monkeypatch.setitem(SAMPLERS, "lcm", SAMPLERS["lcm"]._replace(sample=sampled))
    draw("pizza", "--timesteps", "800,3", "--gamma", "0.3")
    draw("pizza")
    assert seen == [([800, 3], 0.3), ([999, 759, 499, 259], None)]


def test_again_wants_the_same_files(draw, files, tmp_path):
    """Another model, LoRA or picture under the same name is refused with what was and what is."""
    for name in ("model", "lcm"):
        (tmp_path / f"{name}.safetensors").write_bytes((files / f"{name}.safetensors").read_bytes())
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    argv = ["pizza", "--model", f"{tmp_path}/model.safetensors", "--device", "cpu"]
    argv += ["--lora", f"{tmp_path}/lcm.safetensors", "--image", f"{tmp_path}/red.png"]
    sample.main(sample.parse([*argv, "--out", f"{tmp_path}/x.png"]))
    hashes = {
        x: sha256(tmp_path / x)[:10] for x in ("model.safetensors", "lcm.safetensors", "red.png")
    }
    recipe = lines_in((tmp_path / "x.png").read_bytes())[-1]
    assert f"Model hash: {hashes['model.safetensors']}, " in recipe
    assert f'Lora hashes: "lcm: {hashes["lcm.safetensors"]}"' in recipe
    assert "Denoising strength: 0.5, Init image: red.png, " in recipe
    assert f"Init image hash: {hashes['red.png']}" in recipe and "Precision: " in recipe

    write_model(tmp_path / "other.safetensors", seed=1)
    write_tau(tmp_path / "lora.safetensors", random_tau(tiny_unet(), 5, 2, 3.0), {})
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "blue.png")
    for name, other, kind in (
        ("model.safetensors", "other.safetensors", "Model"),
        ("lcm.safetensors", "lora.safetensors", "Lora"),
        ("red.png", "blue.png", "Init image"),
    ):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes((tmp_path / other).read_bytes())
        with pytest.raises(ValueError, match=rf"x.png: drawn with other files: {kind} hash.* now "):
            sample.main(
                sample.parse(["--again", f"{tmp_path}/x.png", "--out", f"{tmp_path}/y.png"])
            )
        (tmp_path / name).write_bytes(whole)
    assert not (tmp_path / "y.png").exists()


def test_a_random_seed_is_told_and_kept(draw, capsys):
    """--seed -1 is a new seed each time, printed, in the name and in the recipe."""
    (one,), (other,) = (draw("pizza", "--seed", "-1", "--steps", "1") for _ in "ab")
    seeds = re.findall(r"^seed (\d+)$", capsys.readouterr().out, re.MULTILINE)
    assert [one, other] == [f"0000_pizza_seed{seed}.png" for seed in seeds] and one != other


@pytest.mark.parametrize("seed", [2**32, 2**63 + 5, 2**64 - 1])
def test_seeds_have_64_bits(draw, seed):
    """As in other programs; PyTorch's generator on the CPU makes use of the lower 32."""
    drawn = only(draw("pizza", "--seed", str(seed), "--steps", "1"))
    assert f"Seed: {seed}," in lines_in(drawn)[1]
    low = only(draw("pizza", "--seed", str(seed % 2**32), "--steps", "1"))
    assert same_picture(drawn, low) and drawn != low


# ---- guidance


def test_negative_counts_above_guidance_1_only(draw):
    """At guidance 1, lcm's default, the negative prompt changes nothing; at 2 it does. ddim: 3."""
    plain, negative = draw("pizza"), draw("pizza", "--negative", "rocket", "--guidance", "1")
    assert same_picture(only(plain), only(negative))
    plain, negative = (
        draw("pizza", "--guidance", "2", *more) for more in ((), ("--negative", "rocket"))
    )
    assert not same_picture(only(plain), only(negative))
    ddim = ("pizza", "--sampler", "ddim", "--steps", "3")
    assert draw(*ddim) == draw(*ddim, "--guidance", f"{CONFIG.guidance}")
    assert not same_picture(only(draw(*ddim)), only(draw(*ddim, "--guidance", "1")))


def test_guidance_0_is_off_as_1(draw, capsys):
    """As the cards of the LCM-LoRAs have it: the prompt is heard, and nothing guides."""
    for flags in ([], ["--sampler", "ddim", "--steps", "2"]):
        assert draw("pizza", "--guidance", "0", *flags) == draw("pizza", "--guidance", "1", *flags)
    assert "--negative" not in capsys.readouterr().out
    draw("pizza", "--guidance", "0", "--negative", "rocket")
    assert "--negative changes nothing" in capsys.readouterr().out


def test_an_empty_negative_is_the_null_prompt(draw):
    """--negative "" is what happens without it."""
    assert draw("pizza", "--guidance", "2", "--negative", "") == draw("pizza", "--guidance", "2")


# ---- LoRA


def test_lambda(draw):
    """Lambda 0 is the bare model, 1 the default; 0.5, 1 and -1 are three other pictures."""
    flags = ("pizza", "--sampler", "ddim", "--steps", "2")
    bare = draw(*flags, loras=[])
    by_lambda = {
        x: only(draw(*flags, loras=[f"style.safetensors:{x}"]))
        for x in ("0", "0.5", "1", "-1", "1e0")
    }
    assert same_picture(by_lambda["0"], only(bare))
    assert only(draw(*flags, loras=["style.safetensors"])) == by_lambda["1"] == by_lambda["1e0"]
    pictures = [only(bare), by_lambda["0.5"], by_lambda["1"], by_lambda["-1"]]
    assert not any(same_picture(a, b) for a, b in itertools.combinations(pictures, 2))


def test_several_loras_add_up(draw):
    """lambda1 style + lambda2 lcm in either order is one picture; 0.3 + 0.5 of a file is 0.8."""
    flags = ("pizza", "--dtype", "float32")
    style, lcm = "style.safetensors:0.8", "lcm.safetensors:1.0"
    one, other = only(draw(*flags, loras=[style, lcm])), only(draw(*flags, loras=[lcm, style]))
    assert abs(levels(one) - levels(other)).max() <= 1
    assert not same_picture(one, only(draw(*flags)))
    twice = only(draw(*flags, loras=["lcm.safetensors:0.3", "lcm.safetensors:0.5"]))
    assert abs(levels(twice) - levels(only(draw(*flags, loras=["lcm.safetensors:0.8"])))).max() <= 1


def test_a_lora_of_the_text_encoder_changes_the_picture(draw, tmp_path):
    """te1. modules are merged into the text encoder, not dropped."""
    g = torch.Generator().manual_seed(0)
    parts = 0.5 * torch.randn(32, 2, generator=g), 0.5 * torch.randn(2, 32, generator=g), 2.0
    write_tau(
        tmp_path / "text.safetensors",
        {f"te1.encoder.layers.0.self_attn.{x}_proj": parts for x in "qv"},
        {},
    )
    argv = "pizza", "--sampler", "ddim", "--steps", "2"
    with_text = draw(*argv, loras=[f"{tmp_path}/text.safetensors"])
    assert not same_picture(only(with_text), only(draw(*argv, loras=[])))


@pytest.mark.parametrize("word", ["blueprint", "blueprint:1.0", "papercut"])
def test_the_shipped_loras_have_words(files, tmp_path, monkeypatch, word):
    """`--lora blueprint` is blueprint.safetensors beside the shipped model; a file of that name
    comes first.
    """
    monkeypatch.setattr(lora_file, "EMOJI", tmp_path)
    monkeypatch.chdir(tmp_path)
    name, lam = lora_file.parse_lora(word)
    assert lora_file.find_lora(name) == tmp_path / f"{name}.safetensors" and lam == 1
    (tmp_path / name).mkdir()  # a folder is none, even a run's: the default is `lcm`
    (tmp_path / name / "lora.safetensors").touch()
    assert lora_file.find_lora(name) == tmp_path / f"{name}.safetensors"
    shutil.rmtree(tmp_path / name)
    (tmp_path / name).touch()
    assert lora_file.find_lora(name) == name
    with pytest.raises(ValueError, match="^openmoji: no such file; the shipped ones are lcm, blue"):
        lora_file.find_lora(Path("openmoji"))


def test_the_folder_of_a_run_is_its_lora(tmp_path):
    (tmp_path / "lora.safetensors").touch()
    assert lora_file.find_lora(tmp_path) == tmp_path / "lora.safetensors"


def test_forgotten_quotes_are_said(draw, capsys):
    """`cat face` without quotes is two prompts, and one name."""
    draw("cat", "face", "--steps", "1")
    assert 'note: 2 prompts; for one picture, quote it: "cat face"' in capsys.readouterr().out
    draw("pizza", "rocket", "--steps", "1")
    assert "quote it" not in capsys.readouterr().out


def test_the_word_lcm_means_the_shipped_lora(draw, files, monkeypatch):
    """`--lora lcm`, and --sampler lcm alone, take the shipped lcm_lora.safetensors; ddim none."""
    shipped = files / "shipped"
    shipped.mkdir()
    (shipped / "lcm_lora.safetensors").write_bytes((files / "lcm.safetensors").read_bytes())
    (shipped / "model.safetensors").write_bytes((files / "model.safetensors").read_bytes())
    monkeypatch.setattr(lora_file, "EMOJI", shipped)
    named = draw("pizza")
    argv = ["--model", str(shipped / "model.safetensors"), "--device", "cpu", "pizza", "--out"]
    for i, more in enumerate(([], ["--lora", "lcm"], ["--lora", "lcm:1.0"])):
        sample.main(sample.parse([*argv, f"{shipped}/out{i}/", *more]))
        assert same_picture((shipped / f"out{i}/0000_pizza_seed0.png").read_bytes(), only(named))
    bare = draw("pizza", "--sampler", "ddim", "--steps", "2", loras=[])
    assert "Lora: none" in lines_in(only(bare))[1]

    monkeypatch.chdir(shipped)  # the same file by another spelling
    sample.main(
        sample.parse(
            ["--model", "../shipped/model.safetensors", "--device", "cpu", "pizza", "--out", "out/"]
        )
    )
    assert same_picture((shipped / "out/0000_pizza_seed0.png").read_bytes(), only(named))


@pytest.mark.parametrize(
    "recipe, told", [({}, True), ({"objective": "lcm"}, False), ({"combined": "a b"}, False)]
)
def test_a_style_alone_is_told_that_few_steps_are_blurred(
    files, tmp_path, monkeypatch, capsys, recipe, told
):
    """A --lora takes the shipped LCM-LoRA's place, which is easily forgotten; a mix isn't told."""
    monkeypatch.setattr(lora_file, "EMOJI", files)
    write_tau(tmp_path / "some.safetensors", read_tau(files / "style.safetensors"), recipe)
    argv = [
        "--model",
        str(files / "model.safetensors"),
        "--device",
        "cpu",
        "pizza, blueprint style",
        "--out",
        f"{tmp_path}/out/",
    ]
    sample.main(sample.parse([*argv, "--lora", str(tmp_path / "some.safetensors")]))
    out = capsys.readouterr().out
    assert ("add --lora lcm" in out) == told
    # a mix may know the style that is asked for, too; an LCM-LoRA alone does not
    assert ("blueprint style is none of" in out) == (recipe == {"objective": "lcm"})


def test_a_full_lcm_takes_w_through_its_embedding(files, tmp_path):
    """A UNet with cond_proj, no LoRA: f of unet(z, t, cond, e(w)), one call, w = guidance - 1."""
    config = dataclasses.replace(CONFIG, unet=dataclasses.replace(CONFIG.unet, w_dim=256))
    path = write_model(tmp_path / "lcm.safetensors", config=config)
    pictures = []
    for guidance in (3.0, 8.0):
        out = tmp_path / f"{guidance}.png"
        argv = "pizza --dtype float32 --device cpu --steps 2 --guidance".split()
        argv += [str(guidance), "--model", str(path), "--out", str(out)]
        sample.main(sample.parse(argv))
        unet, vae, text, _ = load_model(path)
        cond, w_emb = text.encode(["pizza"]), guidance_embedding(torch.tensor([guidance - 1]), 256)
        generator = torch.Generator().manual_seed(0)
        z_T = torch.randn(1, 4, 8, 8, generator=generator)
        with torch.no_grad():
            eps_fn = partial(unet, cond=cond, w_emb=w_emb)
            z0 = sample_lcm(eps_fn, z_T, make_schedule(), lcm_grid(2), [generator])
            assert np.array_equal(levels(out.read_bytes()), np.array(to_images(vae.decode(z0))[0]))
        pictures.append(out.read_bytes())
    assert not same_picture(*pictures)


@pytest.mark.parametrize("name", ["a:b.safetensors", "lora:0.5", "my lora, é.safetensors"])
def test_a_path_with_a_colon(draw, files, name):
    """A file whose name holds a colon is found, with a lambda after it too."""
    (files / name).write_bytes((files / "style.safetensors").read_bytes())
    for lam in ("", ":0.5"):
        expected = draw("pizza", "--steps", "1", loras=[f"style.safetensors{lam}"])
        assert same_picture(only(draw("pizza", "--steps", "1", loras=[name + lam])), only(expected))


# ---- image to image


def test_image_and_strength(draw, files):
    """--image starts at the noised latent of the picture at the shortened grid's first timestep:
    the same levels as these calls made here. The strength, the picture and the seed each change the
    result.
    """
    unet, vae, text, _ = load_model(files / "model.safetensors")
    merge_into(unet, read_tau(files / "lcm.safetensors"))
    generator, schedule, grid = torch.Generator().manual_seed(0), make_schedule(), lcm_grid(2, 0.4)
    assert grid == [399, 199]
    with torch.no_grad():
        z0 = vae.encode_mean(read_image(files / "picture.png", (32, 32)))
        start = add_noise(z0, torch.randn(1, 4, 8, 8, generator=generator), 399, schedule)
        eps_fn = guided_eps(unet, text.encode(["pizza"]), None, 0.0)
        expected = to_images(vae.decode(sample_lcm(eps_fn, start, schedule, grid, [generator])))[0]
    flags = ("pizza", "--steps", "2", "--dtype", "float32", "--image", str(files / "picture.png"))
    drawn = only(draw(*flags, "--strength", "0.4"))
    assert abs(levels(drawn) - np.array(expected)).max() <= 1
    Image.new("RGB", (40, 30), "red").save(files / "red.png")
    others = [
        draw(*flags, "--strength", "0.8"),
        draw(*flags, "--strength", "0.4", "--seed", "1"),
        draw(*flags[:-1], str(files / "red.png"), "--strength", "0.4"),
        draw(*flags),
    ]
    assert not any(same_picture(drawn, only(other)) for other in others)


# ---- prompts as people type them


@pytest.mark.parametrize(
    "prompt, name",
    [
        ("", "0000__seed0.png"),
        ("../../etc/pizza", "0000_etc-pizza_seed0.png"),
        ("/pizza/", "0000_pizza_seed0.png"),
        ('a "pizza", it\'s 100% & <b>', "0000_a-pizza-it-s-100-b_seed0.png"),
        ("寿司 🍣 пицца café", "0000_caf_seed0.png"),
        ("-pizza", "0000_pizza_seed0.png"),
        ("pizza\x1b[31m\x07", "0000_pizza-31m_seed0.png"),
        ("word " * 300, f"0000_{('word-' * 12)}_seed0.png"),
    ],
)
def test_any_prompt_is_drawn_into_the_folder(draw, tmp_path, prompt, name):
    """Slashes, quotes, other alphabets, control characters, nothing at all, far too much: one file
    with a plain name, in the folder, whose text begins with the prompt.
    """
    pictures = draw("--steps", "1", "--sheet", str(tmp_path / "sheet.png"), "--", prompt)
    assert list(pictures) == [name]
    assert lines_in(only(pictures))[0] == prompt.strip()


def test_line_breaks_in_prompts_are_spaces(draw):
    """A prompt over two lines is one line in the PNG, whose first is the prompt; same picture."""
    broken = draw("cat\n  face,\r\n\tnoto style\n", "--negative", "a\nb")
    assert broken == draw("cat face, noto style", "--negative", "a b")
    assert lines_in(only(broken))[:2] == ["cat face, noto style", "Negative prompt: a b"]


def test_long_prompts_say_what_is_ignored(draw, capsys):
    """75 tokens are read; the line says which words were not, and the picture is that of the 75."""
    long = draw("pizza " * 75 + "rocket", "--steps", "1")
    assert "prompt cut after 75 tokens; ignored: 'rocket" in capsys.readouterr().out
    assert same_picture(only(long), only(draw("pizza " * 75, "--steps", "1")))
    assert "cut" not in capsys.readouterr().out


def test_list(draw, files, capsys):
    """--list prints the names, one a line, then styles and colours; it needs no prompt, no LoRA."""
    sample.main(sample.parse(["--list", "--model", str(files / "model.safetensors")]))
    *names, styles, colors = capsys.readouterr().out.splitlines()
    assert names == list(CONFIG.names)
    assert styles == "styles: noto, twemoji, fluent, emojione"
    assert colors.startswith("backgrounds: white, black, pink, ")


def test_unknown_name_gets_a_line_and_a_picture(draw, capsys):
    """A prompt without a known name is drawn all the same, and the line names the nearest."""
    assert len(draw("a rokcet", "cat face", "--steps", "1")) == 2
    told = [line for line in capsys.readouterr().out.splitlines() if "no name" in line]
    assert len(told) == 1 and told[0].startswith(
        "note: 'a rokcet' holds no name this model knows; nearest: rocket"
    )


def test_numbers_too_large_are_said(draw, capsys):
    """A black picture is not drawn in silence."""
    data = only(draw("rocket", "--steps", "1", "--seed", "3", loras=("lcm.safetensors:1e30",)))
    assert levels(data).max() == 0
    assert "seed 3: values not finite in " in capsys.readouterr().out
    draw("rocket", "--steps", "1")
    assert "too large" not in capsys.readouterr().out


def test_names_that_are_not_utf_8(files, draw, tmp_path):
    """Bytes of a file name that are no letters cost no picture: the recipe has their number."""
    name = os.fsdecode(bytes(tmp_path) + b"/b\x94L")
    Path(name).write_bytes((files / "picture.png").read_bytes())
    more = "--image", name, "--sheet", f"{tmp_path}/sheet.png"
    data = only(draw("rocket", "--steps", "1", *more))
    text = Image.open(io.BytesIO(data)).text
    assert r"Init image: b\udc94L" in text["parameters"] and r"/b\udc94L" in text["command"]


def test_a_folder_that_may_not_be_written_to_costs_no_work(draw, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(ValueError, match="/out0: no permission to write there"):
        draw("rocket")
    assert "evaluation" not in capsys.readouterr().out


# ---- mistakes


@pytest.fixture(scope="module")
def bad_files(files):
    """The wrong files of the cases below, beside the good ones."""
    other = dataclasses.replace(CONFIG.unet, channels=(64, 64, 64))
    write_tau(files / "other_lora.safetensors", random_tau(tiny_unet(cfg=other), 0, 2, 3.0), {})
    for name in ("model", "lcm"):
        whole = (files / f"{name}.safetensors").read_bytes()
        (files / f"cut_{name}.safetensors").write_bytes(whole[: len(whole) // 2])
    (files / "words.txt").write_text("these are words")
    (files / "folder.png").mkdir()
    return files


MISTAKES = [
    ("", "no prompt; try: python sample.py"),
    ("pizza --sampler euler", "invalid choice: 'euler'"),
    ("pizza --model {f}/none.safetensors", "none.safetensors: no such file"),
    (
        "pizza --model {f}/cut_model.safetensors",
        "cut_model.safetensors: file is damaged or incomplete",
    ),
    (
        "pizza --model {f}/lcm.safetensors",
        "lcm.safetensors: this is a LoRA file, not a checkpoint; pass it with --lora",
    ),
    ("pizza --model {f}/words.txt", "words.txt: not a safetensors file"),
    ("--list --model {f}/none.safetensors", "none.safetensors: no such file"),
    ("pizza --lora {f}/none.safetensors", "none.safetensors: no such file"),
    ("pizza --lora {f}/none.safetensors:0.5", "none.safetensors: no such file"),
    ("pizza --lora {f}/cut_lcm.safetensors", "cut_lcm.safetensors: file is damaged or incomplete"),
    (
        "pizza --lora {f}/model.safetensors",
        "model.safetensors: this is a checkpoint, not a LoRA file; pass it with --model",
    ),
    ("pizza --lora {f}/other_lora.safetensors", "other_lora.safetensors: made for another model: "),
    (
        "pizza --lora {f}/lcm.safetensors:abc",
        "'abc' is not a number; give FILE:LAMBDA, for example",
    ),
    ("pizza --lora {f}/lcm.safetensors:", "'' is not a number"),
    ("pizza --lora {f}/lcm.safetensors:nan", "'nan' is not a number"),
    ("pizza --lora {f}/lcm.safetensors:inf", "'inf' is not a number"),
    ("pizza --lora ''", "is a folder"),
    ("pizza --image {f}/none.png", "none.png: "),
    ("pizza --image {f}/words.txt", "words.txt: not a readable picture"),
    ("pizza --image {f}", ": not a readable picture"),
    (
        "pizza --image {f}/picture.png --strength 0",
        "--strength is 0.0; give a number from 0.02 to 1",
    ),
    ("pizza --image {f}/picture.png --strength 1.5", "--strength is 1.5"),
    ("pizza --image {f}/picture.png --strength nan", "--strength is nan"),
    ("pizza --image {f}/picture.png --strength 0.1 --steps 6", "steps is 6; give 1 to 5"),
    ("pizza --size 40x32", "--size 40x32: give WxH in multiples of 16, for example 32x32"),
    ("pizza --size 32x40", "--size 32x40"),
    ("pizza --size abc", "--size abc"),
    ("pizza --size 32", "--size 32"),
    ("pizza --size 0x0", "--size 0x0"),
    ("pizza --size -32x32", "expected one argument"),
    ("pizza --steps 0", "steps is 0; give 1 to 50"),
    ("pizza --steps -1", "steps is -1; give 1 to 50"),
    ("pizza --steps 51", "steps is 51; give 1 to 50"),
    ("pizza --steps 1001 --sampler ddim", "steps is 1001; give 1 to 1000"),
    ("pizza --steps 0 --sampler dpmpp", "steps is 0; give 1 to 1000"),
    ("pizza --timesteps 499,999", "timesteps are [499, 999]; give them descending, each 0 to 999"),
    ("pizza --timesteps 1000", "timesteps are [1000]; give them descending, each 0 to 999"),
    ("pizza --timesteps 800,800", "timesteps are [800, 800]; give them descending"),
    ("pizza --timesteps 800,", "--timesteps is '800,'; give numbers, for example 999,749,499,249"),
    ("pizza --timesteps ''", "--timesteps is ''; give numbers"),
    ("pizza --timesteps 9.5", "--timesteps is '9.5'; give numbers"),
    ("pizza --timesteps 800 --steps 1", "--timesteps says which steps to take; leave out --steps"),
    (
        "pizza --image {f}/picture.png --timesteps 800 --strength 0.8",
        "leave out --steps and --strength",
    ),
    ("pizza --gamma 0 --sampler dpmpp", "--gamma needs --sampler lcm"),
    ("pizza --gamma 1.5", "--gamma is 1.5; give a number from 0 to 1"),
    ("pizza --gamma nan", "--gamma is nan; give a number from 0 to 1"),
    ("pizza --steps four", "invalid int value: 'four'"),
    ("pizza --count 0", "--count is 0; give 1 or more"),
    ("pizza --batch 0", "--batch is 0; give 1 or more"),
    ("pizza --seed x", "invalid int value: 'x'"),
    ("pizza --guidance strong", "invalid float value: 'strong'"),
    ("pizza --guidance nan", "--guidance is nan"),
    ("pizza --guidance 0.5", "--guidance is 0.5; give 1 or more (1 is off, and so is 0)"),
    ("pizza --guidance -1", "--guidance is -1.0; give 1 or more"),
    ("pizza --seed -2", "--seed is -2; give 0 to 18446744073709551615, or -1"),
    ("pizza --seed 88888888888888888888", "--seed is 88888888888888888888; give 0 to"),
    ("pizza --seed 18446744073709551615 --count 2", "leaves no seeds for 2 pictures"),
    ("pizza --strength 0.5", "--strength tells how much of --image to redraw"),
    (
        "'pizza <lora:blueprint:0.8>'",
        "<lora:blueprint:0.8> in a prompt is not read; give --lora blueprint:0.8",
    ),
    ("pizza --lora C:\\\\loras\\\\x.safetensors", "C:\\loras\\x.safetensors: no such file"),
    ("pizza --negative '<lyco:my style>'", "give --lora my style:1"),
    ("pizza --device mps", "--device mps, but PyTorch sees no GPU of Apple's"),
    ("--again {f}/none.png", "none.png: no such file"),
    ("--again {f}/words.txt", "words.txt: holds no recipe of sample.py; a sheet"),
    ("--again {f}/picture.png", "picture.png: holds no recipe"),
    ("--again {f}", ": holds no recipe of sample.py"),
    ("pizza --out {f}/picture.png", "picture.png: exists, and is kept"),
    ("pizza --sheet {f}/picture.png", "picture.png: exists, and is kept"),
    ("pizza rocket --out {t}/x.PNG", "is one file for 2 pictures"),
    ("pizza --out x.TGA", "--out x.TGA: pictures are written as .png"),
    ("pizza --out x.avif", "--out x.avif: pictures are written as .png"),
    ("pizza --dtype int8", "invalid choice: 'int8'"),
    ("pizza --device tpu", "invalid choice: 'tpu'"),
    ("pizza rocket --out {t}/x.png", "is one file for 2 pictures; give a folder: DIR/"),
    ("pizza --count 2 --out {t}/x.png", "is one file for 2 pictures; give a folder: DIR/"),
    ("pizza --out {f}/words.txt", "words.txt"),
    ("pizza --out {f}/words.txt/x/", "words.txt"),
    ("pizza --out {f}/words.txt/x.png", "words.txt"),
    ("pizza --out {f}/folder.png", "folder.png"),
    ("pizza --sheet {f}/words.txt/sheet.png", "words.txt"),
    ("pizza --out x.jpg", "--out x.jpg: pictures are written as .png"),
    ("pizza --sheet {t}/sheet.jpg", "give a file that ends in .png"),
    ("pizza --sheet {t}/x.png --out {t}/x.png", "in .png, other than --out"),
    ("pizza --stepz 4", "unrecognized arguments: --stepz"),
    ("'pizza \udcff'", r"'pizza \udcff' is not UTF-8 (surrogates not allowed); type it anew"),
]


@pytest.mark.parametrize("flags, message", MISTAKES)
def test_mistakes_give_one_line_and_no_file(bad_files, tmp_path, flags, message):
    """Each mistake ends in one line that holds what was given; no file was written anywhere."""

    def files_there():
        return sorted(
            p for folder in (bad_files, tmp_path) for p in folder.rglob("*") if p.is_file()
        )

    before = files_there()
    base = "--device cpu --model {f}/model.safetensors --lora {f}/lcm.safetensors --out {t}/out/ "
    argv = [x.format(f=bad_files, t=tmp_path) for x in shlex.split(base + flags)]
    with pytest.raises((SystemExit, ValueError, OSError)) as caught:
        sample.main(sample.parse(argv))
    text = str(caught.value)
    assert message in text and "\n" not in text
    # a text: exit code 1
    assert not isinstance(caught.value, SystemExit) or isinstance(caught.value.code, str)
    assert files_there() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda(files):
    with pytest.raises(SystemExit, match="PyTorch sees no CUDA device"):
        sample.parse(["pizza", "--device", "cuda"])


def test_as_a_command(bad_files, tmp_path, monkeypatch):
    """`python sample.py` leaves a mistake with one line, the script's name first, and exit 1."""
    for argv, message in (
        ([], "no prompt"),
        (["pizza", "--model", "none.safetensors"], "none.safetensors: no such file"),
        (["pizza", "--model", str(bad_files / "model.safetensors"), "--size", "1x1"], "--size 1x1"),
    ):
        monkeypatch.setattr(sys, "argv", ["sample.py", *argv])
        # stdout is pytest's here
        monkeypatch.setattr("minilcm.cli.output.plain_output", lambda: None)
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
        assert caught.value.code.startswith("sample.py: ") and message in caught.value.code
        assert "\n" not in caught.value.code


def test_in_a_shell(bad_files, tmp_path):
    """A whole process, elsewhere: one line on stderr, no traceback, exit 1, no file."""
    argv = ["pizza", "--device", "cpu", "--out", bad_files / "words.txt"]
    argv += ["--model", bad_files / "model.safetensors", "--lora", bad_files / "lcm.safetensors"]
    done = subprocess.run(
        [sys.executable, ROOT / "sample.py", *argv], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert (
        done.stderr.startswith("sample.py: ")
        and done.stderr.count("\n") == 1
        and "words.txt" in done.stderr
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_model_that_predicts_v(files, tmp_path, sampler):
    """--prediction v, and a file that says v and zero terminal SNR: the picture of `generate` by
    that schedule, unlike the one by eps.
    """
    unet = dataclasses.replace(CONFIG.unet, v=True, zero_snr=True)
    config = dataclasses.replace(CONFIG, unet=unet)
    zero = write_model(tmp_path / "zero.safetensors", config=config)
    plain, pictures = files / "model.safetensors", {}
    for name, path, more in (
        ("eps", plain, []),
        ("v", plain, ["--prediction", "v"]),
        ("zero", zero, []),
        ("zero as eps", zero, ["--prediction", "eps"]),
    ):
        argv = ["pizza", "--model", str(path), "--device", "cpu", "--dtype", "float32", *more]
        argv += ["--sampler", sampler, "--steps", "3", "--guidance", "1"]
        sample.main(sample.parse([*argv, "--out", str(tmp_path / f"{name}.png")]))
        pictures[name] = levels((tmp_path / f"{name}.png").read_bytes())
    unet, vae, text, _ = load_model(plain)
    eps_fn = guided_eps(unet, text.encode(["pizza"]), None, 0.0)
    for name, schedule in (
        ("v", make_schedule(v=True)),
        ("zero", make_schedule(v=True, zero_snr=True)),
        ("zero as eps", make_schedule()),
    ):
        pixels = generate(eps_fn, [0], (4, 8, 8), sampler, 3, vae.decode, schedule=schedule)
        assert np.abs(levels(png(to_images(pixels)[0])) - pictures[name]).max() <= 1
    assert np.array_equal(pictures["zero as eps"], pictures["eps"])
    assert np.abs(pictures["v"] - pictures["eps"]).mean() > 2
    assert np.abs(pictures["v"] - pictures["zero"]).mean() > 0.1


def test_tiny_decoder(files, tmp_path):
    """--vae takes a tiny decoder, whose picture is 2 decoder(z0) - 1; without an encoder there is
    no --image.
    """
    f8 = dataclasses.replace(CONFIG.vae, channels=(16,) * 4)
    config = dataclasses.replace(CONFIG, vae=f8, size=64)
    write_model(tmp_path / "f8.safetensors", config=config)
    torch.manual_seed(0)
    decoder = TinyDecoder().requires_grad_(False)
    save_file(decoder.state_dict(), tmp_path / "taesd.safetensors")
    model, vae = (str(tmp_path / f"{name}.safetensors") for name in ("f8", "taesd"))
    argv = ["pizza", "--model", model, "--vae", vae, "--device", "cpu", "--dtype", "float32"]
    argv += ["--steps", "1", "--out", str(tmp_path / "x.png")]
    sample.main(sample.parse(argv))
    unet, _, text, _ = load_model(model, vae_path=vae)
    generator = torch.Generator().manual_seed(0)
    z_T = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        eps_fn = guided_eps(unet, text.encode(["pizza"]), None, 0.0)
        pixels = 2 * decoder(sample_lcm(eps_fn, z_T, make_schedule(), [999], [generator])) - 1
    expected = (pixels[0].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5
    got = levels((tmp_path / "x.png").read_bytes())
    assert got.shape == (64, 64, 3) and np.abs(got - expected.numpy()).max() <= 1
    with pytest.raises(ValueError, match="a decoder alone cannot read --image; leave out --vae"):
        (tmp_path / "x.png").unlink()
        sample.main(sample.parse([*argv, "--image", str(files / "picture.png")]))
