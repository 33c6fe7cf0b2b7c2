"""A web page to try a model in: record or upload, and see the text come, then its words and when they were said.

    pip install gradio && python demo.py        the bundled model, at http://127.0.0.1:7860

The page loads nothing from other hosts and needs no network. The file of a recording is deleted a minute after it was read.
"""

import argparse
import functools
import html
import sys
import time
from itertools import accumulate, islice
from pathlib import Path
from urllib.parse import quote

import numpy as np

from sample import ASSETS, render
from tinyaudio import SAMPLE_RATE, TASKS, InputError, TinyAudio, read_audio, read_clips, split_audio

CSS = """.gradio-container {width: 100%; max-width: 800px !important; margin: auto}
.words {display: flex; flex-wrap: wrap; row-gap: 12px; max-height: 70vh; overflow-y: auto}
.words span {display: flex; flex-direction: column; max-width: 100%; min-width: min-content}
.words svg, progress {width: 100%; stroke: var(--color-accent); accent-color: var(--color-accent)}"""


@functools.lru_cache(maxsize=32)  # Gradio names an upload by its content; its file is gone when a second task is tried on it
def read(path, most):
    """Samples of a file. most: the longest, in minutes. Raises InputError."""
    if not path:
        raise InputError("Record something or choose a file first.")
    wave = np.concatenate(list(islice(read_audio(path), int(6 * most) + 2)))  # blocks of 10 s
    if len(wave) > most * 60 * SAMPLE_RATE:
        raise InputError(f"{path}: longer than {most:g} minutes, the most that this page takes at once")
    return wave


def draw(wave, words):
    """HTML of a waveform that wraps like text: a piece from each word's start to the next one's, word and time below it."""
    wave, pieces = np.abs(wave) / max(np.abs(wave).max(), 1e-3), []
    starts = [0, *(word["start"] for word in words), len(wave) / SAMPLE_RATE]
    for word, start, end in zip(["", *(word["word"] for word in words)], starts, starts[1:]):
        samples = wave[int(start * SAMPLE_RATE):int(end * SAMPLE_RATE)]
        bars = [1 + 46 * part.max(initial=0) for part in np.array_split(samples, np.clip(len(samples) // 480, 1, 1000))]
        path = "".join(f"M{x} {24 - bar / 2:.1f}v{bar:.1f}" for x, bar in enumerate(bars, 1))
        pieces.append(f'<span style="width: {150 * (end - start):.0f}px"><svg height="48" viewBox="0 0 {len(bars) + 1} 48" '
                      f'preserveAspectRatio="none"><path d="{path}" stroke-width="2" vector-effect="non-scaling-stroke"/></svg>'
                      f"<b>{html.escape(word)}&nbsp;&nbsp;</b><small>{start:.2f}&nbsp;&nbsp;</small></span>")
    return f'<div class="words">{"".join(pieces)}</div>'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(ASSETS / "default"), help="folder or hub id of a checkpoint")
    add("--max-minutes", type=float, default=10, help="the longest sound that is taken")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets others in (microphones then need https)")
    add("--port", type=int, help="by default the first from 7860 on that is free")
    add("--share", action="store_true", help="make a public link, through Gradio's servers")
    args = parser.parse_args()
    import gradio as gr
    model = TinyAudio.load(args.model)

    def listen(path, task=None, prompt=""):
        try:
            wave = read(path, args.max_minutes)
        except InputError as error:
            return (yield "", f'<p role="alert">{html.escape(str(error).replace(str(path), Path(path or "").name))}</p>')
        if not task:  # the file has just come, and is read while it is there
            return (yield "", "")
        task = task if task in TASKS else prompt if "<audio>" in prompt else f"{prompt} <audio>"
        since, seconds, segments, text = time.perf_counter(), len(wave) / SAMPLE_RATE, [], ""
        for start, piece in split_audio([wave]):
            end = start + len(piece) / SAMPLE_RATE
            for streamed in accumulate(model.stream(piece, task), initial=""):
                yield f"{text} {streamed}".lstrip(), f'<progress max="{seconds}" value="{start}"></progress>'
            segments.append({"start": start, "end": end, "text": streamed, "words": []})
            if task == "transcribe":  # streamed is the greedy text; what stays is what the checkpoint decodes best, with times
                audio, counts = model.listen([piece])
                answer, = model.hear(audio, counts)
                segments[-1] |= {"text": model.detokenize(answer), "words": model.time_words(audio[0], answer, start, end)}
            text = render("text", path, segments, 0).strip()
        took, stem = time.perf_counter() - since, html.escape(Path(path).stem)
        links = "".join(f' · <a download="{stem}.{kind}" href="data:text/plain;charset=utf-8,{quote(output)}">{kind.upper()}</a>'
                        for kind in ("srt", "json") if (output := render(kind, Path(path).name, segments, took)))
        facts = f"{seconds:.1f} s of sound in {took:.1f} s, {seconds / took:.1f} times real time" if text else "Nobody is heard"
        yield text, draw(wave, [word for segment in segments for word in segment["words"]]) + f"<br>{facts}{links}"

    gr.set_static_paths([ASSETS / "quickstart"])  # served from there; a copy would be deleted
    clips = read_clips(str(ASSETS / "quickstart" / "test.jsonl"))[::21]
    with gr.Blocks(title="Tiny Audio", analytics_enabled=False, delete_cache=(10, 60)) as page:
        gr.Markdown(f"# Tiny Audio\n{model.names['encoder']} listens, {model.names['decoder']} writes.")
        with gr.Tab("Sound"):
            audio = gr.Audio(type="filepath", sources=["upload", "microphone"], label="Sound", buttons=[])
            gr.Examples([[clip["audio"]] for clip in clips], audio, example_labels=[clip["text"] for clip in clips])
            task = gr.Radio([*((name.capitalize(), name) for name in TASKS), "Your own prompt"], value="transcribe", label="Task")
            prompt = gr.Textbox(label="Prompt", placeholder="Summarise: <audio>", visible=False)
            run, text, below = gr.Button("Run", variant="primary"), gr.Textbox(label="Result", buttons=["copy"]), gr.HTML()
        with gr.Tab("Text"):
            message = gr.Textbox(label="To the language model, without any sound", lines=2)
            send, reply = gr.Button("Send", variant="primary"), gr.Textbox(label="Answer", lines=4, buttons=["copy"])
        audio.change(listen, audio, [text, below], show_progress="hidden")
        task.change(lambda task: gr.update(visible=task not in TASKS), task, prompt, queue=False, show_progress="hidden")
        run.click(listen, [audio, task, prompt], [text, below], show_progress_on=text, concurrency_limit=1, concurrency_id="model")
        send.click(lambda message: (yield from accumulate(model.stream(task=message))), message, reply, concurrency_id="model")
    page.launch(server_name=args.host, server_port=args.port, share=args.share, prevent_thread_lock=True, quiet=True, css=CSS,
                run_history=False, footer_links=[], theme=gr.themes.Default(primary_hue="indigo", font="system-ui", font_mono="monospace"))
    print(page.local_url, flush=True)
    page.block_thread()


if __name__ == "__main__":
    try:
        main()
    except ImportError as error:
        sys.exit(f"demo.py: the page needs gradio ({error}): pip install gradio")
    except (InputError, OSError) as error:
        sys.exit(f"demo.py: {str(error).partition('. You can')[0]}")  # without Gradio's advice on flags of its own
