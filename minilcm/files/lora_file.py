"""LoRA files <-> tau, {path: (up, down, lora_alpha)}, in any spelling of lora_keys and names."""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from einops import einsum
from torch import Tensor

from ..lora import Tau
from ..merge import check_fit, no_kernel, with_kernel
from ..model.unet import small_sd, tiny_sd
from .identify import FAMILIES, Family
from .lora_keys import by_module
from .names import TOWERS, module_table, text_paths, text_table, to_diffusers_path
from .safetensors_file import MALFORMED, all_finite, read_header, read_tensors, write_tensors

Lora = tuple[Path, float]  # file and lambda
EMOJI = Path(__file__).parents[2] / "weights/emoji"  # the shipped model and its LoRAs
SHIPPED = {"lcm": "lcm_lora", "blueprint": "blueprint", "papercut": "papercut"}


def parse_lora(text: str) -> Lora:
    """`FILE[:LAMBDA]` -> (path, lambda); LAMBDA is 1 when it is left out."""
    name, colon, number = text.rpartition(":")
    if not colon or re.search(r"[/\\]", number) or Path(text).is_file():  # a colon of the name
        name, number = text, "1"
    try:
        lam = float(number)
    except ValueError:
        lam = math.nan
    if not math.isfinite(lam):
        example = f"give FILE:LAMBDA, for example {name}:0.8"
        raise ValueError(f"{text}: {number!r} is not a number; {example}")
    return Path(name), lam


def find_lora(path: Path) -> Path:
    """The shipped file for `lcm`, `blueprint` or `papercut`, unless a file has that name; for a
    run's folder its lora.safetensors. Raises ValueError for what looks like another such word.
    """
    word = str(path)
    if word in SHIPPED and not path.is_file():
        return EMOJI / f"{SHIPPED[word]}.safetensors"
    if (path / "lora.safetensors").is_file():
        return path / "lora.safetensors"
    if re.fullmatch(r"\d*\.?\d+", word) and not path.exists():
        raise ValueError(f"{word}: no such file; to scale a LoRA, write FILE:{word}")
    if not path.exists() and (not path.suffix or path.stem in SHIPPED):
        raise ValueError(f"{word}: no such file; the shipped ones are {', '.join(SHIPPED)}")
    return path


def is_shipped(model: Path) -> bool:
    """Whether a checkpoint is the model of weights/emoji."""
    return model.resolve() == (EMOJI / "model.safetensors").resolve()


def find_family(modules: dict[str, tuple[Tensor, Tensor]]) -> Family:
    """The family whose UNet has most of these {flattened name: (up, down)}, then by shape."""
    best = {}
    for family in FAMILIES.values():
        table, shaped = module_table(family.unet), 0
        named = modules.keys() & table.keys()
        for flat in named:
            sides = zip(modules[flat], (0, 1), table[flat][1])
            shaped += all(x.shape[i] == width for x, i, width in sides if x.ndim > 1)
        best[family] = len(named), shaped
        if shaped == len(modules):
            return family  # nothing can fit better: no need to build the larger UNets
    return max(best, key=best.get)


def family_of(tau: Tau) -> Family:
    """`find_family` for a tau."""
    of_unet = [path for path in tau if not path.startswith(tuple(TOWERS))]
    return find_family({path.replace(".", "_"): tau[path][:2] for path in of_unet})


def read_tau(path: str | Path) -> Tau:
    """A LoRA file as {path: (up, down, lora_alpha)} in float32; a missing alpha means rank.

    Raises ValueError with one line: no such file, damaged, not a LoRA, another kind of adapter, a
    key that names no module, a module spelled twice, ranks that do not fit, values not finite.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    modules, spelled = by_module(path, tensors)
    of_unet = {flat: (x["up"], x["down"]) for (te, flat), x in modules.items() if not te}
    family, settings = find_family(of_unet), peft_settings(path, metadata)
    if not settings and any(key.startswith("base_model.model.") for key in tensors):
        what = "lora_alpha is taken as the rank; PEFT's default is 8"
        print(f"{path}: no adapter_config.json: {what}")
    table = {flat: path for flat, (path, _) in module_table(family.unet).items()}
    paths = {(te, flat): (text_table() if te else table).get(flat) for te, flat in modules}
    paths.pop(("te1.", "text_projection"), None)  # CLIP-L has none
    unknown = [module for module in modules if paths.get(module) is None]
    acts = [m for m in unknown if modules[m]["up"].any() and modules[m]["down"].any()]
    if acts:
        what = f"{len(acts)} of {len(modules)} modules are in no known UNet"
        begin = "(joint|double|single)_blocks|(single_)?transformer_"
        transformer = all(re.match(begin, "".join(module)) for module in acts)
        hint = "; it is for SD3 or Flux, which are no UNets" if transformer else ""
        first = ", ".join(module[0] + spelled[module] for module in acts[:5])
        raise ValueError(f"{path}: {what}, first: {first}{hint}")
    if unknown:  # ComfyUI's LoraSave writes embeddings that are the same in both models, too
        first = "".join(unknown[0])
        print(f"{path}: {len(unknown)} modules that change nothing are left out, first: {first}")
    tau: Tau = {}
    for module, parts in modules.items():
        if module in unknown:
            continue
        target, up, down = module[0] + paths[module], parts["up"], parts["down"]
        if target in tau:
            spelled_twice = "in the file twice, in LDM and in diffusers spelling"
            raise ValueError(f"{path}: {target} is {spelled_twice}")
        if "mid" in parts:  # LoCon's Tucker form: down is 1x1, mid has the kernel
            down = einsum(parts["mid"], down.flatten(1), "p q h w, q i -> p i h w")
        if "alpha" in parts:
            lora_alpha = parts["alpha"].item()
        elif module[0] in settings:
            lora_alpha = settings[module[0]].lora_alpha(spelled[module], down.shape[0])
        else:
            lora_alpha = float(down.shape[0])
        if "scalar" in parts:  # LyCORIS: one more factor
            lora_alpha *= parts["scalar"].item()
        tau[target] = (*with_kernel(up, down, down.shape[2:]), lora_alpha)
    return tau


def read_taus(loras: list[Lora], weights: dict[str, Tensor]) -> list[Tau]:
    """`read_tau` of each file, all checked to fit `weights`, {key: tensor or shape}, of a model."""
    taus = [read_tau(path) for path, _ in loras]
    for (path, _), tau in zip(loras, taus):
        for te, tower in TOWERS.items():
            first = next((x for x in tau if x.startswith(te)), None)
            if first and not any(key.startswith(te) for key in weights):
                what = f"{tower}, a text encoder that is not here"
                raise ValueError(f"{path}: changes {what}, first: {first}")
        check_fit(weights, tau, str(path))
    return taus


class PeftSettings(NamedTuple):
    """What PEFT stores beside the tensors of one network."""

    default: float  # lora_alpha
    patterns: dict[str, float]  # {end of a module's name, or a regular expression: lora_alpha}
    rslora: bool  # scales by alpha / sqrt(r): as alpha / r that is an alpha of alpha sqrt(r)

    def lora_alpha(self, module: str, rank: int) -> float:
        """By the first pattern that matches the end of `module`'s name, at a dot."""
        scale = rank**0.5 if self.rslora else 1.0
        names = module, f"text_model.{module}"  # text encoders: patterns have it or not
        for pattern, alpha in self.patterns.items():
            if any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in names):
                return alpha * scale
        return self.default * scale


def peft_settings(path: Path, metadata: dict[str, str]) -> dict[str, PeftSettings]:
    """{prefix in tau: settings} from the header, else from adapter_config.json beside the file."""
    config, inside = path.parent / "adapter_config.json", "lora_adapter_metadata" in metadata
    if not inside and not config.is_file():
        return {}
    where = "lora_adapter_metadata" if inside else str(config)
    try:
        raw = json.loads(metadata[where] if inside else config.read_text())
        names = {"unet.": "", "text_encoder.": "te1.", "text_encoder_2.": "te2."}
        settings = {}
        for theirs, ours in names.items():
            theirs = theirs if inside else ""  # beside the file: of its one network
            if any(key.startswith(theirs) for key in raw.keys()) or not inside:
                alphas = raw.get(theirs + "alpha_pattern") or {}
                patterns = {pattern: float(alpha) for pattern, alpha in alphas.items()}
                default, rslora = float(raw[theirs + "lora_alpha"]), theirs + "use_rslora"
                settings[ours] = PeftSettings(default, patterns, bool(raw.get(rslora)))
                for pattern in patterns:
                    re.compile(pattern)
                    if re.search(r"[*+?{(|]", pattern):  # a malicious one could run for years
                        raise ValueError(f"the pattern {pattern} has repeats or choices")
                if not all(map(math.isfinite, (default, *patterns.values()))):
                    raise ValueError("an alpha is not finite")
        if not settings:  # else the ranks would be taken, without a word
            raise ValueError("its networks are none of unet, text_encoder and text_encoder_2")
    except (*MALFORMED, re.error) as error:
        what = ascii(f"{type(error).__name__} {error}"[:200])
        raise ValueError(f"{path}: {where} does not hold PEFT's settings ({what})") from None
    return settings


def read_recipe(path: str | Path) -> dict[str, str]:
    """What `write_tau` recorded: {"w": "7.5", "K": "50", ...}, without the `minilcm.` prefix."""
    return recipe_in(read_header(path)[1])


def parts_of(recipe: dict[str, str]) -> list[dict]:
    """[{file, sha256, scale, objective, w}] of a combined LoRA, or of a model that some are merged
    into; [] of any other.
    """
    try:
        parts = json.loads(recipe.get("loras", "[]"))
        # the sum fails, as it should, where one of the two is no text
        return [x | {"scale": float(x["scale"])} for x in parts if x["file"] + x["sha256"]]
    except MALFORMED:
        return []


def lcm_scale(recipe: dict[str, str], name: str = "") -> float:
    """By how much a LoRA file, or a model that some are merged into, seems to hold an LCM-LoRA: 1
    alone, the sum of its lambdas in a combination.
    """
    if parts := parts_of(recipe):
        marked = [x for x in parts if "lcm" in f"{x['file']} {x.get('objective')}".lower()]
        return sum(x["scale"] for x in marked)
    marks = recipe.get("objective", ""), name, recipe.get("merged", "")
    return float(any("lcm" in mark.lower() for mark in marks) or "combined" in recipe)


def speeds_up(lora: Path) -> bool:
    """Whether a file seems to hold an LCM-LoRA, alone or combined, by its recipe or its name."""
    return lcm_scale(read_recipe(lora), lora.name) != 0


def recipe_in(metadata: dict[str, str]) -> dict[str, str]:
    ours = [key for key in metadata if key.startswith("minilcm.")]
    return {key.removeprefix("minilcm."): metadata[key] for key in ours}


def write_tau(
    path: str | Path,
    tau: Tau,
    recipe: dict[str, str],
    dtype: torch.dtype = torch.float16,
    style: str | None = None,
    kept: dict[str, str] | None = None,
) -> None:
    """Write a LoRA file, atomically, with the recipe as metadata `minilcm.*` and what is `kept`.

    style: "diffusers" (G1), "ldm" (G2) or "peft" (G4). The default is what most programs read: G1
    for SD1.x; G2 for SDXL, because A1111 ignores one of SDXL's modules in G1, and for small-sd and
    tiny-sd, whose names in G1 can be SD1.x's. lora_alpha is rounded to `dtype` in kohya's styles.
    Raises ValueError for a module that `read_tau` would refuse, or a value too large for `dtype`.
    """
    family = family_of(tau)
    cfg, table = family.unet(), module_table(family.unet)
    is_xl = cfg.adm is not None
    style = style or ("ldm" if is_xl or family.unet in (small_sd, tiny_sd) else "diffusers")
    tensors, settings = {}, {}
    for target, (up, down, lora_alpha) in tau.items():
        if target in text_paths():
            part, module = target.split(".", 1)
            module = module if module == "text_projection" else f"text_model.{module}"
            shape = no_kernel((up.shape[0], *down.shape[1:]))
        elif target.replace(".", "_") in table:
            part, module = "unet", target if style == "ldm" else to_diffusers_path(target, cfg)
            shape = table[target.replace(".", "_")][1]
        else:
            raise ValueError(f"{path}: {target} is in no known UNet; it could not be read again")
        if no_kernel((1, 1, *shape[2:])) == no_kernel((1, 1, *down.shape[2:])):
            up, down = with_kernel(up, down, shape[2:])  # as the official weight, for other readers
        for x in (up, down):
            if not all_finite(x.to(dtype)):
                large = f"too large for {str(dtype)[6:]}; give --dtype float32"
                what = large if all_finite(x) else "not finite; lower LAMBDA, if there is one"
                raise ValueError(f"{path}: {target} has values {what}")
        if style == "peft":
            name = {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2"}[part]
            tensors[f"{name}.{module}.lora_B.weight"] = up.to(dtype)
            tensors[f"{name}.{module}.lora_A.weight"] = down.to(dtype)
            settings.setdefault(name, {})[module] = down.shape[0], lora_alpha
        else:
            part = "te" if part == "te1" and not is_xl else part
            flat = f"lora_{part}_{module.replace('.', '_')}"
            tensors[f"{flat}.lora_up.weight"] = up.to(dtype)
            tensors[f"{flat}.lora_down.weight"] = down.to(dtype)
            tensors[f"{flat}.alpha"] = torch.tensor(lora_alpha, dtype=dtype)
    metadata = (kept or {}) | lora_metadata(tau, family, settings)
    metadata |= {"modelspec.title": Path(path).stem}
    write_tensors(path, tensors, metadata | {f"minilcm.{k}": v for k, v in recipe.items()})


def lora_metadata(
    tau: Tau, family: Family, settings: dict[str, dict[str, tuple[int, float]]]
) -> dict[str, str]:
    """What the lists of kohya, A1111 and ComfyUI read: A1111 hides SDXL LoRAs that don't say so."""
    ranks = sorted({down.shape[0] for _, down, _ in tau.values()})
    alphas = sorted({lora_alpha for _, _, lora_alpha in tau.values()})
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": ",".join(map(str, ranks)),
        "ss_network_alpha": ",".join(f"{a:g}" for a in alphas),
        "ss_v2": str(family.unet().context_dim == 1024),
        "modelspec.sai_model_spec": "1.0.1",
    }
    bases = {  # by the width of the prompt
        768: ("sd_v1", "stable-diffusion-v1/lora"),
        1024: ("sd_v2", "stable-diffusion-v2-512/lora"),
        2048: ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    }
    if base := bases.get(family.unet().context_dim):
        metadata["ss_base_model_version"], metadata["modelspec.architecture"] = base
    if settings:  # PEFT: one rank and lora_alpha for a network, patterns for modules that differ
        raw = {}
        for name, modules in settings.items():
            r, lora_alpha = next(iter(modules.values()))
            alphas = {m: alpha for m, (_, alpha) in modules.items() if alpha != lora_alpha}
            raw |= {f"{name}.r": r, f"{name}.lora_alpha": lora_alpha}
            raw[f"{name}.target_modules"] = sorted(modules)
            raw[f"{name}.rank_pattern"] = {m: x for m, (x, _) in modules.items() if x != r}
            raw[f"{name}.alpha_pattern"] = alphas
        metadata["lora_adapter_metadata"] = json.dumps(raw, indent=2, sort_keys=True)
    return metadata
