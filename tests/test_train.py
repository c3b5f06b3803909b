"""train.py on a tiny model: every objective, its files, exact resume, a line for wrong flags."""

import dataclasses
import hashlib
import io
import math
import re
import runpy
import shlex
import signal
import sys
import tarfile
from itertools import islice

import pytest
import torch
from PIL import Image
from tiny import (
    CONFIG,
    ROOT,
    TWO_TOWERS,
    drawing,
    load_tau,
    png,
    random_tau,
    tiny_unet,
    write_art,
    write_model,
)

import sample
import train
from minilcm.data.emoji import art_batches
from minilcm.data.open import Reading, find_data, open_data
from minilcm.data.shards import stream_batches
from minilcm.files.checkpoint import load_model
from minilcm.files.lora_file import EMOJI, read_recipe, read_tau, write_tau
from minilcm.files.safetensors_file import read_header, read_tensors
from minilcm.lcm import lcd_loss, lcm_grid, sample_lcm, update_ema
from minilcm.lora import ATTENTION, add_lora, get_tau, target_paths
from minilcm.merge import merge_into
from minilcm.objective import make_networks
from minilcm.run import diagnostics
from minilcm.run.diagnostics import from_seeds, guided_trajectory, read_metrics
from minilcm.run.state import how_to_draw, latest_state, read_run, save_state
from minilcm.schedule import T, make_schedule
from minilcm.solver import guided_eps

OBJECTIVES = {
    "full": ["--objective", "diffusion", "--full"],
    "style": ["--objective", "diffusion", "--rank", "3", "--alpha", "2"],
    "lcm": ["--objective", "lcm", "--rank", "4", "--alpha", "6"],
    "attention": ["--objective", "lcm", "--rank", "2", "--attention-only"],
    "full lcm": ["--objective", "lcm", "--full"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with model.safetensors, and art/ with two shards and a held_out.txt."""
    folder = tmp_path_factory.mktemp("files")
    write_model(folder / "model.safetensors")
    (folder / "art").mkdir()
    write_art(folder / "art/noto.tar", "noto"), write_art(folder / "art/fluent.tar", "fluent")
    (folder / "art/held_out.txt").write_text("rocket\tfluent\n")
    for name in ("empty", "bare", "broken"):  # no picture; no caption; no picture that can be read
        (folder / name).mkdir()
    (folder / "bare/cat.png").write_bytes(png(drawing(0)))
    (folder / "broken/cat.png").write_bytes(b"no picture")
    (folder / "broken/cat.txt").write_text("a cat")
    (folder / "broken.tar").write_bytes(b"no tar")
    (folder / "blank.txt").write_text("\n \n")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    return folder


TRAJECTORIES: dict[tuple, torch.Tensor] = {}  # {guidance and first eps_hat: the teacher's}


def kept_trajectory(network, z_T, cond, null_cond, schedule, w):
    """`guided_trajectory`, made once for each teacher: its first eps_hat tells which it is."""
    first = diagnostics.guided(network, cond, null_cond, w)(z_T, T - 1)
    key = w, first.float().numpy().tobytes()
    if key not in TRAJECTORIES:
        TRAJECTORIES[key] = guided_trajectory(network, z_T, cond, null_cond, schedule, w)
    return TRAJECTORIES[key]


@pytest.fixture(autouse=True)
def measure_little(monkeypatch):
    """What a save measures, tested in test_diagnostics.py, takes most of a short run: two fixed
    batches for eight, two of the grid's indices for ten, at most four steps for twenty.
    """

    def few_steps(eps_fn, like, sampler, steps, schedule):
        return from_seeds(eps_fn, like, sampler, min(steps, 4), schedule)

    monkeypatch.setattr(train, "islice", lambda batches, _: islice(batches, 2))
    monkeypatch.setattr(diagnostics, "INDICES", (0, 49))
    monkeypatch.setattr(diagnostics, "from_seeds", few_steps)
    monkeypatch.setattr(diagnostics, "guided_trajectory", torch.no_grad()(kept_trajectory))


@pytest.fixture(autouse=True)
def keep_sigint():
    """train.main takes over Ctrl-C; give it back to pytest."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def flags(files, out, objective: str, steps: int, *more: str) -> list[str]:
    small = ["--batch", "3", "--looks", "2", "--device", "cpu", "--steps", str(steps)]
    paths = [
        "--model",
        str(files / "model.safetensors"),
        "--data",
        str(files / "art"),
        "--out",
        str(out),
    ]
    return [*OBJECTIVES[objective], *small, *paths, *more]


def run(*args) -> None:
    train.main(train.parse(flags(*args)))


def refused(argv: list[str]) -> str:
    """The one line with which these flags end, exit code 1; called as `python train.py` would."""
    with pytest.raises((SystemExit, ValueError, OSError)) as caught:
        train.main(train.parse(argv))
    message = str(caught.value)
    assert message and "\n" not in message and message not in "0123"
    return message


# ---- the objectives


@pytest.mark.parametrize("objective", ["style", "lcm", "full lcm"])
def test_two_steps_of_a_model_that_predicts_v(files, tmp_path, objective):
    """With zero terminal SNR: every loss and measurement is a number, and --prediction v says the
    same as the file, but for the schedule.
    """
    unet = dataclasses.replace(CONFIG.unet, v=True, zero_snr=True)
    config = dataclasses.replace(CONFIG, unet=unet)
    write_model(tmp_path / "model.safetensors", config=config)
    by_file = ["--model", str(tmp_path / "model.safetensors")]
    losses = {}
    for name, more in (("zero", by_file), ("v", ["--prediction", "v"]), ("eps", [])):
        run(files, tmp_path / name, objective, 2, *more)
        (record,) = read_metrics(tmp_path / name / "metrics.jsonl")
        assert all(map(math.isfinite, numbers(record)))
        losses[name] = record["fixed_loss"]
    assert len(set(losses.values())) == 3


def numbers(record) -> list[float]:
    """All numbers in a record of metrics.jsonl."""
    if isinstance(record, dict):
        return [x for value in record.values() for x in numbers(value)]
    return [record]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_steps(files, tmp_path, objective, capsys):
    """Two steps write what --help promises: result, sheet and state; the result has moved."""
    run(files, tmp_path / "new/run", objective, 2, "--lr", "0.1")
    out = tmp_path / "new/run"
    result = "model.safetensors" if "full" in objective else "lora.safetensors"
    results = [result, "target.safetensors"] if objective == "full lcm" else [result]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [*results, "state_000002.safetensors", "step_000002.png", "metrics.jsonl"]
    )
    assert Image.open(out / "step_000002.png").text["parameters"] == "step 2"
    metadata = read_run(latest_state(out))
    assert metadata["step"] == 2 and metadata["flags"]["objective"] in OBJECTIVES[objective]
    unet, *_ = load_model(files / "model.safetensors")
    if "full" in objective:
        trained = load_model(out / result)
        w_dim = 256 if objective == "full lcm" else None
        assert trained[3] == dataclasses.replace(
            CONFIG, unet=dataclasses.replace(CONFIG.unet, w_dim=w_dim)
        )
        changed = [
            not torch.equal(a, b) for a, b in zip(unet.parameters(), trained[0].parameters())
        ]
        assert sum(changed) > 0.9 * len(changed)
    else:
        targets = train.ATTENTION if objective == "attention" else train.TARGETS
        tau = read_tau(out / result)
        assert sorted(tau) == sorted(target_paths(unet, targets))
        assert {(down.shape[0], lora_alpha) for _, down, lora_alpha in tau.values()} == {
            {"style": (3, 2.0), "lcm": (4, 6.0), "attention": (2, 2.0)}[objective]
        }
        # B started at zero; gradients flowed into each
        assert all(up.any() for up, _, _ in tau.values())
        expected = {
            "objective": OBJECTIVES[objective][1],
            "steps": "2",
            "model": "model.safetensors",
            "seed": "0",
        }
        expected["model_sha256"] = hashlib.sha256(
            (files / "model.safetensors").read_bytes()
        ).hexdigest()
        if objective != "style":
            expected |= {
                "w": "7.5",
                "k": "20",
                "psi_steps": "1",
                "K": "50",
                "timestep_scaling": "10",
            }
        assert read_recipe(out / result) == expected
    assert "fixed" in capsys.readouterr().out


def test_seed_and_w_matter(files, tmp_path):
    """Another --seed or --w gives another LoRA; the same flags give the same one, bit for bit."""
    results = []
    for i, more in enumerate([(), (), ("--seed", "1"), ("--w", "2")]):
        run(files, tmp_path / str(i), "attention", 1, *more)
        results.append(read_tensors(tmp_path / str(i) / "lora.safetensors")[0])

    def same(a, b):
        return all(torch.equal(a[key], b[key]) for key in a)

    assert same(results[0], results[1])
    assert not any(same(results[0], other) for other in results[2:])


def test_a_lora_of_a_range_of_w(files, tmp_path, monkeypatch):
    """--w 5:15 as the official scripts draw it, w by w of a batch; the student is not told, and the
    file's header says what it was.
    """
    seen = []

    def loss(student, teacher, target, z0, cond, null_cond, schedule, n, w, eps, **skip):
        seen.extend(w.tolist())
        assert torch.equal(student(z0, n, cond, w), student(z0, n, cond, w + 1))
        return lcd_loss(student, teacher, target, z0, cond, null_cond, schedule, n, w, eps, **skip)

    monkeypatch.setattr("minilcm.objective.lcd_loss", loss)
    run(files, tmp_path, "attention", 4, "--w", "5:15")
    assert all(5 <= w <= 15 for w in seen) and max(seen) - min(seen) > 5
    assert read_recipe(tmp_path / "lora.safetensors")["w"] == "5:15"


def test_gradients_are_clipped(files, tmp_path, monkeypatch):
    """What the optimizer sees has norm 1 although the gradient's is larger (a bug of one official
    script: an empty iterator clips nothing).
    """
    norms, clip, step = [], torch.nn.utils.clip_grad_norm_, torch.optim.AdamW.step

    def clip_spy(parameters, most):
        norms.append([clip(parameters, most).item()])
        return torch.tensor(norms[-1][0])

    def step_spy(self, *args, **kwargs):
        grads = [
            p.grad for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        norms[-1].append(torch.stack([g.norm() for g in grads]).norm().item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_spy)
    monkeypatch.setattr(torch.optim.AdamW, "step", step_spy)
    run(files, tmp_path, "lcm", 3, "--alpha", "60")
    assert len(norms) == 3 and max(before for before, _ in norms) > 1.1
    assert all(after == pytest.approx(min(before, 1), rel=1e-3) for before, after in norms)


def test_learning_rate_warms_up_then_falls_to_zero(files, tmp_path, monkeypatch):
    """lr min(1, (step + 1) / warmup) (1 + cos(pi step / steps)) / 2 at every step, with a warm-up
    of a tenth of the steps.
    """
    seen, step = [], torch.optim.AdamW.step

    def step_spy(self, *args, **kwargs):
        seen.extend(group["lr"] for group in self.param_groups)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_spy)
    run(files, tmp_path, "attention", 20, "--lr", "1e-2")
    cosine = [(1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)]
    assert seen == pytest.approx([1e-2 * c for c in (cosine[0] / 2, *cosine[1:])])
    seen.clear()
    run(files, tmp_path / "b", "attention", 3, "--lr", "1e-2", "--constant-lr")
    assert seen == [1e-2] * 3


def test_the_ema_follows_every_optimizer_step(files, tmp_path, monkeypatch):
    """Of a full LCM: step, then target <- 0.95 target + 0.05 student, with that step's weights."""
    events, step = [], torch.optim.AdamW.step

    def step_spy(self, *args, **kwargs):
        events.append("step")
        return step(self, *args, **kwargs)

    def ema_spy(target, student):
        before, now = (
            {k: x.detach().clone() for k, x in net.named_parameters()} for net in (target, student)
        )
        update_ema(target, student)
        right = all(
            torch.equal(x, before[k].lerp(now[k], 1 - 0.95)) for k, x in target.named_parameters()
        )
        events.append("average" if right else "wrong")

    monkeypatch.setattr(torch.optim.AdamW, "step", step_spy)
    monkeypatch.setattr(train, "update_ema", ema_spy)
    run(files, tmp_path, "full lcm", 2)
    assert events == ["step", "average"] * 2, (
        "the target must be averaged once after each optimizer step"
    )


def test_average_is_of_the_weights_and_is_what_is_written(files, tmp_path):
    """--average MU: after the first step average = 0.1 start + 0.9 weights.

    mu grows as (step + 1) / (step + 10); the state keeps both, the result has the average.
    """
    run(files, tmp_path, "full", 1, "--average", "0.9", "--lr", "0.1")
    start = load_model(files / "model.safetensors")[0].state_dict()
    state, _ = read_tensors(latest_state(tmp_path))
    written = load_model(tmp_path / "model.safetensors")[0].state_dict()
    moved = 0
    for key, before in start.items():
        average = 0.1 * before + 0.9 * state[key]
        torch.testing.assert_close(state[f"average.{key}"], average, rtol=1e-5, atol=1e-6)
        assert torch.equal(written[key], state[f"average.{key}"].half().float()), key
        moved += not torch.equal(written[key], state[key].half().float())
    assert moved > 0.8 * len(start), "the average must differ from the weights"


def test_a_save_does_not_change_the_run(files, tmp_path):
    """Weights and average change places while they are measured, and change back: saving at every
    step gives the same bits as saving at the end.
    """
    for name, every in (("often", "1"), ("once", "9")):
        run(files, tmp_path / name, "full", 2, "--average", "0.9", "--save-every", every)
    often, once = contents(tmp_path / "often"), contents(tmp_path / "once")
    for name, (tensors, _) in once.items():
        assert all(torch.equal(x, often[name][0][key]) for key, x in tensors.items()), name


def test_weights_do_not_decay(files, tmp_path):
    """AdamW without decay: what has no gradient stays where it is."""
    args = train.parse(flags(files, tmp_path, "full", 1))
    unet = load_model(files / "model.safetensors")[0]
    how = Reading(32, args.batch, 1, 1, 0, 0.0, "cpu")
    training = train.start_training(args, train.objective_of(args, False), unet, how)
    before = [x.detach().clone() for x in training.named.values()]
    for x in training.named.values():
        x.grad = torch.zeros_like(x)
    training.optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(training.named.values(), before)), (
        "weights decay without a gradient"
    )


@pytest.mark.parametrize(
    "objective, drop", [("full", 0.1), ("style", 0.1), ("lcm", 0.0), ("full lcm", 0.0)]
)
def test_captions_are_dropped_for_diffusion_only(files, tmp_path, monkeypatch, objective, drop):
    """A tenth of the captions becomes "", which guidance needs; consistency has its own null."""
    seen = []

    def spy(*args):
        seen.append(args[-1].drop)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "open_data", spy)
    with pytest.raises(KeyboardInterrupt):
        run(files, tmp_path, objective, 1)
    assert seen == [drop]


@pytest.mark.parametrize("kind", ["art", "pictures", "shards"])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_captions_are_empty_as_often_as_asked(files, tmp_path, kind, drop):
    """None for a consistency loss, whatever the data are; half of them if half is asked for."""
    write_pictures(tmp_path / "pictures", 2)
    write_shards(tmp_path / "shards", 1, 3)
    path = files / "art" if kind == "art" else tmp_path / kind
    how = Reading(CONFIG.size, 16, 1, 1, 0, drop, "cpu")
    model = load_model(files / "model.safetensors")
    data = open_data(find_data(path), model, "", tmp_path / "cache", how)
    captions = [caption for batch in islice(data.batches(0), 20) for caption in batch[1]]
    assert captions.count("") / len(captions) == pytest.approx(drop, abs=0.1 if drop else 0)


def test_base_is_frozen_and_teacher_is_the_lora_off(files, tmp_path, monkeypatch):
    """In every forward of LCM training the base weights are those of the file; student and target
    run with the LoRA on, with and without gradient, the teacher (prompt and null in one batch) with
    it off.
    """
    calls = []

    def spy(student, teacher, target, z0, *rest, **kwargs):
        unet = teacher.__closure__[
            [c for c in teacher.__code__.co_freevars].index("unet")
        ].cell_contents
        base = load_model(files / "model.safetensors")[0]
        state = unet.state_dict()
        assert all(torch.equal(state[key], value) for key, value in base.state_dict().items())

        def wrap(name, network):
            def call(z_t, t, cond, w):
                out = network(z_t, t, cond, w)
                same = torch.equal(out, network_off(base, z_t, t, cond))
                calls.append((name, same, out.requires_grad))
                return out

            return call

        return lcd_loss(
            wrap("student", student),
            wrap("teacher", teacher),
            wrap("target", target),
            z0,
            *rest,
            **kwargs,
        )

    def network_off(base, z_t, t, cond):
        with torch.no_grad():
            return base(z_t, t, cond)

    monkeypatch.setattr("minilcm.objective.lcd_loss", spy)
    # bfloat16 would round the base
    monkeypatch.setattr(train, "forward_dtype", lambda device: torch.float32)
    run(files, tmp_path, "lcm", 3, "--lr", "0.02")
    first, last = calls[:3], calls[6:9]
    names = ["student", "teacher", "target"]
    grads = [True, False, False]
    assert first == list(zip(names, [True] * 3, grads))  # B = 0: all are the base
    assert last == list(zip(names, [False, True, False], grads))


def test_lcm_training_lowers_the_fixed_loss(files, tmp_path, capsys):
    """Learning rate 0 leaves the loss at fixed (z0, t, noise) where it is, to the last digit;
    twenty steps of training bring it down by 15 %.
    """
    run(files, tmp_path / "still", "lcm", 2, "--lr", "0", "--w", "0", "--save-every", "1")
    run(files, tmp_path / "down", "lcm", 20, "--lr", "0.06", "--w", "0")
    lines = capsys.readouterr().out.splitlines()
    before, still, after = [
        float(line.split("fixed loss ")[1]) for line in lines if "fixed loss" in line
    ]
    assert still == before and after < 0.85 * before


def test_written_lora_samples_as_the_live_one(files, tmp_path):
    """The file of an LCM run, read again: as live layers it gives exactly what the state's
    parameters give, rounded to float16; merged into the weights it gives the same latents to 1e-3
    (a bug of one official script: a reload that drops the LoRA).
    """
    run(files, tmp_path, "lcm", 4, "--lr", "0.02")
    tau = read_tau(tmp_path / "lora.safetensors")
    state = read_tensors(latest_state(tmp_path))[0]
    latents = []
    for how in ("state", "file", "merged", "base"):
        unet, _, text, _ = load_model(files / "model.safetensors")
        if how in ("state", "file"):
            add_lora(unet, 4, 6.0)
            load_tau(unet, tau)
        if how == "state":
            for path, (up, down, _) in get_tau(unet).items():
                up.data, down.data = (
                    state[f"{path}.{x}.weight"].half().float() for x in ("lora_up", "lora_down")
                )
        if how == "merged":
            merge_into(unet, tau)
        generator = torch.Generator().manual_seed(0)
        z_T = torch.randn(1, 4, 8, 8, generator=generator)
        eps_fn = guided_eps(unet, text.encode(["cat face"]), None, 0.0)
        latents.append(sample_lcm(eps_fn, z_T, make_schedule(), lcm_grid(4), [generator]))
    live, written, merged, base = latents
    assert torch.equal(live, written)
    assert (live - merged).abs().max() < 1e-3 * live.abs().max()
    assert (live - base).abs().max() > 0.01 * live.abs().max()


def test_full_training_writes_the_average(files, tmp_path):
    """model.safetensors is the running average of the weights: after a step 0.1 old + 0.9 new."""
    run(files, tmp_path, "full", 1, "--lr", "1")
    state = read_tensors(latest_state(tmp_path))[0]
    old = load_model(files / "model.safetensors")[0].state_dict()
    written = load_model(tmp_path / "model.safetensors")[0].state_dict()
    for key, value in written.items():
        torch.testing.assert_close(
            state[f"average.{key}"], 0.1 * old[key] + 0.9 * state[key], rtol=0, atol=1e-5
        )
        assert torch.equal(value, state[f"average.{key}"].half().float())


def test_a_folder_of_own_pictures(files, tmp_path):
    """A style LoRA from two pictures with captions, which the model's names do not limit."""
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(drawing(i)))
        (tmp_path / f"{i}.txt").write_text("a watercolour of my cat")
    argv = [*flags(files, tmp_path / "out", "style", 2), "--data", str(tmp_path)]
    train.main(train.parse(argv))
    assert read_tau(tmp_path / "out/lora.safetensors")


def write_pictures(folder, count: int) -> None:
    folder.mkdir()
    for i in range(count):
        (folder / f"{i}.png").write_bytes(png(drawing(i)))
        (folder / f"{i}.txt").write_text(f"picture {i}")


def test_without_pictures(files, tmp_path):
    """--data prompts.txt: the model draws them, into the cache of --out; a resumed run wants the
    same prompts.
    """
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    data = ["--data", f"{tmp_path}/prompts.txt"]
    run(files, tmp_path / "out", "attention", 1, *data)
    assert read_tau(tmp_path / "out/lora.safetensors")
    kept = [read_header(file)[0] for file in (tmp_path / "out/cache").iterdir()]
    assert sum("mean" in header for header in kept) == 4  # two prompts, --looks 2
    (tmp_path / "prompts.txt").write_text("a cat\na pig\n")
    message = refused(flags(files, tmp_path / "out", "attention", 1, *data, "--resume"))
    assert re.match(r"--resume: --data was 2 prompts, digest \w+, is now 2 prompts, dig", message)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_text_towers(tmp_path, objective):
    """SDXL in small: every objective trains on a folder of pictures, in buckets and with size ids,
    and what it writes loads again.
    """
    write_model(tmp_path / "two.safetensors", config=TWO_TOWERS)
    write_pictures(tmp_path / "pictures", 2)
    argv = [*flags(tmp_path, tmp_path / "out", objective, 1), "--lr", "0.1"]
    train.main(
        train.parse(
            [*argv, "--model", f"{tmp_path}/two.safetensors", "--data", f"{tmp_path}/pictures"]
        )
    )
    if "full" in objective:
        unet, _, _, config = load_model(tmp_path / "out/model.safetensors")
        assert config.text == TWO_TOWERS.text and config.unet.w_dim == (
            256 if "lcm" in objective else None
        )
        old = load_model(tmp_path / "two.safetensors")[0].state_dict()
        assert not torch.equal(
            unet.state_dict()["label_emb.0.0.weight"], old["label_emb.0.0.weight"]
        )
    else:
        assert read_tau(tmp_path / "out/lora.safetensors")


def write_shards(folder, count: int, pictures: int) -> None:
    folder.mkdir()
    for shard in range(count):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(pictures):
                for suffix, data in (
                    ("png", png(drawing(i))),
                    ("txt", f"picture {shard} {i}".encode()),
                ):
                    member = tarfile.TarInfo(f"{i}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def test_shards_are_streamed_and_resumed(files, tmp_path, monkeypatch):
    """Captioned tar shards, two reading processes: no latent is cached, and 5 steps == 2, Ctrl-C,
    then 3 more, bit for bit, with the same captions.
    """
    write_shards(tmp_path / "shards", 2, 5)
    more = ["--data", str(tmp_path / "shards"), "--workers", "2", "--batch", "2"]
    seen, original = [], stream_batches

    def spy(*args, **kwargs):
        for i, data in enumerate(original(*args, **kwargs)):
            if args[4] == 0:  # the seed: -1 is for what is looked at
                seen.append(data[1])
                if i == stop_at:
                    signal.raise_signal(signal.SIGINT)
            yield data

    monkeypatch.setattr("minilcm.data.open.stream_batches", spy)
    stop_at = None
    run(files, tmp_path / "whole", "attention", 5, *more)
    captions, seen[:] = list(seen), []
    stop_at = 1
    with pytest.raises(SystemExit, match="stopped after step 2"):
        run(files, tmp_path / "parts", "attention", 5, *more)
    assert read_run(latest_state(tmp_path / "parts"))["positions"] == [[2, 2]]
    stop_at = None
    run(files, tmp_path / "parts", "attention", 5, *more, "--resume")
    assert seen == captions and len({c for batch in captions for c in batch}) > 5
    assert not (tmp_path / "cache").exists()
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    for name, (tensors, _) in whole.items():
        assert all(torch.equal(tensors[key], parts[name][0][key]) for key in tensors)


def test_a_large_models_base_stays_narrow(files, tmp_path, monkeypatch):
    """As an official checkpoint on a processor without bfloat16: base kept in float16, blocks
    computed again. The LoRA is that of a wide base, to 1e-3 of its largest value.
    """
    taus = []
    for large in (False, True):
        monkeypatch.setattr(train, "is_large", lambda config: large)
        monkeypatch.setattr(train, "forward_dtype", lambda device: torch.float32)
        kept = []
        monkeypatch.setattr(
            train, "make_networks", lambda *args: kept.append(args[1]) or make_networks(*args)
        )
        run(files, tmp_path / str(large), "lcm", 3)
        assert (kept[0].middle_block[1].proj_in.weight.dtype == torch.float16) == large
        assert kept[0].out[2].weight.dtype == torch.float32
        taus.append(read_tensors(latest_state(tmp_path / str(large)))[0])
    wide, narrow = taus
    for key in [k for k in wide if k.endswith("exp_avg")]:
        assert (wide[key] - narrow[key]).abs().max() <= 1e-3 * wide[key].abs().max() + 1e-9, key


def test_quantize_trains_on_an_int8_base(files, tmp_path, monkeypatch):
    """The weights that the LoRA adapts, and no others; what a save measures and draws, too."""
    kept = []
    monkeypatch.setattr(
        train, "make_networks", lambda *args: kept.append(args[1]) or make_networks(*args)
    )
    run(files, tmp_path, "lcm", 1, "--quantize")
    names = {name for name, x in kept[0].named_parameters() if x.dtype == torch.int8}
    assert names == {f"{path}.weight" for path in target_paths(kept[0])}


def test_held_out_and_unknown_names_are_not_trained_on(files, tmp_path, monkeypatch):
    """The cache holds no pair of held_out.txt, and no name outside the model's list."""
    seen = []

    def spy(vae, art, *args):
        seen.extend((a.name, a.style) for a in art)
        raise KeyboardInterrupt

    monkeypatch.setattr("minilcm.data.open.cache_art", spy)
    with pytest.raises(KeyboardInterrupt):
        run(files, tmp_path, "lcm", 2)
    assert sorted(seen) == sorted(
        (n, s) for n in CONFIG.names for s in ("noto", "fluent") if (n, s) != ("rocket", "fluent")
    )


@pytest.mark.parametrize("objective", ["style", "lcm"])
def test_starts_from_a_lora(files, tmp_path, monkeypatch, objective):
    """With --init FILE the layers hold FILE's LoRA, lora_alpha included, before the first step: its
    deltas are equal, and so is what a run with --lr 0 writes.
    """
    run(files, tmp_path / "first", objective, 2, "--lr", "0.1")
    file = tmp_path / "first/lora.safetensors"
    rank = OBJECTIVES[objective][3]
    argv = flags(files, tmp_path / "second", "attention", 1, "--rank", rank, "--init", str(file))
    argv.remove("--attention-only")
    args = train.parse([*argv, "--lr", "0", "--average", "0.9"])
    unet = load_model(files / "model.safetensors")[0]
    how = Reading(32, args.batch, 1, 1, 0, 0.0, "cpu")
    training = train.start_training(args, train.objective_of(args, False), unet, how)
    tau, live = read_tau(file), get_tau(training.unet)
    for path, (up, down, lora_alpha) in tau.items():
        delta = lora_alpha / len(down) * up.flatten(1) @ down.flatten(1)
        up, down, lora_alpha = live[path]
        assert torch.equal(lora_alpha / len(down) * up.flatten(1) @ down.flatten(1), delta)
        assert delta.any() and torch.equal(training.average[f"{path}.lora_up.weight"], up)
    train.main(args)
    written = read_tau(tmp_path / "second/lora.safetensors")
    for path, (up, down, lora_alpha) in tau.items():
        assert torch.equal(written[path][0], up) and torch.equal(written[path][1], down)
        assert written[path][2] == lora_alpha


def test_a_lora_that_does_not_fit_is_no_start(files, tmp_path, finished, monkeypatch):
    """Of another rank, for other layers, for --full, or with a second --alpha: one line, before
    anything is encoded.
    """
    monkeypatch.setattr(train, "open_data", None)
    init = ["--init", str(finished / "lora.safetensors")]
    argv = flags(files, tmp_path / "out", "attention", 1, *init)
    message = refused([*argv, "--rank", "3"])
    assert re.search(r"lora.safetensors: \S+ has rank 2, this run 3; give --rank 2$", message)
    message = refused(flags(files, tmp_path / "out", "lcm", 1, "--rank", "2", *init[:1], init[1]))
    assert "--alpha is 6.0, but --init" in message
    wide = random_tau(tiny_unet(0, TWO_TOWERS.unet), 1, 2, 2.0, ATTENTION)
    write_tau(tmp_path / "wide.safetensors", wide, {})
    message = refused([*argv, "--init", str(tmp_path / "wide.safetensors")])
    assert re.search(r"wide.safetensors: made for another model: \S+ has another shape$", message)
    argv.remove("--attention-only")
    message = refused(argv)
    assert re.search(r"lora.safetensors: it adapts \d+ layers, this run \d+; first diff", message)
    assert "--init is for a LoRA; give --rank in place of --full" in refused(
        flags(files, tmp_path / "out", "full", 1, *init)
    )
    assert "none.safetensors: no such file" in refused(
        flags(files, tmp_path / "out", "attention", 1, "--init", "none.safetensors")
    )


def test_a_full_lcm_writes_its_averaged_target_too(files, tmp_path):
    """target <- 0.95 target + 0.05 student, from the start, which is the base: target.safetensors
    is that average after one step, model.safetensors the student.
    """
    run(files, tmp_path, "full lcm", 1, "--lr", "0.1")
    old = load_model(files / "model.safetensors")[0].state_dict()
    student = load_model(tmp_path / "model.safetensors")
    target = load_model(tmp_path / "target.safetensors")
    assert student[3] == target[3] and target[3].unet.w_dim == 256
    after, moved = student[0].state_dict(), 0
    for key, x in target[0].state_dict().items():
        start = old.get(key, torch.zeros_like(x))  # cond_proj begins at 0
        expected = 0.95 * start + 0.05 * after[key]
        torch.testing.assert_close(x, expected, rtol=2e-3, atol=1e-4)
        moved += not torch.equal(x, after[key])
    assert moved > 0.8 * len(after)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shipped", [True, False])
def test_the_end_says_how_to_draw(files, tmp_path, objective, shipped):
    """A line for sample.py, which takes its flags: the new LoRA on its base, or the new model; in
    few steps only where an LCM or an LCM-LoRA is there.
    """
    argv = flags(files, tmp_path / "my run", objective, 20)
    if shipped:
        argv += ["--model", str(EMOJI / "model.safetensors")]
    args = train.parse(argv)
    result = "model" if "full" in objective else "lora"
    (tmp_path / "my run").mkdir()
    (tmp_path / f"my run/{result}.safetensors").touch()
    (tmp_path / "my run/step_000020.png").touch()
    first, line = how_to_draw(args, "a cat's face", shipped).splitlines()
    python, script, *words = shlex.split(line)
    drawn = sample.parse(words)
    assert (python, script, drawn.prompts) == ("python", "sample.py", ["a cat's face"])
    assert str(tmp_path / "my run/step_000020.png") in first
    full, lcm = "full" in objective, objective in ("lcm", "attention", "full lcm")
    loras = [] if full else [str(tmp_path / "my run/lora.safetensors")]
    lcm_lora = ["lcm"] if shipped and objective == "style" else []
    assert (drawn.lora or []) == loras + lcm_lora
    assert drawn.sampler == ("lcm" if lcm or lcm_lora else "ddim")
    result = tmp_path / "my run" / ("model.safetensors" if full else "lora.safetensors")
    assert drawn.model == (result if full else args.model) and first.startswith(str(result))


# ---- resume


def interrupt_at(monkeypatch, step: int) -> None:
    """Ctrl-C while `step` fetches its batch."""
    original = art_batches

    def interrupted(cache, batch, seed, start, *place):
        for i, data in enumerate(original(cache, batch, seed, start, *place), start):
            if i == step and seed >= 0:
                signal.raise_signal(signal.SIGINT)
            yield data

    monkeypatch.setattr("minilcm.data.open.art_batches", interrupted)


def contents(folder) -> dict:
    """All tensors and headers of a run's result and last state."""
    result = [p for p in folder.glob("*.safetensors") if not p.name.startswith("state_")]
    return {
        name: read_tensors(p)
        for name, p in zip(("result", "state"), [*result, latest_state(folder)])
    }


@pytest.mark.parametrize("objective", ["full", "lcm"])
def test_resume_equals_an_uninterrupted_run(files, tmp_path, monkeypatch, objective):
    """6 steps == Ctrl-C in step 3, then --resume to 6: result and state (weights, averages, both
    moments) equal bit for bit. The interrupted run ends its step, saves, and exits with the line
    that says how to go on.
    """
    run(files, tmp_path / "whole", objective, 6)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(SystemExit, match="stopped after step 3; continue with --resume"):
            run(files, tmp_path / "parts", objective, 6)
    assert read_run(latest_state(tmp_path / "parts"))["step"] == 3
    half_way = contents(tmp_path / "parts")
    run(files, tmp_path / "parts", objective, 6, "--resume")
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    assert whole.keys() == parts.keys() == half_way.keys()
    for name, (tensors, metadata) in whole.items():
        assert metadata == parts[name][1] and tensors.keys() == parts[name][0].keys()
        assert all(torch.equal(tensors[key], parts[name][0][key]) for key in tensors)
        assert not all(torch.equal(tensors[key], half_way[name][0][key]) for key in tensors)
    sheets = [(tmp_path / run / "step_000006.png").read_bytes() for run in ("whole", "parts")]
    assert sheets[0] == sheets[1]


@pytest.mark.parametrize("objective", ["full", "lcm"])
def test_saving_does_not_change_training(files, tmp_path, objective):
    """Validation, sheets and files on the way draw nothing that training draws and put all weights
    back: --save-every 1 ends in the same state.
    """
    run(files, tmp_path / "a", objective, 2)
    run(files, tmp_path / "b", objective, 2, "--save-every", "1")
    a, b = (read_tensors(latest_state(tmp_path / x))[0] for x in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert len(list((tmp_path / "b").glob("*.png"))) == 2


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """A finished run of one step; read only."""
    handler = signal.getsignal(signal.SIGINT)
    out = tmp_path_factory.mktemp("finished")
    run(files, out, "attention", 1)
    signal.signal(signal.SIGINT, handler)
    return out


@pytest.mark.parametrize(
    "flag, was, now", [("--lr", "0.0003", "0.001"), ("--seed", "0", "5"), ("--w", "7.5", "3")]
)
def test_resume_with_another_flag_is_refused(files, finished, flag, was, now):
    """Both values are in the message, and nothing in --out has changed."""
    before = {p: p.read_bytes() for p in finished.iterdir()}
    message = refused([*flags(files, finished, "attention", 1), flag, now, "--resume"])
    assert f"{flag} was {was}, is now {now}" in message
    assert before == {p: p.read_bytes() for p in finished.iterdir()}


def test_data_may_move(files, tmp_path, monkeypatch):
    """A run goes on with the same pictures by another path; with other pictures it does not."""
    write_pictures(tmp_path / "data", 2)
    more = ["--save-every", "1", "--data"]
    run(files, tmp_path / "out", "attention", 1, *more, str(tmp_path / "data"))
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").rename(tmp_path / "disk/data")
    monkeypatch.chdir(tmp_path / "disk")
    run(files, tmp_path / "out", "attention", 1, *more, "data", "--resume")
    (tmp_path / "disk/data/1.txt").write_text("another caption")
    message = refused(flags(files, tmp_path / "out", "attention", 1, *more, "data", "--resume"))
    assert re.match(r"--resume: --data was 2 files, digest \w+, is now 2 files, digest", message)


def test_pictures_are_encoded_inside_out(files, tmp_path):
    """Nothing is written beside --out; with --cache DIR two runs share what is encoded."""
    write_pictures(tmp_path / "data", 2)
    data = ["--data", str(tmp_path / "data")]
    run(files, tmp_path / "out", "attention", 1, *data)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "out"]
    encoded = {p.name for p in (tmp_path / "out/cache").iterdir()}
    for name in "ab":
        run(files, tmp_path / name, "attention", 1, *data, "--cache", str(tmp_path / "shared"))
        assert {p.name for p in (tmp_path / "shared").iterdir()} == encoded
        assert not (tmp_path / name / "cache").exists()


def test_long_seeds(files, tmp_path):
    """Every seed of 64 bits trains, and another one another LoRA."""
    seeds = [2**32 - 1, 1234567890123456, 2**64 - 1]
    for seed in seeds:
        run(files, tmp_path / str(seed), "attention", 1, "--seed", str(seed))
    taus = [read_tau(tmp_path / f"{seed}/lora.safetensors") for seed in seeds]
    a, b, c = (next(iter(tau.values()))[1] for tau in taus)
    assert not torch.equal(a, b) and not torch.equal(b, c)


def test_resume_of_another_model_or_of_nothing_is_refused(files, finished, tmp_path):
    """Another rank, another objective, and a folder without a state."""
    assert "--rank was 2, is now 4" in refused(flags(files, finished, "lcm", 1, "--resume"))
    assert "--objective was lcm, is now diffusion" in refused(
        flags(files, finished, "full", 1, "--resume")
    )
    assert "no state of a run to continue from" in refused(
        flags(files, tmp_path, "lcm", 1, "--resume")
    )


def test_a_new_run_does_not_write_over_an_old_one(files, finished):
    """The same --out without --resume is refused, and the old state stays byte for byte."""
    before = latest_state(finished).read_bytes()
    assert "already holds a run; continue it with --resume" in refused(
        flags(files, finished, "attention", 1)
    )
    assert latest_state(finished).read_bytes() == before


def test_resume_of_a_finished_run_changes_nothing(files, finished):
    """Nothing is left to do, and nothing is written."""
    before = {p: p.read_bytes() for p in finished.iterdir()}
    run(files, finished, "attention", 1, "--resume")
    run(files, finished, "attention", 1, "--resume", "--compile")  # faster, not another run
    assert before == {p: p.read_bytes() for p in finished.iterdir()}


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_saving(files, tmp_path, monkeypatch, what):
    """NaN in loss or gradient at the third step: an error names it, step 2's files are intact."""
    count = []

    def spoiled(*args, **kwargs):
        loss = lcd_loss(*args, **kwargs)
        count.append(loss.requires_grad)
        if sum(count) == 3 and loss.requires_grad:
            # sqrt'(0) = inf, times 0
            return loss * float("nan") if what == "loss" else loss + (0 * loss).sqrt()
        return loss

    monkeypatch.setattr("minilcm.objective.lcd_loss", spoiled)
    argv = flags(files, tmp_path, "lcm", 3, "--save-every", "1")
    with pytest.raises(
        ValueError, match=r"at step 2, with '.+' and others; the last saved state is good"
    ):
        train.main(train.parse(argv))
    assert read_run(latest_state(tmp_path))["step"] == 2
    assert all(x.isfinite().all() for x in read_tensors(latest_state(tmp_path))[0].values())
    assert read_tau(tmp_path / "lora.safetensors")


def test_a_crash_while_saving_keeps_the_last_state(files, tmp_path, monkeypatch):
    """A full disk at the second save: the first save's files are whole, and a run resumes."""
    original, saves = save_state, []

    def full(path, *args):
        saves.append(path)
        if len(saves) == 2:
            raise OSError("No space left on device")
        original(path, *args)

    monkeypatch.setattr("minilcm.run.state.save_state", full)
    argv = flags(files, tmp_path, "attention", 2, "--save-every", "1")
    with pytest.raises(OSError):
        train.main(train.parse(argv))
    assert read_run(latest_state(tmp_path))["step"] == 1
    train.main(train.parse([*argv, "--resume"]))
    assert read_run(latest_state(tmp_path))["step"] == 2


# ---- wrong flags


@pytest.mark.parametrize(
    "argv, message",
    [
        ("", "required: --objective, --rank N or --full"),
        ("--objective lcm", "required: --rank N or --full"),
        ("--objective lcm --rank 2 --model sd15", "--model sd15 is a name for --plan only"),
        ("--objective diffusion --rank 2 --psi-steps 3", "--psi-steps is for --objective lcm"),
        ("--objective diffusion --full --w 3", "--w is for --objective lcm; leave it out"),
        ("--objective lcm --rank 2 --w 2:14:3", "--w is 2:14:3; give a number, or LOW:HIGH"),
        ("--objective lcm --rank 2 --w 15:5", "--w is 15:5; give a number, or LOW:HIGH"),
        ("--objective lcm --rank 2 --data none.txt", "none.txt: no such file"),
        ("--objective lcm --rank 2 --data {f}/blank.txt", "blank.txt: no prompts; write one a"),
        ("--objective lcm --rank 2 --data {f}/latin.txt", "latin.txt: cannot be read ("),
        ("--objective lcm --full --w 14:2", "--w is 14:2; give a number, or LOW:HIGH"),
        ("--objective lcm --full --w high", "--w is high; give a number, or LOW:HIGH"),
        ("--objective lcm --rank 2 --accumulate 0", "--accumulate is 0; give 1 or more"),
        ("--objective lcm --full --quantize", "give --rank in place of --full"),
        ("--objective lcm --rank 2 --average 1", "--average is 1.0; give a number between 0 and 1"),
        ("--objective lcm --full --rank 2", "not allowed with"),
        ("--objective gan --rank 2", "invalid choice: 'gan'"),
        ("--objective lcm --rank two", "invalid int value: 'two'"),
        ("--objective lcm --rank 0", "rank is 0; give 1 or more"),
        ("--objective lcm --rank -1", "rank is -1; give 1 or more"),
        ("--objective lcm --rank 33", "rank is 33, but a LoRA of"),
        ("--objective lcm --rank 2 --data {f}/empty", "empty: no pictures; add some"),
        ("--objective lcm --rank 2 --data {f}/bare", "no caption, first: cat.png; put its"),
        ("--objective lcm --rank 2 --data {f}/broken", "pictures can be read, first: "),
        ("--objective lcm --rank 2 --data none.tar", "none.tar: no such file"),
        ("--objective lcm --rank 2 --data {f}/broken.tar", "broken.tar: not a .tar file"),
        ("--objective lcm --rank 2 --workers 0", "--workers is 0; give 1 or more"),
        ("--objective lcm --rank 2 --steps 0", "--steps is 0; give 1 or more"),
        ("--objective lcm --rank 2 --alpha 0", "--alpha is 0.0; give a number above 0"),
        ("--objective lcm --rank 2 --k 1000", "--k is 1000; give a number of timesteps below 1000"),
        ("--objective lcm --rank 2 --batch 0", "--batch is 0; give 1 or more"),
        ("--objective lcm --rank 2 --looks 0", "--looks is 0; give 1 or more"),
        ("--objective lcm --rank 2 --save-every 0", "--save-every is 0; give 1 or more"),
        ("--objective lcm --rank 2 --lr -1", "--lr is -1.0; give 0 or more"),
        ("--objective lcm --rank 2 --seed -1", "--seed is -1; give 0 to"),
        (
            "--objective lcm --rank 2 --seed 18446744073709551616",
            "--seed is 18446744073709551616; give 0 to 18446744073709551615",
        ),
        (
            "--objective lcm --rank 2 --k 10",
            "--k is 10; give a multiple of 20: a skip must end where",
        ),
        ("--objective lcm --rank 2 --k 30", "--k is 30; give a multiple of 20"),
        ("--objective lcm --rank 2 --size 40", "--size is 40; give a multiple of 16"),
        ("--objective lcm --rank 2 --size 0", "--size is 0; give a multiple of 16"),
        ("--objective lcm --rank 2 --device tpu", "invalid choice: 'tpu'"),
        ("--objective lcm --rank 2 --stepz 3", "unrecognized arguments: --stepz"),
        ("--objective lcm --rank 2 --model none.safetensors", "none.safetensors: no such file"),
        ("--objective lcm --rank 2 --data none", "none: no such file or folder"),
        (
            "--objective lcm --rank 2 --data {f}/model.safetensors",
            "model.safetensors: is no folder, .tar or .txt; give a folder of pictures",
        ),
        ("--objective lcm --rank 2 --model {f}/art/noto.tar", "noto.tar: not a safetensors file"),
        ("--objective lcm --rank 2 --out {f}/model.safetensors", "exists"),
        ("--objective lcm --rank 2 --out {f}/model.safetensors/x", "Not a directory"),
    ],
)
def test_wrong_flags_give_one_line(files, tmp_path, argv, message):
    """Each mistake ends in one line that holds the value, before any file is written."""
    base = "--data {f}/art --model {f}/model.safetensors --out {t}/out --steps 1 --device cpu "
    line = base + argv if argv else ""
    assert message in refused([x.format(f=files, t=tmp_path) for x in line.split()])
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("steps, every", [(40, 25), (400, 100), (9000, 500)])
def test_a_short_run_saves_more_often(files, tmp_path, steps, every):
    """A quarter of the steps, so that there is a course to plot; 25 at least, 500 at most."""
    assert train.parse(flags(files, tmp_path, "lcm", steps)).save_every == every


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda(files, tmp_path):
    assert "PyTorch sees no CUDA device" in refused(
        [*flags(files, tmp_path, "lcm", 1), "--device", "cuda"]
    )


def test_resume_on_another_model(files, tmp_path):
    """The same path, another file: refused with both digests; a LoRA's base cannot change."""
    write_model(tmp_path / "model.safetensors")
    argv = [
        *flags(files, tmp_path / "out", "attention", 1),
        "--model",
        str(tmp_path / "model.safetensors"),
    ]
    train.main(train.parse(argv))
    write_model(tmp_path / "model.safetensors", seed=1)
    message = refused([*argv, "--resume"])
    assert re.match(
        r"--resume: --model was model.safetensors, sha256 \w{10}, is now model.safetensors, sha256",
        message,
    )


def test_art_of_other_names_only(files, tmp_path):
    """A shard with no name the model knows is refused by name, not by an empty list's error."""
    write_model(
        tmp_path / "other.safetensors", config=dataclasses.replace(CONFIG, names=("teapot",))
    )
    argv = [
        *flags(files, tmp_path / "out", "lcm", 1),
        "--model",
        str(tmp_path / "other.safetensors"),
    ]
    for data in (files / "art", files / "art/noto.tar"):
        assert f"{data}: none of its drawings has a name that" in refused(
            [*argv, "--data", str(data)]
        )


def test_as_a_command(files, monkeypatch, capsys):
    """`python train.py` leaves an error with one line and exit 1; --help explains, exit 0."""
    # pytest has an output of its own
    monkeypatch.setattr("minilcm.cli.output.plain_output", lambda: None)
    for argv, message in (
        (
            flags(files, files / "model.safetensors", "lcm", 1),
            "train.py: .*model.safetensors: File exists$",
        ),
        (
            [*flags(files, files, "lcm", 1), "--model", "none.safetensors"],
            "train.py: none.safetensors: no such file",
        ),
    ):
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        assert re.match(message, caught.value.code) and "\n" not in caught.value.code
    with pytest.raises(SystemExit) as caught:
        train.parse(["--help"])
    assert caught.value.code == 0 and "--save-every N" in capsys.readouterr().out


def test_out_is_not_data(files, tmp_path, monkeypatch):
    """The sheets of a save would be pictures of the next start; also by another path."""
    monkeypatch.chdir(files)
    argv = flags(files, "art/../art", "lcm", 1)
    assert "--out and --data are both" in refused(argv)
    assert not list((files / "art").glob("state_*"))
