"""Sound in, text out.

    python sample.py                            the bundled clip, with the bundled model
    python sample.py file.wav                   prints the text and nothing else, a line for every 15 to 28 s
    python sample.py *.flac --model out/mine    prints path<TAB>text, a line per file
    python sample.py talk.mp3 --format srt      subtitles; also json, vtt, tsv, with the times of words
    python sample.py recordings --out texts     a folder, walked; one file each, and a second run does what is left
    python sample.py file.wav --prompt "Summarise: <audio>"     any other instruction
    arecord -f cd -d 5 | python sample.py - --stream            from standard input, token by token

wav, flac, mp3, ogg and opus, at any rate and of any length, mono or not. A file that cannot be read is one line on stderr;
the others are transcribed, and the exit status is 1.
"""

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import soundfile
from tqdm import tqdm

from tinyaudio import AUDIO_SUFFIXES, DECODINGS, TASKS, InputError, TinyAudio, return_freed_memory, write_whole

ASSETS = Path(__file__).parent / "assets"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="*", help="audio files, folders, or - for standard input; without any, a bundled clip")
    add("--model", default=str(ASSETS / "default"), help="folder or hub id of a checkpoint")
    add("--decode", choices=DECODINGS, help="by default what the checkpoint does best")
    add("--format", choices=("text", "json", "srt", "vtt", "tsv"), default="text")
    add("--task", choices=TASKS, default="transcribe")
    add("--prompt", help='an instruction of your own around "<audio>"')
    add("--text", help="ask the language model without any sound")
    add("--stream", action="store_true", help="print tokens as they come")
    add("--out", type=Path, metavar="DIR", help="write a file for each, and skip those that are there")
    add("--overwrite", action="store_true", help="do not skip them")
    add("--device", help="cuda, mps or cpu; by default the best there is")
    args = parser.parse_args()
    if args.prompt is not None and args.prompt.count("<audio>") != 1:
        parser.error('--prompt must say once where the sound goes, as in "Summarise: <audio>"')
    if args.stream and (args.out or args.format != "text" or args.decode):
        parser.error("--stream prints text as the language model makes it; it takes no --out, --format or --decode")
    if args.text is not None and (args.files or args.out):
        parser.error("--text asks the language model alone; it takes neither files nor --out")
    return args


def complain(message):
    tqdm.write(f"sample.py: {message}", file=sys.stderr)


def find_files(names):
    """(path, path below --out) of every file, folders walked; and the number of those that hold nothing."""
    found, empty = [], 0
    for name in names:
        if Path(name).is_dir():
            below = sorted(path for path in Path(name).rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
            found += [(str(path), path.relative_to(name)) for path in below]
            if not below:
                complain(f"{name}: no audio in this folder ({', '.join(AUDIO_SUFFIXES)})")
                empty += 1
        else:
            found.append((name, Path("stdin" if name == "-" else Path(name).name)))
    return found, empty


def open_source(name):
    """What `TinyAudio.segments` reads; standard input is kept in a temporary file, since formats seek."""
    if name != "-":
        return name
    file = tempfile.TemporaryFile()
    shutil.copyfileobj(sys.stdin.buffer, file)
    file.seek(0)
    return file


def duration(name):
    try:
        return soundfile.info(name).duration
    except (soundfile.SoundFileError, OSError):
        return 0


# ---------------------------------------------------------------------------------------------------------- formats


def clock(seconds, comma="."):
    """12.3456 -> 00:00:12.346"""
    whole, thousandths = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{comma}{thousandths:03}"


def make_cues(segments, longest=6.0, width=80):
    """Subtitles (start, end, text): words until a pause, a width or a time is exceeded."""
    cues, words = [], [word for segment in segments for word in segment["words"]]
    for word in words:
        fits = cues and word["start"] - cues[-1][1] < 0.8 and word["end"] - cues[-1][0] <= longest
        if fits and len(cues[-1][2]) + len(word["word"]) < width:
            cues[-1] = (cues[-1][0], word["end"], f"{cues[-1][2]} {word['word']}")
        else:
            cues.append((word["start"], word["end"], word["word"]))
    return cues


def render(format, name, segments, seconds):
    """What is printed or written for one file."""
    text = " ".join(filter(None, (segment["text"] for segment in segments)))
    if format == "text":
        return text + "\n"
    if format == "json":
        rows = [{key: segment[key] for key in ("start", "end", "text")} for segment in segments]
        words = [word for segment in segments for word in segment["words"]]
        return json.dumps({"file": name, "text": text, "duration": round(segments[-1]["end"], 2), "segments": rows, "words": words,
                           "seconds": round(seconds, 2)}, ensure_ascii=False) + "\n"
    cues = make_cues(segments)
    if format == "tsv":  # milliseconds, as openai/whisper writes them
        return "start\tend\ttext\n" + "".join(f"{start * 1000:.0f}\t{end * 1000:.0f}\t{text}\n" for start, end, text in cues)
    if format == "vtt":
        return "WEBVTT\n\n" + "".join(f"{clock(start)} --> {clock(end)}\n{text}\n\n" for start, end, text in cues)
    return "".join(f"{number}\n{clock(start, ',')} --> {clock(end, ',')}\n{text}\n\n"
                   for number, (start, end, text) in enumerate(cues, 1))


def main():
    sys.stdout.reconfigure(line_buffering=True, errors="surrogateescape")  # names of files are any bytes
    args = parse_args()
    if args.text is not None:
        for part in TinyAudio.load(args.model, args.device).stream(task=args.text):
            print(part, end="", flush=True)
        print()
        return False

    files, failed = find_files(args.files or [str(ASSETS / "quickstart" / "clips" / "test_0000.ogg")])
    if args.out:
        suffix = ".txt" if args.format == "text" else f".{args.format}"
        files = [(name, args.out / below.with_suffix(suffix)) for name, below in files]
        targets = [target for _, target in files]
        if len(set(targets)) < len(targets):
            raise InputError(f"two files would be written as {next(t for t in targets if targets.count(t) > 1)}: use two --out folders")
        left = [(name, target) for name, target in files if args.overwrite or not target.exists()]
        if len(left) < len(files):
            complain(f"{len(files) - len(left)} of {len(files)} are in {args.out} already")
        files = left
    if not files:
        return failed > 0

    return_freed_memory()
    model = TinyAudio.load(args.model, args.device)
    task = args.prompt or args.task
    if args.stream:
        for name, _ in files:
            try:
                for part in model.stream(open_source(name), task):
                    print(part, end="", flush=True)
                print()
            except InputError as error:
                complain(error)
                failed += 1
        return failed > 0

    several, since = len(args.files) != 1 or len(files) > 1, time.perf_counter()
    total = sum(duration(name) for name, _ in files if name != "-")
    segments = model.segments((open_source(name) for name, _ in files), args.decode, task, words=args.format != "text",
                              batch_seconds=30)  # larger batches are hardly faster on a CPU, and cost memory
    with tqdm(total=round(total, 1) or None, unit="s", disable=None if total > 30 else True,
              bar_format="{percentage:3.0f}% {n:.0f} of {total:.0f} s of audio, {rate_noinv_fmt}, {remaining} left") as progress:
        for index, group in itertools.groupby(segments, key=lambda segment: segment["source"]):
            (name, target), heard, whole = files[index], [], True
            live = args.format == "text" and not args.out and len(files) == 1
            for segment in group:
                if "error" in segment:
                    complain(segment["error"])
                    failed, whole = failed + 1, False
                    continue
                heard.append(segment)
                progress.update(segment["end"] - segment["start"])
                if live:
                    progress.clear()
                    print(segment["text"])
            now = time.perf_counter()
            if heard and not live and (whole or not args.out):  # with --out, a broken file is tried again
                output = render(args.format, name, heard, now - since)
                if args.out:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    write_whole(target, lambda path: path.write_text(output, "utf-8", "surrogateescape"))
                else:
                    progress.clear()
                    label = name.replace("\t", "\\t").replace("\n", "\\n") + "\t" if several and args.format == "text" else ""
                    print(label + output, end="", flush=True)
            since = now
    return failed > 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (InputError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # whoever reads has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        sys.exit(f"sample.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
