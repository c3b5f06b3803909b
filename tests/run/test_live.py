"""The live page's server draws what sample.py draws, one wish at a time, for its own page only."""

import io
import json
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.client import HTTPConnection

import pytest
from PIL import Image
from tiny import CONFIG, random_tau, tiny_unet, write_model

import sample
from minilcm.files.lora_file import write_tau
from minilcm.lora import ATTENTION
from minilcm.run.live import BODY, LETTERS, STEPS, Server, Studio, live

WISH = {"prompt": "pizza", "seed": 3, "sampler": "lcm", "steps": 2, "guidance": 1, "size": 32}
WISH |= {"lambdas": [1, 0.5], "gamma": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    write_model(folder / "model.safetensors")
    write_tau(folder / "lcm.safetensors", random_tau(tiny_unet(), 1, 2, 3.0, size=0.1), {})
    tau = random_tau(tiny_unet(), 2, 3, 1.0, ATTENTION, size=0.3)
    write_tau(folder / "style.safetensors", tau, {})
    return folder


def test_a_lora_of_another_model_is_refused_at_the_start(files):
    other = replace(CONFIG.unet, channels=(64, 64, 64))
    path = files / "other.safetensors"
    write_tau(path, random_tau(tiny_unet(cfg=other), 0, 2, 3.0), {})
    with pytest.raises(ValueError, match="other.safetensors: made for another model"):
        Studio(files / "model.safetensors", [(path, 1.0)], "cpu")


def test_a_lambda_beyond_its_slider_is_refused_at_the_start(files):
    with pytest.raises(ValueError, match="lcm.safetensors:5: give a LAMBDA from -2 to 2"):
        live(files / "model.safetensors", [f"{files}/lcm.safetensors:5"])


def test_a_browser_that_goes_away_is_no_error(server, capfd):
    """While its request arrives: the connection is reset, and the console stays silent."""
    client = socket.create_connection(("127.0.0.1", server.server_port))
    head = f"POST /{server.token}/draw HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n"
    client.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
    time.sleep(0.2)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()  # by RST
    time.sleep(0.5)
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def server(files):
    loras = [(files / f"{name}.safetensors", 1.0) for name in ("lcm", "style")]
    server = Server(Studio(files / "model.safetensors", loras, "cpu"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def ask(server):
    """ask(wish or bytes, ...) -> (status, body)."""

    def ask(body=None, method="POST", token=server.token, path="/draw", headers={}):
        body = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection = HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        connection.request(method, f"/{token}{path}", body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()

    return ask


def pixels(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data)).tobytes()


def test_it_draws_what_sample_draws(files, tmp_path, ask):
    """The same pixels, also after other lambdas: nothing of them is left in the weights."""
    wishes = [
        WISH,
        WISH | {"lambdas": [0, 0]},
        WISH | {"lambdas": [-2, 1.7], "sampler": "ddim", "guidance": 3},
        WISH | {"prompt": "rocket", "size": 48},
        WISH,
        WISH | {"gamma": 0.3},
    ]
    drawn = []
    for i, wish in enumerate(wishes):
        status, body = ask(wish)
        assert status == 200
        argv = ["--model", str(files / "model.safetensors"), "--device", "cpu"]
        argv += ["--out", f"{tmp_path}/{i}.png", "--size", f"{wish['size']}x{wish['size']}"]
        for name in ("seed", "sampler", "steps", "guidance"):
            argv += [f"--{name}", str(wish[name])]
        argv += ["--gamma", str(wish["gamma"])] if wish["gamma"] < 1 else []
        for name, lam in zip(("lcm", "style"), wish["lambdas"]):
            argv += ["--lora", f"{files}/{name}.safetensors:{lam}"]
        sample.main(sample.parse([*argv, wish["prompt"]]))
        drawn.append(pixels(body))
        assert drawn[i] == pixels((tmp_path / f"{i}.png").read_bytes())
    assert drawn[0] == drawn[4] and len(set(drawn)) == 5


@pytest.mark.parametrize(
    "wish, says",
    [
        (b"{", "JSON"),
        (b"[1]", "JSON"),
        (b"[" * 60_000, "JSON"),
        (WISH | {"seed": True}, "seed is True"),
        (WISH | {"lambdas": [False, 1]}, "lambda is False"),
        ({"prompt": "pizza"}, "JSON"),
        (WISH | {"more": 1}, "JSON"),
        (WISH | {"prompt": "x" * (LETTERS + 1)}, str(LETTERS)),
        (WISH | {"prompt": 1}, str(LETTERS)),
        (WISH | {"size": 1024}, "size is 1024"),
        (WISH | {"size": 33}, "multiple of"),
        (WISH | {"size": 32.0}, "size is 32.0"),
        (WISH | {"size": -32}, "size is -32"),
        (WISH | {"steps": STEPS + 1}, f"steps is {STEPS + 1}"),
        (WISH | {"steps": 0}, "steps is 0"),
        (WISH | {"seed": -1}, "seed is -1"),
        (WISH | {"guidance": float("nan")}, "guidance is nan"),
        (WISH | {"guidance": "3"}, "guidance is 3"),
        (WISH | {"gamma": 1.1}, "gamma is 1.1"),
        (WISH | {"gamma": None}, "gamma is None"),
        (WISH | {"lambdas": [1, 1e9]}, "lambda is 1000000000.0"),
        (WISH | {"lambdas": [1]}, "load the page again"),
        (WISH | {"lambdas": 1}, "JSON"),
        (WISH | {"sampler": "no such sampler"}, "load the page again"),
        (WISH | {"sampler": []}, "load the page again"),
    ],
)
def test_what_is_out_of_bounds_is_refused_in_a_line(ask, wish, says):
    status, body = ask(wish)
    assert status == 400 and says in body.decode() and b"\n" not in body


def test_only_its_own_page_is_answered(server, ask):
    """No token, another page's script, another name of this machine, no end of bytes: refused."""
    here = f"127.0.0.1:{server.server_port}"
    assert server.server_address[0] == "127.0.0.1"
    assert ask(WISH, headers={"Origin": f"http://{here}"})[0] == 200
    assert ask(None, "GET", path="/")[0] == 200
    for token in ("", "x" * len(server.token), server.token[:-1], "%00"):
        assert ask(WISH, token=token)[0] == 404
        assert ask(None, "GET", token=token, path="/")[0] == 404
    for origin in ("http://example.com", "null", f"https://{here}", "http://127.0.0.1:1"):
        assert ask(WISH, headers={"Origin": origin})[0] == 403
    for host in ("example.com", f"example.com:{server.server_port}", "127.0.0.1"):
        assert ask(WISH, headers={"Host": host})[0] == 403
        assert ask(None, "GET", path="/", headers={"Host": host})[0] == 403
    for length in (str(BODY + 1), "-1", "many", "1" * 30, "1" * 5000):
        assert ask(b"", headers={"Content-Length": length})[0] == 413


class Watch:
    """In the UNet's place: counts who is in it at once; the first call waits for `go`."""

    def __init__(self, unet):
        self.unet, self.inside, self.most = unet, 0, 0
        self.entered, self.go = threading.Event(), threading.Event()

    def __call__(self, *x):
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.entered.set()
        assert self.go.wait(60)
        eps_hat = self.unet(*x)
        self.inside -= 1
        return eps_hat


@pytest.fixture
def watch(server, monkeypatch):
    watch = Watch(server.studio.unet)
    monkeypatch.setattr(server.studio, "unet", watch)
    return watch


def test_the_newest_wish_wins(server, ask, watch, monkeypatch):
    """One that is being drawn is given up at its next step, one that waits is never begun."""
    text, begun = server.studio.text, []
    encode = text.encode

    def spy(prompts, *size):
        begun.extend(prompts)
        return encode(prompts, *size)

    monkeypatch.setattr(text, "encode", spy)
    with ThreadPoolExecutor() as pool:
        first = server.studio.newest
        answers = []
        for i, prompt in enumerate(("pizza", "rocket", "cat face")):
            answers.append(pool.submit(ask, WISH | {"prompt": prompt}))
            while server.studio.newest < first + i + 1:
                time.sleep(0.01)
            assert watch.entered.wait(60)
        watch.go.set()
        statuses = [answer.result()[0] for answer in answers]
    assert statuses == [409, 409, 200] and "pizza" in begun and "rocket" not in begun


def test_200_requests_at_once_leave_it_answering(ask, watch):
    watch.go.set()
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(ask, [WISH | {"seed": seed} for seed in range(200)]))
    statuses = [status for status, _ in answers]
    assert set(statuses) <= {200, 409} and 200 in statuses and watch.most == 1
    assert ask(WISH)[0] == 200


def test_every_control_of_the_page_draws_another_picture(server, page):
    """Typed, dragged or chosen; a sampler brings its steps; what is out of bounds is not asked."""
    page.goto(server.url)
    seen = set()

    def picture() -> str:
        page.wait_for_function("!drawing && picture.alt")
        shown = page.evaluate(
            """async () => {
                const buffer = await (await fetch(picture.src)).arrayBuffer();
                return [...new Uint8Array(buffer)].join();
            }"""
        )
        assert shown not in seen
        seen.add(shown)
        return page.text_content("#says")

    assert picture().startswith("4 evaluations")
    page.fill("[name=prompt]", "rocket")
    picture()
    page.fill("[name=seed]", "7")
    picture()
    page.select_option("[name=size]", "48")
    picture()
    page.locator("[name=lambda]").first.press("ArrowLeft")
    picture()
    page.locator("[name=lambda]").last.press("ArrowRight")
    picture()
    page.locator("[name=steps]").press("ArrowRight")
    assert picture().startswith("5 evaluations")
    page.locator("[name=gamma]").press("ArrowLeft")
    picture()
    page.locator("[name=guidance]").press("ArrowRight")
    assert picture().startswith("10 evaluations")
    page.select_option("[name=sampler]", "ddim")
    assert picture().startswith("50 evaluations") and page.is_disabled("[name=gamma]")
    page.fill("[name=seed]", "-7")
    assert not page.evaluate("drawing") and page.text_content("#says").startswith("Value must")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
