"""Sound in, text out.

    python sample.py                            the bundled clip, with the bundled model
    python sample.py file.wav                   prints the text, a line for every 15 to 28 s
    python sample.py *.flac --model out/mine    prints path<TAB>text, a line per file
    python sample.py talk.mp3 --format srt      subtitles; also vtt, or json with word times
    python sample.py *.mp3 --out texts          a file for each; a second run does what is left
    python sample.py file.wav --task "Summarise: <audio>"
    python sample.py file.wav --trace           what each step makes of it, on stderr
    arecord -f cd -d 5 | python sample.py -     reads all of standard input first

wav, flac, mp3, ogg, opus, aiff, au, caf. What cannot be read is a line on stderr; exit status 1.
"""
import glob
import html
import itertools
import json
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch

from data import SAMPLE_RATE, InputError, load_audio, read_audio, run, split_audio, write_file
from tinyaudio import DECODINGS, TRANSCRIBE, TinyAudio

ASSETS = Path(__file__).parent / "assets"
LONGEST, WIDTH = 6.0, 80  # of a subtitle, in seconds and letters

def segments(model, sources, decode=None, task=TRANSCRIBE, words=False, batch_seconds=15):
    """Transcribe sound of any length and number. Yields in order, as they are ready, dicts source
    (index), start, end (seconds), text and, if asked for, words; or source and error."""
    batch, seconds = [], 0
    for part in itertools.chain(split(sources), [{}]):  # {} is the end
        if "wave" in part:
            batch.append(part)
            seconds += part["end"] - part["start"]
        if batch and ("wave" not in part or seconds >= batch_seconds):
            audio = model.encode([waiting.pop("wave") for waiting in batch])
            for done, clip, answer in zip(batch, audio, model.decode(audio, decode, task)):
                done["text"] = model.detokenize(answer)
                if words:
                    done["words"] = time_words(model, clip, answer, done["start"])
            yield from batch
            batch, seconds = [], 0
        if "error" in part:
            yield part

def split(sources):
    """Pieces: dicts source (index), start, end (seconds), wave (samples,); or source, error."""
    for index, source in enumerate(sources):
        try:
            for start, wave in split_audio(read_audio(source)):
                end = start + len(wave) / SAMPLE_RATE
                yield {"source": index, "start": start, "end": end, "wave": wave}
        except InputError as error:
            yield {"source": index, "error": error}

def time_words(model, audio, ids, start):
    """Words of an answer to audio (N, d) from `start` seconds on, with times and probabilities.
    In a language without spaces they are as long as a subtitle can be."""
    frames, probabilities = (x.tolist() for x in model.align(audio, ids))
    tokens = model.tokenizer.convert_ids_to_tokens(ids)
    seconds = model.projector.stack / model.encoder.frame_rate
    firsts, letter = ([0] if ids else []), 0  # tokens that begin a word; the last letter
    for i in range(1, len(ids)):
        word, longer = (model.detokenize(ids[firsts[-1]:end]) for end in (i, i + 1))
        too_long = (frames[i] + 1 - frames[firsts[-1]]) * seconds > LONGEST or len(longer) > WIDTH
        space = tokens[i][0] in "\u0120\u2581"  # so tokenizers write a leading space
        if space or not word.endswith("\ufffd"):  # otherwise token i is a part of a letter
            letter = i
        if space or (too_long and letter > firsts[-1]):
            firsts.append(letter)
    return [{"word": model.detokenize(ids[i:j]), "start": round(start + frames[i] * seconds, 2),
             "end": round(start + (frames[j - 1] + 1) * seconds, 2),
             "probability": round(sum(probabilities[i:j]) / (j - i), 3)}
            for i, j in itertools.pairwise([*firsts, len(ids)])]

def make_cues(words):
    """Subtitles [start, end, text]: cut at a pause, and before they are too long."""
    cues = []
    for word in words:
        start, end, text = cues[-1] if cues else (0, float("-inf"), "")
        whole = f"{text} {word['word']}"
        if word["start"] - end < 0.8 and word["end"] - start <= LONGEST and len(whole) <= WIDTH:
            cues[-1] = [start, word["end"], whole]
        else:
            cues.append([word["start"], min(word["end"], word["start"] + LONGEST), word["word"]])
    return cues

def clock(seconds, mark="."):
    """12.3456 -> 00:00:12.346"""
    whole, thousandths = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{mark}{thousandths:03}"

def render(kind, name, parts):
    """What is printed or written for one file, from its segments."""
    text = " ".join(part["text"] for part in parts if part["text"])
    if kind == "text":
        return text + "\n"
    words = [word for part in parts for word in part["words"]]
    if kind == "json":
        rows = [{key: part[key] for key in ("start", "end", "text")} for part in parts]
        return json.dumps({"file": name, "text": text, "duration": round(parts[-1]["end"], 2),
                           "segments": rows, "words": words}, ensure_ascii=False) + "\n"
    shown, mark = ("WEBVTT\n\n", ".") if kind == "vtt" else ("", ",")
    for number, (start, end, text) in enumerate(make_cues(words), 1):
        text = html.escape(text, quote=False) if kind == "vtt" else text
        shown += f"{number}\n{clock(start, mark)} --> {clock(end, mark)}\n{text}\n\n"
    return shown

def trace(model, source, decode, task):
    """Print on stderr what each step makes of 30 s of sound: function, milliseconds, shape."""
    def shape(x):
        return " x ".join(map(str, (x[0] if isinstance(x, (list, tuple)) else x).shape))
    def step(function, *inputs, show=shape):
        start = time.perf_counter()
        found = function(*inputs)
        if model.device.type != "cpu":  # which goes on by itself
            torch.accelerator.synchronize()
        milliseconds = 1000 * (time.perf_counter() - start)
        print(f"{function.__qualname__:24} {milliseconds:7.1f} ms  {show(found)}", file=sys.stderr)
        return found
    def spell(logits):  # _ is a blank
        return "".join(write(model.ctc.tokens[i - 1]) if i else "_" for i in logits.argmax(-1))
    write = model.tokenizer.decode
    wave = step(load_audio, source)[:30 * SAMPLE_RATE]
    step(model.encoder.features, wave)
    frames = step(model.encoder.forward, [wave])
    step(model.projector.stack_frames, frames[0])
    audio = step(model.projector.forward, frames)
    step(model.ctc.forward, audio[0], model.ctc_words, show=spell)
    step(model.prompt, task, show=lambda found: f"{len(found[0])} + audio + {len(found[1])} tokens")
    show = lambda ids: "|".join(map(write, ids[0]))
    [ids] = step(model.decode, audio, decode, task, show=show)
    step(model.detokenize, ids, show=str)

def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="*", help="audio files, or - for standard input")
    add("--model", default=str(ASSETS / "default"), help="folder or hub id of a checkpoint")
    add("--decode", choices=DECODINGS, help="default: the best one of the training")
    add("--format", choices=("text", "json", "srt", "vtt"), default="text")
    add("--task", default=TRANSCRIBE, help='an instruction with "<audio>" in it')
    add("--out", type=Path, metavar="DIR", help="write a file for each that has none there")
    add("--trace", action="store_true", help="show what each step makes of one clip")
    add("--device", help="cuda, mps or cpu; default: the best that is here")
    args = parser.parse_args(argv)
    if args.task != TRANSCRIBE and args.format != "text":
        parser.error("--task gives text only: its words have no times in the sound")
    names = []
    for name in args.files or [str(ASSETS / "quickstart" / "clips" / "test_0002.ogg")]:
        # The file of this very name, or those of a pattern, which Windows does not expand.
        names += glob.glob(glob.escape(name)) or sorted(glob.glob(name, recursive=True)) or [name]
    suffix = ".txt" if args.format == "text" else f".{args.format}"
    files = [(name, args.out and args.out / (Path(name).stem + suffix)) for name in names]
    if args.out:
        if len({target for _, target in files}) < len(files):
            raise InputError(f"two files have the same name in {args.out}: use two --out folders")
        args.out.mkdir(parents=True, exist_ok=True)
        files = [(name, target) for name, target in files if not target.exists()]
        if there := len(names) - len(files):
            print(f"sample.py: {there} of the files are in {args.out} already", file=sys.stderr)
    model, status = TinyAudio.from_pretrained(args.model, args.device), 0
    as_source = lambda name: sys.stdin.buffer if name == "-" else name
    if args.trace:
        return trace(model, as_source(names[0]), args.decode, args.task)
    sources = (as_source(name) for name, _ in files)
    found = segments(model, sources, args.decode, args.task, words=args.format != "text")
    live = args.format == "text" and not args.out and len(files) == 1
    for index, group in itertools.groupby(found, key=lambda part: part["source"]):
        (name, target), parts = files[index], []
        for part in group:
            if "error" in part:  # it is the last part
                break
            parts.append(part)
            if live:
                print(part["text"], flush=True)
        if args.out and parts:
            write_file(target, render(args.format, name, parts))
            print(target)
        elif parts and not live:
            label = f"{name}\t" if args.format == "text" else ""
            print(label + render(args.format, name, parts), end="", flush=True)
        if "error" in part:
            print(f"sample.py: {part['error']}", file=sys.stderr)
            status = 1
    return status

if __name__ == "__main__":
    run(main)
