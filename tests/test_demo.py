"""demo.py in a real browser: Chromium without a window, driven by Selenium, on the shipped model."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
import soundfile
from conftest import ROOT, run

from demo import draw
from tinyaudio import SAMPLE_RATE, TinyAudio, load_audio, read_clips

PATIENCE = 300  # seconds; what comes sooner is not waited for
CLIPS = [clip["audio"] for clip in read_clips(str(ROOT / "assets/quickstart/test.jsonl"))]


@pytest.fixture(scope="module")
def model():
    return TinyAudio.load(ROOT / "assets" / "default")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The running page: its address, its process, the folder of its uploads, and what would be its way out."""
    pytest.importorskip("gradio", reason="needs gradio: pip install gradio")
    pytest.importorskip("selenium", reason="needs selenium: pip install selenium")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    uploads, outside = tmp_path_factory.mktemp("uploads"), socket.create_server(("127.0.0.1", 0))
    proxy = f"http://127.0.0.1:{outside.getsockname()[1]}"
    env = {**os.environ, "GRADIO_TEMP_DIR": str(uploads), "http_proxy": proxy, "https_proxy": proxy, "no_proxy": "127.0.0.1,localhost"}
    process = subprocess.Popen([sys.executable, str(ROOT / "demo.py"), "--max-minutes", "0.25"], env=env, stdout=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # jobs in the background ignore Ctrl-C
    yield process.stdout.readline().strip(), process, uploads, outside
    process.kill()
    process.communicate()
    outside.close()


@pytest.fixture
def open_page(server):
    """A function that opens the page in a browser of its own. None of them may ask another host for anything."""
    pages = []

    def open_page(*flags):
        pages.append(Page(server[0], flags))
        return pages[-1]

    yield open_page
    hosts = set().union(*(page.hosts() for page in pages))
    for page in pages:
        page.driver.quit()
    assert hosts == {"127.0.0.1"}


class Page:
    def __init__(self, url, flags):
        from selenium import webdriver
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=900,1200", *flags):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        self.driver.get(url)
        self.wait(lambda: self.all("input[type=file]"))

    def hosts(self):
        """Of all that the browser asked for."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [urlparse(event["params"]["request"]["url"]) for event in events if event["method"] == "Network.requestWillBeSent"]
        return {url.hostname for url in urls if url.scheme not in ("data", "blob")}

    def all(self, css, text=None):
        """What is to be seen on the page."""
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].filter(element => (element.type == 'file' || element.checkVisibility())"
            " && (arguments[1] === null || element.innerText.trim() == arguments[1]))", css, text)

    def wait(self, found):
        end = time.time() + PATIENCE
        while not (result := found()):
            assert time.time() < end, self.driver.execute_script("return document.body.innerText")
            time.sleep(0.05)
        return result

    def click(self, css, text=None):
        self.wait(lambda: self.all(css, text))[0].click()

    def upload(self, path):
        """Choose a file, in the place of the one before."""
        if self.all("[aria-label=Clear]"):
            self.click("[aria-label=Clear]")
        self.wait(lambda: self.all("input[type=file]"))[0].send_keys(str(path))
        self.wait(lambda: self.all("[aria-label=Play], audio"))

    def text(self):
        """What stands in the last field of the page."""
        return self.all("textarea")[-1].get_property("value")

    def run(self, result=".words"):
        """Press the button and wait for what comes of it, which is returned, in the place of what was there before."""
        before = self.all(result)
        self.click("button", "Run")
        return self.wait(lambda: [element for element in self.all(result) if element not in before])[0]

    def words(self):
        pieces = [piece.text.split() for piece in self.all(".words span")]
        return [(piece[0], float(piece[1])) for piece in pieces if len(piece) == 2]


def write(path, *clips):
    """Join clips into one wav."""
    soundfile.write(path, np.concatenate([load_audio(clip) for clip in clips]), SAMPLE_RATE)
    return path


def test_without_gradio_it_says_so(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError('not there')")
    done = run("demo.py", check=False, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "pip install gradio" in done.stderr


def test_the_whole_wave_is_drawn_and_words_cannot_be_html():
    wave = np.sin(np.arange(3 * SAMPLE_RATE, dtype=np.float32))
    picture = draw(wave, [{"word": "<b>", "start": 0.5}, {"word": "R&B", "start": 1.0}])
    assert re.findall(r"width: (\d+)px", picture) == ["75", "75", "300"] and picture.count("M1 ") == 3
    assert "&lt;b&gt;" in picture and "R&amp;B" in picture


def test_an_upload_becomes_words_with_times(model, open_page, tmp_path):
    page = open_page()
    page.upload(CLIPS[0])
    page.driver.execute_script("""window.seen = new Set();
        setInterval(() => seen.add([...document.querySelectorAll("textarea")].at(-1).value), 5)""")
    page.run()
    assert page.text() == model.transcribe(CLIPS[0])
    parts = sorted(page.driver.execute_script("return [...seen]"), key=len)
    streamed = list(model.stream(CLIPS[0]))
    assert sum(part in ["".join(streamed[:i]) for i in range(1, len(streamed) + 1)] for part in parts) > len(streamed) / 3  # the others came too fast to be seen
    segments = list(model.segments([CLIPS[0]], words=True))
    assert page.words() == [(word["word"], word["start"]) for word in segments[0]["words"]]
    assert len(page.all(".words path")) == len(page.words()) + 1  # the silence before the first
    links = {link.get_attribute("download"): unquote(link.get_attribute("href").partition(",")[2]) for link in page.all("a[download]")}
    assert links["test_0000.srt"] == run("sample.py", CLIPS[0], "--format", "srt").stdout
    whole = json.loads(links["test_0000.json"])
    assert whole["words"] == segments[0]["words"] and whole["file"] == "test_0000.ogg"
    assert f"{whole['duration']:.1f} s of sound in {whole['seconds']:.1f} s" in page.driver.page_source
    picture = os.environ.get("SCREENSHOT", str(tmp_path / "page.png"))  # SCREENSHOT=assets/demo.png makes the README's
    assert page.driver.save_screenshot(picture)


def test_it_fits_a_phone(open_page):
    page = open_page()
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True})
    page.upload(CLIPS[0])
    page.run()
    width, rows = page.driver.execute_script("""return [document.documentElement.scrollWidth,
        new Set([...document.querySelectorAll(".words span")].map(piece => piece.offsetTop)).size]""")
    assert width == 390 and rows > 1


def test_the_microphone(model, open_page, tmp_path):
    """Chromium's false one, which plays a file over and over."""
    sound = write(tmp_path / "sound.wav", CLIPS[0])
    page = open_page("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", f"--use-file-for-fake-audio-capture={sound}")
    page.click("[aria-label='Record audio']")
    page.click("button", "Record")
    time.sleep(2.2 * load_audio(sound).size / SAMPLE_RATE)
    page.click("button", "Stop")
    page.wait(lambda: page.all("[aria-label=Play]"))
    page.run()
    known = set(model.transcribe(CLIPS[0]).split())
    assert len(known & set(page.text().split())) > 0.6 * len(known), page.text()


def test_what_cannot_be_heard_is_told_in_a_sentence(model, open_page, tmp_path):
    page = open_page()
    assert page.run("[role=alert]").text == "Record something or choose a file first."
    (tmp_path / "notes.wav").write_text("this is no sound\n" * 50)
    (tmp_path / "empty.wav").touch()
    write(tmp_path / "long.mp3", *CLIPS[:6])
    for name, reason in (("notes.wav", "not audio that can be read"), ("empty.wav", ""), ("long.mp3", "longer than 0.25 minutes")):
        page.upload(tmp_path / name)
        for press in (lambda: None, lambda: page.click("button", "Run")):
            press()
            page.wait(lambda: [alert for alert in page.all("[role=alert]") if alert.text.startswith(name) and reason in alert.text])
            shown = page.driver.execute_script("return document.body.innerText")
            assert "Traceback" not in shown and "Error" not in shown
    page.upload(CLIPS[1])
    page.run()
    assert page.text() == model.transcribe(CLIPS[1]) and not page.all("[role=alert]")


def test_two_at_once_wait_for_each_other_and_are_not_mixed(model, open_page, tmp_path):
    pages, clips = [open_page(), open_page()], [write(tmp_path / "a.wav", *CLIPS[2:5]), write(tmp_path / "b.wav", *CLIPS[5:8])]
    for page, clip in zip(pages, clips):
        page.upload(clip)
        page.driver.execute_script("""window.busy = [];
            setInterval(() => document.querySelector("progress") && busy.push(Date.now()), 10)""")
    for page in pages:
        page.click("button", "Run")
    for page, clip in zip(pages, clips):
        page.wait(lambda: page.all(".words"))
        assert page.text() == model.transcribe(clip)
        assert " ".join(word for word, _ in page.words()) == model.transcribe(clip)
    (start, end), (next_start, _) = sorted(page.driver.execute_script("return [busy[0], busy.at(-1)]") for page in pages)
    assert next_start > end - 0.3 * (end - start)  # the browser hears of the end a little later


def test_examples_tasks_and_text_alone(model, open_page):
    page = open_page()
    page.click("button.gallery-item")
    page.wait(lambda: page.all("[aria-label=Play]"))
    for name, task in (("Describe", "describe"), ("Your own prompt", "In one word: <audio>")):
        page.click("label", name)
        if name == "Your own prompt":
            page.wait(lambda: len(page.all("textarea")) == 2)
            page.all("textarea")[0].send_keys(task)
        page.run()
        assert page.text() == model.transcribe(CLIPS[0], task=task)
        assert not page.words() and [link.text for link in page.all("a[download]")] == ["JSON"]
    page.click("button[role=tab]", "Text")
    page.wait(lambda: page.all("button", "Send"))
    page.all("textarea")[0].send_keys("What is the capital of France?")
    page.click("button", "Send")
    answer = "".join(model.stream(task="What is the capital of France?"))
    page.wait(lambda: page.text() == answer)


def test_nothing_is_asked_of_another_host(server):
    """The browsers are watched by `open_page`; here, the process behind the page."""
    outside = server[3]
    outside.settimeout(1)
    with pytest.raises(TimeoutError):
        outside.accept()


def test_uploads_are_deleted(server, model, open_page, tmp_path):
    """The last test, which ends the page."""
    _, process, uploads, _ = server
    page = open_page()
    page.upload(write(tmp_path / "one.wav", CLIPS[4]))
    assert list(uploads.rglob("one.wav"))
    page.wait(lambda: not list(uploads.rglob("one.wav")))
    page.run()  # goes on working with what it has read
    assert page.text() == model.transcribe(CLIPS[4])
    page.upload(write(tmp_path / "two.wav", CLIPS[5]))
    assert list(uploads.rglob("two.wav"))
    process.send_signal(signal.SIGINT)
    process.wait(PATIENCE)
    assert not [path for path in uploads.rglob("*") if path.is_file()]
