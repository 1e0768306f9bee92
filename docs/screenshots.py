"""Looks at the built site in a browser: pictures of each page, and what a picture does not show.

    nox -s screenshots                     # builds the site and writes pictures to .build/screenshots
    python docs/screenshots.py SITE OUT    # the same of a site that is built

Each page is opened at a desktop's and a phone's width, light and dark. It is wrong if the page scrolls sideways, if
something does not load, if it asks another host for anything, or if text has less contrast than 4.5 to 1 (WCAG 2.1,
1.4.3). It needs playwright and an installed Chromium or Chrome; the browser gets no network.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WIDTHS = {"desktop": 1280, "phone": 390}
SCHEMES = ("light", "dark")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Pages whose pictures are kept; all are checked.
PICTURED = ("index", "quickstart", "fuse", "numerics", "migration", "models", "api/modules", "variants", "design")
PICTURE_HEIGHT = 2400
# A page with each fault, which has to be found wherever the others are looked at.
PLANTED = """<article><p style="width: 2000px; color: #999">pale and wide</p></article>
<img src="gone.png"><img src="http://localhost:9/other-host.png">"""
FAULTS = ("wider than the window", "contrast", "does not find", "asks for")

# Returns the widest overflow of the page, in pixels.
OVERFLOW = "document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth"
# Returns texts whose contrast with the nearest background that is set is too small.
CONTRAST = """() => {
  const rgb = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = rgb(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const low = new Map();
  for (const element of document.querySelectorAll("article *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    const [a, b] = [luminance(rgb(getComputedStyle(element).color)), luminance(ground(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) low.set(element.tagName + "." + element.className, contrast.toFixed(2));
  }
  return [...low].map(([what, contrast]) => `contrast ${contrast} of ${what}`);
}"""


def browser_path() -> str | None:
    """Return the path of an installed Chromium or Chrome, or None."""
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


def pages_of(site: Path) -> list[str]:
    """Return the names of the pages of a built site, without `.html`."""
    inside = sorted(path.relative_to(site) for path in site.rglob("*.html"))
    return [path.with_suffix("").as_posix() for path in inside if path.parts[0] not in ("_static", "_sources")]


def looked_at(site: Path, out: Path | None = None) -> Iterator[str]:
    """Open each page in each width and scheme, and yield what is wrong; `out` gets the pictures of some."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox", "--disable-gpu"])
        for scheme in SCHEMES:
            for device, width in WIDTHS.items():
                context = browser.new_context(
                    viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True, reduced_motion="reduce"
                )
                tab = context.new_page()
                asked: list[str] = []
                tab.on("request", lambda request: asked.append(request.url))
                failed: list[str] = []
                tab.on("requestfailed", lambda request: failed.append(request.url))
                for name in pages_of(site):
                    asked.clear(), failed.clear()
                    for wrong in _wrong(tab, site, name, asked, failed):
                        yield f"{name}, {device}, {scheme}: {wrong}"
                    if out is not None and name in PICTURED:
                        picture = out / f"{name.replace('/', '-')}-{device}-{scheme}.png"
                        height = min(tab.evaluate("document.documentElement.scrollHeight"), PICTURE_HEIGHT)
                        clip = {"x": 0, "y": 0, "width": width, "height": height}
                        tab.screenshot(path=picture, full_page=True, clip=clip)
                context.close()
        browser.close()


def _wrong(tab: Any, site: Path, name: str, asked: list[str], failed: list[str]) -> Iterator[str]:
    tab.goto((site / f"{name}.html").as_uri(), wait_until="load")
    overflow = tab.evaluate(OVERFLOW)
    if overflow > 0:
        yield f"is {overflow} px wider than the window"
    yield from (f"asks for {url}" for url in asked if not url.startswith(("file:", "data:")))
    yield from (f"does not find {url}" for url in failed)
    yield from tab.evaluate(CONTRAST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("site", type=Path, help="the folder of the built site")
    parser.add_argument("out", type=Path, help="the folder for the pictures")
    args = parser.parse_args()
    if browser_path() is None:
        raise SystemExit(f"expected one of {', '.join(BROWSERS)} on the path, got none")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "planted.html").write_text(PLANTED)
        found = "\n".join(looked_at(Path(folder)))
    if unseen := [fault for fault in FAULTS if fault not in found]:
        raise SystemExit(f"expected to find the planted faults, got none of: {', '.join(unseen)}")
    wrong = list(looked_at(args.site.resolve(), args.out))
    print("\n".join(wrong))
    print(f"{len(pages_of(args.site))} pages, {len(wrong)} faults; pictures in {args.out}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
