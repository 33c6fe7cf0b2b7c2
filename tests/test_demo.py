"""demo.py: its parts, with the shipped model, and once the whole page in a real browser."""

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
import soundfile
from conftest import ROOT, run, tone

from data import SAMPLE_RATE, load_audio
from demo import draw_hearing, listen, stream
from sample import ASSETS, segments
from tinyaudio import TinyAudio

CLIP = str(ASSETS / "quickstart" / "clips" / "test_0000.ogg")  # the first example of the page

@pytest.fixture(scope="module")
def model(embedded):
    return TinyAudio.from_pretrained(ASSETS / "default")

def test_a_missing_gradio_is_one_line(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ModuleNotFoundError('no gradio', name='gradio')")
    done = run("demo.py", check=False, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (1, "demo.py: no gradio; pip install gradio\n")

def test_the_picture_shows_what_ctc_spells_and_the_words(model):
    pytest.importorskip("matplotlib")
    waveform, probabilities, words = draw_hearing(model, 1, CLIP).axes
    assert len(waveform.lines[0].get_xdata()) == len(load_audio(CLIP))
    peaks = [line.get_ydata().max() for line in probabilities.lines]
    assert len(peaks) == len(probabilities.texts) >= 4 and 0.3 < min(peaks) <= max(peaks) <= 1
    places, texts = zip(*((text.get_position()[0], text.get_text()) for text in words.texts))
    assert " ".join(texts) == model.transcribe(CLIP) and list(places) == sorted(places)

def test_what_cannot_be_read_is_one_line_without_folders(tmp_path):
    soundfile.write(tmp_path / "long.wav", tone(4), SAMPLE_RATE)
    (tmp_path / "notes.wav").write_text("this is no sound\n" * 50)
    soundfile.write(tmp_path / "tiny.wav", tone(4)[:1], 48_000)  # no sample at 16 kHz
    for start in "long.wav: longer than", "notes.wav: ", "none.wav: ", "tiny.wav: ":
        [(text, line)] = listen(None, 0.05, str(tmp_path / start.split(":")[0]), "")
        assert text == "" and line.startswith(start) and "\n" not in line
    assert list(listen(None, 0.05, None, "")) == [("", "Record something or choose a file.")]

def test_stream_joins_to_the_greedy_text(model):
    wave = load_audio(CLIP)
    parts = list(stream(model, wave))
    answer = model.generate(model.encode([wave]))[0]
    assert "".join(parts).strip() == model.detokenize(answer) and len(parts) > 5
    assert list(stream(model, np.zeros(SAMPLE_RATE, np.float32))) == []

def test_an_own_prompt(model):
    *_, (text, below) = listen(model, 1, CLIP, "In one word:")
    assert text == model.transcribe(CLIP, task="In one word: <audio>")
    assert "<ruby>" not in below and "download" not in below

def test_an_error_while_streaming_ends_the_stream(model, monkeypatch):
    monkeypatch.setattr(model.decoder, "generate", lambda **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(stream(model, load_audio(CLIP)))

def test_the_page_in_a_browser(model, tmp_path, request):
    pytest.importorskip("gradio", reason="needs gradio: pip install gradio")
    pytest.importorskip("selenium", reason="needs selenium: pip install selenium")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    outside = socket.create_server(("127.0.0.1", 0))  # all that asks other hosts would come here
    proxy = f"http://127.0.0.1:{outside.getsockname()[1]}"
    env = {**os.environ, "http_proxy": proxy, "https_proxy": proxy, "no_proxy": "127.0.0.1",
           "GRADIO_TEMP_DIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen([sys.executable, str(ROOT / "demo.py")], env=env, text=True,
                              stdout=subprocess.PIPE)
    request.addfinalizer(server.kill)
    driver = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options, driver) as browser:
        browser.get(server.stdout.readline().split()[-1])
        browser.implicitly_wait(300)  # seconds; what comes sooner is not waited for
        find = functools.partial(browser.find_elements, "css selector")
        find("button.gallery-item")[0].click()
        links = {link.get_attribute("download"): unquote(link.get_attribute("href"))
                 for link in find("a[download]")}
        text = find("textarea")[-1].get_property("value")
        shown = [ruby.text.split() for ruby in find("ruby")]
        log = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    part, = segments(model, [CLIP], words=True)
    assert text == part["text"] == model.transcribe(CLIP)
    times = [[f"{word['start']:.2f}", word["word"]] for word in part["words"]]
    assert [sorted(pair) for pair in shown] == times  # digits sort before letters
    assert links["test_0000.srt"] == "data:," + run("sample.py", CLIP, "--format", "srt").stdout
    assert json.loads(links["test_0000.json"].removeprefix("data:,"))["words"] == part["words"]
    urls = [urlparse(event["params"]["request"]["url"]) for event in log
            if event["method"] == "Network.requestWillBeSent"]
    assert {url.hostname for url in urls if url.scheme not in ("data", "blob")} == {"127.0.0.1"}
    outside.settimeout(1)
    with pytest.raises(TimeoutError):
        outside.accept()
