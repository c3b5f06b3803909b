"""The paper, measured: eight questions that the LCM-LoRA report (2311.05556) leaves its readers with, a function each.

    python paper/run.py --quick          all eight, small, under ten minutes on 2 cores: proves the chain, no science
    python paper/run.py                  all eight, hours; what is done is kept under runs/paper/, so stop it at will
    python paper/run.py steps rank       some
    python paper/run.py rank --seed 1    again with other pictures and other training noise, beside the first

Each writes results/NAME.json: numbers with 95 % intervals, the rule of the verdict and the verdict, seed, commit,
processor, seconds; and pictures into figures/. `python paper/report.py` makes figures and README.md of them. --quick
writes into runs/paper/quick, another seed results/NAME-seed1.json.
"""

import argparse
import json
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import correlation, mean
from typing import NamedTuple

import torch
import verdicts
from lab import (
    CACHE,
    CATEGORY,
    EMOJI,
    HALF,
    HERE,
    SCHEDULE,
    Base,
    Draw,
    Prompt,
    Recipe,
    Vector,
    Vectors,
    W,
    bound,
    cached,
    changed,
    decoded_images,
    drawn,
    frechet,
    interval,
    measure,
    noise,
    open_lab,
    pairs,
    pictures,
    prompts_of,
    rms,
    shipped,
    spent,
    spent_now,
    train,
    wilson,
)
from styled import open_reader, read_latents
from styles import KINDS, REAL

from minilcm.data.emoji import compose, read_art, split_art
from minilcm.data.pictures import contact_sheet, save_png
from minilcm.files.identify import Config, identify, sd15_config, sdxl_config, ssd1b_config
from minilcm.files.lora_file import write_tau
from minilcm.files.safetensors_file import atomic
from minilcm.lora import ATTENTION, TARGETS, Tau
from minilcm.merge import combine, delta, delta_norms, factorise, reduce_rank
from minilcm.model.text import TextEncoder
from minilcm.model.unet import UNet
from minilcm.model.vae import VAE
from minilcm.objective import Objective, loss_of, make_networks
from minilcm.run.diagnostics import consistency_along_trajectory, guided_trajectory
from minilcm.run.plan import LiveBytes, Step, peak_bytes, size_of, step_bytes
from minilcm.schedule import eps_from_x0
from minilcm.solver import ddim_step, sample_ddim, sample_dpmpp_2m

TEACHER, FOUR = Draw("ddim", 50, W), Draw("lcm", 4)
SOLVERS = {"ddim": "DDIM", "dpmpp": "DPM-Solver++"}
CONV = tuple(t for t in TARGETS if t in ("in_layers.2", "out_layers.3", "skip_connection", "op", "conv"))
LAMBDA_STYLE, LAMBDA_LCM = 0.8, 1.0  # of the report's Fig. 3
ALLOWED, FLOOR = 0.1, 0.5  # see verdicts.combination


class Size(NamedTuple):
    """How much of everything."""

    quick: bool
    seeds: tuple[int, ...]  # of pictures
    seed: int  # of training
    prompts: int | None  # None: all
    few: int  # prompts where many settings are compared
    steps: int  # of a short training
    style_steps: int
    tune_steps: int
    looks: int  # compositions of each drawing to train on
    styles: tuple[str, ...]
    grid: tuple[float, ...]  # lambdas


def size_of_run(quick: bool, seed: int) -> Size:
    if quick:
        return Size(True, (2 * seed,), seed, 8, 6, 4, 6, 8, 1, ("sepia", "outline"), (0.0, 1.0))
    grid = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
    return Size(False, (2 * seed, 2 * seed + 1), seed, None, 100, 300, 300, 800, 4, tuple(KINDS), grid)


def short(size: Size) -> Recipe:
    """The LCM-LoRA that is trained many times: of few steps, in other things as the shipped one."""
    marks = (0, size.steps // 8, size.steps // 2)
    return Recipe(steps=size.steps, seed=size.seed, looks=size.looks, marks=marks)


# ---- 1


def peak_of(flags: list[str]) -> float:
    """GB that train.py holds at its peak, encoding and sheets included, above the imports; in a process of its own."""
    sys.path.insert(0, str(HERE.parent))
    import train as script

    before = peak_bytes("cpu")
    script.main(script.parse(flags))
    return (peak_bytes("cpu") - before) / 1e9


def memory(size: Size) -> dict:
    """What does LoRA save against full LCM distillation?"""
    choices = {"LCM-LoRA": ["--rank", "64", "--w", "3"], "full LCM": ["--full", "--w", "2:14"]}
    measured = {}
    for label, flags in choices.items():
        out = CACHE / f"memory-{label.replace(' ', '-')}"
        argv = ["--objective", "lcm", *flags, "--data", f"{EMOJI}/art", "--steps", "2", "--looks", "1"]
        argv += ["--batch", "2" if size.quick else "32"]
        for old in out.glob("*"):
            old.unlink()
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            measured[label] = pool.submit(peak_of, [*argv, "--out", str(out), "--device", "cpu"]).result()
    report = {"SD-V1.5": 67.5e6, "SSD-1B": 105e6, "SDXL": 197e6}  # Table 1
    families = {"SD-V1.5": (sd15_config(), 512), "SSD-1B": (ssd1b_config(), 1024), "SDXL": (sdxl_config(), 1024)}
    planned = {}
    for family, (config, side) in list(families.items())[: 1 if size.quick else 3]:
        for label, rank in (("LCM-LoRA", 64), ("full LCM", None)):
            objective = Objective("lcm", rank, w_range=(7.5, 7.5) if rank else (2.0, 14.0), checkpointing=True)
            parts, count = step_bytes(objective, config, Step(1, side, "cuda", torch.bfloat16))
            parts = {k: v / 1e9 for k, v in parts.items() if k != "pictures to look at"}
            planned.setdefault(family, {})[label] = {"parts": parts, "total": sum(parts.values()), "trained": count}
        lora, full = planned[family]["LCM-LoRA"], planned[family]["full LCM"]
        planned[family] |= {"share": lora["total"] / full["total"], "times": full["total"] / lora["total"],
            "report": report[family], "off": lora["trained"] / report[family] - 1, "pixels": side}  # fmt: skip
    share = measured["LCM-LoRA"] / measured["full LCM"]
    full_size = {"SD-V1.5": count_parts(sd15_config()), "SSD-1B": count_parts(ssd1b_config())}
    full_size |= {"SDXL": count_parts(sdxl_config())}
    return {"measured": measured, "measured share": share, "planned": planned, "parameters": full_size}


def count_parts(config: Config) -> dict[str, int]:
    """Parameters of UNet, text encoders and VAE, from shapes alone."""
    with torch.device("meta"):
        parts = {"UNet": UNet(config.unet), "text": TextEncoder(config.text), "VAE": VAE(config.vae)}
    return {part: sum(x.numel() for x in module.parameters()) for part, module in parts.items()}


# ---- 2


def steps(size: Size) -> dict:
    """Quality in 1 to 8 steps, at equal numbers of network evaluations."""
    prompts, lab, vector = prompts_of("all", size.prompts), open_lab(), [(shipped("lcm_lora"), 1.0)]
    few = (2, 4) if size.quick else (1, 2, 3, 4, 6, 8)
    rows = {f"LCM-LoRA {n}": (Draw("lcm", n), vector) for n in few}
    rows |= {f"LCM sampler, no LoRA, {n}": (Draw("lcm", n), []) for n in few}
    for sampler, label in SOLVERS.items():
        rows |= {f"{label} {n}": (Draw(sampler, n, W), []) for n in few}
        rows |= {f"{label}, no guidance, {n}": (Draw(sampler, n), []) for n in few}
    teacher, four = pictures(prompts, size.seeds, TEACHER), pictures(prompts, size.seeds, FOUR, vector)
    held, groups = torch.tensor([p.held_out for p in prompts]), pairs(prompts)
    art = held_out_features(lab)
    sharp = art["sharpness"].mean().item()
    numbers = {"prompts": len(prompts), "seeds": len(size.seeds), "rows": {}}
    numbers |= {"art": {"right": art["right"].mean().item(), "sharpness": sharp}}
    for label, (draw, vectors) in {"DDIM 50": (TEACHER, []), **rows}.items():
        x = pictures(prompts, size.seeds, draw, vectors)
        numbers["rows"][label] = {
            "sampler": label.rstrip("0123456789").rstrip(" ,"),
            "solver": draw.sampler != "lcm" and draw != TEACHER,
            "steps": draw.steps,
            "evaluations": draw.evaluations,
            "right": interval(x["right"], groups=groups),
            "share": interval(x["right"], teacher["right"], ratio=True, groups=groups),
            "seen": interval(x["right"][~held], groups=groups[~held]),
            "held out": interval(x["right"][held], groups=groups[held]),
            "four against it": interval(four["right"], x["right"], groups=groups),
            "score": interval(x["score"], groups=groups),
            "distance": interval(rms(x["z0"], teacher["z0"]), groups=groups),
            "sharpness": [v / sharp for v in interval(x["sharpness"][held], groups=groups[held])],
            "frechet": frechet(x["features"][held].flatten(0, 1), art["features"]),
            "content": {c: interval(x["right"][i], groups=groups[i]) for c, i in by_content(prompts).items()},
        }
    reach = [n for n in few if numbers["rows"][f"LCM-LoRA {n}"]["share"][0] >= 0.9]
    numbers["fewest"] = min(reach, default="none")
    draw_rows(prompts, {k: v for k, v in rows.items() if k in SHOWN}, size)
    return numbers


def by_content(prompts: list[Prompt]) -> dict[str, torch.Tensor]:
    """{category: which prompts (p,) bool}."""
    mine = [CATEGORY[p.name] for p in prompts]
    return {c: torch.tensor([m == c for m in mine]) for c in dict.fromkeys(mine)}


SHOWN = (
    *("LCM-LoRA 1", "LCM-LoRA 2", "LCM-LoRA 4", "LCM sampler, no LoRA, 4", "DDIM 2", "DDIM, no guidance, 4"),
    *("DPM-Solver++ 2", "DPM-Solver++, no guidance, 4"),
)


def held_out_features(lab) -> dict[str, torch.Tensor]:
    """What `measure` finds on the held-out drawings themselves, through the autoencoder."""

    def make() -> dict[str, torch.Tensor]:
        art, rng = split_art(read_art(EMOJI / "art"), EMOJI / "art/held_out.txt", lab.names)[1] * 8, random.Random(2)
        pixels = torch.stack([compose(a, 4 * lab.side, rng)[0] for a in art])
        z0 = torch.cat([lab.vae.encode_mean(x) for x in pixels.split(64)])
        return measure(lab, z0, [Prompt(a.name, a.name) for a in art])

    return cached("held-out", "8 looks, seed 2", make)


def draw_rows(prompts: list[Prompt], rows: dict, size: Size) -> None:
    """Eight prompts, one row of pictures for each of some samplers."""
    chosen = list(range(0, len(prompts), max(1, len(prompts) // 8)))[:8]
    images, labels = [], []
    for label, (draw, vectors) in rows.items():
        z0 = pictures(prompts, size.seeds, draw, vectors)["z0"][chosen, 0]
        images += decoded_images(z0)
        labels += [f"{label} ({draw.evaluations} ev.)"] + [prompts[i].name for i in chosen[1:]]
    save_sheet("steps", images, labels, len(chosen), size)


# ---- 3


def style_vectors(size: Size) -> dict[str, Vector]:
    """{style: its LoRA}, rank 8, all by one recipe."""
    one = short(size)._replace(kind="diffusion", rank=8, steps=size.style_steps, batch=16, marks=())
    return {s: train(one._replace(data=s)).end for s in size.styles}


def reader_of(size: Size) -> tuple:
    """(the reader, {style: share of its held-out art whose style it finds}, the same of names)."""
    styles = tuple(dict.fromkeys([*size.styles, *REAL]))
    return open_reader(styles, 20, every=8) if size.quick else open_reader(styles, 3000)


def overlap(a: Tau, b: Tau) -> tuple[float, float, float]:
    """(how much of a's delta lies in the column spaces of b's, the same by chance, ratio of norms |a| / |b|).

    The columns of U span what a delta can write. The first is sum_ij s_i^2 (u_i . u'_j)^2 / sum_i s_i^2 over U' of b,
    all modules together: 0 if a writes where b does not, 1 if wholly within. A random U would give r' / out.
    """
    inside = chance = whole = other = 0.0
    for path in a.keys() & b.keys():
        (u, s, _), (u_, s_, _) = factorise(*a[path]), factorise(*b[path])
        kept = s_ > 1e-6 * s_[0]
        energy = s.square().sum().item()
        inside += (s[None, :] * (u_[:, kept].T @ u)).square().sum().item()
        chance += energy * kept.sum().item() / len(u_)
        whole, other = whole + energy, other + s_.square().sum().item()
    return inside / whole, chance / whole, (whole / other) ** 0.5


def blocks(tau: Tau) -> dict[str, float]:
    """Share of the squared norm on the way down, in the middle and on the way up."""
    squares = {block: norm**2 for block, norm in delta_norms(tau).items()}
    parts = {"down": "input", "middle": "middle", "up": "output"}
    return {p: sum(v for k, v in squares.items() if k.startswith(start)) / sum(squares.values())
        for p, start in parts.items()}  # fmt: skip


def combination(size: Size) -> dict:
    """tau' = lambda1 tau_style + lambda2 tau_lcm, with no training: how often does it work?"""
    reader, found, named = reader_of(size)
    tau_lcm, vectors, alone = shipped("lcm_lora"), style_vectors(size), Draw("ddim", 25, W)
    numbers = {"allowed": ALLOWED, "styles": {}, "grid": {}}
    images, labels = [], []
    for style, tau in vectors.items():
        prompts = prompts_of(style, size.prompts)
        both = [(tau, LAMBDA_STYLE), (tau_lcm, LAMBDA_LCM)]
        ways = {"alone": (alone, [(tau, 1.0)]), "both": (FOUR, both), "lcm": (FOUR, [(tau_lcm, 1.0)])}
        ways["equal"] = FOUR, [(tau, 1.0), (tau_lcm, LAMBDA_LCM)]  # the style as strong as it is alone
        ways["without lcm"] = FOUR, [(tau, LAMBDA_STYLE)]
        z0 = {k: drawn(prompts, size.seeds, *way) for k, way in ways.items()}
        read = {k: read_latents(reader, z, [style], prompts) for k, z in z0.items()}
        right, kept, sharp = ({k: x[i] for k, x in read.items()} for i in range(3))
        row = {"kind": KINDS[style], "right": {k: interval(x) for k, x in right.items()}}
        row |= {"style": {k: interval(x) for k, x in kept.items()}}
        row["sharpness"] = {k: interval(sharp[k], sharp["alone"], ratio=True) for k in ("both", "without lcm")}
        row |= {"found in art": found[style], "right in art": named[style]}
        row["lost accuracy"], row["lost style"] = (interval(x["alone"], x["both"]) for x in (right, kept))
        row["both against lcm"] = interval(right["both"], right["lcm"])
        row["lost, equal"] = [(x["alone"] - x["equal"]).mean().item() for x in (right, kept)]
        row["overlap"], row["overlap by chance"], row["norm"] = overlap(tau.tau, tau_lcm.tau)
        row["blocks"] = blocks(tau.tau)
        row |= what_became(row)
        numbers["styles"][style] = row
        some = prompts_of(style, size.few // 4)
        for lambda1, lambda2 in product(size.grid, size.grid):
            z = drawn(some, size.seeds[:1], FOUR, [(tau, lambda1), (tau_lcm, lambda2)])
            cell = numbers["grid"].setdefault(f"{lambda1:g} {lambda2:g}", {"right": [], "style": [], "sharpness": []})
            names, inside, edges = read_latents(reader, z, [style], some)
            cell["right"].append(names.mean().item()), cell["style"].append(inside.mean().item())
            cell["sharpness"].append((edges.mean() / sharp["alone"].mean()).item())
        for key, label in (("alone", f"{style} 25 steps"), ("both", f"0.8 {style} + 1.0 lcm, 4 steps")):
            images += decoded_images(z0[key][:: max(1, len(prompts) // 6), 0][:6])
            labels += [label] + [""] * 5
    save_sheet("combination", images, labels, 6, size)
    rows = list(numbers["styles"].values())
    numbers["reader"] = {"styles": mean(row["found in art"] for row in rows),
        "names": mean(row["right in art"] for row in rows), "plain names": named["plain"]}  # fmt: skip
    numbers |= failures(rows)
    numbers["lowest accuracy"] = min(mean(cell["right"]) for cell in numbers["grid"].values())
    product_of = lambda cell: sum(a * b for a, b in zip(cell["right"], cell["style"]))  # noqa: E731
    numbers["best lambdas"] = max(numbers["grid"], key=lambda k: product_of(numbers["grid"][k]))
    return numbers


def what_became(row: dict) -> dict:
    """Of a style in the sum: did it fail, does its interval say so too, and would it with lambda1 = 1?"""
    if min(row["right"]["alone"][0], row["style"]["alone"][0]) < FLOOR:
        return {"outcome": "not measurable", "surely": False, "failed, equal": False}
    lost = row["lost accuracy"], row["lost style"]
    outcome = "failed" if max(x for x, _, _ in lost) > ALLOWED else "works"
    surely = max(low for _, low, _ in lost) > ALLOWED
    return {"outcome": outcome, "surely": surely, "failed, equal": max(row["lost, equal"]) > ALLOWED}


def failures(rows: list[dict]) -> dict:
    """How many styles failed, of those with something to lose, and what goes with their losses."""
    lost = [row for row in rows if row["outcome"] != "not measurable"]
    failed = sum(row["outcome"] == "failed" for row in lost)
    numbers = {"failed": failed, "measurable": len(lost), "failure rate": wilson(failed, max(1, len(lost)))}
    numbers |= {"surely failed": sum(r["surely"] for r in lost), "failed, equal": sum(r["failed, equal"] for r in lost)}
    causes = {"overlap": [r["overlap"] - r["overlap by chance"] for r in lost], "norm": [r["norm"] for r in lost]}
    causes |= {f"share {part}": [r["blocks"][part] for r in lost] for part in ("down", "middle", "up")}
    numbers["causes"] = {cause: {loss: rank_correlation(values, [r[loss][0] for r in lost])
        for loss in ("lost accuracy", "lost style")} for cause, values in causes.items()}  # fmt: skip
    return numbers | {"by chance": correlation_by_chance(len(lost))}


def correlation_by_chance(n: int) -> float:
    """The size that one in a hundred rank correlations of `n` unrelated pairs surpasses, from 2,000 shuffles."""
    rng, order = random.Random(0), list(range(n))
    return sorted(abs(rank_correlation(order, rng.sample(order, n))) for _ in range(2000))[1980]


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's, equal values sharing their mean rank; 0 if all of one are equal."""
    ranks = [[mean(j for j, other in enumerate(sorted(v)) if other == value) for value in v] for v in (x, y)]
    return correlation(*ranks) if all(len(set(v)) > 1 for v in ranks) else 0.0


# ---- 4


def tuning(size: Size) -> Recipe:
    """A fine-tune of all weights on the four real sets, kept at four distances."""
    marks = tuple(size.tune_steps * i // 16 for i in (1, 2, 6))
    return Recipe("diffusion", None, size.tune_steps, 16, 3e-4, "styles", seed=size.seed, looks=size.looks, marks=marks)


def base(size: Size) -> dict:
    """Does the vector work on a base it never saw?"""
    reader = reader_of(size)[0]
    tune, before = tuning(size), dict(open_lab().unet.named_parameters())
    tuned = train(tune)
    shipped_one, old = shipped("lcm_lora"), train(short(size)).end
    prompts = [p for style in REAL for p in prompts_of(style, max(1, size.few // 4))]
    groups, words = pairs(prompts), ("right", "style")
    vectors = {"none": [], "shipped": [(shipped_one, 1.0)], "short, old base": [(old, 1.0)]}

    def found_on(where: Base, vectors: dict[str, Vectors]) -> dict[str, tuple]:
        """{way: what the reader finds}, 25 guided steps without a vector among them."""
        z0 = {way: drawn(prompts, size.seeds, FOUR, v, where) for way, v in vectors.items()}
        z0["25 guided steps"] = drawn(prompts, size.seeds, Draw("ddim", 25, W), (), where)
        return {way: read_latents(reader, z, list(REAL), prompts) for way, z in z0.items()}

    def intervals(found: dict[str, tuple]) -> dict:
        return {way: {k: interval(v, groups=groups) for k, v in zip(words, y)} for way, y in found.items()}

    numbers = {"untouched": intervals(found_on(None, vectors)), "bases": {}}
    for step, weights in tuned.at.items():
        made = [tune, step]
        far = sum((x - before[k]).square().sum().item() for k, x in weights.items()) ** 0.5
        far /= sum(x.square().sum().item() for x in before.values()) ** 0.5
        there = train(short(size)._replace(data="styles", base=made), weights).end
        found = found_on((made, weights), vectors | {"short, trained there": [(there, 1.0)]})
        right = {way: y[0] for way, y in found.items()}
        row = intervals(found)
        row |= {"distance": far, "shipped against none": interval(right["shipped"], right["none"], groups=groups)}
        row["short against there"] = interval(right["short, old base"], right["short, trained there"], groups=groups)
        numbers["bases"][str(step)] = row
    return numbers


# ---- 5


def rank(size: Size) -> dict:
    """Which rank: quality, file, memory; trained at it against the highest truncated to it; which layers."""
    prompts = prompts_of("all", size.few)
    ranks, groups = (8, 32) if size.quick else (1, 4, 8, 16, 32, 64), pairs(prompts)
    trained = {r: train(short(size)._replace(rank=r)).end for r in ranks}
    largest = trained[ranks[-1]]
    teacher, top = pictures(prompts, size.seeds, TEACHER), pictures(prompts, size.seeds, FOUR, [(largest, 1.0)])
    config = identify(EMOJI / "model.safetensors") if size.quick else sd15_config()
    numbers = {"prompts": len(prompts), "trained": {}, "truncated": {}, "layers": {}}
    path = CACHE / "lora-for-its-size.safetensors"

    def quality(vector: Vector) -> dict:
        one = drawn(prompts, size.seeds, Draw("lcm", 1), [(vector, 1.0)])
        two, four = (pictures(prompts, size.seeds, Draw("lcm", n), [(vector, 1.0)]) for n in (2, 4))
        write_tau(path, vector.tau, {})
        row = {word: interval(x["right"], groups=groups) for word, x in (("two", two), ("four", four))}
        row["against the highest"] = interval(four["right"], top["right"], groups=groups)
        row["distance"] = interval(rms(one, teacher["z0"]), groups=groups)
        return row | {"bytes": path.stat().st_size}

    for (r, vector), seconds in zip(trained.items(), step_times(ranks)):
        row, objective = quality(vector), Objective("lcm", r, checkpointing=True)
        parts, row["trained"] = step_bytes(objective, config, Step(1, 512, "cuda", torch.bfloat16))
        total = sum(v for part, v in parts.items() if part != "pictures to look at")
        numbers["trained"][str(r)] = row | {"memory": total / 1e9, "time": seconds}
        small, residual = reduce_rank(largest.tau, rank=r)
        square = {p: delta(*three).square().sum().item() for p, three in largest.tau.items()}
        lost = sum(residual[p] ** 2 * square[p] for p in residual) / sum(square.values())
        numbers["truncated"][str(r)] = quality(Vector([largest.key, "to rank", r], small)) | {"residual": lost**0.5}
    middle = 32  # the short recipe's
    for label, targets in (("attention only", ATTENTION), ("convolutions only", CONV)):
        numbers["layers"][label] = quality(train(short(size)._replace(rank=middle, targets=targets)).end)
    numbers["layers"]["all"] = numbers["trained"][str(middle)]
    numbers["teacher"] = interval(teacher["right"], groups=groups)
    return numbers


def step_times(ranks: tuple[int, ...], rounds: int = 3) -> list[float]:
    """Time of a step at each rank, of the highest's; medians, the ranks taking turns."""
    lab, data, times = open_lab(), torch.zeros(12, 4, 16, 16), []
    cond, null = lab.text.encode(["a cat face"] * 12), lab.text.null_cond(12)
    objectives = [Objective("lcm", r) for r in ranks]
    nets = [make_networks(o, deepcopy(lab.unet), HALF) for o in objectives]
    for _ in range(rounds + 1):
        for objective, net in zip(objectives, nets):
            start = time.perf_counter()
            loss_of(objective, net, data, cond, null, torch.Generator().manual_seed(0)).backward()
            times.append(time.perf_counter() - start)
    medians = torch.tensor(times[len(ranks) :]).reshape(rounds, len(ranks)).median(dim=0).values
    return (medians / medians[-1]).tolist()


# ---- 6


def solver(size: Size) -> dict:
    """Is the LCM-LoRA a neural solver of the teacher's ODE?"""
    prompts, lab = prompts_of("all", size.few), open_lab()
    groups, vector, counts = pairs(prompts), [(shipped("lcm_lora"), 1.0)], (1, 2, 4, 8)
    stages = {str(step): tau for step, tau in train(short(size)).at.items()} | {"shipped": vector[0][0]}
    some = prompts_of("all", min(64, len(prompts)))
    cond, null = lab.text.encode([p.text for p in some]), lab.text.null_cond(len(some))
    z_T, _ = noise(len(some), 2 * size.seed, lab.side)
    network = bound(lab.unet)
    trajectory = guided_trajectory(network, z_T, cond, null, SCHEDULE, W)
    numbers = {"along": {}, "distance": {}, "gaussian": gaussian()}
    for stage, tau in stages.items():
        with changed(lab.unet, None, [(tau, 1.0)]):
            near, end = consistency_along_trajectory(network, trajectory, cond, SCHEDULE, W)
        numbers["along"][stage] = {"neighbours": near, "to the end": end, "mean to the end": mean(end.values())}
    teacher = drawn(prompts, size.seeds, TEACHER)
    rows = {f"LCM-LoRA {n}": (Draw("lcm", n), vector) for n in counts}
    rows |= {f"LCM sampler, no LoRA, {n}": (Draw("lcm", n), []) for n in counts}
    for sampler, label in SOLVERS.items():
        rows |= {f"{label} {n}": (Draw(sampler, n, W), []) for n in counts}
        rows |= {f"{label}, no guidance, {n}": (Draw(sampler, n), []) for n in counts}
    one = rms(drawn(prompts, size.seeds, *rows["LCM-LoRA 1"]), teacher)
    for label, (draw, vectors) in rows.items():
        far = rms(drawn(prompts, size.seeds, draw, vectors), teacher)
        row = {"sampler": label.rstrip("0123456789").rstrip(" ,"), "solver": draw.sampler != "lcm"}
        row |= {"evaluations": draw.evaluations, "rms": interval(far, groups=groups)}
        numbers["distance"][label] = row | {"one step against it": interval(one, far, groups=groups)}
    before, after = (numbers["along"][s]["mean to the end"] for s in ("0", "shipped"))
    numbers["error left"] = after / before
    return numbers


def gaussian(m: float = 0.7, s: float = 0.5) -> dict:
    """Where the answer is known: data N(m, s^2), whose ODE ends at m + s (z - alpha m) / sqrt(alpha^2 s^2 + sigma^2).

    RMS over z ~ N(0, 1) of each solver's end minus the exact one. What distillation leads to, as tests/test_convergence
    shows, is f = one step of DDIM from each skip to the next, down to t = 0: so many skips of k, in one evaluation.
    """
    z_T = torch.randn(4096, 1, 1, 1, generator=torch.Generator().manual_seed(0))

    def x0_of(z_t, t):
        alpha, sigma = SCHEDULE.at(t, z_t)
        return m + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (z_t - alpha * m)

    def eps_fn(z_t, t):
        return eps_from_x0(z_t, x0_of(z_t, t), t, SCHEDULE)

    def fixed_point(k: int) -> torch.Tensor:
        z_t, t = z_T, 999
        while t > 0:
            t_end = max(t - k, 0)
            z_t, t = ddim_step(z_t, x0_of(z_t, t), eps_fn(z_t, t), t_end, SCHEDULE), t_end
        return z_t

    alpha, sigma = SCHEDULE.at(999, z_T)
    exact = m + s * (z_T - alpha * m) / (alpha**2 * s**2 + sigma**2).sqrt()
    far = lambda z0: (z0 - exact).square().mean().sqrt().item()  # noqa: E731
    counts = (1, 2, 4, 8, 16, 32, 50)
    return {
        "DDIM": {str(n): far(sample_ddim(eps_fn, z_T, SCHEDULE, n)) for n in counts},
        "DPM-Solver++": {str(n): far(sample_dpmpp_2m(eps_fn, z_T, SCHEDULE, n)) for n in counts},
        "lcm, one step": {f"k={k}": far(fixed_point(k)) for k in (20, 100, 200)},
    }


# ---- 7


def recipe(size: Size) -> dict:
    """Which choices of the recipe matter?"""
    prompts, start = prompts_of("all", size.few), short(size)
    groups, teacher = pairs(prompts), pictures(prompts, size.seeds, TEACHER)
    choices = {  # label: (recipe, guidance w while sampling, does it take a simplification of LCM-LoRA back?)
        "baseline": (start, 0.0, False),
        "w drawn from 1 to 6, not told": (start._replace(w=(1.0, 6.0)), 0.0, True),
        "w = 0, guided while sampling": (start._replace(w=(0.0, 0.0)), W, False),
        "w = 7.5": (start._replace(w=(7.5, 7.5)), 0.0, False),
        "L2 in place of Huber": (start._replace(distance="l2"), 0.0, False),
        "EMA target, 0.95": (start._replace(target_ema=0.95), 0.0, True),
        "k = 1": (start._replace(k=1), 0.0, False),
        "k = 5": (start._replace(k=5), 0.0, False),
        "k = 20": (start._replace(k=20), 0.0, False),
        "without c_skip": (start._replace(c_skip=False), 0.0, False),
        "rank 64, alpha 64": (start._replace(rank=64), 0.0, False),
        "rank 64, alpha 8": (start._replace(rank=64, lora_alpha=8.0), 0.0, False),
        "full LCM, w in 1 to 6 as input": (start._replace(rank=None, w=(1.0, 6.0), lr=1e-4, marks=()), 0.0, True),
    }
    if size.quick:
        some = (
            "baseline",
            "L2 in place of Huber",
            "without c_skip",
            "EMA target, 0.95",
            "w = 0, guided while sampling",
        )
        choices = {k: choices[k] for k in (*some, "full LCM, w in 1 to 6 as input")}
    numbers, good = {"steps": size.steps, "prompts": len(prompts), "rows": {}}, None
    numbers["teacher"] = interval(teacher["right"], groups=groups)
    for label, (choice, w, takes_back) in choices.items():
        made = train(choice)
        full = ([choice, choice.steps], made.end) if choice.rank is None else None
        vectors, w_emb = ([], W) if full else ([(made.end, 1.0)], None)
        one, two, four = (pictures(prompts, size.seeds, Draw("lcm", n, w, w_emb), vectors, full) for n in (1, 2, 4))
        good = good or four
        row = {word: interval(x["right"], groups=groups) for word, x in (("one", one), ("two", two), ("four", four))}
        row["evaluations"] = Draw("lcm", 4, w).evaluations
        row["distance"] = interval(rms(one["z0"], teacher["z0"]), groups=groups)
        row["sharpness"] = interval(four["sharpness"], teacher["sharpness"], ratio=True, groups=groups)
        row["against baseline"] = interval(four["right"], good["right"], groups=groups)
        numbers["rows"][label] = row | {"takes back": takes_back}
    numbers["worse"] = [k for k, row in numbers["rows"].items() if row["against baseline"][2] < 0]
    numbers["better"] = [k for k, row in numbers["rows"].items() if row["against baseline"][1] > 0]
    return numbers


# ---- 8


def fail(size: Size) -> dict:
    """The failures that people meet, each provoked, and the number that shows it."""
    prompts, lab, tau_lcm, reader = prompts_of("bare", size.few), open_lab(), shipped("lcm_lora"), reader_of(size)[0]
    style, tune = style_vectors(size)[size.styles[-1]], tuning(size)
    far = [tune, tune.steps], train(tune).end
    there = train(short(size)._replace(data="styles", base=far[0]), far[1]).end
    nothing = train(short(size)._replace(steps=2, lr=0.0, marks=())).end
    order = torch.Generator().manual_seed(0)
    shuffled = {p: (up[torch.randperm(len(up), generator=order)], *rest) for p, (up, *rest) in tau_lcm.tau.items()}
    shuffled = Vector(["rows shuffled", tau_lcm.key], shuffled)
    cases = {  # label: (vectors, base, is it a good one?); the first of each base is what the others are held against
        "as it should be": ([(tau_lcm, 1.0)], None, True),
        "0.8 style + 1.0 lcm": ([(style, 0.8), (tau_lcm, 1.0)], None, True),
        "a short run's vector": ([(train(short(size)).end, 1.0)], None, True),
        "no LCM-LoRA": ([], None, False),
        "lambda2 = 0.25": ([(tau_lcm, 0.25)], None, False),
        "lambda2 = 2": ([(tau_lcm, 2.0)], None, False),
        "lambda1 = 2.5 beside it": ([(tau_lcm, 1.0), (style, 2.5)], None, False),
        "left out of the optimizer": ([(nothing, 1.0)], None, False),
        "rows shuffled": ([(shuffled, 1.0)], None, False),
        "made on a far fine-tune": ([(there, 1.0)], None, False),
        "far fine-tune, its own vector": ([(there, 1.0)], far, True),
        "far fine-tune, the shipped vector": ([(tau_lcm, 1.0)], far, False),
        "far fine-tune, style of the old base": ([(there, 1.0), (style, 0.8)], far, False),
    }
    some = prompts_of("bare", min(32, len(prompts)))
    z_T, _ = noise(len(some), 0, lab.side)
    cond, null = lab.text.encode([p.text for p in some]), lab.text.null_cond(len(some))
    numbers, images, labels = {"style": size.styles[-1], "cases": {}}, [], []
    good, network = {}, bound(lab.unet)
    for label, (vectors, weights, control) in cases.items():
        x, where = pictures(prompts, size.seeds, FOUR, vectors, weights), "far" if weights else "shipped"
        if where not in good:
            with changed(lab.unet, weights and weights[1], []):
                trajectory = guided_trajectory(network, z_T, cond, null, SCHEDULE, W)
        with changed(lab.unet, weights and weights[1], vectors):
            error = mean(consistency_along_trajectory(network, trajectory, cond, SCHEDULE, W)[1].values())
        ours, good_error = good.setdefault(where, (x, error))
        tau = combine([v.tau for v, _ in vectors], [lam for _, lam in vectors]) if vectors else {}
        sharpness = interval(x["sharpness"], ours["sharpness"], ratio=True)
        right, best = (read_latents(reader, y["z0"], ["plain"], prompts)[0] for y in (x, ours))
        row = {"right": interval(right), "sharpness": sharpness, "error": error / good_error, "control": control}
        row |= {"against good": interval(right, best)}
        row["norm"] = sum(n**2 for n in delta_norms(tau).values()) ** 0.5
        row["flagged"] = not 0.85 < sharpness[0] < 1.15 or row["error"] > 1.25 or row["norm"] == 0
        numbers["cases"][label] = row
        images += decoded_images(x["z0"][:6, 0])
        labels += [label] + [p.name for p in prompts[1:6]]
    save_sheet("fail", images, labels, min(6, len(prompts)), size)
    numbers["memory"] = {label: step_memory(label == "base unfrozen") for label in ("base frozen", "base unfrozen")}
    numbers["bad"] = [k for k, row in numbers["cases"].items() if row["against good"][2] < 0]
    numbers["missed"] = [k for k in numbers["bad"] if not numbers["cases"][k]["flagged"]]
    numbers["false alarms"] = [k for k, row in numbers["cases"].items() if row["control"] and row["flagged"]]
    return numbers


def step_memory(unfrozen: bool) -> float:
    """GB of a training step's tensors on the emoji model: activations, gradients and Adam's moments."""
    lab, objective = open_lab(), Objective("lcm", 32)
    unet = deepcopy(lab.unet)
    nets = make_networks(objective, unet, HALF)
    if unfrozen:
        unet.requires_grad_(True)
    trained = [x for x in unet.parameters() if x.requires_grad]
    cond, null = lab.text.encode(["a cat face"] * 12), lab.text.null_cond(12)
    with LiveBytes() as live:
        loss_of(objective, nets, torch.zeros(12, 4, 16, 16), cond, null, torch.Generator()).backward()
    return (live.peak + 2 * size_of(trained)) / 1e9


# ---- around


SECTIONS: dict[str, Callable[[Size], dict]] = {
    f.__name__: f for f in (memory, steps, combination, base, rank, solver, recipe, fail)
}
REPEATED = ("rank", "solver")


def save_sheet(section: str, images: list, labels: list[str], columns: int, size: Size) -> None:
    """Labelled pictures, in 256 colours, which is a third of the bytes."""
    folder = CACHE / "quick" if size.quick else HERE / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{section}-pictures{f'-seed{size.seed}' if size.seed else ''}.png"
    save_png(path, contact_sheet(images, labels, columns).quantize(256), f"paper/run.py {section}")


def processor() -> str:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else []
    return f"{(names or [platform.processor()])[0]}, {torch.get_num_threads()} thread(s), UNet in {str(HALF)[6:]}"


def rounded(x):
    """Four significant digits are enough for a report."""
    if isinstance(x, float):
        return float(f"{x:.4g}")
    if isinstance(x, dict):
        return {str(k): rounded(v) for k, v in x.items()}
    return [rounded(v) for v in x] if isinstance(x, list | tuple) else x


def measure_section(name: str, quick: bool, seed: int) -> None:
    """Run one section and write its JSON."""
    folder = CACHE / "quick" if quick else HERE / "results"
    folder.mkdir(parents=True, exist_ok=True)
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=HERE, capture_output=True, text=True).stdout.strip()
    start = time.perf_counter()
    spent.clear(), spent_now.clear()
    numbers = SECTIONS[name](size_of_run(quick, seed))
    seconds = time.perf_counter() - start - sum(spent_now) + sum(spent.values())  # as if nothing had been kept
    verdict, rule = verdicts.RULES[name](numbers), " ".join(verdicts.RULES[name].__doc__.split())
    result = {"section": name, "quick": quick, "seed": seed, "commit": commit, "processor": processor()}
    result |= {"seconds": seconds, "rule": rule, "verdict": verdict, "numbers": numbers}
    with atomic(folder / f"{name}{f'-seed{seed}' if seed else ''}.json") as part:
        part.write_text(json.dumps(rounded(result), indent=1) + "\n")
    print(f"{name}, seed {seed}: {verdict} ({seconds:.0f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = f"of {', '.join(SECTIONS)} (default: all, then {' and '.join(REPEATED)} with another seed)"
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=every)
    parser.add_argument("--quick", action="store_true", help="a small version of all, into runs/paper/quick")
    parser.add_argument("--seed", type=int, default=0, help="of pictures and training (default 0)")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        sys.exit(f"run.py: no section {sorted(unknown)[0]!r}; choose from {', '.join(SECTIONS)}")
    for name in args.sections or SECTIONS:
        measure_section(name, args.quick, args.seed)
    for name in () if args.sections else REPEATED:
        measure_section(name, args.quick, args.seed + 1)


if __name__ == "__main__":
    main()
