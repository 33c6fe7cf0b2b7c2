"""Sound in, text out.

    python sample.py                        the bundled clip, with the bundled model
    python sample.py file.wav               prints the text and nothing else
    python sample.py *.flac --model out/mine    prints path<TAB>text, a line per file

wav, flac, mp3, ogg and opus, at any rate, mono or not. A file that cannot be read is one line on stderr; the others are
transcribed, and the exit status is 1.
"""

import argparse
import sys
from pathlib import Path

from tinyaudio import InputError, TinyAudio, load_audio

ASSETS = Path(__file__).parent / "assets"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="audio files; without any, a bundled clip")
    parser.add_argument("--model", default=str(ASSETS / "default"), help="folder or hub id of a checkpoint")
    parser.add_argument("--decode", choices=("greedy", "ctc"), help="by default what the checkpoint does best")
    parser.add_argument("--device", help="cuda, mps or cpu; by default the best there is")
    args = parser.parse_args()

    files = args.files or [str(ASSETS / "quickstart" / "clips" / "test_0000.ogg")]
    clips = {}
    for file in files:
        try:
            clips[file] = load_audio(file)
        except InputError as error:
            print(f"sample.py: {error}", file=sys.stderr)
    if clips:
        model = TinyAudio.load(args.model, args.device)
        for file, text in zip(clips, model.transcribe(list(clips.values()), args.decode)):
            print(text if len(files) == 1 else f"{file}\t{text}")
    return len(clips) < len(set(files))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"sample.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
