"""Word error rate (WER) of a checkpoint, on a benchmark or on your own files.

    python eval.py assets/default --dataset assets/quickstart/test.jsonl
    python eval.py out --dataset loquacious --max-samples 100
    python eval.py openai/whisper-base --dataset my.jsonl      any recogniser of transformers
    python eval.py --compare outputs/a/results.jsonl outputs/b/results.jsonl

Writes outputs/eval_<dataset>_<model>/: results.txt, results.jsonl (a row for each clip) and
summary.json. The same command with --resume goes on after an interruption.
"""
import json
import re
import subprocess
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib.metadata import version
from pathlib import Path

import jiwer
import numpy as np
from transformers import PretrainedConfig, pipeline
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from data import (SAMPLE_RATE, InputError, finished_rows, is_hub_id, load_audio, open_stream,
                  read_clips, run, stream_clips, write_file)
from tinyaudio import DECODINGS, TinyAudio, fetch

ASR = "hf-audio/esb-datasets-test-only-sorted"  # the test sets of the Open ASR Leaderboard
BENCHMARKS = {  # on the Hub
    "loquacious": "speechbrain/LoquaciousSet:medium:test",
    "librispeech": f"{ASR}:librispeech:test.clean",
    "commonvoice": f"{ASR}:common_voice:test",
    **{name: f"{ASR}:{name}:test" for name in
       ("ami", "earnings22", "gigaspeech", "spgispeech", "tedlium", "voxpopuli")},
}
NORMALIZERS = {"english": EnglishTextNormalizer(), "basic": BasicTextNormalizer(), "none": str}
PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u2026": " "})  # quotes and the ellipsis
SHUFFLED = 1000  # clips of a stream among which --max-samples draws
COUNTS = ("errors", "words", "substitutions", "deletions", "insertions")

def normalize(text, normalizer):
    return NORMALIZERS[normalizer](text.translate(PLAIN))

def score(reference, hypothesis, normalizer="english"):
    """Counts of one clip; zeros for an empty reference, or one that TED-LIUM does not score."""
    ignored = reference.replace("_", " ").lower().strip() == "ignore time segment in scoring"
    reference, hypothesis = (normalize(text, normalizer) for text in (reference, hypothesis))
    if ignored or not reference.strip():
        return dict.fromkeys(COUNTS, 0)
    found = jiwer.process_words(reference, hypothesis)
    errors = found.substitutions, found.deletions, found.insertions
    return dict(zip(COUNTS, (sum(errors), len(reference.split()), *errors)))

def wer(rows):
    """Errors by reference words over all rows, a fraction; NaN without words."""
    return sum(row["errors"] for row in rows) / (sum(row["words"] for row in rows) or np.nan)

def corpus_wer(references, hypotheses):
    """WER of lists of texts, after Whisper's English normaliser."""
    return wer([score(*pair) for pair in zip(references, hypotheses)])

def interval(rows, statistic=wer):
    """95 % interval over 1000 draws of clips with replacement (Bisani and Ney 2004)."""
    draws = np.random.default_rng(0).integers(len(rows), size=(1000, len(rows)))
    values = [statistic([rows[i] for i in draw]) for draw in draws]
    return np.percentile(values, [2.5, 97.5]).tolist()

def read_samples(args):
    """The clips to score."""
    name = BENCHMARKS.get(args.dataset, args.dataset)
    if not is_hub_id(name):
        clips = np.random.default_rng(args.seed).permutation(read_clips(name))
        return clips[:args.max_samples].tolist()
    rows = open_stream(name, "test")
    if args.max_samples:
        rows = rows.shuffle(args.seed, buffer_size=SHUFFLED).take(args.max_samples)
    return list(stream_clips(rows, name))

def load_recognizer(name, decode, device):
    """A function from waves to texts; and its encoder, decoder and trained parameters."""
    config, _ = fetch(PretrainedConfig.get_config_dict, name)
    if "model_type" not in config:
        model = TinyAudio.from_pretrained(name, device)
        facts = config["encoder"], config["decoder"], f"{model.trained_size / 1e6:.1f}M"
        return lambda waves: model.transcribe(waves, decode), facts
    pipe = fetch(lambda x: pipeline("automatic-speech-recognition", x, device=device), name)
    options = {}
    if config["model_type"] == "whisper":
        options = {"return_timestamps": True, "generate_kwargs": {"num_beams": 1}}
        if getattr(pipe.model.generation_config, "is_multilingual", False):
            options["generate_kwargs"] |= {"language": "en", "task": "transcribe"}
    return lambda waves: [found["text"] for found in pipe(waves, **options)], (name, "-", "-")

def recognize(clips, recognizer):
    """Rows (hypothesis, seconds, time, failed) of clips."""
    rows, waves = [], []
    for clip in clips:
        rows.append({"hypothesis": "", "seconds": 0.0, "time": 0.0, "failed": None})
        try:
            waves.append(load_audio(clip["audio"]))
            rows[-1]["seconds"] = len(waves[-1]) / SAMPLE_RATE
        except InputError as error:
            rows[-1]["failed"] = str(error)
    start = time.perf_counter()
    texts = recognizer(waves) if waves else []
    rate = (time.perf_counter() - start) / (sum(row["seconds"] for row in rows) or 1)
    for row, text in zip((row for row in rows if not row["failed"]), texts):
        row.update(hypothesis=text, time=rate * row["seconds"])  # its share of the time
    return rows

def compare(first, second):
    """Print the paired difference in WER of two results.jsonl over the clips that both have."""
    a, b = ({row["name"]: row for row in finished_rows(file)} for file in (first, second))
    pairs = [(a[name], b[name]) for name in a if name in b]
    if not pairs or any(x["normalizer"] != y["normalizer"] for x, y in pairs):
        raise InputError(f"{first} and {second} have no clips in common, or other --normalizer")
    a, b = zip(*pairs)
    low, high = interval(pairs, lambda draw: wer([b for _, b in draw]) - wer([a for a, _ in draw]))
    print(f"A {first}, WER {wer(a):.2%}\nB {second}, WER {wer(b):.2%}\n{len(pairs)} clips in both: "
          f"B - A {wer(b) - wer(a):+.2%} (95 % {low:+.2%} to {high:+.2%})")

def score_clips(args, clips, out):
    """Recognise and score the clips; print and write a row of each. Returns the rows, and what
    `load_recognizer` tells of the model."""
    results = out / "results.jsonl"
    rows = finished_rows(results) if args.resume and results.exists() else []
    asked = {key: getattr(args, key) for key in ("checkpoint", "decode", "normalizer")}
    wanted = [{**asked, "name": clip["name"], "reference": clip["text"]} for clip in clips]
    if len(rows) > len(clips) or any({**row, **w} != row for row, w in zip(rows, wanted)):
        raise InputError(f"{results} is of other clips or flags: run without --resume")
    recognizer, facts = load_recognizer(args.checkpoint, args.decode, args.device)
    out.mkdir(parents=True, exist_ok=True)
    write_file(results, "".join(json.dumps(row) + "\n" for row in rows))
    while len(rows) < len(clips):
        chunk = slice(len(rows), len(rows) + 20 - len(rows) % 20)  # what a crash can lose
        for want, found in zip(wanted[chunk], recognize(clips[chunk], recognizer)):
            text = found["hypothesis"]
            rows.append({**want, **found, **score(want["reference"], text, args.normalizer)})
            print(f"Sample {len(rows)}: WER = {wer(rows[-1:]):.2%}, Time = {found['time']:.2f}s\n"
                  f"  Ref:  {want['reference']}\n  Pred: {found['failed'] or text}")
        with open(results, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows[chunk])
        if len(rows) % 100 == 0 or len(rows) == len(clips):
            print(f"CHECKPOINT @ {len(rows)} samples:\n  Corpus WER: {wer(rows):.2%}\n"
                  f"  Avg Time/Sample: {np.mean([row['time'] for row in rows]):.2f}s", flush=True)
    if not any(row["words"] and not row["failed"] for row in rows):
        raise InputError(f"no clip of {args.dataset} could be scored")
    return rows, facts

def report(args, rows, facts, out):
    """Print and write the summary; print the worst clips and a row for the leaderboard."""
    totals = {key: sum(row[key] for row in rows) for key in (*COUNTS, "seconds", "time")}
    low, high = interval(rows)
    scorer = ", ".join(f"{name} {version(name)}" for name in ("jiwer", "whisper-normalizer"))
    summary = {**vars(args), **totals, "wer": wer(rows), "low": low, "high": high,
               "samples": len(rows), "rtfx": totals["seconds"] / totals["time"], "scorer": scorer,
               "failed": sum(bool(row["failed"]) for row in rows),
               "unscored": sum(not row["words"] for row in rows)}
    header = ("{checkpoint} on {dataset}: {samples} samples (seed {seed}), {failed} failed, "
              "{unscored} without reference, {seconds:.0f} s\nWER {wer:.2%} (95 % {low:.2%} to "
              "{high:.2%}): {substitutions} substitutions, {deletions} deletions, {insertions} "
              "insertions in {words} words\nRTFx {rtfx:.1f}; {scorer} ({normalizer}, plain quotes)")
    print(header.format(**summary))
    write_file(out / "summary.json", json.dumps(summary, indent=2))
    write_file(out / "results.txt", header.format(**summary) + "\n" + "".join(
        f"\n{row['name']}\nRef:  {row['reference']}\nPred: {row['hypothesis']}\n" for row in rows))
    scored = sorted((row for row in rows if row["words"]), key=lambda row: -wer([row]))
    for row in scored[:args.worst]:
        texts = [normalize(row[key], args.normalizer) for key in ("reference", "hypothesis")]
        words = jiwer.visualize_alignment(jiwer.process_words(*texts), show_measures=False,
                                          skip_correct=False)
        print(f"\n{row['name']}, WER {wer([row]):.0%}\n{words}")
    if args.leaderboard:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True,
                                cwd=Path(__file__).parent, text=True).stdout.strip()
        print(f"| {args.leaderboard} | {' | '.join(facts)} | {args.dataset} | {len(rows)} | "
              f"{100 * wer(rows):.2f} ± {50 * (high - low):.2f} | {summary['rtfx']:.0f} | "
              f"{commit} | {time.strftime('%Y-%m-%d')} |")

def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", nargs="?", help="folder or hub id of a trained model or another recogniser")
    add("--dataset", help=f"{', '.join(BENCHMARKS)}, your files or folder, or owner/name:config:"
                          "split of the Hub")
    add("--max-samples", type=int, help=f"random clips; of a set of the Hub, among {SHUFFLED}")
    add("--seed", type=int, default=0, help="of the random choice")
    add("--normalizer", choices=NORMALIZERS, default="english", help="Whisper's, or none")
    add("--decode", choices=DECODINGS, help="default: the best one of the training")
    add("--out", help="default: outputs/eval_<dataset>_<model>")
    add("--resume", action="store_true", help="go on with an interrupted run")
    add("--worst", type=int, default=0, metavar="N", help="show the N worst clips word by word")
    add("--leaderboard", metavar="NAME", help="print a row for the README's leaderboard")
    add("--compare", nargs=2, metavar="RESULTS", help="paired difference of two results.jsonl")
    add("--device", help="cuda, mps or cpu; default: the best that is here")
    args = parser.parse_args(argv)
    if args.compare:
        return compare(*args.compare)
    if not args.checkpoint or not args.dataset:
        parser.error("a checkpoint and --dataset are needed")
    if args.max_samples is not None and args.max_samples < 1:
        parser.error("--max-samples must be 1 or more")
    names = [re.sub(r"[^A-Za-z0-9.]+", "-", x).strip("-") for x in (args.dataset, args.checkpoint)]
    out = Path(args.out or f"outputs/eval_{'_'.join(names)}")
    rows, facts = score_clips(args, read_samples(args), out)
    report(args, rows, facts, out)

if __name__ == "__main__":
    run(main)
