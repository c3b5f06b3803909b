"""Files of other programs that minilcm reads, and files of minilcm that others read; not in CI.

    python -m benchmarks.other_programs all    (or kohya, peft, diffusers-old, merged, sdcpp, lists)

Needs the `reference` extra; from PyPI also lycoris-lora for kohya, cyllama for sdcpp, pytest for
lists; 16 GB of memory and, under TMPDIR, 8 GB of disk. Weights are random and full size, nothing is
downloaded.

    kohya          LoRA files by LyCORIS as kohya's trainer runs it: plain, rsLoRA, Tucker, text
    peft           adapter folders by PEFT, files by diffusers' save_lora_weights: patterns of rank
                   and alpha, rsLoRA
    diffusers-old  the spellings of 2023, by what diffusers still has of that code
    merged         what `python -m minilcm merge` writes, and LoRA files, by diffusers' pipeline
    sdcpp          the same by stable-diffusion.cpp
    lists          names that ComfyUI and A1111 look for

A LoRA file is compared module by module: minilcm's delta against the one that the other program's
own layer gives. Prints a line for each fact and exits with 1 if one fails.
"""

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from benchmarks import files_by_others, files_for_others

PARTS = {
    "kohya": files_by_others.kohya,
    "peft": files_by_others.peft,
    "diffusers-old": files_by_others.diffusers_old,
    "merged": files_for_others.merged,
    "sdcpp": files_for_others.sdcpp,
    "lists": files_for_others.lists,
}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("part", choices=[*PARTS, "all"])
    part = parser.parse_args().part
    if part == "all":  # a process each, which gives its memory back
        command = [sys.executable, "-m", "benchmarks.other_programs"]
        sys.exit(max([subprocess.run([*command, part]).returncode != 0 for part in PARTS]))
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        for fact in PARTS[part](Path(name)):
            print(f"{'holds' if fact.holds else 'FAILS'}  {fact.what}: {fact.figures}", flush=True)
            failed += not fact.holds
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
