"""Chromium without a window, driven over the W3C's WebDriver protocol, which is plain HTTP."""

from __future__ import annotations

import base64
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """One window."""

    def __init__(self, address: str) -> None:
        self._address = address

    def _ask(self, method: str, path: str, **content: Any) -> Any:
        answer = requests.request(method, self._address + path, json=content if method == "POST" else None, timeout=60)
        value = answer.json()["value"]
        assert answer.ok, f"{path}: {value.get('error')}: {value.get('message')}"
        return value

    def open(self, url: str) -> None:
        self._ask("POST", "/url", url=url)

    def run(self, code: str, *arguments: Any) -> Any:
        """The value of *code*, JavaScript that returns one; promises are waited for."""
        return self._ask("POST", "/execute/sync", script=code, args=list(arguments))

    def until(self, code: str, seconds: float = 30) -> Any:
        """The value of *code* as soon as there is one."""
        end = time.monotonic() + seconds
        while not (value := self.run(code)):
            assert time.monotonic() < end, f"never true: {code}; the page says: {self.said()}"
            time.sleep(0.05)
        return value

    def said(self) -> str:
        return self.run("return document.getElementById('status').textContent")

    def _element(self, selector: str) -> str:
        return self._ask("POST", "/element", using="css selector", value=selector)[ELEMENT]

    def click(self, selector: str) -> None:
        self._ask("POST", f"/element/{self._element(selector)}/click")

    def choose_file(self, selector: str, path: Path) -> None:
        self._ask("POST", f"/element/{self._element(selector)}/value", text=str(path))

    def stroke(self, *points: tuple[float, float]) -> None:
        """Press at the first of *points* of the window, move over the others, let go."""
        moves = [
            {"type": "pointerMove", "duration": 20, "x": round(x), "y": round(y), "origin": "viewport"}
            for x, y in points
        ]
        down, up = {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}
        self._act({"type": "pointer", "id": "mouse", "actions": [moves[0], down, *moves[1:], up]})

    def hover(self, x: float, y: float) -> None:
        move = {"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y), "origin": "viewport"}
        self._act({"type": "pointer", "id": "mouse", "actions": [move]})

    def keys(self, *keys: str, holding: str = "") -> None:
        """Press and let go of each of *keys*, while *holding* is down."""
        pressed = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        held = [{"type": kind, "value": holding} for kind in ("keyDown", "keyUp")] if holding else []
        self._act({"type": "key", "id": "keys", "actions": [*held[:1], *pressed, *held[1:]]})

    def _act(self, source: dict[str, Any]) -> None:
        self._ask("POST", "/actions", actions=[source])

    def resize(self, width: int, height: int) -> None:
        """Let the page be *width* x *height*, as on a telephone, whatever a window can be."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._ask("POST", "/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=metrics)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What has been logged since the last look: `performance` (the network's too), `browser`."""
        return self._ask("POST", "/se/log", type=kind)


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with the empty *profile*, until the end of the block."""
    assert DRIVER is not None
    driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        line = next(line for line in driver.stdout if "started successfully on port" in line)
        address = f"http://127.0.0.1:{line.rstrip().rstrip('.').rsplit(' ', 1)[1]}/session"
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}", "--window-size=1200,900"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"}}
        answer = requests.post(address, json={"capabilities": {"alwaysMatch": wanted}}, timeout=60).json()["value"]
        assert "sessionId" in answer, answer
        address = f"{address}/{answer['sessionId']}"
        yield Browser(address)
        requests.delete(address, timeout=60)
    finally:
        driver.terminate()
        driver.wait()
