"""sample.py, eval.py and bench.py on toy backbones, and the size of the project."""

import ast
import io
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tokenize
from pathlib import Path
from unittest.mock import Mock, create_autospec

import datasets
import jiwer
import pytest
import soundfile
import torch
import transformers as hf
from conftest import LLAMA, ROOT, SENTENCES, TOYS, tone

import bench
import eval
import sample
import train
from data import InputError, read_audio
from tinyaudio import TinyAudio

@pytest.fixture(scope="module")
def talker(toys, tmp_path_factory):
    """A checkpoint that is untrained and says something at any sound."""
    torch.manual_seed(0)
    model = TinyAudio(toys["whisper"], toys["llama"], decode="ctc", device="cpu")
    model.set_ctc_tokens(sum(map(model.tokenize_answer, SENTENCES), []))
    model.ctc.bias.data -= 10
    folder = str(tmp_path_factory.mktemp("talker"))
    model.save_pretrained(folder)
    return folder

@pytest.fixture
def say(talker, capsys):
    """Run sample.py with the talker: status, lines on stdout, lines on stderr."""
    def say(*flags):
        status = sample.main([*map(str, flags), "--model", talker])
        printed = capsys.readouterr()
        errors = [x for x in printed.err.splitlines() if not x.startswith("loading ")]
        return status, printed.out.splitlines(), errors
    return say

def write(path, seconds=1.0, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds, seed), 16_000)
    return path

def test_one_file_and_broken_ones_among_many(say, tmp_path, monkeypatch):
    files = [write(tmp_path / f"{seed}.flac", 1 + seed, seed) for seed in range(3)]
    status, [text], errors = say(files[0])
    assert status == 0 and text.strip() and "\t" not in text and not errors
    with open(files[0], "rb") as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        assert say("-") == (0, [text], [])
        file.seek(0)
        assert say("-", "--trace")[2][-1].endswith(text)
    broken = [tmp_path / name for name in ("text.wav", "empty.wav", "missing.wav", "a.wav")]
    broken[0].write_text("no sound")
    broken[1].touch()
    write(broken[3], 1 / 16_000)  # one sample
    status, lines, errors = say(*itertools.chain(*zip(files, broken)), broken[3])
    assert status == 1
    assert all(str(path) in error for path, error in zip(broken, errors, strict=True))
    paths, texts = zip(*(line.split("\t") for line in lines))
    assert paths == tuple(map(str, files)) and texts[0] == text and len(set(texts)) == 3

def test_patterns_are_expanded(say, tmp_path):
    a, b = (write(tmp_path / name) for name in ("a1.wav", "a[1].wav"))
    for pattern, files in (("a*.wav", [a, b]), ("a[1].wav", [b])):
        lines = say(tmp_path / pattern, a)[1]
        assert [line.split("\t")[0] for line in lines] == [*map(str, files), str(a)]

def test_a_task_is_another_question(say, tmp_path):
    path = write(tmp_path / "a.wav", 2)
    assert say(path, "--task", "call <audio>")[1] != say(path, "--task", "light <audio>")[1]
    with pytest.raises(InputError, match="where the sound goes"):
        say(path, "--task", "Summarise")

def test_trace_follows_a_clip_to_its_text(say, tmp_path):
    path = write(tmp_path / "a.wav", 2)
    status, lines, rows = say(path, "--trace")
    names, shapes = zip(*(re.split(r" +\d+\.\d ms  ", row) for row in rows))
    assert not status and not lines and names[1] == "Encoder.features" and len(names) == 9
    assert shapes[:5] == ("32000", "200 x 80", "100 x 32", "20 x 160", "20 x 32")
    text = say(path)[1][0]
    assert shapes[8] == text and shapes[7].replace("|", "").split() == text.split()
    assert shapes[6].endswith(" tokens")
    assert shapes[6] not in say(path, "--trace", "--task", "Sum it all up: <audio>")[2][6]

def test_a_file_for_each_is_written_once(say, tmp_path):
    names, out = ("a.wav", "b.flac", "broken.wav"), tmp_path / "out"
    files = [write(tmp_path / name, seed=i) for i, name in enumerate(names)]
    files[2].write_bytes(b"")
    a, b = out / "a.txt", out / "b.txt"
    assert say(*files, "--out", out)[:2] == (1, [str(a), str(b)])
    assert a.read_text() == say(files[0])[1][0] + "\n"
    a.write_text("mine")
    b.unlink()
    _, lines, errors = say(*files, "--out", out)
    assert lines == [str(b)] and a.read_text() == "mine" and "1 of the files" in errors[0]
    with pytest.raises(InputError, match="same name"):
        say(files[0], write(tmp_path / "a.flac"), "--out", tmp_path / "more")

def test_what_can_be_read_of_a_file_is_written_and_the_rest_said(say, tmp_path, monkeypatch):
    file, half, out = write(tmp_path / "a.flac", 90), tmp_path / "half.flac", tmp_path / "out"
    half.write_bytes(file.read_bytes()[:file.stat().st_size // 2])
    for flags in ((half,), (half, file), (half, "--out", out)):
        status, lines, [error] = say(*flags)
        assert status == 1 and error.startswith(f"sample.py: {half}: ")
        assert lines[0].strip() and (out / "half.txt").exists() == ("--out" in flags)
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    assert say(half, "--format", "json")[1][-1].startswith("sample.py: ")  # behind the text

def test_formats(say, tmp_path):
    path = write(tmp_path / "a.wav", 40)
    whole = json.loads(say(path, "--format", "json")[1][0])
    assert whole["file"] == str(path) and whole["duration"] == 40 and len(whole["segments"]) == 2
    assert " ".join(word["word"] for word in whole["words"]) == whole["text"]
    for first, word in itertools.pairwise([{"start": 0}, *whole["words"]]):
        assert first["start"] <= word["start"] < word["end"] <= 40.1
    srt = "\n".join(say(path, "--format", "srt")[1]) + "\n"
    cues = re.findall(r"(\d+)\n00:00:(\d\d,\d{3}) --> 00:00:(\d\d,\d{3})\n(.+)\n\n?", srt)
    assert [int(number) for number, *_ in cues] == list(range(1, len(cues) + 1))
    assert " ".join(text for *_, text in cues) == whole["text"]
    times = [time for _, start, end, _ in cues for time in (start, end)]
    assert times == sorted(times) and times[-1] < "40,100"
    vtt = "\n".join(say(path, "--format", "vtt")[1])
    assert vtt.startswith("WEBVTT\n\n") and vtt.count(" --> ") == len(cues)
    parts = [{"text": "", "words": [{"word": "a<b & --> c's", "start": 0, "end": 1}]}]
    assert "\na&lt;b &amp; --&gt; c's\n" in sample.render("vtt", "", parts)
    assert sample.clock(3661.0006) == "01:01:01.001" and sample.clock(59.9996) == "00:01:00.000"
    words = [{"word": "word", "start": x, "end": x + 0.4} for x in (0, *range(2, 60))]
    cues = sample.make_cues(words)  # end at pauses, and before they are too long
    assert tuple(cues[0]) == (0, 0.4, "word")
    assert all(end - start <= 6 and len(text) <= 80 for start, end, text in cues)

def test_subtitles_of_a_language_without_spaces(talker, monkeypatch):
    monkeypatch.setattr(sample, "WIDTH", 14)
    model, text = TinyAudio.from_pretrained(talker, "cpu"), "\u65e5\u672c\u8a9e" * 20
    words = sample.time_words(model, torch.randn(260, 32), model.tokenize(text), 0)  # 26 s
    assert "".join(word["word"] for word in words) == text
    for start, end, text in sample.make_cues(words):
        assert end - start < 6.01 and len(text) <= 14

def test_a_long_file_is_printed_while_it_is_read(say, tmp_path, capsys, monkeypatch):
    def read(source):
        for block in read_audio(source):
            printed.append(capsys.readouterr().out)
            yield block
    printed = []
    monkeypatch.setattr(sample, "read_audio", read)
    rest = say(write(tmp_path / "a.wav", 99))[1]
    assert len(printed) > 10 and "".join(printed[:8]).strip() and rest

@pytest.fixture
def judge(tmp_path, monkeypatch, capsys):
    """Run eval.py on clips with these references, with a recogniser that says these texts, takes
    27 s for each batch and crashes when it has no more. Returns what is printed."""
    def judge(references, texts, *flags):
        said, facts = iter(texts), ("enc", "dec", "1.2M")
        rows = [json.dumps({"audio": "a.wav", "text": text}) for text in references]
        (tmp_path / "mine.jsonl").write_text("\n".join(rows))
        recognizer = lambda waves: [next(said) for _ in waves]
        monkeypatch.setattr(eval, "load_recognizer", lambda *_: (
            recognizer, facts, judge.weights))
        capsys.readouterr()
        eval.main(["org/model", "--dataset", "mine.jsonl", *flags])
        return capsys.readouterr().out
    judge.weights = {"x": torch.zeros(1)}
    write(tmp_path / "a.wav", 0.2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.perf_counter", itertools.count(0, 27).__next__)
    return judge

def test_wer_is_that_of_jiwer_on_normalised_texts():
    rng, normalize = random.Random(0), eval.NORMALIZERS["english"]
    words = "twenty one,2,$3.50,1990s,it's,it is,can't,colour,um,Mr. Smith,the,(laughs),naïve,OK"
    references = [" ".join(rng.choices(words.split(","), k=rng.randrange(9))) for _ in range(200)]
    heard = [" ".join(w for w in text.split() if rng.random() > 0.2) for text in references]
    kept = [(normalize(r), normalize(h)) for r, h in zip(references, heard) if normalize(r)]
    found = eval.wer(list(map(eval.score, references, heard)))
    assert found == jiwer.wer(*map(list, zip(*kept)))
    references = ["It's GOOD", "", "ignore_time_segment_in_scoring", "I don\u2019t … know"]
    assert eval.corpus_wer(references, ["it is good", "x", "x", "I don't know"]) == 0
    german = "wir treffen uns um acht im caf\u00e9"  # "um" is no word in English
    assert eval.corpus_wer([german], [german.replace("um ", "")]) == 1 / 7
    assert eval.score("A.", "a", "none")["errors"] == 1
    assert eval.score("\u0915\u093f", "\u0915\u0940", "basic")["errors"] == 1  # ki and kii in Hindi

def test_what_eval_prints_and_writes(judge, tmp_path):
    said = "sun moon sea land " * 5
    texts = [said.split(" ", 3 if i < 49 else 2)[-1] for i in range(100)]
    printed = judge([said] * 100, texts, "--leaderboard", "Toy", "--worst", "2")
    for words in ("Sample 2: WER = 15.00%, Time = 1.35s\n  Ref:  sun moon sea land sun",
                  "CHECKPOINT @ 100 samples:\n  Corpus WER: 12.45%\n  Avg Time/Sample: 1.35s\n",
                  "| Toy | enc | dec | 1.2M | mine.jsonl | 100 | 12.45 ± 0."):
        assert f"\n{words}" in printed
    assert printed.count("WER 15%\n") == 2 and "***" in printed  # word by word
    out = tmp_path / re.search("\nIn (.*)", printed)[1]
    assert {file.name for file in out.iterdir()} == {"results.txt", "results.jsonl", "summary.json"}
    assert json.loads((out / "summary.json").read_text())["deletions"] == 249
    assert (out / "results.jsonl").read_text().count("\n") == 100
    assert (out / "results.txt").read_text().count("\nRef:") == 100

def test_an_interrupted_evaluation_goes_on(judge, tmp_path):
    references, texts = ["sun moon"] * 50, random.Random(0).choices(["sun", "sun moon"], k=50)
    judge(references, texts, "--out", "whole")
    with pytest.raises(StopIteration):
        judge(references, texts[:45], "--out", "parts")
    with open("parts/results.jsonl", "a") as file:
        file.write('{"name": "cut o')
    flags = ["--out", "parts", "--resume"]
    with pytest.raises(InputError, match="other clips, flags"):
        judge(references, texts[40:], *flags, "--normalizer", "none")
    with pytest.raises(InputError, match="other clips, flags"):
        judge(references[:20], texts[:20], *flags)
    assert "Sample 40:" not in judge(references, texts[40:], *flags)
    whole, parts = ((tmp_path / name / "results.jsonl").read_text() for name in ("whole", "parts"))
    assert whole == parts and whole.count("\n") == 50
    with pytest.raises(InputError, match="no clip of mine.jsonl could be scored"):
        judge(["", "[noise]"], ["one", "two"])
    judge.weights = {"x": torch.ones(1)}  # trained on
    with pytest.raises(InputError, match="other clips, flags or weights"):
        judge(references, [], *flags)
    for flags in (("--max-samples", "0"), ("--seed", "-1"), ("--worst", "-1")):
        with pytest.raises(SystemExit):
            judge(["one"], ["one"], *flags)

def test_few_references_and_no_commit(judge, tmp_path, monkeypatch):
    monkeypatch.setattr(eval, "__file__", str(tmp_path / "eval.py"))  # no checkout
    for references, bounds in (["sun"], [None, None]), (["sun", "moon"], [0, 1]):
        printed = judge(references + 9 * [""], 11 * ["sun"], "--leaderboard", "Toy", "--out", "out")
        summary = json.loads(Path("out/summary.json").read_text(), parse_constant=pytest.fail)
        assert [summary["low"], summary["high"]] == bounds and "nan to" not in printed
        assert " | - | 20" in printed and ("(one clip)" in printed) == (bounds[0] is None)
        monkeypatch.setenv("PATH", "")  # no git

def test_each_set_model_and_decoding_has_its_own_folder(judge):
    names = ["\u0442\u0435\u0441\u0442", "\u97f3", "a b", "a-b", "1" + 60 * "k", "2" + 60 * "k"]
    names = [f"{name}.jsonl" for name in (*names, os.fsdecode(b"caf\xe9"), "mine")]  # one not UTF-8
    sys.stdout.reconfigure(errors="backslashreplace")  # as data.run does
    for name in names:
        Path(name).write_text('{"audio": "a.wav", "text": "one"}')
        judge(["one"], ["one"], "--dataset", name)
    judge(["one"], ["one"], "--decode", "ctc")
    sets = [json.loads(x.read_text())["dataset"] for x in Path().glob("outputs/*/summary.json")]
    assert sorted(sets) == sorted([*names, "mine.jsonl"])

def test_a_closed_pipe_ends_printing_and_not_the_work(judge, monkeypatch):
    monkeypatch.setattr(sys.stdout, "write", Mock(side_effect=BrokenPipeError))
    with pytest.raises(BrokenPipeError):
        judge(["sun moon"] * 50, ["sun"] * 50, "--out", "out")
    rows, summary = (Path("out", name).read_text() for name in ("results.jsonl", "summary.json"))
    assert rows.count("\n") == json.loads(summary)["samples"] == 50

def test_of_a_benchmark_only_what_is_needed_is_streamed(judge, monkeypatch, tmp_path):
    def rows():
        for i in range(5000):
            taken.append(i)
            yield {"audio": {"bytes": sound, "path": None}, "text": f"number {i}"}
    taken, sound = [], (tmp_path / "a.wav").read_bytes()
    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(eval, "open_stream", lambda *names: stream)
    printed = judge([], ["x"] * 10, "--dataset", "librispeech", "--max-samples", "10")
    numbers = [int(number) for number in re.findall(r"Ref:  number (\d+)", printed)]
    assert len(numbers) == 10 and max(numbers) > 100 and 1000 <= len(taken) <= 1100
    assert len(list(tmp_path.glob("outputs/eval_librispeech_org-model_*"))) == 1

@pytest.mark.parametrize("normalizer, language", [("english", "en"), ("basic", None)])
def test_whisper_by_itself_and_broken_clips(
        toys, dataset, tmp_path, capsys, monkeypatch, normalizer, language):
    generate = hf.WhisperForConditionalGeneration.generate
    asked = create_autospec(generate, side_effect=generate)
    monkeypatch.setattr(hf.WhisperForConditionalGeneration, "generate", asked)
    flags = ["--normalizer", normalizer, "--out", str(tmp_path)]
    eval.main([toys["whisper-own"], "--dataset", dataset, *flags])
    assert {call.kwargs["language"] for call in asked.call_args_list} == {language}
    assert "25 samples (seed 0), 1 failed" in capsys.readouterr().out
    rows = list(map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines()))
    [failed] = [row for row in rows if row["failed"]]
    assert "broken.wav" in failed["failed"] and failed["deletions"] == failed["words"] > 0
    assert sum(row["time"] > 0 for row in rows) == 24

def test_flops_grow_with_the_clips(toys):
    model = TinyAudio(toys["whisper"], toys["llama"], device="cpu")
    clips = [{"answer": [1] * i, "seconds": 1 + i} for i in range(4)]
    flops = [train.model_flops(model, clips[:count], 0.1, 1) for count in range(1, 5)]
    assert 0 < flops[0] and flops == sorted(set(flops))

def test_what_bench_prints(talker, capsys, monkeypatch):
    monkeypatch.setattr(bench, "matmul_flops", lambda *_: 1e12)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)  # takes minutes
    def loss(model, *batch):
        if not next(count):  # the first row of training
            raise torch.OutOfMemoryError
        return real_loss(model, *batch)
    real_loss, count = TinyAudio.loss, itertools.count()
    monkeypatch.setattr(TinyAudio, "loss", loss)
    bench.main(["--model", talker, "--clips", "2", "--batch", "1", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert re.match(r".*whisper -> .*llama: 2 clips", printed)
    assert "\n| joint, batch 1 | " in printed and "\n| phase 1, 120 s | out of memory |" in printed
    assert re.search(r"\n\| phase 2, 120 s \| \d", printed)
    for flag in ("--clips", "--batch", "--batch-seconds"):
        with pytest.raises(SystemExit):
            bench.main(["--plan", flag, "0"])
        assert flag in capsys.readouterr().err.splitlines()[-1]
    bench.main(["--plan", "--encoder", "hubert", "--decoder", "qwen3-8b"])
    printed = capsys.readouterr().out
    assert re.search(r"\b962M\b.* 12\.94M .* 8191M\b.* 0\.14%", printed)
    assert re.search(r"4090.* no \|\n.*A40.* yes \|\n.*A100.* yes \|\n.*H100.* yes \|", printed)
    bench.main(["--plan", "--checkpointing"])
    less = capsys.readouterr().out
    assert re.search(r"4090.* yes \|", less)
    bench.main(["--plan", "--lora-rank", "16"])
    more = capsys.readouterr().out
    flops = [int(re.search(r"(\d+) GFLOP", text)[1]) for text in (printed, less, more)]
    assert 1.3 < flops[1] / flops[0] < 1.5  # a third pass through the decoder
    memory = [float(re.search(r"([\d.]+) GB at", text)[1]) for text in (less, printed, more)]
    assert flops[0] < flops[2] and memory == sorted(set(memory)) and ", CTC 1.0, " in printed

@pytest.mark.parametrize("encoder", ["hubert", "whisper"])
def test_bench_of_random_weights(embedded, encoder, capsys, monkeypatch):
    monkeypatch.setattr(bench, "matmul_flops", lambda *_: 1e12)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    decoder = hf.Qwen3Config(**{**LLAMA, "vocab_size": 50000}, head_dim=8)
    monkeypatch.setattr(bench, "CONFIGS", {encoder: TOYS[encoder][1], "qwen3-8b": decoder})
    bench.main(["--random", "--encoder", encoder, "--clips", "2", "--batch", "1", "2",
                "--batch-seconds", "10", "20", "--checkpointing", "--device", "cpu"])
    rows = re.findall(r"\n\| ([^|]+) \| [\d.]+ \|", capsys.readouterr().out)
    assert len(rows) == 12 and {"joint, batch 2", "phase 2, --compile, 20 s"} < set(rows)

def test_scripts_start_without_modules_of_posix_and_errors_are_one_line():
    posix = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            assert not posix & {getattr(node, "module", ""), getattr(node, "name", "")}, path
    code = f"""import runpy, sys
sys.modules |= dict.fromkeys({posix})
import demo
for command in sys.argv[1:]:
    sys.argv = command.split()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        print(end.code)"""
    commands = ["sample.py x.wav --model missing", "eval.py missing --dataset missing.jsonl",
                "eval.py . --dataset assets/quickstart/test.jsonl --device missing",
                "bench.py --random --device missing", "train.py --resume missing"]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *commands], cwd=ROOT,
                          text=True, capture_output=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 5 and not done.stderr, done.stderr
    for command, line in zip(commands, lines):
        assert line.startswith(command.split()[0] + ": ") and "missing" in line

def test_the_project_stays_small():
    limits = {"data.py": 355, "offline.py": 140, "tinyaudio.py": 585, "train.py": 589,
              "sample.py": 193, "eval.py": 211, "demo.py": 130, "bench.py": 198,
              "*.py": 2401, "tests/*.py": 1820, "README.md": 235}
    faults, sizes = [], {}
    for pattern, limit in limits.items():
        text = "".join(path.read_text("utf-8") for path in ROOT.glob(pattern))
        lines, sizes[pattern] = text.splitlines(), len(text.encode())
        faults += [f"{pattern} has {len(lines)} lines"] if len(lines) > limit else []
        if pattern.endswith(".py"):
            faults += [f"{pattern}, too wide: {line}" for line in lines if len(line) > 100]
            faults += [f"{pattern}, two statements: {token.line}" for token in
                       tokenize.generate_tokens(io.StringIO(text).readline) if token.string == ";"]
    assert {path.name for path in ROOT.glob("*.py")} < limits.keys() and not faults, faults
    assert sizes["*.py"] <= 131_150 and sizes["README.md"] <= 15_000, sizes
