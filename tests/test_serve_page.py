"""The server's page, as a headless Chromium shows it."""

import json
import re
import time
from io import BytesIO

import httpx
import numpy as np
import pytest
from browser import CHROMIUM, Browser
from PIL import Image
from served import KEY, NAME, Served, expected, questions

from vispec import embedded
from vispec.evaluation.loading import load_model
from vispec.prompts import Turn, load_processor, user_turn
from vispec.serve.guard import HttpLimits
from vispec.serve.service import Service, ServiceLimits

in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium (Debian's package) is installed")


@pytest.fixture(scope="module")
def processor():
    return load_processor(str(embedded.TARGET))


@pytest.fixture(scope="module")
def model():
    return load_model(*embedded.require_weights(), dtype="float32", tree=embedded.TREE_NAME)


@pytest.fixture(scope="module")
def served(model, processor):
    served = Served(Service(model, processor, NAME, ServiceLimits(batch=1, tokens=600)), HttpLimits(api_key=KEY))
    yield served
    served.close()


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture
def page(browser, served):
    """Open, on a screen of a desk, with the server's key."""
    browser.errors.clear()
    browser.show(900, 900)
    browser.open(served.url)
    browser.wait("document.activeElement === part.key")  # since the server wants one
    browser.write(KEY)
    browser.press("Tab", 9)
    browser.wait("model !== null")
    yield browser
    assert browser.errors == []


def tab_to(page: Browser, name: str) -> None:
    for _ in range(10):
        if page.value("document.activeElement.id") == name:
            return
        page.press("Tab", 9)
    raise AssertionError(f"the tabulator does not lead to {name}")


def drop(page: Browser, file) -> None:
    page.drop(file)
    page.wait("pictures.length === 1")


def ask(page: Browser, text: str, longest: int | str = "") -> None:
    page.value(f"part.longest.value = {json.dumps(longest)}; part.question.focus()")
    page.write(text)
    page.press("Enter", 13, "\r")


def answered(page: Browser) -> list[str]:
    page.wait("running === null")
    return page.value("[...document.querySelectorAll('.answer')].map((one) => one.textContent)")


def colour(page: Browser, what: str, selector: str) -> tuple[int, ...]:
    found = page.value(f"getComputedStyle(document.querySelector('{selector}')).{what}")
    return tuple(map(int, re.findall(r"\d+", found)))[:3]


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """As WCAG 2 defines it."""

    def luminance(rgb):
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (value / 255 for value in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_the_page_is_one_file_that_asks_nobody_else(served):
    answer = httpx.get(served.url)
    assert answer.status_code == 200
    assert not re.search(r"https?:|url\(|@import|\b(src|href)=\"(?!data:)", answer.text)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


@in_chromium
def test_the_keyboard_asks_about_a_dropped_picture_with_and_without_a_draft(page, model, processor):
    [(image, text)] = questions(1)
    drop(page, embedded.questions()[0][0])
    tab_to(page, "question")
    page.write(text)
    tab_to(page, "compare")
    page.press(" ", 32, " ")
    tab_to(page, "longest")
    page.write("40")
    tab_to(page, "ask")
    page.press("Enter", 13, "\r")
    assert answered(page) == [expected(model, processor, user_turn(image, text))] * 2
    drafted = page.value(
        "[...document.querySelectorAll('.answer')].map((one) => one.querySelectorAll('mark').length)"
    )
    assert 0 < drafted[0] < 40 and drafted[1] == 0
    rows = page.value("[...document.querySelectorAll('tbody tr')].map((row) => row.innerText.split('\\t'))")
    assert [(row[0], row[3]) for row in rows] == [("With the draft", "40"), ("Plain decoding", "40")]
    assert float(rows[0][1]) > 0 and float(rows[1][1]) > 0  # tokens/s
    assert 1 < float(rows[0][2]) < 8 and rows[1][2] == "–"  # τ
    green = colour(page, "backgroundColor", ".answer mark")
    pixels = np.asarray(Image.open(BytesIO(page.screenshot())).convert("RGB"))
    assert (pixels == green).all(-1).sum() > 100 * drafted[0]


@in_chromium
def test_further_turns_know_those_before(page, model, processor):
    [(image, text)] = questions(1)
    drop(page, embedded.questions()[0][0])
    ask(page, text, 30)
    [first] = answered(page)
    ask(page, "Count the pink things.", 10)
    turns = [user_turn(image, text), Turn("assistant", (first,)), user_turn("Count the pink things.")]
    assert answered(page) == [first, expected(model, processor, *turns, new=10)]
    page.value("part.anew.click()")
    assert answered(page) == []
    assert page.value("messages") == []


@in_chromium
def test_an_answer_is_stopped(page, served):
    page.value("part.compare.checked = true")
    ask(page, "Give me a full account of the image.")
    page.wait("document.querySelector('.answer')?.textContent")
    page.press("Escape", 27)
    assert answered(page)[0]
    assert page.value("part.state.textContent") == "Stopped."
    assert page.value("document.activeElement.id") == "question"
    deadline = time.monotonic() + 5
    while served.service.engine._rows and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not served.service.engine._rows


@in_chromium
def test_errors_are_one_line_and_the_question_stays(page, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    drop(page, tmp_path / "broken.png")
    ask(page, "What is this?")
    assert answered(page) == []
    assert "cannot be read as a picture" in page.value("part.wrong.textContent")
    assert page.value("[part.question.value, pictures.length, messages.length]") == ["What is this?", 1, 0]
    page.value("part.key.value = 'wrong'; choose([]); part.form.requestSubmit()")
    assert answered(page) == []
    assert page.value("part.wrong.innerText") == "the API key is missing or wrong"


@in_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_in_the_light_and_in_the_dark(page, scheme):
    page.show(320, 640, scheme)
    drop(page, embedded.questions()[0][0])
    page.value("part.compare.checked = true")
    ask(page, "Give me a full account of the image.", 20)
    answered(page)
    drop(page, embedded.questions()[1][0])
    assert page.value("document.documentElement.scrollWidth") <= 320
    ground = colour(page, "backgroundColor", "body")
    assert (sum(ground) > 384) == (scheme == "light")
    for text, behind in (("body", "body"), (".answer mark", ".answer mark"), (".hint", "body"), ("#ask", "#ask")):
        assert contrast(colour(page, "color", text), colour(page, "backgroundColor", behind)) >= 4.5
    assert contrast(colour(page, "color", "#wrong"), colour(page, "backgroundColor", "form")) >= 4.5
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    named = {"button", "switch", "spinbutton", "textbox", "image", "log", "list"}
    found = [(node["role"]["value"], node["name"]["value"]) for node in nodes if node["role"]["value"] in named]
    assert {role for role, _ in found} == named
    assert all(name for _, name in found), found


@in_chromium
def test_nothing_moves_for_who_wants_that(page):
    ask(page, "What?", 5)
    answered(page)
    page.value("document.querySelector('article').setAttribute('aria-busy', 'true')")
    for wish, moves in (("no-preference", 1), ("reduce", 0)):
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": wish}])
        assert page.value("document.getAnimations().length") == moves
