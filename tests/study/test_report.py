import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from browser import CHROMIUM, Browser
from charlm.study.report import page as report
from conftest import settings

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> "
    '«{{title}}» & "{{data}}" \n'
)


class Elements(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [("", {})], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append((self.tags[-1], data))


@pytest.fixture
def page(charlm, monkeypatch):
    """The page of a model trained on a hostile text."""
    monkeypatch.setattr(report, "WRITTEN", 60)
    Path("bad.txt").write_text(HOSTILE * 60, encoding="utf-8")
    done = charlm("train", "--name", "bad", *settings("corpus.source=bad.txt", "train.max_steps=3"))
    assert done.code == 0, done.err
    done = charlm("report", "bad")
    assert done.code == 0 and "report.html" in done.err
    return Path("runs/bad/report.html")


def test_page_shows_the_run_and_escapes_its_text(page):
    text = page.read_text(encoding="utf-8")
    found = Elements(text)
    tags = [tag for tag, _ in found.tags]
    assert tags.count("script") == 2 and "img" not in tags and tags.count("circle") == 4, (
        "a single evaluation"
    )
    loaded = [v for _, attributes in found.tags for k, v in attributes.items() if k in ("src", "href")]
    assert loaded == ["data:,"]
    data = json.loads(next(t for (tag, a), t in found.texts if a.get("id") == "data"))
    assert HOSTILE.startswith("</script>") and HOSTILE[:40] in "".join(data["passage"]) * 2
    length = len(data["passage"])
    assert len(data["bits"]) == len(data["guesses"]) == length and data["bits"][0] is None
    assert all(isinstance(bits, float) for bits in data["bits"][1:])
    assert data["units"] == list(range(12)) and "inside quotes" in data["features"]
    assert len(data["activations"]) == -(-12 * length // 3) * 4
    assert re.search(r"<pre>corpus:\n  source: bad.txt", text)
    # Text written from right to left starts on the right; a single character is isolated.
    sided = [tag for tag, attributes in found.tags if attributes.get("dir") == "auto"]
    assert sorted(sided) == ["div", "div", "pre", "pre", "pre"] and "`\\u2068$" in text


def test_charts_have_the_rows_between_evaluations(charlm, trained, monkeypatch):
    monkeypatch.setattr(report, "WRITTEN", 30)
    (trained / "metrics.jsonl").write_text(
        '{"step": 1, "train_loss": 3.0}\n'
        '{"step": 2, "train_loss": NaN}\n'
        '{"step": 3, "train_loss": 2.0, "val_loss": 2.5, "lr": 0.1}\n'
    )
    assert charlm("report", "tiny").code == 0
    tags = Elements((trained / "report.html").read_text("utf-8")).tags
    assert [tag["aria-label"] for name, tag in tags if name == "svg"] == [
        "loss, nats per character, by step",
        "learning rate, by step",
    ]
    assert [tag["points"] for name, tag in tags if name == "polyline"] == ["58.0,22.0 350.0,172.0"]
    assert [tag["transform"] for name, tag in tags if name == "circle"] == [
        "translate(350.0,97.0)",
        "translate(58.0,172.0)",
    ]


def test_features_that_vary_are_correlated_with_units():
    text = "ab «cd» ab\n" * 20
    states = torch.rand(len(text), 4) - 0.5
    states[:, 2] = torch.tensor([float(i) for i in report._inside(text, "«", "»")]) * -3 + 1
    best = report.correlate(report.features(text), states)
    assert best["inside quotes"][0] == (2, -1.0)
    assert "digits" not in best, "it does not vary"
    assert report._inside("a«b»c\n", "«", "»") == [0, 1, 1, 0, 0, 0]


def test_backward_model_has_a_page_and_fill_in_model_is_refused(charlm, monkeypatch):
    monkeypatch.setattr(report, "WRITTEN", 30)
    for direction in ("backward", "both"):
        options = settings("corpus.source=corpus.txt", "train.max_steps=2", f"model.direction={direction}")
        assert charlm("train", "--name", direction, *options).code == 0
    assert charlm("report", "backward", "-o", "b.html").code == 0
    data = json.loads(re.search(r'id="data">(.*?)</script>', Path("b.html").read_text("utf-8"), re.S)[1])
    assert data["bits"][-1] is None and data["guesses"][-1] is None and data["guesses"][0]
    # The guesses agree with the surprisals, in the order of the text.
    for char, bits, guesses in zip(data["passage"], data["bits"], data["guesses"], strict=True):
        assert bits is None or dict(guesses).get(char, 2**-bits) == pytest.approx(2**-bits, abs=2e-3)
    done = charlm("report", "both")
    assert done.code == 1 and "model.direction is 'both'" in done.err


def test_folder_name_that_is_not_utf8_is_shown_with_question_marks(charlm, trained, monkeypatch):
    monkeypatch.setattr(report, "WRITTEN", 30)
    run = trained.rename(os.fsdecode(b"runs/t\xff"))
    done = charlm("report", run)
    assert done.code == 0 and "<title>t?</title>" in (run / "report.html").read_text(encoding="utf-8"), done


def test_missing_or_changed_training_text_is_refused(charlm, trained):
    text = Path("corpus.txt").read_text()
    Path("corpus.txt").write_text(text.replace("a", "b"))
    for arguments in (["report", "tiny"], ["generate", "--novelty"]):
        done = charlm(*arguments)
        assert done.code == 1 and "trained on" in done.err and "--corpus" in done.err and done.out == ""
    Path("corpus.txt").rename("moved.txt")
    assert "no such file" in charlm("report", "tiny").err
    Path("moved.txt").write_text(text)
    assert charlm("generate", "-n", "20", "--novelty", "--corpus", "moved.txt").code == 0


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium not found")
def test_page_works_in_a_browser_and_loads_nothing(page):
    with Browser() as browser:
        browser.call(
            "Emulation.setDeviceMetricsOverride", width=400, height=800, deviceScaleFactor=1, mobile=True
        )
        browser.open(page.resolve().as_uri())
        assert browser.run("document.title") == "bad"
        assert browser.run("document.documentElement.scrollWidth") <= 400
        browser.run("find('surprisal').children[5].click()")
        assert "bits" in browser.run("find('surprise').textContent")
        assert browser.run("find('guesses').children.length") == 5
        before = browser.run("find('unit-text').children[9].style.backgroundColor")
        browser.run("choose((Number(find('unit').value) + 1) % 12)")
        assert browser.run("find('unit-text').children[9].style.backgroundColor") != before
        assert browser.run("find('best').querySelectorAll('button').length") > 3
        urls = [each["request"]["url"] for each in browser.named("Network.requestWillBeSent")]
        assert all(url.startswith(("file:", "data:")) for url in urls) and len(urls) <= 2
        assert not browser.named("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
