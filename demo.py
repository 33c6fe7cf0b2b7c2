"""A web page: record or upload sound, see its text come, then when each word was said.

    pip install gradio matplotlib && python demo.py

It loads nothing from other hosts, and deletes uploads a minute after reading them.
"""
import html
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from urllib.parse import quote

import numpy as np
from transformers import TextIteratorStreamer

from data import SAMPLE_RATE, InputError, read_audio, read_clips, run, split_audio
from sample import ASSETS, render, segments, time_words
from tinyaudio import TRANSCRIBE, TinyAudio

CSS = """.gradio-container {max-width: 800px !important; margin: auto}
ruby {margin-right: 12px; line-height: 3} rt {font-size: 12px}"""

@lru_cache(maxsize=8)  # a second prompt needs no file
def read(path, minutes):
    if not path:
        raise InputError("Record something or choose a file.")
    wave = np.zeros(0, np.float32)
    for block in read_audio(path):
        wave = np.concatenate([wave, block])
        if len(wave) > minutes * 60 * SAMPLE_RATE:
            raise InputError(f"{path}: longer than {minutes:g} minutes")
    return wave

def stream(model, wave, task=TRANSCRIBE):
    """Yields the greedy text in parts, as the language model writes it."""
    audio = model.encode([wave])
    if task == TRANSCRIBE and not model.ctc_greedy(audio)[0]:
        return
    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    writing = ThreadPoolExecutor().submit(model.generate, audio, task, streamer)
    writing.add_done_callback(lambda _: streamer.end())  # after an error too
    yield from streamer
    writing.result()  # raises the error

def show_words(parts):  # as HTML, with their times
    return "".join(f"<ruby>{html.escape(word['word'])}<rt>{word['start']:.2f}</rt></ruby> "
                   for part in parts for word in part["words"])

def draw_hearing(model, minutes, path):
    """Figure: 28 s of sound, what CTC spells, and the words. None without sound or matplotlib."""
    try:
        from matplotlib.figure import Figure
        wave = read(path, minutes)[:28 * SAMPLE_RATE]
    except (InputError, ImportError):
        return None
    audio = model.encode([wave])
    probs = model.ctc(audio[0], model.ctc_words).softmax(-1).detach().cpu().numpy()
    [ids] = model.decode(audio)
    times = (np.arange(len(probs)) + 0.5) * model.projector.stack / model.encoder.frame_rate
    figure = Figure(figsize=(11, 4), layout="constrained")
    top, middle, low = figure.subplots(3, sharex=True, height_ratios=(2, 4, 1))
    top.plot(np.arange(len(wave)) / SAMPLE_RATE, wave, linewidth=0.3)
    middle.fill_between(times, probs[:, 0], color="lightgrey")  # blank
    for i in sorted(set(probs.argmax(-1)) - {0}):
        line, token = probs[:, i], model.tokenizer.decode(model.ctc.tokens[i - 1])
        middle.plot(times, line)
        middle.text(times[line.argmax()], line.max(), token, ha="center", va="bottom")
    for word in time_words(model, audio[0], ids, 0):
        low.text(word["start"], 0.3, word["word"])
    top.set(title="waveform; probability of each token by CTC (grey: blank); words", yticks=[])
    middle.set(ylim=(0, 1.15), xlim=(0, len(wave) / SAMPLE_RATE))
    low.set(xlabel="seconds", yticks=[])
    return figure

def listen(model, minutes, path, prompt):
    """Yields the text so far and the HTML below it."""
    try:
        wave = read(path, minutes)
    except InputError as error:
        yield "", html.escape(Path(str(error)).name)
        return
    task = prompt if "<audio>" in prompt else f"{prompt} <audio>" if prompt else TRANSCRIBE
    since, text, parts = time.perf_counter(), "", []
    for _, piece in split_audio([wave]):
        for more in chain([" "], stream(model, piece, task)):
            text += more
            yield text.strip(), show_words(parts)
    if task == TRANSCRIBE:  # what stays is the best decoding
        for part in segments(model, [wave], words=True):
            parts.append(part)
            yield text.strip(), show_words(parts)
        text = render("text", path, parts)
    facts = f"<p>{len(wave) / SAMPLE_RATE:.1f} s of sound in {time.perf_counter() - since:.1f} s"
    for kind in ("srt", "json") if parts else ():
        link = quote(render(kind, Path(path).name, parts))
        facts += f' | <a download="{Path(path).stem}.{kind}" href="data:,{link}">{kind.upper()}</a>'
    yield text.strip() or "(no words)", show_words(parts) + facts

def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(ASSETS / "default"), help="folder or hub id")
    add("--host", default="127.0.0.1", help="0.0.0.0 lets others in")
    add("--port", type=int, help="default: from 7860 on")
    add("--share", action="store_true", help="public link through Gradio")
    add("--max-minutes", type=float, default=10, help="longest sound")
    add("--device", help="cuda, mps or cpu")
    args = parser.parse_args(argv)
    import gradio as gr
    model = TinyAudio.from_pretrained(args.model, args.device)
    gr.set_static_paths([ASSETS / "quickstart"])  # a copy would be deleted
    clips = read_clips(str(ASSETS / "quickstart" / "test.jsonl"))[::21]
    with gr.Blocks(title="Tiny Audio", analytics_enabled=False, delete_cache=(10, 60)) as page:
        gr.Markdown("# Tiny Audio\n{encoder} listens, {decoder} writes.".format(**model.config))
        audio = gr.Audio(type="filepath", buttons=[])
        gr.Examples([clip["audio"] for clip in clips], audio,
                    example_labels=[clip["text"] for clip in clips])
        prompt = gr.Textbox(label="Prompt (Enter runs it)", placeholder=TRANSCRIBE)
        text, below = gr.Textbox(label="Text", buttons=["copy"]), gr.HTML()
        shown = gr.on([audio.change, prompt.submit], partial(listen, model, args.max_minutes),
                      [audio, prompt], [text, below], show_progress_on=text)
        shown.then(partial(draw_hearing, model, args.max_minutes), audio, gr.Plot(label="CTC"))
    page.launch(server_name=args.host, server_port=args.port, share=args.share, css=CSS,
                theme=gr.themes.Default(font="system-ui"), footer_links=[], run_history=False)

if __name__ == "__main__":
    run(main)
