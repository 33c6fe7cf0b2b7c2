"""How fast is decoding? Every way of it on the same clips, side by side in one run.

    python bench.py                                             the shipped model on the quick-start test clips
    python bench.py --model out/mine --dataset test.jsonl       another model, other clips
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from tinyaudio import SAMPLE_RATE, InputError, TinyAudio, load_audio, read_clips

ASSETS = Path(__file__).parent / "assets"


WAYS = {  # name -> a function of a model and a batch: token ids of every clip, passes of the decoder
    "ctc": lambda model, audio, counts: [model.spell(audio, counts)],
    "plain greedy": lambda model, audio, counts: list(model.passes(audio, counts)),
    "draft and verify": lambda model, audio, counts: list(model.passes(audio, counts, drafts=model.respell(model.spell(audio, counts)))),
    "joint": lambda model, audio, counts: [model.search(audio, counts)],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(ASSETS / "default"), help="folder or hub id of a checkpoint")
    add("--dataset", default=str(ASSETS / "quickstart" / "test.jsonl"), help="files as train.py reads them")
    add("--clips", type=int, default=48, help="of the dataset")
    add("--batches", type=int, nargs="+", default=[1, 4, 16], help="clips decoded at once")
    add("--float32", action="store_true", help="compute in float32, where equal texts are equal to the last token")
    add("--device", help="cuda, mps or cpu; by default the best there is")
    args = parser.parse_args()

    model = TinyAudio.load(args.model, args.device, torch.float32 if args.float32 else None)
    waves = [load_audio(clip["audio"]) for clip in read_clips(args.dataset)[:args.clips]]
    if not waves:
        raise InputError(f"no clips of {args.dataset} to decode: raise --clips")
    waves.sort(key=len)
    seconds = sum(map(len, waves)) / SAMPLE_RATE
    print(f"{args.model}, {len(waves)} clips, {seconds:.0f} s of audio, {model.embed.weight.dtype}, {model.device}\n"
          f"| batch | decoding | RTFx | against plain | tokens per pass | texts equal to plain |\n|---|---|---|---|---|---|")
    for size in args.batches:
        batches = [waves[i:i + size] for i in range(0, len(waves), size)]
        rows = {}
        for warm_up in (True, False):
            for name, way in WAYS.items():
                start, answers, passes = time.perf_counter(), [], 0
                for batch in batches[:2] if warm_up else batches:
                    states = way(model, *model.listen(batch))
                    answers += states[-1]
                    passes += len(states) * len(batch)
                rows[name] = (time.perf_counter() - start, answers, passes)
        plain_time, plain, _ = rows["plain greedy"]
        for name, (elapsed, answers, passes) in rows.items():
            tokens = sum(len(answer) + 1 for answer in answers)  # with the end token
            ratio = f"{tokens / passes:.2f}" if name in ("plain greedy", "draft and verify") else "-"
            print(f"| {size} | {name} | {seconds / elapsed:.1f} | {plain_time / elapsed:.2f}x | {ratio} | "
                  f"{sum(a == b for a, b in zip(answers, plain))} of {len(plain)} |")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"bench.py: {error}")
