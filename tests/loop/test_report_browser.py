"""The page in headless Chromium, where it is installed: no error, no script, nothing wider than the screen, quick."""
from __future__ import annotations

import functools
import html
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from loop.report import training
from loop.report.page import write_page
from report_folder import HOSTILE, make_items, make_run, picture

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
# Loads the page in frames as wide as screens are, and writes down what it finds there.
PROBE = """<!DOCTYPE html><title>probe</title><body><script>
const found = [];
function load(width) {
  const frame = document.createElement("iframe"), start = performance.now();
  frame.width = width; frame.height = 900; frame.src = "report.html";
  frame.onload = () => {
    const page = frame.contentDocument, root = page.documentElement;
    found.push({width, seconds: (performance.now() - start) / 1000, wide: root.scrollWidth, high: root.scrollHeight,
                scripts: page.scripts.length, title: page.title, rows: page.querySelectorAll("article").length,
                shown: [...page.images].every(image => image.naturalWidth > 0),
                question: page.querySelector(".question").textContent});
    if (width > 400) load(400);
    else document.body.innerHTML = "<pre>" + encodeURIComponent(JSON.stringify(found)) + "</pre>";
  };
  document.body.append(frame);
}
load(1280);
</script>"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of a server of the test's folder."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_in_a_browser(tmp_path: Path, served: str) -> None:
    """2,000 items with hostile questions and answers, at 1280 and at 400 pixels."""
    make_run(tmp_path / "run", count=2000, text=HOSTILE)
    items = make_items(2000, question=HOSTILE, image=picture(300, 200, "JPEG"))
    write_page(tmp_path / "report.html", training.training_page(tmp_path / "run", items))
    (tmp_path / "probe.html").write_text(PROBE)
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--enable-logging=stderr", "--dump-dom", f"{served}/probe.html"],
        capture_output=True, text=True, timeout=180)
    crowded = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))          # what else the cores are busy with
    told = re.search("<pre>(.+?)</pre>", done.stdout)
    assert told, done.stderr[-2000:]
    wide, narrow = json.loads(unquote(html.unescape(told[1])))
    for seen in (wide, narrow):
        assert seen["scripts"] == 0 and seen["title"] == "bar: promoted" and seen["shown"]
        assert seen["question"] == HOSTILE and seen["rows"] == 200
        assert seen["wide"] <= seen["width"] and seen["high"] > 5000
        assert seen["seconds"] < 2 * crowded
    assert "CONSOLE" not in done.stderr
