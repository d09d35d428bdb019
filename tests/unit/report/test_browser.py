"""The page in a browser without a window: it works, at two widths, from a file and without a word of complaint."""

import shutil

import pytest

from fewstep.report.page import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no chromium on this machine: apt-get install chromium", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
WIDTHS = {"desktop": (1280, 900), "phone": (375, 740)}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        started = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture(params=WIDTHS)
def page(request, browser, make_run):
    """Two runs' page, opened; at its end it has complained of nothing and asked for nothing but itself."""
    path = write_report([make_run("first"), make_run("second", method="sid", every=80, done=400)])
    width, height = WIDTHS[request.param]
    opened = browser.new_page(viewport={"width": width, "height": height})
    said, asked = [], []
    opened.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda made: asked.append(made.url) if not made.url.startswith("data:") else None)
    opened.goto(path.as_uri())
    opened.wait_for_function("window.Bokeh && Bokeh.documents.length && Bokeh.documents[0].is_idle")
    yield opened
    opened.close()
    assert said == []
    assert asked == [path.as_uri()]


def shown(page):
    """The iterations of the grids that are seen, one a run."""
    images = page.locator(".frames img").all()
    return [image.get_attribute("data-iteration") for image in images if image.is_visible()]


def test_slider_moves_the_grids(page):
    """By its value and by the keyboard; a run shows its last grid until then, and its first before."""
    slider = page.get_by_role("slider")
    assert page.locator("#at").inner_text() == "600" and shown(page) == ["600", "400"]
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#at").inner_text() == "500" and shown(page) == ["500", "400"]
    page.keyboard.press("Home")
    assert slider.get_attribute("aria-valuetext") == "iteration 80" and shown(page) == ["100", "80"]
    slider.fill("4")
    assert page.locator("#at").inner_text() == "240" and shown(page) == ["200", "240"]


def test_play_goes_through_training_and_stops_at_its_end(page):
    page.get_by_role("slider").fill("7")
    page.get_by_role("button", name="Play").click()
    page.get_by_role("button", name="Stop").wait_for()
    page.get_by_role("button", name="Play").wait_for()
    assert shown(page) == ["600", "400"]


def test_hover_tells_a_curves_numbers(page):
    chart = page.locator(".chart[data-name='dm'] .bk-Figure")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
    page.locator(".bk-Tooltip >> text=iteration").first.wait_for()
    page.locator(".bk-Tooltip >> text=second").first.wait_for()
    assert page.locator(".bk-Tooltip >> text=dm").first.is_visible()


def test_nothing_is_wider_than_the_window(page):
    """Tables scroll by themselves; the page does not, sideways.  Folded charts are drawn when they are opened."""
    for summary in page.locator("summary").all():
        summary.click()
    page.wait_for_timeout(300)
    width = page.evaluate("document.documentElement.clientWidth")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = [chart.bounding_box() for chart in page.locator(".chart .bk-Figure").all()]
    assert len(sizes) == 7
    assert all(0 < size["width"] <= width and size["height"] > 100 for size in sizes)


def test_every_control_is_reached_by_the_keyboard_and_named(page):
    names = page.evaluate(
        """() => [...document.querySelectorAll('button, input, summary, nav a')]
        .filter((x) => x.tabIndex < 0 || !(x.innerText || x.labels?.[0]?.innerText || x.ariaLabel))
        .map((x) => x.outerHTML.slice(0, 80))"""
    )
    assert names == []
