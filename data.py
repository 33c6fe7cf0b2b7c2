"""Sound and text in: waveforms, rows of data files and of the Hub, batches, augmentation."""
import csv
import glob
import hashlib
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000  # Hz
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aiff", ".aif", ".au", ".caf",
                  ".m4a", ".aac", ".mp4", ".wma", ".webm", ".amr")  # not readable, but counted
AUDIO_COLUMNS = ("audio", "wav", "file_name", "audio_filepath", "path")
TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript")
TAGS = re.compile(rb"\A(\0+|TAG.{125}|APETAGEX.+?APETAGEX.{24})*", re.DOTALL)  # behind an MP3
MARKS = {"COMMA": ",", "PERIOD": ".", "QUESTIONMARK": "?", "EXCLAMATIONPOINT": "!"}

class InputError(Exception):
    """Something that the user can mend. The scripts print it as one line, without a traceback."""

def first_line(error):
    return getattr(error, "strerror", None) or (str(error).strip() or repr(error)).splitlines()[0]

def run(main):
    """Call the main() of a script: what the user can mend is one line, and exit status 1."""
    encoding = None if sys.stdout.isatty() else "utf-8"  # a terminal's own may lack letters
    sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status)
    except BrokenPipeError:  # of | head
        os._exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:  # gradio and wandb are optional
        sys.exit(f"{Path(sys.argv[0]).name}: {error}; pip install {error.name or ''}")
    except (InputError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")

def load_audio(source, sample_rate=SAMPLE_RATE, longest=1e9):
    """What `read_audio` takes -> float32 array (samples,), mono, 16 kHz."""
    return np.concatenate(list(read_audio(source, sample_rate, longest)))

def read_audio(source, sample_rate=SAMPLE_RATE, longest=1e9):
    """Yields float32 arrays (samples,), mono, 16 kHz: of a file 10 s at a time, an array at once.
    source is a path, bytes or file; an array or tensor (samples,), (samples, channels) or
    (channels, samples), float in [-1, 1] or integer, of sample_rate in Hz; or a dict of Hugging
    Face, perhaps with offset and duration in seconds. Raises InputError, behind the last sample if
    a part is missing."""
    row = source if isinstance(source, dict) else {"path": source}
    name = row["path"] if isinstance(row.get("path"), (str, Path)) else "audio input"
    sound = row.get("array", row.get("bytes") or row.get("path"))
    sound = io.BytesIO(sound) if isinstance(sound, (bytes, bytearray, memoryview)) else sound
    start, place, known, nothing = row.get("offset", 0), 0, None, np.zeros(0, np.float32)
    end = start + min(row.get("duration", 1e9), longest)
    try:
        for block, rate in read_blocks(sound, row.get("sampling_rate") or sample_rate):
            if not np.isfinite(block).all() or np.abs(block).max(initial=0) > 16:  # not just loud
                raise ValueError("samples are not numbers from -1 to 1")
            mono, energies = block.mean(axis=1), np.square(block).sum(axis=0)
            if np.square(mono).sum() < 0.01 * energies.max():  # they cancel out
                mono = block[:, (energies > energies.max() / 2).argmax()]
            if rate != known:  # joined files may have several
                if known:
                    yield resampler.resample_chunk(nothing, last=True)
                resampler, known = soxr.ResampleStream(rate, SAMPLE_RATE, 1), rate
            first, last = (max(0, round((x - place) * rate)) for x in (start, end))
            yield resampler.resample_chunk(mono[first:last])
            place += len(block) / rate
            if place > end:
                break
        yield resampler.resample_chunk(nothing, last=True)
        if min(place, end) - start < 0.025:  # a window of the encoders
            raise ValueError("too short")
    except soundfile.LibsndfileError as error:
        advice = "" if name == "audio input" else f"; try ffmpeg -i {Path(name).name} new.wav"
        raise InputError(f"{name}: not readable as audio ({error.error_string}){advice}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: {first_line(error)}") from None

def read_blocks(source, sample_rate):
    """Yields (float32 array (samples, channels), its rate in Hz)."""
    if isinstance(source, (str, Path)):
        with open(source, "rb") as file:
            yield from read_file(file)
    elif hasattr(source, "read"):
        yield from read_file(source)
    elif hasattr(source, "get_all_samples"):
        found = source.get_all_samples()
        yield as_samples(found.data), found.sample_rate
    else:
        yield as_samples(source), sample_rate

def read_file(file):
    """Blocks of an audio file and of those joined to it; then ValueError if a part is missing."""
    file = file if file.seekable() else io.BytesIO(file.read())
    file.seek(0)
    head, more, files = file.read(4), 2**30, [file]
    if head == b"vers":
        raise ValueError("a pointer of git-lfs, not sound: run git lfs pull")
    if head == b"OggS":  # the first page of each stream is marked
        streams = re.split(rb"(?!\A)(?=OggS\0[\2\6])", head + file.read())
        files, more = [io.BytesIO(stream) for stream in streams], 0
    while files:
        file = files.pop(0)
        # A length that the header lacks is guessed from the size: false sizes show it.
        stated = soundfile.SoundFile(Longer(file, more // 2)).frames
        sound = soundfile.SoundFile(Longer(file, more))
        sound.seekable = lambda: False  # else soundfile seeks, which is inexact or fails
        rate, count, block, whole = sound.samplerate, 0, [0], True
        while len(block) and whole:
            size = min(10 * rate, 2**22)  # a damaged header may say any rate
            block = np.full((size, sound.channels), np.nan, np.float32)  # NaN: not read
            try:
                block = sound.read(out=block)
            except soundfile.LibsndfileError:
                block, whole = block[np.isfinite(block[:, 0])], False
            count += len(block)
            yield block, rate
        if stated == sound.frames and rate / 4 < stated - count < 2**62:  # 2**63: unknown
            raise ValueError(f"only {count / rate:.1f} of {stated / rate:.1f} s can be read")
        rest = TAGS.sub(b"", file.read())
        if len(rest) > 1000 and rest.startswith((b"\xff", b"ID3")) and head != b"fLaC":  # an MP3
            files.append(io.BytesIO(rest))
    if head == b"OggS" and not streams[-1][streams[-1].rfind(b"OggS") + 5] & 4:  # the last page's
        raise ValueError("its end is missing, or not marked: ffmpeg -i old.ogg new.ogg marks it")
    if len(rest) > 4096 and sound.format in ("MP3", "FLAC"):
        raise ValueError(f"{len(rest)} bytes follow that are not readable")

class Longer:
    """A file that seems `more` bytes longer: libsndfile guesses some lengths from the size, and
    reads no further."""

    def __init__(self, file, more):
        file.seek(0)
        self.file, self.read, self.more, self.added = file, file.read, more, 0

    def seek(self, offset, whence=0):
        self.file.seek(offset, whence)
        self.added = self.more if whence == 2 else 0

    def tell(self):
        return self.file.tell() + self.added

def as_samples(array):
    """Array or tensor -> float32 (samples, channels) in [-1, 1]. The longer dimension is time."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array  # NumPy has no bfloat16
    samples = np.atleast_2d(array)
    numeric = samples.dtype.kind in "fi" or samples.dtype == np.uint8
    if samples.ndim != 2 or not samples.size or not numeric:
        raise ValueError(f"{samples.dtype} of shape {samples.shape} is not one clip of sound")
    samples = samples.T if samples.shape[0] < samples.shape[1] else samples
    if samples.dtype.kind != "f":
        bits = 8 * samples.itemsize
        if bits > 16:  # a wide type often holds 16 or 24
            peak = max(int(samples.max()), -1 - int(samples.min()))
            bits = next(bits for bits in (16, 24, 32, 64) if peak < 2 ** (bits - 1))
        samples = samples / 2.0 ** (bits - 1) - (samples.dtype.kind == "u")
    return samples.astype(np.float32)

def split_audio(blocks):
    """Cut a stream of arrays into pieces of 15 to 28 s, in the middle of the quietest 0.1 s.
    Yields the start of each piece in seconds, and its samples; then raises what `blocks` raises."""
    rest, start, fault = np.zeros(0, np.float32), 0, None
    first, last, window = 15 * SAMPLE_RATE, 28 * SAMPLE_RATE, SAMPLE_RATE // 10
    try:
        for block in blocks:
            rest = np.concatenate([rest, block])
            while len(rest) > last:
                energy = np.square(rest[first:last]).reshape(-1, window).mean(axis=1)
                cut = first + int(energy.argmin()) * window + window // 2
                yield start / SAMPLE_RATE, rest[:cut]
                rest, start = rest[cut:], start + cut
    except InputError as error:
        fault = error
    if len(rest) > (400 if fault else 0):  # less is too short
        yield start / SAMPLE_RATE, rest
    if fault:
        raise fault

def clean_text(text):
    """Reference text: tags become punctuation or go; if all of it is in capitals, even NASA alone,
    it becomes lower case."""
    text = re.sub(rf" ?<({'|'.join(MARKS)})>", lambda tag: MARKS[tag[1]], text)  # of GigaSpeech
    text = re.sub(r"<[\w|/-]+>|\[[\w -]+\]", " ", text)  # <inaudible>, [background noise]
    text = " ".join(text.split())
    return text.lower() if text.isupper() else text

def read_clips(pattern):
    """Clips of .jsonl, .csv, .tsv or .parquet files, or of a folder with a .txt beside each audio
    file: dicts name, audio (path or bytes), text (cleaned). pattern is a path, a glob, or several
    with commas between. Audio paths are relative to the file. Raises InputError."""
    files = []
    for part in [pattern] if os.path.exists(pattern) else map(str.strip, pattern.split(",")):
        if not part:
            raise InputError(f"'{pattern}': a name is missing")
        found = [] if os.path.exists(part) else sorted(glob.glob(part, recursive=True))
        files += map(Path, found or [part])
    return [clip for file in files for clip in read_data(file)]

def read_text(file):
    """The text of a file. Raises InputError."""
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{file} is not in UTF-8: save it so") from None

def read_data(file):
    """Yields the clips of one data file or folder."""
    number, rows = 1, None
    try:
        if file.is_dir():
            rows = read_folder(file)
        elif file.suffix == ".parquet":
            import pyarrow.parquet
            rows = pyarrow.parquet.read_table(file).to_pylist()
        elif file.suffix in (".csv", ".tsv"):
            tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if file.suffix == ".tsv" else {}
            rows = csv.DictReader(io.StringIO(read_text(file)), strict=True, **tabs)
        elif file.suffix in (".json", ".jsonl"):
            text = read_text(file).strip()
            lines = [line for line in text.split("\n") if line.strip()]
            rows = json.loads(text) if text[:1] == "[" else map(json.loads, lines)
        else:
            raise ValueError("not .jsonl, .json, .csv, .tsv, .parquet or a folder")
        for row in rows:
            if not isinstance(row, dict) or None in row:
                raise ValueError("more cells than columns, or no columns")
            yield to_clip(row, f"{file}#{number}", file.parent)
            number += 1
    except (OSError, ValueError, csv.Error) as error:
        where = f"row {number}: " if rows else ""
        raise InputError(f"{file}: {where}{first_line(error)}") from None

def read_folder(folder):
    """Rows of the audio files of a folder, with the text of the .txt beside each."""
    for audio in sorted(folder.rglob("*")):
        if audio.suffix.lower() in AUDIO_SUFFIXES and audio.name[0] != ".":  # of macOS
            file = audio.with_suffix(".txt")
            text = read_text(file) if file.exists() else ""
            yield {"audio": str(audio.relative_to(folder.parent)), "text": text}

def to_clip(row, name, folder=""):
    """A row of a data file or of the Hub -> a clip, named by its path or by a hash of its bytes."""
    audios = [row[column] for column in AUDIO_COLUMNS if column in row]
    texts = [row[column] for column in TEXT_COLUMNS if column in row]
    if not audios or not texts:
        raise InputError(f"{name} has the columns {list(row)}; needed are one of "
                         f"{', '.join(AUDIO_COLUMNS)} and one of {', '.join(TEXT_COLUMNS)}")
    audio, text = audios[0], texts[0]
    if isinstance(audio, dict) and "array" not in audio:  # as Hugging Face datasets keep audio
        audio = audio.get("bytes") or audio.get("path")
    if isinstance(audio, str):
        path, beside = Path(folder, audio), Path(folder, "clips", audio)  # of Common Voice
        audio = name = str(beside if beside.exists() and not path.exists() else path)
    elif isinstance(audio, bytes):
        name = hashlib.md5(audio).hexdigest()
    if row.get("offset") not in (None, ""):  # of NeMo; else duration is the whole file's
        stretch = {key: float(row[key]) for key in ("offset", "duration") if row.get(key)}
        audio, name = {"path": audio, **stretch}, f"{name}@{row['offset']}+{row.get('duration')}"
    if isinstance(text, (list, dict, bytes)):
        raise InputError(f"{name}: its text is a {type(text).__name__}, not a string")
    text = "" if text is None or text != text else clean_text(str(text))  # NaN is no text
    return {"name": name, "audio": audio, "text": text}

def is_hub_id(name):
    """Whether a name is owner/name[:config[:split]] of the Hub, and not that of a file."""
    suffixes = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
    is_file = (Path(name).parent.is_dir() and ":" not in name) or name.endswith(suffixes)
    return not is_file and bool(re.fullmatch(r"[\w-]+/[\w.-]+(:[\w.-]*){0,2}", name))

def open_stream(name, split):
    """A set of the Hub, owner/name:config:split, as a `datasets.IterableDataset`, with its audio
    as it was encoded. The config and the split may be left out."""
    from datasets import load_dataset
    hub_id, config, asked = f"{name}::".split(":")[:3]
    try:
        rows = load_dataset(hub_id, config or None, split=asked or split, streaming=True)
        return rows.decode(False)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot open {name} on the Hub: {first_line(error)}") from None

def stream_clips(rows, hub_id):
    """Clips of a stream, as of `read_clips`."""
    try:
        yield from (to_clip(row, hub_id) for row in rows)
    except (OSError, ValueError) as error:
        raise InputError(f"{hub_id}: the stream broke off ({first_line(error)})") from None

def make_batches(clips, batch_seconds, rng=None):
    """Lists of clips (dicts with `seconds`) of similar length; longest times clips <=
    `batch_seconds`, or one clip. rng is a numpy Generator that shuffles; None: longest first."""
    jitter = rng.uniform(0.9, 1.1, len(clips)) if rng else np.ones(len(clips))
    order = np.argsort([-clip["seconds"] * x for clip, x in zip(clips, jitter)], kind="stable")
    batches, longest = [], 0
    for clip in (clips[i] for i in order):
        longest = max(longest, clip["seconds"])
        if not batches or longest * (len(batches[-1]) + 1) > batch_seconds:
            batches.append([])
            longest = clip["seconds"]
        batches[-1].append(clip)
    return [batches[i] for i in rng.permutation(len(batches))] if rng else batches

def coloured_noise(size, rng):
    """Noise (size,) from white to brown, of RMS 1."""
    frequencies = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    spectrum = rng.standard_normal((2, len(frequencies)))
    spectrum /= np.maximum(frequencies, 20) ** rng.choice([0, 0.5, 1])
    noise = np.fft.irfft(spectrum[0] + 1j * spectrum[1], size)
    return noise / noise.std()

def augment(wave, rng, share, max_seconds):
    """wave (samples,) -> with chance `share` up to 10 % faster or slower (Ko et al. 2015), at most
    max_seconds long; with chance `share` with noise, 5 to 30 dB below."""
    if rng.random() < share:
        factor = max(rng.uniform(0.9, 1.1), len(wave) / SAMPLE_RATE / max_seconds + 1e-3)
        wave = soxr.resample(wave, SAMPLE_RATE * factor, SAMPLE_RATE)
    if rng.random() < share:
        level = np.sqrt(np.square(wave).mean()) * 10 ** (-rng.uniform(5, 30) / 20)
        wave = wave + level * coloured_noise(len(wave), rng).astype(np.float32)
    return wave

def no_speech(count, seed):
    """`count` clips of noise and tones, 1 to 12 s, without a text and without tokens (answer)."""
    rng, clips = np.random.default_rng(seed), []
    for number in range(count):
        size = int(rng.uniform(1, 12) * SAMPLE_RATE)
        angles = rng.uniform(0.02, 0.8, (3, 1)) * np.arange(size)  # 50 to 2000 Hz
        wave = rng.choice([0.1, 1]) * coloured_noise(size, rng)
        wave += rng.choice([0, 1]) * np.sin(angles).sum(axis=0)
        wave *= 10 ** rng.uniform(-3, 0) / np.abs(wave).max()
        name = f"no speech {number}"
        clips.append({"name": name, "audio": wave.astype(np.float32), "seconds": size / SAMPLE_RATE,
                      "sound": name, "text": "", "answer": []})
    return clips

def write_file(path, data):
    """Write text or bytes under another name, then rename: a file is whole or it is not there."""
    unfinished = path.with_name(f"{path.name[-60:]}.unfinished")  # a name has 255 bytes at most
    try:
        unfinished.write_bytes(data.encode(errors="replace") if isinstance(data, str) else data)
        unfinished.replace(path)
    except OSError as error:
        raise InputError(f"{path}: {first_line(error)}") from None
    finally:
        unfinished.unlink(missing_ok=True)
