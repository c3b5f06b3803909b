"""Two styles the base has never seen, made from the art by image processing, for two style LoRAs.

    python -m weights.emoji.make_styles runs/styles --names 300
    python -m weights.emoji.make_styles my_pictures --pictures 20    pictures with captions

blueprint: the drawing as white lines on its own blue silhouette. papercut: few flat colours, a
white paper rim and a shadow. Both keep the drawing's transparency, so they stand on any background.
"""

import argparse
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from minilcm.data.emoji import COLORS, article, read_art, split_art

from .make_data import add

HERE = Path(__file__).parent


def blueprint(image: Image.Image) -> Image.Image:
    """White where colour or outline changes, deep blue inside."""
    rgb = np.asarray(image.convert("RGB"), np.float32)
    alpha = np.asarray(image.getchannel("A"), np.float32)
    planes = np.dstack([rgb * (alpha[..., None] / 255), alpha])  # (H, W, 4)
    dy, dx = np.gradient(planes, axis=(0, 1))
    line = np.clip(np.sqrt(dx**2 + dy**2).max(axis=2) / 24, 0, 1)  # (H, W)
    thick = Image.fromarray((line * 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(3))
    ink = Image.composite(
        Image.new("RGB", image.size, "white"), Image.new("RGB", image.size, (23, 74, 160)), thick
    )
    ink.putalpha(image.getchannel("A").filter(ImageFilter.MaxFilter(3)))
    return ink


def papercut(image: Image.Image) -> Image.Image:
    """Six flat colours after smoothing, on a white rim, over a soft grey shadow."""
    alpha = image.getchannel("A").point(lambda a: 255 if a > 127 else 0)
    flat = (
        image.convert("RGB")
        .filter(ImageFilter.ModeFilter(7))
        .quantize(6, method=Image.Quantize.MEDIANCUT)
        .convert("RGB")
    )
    rim = alpha.filter(ImageFilter.MaxFilter(9)).filter(ImageFilter.GaussianBlur(0.7))
    out = Image.new("RGBA", image.size, (60, 60, 60, 0))
    shadow = Image.new("L", image.size)
    shadow.paste(rim, (4, 5))  # down and to the right
    out.putalpha(shadow.filter(ImageFilter.GaussianBlur(2)).point(lambda a: a * 6 // 10))
    white = Image.new("RGBA", image.size, (255, 255, 255, 0))
    white.putalpha(rim)
    out = Image.alpha_composite(out, white)
    flat.putalpha(alpha.filter(ImageFilter.GaussianBlur(0.7)))
    return Image.alpha_composite(out, flat)


MADE = {"blueprint": blueprint, "papercut": papercut}  # style: drawing -> drawing


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder that gets blueprint/ and papercut/")
    parser.add_argument(
        "--names", type=int, default=300, help="how many names of names.txt (default 300)"
    )
    parser.add_argument(
        "--pictures",
        type=int,
        metavar="N",
        help="at most N .png with .txt captions, instead of a .tar of all",
    )
    args = parser.parse_args()
    if args.names < 1 or (args.pictures is not None and args.pictures < 1):
        sys.exit("make_styles.py: --names and --pictures are 1 or more")
    names = (HERE / "names.txt").read_text().splitlines()[: args.names]
    seen, _ = split_art(read_art(HERE / "art"), HERE / "art/held_out.txt", names)
    for style, draw in MADE.items():
        (args.out / style).mkdir(parents=True, exist_ok=True)
        if args.pictures:
            of_one_style = [a for a in seen if a.style == "noto"]
            chosen = of_one_style[:: max(1, len(of_one_style) // args.pictures)][: args.pictures]
            # white lines and rims are nothing on white
            colors = [c for c in COLORS if c != "white"]
            for i, a in enumerate(chosen):
                image, color = draw(a.image), colors[i % len(colors)]
                on_ground = Image.alpha_composite(
                    Image.new("RGBA", image.size, COLORS[color]), image
                )
                on_ground.convert("RGB").save(args.out / style / f"{a.name}.png")
                caption = f"{a.name}, {style} style, on {article(color)} background"
                (args.out / style / f"{a.name}.txt").write_text(caption)
            print(f"{args.out / style}: {len(chosen)} pictures")
            continue
        with tarfile.open(
            args.out / style / f"{style}.tar", "w", format=tarfile.USTAR_FORMAT
        ) as tar:
            for a in seen:
                stem = f"{a.name} {a.style}".replace(" ", "-")
                png = io.BytesIO()
                draw(a.image).save(png, "PNG")
                meta = {
                    "name": a.name,
                    "label": a.words[0],
                    "keywords": a.words[1:],
                    "style": style,
                }
                add(tar, f"{stem}.png", png.getvalue())
                add(tar, f"{stem}.json", json.dumps(meta).encode())
        print(f"{args.out / style}: {len(seen)} pictures")


if __name__ == "__main__":
    main()
