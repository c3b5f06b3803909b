"""Work goes on when what it prints is not read, or cannot be spelled."""

import os
import subprocess
import sys

import pytest
import torch
from tiny import ROOT

PROGRAM = """
import sys
from minilcm.cli.output import plain_output
plain_output()
for i in range(5000):
    print("a line that nobody reads")
    print("nor this", file=sys.stderr)
open(sys.argv[1], "w").write("done")
"""


def start(code: str, *argv, unbuffered: str = "", **how) -> subprocess.Popen:
    environment = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONUNBUFFERED=unbuffered)
    environment |= how.pop("env", {})
    return subprocess.Popen([sys.executable, "-c", code, *argv], env=environment, **how)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_who_goes_away(tmp_path, unbuffered):
    """`2>&1 | head -1`: the work is done, and the exit is quiet."""
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, unbuffered=unbuffered)
    program = start(PROGRAM, tmp_path / "work", **how)
    assert program.stdout.readline() == b"a line that nobody reads\n"
    program.stdout.close()
    assert program.wait() == 0 and (tmp_path / "work").read_text() == "done"


def test_a_full_disk_is_said_once(tmp_path):
    """Standard output on a full disk: one line on standard error."""
    program = PROGRAM.replace('print("nor this", file=sys.stderr)', "")
    with open("/dev/full", "w") as full:
        run = start(program, tmp_path / "work", stdout=full, stderr=subprocess.PIPE, text=True)
        _, errors = run.communicate()
    assert run.returncode == 0 and (tmp_path / "work").read_text() == "done"
    assert errors == "nothing more can be printed (No space left on device)\n"


def test_without_standard_output_and_error(tmp_path):
    """`>&- 2>&-`, as without a terminal on Windows: prints and bars go nowhere."""
    bar = "from tqdm import tqdm; list(tqdm(range(3), disable=None))"
    closed = ["bash", "-c", 'exec "$@" >&- 2>&-', "-", sys.executable, "-c", f"{PROGRAM}\n{bar}"]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    assert subprocess.run([*closed, tmp_path / "work"], env=environment).returncode == 0


FAIL = "from minilcm.cli.output import run_script as r; r('x', lambda _: exec({!r}), dict, '')"


@pytest.mark.parametrize("cuda", [True, False])
def test_no_memory_is_one_line(cuda):
    """Of a GPU or a processor, in torch's words; any other RuntimeError is a fault of ours."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    words = "CUDA out of memory. Tried to allocate 2.00 GiB." if cuda else str(error.value)
    for words, line in {
        words: "x: out of memory; a smaller --size or",
        "sizes": "Traceback",
    }.items():
        run = start(
            FAIL.format(f"raise RuntimeError({words!r})"), stderr=subprocess.PIPE, text=True
        )
        said = run.communicate()[1].splitlines()
        assert said[0].startswith(line) and run.returncode == 1
        assert len(said) == 1 or line == "Traceback"


def test_errors_of_the_system_name_the_file(tmp_path):
    """And no number. A RecursionError, which is a RuntimeError, is not called out of memory."""
    for code, line in {
        f"open({str(tmp_path)!r})": f"x: {tmp_path}: Is a directory",
        "import json; json.loads('[' * 10**6)": "Traceback (most recent call last):",
    }.items():
        run = start(FAIL.format(code), stderr=subprocess.PIPE, text=True)
        assert run.communicate()[1].splitlines()[0] == line and run.returncode == 1


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_letters_that_the_encoding_lacks(encoding):
    """They are shown by their number, as is a byte of a file name that is no letter at all."""
    text = "from minilcm.cli.output import plain_output; plain_output(); print('a 寿 \\udcff')"
    run = start(text, stdout=subprocess.PIPE, env={"PYTHONIOENCODING": encoding})
    shown = "寿" if encoding == "utf-8" else r"\u5bff"
    assert run.communicate()[0].decode(encoding).splitlines() == [rf"a {shown} \udcff"]
    assert run.returncode == 0
