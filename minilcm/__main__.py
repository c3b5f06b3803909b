"""Work on LoRA and checkpoint files, in float32, one tensor at a time where a checkpoint is written.

    info     what is this file?             python -m minilcm info lcm.safetensors
    combine  tau' = sum_i lambda_i tau_i    python -m minilcm combine style.safetensors:0.8 lcm.safetensors:1.0 -o mix.safetensors
    resize   the best tau of a lower rank   python -m minilcm resize lcm.safetensors --rank 16 -o small.safetensors
    merge    W <- W + lambda dW             python -m minilcm merge sd15.safetensors lcm.safetensors:1.0 -o fast.safetensors
    unmerge  W <- W - lambda dW             python -m minilcm unmerge fast.safetensors lcm.safetensors:1.0 -o base.safetensors
    extract  dW = W_tuned - W_base          python -m minilcm extract base.safetensors tuned.safetensors --rank 32 -o tau.safetensors
    diff     which keys differ, how far     python -m minilcm diff a.safetensors b.safetensors
    plot     the course of a training run   python -m minilcm plot runs/lcm

dW = (lora_alpha / rank) B A. combine concatenates ranks, which is exact; averaging A and B is not.
"""  # noqa: E501

import argparse
import math
import os
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from .files.checkpoint import places
from .files.identify import BIG_G, CLIP_L, UNET, VAE_, identify, part_of
from .files.lora_file import parse_lora, read_recipe, read_tau, write_tau
from .files.names import module_table
from .files.safetensors_file import all_finite, atomic, read_header, rewrite
from .lora import Tau
from .merge import add_delta_, check_fit, combine, delta, extract_tau, no_kernel, reduce_rank, split_parts
from .model.unet import emoji, sd15, sdxl, ssd1b
from .run.diagnostics import delta_norms, read_metrics
from .run.plot import draw_run

FAMILIES = {"the emoji model": emoji, "SD1.x": sd15, "SSD-1B": ssd1b, "SDXL base": sdxl}
BLOCK = 1 << 19  # values merged at a time: as many as a processor's cache holds
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_out(out: Path, inputs: list[Path], force: bool) -> None:
    """Raises ValueError if `out` is one of the inputs, or exists and --force is not given."""
    for path in inputs:
        if out.exists() and path.exists() and os.path.samefile(out, path):
            raise ValueError(f"{out}: is one of the inputs; give another -o")
    if out.exists() and not force:
        raise ValueError(f"{out}: exists; give another -o, or --force")


def distance(a: Tau, b: Tau) -> float:
    """||a - b||_F / ||b||_F over all modules of both."""
    total = norm = 0.0
    for path in a.keys() | b.keys():
        da, db = (delta(*tau[path]) if path in tau else 0.0 for tau in (a, b))
        total += float(torch.as_tensor(da - db).square().sum())
        norm += float(torch.as_tensor(db).square().sum())
    return (total / norm) ** 0.5 if norm else 0.0


def is_lora(header: dict) -> bool:
    return any(re.search(r"\.?lora[._]", key) for key in header)


def lora_family(tau: Tau) -> str:
    """The first family that has all of tau's UNet modules: SSD-1B's are all among SDXL's."""
    unet, _ = split_parts(tau)
    paths = {name: {path for path, _ in module_table(cfg).values()} for name, cfg in FAMILIES.items()}
    return next((name for name in FAMILIES if unet.keys() <= paths[name]), "no known UNet")


# ---- commands


def info(args) -> None:
    for path in args.files:
        header, metadata = read_header(path)
        dtypes = ", ".join(f"{n} {dtype}" for dtype, n in Counter(e.dtype for e in header.values()).most_common())
        print(f"{path}: {path.stat().st_size:,} bytes, {len(header)} tensors: {dtypes}")
        if is_lora(header):
            tau = read_tau(path)
            ranks = Counter(down.shape[0] for _, down, _ in tau.values())
            alphas = Counter(lora_alpha for _, _, lora_alpha in tau.values())
            parts = Counter({"te1.": "CLIP-L", "te2.": "bigG"}.get(path[:4], "UNet") for path in tau)
            size = sum(up.numel() + down.numel() for up, down, _ in tau.values())
            modules = ", ".join(f"{part} {n} modules" for part, n in parts.items())
            print(f"  LoRA for {lora_family(tau)}: {modules}, {size:,} parameters")
            print("  rank       " + ", ".join(f"{r} ({n})" for r, n in sorted(ranks.items())))
            print("  lora_alpha " + ", ".join(f"{a:g} ({n})" for a, n in sorted(alphas.items())))
            for block, norm in delta_norms(tau).items():
                print(f"  ||dW|| {norm:10.4f}  {block}")
            for key, value in read_recipe(path).items():
                print(f"  {key}: {value}")
        else:
            config = identify(path)
            lcm = ", full LCM: it takes w" if config.unet.w_dim else ""
            base = replace(config.unet, w_dim=None)
            name = next((name for name, cfg in FAMILIES.items() if cfg() == base), "a model by minilcm")
            print(f"  checkpoint: {name}, native {config.size}x{config.size}{lcm}")
            for part, prefixes in (("UNet", UNET), ("VAE", VAE_), ("CLIP-L", CLIP_L), ("bigG", BIG_G)):
                if found := part_of(header, prefixes):
                    print(f"  {part:10} {sum(math.prod(shape) for _, shape in found.values()):,} values")
            for key, value in metadata.items():
                print(f"  {key}: {ascii(value)[1:-1] if len(value) < 200 else ascii(value[:200])[1:-1] + ' ...'}")


def combine_files(args) -> None:
    loras = [parse_lora(text) for text in args.loras]
    check_out(args.out, [path for path, _ in loras], args.force)
    mix = combine([read_tau(path) for path, _ in loras], [lam for _, lam in loras])
    recipe = {"combined": " ".join(f"{path.name}:{lam:g}" for path, lam in loras)}
    write_tau(args.out, mix, recipe, DTYPES[args.dtype], args.style)
    print(f"{args.out}: {len(mix)} modules, rank {max(down.shape[0] for _, down, _ in mix.values())}")


def resize(args) -> None:
    check_out(args.out, [args.lora], args.force)
    tau = read_tau(args.lora)
    small, residual = reduce_rank(tau, args.rank, args.energy)
    for path, lost in residual.items():
        print(f"  {lost:.4f}  rank {tau[path][1].shape[0]} -> {small[path][1].shape[0]}  {path}")
    print(f"in all ||dW - dW'|| / ||dW|| = {distance(small, tau):.4f}")
    if args.against:
        print(f"{args.against}: ||dW_it - dW|| / ||dW|| = {distance(read_tau(args.against), tau):.4f}")
    recipe = read_recipe(args.lora) | {"resized": f"from {args.lora.name}"}
    write_tau(args.out, small, recipe, DTYPES[args.dtype], args.style)
    print(args.out)


def merge(args, sign: float = 1.0) -> None:
    loras = [parse_lora(text) for text in args.loras]
    check_out(args.out, [args.checkpoint, *(path for path, _ in loras)], args.force)
    identify(args.checkpoint)
    header, _ = read_header(args.checkpoint)
    where, taus = places(header), [read_tau(path) for path, _ in loras]
    shapes = {}
    for path, place in where.items():
        shape = header[place.key].shape
        rows = len(range(*place.rows.indices(shape[0]))) if shape else 0
        shape = shape[::-1] if place.transposed else (rows, *shape[1:])
        shapes[f"{path}.weight"] = torch.empty(shape, device="meta")
    for (path, _), tau in zip(loras, taus):
        check_fit(shapes, tau, str(path))

    mix = combine(taus, [sign * lam for _, lam in loras])
    by_key: dict[str, list] = {}
    for path, parts in mix.items():
        by_key.setdefault(where[path].key, []).append((where[path], parts))

    def add(key: str):
        def change(weight: Tensor) -> Tensor:
            changed = weight.clone()
            for place, (up, down, lora_alpha) in by_key[key]:
                rows = changed.T if place.transposed else changed[place.rows]
                n = max(1, BLOCK // rows[0].numel())
                for i in range(0, len(rows), n):
                    wide = rows[i : i + n].float()
                    add_delta_(wide, up[i : i + n], down, lora_alpha)
                    if not all_finite(wide):
                        raise ValueError(f"{args.checkpoint}: {key} has values that are not finite")
                    rows[i : i + n] = wide
            return changed

        return change

    note = " ".join(f"{path.name}:{sign * lam:g}" for path, lam in loras)
    rewrite(args.checkpoint, args.out, {"format": "pt", "minilcm.merged": note}, {key: add(key) for key in by_key})
    print(f"{args.out}: {len(by_key)} of {len(header)} tensors changed")


def extract(args) -> None:
    check_out(args.out, [args.base, args.tuned], args.force)
    (base, _), (tuned, _) = read_header(args.base), read_header(args.tuned)
    here, there = places(base), places(tuned)
    tau: Tau = {}
    with safe_open(args.base, "pt") as a, safe_open(args.tuned, "pt") as b:
        for path in tqdm(sorted(here.keys() & there.keys()), desc="modules", disable=None):
            x, y = (
                weight.T if place.transposed else weight[place.rows]
                for weight, place in (
                    (a.get_tensor(here[path].key).float(), here[path]),
                    (b.get_tensor(there[path].key).float(), there[path]),
                )
            )
            if x.ndim < 2 or no_kernel(tuple(x.shape)) != no_kernel(tuple(y.shape)):
                continue
            if not torch.equal(x, y.reshape(x.shape)):
                tau |= extract_tau(path, y.reshape(x.shape) - x, args.rank)
    if not tau:
        raise ValueError(f"{args.base} and {args.tuned} do not differ in any weight that a LoRA can change")
    recipe = {"extracted": f"{args.tuned.name} - {args.base.name}"}
    write_tau(args.out, tau, recipe, DTYPES[args.dtype], args.style)
    print(f"{args.out}: {len(tau)} modules, rank {args.rank}")


def diff(args) -> None:
    (a, _), (b, _) = read_header(args.a), read_header(args.b)
    for keys, path in ((a.keys() - b.keys(), args.a), (b.keys() - a.keys(), args.b)):
        if keys:
            print(f"{len(keys)} keys only in {path}, first: {', '.join(sorted(keys)[:5])}")
    same = 0
    with safe_open(args.a, "pt") as fa, safe_open(args.b, "pt") as fb:
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
        far = distance(read_tau(args.a), read_tau(args.b))
        print(f"what they add to the weights differs by ||dW - dW'|| / ||dW'|| = {far:.3e}")


def plot(args) -> None:
    figure, out = draw_run(read_metrics(args.run / "metrics.jsonl"), str(args.run)), args.run / "plot.png"
    with atomic(out) as part:
        figure.savefig(part, format="png", dpi=120)
    print(out)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m minilcm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, what: str, writes: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=what, description=what)
        if writes:
            sub.add_argument("-o", "--out", type=Path, required=True, help="file to write")
            sub.add_argument("--force", action="store_true", help="write over --out if it exists")
        if writes and name not in ("merge", "unmerge"):
            sub.add_argument("--dtype", choices=DTYPES, default="float16", help="of the LoRA written")
            styles = "names of the modules: diffusers (G1), ldm (G2) or peft (default: what most programs read)"
            sub.add_argument("--style", choices=["diffusers", "ldm", "peft"], help=styles)
        return sub

    sub = command("info", "Family, ranks, alphas, norm of each block's delta, recipe.", writes=False)
    sub.add_argument("files", nargs="+", type=Path, metavar="FILE")
    sub = command("combine", "tau' = sum_i lambda_i tau_i, exact by concatenation of ranks.")
    sub.add_argument("loras", nargs="+", metavar="FILE[:LAMBDA]")
    sub = command("resize", "The best approximation of a lower rank, by SVD; prints what it loses.")
    sub.add_argument("lora", type=Path)
    size = sub.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, help="at most this rank in each module")
    size.add_argument("--energy", type=float, help="keep this share of the sum of squared singular values, e.g. 0.99")
    sub.add_argument(
        "--against", type=Path, help="also print how far this LoRA is, of a lower rank, from the one given"
    )
    for name, sign in (("merge", "+"), ("unmerge", "-")):
        what = f"W {sign} lambda dW for each LoRA, into a checkpoint file, rounded to its number format"
        sub = command(name, f"{what}; all other tensors stay byte for byte.")
        sub.add_argument("checkpoint", type=Path)
        sub.add_argument("loras", nargs="+", metavar="FILE[:LAMBDA]")
    sub = command("extract", "The LoRA of the difference between two checkpoints, of a given rank.")
    sub.add_argument("base", type=Path)
    sub.add_argument("tuned", type=Path)
    sub.add_argument("--rank", type=int, required=True)
    sub = command("diff", "Which keys two files do not share, and how far their tensors are apart.", writes=False)
    sub.add_argument("a", type=Path)
    sub.add_argument("b", type=Path)
    sub = command("plot", "RUN/plot.png from the RUN/metrics.jsonl that train.py writes.", writes=False)
    sub.add_argument("run", type=Path, metavar="RUN", help="the run's --out folder")
    for one in (parser, *commands.choices.values()):
        one.error = lambda message: sys.exit(f"minilcm: {message}")  # one line, exit 1
    args = parser.parse_args(argv)
    if getattr(args, "rank", None) is not None and args.rank < 1:
        parser.error(f"--rank is {args.rank}; give 1 or more")
    if getattr(args, "energy", None) is not None and not 0 < args.energy <= 1:
        parser.error(f"--energy is {args.energy}; give a number above 0, at most 1")
    return args


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    if args.command == "unmerge":
        return merge(args, -1.0)
    run = {"info": info, "combine": combine_files, "resize": resize, "merge": merge, "extract": extract, "diff": diff}
    (run | {"plot": plot})[args.command](args)


if __name__ == "__main__":
    try:
        main(parse())
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.exit(f"minilcm: {error}")
    except KeyboardInterrupt:
        sys.exit("minilcm: stopped; nothing was written")
