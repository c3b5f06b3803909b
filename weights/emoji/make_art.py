"""Make paper/art/: four more emoji sets, openly licensed, as styles that the base has never seen.

    npm install @iconify-json/noto-v1 @iconify-json/fluent-emoji \\
        @iconify-json/fluent-emoji-high-contrast @iconify-json/emojione-monotone
    pip install resvg-py
    python -m weights.emoji.make_art node_modules

Only the first 64 of the shipped model's names, 96x96. The result is committed, so nobody needs npm
to run the paper.
"""

import json
import sys
import tarfile
from pathlib import Path

from .make_data import add, svg

HERE = Path(__file__).parent
ART = HERE.parents[1] / "paper/art"
SETS = {  # style: package
    "blob": "noto-v1",
    "gradient": "fluent-emoji",
    "glyph": "fluent-emoji-high-contrast",
    "monotone": "emojione-monotone",
}
SIZE = 96


def main(node_modules: Path) -> None:
    import resvg_py

    names = (HERE / "names.txt").read_text().splitlines()[:64]
    ART.mkdir(exist_ok=True)
    for style, package in SETS.items():
        icons = json.loads((node_modules / "@iconify-json" / package / "icons.json").read_text())
        found = [
            n for n in names if n.replace(" ", "-") in icons["icons"] | icons.get("aliases", {})
        ]
        with tarfile.open(ART / f"{style}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for name in found:
                stem = name.replace(" ", "-")
                png = resvg_py.svg_to_bytes(svg_string=svg(icons, stem), width=SIZE, height=SIZE)
                meta = {"name": name, "label": "", "keywords": [], "style": style}
                add(tar, f"{stem}.png", bytes(png))
                add(tar, f"{stem}.json", json.dumps(meta).encode())
        print(f"{style}: {len(found)} drawings")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
