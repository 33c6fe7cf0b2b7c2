"""Word error rate (WER) of a checkpoint.

    python eval.py assets/default --dataset assets/quickstart/test.jsonl
    python eval.py out/mine --dataset "data/*.parquet" --max-samples 100
"""

import argparse
import random
import sys
import time

import jiwer
from tqdm import tqdm
from whisper_normalizer.english import EnglishTextNormalizer

from tinyaudio import SAMPLE_RATE, InputError, TinyAudio, load_audio, make_batches, read_clips

normalize = EnglishTextNormalizer()


def corpus_wer(references, hypotheses):
    """Errors by words of all references, after Whisper's English normaliser; clips whose reference is then empty are left
    out. A fraction, or NaN if no word is left."""
    pairs = [(normalize(reference), normalize(hypothesis)) for reference, hypothesis in zip(references, hypotheses)]
    pairs = [pair for pair in pairs if pair[0]]
    return jiwer.wer(*map(list, zip(*pairs))) if pairs else float("nan")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or hub id of a trained model")
    parser.add_argument("--dataset", required=True, help=".jsonl, .csv, .tsv, .parquet files (globs) or a folder")
    parser.add_argument("--max-samples", type=int, help="score this many random clips instead of all")
    parser.add_argument("--batch-seconds", type=float, default=120, help="seconds of audio decoded at once")
    parser.add_argument("--seed", type=int, default=0, help="of the random choice of clips")
    args = parser.parse_args()

    clips = read_clips(args.dataset)
    random.Random(args.seed).shuffle(clips)
    clips = clips[:args.max_samples]
    model = TinyAudio.load(args.checkpoint)
    waves, failed = [], 0
    for clip in clips:
        try:
            waves.append(load_audio(clip["audio"]))
        except InputError as error:
            print(f"eval.py: {clip['name']}: {error}", file=sys.stderr)
            waves.append(None)
            failed += 1
    heard = [i for i, wave in enumerate(waves) if wave is not None]
    seconds = [len(waves[i]) / SAMPLE_RATE for i in heard]
    texts, start = [""] * len(clips), time.time()  # a clip that cannot be read counts as all words deleted
    for batch in tqdm(make_batches(seconds, args.batch_seconds), unit="batch"):
        batch = [heard[i] for i in batch]
        for i, text in zip(batch, model.transcribe([waves[i] for i in batch])):
            texts[i] = text
    wer = corpus_wer([clip["text"] for clip in clips], texts)
    print(f"WER {100 * wer:.2f} %  ({len(clips)} clips, {failed} unreadable, {sum(seconds) / 3600:.2f} h, seed {args.seed}, "
          f"RTFx {sum(seconds) / (time.time() - start):.0f}, jiwer {jiwer.__version__}, Whisper's English normaliser)")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"eval.py: {error}")
