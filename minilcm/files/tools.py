"""Work on LoRA and checkpoint files, in float32; a checkpoint is written one tensor at a time.

dW = (lora_alpha / rank) B A. A LoRA is given with its lambda, and written with a recipe of what it
was made from.
"""

import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from ..lora import Tau
from ..merge import add_delta_, combine, delta_norms, distance, extract_tau, no_kernel, reduce_rank
from .checkpoint import Place, places, weight_shapes
from .identify import (
    BIG_G,
    CLIP_L,
    FAMILIES,
    UNET,
    VAE_,
    identify_header,
    is_lora,
    open_checkpoint,
    part_of,
)
from .lora_file import check_lora, family_of, read_recipe, read_tau, recipe_in, write_tau
from .names import TOWERS
from .safetensors_file import Header, all_finite, read_header, rewrite

BLOCK = 1 << 19  # values merged at a time: as many as a processor's cache holds

Lora = tuple[Path, float]  # file and lambda


def check_out(out: Path, inputs: list[Path], force: bool) -> None:
    """Raises ValueError if `out` is one of the inputs, or exists and `force` is not set."""
    for path in inputs:
        if out.exists() and path.exists() and os.path.samefile(out, path):
            raise ValueError(f"{out}: is one of the inputs; give another -o")
    if out.exists() and not force:
        raise ValueError(f"{out}: exists; give another -o, or --force")


def recipe_text(loras: list[Lora], sign: float = 1.0) -> str:
    return " ".join(f"{path.name}:{sign * lam:g}" for path, lam in loras)


# ---- info


def info(path: Path) -> None:
    """Print what a file is."""
    header, metadata = read_header(path)
    dtypes = ", ".join(
        f"{n} {dtype}" for dtype, n in Counter(e.dtype for e in header.values()).most_common()
    )
    print(f"{path}: {path.stat().st_size:,} bytes, {len(header)} tensors: {dtypes}")
    if is_lora(header):
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
    extra = ", full LCM: it takes w" if config.unet.w_dim else ""
    extra += ", predicts v" if config.unet.v else ""
    extra += ", zero terminal SNR" if config.unet.zero_snr else ""
    base = replace(config.unet, w_dim=None, v=False, zero_snr=False)
    title = next(
        (family.title for family in FAMILIES.values() if family.unet() == base),
        "a model by minilcm" if "minilcm.config" in metadata else "a UNet of other sizes",
    )
    print(f"  checkpoint: {title}, native {config.size}x{config.size}{extra}")
    first = "OpenCLIP-H" if config.text.open_clip else "CLIP-L"
    for part, prefixes in (("UNet", UNET), ("VAE", VAE_), (first, CLIP_L), ("bigG", BIG_G)):
        if found := part_of(header, prefixes):
            print(f"  {part:10} {sum(math.prod(shape) for _, shape in found.values()):,} values")
    for key, value in metadata.items():
        shown = ascii(value[:200])[1:-1]
        print(f"  {key}: {shown}{' ...' * (len(value) >= 200)}")


# ---- LoRA files


def combine_files(
    loras: list[Lora], out: Path, dtype: torch.dtype, style: str | None, force: bool
) -> None:
    """tau_mix = sum_i lambda_i tau_i."""
    check_out(out, [path for path, _ in loras], force)
    mix = combine([read_tau(path) for path, _ in loras], [lam for _, lam in loras])
    write_tau(out, mix, {"combined": recipe_text(loras)}, dtype, style)
    print(f"{out}: {len(mix)} modules, rank {max(down.shape[0] for _, down, _ in mix.values())}")


def resize_file(
    lora: Path,
    out: Path,
    dtype: torch.dtype,
    style: str | None,
    force: bool,
    rank: int | None = None,
    energy: float | None = None,
    against: Path | None = None,
) -> None:
    """The best tau of a lower rank, and what it loses."""
    check_out(out, [lora], force)
    tau = read_tau(lora)
    small, residual = reduce_rank(tau, rank, energy)
    for path, lost in residual.items():
        print(f"  {lost:.4f}  rank {tau[path][1].shape[0]} -> {small[path][1].shape[0]}  {path}")
    print(f"total ||dW - dW'|| / ||dW|| = {distance(small, tau):.4f}")
    if against:
        print(f"{against}: ||dW_it - dW|| / ||dW|| = {distance(read_tau(against), tau):.4f}")
    write_tau(out, small, read_recipe(lora) | {"resized": f"from {lora.name}"}, dtype, style)
    print(out)


# ---- checkpoint files


def merge_file(
    checkpoint: Path, loras: list[Lora], out: Path, force: bool, sign: float = 1.0
) -> None:
    """W <- W + sign lambda dW for each LoRA; all other tensors stay byte for byte."""
    check_out(out, [checkpoint, *(path for path, _ in loras)], force)
    header = open_checkpoint(checkpoint).header
    shapes, taus = weight_shapes(header), [read_tau(path) for path, _ in loras]
    for (path, _), tau in zip(loras, taus):
        check_lora(shapes, tau, str(path))

    where, by_key = places(header), {}
    for path, parts in combine(taus, [sign * lam for _, lam in loras]).items():
        by_key.setdefault(where[path].key, []).append((where[path], parts))

    def add(
        key: str, changes: list[tuple[Place, tuple[Tensor, Tensor, float]]]
    ) -> Callable[[Tensor], Tensor]:
        def change(weight: Tensor) -> Tensor:
            if not all_finite(weight):
                raise ValueError(f"{checkpoint}: {key} has values that are not finite")
            changed = weight.clone()
            for place, parts in changes:
                add_delta_(place.view(changed), *parts, block=BLOCK)
            return changed

        return change

    metadata = {"format": "pt", "minilcm.merged": recipe_text(loras, sign)}
    rewrite(checkpoint, out, metadata, {key: add(key, changes) for key, changes in by_key.items()})
    print(f"{out}: {len(by_key)} of {len(header)} tensors changed")


def extract_file(
    base: Path,
    tuned: Path,
    rank: int,
    out: Path,
    dtype: torch.dtype,
    style: str | None,
    force: bool,
) -> None:
    """The best tau of this rank for dW = W_tuned - W_base."""
    check_out(out, [base, tuned], force)
    here, there = places(read_header(base)[0]), places(read_header(tuned)[0])
    tau: Tau = {}
    with safe_open(base, "pt") as a, safe_open(tuned, "pt") as b:
        for path in tqdm(sorted(here.keys() & there.keys()), desc="modules", disable=None):
            x = here[path].view(a.get_tensor(here[path].key).float())
            y = there[path].view(b.get_tensor(there[path].key).float())
            if x.ndim < 2 or no_kernel(tuple(x.shape)) != no_kernel(tuple(y.shape)):
                continue
            if not torch.equal(x, y.reshape(x.shape)):
                tau |= extract_tau(path, y.reshape(x.shape) - x, rank)
    if not tau:
        raise ValueError(f"{base} and {tuned} do not differ in any weight that a LoRA can change")
    write_tau(out, tau, {"extracted": f"{tuned.name} - {base.name}"}, dtype, style)
    print(f"{out}: {len(tau)} modules, rank {rank}")


# ---- diff


def diff(path_a: Path, path_b: Path) -> None:
    """Print which keys two files do not share, and how far their tensors are apart."""
    (a, _), (b, _) = read_header(path_a), read_header(path_b)
    for keys, path in ((a.keys() - b.keys(), path_a), (b.keys() - a.keys(), path_b)):
        if keys:
            print(f"{len(keys)} keys only in {path}, first: {', '.join(sorted(keys)[:5])}")
    same = 0
    with safe_open(path_a, "pt") as fa, safe_open(path_b, "pt") as fb:
        for key in tqdm(sorted(a.keys() & b.keys()), desc="tensors", disable=None):
            if a[key].shape != b[key].shape:
                print(f"  shape {a[key].shape} against {b[key].shape}  {key}")
                continue
            x, y = fa.get_tensor(key).float(), fb.get_tensor(key).float()
            if torch.equal(x, y):
                same += 1
                continue
            far = ((x - y).norm() / y.norm().clamp(min=1e-12)).item()
            print(f"  {far:.3e} of the norm, at most {(x - y).abs().max().item():.3e}  {key}")
    print(f"{same} of {len(a.keys() & b.keys())} common tensors are equal")
    if is_lora(a) and is_lora(b):  # B R and R^-1 A are the same LoRA as B and A
        far = distance(read_tau(path_a), read_tau(path_b))
        print(f"their changes of the weights differ by ||dW - dW'|| / ||dW'|| = {far:.3e}")
