"""A page in headless Chromium, spoken to over a pipe in the DevTools protocol."""

import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

PROGRAM = shutil.which("chromium")

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update"),
    *("--disable-background-networking", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe"),
)


class Chromium:
    """One browser with one page; every wait ends after ``timeout_s``."""

    def __init__(self, timeout_s: float = 20.0) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._number = 0
        self._unread = b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        assert PROGRAM is not None
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()

        def take_pipes() -> None:
            # Chromium reads from 3 and writes to 4; the copies must not lie on these numbers themselves.
            ends = os.dup(to_browser), os.dup(from_browser)
            for end, number in zip(ends, (3, 4), strict=True):
                os.dup2(end, number)

        self._process = subprocess.Popen(
            [PROGRAM, *_FLAGS, f"--user-data-dir={self._folder.name}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=take_pipes,
            close_fds=False,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        os.set_blocking(self._read, False)
        self._session = ""
        pages = [one for one in self.send("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        target = pages[0]["targetId"] if pages else self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.send("Performance.enable", timeDomain="threadTicks")
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._write)
        os.close(self._read)
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=10)
        self._folder.cleanup()

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer; what comes before it is kept in ``events``."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            if time.monotonic() > self._deadline:
                raise TimeoutError("chromium did not answer in time")
            try:
                self._unread += os.read(self._read, 1 << 20)
            except BlockingIOError:
                time.sleep(0.005)
        line, _, self._unread = self._unread.partition(b"\0")
        return json.loads(line)

    def emulate(self, width: int = 1280, height: int = 900, scheme: str = "light", media: str = "screen") -> None:
        """Sets the size of the window, the colour scheme that the user prefers, and the medium."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", media=media, features=features)

    def open(self, file: Path) -> int:
        """Opens the file without a network and waits until all is drawn; milliseconds since the navigation began."""
        self.send("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
        self.send("Page.navigate", url=file.as_uri())
        while not (ready := self.value("document.documentElement?.dataset.ready || ''")):
            time.sleep(0.02)
        return int(ready)

    def value(self, expression: str) -> Any:
        """What the expression gives in the page."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def cpu_s(self) -> float:
        """CPU time of the page's main thread."""
        metrics = self.send("Performance.getMetrics")["metrics"]
        return next(one["value"] for one in metrics if one["name"] == "TaskDuration")

    def screenshot(self, file: Path) -> None:
        """Saves what the page looks like."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))

    def requests(self) -> list[str]:
        """Addresses asked for so far, the page itself and what is inside it (data: and blob:) left out."""
        sent = [event["params"]["request"]["url"] for event in self.events if event["method"].endswith("WillBeSent")]
        return [url for url in sent if not url.startswith(("data:", "blob:"))]

    def problems(self) -> list[str]:
        """Exceptions and console messages of the page."""
        told = []
        for event in self.events:
            if event["method"] == "Runtime.exceptionThrown":
                told.append(event["params"]["exceptionDetails"]["text"])
            elif event["method"] == "Log.entryAdded":
                told.append(event["params"]["entry"]["text"])
            elif event["method"] == "Runtime.consoleAPICalled":
                told.append(str(event["params"]["args"]))
        return told
