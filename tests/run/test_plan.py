"""The plan: bytes by part, from shapes, against closed-form counts and the real step."""

import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import CONFIG, ROOT, TWO_TOWERS, tiny_text, tiny_unet, tiny_vae

import train
from minilcm.lora import ATTENTION
from minilcm.model.unet import UNet
from minilcm.objective import Objective, loss_of, make_networks
from minilcm.run import plan
from minilcm.run.plan import LiveBytes, Step, size_of, step_bytes, vae_and_text_bytes

F32 = torch.float32
PARTS = "UNet", "LoRA", "gradients", "Adam's moments", "pictures to look at", "activations"


def count(module: torch.nn.Module) -> int:
    return sum(x.numel() for x in module.parameters())


def test_live_bytes_in_closed_form():
    """What is made counts from making to end; not views, work in place, or what was there."""
    x = torch.zeros(1000)
    with LiveBytes() as live:
        a = x + 1  # 4,000 bytes
        b = a[10:].reshape(30, 33)  # a view
        a.add_(1)
        c = torch.cat([a, a])  # 8,000
        assert (live.now, live.peak) == (12000, 12000)
        del c
        assert (live.now, live.peak) == (4000, 12000)
        d = x.double()  # 8,000
        assert live.now == 12000
        del a, d
        assert live.now == 4000  # b holds a's storage
        del b
        assert (live.now, live.peak) == (0, 12000)


@pytest.mark.parametrize("kind", ["diffusion", "lcm"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [4, None])
def test_activations_are_those_of_the_real_step(kind, checkpointing, rank):
    """The peak of a step on fake tensors is the peak of the same step on real ones, to 1 %."""
    objective, unet = Objective(kind, rank, checkpointing=checkpointing), tiny_unet()
    nets = make_networks(objective, unet, F32)
    cond = tiny_text().encode(["cat face", "rocket", "pizza"])
    z0, null_cond = torch.randn(3, 4, 16, 16), tiny_text().null_cond(3)
    with LiveBytes() as live:
        loss_of(objective, nets, z0, cond, null_cond, torch.Generator()).backward()
    parts, trained = step_bytes(objective, CONFIG, Step(3, 64, "cpu", F32))
    gradients = size_of(x.grad for x in unet.parameters() if x.grad is not None)
    assert trained == sum(x.numel() for x in unet.parameters() if x.requires_grad)
    assert parts["gradients"] == gradients == 4 * trained
    assert parts["activations"] == pytest.approx(live.peak - gradients, rel=0.01)


def test_accumulated_gradients_count():
    """From the second batch on all gradients are there while activations peak: of all weights that
    is more, and a third batch changes nothing.
    """
    one, two, three = (
        step_bytes(Objective("diffusion", None), CONFIG, Step(4, 64, "cpu", F32, accumulate=n))[0][
            "activations"
        ]
        for n in (1, 2, 3)
    )
    assert one < two == three <= one + 4 * count(tiny_unet())


def test_norms_are_wide_on_a_card():
    """In bfloat16 a card normalises in float32 and keeps the wide input; a processor does not."""
    wide, card, processor = (
        step_bytes(Objective("diffusion", 4), CONFIG, Step(4, 64, device, half))[0]["activations"]
        for device, half in (("cuda", F32), ("cuda", torch.bfloat16), ("cpu", torch.bfloat16))
    )
    assert 0.6 * wide < card < wide
    assert processor < 0.9 * card


def test_checkpointing_and_batch_move_activations_only():
    """Twice the batch: about twice the activations, checkpointing less; nothing else changes."""
    wide, small, double = (
        step_bytes(Objective("lcm", 4, checkpointing=c), CONFIG, Step(b, 64, "cpu", F32))[0]
        for c, b in ((False, 4), (True, 4), (False, 8))
    )
    assert small["activations"] < 0.8 * wide["activations"]
    assert double["activations"] == pytest.approx(2 * wide["activations"], rel=0.1)
    for other in (small, double):
        assert {k: v for k, v in other.items() if k != "activations"} == {
            k: v for k, v in wide.items() if k != "activations"
        }


@pytest.mark.parametrize("config", [CONFIG, TWO_TOWERS])
def test_parts_in_closed_form(config, monkeypatch):
    """Parameters times bytes: a frozen base in the forward's dtype or narrow, the LoRA with
    gradient, two moments and an average in float32; a full LCM has a float32 student and target and
    a teacher in the forward's dtype. Activations aside: the loss is the sum of all weights.
    """

    def sum_of_weights(objective, nets, *batch):
        return sum(x.sum() for x in nets.net.parameters() if x.requires_grad)

    def parts_of(objective, device="cuda", dtype=torch.bfloat16, **how):
        return step_bytes(objective, config, Step(1, 64, device, dtype, **how))

    monkeypatch.setattr(plan, "loss_of", sum_of_weights)
    base = count(tiny_unet(0, config.unet))
    parts, trained = parts_of(Objective("lcm", 4), average=True)
    assert parts["UNet"] == 2 * base and parts["teacher and target"] == 0
    assert [parts[k] for k in ("LoRA", "gradients", "Adam's moments", "average")] == [
        4 * trained * n for n in (1, 1, 2, 1)
    ]
    few, fewer = parts_of(Objective("diffusion", 4, targets=ATTENTION))
    assert fewer < trained and few["LoRA"] == 4 * fewer and few["average"] == 0
    narrow, _ = parts_of(Objective("lcm", 4, narrow=True), "cpu", F32)
    # embeddings, norms and first and last layer are wide
    assert 2 * base < narrow["UNet"] < 3 * base
    int8, _ = parts_of(Objective("lcm", 4, quantized=True))
    assert base < int8["UNet"] < 1.5 * base
    full, all_of_it = parts_of(Objective("lcm", None))
    w_input = config.unet.channels[0] * 256
    assert all_of_it == base + w_input and full["UNet"] == 4 * all_of_it and full["LoRA"] == 0
    assert full["teacher and target"] == 4 * all_of_it + 2 * base
    assert parts_of(Objective("diffusion", None))[0]["teacher and target"] == 0


def test_vae_and_text():
    """Weights in float32; encoding grows with area; decoding, in tiles of 64, with pictures."""
    (vae, text, small, _), (vae2, text2, large, tile), (*_, tiles) = (
        vae_and_text_bytes(TWO_TOWERS, size) for size in (128, 256, 1024)
    )
    assert vae == vae2 == 4 * count(tiny_vae())
    assert text == text2 == 4 * count(tiny_text(0, TWO_TOWERS.text))
    assert large > 3 * small
    assert tiles < tile + 16 * 4 * 3 * 1024**2


def test_sd15_from_its_name(capsys, monkeypatch):
    """`--model sd15`: no file is read. The official count; bf16 base; the largest of three stages
    is the total, in the last line, and fits or does not.
    """
    monkeypatch.chdir(ROOT)
    flags = "--objective diffusion --rank 64 --model sd15 --batch 1 --size 128 --plan 4"
    train.main(train.parse(flags.split()))
    lines = capsys.readouterr().out.splitlines()
    assert (
        "67,252,224 parameters to train, batch 1 x 128x128, bfloat16, checkpointing on" in lines[0]
    )
    sizes = dict(
        re.fullmatch(r" *(.+?):? +(\d+\.\d\d) GB(?: more)?", line).groups() for line in lines[1:-2]
    )
    sizes = {part: float(size) for part, size in sizes.items()}
    assert sizes["UNet"] == 1.72 and sizes["LoRA"] == 0.27 and sizes["Adam's moments"] == 0.54
    step = sizes["a training step"]
    assert step == pytest.approx(
        sum(size for part, size in sizes.items() if part in PARTS), abs=0.03
    )
    total = float(re.fullmatch(r"total (\d+\.\d\d) GB", lines[-1])[1])
    assert total == max(
        size for part, size in sizes.items() if ": " in part or part == "a training step"
    )
    assert lines[-2] == f"in 4 GB, 0.5 for CUDA itself: fits, {4 - total - 0.5:.2f} GB are left"


@pytest.mark.parametrize(
    "rank, how", [(None, "--rank N in place of --full"), (4, "--quantize, a lower --rank")]
)
def test_what_to_do_if_it_does_not_fit(capsys, monkeypatch, rank, how):
    """Without a LoRA neither --quantize nor a lower --rank."""
    monkeypatch.setattr(plan, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(plan, "step_bytes", lambda *_: ({"activations": 10**9}, 1))
    monkeypatch.setattr(plan, "vae_and_text_bytes", lambda *_: (0, 0, 0, 0))
    plan.plan(Objective("diffusion", rank), CONFIG, Step(1, 32, "cuda", torch.bfloat16), 1.0)
    line = capsys.readouterr().out.splitlines()[-2]
    assert line.endswith(f"0.50 GB are missing; try --batch 1 with --accumulate, {how}")


def test_official_counts():
    """Trained parameters at rank 64 of the three official LCM-LoRAs; on shapes alone."""
    expected = {"sd15": 67_252_224, "ssd1b": 104_902_656, "sdxl": 196_751_360}
    for name, number in expected.items():
        with torch.device("meta"):
            unet = UNet(train.FAMILIES[name].unet())
        make_networks(Objective("lcm", 64), unet, torch.bfloat16)
        assert sum(x.numel() for x in unet.parameters() if x.requires_grad) == number


def test_memory_where_it_cannot_be_measured(monkeypatch):
    """Windows has no module `resource`: train.py starts there all the same."""
    assert plan.peak_bytes("cpu") > 1e8
    monkeypatch.setitem(sys.modules, "resource", None)
    assert plan.peak_bytes("cpu") == 0
