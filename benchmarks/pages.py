"""Pages of `autoquant report` in headless Chromium: ``python benchmarks/pages.py --out FOLDER``.

Needs playwright (``pip install playwright``) and a Chromium (``apt-get install chromium``). Makes a page for each
subject, opens it in both themes and at the width of a phone, tries what can be done on it, and saves screenshots to
FOLDER. Writes ``benchmarks/pages.md`` and, with ``--pictures``, the README's pictures. Exits with 1 where a page does
not do what it should.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "generated_configs"
WIKINANO = ROOT / "autoquant" / "data" / "wikinano1m"
SUBJECTS = ("llama", "wikinano1m", "qwen3_moe", "deepseek_v3", "gemma2", "speech-seq2seq/whisper", "deep")
VIEWS = (("light", 1280), ("dark", 1280), ("light", 400))
RUN = [sys.executable, "-m", "autoquant"]
PICTURE = """
nav { position: static !important }
section:not(#layers, #tokens), #layers h3:nth-of-type(n+2), #layers h3:nth-of-type(n+2) ~ * { display: none !important }
"""
"""What of a page the README shows."""
HEAD = """# Pages of `autoquant report`

`python benchmarks/pages.py --out out/pages`, headless Chromium {version}, {cores} cores: each page in the light and
the dark theme at 1280 pixels, and at 400. 'opened': until what is in view is drawn, the slowest of the three; 'made':
processor seconds of the command (wikinano1m with its weights and a text). What was tried: nothing is asked of the
network, no message on the console, nothing wider than the window, every figure drawn and named, groups chosen by
keyboard, tables that open, each choice of a list, the theme that changes.

| config | MB | made, s | opened, s | works |
|---|---:|---:|---:|---|
"""


def config_of(name: str, out: Path) -> Path:
    """The committed config, or one made for this: 126 layers with 256 experts, or the packaged model's."""
    if name not in ("wikinano1m", "deep"):
        return CONFIGS / f"{name}.json"
    path = out / f"{name}.json"
    if name == "deep":
        text = (CONFIGS / "deepseek_v3.json").read_text()
        text = text.replace('"layers": 61', '"layers": 126').replace('3-60"', '3-125"').replace('0-60"', '0-125"')
        path.write_text(text.replace('"model": "deepseek_v3"', '"model": "126 layers, 256 experts"').replace("../", ""))
    else:
        model = str(WIKINANO.relative_to(ROOT))
        subprocess.run([*RUN, "analyze", model, "-o", str(path), "--force", "--quiet"], check=True, cwd=ROOT)
    return path


def made(name: str, out: Path) -> tuple[Path, float]:
    """The page, and the processor seconds that it took."""
    page = out / f"{Path(name).name}.html"
    model = ["--model", str(WIKINANO)] if name == "wikinano1m" else []
    command = [*RUN, "report", str(config_of(name, out)), *model, "-o", str(page), "--force", "--quiet"]
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_utime + used.ru_stime)"
    )
    seconds = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True).stdout
    return page, float(seconds)


def opened(browser: Any, path: Path, theme: str, width: int, out: Path) -> tuple[float, list[str]]:
    """Seconds until everything that is in view is drawn, and what is wrong. Saves a screenshot of the whole page."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
    page, wrong = context.new_page(), []
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request", lambda r: wrong.append(f"asks for {r.url}") if not r.url.startswith(("file:", "data:")) else None
    )
    started = time.perf_counter()
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready] canvas")
    seconds = time.perf_counter() - started
    wrong += tried(page, theme, width)
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(200)
    page.screenshot(path=out / f"{path.stem}-{theme}-{width}.png", full_page=True)
    context.close()
    return seconds, wrong


def tried(page: Page, theme: str, width: int) -> list[str]:
    """What does not work: nothing wider than the window, every figure drawn and named, groups by mouse and keyboard."""
    wrong = []
    for _ in range(40):
        page.mouse.wheel(0, 600)
        page.wait_for_timeout(20)
    if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
        wrong.append("the page is wider than the window")
    script = "[...document.querySelectorAll('.chart')].filter((c) => !c.querySelector('canvas')).map((c) => c.id)"
    blank = page.evaluate(script)
    wrong += [f"{one} is not drawn" for one in blank]
    if page.locator(".chart:not([aria-label]), select:not([id]), button:empty").count():
        wrong.append("something has no name for a screen reader")
    button = page.locator("ul.groups button").first
    button.focus()
    page.keyboard.press("Enter")
    if button.get_attribute("aria-pressed") != "true":
        wrong.append("the keyboard does not choose a group")
    page.keyboard.press("Space")
    if button.get_attribute("aria-pressed") != "false":
        wrong.append("the keyboard does not let go of a group")
    page.locator("summary").first.click()
    if not page.locator("details[open] table").first.is_visible():
        wrong.append("the table beside a figure does not open")
    page.locator("summary").first.click()
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click()
    if page.evaluate("getComputedStyle(document.body).backgroundColor") == before:
        wrong.append("the theme does not change")
    page.locator("#theme").click()
    for select in page.locator("select").all():  # each choice, and back to what the page chose
        chosen = select.input_value()
        for value in select.evaluate("(one) => [...one.options].map((option) => option.value)"):
            select.select_option(value)
        select.select_option(chosen)
    return wrong


def pictures(browser: Any, path: Path) -> None:
    """The README's: the top of the packaged model's page, and its tokens, in both themes."""
    for theme in ("light", "dark"):
        context = browser.new_context(viewport={"width": 1180, "height": 900}, color_scheme=theme)
        page = context.new_page()
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready] canvas")
        page.add_style_tag(content=PICTURE)
        page.mouse.wheel(0, 3000)
        page.wait_for_timeout(800)
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=ROOT / "docs" / f"report-{theme}.png", full_page=True)
        context.close()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--only", default=",".join(SUBJECTS))
    parser.add_argument("--pictures", action="store_true")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows, failed = [], False
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox"])
        for name in arguments.only.split(","):
            page, seconds = made(name, out)
            found = [opened(browser, page, theme, width, out) for theme, width in VIEWS]
            wrong = list(dict.fromkeys(text for _, problems in found for text in problems))
            slowest = max(seconds for seconds, _ in found)
            failed |= bool(wrong)
            size = page.stat().st_size / 1e6
            rows.append(f"| {name} | {size:.2f} | {seconds:.1f} | {slowest:.2f} | {'; '.join(wrong) or 'all'} |")
            print(rows[-1], flush=True)
            if arguments.pictures and name == "wikinano1m":
                pictures(browser, page)
        version = browser.version
        browser.close()
    if arguments.only == ",".join(SUBJECTS):
        text = HEAD.format(version=version.split(".")[0], cores=os.cpu_count()) + "\n".join(rows) + "\n"
        (ROOT / "benchmarks" / "pages.md").write_text(text, encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
