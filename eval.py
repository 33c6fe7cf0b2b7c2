"""Word error rate (WER) of a checkpoint, on a benchmark or on your own files.

    python eval.py assets/default --dataset assets/quickstart/test.jsonl
    python eval.py out --dataset loquacious --max-samples 100
    python eval.py openai/whisper-base --dataset my.jsonl      any recogniser of transformers
    python eval.py --compare outputs/a/results.jsonl outputs/b/results.jsonl

Writes outputs/eval_<dataset>_<model>/: results.txt, results.jsonl (a row for each clip) and
summary.json. The same command with --resume goes on after an interruption.
"""
import datetime
import json
import random
import re
import subprocess
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib.metadata import version
from pathlib import Path

import jiwer
import numpy as np
from transformers import PretrainedConfig, pipeline
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from data import (SAMPLE_RATE, InputError, finished_rows, first_line, is_hub_id, load_audio,
                  make_batches, open_stream, read_clips, stream_clips, write_file)
from tinyaudio import DECODINGS, TinyAudio, fetch

ASR = "hf-audio/esb-datasets-test-only-sorted"  # the test sets of the Open ASR Leaderboard
BENCHMARKS = {  # name -> hub id, config, split
    "loquacious": ("speechbrain/LoquaciousSet", "medium", "test"),
    "librispeech": (ASR, "librispeech", "test.clean"),
    "commonvoice": (ASR, "common_voice", "test"),
    **{name: (ASR, name, "test") for name in
       ("ami", "earnings22", "gigaspeech", "spgispeech", "tedlium", "voxpopuli")},
}
NORMALIZERS = {"english": EnglishTextNormalizer(), "basic": BasicTextNormalizer(),
               "none": lambda text: " ".join(text.split())}
SHUFFLED = 1000  # clips of a stream among which --max-samples draws
COUNTS = ("errors", "words", "substitutions", "deletions", "insertions")

def score(reference, hypothesis, normalizer="english"):
    """Counts of one clip; zeros for an empty reference, or one that TED-LIUM does not score."""
    ignored = reference.replace("_", " ").lower().strip() == "ignore time segment in scoring"
    reference, hypothesis = map(NORMALIZERS[normalizer], (reference, hypothesis))
    if ignored or not reference:
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
    """The clips to score, and the name of their set for the output folder."""
    if args.dataset in BENCHMARKS or is_hub_id(args.dataset):
        hub_id, config, split = BENCHMARKS.get(args.dataset, (args.dataset, None, "test"))
        config, split = args.config or config, args.split or split
        rows = open_stream(f"{hub_id}:{config or ''}:{split}", "test")
        if args.max_samples:
            rows = rows.shuffle(args.seed, buffer_size=SHUFFLED).take(args.max_samples)
        name = "-".join(filter(None, [args.dataset.replace("/", "-"), config, split]))
        return list(stream_clips(rows, hub_id)), name
    if args.config or args.split:
        raise InputError("--config and --split are for sets of the Hub, not for files")
    clips = read_clips(args.dataset)
    random.Random(args.seed).shuffle(clips)
    name = re.sub(r"\W+", "-", str(Path(args.dataset).with_suffix(""))).strip("-")
    return clips[:args.max_samples], name

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
    def recognizer(waves):
        sounds = [{"raw": wave, "sampling_rate": SAMPLE_RATE} for wave in waves]
        return [result["text"] for result in pipe(sounds, **options)]
    return recognizer, (name, "-", "-")

def recognize(clips, recognizer):
    """Rows (hypothesis, seconds, time, failed) of clips, in their order."""
    rows, good = [], []
    for clip in clips:
        rows.append({"hypothesis": "", "seconds": 0.0, "time": 0.0, "failed": None})
        try:
            wave = load_audio(clip["audio"])
            rows[-1] |= {"wave": wave, "seconds": len(wave) / SAMPLE_RATE}
            good.append(rows[-1])
        except InputError as error:
            rows[-1]["failed"] = str(error)
    for batch in make_batches(good, 120):
        start = time.perf_counter()
        texts = recognizer([row.pop("wave") for row in batch])
        rate = (time.perf_counter() - start) / sum(row["seconds"] for row in batch)
        for row, text in zip(batch, texts):  # each clip has its share of the batch's time
            row.update(hypothesis=text, time=rate * row["seconds"])
    return rows

def compare(first, second):
    """Print the paired difference in WER of two results.jsonl over the clips that both have."""
    try:
        a, b = ({row["name"]: row for row in finished_rows(file)} for file in (first, second))
        pairs = [(a[name], b[name]) for name in a.keys() & b.keys()]
        a, b = zip(*pairs)
    except (OSError, ValueError, KeyError) as error:
        reason = first_line(error)
        raise InputError(f"{first} and {second} have no common clips: {reason}") from None
    def difference(pairs):
        return wer([b for _, b in pairs]) - wer([a for a, _ in pairs])
    low, high = interval(pairs, difference)
    print(f"A {first}, WER {wer(a):.2%}\nB {second}, WER {wer(b):.2%}\n{len(pairs)} clips in both: "
          f"B - A {difference(pairs):+.2%} (95 % {low:+.2%} to {high:+.2%})")

def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", nargs="?", help="folder or hub id of a trained model or another recogniser")
    add("--dataset", help=f"{', '.join(BENCHMARKS)}, a hub id, your files or a folder")
    add("--config", help="of a set of the Hub")
    add("--split", help="of a set of the Hub")
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
    clips, dataset = read_samples(args)
    model_name = re.sub(r"[^A-Za-z0-9.]+", "-", args.checkpoint).strip("-")
    out = Path(args.out or f"outputs/eval_{dataset}_{model_name}")
    results, normalize = out / "results.jsonl", NORMALIZERS[args.normalizer]
    rows = finished_rows(results) if args.resume and results.exists() else []
    asked = {"checkpoint": args.checkpoint, "decode": args.decode, "normalizer": args.normalizer}
    wanted = [{**asked, "name": clip["name"], "reference": clip["text"]} for clip in clips]
    if any({**row, **want} != row for row, want in zip(rows, wanted)):
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
    totals = {key: sum(row[key] for row in rows) for key in (*COUNTS, "seconds", "time")}
    low, high = interval(rows)
    summary = {**vars(args), **totals, "wer": wer(rows), "low": low, "high": high,
               "samples": len(rows), "rtfx": totals["seconds"] / totals["time"],
               "failed": sum(bool(row["failed"]) for row in rows),
               "unscored": sum(not row["words"] for row in rows),
               "scorer": f"jiwer {version('jiwer')}, whisper-normalizer "
                         f"{version('whisper-normalizer')} ({args.normalizer})"}
    header = ("{checkpoint} on {dataset}: {samples} samples (seed {seed}), {failed} failed, "
              "{unscored} without reference, {seconds:.0f} s\nWER {wer:.2%} (95 % {low:.2%} to "
              "{high:.2%}): {substitutions} substitutions, {deletions} deletions, {insertions} "
              "insertions in {words} words\nRTFx {rtfx:.1f}; {scorer}").format(**summary)
    print(header)
    write_file(out / "results.txt", header + "\n" + "".join(
        f"\n{row['name']}\nRef:  {row['reference']}\nPred: {row['hypothesis']}\n" for row in rows))
    write_file(out / "summary.json", json.dumps(summary, indent=2))
    scored = [row for row in rows if row["words"]]
    for row in sorted(scored, key=lambda row: -row["errors"] / row["words"])[:args.worst]:
        words = jiwer.process_words(normalize(row["reference"]), normalize(row["hypothesis"]))
        print(f"\n{row['name']}, WER {wer([row]):.0%}\n"
              + jiwer.visualize_alignment(words, show_measures=False, skip_correct=False))
    if args.leaderboard:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True,
                                cwd=Path(__file__).parent, text=True).stdout.strip()
        print(f"| {args.leaderboard} | {' | '.join(facts)} | {dataset} | {len(rows)} | "
              f"{100 * wer(rows):.2f} ± {50 * (high - low):.2f} | {summary['rtfx']:.0f} | "
              f"{commit} | {datetime.date.today()} |")

if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"eval.py: {error}")
    except KeyboardInterrupt:
        sys.exit("eval.py: interrupted; the same command with --resume goes on")
