"""Tiny Audio: speech recognition from two frozen pretrained models and one small trained bridge.

    waveform -> encoder (frozen) -> stack 5 frames -> projector (trained) -> language model (frozen) -> text

    from tinyaudio import TinyAudio
    model = TinyAudio.load("assets/default")
    print(model.transcribe("file.wav"))

The file is laid out in the order in which the sound travels:
names, audio, encoder, projector, CTC head, LoRA, TinyAudio (prompt, loss, decoding, save and load), data.

Letters in shapes: B clips, T encoder frames (50 a second), N stacked frames (10 a second), D the encoder's width,
d the decoder's width, V tokens that the CTC head spells with.
"""

import contextlib
import copy
import csv
import ctypes
import glob
import io
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import safetensors.torch
import soundfile
import soxr
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache, logging
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import offline
from offline import InputError

logging.set_verbosity_error()
logging.disable_progress_bar()

# ------------------------------------------------------------------------------------------------------------ names

ENCODERS = {
    "hubert": "facebook/hubert-xlarge-ls960-ft",
    "whisper": "openai/whisper-large-v3-turbo",
    "whisper-base": "embedded",
}
DECODERS = {
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
    "smollm2-135m": "embedded",
}


def locate(name, names):
    """Local folder or hub id of a backbone given by short name, hub id or folder."""
    if names.get(name) == "embedded":
        return str(offline.folder(name))
    if name in names or Path(name).is_dir():
        return names.get(name, name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise InputError(f"{name} is no model: use {''.join(f'{known}, ' for known in names)}a hub id (owner/name) or a local folder")
    return name


def from_hub(load, source, **options):
    """`load(source, **options)`, with the many ways in which that fails told in one line."""
    try:
        return load(source, **options)
    except InputError:
        raise
    except Exception as error:
        if Path(source).is_dir():
            raise InputError(f"{source} holds nothing usable: {first_line(error)}") from None
        raise InputError(f"cannot get {source} from the Hugging Face Hub ({first_line(error)}); the embedded pair, "
                         "whisper-base and smollm2-135m, needs no download") from None


def load_model(model_class, source, dtype, **options):
    """A pretrained model, whole: weights that its files lack would otherwise stay random without a word."""
    # Float32 is made layer by layer from what is on disk, most often half as large, so that never all of it is there twice.
    stored = "auto" if dtype == torch.float32 else dtype
    model, report = from_hub(model_class.from_pretrained, source, output_loading_info=True, dtype=stored, **options)
    missing = sorted(name for name in report["missing_keys"] if not name.endswith("masked_spec_embed"))  # unused in eval mode
    if missing:
        raise InputError(f"{source} lacks {len(missing)} weights of a {type(model).__name__}, such as {missing[0]}")
    return (model.float() if stored == "auto" else model).eval().requires_grad_(False)


def first_line(error):
    return getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]


def placement(device=None, dtype=None):
    """Where the frozen parts go: the best device, in bfloat16; or float32 on a CPU for which bfloat16 is slower."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.empty(0, device=device or best).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"no device {device} here: {first_line(error)}") from None
    slow = device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported()
    return device, dtype or (torch.float32 if slow else torch.bfloat16)


def return_freed_memory():
    """Have glibc return what large tensors held to the system at once. By default it keeps pieces, more with every new shape, and a
    process that hears sound of any length would grow with it. Elsewhere this does nothing."""
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 20), mallopt(-1, 1 << 20)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


# ------------------------------------------------------------------------------------------------------------ audio

SAMPLE_RATE = 16_000


def read_audio(source, sample_rate=SAMPLE_RATE):
    """Decode, mix down and resample sound of any length, which is never in memory as a whole.

    Parameters
    ----------
    source : path, bytes or file object (wav, flac, mp3, ogg/opus, ...), or array (samples,) or (samples, channels),
        float in [-1, 1] or signed integer
    sample_rate : of an array, in Hz; files carry their own

    Yields float32 arrays (samples,), mono, 16 kHz, of about 10 s.
    Raises InputError if the source is missing, empty, not audio, or holds samples that are not numbers.
    """
    name, total = source if isinstance(source, (str, Path)) else getattr(source, "name", None), 0
    name = name if isinstance(name, (str, Path)) else "audio input"  # temporary files are named by a number
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(source, (str, Path)):
                source = stack.enter_context(open(source, "rb"))
            elif isinstance(source, bytes):
                source = io.BytesIO(source)
            if hasattr(source, "read"):
                file = stack.enter_context(soundfile.SoundFile(source))
                sample_rate = file.samplerate
                blocks = (file.read(10 * sample_rate, dtype="float32", always_2d=True) for _ in itertools.count())
            else:
                samples = np.asarray(source)
                scale = -np.iinfo(samples.dtype).min if np.issubdtype(samples.dtype, np.signedinteger) else 1
                samples = samples.astype(np.float32).reshape(samples.shape if samples.ndim == 2 else (-1, 1)) / scale
                blocks = iter([samples, samples[:0]])
            resampler = soxr.ResampleStream(sample_rate, SAMPLE_RATE, 1)
            while len(block := next(blocks)):
                if not np.isfinite(block).all():
                    raise InputError(f"{name}: holds samples that are not numbers (NaN or infinity)")
                total += len(block)
                mono = np.ascontiguousarray(block.mean(axis=1))
                yield mono if sample_rate == SAMPLE_RATE else resampler.resample_chunk(mono)
            if total and sample_rate != SAMPLE_RATE:
                yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
    except soundfile.LibsndfileError as error:
        raise InputError(f"{name}: not audio that can be read ({error.error_string.strip().rstrip('.')})") from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{name}: {first_line(error)}") from None
    if not total:
        raise InputError(f"{name}: no sound in it (0 samples)")


def load_audio(source, sample_rate=SAMPLE_RATE):
    """One clip as a whole: what `read_audio` takes -> float32 array (samples,), mono, 16 kHz."""
    return np.concatenate(list(read_audio(source, sample_rate)))


def split_audio(blocks, shortest=15.0, longest=28.0):
    """Cut a stream of arrays into pieces of at most `longest` seconds, each at the quietest 0.1 s in reach.
    Yields the start of each piece in seconds, and its samples."""
    rest, start, window = np.zeros(0, np.float32), 0, SAMPLE_RATE // 10
    for block in blocks:
        rest = np.concatenate([rest, block])
        while len(rest) > longest * SAMPLE_RATE:
            reach = rest[int(shortest * SAMPLE_RATE):int(longest * SAMPLE_RATE)]
            loudness = np.square(reach[:len(reach) // window * window]).reshape(-1, window).mean(axis=1)
            cut = int(shortest * SAMPLE_RATE) + int(loudness.argmin()) * window + window // 2
            yield start / SAMPLE_RATE, rest[:cut]
            rest, start = rest[cut:], start + cut
    yield start / SAMPLE_RATE, rest


# ---------------------------------------------------------------------------------------------------------- encoder


class Encoder(nn.Module):
    """A frozen audio encoder, run at the true length of each clip: there is no 30 s padding, and the padding up to the
    longest clip is masked wherever it could be heard, so that frames do not depend on what else is in the batch."""

    frame_rate = 50  # frames a second, of every supported family

    def __init__(self, model, extractor):
        super().__init__()
        self.model, self.extractor = model, extractor
        self.is_whisper = model.config.model_type == "whisper"
        self.dim = model.config.d_model if self.is_whisper else model.config.hidden_size
        self.max_seconds = model.config.max_source_positions / self.frame_rate if self.is_whisper else math.inf
        # Group norm takes its statistics over the whole padded length, so such models hear one clip at a time.
        self.one_by_one = getattr(model.config, "feat_extract_norm", "") == "group"

    @torch.no_grad()
    def forward(self, waves):
        """B arrays (samples,) -> frames (B, T, D), zero past each clip's length, and lengths (B,).
        Raises InputError for a clip that is longer than the encoder's positions (Whisper: 30 s)."""
        waves = [np.pad(wave, (0, max(0, 400 - len(wave)))) for wave in waves]  # one window, below which there is no frame
        longest = max(map(len, waves)) / SAMPLE_RATE
        if longest > self.max_seconds:
            raise InputError(f"a clip of {longest:.1f} s is longer than the encoder hears ({self.max_seconds:.0f} s)")
        encode = self.whisper_frames if self.is_whisper else self.wav2vec2_frames
        if self.one_by_one:
            frames, lengths = zip(*(encode([wave]) for wave in waves))
            return pad_sequence([clip[0] for clip in frames], batch_first=True), torch.cat(lengths)
        frames, lengths = encode(waves)
        return frames * length_mask(lengths, frames.shape[1])[..., None], lengths

    def whisper_frames(self, waves):
        """`WhisperEncoder.forward`, which insists on 30 s, taken apart (Radford et al. 2022)."""
        model = self.model
        where = "cuda" if model.device.type == "cuda" else "cpu"
        mels = [self.extractor(wave, sampling_rate=SAMPLE_RATE, padding="do_not_pad", return_tensors="pt", device=where)
                .input_features[0].T for wave in waves]
        mel_lengths = torch.tensor([len(mel) for mel in mels], device=model.device)
        mel = pad_sequence(mels, batch_first=True).to(model.device, model.dtype)
        x = F.gelu(model.conv1(mel.transpose(1, 2)))
        # The second convolution looks one frame past the end, where a clip by itself would have zeros.
        x = x * length_mask(mel_lengths, x.shape[2])[:, None]
        x = F.gelu(model.conv2(x)).transpose(1, 2)
        x = x + model.embed_positions.weight[:x.shape[1]]
        lengths = (mel_lengths + 1) // 2
        mask = create_bidirectional_mask(model.config, x, length_mask(lengths, x.shape[1]))
        for layer in model.layers:
            x = layer(x, mask)
        return model.layer_norm(x), lengths

    def wav2vec2_frames(self, waves):
        """HuBERT, wav2vec 2.0 and WavLM, which take raw samples and an attention mask."""
        waves = [torch.from_numpy(self.extractor(wave, sampling_rate=SAMPLE_RATE).input_values[0]) for wave in waves]
        samples = torch.tensor([len(wave) for wave in waves], device=self.model.device)
        x = pad_sequence(waves, batch_first=True).to(self.model.device, self.model.dtype)
        mask = length_mask(samples, x.shape[1]) if len(waves) > 1 else None
        return (self.model(x, attention_mask=mask).last_hidden_state,
                self.model._get_feat_extract_output_lengths(samples))


def length_mask(lengths, size):
    """lengths (B,) -> bool mask (B, size), true before each length."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def load_encoder(name, device=None, dtype=None):
    """An `Encoder` by short name, hub id or local folder of a Whisper, HuBERT, wav2vec 2.0 or WavLM model."""
    device, dtype = placement(device, dtype)
    source = locate(name, ENCODERS)
    kind = from_hub(AutoConfig.from_pretrained, source).model_type
    if kind == "whisper":  # its decoder is left behind
        model = load_model(WhisperEncoder, source, dtype, key_mapping={r"^(model\.)?encoder\.": ""})
    elif kind in ("hubert", "wav2vec2", "wavlm"):
        model = load_model(AutoModel, source, dtype)
    else:
        raise InputError(f"{name} is a {kind} model, not an audio encoder (whisper, hubert, wav2vec2, wavlm)")
    return Encoder(model, from_hub(AutoFeatureExtractor.from_pretrained, source)).eval().to(device)


def load_decoder(name, device=None, dtype=None):
    """A frozen causal language model and its tokenizer, by short name, hub id or local folder."""
    device, dtype = placement(device, dtype)
    source = locate(name, DECODERS)
    tokenizer = from_hub(AutoTokenizer.from_pretrained, source)
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        raise InputError(f"{name} has no chat template or no end token: use an instruction-tuned model")
    config = from_hub(AutoConfig.from_pretrained, source)
    odd = [key for key in ("logits_scaling", "logit_scale", "final_logit_softcapping") if getattr(config, key, None) not in (None, 1)]
    odd += {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    if odd:  # none of which loss and search, which run body and vocabulary apart and undo drafts, would respect
        raise InputError(f"{name} is not a decoder with plain full attention and plain logits ({', '.join(odd)}), such as Qwen3, SmolLM or Llama")
    return load_model(AutoModelForCausalLM, source, dtype).to(device), tokenizer


# -------------------------------------------------------------------------------------------------------- projector


class Projector(nn.Module):
    """The trained bridge: stack k frames -> RMSNorm -> Linear -> GELU -> Linear -> RMSNorm.

    Parameters
    ----------
    encoder_dim, decoder_dim : D and d
    loudness : RMS of the decoder's embeddings; the last norm starts there, so that sound arrives as loud as words
    stack : k; 50 frames a second become 50 / k
    hidden : by default what makes 13M parameters, and at most twice the encoder's width
    """

    def __init__(self, encoder_dim, decoder_dim, loudness=1.0, stack=5, hidden=None):
        super().__init__()
        self.stack = stack
        self.hidden = hidden or min(2 * encoder_dim, 13_000_000 // (stack * encoder_dim + decoder_dim)) // 16 * 16
        self.norm_in = nn.RMSNorm(stack * encoder_dim, eps=1e-6)
        self.linear_in = nn.Linear(stack * encoder_dim, self.hidden, bias=False)
        self.linear_out = nn.Linear(self.hidden, decoder_dim, bias=False)
        self.norm_out = nn.RMSNorm(decoder_dim, eps=1e-6)
        nn.init.constant_(self.norm_out.weight, loudness)
        self.mask, self.dropout = 0.0, 0.0  # shares of stacked frames and of hidden units dropped while training

    def forward(self, frames, lengths):
        """frames (B, T, D), zero past lengths (B,) -> audio (B, N, d), counts (B,) with N = ceil(T / k)."""
        frames = F.pad(frames.float(), (0, 0, 0, -frames.shape[1] % self.stack))  # fill up the last stack, drop nothing
        x = frames.reshape(len(frames), -1, self.stack * frames.shape[2])
        if self.training and self.mask:
            x = x * (torch.rand(x.shape[:2], device=x.device) >= self.mask)[..., None]
        x = F.gelu(self.linear_in(self.norm_in(x)))
        x = F.dropout(x, self.dropout, self.training)
        return self.norm_out(self.linear_out(x).float()), (lengths + self.stack - 1) // self.stack


class CTCHead(nn.Module):
    """Spelling with the decoder's own words: the logits of a frame are its products with the decoder's embeddings.

    Trained parameters: a blank vector, its bias, and a temperature. Connectionist temporal classification is
    Graves et al. 2006; token ids are those of the decoder, and class 0 is the blank.
    """

    def __init__(self, decoder_dim, loudness=1.0):
        super().__init__()
        self.blank = nn.Parameter(torch.zeros(decoder_dim))
        self.bias = nn.Parameter(torch.zeros(()))
        # A frame that equals a token's embedding scores 60 to begin with; with much less, spelling is slow to be learned.
        self.log_temperature = nn.Parameter(torch.tensor(math.log(60 / (decoder_dim * loudness**2))))
        self.register_buffer("tokens", torch.zeros(0, dtype=torch.int32))

    def forward(self, audio, embeddings):
        """audio (B, N, d), embeddings (vocabulary, d) -> logits (B, N, 1 + V), float32."""
        z = audio * self.log_temperature.exp()
        # Part by part: a copy of all these embeddings at once (43 MB for the shipped model) sets the peak of a transcription's memory.
        words = (z.to(embeddings.dtype) @ embeddings[tokens].T for tokens in self.tokens.split(4096))
        return torch.cat([(z @ self.blank + self.bias)[..., None], *(part.float() for part in words)], dim=-1)


class LoRA(nn.Module):
    """A trained low-rank update of a frozen linear layer, W x + B A x (Hu et al. 2021), hooked on so that the layer itself
    stays as it is. Optional; made for small decoders, which hardly learn to listen without."""

    def __init__(self, linear, rank):
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.linear, self.hook = [linear], linear.register_forward_hook(self.add)  # in a list: it is no part of this module

    def add(self, _, inputs, output):
        """The hook: inputs of one tensor (..., in), output (..., out) -> (..., out)."""
        return output + F.linear(F.linear(inputs[0], self.a.to(output.dtype)), self.b.to(output.dtype))

    def merge(self):
        """Add the update to the layer's weight for good, which makes it free."""
        self.hook.remove()
        weight = self.linear[0].weight
        weight.addmm_(self.b.to(weight), self.a.to(weight))


# -------------------------------------------------------------------------------------------------------- TinyAudio

TASKS = {"transcribe": "Transcribe: <audio>", "describe": "Describe what you hear: <audio>", "continue": "Continue: <audio>"}
DECODINGS = ("greedy", "ctc", "joint")
LONGEST_ANSWER = 200  # tokens, where the length of the sound says nothing
DRAFTED = 3  # tokens of a draft that are checked in one pass; more of them seldom hold, and cost time on a CPU
JOINT_WEIGHT = 0.4  # of the CTC score in joint decoding; chosen on the development set


class TinyAudio(nn.Module):
    """Encoder, projector, CTC head and decoder. Only the projector, the CTC head and LoRA, if any, have gradients.

    Parameters: the names of the two backbones; the projector's stack and hidden width; the rank of a low-rank update of
    the decoder, 0 for none; and how `transcribe` decodes. This makes an untrained model; `TinyAudio.load` brings a trained one.
    """

    def __init__(self, encoder, decoder, stack=5, hidden=None, lora=0, decode="greedy", device=None, dtype=None):
        super().__init__()
        self.names, self.decode, self.prefixes = {"encoder": encoder, "decoder": decoder}, decode, {}
        self.word_dropout = 0.0  # share of the answer's tokens that the decoder does not see while training
        self.encoder = load_encoder(encoder, device, dtype)
        self.decoder, self.tokenizer = load_decoder(decoder, device, dtype)
        self.embed = self.decoder.get_input_embeddings()
        # Byte-level BPE and SentencePiece write a leading space so.
        self.word_starts = {i for token, i in self.tokenizer.get_vocab().items() if token[:1] in ("\u0120", "\u2581")}
        width = self.embed.weight.shape[1]
        loudness = self.embed.weight.norm(dim=1, dtype=torch.float32).square().div(width).mean().sqrt().item()
        self.projector = Projector(self.encoder.dim, width, loudness, stack, hidden).to(self.device)
        self.ctc = CTCHead(width, loudness).to(self.device)
        layers = self.decoder.base_model.named_modules() if lora else ()
        self.lora = nn.ModuleDict({name.replace(".", "-"): LoRA(layer, lora).to(self.device)
                                   for name, layer in layers if isinstance(layer, nn.Linear)})

    @property
    def device(self):
        return self.embed.weight.device

    def train(self, mode=True):
        """Only the trained part ever leaves eval mode."""
        self.prefixes.clear()  # training may change what they hold
        self.projector.train(mode), self.ctc.train(mode)
        return self

    def trained(self):
        """name -> tensor of all that is trained, and the list of tokens that the CTC head spells with."""
        return {name: tensor for name, tensor in self.state_dict().items() if name.startswith(("projector.", "ctc.", "lora."))}

    def prompt(self, task="transcribe"):
        """Token ids before and after the audio, from the tokenizer's own chat template. task is one of TASKS, or any text,
        with or without "<audio>" in it."""
        messages = [{"role": "system", "content": ""}, {"role": "user", "content": TASKS.get(task, task)}]
        # Some templates print today's date; the prompt must not change from day to day.
        template = re.sub(r"strftime_now\([^()]*\)", "''", self.tokenizer.get_chat_template())
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False, "chat_template": template}
        try:  # an empty system message stands in the place of the long default that some templates have
            text = self.tokenizer.apply_chat_template(messages, **options)
        except Exception:  # each template raises what it likes at a role that it does not know
            text = self.tokenizer.apply_chat_template(messages[1:], **options)
        before, _, after = text.rpartition("<audio>")
        return [self.tokenizer(part, add_special_tokens=False).input_ids for part in (before, after)]

    def tokenize(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def detokenize(self, ids):
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return " ".join(text.split())

    def spell_with(self, texts):
        """Choose the tokens of the CTC head: those of the texts, and every single character with and without a space,
        so that any other word can be spelled."""
        characters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'.,?!-"
        pieces = [self.tokenize(space + character) for character in characters for space in ("", " ")]
        tokens = {piece[0] for piece in pieces if len(piece) == 1}.union(*map(self.tokenize, texts))
        tokens |= set(self.ctc.tokens.tolist())
        self.ctc.tokens = torch.tensor(sorted(tokens), dtype=torch.int32, device=self.device)

    def spelling(self, answer, known):
        """Token ids with those that are not known to the CTC head spelled in characters."""
        return [piece for token in answer for piece in
                ([token] if token in known else sum(map(self.tokenize, self.tokenizer.decode([token])), [])) if piece in known]

    # ------------------------------------------------------------------------------------------------------- loss

    def loss(self, frames, lengths, answers, ctc_weight=0.1, lm_weight=1.0):
        """Loss of a batch, summed over the tokens of its answers, and its two parts for the log.

        Parameters
        ----------
        frames (B, T, D), lengths (B,) : of the encoder
        answers : B lists of token ids, without the end token
        ctc_weight, lm_weight : of the two parts; what has no weight is not computed
        """
        audio, counts = self.projector(frames, lengths)
        ctc = self.ctc_loss(audio, counts, answers) if ctc_weight else torch.zeros((), device=self.device)
        lm = self.lm_loss(audio, counts, answers) if lm_weight else torch.zeros((), device=self.device)
        return ctc_weight * ctc + lm_weight * lm, {"ctc": ctc.detach(), "lm": lm.detach()}

    def ctc_loss(self, audio, counts, answers):
        """Summed CTC loss; an answer that has more tokens than the clip has frames counts as zero."""
        log_probs = self.ctc(audio, self.embed.weight).log_softmax(-1).transpose(0, 1)
        number = {token: i for i, token in enumerate(self.ctc.tokens.tolist(), 1)}
        answers = [[number[token] for token in self.spelling(answer, number)] for answer in answers]
        classes = torch.tensor(sum(answers, []), dtype=torch.int32, device=self.device)
        sizes = torch.tensor([len(answer) for answer in answers], device=self.device)
        if self.device.type == "mps":  # which has no CTC loss of its own
            log_probs, classes, counts, sizes = (tensor.cpu() for tensor in (log_probs, classes, counts, sizes))
        return F.ctc_loss(log_probs, classes, counts, sizes, reduction="sum", zero_infinity=True).to(self.device)

    def lm_loss(self, audio, counts, answers):
        """Summed cross-entropy of the answers and their end token, given the audio."""
        end = self.tokenizer.eos_token_id
        prompts = self.embed_prompt(audio, counts)
        words = [self.embed(torch.tensor(answer, dtype=torch.long, device=self.device)) for answer in answers]
        if self.projector.training and self.word_dropout:  # so that it has to listen, not only to guess (Bowman et al. 2016)
            words = [word * (torch.rand(len(word), 1, device=self.device) >= self.word_dropout) for word in words]
        rows = [torch.cat(pair) for pair in zip(prompts, words)]
        # Padding stands on the right, where causal attention never looks: no mask is needed.
        hidden = self.decoder.base_model(inputs_embeds=pad_sequence(rows, batch_first=True), use_cache=False)
        hidden = hidden.last_hidden_state
        # The vocabulary is the most expensive layer; only the positions that predict an answer go through it.
        hidden = torch.cat([row[len(prompt) - 1:len(prompt) + len(answer)]
                            for row, prompt, answer in zip(hidden, prompts, answers)])
        targets = torch.tensor(sum((answer + [end] for answer in answers), []), device=self.device)
        return F.cross_entropy(self.decoder.get_output_embeddings()(hidden).float(), targets, reduction="sum")

    def embed_prompt(self, audio, counts, task="transcribe"):
        """List of B tensors (prefix + count + suffix, d), in the decoder's dtype: what stands before the answer."""
        prefix, suffix = (self.embed(torch.tensor(ids, dtype=torch.long, device=self.device)) for ids in self.prompt(task))
        return [torch.cat([prefix, clip[:count].to(prefix.dtype), suffix]) for clip, count in zip(audio, counts.tolist())]

    # ----------------------------------------------------------------------------------------------------- decoding

    @torch.no_grad()
    def listen(self, waves):
        """B arrays (samples,) -> audio (B, N, d), counts (B,): what the decoder is given to hear."""
        return self.projector(*self.encoder(waves))

    @torch.no_grad()
    def spell(self, audio, counts):
        """Greedy CTC: audio (B, N, d), counts (B,) -> B lists of token ids. The decoder is not run."""
        best = self.ctc(audio, self.embed.weight).argmax(-1)
        paths = [torch.unique_consecutive(path[:count]) for path, count in zip(best, counts.tolist())]
        return [self.ctc.tokens[path[path > 0] - 1].tolist() for path in paths]

    def respell(self, answers):
        """B lists of token ids -> the same texts in the tokens that the tokenizer, and so the language model, would choose."""
        return [self.tokenize(self.detokenize(answer)) for answer in answers]

    def generate(self, audio, counts, task="transcribe", drafts=None, most=None):
        """Greedy decoding through the language model: what the last of the `passes` has."""
        answers = [[] for _ in audio]
        for answers in self.passes(audio, counts, task, drafts, most):
            pass
        return answers

    @torch.no_grad()
    def passes(self, audio, counts, task="transcribe", drafts=None, most=None):
        """Greedy decoding with a KV cache, of a draft if there is one (Leviathan et al. 2023, with CTC as the small model):
        each pass runs the decoder over its last token and the next of the draft, and takes its own choices up to and
        including the first that differs from the draft. Without drafts that is one token a pass.

        Parameters
        ----------
        audio (B, N, d), counts (B,)
        task : one of TASKS, or any instruction
        drafts : B lists of token ids
        most : tokens of an answer; by default 6.5 a second of sound and a few more

        Yields after every pass the B lists of token ids so far, without the end token. A loop ends its clip and stays in.
        """
        prefix, suffix = self.prompt(task)
        cache = self.prefix_cache(prefix) if prefix else DynamicCache(config=self.decoder.config)
        cache.batch_repeat_interleave(len(audio))
        suffix = self.embed(torch.tensor(suffix, dtype=torch.long, device=self.device))
        limits = [most or limit for limit in self.token_limits(counts)]
        drafts, answers = list(drafts or [[]] * len(audio)), [[] for _ in audio]
        inputs = [torch.cat([clip[:count].to(suffix.dtype), suffix]) for clip, count in zip(audio, counts.tolist())]
        active = list(range(len(audio)))  # the clips that are not at their end; all tensors below have a row for each
        mask = torch.ones(len(audio), len(prefix), dtype=torch.bool, device=self.device)
        while active:
            tried = [drafts[clip][:DRAFTED] for clip in active]
            rows = [torch.cat([row, self.embed(torch.tensor(draft, dtype=torch.long, device=self.device))])
                    for draft, row in zip(tried, inputs)]
            sizes = torch.tensor([len(row) for row in rows], device=self.device)
            x = pad_sequence(rows, batch_first=True)
            # Padding and rejected drafts stay in the cache and are masked; positions count what is not.
            positions = mask.sum(1, keepdim=True) + torch.arange(x.shape[1], device=self.device)
            width = mask.shape[1]
            mask = torch.cat([mask, length_mask(sizes, x.shape[1])], dim=1)
            out = self.decoder.base_model(inputs_embeds=x, position_ids=positions, attention_mask=mask, past_key_values=cache,
                                          use_cache=True)
            checked = [hidden[size - 1 - len(draft):size] for draft, hidden, size in zip(tried, out.last_hidden_state, sizes.tolist())]
            choices = iter(self.decoder.get_output_embeddings()(torch.cat(checked)).argmax(-1).tolist())
            left = []
            for row, clip in enumerate(active):
                draft, own = tried[row], list(itertools.islice(choices, len(checked[row])))
                agreed = next((i for i, (a, b) in enumerate(zip(own, draft)) if a != b), len(draft))
                mask[row, width + len(rows[row]) - len(draft) + agreed:] = False
                if self.extend(answers[clip], own[:agreed + 1], limits[clip]):
                    left.append(row)
                    drafts[clip] = realign(drafts[clip][agreed:], own[agreed], self.word_starts)
            yield answers
            active = [active[row] for row in left]
            inputs = [self.embed(torch.tensor(answers[clip][-1:], device=self.device)) for clip in active]
            if len(left) < len(mask):
                left = torch.tensor(left, dtype=torch.long, device=self.device)
                cache.batch_select_indices(left)
                mask = mask[left]

    def token_limits(self, counts):
        """The most tokens that clips of `counts` (B,) stacked frames can hold: 6.5 a second and a few more."""
        return [int(6.5 * count * self.projector.stack / self.encoder.frame_rate + 10) for count in counts.tolist()]

    def extend(self, answer, tokens, limit):
        """Append tokens to an answer, up to the end token, the limit, or a loop. Returns whether it goes on."""
        for token in tokens:
            if token == self.tokenizer.eos_token_id:
                return False
            answer.append(token)
            if len(answer) >= limit or loop_length(answer):
                return False
        return True

    def prefix_cache(self, prefix):
        """Keys and values of what stands before the audio, which is the same for every clip: computed once."""
        if tuple(prefix) not in self.prefixes:
            ids = torch.tensor([prefix], device=self.device)
            self.prefixes[tuple(prefix)] = self.decoder.base_model(input_ids=ids, use_cache=True).past_key_values
        return copy.deepcopy(self.prefixes[tuple(prefix)])

    @torch.no_grad()
    def search(self, audio, counts, weight=JOINT_WEIGHT, beam=4, choices=16):
        """Joint decoding (Watanabe et al. 2017): audio (B, N, d), counts (B,) -> B lists of token ids.

        A beam search over (1 - weight) log p_LM + weight log p_CTC. The language model knows sentences; the CTC prefix
        score, the probability of all paths that begin with a text, holds it to the sound: no loops, nothing invented.
        beam is the hypotheses kept of each clip, choices the tokens tried for each of them: those that the language model
        expects and some frame sounds like.
        """
        spoken = self.ctc(audio, self.embed.weight).log_softmax(-1)
        silent = ~length_mask(counts, spoken.shape[1])[..., None]
        spoken.masked_fill_(silent, -math.inf)
        spoken[..., :1].masked_fill_(silent, 0)  # behind a clip's end all frames are blank for certain
        heard = spoken[..., 1:].amax(1)  # (B, V): a token that no frame sounds like is not worth a try
        spoken = spoken.cpu().numpy()
        prompts = self.embed_prompt(audio, counts)
        sizes = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        sees = length_mask(sizes, sizes.max())
        out = self.decoder.base_model(inputs_embeds=pad_sequence(prompts, batch_first=True), attention_mask=sees, use_cache=True)
        hidden, cache = out.last_hidden_state[torch.arange(len(sizes), device=self.device), sizes - 1], out.past_key_values
        # All hypotheses of a clip share its row of the cache: their tokens make a tree, in which each sees its own branch.
        rows = [(clip, (), 0.0) for clip in range(len(audio))]  # clip, classes, log p_LM; at first a single empty one
        of = alive = np.arange(len(audio))  # the clip of every row; the clips in the cache
        paths = prefix_start(spoken)
        best = [((), -math.inf)] * len(audio)  # of the hypotheses that have ended
        while True:
            log_probs = self.decoder.get_output_embeddings()(hidden).float().log_softmax(-1)
            ends = log_probs[:, self.tokenizer.eos_token_id].tolist()
            log_probs = log_probs[:, self.ctc.tokens]
            top = ((1 - weight) * log_probs + weight * heard[of]).topk(min(choices, len(self.ctc.tokens))).indices
            classes = (top + 1).cpu().numpy()
            last = np.array([found[-1] if found else 0 for _, found, _ in rows])
            scores, grown = prefix_extend(spoken, of, paths, last, classes)
            known = np.array([lm for *_, lm in rows])
            lm = known[:, None] + log_probs.gather(1, top).cpu().double().numpy()
            total = (1 - weight) * lm + weight * scores
            whole = (1 - weight) * (known + ends) + weight * np.logaddexp(paths[:, -1, 0], paths[:, -1, 1])
            chosen = []
            for clip in alive.tolist():
                mine = np.flatnonzero(of == clip)
                for row in mine[whole[mine] > best[clip][1]]:
                    best[clip] = max(best[clip], (rows[row][1], whole[row]), key=lambda pair: pair[1])
                order = np.argsort(-total[mine], axis=None)[:beam]
                picks = [(mine[i // total.shape[1]], i % total.shape[1]) for i in order]
                chosen += [(row, i) for row, i in picks if total[row, i] > best[clip][1]]  # a longer one scores lower
            if not chosen:
                break
            rows = [(rows[row][0], rows[row][1] + (classes[row, i],), lm[row, i]) for row, i in chosen]
            paths = np.stack([grown[row, :, :, i] for row, i in chosen])
            of = np.array([clip for clip, *_ in rows])
            clips, place = np.unique(of, return_inverse=True)
            if len(clips) < len(alive):
                cache.batch_select_indices(torch.from_numpy(np.searchsorted(alive, clips)).to(self.device))
            alive, slot = clips, torch.from_numpy(np.arange(len(of)) - np.searchsorted(of, of)).to(self.device)
            sees = torch.cat([sees[[int(row) for row, _ in chosen]], F.one_hot(slot).bool()], dim=1)
            tokens = torch.zeros(len(alive), slot.max() + 1, dtype=torch.int32, device=self.device)
            tokens[place, slot] = self.ctc.tokens[[int(found[-1]) - 1 for _, found, _ in rows]]
            mask = hidden.new_zeros(*tokens.shape, sees.shape[1])
            mask[place, slot] = mask[place, slot].masked_fill(~sees, torch.finfo(mask.dtype).min)
            positions = (sizes[alive, None] + len(rows[0][1]) - 1).expand(tokens.shape)
            out = self.decoder.base_model(input_ids=tokens, position_ids=positions, attention_mask=mask[:, None], past_key_values=cache,
                                          use_cache=True)
            hidden = out.last_hidden_state[place, slot]
        return [self.ctc.tokens[torch.tensor(found, dtype=torch.long) - 1].tolist() for found, _ in best]

    @torch.no_grad()
    def hear(self, audio, counts, decode=None):
        """Transcripts of a batch: audio (B, N, d), counts (B,) -> B lists of token ids.

        decode is "ctc", what the projector spells; "greedy", through the language model, which checks that as a draft;
        or "joint", both together; by default what had the lowest WER when the checkpoint was trained. Where nothing is
        spelled nobody speaks, and the language model is not asked. Where it loops or never ends, the clip is decoded once more,
        jointly, and should that loop too the spelling stands.
        """
        spelled, decode = self.spell(audio, counts), decode or self.decode
        spoken = [clip for clip, answer in enumerate(spelled) if answer]
        if decode == "ctc" or not spoken:
            return spelled
        audio, counts = audio[spoken], counts[spoken]
        if decode == "joint":
            answers = self.search(audio, counts)
        else:
            answers = self.generate(audio, counts, drafts=self.respell([spelled[clip] for clip in spoken]))
            lost = [i for i, limit in enumerate(self.token_limits(counts)) if loop_length(answers[i]) or len(answers[i]) >= limit]
            for i, answer in zip(lost, self.search(audio[lost], counts[lost]) if lost else ()):
                answers[i] = answer
        for clip, answer in zip(spoken, answers):
            spelled[clip] = spelled[clip] if loop_length(answer) else answer
        return spelled

    def segments(self, sources, decode=None, task="transcribe", words=False, batch_seconds=120):
        """Transcribe sound of any length and number, in batches of pieces of at most 28 s.

        Yields, in order and as they are ready, dicts: source (index), start, end (seconds), text, and words if asked
        for; or source and error (an InputError) for what cannot be read.
        """
        pieces = self.pieces(sources)
        while window := list(take_seconds(pieces, 4 * batch_seconds)):
            heard = [piece for piece in window if "wave" in piece]
            for batch in make_batches([piece["end"] - piece["start"] for piece in heard], batch_seconds):
                batch = [heard[i] for i in batch]
                audio, counts = self.listen([piece.pop("wave") for piece in batch])
                answers = (self.hear(audio, counts, decode) if task == "transcribe" else
                           self.generate(audio, counts, task, most=LONGEST_ANSWER))
                for piece, answer, clip, count in zip(batch, answers, audio, counts.tolist()):
                    piece["text"] = self.detokenize(answer)
                    if words:
                        piece["words"] = self.time_words(clip[:count], answer, piece["start"], piece["end"])
            yield from window

    def pieces(self, sources):
        """Dicts source (index), start, end (seconds), wave (samples,), or source, error, of all sources in order."""
        for index, source in enumerate(sources):
            try:
                for start, wave in split_audio(read_audio(source)):
                    yield {"source": index, "start": start, "end": start + len(wave) / SAMPLE_RATE, "wave": wave}
            except InputError as error:
                yield {"source": index, "error": error}

    def transcribe(self, source, decode=None, task="transcribe", batch_seconds=120):
        """Text of one clip, or a list of texts for a list of clips: whatever `read_audio` takes, of any length.
        decode is as in `hear`. Raises InputError for a clip that cannot be read."""
        many = isinstance(source, (list, tuple))
        texts = [[] for _ in (source if many else [source])]
        for segment in self.segments(source if many else [source], decode, task, batch_seconds=batch_seconds):
            if "error" in segment:
                raise segment["error"]
            texts[segment["source"]].append(segment["text"])
        texts = [" ".join(filter(None, parts)) for parts in texts]
        return texts if many else texts[0]

    def stream(self, source=None, task="transcribe"):
        """Text of one clip (whatever `read_audio` takes), in parts as the language model makes them, greedily; without a
        source, its answer to `task`, which is then any text."""
        most = None if task == "transcribe" else LONGEST_ANSWER
        waves = (wave for _, wave in split_audio(read_audio(source))) if source is not None else [None]
        gap = ""
        for wave in waves:
            audio, counts = self.listen([wave]) if wave is not None else (
                torch.zeros(1, 0, self.ctc.blank.shape[0], device=self.device), torch.zeros(1, dtype=torch.long))
            drafts = None
            if task == "transcribe":
                drafts = self.respell(self.spell(audio, counts))
                if not drafts[0]:
                    continue
            done = ""
            for answers in self.passes(audio, counts, task, drafts, most):
                text = self.detokenize(answers[0])
                text = text and gap + text
                if not text.endswith("\ufffd"):  # in the midst of a character
                    yield text[len(done):]
                    done = text
            if text != done:  # the answer ended there
                yield text[len(done):]
            gap = " " if text else gap

    @torch.no_grad()
    def align(self, audio, ids):
        """The most likely CTC path (Viterbi) through a given text: audio (N, d), L token ids -> for each token its first
        frame, the frame after its last, and its mean probability. Any token of the decoder can be aligned."""
        z = audio * self.ctc.log_temperature.exp()
        logits = self.ctc(audio[None], self.embed.weight)[0]
        total = logits.logsumexp(-1, keepdim=True)
        words = (z.to(self.embed.weight.dtype) @ self.embed.weight[ids].T).float()
        # States: blank, token, blank, token, ..., blank.
        scores = torch.empty(len(audio), 2 * len(ids) + 1)
        scores[:, 0::2] = (logits[:, :1] - total).cpu()
        scores[:, 1::2] = (words - total).clamp(max=0).cpu()  # a token that the head lacks may exceed its total
        scores = scores.double().numpy()
        state = np.arange(scores.shape[1])
        may_skip = (state % 2 == 1) & (state > 1)
        may_skip[3::2] &= np.asarray(ids[1:]) != np.asarray(ids[:-1])
        best, came = np.where(state < 2, scores[0], -np.inf), np.zeros(scores.shape, dtype=int)
        for frame in range(1, len(scores)):
            steps = np.stack([best, np.append(-np.inf, best[:-1]), np.where(may_skip, np.append([-np.inf] * 2, best[:-2]), -np.inf)])
            came[frame] = steps.argmax(0)
            best = steps.max(0) + scores[frame]
        path = [len(state) - 1 if best[-1] >= best[-2] else len(state) - 2]
        for frame in range(len(scores) - 1, 0, -1):
            path.append(path[-1] - came[frame, path[-1]])
        path = np.array(path[::-1])
        spans = []
        for token in range(len(ids)):
            frames = np.flatnonzero(path == 2 * token + 1)
            if len(frames) == 0:  # more tokens than frames: there is no path
                return [(len(audio) * i // len(ids), len(audio) * (i + 1) // len(ids), 0.0) for i in range(len(ids))]
            spans.append((int(frames[0]), int(frames[-1]) + 1, float(np.exp(scores[frames, 2 * token + 1]).mean())))
        return spans

    def time_words(self, audio, ids, start, end):
        """Words of an answer, L token ids, to audio (N, d) that lies between start and end: dicts word, start, end (seconds),
        probability."""
        if not ids:
            return []
        seconds, words = self.projector.stack / self.encoder.frame_rate, []
        for token, span in zip(ids, self.align(audio, ids)):
            if not words or token in self.word_starts:
                words.append(([], []))
            words[-1][0].append(token), words[-1][1].append(span)
        return [{"word": self.detokenize(tokens), "start": round(start + spans[0][0] * seconds, 2),
                 "end": round(min(start + spans[-1][1] * seconds, end), 2),
                 "probability": round(float(np.mean([span[2] for span in spans])), 3)} for tokens, spans in words]

    # ----------------------------------------------------------------------------------------------- save and load

    def save(self, path):
        """Write the trained part, a few MB: `projector.safetensors` (matrices in bfloat16), `config.json`, and, if there is a
        low-rank update of the decoder, `lora.safetensors`, without which the rest can be used as well."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        rank = next(iter(self.lora.values())).a.shape[0] if self.lora else 0
        config = {**self.names, "stack": self.projector.stack, "hidden": self.projector.hidden, "lora": rank, "decode": self.decode}
        tensors = {name: tensor.bfloat16() if tensor.ndim == 2 else tensor for name, tensor in self.trained().items()}
        for file, part in (("projector", ("projector.", "ctc.")), ("lora", "lora.")):
            data = safetensors.torch.save({name: tensor for name, tensor in tensors.items() if name.startswith(part)})
            if file == "projector" or self.lora:
                write_whole(path / f"{file}.safetensors", lambda unfinished: unfinished.write_bytes(data))
        write_whole(path / "config.json", lambda unfinished: unfinished.write_text(json.dumps(config, indent=2) + "\n"))

    @classmethod
    def load(cls, path, device=None, dtype=None):
        """A trained model from a folder that `save` wrote, or from a hub id that holds one."""
        folder = Path(path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download
            folder = Path(from_hub(snapshot_download, locate(str(path), {}), allow_patterns=["*.safetensors", "config.json"]))
        config = read_config(folder)
        if not (folder / "lora.safetensors").exists():
            config["lora"] = 0
        model = cls(**config, device=device, dtype=dtype)
        model.load_trained(folder)
        with torch.no_grad():
            for update in model.lora.values():
                update.merge()
        return model.eval()

    def load_trained(self, folder):
        """Take over the trained tensors of a checkpoint folder, e.g. to train them further on other data."""
        file, expected = Path(folder) / "projector.safetensors", set(self.trained())
        try:
            tensors = safetensors.torch.load_file(file)
            if self.lora and file.with_name("lora.safetensors").exists():
                file = file.with_name("lora.safetensors")
                tensors |= safetensors.torch.load_file(file)
            else:  # a low-rank update starts from nothing
                expected = {name for name in expected if not name.startswith("lora.")}
            if tensors.keys() != expected:
                raise KeyError(f"it holds {', '.join(tensors)}")
            self.ctc.tokens = tensors["ctc.tokens"].to(self.device)  # of any number
            self.load_state_dict(tensors, strict=False)
        except Exception as error:
            raise InputError(f"{file} is no checkpoint of this model: {first_line(error)}") from None


def read_config(folder):
    """What a checkpoint's config.json says, a dict. Raises InputError for a file that is missing or says anything else."""
    file = Path(folder) / "config.json"
    try:
        config = json.loads(file.read_text())
        known = {"encoder", "decoder", "stack", "hidden", "lora", "decode"}
        if set(config) != known:
            raise ValueError(f"the keys must be {', '.join(sorted(known))}, and are {', '.join(config)}")
        if config["decode"] not in DECODINGS:
            raise ValueError(f"decode must be one of {', '.join(DECODINGS)}")
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is no checkpoint's config: {first_line(error)}") from None
    return config


def write_whole(path, write):
    """Write a file under a temporary name and rename it, so that it is there whole or not at all."""
    unfinished = Path(f"{path}.unfinished")
    try:
        write(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_whole_rows(path):
    """The rows of a .jsonl that one of the scripts wrote, without a last one that a crash left unfinished."""
    lines = Path(path).read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def realign(draft, token, word_starts):
    """What is left of a draft behind a token that the decoder put in the place of its first: behind the same token if that
    comes soon, else from the next word on."""
    if token in draft[:4]:
        return draft[draft.index(token) + 1:]
    skip = 1 if token in word_starts else 0  # another word instead, or more of the word before
    while skip < len(draft) and draft[skip] not in word_starts:
        skip += 1
    return draft[skip:]


def take_seconds(pieces, seconds):
    """The next pieces of a generator, until they hold so much sound."""
    for piece in pieces:
        yield piece
        seconds -= piece.get("end", 0) - piece.get("start", 0)
        if seconds <= 0:
            return


def prefix_start(log_probs):
    """CTC log probabilities (B, N, 1 + V) -> paths (B, N, 2) of the empty text: the log probability up to each frame of all
    paths that end in a token, and of those that end in a blank."""
    blank = log_probs[:, :, 0].cumsum(1, dtype=np.float64)
    return np.stack([np.full_like(blank, -np.inf), blank], axis=2)


def prefix_extend(log_probs, of, paths, last, classes):
    """CTC prefix scores of texts that are one token longer (Watanabe et al. 2017, algorithm 2).

    Parameters: log_probs (B, N, 1 + V); of R texts: of (R,), their clips; paths (R, N, 2); last (R,), their last tokens, 0 for
    none; classes (R, K), the tokens to append.
    Returns scores (R, K), log p of all that begins with the longer text, and its paths (R, N, 2, K).
    """
    emitted = log_probs[of[:, None, None], np.arange(paths.shape[1])[:, None], classes[:, None]]
    blank = log_probs[of, :, :1]
    # Behind the same token a new one needs a blank between.
    before = np.where(classes[:, None] == last[:, None, None], paths[:, :, 1:], np.logaddexp(paths[:, :, :1], paths[:, :, 1:]))
    grown = np.full((*paths.shape, classes.shape[1]), -np.inf)
    grown[:, 0, 0] = np.where(last[:, None] == 0, emitted[:, 0], -np.inf)
    for frame in range(1, paths.shape[1]):
        token, silence = grown[:, frame - 1, 0], grown[:, frame - 1, 1]
        grown[:, frame, 0] = np.logaddexp(token, before[:, frame - 1]) + emitted[:, frame]
        grown[:, frame, 1] = np.logaddexp(token, silence) + blank[:, frame]
    starts = np.concatenate([grown[:, :1, 0], before[:, :-1] + emitted[:, 1:]], axis=1)
    return np.logaddexp.reduce(starts, axis=1), grown


def loop_length(ids):
    """How many tokens at the end of `ids` only repeat what stands before them, if that is a loop (else 0): the same
    1 to 24 tokens three times over and at least eight tokens long."""
    for size in range(1, 25):
        times = max(3, math.ceil(8 / size))
        if ids[-times * size:] == ids[-size:] * times:
            return (times - 1) * size
    return 0


# ------------------------------------------------------------------------------------------------------------- data

TAGS = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}  # as GigaSpeech writes them
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus")


def clean_text(text):
    """Reference text as it is trained on: ALL CAPS lower-cased, tags turned into punctuation or dropped."""
    for tag, mark in TAGS.items():
        text = text.replace(f" {tag}", mark).replace(tag, mark)
    text = re.sub(r"<[^<>]*>|\[[^\[\]]*\]", " ", text)  # <inaudible>, [noise]
    text = " ".join(text.split())
    return text.lower() if text.isupper() else text


def read_clips(pattern):
    """Clips of .jsonl, .csv, .tsv (columns audio, text), .parquet (an audio column with bytes or path) or a folder.

    Parameters: pattern, a path, glob or comma-separated list of them. Relative audio paths start at the file's folder;
    in a folder each audio file has its text beside it, in a .txt of the same name.
    Returns a list of dicts: name, audio (path or bytes), text (cleaned).
    Raises InputError for a file that is missing, of another kind, or without these columns.
    """
    clips = []
    for part in [pattern] if Path(pattern).exists() else map(str.strip, pattern.split(",")):
        for file in map(Path, sorted(glob.glob(part, recursive=True)) or [part]):
            for number, row in enumerate(read_rows(file), 1):
                if not isinstance(row, dict) or not {"audio", "text"} <= row.keys():
                    raise InputError(f"{file}: row {number} has no column audio or no column text")
                audio = row["audio"]
                if isinstance(audio, dict):  # as Hugging Face datasets keep audio: its bytes, or where they are
                    audio = audio.get("bytes") or audio.get("path")
                if isinstance(audio, str):
                    audio = str(file.parent / audio)
                name = audio if isinstance(audio, str) else f"{file}#{number}"
                clips.append({"name": name, "audio": audio, "text": clean_text("" if row["text"] is None else str(row["text"]))})
    return clips


def read_rows(file):
    """The rows of one data file, as dicts."""
    try:
        if file.is_dir():
            texts = sorted(file.rglob("*.txt"))
            return [{"audio": str(path.relative_to(file.parent)), "text": text.read_text("utf-8-sig")}
                    for text in texts for path in sorted(text.parent.glob(f"{glob.escape(text.stem)}.*"))
                    if path.suffix.lower() in AUDIO_SUFFIXES and path.stem == text.stem]
        if file.suffix == ".jsonl":
            with open(file, encoding="utf-8-sig") as lines:
                return [json.loads(line) for line in lines if line.strip()]
        if file.suffix in (".csv", ".tsv"):
            with open(file, newline="", encoding="utf-8-sig") as lines:
                return list(csv.DictReader(lines) if file.suffix == ".csv" else
                            csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
        if file.suffix == ".parquet":
            import pyarrow.parquet
            return pyarrow.parquet.read_table(file).to_pylist()
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{file}: {first_line(error)}") from None
    raise InputError(f"{file}: no such file, or not .jsonl, .csv, .tsv, .parquet or a folder")


def make_batches(seconds, batch_seconds, rng=None):
    """Lists of indices of clips of similar length; longest clip times clips is at most `batch_seconds`.

    Parameters: seconds, the length of every clip; rng, a numpy Generator that shuffles, or None for longest first.
    """
    if len(seconds) == 0:
        return []
    seconds = np.asarray(seconds, dtype=float)
    order = np.argsort(-seconds * (rng.uniform(0.9, 1.1, len(seconds)) if rng else 1), kind="stable")
    batches, longest = [[]], 0.0
    for index in order.tolist():
        longest = max(longest, seconds[index])
        if batches[-1] and longest * (len(batches[-1]) + 1) > batch_seconds:
            batches.append([])
            longest = seconds[index]
        batches[-1].append(index)
    return [batches[i] for i in rng.permutation(len(batches))] if rng else batches
