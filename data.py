"""Sound and text in: waveforms, rows of data files and of the Hub, batches, augmentation.

    from data import load_audio, read_clips
    wave = load_audio("file.mp3")       # float32 (samples,), mono, 16 kHz
    clips = read_clips("mine.jsonl")    # dicts name, audio, text

It knows nothing of models.
"""
import csv
import glob
import hashlib
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000  # Hz
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au", ".caf", ".m4a")
AUDIO_COLUMNS = ("audio", "wav", "file_name", "audio_filepath", "path")
TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript")
MARKS = {"COMMA": ",", "PERIOD": ".", "QUESTIONMARK": "?", "EXCLAMATIONPOINT": "!"}

class InputError(Exception):
    """Something that the user can mend. The scripts print it as one line, without a traceback."""

def first_line(error):
    return getattr(error, "strerror", None) or (str(error).strip() or repr(error)).splitlines()[0]

def run(main):
    """Call the main() of a script: what the user can mend is one line, and exit status 1."""
    try:
        sys.exit(main())
    except (InputError, OSError, ModuleNotFoundError) as error:  # gradio and wandb are optional
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")

def load_audio(source, sample_rate=SAMPLE_RATE):
    """What `read_audio` takes -> float32 array (samples,), mono, 16 kHz."""
    return np.concatenate(list(read_audio(source, sample_rate)))

def read_audio(source, sample_rate=SAMPLE_RATE):
    """Yields float32 arrays (samples,), mono, 16 kHz: of a file 10 s at a time, an array at once.
    source is a path, bytes or file object of what libsndfile reads; an array or tensor (samples,),
    (samples, channels) or (channels, samples), float in [-1, 1] or integer, of sample_rate in Hz;
    or a dict of bytes or path (Hugging Face, undecoded), or of array and sampling_rate. Raises
    InputError, behind the last sample if a part of a file is missing."""
    name = source if isinstance(source, (str, Path)) else "audio input"
    resampler = None
    try:
        for block, rate in read_blocks(source, sample_rate):
            if not np.abs(block).max() < 16:  # loud is fine, int16 kept as float is not
                raise ValueError("samples are not numbers from -1 to 1")
            resampler = resampler or soxr.ResampleStream(rate, SAMPLE_RATE, 1)
            yield resampler.resample_chunk(block.mean(axis=1))
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
    except soundfile.LibsndfileError as error:
        raise InputError(f"{name}: not readable as audio ({error.error_string}); try ffmpeg -i "
                         f"{Path(name).name} new.wav") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: {first_line(error)}") from None

def read_blocks(source, sample_rate):
    """Yields (float32 array (samples, channels), its rate in Hz)."""
    if isinstance(source, dict):  # of Hugging Face datasets
        sample_rate = source.get("sampling_rate", sample_rate)
        source = source.get("array", source.get("bytes") or source.get("path"))
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    if isinstance(source, (str, Path)):
        with open(source, "rb") as file:
            yield from read_file(file)
    elif hasattr(source, "read"):
        yield from read_file(source)
    else:
        yield as_samples(source), sample_rate

def read_file(file):
    """The blocks of an audio file. Raises ValueError at its end if a part of it is missing."""
    sound, count = soundfile.SoundFile(file), 0
    rate = sound.samplerate
    while len(block := sound.read(10 * rate, "float32", always_2d=True)):
        yield block, rate
        count += len(block)
    rest = len(file.read())
    if not count:
        raise ValueError("no sound in it (0 samples)")
    wrong_length = rest > 4096 and sound.format in ("MP3", "FLAC")  # tags are shorter
    if count < 0.99 * sound.frames or wrong_length:
        raise ValueError(f"only {count / rate:.1f} of {sound.frames / rate:.1f} s can be read, and "
                         f"{rest} bytes follow")

def as_samples(array):
    """Array or tensor -> float32 (samples, channels) in [-1, 1]. The longer dimension is time."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array  # NumPy has no bfloat16
    samples = np.asarray(array)
    numeric = samples.dtype.kind in "fi" or samples.dtype == np.uint8
    if samples.ndim not in (1, 2) or not samples.size or not numeric:
        raise ValueError(f"{samples.dtype} of shape {samples.shape} is not one clip of sound")
    samples = np.atleast_2d(samples)
    samples = samples.T if samples.shape[0] < samples.shape[1] else samples
    if samples.dtype.kind != "f":
        bits = 8 * samples.itemsize
        bits = min(bits, 16) if np.abs(samples).max() < 2**15 else bits  # often in a wider type
        samples = samples / 2.0 ** (bits - 1) - (samples.dtype.kind == "u")
    return samples.astype(np.float32)

def split_audio(blocks):
    """Cut a stream of arrays into pieces of 15 to 28 s, in the middle of the quietest 0.1 s.
    Yields the start of each piece in seconds, and its samples. The last is what is left."""
    rest, start = np.zeros(0, np.float32), 0
    first, last, window = 15 * SAMPLE_RATE, 28 * SAMPLE_RATE, SAMPLE_RATE // 10
    for block in blocks:
        rest = np.concatenate([rest, block])
        while len(rest) > last:
            energy = np.square(rest[first:last]).reshape(-1, window).mean(axis=1)
            cut = first + int(energy.argmin()) * window + window // 2
            yield start / SAMPLE_RATE, rest[:cut]
            rest, start = rest[cut:], start + cut
    if len(rest):
        yield start / SAMPLE_RATE, rest

def clean_text(text):
    """Reference text: tags become punctuation or go, ALL CAPS, even one acronym, lower case."""
    text = re.sub(rf" ?<({'|'.join(MARKS)})>", lambda tag: MARKS[tag[1]], text)  # of GigaSpeech
    text = re.sub(r"<[\w|/-]+>|\[[\w -]+\]", " ", text)  # <inaudible>, [background noise]
    text = " ".join(text.split())
    return text.lower() if text.isupper() else text

def read_clips(pattern):
    """Clips of .jsonl, .csv, .tsv or .parquet files, or of a folder with a .txt beside each audio
    file: dicts name, audio (path or bytes), text (cleaned). pattern is a path, a glob, or several
    with commas between. Audio paths are relative to the file. Raises InputError."""
    files = []
    for part in map(str.strip, pattern.split(",")):
        if not part:
            raise InputError(f"'{pattern}': a name is missing")
        found = [] if Path(part).exists() else sorted(glob.glob(part, recursive=True))
        files += map(Path, found or [part])
    return [clip for file in files for clip in read_data(file)]

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
            rows = csv.DictReader(file.open(encoding="utf-8-sig", newline=""), strict=True, **tabs)
        elif file.suffix in (".json", ".jsonl"):
            rows = (json.loads(line) for line in file.open(encoding="utf-8-sig") if line.strip())
        else:
            raise ValueError("not .jsonl, .csv, .tsv, .parquet or a folder")
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
        if audio.suffix.lower() in AUDIO_SUFFIXES:
            file = audio.with_suffix(".txt")
            text = file.read_text("utf-8-sig") if file.exists() else ""
            yield {"audio": str(audio.relative_to(folder.parent)), "text": text}

def to_clip(row, name, folder=""):
    """A row of a data file or of the Hub -> a clip, named by its path or by a hash of its bytes."""
    audios = [row[column] for column in AUDIO_COLUMNS if column in row]
    texts = [row[column] for column in TEXT_COLUMNS if column in row]
    if not audios or not texts:
        raise InputError(f"{name} has the columns {', '.join(map(str, row))}; needed are one of "
                         f"{', '.join(AUDIO_COLUMNS)} and one of {', '.join(TEXT_COLUMNS)}")
    audio, text = audios[0], texts[0]
    if isinstance(audio, dict):  # as Hugging Face datasets keep audio
        audio = audio.get("bytes") or audio.get("path")
    if isinstance(audio, str):
        path = Path(folder, audio)
        beside = Path(folder, "clips", audio)  # as Common Voice has it
        audio = name = str(beside if beside.exists() else path)
    elif isinstance(audio, bytes):
        name = hashlib.md5(audio).hexdigest()
    text = "" if text is None or text != text else clean_text(str(text))  # NaN is no text
    return {"name": name, "audio": audio, "text": text}

def is_hub_id(name):
    """Whether a name is owner/name[:config[:split]] of the Hub, and not that of a file."""
    suffixes = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
    is_file = Path(name).parent.is_dir() or name.endswith(suffixes)
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
        for row in rows:
            yield to_clip(row, hub_id)
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
        clips.append({"name": f"no speech {number}", "audio": wave.astype(np.float32), "text": "",
                      "seconds": size / SAMPLE_RATE, "answer": []})
    return clips

def write_file(path, data):
    """Write text or bytes under another name, then rename: a file is whole or it is not there."""
    unfinished = Path(f"{path}.unfinished")
    unfinished.write_bytes(data.encode() if isinstance(data, str) else data)
    unfinished.replace(path)

def finished_rows(path):
    """Rows of a .jsonl that a script wrote, without a last line that a crash cut off."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.endswith("}\n")]
