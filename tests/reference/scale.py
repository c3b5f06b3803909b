"""The arithmetic of many GPUs: time of a step, bytes over the wire, reading rate of shards, where it stops scaling.

    python tests/reference/scale.py    (no GPU, no weights; some minutes, since SDXL's step is counted twice)

Operations are counted in the real step on fake tensors; what a GPU and its links do is assumed, and said. Ring
all-reduce of S bytes over N ranks: each sends and receives 2 (N - 1) / N S. FSDP2 over N ranks: each gathers
(N - 1) / N of the weights for every pass through a network, and scatters (N - 1) / N of the gradients once.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minilcm.family import sd15_config, sdxl_config, ssd1b_config
from minilcm.memory import size_of
from minilcm.objective import Objective, loss_of, make_networks
from minilcm.text import TextEncoder
from minilcm.unet import UNet

# an H100 in a node of eight, and its links, per GPU and direction; pictures as they lie in shards
FLOPS, SHARE = 989e12, 0.4  # dense bfloat16; what training reaches of it
NVLINK, NETWORK = 450e9, 50e9  # bytes a second within a node of 8; between nodes, 400 Gb/s a GPU
PICTURE, DECODED = 0.4e6, 80  # bytes; pictures a second that one core decodes and cuts
GPUS, BATCH = (8, 64, 1024), 8  # pictures on each
USEFUL = 512  # pictures in a step, beyond which more of them shorten a distillation little: an assumption


def operations(objective: Objective, config, size: int) -> tuple[float, int, int]:
    """(floating-point operations of a step on one picture, bytes of the trained weights, of a teacher's weights)."""
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):
        unet = UNet(config.unet)
        nets = make_networks(objective, unet, torch.bfloat16)
        z0 = torch.randn(1, 4, size // 8, size // 8)
        cond = TextEncoder(config.text).null_cond(1, (size, size))
        with FlopCounterMode(display=False) as counter:
            loss_of(objective, nets, z0, cond, cond, torch.Generator()).backward()
    trained = size_of(x for x in unet.parameters() if x.requires_grad)
    return counter.get_total_flops(), trained, 2 * sum(x.numel() for x in unet.parameters())


def wire(full: bool, trained: int, teacher: int, n: int) -> float:
    """Bytes that each GPU receives in a step."""
    share = (n - 1) / n
    if not full:
        return 2 * share * trained  # gradients of the LoRA, all-reduced
    # weights of the student, there and back, of the target, of the teacher for cond and null; the student's gradients
    return share * (2 * trained + trained + 2 * teacher + trained)


def main() -> None:
    print(
        f"H100: {SHARE:.0%} of {FLOPS / 1e12:.0f} TFLOP/s in bfloat16; links of {NVLINK / 1e9:.0f} GB/s in a node of "
        f"eight, {NETWORK / 1e9:.0f} GB/s beyond; {BATCH} pictures a GPU, {PICTURE / 1e6} MB each; checkpointing on\n"
    )
    columns = (
        "model",
        "trained",
        "TFLOP a picture",
        "GPUs",
        "compute",
        "wire",
        "pictures a second",
        "shards",
        "cores a GPU",
    )
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name, config in (("SD1.5", sd15_config()), ("SSD-1B", ssd1b_config()), ("SDXL", sdxl_config())):
        for rank in (64, None):
            objective = Objective("lcm", rank, checkpointing=True)
            flops, trained, teacher = operations(objective, config, config.size)
            for n in GPUS:
                compute, moved = flops * BATCH / (FLOPS * SHARE), wire(rank is None, trained, teacher, n)
                passed = moved / (NVLINK if n <= 8 else NETWORK)
                slow, fast = (n * BATCH / x for x in (compute + passed, max(compute, passed)))  # in turn, or hidden
                row = (
                    f"{name}, {config.size}",
                    f"{'all' if rank is None else 'LoRA'}, {trained / 4e6:,.0f} M",
                    f"{flops / 1e12:.1f}",
                    f"{n:,}",
                    f"{compute:.2f} s",
                    f"{moved / 1e9:.2f} GB, {passed:.3f} s",
                    f"{slow:,.0f} to {fast:,.0f}",
                    f"{fast * PICTURE / 1e6:,.0f} MB/s",
                    f"{fast / n / DECODED:.1f}",
                )
                print("| " + " | ".join(row) + " |", flush=True)
    print(
        f"\nWhere it stops: beyond {USEFUL} pictures a step (assumed) more of them make it little more useful: that is "
        f"{USEFUL // BATCH} GPUs of {BATCH} pictures, {USEFUL} of one."
    )


if __name__ == "__main__":
    main()
