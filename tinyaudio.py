"""Tiny Audio: speech recognition from two frozen pretrained models and one small trained bridge.

    waveform -> encoder (frozen) -> stack 5 frames -> projector (trained) -> language model (frozen) -> text

    from tinyaudio import TinyAudio
    model = TinyAudio.load("assets/default")
    print(model.transcribe("file.wav"))

The file is laid out in the order in which the sound travels:
names, audio, encoder, projector, CTC head, TinyAudio (prompt, loss, generate, save, load), data.

Letters in shapes: B clips, T encoder frames (50 a second), N stacked frames (10 a second), D the encoder's width,
d the decoder's width, V tokens that the CTC head spells with.
"""

import csv
import glob
import io
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
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForCausalLM, AutoTokenizer, logging
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
            raise InputError(f"{source} holds no usable model: {first_line(error)}") from None
        raise InputError(f"cannot get {source} from the Hugging Face Hub ({first_line(error)}); the embedded pair, "
                         "whisper-base and smollm2-135m, needs no download") from None


def load_model(model_class, source, **options):
    """A pretrained model, whole: weights that its files lack would otherwise stay random without a word."""
    model, report = from_hub(model_class.from_pretrained, source, output_loading_info=True, **options)
    missing = sorted(name for name in report["missing_keys"] if not name.endswith("masked_spec_embed"))  # unused in eval mode
    if missing:
        raise InputError(f"{source} lacks {len(missing)} weights of a {type(model).__name__}, such as {missing[0]}")
    return model.eval().requires_grad_(False)


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


# ------------------------------------------------------------------------------------------------------------ audio

SAMPLE_RATE = 16_000


def load_audio(source, sample_rate=SAMPLE_RATE):
    """Decode, mix down and resample one clip to a float32 array (samples,), mono, 16 kHz.

    Parameters
    ----------
    source : path, bytes or file object (wav, flac, mp3, ogg/opus, ...), or array (samples,) or (samples, channels),
        float in [-1, 1] or signed integer
    sample_rate : of an array, in Hz; files carry their own

    Raises InputError if the source is missing, empty, not audio, or holds samples that are not numbers.
    """
    name = source if isinstance(source, (str, Path)) else getattr(source, "name", "audio")
    try:
        if isinstance(source, (str, Path)):
            source = Path(source).read_bytes()
        if isinstance(source, bytes):
            source = io.BytesIO(source)
        if hasattr(source, "read"):
            samples, sample_rate = soundfile.read(source, dtype="float32")
        else:
            samples = np.asarray(source)
            scale = -np.iinfo(samples.dtype).min if np.issubdtype(samples.dtype, np.signedinteger) else 1
            samples = samples.astype(np.float32) / scale
    except soundfile.LibsndfileError as error:
        raise InputError(f"{name}: not audio that can be read ({error.error_string.strip().rstrip('.')})") from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{name}: {first_line(error)}") from None
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if samples.ndim != 1 or samples.size == 0:
        raise InputError(f"{name}: no sound in it (0 samples)")
    if not np.isfinite(samples).all():
        raise InputError(f"{name}: holds samples that are not numbers (NaN or infinity)")
    if sample_rate != SAMPLE_RATE:
        samples = soxr.resample(samples, sample_rate, SAMPLE_RATE)
    return np.ascontiguousarray(samples, dtype=np.float32)


def split_audio(wave, shortest=15.0, longest=28.0):
    """Cut a long wave (samples,) into pieces of at most `longest` seconds, each at the quietest 0.1 s in reach."""
    pieces, window = [], SAMPLE_RATE // 10
    while len(wave) > longest * SAMPLE_RATE:
        reach = wave[int(shortest * SAMPLE_RATE):int(longest * SAMPLE_RATE)]
        loudness = np.square(reach[:len(reach) // window * window]).reshape(-1, window).mean(axis=1)
        cut = int(shortest * SAMPLE_RATE) + int(loudness.argmin()) * window + window // 2
        pieces.append(wave[:cut])
        wave = wave[cut:]
    return pieces + [wave]


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
        model = load_model(WhisperEncoder, source, dtype=dtype, key_mapping={r"^(model\.)?encoder\.": ""})
    elif kind in ("hubert", "wav2vec2", "wavlm"):
        model = load_model(AutoModel, source, dtype=dtype)
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
    return load_model(AutoModelForCausalLM, source, dtype=dtype).to(device), tokenizer


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
        words = z.to(embeddings.dtype) @ embeddings[self.tokens].T
        return torch.cat([(z @ self.blank + self.bias)[..., None], words.float()], dim=-1)


class LoRA(nn.Module):
    """A trained low-rank update of a frozen linear layer, W x + B A x (Hu et al. 2021), hooked on so that the layer itself
    stays as it is. Optional: the bridge alone is enough for a large decoder, a small one gains by it."""

    def __init__(self, linear, rank):
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.linear, self.hook = [linear], linear.register_forward_hook(self.add)  # in a list: it is no part of this module

    def add(self, _, inputs, output):
        return output + F.linear(F.linear(inputs[0], self.a.to(output.dtype)), self.b.to(output.dtype))

    def merge(self):
        """Add the update to the layer's weight for good, which makes it free."""
        self.hook.remove()
        self.linear[0].weight += (self.b @ self.a).to(self.linear[0].weight)


# -------------------------------------------------------------------------------------------------------- TinyAudio

TASKS = {"transcribe": "Transcribe: <audio>"}


class TinyAudio(nn.Module):
    """Encoder, projector, CTC head and decoder. Only the projector and the CTC head have gradients.

    Parameters: the names of the two backbones; the projector's stack and hidden width; the rank of a low-rank update of
    the decoder, 0 for none; and how `transcribe` decodes. This makes an untrained model; `TinyAudio.load` brings a trained one.
    """

    def __init__(self, encoder, decoder, stack=5, hidden=None, lora=0, decode="greedy", device=None, dtype=None):
        super().__init__()
        self.names, self.decode = {"encoder": encoder, "decoder": decoder}, decode
        self.encoder = load_encoder(encoder, device, dtype)
        self.decoder, self.tokenizer = load_decoder(decoder, device, dtype)
        self.embed = self.decoder.get_input_embeddings()
        width, loudness = self.embed.weight.shape[1], self.embed.weight.float().square().mean().sqrt().item()
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
        self.projector.train(mode), self.ctc.train(mode)
        return self

    def trained(self):
        """name -> tensor of all that is trained, and the list of tokens that the CTC head spells with."""
        return {name: tensor for name, tensor in self.state_dict().items() if name.startswith(("projector.", "ctc.", "lora."))}

    def prompt(self, task="transcribe"):
        """Token ids before and after the audio, from the tokenizer's own chat template."""
        messages = [{"role": "system", "content": ""}, {"role": "user", "content": TASKS[task]}]
        # Some templates print today's date; the prompt must not change from day to day.
        template = re.sub(r"strftime_now\([^()]*\)", "''", self.tokenizer.get_chat_template())
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False, "chat_template": template}
        try:  # an empty system message stands in the place of the long default that some templates have
            text = self.tokenizer.apply_chat_template(messages, **options)
        except Exception:  # each template raises what it likes at a role that it does not know
            text = self.tokenizer.apply_chat_template(messages[1:], **options)
        return [self.tokenizer(part, add_special_tokens=False).input_ids for part in text.split("<audio>")]

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
        flat = torch.tensor(sum(answers, []), dtype=torch.int32, device=self.device)
        classes = torch.searchsorted(self.ctc.tokens, flat) + 1
        sizes = torch.tensor([len(answer) for answer in answers], device=self.device)
        if self.device.type == "mps":  # which has no CTC loss of its own
            log_probs, classes, counts, sizes = (tensor.cpu() for tensor in (log_probs, classes, counts, sizes))
        return F.ctc_loss(log_probs, classes, counts, sizes, reduction="sum", zero_infinity=True).to(self.device)

    def lm_loss(self, audio, counts, answers):
        """Summed cross-entropy of the answers and their end token, given the audio."""
        end = self.tokenizer.eos_token_id
        prompts = self.embed_prompt(audio, counts)
        rows = [torch.cat([prompt, self.embed(torch.tensor(answer, dtype=torch.long, device=self.device))])
                for prompt, answer in zip(prompts, answers)]
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

    # --------------------------------------------------------------------------------------------------- generate

    @torch.no_grad()
    def spell(self, audio, counts):
        """Greedy CTC: audio (B, N, d), counts (B,) -> B lists of token ids. The decoder is not run."""
        best = self.ctc(audio, self.embed.weight).argmax(-1)
        paths = [torch.unique_consecutive(path[:count]) for path, count in zip(best, counts.tolist())]
        return [self.ctc.tokens[path[path > 0] - 1].tolist() for path in paths]

    @torch.no_grad()
    def generate(self, audio, counts, task="transcribe"):
        """Greedy decoding with a KV cache: audio (B, N, d), counts (B,) -> B lists of token ids without the end token.

        A clip gets at most 6.5 tokens a second and a few more; one that runs in a loop is stopped.
        """
        prompts = self.embed_prompt(audio, counts, task)
        seconds = counts * self.projector.stack / self.encoder.frame_rate
        limits = (6.5 * seconds + 10).long().tolist()
        # Padding on the left, so that the last position of every row is where its next token goes.
        x = pad_sequence(prompts, batch_first=True, padding_side="left")
        mask = length_mask(torch.tensor([len(prompt) for prompt in prompts], device=self.device), x.shape[1]).flip(1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        step = {"inputs_embeds": x, "position_ids": positions}
        answers, running, cache = [[] for _ in prompts], set(range(len(prompts))), None
        while running:
            out = self.decoder.base_model(**step, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            best = self.decoder.get_output_embeddings()(out.last_hidden_state[:, -1]).argmax(-1)
            for row, token in enumerate(best.tolist()):
                if row in running:
                    answers[row].append(token)
                    surplus = 1 if token == self.tokenizer.eos_token_id else loop_length(answers[row])
                    if surplus or len(answers[row]) >= limits[row]:
                        del answers[row][len(answers[row]) - surplus:]
                        running.remove(row)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = positions[:, -1:] + 1
            step = {"input_ids": best[:, None], "position_ids": positions}
        return answers

    @torch.no_grad()
    def transcribe(self, source, decode=None, batch_seconds=120):
        """Text of one clip, or a list of texts for a list of clips (whatever `load_audio` takes, of any length).

        decode is "greedy", through the language model, or "ctc", what the projector spells; by default the one that
        had the lower WER when the checkpoint was trained.
        """
        decoder = {"greedy": self.generate, "ctc": self.spell}[decode or self.decode]
        many = isinstance(source, (list, tuple))
        waves = [load_audio(clip) for clip in (source if many else [source])]
        pieces = [(owner, piece) for owner, wave in enumerate(waves) for piece in split_audio(wave)]
        texts = [None] * len(pieces)
        for batch in make_batches([len(piece) / SAMPLE_RATE for _, piece in pieces], batch_seconds):
            audio, counts = self.projector(*self.encoder([pieces[i][1] for i in batch]))
            for i, answer in zip(batch, decoder(audio, counts)):
                texts[i] = self.detokenize(answer)
        joined = [" ".join(filter(None, (text for (owner, _), text in zip(pieces, texts) if owner == clip)))
                  for clip in range(len(waves))]
        return joined if many else joined[0]

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
        try:
            config = json.loads((folder / "config.json").read_text())
            known = {"encoder", "decoder", "stack", "hidden", "lora", "decode"}
            if set(config) != known:
                raise ValueError(f"the keys must be {', '.join(sorted(known))}, and are {', '.join(config)}")
        except (OSError, ValueError) as error:
            raise InputError(f"{folder / 'config.json'} is no checkpoint's config: {first_line(error)}") from None
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
                tensors |= safetensors.torch.load_file(file.with_name("lora.safetensors"))
            else:  # a low-rank update starts from nothing
                expected = {name for name in expected if not name.startswith("lora.")}
            if tensors.keys() != expected:
                raise KeyError(f"it holds {', '.join(tensors)}")
            self.ctc.tokens = tensors["ctc.tokens"].to(self.device)  # of any number
            self.load_state_dict(tensors, strict=False)
        except Exception as error:
            raise InputError(f"{file} is no checkpoint of this model: {first_line(error)}") from None


def write_whole(path, write):
    """Write a file under a temporary name and rename it, so that it is there whole or not at all."""
    unfinished = Path(f"{path}.unfinished")
    write(unfinished)
    unfinished.replace(path)


def read_whole_rows(path):
    """The rows of a .jsonl that one of the scripts wrote, without a last one that a crash left unfinished."""
    lines = Path(path).read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def loop_length(ids):
    """How many tokens at the end of `ids` only repeat what stands before them, if that is a loop (else 0): the same
    1 to 12 tokens four times over and at least eight tokens long."""
    for size in range(1, 13):
        times = max(4, math.ceil(8 / size))
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
            return [{"audio": str(text.with_suffix(suffix).relative_to(file.parent)), "text": text.read_text("utf-8-sig")}
                    for text in texts for suffix in AUDIO_SUFFIXES if text.with_suffix(suffix).exists()]
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
