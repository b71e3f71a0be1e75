"""`PPOTrainer`: a PPO run from folders and files, iteration by iteration, saved and resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from .batch import Prompt
from .checkpoint import atomic_folder, load_state, save_model
from .config import PPOConfig
from .data import OnBad, Paths, read_dialogues, read_prompts, split_by_context
from .errors import InputError
from .evaluation import answer_and_judge
from .lora import adapt, check_lora, has_adapter, merged, save_adapter
from .metrics import StageProgress
from .models import (
    Model,
    Placement,
    ScalarModel,
    as_critic,
    check_same_tokenizer,
    check_vocabulary,
    load_critic,
    load_policy,
    load_tokenizer,
    trainable_copy,
)
from .parallel import Ranks
from .ppo import PPO
from .prompts import encode_prompts
from .rewards import ModelReward, Reward, RewardFunction, Source, is_function, make_reward, qualified_name
from .run_plan import RunPlan
from .runs import Inputs, RunFolder
from .templates import Encoded, Style, Template, encode_all


@dataclass(frozen=True)
class Step:
    """One finished iteration, or one rollout batch of critic pre-training."""

    stage: Literal["critic", "ppo"]
    number: int
    """From 1"""
    metrics: dict[str, float]


# What stands beside the progress bar, and under which name.
SHOWN = {
    "critic": {"fresh_loss": "critic/fresh_loss"},
    "ppo": {
        "score_mean": "reward/score_mean",
        "judge_mean": "reward/judge_mean",
        "kl_ref_per_response": "kl/ref_per_response",
        "length_mean": "response/length_mean",
        "ppl_reference": "ppl/reference",
    },
}


class PPOTrainer:
    """Iterate over it to train: each item is one finished iteration (those of critic pre-training come first).

    Under torchrun each process makes one and iterates; steps are equal on all, one process writes.

    Args:
        config: `preset("ppo-max")` and the like.
        policy: Hugging Face folder; also the frozen reference.
        reward: a reward-model folder, `module:function`, or `fn(prompts, responses) -> scores` where a prompt is a
            list of chat messages.
        prompts: file or files to sample responses for.
        critic: folder to start the critic from; default: the reward model, or the policy's trunk with a zero head
            where the reward is a function, and always so with `config.lora`.
        ptx: files of dialogues for PPO-ptx; needed where `config.ptx_coef` > 0.
        eval_prompts: files of held-out prompts, answered every `config.eval_every` iterations.
        judge: a second reward that is measured beside the first and never optimised.
        template: how dialogues become text: `chat`, the tokenizer's template; `en`, `zh`, the paper's; `auto`, the
            tokenizer's where it has one, else `en`.
        on_bad: what to do with a record that cannot be used: `raise`, or `skip` it.
        out: run folder; None keeps nothing on disk until `save`.
        overwrite: replace a run that `out` already holds.

    Raises:
        InputError: unusable files, folders or values, before anything is written.
    """

    def __init__(
        self,
        config: PPOConfig,
        policy: str | Path,
        reward: Source,
        prompts: Paths,
        *,
        critic: str | Path | None = None,
        ptx: Paths | None = None,
        eval_prompts: Paths | None = None,
        judge: Source | None = None,
        template: Style = "auto",
        on_bad: OnBad = "raise",
        out: str | Path | None = None,
        overwrite: bool = False,
    ) -> None:
        _check_kinds(config, policy, reward)
        inputs: Inputs = {
            "policy": str(policy),
            "reward": _name(reward),
            "prompts": _as_list(prompts),
            "critic": str(critic or ""),
            "ptx": _as_list(ptx),
            "eval_prompts": _as_list(eval_prompts),
            "judge": _name(judge),
            "template": template,
            "on_bad": on_bad,
        }
        self._build(config, inputs, reward=reward, judge=judge)
        create = partial(RunFolder.create, command="ppo", inputs=inputs, config=config, overwrite=overwrite)
        self.run = create(out, ranks=self.ranks) if out else None

    @classmethod
    def resume(
        cls, folder: str | Path, *, reward: RewardFunction | None = None, judge: RewardFunction | None = None
    ) -> PPOTrainer:
        """Continue the run in `folder` from its newest checkpoint, bit for bit on a CPU.

        `reward` and `judge` are needed where the run was given functions that have no `module:function` name.
        """
        run = RunFolder.open(folder)
        inputs, config = run.inputs("ppo"), run.config(PPOConfig)
        checkpoint = run.latest_checkpoint()
        trainer = cls.__new__(cls)
        trainer._build(
            config, inputs, reward=reward or inputs["reward"], judge=judge or inputs["judge"], checkpoint=checkpoint
        )
        state = load_state(checkpoint)
        trainer.ppo.load_state_dict(state["ppo"])
        trainer.iteration, trainer.critic_ready = state["step"], True
        trainer.run = replace(run, ranks=trainer.ranks)
        return trainer

    def _build(
        self, config: PPOConfig, inputs: Inputs, *, reward: Source, judge: Source | None, checkpoint: Path | None = None
    ) -> None:
        self.config, self.inputs = config, inputs
        self.iteration, self.critic_ready = 0, config.critic_pretrain_iterations == 0
        self.ranks = ranks = Ranks.of(config.runtime)
        placement = Placement.of(config.runtime)
        self.tokenizer = load_tokenizer(inputs["policy"])
        self.template = Template(self.tokenizer, inputs["template"])
        prompts, self.eval_prompts = self._read_prompts()
        ranks.check_same("held-out prompts", (prompt.tokens for prompt in self.eval_prompts))
        lora = config.lora.rank > 0
        if lora:
            check_lora(config.lora, inputs["critic"])
        base = load_policy(inputs["policy"], placement if lora else ranks.placement(placement, frozen=True))
        check_vocabulary(self.tokenizer, base, inputs["policy"])
        if config.eval_every and not self.eval_prompts:
            raise InputError("PPOConfig.eval_every > 0 needs held-out prompts: set held_out, or give files of them")
        frozen: dict[Path, Model] = {Path(inputs["policy"]).resolve(): base}
        sources = {"score": reward, **({"judge": judge} if judge else {})}
        self.judges = self._make_judges(sources, placement, frozen)
        if lora:
            policy, reference, critic = adapt(base, config.lora, config.runtime.seed, checkpoint)
        else:
            reference, trained = base, ranks.placement(placement)
            policy = load_policy(checkpoint / "policy", trained) if checkpoint else trainable_copy(base, trained)
            folder = checkpoint / "critic" if checkpoint else _critic_folder(inputs, reward)
            critic = self._make_critic(folder, trained, frozen)
        self.ppo = PPO(
            config,
            policy=policy,
            reference=reference,
            critic=critic,
            reward=self.judges["score"],
            judge=self.judges.get("judge"),
            prompts=prompts,
            stop_tokens=self.template.eos_token_ids,
            ptx=self._ptx_dialogues(),
            decode=self.tokenizer.decode,
            ranks=ranks,
        )

    def _read_prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        """Prompts to train on, and held-out ones: from files of their own, else a share of all by context."""
        config, inputs = self.config, self.inputs
        seen = read_prompts(inputs["prompts"], inputs["on_bad"])
        if inputs["eval_prompts"]:
            held_out = read_prompts(inputs["eval_prompts"], inputs["on_bad"])
        else:
            seen, held_out = split_by_context(seen, config.held_out, config.runtime.seed)
        encode = partial(encode_prompts, self.template, limit=config.max_prompt, on_bad=inputs["on_bad"])
        return encode(seen), encode(held_out)

    def _make_judges(
        self, sources: Mapping[str, Source], placement: Placement, frozen: dict[Path, Model]
    ) -> dict[str, Reward]:
        """A reward for each name; those from one folder are one. Enters their models in `frozen`."""
        made: dict[object, Reward] = {}
        for source in sources.values():
            if _key(source) in made:
                continue
            made[_key(source)] = judge = make_reward(
                source, self.template, placement, self.config.micro_batch_tokens, self.ranks
            )
            if isinstance(judge, ModelReward):
                frozen[Path(str(source)).resolve()] = judge.model
        return {name: made[_key(source)] for name, source in sources.items()}

    def _make_critic(self, folder: str | Path, placement: Placement, frozen: Mapping[Path, Model]) -> ScalarModel:
        """The critic in `folder`: where a frozen model came from there, a copy of it in memory, not a second read."""
        loaded = frozen.get(Path(folder).resolve())
        critic = load_critic(folder, placement) if loaded is None else trainable_copy(as_critic(loaded), placement)
        check_same_tokenizer(self.tokenizer, load_tokenizer(folder), f"the policy and the critic in {folder}")
        check_vocabulary(self.tokenizer, critic, folder)
        return critic

    def _ptx_dialogues(self) -> list[Encoded]:
        if not self.config.ptx_coef:
            return []
        if not self.inputs["ptx"]:
            raise InputError(
                f"PPOConfig.ptx_coef = {self.config.ptx_coef:g} needs files of dialogues (ptx); 0 turns PPO-ptx off"
            )
        dialogues = read_dialogues(self.inputs["ptx"], self.inputs["on_bad"])
        dialogues, _ = split_by_context(dialogues, self.config.held_out, self.config.runtime.seed)
        encode = partial(self.template.encode_dialogue, limit=self.config.max_sequence)
        return encode_all(encode, dialogues, self.inputs["on_bad"])

    def __iter__(self) -> Iterator[Step]:
        """Run what is left of the run; where there is a run folder, log and save there as it goes, and the models at
        the end."""
        yield from self._recorded("critic", self._pretrain())
        yield from self._recorded("ppo", self._iterate())
        self._save_result()

    def train(self, name: str = "ppo", *, plain: bool = False) -> None:
        """Run what is left under a progress display; the models end up in the run folder where there is one."""
        config = self.config
        stages = (
            ("critic", self._pretrain(), f"{name} critic", 0, config.critic_pretrain_iterations, "batch"),
            ("ppo", self._iterate(), name, self.iteration, config.iterations, "iteration"),
        )
        planned = RunPlan(self.ppo, name)
        planned.show()
        for stage, steps, title, done, total, unit in stages:
            if stage == "critic" and self.critic_ready:
                continue
            with StageProgress(title, total, done=done, unit=unit, plain=plain) as progress:
                self.ppo.engine.watch = self._watcher(progress)
                for step in self._recorded(stage, steps):
                    metrics = step.metrics
                    shown = {label: metrics[name] for label, name in SHOWN[stage].items() if name in metrics}
                    progress.update(step.number, **shown)
                    planned.add(metrics)
        planned.compare()
        self._save_result()

    def _watcher(self, progress: StageProgress) -> Callable[[int, int], None]:
        before = self.ppo.engine.statistics

        def watch(done: int, wanted: int) -> None:
            figures = self.ppo.engine.statistics.since(before).metrics()
            speed, hits = figures["time/tokens_per_second"], figures["rollout/cache_hit_rate"]
            progress.note(f"sampling {done}/{wanted}  {speed:.0f} tokens/s  {hits:.0%} of prompt tokens from the cache")

        return watch

    def _pretrain(self) -> Iterator[Step]:
        if self.critic_ready:
            return
        for metrics in self.ppo.pretrain_critic():
            yield Step("critic", self.ppo.batches, metrics)
        self.critic_ready = True
        self._save_checkpoint()

    def _iterate(self) -> Iterator[Step]:
        every = self.config.eval_every
        while self.iteration < self.config.iterations:
            metrics = self.ppo.iterate()
            self.iteration += 1
            last = self.iteration == self.config.iterations
            if every and (last or self.iteration % every == 0):
                metrics |= self.evaluate()
            yield Step("ppo", self.iteration, metrics)

    def _recorded(self, stage: str, steps: Iterator[Step]) -> Iterator[Step]:
        """The steps, each logged and, where it is time, saved in the run folder before it is handed on."""
        if self.run is None:
            yield from steps
            return
        done = self.ppo.batches if stage == "critic" else self.iteration
        try:
            with closing(self.run.log(stage, after=done)) as log:
                for step in steps:
                    log.write(step.number, step.metrics)
                    if stage == "ppo":
                        self._save_when_due()
                    yield step
        except InputError:
            self.run.remove_if_unused()
            raise

    def evaluate(self) -> dict[str, float]:
        """Metrics `eval/...` of one response to each held-out prompt, drawn with the same seeds each time.

        Raises InputError where the run has no held-out prompts.
        """
        if not self.eval_prompts:
            raise InputError("nothing to evaluate on: set PPOConfig.held_out, or give files of held-out prompts")
        answers = answer_and_judge(
            self.ppo.engine,
            self.ppo.reference,
            self.eval_prompts,
            self.judges,
            micro_batch_tokens=self.config.micro_batch_tokens,
            seed=self.config.runtime.seed,
            ranks=self.ranks,
        )
        return {f"eval/{name}": value for name, value in answers.summary().items()}

    def _save_when_due(self) -> None:
        if self.iteration == self.config.iterations or self.iteration % self.config.runtime.save_every == 0:
            self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        if self.run is None:
            return
        models: dict[str, Model] = {"policy": self.ppo.policy, "critic": self.ppo.critic}
        state = {"ppo": self.ppo.state_dict()}
        keep = self.config.runtime.keep_checkpoints
        self.run.save_checkpoint(self.iteration, models, self.tokenizer, state, keep)

    def _save_result(self) -> None:
        if self.run is not None:
            self.save(self.run.path)

    def save(self, folder: str | Path) -> None:
        """Write the policy as a Hugging Face folder, and the critic beside it in `folder/critic`.

        With LoRA both are merged; what was trained is in `folder/adapter` and `folder/critic/adapter`, for peft.
        """
        folder = Path(folder)
        models: list[tuple[Model, Path]] = [(self.ppo.critic, folder / "critic"), (self.ppo.policy, folder)]
        for model, place in models:
            place.mkdir(parents=True, exist_ok=True)
            if not has_adapter(model):
                save_model(model, self.tokenizer, place, write=self.ranks.is_main)
            elif self.ranks.is_main:
                with atomic_folder(place / "adapter") as draft:
                    save_adapter(model, draft)
                save_model(merged(model), self.tokenizer, place)


def _check_kinds(config: object, policy: object, reward: object) -> None:
    """Raise InputError where something else was given than what the trainer takes: loaded models, say."""
    kinds: tuple[tuple[str, object, bool, str], ...] = (
        ("config", config, isinstance(config, PPOConfig), 'a PPOConfig, of `preset("ppo-max")`, say'),
        ("policy", policy, isinstance(policy, str | Path), "the path of a Hugging Face folder"),
        (
            "reward",
            reward,
            isinstance(reward, str | Path) or callable(reward),
            "the path of a reward model's folder, module:function, or a function",
        ),
    )
    for name, found, fits, expected in kinds:
        if not fits:
            raise InputError(f"{name}: expected {expected}; found {type(found).__name__}")


def _key(source: Source) -> object:
    """The same for what names the same reward."""
    return id(source) if callable(source) else source if is_function(source) else Path(source).resolve()


def _critic_folder(inputs: Inputs, reward: Source) -> str:
    if inputs["critic"]:
        return inputs["critic"]
    return inputs["policy"] if is_function(reward) else inputs["reward"]


def _as_list(files: Paths | None) -> list[str]:
    if files is None:
        return []
    return [str(files)] if isinstance(files, (str, Path)) else [str(path) for path in files]


def _name(source: Source | None) -> str:
    """How run.toml records a source of rewards."""
    if callable(source):
        return qualified_name(source)
    return str(source or "")
