"""The page in a real browser: Chromium without a window, driven by selenium."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image

from tests.recipes.conftest import MakeModel
from vqguard.recipes.run import LoadedRun
from vqguard.recipes.serving.app import make_app
from vqguard.recipes.serving.limits import Limits
from vqguard.recipes.serving.page.undefended import Undefended
from vqguard.recipes.serving.service import Service

from .conftest import NAME, PICTURES

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402  # where it is
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
WAIT = 120
pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium and chromedriver here"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Opened:
    """A page that is open."""

    def __init__(self, browser: Any, address: str) -> None:
        self.browser = browser
        self.address = address
        browser.set_window_size(1200, 1000)
        browser.get_log("browser")
        browser.get(address)
        self.until(lambda: self.text("model") == NAME)

    def one(self, id: str) -> Any:
        return self.browser.find_element(By.ID, id)

    def text(self, id: str) -> str:
        return str(self.one(id).text)

    def until(self, condition: Callable[[], bool]) -> None:
        WebDriverWait(self.browser, WAIT).until(lambda _: condition())

    def choose(self, path: Path) -> None:
        self.one("file").send_keys(str(path))

    def judge(self, path: Path) -> str:
        self.choose(path)
        self.until(lambda: self.one("verdict").get_attribute("data-kind") in ("good", "bad"))
        return self.text("verdict")

    def ask(self) -> dict[str, tuple[str, str]]:
        self.one("send").click()
        self.until(lambda: self.one("send").is_displayed())
        shown = self.browser.find_elements(By.CSS_SELECTOR, "article:not([hidden])")
        return {
            article.get_attribute("id"): (
                article.find_element(By.CLASS_NAME, "said").text,
                article.find_element(By.CLASS_NAME, "end").text,
            )
            for article in shown
        }

    def run(self, script: str) -> Any:
        return self.browser.execute_script(script)

    def complaints(self) -> list[str]:
        return [line["message"] for line in self.browser.get_log("browser")]


Open = Callable[..., Opened]


@pytest.fixture
def open_page(run: LoadedRun, small_model: MakeModel, browser: Any) -> Iterator[Open]:
    with ExitStack() as stack:

        def start(*, undefended: bool = False, shadow: bool = False, **limits: Any) -> Opened:
            service = Service(run, NAME, Limits(**limits), shadow=shadow)
            beside = Undefended(small_model(seed=1)[0], "control") if undefended else None
            app: Any = make_app(service, page=True, undefended=beside)
            bound = socket.create_server(("127.0.0.1", 0))
            server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
            thread = threading.Thread(target=server.run, args=([bound],))
            thread.start()

            def stop() -> None:
                browser.get("about:blank")
                server.should_exit = True
                thread.join()
                bound.close()

            stack.callback(stop)
            return Opened(browser, f"http://127.0.0.1:{bound.getsockname()[1]}/")

        yield start


@pytest.fixture
def files(flagged: list[bool], tmp_path: Path) -> dict[bool, Path]:
    paths = {}
    for bad in (False, True):
        paths[bad] = tmp_path / f"{bad}.png"
        PICTURES[flagged.index(bad)].save(paths[bad])
    return paths


WHOLE = ("", "Cut at its longest.")
"""What is said of the end of an answer that nobody refused."""


def test_a_clean_and_a_flagged_picture(
    open_page: Open, run: LoadedRun, files: dict[bool, Path], flagged: list[bool]
) -> None:
    clean = PICTURES[flagged.index(False)]
    expected = run.ask(clean, "What is in the image?", max_new_tokens=256).text
    page = open_page(undefended=True)
    assert page.judge(files[False]) == "✓ Passes"
    assert "96 × 96" in page.text("size")
    assert "9 tokens" in page.text("distinct")
    assert '"flagged": false' in page.one("reason").get_attribute("textContent")
    said, end = page.ask()["guarded"]
    assert (said, end in WHOLE) == (expected.strip(), True)
    assert page.judge(files[True]) == "✕ Refused: gun"
    assert " exceeds " in page.text("why")
    row = page.browser.find_element(By.CSS_SELECTOR, "#scores tr.over:not(.all)")
    assert row.text.split()[0] == "gun"
    assert " > " in row.text
    answers = page.ask()
    assert answers["guarded"] == ("sorry .", "Refused by the guard (content_filter).")
    assert answers["undefended"][0] != "sorry ."
    assert answers["undefended"][1] in WHOLE
    assert "no guard" in page.text("kind")
    assert page.text("undefended-title").startswith("Undefended")
    assert '"category": "gun"' in page.one("reason").get_attribute("textContent")
    assert page.complaints() == []


def test_a_text_alone_and_a_page_without_an_undefended_model(open_page: Open) -> None:
    page = open_page()
    answers = page.ask()
    assert set(answers) == {"guarded"}
    assert answers["guarded"][1] in WHOLE
    assert not page.one("undefended").is_displayed()


def test_in_the_shadow(open_page: Open, files: dict[bool, Path]) -> None:
    page = open_page(shadow=True)
    assert page.one("shadow").is_displayed()
    assert page.judge(files[True]) == "✕ Reported: gun"


def test_files_that_cannot_be_judged(
    open_page: Open, files: dict[bool, Path], tmp_path: Path
) -> None:
    page = open_page(body_bytes=200_000, pixels=100_000)
    broken, large, wide = (tmp_path / name for name in ("broken.png", "large.png", "wide.png"))
    broken.write_bytes(b"\x89PNG\r\n\x1a\nno")
    large.write_bytes(bytes(200_000))
    Image.new("RGB", (2000, 2000)).save(wide)
    for path, says in ((broken, "picture"), (large, "too large: 0.2 MB"), (wide, "pixels")):
        assert page.judge(files[False]) == "✓ Passes"
        page.choose(path)
        page.until(lambda: page.one("problem").is_displayed())
        assert says in page.text("problem"), path
        assert page.one("drop").is_displayed()
        assert page.one("verdict").get_attribute("data-kind") == "none"
    assert page.judge(files[True]) == "✕ Refused: gun"
    assert not page.one("problem").is_displayed()


def test_a_busy_server_and_one_that_is_gone(open_page: Open, files: dict[bool, Path]) -> None:
    page = open_page(requests=1)
    host, port = page.address.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port))) as held:
        held.sendall(b"POST /v1/moderations HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{")
        page.choose(files[False])
        page.until(lambda: page.one("problem").is_displayed())
        assert "busy. Try again in 1 s" in page.text("problem")
    page.until(lambda: not page.one("problem").is_displayed() or "✓" in page.judge(files[False]))
    page.run("window.fetch = () => Promise.reject(new TypeError('gone'))")
    page.one("send").click()
    page.until(lambda: page.one("problem").is_displayed())
    assert "did not answer" in page.text("problem")
    assert page.one("send").is_displayed()


def test_by_keyboard_alone(open_page: Open, files: dict[bool, Path]) -> None:
    page = open_page()
    page.judge(files[False])
    seen = []
    page.run("document.body.tabIndex = -1; document.body.focus()")
    for _ in range(5):
        ActionChains(page.browser).send_keys(Keys.TAB).perform()
        seen.append(page.run("const a = document.activeElement; return a.id || a.tagName"))
    assert seen == ["file", "CANVAS", "question", "send", "SUMMARY"]
    canvas = page.browser.find_element(By.TAG_NAME, "canvas")
    canvas.send_keys(Keys.ARROW_RIGHT)
    assert page.text("cell").startswith("Row 1, column 2: code ")
    canvas.send_keys(Keys.ARROW_DOWN)
    assert page.text("cell").startswith("Row 2, column 2: code ")
    canvas.send_keys(Keys.ARROW_UP + Keys.ARROW_UP)
    assert page.text("cell").startswith("Row 1, column 2: code ")
    page.one("question").send_keys(Keys.ENTER)
    page.until(lambda: page.one("send").is_displayed())
    assert page.browser.find_element(By.CSS_SELECTOR, "#guarded .end").text in WHOLE


@pytest.mark.parametrize("width", [320, 390, 700, 1200])
def test_every_width_and_both_colours(open_page: Open, files: dict[bool, Path], width: int) -> None:
    page = open_page(undefended=True)
    page.judge(files[True])
    page.ask()
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert page.run("return document.documentElement.scrollWidth") <= width
    backgrounds = set()
    for scheme in ("light", "dark"):
        wanted = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)
        backgrounds.add(page.run("return getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2
    page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_names_are_text_and_scripts_from_elsewhere_do_not_run(
    open_page: Open, run: LoadedRun, files: dict[bool, Path]
) -> None:
    own = run.model.vqguard.safety_map
    hostile = "<img src=x onerror=document.title='ran'>"
    run.model.vqguard.safety_map = type(own)(
        (hostile,), own.counts, codebook_checksum=own.codebook_checksum
    )
    page = open_page()
    assert page.judge(files[True]) == f"✕ Refused: {hostile}"
    assert page.browser.find_elements(By.CSS_SELECTOR, "#scores img, #verdict img") == []
    for script in (
        "const s = document.createElement('script'); s.textContent = 'document.title = \"ran\"';",
        "const s = document.createElement('script'); s.src = 'data:text/javascript,0';",
    ):
        with pytest.raises(Exception, match="TrustedScript"):
            page.run(script + "document.head.append(s)")
    loaded = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded
    assert all(name.startswith((page.address, "blob:")) for name in loaded)
    assert "ran" not in page.browser.title
