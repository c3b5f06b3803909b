"""From a change on the page of `python -m minilcm live` to its picture, on the shipped model: the
median and the 95th centile of 40.

    python -m benchmarks.live
"""

import json
import platform
import statistics
import time

import torch
from tqdm import tqdm

from minilcm.files.lora_file import EMOJI, find_lora, parse_lora
from minilcm.run.live import SLIDERS, Studio

WISH = {"prompt": "pizza", "sampler": "lcm", "steps": 4, "guidance": 1, "gamma": 1, "size": 128}


def main() -> None:
    loras = [(find_lora(path), lam) for path, lam in map(parse_lora, SLIDERS)]
    studio, times = Studio(EMOJI / "model.safetensors", loras, "cpu"), []
    for i in tqdm(range(41), "pictures", disable=None):
        wish = json.dumps(WISH | {"seed": i, "lambdas": [1, i / 40, 0]}).encode()
        start = time.perf_counter()
        studio.draw(studio.read_wish(wish))
        times.append(time.perf_counter() - start)
    cuts = statistics.quantiles(times[1:], n=20)  # the first one packs and warms up
    where = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"median {cuts[9]:.2f} s, 95th centile {cuts[18]:.2f} s on {where}")


if __name__ == "__main__":
    main()
