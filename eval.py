"""Word error rate (WER) of a checkpoint, on a benchmark or on your own files.

    python eval.py assets/default --dataset assets/quickstart/test.jsonl
    python eval.py out/mine --dataset loquacious --config medium --split test --max-samples 100
    python eval.py openai/whisper-base --dataset my.jsonl         a baseline: Whisper with its own decoder
    python eval.py --compare outputs/a/results.jsonl outputs/b/results.jsonl

Results go to outputs/eval_<dataset>_<model>/: results.txt, results.jsonl (a row per clip) and summary.json. An interrupted
run keeps what it has; the same command with --resume goes on.
"""

import argparse
import json
import math
import random
import re
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import jiwer
import numpy as np
from tqdm import tqdm
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from tinyaudio import (DECODINGS, SAMPLE_RATE, InputError, TinyAudio, clean_text, first_line, from_hub, load_audio, make_batches,
                       placement, read_clips, read_whole_rows, split_audio, write_whole)

ESB = "hf-audio/esb-datasets-test-only-sorted"  # the test sets of the Open ASR Leaderboard
BENCHMARKS = {  # name -> hub id, config, split, audio column, text column
    "loquacious": ("speechbrain/LoquaciousSet", "medium", "test", "wav", "text"),
    "librispeech": (ESB, "librispeech", "test.clean", "audio", "text"),
    "ami": (ESB, "ami", "test", "audio", "text"),
    "earnings22": (ESB, "earnings22", "test", "audio", "text"),
    "gigaspeech": (ESB, "gigaspeech", "test", "audio", "text"),
    "spgispeech": (ESB, "spgispeech", "test", "audio", "text"),
    "tedlium": (ESB, "tedlium", "test", "audio", "text"),
    "voxpopuli": (ESB, "voxpopuli", "test", "audio", "text"),
    "commonvoice": (ESB, "common_voice", "test", "audio", "text"),
}
NORMALIZERS = {"english": EnglishTextNormalizer(), "basic": BasicTextNormalizer(), "none": lambda text: " ".join(text.split())}
DATA_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
IGNORED = "ignore time segment in scoring"  # how TED-LIUM marks what was not transcribed


# ---------------------------------------------------------------------------------------------------------- scoring


def corpus_wer(references, hypotheses, normalizer="english"):
    """Errors by reference words over all clips, a fraction. Clips whose normalised reference is empty are left out."""
    rows = [score(*pair, normalizer) for pair in zip(references, hypotheses)]
    return ratio(rows, "errors", "words")


def score(reference, hypothesis, normalizer="english"):
    """Counts of one clip: words, characters, substitutions, deletions, insertions, errors, character errors."""
    ignored = reference.replace("_", " ").lower().strip() == IGNORED
    reference, hypothesis = NORMALIZERS[normalizer](reference), NORMALIZERS[normalizer](hypothesis)
    if ignored or not reference:
        return dict.fromkeys(("words", "characters", "substitutions", "deletions", "insertions", "errors", "character_errors"), 0)
    words, characters = jiwer.process_words(reference, hypothesis), jiwer.process_characters(reference, hypothesis)
    return {"words": len(reference.split()), "characters": len(reference),
            "substitutions": words.substitutions, "deletions": words.deletions, "insertions": words.insertions,
            "errors": words.substitutions + words.deletions + words.insertions,
            "character_errors": characters.substitutions + characters.deletions + characters.insertions}


def ratio(rows, errors, total):
    """Sum of one count by the sum of another; NaN where there is nothing to count."""
    denominator = sum(row[total] for row in rows)
    return sum(row[errors] for row in rows) / denominator if denominator else float("nan")


def bootstrap(rows, statistic, draws=1000):
    """95 % interval of a statistic over clips drawn with replacement (Bisani and Ney 2004)."""
    rng = np.random.default_rng(0)
    values = [statistic([rows[i] for i in rng.integers(len(rows), size=len(rows))]) for _ in range(draws)]
    return np.percentile(values, [2.5, 97.5]).tolist()


def marked(reference, hypothesis, normalizer="english"):
    """The reference with the errors marked in place: there -> [sub: there->their], [del: word], [ins: word]."""
    out = jiwer.process_words(NORMALIZERS[normalizer](reference), NORMALIZERS[normalizer](hypothesis))
    words = []
    for chunk in out.alignments[0]:
        said = out.references[0][chunk.ref_start_idx:chunk.ref_end_idx]
        heard = out.hypotheses[0][chunk.hyp_start_idx:chunk.hyp_end_idx]
        words += {"equal": lambda: said, "delete": lambda: [f"[del: {word}]" for word in said],
                  "insert": lambda: [f"[ins: {word}]" for word in heard],
                  "substitute": lambda: [f"[sub: {a}->{b}]" for a, b in zip(said, heard)]}[chunk.type]()
    return " ".join(words)


# ------------------------------------------------------------------------------------------------------------- data


def read_samples(args):
    """The clips to score, dicts of name, audio (path or bytes) and text, and the name of the set for the output folder."""
    asked = (args.config, args.split, args.audio_column, args.text_column)
    if args.dataset in BENCHMARKS or is_hub_id(args.dataset):
        hub_id, *defaults = BENCHMARKS.get(args.dataset, (args.dataset, None, "test", "audio", "text"))
        config, split, *columns = (a or b for a, b in zip(asked, defaults))
        rows = open_stream(hub_id, config, split, *columns)
        clips = from_hub(lambda source: draw_clips(rows, source, args.max_samples, args.seed), hub_id)
        return clips, "-".join(filter(None, [args.dataset.replace("/", "-"), config, split]))
    if any(asked):
        raise InputError("--config, --split, --audio-column and --text-column are for benchmarks and hub ids, not for files")
    clips = read_clips(args.dataset)
    random.Random(args.seed).shuffle(clips)
    return clips[:args.max_samples], re.sub(r"\W+", "-", Path(args.dataset).with_suffix("").as_posix()).strip("-")


def is_hub_id(name):
    """Whether a name is that of something on the Hugging Face Hub, owner/name, and no file or folder here."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not Path(name).exists() and Path(name).suffix not in DATA_SUFFIXES


def open_stream(hub_id, config, split, audio_column, text_column):
    """A dataset on the Hub as a `datasets.IterableDataset` of rows audio (bytes, path) and text; the audio is encoded as it was."""
    from datasets import load_dataset

    data = from_hub(lambda source: load_dataset(source, config, split=split, streaming=True), hub_id)
    columns = data.column_names or list(next(iter(data)))
    for column in (audio_column, text_column):
        if column not in columns:
            raise InputError(f"{hub_id} has no column {column}, but {', '.join(columns)}: --audio-column, --text-column")
    data = data.cast_column(audio_column, encoded_audio()).select_columns([audio_column, text_column])
    return data.rename_columns({name: new for name, new in ((audio_column, "audio"), (text_column, "text")) if name != new})


def encoded_audio():
    """The type of a column of encoded audio. `Audio(decode=False)` holds the same, but wants torchcodec as soon as a column is renamed or a stream shuffled."""
    from datasets import Value

    return {"bytes": Value("binary"), "path": Value("string")}


def draw_clips(rows, name, max_samples, seed):
    """Random clips of a stream of rows, each equally likely, by reservoir sampling over the whole of it; all if max_samples is None."""
    rng, clips = random.Random(seed), []
    for number, row in enumerate(rows):
        place = number if len(clips) < (max_samples or math.inf) else rng.randrange(number + 1)
        if place < (max_samples or math.inf):
            audio = row["audio"] or {}
            clips[place:place + 1] = [{"name": f"{name}#{number}", "audio": audio.get("bytes") or audio.get("path"),
                                       "text": clean_text(row["text"] or "")}]
    rng.shuffle(clips)
    return clips


# ------------------------------------------------------------------------------------------------------ recognisers


def load_recognizer(name, decode, device, batch_seconds):
    """A function from waves to texts; and its encoder, decoder and number of trained parameters."""
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        folder = Path(from_hub(snapshot_download, name, allow_patterns=["config.json"]))
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{name} is no checkpoint: {first_line(error)}") from None
    if config.get("model_type") == "whisper":
        return whisper_recognizer(name, device), ("its own", "its own", 0)
    model = TinyAudio.load(name, device)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return lambda waves: model.transcribe(waves, decode, batch_seconds=batch_seconds), (*model.names.values(), trained)


def whisper_recognizer(name, device):
    """Whisper with its own decoder, greedy, in English, without timestamps and without fallbacks."""
    from transformers import AutoFeatureExtractor, AutoTokenizer, WhisperForConditionalGeneration

    device, dtype = placement(device)
    model = from_hub(WhisperForConditionalGeneration.from_pretrained, name, dtype=dtype).to(device).eval()
    extractor, tokenizer = from_hub(AutoFeatureExtractor.from_pretrained, name), from_hub(AutoTokenizer.from_pretrained, name)
    language = {"language": "en", "task": "transcribe"} if model.generation_config.is_multilingual else {}

    def transcribe(waves):
        pieces = [[piece for _, piece in split_audio([wave])] for wave in waves]
        mel = extractor(sum(pieces, []), sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features.to(device, dtype)
        ids = model.generate(mel, do_sample=False, num_beams=1, max_new_tokens=440, **language)
        texts = iter(tokenizer.batch_decode(ids, skip_special_tokens=True))
        return [" ".join(next(texts).strip() for _ in clip) for clip in pieces]

    return transcribe


# ------------------------------------------------------------------------------------------------------------- main


def recognize(clips, recognizer, batch_seconds):
    """Rows (hypothesis, seconds, time, failed) of some clips, in their order; a clip that fails has no hypothesis."""
    rows = [{"hypothesis": "", "seconds": 0.0, "time": 0.0, "failed": None} for _ in clips]
    waves = {}
    for i, clip in enumerate(clips):
        try:
            waves[i] = load_audio(clip["audio"])
            rows[i]["seconds"] = len(waves[i]) / SAMPLE_RATE
        except InputError as error:
            rows[i]["failed"] = str(error)
    heard = list(waves)
    for batch in make_batches([rows[i]["seconds"] for i in heard], batch_seconds):
        batch = [heard[i] for i in batch]
        start = time.perf_counter()
        try:
            texts = recognizer([waves[i] for i in batch])
        except InputError as error:
            for i in batch:
                rows[i]["failed"] = str(error)
            continue
        taken, seconds = time.perf_counter() - start, sum(rows[i]["seconds"] for i in batch)
        for i, text in zip(batch, texts):  # a clip's share of the batch's time
            rows[i].update(hypothesis=text, time=taken * rows[i]["seconds"] / seconds)
    return rows


def summarize(rows, wall):
    """All figures of a set of result rows; `wall` is the time in seconds with loading and decoding of files."""
    wer = ratio(rows, "errors", "words")
    seconds = sum(row["seconds"] for row in rows)
    return {"samples": len(rows), "wer": wer, "interval": bootstrap(rows, lambda drawn: ratio(drawn, "errors", "words")),
            "cer": ratio(rows, "character_errors", "characters"),
            **{name: sum(row[name] for row in rows) for name in ("words", "substitutions", "deletions", "insertions")},
            "left_out": sum(not row["words"] for row in rows), "failed": sum(bool(row["failed"]) for row in rows),
            "seconds": seconds, "rtfx": seconds / max(1e-9, sum(row["time"] for row in rows)), "rtfx_with_loading": seconds / wall}


def compare(first, second):
    """Print the paired difference in WER of two results.jsonl over the clips that both have."""
    try:
        a, b = ({row["name"]: row for row in map(json.loads, Path(file).read_text().splitlines())} for file in (first, second))
        pairs = [(a[name], b[name]) for name in a if name in b and a[name]["words"]]
        assert pairs
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise InputError(f"{first}, {second}: no results of the same clips ({first_line(error)})") from None

    def difference(drawn):
        return ratio([pair[1] for pair in drawn], "errors", "words") - ratio([pair[0] for pair in drawn], "errors", "words")

    low, high = bootstrap(pairs, difference)
    right = [(not x["errors"], not y["errors"]) for x, y in pairs]
    print(f"A {first}\nB {second}\n{len(pairs)} clips in both: WER A {ratio([p[0] for p in pairs], 'errors', 'words'):.2%}, "
          f"B {ratio([p[1] for p in pairs], 'errors', 'words'):.2%}, B - A {difference(pairs):+.2%} (95 % {low:+.2%} to {high:+.2%})\n"
          f"right in A only: {right.count((True, False))}, in B only: {right.count((False, True))}, "
          f"in both: {right.count((True, True))}, in neither: {right.count((False, False))}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", nargs="?", help="folder or hub id of a trained model, or of a Whisper with its own decoder")
    add("--dataset", help=f"{', '.join(BENCHMARKS)}, a hub id, or .jsonl, .csv, .tsv, .parquet files (globs) or a folder")
    add("--config", help="of a dataset on the Hub")
    add("--split", help="of a dataset on the Hub")
    add("--audio-column", help="of a dataset on the Hub")
    add("--text-column", help="of a dataset on the Hub")
    add("--max-samples", type=int, help="score this many random clips instead of all")
    add("--seed", type=int, default=0, help="of the random choice of clips")
    add("--normalizer", choices=NORMALIZERS, default="english", help="Whisper's, of English or of any language, or none")
    add("--decode", choices=DECODINGS, help="by default what the checkpoint does best")
    add("--batch-seconds", type=float, default=120, help="seconds of audio decoded at once")
    add("--out", help="by default outputs/eval_<dataset>_<model>")
    add("--resume", action="store_true", help="go on with an interrupted run")
    add("--worst", type=int, default=0, metavar="N", help="list the worst clips with their errors marked")
    add("--leaderboard", metavar="NAME", help="print a row for the README's leaderboard")
    add("--compare", nargs=2, metavar="RESULTS", help="paired difference of two results.jsonl")
    add("--device", help="cuda, mps or cpu; by default the best there is")
    args = parser.parse_args()
    if args.compare:
        return compare(*args.compare)
    if not args.checkpoint or not args.dataset:
        parser.error("a checkpoint and --dataset are needed")

    clips, dataset = read_samples(args)
    out = Path(args.out or f"outputs/eval_{dataset}_{re.sub(r'[^A-Za-z0-9.]+', '-', args.checkpoint).strip('-')}")
    rows_file = out / "results.jsonl"
    rows = read_whole_rows(rows_file) if args.resume and rows_file.exists() else []
    asked = {"checkpoint": args.checkpoint, "decode": args.decode}
    if rows and [{**asked, "name": clip["name"], "reference": clip["text"]} for clip in clips[:len(rows)]] != [
            {key: row.get(key) for key in (*asked, "name", "reference")} for row in rows]:
        raise InputError(f"{rows_file} holds results of other clips, of another checkpoint or --decode: run without --resume")
    rows = [{**row, **score(row["reference"], row["hypothesis"], args.normalizer)} for row in rows]
    start, before = time.perf_counter(), sum(row["wall"] for row in rows)
    recognizer, (encoder, decoder, trained) = load_recognizer(args.checkpoint, args.decode, args.device, args.batch_seconds)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(rows_file, lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows)))

    progress = tqdm(total=len(clips), initial=len(rows), unit="clip")
    while len(rows) < len(clips):
        chunk = clips[len(rows):len(rows) + 20 - len(rows) % 20]  # what an interruption can lose
        began = time.perf_counter()
        results = recognize(chunk, recognizer, args.batch_seconds)
        wall = (time.perf_counter() - began) / len(chunk)
        for clip, result in zip(chunk, results):
            row = {"name": clip["name"], "reference": clip["text"], **asked, **result, "wall": wall,
                   **score(clip["text"], result["hypothesis"], args.normalizer)}
            rows.append(row)
            tqdm.write(f"Sample {len(rows)}: WER = {ratio([row], 'errors', 'words'):.2%}, Time = {row['time']:.2f}s\n"
                       f"  Ref:  {row['reference']}\n  Pred: {row['hypothesis']}" + (f"\n  FAILED: {row['failed']}" if row["failed"] else ""))
        with open(rows_file, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows[-len(chunk):])
        progress.update(len(chunk))
        if len(rows) % 100 == 0 or len(rows) == len(clips):
            tqdm.write(f"CHECKPOINT @ {len(rows)} samples: WER = {ratio(rows, 'errors', 'words'):.2%}, "
                       f"average time = {sum(row['time'] for row in rows) / len(rows):.2f}s")
    progress.close()

    summary = summarize(rows, before + time.perf_counter() - start)
    scorer = f"jiwer {version('jiwer')}, whisper-normalizer {version('whisper-normalizer')} ({args.normalizer})"
    header = ("{checkpoint} on {dataset}: {samples} samples (seed {seed}, {left_out} left out for an empty reference, {failed} failed), "
              "{seconds:.0f} s of audio\nWER {wer:.2%} (95 % {low:.2%} to {high:.2%}), {substitutions} substitutions, {deletions} deletions, "
              "{insertions} insertions in {words} words, CER {cer:.2%}\nRTFx {rtfx:.1f}, with loading {rtfx_with_loading:.1f}; {scorer}").format(
                  checkpoint=args.checkpoint, dataset=dataset, seed=args.seed, low=summary["interval"][0],
                  high=summary["interval"][1], scorer=scorer, **summary)
    print(header)
    predictions = "".join(f"\n{row['name']}\nRef:  {row['reference']}\nPred: {row['hypothesis']}\n" for row in rows)
    write_whole(out / "results.txt", lambda path: path.write_text(header + "\n" + predictions, "utf-8", "surrogateescape"))
    write_whole(out / "summary.json", lambda path: path.write_text(
        json.dumps({**vars(args), "scorer": scorer, "encoder": encoder, "decoder": decoder, "trained": trained, **summary}, indent=2)))
    for row in sorted(rows, key=lambda row: -row["errors"] / max(1, row["words"]))[:args.worst]:
        print(f"{ratio([row], 'errors', 'words'):.0%}  {row['name']}\n    {marked(row['reference'], row['hypothesis'], args.normalizer)}")
    if args.leaderboard:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
        low, high = summary["interval"]
        print(f"| {args.leaderboard} | {encoder} | {decoder} | {trained / 1e6:.1f}M | {dataset} | {len(rows)} | {100 * summary['wer']:.2f} "
              f"± {50 * (high - low):.2f} | {summary['rtfx']:.0f} | {commit or '-'} | {date.today()} |")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"eval.py: {error}")
    except KeyboardInterrupt:
        sys.exit("eval.py: interrupted; the same command with --resume goes on")
