"""A page that draws while you type: a server for this machine alone, one drawing at a time.

    page --prompt, sliders--> newest wish wins --> weights --> sampler --> PNG

The weights follow the sliders by arithmetic, W_base + sum_i lambda_i dW_i, from a copy of what the
LoRAs adapt. No file is read again.
"""

import io
import json
import re
import secrets
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import torch

from ..data.pictures import to_images
from ..files.checkpoint import load_model
from ..files.lora_file import EMOJI, Lora, find_lora, parse_lora, read_taus, speeds_up
from ..generate import SAMPLERS, generate
from ..merge import combine, merge_into
from ..model.precision import default_dtype
from ..model.text import lora_weights
from ..schedule import make_schedule
from ..solver import guided_eps

SLIDERS = "lcm:1", "blueprint:0", "papercut:0"  # of the shipped model, where they start
# the most of each; BODY: bytes of a request
LETTERS, SEED, STEPS, GUIDANCE, LAMBDA, BODY = 300, (1 << 32) - 1, 50, 10, 2, 1 << 16


class Wish(NamedTuple):
    """What the page asks for."""

    prompt: str
    seed: int
    sampler: str
    steps: int
    guidance: float
    gamma: float  # lcm: how much of the noise between steps is fresh; 1: all, LCM's own sampler
    size: int  # width and height in pixels
    lambdas: list[float]


class Superseded(Exception):
    """A newer wish has come."""


class Studio:
    """A model in memory that draws with any sum of its LoRAs, [(file, lambda at first)]."""

    def __init__(self, model: Path, loras: list[Lora], device: str):
        *networks, self.config = load_model(model, default_dtype(device))
        if self.config.unet.w_dim is not None:
            raise ValueError(f"{model}: a full LCM; draw it with sample.py")
        self.loras, self.device = loras, device
        self.unet, self.vae, self.text = (network.to(device) for network in networks)
        self.weights = dict(self.unet.named_parameters()) | lora_weights(self.text)
        self.taus = read_taus(loras, self.weights)
        adapted = {f"{path}.weight" for tau in self.taus for path in tau}
        self.base = {key: self.weights[key].clone() for key in adapted}
        self.lambdas = [0.0] * len(loras)  # of what is in the weights now
        multiple = self.config.multiple
        self.sizes = list(range(multiple, self.config.size * 3 // 2 + 1, multiple))
        self.schedule = make_schedule(self.config.unet.v, self.config.unet.zero_snr)
        self.arrival, self.drawing, self.newest = threading.Lock(), threading.Lock(), 0

    def settings(self) -> dict:
        """The page's choices, their limits, and where they start."""
        own, fast = self.config.guidance, any(speeds_up(path) for path, _ in self.loras)
        return {
            "start": {"sampler": "lcm" if fast else "ddim", "size": self.config.size},
            "most": {"letters": LETTERS, "steps": STEPS, "guidance": GUIDANCE, "lambda": LAMBDA},
            "samplers": {
                name: [x.default_steps, 1 if x.needs_lcm_lora else own, x.stochastic]
                for name, x in SAMPLERS.items()
            },
            "sizes": self.sizes,
            "loras": [[path.stem, lam] for path, lam in self.loras],
            "names": self.config.names,
        }

    def read_wish(self, body: bytes) -> Wish:
        """Raises ValueError, one line, for what is no wish or out of bounds."""
        try:
            wish = Wish(**json.loads(body))
            numbers = [
                ("seed", wish.seed, 0, SEED, int),
                ("steps", wish.steps, 1, STEPS, int),
                ("size", wish.size, self.sizes[0], self.sizes[-1], int),
                ("guidance", wish.guidance, 1, GUIDANCE, int | float),
                ("gamma", wish.gamma, 0, 1, int | float),
                *[("lambda", x, -LAMBDA, LAMBDA, int | float) for x in wish.lambdas],
            ]
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"give JSON of {', '.join(Wish._fields)}") from None
        if not isinstance(wish.prompt, str) or len(wish.prompt) > LETTERS:
            raise ValueError(f"the prompt is too long; give at most {LETTERS} letters")
        for name, value, low, high, kind in numbers:
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
                raise ValueError(f"{name} is {str(value)[:20]}; give {low} to {high}")
        if wish.size not in self.sizes:
            raise ValueError(f"size is {wish.size}; give a multiple of {self.sizes[0]}")
        if wish.sampler not in [*SAMPLERS] or len(wish.lambdas) != len(self.loras):
            raise ValueError("another sampler or number of LoRA; load the page again")
        return wish

    @torch.no_grad()  # PyTorch keeps this for each thread, and each request has its own
    def draw(self, wish: Wish) -> bytes:
        """A PNG. Raises Superseded when a newer wish comes, while waiting or at the next step."""
        with self.arrival:
            self.newest = mine = self.newest + 1

        def unet(*of_step):
            self.check_newest(mine)
            return self.unet(*of_step)

        size, side = (wish.size, wish.size), wish.size // self.vae.factor
        with self.drawing:
            self.check_newest(mine)
            if wish.lambdas != self.lambdas:
                self.set_lambdas(wish.lambdas)
            cond, null_cond = self.text.encode([wish.prompt], size), self.text.null_cond(1, size)
            eps_fn = guided_eps(unet, cond, null_cond, wish.guidance - 1)
            how = dict(decode=self.vae.decode, device=self.device, schedule=self.schedule)
            tcd = SAMPLERS[wish.sampler].stochastic and wish.gamma < 1
            how |= dict(gamma=wish.gamma if tcd else None)
            pixels = generate(eps_fn, [wish.seed], (4, side, side), wish.sampler, wish.steps, **how)
        png = io.BytesIO()
        to_images(pixels)[0].save(png, "PNG", compress_level=1)
        return png.getvalue()

    def check_newest(self, mine: int) -> None:
        if mine < self.newest:
            raise Superseded

    def set_lambdas(self, lambdas: list[float]) -> None:
        """W = W_base + sum_i lambda_i dW_i, from the copy: rounding does not pile up."""
        self.lambdas = None  # until the sum is whole
        for key, weight in self.base.items():
            self.weights[key].copy_(weight)
        merge_into(self.weights, combine(self.taus, lambdas))
        self.lambdas = lambdas


class Server(ThreadingHTTPServer):
    """On a free port of 127.0.0.1. Other pages in the browser reach it, but not its token."""

    daemon_threads, request_queue_size = True, 512

    def __init__(self, studio: Studio):
        super().__init__(("127.0.0.1", 0), Handler)
        self.studio, self.token = studio, secrets.token_urlsafe(16)
        self.url = f"http://127.0.0.1:{self.server_port}/{self.token}/"
        page = Path(__file__).with_name("live.html").read_text(encoding="utf-8")
        settings = json.dumps(studio.settings()).replace("<", "\\u003c")  # names are the file's
        self.page = page.replace("SETTINGS_JSON", settings).encode()


class Handler(BaseHTTPRequestHandler):
    timeout = 10  # seconds for a request to arrive

    def do_GET(self) -> None:
        self.answer(*(self.refusal("/") or (200, self.server.page, "text/html")))

    def do_POST(self) -> None:
        self.answer(*(self.refusal("/draw") or self.drawing()))

    def drawing(self) -> tuple:
        studio, length = self.server.studio, self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,9}", length) or int(length) > BODY:
            return 413, b"the request is too long"
        try:
            return 200, studio.draw(studio.read_wish(self.rfile.read(int(length)))), "image/png"
        except ValueError as error:
            return 400, str(error).encode()
        except Superseded:
            return 409, b"a newer request came"
        except ConnectionError:  # the browser has gone away, and so will the answer
            return 400, b"cut off"

    def refusal(self, path: str) -> tuple[int, bytes] | None:
        """For another name of this machine, another page's script, or no token."""
        here = f"127.0.0.1:{self.server.server_port}"
        origins = None, f"http://{here}"
        if self.headers.get("Host") != here or self.headers.get("Origin") not in origins:
            return 403, b"only for its own page, at the address that was printed"
        known = f"/{self.server.token}{path}"
        if not secrets.compare_digest(self.path.encode(), known.encode()):
            return 404, b"no such page; open the address that was printed"

    def answer(self, status: int, body: bytes, kind: str = "text/plain") -> None:
        with suppress(ConnectionError):  # the browser may have gone away
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_) -> None: ...  # not a line for each request


def live(model: Path | None, words: list[str]) -> None:
    """Serve until Ctrl-C: MODEL with LoRAs FILE[:LAMBDA], or the shipped model with its own."""
    loras = list(map(parse_lora, words or ([] if model else SLIDERS)))
    for path, lam in loras:
        if not -LAMBDA <= lam <= LAMBDA:
            raise ValueError(f"--lora {path}:{lam:g}: give a LAMBDA from -{LAMBDA} to {LAMBDA}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model or EMOJI / "model.safetensors"
    server = Server(Studio(model, [(find_lora(path), lam) for path, lam in loras], device))
    print(f"open {server.url}\nCtrl-C stops it")
    server.serve_forever()
