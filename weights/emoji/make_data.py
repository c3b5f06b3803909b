"""Make the art: rasterise four openly licensed emoji sets into one webdataset tar each.

    npm install @iconify-json/noto @iconify-json/twemoji @iconify-json/fluent-emoji-flat \\
        @iconify-json/emojione emojibase-data
    pip install resvg-py
    python -m weights.emoji.make_data node_modules

Writes art/{noto,twemoji,fluent,emojione}.tar (PNG 128x128 RGBA + JSON: name, label, keywords,
style), art/held_out.txt, the (name, style) pairs that training never sees. The result is committed,
so nobody needs npm to train.
"""

import io
import json
import random
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).parent
# style: package
SETS = {"noto": "noto", "twemoji": "twemoji", "fluent": "fluent-emoji-flat", "emojione": "emojione"}
CATEGORIES = [
    "Activities",
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "Smileys & Emotion",
    "Travel & Places",
]
SIZE = 128  # the model draws 64x64; the art is kept larger for a later, larger model


def svg(icon_set: dict, name: str) -> str:
    """One icon of an iconify set as an SVG document."""
    name = icon_set.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icon_set["icons"][name]
    width, height = icon.get("width", icon_set["width"]), icon.get("height", icon_set["height"])
    box = f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}"'
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f"<svg {names} {box}>{icon['body']}</svg>"


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # mtime 0, uid 0: the same art gives the same bytes
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def main(node_modules: Path) -> None:
    import resvg_py

    sets = {
        style: json.loads((node_modules / "@iconify-json" / p / "icons.json").read_text())
        for style, p in SETS.items()
    }
    emojibase = json.loads((node_modules / "emojibase-data/en/data.json").read_text())
    by_code = {e["hexcode"].lower().replace("-fe0f", ""): e for e in emojibase}

    # the other three sets name emojione's icons, which come without categories and code points
    names, code = {}, {}
    for style in ["noto", "twemoji", "fluent"]:
        folder = node_modules / "@iconify-json" / SETS[style]
        categories = json.loads((folder / "metadata.json").read_text())["categories"]
        for category in CATEGORIES:
            names |= dict.fromkeys(categories.get(category, []))
        code |= {name: c for c, name in json.loads((folder / "chars.json").read_text()).items()}

    def has(style: str, name: str) -> bool:
        return name in sets[style]["icons"] or name in sets[style].get("aliases", {})

    pairs = {name: [style for style in SETS if has(style, name)] for name in sorted(names)}
    pairs = {name: styles for name, styles in pairs.items() if len(styles) >= 2}

    (HERE / "art").mkdir(exist_ok=True)
    for style in SETS:
        with tarfile.open(HERE / "art" / f"{style}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for name in (n for n in pairs if style in pairs[n]):
                png = resvg_py.svg_to_bytes(
                    svg_string=svg(sets[style], name), width=SIZE, height=SIZE
                )
                entry = by_code.get(
                    code[name].lower().replace("-fe0f", ""), {"label": "", "tags": []}
                )
                words = name.replace("-", " ")
                meta = {
                    "name": words,
                    "label": entry["label"],
                    "keywords": entry.get("tags", []),
                    "style": style,
                }
                add(tar, f"{name}.png", bytes(png))
                add(tar, f"{name}.json", json.dumps(meta, ensure_ascii=False).encode())

    # Hold out 10 % of the pairs so that every name is still seen in two styles
    every = [(name, style) for name, styles in pairs.items() for style in styles]
    random.Random(0).shuffle(every)
    left, held_out = {name: len(styles) for name, styles in pairs.items()}, []
    for name, style in every:
        if left[name] > 2 and len(held_out) < len(every) // 10:
            left[name] -= 1
            held_out.append(f"{name.replace('-', ' ')}\t{style}")
    (HERE / "art/held_out.txt").write_text("\n".join(sorted(held_out)) + "\n")
    print(f"{len(pairs)} names, {len(every)} pictures, {len(held_out)} pairs held out")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
