"""The page in a real browser: Debian's chromium, driven by playwright (`pip install playwright`).

BT_ADAPTER_SCREENSHOT names a file for the picture that README.md and docs/demo.md show.
"""

import dataclasses
import os
import re
import shutil
import statistics
from pathlib import Path

import pytest

from bt_adapter_hf.demo.clips import Clips


CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")]
MILLISECONDS = """button => new Promise(done => {
    const source = () => document.querySelector("video.player")?.getAttribute("src");
    const before = source(), start = performance.now();
    const timer = setInterval(() => {
        if (source() !== before) { clearInterval(timer); done(performance.now() - start); }
    }, 5);
    button.click();
})"""
RIGHT = "a red zero moves from the left to the right"


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, served):
    """Opens the page, as wide as asked; at the end nothing was asked of another machine and no script has failed."""
    opened, elsewhere, failed = [], [], []

    def open_one(width: int = 1280):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(60_000)
        page.on("request", lambda request: elsewhere.append(request.url))
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.goto(served[1])
        opened.append(page)
        return page

    yield open_one
    for page in opened:
        page.close()
    own = (served[1], "data:", "blob:")
    assert [url for url in elsewhere if not url.startswith(own)] == [] and failed == []


def tab(page, name: str):
    page.get_by_role("tab", name=name).click()
    return page.get_by_role("tabpanel").filter(visible=True)


def search(page):
    panel = tab(page, "Search")
    panel.get_by_label("Sentence").fill(RIGHT)
    panel.get_by_role("button", name="Search", exact=True).click()
    panel.locator("video.player").wait_for()
    return panel


def test_search_plays_what_is_clicked(open_page):
    page = open_page()
    panel = search(page)
    first = panel.locator("video.player").get_attribute("src")
    page.wait_for_function("document.querySelector('video.player').readyState >= 2")  # it plays
    hits = panel.locator("button.thumbnail-item")
    assert hits.count() == 8
    page.wait_for_function("document.querySelector('button.thumbnail-item').ariaLabel.startsWith('test-79-')")
    hits.nth(1).click()
    page.wait_for_function(
        "before => document.querySelector('video.player').getAttribute('src') !== before", arg=first
    )


def test_label(open_page, served, tmp_path):
    page = open_page()
    panel = tab(page, "Label")
    panel.locator("input[type=file]").first.set_input_files(served[0].examples[0])
    panel.get_by_text("test-79-00000").first.wait_for()
    panel.get_by_role("button", name="Label", exact=True).click()
    panel.locator("video.player").wait_for()
    best = panel.locator("h2.output-class").all_inner_texts()
    assert [text.strip() for text in best] == [RIGHT, "a red zero moves from the right to the left"]
    shot = os.environ.get("BT_ADAPTER_SCREENSHOT", str(tmp_path / "demo.png"))
    page.wait_for_timeout(1500)  # fades in
    page.screenshot(path=shot, full_page=True)
    assert Path(shot).stat().st_size > 10_000


# Texts whose contrast with the first background behind them that is not transparent is under 4.5 to 1 (WCAG 2, AA).
PALE = """() => {
    const part = c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const parse = text => text.match(/[\\d.]+/g).map(Number);
    const luminance = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
    const behind = it => { for (; it; it = it.parentElement) {
        const colour = parse(getComputedStyle(it).backgroundColor);
        if (colour.length < 4 || colour[3] === 1) return colour;
    } return document.documentElement.classList.contains("dark") ? [0, 0, 0] : [255, 255, 255]; };
    const pale = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node; node = walker.nextNode();) {
        const it = node.parentElement, words = node.data.trim();
        if (!words || it.closest("svg, video, script, style")) continue;
        if (!it.checkVisibility({visibilityProperty: true})) continue;
        const [low, high] = [parse(getComputedStyle(it).color), behind(it)].map(luminance).sort((a, b) => a - b);
        const ratio = (high + 0.05) / (low + 0.05);
        if (ratio < 4.5) pale.push(`${words.slice(0, 40)}: ${ratio.toFixed(2)}`);
    }
    return pale; }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_words_can_be_read(browser, served, scheme):
    with browser.new_context(color_scheme=scheme) as context:
        page = context.new_page()
        page.goto(served[1])
        search(page)
        for name in ("Search", "Label", "Chat", "Adapter in/out", "Over time"):
            tab(page, name)
            page.wait_for_timeout(700)  # fades in
            assert page.evaluate(PALE) == [], name


def test_ten_thousand_clips_answer_in_half_a_second(browser, served, tmp_path):
    """From the click on the button to the player of the best hit. (At rest: the median of nine is what is told.)"""
    from bt_adapter_hf.demo.page import serve
    from bt_adapter_hf.search.index import VideoIndex
    from bt_adapter_hf.search.writer import IndexWriter

    material = served[0]
    videos = list(material.encoder.encode_videos(material.examples))
    (tmp_path / "clips").mkdir()
    with IndexWriter(tmp_path / "index", material.encoder) as writer:
        for number in range(10_000):
            video = videos[number % len(videos)]
            path = tmp_path / "clips" / f"{number:05d}.mp4"
            os.link(video.path, path)
            writer.add(video._replace(path=str(path)))
    big = dataclasses.replace(material, index=VideoIndex.load(tmp_path / "index"), clips=Clips())
    with serve(big, "127.0.0.1", 0) as address:
        page = browser.new_page()
        page.goto(address)
        panel = page.get_by_role("tabpanel").filter(visible=True)
        panel.get_by_text("among 10000").wait_for()
        button = panel.get_by_role("button", name="Search", exact=True).element_handle()
        taken = []
        for text in material.texts[:3] * 3:
            panel.get_by_label("Sentence").fill(text)
            page.wait_for_timeout(100)
            taken.append(page.evaluate(MILLISECONDS, button))
            page.wait_for_timeout(1500)  # its thumbnails
        page.close()
    assert statistics.median(taken) < 500, taken


def test_chat(open_page, served):
    page = open_page()
    panel = tab(page, "Chat")
    panel.locator("input[type=file]").first.set_input_files(served[0].examples[:2])
    panel.get_by_placeholder("How does it move?").fill("How does it move?")
    page.wait_for_timeout(2000)  # the files go first
    panel.get_by_placeholder("How does it move?").press("Enter")
    panel.get_by_text(re.compile("2 videos, .* tokens each")).wait_for()
    panel.locator(".bot.message").filter(has_text="moves from").first.wait_for()


def test_adapter_in_and_out(open_page, served):
    page = open_page()
    panel = tab(page, "Adapter in/out")
    panel.locator("input[type=file]").first.set_input_files(served[0].examples[0])
    panel.get_by_text("test-79-00000").first.wait_for()
    panel.get_by_role("button", name="Ask both").click()
    panel.get_by_text("bit by bit").wait_for()
    assert panel.get_by_label("With the branch").input_value() == "it moves from the left to the right"


def test_over_time_follows_the_player(open_page, served):
    page = open_page()
    panel = tab(page, "Over time")
    panel.locator("input[type=file]").first.set_input_files(served[0].film)
    panel.get_by_text("film").first.wait_for()
    panel.get_by_role("button", name="Look").click()
    curve = panel.locator("svg.over-time")
    curve.wait_for()
    page.wait_for_function("document.querySelector('div > video.player')?.duration > 5")
    box = curve.bounding_box()
    page.evaluate("document.querySelector('svg.over-time').parentElement.querySelector('video').pause()")
    page.mouse.click(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 2)
    page.wait_for_function(
        "document.querySelector('svg.over-time').parentElement.querySelector('video').currentTime > 6"
    )
    page.wait_for_function("+document.querySelector('.over-time .cursor').getAttribute('x1') > 350")


def test_a_broken_upload_is_told(open_page, tmp_path):
    page = open_page()
    panel = tab(page, "Over time")
    (tmp_path / "words.mp4").write_text("these are words")
    panel.locator("input[type=file]").first.set_input_files(tmp_path / "words.mp4")
    panel.get_by_text("words").first.wait_for()
    panel.get_by_label("Sentence").fill("a")
    panel.get_by_role("button", name="Look").click()
    page.get_by_text("words.mp4 is not a readable video").wait_for()
    assert str(tmp_path) not in page.content()
    (tmp_path / "large.mp4").write_bytes(bytes(2 << 20))
    panel = tab(page, "Label")
    panel.locator("input[type=file]").first.set_input_files(tmp_path / "large.mp4")
    page.get_by_text(re.compile("exceeds|too large|maximum", re.IGNORECASE)).first.wait_for()


def test_two_users(open_page):
    for page in (open_page(), open_page()):
        search(page)


def test_on_a_phone_with_the_keyboard(open_page):
    page = open_page(width=390)
    panel = search(page)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")
    assert panel.locator("img:not([alt])").count() == 0  # each picture has a text in its place
    panel.get_by_label("Sentence").focus()
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.innerText || document.activeElement.tagName"))
    assert any("Search" in text for text in reached)


MAIN = {"Search": "Search", "Label": "Label", "Chat": "Message", "Adapter in/out": "Ask both", "Over time": "Look"}


def test_each_tab_by_keyboard(open_page):
    """From the row of tabs on: to a file, to where one types, to what starts it."""
    page = open_page()
    for name, button in MAIN.items():
        page.get_by_role("tab", name=name, exact=True).focus()
        page.keyboard.press("Enter")
        page.wait_for_timeout(700)
        reached = set()
        for _ in range(25):
            page.keyboard.press("Tab")
            reached.add(
                page.evaluate(
                    "(it => it.ariaLabel || it.innerText?.trim() || it.closest('label')?.innerText.trim() "
                    "|| it.placeholder || it.tagName)(document.activeElement)"
                )
            )
        said = " / ".join(sorted(reached))
        assert "pload" in said, f"{name}: {said}"
        assert button in reached or name == "Chat" and "How does it move?" in said, f"{name}: {said}"
