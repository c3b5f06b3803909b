"""advice.py: what is said of prompts and settings before a picture is drawn."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import CONFIG, ROOT, write_art

from minilcm.cli.advice import OTHER_SYNTAX, lora_tags, nearest_names, on_prompt, on_settings
from minilcm.files.identify import Checkpoint

EMOJI = ROOT / "weights/emoji"
EMOJI_NAMES = tuple((EMOJI / "names.txt").read_text().splitlines()[:64])

# ---- names


@pytest.mark.parametrize(
    "prompt",
    [
        "pizza",
        "a slice of pizza",
        "Pizza, noto style",
        "apple",
        "two penguins? penguin!",
        "CAT FACE",
        "rocket, on a pink background",
    ],
)
def test_known_names(prompt):
    """A whole name in the prompt, or a word that only one name has, is known, in any case."""
    assert nearest_names(prompt, EMOJI_NAMES, {}) == []


@pytest.mark.parametrize(
    "prompt, near", [("pengiun", "penguin"), ("helicopter", None), ("", None), ("???", None)]
)
def test_unknown_names(prompt, near):
    """Three names are offered, among them the one that was misspelt."""
    offered = nearest_names(prompt, EMOJI_NAMES, {})
    assert (
        len(offered) == 3 and set(offered) <= set(EMOJI_NAMES) and (near is None or near in offered)
    )


@pytest.mark.parametrize(
    "prompt, near",
    [("car", "automobile"), ("coffee", "hot beverage"), ("my puppy", "dog face")],
)
def test_keywords_of_the_art_lead_to_names(prompt, near):
    """No letters in common, and yet the nearest."""
    assert near not in nearest_names(prompt, EMOJI_NAMES, {})
    (line,) = on_prompt(prompt, EMOJI_NAMES, EMOJI / "art", False)
    assert line.startswith(f"{prompt!r} holds no name this model knows; nearest: {near}")


def test_without_the_art_names_are_compared_by_their_letters(tmp_path):
    (line,) = on_prompt("automobil", EMOJI_NAMES, tmp_path, False)
    assert "nearest: automobile, " in line


def test_a_word_of_several_names_is_not_silent(tmp_path):
    """A word that belongs to one name only, by its keywords too, stands for that name."""
    names = "mobile phone", "telephone", "red heart", "broken heart", "pizza"
    keywords = {"telephone": {"phone"}, "mobile phone": {"cell", "phone"}}
    assert set(nearest_names("phone", names, keywords)) == {"mobile phone", "telephone"}
    assert set(nearest_names("heart", names, {})) == {"red heart", "broken heart"}
    assert nearest_names("phone", names, {}) == [] == nearest_names("broken", names, {})


def test_the_art_is_read_where_it_is(tmp_path):
    (tmp_path / "art").mkdir()
    write_art(tmp_path / "art/noto.tar")
    (line,) = on_prompt(
        "thing", CONFIG.names, tmp_path / "art", False
    )  # every drawing's keyword there
    assert line.endswith("nearest: pizza, rocket, cat face (all: --list)")


# ---- styles and colours


@pytest.mark.parametrize(
    "prompt, styled, told",
    [
        ("pizza, noto style, on a pink background", False, ""),
        (
            "pizza, openmoji style",
            False,
            "openmoji style is none of this model's styles: noto, ",
        ),
        ("pizza, Blueprint style", False, "; give --lora blueprint --lora lcm"),
        ("pizza, blueprnt style", False, "; nearest: blueprint; give --lora blueprint --lora lcm"),
        ("pizza, twemojy style", False, "emojione; nearest: twemoji"),
        ("pizza, blueprint style", True, ""),
        ("pizza, on a crimson background", True, "crimson is none of this model's backgrounds"),
        ("a pink rocket, noto style, with the sea", False, "sea: in no caption this model was"),
        ("pizza \u5bff\u53f8", False, "\u5bff\u53f8: in no caption this model was trained on"),
        ("pizza, sea", True, ""),
    ],
)
def test_unknown_looks_are_said(prompt, styled, told):
    lines = list(on_prompt(prompt, EMOJI_NAMES, EMOJI / "art", styled))
    assert len(lines) == bool(told) and (not told or told in lines[0])
    assert not list(on_prompt(prompt, (), EMOJI / "art", styled))  # SD1.5 knows any


# ---- other programs' syntax


@pytest.mark.parametrize(
    "prompt, parts",
    [
        ("(rocket:1.3), on a pink background", ["(rocket:1.3)"]),
        (
            "rocket BREAK {red|blue} __color__ [cat:dog:0.5]",
            ["BREAK", "{red|blue}", "__color__", "[cat:dog:0.5]"],
        ),
        ("((rocket)), [dull], (grey:-1)", ["((rocket))", "[dull]", "(grey:-1)"]),
        (
            "a (very big: 1.21) rocket++ AND <hypernet:x:1>",
            ["(very big: 1.21)", "rocket++", "AND", "<hypernet:x:1>"],
        ),
        ("embedding:easynegative blurred", ["embedding:easynegative"]),
        ("a (red) rocket - and well-known, 1:3, don't AND_ break <3", []),
    ],
)
def test_syntax_of_other_programs_is_said(prompt, parts):
    assert OTHER_SYNTAX.findall(prompt) == parts
    assert [line.split(": read as")[0] for line in on_prompt(prompt, (), EMOJI, False)] == (
        [" ".join(parts)] if parts else []
    )


def test_lora_tags():
    assert lora_tags(
        "a <lora:my style-v2:0.8> b <lyco:x>, <lora:y:1:lbw=2> <b> 1<2 <lora:z:-.5>"
    ) == [
        ("<lora:my style-v2:0.8>", "my style-v2:0.8"),
        ("<lyco:x>", "x:1"),
        ("<lora:y:1:lbw=2>", "y:1"),
        ("<lora:z:-.5>", "z:-.5"),
    ]


# ---- settings

PARTS = [{"file": "a", "sha256": "0", "scale": 0.1, "objective": "lcm"}]
PARTS += [{"file": "b", "sha256": "1", "scale": 1.0}]
MIX = {"loras": json.dumps(PARTS)}


@pytest.mark.parametrize(
    "flags, told",
    [
        ({}, ""),
        ({"loras": []}, "no --lora: few steps will be blurred"),
        ({"loras": [], "merged": ["fast.safetensors:1", "lcm"]}, ""),
        ({"loras": [], "merged": ["lcm_lora.safetensors:1", None]}, ""),
        ({"loras": [], "merged": ["a.safetensors:1", "diffusion"]}, "no --lora: few steps will"),
        ({"merged": ["fast.safetensors:1", "lcm"]}, "LCM-LoRAs of 2 in all, where 1 is right: "),
        ({"lambdas": [8.0]}, "LCM-LoRAs of 8 in all, where 1 is right: pictures will be burnt"),
        ({"lambdas": [0.25]}, "LCM-LoRAs of 0.25 in all, where 1 is right: pictures will be blur"),
        ({"lambdas": [0.75]}, ""),
        ({"merged": ["fast.safetensors:0.1", "lcm"], "loras": []}, "LCM-LoRAs of 0.1 in all"),
        ({"lambdas": [0.0], "sampler": "ddim", "guidance": 4.0}, ""),
        ({"merged": ["fast.safetensors:-1", "lcm"], "lambdas": [2.0]}, ""),
        (
            {"loras": [Path("mix.safetensors")], "recipe": MIX},
            "LCM-LoRAs of 0.1 in all, where 1 is right: pictures will be blurred",
        ),
        ({"loras": [Path("mix.safetensors")], "recipe": MIX, "lambdas": [10.0]}, ""),
        (
            {"loras": [Path("x.safetensors"), Path("lcm.safetensors")], "lambdas": [5.0, 1.0]},
            "--lora x:5 is far from 1",
        ),
        ({"lambdas": [0.25], "sampler": "ddim"}, ""),
        ({"loras": [], "sampler": "ddim", "steps": 3}, "ddim with --steps 3 will be blurred"),
        ({"loras": [], "sampler": "dpmpp", "steps": 4}, ""),
        (
            {"loras": [], "sampler": "dpmpp", "steps": 9, "large": True},
            "dpmpp with --steps 9 will be",
        ),
        ({"loras": [], "sampler": "dpmpp", "steps": 10, "large": True}, ""),
        ({"loras": [], "sampler": "ddim", "guidance": 8.0}, ""),
        ({"guidance": 2.0}, ""),
        ({"guidance": 4.0, "w_dim": 256}, "this model is an LCM itself: an LCM-LoRA will spoil it"),
        ({"guidance": 8.0}, "guidance 8 is too much for an LCM-LoRA; give --guidance 1 to 2"),
        ({"guidance": 4.0, "sampler": "ddim"}, "give --guidance 1 to 2, or no LCM-LoRA"),
        (
            {"guidance": 4.0, "sampler": "dpmpp", "loras": [], "merged": ["lcm:1", "lcm"]},
            "or no LCM",
        ),
        ({"negative": "rocket"}, "--negative changes nothing: it needs a --guidance above 1"),
        ({"negative": "rocket", "guidance": 1.5}, ""),
        (
            {"negative": "rocket", "guidance": 1.5, "w_dim": 256, "loras": []},
            "a full LCM takes none",
        ),
        ({"size": (64, 32)}, ""),
        ({"size": (64, 48)}, "--size 64x48 is far from this model's 32x32"),
        ({"size": (16, 16)}, "--size 16x16 is far from this model's 32x32"),
    ],
)
def test_ruinous_settings_get_a_line(monkeypatch, flags, told):
    """One line where a picture will be spoilt or a flag ignored, and none where it will not."""
    monkeypatch.setattr("minilcm.files.lora_file.read_recipe", lambda path: flags.get("recipe", {}))
    monkeypatch.setattr("minilcm.cli.advice.read_recipe", lambda path: flags.get("recipe", {}))
    monkeypatch.setattr("minilcm.cli.advice.is_large", lambda config: "large" in flags)
    args = dict(sampler="lcm", guidance=1.0, negative="", size=(32, 32), steps=4) | flags
    merged, objective = flags.get("merged", (None, None))
    file, _, scale = (merged or "x:1").rpartition(":")
    part = {"file": file, "sha256": "0", "scale": float(scale), "objective": objective}
    recipe = json.dumps([part])
    metadata = {"minilcm.merged": merged, "minilcm.loras": recipe} if merged else {}
    unet = replace(CONFIG.unet, w_dim=flags.get("w_dim"))
    checkpoint = Checkpoint(Path("x"), {}, metadata, replace(CONFIG, unet=unet))
    loras = flags.get("loras", [Path("lcm.safetensors")])
    loras = list(zip(loras, flags.get("lambdas", [1.0])))
    lines = list(on_settings(Namespace(**args), checkpoint, loras, False))
    if merged:
        assert lines.pop(0) == f"merged into this model: {merged}"
    assert len(lines) == bool(told) and (not told or told in lines[0])
