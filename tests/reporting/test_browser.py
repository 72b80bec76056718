"""The page as a browser shows it: no errors, no sideways scrolling on a phone, both colour schemes, whole in print."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from bs_exp.records.record import Status
from bs_exp.reporting.report import write_report
from tests.support import synthetic

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
BROWSER = next((found for name in _NAMES if (found := shutil.which(name))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(_NAMES)} is on the PATH")

# Asks a page in a frame as wide as a phone; the answer is printed as JSON. The script of the page itself runs too.
_PROBE = """<!doctype html><title>probe</title>
<iframe id="frame" src="PAGE" style="width:WIDTHpx;height:2000px"></iframe>
<pre id="answer"></pre><script>
addEventListener("load", () => {
  const frame = document.getElementById("frame").contentDocument, view = frame.defaultView;
  const table = frame.querySelector("table.sortable");
  const column = () =>
    [...table.tBodies[0].rows].filter((r) => !r.classList.contains("dense")).map((r) => r.cells[0].dataset.v);
  table.tHead.rows[0].cells[0].querySelector("button").click();
  const up = column();
  table.tHead.rows[0].cells[0].querySelector("button").click();
  view.location.hash = "#run-1";
  setTimeout(() => {
    document.getElementById("answer").textContent = JSON.stringify({
      width: frame.documentElement.scrollWidth,
      up: up.map(Number), down: column().map(Number),
      opened: frame.getElementById("run-1").open,
      scripts: frame.scripts.length,
      injected: view.injected === undefined,
      background: view.getComputedStyle(frame.body).backgroundColor,
      ink: view.getComputedStyle(frame.querySelector(".plot")).color,
      letters: Math.min(...[...frame.querySelectorAll(".plot text")].map((t) => t.getBoundingClientRect().height)),
    });
  }, 50);
});
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two models with everything in it, and an attempt to run a script."""
    evil = "<script>window.injected = 1</script>"
    records = [synthetic.record(m, r) for m in ("svd", "basis_sharing", "best") for r in (0.2, 0.4, 0.6)]
    records += [synthetic.record("drank", 0.4, status=Status.FAILED), synthetic.record(evil, 0.2)]
    records += [synthetic.record("basis_sharing", r, hub="huggyllama/llama-7b") for r in (0.2, 0.4)]
    folder = synthetic.write(records, tmp_path_factory.mktemp("page"))
    return write_report([folder], folder / "report").folder / "index.html"


def _browse(url: str, profile: Path, *options: str, dark: bool = False) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    # Without a sandbox: containers forbid it, and the page is ours. Files may look into each other for the probe.
    fixed = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    fixed += ["--no-first-run", "--disable-background-networking", "--allow-file-access-from-files"]
    command = [BROWSER, *fixed, *scheme, f"--user-data-dir={profile}", "--enable-logging=stderr", *options, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done


def _console(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def _probe(page: Path, profile: Path, width: int, *, dark: bool = False) -> tuple[dict[str, Any], list[str]]:
    probe = profile / f"probe-{width}-{dark}.html"
    probe.write_text(_PROBE.replace("PAGE", page.as_uri()).replace("WIDTH", str(width)), encoding="utf-8")
    done = _browse(probe.as_uri(), profile, "--virtual-time-budget=4000", "--dump-dom", dark=dark)
    answer = re.search(r'<pre id="answer">(.*?)</pre>', done.stdout, re.DOTALL)
    assert answer is not None and answer[1], done.stdout[-2000:]
    found: dict[str, Any] = json.loads(answer[1])
    return found, _console(done)


def test_on_a_phone_in_both_schemes(page: Path, tmp_path: Path) -> None:
    light, errors = _probe(page, tmp_path, 390)
    dark, more = _probe(page, tmp_path, 390, dark=True)
    assert errors + more == []
    assert light["width"] == 390  # tables scroll, the page does not
    assert light["scripts"] == 1 and light["injected"]
    assert light["up"] == sorted(light["up"]) and light["down"] == sorted(light["up"], reverse=True)
    assert light["opened"]
    assert light["letters"] > 7  # pixels: letters of figures stay readable
    assert light["background"] != dark["background"]
    assert light["ink"] == "rgb(31, 35, 41)" and dark["ink"] == "rgb(230, 233, 238)"


def _screenshot(page: Path, folder: Path, *, dark: bool) -> np.ndarray:
    picture = folder / f"{dark}.png"
    done = _browse(page.as_uri(), folder, "--window-size=1280,1800", f"--screenshot={picture}", dark=dark)
    assert _console(done) == []
    pixels: np.ndarray = matplotlib.image.imread(picture)[..., :3]
    return pixels


def test_screenshots_show_a_page_with_figures(page: Path, tmp_path: Path) -> None:
    for dark in (False, True):
        pixels = _screenshot(page, tmp_path, dark=dark)
        assert pixels.shape[:2] == (1800, 1280)
        brightness = pixels.mean()
        assert brightness < 0.25 if dark else brightness > 0.85
        # Lines in the colours of the page's scheme: saturated pixels, of several hues.
        spread = pixels.max(axis=2) - pixels.min(axis=2)
        assert (spread > 0.35).sum() > 2000
        hues = {tuple(np.round(colour, 1)) for colour in pixels[spread > 0.5]}
        assert len(hues) > 4


def _streams(pdf: bytes) -> Iterator[bytes]:
    for found in re.finditer(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL):
        try:
            yield zlib.decompress(found[1])
        except zlib.error:  # a stream that is not compressed
            yield found[1]


def _pages(pdf: bytes) -> int:
    return len(re.findall(rb"/Type\s*/Page\b", b"".join([pdf, *_streams(pdf)])))


@pytest.mark.slow
def test_print_holds_what_is_folded_on_the_screen(page: Path, tmp_path: Path) -> None:
    def printed(source: Path) -> bytes:
        pdf = tmp_path / f"{source.stem}.pdf"
        done = _browse(source.as_uri(), tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={pdf}")
        assert _console(done) == []
        return pdf.read_bytes()

    whole = printed(page)
    assert whole.startswith(b"%PDF")
    # Without its folded parts, the same page is shorter.
    text = page.read_text(encoding="utf-8")
    cut = tmp_path / "cut.html"
    cut.write_text(re.sub(r"(<summary>.*?</summary>).*?</details>", r"\1</details>", text, flags=re.DOTALL), "utf-8")
    assert _pages(whole) > _pages(printed(cut)) > 2


def test_nothing_is_asked_of_a_network(page: Path, tmp_path: Path) -> None:
    log: Sequence[str]
    record = tmp_path / "net.json"
    _browse(page.as_uri(), tmp_path, f"--log-net-log={record}", "--dump-dom")
    log = re.findall(r'"url":"(https?://[^"]*)"', record.read_text(encoding="utf-8", errors="replace"))
    # The browser's own errands go to its makers.
    assert not [url for url in log if not re.match(r"https?://([\w-]+\.)*(google|googleapis|gvt1|gstatic)\.com", url)]
