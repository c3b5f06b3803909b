"""CUDA against the processor: networks, samplers, training steps, both scripts, on small models.

    pytest tests/test_cuda.py -n 0

Skipped without a CUDA device. float32 is compared with TF32 off; what is random is drawn on the CPU
for both.
"""

import copy
import itertools
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import contents, flags, interrupt_at
from tiny import (
    CONFIG,
    TWO_TOWERS,
    load_tau,
    noise,
    random_tau,
    tiny_text,
    tiny_unet,
    write_art,
    write_model,
)

import sample
import train
from minilcm.files.lora_file import write_tau
from minilcm.lcm import lcm_grid, sample_lcm, update_ema
from minilcm.model.unet import Cond, emoji
from minilcm.model.vae import VAE, VAEConfig
from minilcm.objective import Objective, loss_of, make_networks
from minilcm.schedule import make_schedule
from minilcm.solver import guided_eps, sample_ddim, sample_dpmpp_2m, trailing_grid

DEVICE, HERE = "cuda", "cpu"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module", autouse=True)
def exact_float32():
    """TF32 keeps 10 of float32's 23 bits, cuDNN's default; and the processor may use its cores."""
    before = (
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        torch.get_num_threads(),
    )
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before[:2]
    torch.set_num_threads(before[2])


@pytest.fixture(scope="module")
def nets():
    """{device: (UNet of the emoji model's size, VAE of factor 8)}, the same random weights."""
    unet = tiny_unet(0, emoji())
    torch.manual_seed(0)
    vae = VAE(VAEConfig((32, 32, 64, 128), res_blocks=1, groups=8)).requires_grad_(False)
    return {
        HERE: (unet, vae),
        DEVICE: (copy.deepcopy(unet).to(DEVICE), copy.deepcopy(vae).to(DEVICE)),
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with model.safetensors, lora.safetensors for all its targets, and art/."""
    folder = tmp_path_factory.mktemp("files")
    write_model(folder / "model.safetensors")
    write_tau(folder / "lora.safetensors", random_tau(tiny_unet(), 1, 2, 3.0, size=0.1), {})
    (folder / "art").mkdir()
    write_art(folder / "art/noto.tar")
    return folder


def conds(b: int) -> tuple[Cond, Cond]:
    return Cond(noise(10, (b, 77, 128))), Cond(noise(11, (1, 77, 128)).expand(b, -1, -1))


def far(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a part of the largest value; NaN is never near."""
    return ((got.cpu().float() - expected.cpu().float()).abs().max() / expected.abs().max()).item()


def far_apart(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Euclidean distance of all tensors together, as a part of their length."""
    assert got.keys() == expected.keys()
    difference = sum(
        (got[key].cpu() - x.cpu()).double().square().sum() for key, x in expected.items()
    )
    return (
        (difference / sum(x.double().square().sum().cpu() for x in expected.values())).sqrt().item()
    )


# ---- networks


@pytest.mark.parametrize(
    "dtype, most", [(torch.float32, 1e-4), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)]
)
def test_unet(nets, dtype, most):
    """eps_hat of the emoji UNet at three timesteps, in each format, is the CPU's in float32."""
    z_t, t, (cond, _) = noise(0, (3, 4, 16, 16)), torch.tensor([999, 500, 0]), conds(3)
    unet = copy.deepcopy(nets[DEVICE][0]).to(dtype)
    got = unet(z_t.to(DEVICE), t.to(DEVICE), cond.to(DEVICE))
    assert (got.device.type, got.dtype) == (DEVICE, dtype)
    assert far(got, nets[HERE][0](z_t, t, cond)) < most


def test_unet_with_two_towers():
    """SDXL in small: the second tower's vector goes in, and heads have one width."""
    unet = tiny_unet(0, TWO_TOWERS.unet)
    z_t = noise(0, (2, 4, 16, 16))
    cond = Cond(noise(1, (2, 77, 80)), noise(2, (2, TWO_TOWERS.unet.adm)))
    expected = unet(z_t, 500, cond)
    assert far(unet.to(DEVICE)(z_t.to(DEVICE), 500, cond.to(DEVICE)), expected) < 1e-4


def test_vae(nets):
    """A drawn latent, its pixels, and pixels by tiles."""
    here, there = (nets[device][1] for device in (HERE, DEVICE))
    pixels = noise(3, (2, 3, 128, 128)).clamp(-1, 1)
    z0, got = (
        vae.encode(pixels.to(device), torch.Generator().manual_seed(0))
        for vae, device in ((here, HERE), (there, DEVICE))
    )
    assert got.device.type == DEVICE and far(got, z0) < 1e-4
    assert far(there.decode(z0.to(DEVICE)), here.decode(z0)) < 1e-4
    assert far(there.decode_tiled(z0.to(DEVICE), 12, 4), here.decode_tiled(z0, 12, 4)) < 1e-4


@pytest.mark.parametrize("config", [CONFIG.text, TWO_TOWERS.text], ids=["one tower", "two towers"])
def test_text(config):
    """Prompts and the null condition, one tower and two; dropped captions are null anywhere."""
    text, captions = tiny_text(0, config), ["a cat face", "", "rocket, noto style"]
    expected = text.encode(captions), text.null_cond(2), text.encode_captions(captions)
    text.to(DEVICE)
    for a, b in zip(
        (text.encode(captions), text.null_cond(2), text.encode_captions(captions)), expected
    ):
        assert a.context.device.type == DEVICE
        assert torch.allclose(a.context.cpu(), b.context, atol=1e-4)
        assert (a.vector is None) == (b.vector is None)
        assert b.vector is None or far(a.vector, b.vector) < 1e-4


# ---- samplers

SAMPLERS = {
    "lcm": lambda eps_fn, z_T, generators: sample_lcm(
        eps_fn, z_T, make_schedule(), lcm_grid(4), generators
    ),
    "ddim": lambda eps_fn, z_T, generators: sample_ddim(
        eps_fn, z_T, make_schedule(), trailing_grid(8)
    ),
    "dpmpp": lambda eps_fn, z_T, generators: sample_dpmpp_2m(
        eps_fn, z_T, make_schedule(), trailing_grid(8)
    ),
}


def pixels_of(nets, device: str, sampler: str, seeds: list[int], w: float) -> torch.Tensor:
    """Pictures (b, 3, 128, 128), each of its own seed and condition."""
    unet, vae = nets[device]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    z_T = torch.stack([torch.randn(4, 16, 16, generator=g) for g in generators]).to(device)
    cond, null_cond = (Cond(x.context[seeds]).to(device) for x in conds(4))
    return vae.decode(SAMPLERS[sampler](guided_eps(unet, cond, null_cond, w), z_T, generators))


@pytest.mark.parametrize("sampler, w", [("lcm", 0.0), ("lcm", 1.5), ("ddim", 1.5), ("dpmpp", 1.5)])
def test_same_seeds_same_pictures(nets, sampler, w):
    """Four pictures of one batch are the CPU's, and each is the one that is drawn alone."""
    batch = pixels_of(nets, DEVICE, sampler, [0, 1, 2, 3], w)
    assert batch.device.type == DEVICE
    assert far(batch, pixels_of(nets, HERE, sampler, [0, 1, 2, 3], w)) < 1e-3
    for seed in (0, 3):
        assert far(pixels_of(nets, DEVICE, sampler, [seed], w), batch[seed : seed + 1]) < 1e-3
    assert far(batch[:1], batch[1:2]) > 0.1


# ---- a step of training


def one_step(device: str, objective: Objective, half: torch.dtype = torch.float32):
    """(loss, {name: gradient}, {name: change by AdamW}, target) of a step on three latents."""
    unet = tiny_unet(0, emoji()).to(device)
    nets = make_networks(objective, unet, half)
    if objective.rank:  # with B = 0 student and teacher are one, and A has no gradient
        load_tau(
            unet,
            random_tau(tiny_unet(0, emoji()), 1, objective.rank, float(objective.rank), size=0.05),
        )
    named = {name: x for name, x in unet.named_parameters() if x.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=1e-3, weight_decay=0.0, fused=True)
    cond, null_cond = (x.to(device) for x in conds(3))
    generator = torch.Generator().manual_seed(5)
    loss = loss_of(objective, nets, noise(4, (3, 4, 16, 16)).to(device), cond, null_cond, generator)
    loss.backward()
    gradients = {name: x.grad.clone() for name, x in named.items()}
    before = {name: x.detach().clone() for name, x in named.items()}
    optimizer.step()
    change = {name: x.detach() - before[name] for name, x in named.items()}
    if nets.target_unet is not None:
        update_ema(nets.target_unet, unet)
    return (
        loss.item(),
        gradients,
        change,
        dict(nets.target_unet.named_parameters()) if nets.target_unet else {},
    )


OBJECTIVES = {
    "LCM-LoRA": Objective("lcm", 4),
    "LCM-LoRA, checkpointing": Objective("lcm", 4, checkpointing=True),
    "LCM-LoRA, narrow": Objective("lcm", 4, narrow=True),
    "LCM-LoRA, int8": Objective("lcm", 4, quantized=True),
    "diffusion": Objective("diffusion", None),
    "full LCM": Objective("lcm", None, w_range=(2.0, 14.0)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_step(name):
    """Loss, gradients and AdamW's step in float32 are the CPU's; its first step is lr times a sign,
    which may turn where a gradient is nearly zero.
    """
    loss, gradients, change, target = one_step(DEVICE, OBJECTIVES[name])
    expected = one_step(HERE, OBJECTIVES[name])
    assert loss == pytest.approx(expected[0], rel=1e-3)
    assert far_apart(gradients, expected[1]) < 2e-3
    assert far_apart(change, expected[2]) < 0.1
    assert not target and not expected[3] or far_apart(target, expected[3]) < 1e-4


def test_step_in_bfloat16():
    """As on a card: the frozen base in bfloat16, autocast; loss, gradients about the CPU's."""
    loss, gradients, *_ = one_step(DEVICE, OBJECTIVES["LCM-LoRA"], torch.bfloat16)
    expected = one_step(HERE, OBJECTIVES["LCM-LoRA"])
    assert all(x.dtype == torch.float32 and x.device.type == DEVICE for x in gradients.values())
    assert loss == pytest.approx(expected[0], rel=0.2)
    assert far_apart(gradients, expected[1]) < 0.5


# ---- the scripts


@pytest.fixture
def no_chance(monkeypatch):
    """cuDNN and attention add up in varying order; AdamW's first steps make much of that."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    handler = signal.getsignal(signal.SIGINT)  # train.main takes over Ctrl-C
    yield
    signal.signal(signal.SIGINT, handler)
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore")  # of cuBLAS, which would need an environment variable
@pytest.mark.parametrize("objective", ["lcm", "full lcm"])
def test_resume(files, tmp_path, monkeypatch, no_chance, objective):
    """Four steps of train.py are Ctrl-C in one of the first two, then --resume: weights, averages
    and both moments end within 5 % of what the other steps changed.
    """

    def run(folder: str, *more: str) -> None:
        argv = flags(files, tmp_path / folder, objective, 4, "--lr", "1", "--device", DEVICE, *more)
        train.main(train.parse(argv))

    run("whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(SystemExit, match="stopped after step [12]; continue with --resume"):
            run("parts")
    half_way = contents(tmp_path / "parts")["state"][0]
    run("parts", "--resume")
    whole, parts = (contents(tmp_path / folder)["state"][0] for folder in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        keys = [
            k
            for k in whole
            if (k.split(".")[-1] if k.startswith("optimizer.") else "weights") == kind
        ]
        then, last, resumed = ({k: state[k] for k in keys} for state in (half_way, whole, parts))
        moved = far_apart(then, last)
        assert moved > 1e-3 and far_apart(resumed, last) < 0.05 * moved, kind


@pytest.mark.parametrize("sampler", ["lcm", "ddim"])
def test_sample(files, tmp_path, sampler):
    """sample.py's picture is the CPU's to two levels in float32, to four on average in float16."""

    def picture(device: str, dtype: str, number=itertools.count()) -> np.ndarray:
        out = tmp_path / f"{next(number)}.png"
        argv = ["cat face", *f"--steps 4 --sampler {sampler}".split()]
        argv += ["--device", device, "--dtype", dtype, "--out", str(out)]
        argv += ["--model", str(files / "model.safetensors")]
        argv += ["--lora", str(files / "lora.safetensors")]
        sample.main(sample.parse(argv))
        return np.array(Image.open(out)).astype(int)

    expected = picture(HERE, "float32")
    assert np.ptp(expected) > 20
    assert abs(picture(DEVICE, "float32") - expected).max() <= 2
    assert abs(picture(DEVICE, "float16") - expected).mean() <= 4
