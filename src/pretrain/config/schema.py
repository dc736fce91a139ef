"""The configuration of a run: frozen dataclasses, read from a recipe or TOML file, overridden on the command line.

    recipes/NAME.toml or FILE.toml  →  Config  ←  --model.layers 6        →  config.toml in the run directory

Each field's docstring below it is its help text on the command line. Validation happens when a dataclass is made, so a
recipe, a file, the command line and Python all meet the same checks and the same one-line errors.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class DataConfig:
    """The text to learn from and the order in which it is read."""

    paths: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--data"])] = ()
    """Text (files, folders, patterns, URLs), or token shards: folders of 'pretrain data prepare', or .bin and .ds files
    of other programs. None: the embedded corpus, the King James Bible."""
    field: str = "text"
    """Name of the text in each object of JSONL files and of the text column of Parquet files."""
    separator: str = ""
    """What stands between the documents of plain text files, such as <|endoftext|>. Empty: each file is a document."""
    split: Literal["tail", "hash", "last_file"] = "tail"
    """What is held out for validation. tail: the last val_fraction of all characters; hash: documents chosen by a hash
    of their text, val_fraction of them; last_file: the last file."""
    val_fraction: float = 0.05
    """Share of the text held out for validation."""
    val_paths: tuple[str, ...] = ()
    """Text files to validate on, instead of a split of the others."""
    order: Literal["shuffled", "random", "sequential"] = "shuffled"
    """Order of the training windows. shuffled: each epoch a fresh permutation of all of them; random: drawn with
    replacement (as nanoGPT does); sequential: as they stand."""
    stride: int = 0
    """Tokens between the starts of neighbouring windows, for overlapping windows. 0: the context length, with a fresh
    offset each epoch when shuffled."""
    weights: tuple[float, ...] = ()
    """Share of the training rows from each of paths, when these are token shards. None: by their numbers of tokens."""
    stream: bool = False
    """Tokenize the text while training on it, instead of preparing token shards first."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How a stream fills rows. concatenate: documents one after another, cut where a row ends; best_fit: every row
    begins with a document, and documents are cut as seldom as possible."""
    readers: int = 16
    """Parts of the text that a stream reads side by side, at most; it decides the order, not the speed."""

    def __post_init__(self):
        _require(0 <= self.val_fraction < 1, f"data.val_fraction must be in [0, 1), not {self.val_fraction}")
        _require(self.stride >= 0, f"data.stride must be 0 or more tokens, not {self.stride}")
        _require(self.readers >= 1, f"data.readers must be 1 or more, not {self.readers}")
        _require(bool(self.field), "data.field is empty; it names the text in each row, usually text or content")
        borders = [k for k in range(1, len(self.separator)) if self.separator.startswith(self.separator[-k:])]
        _require(
            not borders,
            f"data.separator {self.separator!r} ends as it begins, so that it may overlap itself; choose another, or"
            f" replace it in the text",
        )
        _require(all(weight > 0 for weight in self.weights), f"data.weights must be positive, not {self.weights}")
        _require(
            len(self.weights) in (0, len(self.paths)),
            f"data.weights has {len(self.weights)} values for {len(self.paths)} data.paths; give one for each",
        )


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens."""

    kind: str = "bpe"
    """bpe (byte-level BPE trained on this text), char, byte, gpt2 (its 50,257 tokens), or a tokenizer.json's path."""
    vocab_size: int = 4096
    """Number of tokens for kind bpe; the other kinds have their own."""
    pattern: Literal["gpt2", "gpt4", "nanochat"] = "gpt2"
    """How kind bpe cuts words before it merges their bytes: as GPT-2 does, as GPT-4 and Llama 3 do (digits in threes),
    or as nanochat does (the same, digits in twos)."""

    def __post_init__(self):
        _require(bool(self.kind), "tokenizer.kind is empty; choose bpe, char, byte, gpt2 or a tokenizer.json file")
        if self.kind == "bpe":
            _require(
                self.vocab_size >= 257,
                f"tokenizer.vocab_size must be at least 257 (256 bytes and the boundary token), not {self.vocab_size}",
            )


@dataclass(frozen=True)
class ModelConfig:
    """The Transformer."""

    depth: int = 0
    """The dial: sets those of layers, width (64 a layer) and heads (128 wide) that are 0; and with train.steps = 0 and
    train.batch_tokens = 0 also the horizon, batch and rates. 0: no dial."""
    layers: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Attention heads in each block."""
    kv_heads: int = 0
    """Key and value heads, shared by groups of heads (GQA). 0: as many as heads."""
    width: int = 256
    """Channels of the residual stream."""
    head_width: int = 0
    """Channels of one head. 0: width / heads."""
    context_length: int = 128
    """Tokens the model sees at once."""
    mlp: Literal["gelu", "gelu_tanh", "relu2", "swiglu"] = "relu2"
    """Activation of the MLP. gelu_tanh is GPT-2's approximation, relu2 the square of ReLU."""
    mlp_width: int = 0
    """Hidden channels of the MLP. 0: 4 x width, or 8/3 x width rounded up to a multiple of 64 for swiglu."""
    position: Literal["rope", "learned", "none"] = "rope"
    """How the model knows where a token stands."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_fraction: float = 1.0
    """Share of each head's channels that rotate; the rest carry no position."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before attention, before the MLP and at the end."""
    norm_weight: bool = False
    """Whether norms have a learned weight (and a bias when model.bias is on and norm is layernorm)."""
    norm_eps: float = 1e-5
    """Added to the variance in every norm."""
    embedding_norm: bool = True
    """Normalise right after the embedding."""
    qk_norm: bool = True
    """Normalise queries and keys, so that attention cannot saturate."""
    attention_scale: float = 0.0
    """Factor of queries times keys before the softmax. 0: head width ** -0.5."""
    window_pattern: str = "L"
    """Attention of the layers in turn: L sees the whole context, S a sliding window. The last layer is always L."""
    window: int = 0
    """Tokens that an S layer sees, itself included. 0: a quarter of the context."""
    document_mask: bool = False
    """Let a token see only its own document in the packed row (from the boundary token on)."""
    bias: bool = False
    """Biases on the projections and the MLP (and on layernorm)."""
    qkv_bias: bool = False
    """Biases on queries, keys and values."""
    value_embeddings: bool = False
    """Add a learned vector of the token itself to the values, gated, in every other layer (ResFormer)."""
    residual_scalars: bool = False
    """Learned scalars in each layer: of the stream, and of the embedding added to it again."""
    smear: bool = False
    """Mix the embedding of the token before into each token's, by a learned gate."""
    backout: bool = False
    """Take a learned share of the stream half way up away from the last one (nanochat)."""
    tied_head: bool = False
    """Use the embedding as the output head."""
    logit_softcap: float = 15.0
    """Bound the logits smoothly: c * tanh(logits / c). 0: no bound."""
    vocab_multiple: int = 1
    """Round the rows of embedding and head up to a multiple; the added ones are never predicted."""
    dropout: float = 0.0
    """Dropout of the embedding, attention weights and residual branches."""
    init: Literal["zero", "gpt2", "torch"] = "zero"
    """Initialisation. zero: output projections 0 (with Muon); gpt2: normal 0.02, scaled at the projections; torch:
    PyTorch's default for each layer."""

    def __post_init__(self):
        _require(self.depth >= 0, f"model.depth must be 0 or more, not {self.depth}")
        for name in ("layers", "heads", "width", "context_length"):
            least = 0 if self.depth and name != "context_length" else 1  # 0: the dial sets it
            _require(getattr(self, name) >= least, f"model.{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("kv_heads", "head_width", "mlp_width", "window", "attention_scale"):
            _require(getattr(self, name) >= 0, f"model.{name} must be 0 or more, not {getattr(self, name)}")
        if not (self.layers and self.heads and self.width):
            return  # checked when the dial has set them
        if not self.head_width:
            near = _nearest_multiple(self.width, self.heads)
            _require(
                self.width % self.heads == 0,
                f"model.heads {self.heads} does not divide model.width {self.width}; try --model.width {near}",
            )
        if self.kv_heads:
            _require(
                self.heads % self.kv_heads == 0,
                f"model.kv_heads {self.kv_heads} does not divide model.heads {self.heads}",
            )
        if self.position == "rope":
            head_width = self.head_width or self.width // self.heads
            rotated = head_width * self.rope_fraction
            _require(
                0 < self.rope_fraction <= 1 and rotated % 2 == 0,
                f"model.rope_fraction {self.rope_fraction} of the head width {head_width} is not an even number of"
                f" channels; rotary positions turn them in pairs",
            )
        _require(
            bool(self.window_pattern) and set(self.window_pattern) <= {"L", "S"},
            f"model.window_pattern must be made of L and S, not '{self.window_pattern}'",
        )
        _require(self.vocab_multiple >= 1, f"model.vocab_multiple must be at least 1, not {self.vocab_multiple}")
        _require(0 <= self.dropout < 1, f"model.dropout must be in [0, 1), not {self.dropout}")
        _require(self.logit_softcap >= 0, f"model.logit_softcap must be 0 or more, not {self.logit_softcap}")
        _require(self.rope_theta > 0, f"model.rope_theta must be positive, not {self.rope_theta}")


@dataclass(frozen=True)
class OptimConfig:
    """How gradients become updates."""

    kind: str = "muon"
    """adamw for all parameters, or muon for the hidden matrices and adamw for the rest."""
    lr: float = 0.02
    """Peak learning rate: of the hidden matrices under muon, of everything under adamw."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the matrices."""
    decay_all: bool = False
    """Decay norms, biases and scalars too (adamw only)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    momentum: float = 0.95
    """Muon's momentum."""
    momentum_warmup_steps: int = 0
    """Steps over which Muon's momentum rises to its value."""
    momentum_from: float = 0.85
    """Where Muon's momentum rises from."""
    momentum_final: float = 0.0
    """Where Muon's momentum falls to while a linear schedule decays. 0: it stays."""
    decay_to_zero: bool = False
    """Bring Muon's weight decay to 0 by a half cosine over the run."""
    newton_schulz: Literal["classic", "polar_express"] = "classic"
    """Polynomials that orthogonalise: one quintic repeated (Jordan), or a sequence of them (arXiv 2505.16932)."""
    newton_schulz_steps: int = 5
    """Rounds of them."""
    update_scale: Literal["spectral", "rms"] = "spectral"
    """Size of Muon's update. spectral: sqrt(max(1, rows / columns)), the original; rms: 0.2 sqrt(max(rows, columns)),
    as large as AdamW's (Moonlight, arXiv 2502.16982), for rates like AdamW's."""
    cautious: bool = False
    """Decay a weight only where the update shrinks it too (muon only)."""
    embedding_lr: float = 0.02
    """Peak learning rate of the embeddings under muon."""
    value_embedding_lr: float = 0.0
    """Peak learning rate of the value embeddings under muon. 0: that of the embeddings."""
    head_lr: float = 0.02
    """Peak learning rate of the output head under muon."""
    scalar_lr: float = 0.02
    """Peak learning rate of norms, biases and scalars under muon."""
    width_scaling: bool = False
    """Scale the rates of embeddings and head under muon by (width / 768) ** -0.5."""

    def __post_init__(self):
        _require(self.value_embedding_lr >= 0, "optim.value_embedding_lr must be 0 or more")
        for name in ("lr", "embedding_lr", "head_lr", "scalar_lr"):
            _require(getattr(self, name) > 0, f"optim.{name} must be positive, not {getattr(self, name)}")
        _require(self.weight_decay >= 0, f"optim.weight_decay must be 0 or more, not {self.weight_decay}")
        for beta in (*self.betas, self.momentum, self.momentum_from, self.momentum_final):
            _require(
                0 <= beta < 1, f"optim.betas, momentum, momentum_from and momentum_final must be in [0, 1), not {beta}"
            )
        _require(self.momentum_warmup_steps >= 0, "optim.momentum_warmup_steps must be 0 or more")
        limit = 5 if self.newton_schulz == "polar_express" else 20
        _require(
            2 <= self.newton_schulz_steps <= limit,
            f"optim.newton_schulz_steps must be from 2 to {limit}, not {self.newton_schulz_steps}",
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the steps, as a share of its peak."""

    kind: Literal["cosine", "linear", "constant"] = "linear"
    """Decay after the warmup: cosine over all remaining steps, linear over the last decay_fraction (also called
    warmup-stable-decay), or none."""
    warmup_steps: int = 20
    """Steps of linear rise from warmup_from to the peak."""
    warmup_from: float = 0.0
    """Share of the peak from which the warmup rises."""
    decay_fraction: float = 0.6
    """Share of all steps, at the end, over which a linear schedule falls."""
    final: float = 0.0
    """Share of the peak at the end of the decay."""

    def __post_init__(self):
        _require(self.warmup_steps >= 0, f"schedule.warmup_steps must be 0 or more, not {self.warmup_steps}")
        for name in ("warmup_from", "decay_fraction", "final"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"schedule.{name} must be in [0, 1], not {value}")


@dataclass(frozen=True)
class TrainConfig:
    """The run."""

    steps: int = 420
    """Optimizer steps. 0: from tokens_per_parameter or target_flops."""
    tokens_per_parameter: float = 20.0
    """Horizon with steps = 0: training tokens for each parameter (Chinchilla, arXiv 2203.15556, found about 20)."""
    target_flops: float = 0.0
    """Horizon with steps = 0: operations to spend in training, instead of tokens_per_parameter. 0: not used."""
    horizon_parameters: Literal["all", "matrices"] = "all"
    """Parameters that the horizon counts: all, or those of the blocks and the head (nanochat since 2026)."""
    batch_tokens: int = 2048
    """Tokens in the global batch of one step, over all machines and micro-batches. 0: by the dial, a power of two that
    grows with the horizon; the rates follow its square root."""
    micro_batch: int = 0
    """Rows in one forward and backward pass on one device; it changes speed and memory, never what is learned. 0: the
    whole batch, or the most that fits in memory."""
    grad_clip: float = 1.0
    """Largest global gradient norm. 0: no clipping."""
    grad_clip_from: int = 0
    """First step, counted from 0, at which gradients are clipped."""
    activation_checkpointing: bool = False
    """Compute each block again in the backward pass instead of keeping its activations: less memory, more time."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the matrix products; weights stay fp32. auto: what this machine does fastest, measured."""
    fp8: bool = False
    """Matrix products of the blocks in fp8 (Hopper and later GPUs; needs the extra 'fp8')."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile. auto: on a GPU."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train. auto: cuda, else mps, else cpu."""
    seed: int = 1337
    """Fixes the initial weights, the data order, dropout and samples."""
    init_from: Annotated[str, tyro.conf.arg(aliases=["--init-from"])] = ""
    """Begin with the weights, not the optimizer, of a run directory, or of a Hugging Face checkpoint: hf:FOLDER, whose
    architecture and tokenizer are taken over. Empty: begin with random weights."""

    def __post_init__(self):
        for name in ("steps", "batch_tokens", "grad_clip_from"):
            _require(getattr(self, name) >= 0, f"train.{name} must be 0 or more, not {getattr(self, name)}")
        _require(self.tokens_per_parameter > 0, "train.tokens_per_parameter must be positive")
        _require(self.target_flops >= 0, "train.target_flops must be 0 or more")
        _require(self.micro_batch >= 0, f"train.micro_batch must be 0 or more rows, not {self.micro_batch}")
        _require(self.grad_clip >= 0, f"train.grad_clip must be 0 or more, not {self.grad_clip}")
        _require(0 <= self.seed < 2**63, f"train.seed must be in [0, 2**63), not {self.seed}")


@dataclass(frozen=True)
class EvalConfig:
    """Validation during training."""

    every: int = 100
    """Steps between validations; always at the end. 0: only at the end."""
    tokens: int = 0
    """Validation tokens each time. 0: all that are held out. The last validation always takes all."""
    core_every: int = 0
    """Steps between measurements of CORE (docs/evaluation.md), and at the end. 0: never."""
    core_bundle: str = ""
    """CORE's tasks: a folder, a .zip file or a URL. Empty: nanochat's, downloaded once."""
    core_max_per_task: int = 0
    """Questions of each task. 0: all."""

    def __post_init__(self):
        _require(self.every >= 0, f"eval.every must be 0 or more steps, not {self.every}")
        _require(self.tokens >= 0, f"eval.tokens must be 0 or more, not {self.tokens}")
        _require(self.core_every >= 0, f"eval.core_every must be 0 or more steps, not {self.core_every}")
        _require(self.core_max_per_task >= 0, f"eval.core_max_per_task must be 0 or more, not {self.core_max_per_task}")


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of the run."""

    every: int = 200
    """Steps between checkpoints; always at the end. 0: only at the end."""
    at: tuple[int, ...] = ()
    """Further steps at which to save; these checkpoints are never removed."""
    keep_last: int = 2
    """How many of the regular checkpoints to keep. 0: all."""
    keep_every: int = 0
    """Never remove checkpoints of steps that are multiples of this. 0: no such steps."""
    keep_best: bool = False
    """Also save whenever the validation loss is the lowest so far, and keep the checkpoint of the lowest."""
    on_error: Literal["continue", "stop"] = "continue"
    """When a checkpoint cannot be written, as on a full disk: train on to the next one, or stop. The last one stays."""

    def __post_init__(self):
        for name in ("every", "keep_last", "keep_every"):
            _require(getattr(self, name) >= 0, f"checkpoint.{name} must be 0 or more, not {getattr(self, name)}")
        _require(all(step > 0 for step in self.at), f"checkpoint.at must list steps of 1 or more, not {self.at}")


@dataclass(frozen=True)
class GuardConfig:
    """What watches over a run (docs/reliability.md)."""

    max_skips: int = 10
    """Steps in a row whose gradients may be skipped, as not finite or as spikes, before training stops."""
    spike_sigma: float = 0.0
    """Treat a step as a spike whose loss or gradient norm is this many standard deviations above the mean of the
    window. 0: never."""
    spike_window: int = 128
    """Good steps that the mean and the deviation are of; there are no spikes before so many."""
    spike_action: Literal["skip", "roll_back"] = "skip"
    """With a spike. skip: change nothing with that step; roll_back: go back to the last checkpoint and leave out the
    batches since then."""
    grace_seconds: float = 20.0
    """Time to save and leave after a signal; then the run leaves with the last checkpoint it has."""
    hang_factor: float = 20.0
    """Say where every thread is when nothing has happened for this many times a usual step, and hang_seconds."""
    hang_seconds: float = 300.0
    """The least time without a step that counts as a hang. 0: do not watch."""

    def __post_init__(self):
        _require(self.max_skips >= 1, f"guard.max_skips must be at least 1, not {self.max_skips}")
        for name in ("spike_sigma", "grace_seconds", "hang_seconds"):
            _require(getattr(self, name) >= 0, f"guard.{name} must be 0 or more, not {getattr(self, name)}")
        _require(self.spike_window >= 2, f"guard.spike_window must be at least 2 steps, not {self.spike_window}")
        _require(self.hang_factor >= 1, f"guard.hang_factor must be at least 1, not {self.hang_factor}")


@dataclass(frozen=True)
class ParallelConfig:
    """How several processes share the work (docs/cluster.md); never what is learned."""

    kind: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """ddp: every process holds the whole model; fsdp: each holds a part of it; hsdp: each machine holds it in parts.
    auto: ddp if the model and its optimizer fit, else fsdp."""
    reshard: bool = True
    """Under fsdp and hsdp, give a block's weights back after its forward pass and fetch them again for the backward
    pass: less memory, more traffic."""
    start_seconds: float = 1800.0
    """How long to wait for other processes at the start, while rank 0 prepares the text and the first step compiles."""
    timeout_seconds: float = 120.0
    """How long to wait for them after the first step."""

    def __post_init__(self):
        for name in ("start_seconds", "timeout_seconds"):
            _require(getattr(self, name) > 0, f"parallel.{name} must be positive, not {getattr(self, name)}")


@dataclass(frozen=True)
class LogConfig:
    """Where the numbers go beside metrics.jsonl (docs/logging.md)."""

    backends: tuple[Literal["auto", "none", "tensorboard", "wandb", "trackio"], ...] = ("auto",)
    """Tools that the numbers and samples go to. auto: TensorBoard, if it is installed."""
    project: str = "pretrain"
    """Project in Weights & Biases and trackio."""
    name: str = ""
    """Name of the run there. Empty: that of the run directory."""

    def __post_init__(self):
        _require(bool(self.project), "log.project is empty; name the project that the runs belong to")


@dataclass(frozen=True)
class SampleConfig:
    """Text sampled at every validation."""

    prompt: str = ""
    """Text to continue. Empty: begin a new document."""
    max_tokens: int = 64
    """Tokens to sample. 0: no samples."""
    temperature: float = 0.8
    """Randomness: 0 always takes the likeliest token."""
    top_k: int = 50
    """Sample among the k likeliest tokens. 0: among all."""

    def __post_init__(self):
        _require(self.max_tokens >= 0, f"sample.max_tokens must be 0 or more, not {self.max_tokens}")
        _require(self.temperature >= 0, f"sample.temperature must be 0 or more, not {self.temperature}")
        _require(self.top_k >= 0, f"sample.top_k must be 0 or more, not {self.top_k}")


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

    def __post_init__(self):
        tokens, length = self.train.batch_tokens, self.model.context_length
        _require(tokens > 0 or self.model.depth > 0, "train.batch_tokens must be at least 1 (0 needs model.depth)")
        _require(
            tokens % length == 0,
            f"train.batch_tokens {tokens} is not a multiple of model.context_length {length};"
            f" try --train.batch_tokens {_nearest_multiple(tokens, length)}",
        )
        rows = tokens // length
        if self.train.micro_batch and rows:
            _require(
                rows % self.train.micro_batch == 0,
                f"train.micro_batch {self.train.micro_batch} does not divide the {rows} rows of the batch"
                f" (train.batch_tokens / model.context_length)",
            )

    @property
    def batch_rows(self) -> int:
        """Rows of ``model.context_length`` tokens in the global batch of one step."""
        return self.train.batch_tokens // self.model.context_length


def _nearest_multiple(value: int, of: int) -> int:
    return max(1, round(value / of)) * of
