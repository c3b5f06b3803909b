"""What several test files share: schedules, reference tensors, fake CUDA."""

import gzip
import json
import shutil

import pytest
import torch
from gaussian import Gaussian
from make_reference import REFERENCE
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from minilcm.schedule import Schedule, make_schedule


def pytest_addoption(parser, pluginmanager):
    """Without pytest-xdist, take the flags of setup.cfg that are xdist's and run in one process."""
    if not pluginmanager.hasplugin("xdist"):
        parser.addoption("--numprocesses", help="ignored: pytest-xdist is not installed")
        parser.addoption("--dist", help="ignored: pytest-xdist is not installed")


torch.set_num_threads(1)  # two processes share the cores


@pytest.fixture(scope="session")
def schedule() -> Schedule:
    return make_schedule()


@pytest.fixture(scope="session")
def schedule64(schedule) -> Schedule:
    """The same alpha_bar in float64, for identities that hold to the last digits."""
    alpha_bar = schedule.alpha_bar.double()
    return Schedule(alpha_bar, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


@pytest.fixture(scope="session")
def gaussian(schedule64) -> Gaussian:
    return Gaussian(schedule64)


@pytest.fixture(scope="session")
def samplers() -> dict[str, Tensor]:
    return load_file(REFERENCE / "samplers.safetensors")


@pytest.fixture(scope="session")
def official_keys() -> dict[str, dict[str, list[int]]]:
    """{sd15, sdxl, ssd1b: UNet; vae; clip_l: {key: shape}}; "about" says where they are from."""
    return json.loads(gzip.decompress((REFERENCE / "official_keys.json.gz").read_bytes()))


@pytest.fixture(scope="session")
def official_lora_keys() -> dict[str, dict]:
    """{family: {LDM module: diffusers module}; lcm_family: {key: shape} of its official LoRA}."""
    return json.loads(gzip.decompress((REFERENCE / "official_lora_keys.json.gz").read_bytes()))


@pytest.fixture
def fake_cuda():
    """Tensors have device, dtype and shape but no data; "cuda" exists; mixing devices is an error.

    Gives build(make, dtype): make() with weights of that dtype on cuda.
    """

    def build(make, dtype):
        torch.set_default_dtype(dtype)
        try:
            with torch.device("cuda"):
                return make().requires_grad_(False)
        finally:
            torch.set_default_dtype(torch.float32)

    with FakeTensorMode():
        yield build


@pytest.fixture
def page():
    """A page in headless Chromium, 360 pixels wide, with touch. Words on its console fail a test,
    and so do requests that leave the page's folder.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium, for example by apt-get install chromium")
    words, requests = [], []
    with playwright.sync_playwright() as p:
        # files may read the pixels of files, as a test has to
        flags = ["--no-sandbox", "--allow-file-access-from-files"]
        browser = p.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport={"width": 360, "height": 800}, has_touch=True)
        page.set_default_timeout(120_000)
        page.on("console", lambda message: words.append(message.text))
        page.on("pageerror", lambda error: words.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        yield page
        folder = page.url.rpartition("/")[0]
        allowed = (folder, "data:", "blob:http://127.0.0.1")
        assert words == [] and [url for url in requests if not url.startswith(allowed)] == []
        browser.close()
