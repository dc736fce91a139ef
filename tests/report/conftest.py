"""Runs to look at, and a real browser to look at them with."""

import contextlib
import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import TINY

from pretrain.config import load_config
from pretrain.io import append_jsonl
from pretrain.runs import Run
from pretrain.tokens import prepare
from pretrain.training import train


def records(first: int, last: int, **more: Any) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, as training writes them; validated at every tenth step."""
    lines = []
    for step in range(first, last + 1):
        line = {
            "step": step,
            "tokens": 256 * step,
            "time": 0.5 * step,
            "train/loss": 2 + 3 / step,
            "train/lr": 0.001,
            "train/grad_norm": 0.5 + (step % 4),
            "train/skipped": 0.0,
            "train/tokens_per_second": 512,
        }
        if step % 10 == 0:
            line |= {"val/loss": 2.2 + 3 / step, "val/bpb": (2.2 + 3 / step) / 1.5}
        lines.append(line | more)
    return lines


@pytest.fixture(scope="session")
def prepared(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards and the tokenizer of a run."""
    folder = tmp_path_factory.mktemp("prepared")
    config = load_config("quickstart", **{**TINY, "data.paths": [str(text_file)]})
    prepare(config, folder / "data").tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture
def make_run(prepared: Path, text_file: Path, tmp_path: Path):
    """A function that makes a run directory with a course of 40 steps, without training."""

    def make(name: str = "one", steps: int = 40, **overrides: Any) -> Run:
        settings = {**TINY, "data.paths": [str(text_file)], "train.steps": 40, "train.grad_clip": 1.0, **overrides}
        folder = tmp_path / name
        shutil.copytree(prepared, folder)
        run = Run.create(folder, load_config("quickstart", **settings))
        append_jsonl(run.metrics, *records(1, steps))
        for step in range(10, steps + 1, 10):
            append_jsonl(run.samples, {"step": step, "prompt": "Ada", "text": f"Ada sees {name} {step}."})
        return run

    return make


@pytest.fixture(scope="session")
def trained(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tiny run that was really trained."""
    config = load_config("quickstart", **{**TINY, "data.paths": [str(text_file)], "train.device": "cpu"})
    return train(config, tmp_path_factory.mktemp("runs") / "trained")


class Browser:
    """A headless Chromium."""

    def __init__(self, driver: Any):
        self.driver = driver

    def open(self, address: str | Path, width: int = 1100, scheme: str = "light") -> None:
        """Go to a page, in a window of a width and with a preferred color scheme; when it is drawn, return."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.prefer(scheme)
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(address.as_uri() if isinstance(address, Path) else address)
        self.until("return document.readyState === 'complete'")

    def prefer(self, scheme: str) -> None:
        """Change the color scheme that the system prefers."""
        features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", features)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script gives."""
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str, *arguments: Any) -> Any:
        """Wait until a script gives something true."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, 60, 0.1).until(lambda driver: driver.execute_script(script, *arguments))

    def find(self, selector: str) -> Any:
        """The element."""
        return self.driver.find_element("css selector", selector)

    def complaints(self) -> list[str]:
        """Errors and warnings on its console since the page was opened, but about the reading of pixels by tests."""
        logged = self.driver.get_log("browser")
        return [each["message"] for each in logged if each["level"] != "INFO" and each["source"] != "rendering"]

    def legend(self, plot: str) -> dict[str, str]:
        """What a plot's legend says, by name."""
        return self.run(
            """const rows = document.querySelectorAll(`figure[data-plot="${arguments[0]}"] .u-legend tr`), said = {};
            for (const row of rows) said[row.querySelector("th").textContent] = row.querySelector("td").textContent;
            return said;""",
            plot,
        )

    def requests(self) -> list[str]:
        """What it asked for since, other than what a page holds itself."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [address for address in sent if not address.startswith(("data:", "chrome:", "chrome-untrusted:"))]

    def drawn(self, plot: str) -> int:
        """Pixels of a plot's canvas that are not transparent: 0 when there is no such plot."""
        return self.run(
            """const canvas = document.querySelector(`figure[data-plot="${arguments[0]}"] canvas`);
            if (!canvas) return 0;
            const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            let drawn = 0;
            for (let i = 3; i < pixels.length; i += 4) drawn += pixels[i] > 0;
            return drawn;""",
            plot,
        )

    def colors(self, plot: str) -> set[str]:
        """The colors that cover more than a few pixels of a plot."""
        counted = self.run(
            """const canvas = document.querySelector(`figure[data-plot="${arguments[0]}"] canvas`);
            const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data, counts = {};
            for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3] === 255) {
              const name = "#" + [0, 1, 2].map((j) => pixels[i + j].toString(16).padStart(2, "0")).join("");
              counts[name] = (counts[name] ?? 0) + 1;
            }
            return counts;""",
            plot,
        )
        return {name for name, count in counted.items() if count > 20}

    def shoot(self, file: Path) -> None:
        """Save a picture of the whole page."""
        height = self.run("return document.documentElement.scrollHeight")
        width = self.run("return innerWidth")
        metrics = {"width": width, "height": min(height, 8000), "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.save_screenshot(str(file))


@functools.cache
def chromium() -> tuple[str, str] | None:
    """The programs of the browser and of its driver, if they are installed."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium; tests that need it are skipped where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver")
    found = chromium()
    if found is None:
        pytest.skip("no chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(found[1]))
    try:
        yield Browser(driver)
    finally:
        with contextlib.suppress(Exception):
            driver.quit()
