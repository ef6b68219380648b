"""The report in a real browser (Debian: chromium, chromium-driver), without a window and without a network."""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from fake_run import a_row, make_run
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from foveate.evaluate.predictions import Evaluation, read_evaluations, write_evaluation, write_gallery, write_models
from foveate.report.live import ReportServer
from foveate.report.page import write_report

DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DRIVER and BROWSER), reason="needs Debian's packages chromium and chromium-driver"),
]
SCREENS = os.environ.get("FOVEATE_SCREENSHOTS")
"""A folder for screenshots, for people to look at."""


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def thinking(answer, row_id):
    text = f"<think>Let me look at {row_id}.</think>{answer.text}"
    return replace(answer, text=text, logprobs=(("<box>", -0.01), ("12", -1.6)))


def with_thoughts(folder: Path) -> Path:
    """Answers with a thinking section and the probabilities of their tokens, at every step."""
    for one in read_evaluations(folder):
        rows = [replace(row, answers=(thinking(row.shown, row.id), *row.sampled)) for row in one.predictions]
        write_evaluation(folder, one.step, rows)
    return folder


@pytest.fixture
def page(browser):
    """page(folder) -> the browser at the report of a folder, opened from disk."""

    def open_page(folder):
        browser.get_log("performance")
        browser.get(write_report(folder).as_uri())
        return browser

    return open_page


def shown(browser):
    return [card for card in browser.find_elements(By.CSS_SELECTOR, ".shot") if card.is_displayed()]


def choose(browser, name, value):
    field = browser.find_element(By.CSS_SELECTOR, f"input[name={name}][value='{value}']")
    browser.execute_script("arguments[0].click()", field)


def requests_of(browser):
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith(("data:", "file:"))]


def screenshot(browser, name):
    if SCREENS:
        browser.save_screenshot(f"{SCREENS}/{name}.png")


def test_filters_and_steps_choose_what_is_shown(page, tmp_path):
    browser = page(with_thoughts(make_run(tmp_path / "run", rows=24)))
    cards = shown(browser)
    assert len(cards) == 24
    counts = {}
    for outcome in ("hits", "misses"):
        choose(browser, "outcome", outcome)
        counts[outcome] = len(shown(browser))
        marks = {card.find_element(By.CSS_SELECTOR, ".words-at:not(.off) .mark b").text[0] for card in shown(browser)}
        assert marks == {"✓" if outcome == "hits" else "✗"}
    assert sum(counts.values()) == 24
    choose(browser, "step", "0")
    assert len(shown(browser)) >= counts["misses"]
    choose(browser, "outcome", "all")
    search = browser.find_element(By.CSS_SELECTOR, "input[type=search]")
    search.send_keys("test-0007")
    assert [card.find_element(By.CSS_SELECTOR, ".meta").text.split(" ")[0] for card in shown(browser)] == ["test-0007"]
    assert requests_of(browser) == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_answers_of_an_own_reward_are_hits_from_the_score_that_a_reader_says(page, tmp_path):
    own = {"answer": "7", "text": "7", "width": 0, "box": None, "iou": None, "hit": None}
    write_evaluation(tmp_path, 10, [a_row(str(number), **own, score=number / 10) for number in range(10)])
    write_gallery(tmp_path, [str(number) for number in range(10)])
    browser = page(tmp_path)
    choose(browser, "outcome", "hits")
    assert len(shown(browser)) == 5
    least = browser.find_element(By.CSS_SELECTOR, "input[name=least]")
    least.clear()
    least.send_keys("0.8")
    assert [card.find_element(By.CSS_SELECTOR, ".mark b").text for card in shown(browser)] == [
        "score 0.800",
        "score 0.900",
    ]


def test_thinking_is_folded_and_probabilities_come_when_asked_for(page, tmp_path):
    browser = page(with_thoughts(make_run(tmp_path / "run", rows=4)))
    answer = shown(browser)[0].find_element(By.CSS_SELECTOR, ".words-at:not(.off)")
    thought = answer.find_element(By.CSS_SELECTOR, ".think p")
    assert not thought.is_displayed()
    answer.find_element(By.CSS_SELECTOR, ".think summary").send_keys(Keys.ENTER)
    assert thought.is_displayed()
    assert thought.text.startswith("Let me look")
    tokens = answer.find_element(By.CSS_SELECTOR, ".tokens")
    assert tokens.find_elements(By.TAG_NAME, "span") == []
    tokens.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    browser.implicitly_wait(2)
    marks = [(mark.text, mark.get_attribute("title")) for mark in tokens.find_elements(By.TAG_NAME, "span")]
    browser.implicitly_wait(0)
    assert marks == [("<box>", "99.0 %"), ("12", "20.2 %")]


def test_charts_are_drawn_from_the_pages_own_json(page, tmp_path):
    rows = [
        {"step": step, "loss": value, "eval/x": 0.41 + 0.04 * step, "reward/a": step % 2, "reward/b": step / 18}
        for step, value in enumerate([1e-7, 2e-7, None, 3e-7, None, 2e-7, 1e-7])
    ]
    long = [{"step": step, "reward/a": float(step % 2), "reward/b": step / 18} for step in range(7, 60)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + long))
    browser = page(tmp_path)

    def read(title):
        figures = browser.find_elements(By.CSS_SELECTOR, "figure[data-chart]")
        figure = next(one for one in figures if one.find_element(By.TAG_NAME, "h3").text == title)
        texts = [text.text for text in figure.find_elements(By.CSS_SELECTOR, "svg.plot text")]
        paths = [path.get_attribute("d") for path in figure.find_elements(By.CSS_SELECTOR, "svg.plot path")]
        label = figure.find_element(By.CSS_SELECTOR, "svg.plot").get_attribute("aria-label")
        return texts, paths, len(figure.find_elements(By.CSS_SELECTOR, "svg.plot circle")), label

    texts, paths, dots, label = read("loss")
    assert texts[:4] == ["0", "1e-7", "2e-7", "3e-7"]
    assert texts[4:] == ["0", "2", "4", "6"]
    assert [path.count("M") for path in paths] == [3]
    assert dots == 5
    assert label.startswith("loss: loss from 1.00e-7 at step 0 to 1.00e-7 at step 6.")
    assert read("Held-out figures")[0][:4] == ["0.4", "0.5", "0.6", "0.7"]
    texts, paths, dots, _ = read("Parts of the reward")
    assert (len(paths), dots) == (4, 0)
    averages = [float(pair.split(" ")[1]) for pair in paths[1][1:].split("L")][5:-5]
    assert max(averages) - min(averages) < 100
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_charts_answer_to_the_keyboard(page, tmp_path):
    browser = page(make_run(tmp_path / "run", rows=4))
    chart = browser.find_element(By.CSS_SELECTOR, "#curves .chart")
    svg = chart.find_element(By.CSS_SELECTOR, "svg[tabindex]")
    browser.execute_script("arguments[0].focus()", svg)
    svg.send_keys(Keys.HOME)
    tip = chart.find_element(By.CSS_SELECTOR, ".tip")
    first = tip.text
    svg.send_keys(Keys.ARROW_RIGHT)
    assert tip.is_displayed()
    assert tip.text != first
    svg.send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()


def test_models_side_by_side_switch_like_steps(page, tmp_path):
    folder = make_run(tmp_path / "run", rows=8)
    models = [
        Evaluation(i, one.predictions, name)
        for i, (one, name) in enumerate(zip(read_evaluations(folder)[::3], ("first", "second"), strict=False))
    ]
    write_models(folder, models)
    browser = page(folder)
    names = [label.text for label in browser.find_elements(By.CSS_SELECTOR, "input[name=step] + span")]
    assert names == ["first", "second"]
    assert "Side by side" in browser.find_element(By.TAG_NAME, "nav").text
    screenshot(browser, "models")


def test_five_hundred_samples_stay_small_and_fit_every_screen(page, tmp_path):
    folder = with_thoughts(make_run(tmp_path / "run", rows=500, photographs=True))
    browser = page(folder)
    assert (folder / "report.html").stat().st_size < 5_000_000
    assert len(browser.find_elements(By.CSS_SELECTOR, ".shot")) == 500
    for width, height, name in ((1280, 900, "desktop"), (390, 844, "phone")):
        for scheme in ("light", "dark"):
            media = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            wide = browser.execute_script("return document.documentElement.scrollWidth")
            assert wide <= width, f"{name} scrolls sideways: {wide}"
            for place in ("result", "pictures", "curves"):
                browser.execute_script(f"document.getElementById('{place}').scrollIntoView()")
                screenshot(browser, f"{name}-{scheme}-{place}")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert requests_of(browser) == []


def test_a_live_page_shows_what_the_files_say_now(browser, tmp_path):
    folder = make_run(tmp_path / "run", steps=12, rows=4)
    with ReportServer(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        browser.get(server.address)
        assert "last step 12" in browser.find_element(By.CSS_SELECTOR, ".chips").text
        with (folder / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps({"step": 13, "reward/mean": 0.5}) + "\n" + '{"step": 14, "rew')
        browser.refresh()
        assert "last step 13" in browser.find_element(By.CSS_SELECTOR, ".chips").text
        assert not (folder / "report.html").exists()
        server.shutdown()
        thread.join()
