"""The fields of a run's configuration: frozen dataclasses, read from a recipe or TOML file and the command line.

    recipes/NAME.toml or FILE.toml  →  Config  ←  --model.layers 6        →  config.toml in the run directory

The docstring below a field is its help on the command line. Values are checked when a dataclass is made, so a recipe, a
file, the command line and Python get the same checks and the same one-line errors: types and bounds by ``Section``,
what concerns several fields in ``__post_init__``.
"""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro
from msgspec import Meta

from pretrain.config.validate import Section

Natural = Annotated[int, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]
NonEmpty = Annotated[str, Meta(min_length=1)]
Fitted = Literal[
    "data.val_fraction", "tokenizer.kind", "tokenizer.vocab_size",
    "model.layers", "model.heads", "model.width", "model.context_length", "model.dropout",
    "model.head_gates", "model.ngram_heads", "model.value_embeddings", "model.bigram_rows",
    "optim.lr", "optim.embedding_lr", "optim.head_lr", "optim.scalar_lr", "optim.weight_decay",
    "train.steps", "train.batch_tokens", "train.micro_batch", "train.compile",
    "eval.every", "eval.stride", "eval.calibrate", "checkpoint.every",
]  # fmt: skip
"""What ``pretrain.fitting`` can choose."""
_STAGE = re.compile(r"0?\.\d+:( *\d+(\.\d+)?\b)+")  # one of data.stages


@dataclass(frozen=True)
class DataConfig(Section):
    """The text to learn from and the order in which it is read."""

    paths: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--data"])] = ()
    """Text (files, folders, patterns, URLs), or token shards: folders of 'pretrain data prepare', or .bin and .ds files
    made by other tools. None: the embedded corpus, the King James Bible."""
    field: NonEmpty = "text"
    """Name of the text in each object of JSONL files and of the text column of Parquet files."""
    separator: str = ""
    """Separator of the documents in plain text files, such as <|endoftext|>. Empty: each file is a document."""
    bos: bool = True
    """Begin each document with the BOS token, if the vocabulary has one. Off: documents follow one another unmarked, as
    in sources that tokenize one text."""
    split: Literal["tail", "hash", "last_file"] = "tail"
    """What is held out for validation. tail: the last val_fraction of all characters; hash: documents chosen by a hash
    of their text, val_fraction of them; last_file: the last file."""
    val_fraction: BelowOne = 0.05
    """Share of the text held out for validation."""
    test_fraction: BelowOne = 0.0
    """Share held out besides, which nothing is trained on or chosen by: measured once, at the end. tail: what comes
    last, after that for validation; hash: other documents; last_file: any share above 0 is the last file, and
    validation the one before it. 0: none."""
    val_paths: tuple[str, ...] = ()
    """Text files to validate on, instead of a split of the others."""
    allow_broken: bool = False
    """Use what is left where more than half of the records (lines, rows) have no text that can be used; otherwise that
    is an error."""
    order: Literal["shuffled", "random", "sequential"] = "shuffled"
    """Order of the training windows. shuffled: a new permutation each epoch; random: drawn with replacement (as nanoGPT
    does); sequential: as stored."""
    stride: Natural = 0
    """Tokens between the starts of neighbouring windows, for overlapping windows. 0: the context length, with a new
    offset each epoch when shuffled."""
    weights: tuple[NonNegative, ...] = ()
    """Share of the training rows from each path, if the paths are token shards. None: in proportion to their tokens."""
    stages: tuple[str, ...] = ()
    """Other weights from a share of the steps on: with '0.8: 0.2 0.8' the last fifth of the steps takes 0.2 of its rows
    from the first path and 0.8 from the second. 0: none, in that stage."""
    stream: bool = False
    """Tokenize the text while training on it, instead of preparing token shards first."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How a stream fills rows. concatenate: documents one after another, cut where a row ends; best_fit: every row
    begins with a document, and as few documents as possible are cut."""
    dtype: Literal["auto", "uint16", "uint32", "int32", "int64"] = "auto"
    """Integers of token files made by other tools that do not say it themselves. auto: as their values look."""
    readers: Count = 16
    """Parts of the text that a stream reads alternately, at most; affects the order, not the speed."""

    def __post_init__(self):
        super().__post_init__()
        if any(self.separator.startswith(self.separator[-k:]) for k in range(1, len(self.separator))):
            raise ValueError(f"data.separator {self.separator!r} ends as it begins and may overlap itself; use another")
        self._check_stages()
        if self.split != "last_file" and not self.val_paths and self.val_fraction + self.test_fraction >= 1:
            shares = f"data.val_fraction {self.val_fraction:g} and data.test_fraction {self.test_fraction:g}"
            raise ValueError(f"{shares} leave nothing to train on; together they must be below 1")

    @property
    def mixtures(self) -> list[tuple[float, tuple[float, ...]]]:
        """Each stage of the mixture: the share of the steps at which it begins, and the weight of each path."""
        later = [stage.partition(":") for stage in self.stages]
        return [(0.0, self.weights), *((float(begin), tuple(map(float, each.split()))) for begin, _, each in later)]

    def _check_stages(self) -> None:
        if self.stages and not self.weights:
            raise ValueError("data.stages changes data.weights, and there are none; give those of the first stage")
        if wrong := next((stage for stage in self.stages if not _STAGE.fullmatch(stage)), ""):
            form = "'SHARE: WEIGHTS', such as '0.8: 0.2 0.8', with a weight for each of data.paths"
            raise ValueError(f"data.stages must be of the form {form}, not '{wrong}'")
        begins, weights = zip(*self.mixtures, strict=True)
        if list(begins) != sorted(set(begins)):
            raise ValueError(
                f"data.stages begin at {', '.join(map(str, begins[1:]))}; each must be later than the one before"
            )
        for name, each in zip(["data.weights", *self.stages], weights, strict=True) if self.weights else ():
            if len(each) != len(self.paths):
                raise ValueError(f"{name} has {len(each)} values; give one for each of data.paths")
            if not any(each):
                raise ValueError(f"{name} are all 0; give one above")
        for path, each in zip(self.paths, zip(*weights, strict=True), strict=False):
            if not any(each):
                raise ValueError(f"data.weights gives {path} nothing in any stage; leave it out of data.paths")


@dataclass(frozen=True)
class TokenizerConfig(Section):
    """How text becomes tokens."""

    kind: NonEmpty = "bpe"
    """bpe (byte-level BPE trained on this text), char, byte, gpt2 (its 50,257 tokens), or a tokenizer.json by path."""
    vocab_size: int = 4096
    """Number of tokens for kind bpe; the other kinds have their own."""
    pattern: Literal["gpt2", "gpt4", "nanochat"] = "gpt2"
    """How kind bpe splits text into words before it merges their bytes: as GPT-2, as GPT-4 and Llama 3 (digits in
    threes), or as nanochat (the same, digits in twos)."""
    bos: str = ""
    """Token of a tokenizer.json that begins a document. Empty: found by the tokenizer's own files."""

    def __post_init__(self):
        super().__post_init__()
        if self.bos and self.kind in ("bpe", "char", "byte", "gpt2"):
            raise ValueError(f"tokenizer.bos is of a tokenizer.json; kind {self.kind} has <|endoftext|>; leave it out")
        if self.kind == "bpe" and self.vocab_size < 257:
            raise ValueError(f"tokenizer.vocab_size must be at least 257 (256 bytes and BOS), not {self.vocab_size}")


@dataclass(frozen=True)
class ModelConfig(Section):
    """The Transformer."""

    depth: Natural = 0
    """The dial: sets layers, width (64 per layer, rounded up to a multiple of 128), heads (head dimension 128) and
    window where they are 0, and with train.steps = 0 and train.batch_tokens = 0 also the horizon, batch and rates.
    0: no dial."""
    layers: Natural = 4
    """Transformer blocks."""
    heads: Natural = 4
    """Attention heads in each block."""
    kv_heads: Natural = 0
    """Key and value heads, shared by groups of heads (GQA). 0: as many as heads."""
    width: Natural = 256
    """Channels of the residual stream."""
    head_width: Natural = 0
    """Head dimension. 0: width / heads."""
    context_length: Count = 128
    """Tokens the model sees at once."""
    mlp: Literal["gelu", "gelu_tanh", "relu2", "swiglu"] = "relu2"
    """Activation of the MLP. gelu_tanh is GPT-2's approximation, relu2 the square of ReLU."""
    mlp_width: Natural = 0
    """Hidden channels of the MLP. 0: 4 x width, or 8/3 x width rounded up to a multiple of 64 for swiglu."""
    position: Literal["rope", "learned", "none"] = "rope"
    """Position encoding."""
    rope_theta: Positive = 10000.0
    """Base of the rotary frequencies."""
    rope_fraction: Fraction = 1.0
    """Share of each head's channels that rotate; the rest carry no position."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before attention, before the MLP and at the end."""
    norm_weight: bool = False
    """Whether norms have a learned weight (and a bias when model.bias is on and norm is layernorm)."""
    norm_eps: NonNegative = 1e-5
    """Added to the variance in every norm."""
    embedding_norm: bool = True
    """Normalise right after the embedding."""
    qk_norm: bool = True
    """Normalise queries and keys, so that attention cannot saturate."""
    attention_scale: NonNegative = 0.0
    """Scale of the attention scores before the softmax. 0: head dimension ** -0.5."""
    window_pattern: Annotated[str, Meta(pattern="^[LS]+$")] = "L"
    """Attention of the layers, repeated: L sees the whole context, S a sliding window. The last layer is always L."""
    window: Natural = 0
    """Tokens that an S layer sees, including the current one. 0: a quarter of the context; with the dial that quarter
    is rounded up to a multiple of 128 and the current token comes on top, as in nanochat."""
    document_mask: bool = False
    """Let a token see only its own document in the packed row, from its BOS token on."""
    bias: bool = False
    """Biases on the projections and the MLP (and on layernorm)."""
    qkv_bias: bool = False
    """Biases on queries, keys and values."""
    head_gates: bool = False
    """Scale what each head of attention gives by a learned gate of the token, 1 at first (arXiv 2505.06708)."""
    ngram_heads: Natural = 0
    """Heads of the first layer that attend to what followed the last 1, 2, ... tokens wherever these came before in the
    context (arXiv 2401.12973). 0: none."""
    value_embeddings: bool = False
    """Add a learned vector of the token itself to the values, gated, in every other layer (ResFormer)."""
    residual_scalars: bool = False
    """Learned scalars in each layer: one scales the stream, one the embedding that is added to it."""
    smear: bool = False
    """Mix the previous token's embedding into each token's, by a learned gate."""
    bigram_rows: Natural = 0
    """Rows of a table of learned vectors of pairs of tokens, the token and the one before it, that is added to the
    embedding; a hash finds the row of a pair (arXiv 2601.07372). It starts at zero. 0: none."""
    backout: bool = False
    """Subtract a learned share of the middle layer's stream from the last one (nanochat)."""
    tied_head: bool = False
    """Use the embedding as the output head."""
    logit_softcap: NonNegative = 15.0
    """Bound the logits smoothly: c * tanh(logits / c). 0: no bound."""
    vocab_multiple: Count = 1
    """Round the rows of embedding and head up to a multiple of this; the added rows are never predicted."""
    dropout: BelowOne = 0.0
    """Dropout of the embedding, attention weights and residual branches."""
    init: Literal["zero", "gpt2", "torch", "nanochat_2025", "nanochat_2026"] = "zero"
    """Initialisation. zero: output projections 0 (with Muon); gpt2: normal 0.02, scaled at the projections; torch:
    PyTorch's default for each layer; nanochat_2025 and nanochat_2026: as nanochat of October 2025 and July 2026."""

    def __post_init__(self):
        super().__post_init__()
        if not (self.layers and self.heads and self.width):
            return  # the rest is checked once the dial, or what fits the text, has set them
        if not self.head_width and self.width % self.heads:
            hint = f"try --model.width {_nearest_multiple(self.width, self.heads)}"
            raise ValueError(f"model.heads {self.heads} does not divide model.width {self.width}; {hint}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"model.kv_heads {self.kv_heads} does not divide model.heads {self.heads}")
        head_dimension = self.head_width or self.width // self.heads
        rotated = head_dimension * self.rope_fraction
        if self.position == "rope" and (rotated % 2 or not rotated):  # rotary positions turn channels in pairs
            share = f"model.rope_fraction {self.rope_fraction} of the head dimension {head_dimension}"
            raise ValueError(f"{share} is not an even number of channels")


@dataclass(frozen=True)
class GroupConfig:
    """What parameters of one name have of their own in AdamW; what is absent is as for the rest."""

    lr: NonNegative = 0.0
    """Peak learning rate, which neither optim.batch_scaling nor optim.width_scaling scales. 0: lr_factor decides."""
    lr_factor: Positive = 1.0
    """Peak learning rate as a multiple of that of the rest, with which it scales."""
    betas: tuple[BelowOne, BelowOne] | None = None
    """AdamW's beta1 and beta2. None: optim.betas."""
    weight_decay: NonNegative | None = None
    """Decoupled weight decay. None: as for the rest."""

    def __post_init__(self):
        if self.lr and self.lr_factor != 1:
            both = f"lr {self.lr:g} and lr_factor {self.lr_factor:g}"
            raise ValueError(f"{both} of a group in optim.groups both set its rate; give one of them")


@dataclass(frozen=True)
class OptimConfig(Section):
    """How gradients become updates."""

    kind: str = "muon"
    """adamw for all parameters, or muon for the hidden matrices and adamw for the rest."""
    lr: Positive = 0.02
    """Peak learning rate: of the hidden matrices under muon, of everything under adamw."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of the matrices."""
    decay_all: bool = False
    """Decay norms, biases and scalars too (adamw only)."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """AdamW's beta1 and beta2."""
    eps: NonNegative = 1e-8
    """AdamW's epsilon."""
    momentum: BelowOne = 0.95
    """Muon's momentum."""
    momentum_warmup_steps: Natural = 0
    """Steps over which Muon's momentum rises to its value."""
    momentum_from: BelowOne = 0.85
    """Muon's momentum at the start of its warmup."""
    momentum_final: BelowOne = 0.0
    """Muon's momentum at the end of a linear schedule's decay. 0: unchanged."""
    decay_to_zero: bool = False
    """Lower Muon's weight decay to 0 along a half cosine over the run."""
    newton_schulz: Literal["classic", "polar_express"] = "classic"
    """Polynomials that orthogonalise: one quintic repeated (Jordan), or a sequence of them (arXiv 2505.16932)."""
    newton_schulz_steps: int = 5
    """Newton-Schulz iterations."""
    newton_schulz_eps: NonNegative = 1e-7
    """Added to a matrix's norm before Newton-Schulz divides by it."""
    update_scale: Literal["spectral", "rms"] = "spectral"
    """Scale of Muon's update. spectral: sqrt(max(1, rows / columns)), the original; rms: 0.2 sqrt(max(rows, columns)),
    as large as AdamW's (Moonlight, arXiv 2502.16982), for rates like AdamW's."""
    cautious: bool = False
    """Decay a weight only where the update shrinks it too (muon only)."""
    nanochat_decay: bool = False
    """Muon's decay as in nanochat: scaled as the update is, and when cautious also where the update is 0."""
    row_equilibration: bool = False
    """Scale the rows of Muon's momentum to one norm before it is orthogonalised (MuonEq, arXiv 2603.28254)."""
    renormalize: bool = False
    """Scale Muon's orthogonalised update to the norm of an orthogonal matrix (Muon+, arXiv 2602.21545)."""
    normuon_beta2: BelowOne = 0.0
    """Divide each neuron of Muon's update by the root of its mean square, averaged over the steps with this beta2
    (NorMuon, arXiv 2510.05491). 0: off."""
    ema: BelowOne = 0.0
    """Decay per step of an exponential moving average of the weights, measured beside them and used wherever it is
    better (docs/evaluation.md); what is learned stays the same. 0: no average."""
    embedding_lr: Positive = 0.02
    """Peak learning rate of the embeddings under muon."""
    value_embedding_lr: NonNegative = 0.0
    """Peak learning rate of the value embeddings under muon. 0: that of the embeddings."""
    bigram_lr: Positive = 0.02
    """Peak learning rate of the table of pairs of tokens under muon."""
    head_lr: Positive = 0.02
    """Peak learning rate of the output head under muon."""
    scalar_lr: Positive = 0.02
    """Peak learning rate of norms, biases and scalars under muon."""
    width_scaling: bool = False
    """Scale the rates of embeddings and head under muon by (width / 768) ** -0.5."""
    batch_scaling: bool = False
    """With the dial, scale the rates and Muon's decay to the batch and the horizon (docs/recipes.md) also when
    train.batch_tokens is given. Off once that is done."""
    groups: dict[str, GroupConfig] = field(default_factory=dict)
    """Parameters that AdamW updates otherwise than the rest, by the name of a parameter or module, such as
    [optim.groups.head]: lr, lr_factor, betas, weight_decay."""

    def __post_init__(self):
        super().__post_init__()
        limit = 5 if self.newton_schulz == "polar_express" else 20
        if not 2 <= self.newton_schulz_steps <= limit:
            raise ValueError(f"optim.newton_schulz_steps must be from 2 to {limit}, not {self.newton_schulz_steps}")


@dataclass(frozen=True)
class ScheduleConfig(Section):
    """The learning rate over the steps, as a share of its peak."""

    kind: Literal["cosine", "linear", "constant"] = "linear"
    """Decay after the warmup: cosine over all remaining steps, linear over the last decay_fraction (also called
    warmup-stable-decay), or none."""
    warmup_steps: Natural = 20
    """Steps of linear rise from warmup_from to the peak."""
    warmup_fraction: Fraction = 0.0
    """With warmup_steps = 0: share of all steps that are warmup, rounded down."""
    warmup_from: Fraction = 0.0
    """Share of the peak from which the warmup rises."""
    decay_fraction: Fraction = 0.6
    """Share of all steps, at the end, over which a linear schedule falls."""
    final: Fraction = 0.0
    """Share of the peak at the end of the decay."""

    def __post_init__(self):
        super().__post_init__()
        if self.warmup_steps and self.warmup_fraction:
            both = f"schedule.warmup_steps {self.warmup_steps} and schedule.warmup_fraction {self.warmup_fraction:g}"
            raise ValueError(f"{both} both set the warmup; give 0 for one of them")


@dataclass(frozen=True)
class TrainConfig(Section):
    """The run."""

    steps: Natural = 420
    """Optimizer steps. 0: from minutes, epochs, target_flops or tokens_per_parameter, the first of them that is not
    0."""
    minutes: NonNegative = 0.0
    """Horizon with steps = 0: length of the whole command in minutes, from its start to the report; the steps that
    fill it follow from a measurement of some seconds, once. Given for a recipe that has steps, it takes their place.
    0: not used."""
    epochs: NonNegative = 0.0
    """Horizon with steps = 0: passes over the training windows, instead of tokens_per_parameter. 0: not used."""
    tokens_per_parameter: Positive = 20.0
    """Horizon with steps = 0: training tokens for each parameter (Chinchilla, arXiv 2203.15556, found about 20)."""
    target_flops: NonNegative = 0.0
    """Horizon with steps = 0: FLOPs to spend on training, instead of tokens_per_parameter. 0: not used."""
    horizon_parameters: Literal["all", "matrices"] = "all"
    """Parameters that the horizon counts: all, or the matrices of the blocks and the head (nanochat since 2026)."""
    batch_tokens: Natural = 2048
    """Tokens in the global batch of one step, over all machines and micro-batches. 0: set by the dial, a power of two
    that grows with the horizon; the rates scale with its square root."""
    micro_batch: Natural = 0
    """Rows in one forward and backward pass on one device; affects speed and memory, not what is learned. 0: the whole
    batch, or the most that fits in memory: an estimate, which a long run on a GPU corrects by what its second step
    took."""
    grad_clip: NonNegative = 1.0
    """Largest global gradient norm. 0: no clipping."""
    grad_clip_from: Natural = 0
    """First step, counted from 0, at which gradients are clipped."""
    grad_clip_after_warmup: bool = False
    """With grad_clip_from = 0: clip only after the warmup, whatever its steps."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations: less memory, more time."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Precision of the matrix products; weights stay fp32. auto: bf16 on GPUs from Ampere on, fp16 on
    older ones, fp32 on Apple's; on a CPU bf16 if measured to be clearly faster than fp32. tf32: fp32, but of what it
    multiplies an NVIDIA GPU from Ampere on takes 10 bits, which is faster; elsewhere fp32."""
    fp8: bool = False
    """Matrix products of the blocks in fp8 (Hopper and later GPUs; needs the extra 'fp8')."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile. auto: on a GPU, and for runs of some minutes on a CPU."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train. auto: cuda, else mps, else cpu."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 1337
    """Determines the initial weights, the data order, dropout and samples."""
    init_from: Annotated[str, tyro.conf.arg(aliases=["--init-from"])] = ""
    """Start from the weights (not the optimizer) of a run directory or of a Hugging Face checkpoint, hf:FOLDER, with
    its architecture and tokenizer. Empty: random weights."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("steps", "target_flops"):
            if self.epochs and (value := getattr(self, name)):
                both = f"train.{name} {value:g} and train.epochs {self.epochs:g} both set the horizon"
                raise ValueError(f"{both}; give 0 for one of them, as --train.{name} 0")

    @property
    def timed(self) -> bool:
        """Whether the steps are still to be chosen, to fill the minutes."""
        return self.minutes > 0 and not self.steps


@dataclass(frozen=True)
class EvalConfig(Section):
    """Validation during training."""

    every: Natural = 100
    """Steps between validations; always at the end. 0: only at the end."""
    offset: Natural = 0
    """Added to the steps of validations: 1 validates after 1, every + 1, ... updates, as loops do that validate after
    update number 0."""
    at_start: bool = False
    """Validate before the first step too."""
    tokens: Natural = 0
    """Tokens per validation. 0: all held-out tokens. The last validation always uses all, and these too."""
    order: Literal["sequential", "random"] = "sequential"
    """Which held-out tokens a validation over eval.tokens takes. sequential: the first; random: windows drawn anew each
    time, with replacement (as nanoGPT does)."""
    stride: Natural = 0
    """Tokens from one window to the next. Fewer than model.context_length: windows overlap, and each token is counted
    once, in the window where most tokens are before it. 0: the context length, so that the first tokens of each window
    are predicted from little. Needs eval.order = "sequential"."""
    train_tokens: Natural = 0
    """Tokens of the training split on which each validation measures the loss too, in windows drawn anew each time. 0:
    none."""
    calibrate: bool = False
    """Let each validation also find the temperature by which the head divides its logits for the lowest loss; it then
    belongs to the model (arXiv 1706.04599). Models of little text are too sure of themselves without it. Needs
    model.tied_head = false."""
    core_every: Natural = 0
    """Steps between measurements of CORE (docs/evaluation.md), and at the end. 0: never."""
    core_bundle: str = ""
    """CORE's tasks: a folder, a .zip file or a URL. Empty: nanochat's, downloaded once; where that is impossible, the
    run goes on without CORE."""
    core_max_per_task: Natural = 0
    """Questions of each task. 0: all."""


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """When checkpoints are saved and which are kept."""

    every: Natural = 200
    """Steps between checkpoints; always at the end. 0: only at the end."""
    at: tuple[Count, ...] = ()
    """Further steps at which to save; these checkpoints are never removed."""
    keep_last: Natural = 2
    """How many of the regular checkpoints to keep. 0: all."""
    keep_every: Natural = 0
    """Never remove checkpoints of steps that are multiples of this. 0: no such steps."""
    keep_best: bool = False
    """Also save whenever the validation loss is the lowest so far, and keep that checkpoint."""
    on_error: Literal["continue", "stop"] = "continue"
    """When a checkpoint cannot be written, as on a full disk: continue to the next one, or stop; the last is kept."""
    copy_to: str = ""
    """A bucket (s3://BUCKET/PATH, gs://...) or a folder on another disk, to which each checkpoint and the run's files
    are copied in the background. A machine that has no such run directory goes on from there (docs/reliability.md)."""


@dataclass(frozen=True)
class GuardConfig(Section):
    """Protection against bad steps, spikes and hangs (docs/reliability.md)."""

    max_skips: Count = 10
    """Training stops after this many steps in a row were skipped, as not finite or as spikes."""
    spike_sigma: NonNegative = 0.0
    """Treat a step as a spike if its loss or gradient norm is this many standard deviations above the mean of the
    window. 0: never."""
    spike_window: Annotated[int, Meta(ge=2)] = 128
    """Good steps in the window, which must be full before a step can be a spike."""
    spike_action: Literal["skip", "roll_back"] = "skip"
    """What to do with a spike. skip: that step changes nothing; roll_back: go back to the last checkpoint and skip the
    batches since then."""
    grace_seconds: NonNegative = 20.0
    """Time to save after a signal to stop; more, up to 10 minutes, where the checkpoint takes more. Then the process
    exits with the last one."""
    hang_factor: Annotated[float, Meta(ge=1)] = 20.0
    """Report the stack of every thread after no progress for this many times a usual step, and for hang_seconds."""
    hang_seconds: NonNegative = 300.0
    """Shortest time without progress that counts as a hang. 0: off."""


@dataclass(frozen=True)
class ParallelConfig(Section):
    """How several processes share the work (docs/cluster.md); it does not change what is learned."""

    kind: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """ddp: every process holds the whole model; fsdp: it is sharded over all processes; hsdp: within each machine.
    auto: ddp if the model and its optimizer fit, else hsdp if they fit in the GPUs of each of several machines, else
    fsdp."""
    reshard: bool = True
    """Under fsdp and hsdp, free a block's gathered weights after its forward pass and gather them again for the
    backward pass: less memory, more traffic."""
    start_seconds: Positive = 1800.0
    """How long to wait for other processes at the start, while rank 0 prepares the text and the first step compiles."""
    timeout_seconds: Positive = 120.0
    """How long to wait for them after the first step."""


@dataclass(frozen=True)
class LogConfig(Section):
    """Where the metrics go besides metrics.jsonl (docs/logging.md)."""

    every: Natural = 0
    """Steps between printed lines when the output is not a terminal. 0: about twenty lines in all."""
    backends: tuple[Literal["auto", "none", "tensorboard", "wandb", "trackio"], ...] = ("auto",)
    """Where metrics and samples are logged. auto: TensorBoard, if it is installed."""
    project: NonEmpty = "pretrain"
    """Project in Weights & Biases and trackio."""
    name: str = ""
    """Name of the run there. Empty: the name of the run directory."""


@dataclass(frozen=True)
class SampleConfig(Section):
    """Text sampled on the way."""

    prompts: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--sample.prompt"])] = ("",)
    """Texts to continue. Empty: begin a new document."""
    every: Natural = 0
    """Steps between samples, and at the end. 0: at every validation."""
    max_tokens: Natural = 64
    """Tokens to sample. 0: no samples."""
    temperature: NonNegative = 0.8
    """Randomness: 0 always takes the most likely token."""
    top_k: Natural = 50
    """Sample among the k most likely tokens. 0: among all."""


@dataclass(frozen=True)
class FitConfig(Section):
    """What is chosen to fit the text and the machine, instead of being given (docs/your-data.md)."""

    fields: tuple[Fitted, ...] = ()
    """Fields to choose when the run is made. A field that is given, on the command line or in Python, is not."""
    chosen: tuple[Fitted, ...] = ()
    """Those that were chosen: a record of it, which changes nothing."""


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. A recipe is a TOML file over these fields."""

    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    log: LogConfig = field(default_factory=LogConfig)
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self):
        open_fields = set() if self.model.depth else {"model.layers", "model.heads", "model.width"}
        for name in sorted(open_fields - set(self.fit.fields)):
            if not getattr(self.model, name.removeprefix("model.")):
                raise ValueError(f"{name} must be at least 1, not 0 (0 needs model.depth)")
        tokens, length = self.train.batch_tokens, self.model.context_length
        batch_fits = {"train.batch_tokens", "model.context_length"} & set(self.fit.fields)  # whatever is given
        if not tokens and not self.model.depth and not batch_fits:
            raise ValueError("train.batch_tokens must be at least 1 (0 needs model.depth)")
        if tokens % length and not batch_fits:
            hint = f"try --train.batch_tokens {_nearest_multiple(tokens, length)}"
            raise ValueError(f"train.batch_tokens {tokens} is not a multiple of model.context_length {length}; {hint}")
        if self.train.micro_batch and self.batch_rows % self.train.micro_batch and not batch_fits:
            rows = f"the {self.batch_rows} rows of the batch (train.batch_tokens / model.context_length)"
            raise ValueError(f"train.micro_batch {self.train.micro_batch} does not divide {rows}")
        if self.train.epochs and self.data.stream:
            raise ValueError("train.epochs counts windows, which a stream (data.stream) has not; give train.steps")
        if self.model.document_mask and not self.data.bos:
            raise ValueError("model.document_mask finds documents by their BOS tokens, which data.bos false leaves out")
        if self.eval.calibrate and self.model.tied_head:
            raise ValueError("eval.calibrate divides the head, which model.tied_head shares with the embedding")
        if self.eval.stride > length and "model.context_length" not in self.fit.fields:
            raise ValueError(f"eval.stride {self.eval.stride} is more than model.context_length {length}; give less")
        if self.eval.stride and self.eval.order == "random":
            raise ValueError("eval.stride needs windows one after the other; set --eval.order sequential")
        if self.eval.train_tokens and self.data.stream:
            why = "a stream (data.stream) keeps no training text to measure on"
            raise ValueError(f"eval.train_tokens is {self.eval.train_tokens}, but {why}; set --eval.train_tokens 0")

    @property
    def mixtures(self) -> list[tuple[int, tuple[float, ...]]]:
        """The batch at which each stage of the mixture begins, the first of the run being 0, and its weights."""
        return [(round(begin * self.train.steps), weights) for begin, weights in self.data.mixtures]

    @property
    def batch_rows(self) -> int:
        """Rows of ``model.context_length`` tokens in the global batch of one step."""
        return self.train.batch_tokens // self.model.context_length


def _nearest_multiple(value: int, of: int) -> int:
    return max(1, round(value / of)) * of
