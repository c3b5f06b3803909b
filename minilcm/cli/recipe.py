"""The recipe inside a picture: what made it, as A1111 has it, and the command to draw it again."""

import re
import shlex
from argparse import Namespace
from pathlib import Path

from PIL import Image

from .. import __version__
from ..files.safetensors_file import sha256


def recipe_of(args: Namespace, loras: list[tuple[Path, float]]) -> dict[str, object]:
    """What made the pictures of a run, under A1111's names; hashes are ten digits of a sha256."""
    recipe = {
        "Steps": args.steps,
        "Sampler": args.sampler,
        "CFG scale": f"{args.guidance:g}",
        "Seed": None,  # each picture's own
        "Size": "{}x{}".format(*args.size),
        "Model": args.model.stem,
        "Lora": ", ".join(f"{path.stem}:{lam:g}" for path, lam in loras) or "none",
        "Version": f"minilcm {__version__}",
        "Precision": f"{args.dtype} on {args.device}",
        "Model hash": sha256(args.model)[:10],
    }
    if loras:
        hashes = ", ".join(f"{path.stem}: {sha256(path)[:10]}" for path, _ in loras)
        recipe["Lora hashes"] = f'"{hashes}"'
    if args.vae:
        recipe["VAE hash"] = sha256(args.vae)[:10]
    recipe |= {} if args.gamma is None else {"Gamma": f"{args.gamma:g}"}
    if args.timesteps:
        recipe["Timesteps"] = " ".join(map(str, args.timesteps))
    if args.image:
        recipe |= {"Denoising strength": args.strength, "Init image": args.image.name}
        recipe["Init image hash"] = sha256(args.image)[:10]
    return recipe


def command_line(args: Namespace, prompt: str, seed: int, model: Path | None) -> str:
    """The line that draws one of the pictures again, with all values; `model` None: the shipped."""
    used = "sampler", "gamma", "guidance", "negative", "lora", "prediction", "vae", "image"
    used += "dtype", "device"
    flags = {"seed": seed, "model": model, "size": "{}x{}".format(*args.size)}
    flags |= {flag: getattr(args, flag) for flag in used}
    flags |= {"batch": args.batch} if args.batch > 1 else {}
    if args.timesteps:
        flags["timesteps"] = ",".join(map(str, args.timesteps))
    else:
        flags |= {"steps": args.steps, "strength": args.strength if args.image else None}
    words = [f"--lora={lora}" for lora in flags.pop("lora")]
    words += [f"--{flag}={value}" for flag, value in flags.items() if value not in (None, "")]
    return shlex.join(["python", "sample.py", *words, "--", prompt])


def parameters(prompt: str, negative: str, recipe: dict[str, object]) -> str:
    """What A1111 writes and reads."""
    lines = [prompt, *([f"Negative prompt: {negative}"] if negative else [])]
    return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in recipe.items())])


def read_texts(path: Path) -> dict[str, str]:
    """The text chunks of a picture that sample.py drew. Raises ValueError for any other file."""
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    try:
        with Image.open(path) as image:
            texts = image.info
        if "parameters" in texts and shlex.split(texts["command"])[:2] == ["python", "sample.py"]:
            return texts
    except (OSError, ValueError, KeyError, AttributeError, Image.DecompressionBombError):
        pass
    raise ValueError(f"{path}: holds no recipe of sample.py; a sheet has none, its pictures have")


# of the files in a recipe, and the flag that names each
HASHES = {"Model hash": "model", "Lora hashes": "lora", "VAE hash": "vae"}
HASHES |= {"Init image hash": "image"}


def names_of(words: list[str]) -> list[str]:
    """`steps` of --steps=4, of --steps, and "" of what is no flag."""
    return [re.match("(?:--([a-z-]+))?", word)[1] or "" for word in words]


# {flag given: the picture's flags that it removes}
INSTEAD = {
    "timesteps": ("steps", "strength"),
    "steps": ("timesteps",),
    "strength": ("timesteps",),
    "image": ("strength",),
    "sampler": ("gamma", "steps", "timesteps", "guidance"),
}


def command_again(path: Path, argv: list[str], sampler: str) -> list[str]:
    """The command line inside a picture, with the flags of `argv`, of which one may be another
    `sampler`, in place of its own.
    """
    *flags, _, prompt = shlex.split(read_texts(path)["command"])[2:]
    given = {*names_of(argv)} - ({"sampler"} if f"--sampler={sampler}" in flags else set())
    drop = given.union(*(INSTEAD.get(name, ()) for name in given))
    kept = [flag for flag, name in zip(flags, names_of(flags)) if name not in drop]
    return [*kept, *argv, "--", prompt]


def check_same_files(path: Path, recipe: dict[str, object], argv: list[str]) -> None:
    """Raises ValueError unless the picture was drawn with files of the hashes in the recipe, except
    files that `argv` replaces.
    """
    drawn, given = read_texts(path)["parameters"], names_of(argv)
    for name, flag in HASHES.items():
        value = recipe.get(name)
        if value and flag not in given and f"{name}: {value}" not in drawn:
            then = re.search(rf'{name}: ("[^"]*"|\w+)', drawn)
            then = then[1] if then else "none"
            raise ValueError(f"{path}: drawn with other files: {name} {then}, now {value}")
