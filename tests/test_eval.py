"""Scoring: parity with the reference scorer, benchmarks in their own schemas, interrupted runs, comparisons."""

import io
import json
import random
import re
from collections import Counter
from importlib.metadata import version

import jiwer
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
from datasets import Audio, Features, Value
from conftest import ROOT, SENTENCES, run, tone
from whisper_normalizer.english import EnglishTextNormalizer

import eval
from eval import BENCHMARKS, bootstrap, corpus_wer, draw_clips, marked, open_stream, score, summarize
from tinyaudio import InputError

# ---------------------------------------------------------------------------------------------------------- scoring


def pairs(count=300):
    """Reference and hypothesis pairs with numbers, contractions, spellings, fillers, punctuation and empty strings."""
    words = ("twenty one,two,2,$3.50,three hundred,1990s,first,it's,it is,can't,cannot,won't,I'm,they've,colour,color,grey,gray,organise,"
             "organize,um,uh,mhm,hmm,Mr. Smith,Dr.,OK,okay,the,a,house,(laughs),[noise],e-mail,half past four,10%,well-known,naïve,é,don't").split(",")
    rng = random.Random(0)
    for _ in range(count):
        reference = [rng.choice(words) for _ in range(rng.randrange(0, 14))]
        hypothesis = [rng.choice(words) if rng.random() < 0.2 else word for word in reference if rng.random() > 0.1]
        if rng.random() < 0.1:
            hypothesis = []
        yield " ".join(reference).upper() if rng.random() < 0.2 else " ".join(reference), " ".join(hypothesis)


def test_wer_equals_that_of_jiwer_on_normalised_texts():
    references, hypotheses = zip(*pairs())
    normalize = EnglishTextNormalizer()
    kept = [(normalize(r), normalize(h)) for r, h in zip(references, hypotheses) if normalize(r)]
    assert 200 < len(kept) < len(references) and any(not h for _, h in kept)
    assert corpus_wer(references, hypotheses) == jiwer.wer([r for r, _ in kept], [h for _, h in kept])
    counts = jiwer.process_words([r for r, _ in kept], [h for _, h in kept])
    rows = [score(*pair) for pair in zip(references, hypotheses)]
    for name in ("substitutions", "deletions", "insertions"):
        assert sum(row[name] for row in rows) == getattr(counts, name)
    cer = sum(row["character_errors"] for row in rows) / sum(row["characters"] for row in rows)
    assert cer == jiwer.cer([r for r, _ in kept], [h for _, h in kept])


def test_corpus_wer():
    assert corpus_wer(["sun and moon"], ["sun and moon"]) == 0
    assert corpus_wer(["sun moon star sky", "sea land"], ["sun noon star", "sea land"]) == 2 / 6  # by words, not by clips
    assert corpus_wer(["It's GOOD.", "", "ignore_time_segment_in_scoring"], ["it is good", "anything", "x"]) == 0
    assert corpus_wer(["sun moon"], [""]) == 1
    assert np.isnan(corpus_wer([""], ["sun"]))
    assert corpus_wer(["Sun."], ["sun"], "none") == 1 and corpus_wer(["Sun."], ["sun"], "basic") == 0


def test_errors_are_marked_in_place():
    found = marked("over there my dear old friend", "over their dear old friend now")
    assert found == "over [sub: there->their] [del: my] dear old friend [ins: now]"


def test_bootstrap_interval_holds_the_value_and_shrinks():
    def wer(drawn):
        return eval.ratio(drawn, "errors", "words")

    rng = np.random.default_rng(0)
    rows = [{"errors": int(e), "words": 10} for e in rng.binomial(10, 0.3, 800)]
    low, high = bootstrap(rows, wer)
    assert low < wer(rows) < high and bootstrap(rows, wer) == [low, high]  # seeded
    assert high - low == pytest.approx(2 * 1.96 * (0.3 * 0.7 / 8000) ** 0.5, rel=0.3)  # as for a binomial share


# ------------------------------------------------------------------------------------------------------- benchmarks


def hub_folder(root, config, split, audio_column, text_column, extra, count=30, typed=True):
    """A dataset as the Hub lays it out: parquet with nested audio, a README that names config and split."""
    rows = []
    for i in range(count):
        buffer = io.BytesIO()
        soundfile.write(buffer, tone(0.5 + i / 50, i), 16_000, format="flac")
        text = None if i == 3 else SENTENCES[i % 4].upper()
        rows.append({**extra, "id": f"clip-{i}", audio_column: {"bytes": buffer.getvalue(), "path": f"{i}.flac"}, text_column: text})
    (root / "data").mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    if typed:  # the features as `push_to_hub` leaves them
        features = Features({name: Audio(sampling_rate=16_000) if name == audio_column else Value("string") for name in table.column_names})
        table = table.cast(pyarrow.schema([(name, table.schema.field(name).type if name == audio_column else "string") for name in table.column_names],
                                          metadata=features.arrow_schema.metadata))
    pyarrow.parquet.write_table(table, root / "data" / f"{split}-00000-of-00001.parquet")
    (root / "README.md").write_text("---\nconfigs:\n- config_name: {0}\n  data_files:\n  - split: {1}\n    path: data/{1}-*\n---\n".format(config, split))
    return str(root)


@pytest.mark.parametrize("name, extra", [
    ("loquacious", {"ID": "a", "duration": 1.5, "sex": "unk", "spk_id": "7"}),
    ("librispeech", {"dataset": "librispeech", "audio_length_s": 1.5}),
    ("voxpopuli", {"dataset": "voxpopuli", "audio_length_s": 1.5})])
def test_benchmarks_are_read_in_their_own_schema(tmp_path, name, extra):
    _, config, split, audio_column, text_column = BENCHMARKS[name]
    folder = hub_folder(tmp_path / "set", config, split, audio_column, text_column, extra)
    clips = {clip["name"]: clip for clip in draw_clips(open_stream(folder, config, split, audio_column, text_column), folder, None, 0)}
    assert len(clips) == 30 and len(eval.load_audio(clips[f"{folder}#0"]["audio"])) == 8000
    assert [clips[f"{folder}#{i}"]["text"] for i in range(4)] == [SENTENCES[0], SENTENCES[1], SENTENCES[2], ""]
    rows = open_stream(folder, config, split, audio_column, text_column)
    drawn = [[clip["name"] for clip in draw_clips(rows, folder, 10, seed)] for seed in range(40)]
    assert drawn[0] == [clip["name"] for clip in draw_clips(rows, folder, 10, 0)]
    counts = Counter(sum(drawn, []))
    assert len(counts) == 30 and max(counts.values()) < 26  # of 40; each clip is expected 13 times
    with pytest.raises(InputError, match="no column speech, but"):
        open_stream(folder, config, split, "speech", text_column)


def test_a_benchmark_that_the_hub_cannot_deliver_is_one_line():
    done = run("eval.py", "assets/default", "--dataset", "loquacious", check=False)
    assert done.returncode == 1 and "speechbrain/LoquaciousSet" in done.stderr.splitlines()[-1]


# -------------------------------------------------------------------------------------------------------- the script


def test_the_files_it_writes_and_what_it_prints(trained, dataset, tmp_path):
    out = tmp_path / "out"
    done = run("eval.py", trained[0], "--dataset", dataset, "--out", out, "--worst", 2, "--leaderboard", "Toy")
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    assert len(rows) == summary["samples"] == 25 and summary["failed"] == 1
    failed = [row for row in rows if row["failed"]]
    assert "broken.wav" in failed[0]["failed"] and failed[0]["deletions"] == failed[0]["words"] == 2
    assert summary["wer"] == sum(row["errors"] for row in rows) / sum(row["words"] for row in rows)
    assert re.search(r"Sample 25: WER = [\d.]+%, Time = [\d.]+s\n  Ref:  .*\n  Pred: ", done.stdout)
    assert "CHECKPOINT @ 25 samples: WER = " in done.stdout and "seed 0" in done.stdout and f"jiwer {version('jiwer')}" in done.stdout
    assert "[sub: " in done.stdout or "[del: " in done.stdout
    assert re.search(r"^\| Toy \| .*whisper \| .*llama \| 0\.0M \| .* \| 25 \| [\d.]+ ± [\d.]+ \| \d+ \| \S+ \| \d{4}-\d\d-\d\d \|$", done.stdout, re.M)
    assert done.stdout.count("\n  Ref:") == 25 and (out / "results.txt").read_text().count("\nRef:") == 25


def test_an_interrupted_run_goes_on_and_gives_the_same(trained, dataset, tmp_path):
    whole = run("eval.py", trained[0], "--dataset", dataset, "--out", tmp_path / "whole", "--max-samples", 12)
    again = run("eval.py", trained[0], "--dataset", dataset, "--out", tmp_path / "again", "--max-samples", 12)
    figures = [re.search(r"\nWER .*", done.stdout).group() for done in (whole, again)]
    assert figures[0] == figures[1]
    rows = (tmp_path / "whole" / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "again" / "results.jsonl").write_text("".join(rows[:5]))
    resumed = run("eval.py", trained[0], "--dataset", dataset, "--out", tmp_path / "again", "--max-samples", 12, "--resume")
    assert figures[0] == re.search(r"\nWER .*", resumed.stdout).group() and "Sample 5:" not in resumed.stdout
    other = run("eval.py", trained[0], "--dataset", dataset, "--out", tmp_path / "again", "--max-samples", 12, "--decode", "ctc", "--resume",
                check=False)
    assert other.returncode == 1 and "of another checkpoint or --decode" in other.stderr
    other = run("eval.py", trained[0], "--dataset", dataset, "--out", tmp_path / "again", "--seed", 1, "--resume", check=False)
    assert other.returncode == 1 and "other clips" in other.stderr


def test_whisper_with_its_own_decoder_is_a_baseline(toys, dataset, tmp_path):
    done = run("eval.py", toys["whisper-own"], "--dataset", dataset, "--out", tmp_path, "--max-samples", 4)
    assert "4 samples" in done.stdout and json.loads((tmp_path / "summary.json").read_text())["decoder"] == "its own"


def test_compare_pairs_clips_by_name(tmp_path):
    for name, errors in (("a", [0, 1, 2, 0]), ("b", [0, 0, 2, 1])):
        rows = [{"name": str(i), "errors": e, "words": 5} for i, e in enumerate(errors)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (rows if name == "a" else rows[::-1])))
    done = run("eval.py", "--compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert "4 clips in both: WER A 15.00%, B 15.00%, B - A +0.00%" in done.stdout
    assert "right in A only: 1, in B only: 1, in both: 1, in neither: 1" in done.stdout
    missing = run("eval.py", "--compare", tmp_path / "a.jsonl", tmp_path / "c.jsonl", check=False)
    assert missing.returncode == 1 and "c.jsonl" in missing.stderr


def test_summary_of_nothing_heard():
    row = {**score("", "x"), "time": 0.0, "seconds": 1.0, "failed": None}
    summary = summarize([row], 1.0)
    assert summary["left_out"] == 1 and np.isnan(summary["wer"])


@pytest.mark.parametrize("flags, message", [
    (["--dataset", "assets/quickstart/test.jsonl"], "a checkpoint and --dataset are needed"),
    (["assets/default", "--dataset", "assets/quickstart/test.jsonl", "--split", "test"], "not for files"),
    (["assets/default", "--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
    (["nowhere", "--dataset", "assets/quickstart/test.jsonl"], "nowhere")])
def test_wrong_flags_are_one_line(flags, message):
    done = run("eval.py", *flags, check=False)
    assert done.returncode and message in done.stderr.splitlines()[-1]
