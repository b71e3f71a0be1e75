"""What a run is told: one frozen, validated dataclass per owner. The named PPO presets stand in `presets.py`."""

from __future__ import annotations

import dataclasses
import math
import re
import types
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import InputError

Config = TypeVar("Config")


def _require(config: object, name: str, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """Raise unless field `name` lies in [low, high] (`above`: > low), whole where its type is int.

    None passes where the type has it.
    """
    value = getattr(config, name)
    hint = get_type_hints(type(config))[name]
    if value is None and type(None) in get_args(hint):
        return
    whole = int in (hint, *get_args(hint))
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if number and (low < value if above else low <= value) and value <= high:
        return
    kind, upper = "a whole number" if whole else "a number", "" if high == math.inf else f" and <= {high:.10g}"
    raise _bad_value(config, name, f"{kind} {'>' if above else '>='} {low:g}{upper}")


def _require_choice(config: object, name: str) -> None:
    """Raise unless field `name` is one of the values that its type lists."""
    hint = get_type_hints(type(config))[name]
    choices = (False, True) if hint is bool else get_args(hint)
    if getattr(config, name) not in choices:
        raise _bad_value(config, name, f"one of {', '.join(map(repr, choices))}")


def _bad_value(config: object, name: str, expected: str) -> InputError:
    return InputError(f"{type(config).__name__}.{name} = {getattr(config, name)!r}: expected {expected}")


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning-rate factor over optimizer steps (`optim.lr_factor`)."""

    kind: Literal["constant", "cosine", "inverse-sqrt"] = "constant"
    """After the warm-up."""
    warmup: float = 0.0
    """Warm-up: a share of all steps below 1, a number of steps from 1 on."""
    floor: float = 0.0
    """Lowest factor: where an inverse-sqrt warm-up starts, where a cosine ends."""

    def __post_init__(self) -> None:
        _require_choice(self, "kind")
        _require(self, "warmup", 0)
        _require(self, "floor", 0, 1)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW for one model."""

    lr: float = 5e-7
    """Learning rate; `schedule` scales it over the run."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the two moments, a step."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Share of a weight, times the learning rate, that a step takes away."""
    moments: Literal["float32", "8bit"] = "float32"
    """8 bytes a weight for both, or 2 in blocks of 256. bfloat16 weights keep 2 more in either case: the low bits of
    the float32 masters that are trained. A run goes on in the form that it was saved in."""
    offload: bool = False
    """On a GPU: moments and low bits wait in pinned host memory while the model is not being updated."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        _require(self, "lr", 0)
        _require_choice(self, "moments")
        _require_choice(self, "offload")
        _require(self, "eps", 0, above=True)
        _require(self, "weight_decay", 0)
        betas: Any = self.betas
        pair = isinstance(betas, (tuple, list)) and len(betas) == 2
        if not pair or not all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in betas):
            raise _bad_value(self, "betas", "two numbers in [0, 1)")


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and in which precision a run computes."""

    device: str = "auto"
    """`auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights and activations; `auto`: bfloat16 on a GPU, float32 on a CPU. Losses are always float32."""
    exact: bool = False
    """On a CPU: arithmetic in which log-probs recorded while sampling equal recomputed ones bit for bit; slow."""
    attention: Literal["auto", "flash-attn", "torch", "sdpa"] = "auto"
    """In training and scoring, of packed sequences: flash-attn's or torch's kernels for them (a GPU, bfloat16), or one
    call a sequence. `auto`: the first of these that is there."""
    deterministic: bool = False
    """On a GPU: only algorithms that give the same bits each time. A CPU's always do."""
    checkpointing: Literal["none", "selective", "layer"] = "none"
    """What the backward pass computes again instead of keeping it: nothing; all but matrix products and attention; all
    of a decoder layer but its input."""
    compile: bool = False
    """Training and scoring run decoder layers that torch.compile has made; sampling does not."""
    liger: bool = False
    """On a GPU: Liger's fused norms, rotary embedding and gated feed-forward (`pip install 'ppomax[liger]'`)."""
    offload_frozen: bool = False
    """On a GPU: reference and reward models wait in host memory and pass through the GPU layer by layer."""
    shard_size: int | None = None
    """Under torchrun: processes that share one copy of the weights, those of a machine, say; none: all of them."""
    seed: int = 0
    """Of the order of the data, of sampling and of new weights."""
    save_every: int = 100
    """Steps (PPO: iterations) between resumable checkpoints; there is one at the end in any case."""
    keep_checkpoints: int = 1
    """Newest checkpoints that are kept."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(self.device)):
            raise _bad_value(self, "device", "'auto', 'cpu', 'cuda' or 'cuda:N'")
        for name in ("dtype", "exact", "attention", "deterministic", "checkpointing", "compile", "liger",
                     "offload_frozen"):  # fmt: skip
            _require_choice(self, name)
        for name in ("compile", "liger"):
            if self.exact and getattr(self, name):
                raise _bad_value(self, name, "False with exact = True")
        if self.compile and self.liger:
            raise _bad_value(self, "liger", "False with compile = True, which fuses the same operations")
        _require(self, "seed", 0, 2**31 - 1)
        _require(self, "shard_size", 1)
        _require(self, "save_every", 1)
        _require(self, "keep_checkpoints", 1)


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled."""

    max_response: int = 512
    """Tokens of a response at most."""
    temperature: float = 0.8
    """0 takes the likeliest token."""
    top_p: float = 0.9
    """Only the likeliest tokens that together have this probability are sampled; 1: off."""
    top_k: int = 0
    """0: off."""
    repetition_penalty: float = 1.1
    """CTRL rule, on response tokens only; 1: off."""
    max_running: int = 256
    """Sequences decoded at the same time, by each process."""
    prefill_tokens: int = 8192
    """Prompt tokens computed in one forward pass at most (one prompt always may)."""
    block_size: int = 16
    """Tokens per block of the KV cache."""
    attention: Literal["auto", "triton", "torch", "flash-attn"] = "auto"
    """On a GPU: over the KV cache by this package's kernel (`auto`), torch's or flash-attn's. The latter two take
    blocks in multiples of 256 tokens."""
    kv_memory: float = 0.3
    """On a GPU: share of the memory that is free when the engine is made that the KV cache takes."""
    kv_blocks: int | None = None
    """Blocks of the KV cache instead; none on a CPU: as many as `max_running` sequences of full length need."""
    sleep: bool = False
    """Give the memory of the KV cache back while the models are updated."""
    cuda_graphs: bool = True
    """On a GPU: decode by CUDA graphs, captured once for each of a few batch sizes; where weights are sharded, anew for
    each batch of rollouts."""
    stop: tuple[str, ...] = ()
    """Texts that end a response, as its last part, beside the tokenizer's end tokens."""

    def __post_init__(self) -> None:
        stop: Any = self.stop
        if not isinstance(stop, (tuple, list)) or not all(isinstance(text, str) and text for text in stop):
            raise _bad_value(self, "stop", "texts, none empty")
        for name in ("max_response", "max_running", "prefill_tokens", "block_size"):
            _require(self, name, 1)
        _require(self, "kv_memory", 0, 1, above=True)
        _require(self, "kv_blocks", 2)
        for name in ("sleep", "cuda_graphs", "attention"):
            _require_choice(self, name)
        if self.attention in ("torch", "flash-attn") and self.block_size % 256:
            raise _bad_value(self, "block_size", f"a multiple of 256 with attention = {self.attention!r}")
        _require(self, "temperature", 0)
        _require(self, "top_p", 0, 1, above=True)
        _require(self, "top_k", 0)
        _require(self, "repetition_penalty", 0, above=True)


def _require_prompt(config: GenerateConfig | PPOConfig) -> None:
    _require(config, "max_sequence", 2)
    limit = config.rollout.max_response
    if config.max_sequence <= limit:
        raise _bad_value(config, "max_sequence", f"more than rollout.max_response = {limit}, or no prompt fits")


@dataclass(frozen=True)
class RewardConfig:
    """Score reparameterisation (paper Fig. 5, star 5), before the KL penalty is added."""

    transform: Literal["normalize", "scale", "none"] = "normalize"
    """normalize: (r - mean) / std; scale: r / std; moments over the whole history of scores."""
    clip: float | None = 5.0
    """Transformed scores are cut to [-clip, clip]; None: not cut."""

    def __post_init__(self) -> None:
        _require_choice(self, "transform")
        _require(self, "clip", 0, above=True)


@dataclass(frozen=True)
class LoRAConfig:
    """Policy and critic as low-rank adapters on one frozen base, which is the reference too (`lora.py`). Learning
    rates of full training are too low for adapters: 1e-5 to 1e-4 is the usual range."""

    rank: int = 0
    """0: off, all weights are trained."""
    alpha: int = 32
    """The product of the two factors is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead: the step then depends little on the rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Linear layers that get an adapter, by the last part of their name (q_proj v_proj); all-linear: all of the
    decoder. Never the LM head."""

    def __post_init__(self) -> None:
        _require(self, "rank", 0)
        _require(self, "alpha", 1)
        _require_choice(self, "rslora")
        targets: Any = self.targets
        names = isinstance(targets, (tuple, list)) and all(isinstance(name, str) and name for name in targets)
        if not names or not targets or ("all-linear" in targets and len(targets) > 1):
            raise _bad_value(self, "targets", "names of linear layers, or all-linear alone")


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning: cross-entropy on assistant tokens. Defaults: the paper, training settings."""

    epochs: int = 2
    """Passes over the dialogues."""
    max_steps: int | None = None
    """Optimizer steps at most, whatever `epochs` says."""
    batch_size: int = 32
    """Dialogues per optimizer step (global)."""
    micro_batch_tokens: int = 16384
    """Tokens per forward pass at most (one sequence always may)."""
    max_sequence: int = 2048
    """Tokens of a dialogue at most; oldest rounds go first."""
    held_out: float = 0.02
    """Share of the dialogues, split by context, on which the loss is measured."""
    eval_every: int = 100
    """Steps between measurements on the held-out dialogues; there is one at the end in any case."""
    grad_clip: float | None = 1.0
    """Largest norm of the gradient; None: off."""
    vocab_size: int = 2048
    """Of the tokenizer that is trained where the model is a built-in one."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=9.5e-6, schedule=ScheduleConfig("cosine", floor=0.1))
    )
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        for name in ("epochs", "max_steps", "batch_size", "micro_batch_tokens", "eval_every"):
            _require(self, name, 1)
        _require(self, "max_sequence", 2)
        _require(self, "held_out", 0, 0.5)
        _require(self, "grad_clip", 0, above=True)
        _require(self, "vocab_size", 300)


@dataclass(frozen=True)
class RewardModelConfig:
    """Ranking loss with an imitation term (paper section 3.1)."""

    max_steps: int = 1000
    """Optimizer steps."""
    batch_tokens: int = 16384
    """Dynamic batches: as many pairs (4 to 128) per optimizer step as reach this number of tokens (global)."""
    batch_size: int | None = None
    """Pairs per optimizer step, where every step shall have the same number of them."""
    micro_batch_tokens: int = 16384
    """Tokens per forward pass at most (one pair always may)."""
    max_sequence: int = 2048
    """Tokens of a prompt and an answer at most; oldest rounds go first."""
    imitation_coef: float = 1.0
    """beta_rm: weight of the language-modelling loss on the chosen response (paper 1, released code 0)."""
    held_out: float = 0.05
    """Share of the pairs, split by context, on which the accuracy is measured."""
    eval_every: int = 100
    """Steps between measurements on the held-out pairs; there is one at the end in any case."""
    grad_clip: float | None = 1.0
    """Largest norm of the gradient; None: off."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=5e-6, schedule=ScheduleConfig("constant", warmup=0.1))
    )
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "batch_tokens", "micro_batch_tokens", "eval_every"):
            _require(self, name, 1)
        _require(self, "max_sequence", 2)
        _require(self, "imitation_coef", 0)
        _require(self, "held_out", 0, 0.5)
        _require(self, "grad_clip", 0, above=True)


@dataclass(frozen=True)
class PPOConfig:
    """PPO on a language model; `preset("ppo-max")` and its siblings fill it. All batch sizes are global."""

    iterations: int = 1000
    """Rounds of sampling, scoring and training; those of critic pre-training come before them."""
    rollouts_per_iteration: int = 128
    """Responses that an iteration trains on."""
    minibatch_size: int = 32
    """Rollouts per optimizer step."""
    samples_per_prompt: int = 1
    """Responses sampled to each prompt; their prompt is computed once."""
    extra_in_flight: int = 0
    """Responses under way beyond those that an iteration trains on. What is unfinished when it has enough goes on in
    the next one under the new weights (partial rollouts); 0: each iteration waits for its longest response."""
    ppo_epochs: int = 1
    """Passes over an iteration's rollouts."""
    micro_batch_tokens: int = 16384
    """Tokens per forward pass at most (one sequence always may)."""
    max_sequence: int = 2048
    """Prompt and response together; prompts keep `max_sequence - rollout.max_response` tokens."""

    gamma: float = 1.0
    """Discount of rewards, a token."""
    gae_lambda: float = 0.9
    """Of generalised advantage estimation: 0 trusts the critic, 1 the rewards."""
    bootstrap_truncated: bool = False
    """Value after a response cut off at the limit: the critic's (True) or 0 (False, as in the released code)."""
    kl_coef: float = 0.05
    """eta: weight of the per-token penalty on log pi - log pi_ref inside the reward."""
    clip_eps: float = 0.2
    """The ratio counts within [1 - this, 1 + this]."""
    value_clip: float | None = 0.2
    """Values count within this of those at the rollout; None: off."""
    dual_clip: float | None = None
    """Bound of the ratio where the advantage is negative, above 1 + clip_eps; None: off."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus in the policy's loss."""
    entropy_bound: float | None = None
    """The entropy bonus acts only on tokens whose entropy is below this (nats)."""
    normalize_advantages: bool = False
    """Advantages of an iteration get mean 0 and deviation 1."""
    advantage_clip: float | None = None
    """Advantages are cut to [-this, this]; None: off."""
    ratio_base: Literal["rollout", "reference"] = "rollout"
    """Denominator of the ratio: the policy that sampled, or the reference (the paper's "importance sampling")."""
    old_logprobs: Literal["recomputed", "recorded"] = "recomputed"
    """Log-probs of the policy that sampled: by a forward pass over the training batches, so that the first ratio is
    1, or those recorded while sampling, which saves the pass. Tokens that earlier weights drew keep recorded ones."""
    importance_clip: float | None = None
    """Weigh each token's policy loss by min(recomputed / recorded probability, this): the correction of the gap
    between training and sampling arithmetic, truncated. None: off."""
    logprob_temperature: float = 1.0
    """Logits are divided by this in all log-probs that training uses."""
    grad_clip: float | None = 1.0
    """Largest norm of each model's gradient; None: off."""
    ptx_coef: float = 0.0
    """lambda_ptx: weight of the language-modelling loss on SFT text (PPO-ptx)."""
    ptx_batch_size: int = 32
    """Dialogues of SFT text per optimizer step."""
    critic_pretrain_iterations: int = 0
    """Rollout batches of the fixed policy on which the critic is trained first, at most; 0: off."""
    critic_pretrain_epochs: int = 2
    """Passes over each of these batches."""
    critic_pretrain_tolerance: float = 0.05
    """Critic pre-training ends early when the value loss falls by less than this share from batch to batch."""

    held_out: float = 0.0
    """Share of the prompts, split by context, that is kept for evaluation. The same share and seed leave out the
    same contexts in every command."""
    eval_every: int = 0
    """Iterations between evaluations on held-out prompts; 0: none."""

    policy_optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-7, eps=1e-6))
    critic_optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1.65e-6, eps=1e-8))
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        for name in ("iterations", "rollouts_per_iteration", "minibatch_size", "ppo_epochs", "micro_batch_tokens",
                     "ptx_batch_size", "critic_pretrain_epochs", "samples_per_prompt"):  # fmt: skip
            _require(self, name, 1)
        for name in ("gamma", "gae_lambda"):
            _require(self, name, 0, 1)
        for name in ("kl_coef", "entropy_coef", "ptx_coef", "critic_pretrain_iterations", "eval_every",
                     "extra_in_flight"):  # fmt: skip
            _require(self, name, 0)
        for name in ("importance_clip", "value_clip", "entropy_bound", "advantage_clip", "logprob_temperature",
                     "grad_clip"):  # fmt: skip
            _require(self, name, 0, above=True)
        _require(self, "clip_eps", 0, 1, above=True)
        _require(self, "held_out", 0, 0.5)
        _require(self, "dual_clip", 1 + self.clip_eps, above=True)
        _require(self, "critic_pretrain_tolerance", 0, 1)
        for name in ("bootstrap_truncated", "normalize_advantages", "ratio_base", "old_logprobs"):
            _require_choice(self, name)
        self._check_sizes()
        self._check_old_logprobs()

    def _check_sizes(self) -> None:
        _require_prompt(self)
        if self.rollouts_per_iteration % self.minibatch_size:
            divided = f"rollouts_per_iteration = {self.rollouts_per_iteration}"
            raise _bad_value(self, "minibatch_size", f"a divisor of {divided}")
        for name in ("rollouts_per_iteration", "extra_in_flight"):
            if getattr(self, name) % self.samples_per_prompt:
                raise _bad_value(self, "samples_per_prompt", f"a divisor of {name} = {getattr(self, name)}")

    def _check_old_logprobs(self) -> None:
        """What is recorded while sampling is at temperature 1."""
        recorded = self.old_logprobs == "recorded" or self.importance_clip is not None or self.extra_in_flight > 0
        if recorded and self.logprob_temperature != 1:
            raise _bad_value(self, "logprob_temperature", "1 where log-probs recorded while sampling are used")
        if self.old_logprobs == "recorded" and self.importance_clip is not None:
            raise _bad_value(self, "importance_clip", 'none with old_logprobs = "recorded": nothing is recomputed')

    @property
    def max_prompt(self) -> int:
        """Tokens of a prompt at most."""
        return self.max_sequence - self.rollout.max_response

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the policy over the whole run."""
        return self.iterations * self.ppo_epochs * (self.rollouts_per_iteration // self.minibatch_size)

    @property
    def critic_pretrain_steps(self) -> int:
        """Optimizer steps of the critic before the first iteration, at most."""
        minibatches = self.rollouts_per_iteration // self.minibatch_size
        return self.critic_pretrain_iterations * self.critic_pretrain_epochs * minibatches


@dataclass(frozen=True)
class GenerateConfig:
    """Answering prompts."""

    max_sequence: int = 2048
    """Prompt and response together."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        _require_prompt(self)

    @property
    def max_prompt(self) -> int:
        """Tokens of a prompt at most."""
        return self.max_sequence - self.rollout.max_response


@dataclass(frozen=True)
class EvalConfig(GenerateConfig):
    """Answering held-out prompts and judging the answers."""

    max_prompts: int = 512
    """The first so many prompts of the files."""
    held_out: float = 0.0
    """Only the contexts that training with this share and the same seed has left out; 0: all prompts."""
    micro_batch_tokens: int = 16384
    """Tokens per forward pass at most (one sequence always may)."""
    tie_margin: float = 0.1
    """Scores closer than this many standard deviations of the baseline's scores are a tie."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_prompts", "micro_batch_tokens"):
            _require(self, name, 1)
        _require(self, "tie_margin", 0)
        _require(self, "held_out", 0, 0.5)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dict for TOML; None, which TOML lacks, becomes the string "none"."""
    out: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, tuple):
            value = list(value)
        out[item.name] = "none" if value is None else value
    return out


def from_dict(cls: type[Config], values: dict[str, Any], where: str = "config") -> Config:
    """The config of class `cls` from a nested dict; fields left out keep their defaults.

    Raises InputError naming `where` and the field for an unknown field or a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise InputError(f"{where} = {values!r}: expected a table")
    hints = get_type_hints(cls)
    kwargs = {}
    for name, value in values.items():
        if name not in hints:
            raise InputError(f"{where}: unknown field {name!r}; expected one of {', '.join(hints)}")
        kwargs[name] = _convert(hints[name], value, f"{where}.{name}")
    return cls(**kwargs)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        if value == "none" or value is None:
            return None
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise InputError(f"{where} = {value!r}: expected one of {', '.join(map(repr, get_args(hint)))}")
        return value
    if get_origin(hint) is tuple:
        return tuple(_convert(get_args(hint)[0], item, where) for item in _as_list(value, where))
    return _convert_scalar(hint, value, where)


def _convert_scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise InputError(f"{where} = {value!r}: expected {hint.__name__}")
    return value


def _as_list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{where} = {value!r}: expected a list")
    return list(value)
