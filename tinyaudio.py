"""Tiny Audio: speech recognition from two frozen pretrained models and one small trained bridge.

    waveform -> encoder -> stack 5 frames -> projector (trained) -> language model -> text

    from tinyaudio import TinyAudio
    print(TinyAudio.from_pretrained("assets/default").transcribe("file.wav"))

The file follows the sound. Shapes: B clips, T encoder frames (50 per second), N stacked frames
(10 per second), D encoder width, d decoder width, V CTC tokens. A batch is a list of tensors.
"""
import itertools
import json
import shutil
import string
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import offline
from data import (SAMPLE_RATE, InputError, first_line, is_hub_id, make_batches, read_audio,
                  split_audio, write_file)

hf.logging.set_verbosity_error()
# Its bars of loading, while those of the Hub's downloads stay
hf.logging.set_tqdm_hook(lambda bar, inputs, options: bar(*inputs, **{**options, "disable": True}))

NAMES = {  # whisper-base and smollm2-135m are in offline.py
    "hubert": "facebook/hubert-xlarge-ls960-ft",
    "whisper": "openai/whisper-large-v3-turbo",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
}

def fetch(load, name, **options):
    """load(source) of a short name, hub id or folder, with its errors as InputError."""
    known = [*NAMES, *offline.PACKAGES]
    if name not in known and not Path(name).is_dir() and not is_hub_id(name):
        raise InputError(f"{name} is no folder, no hub id and none of {', '.join(known)}")
    source = str(offline.folder(name)) if name in offline.PACKAGES else NAMES.get(name, name)
    try:
        return load(source, **options)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot load {source}: {first_line(error)}") from None

def find_device(name=None):
    """The torch.device of a name; without one the accelerator, or the CPU. Raises InputError."""
    best = name or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    if not name and best == "cpu" and torch.version.cuda and shutil.which("nvidia-smi"):
        raise InputError(f"torch {torch.__version__} does not see the GPU that is here: it needs a "
                         "newer driver, or another torch (README); --device cpu does without")
    try:
        return torch.empty(0, device=best).device
    except (RuntimeError, AssertionError):
        raise InputError(f"there is no device {best} here") from None

def load_frozen(model_class, name, device, dtype, **options):
    """A pretrained model: by default on the accelerator, and in bfloat16 where that is fast."""
    device = find_device(device)
    if name not in offline.PACKAGES:  # it may take long
        print(f"loading {NAMES.get(name, name)}", file=sys.stderr)
    fast = device.type != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16")
    dtype = dtype or (torch.bfloat16 if fast else torch.float32)
    model, report = fetch(model_class.from_pretrained, name, dtype=dtype,
                          output_loading_info=True, **options)
    missing = [key for key in report["missing_keys"] if "masked_spec_embed" not in key]
    if missing:  # they would be random
        raise InputError(f"{name} lacks {len(missing)} weights, such as {min(missing)}")
    model.name_or_path = name  # as the user typed it
    return model.eval().requires_grad_(False).to(device)

def load_encoder(name, device=None, dtype=None):
    """The `Encoder` of a short name, hub id or folder."""
    kind = fetch(hf.AutoConfig.from_pretrained, name).model_type
    if kind == "whisper":  # without its own decoder
        encoder_only = {r"^(model\.)?encoder\.": ""}
        model = load_frozen(WhisperEncoder, name, device, dtype, key_mapping=encoder_only)
    elif kind in ("hubert", "wav2vec2", "wavlm"):
        model = load_frozen(hf.AutoModel, name, device, dtype)
    else:
        raise InputError(f"{name} is a {kind} model, not Whisper, HuBERT, wav2vec 2.0 or WavLM")
    return Encoder(model, fetch(hf.AutoFeatureExtractor.from_pretrained, name)).eval()

def load_decoder(name, device=None, dtype=None):
    """The causal language model of a short name, hub id or folder, and its tokenizer."""
    tokenizer = fetch(hf.AutoTokenizer.from_pretrained, name)
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        raise InputError(f"{name} has no chat template or no end token: use an instruct model")
    config = fetch(hf.AutoConfig.from_pretrained, name)
    with torch.device("meta"):  # its shape, before its weights are fetched
        shape = hf.AutoModelForCausalLM.from_config(config)
    scales = ("logits_scaling", "logit_scale", "final_logit_softcapping")  # not in `lm_loss`
    if (not hasattr(shape.base_model, "layers")
            or type(shape.get_input_embeddings()) is not nn.Embedding  # Gemma 3 scales them
            or any(getattr(config, key, None) not in (None, 1) for key in scales)):
        raise InputError(f"{name} is a {config.model_type} model, which is built otherwise than "
                         "Llama, Qwen3 and SmolLM3: use one with `layers` and plain logits")
    if not device and find_device().type == "cpu" and shape.num_parameters() > 1e9:
        raise InputError(f"{name} has {shape.num_parameters() / 1e9:.1f} billion parameters, and "
                         "torch sees no GPU here: --device cpu runs it all the same, slowly")
    model = load_frozen(hf.AutoModelForCausalLM, name, device, dtype)
    # Each prompt's last position is a strided view, for which `F.linear` copies the head's weights.
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, inputs: inputs[0].contiguous())
    model.generation_config = hf.GenerationConfig()  # plain: its own may punish repeats
    return model, tokenizer

def length_mask(lengths, size, device):
    """lengths (B,) -> bool mask (B, size) on the device, true before each length."""
    return (torch.arange(size) < torch.tensor(lengths)[:, None]).to(device)

class Encoder(nn.Module):
    """A frozen audio encoder. Each clip keeps its true length, without Whisper's 30 s of padding,
    and its frames do not depend on the other clips of the batch."""
    frame_rate = 50  # per second, in every supported family

    def __init__(self, model, extractor):
        super().__init__()
        self.model, self.extractor = model, extractor
        self.dim = model.config.hidden_size
        self.is_whisper = isinstance(model, WhisperEncoder)

    def forward(self, waves):
        """B arrays (samples,) -> B tensors of frames (T, D)."""
        return self.encode([self.features(wave) for wave in waves])

    def features(self, wave):
        """wave (samples,) -> what the model takes: the log-mel spectrogram (100 per second, mels)
        for Whisper, the samples (samples,) for the others."""
        wave = np.pad(wave, (0, max(0, 400 - len(wave))))  # a full window
        found = self.extractor(wave, sampling_rate=SAMPLE_RATE, padding="do_not_pad",
                               return_tensors="pt")
        return found.input_features[0].T if self.is_whisper else found.input_values[0]

    def encode(self, features):
        """B tensors of `features` -> B tensors of frames (T, D)."""
        if getattr(self.model.config, "feat_extract_norm", "") == "group":  # it counts padding
            return [self.wav2vec2([clip])[0] for clip in features]
        return (self.whisper if self.is_whisper else self.wav2vec2)(features)

    def whisper(self, mels):
        """`WhisperEncoder.forward` at any length up to 30 s (Radford et al. 2022)."""
        model, device, sizes = self.model, self.model.device, list(map(len, mels))
        mel = pad_sequence(mels, batch_first=True).to(device, model.dtype)
        x = F.gelu(model.conv1(mel.transpose(1, 2)))
        # conv2 looks one frame past the end, where a clip alone would have zeros.
        x = x * length_mask(sizes, x.shape[2], device)[:, None]
        x = F.gelu(model.conv2(x)).transpose(1, 2)
        x = x + model.embed_positions.weight[:x.shape[1]]
        lengths = [(size + 1) // 2 for size in sizes]
        mask = length_mask(lengths, x.shape[1], device)
        mask = create_bidirectional_mask(model.config, x, mask)
        for layer in model.layers:
            x = layer(x, mask)
        return [clip[:length] for clip, length in zip(model.layer_norm(x), lengths)]

    def wav2vec2(self, waves):
        """HuBERT, wav2vec 2.0 and WavLM take raw samples and their mask."""
        sizes = list(map(len, waves))
        x = pad_sequence(waves, batch_first=True).to(self.model.device, self.model.dtype)
        mask = length_mask(sizes, x.shape[1], x.device).long()
        x = self.model(x, attention_mask=mask).last_hidden_state
        lengths = self.model._get_feat_extract_output_lengths(torch.tensor(sizes)).tolist()
        return [clip[:length] for clip, length in zip(x, lengths)]

class Projector(nn.Module):
    """The trained bridge: stack k frames -> RMSNorm -> Linear -> GELU -> Linear -> RMSNorm. Without
    `hidden` it has at most 13M parameters. rms is that of the decoder's embeddings: sound starts as
    loud as words."""

    def __init__(self, encoder_dim, decoder_dim, rms=1.0, stack=5, hidden=None):
        super().__init__()
        widest = min(2 * encoder_dim, 13_000_000 // (stack * encoder_dim + decoder_dim))
        self.stack, self.hidden = stack, hidden or widest // 16 * 16
        self.norm_in = nn.RMSNorm(stack * encoder_dim, eps=1e-6)
        self.linear_in = nn.Linear(stack * encoder_dim, self.hidden, bias=False)
        self.linear_out = nn.Linear(self.hidden, decoder_dim, bias=False)
        self.norm_out = nn.RMSNorm(decoder_dim, eps=1e-6)
        nn.init.constant_(self.norm_out.weight, rms)
        self.mask = self.dropout = 0.0  # shares of frames and of hidden units

    def stack_frames(self, frames):
        """frames (T, D) -> (N, k D), N = ceil(T / k): no frame is lost."""
        frames = F.pad(frames.float(), (0, 0, 0, -len(frames) % self.stack))
        return frames.reshape(-1, self.stack * frames.shape[1])

    def forward(self, frames):
        """B tensors of frames (T, D) -> B tensors of audio (N, d)."""
        clips = [self.stack_frames(clip) for clip in frames]
        # Whole frames. dropout1d scales what it keeps; the RMSNorm behind it cancels that.
        x = F.dropout1d(torch.cat(clips), self.mask, self.training)
        x = F.gelu(self.linear_in(self.norm_in(x)))
        x = self.linear_out(F.dropout(x, self.dropout, self.training))
        return self.norm_out(x.float()).split(list(map(len, clips)))

class CTCHead(nn.Module):
    """Spell with the decoder's own words: logits are temperature * dot products of a frame with the
    decoder's input embeddings and with one learned blank, plus its bias (CTC: Graves et al. 2006).
    Class 0 is the blank, class i the token tokens[i - 1] of the decoder."""

    def __init__(self, decoder_dim, rms=1.0):
        super().__init__()
        self.blank = nn.Parameter(torch.zeros(decoder_dim))
        self.bias = nn.Parameter(torch.zeros(()))
        # At first a frame that equals a token's embedding has logit 60. Less learns slowly.
        self.log_temperature = nn.Parameter(torch.tensor(60 / (decoder_dim * rms**2)).log())
        self.register_buffer("tokens", torch.zeros(0, dtype=torch.int32))
        self.classes = {}  # token -> class, in the order of `tokens`

    def forward(self, audio, words):
        """audio (..., N, d), words (V, d), embeddings of tokens -> logits (..., N, 1 + V)."""
        audio = audio * self.log_temperature.exp()
        blank = (audio @ self.blank + self.bias)[..., None]
        return torch.cat([blank, F.linear(audio.to(words.dtype), words).float()], dim=-1)

class LoRA(nn.Module):
    """A trained low-rank update of a frozen layer: W x + B A x (Hu et al. 2021)."""

    def __init__(self, linear, rank):
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.hook = linear.register_forward_hook(self.add)

    def add(self, linear, inputs, output):
        """Forward hook: (..., in), (..., out) -> (..., out)."""
        return output + F.linear(inputs[0] @ self.a.to(output.dtype).T, self.b.to(output.dtype))

def ctc_prefix_extend(log_probs, clips, ends, last, classes):
    """Try K next classes for each of R texts (Watanabe et al. 2017, algorithm 2). log_probs
    (B, N, 1 + V), clip and last class (0: none) of each text (R,), classes (R, K). ends (R, N, 2):
    [:, n, 0] is log p that the frames 0 to n spell the text and frame n is of its last token, and
    [:, n, 1] the same where frame n is a blank. Returns log p that the clip begins with the longer
    text (R, K), and its ends (R, K, N, 2)."""
    token = log_probs[clips[:, None], :, classes]  # (R, K, N)
    blank = log_probs[clips, None, :, 0]  # (R, 1, N)
    old_token, old_blank = ends[:, None, :, 0], ends[:, None, :, 1]
    # The longer text can begin behind both; a repeated token needs a blank between.
    repeats = (classes == last[:, None])[:, :, None]
    before = np.where(repeats, old_blank, np.logaddexp(old_token, old_blank))
    in_token = [np.where(last[:, None] == 0, token[:, :, 0], -np.inf)]
    in_blank = [np.full_like(in_token[0], -np.inf)]
    for n in range(1, ends.shape[1]):
        in_blank.append(np.logaddexp(in_token[-1], in_blank[-1]) + blank[:, :, n])
        in_token.append(np.logaddexp(in_token[-1], before[:, :, n - 1]) + token[:, :, n])
    begun = np.concatenate([in_token[0][:, :, None], before[:, :, :-1] + token[:, :, 1:]], axis=2)
    longer = np.stack([np.stack(in_token, axis=2), np.stack(in_blank, axis=2)], axis=3)
    return np.logaddexp.reduce(begun, axis=2), longer

TRANSCRIBE = "Transcribe: <audio>"
DECODINGS = ("ctc", "greedy", "joint")

class TinyAudio(nn.Module):
    """Two frozen backbones and an untrained bridge. encoder is a name, or an `Encoder`; decoder is
    a name, or a causal language model and its tokenizer. lora is the rank of `LoRA` layers (0:
    none), prompt the text around the audio (default: by the tokenizer's chat template)."""

    def __init__(self, encoder, decoder, stack=5, hidden=None, lora=0, decode="greedy",
                 prompt=None, device=None, dtype=None):
        super().__init__()
        if isinstance(encoder, str):
            encoder = load_encoder(encoder, device, dtype)
        if isinstance(decoder, str):
            decoder = load_decoder(decoder, device, dtype)
        self.encoder, (self.decoder, self.tokenizer) = encoder, decoder
        for frozen in (self.encoder, self.decoder):
            frozen.eval().requires_grad_(False)
        weight, self.end = self.embed.weight, self.tokenizer.eos_token_id
        dim = weight.shape[1]
        rms = weight.norm(dtype=torch.float32).item() / weight.numel()**0.5
        self.projector = Projector(self.encoder.dim, dim, rms, stack, hidden)
        self.ctc = CTCHead(dim, rms)
        layers = self.decoder.base_model.named_modules() if lora else ()
        self.lora = nn.ModuleDict({name.replace(".", "-"): LoRA(layer, lora)
                                   for name, layer in layers if isinstance(layer, nn.Linear)})
        self.to(self.device)
        # A template may write today's date: what was trained is what must be asked later.
        self.config = dict(
            encoder=self.encoder.model.name_or_path, decoder=self.decoder.name_or_path,
            stack=stack, hidden=self.projector.hidden, lora=lora, decode=decode,
            prompt=prompt or self.render(TRANSCRIBE))

    @property
    def device(self):
        return self.embed.weight.device

    @property
    def embed(self):
        return self.decoder.get_input_embeddings()

    @property
    def ctc_words(self):
        """A copy of the embeddings (V, d) of the tokens that CTC knows."""
        return self.embed.weight[self.ctc.tokens]

    def train(self, mode=True):
        """As in PyTorch, but the frozen parts stay in eval: another thread may be encoding."""
        self.training = mode
        for part in (self.projector, self.ctc, self.lora):
            part.train(mode)
        return self

    def trained(self):
        """The parameters that are trained and saved, by name."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def tokenize(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def tokenize_answer(self, text):
        """Token ids. Behind a space a word is the same token wherever it stands."""
        return self.tokenize(f" {text}") if text else []

    def detokenize(self, ids):
        return " ".join(self.tokenizer.decode(ids, skip_special_tokens=True).split())

    def render(self, task):
        """The tokenizer's chat template around a task."""
        # Without a system message some templates write a long one.
        messages = [{"role": "system", "content": ""}, {"role": "user", "content": task}]
        options = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except Exception:  # some templates know no system role
            return self.tokenizer.apply_chat_template(messages[1:], **options)

    def prompt(self, task=TRANSCRIBE):
        """Token ids before and after the audio. Raises InputError."""
        if task.count("<audio>") != 1:
            raise InputError(f"task {task!r} must say once where the sound goes: Sum up: <audio>")
        text = self.config["prompt"] if task == TRANSCRIBE else self.render(task)
        before, _, after = text.rpartition("<audio>")
        return self.tokenize(before), self.tokenize(after)

    def embed_ids(self, ids):
        return self.embed(torch.tensor(ids, dtype=torch.long, device=self.device))

    def embed_prompt(self, audio, task=TRANSCRIBE):
        """B tensors of audio (N, d) -> B tensors (before + N + after, d)."""
        before, after = map(self.embed_ids, self.prompt(task))
        return [torch.cat([before, clip.to(before.dtype), after]) for clip in audio]

    def loss(self, frames, answers, ctc_weight=0.1, lm_weight=1.0):
        """B tensors of frames (T, D), B lists of token ids -> summed loss, its parts (2,): CTC and
        cross-entropy."""
        audio = self.projector(frames)
        zero = torch.zeros((), device=self.device)
        ctc = self.ctc_loss(audio, answers) if ctc_weight else zero
        lm = self.lm_loss(audio, answers) if lm_weight else zero
        return ctc_weight * ctc + lm_weight * lm, torch.stack([ctc, lm]).detach()

    def ctc_loss(self, audio, answers):
        """CTC loss of the tokens that CTC knows. An answer that does not fit its frames adds zero.
        To save time and memory, the tokens that are in no answer are merged into one class: loss
        and gradient are the same."""
        classes, words, x = self.ctc.classes, self.ctc_words, torch.cat(audio)
        answers = [[classes[token] for token in answer if token in classes] for answer in answers]
        counts, sizes = list(map(len, audio)), list(map(len, answers))
        # said: the classes of the answers; targets: places in said
        said, targets = torch.tensor(sum(answers, []), dtype=torch.long).unique(return_inverse=True)
        # The softmax's denominator, over all tokens. On a CPU 128 frames at a time are fastest
        total = torch.cat([self.ctc(piece, words).logsumexp(-1, keepdim=True)
                           for piece in x.split(128)])
        log_probs = self.ctc(x, words[said - 1]) - total
        # All others: the gradient of `F.ctc_loss` is right only where the classes sum to 1
        known = log_probs.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6)
        log_probs = torch.cat([log_probs, torch.log1p(-known)], -1).split(counts)
        return F.ctc_loss(pad_sequence(log_probs), targets.to(self.device) + 1, counts, sizes,
                          reduction="sum", zero_infinity=True)

    def lm_loss(self, audio, answers):
        """Cross-entropy of the answers and their end tokens, given the audio."""
        prompts = self.embed_prompt(audio)
        words = self.embed_ids(sum(answers, [])).split([len(answer) for answer in answers])
        # Padding on the right needs no mask: causal attention never looks there.
        x = pad_sequence([torch.cat(row) for row in zip(prompts, words)], batch_first=True)
        x = self.decoder.base_model(inputs_embeds=x, use_cache=False).last_hidden_state
        # Logits are the most expensive layer: only where the next token is of the answer.
        x = torch.cat([row[len(prompt) - 1:len(prompt) + len(answer)]
                       for row, prompt, answer in zip(x, prompts, answers)])
        logits = self.decoder.get_output_embeddings()(x).float()
        labels = [token for answer in answers for token in [*answer, self.end]]
        return F.cross_entropy(logits, torch.tensor(labels, device=self.device), reduction="sum")

    # Decoding. From here on: audio as B tensors (N, d), answers as B lists of token ids.

    @torch.no_grad()
    def encode(self, waves):
        """B arrays (samples,) -> audio."""
        return self.projector(self.encoder(waves))

    def set_ctc_tokens(self, tokens):
        """CTC may use these token ids too, and single characters."""
        tokens = {*self.ctc.classes, *tokens}
        for letter in string.ascii_letters + string.digits + "'.,?!-":
            tokens.update(self.tokenize(letter), self.tokenize(f" {letter}"))
        self.ctc.tokens = torch.tensor(sorted(tokens), dtype=torch.int32, device=self.device)
        self.ctc.classes = {token: i for i, token in enumerate(sorted(tokens), 1)}

    def ctc_greedy(self, audio):
        """The best class of each frame, without repeats and blanks."""
        best = self.ctc(torch.cat(audio), self.ctc_words).argmax(-1).cpu()
        tokens = list(self.ctc.classes)
        return [[tokens[i - 1] for i, _ in itertools.groupby(path.tolist()) if i]
                for path in best.split(list(map(len, audio)))]

    def left_pad(self, prompts):
        """B tensors (length, d) -> (B, longest, d) and its mask (B, longest), 0 at padding."""
        masks = [torch.ones(len(x), dtype=torch.long, device=self.device) for x in prompts]
        return [pad_sequence(rows, True, padding_side="left") for rows in (prompts, masks)]

    def token_limits(self, audio, task=TRANSCRIBE):
        """The most tokens of each answer: one a frame and 10 more, or 200 for other tasks."""
        return [len(clip) + 10 if task == TRANSCRIBE else 200 for clip in audio]

    def generate(self, audio, task=TRANSCRIBE, streamer=None):
        """Greedy decoding by the language model, with a streamer of transformers."""
        x, mask = self.left_pad(self.embed_prompt(audio, task))
        limits = self.token_limits(audio, task)
        found = self.decoder.generate(
            inputs_embeds=x, attention_mask=mask, max_new_tokens=max(limits), do_sample=False,
            eos_token_id=self.end, pad_token_id=self.end, streamer=streamer)
        answers = [ids[:limit] for ids, limit in zip(found.tolist(), limits)]
        return [ids[:ids.index(self.end)] if self.end in ids else ids for ids in answers]

    @torch.no_grad()
    def joint(self, audio, weight=0.4, beams=4, choices=16):
        """Beam search for the best (1 - weight) log p_LM + weight log p_CTC: the language model
        knows sentences, CTC holds it to the sound (Watanabe et al. 2017). Only `choices` next
        tokens of each text are tried: the best by the language model and CTC's loudest frame."""
        log_probs = self.ctc(torch.cat(audio), self.ctc_words).log_softmax(-1)
        log_probs = pad_sequence(log_probs.split(list(map(len, audio))), True, -np.inf)
        blank = log_probs[..., 0]
        blank[blank == -np.inf] = 0  # behind its end a clip is certainly blank
        loudest, log_probs = log_probs[..., 1:].amax(1), log_probs.cpu().numpy()
        spoken = list(self.ctc.classes)
        # R unfinished texts, at first an empty one of each clip; last is the class they end in
        clips, texts, lm = np.arange(len(audio)), [[]] * len(audio), np.zeros(len(audio))
        blanks, last = log_probs[:, :, 0].cumsum(1, dtype=np.float64), np.zeros_like(clips)
        ends = np.stack([np.full_like(blanks, -np.inf), blanks], axis=2)
        answers, best = [[]] * len(audio), np.full(len(audio), -np.inf)  # the best that ended
        (x, mask), cache = self.left_pad(self.embed_prompt(audio)), None
        while texts:
            positions = (mask.cumsum(1) - 1).clamp(0)[:, -x.shape[1]:]
            out = self.decoder(inputs_embeds=x, attention_mask=mask, position_ids=positions,
                               past_key_values=cache, use_cache=True, logits_to_keep=1)
            next_lm, cache = out.logits[:, -1].float().log_softmax(-1), out.past_key_values
            ended = (1 - weight) * (lm + next_lm[:, self.end].cpu().numpy())
            ended += weight * np.logaddexp(ends[:, -1, 0], ends[:, -1, 1])
            for clip, text, score in zip(clips, texts, ended):
                if score > best[clip]:
                    answers[clip], best[clip] = text, score
            next_lm = next_lm[:, self.ctc.tokens]
            promising = (1 - weight) * next_lm + weight * loudest[clips]
            top = promising.topk(min(choices, promising.shape[1])).indices
            classes = top.cpu().numpy() + 1
            ctc, longer = ctc_prefix_extend(log_probs, clips, ends, last, classes)
            lm = lm[:, None] + next_lm.gather(1, top).cpu().numpy()
            scores = (1 - weight) * lm + weight * ctc  # (R, choices)
            kept = []  # of each clip the `beams` best, as places in scores
            for clip in np.unique(clips):
                mine = np.where(clips[:, None] == clip, scores, -np.inf).flatten()
                order = mine.argsort()[::-1][:beams]
                kept += [place for place in order if mine[place] > best[clip]]  # it can only fall
            rows, columns = np.unravel_index(np.array(kept, int), scores.shape)
            clips, lm, ends = clips[rows], lm[rows, columns], longer[rows, columns]
            last = classes[rows, columns]
            tokens = [spoken[i - 1] for i in last]
            texts = [texts[row] + [token] for row, token in zip(rows, tokens)]
            x, mask = self.embed_ids(tokens)[:, None], F.pad(mask[rows], (0, 1), value=1)
            cache.batch_select_indices(torch.from_numpy(rows).to(self.device))
        return answers

    def decode(self, audio, decode=None, task=TRANSCRIBE):
        """Answers by one of DECODINGS (default: the best in training), of other tasks by greedy.
        Where CTC hears nothing: empty. One that reaches its length limit is replaced by CTC's."""
        decode = decode or self.config["decode"]
        if decode not in DECODINGS:
            raise InputError(f"decode={decode!r} is none of {', '.join(DECODINGS)}")
        if not len(self.ctc.tokens):
            raise InputError("this model is untrained: load one with TinyAudio.from_pretrained")
        if task != TRANSCRIBE:
            return self.generate(audio, task)
        answers = self.ctc_greedy(audio)
        speech = [i for i, answer in enumerate(answers) if answer]
        if decode != "ctc" and speech:
            search = self.joint if decode == "joint" else self.generate
            heard = [audio[i] for i in speech]
            for i, answer, limit in zip(speech, search(heard), self.token_limits(heard)):
                if len(answer) < limit:
                    answers[i] = answer
        return answers

    def transcribe(self, source, decode=None, task=TRANSCRIBE, sample_rate=SAMPLE_RATE):
        """Text of one clip of any length (see `data.read_audio`), or texts of a list of clips."""
        clips = source if isinstance(source, list) else [source]
        pieces = [{"clip": i, "wave": wave, "seconds": len(wave) / SAMPLE_RATE}
                  for i, clip in enumerate(clips)
                  for _, wave in split_audio(read_audio(clip, sample_rate))]
        for batch in make_batches(pieces, 120):
            answers = self.decode(self.encode([piece["wave"] for piece in batch]), decode, task)
            for piece, answer in zip(batch, answers):
                piece["text"] = self.detokenize(answer)
        texts = [" ".join(piece["text"] for piece in pieces if piece["clip"] == i and piece["text"])
                 for i in range(len(clips))]
        return texts if isinstance(source, list) else texts[0]

    def align(self, audio, ids):
        """audio (N, d), L token ids -> frames (L,) in which they are said, probabilities (L,).
        A token is said where its posterior, given the whole text, is highest. The gradient of the
        CTC loss is probability - posterior (Graves et al. 2006, eq. 16)."""
        total = self.ctc(audio, self.ctc_words).logsumexp(-1, keepdim=True)
        logits = self.ctc(audio, self.embed.weight[ids])
        log_probs, classes = (logits - total).detach().cpu(), torch.arange(1, len(ids) + 1)
        loss = F.ctc_loss(log_probs.requires_grad_()[:, None], classes[None], [len(audio)],
                          [len(ids)], reduction="sum", zero_infinity=True)
        gradient, probs = torch.autograd.grad(loss, log_probs)[0], log_probs.detach().exp()
        frames = (probs - gradient)[:, 1:].argmax(0).cummax(0).values
        return frames, probs[frames, classes]

    def save_pretrained(self, folder, notes=""):
        """Write the trained tensors (matrices in bfloat16), config.json and a model card."""
        if self.config["lora"] and not self.lora:
            raise ValueError("the low-rank update is merged into the decoder and cannot be saved")
        tensors = {k: x.bfloat16() if x.ndim == 2 else x for k, x in self.trained().items()}
        tensors["ctc.tokens"] = self.ctc.tokens
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_file(Path(folder, "model.safetensors"), safetensors.torch.save(tensors))
        write_file(Path(folder, "config.json"), json.dumps(self.config, indent=2) + "\n")
        write_file(Path(folder, "README.md"), CARD.format(**self.config, notes=notes))

    @classmethod
    def from_pretrained(cls, name, device=None, dtype=None, merge=True):
        """A trained model of a folder or the Hub. merge=False keeps LoRA apart, to train it on."""
        local = Path(name).is_dir()
        if not local and not is_hub_id(str(name)):
            raise InputError(f"{name} is no folder and no hub id of a checkpoint")
        files = ["config.json", "model.safetensors"]
        folder = Path(name if local else fetch(huggingface_hub.snapshot_download, str(name),
                                               allow_patterns=files))
        try:
            config = json.loads((folder / "config.json").read_text())
            keys = ["decode", "decoder", "encoder", "hidden", "lora", "prompt", "stack"]
            if sorted(config) != keys:
                raise ValueError(f"config.json has the keys {', '.join(config)}")
            tensors = safetensors.torch.load_file(folder / "model.safetensors")
            tokens = tensors.pop("ctc.tokens").tolist()
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            raise InputError(f"{name} is no checkpoint: {first_line(error)}") from None
        model = cls(**config, device=device, dtype=dtype)
        if tokens:
            model.set_ctc_tokens(tokens)
        found, own = ({key: x.shape for key, x in named.items()}
                      for named in (tensors, model.trained()))
        if found != own:
            raise InputError(f"{name}: its tensors do not fit its config.json")
        model.load_state_dict(tensors, strict=False)  # the frozen parts are not in it
        if merge:  # the low-rank update into the weights, where it costs nothing
            for layer_name, update in model.lora.items():
                update.hook.remove()
                layer = model.decoder.base_model.get_submodule(layer_name.replace("-", "."))
                layer.weight += (update.b @ update.a).detach().to(layer.weight)
            model.lora = nn.ModuleDict()
        model.loaded = tensors  # also what is merged
        return model.eval()

CARD = """---
pipeline_tag: automatic-speech-recognition
---
# Tiny Audio: {encoder} -> {decoder}
`TinyAudio.from_pretrained("this folder or its hub id").transcribe("file.wav")`

{notes}
"""
