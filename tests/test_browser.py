"""Pages in a browser: nothing fails, nothing sticks out, everything can be read, on a phone and at night.

Needs Chromium (Debian: `apt install chromium`); skipped where there is none.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pages
import pytest

import resprobe as rp
from studies import scorecard

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="needs Chromium: none of chromium, chromium-browser, google-chrome"
)

WIDTHS = (390, 950, 1600)

# What the page looks like inside frames as wide as screens are. Contrast as WCAG 2.2 defines it, of every element that has
# text of its own, with the nearest background behind it.
HARNESS = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">
<script>
const luminance = colour => colour.map(c => c / 255)
  .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const channels = text => text.match(/[\\d.]+/g).map(Number);
const behind = element => {
  for (; element; element = element.parentElement) {
    const colour = channels(getComputedStyle(element).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour.slice(0, 3);
  }
  return [255, 255, 255];
};
const contrast = element => {
  const both = [luminance(channels(getComputedStyle(element).color)), luminance(behind(element))].sort((a, b) => b - a);
  return (both[0] + 0.05) / (both[1] + 0.05);
};
const look = frame => {
  const page = frame.contentDocument, root = page.documentElement, all = [...page.body.querySelectorAll("*")];
  const start = element => element.outerHTML.slice(0, 80);
  const spoken = all.filter(element => element.getClientRects().length
    && [...element.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.data.trim()));
  return {
    dark: frame.contentWindow.matchMedia("(prefers-color-scheme: dark)").matches,
    background: behind(page.body),
    width: root.clientWidth,
    needed: root.scrollWidth,
    outside: all.filter(element => !element.closest(".scroll, .unseen")
      && element.getBoundingClientRect().right > root.clientWidth + 0.5).map(start),
    images: [...page.images].map(image => ({
      loaded: image.complete && image.naturalWidth > 0, shown: image.getClientRects().length > 0, of: image.className})),
    texts: spoken.length,
    faint: spoken.filter(element => contrast(element) < 4.5).map(element => [contrast(element), start(element)]),
  };
};
addEventListener("load", () => {
  const result = document.createElement("pre");
  result.id = "found";
  result.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(look));
  document.body.append(result);
});
</script>
"""
FRAME = '<iframe src="{page}" style="width: {width}px; height: 30000px; border: 0"></iframe>\n'


def look(page: Path, tmp_path: Path, *, dark: bool) -> tuple[list[dict], list[str]]:
    """What the harness found at each width, and what the browser's console said."""
    frames = tmp_path / "frames.html"
    frames.write_text(HARNESS + "".join(FRAME.format(page=page.as_uri(), width=width) for width in WIDTHS))
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1600,1200",
        "--virtual-time-budget=10000",
        "--dump-dom",
        frames.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    result = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert result, done.stderr
    return json.loads(html.unescape(result[1])), re.findall(r"CONSOLE.*", done.stderr)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    report = pages.write(folder / "awkward")
    words = ("holds", "fails", "inconclusive", "not tested")
    rows = [
        scorecard.Row(claim, "awkward", word, "1 ± 2 % " + pages.WORDS, "p = 0.01", "quick", folder=folder / "awkward")
        for claim, word in zip(pages.claims(), words, strict=True)
    ]
    scorecard.write([*rows, scorecard.Row(rp.Claim("C9", "Not tested", "§1", "–", "–"))], folder / "scorecard")
    return {"report": report, "scorecard": folder / "scorecard" / "report.html"}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["report", "scorecard"])
def test_a_page_fits_every_screen_and_can_be_read(written, tmp_path, name, dark):
    screens, console = look(written[name], tmp_path, dark=dark)
    assert console == []
    assert [found["width"] for found in screens] == list(WIDTHS)
    for found in screens:
        assert (found["dark"], found["background"]) == (dark, [22, 24, 27] if dark else [255, 255, 255])
        assert found["needed"] <= found["width"]
        assert found["outside"] == []
        assert found["images"] and all(image["loaded"] for image in found["images"])
        assert found["texts"] > 20
        assert found["faint"] == []  # WCAG 2.2, 1.4.3, level AA


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_follow_the_page(written, tmp_path, scheme):
    screens, _ = look(written["report"], tmp_path, dark=scheme == "dark")
    for found in screens:
        assert [image["of"] for image in found["images"] if image["shown"]] == [scheme] * 2
        assert len(found["images"]) == 4


def test_the_harness_finds_what_is_wrong(tmp_path):
    page = tmp_path / "wrong.html"
    page.write_text(
        '<!doctype html><html><meta charset="utf-8"><body style="background: #fff"><img src="none.png" alt="">'
        '<p style="color: #999">faint</p><div style="width: 500px">wide</div><script>missing()</script>'
    )
    screens, console = look(page, tmp_path, dark=False)
    phone = screens[0]
    assert phone["needed"] > 390 and any("500px" in element for element in phone["outside"])
    assert screens[1]["outside"] == []  # 500 pixels fit there
    assert not phone["images"][0]["loaded"]
    ((ratio, element),) = phone["faint"]
    assert ratio == pytest.approx(2.85, abs=0.01) and "faint" in element
    assert any("missing is not defined" in line for line in console)
