"""What is said before a picture is drawn, a line each: what will be ignored or will spoil it."""

import difflib
import re
from argparse import Namespace
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from ..data.emoji import COLORS, STYLES, read_labels
from ..files.identify import Checkpoint, is_large
from ..files.lora_file import (
    EMOJI,
    SHIPPED,
    Lora,
    is_shipped,
    lcm_scale,
    read_recipe,
    recipe_in,
    speeds_up,
)
from ..generate import SAMPLERS

# ---- prompts

SMALL_WORDS = {"a", "an", "the", "of", "on", "in", "with", "and", "style", "background"}


def read_keywords(art: Path) -> dict[str, set[str]]:
    """{name: the words of the drawings' labels and keywords} from the art's .tar shards, if any."""
    words: dict[str, set[str]] = {}
    for meta in chain.from_iterable(map(read_labels, sorted(art.glob("*.tar")))):
        told = " ".join([meta["label"], *meta["keywords"]]).lower().split()
        words.setdefault(meta["name"], set()).update(told)
    return words


def list_names(names: tuple[str, ...]) -> None:
    """Print the closed list of what a model can draw, or that there is none."""
    if not names:
        return print("this model has no list of names: describe what you like")
    print("\n".join(names))
    print(f"styles: {', '.join(STYLES)}\nbackgrounds: {', '.join(COLORS)}")


def words_of(prompt: str) -> list[str]:
    return re.findall(r"[^\W_]+", prompt.lower())


def holds_name(prompt: str, names: tuple[str, ...]) -> bool:
    return any(f" {name} " in f" {' '.join(words_of(prompt))} " for name in names)


def nearest_names(prompt: str, names: tuple[str, ...], keywords: dict[str, set[str]]) -> list[str]:
    """[] if the prompt holds a known name, or a word of one that stands for no other.

    Else at most three names: those that share words with the prompt, or else are spelt alike.
    """
    words = set(words_of(prompt)) - SMALL_WORDS
    meanings = {name: {*name.split(), *keywords.get(name, ())} for name in names}
    meant = {word: [name for name in names if word in meanings[name]] for word in words}
    known = [word for word, found in meant.items() if len(found) == 1 and word in found[0].split()]
    if known or holds_name(prompt, names):
        return []
    shared = {name: len(words & meanings[name]) for found in meant.values() for name in found}

    def rank(name: str) -> tuple:
        """Words shared; of these, its own and not a keyword's; how little it means besides."""
        return -shared[name], -len(words & set(name.split())), len(meanings[name])

    best = sorted(shared, key=rank)
    return best[:3] or difflib.get_close_matches(prompt.lower(), names, n=3, cutoff=0.0)


OTHER_SYNTAX = re.compile(
    r"<\w+:[^<>]*>"  # A1111: <lora:name:0.8>, <hypernet:...>
    r"|\([^()]*:\s*-?[\d.]+\s*\)|\(\([^()]*\)+"  # (word:1.3), ((word))
    r"|\[[^\[\]]+\]"  # [word], [from:to:0.5], [a|b]
    r"|\{[^{}]*\}|__[\w/-]+__"  # dynamic prompts: {a|b}, __file__
    r"|\bembedding:\S+"  # ComfyUI
    r"|\b\w+(?:\+\+|--)"  # compel: word++
    r"|\b(?:BREAK|AND)\b"
)


def lora_tags(prompt: str) -> list[tuple[str, str]]:
    """(tag, FILE:LAMBDA) of A1111's <lora:name:0.8> in a prompt."""
    tags = re.finditer(r"<(?:lora|lyco):([^<>:]*)(?::(-?[\d.]+))?[^<>]*>", prompt)
    return [(m[0], f"{m[1]}:{m[2] or 1}") for m in tags]


def on_prompt(prompt: str, names: tuple[str, ...], art: Path, styled: bool) -> Iterator[str]:
    """About a prompt; `names`: all that the model knows; `art`: the folder of the drawings that it
    learned from; `styled`: a LoRA may know more styles.
    """
    if parts := OTHER_SYNTAX.findall(prompt):
        yield f"{' '.join(parts)}: read as plain words, not as other programs would"
    if not names:
        return
    looks = r"\w+ style\b|\bon an? [\w ]+ background\b"  # have their own lines below
    known = SMALL_WORDS.union(STYLES, COLORS, *map(str.split, names))
    told = words_of(re.sub(looks, "", prompt.lower()))
    unknown = [word for word in dict.fromkeys(told) if word not in known]
    named = [name for name in names if holds_name(prompt, (name,))]
    keywords = read_keywords(art) if unknown or not named else {}  # takes 0.2 s
    meant = set().union(*(keywords.get(name, ()) for name in named))
    if near := nearest_names(prompt, names, keywords):
        nearest = f"nearest: {', '.join(near)} (all: --list)"
        yield f"{prompt!r} holds no name this model knows; {nearest}"
    elif not styled and (unknown := [word for word in unknown if word not in meant]):
        yield f"{', '.join(unknown)}: in no caption this model was trained on"
    for style in re.findall(r"(\w+) style\b", prompt.lower()):
        if style not in STYLES and not styled:
            near = difflib.get_close_matches(style, [*STYLES, *SHIPPED.keys() - {"lcm"}], n=1)
            more = f"; nearest: {near[0]}" if near and near[0] != style else ""
            if near and near[0] in SHIPPED:
                more += f"; give --lora {near[0]} --lora lcm"
            yield f"{style} style is none of this model's styles: {', '.join(STYLES)}{more}"
    for color in re.findall(r"\bon an? ([\w ]+) background\b", prompt.lower()):
        if color not in COLORS:
            yield f"{color} is none of this model's backgrounds: {', '.join(COLORS)}"


# ---- settings


def on_settings(
    args: Namespace, checkpoint: Checkpoint, loras: list[Lora], shipped: bool
) -> Iterator[str]:
    """`args` are sample.py's; `shipped`: whether the model is, which has an LCM-LoRA."""
    config, needs_lcm = checkpoint.config, SAMPLERS[args.sampler].needs_lcm_lora
    full_lcm, (width, height) = config.unet.w_dim is not None, args.size
    merged = checkpoint.metadata.get("minilcm.merged", "")
    shares = [lcm_scale(read_recipe(path), path.name) for path, _ in loras]  # of an LCM-LoRA
    merged_lcm = lcm_scale(recipe_in(checkpoint.metadata))
    parts = [merged_lcm, *(lam * share for (_, lam), share in zip(loras, shares))]
    lcm, total = any(parts), sum(parts)
    if merged:
        yield f"merged into this model: {merged}"
    if lcm and needs_lcm and not 0.5 < total < 1.5:
        what = "burnt" if total > 1 else "blurred"
        yield f"LCM-LoRAs of {total:g} in all, where 1 is right: pictures will be {what}"
    for (path, lam), share in zip(loras, shares):
        if abs(lam) > 2 and not share:
            yield f"--lora {path.stem}:{lam:g} is far from 1: shapes will break up"
    if not needs_lcm and args.steps < (10 if is_large(config) else 4):
        yield f"{args.sampler} with --steps {args.steps} will be blurred; give --steps 25"
    if needs_lcm and not loras and not lcm and not full_lcm:
        yield "no --lora: few steps will be blurred, unless an LCM-LoRA is merged into this model"
    if needs_lcm and loras and not lcm and shipped:
        yield "no LCM-LoRA among these --lora: few steps will be blurred; add --lora lcm"
    if lcm and full_lcm:
        yield "this model is an LCM itself: an LCM-LoRA will spoil it; leave it out"
    elif lcm and args.guidance > 2:
        other = "--guidance 1 to 2" if needs_lcm else "--guidance 1 to 2, or no LCM-LoRA"
        yield f"guidance {args.guidance:g} is too much for an LCM-LoRA; give {other}"
    if args.negative and (full_lcm or args.guidance == 1):
        why = "a full LCM takes none" if full_lcm else "it needs a --guidance above 1"
        yield f"--negative changes nothing: {why}"
    if not 0.5 <= width * height / config.size**2 <= 2:
        own = f"{config.size}x{config.size}"
        yield f"--size {width}x{height} is far from this model's {own}: shapes will break up"


def advise(args: Namespace, checkpoint: Checkpoint, loras: list[Lora]) -> None:
    """Print all that there is to say."""
    lines = list(on_settings(args, checkpoint, loras, is_shipped(args.model)))
    # a combined LoRA may hold a style, too
    styled = any(not speeds_up(path) or "combined" in read_recipe(path) for path, _ in loras)
    names = checkpoint.config.names
    if len(args.prompts) > 1 and (whole := " ".join(args.prompts)) in names:
        lines.append(f'{len(args.prompts)} prompts; for one picture, quote it: "{whole}"')
    for prompt in args.prompts:
        lines += on_prompt(prompt, names, EMOJI / "art", styled)
    lines += on_prompt(args.negative, (), EMOJI / "art", styled)
    for line in lines:
        print(f"note: {line}")
