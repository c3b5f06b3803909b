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
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from lab import (
    CACHE,
    CATEGORY,
    EMOJI,
    HALF,
    HERE,
    SCHEDULE,
    Draw,
    Prompt,
    Recipe,
    Vector,
    W,
    bound,
    cached,
    changed,
    decoded_images,
    frechet,
    interval,
    measure,
    noise,
    open_lab,
    pictures,
    prompts_of,
    rms,
    shipped,
    spent,
    spent_now,
    train,
)
from styled import in_style, open_classifier
from styles import KINDS, REAL

from minilcm.art import compose, read_art, split_art
from minilcm.family import identify, sd15_config, sdxl_config, ssd1b_config
from minilcm.lora import ATTENTION, TARGETS, Tau
from minilcm.lora_io import write_tau
from minilcm.memory import LiveBytes, size_of
from minilcm.merge import combine, delta, factorise, reduce_rank
from minilcm.objective import Objective, loss_of, make_networks
from minilcm.pictures import contact_sheet, save_png
from minilcm.plan import step_bytes
from minilcm.safefile import atomic
from minilcm.schedule import eps_from_x0
from minilcm.solver import sample_ddim, sample_dpmpp_2m
from minilcm.watch import consistency_along_trajectory, delta_norms, guided_trajectory

TEACHER, FOUR = Draw("ddim", 50, W), Draw("lcm", 4)
CONV = tuple(t for t in TARGETS if t in ("in_layers.2", "out_layers.3", "skip_connection", "op", "conv"))
LAMBDA_STYLE, LAMBDA_LCM = 0.8, 1.0  # of the report's Fig. 3
ALLOWED = 0.1  # how far a combination may be below the style LoRA alone

RULES = {  # of the verdicts, set before the first run of this code
    "memory": "held if it is half of full distillation's memory or less on every base, and its counts within 1 %",
    "steps": "held if 4 steps reach 0.95 and 2 steps 0.85 of DDIM's 50 in prompt accuracy, and 4 steps are better "
    "than any guided solver at as many evaluations, intervals apart; in part if 0.9 at 4 and better",
    "combination": "a style fails if accuracy or style is more than 0.1 below the style LoRA alone at 25 guided steps; "
    "held if none of ten fails; in part if less than half",
    "base": "held if on every base the old vector is within 0.05 of one trained there, or better, and above none; "
    "in part if above none on every base",
    "rank": "the report adapts with rank 64 and says that a low rank is enough; held if rank 16 or less is within 3 "
    "% of the highest in prompt accuracy at 4 steps",
    "solver": "held if the error to the trajectory's end falls to half or less, and one evaluation comes nearer to it "
    "than two of guided DDIM; in part if one of the two",
    "recipe": "a choice matters if its prompt accuracy at 4 steps is below the baseline's, the whole interval by "
    "0.02 or more",
    "fail": "a failure is recognisable without a judge if sharpness is off by 15 %, the error to the teacher's "
    "end by 25 %, or the norm of the delta is 0; held if every case whose accuracy suffers is",
}


class Size(NamedTuple):
    """How much of everything."""

    quick: bool
    seeds: tuple[int, ...]  # of pictures
    seed: int  # of training
    prompts: int | None  # None: all 334
    few: int  # prompts where many settings are compared
    steps: int  # of a short training
    style_steps: int
    tune_steps: int
    looks: int  # compositions of each drawing to train on
    styles: tuple[str, ...]
    grid: tuple[float, ...]  # lambdas


def size_of_run(quick: bool, seed: int) -> Size:
    if quick:
        return Size(True, (2 * seed,), seed, 12, 6, 4, 6, 8, 1, ("sepia", "outline"), (0.0, 1.0))
    grid = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
    return Size(False, (2 * seed, 2 * seed + 1), seed, None, 100, 300, 300, 800, 4, tuple(KINDS), grid)


def short(size: Size) -> Recipe:
    """The LCM-LoRA that is trained many times: a tenth of the shipped one's steps."""
    return Recipe(steps=size.steps, seed=size.seed, looks=size.looks)


# ---- 1


def peak_of(flags: list[str]) -> float:
    """GB that train.py holds at its peak, above what Python holds after the imports; in a process of its own."""
    sys.path.insert(0, str(HERE.parent))
    import train as script

    def resident(which: str) -> float:
        return int(re.search(rf"{which}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9

    before = resident("VmRSS")
    script.main(script.parse(flags))
    return resident("VmHWM") - before


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
            parts, count = step_bytes(objective, config, 1, side, "cuda", torch.bfloat16)
            parts = {k: v / 1e9 for k, v in parts.items() if k != "pictures to look at"}
            planned.setdefault(family, {})[label] = {"parts": parts, "total": sum(parts.values()), "trained": count}
        lora, full = planned[family]["LCM-LoRA"], planned[family]["full LCM"]
        planned[family] |= {"share": lora["total"] / full["total"], "times": full["total"] / lora["total"],
            "report": report[family], "off": lora["trained"] / report[family] - 1, "pixels": side}  # fmt: skip
    held = all(p["share"] <= 0.5 and abs(p["off"]) < 0.01 for p in planned.values())
    numbers = {"measured": measured, "measured share": measured["LCM-LoRA"] / measured["full LCM"], "planned": planned}
    return {"numbers": numbers, "verdict": "held" if held else "did not hold"}


# ---- 2


def steps(size: Size) -> dict:
    """Quality in 1 to 8 steps, at equal numbers of network evaluations."""
    prompts, lab, vector = prompts_of("all", size.prompts), open_lab(), [(shipped("lcm_lora"), 1.0)]
    few = (1, 2, 3, 4, 6, 8)
    rows = {f"LCM-LoRA {n}": (Draw("lcm", n), vector) for n in few}
    rows |= {f"LCM sampler, no LoRA, {n}": (Draw("lcm", n), []) for n in few}
    for sampler, label in (("ddim", "DDIM"), ("dpmpp", "DPM-Solver++")):
        rows |= {f"{label} {n}": (Draw(sampler, n, W), []) for n in (1, 2, 3, 4, 8)}
    if size.quick:
        rows = {k: v for k, v in rows.items() if k.endswith((" 2", " 4"))}
    teacher = pictures(prompts, size.seeds, TEACHER)
    held = torch.tensor([p.held_out for p in prompts])
    art = held_out_features(lab)
    sharp = art["sharpness"].mean().item()
    numbers = {"prompts": len(prompts), "seeds": len(size.seeds), "rows": {}}
    numbers |= {"art": {"right": art["right"].mean().item(), "sharpness": sharp}}
    for label, (draw, vectors) in {"DDIM 50": (TEACHER, []), **rows}.items():
        x = pictures(prompts, size.seeds, draw, vectors)
        row = {"sampler": label.rstrip("0123456789").rstrip(" ,"), "steps": draw.steps}
        row |= {"evaluations": draw.evaluations, "right": interval(x["right"]), "score": interval(x["score"])}
        row["share"] = interval(x["right"], teacher["right"], ratio=True)
        row["seen"], row["held out"] = interval(x["right"][~held]), interval(x["right"][held])
        row["distance"] = interval(rms(x["z0"], teacher["z0"]))
        row["sharpness"] = [v / sharp for v in interval(x["sharpness"])]
        row["frechet"] = frechet(x["features"][held].flatten(0, 1), art["features"])
        row["content"] = {c: interval(x["right"][torch.tensor([CATEGORY[p.name] == c for p in prompts])])
            for c in dict.fromkeys(CATEGORY[p.name] for p in prompts)}  # fmt: skip
        numbers["rows"][label] = row
    four, two = (numbers["rows"][f"LCM-LoRA {n}"]["share"] for n in (4, 2))
    baseline = max(numbers["rows"][f"{s} 2"]["right"][2] for s in ("DDIM", "DPM-Solver++"))
    numbers["baseline at 4 evaluations, upper end"] = baseline
    better = numbers["rows"]["LCM-LoRA 4"]["right"][1] > baseline
    numbers["fewest"] = min((n for n in few if f"LCM-LoRA {n}" in numbers["rows"]
        and numbers["rows"][f"LCM-LoRA {n}"]["share"][0] >= 0.9), default=0)  # fmt: skip
    draw_rows(numbers, prompts, {k: v for k, v in rows.items() if k in SHOWN}, size)
    verdict = "held" if four[0] >= 0.95 and two[0] >= 0.85 and better else None
    verdict = verdict or ("held in part" if four[0] >= 0.9 and better else "did not hold")
    return {"numbers": numbers, "verdict": verdict}


SHOWN = ("LCM-LoRA 1", "LCM-LoRA 2", "LCM-LoRA 4", "DDIM 2", "DPM-Solver++ 2", "DDIM 4", "LCM sampler, no LoRA, 4")


def held_out_features(lab) -> dict[str, torch.Tensor]:
    """What `measure` finds on the held-out drawings themselves, through the autoencoder."""

    def make() -> dict[str, torch.Tensor]:
        art, rng = split_art(read_art(EMOJI / "art"), EMOJI / "art/held_out.txt", lab.names)[1] * 8, random.Random(2)
        pixels = torch.stack([compose(a, 4 * lab.side, rng)[0] for a in art])
        z0 = torch.cat([lab.vae.encode_mean(x) for x in pixels.split(64)])
        return measure(lab, z0, [Prompt(a.name, a.name) for a in art])

    return cached("held-out", "8 looks, seed 2", make)


def draw_rows(numbers: dict, prompts: list[Prompt], rows: dict, size: Size) -> None:
    """Eight prompts, one row of pictures for each of some samplers."""
    chosen = list(range(0, len(prompts), max(1, len(prompts) // 8)))[:8]
    images, labels = [], []
    for label, (draw, vectors) in rows.items():
        z0 = pictures(prompts, size.seeds, draw, vectors)["z0"][chosen, 0]
        images += decoded_images(z0)
        labels += [f"{label} ({draw.evaluations} ev.)"] + [prompts[i].name for i in chosen[1:]]
    save_png(figure_path("steps-pictures", size), contact_sheet(images, labels, len(chosen)), "paper/run.py steps")


# ---- 3


def style_vectors(size: Size) -> dict[str, Vector]:
    """{style: its LoRA}, rank 8, all by one recipe."""
    one = short(size)._replace(kind="diffusion", rank=8, steps=size.style_steps, batch=16)
    return {s: train(one._replace(data=s))[one.steps] for s in size.styles}


def classifier_of(size: Size):
    styles = tuple(dict.fromkeys([*size.styles, *REAL]))
    return open_classifier(styles, 20, every=8) if size.quick else open_classifier(styles, 800)


def overlap(a: Tau, b: Tau) -> tuple[float, float]:
    """(how much of a's column space lies in b's, ratio of norms |a| / |b|), modules weighted by |a|'s square.

    The columns of U span what a delta can write. The first is sum_ij s_i^2 (u_i . u'_j)^2 / sum_i s_i^2 over U' of b:
    0 if a writes where b does not, 1 if wholly within.
    """
    inside = whole = other = 0.0
    for path in a.keys() & b.keys():
        (u, s, _), (u_, s_, _) = factorise(*a[path]), factorise(*b[path])
        kept = s_ > 1e-6 * s_[0]
        inside += ((s[None, :] * (u_[:, kept].T @ u)).square().sum()).item()
        whole, other = whole + s.square().sum().item(), other + s_.square().sum().item()
    return inside / whole, (whole / other) ** 0.5


def combination(size: Size) -> dict:
    """tau' = lambda1 tau_style + lambda2 tau_lcm, with no training: how often does it work?"""
    classifier, trust = classifier_of(size)
    tau_lcm, vectors = shipped("lcm_lora"), style_vectors(size)
    numbers = {"classifier": trust, "allowed": ALLOWED, "styles": {}, "grid": {}}
    alone, fails, images, labels = Draw("ddim", 25, W), [], [], []
    for style, tau in vectors.items():
        prompts = prompts_of(style, size.prompts)
        both = [(tau, LAMBDA_STYLE), (tau_lcm, LAMBDA_LCM)]
        drawn = {"alone": pictures(prompts, size.seeds, alone, [(tau, 1.0)])}
        drawn |= {"both": pictures(prompts, size.seeds, FOUR, both)}
        drawn |= {"lcm": pictures(prompts, size.seeds, FOUR, [(tau_lcm, 1.0)])}
        kept = {k: in_style(classifier, x["z0"], style) for k, x in drawn.items()}
        row = {"kind": KINDS[style], "right": {k: interval(x["right"]) for k, x in drawn.items()}}
        row["style"] = {k: interval(x) for k, x in kept.items()}
        row["lost accuracy"] = interval(drawn["alone"]["right"], drawn["both"]["right"])
        row["lost style"] = interval(kept["alone"], kept["both"])
        row["overlap"], row["norm"] = overlap(tau.tau, tau_lcm.tau)
        row["failed"] = row["lost accuracy"][0] > ALLOWED or row["lost style"][0] > ALLOWED
        fails.append(float(row["failed"]))
        numbers["styles"][style] = row
        some = prompts_of(style, size.few // 2)
        for l1 in size.grid:
            for l2 in size.grid:
                x = pictures(some, size.seeds[:1], FOUR, [(tau, l1), (tau_lcm, l2)])
                cell = numbers["grid"].setdefault(f"{l1:g} {l2:g}", {"right": [], "style": []})
                cell["right"].append(x["right"].mean().item())
                cell["style"].append(in_style(classifier, x["z0"], style).mean().item())
        for key, label in (("alone", f"{style} 25 steps"), ("both", f"0.8 {style} + 1.0 lcm, 4 steps")):
            images += decoded_images(drawn[key]["z0"][:: max(1, len(prompts) // 6), 0][:6])
            labels += [label] + [""] * 5
    save_png(figure_path("combination-pictures", size), contact_sheet(images, labels, 6), "paper/run.py combination")
    rows = list(numbers["styles"].values())
    numbers["failure rate"] = interval(torch.tensor(fails)[:, None])
    numbers["failed"] = int(sum(fails))
    for cause in ("overlap", "norm"):
        for loss in ("lost accuracy", "lost style"):
            numbers[f"rank correlation of {cause} and {loss}"] = rank_correlation([r[cause] for r in rows],
                [r[loss][0] for r in rows])  # fmt: skip
    best = max(numbers["grid"], key=lambda k: sum(numbers["grid"][k]["right"]) * sum(numbers["grid"][k]["style"]))
    numbers["best lambdas"] = best
    rate = numbers["failure rate"][0]
    return {"numbers": numbers, 
        "verdict": "held" if rate <= 0.1 else "held in part" if rate < 0.5 else "did not hold"}  # fmt: skip


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's."""
    ranks = [torch.tensor(v).argsort().argsort().double() for v in (x, y)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item() if len(x) > 2 else 0.0


# ---- 4


def tuning(size: Size) -> Recipe:
    """A fine-tune of all weights on the four real sets, kept at four distances."""
    marks = tuple(size.tune_steps * i // 16 for i in (1, 2, 6))
    return Recipe("diffusion", None, size.tune_steps, 16, 3e-4, "styles", seed=size.seed, looks=size.looks, marks=marks)


def base(size: Size) -> dict:
    """Does the vector work on a base it never saw?"""
    classifier, _ = classifier_of(size)
    tune, before = tuning(size), dict(open_lab().unet.named_parameters())
    tuned = train(tune)
    old, old_short = shipped("lcm_lora"), train(short(size))[size.steps]
    some = ("blob", "gradient", "glyph", "monotone")
    prompts = [p for style in some for p in prompts_of(style, size.few // 4 or 1)]
    numbers = {"bases": {}}
    for step in (*tune.marks, tune.steps):
        weights, made = tuned[step], [tune, step]
        far = sum((x - before[k]).square().sum().item() for k, x in weights.items()) ** 0.5
        far /= sum(x.square().sum().item() for x in before.values()) ** 0.5
        there = train(short(size)._replace(data="styles", base=made), weights)[size.steps]
        teacher = pictures(prompts, size.seeds, Draw("ddim", 25, W), (), (made, weights))
        row = {"distance": far, "teacher": interval(teacher["right"])}
        ways = {"none": [], "old": [(old, 1.0)], "old, short": [(old_short, 1.0)], "trained there": [(there, 1.0)]}
        for way, vectors in ways.items():
            x = pictures(prompts, size.seeds, FOUR, vectors, (made, weights))
            row[way] = {"right": interval(x["right"]), "share": interval(x["right"], teacher["right"], ratio=True)}
            row[way]["style"] = interval(torch.cat([in_style(classifier, z, style)
                for style, z in zip(some, x["z0"].split(len(prompts) // 4))]))  # fmt: skip
        row["teacher style"] = interval(torch.cat([in_style(classifier, z, style)
            for style, z in zip(some, teacher["z0"].split(len(prompts) // 4))]))  # fmt: skip
        numbers["bases"][str(step)] = row
    shares = [row["old"]["right"][0] - row["trained there"]["right"][0] for row in numbers["bases"].values()]
    gains = [row["old"]["right"][0] - row["none"]["right"][0] for row in numbers["bases"].values()]
    numbers["worst against trained there"], numbers["least gain over none"] = min(shares), min(gains)
    held = "held" if min(shares) >= -0.05 and min(gains) > 0 else "held in part" if min(gains) > 0 else "did not hold"
    return {"numbers": numbers, "verdict": held}


# ---- 5


def rank(size: Size) -> dict:
    """Which rank: quality, file, memory; trained at it against the highest truncated to it; which layers."""
    prompts = prompts_of("all", size.few)
    ranks = (4, 16) if size.quick else (1, 4, 8, 16, 32, 64)
    config = identify(EMOJI / "model.safetensors")
    trained = {r: train(short(size)._replace(rank=r))[size.steps] for r in ranks}
    largest = trained[ranks[-1]]
    teacher = pictures(prompts, size.seeds, TEACHER)
    numbers, path = {"trained": {}, "truncated": {}, "layers": {}}, CACHE / "lora-for-its-size.safetensors"

    def quality(vector: Vector) -> dict:
        two, four = (pictures(prompts, size.seeds, Draw("lcm", n), [(vector, 1.0)]) for n in (2, 4))
        write_tau(path, vector.tau, {})
        one = pictures(prompts, size.seeds, Draw("lcm", 1), [(vector, 1.0)])
        return {"two": interval(two["right"]), "four": interval(four["right"]), "bytes": path.stat().st_size,
            "distance": interval(rms(one["z0"], teacher["z0"]))}  # fmt: skip

    for r, vector in trained.items():
        parts, count = step_bytes(Objective("lcm", r), config, short(size).batch, config.size, "cpu", HALF)
        row = quality(vector) | {"trained": count, "memory": sum(parts.values()) / 1e9}
        if not size.quick:
            big, _ = step_bytes(Objective("lcm", r, checkpointing=True), sd15_config(), 1, 512, "cuda", torch.bfloat16)
            row["memory, SD-V1.5"] = sum(big.values()) / 1e9
        numbers["trained"][str(r)] = row
        small, residual = reduce_rank(largest.tau, rank=r)
        lost = sum(residual[p] ** 2 * delta(*largest.tau[p]).square().sum().item() for p in residual)
        whole = sum(delta(*three).square().sum().item() for three in largest.tau.values())
        numbers["truncated"][str(r)] = quality(Vector([largest.key, "to rank", r], small))
        numbers["truncated"][str(r)]["residual"] = (lost / whole) ** 0.5
    for label, targets in (("attention only", ATTENTION), ("convolutions only", CONV)):
        vector = train(short(size)._replace(rank=ranks[-2], targets=targets))[size.steps]
        numbers["layers"][label] = quality(vector)
    numbers["layers"]["all"] = numbers["trained"][str(ranks[-2])]
    times = step_times(ranks)
    for r, seconds in zip(ranks, times):
        numbers["trained"][str(r)]["time"] = seconds / times[-1]
    numbers["teacher"], top = interval(teacher["right"]), numbers["trained"][str(ranks[-1])]["four"][0]
    enough = next(r for r in ranks if numbers["trained"][str(r)]["four"][0] >= 0.97 * top)
    numbers["least rank within 3 %"] = enough
    return {"numbers": numbers, "verdict": "held" if enough <= 16 else "did not hold"}


def step_times(ranks: tuple[int, ...], rounds: int = 3) -> list[float]:
    """Seconds of a step at each rank, median, the ranks taking turns."""
    lab, data, times = open_lab(), torch.randn(12, 4, 16, 16), []
    cond, null = lab.text.encode(["a cat face"] * 12), lab.text.null_cond(12)
    objectives = [Objective("lcm", r) for r in ranks]
    nets = [make_networks(o, deepcopy(lab.unet), HALF) for o in objectives]
    for _ in range(rounds + 1):
        for objective, net in zip(objectives, nets):
            start = time.perf_counter()
            loss_of(objective, net, data, cond, null, torch.Generator().manual_seed(0)).backward()
            times.append(time.perf_counter() - start)
    return torch.tensor(times[len(ranks) :]).reshape(rounds, len(ranks)).median(dim=0).values.tolist()


# ---- 6


def solver(size: Size) -> dict:
    """Is the LCM-LoRA a neural solver of the teacher's ODE?"""
    prompts, lab = prompts_of("all", size.few), open_lab()
    marks = (0, size.steps // 8, size.steps // 2)
    made = train(short(size)._replace(marks=marks))
    b = min(64, len(prompts))
    cond, null = lab.text.encode([p.text for p in prompts[:b]]), lab.text.null_cond(b)
    z_T, _ = noise(b, 2 * size.seed, lab.side)
    network = bound(lab.unet)
    trajectory = guided_trajectory(network, z_T, cond, null, SCHEDULE, W, steps=50)
    numbers = {"along": {}, "distance": {}, "gaussian": gaussian()}
    stages = {str(s): made[s] for s in (*marks, size.steps)} | {"shipped": shipped("lcm_lora")}
    for stage, vector in stages.items():
        with changed(lab.unet, None, [(vector, 1.0)]):
            near, end = consistency_along_trajectory(network, trajectory, cond, SCHEDULE, W)
        numbers["along"][stage] = {"neighbours": near, "to the end": end, "mean to the end": mean(end.values())}
    teacher = pictures(prompts, size.seeds, TEACHER)["z0"]
    rows = {f"LCM-LoRA {n}": (Draw("lcm", n), [(shipped("lcm_lora"), 1.0)]) for n in (1, 2, 4, 8)}
    rows |= {f"no LoRA {n}": (Draw("lcm", n), []) for n in (1, 2, 4, 8)}
    rows |= {f"{s} {n}": (Draw(s, n, W), []) for s in ("ddim", "dpmpp") for n in (1, 2, 4, 8)}
    for label, (draw, vectors) in rows.items():
        far = rms(pictures(prompts, size.seeds, draw, vectors)["z0"], teacher)
        numbers["distance"][label] = {"evaluations": draw.evaluations, "rms": interval(far)}
    one, at_most = numbers["distance"]["LCM-LoRA 1"]["rms"], numbers["distance"]["ddim 1"]["rms"]
    better = {s: min((numbers["distance"][f"{s} {n}"]["evaluations"] for n in (1, 2, 4, 8)
        if numbers["distance"][f"{s} {n}"]["rms"][0] <= one[0]), default=99) for s in ("ddim", "dpmpp")}  # fmt: skip
    numbers["evaluations of a solver as near as one of LCM-LoRA"] = better
    before, after = (numbers["along"][s]["mean to the end"] for s in ("0", "shipped"))
    numbers["error left"] = after / before
    both = [after <= before / 2, one[2] < at_most[1]]
    return {"numbers": numbers, 
        "verdict": "held" if all(both) else "held in part" if any(both) else "did not hold"}  # fmt: skip


def gaussian(m: float = 0.7, s: float = 0.5) -> dict:
    """Where the answer is known: data N(m, s^2), whose ODE ends at m + s (z - alpha m) / sqrt(alpha^2 s^2 + sigma^2).

    RMS over z ~ N(0, 1) of each solver's end minus the exact one. The consistency function that distillation leads to
    (2310.04378 algorithm 1, solved in tests/test_convergence.py) is DDIM in skips of k, whatever the number of steps.
    """
    z_T = torch.randn(4096, 1, 1, 1, generator=torch.Generator().manual_seed(0))

    def eps_fn(z_t, t):
        alpha, sigma = SCHEDULE.at(t, z_t)
        x0 = m + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (z_t - alpha * m)
        return eps_from_x0(z_t, x0, t, SCHEDULE)

    alpha, sigma = SCHEDULE.at(999, z_T)
    exact = m + s * (z_T - alpha * m) / (alpha**2 * s**2 + sigma**2).sqrt()
    far = lambda z0: (z0 - exact).square().mean().sqrt().item()  # noqa: E731
    counts = (1, 2, 4, 8, 16, 32, 50)
    return {
        "ddim": {str(n): far(sample_ddim(eps_fn, z_T, SCHEDULE, n)) for n in counts},
        "dpmpp": {str(n): far(sample_dpmpp_2m(eps_fn, z_T, SCHEDULE, n)) for n in counts},
        "lcm, one step": {f"k={k}": far(sample_ddim(eps_fn, z_T, SCHEDULE, 1000 // k)) for k in (5, 20, 100)},
    }


# ---- 7


def recipe(size: Size) -> dict:
    """Which choices of the recipe matter?"""
    prompts, start = prompts_of("all", size.few), short(size)
    teacher = pictures(prompts, size.seeds, TEACHER)
    choices = {
        "baseline": start,
        "w drawn from 1 to 6, not told": start._replace(w=(1.0, 6.0)),
        "w = 0, guided while sampling": start._replace(w=(0.0, 0.0)),
        "w = 7.5": start._replace(w=(7.5, 7.5)),
        "L2 in place of Huber": start._replace(distance="l2"),
        "EMA target, 0.95": start._replace(target_ema=0.95),
        "k = 1": start._replace(k=1),
        "k = 5": start._replace(k=5),
        "k = 20": start._replace(k=20),
        "without c_skip": start._replace(c_skip=False),
        "rank 64, alpha 64": start._replace(rank=64),
        "rank 64, alpha 8": start._replace(rank=64, lora_alpha=8.0),
        "full LCM, w in 1 to 6 as input": start._replace(rank=None, w=(1.0, 6.0), lr=1e-4),
    }
    if size.quick:
        choices = {k: choices[k] for k in ("baseline", "L2 in place of Huber", "without c_skip", "EMA target, 0.95",
            "full LCM, w in 1 to 6 as input")}  # fmt: skip
    numbers, reference = {"steps": size.steps, "rows": {}, "teacher": interval(teacher["right"])}, None
    for label, choice in choices.items():
        made, row = train(choice), {}
        for n, word in ((1, "one"), (2, "two"), (4, "four")):
            draw = Draw("lcm", n, W if "guided" in label else 0.0, W if choice.rank is None else None)
            full = ([choice, choice.steps], made[choice.steps]) if choice.rank is None else None
            x = pictures(prompts, size.seeds, draw, [] if full else [(made[choice.steps], 1.0)], full)
            row[word] = interval(x["right"])
            if n == 1:
                row["distance"] = interval(rms(x["z0"], teacher["z0"]))
            if n == 4:
                row["sharpness"] = interval(x["sharpness"], teacher["sharpness"], ratio=True)
                reference = x if reference is None else reference
                row["against baseline"] = interval(x["right"], reference["right"])
        row["loss"] = made["loss"][-50:].mean().item()
        numbers["rows"][label] = row
    matter = [k for k, row in numbers["rows"].items() if row["against baseline"][2] < -0.02]
    numbers["worse"] = matter
    return {"numbers": numbers, "verdict": "matter: " + (", ".join(matter) or "none")}


# ---- 8


def fail(size: Size) -> dict:
    """The failures that people meet, each provoked, and the number that shows it."""
    prompts, lab = prompts_of("bare", size.few), open_lab()
    tau_lcm, style = shipped("lcm_lora"), style_vectors(size)[size.styles[-1]]
    tune = tuning(size)
    far_key, far = [tune, tune.steps], train(tune)[tune.steps]
    there = train(short(size)._replace(data="styles", base=far_key), far)[size.steps]
    generator = torch.Generator().manual_seed(0)
    shuffled = {p: (up[torch.randperm(len(up), generator=generator)], *rest) for p, (up, *rest) in tau_lcm.tau.items()}
    alone = train(short(size)._replace(steps=2, lr=0.0))[2]
    cases = {
        "as it should be": ([(tau_lcm, 1.0)], None),
        "no LCM-LoRA": ([], None),
        "lambda2 = 0.25": ([(tau_lcm, 0.25)], None),
        "lambda2 = 2": ([(tau_lcm, 2.0)], None),
        "lambda1 = 2.5 beside it": ([(tau_lcm, 1.0), (style, 2.5)], None),
        "left out of the optimizer": ([(alone, 1.0)], None),
        "another base's vector": ([(Vector("shuffled", shuffled), 1.0)], None),
        "a far fine-tune's vector": ([(there, 1.0)], None),
        "style of this base on a far one": ([(tau_lcm, 1.0), (style, 0.8)], (far_key, far)),
    }
    reference = pictures(prompts, size.seeds, FOUR, cases["as it should be"][0])
    z_T, _ = noise(8, 0, lab.side)
    cond, null = lab.text.encode([p.text for p in prompts[:8]]), lab.text.null_cond(min(8, len(prompts)))
    z_T, numbers, images, labels, network = z_T[: len(prompts)], {"cases": {}}, [], [], bound(lab.unet)
    trajectories: dict[bool, torch.Tensor] = {}
    for label, (vectors, weights) in cases.items():
        x = pictures(prompts, size.seeds, FOUR, vectors, weights)
        far_base = weights is not None
        if far_base not in trajectories:  # the teacher's, one for each base
            with changed(lab.unet, weights and weights[1], []):
                trajectories[far_base] = guided_trajectory(network, z_T, cond, null, SCHEDULE, W)
        with changed(lab.unet, weights and weights[1], vectors):
            _, end = consistency_along_trajectory(network, trajectories[far_base], cond, SCHEDULE, W)
        tau = combine([v.tau for v, _ in vectors], [lam for _, lam in vectors]) if vectors else {}
        numbers["cases"][label] = {"right": interval(x["right"]), "consistency": mean(end.values()),
            "sharpness": interval(x["sharpness"], reference["sharpness"], ratio=True),
            "norm": sum(n**2 for n in delta_norms(tau).values()) ** 0.5}  # fmt: skip
        images += decoded_images(x["z0"][:6, 0])
        labels += [label] + [p.name for p in prompts[1:6]]
    sheet = contact_sheet(images, labels, min(6, len(prompts)))
    save_png(figure_path("fail-pictures", size), sheet, "paper/run.py fail")
    numbers["memory"] = {label: step_memory(label == "base unfrozen") for label in ("base frozen", "base unfrozen")}
    good = numbers["cases"]["as it should be"]
    for row in numbers["cases"].values():
        far_off = not 0.85 < row["sharpness"][0] < 1.15 or row["consistency"] > 1.25 * good["consistency"]
        row["shown"] = row is not good and (far_off or row["norm"] == 0)
    bad = [k for k, row in numbers["cases"].items() if row["right"][2] < good["right"][0]]
    missed = [k for k in bad if not numbers["cases"][k]["shown"]]
    numbers["bad"], numbers["missed"] = bad, missed
    return {"numbers": numbers, "verdict": "held" if not missed else "held in part"}


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
        loss_of(objective, nets, torch.randn(12, 4, 16, 16), cond, null, torch.Generator()).backward()
    return (live.peak + 2 * size_of(trained)) / 1e9


# ---- around


SECTIONS: dict[str, Callable[[Size], dict]] = {
    f.__name__: f for f in (memory, steps, combination, base, rank, solver, recipe, fail)
}
REPEATED = ("steps", "combination")


def figure_path(name: str, size: Size) -> Path:
    folder = CACHE / "quick" if size.quick else HERE / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}{f'-seed{size.seed}' if size.seed else ''}.png"


def processor() -> str:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else []
    return f"{(names or [platform.processor()])[0]}, {torch.get_num_threads()} threads, UNet in {str(HALF)[6:]}"


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
    start = time.perf_counter()
    spent.clear(), spent_now.clear()
    result = SECTIONS[name](size_of_run(quick, seed))
    seconds = time.perf_counter() - start - sum(spent_now) + sum(spent.values())  # as if nothing had been kept
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout
    about = {"section": name, "quick": quick, "seed": seed, "commit": commit.strip(), "processor": processor()}
    about |= {"seconds": seconds, "rule": RULES[name]}
    with atomic(folder / f"{name}{f'-seed{seed}' if seed else ''}.json") as part:
        part.write_text(json.dumps(rounded(about | result), indent=1) + "\n")
    print(f"{name}, seed {seed}: {result['verdict']} ({seconds:.0f} s)", flush=True)


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
