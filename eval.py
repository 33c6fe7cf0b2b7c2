"""Word error rate (WER) of a checkpoint, on a benchmark or on your own files.

    python eval.py assets/default --dataset assets/quickstart/test.jsonl
    python eval.py out --dataset loquacious --max-samples 100
    python eval.py openai/whisper-base --dataset my.jsonl      any recogniser of transformers

Writes results.txt, results.jsonl (a row for each clip) and summary.json, and prints where. The
same command with --resume goes on after an interruption.
"""
import json
import re
import subprocess
import time
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import jiwer
import numpy as np
from transformers import PretrainedConfig, pipeline
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from data import (SAMPLE_RATE, InputError, is_hub_id, load_audio, open_stream,
                  read_clips, run, stream_clips, write_file)
from tinyaudio import DECODINGS, TinyAudio, fetch, find_device

ESB = "hf-audio/esb-datasets-test-only-sorted"  # the test sets of the Open ASR Leaderboard
NAMES = "ami common_voice earnings22 gigaspeech spgispeech tedlium voxpopuli".split()
BENCHMARKS = {name.replace("_", ""): f"{ESB}:{name}:test" for name in NAMES}
BENCHMARKS |= {"librispeech": f"{ESB}:librispeech:test.clean",
               "loquacious": "speechbrain/LoquaciousSet:medium:test"}
NORMALIZERS = {"english": EnglishTextNormalizer(), "none": str,
               "basic": BasicTextNormalizer(preserve_marks=True)}  # such as the vowels of Hindi
PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u2026": " "})  # quotes and the ellipsis
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

def is_english(texts):
    """Whether nearly all letters of the texts are those of English."""
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    return sum(map(str.isascii, letters)) >= 0.999 * len(letters)

def corpus_wer(references, hypotheses):
    """WER of lists of texts, after Whisper's normaliser for English or for other languages."""
    normalizer = "english" if is_english(references) else "basic"
    return wer([score(*pair, normalizer) for pair in zip(references, hypotheses)])

def interval(rows):
    """95 % interval over 1000 draws of the clips, with replacement (Bisani and Ney 2004)."""
    if len(rows) < 2:
        return None, None
    draws = np.random.default_rng(0).integers(len(rows), size=(1000, len(rows)))
    return np.percentile([wer([rows[i] for i in draw]) for draw in draws], [2.5, 97.5]).tolist()

def read_samples(args):
    name = BENCHMARKS.get(args.dataset, args.dataset)
    if not is_hub_id(name):
        clips = np.random.default_rng(args.seed).permutation(read_clips(name))
        return clips[:args.max_samples].tolist()
    rows = open_stream(name, "test")
    if args.max_samples:
        rows = rows.shuffle(args.seed, buffer_size=1000).take(args.max_samples)
    return list(stream_clips(rows, name))

def load_recognizer(args):
    """A function from waves to texts; its encoder, decoder and trained parameters; weights."""
    name, device = args.checkpoint, find_device(args.device)
    config, _ = fetch(PretrainedConfig.get_config_dict, name)
    if "model_type" not in config:
        model = TinyAudio.from_pretrained(name, device)
        size = sum(x.numel() for x in model.loaded.values())
        facts = config["encoder"], config["decoder"], f"{size / 1e6:.1f}M"
        return lambda waves: model.transcribe(waves, args.decode), facts, model.loaded
    pipe = fetch(lambda x: pipeline("automatic-speech-recognition", x, device=device), name)
    options = {}
    if config["model_type"] == "whisper":
        options = {"return_timestamps": True, "generate_kwargs": {"num_beams": 1}}
        if getattr(pipe.model.generation_config, "is_multilingual", False):
            # None: it detects the language of each clip
            language = "en" if args.normalizer == "english" else None
            options["generate_kwargs"] |= {"language": language, "task": "transcribe"}
    recognizer = lambda waves: [found["text"] for found in pipe(waves, **options)]
    return recognizer, (name, "-", "-"), pipe.model.state_dict()

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
    cost = (time.perf_counter() - start) / (sum(row["seconds"] for row in rows) or 1)
    for row, text in zip((row for row in rows if not row["failed"]), texts):
        row.update(hypothesis=text, time=cost * row["seconds"])  # its share of the time
    return rows

def score_clips(args, clips, out):
    """Recognise and score the clips; write and print a row of each. Returns rows and facts."""
    recognizer, facts, tensors = load_recognizer(args)
    weights = sum(zlib.crc32(x.float().contiguous().cpu().numpy()) for x in tensors.values())
    results = out / "results.jsonl"
    text = results.read_text("utf-8") if args.resume and results.exists() else ""
    rows = [json.loads(line) for line in text.split("\n")[:-1]]  # a crash may cut the last one
    asked = {"weights": weights, "decode": args.decode, "normalizer": args.normalizer}
    wanted = [{**asked, "name": clip["name"], "reference": clip["text"]} for clip in clips]
    if len(rows) > len(clips) or not all(x.items() <= y.items() for x, y in zip(wanted, rows)):
        raise InputError(f"{results} is of other clips, flags or weights: run without --resume")
    out.mkdir(parents=True, exist_ok=True)
    write_file(results, "".join(json.dumps(row) + "\n" for row in rows))
    while len(rows) < len(clips):
        chunk = slice(len(rows), len(rows) + 20 - len(rows) % 20)  # what a crash can lose
        for want, found in zip(wanted[chunk], recognize(clips[chunk], recognizer)):
            counts = score(want["reference"], found["hypothesis"], args.normalizer)
            rows.append({**want, **found, **counts})
        with open(results, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows[chunk])
        with suppress(BrokenPipeError):  # `| head` ends what is printed, not the files
            for number, row in enumerate(rows[chunk], chunk.start + 1):
                print(f"Sample {number}: WER = {wer([row]):.2%}, Time = {row['time']:.2f}s\n"
                      f"  Ref:  {row['reference']}\n  Pred: {row['failed'] or row['hypothesis']}")
            if len(rows) % 100 == 0 or len(rows) == len(clips):
                seconds = np.mean([row["time"] for row in rows])
                print(f"CHECKPOINT @ {len(rows)} samples:\n  Corpus WER: {wer(rows):.2%}\n"
                      f"  Avg Time/Sample: {seconds:.2f}s", flush=True)
    if not any(row["words"] and not row["failed"] for row in rows):
        raise InputError(f"no clip of {args.dataset} could be scored")
    return rows, facts

def report(args, rows, facts, out):
    """Write and print the summary; print the worst clips and a row for the leaderboard."""
    totals = {key: sum(row[key] for row in rows) for key in (*COUNTS, "seconds", "time")}
    scored = [row for row in rows if row["words"]]
    low, high = interval(scored)
    spread = "one clip" if low is None else f"95 % {low:.2%} to {high:.2%}"
    scorer = ", ".join(f"{name} {version(name)}" for name in ("jiwer", "whisper-normalizer"))
    summary = {**vars(args), **totals, "out": str(out), "wer": wer(rows), "low": low, "high": high,
               "samples": len(rows), "rtfx": totals["seconds"] / totals["time"], "scorer": scorer,
               "failed": sum(bool(row["failed"]) for row in rows),
               "unscored": len(rows) - len(scored)}
    header = ("{checkpoint} on {dataset}: {samples} samples (seed {seed}), {failed} failed, "
              "{unscored} without reference, {seconds:.0f} s\nWER {wer:.2%} ({spread}): {errors} "
              "errors ({substitutions} substituted, {deletions} deleted, {insertions} inserted) in "
              "{words} words\nRTFx {rtfx:.1f}; {scorer} ({normalizer}, plain quotes)\nIn {out}")
    header = header.format(**summary, spread=spread)
    write_file(out / "summary.json", json.dumps(summary, indent=2))
    write_file(out / "results.txt", header + "\n" + "".join(
        f"\n{row['name']}\nRef:  {row['reference']}\nPred: {row['hypothesis']}\n" for row in rows))
    print(header)
    for row in sorted(scored, key=lambda row: -wer([row]))[:args.worst]:
        texts = [normalize(row[key], args.normalizer) for key in ("reference", "hypothesis")]
        words = jiwer.visualize_alignment(jiwer.process_words(*texts), show_measures=False)
        print(f"\n{row['name']}, WER {wer([row]):.0%}\n{words}")
    if args.leaderboard:
        margin = "-" if low is None else f"{50 * (high - low):.2f}"
        commit = subprocess.run("git rev-parse --short HEAD", shell=True, capture_output=True,
                                cwd=Path(__file__).parent, text=True).stdout.strip() or "-"
        print(f"| {args.leaderboard} | {' | '.join(facts)} | {args.dataset} | {len(rows)} | "
              f"{100 * wer(rows):.2f} ± {margin} | {summary['rtfx']:.0f} | {commit} | "
              f"{time.strftime('%Y-%m-%d')} |")

def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="folder or hub id of a trained model or another recogniser")
    add("--dataset", required=True, help=f"{', '.join(BENCHMARKS)}, your files or folder, or "
                                         "owner/name:config:split of the Hub")
    add("--max-samples", type=int, help="random clips; of a set of the Hub, among 1000")
    add("--seed", type=int, default=0, help="of the random choice")
    add("--normalizer", choices=NORMALIZERS, default="english",
        help="Whisper's for English (default), its basic one for other languages, or none")
    add("--decode", choices=DECODINGS, help="default: the best one of the training")
    add("--out", help="default: a folder of outputs/ for each set, model and --decode")
    add("--resume", action="store_true", help="go on with an interrupted run")
    add("--worst", type=int, default=0, metavar="N", help="show the N worst clips word by word")
    add("--leaderboard", metavar="NAME", help="print a row for the README's leaderboard")
    add("--device", help="cuda, mps or cpu; default: the best that is here")
    args = parser.parse_args(argv)
    if min(args.seed, args.worst) < 0 or args.max_samples is not None and args.max_samples < 1:
        parser.error("--seed and --worst must be 0 or more, --max-samples 1 or more")
    names = re.sub(r"[^\w.]+", "-", f"{args.dataset[-30:]}_{args.checkpoint[-30:]}")
    own = zlib.crc32(repr((args.dataset, args.checkpoint, args.decode)).encode())
    out = Path(args.out or f"outputs/eval_{names}_{own:08x}")  # other names, another folder
    rows, facts = score_clips(args, read_samples(args), out)
    report(args, rows, facts, out)

if __name__ == "__main__":
    run(main)
