"""The arithmetic of many GPUs: time of a step, bytes over the wire, reading rate, limits.

    python -m benchmarks.scale > benchmarks/scale.md    (no GPU, no weights; two minutes)

Operations are counted in the real step on fake tensors; what a GPU and its links do is assumed, and
said. Ring all-reduce of S bytes over N ranks: each sends and receives 2 (N - 1) / N S.
FSDP2 over N ranks: each gathers (N - 1) / N of the weights for every pass through a network, and
scatters (N - 1) / N of the gradients once.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minilcm.files.identify import sd15_config, sdxl_config, ssd1b_config
from minilcm.model.text import TextEncoder
from minilcm.model.unet import UNet
from minilcm.model.vae import VAE
from minilcm.objective import Objective, loss_of, make_networks
from minilcm.run.plan import size_of

# an H100 in a node of eight, and its links, per GPU and direction; pictures as they lie in shards
FLOPS, SHARE = 989e12, 0.4  # dense bfloat16; what training reaches of it
NVLINK, NETWORK = 450e9, 50e9  # bytes a second within a node of 8; between nodes, 400 Gb/s a GPU
PICTURE, DECODED = 0.4e6, 80  # bytes; pictures a second that one core decodes and cuts
GPUS, BATCH = (8, 64, 1024), 8  # pictures on each
USEFUL = 512  # pictures in a step: more of them shorten a distillation little, as we assume


def operations(objective: Objective, config, size: int) -> tuple[float, int, int]:
    """Operations of a step on one picture, bytes of the trained and of the teacher's weights."""
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):
        unet = UNet(config.unet)
        nets = make_networks(objective, unet, torch.bfloat16)
        z0 = torch.randn(1, 4, size // 8, size // 8)
        cond = TextEncoder(config.text).null_cond(1, (size, size))
        vae = VAE(config.vae).requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            vae.moments(torch.randn(1, 3, size, size))  # shards are encoded as they are read
            loss_of(objective, nets, z0, cond, cond, torch.Generator()).backward()
    trained = size_of(x for x in unet.parameters() if x.requires_grad)
    return counter.get_total_flops(), trained, 2 * sum(x.numel() for x in unet.parameters())


def wire(full: bool, trained: int, teacher: int, n: int) -> float:
    """Bytes that each GPU receives in a step."""
    share = (n - 1) / n
    if not full:
        return 2 * share * trained  # gradients of the LoRA, all-reduced
    # the student's weights, there and back; the target's; the teacher's, twice; the gradients
    return share * (2 * trained + trained + 2 * teacher + trained)


PAGE = f"""# Many GPUs, by arithmetic

Written by `python -m benchmarks.scale`. Nothing here was timed: no such machine was at hand.
Floating-point operations are counted in the real step on tensors without memory, VAE encoding
included, checkpointing on; all else is assumed.

- A GPU is an H100, {SHARE:.0%} of {FLOPS / 1e12:.0f} TFLOP/s in bfloat16, with {BATCH} pictures
  of {PICTURE / 1e6} MB.
- A link carries {NVLINK / 1e9:.0f} GB/s per GPU and direction in a node of eight,
  {NETWORK / 1e9:.0f} between nodes.
- A LoRA's gradients, S bytes in float32, are all-reduced by DDP: each of N ranks receives
  2 (N - 1) / N S, once a step.
- All weights, by FSDP2: each rank gathers (N - 1) / N of the student's float32 weights on the way
  there and back, of the target's once, of the teacher's bfloat16 ones for cond and null, and of the
  gradients once: 20 bytes a parameter.
- Pictures a second: as many as fit into compute + wire if nothing overlaps, into the longer of the
  two if all does.
- Shards must be read at that rate; a core decodes and cuts {DECODED} pictures a second.
"""

READING = f"""
What it says:

- **LoRA**: the wire takes less than a tenth of a step, on 1,024 GPUs as on 64, since what a ring
  moves does not grow with N. It is the size of the LoRA, not of the model, that crosses it.
- **All weights**: within a node the wire hides behind the compute. Between nodes it is as long as
  the step, for SD1.5 more than twice as long. Then gather within a node only (a whole model in
  each, gradients between them), or raise the batch.
- **Reading**: 1,024 GPUs on SD1.5 read tens of GB/s: many disks, and shards for N times `--workers`
  readers.
- **Where it stops**: not at the wire but at the batch. Beyond some {USEFUL} pictures a step
  (assumed) more of them make a step little more useful: {USEFUL // BATCH} GPUs of {BATCH} pictures,
  or {USEFUL} of one. With 1,024, train several LoRAs at a time.
"""


def main() -> None:
    print(PAGE)
    columns = "model | trained | TFLOP a picture | GPUs | compute | wire | pictures a second"
    columns += " | shards | cores a GPU"
    print(f"| {columns} |\n" + "|---" * (columns.count("|") + 1) + "|")
    models = {"SD1.5": sd15_config(), "SSD-1B": ssd1b_config(), "SDXL": sdxl_config()}
    for name, config in models.items():
        for rank in (64, None):
            objective = Objective("lcm", rank, checkpointing=True)
            flops, trained, teacher = operations(objective, config, config.size)
            for n in GPUS:
                compute = flops * BATCH / (FLOPS * SHARE)
                moved = wire(rank is None, trained, teacher, n)
                passed = moved / (NVLINK if n <= 8 else NETWORK)
                slow, fast = (n * BATCH / x for x in (compute + passed, max(compute, passed)))
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
    print(READING, end="")


if __name__ == "__main__":
    main()
