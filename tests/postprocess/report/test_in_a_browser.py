"""The report in headless Chromium: it loads nothing, complains of nothing, and fits a phone.

Skipped where there is no Chromium with its driver: on Debian and Ubuntu, apt-get install chromium chromium-driver.
"""

import json
import shutil
from contextlib import contextmanager

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from tests.postprocess.report import reported
from tests.postprocess.report.reported import FOUR, Row

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
LONG = "https://example.org/" + "a-word-without-an-end" * 30
INJECTED = '<img src=x onerror="window.broken = 1"><a id="bad" href="javascript:window.broken = 1">bad</a>'
ARABIC = "ما هي عاصمة مصر؟"
ROWS = (
    *FOUR,
    Row(0.9, 0.8, "model_b", prompt=ARABIC, a="القاهرة", b="الإسكندرية", language="Arabic"),
    Row(0.9, 0.8, "model_b", prompt=LONG, a="<img src=x onerror=alert(1)>", b="word " * 400, language="L" * 300),
)

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its driver (chromium, chromium-driver)")


@contextmanager
def browser(profile):
    """Chromium with a profile of its own, and the driver that is here: selenium is to look for none."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page's address and a browser, for all tests."""
    folder = tmp_path_factory.mktemp("browser")
    file = folder / "report.html"
    file.write_text(reported.render(reported.write_run(folder / "tiny", ROWS)), encoding="utf-8")
    with browser(folder / "profile") as driver:
        yield driver, file.as_uri()


@pytest.fixture
def opened(page):
    """The browser with the page in its first state."""
    driver, address = page
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    driver.get_log("performance")
    driver.get_log("browser")
    driver.get(address)
    return driver


def test_the_page_asks_nothing_of_a_network_and_complains_of_nothing(opened):
    assert opened.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    assert asked == [opened.current_url]


def test_no_script_runs_in_it(opened):
    """Were the escaping ever broken, the content security policy would still hold."""
    opened.execute_script("document.body.insertAdjacentHTML('beforeend', arguments[0])", INJECTED)
    opened.execute_script("document.getElementById('bad').click()")
    assert opened.execute_script("return window.broken") is None
    assert any("Content Security Policy" in entry["message"] for entry in opened.get_log("browser"))


@pytest.mark.parametrize("width", [320, 1280])
def test_the_page_is_never_wider_than_the_screen_and_arabic_runs_from_the_right(opened, width):
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    measured = "const page = document.documentElement; return [page.scrollWidth - page.clientWidth, window.innerWidth]"
    assert opened.execute_script(measured) == [0, width]
    texts = {text.text: text.value_of_css_property("direction") for text in opened.find_elements(By.CSS_SELECTOR, ".text")}
    assert (texts[ARABIC], texts["Which?"]) == ("rtl", "ltr")


@pytest.mark.parametrize(
    ("media", "scheme", "ground"),
    [("", "light", "252, 252, 251"), ("", "dark", "20, 23, 26"), ("print", "dark", "255, 255, 255")],
)
def test_the_page_is_light_or_dark_as_the_reader_has_it_and_prints_on_white(opened, media, scheme, ground):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    assert ground in opened.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
    assert opened.find_element(By.TAG_NAME, "nav").is_displayed() == (media != "print")
