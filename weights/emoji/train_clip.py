"""Train the small CLIP: its text tower conditions the UNet, its image tower judges pictures.

    python weights/emoji/train_clip.py --out runs/clip --names 64 --steps 2500
    python weights/emoji/train_clip.py --out runs/judge --names 64 --steps 1000 --init runs/clip --vae
    runs/vae/vae.safetensors

The second line trains the image tower on, with the text tower frozen, on pictures the autoencoder has decoded: a judge
must know what blur and decoding do to a drawing, or it marks the blur. It also sees the held-out pairs, which it has
to mark; the text tower and the UNet never do. Class: open_clip's CLIP. Loss: InfoNCE in both directions,
where *every* caption of the batch that fits a picture counts as right ("a cat" fits all cats); the judge also learns
to pick the name out of all names.
"""

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from minilcm.data.emoji import Art, caption, compose, read_art, split_art  # noqa: E402
from minilcm.files.safetensors_file import read_tensors, write_tensors  # noqa: E402
from minilcm.model.precision import default_dtype  # noqa: E402
from minilcm.model.text import TextConfig, TextEncoder, open_clip_to_clip_l  # noqa: E402
from minilcm.model.vae import VAE, VAEConfig  # noqa: E402

TEXT = TextConfig(width=128, layers=4, heads=4)
IMAGE = dict(image_size=64, patch_size=8, width=192, layers=6, heads=6, embed_dim=128, text_width=TEXT.width)


def make_clip() -> open_clip.CLIP:
    vision = dict(image_size=64, patch_size=8, width=IMAGE["width"], layers=IMAGE["layers"], head_width=32)
    text = dict(width=TEXT.width, layers=TEXT.layers, heads=TEXT.heads)
    return open_clip.CLIP(IMAGE["embed_dim"], vision, text, quick_gelu=False)


def encode_text(clip: open_clip.CLIP, text: TextEncoder, ids: Tensor) -> Tensor:
    """Unit text vectors (b, e): the tower's output at the first EOS, projected."""
    n = int((ids == 49407).int().argmax(dim=1).max()) + 1  # no padding needed behind the last EOS: attention is causal
    tokens = text(ids[:, :n])
    return F.normalize(
        tokens[torch.arange(len(ids)), (ids == 49407).int().argmax(dim=1)] @ clip.text_projection, dim=-1
    )


def fits(said: tuple, art: Art, color: str) -> bool:
    """Is a caption that said (name, style, color), None for what it left out, right about this picture?"""
    return all(word is None or word == true for word, true in zip(said, (art.name, art.style, color)))


def degrade(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, blur and noise each picture a little, as an autoencoder and few sampling steps do: (b, 3, 64, 64)."""
    b = len(x)
    u = torch.rand(b, 4, generator=generator)
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 0.9 + 0.25 * u[:, 0]
    theta[:, :, 2] = (u[:, 1:3] - 0.5) * 0.2
    x = F.grid_sample(
        x, F.affine_grid(theta, list(x.shape), align_corners=False), "bilinear", "border", align_corners=False
    )
    small = F.interpolate(x, scale_factor=0.4, mode="bilinear", antialias=True)
    blurred = F.interpolate(small, x.shape[-2:], mode="bicubic")
    mix = u[:, 3, None, None, None]
    noise = torch.randn(x.shape, generator=generator) * 0.15 * torch.rand(b, 1, 1, 1, generator=generator)
    return x * (1 - mix) + blurred * mix + noise


@torch.no_grad()
def accuracy(clip, text, pixels: Tensor, names: list[str], choices: list[str]) -> float:
    images = torch.cat([F.normalize(clip.visual(p), dim=-1) for p in pixels.split(64)])
    picked = (images @ encode_text(clip, text, text.tokenize(choices)).T).argmax(dim=1)
    return (picked == torch.tensor([choices.index(n) for n in names])).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for text.safetensors, judge.safetensors")
    parser.add_argument("--names", type=int, default=64, help="how many names of names.txt (default 64)")
    parser.add_argument("--init", type=Path, help="start from the files in this folder and train the image tower only")
    parser.add_argument("--vae", type=Path, help="also show pictures decoded by this vae.safetensors")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--looks", type=int, default=16, help="compositions made of each drawing (default 16)")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    choices = (HERE / "names.txt").read_text().splitlines()[: args.names]
    seen, held_out = split_art(read_art(HERE / "art"), HERE / "art/held_out.txt", choices)
    seen = seen + held_out if args.init else seen
    rng = random.Random(args.seed)
    pool = [(a, *compose(a, 64, rng)) for a in seen for _ in range(args.looks)]
    test = [(a, *compose(a, 64, rng)) for a in held_out for _ in range(4)]
    pixels, test_pixels = torch.stack([x for _, x, _ in pool]), torch.stack([x for _, x, _ in test])
    if args.vae:
        tensors, metadata = read_tensors(args.vae)
        vae = VAE(VAEConfig(**json.loads(metadata["config"])))
        vae.load_state_dict(tensors)
        noise = torch.Generator().manual_seed(args.seed)

        @torch.no_grad()
        def decoded(x: Tensor, strength: float) -> Tensor:
            z = vae.encode_mean(x)
            z = z + strength * torch.rand(len(z), 1, 1, 1, generator=noise) * torch.randn(z.shape, generator=noise)
            return vae.decode(z).clamp(-1, 1)

        # half of the pool as it comes out of the autoencoder, with latents as inexact as few steps leave them
        pixels = torch.cat([decoded(x, 0.5) if i % 2 else x for i, x in enumerate(pixels.split(32))])
        test_pixels = torch.cat([decoded(x, 0.0) for x in test_pixels.split(32)])

    torch.manual_seed(args.seed)
    clip, text = make_clip(), TextEncoder(TEXT)
    if args.init:
        clip.load_state_dict(load_file(args.init / "clip.safetensors"), strict=False)
    # one set of text weights, seen through our encoder: the tower that will condition the UNet is the one trained
    for name, parameter in text.tower.named_parameters():
        module, _, leaf = name.rpartition(".")
        setattr(text.tower.get_submodule(module), leaf, clip.get_parameter(name))
    frozen = [p for n, p in clip.named_parameters() if not n.startswith("visual.")] if args.init else []
    [p.requires_grad_(False) for p in frozen]
    with torch.no_grad():
        names = encode_text(clip, text, text.tokenize(choices)) if args.init else None  # (n, e)

    parameters = [p for p in clip.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0, betas=(0.9, 0.98), fused=True)
    used = torch.zeros(49408, dtype=torch.bool)
    bf16 = default_dtype("cpu") == torch.bfloat16
    start = time.time()
    for step in tqdm(range(args.steps), disable=None):
        lr = args.lr * min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        rng = random.Random(f"{args.seed} {step}")
        index = [rng.randrange(len(pool)) for _ in range(args.batch)]
        captions, said = zip(*(caption(pool[i][0], pool[i][2], rng) for i in index))
        x = degrade(pixels[index], torch.Generator().manual_seed(rng.getrandbits(62)))
        ids = text.tokenize(list(captions))
        used[ids.unique()] = True
        right = torch.tensor(
            [[fits(s, pool[i][0], pool[i][2]) for s in said] for i in index]
        ).float()  # (images, captions)

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            images = F.normalize(clip.visual(x), dim=-1)  # (b, e)
            texts = encode_text(clip, text, ids)  # (b, e)
        logits = clip.logit_scale.exp().clamp(max=100) * images.float() @ texts.float().T  # (b, b)
        # InfoNCE towards the uniform distribution over all that fit
        loss = (
            F.cross_entropy(logits, right / right.sum(1, keepdim=True))
            + F.cross_entropy(logits.T, right.T / right.T.sum(1, keepdim=True))
        ) / 2
        if args.init:  # and the question the judge will be asked: which of all names?
            logits = clip.logit_scale.exp().clamp(max=100) * images.float() @ names.T  # (b, n)
            loss = loss + F.cross_entropy(logits, torch.tensor([choices.index(pool[i][0].name) for i in index]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            clip.eval()
            some = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))[:512].tolist()
            on_seen = accuracy(clip, text, pixels[some], [pool[i][0].name for i in some], choices)
            on_held_out = accuracy(clip, text, test_pixels, [a.name for a, _, _ in test], choices)
            clip.train()
            seconds = time.time() - start
            right = f"pool {on_seen:.3f} held-out {on_held_out:.3f}"
            print(f"step {step + 1} loss {loss.item():.3f} right: {right} {seconds:.0f} s", flush=True)

            state = {k: v.clone() for k, v in clip.state_dict().items() if k != "attn_mask"}
            if not args.init:
                # rows of tokens never trained are zero, which git packs to nothing
                state["token_embedding.weight"][~used] = 0
            write_tensors(args.out / "clip.safetensors", state, {})
            tower = {k: state[k] for k in text.tower.state_dict() if k in state}
            text_config = json.dumps(dict(width=TEXT.width, layers=TEXT.layers, heads=TEXT.heads))
            write_tensors(args.out / "text.safetensors", open_clip_to_clip_l(tower), {"config": text_config})
            judge = {k: v.half() for k, v in state.items() if k.startswith("visual.") or k == "text_projection"}
            write_tensors(args.out / "judge.safetensors", judge, {"config": json.dumps(IMAGE)})


if __name__ == "__main__":
    main()
