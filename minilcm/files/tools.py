"""Work on LoRA and checkpoint files, in float32; a checkpoint is written one tensor at a time."""

import json
import math
import os
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from ..lora import Tau
from ..merge import (
    add_delta_,
    combine,
    delta_norms,
    distance,
    extract_module,
    no_kernel,
    reduce_rank,
)
from .checkpoint import places, weight_shapes
from .identify import FAMILIES, identify_header, of_adapter, open_checkpoint, refuse_quantised
from .lora_file import (
    Lora,
    family_of,
    parts_of,
    read_recipe,
    read_tau,
    read_taus,
    recipe_in,
    write_tau,
)
from .lora_keys import of_lora
from .names import TOWERS, module_table, text_paths
from .parts import BIG_G, PARTS, part_of
from .safetensors_file import (
    MALFORMED,
    Header,
    all_finite,
    check_name,
    read_header,
    rewrite,
    sha256,
)

BLOCK = 1 << 19  # values merged at a time: as many as a processor's cache holds


def check_out(out: Path, inputs: list[Path], force: bool) -> None:
    """Refuse an `out` that is an input, a folder, or there without `force`; make its folder."""
    check_name(out)
    if out.is_dir():
        raise ValueError(f"{out}: is a folder; give a file, for example {out}/new.safetensors")
    if out.suffix != ".safetensors":  # by which other programs know the format
        raise ValueError(f"{out}: its name does not end in .safetensors; give -o one that does")
    for path in inputs:
        if out.exists() and path.exists() and os.path.samefile(out, path):
            raise ValueError(f"{out}: is one of the inputs; give another -o")
    if out.exists() and not force:
        raise ValueError(f"{out}: exists; give another -o, or --force")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out}: its folder cannot be made ({error.strerror})") from None


# ---- what the headers of the inputs say


def recipe_of_loras(loras: list[Lora], sign: float = 1.0, before: str | None = None) -> list[dict]:
    """[{file, sha256, scale, objective, w}] of what was added, of a combination its parts, after
    those in `before` (JSON).
    """
    recipe = {x["sha256"]: x for x in parts_of({"loras": before or "[]"})}
    for path, lam in loras:
        known = read_recipe(path)
        alone = {"file": path.name, "sha256": sha256(path)[:10], "scale": 1.0}
        alone |= {k: known[k] for k in ("objective", "w") if k in known}
        for part in parts_of(known) or [alone]:
            scale = recipe.get(part["sha256"], {"scale": 0.0})["scale"]
            recipe[part["sha256"]] = part | {"scale": scale + sign * lam * part["scale"]}
    return [x for x in recipe.values() if abs(x["scale"]) > 1e-9]  # the rest is taken away again


def recipe_text(recipe: list[dict]) -> str:
    return " ".join(f"{x['file']}:{x['scale']:g}" for x in recipe)


# Of one file's tensors, so no longer true
OF_ONE_FILE = re.compile(
    r"sshs_\w+|ss_v2|ss_network_(dim|alpha|module|args)|lora_adapter_metadata|format|minilcm\..*"
    r"|modelspec\.(hash_sha256|date|title|sai_model_spec)"
)
# Kept even if not all files say it
FOR_PEOPLE = re.compile(
    "licen[cs]e|author|copyright|trigger|trained_?words|tag_frequency|description|usage_hint"
    "|comment"
)


def read_metadata(path: Path) -> dict[str, str]:
    """What a file says that may be true of another made from it."""
    metadata = read_header(path)[1]
    return {key: x for key, x in metadata.items() if not OF_ONE_FILE.fullmatch(key)}


def for_people(paths: list[Path]) -> dict[str, str]:
    """Licence, authors, trigger words and the like, of all the files."""
    said: dict[str, list[str]] = {}
    for key, value in [x for path in paths for x in read_metadata(path).items()]:
        if FOR_PEOPLE.search(key):
            said.setdefault(key, []).append(value)
    return {key: united(list(dict.fromkeys(values))) for key, values in said.items()}


def kept_metadata(paths: list[Path]) -> dict[str, str]:
    """What is for people, and what else all files share; one printed line names the rest."""
    kept, heads = for_people(paths), [read_metadata(path).items() for path in paths]
    kept |= dict(set(heads[0]).intersection(*heads))
    if rest := {key for head in heads for key, _ in head} - kept.keys():
        first = ", ".join(map(ascii, sorted(rest)[:5]))
        print(f"{len(rest)} entries of metadata differ and are left out, first: {first}")
    return kept


def united(values: list[str]) -> str:
    """Several texts as one; dictionaries in JSON, as kohya's tag counts are, stay one."""
    if len(values) == 1:
        return values[0]
    try:
        dicts = [json.loads(value) for value in values]
        return json.dumps({key: x for one in reversed(dicts) for key, x in one.items()})
    except MALFORMED:
        return "; ".join(values)


# ---- info


def info(path: Path) -> None:
    """Print what a file is."""
    header, metadata = read_header(path)
    counts = Counter(entry.dtype for entry in header.values()).most_common()
    dtypes = ", ".join(f"{n} {dtype}" for dtype, n in counts)
    print(f"{path}: {path.stat().st_size:,} bytes, {len(header)} tensors: {dtypes}")
    if any(map(of_adapter, header)):
        lora_info(read_tau(path), recipe_in(metadata))
    else:
        checkpoint_info(path, header, metadata)


def lora_info(tau: Tau, recipe: dict[str, str]) -> None:
    ranks = Counter(down.shape[0] for _, down, _ in tau.values())
    alphas = Counter(lora_alpha for _, _, lora_alpha in tau.values())
    parts = Counter(TOWERS.get(path[:4], "UNet") for path in tau)
    size = sum(up.numel() + down.numel() for up, down, _ in tau.values())
    modules = ", ".join(f"{part} {n} modules" for part, n in parts.items())
    print(f"  LoRA for {family_of(tau).title}: {modules}, {size:,} parameters")
    print("  rank       " + ", ".join(f"{r} ({n})" for r, n in sorted(ranks.items())))
    print("  lora_alpha " + ", ".join(f"{a:g} ({n})" for a, n in sorted(alphas.items())))
    for block, norm in delta_norms(tau).items():
        print(f"  ||dW|| {norm:10.4f}  {block}")
    for key, value in recipe.items():
        print(f"  {key}: {value}")


def checkpoint_info(path: Path, header: Header, metadata: dict[str, str]) -> None:
    config = identify_header(path, header, metadata)
    more = ", full LCM: it takes w" if config.unet.w_dim else ""
    more += ", predicts v" if config.unet.v else ""
    more += ", zero terminal SNR" if config.unet.zero_snr else ""
    base = replace(config.unet, w_dim=None, v=False, zero_snr=False)
    title = "a model by minilcm" if "minilcm.config" in metadata else "a UNet of other sizes"
    title = next((x.title for x in FAMILIES.values() if x.unet() == base), title)
    print(f"  checkpoint: {title}, native {config.size}x{config.size}{more}")
    extra = set(header)
    first = "OpenCLIP-H" if config.text.open_clip else "CLIP-L"
    for part, prefixes in zip(("UNet", "VAE", first, "bigG"), PARTS):
        if found := part_of(header, prefixes):
            extra -= {key for key, _ in found.values()}
            print(f"  {part:10} {sum(math.prod(shape) for _, shape in found.values()):,} values")
    if extra:
        first = ", ".join(sorted(extra)[:5])
        print(f"  not used   {len(extra)} keys, first: {first}")
    for key, value in metadata.items():
        shown = ascii(value[:200])[1:-1]
        print(f"  {key}: {shown}{' ...' * (len(value) >= 200)}")


# ---- LoRA files


def combine_files(loras: list[Lora], out: Path, dtype: torch.dtype, style: str | None) -> None:
    """tau_mix = sum_i lambda_i tau_i."""
    mix = combine([read_tau(path) for path, _ in loras], [lam for _, lam in loras])
    made = recipe_of_loras(loras)
    recipe = {"combined": recipe_text(made), "loras": json.dumps(made)}
    lcm = next((x for x in made if x.get("objective") == "lcm"), {})
    recipe |= {key: lcm[key] for key in ("objective", "w") if key in lcm}
    write_tau(out, mix, recipe, dtype, style, kept_metadata([path for path, _ in loras]))
    print(f"{out}: {len(mix)} modules, rank {max(down.shape[0] for _, down, _ in mix.values())}")


def resize_file(
    lora: Path,
    out: Path,
    dtype: torch.dtype,
    style: str | None,
    rank: int | None,
    energy: float | None,
    against: Path | None,
) -> None:
    """The best tau of a lower rank, and what it loses."""
    tau, other = read_tau(lora), read_tau(against) if against else None
    small, residual = reduce_rank(tau, rank, energy)
    for path, lost in residual.items():
        print(f"  {lost:.4f}  rank {tau[path][1].shape[0]} -> {small[path][1].shape[0]}  {path}")
    print(f"total ||dW - dW'|| / ||dW|| = {distance(small, tau):.4f}")
    if other:
        print(f"{against}: ||dW_it - dW|| / ||dW|| = {distance(other, tau):.4f}")
    recipe = read_recipe(lora) | {"resized": f"from {lora.name}"}
    write_tau(out, small, recipe, dtype, style, kept_metadata([lora]))
    print(out)


# ---- checkpoint files


def merge_file(base: Path, loras: list[Lora], out: Path, sign: float) -> None:
    """W <- W + sign lambda dW for each LoRA; all other tensors stay byte for byte."""
    _, header, metadata, _ = open_checkpoint(base)
    taus = read_taus(loras, weight_shapes(header))
    where, by_key = places(header), {}
    for path, parts in combine(taus, [sign * lam for _, lam in loras]).items():
        by_key.setdefault(where[path].key, []).append((where[path], parts))

    def change(key: str, weight: Tensor) -> Tensor:
        if not all_finite(weight):
            raise ValueError(f"{base}: {key} has values that are not finite")
        changed = weight.clone()
        for place, parts in by_key[key]:
            try:
                add_delta_(place.view(changed), *parts, block=BLOCK)
            except ValueError as error:
                raise ValueError(f"{base}: {key}: {error}") from None
        return changed

    recipe = recipe_of_loras(loras, sign, metadata.pop("minilcm.loras", None))
    stale = "minilcm.merged", "modelspec.hash_sha256"
    metadata = {k: v for k, v in metadata.items() if k not in stale} | {"format": "pt"}
    metadata |= for_people([base, *(path for path, _ in loras)])
    if recipe:  # not so, if what was merged has been taken away again
        metadata |= {"minilcm.merged": recipe_text(recipe), "minilcm.loras": json.dumps(recipe)}
    rewrite(base, out, metadata, {key: partial(change, key) for key in by_key})
    print(f"{out}: {len(by_key)} of {len(header)} tensors changed")


def differing(a: safe_open, b: safe_open, base: Header, tuned: Header) -> list[str]:
    """The keys of `tuned` whose tensors differ from those of `base`, or are not there, by parts."""
    keys = []
    for prefixes in PARTS:
        here = part_of(base, prefixes)
        for name, (key, shape) in part_of(tuned, prefixes).items():
            if name not in here:  # bigG has two layouts: another name tells nothing
                keys += [key] if prefixes is not BIG_G else []
            else:
                x, y = a.get_tensor(here[name][0]).float(), b.get_tensor(key).float()
                fits = no_kernel(x.shape) == no_kernel(shape)
                keys += [] if fits and torch.equal(x.flatten(), y.flatten()) else [key]
    return keys


def extract_file(
    base: Path, tuned: Path, rank: int, out: Path, dtype: torch.dtype, style: str | None
) -> None:
    """A tau of this rank, close to the best, for dW = W_tuned - W_base."""
    headers = read_header(base)[0], read_header(tuned)[0]
    for path, header in zip((base, tuned), headers):
        refuse_quantised(path, header)
    here, there = map(places, headers)
    tau: Tau = {}
    with safe_open(base, "pt") as a, safe_open(tuned, "pt") as b:
        for path in tqdm(sorted(here.keys() & there.keys()), desc="modules", disable=None):
            x = here[path].view(a.get_tensor(here[path].key).float())
            y = there[path].view(b.get_tensor(there[path].key).float())
            if no_kernel(x.shape) == no_kernel(y.shape) and not torch.equal(x, y.reshape(x.shape)):
                difference = y.reshape(x.shape) - x
                if not all_finite(difference):
                    key = there[path].key
                    raise ValueError(f"{base} or {tuned}: {key} has values that are not finite")
                tau[path] = extract_module(difference, rank)
        if tau:
            table = module_table(family_of(tau).unet)
            tau = {p: tau[p] for p in tau if p in text_paths() or p.replace(".", "_") in table}
        held = {there[path].key for path in tau}
        left_out = [key for key in differing(a, b, *headers) if key not in held]
    if not tau:
        what = "no weight that a LoRA can change has one shape in both and other values"
        raise ValueError(f"{base} and {tuned}: {what}; give a model and its fine-tune")
    if left_out:
        first = ", ".join(left_out[:5])
        print(f"{len(left_out)} tensors differ that a LoRA cannot change; left out, first: {first}")
    recipe = {"extracted": f"{tuned.name} - {base.name}"}
    write_tau(out, tau, recipe, dtype, style, for_people([tuned]))
    print(f"{out}: {len(tau)} modules, rank {rank}")


# ---- diff


def diff(path_a: Path, path_b: Path) -> None:
    """Print which keys two files do not share, and how far their tensors are apart; of two LoRAs
    how far their deltas are, as B R and R^-1 A are the same LoRA as B and A.
    """
    (a, _), (b, _) = read_header(path_a), read_header(path_b)
    for keys, path in ((a.keys() - b.keys(), path_a), (b.keys() - a.keys(), path_b)):
        if keys:
            print(f"{len(keys)} keys only in {path}, first: {', '.join(sorted(keys)[:5])}")
    if any(map(of_lora, a)) and any(map(of_lora, b)):
        far = distance(read_tau(path_a), read_tau(path_b))
        print(f"the LoRAs differ by ||dW - dW'|| / ||dW'|| = {far:.3e}")
        return
    same, furthest = 0, (0.0, "")
    with safe_open(path_a, "pt") as fa, safe_open(path_b, "pt") as fb:
        for key in tqdm(sorted(a.keys() & b.keys()), desc="tensors", disable=None):
            if no_kernel(a[key].shape) != no_kernel(b[key].shape):
                print(f"  shape {a[key].shape} against {b[key].shape}  {key}")
                continue
            if {a[key].dtype[:2], b[key].dtype[:2]} & {"F4", "F6"}:
                print(f"  {a[key].dtype} against {b[key].dtype}, not compared  {key}")
                continue
            y = fb.get_tensor(key).float()
            x = fa.get_tensor(key).float().reshape(y.shape)
            if torch.equal(x, y):
                same += 1
                continue
            far = ((x - y).norm() / y.norm().clamp(min=1e-12)).item()
            far = math.inf if math.isnan(far) else far
            furthest = max(furthest, (far, key))
            print(f"  {far:.3e} of the norm, at most {(x - y).abs().max().item():.3e}  {key}")
    far, key = furthest
    more = f"; furthest apart: {far:.3e} of the norm, {key}" if key else ""
    print(f"{same} of {len(a.keys() & b.keys())} common tensors are equal{more}")
