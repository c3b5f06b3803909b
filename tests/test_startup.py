"""Help, work on LoRA files and refusals start fast: they import neither open_clip nor torchvision,
which cost more than torch itself.
"""

import subprocess
import sys

from tiny import ROOT, random_tau, tiny_unet, write_model

from minilcm.files.lora_file import write_tau

SCRIPT = """
import contextlib, io, sys
import sample, train
from minilcm import __main__ as minilcm

lora, model, out = sys.argv[1:]
for run, argv in (
    (train, ["--help"]),
    (sample, ["--help"]),
    (minilcm, ["--help"]),
    (minilcm, ["info", lora, model]),
    (minilcm, ["combine", lora, lora, "-o", out]),
    (minilcm, ["diff", lora, out]),
    (minilcm, ["merge", model, lora, "-o", lora]),
    (sample, ["a pizza", "--model", model, "--size", "3x3"]),
    (sample, ["a pizza", "--model", lora]),
    (sample, ["a pizza", "--model", model, "--lora", model]),
    (train, ["--objective", "lcm", "--rank", "4", "--data", out, "--out", out, "--model", lora]),
    (train, ["--objective", "lcm"]),
):
    refusals = contextlib.suppress(SystemExit, ValueError, OSError)
    with contextlib.redirect_stdout(io.StringIO()), refusals:
        run.main(run.parse(argv))
    heavy = {"open_clip", "torchvision"} & sys.modules.keys()
    assert not heavy, f"{run.__name__} {argv} imports {heavy}"
"""


def test_nothing_heavy_is_imported_before_it_is_needed(tmp_path):
    model = write_model(tmp_path / "model.safetensors")
    write_tau(tmp_path / "lora.safetensors", random_tau(tiny_unet(), 1, 2, 3.0), {})
    argv = [
        sys.executable,
        "-c",
        SCRIPT,
        tmp_path / "lora.safetensors",
        model,
        tmp_path / "mix.safetensors",
    ]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
