"""The page at `/`, in a headless Chromium: on a phone and in the dark; its only network is its own server."""

import json
import time

import pytest
from browser import browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def until(page, code):
    end = time.monotonic() + 60
    while not page.run(code):
        assert time.monotonic() < end, code
        time.sleep(0.05)


def text(page, name):
    return page.run(f"document.getElementById('{name}').textContent")


def judge(page, prompt):
    page.run(f"document.getElementById('prompt').value = {json.dumps(prompt)}")
    page.run("document.getElementById('judge').click()")
    until(page, "!document.getElementById('judge').disabled")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True)])
def test_in_a_browser(chromium, server, tmp_path, width, dark):
    chromium.complaints.clear()
    chromium.requests.clear()
    chromium.open(f"{server.url}/", width, dark=dark)
    until(chromium, "document.getElementById('engine').textContent.includes('Engine of emoji, cpu fp32')")
    assert chromium.run("document.activeElement.id") == "prompt"  # one may type at once
    judge(chromium, "the left luggage sign")
    assert text(chromium, "verdict") == "Memorized" and "≥ threshold -16.22" in text(chromium, "reason")
    judge(chromium, "<img src=x onerror=alert(1)> 猫")
    assert text(chromium, "verdict") == "Not memorized"
    rows = "[...document.querySelectorAll('#history tr')].map((row) => row.cells[0].textContent)"
    assert chromium.run(rows)[:2] == ["<img src=x onerror=alert(1)> 猫", "the left luggage sign"]
    chromium.run("document.querySelectorAll('#history button')[1].click()")
    assert text(chromium, "verdict") == "Memorized"
    # With the keyboard: what is focused is sent by Control and Enter.
    chromium.run("document.getElementById('prompt').value = 'a red bicycle'; document.getElementById('prompt').focus()")
    chromium.run(
        "document.getElementById('prompt').dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', ctrlKey: true}))"
    )
    until(chromium, f"({rows})[0] === 'a red bicycle'")
    assert text(chromium, "verdict") == "Not memorized"
    chromium.run("document.getElementById('prompt').value = 'the left luggage sign'")
    chromium.run("document.getElementById('explain').click()")
    until(chromium, "!document.getElementById('words').hidden")
    assert text(chromium, "words") == "the left luggage sign"
    colours = chromium.run("[...document.querySelectorAll('#words span')].map((word) => word.style.background)")
    assert len(colours) == 4 and len(set(colours)) == 4
    page = chromium.run("[document.documentElement.scrollWidth, innerWidth]")
    assert page[0] <= page[1]  # nothing to scroll sideways
    chromium.screenshot(tmp_path / "page.png")
    assert not chromium.complaints
    assert {request.split("/", 3)[2] for request in chromium.requests} == {server.url.removeprefix("http://")}


@pytest.mark.slow
def test_errors_are_shown(chromium, server):
    chromium.open(f"{server.url}/", 800)
    until(chromium, "document.getElementById('engine').textContent.includes('Engine of emoji')")
    judge(chromium, "a" * 3_000_000)
    assert text(chromium, "verdict") == "No verdict" and "send fewer prompts" in text(chromium, "reason")
    chromium.complaints.clear()  # of the answer's status


def test_policy(client):
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff" and "${style}" not in answer.text
