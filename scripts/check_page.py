"""The page of a running server in headless Chromium, by hand: needs the packages `playwright` and a Chromium.

    jaxserve serve smollm2-135m-instruct --http-port 8000
    python scripts/check_page.py http://127.0.0.1:8000 [--chromium PATH] [--screenshot docs/page.png]

A message is typed, its answer must come in pieces, the map of pages must change, the console must stay empty, and the
page must fit 400 pixels, light and dark.
"""

import argparse
import time
from typing import Any

from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

NARROW, WIDE = {"width": 400, "height": 800}, {"width": 1200, "height": 760}
QUESTION = "Write a long story about a fox."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--chromium", help="its executable (default: playwright's own)")
    parser.add_argument("--screenshot", help="of the wide page, while it answers")
    args = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        for scheme in ("dark", "light"):
            for size in (NARROW, WIDE):
                context = browser.new_context(viewport=size, color_scheme=scheme, device_scale_factor=1)
                wanted = args.screenshot if (scheme, size) == ("light", WIDE) else None
                check(context.new_page(), args.url, f"{scheme}, {size['width']} px", wanted)
                context.close()
        browser.close()


def check(page: Any, url: str, name: str, screenshot: str | None) -> None:
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(url)
    page.wait_for_function("document.querySelectorAll('#figures div').length > 0")
    before = page.get_attribute("#map", "aria-label")
    page.fill("#max_tokens", "200")
    page.fill("#text", QUESTION)
    page.keyboard.press("Enter")
    lengths: list[int] = []
    maps = set()
    deadline = time.monotonic() + 120
    while page.inner_text("#send") == "Stop" or not lengths:
        assert time.monotonic() < deadline, "no end of the answer"
        lengths.append(len("".join(page.locator(".assistant").all_inner_texts())))
        maps.add(page.get_attribute("#map", "aria-label"))
        if screenshot and len(lengths) > 20 and len(maps) > 1:
            page.screenshot(path=screenshot)
            screenshot = None
        time.sleep(0.05)
    assert len(set(lengths)) > 5, f"{name}: the answer came in {len(set(lengths))} pieces"
    assert maps - {before}, f"{name}: the map of pages did not change"
    assert "tokens/s" in page.inner_text(".assistant small"), name
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= page.viewport_size["width"], f"{name}: {width} pixels wide"
    assert said == [], f"{name}: {said}"
    print(f"ok: {name}: {len(set(lengths))} pieces, {len(maps)} maps")


if __name__ == "__main__":
    main()
