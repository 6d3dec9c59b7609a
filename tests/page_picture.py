"""A picture of the page of a server that runs: python -m tests.page_picture http://127.0.0.1:8000 figs/serve.png"""

import sys
from pathlib import Path

from tests.browser import Browser

SCENE = Path(__file__).parents[1] / "figs" / "scene.png"


def main(url: str, file: str) -> None:
    with Browser() as browser:
        browser.show(800, 600, scale=1.25)
        browser.open(url)
        for _ in range(2):  # the first answer warms the server up
            browser.value("part.anew.click(); part.compare.checked = true; part.question.focus()")
            browser.drop(SCENE)
            browser.wait("pictures.length === 1")
            browser.write("What do you see?")
            browser.press("Enter", 13, "\r")
            browser.wait("running === null")
        Path(file).write_bytes(browser.screenshot())


if __name__ == "__main__":
    main(*sys.argv[1:])
