"""The demonstration: every file of it at a tiny size, and at its full size what it is there to show."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ppomax.engine import demo
from ppomax.engine.demo import DemoConfig, run_demo
from ppomax.engine.errors import InputError
from ppomax.engine.evaluation import Evaluation
from ppomax.engine.metrics import read_metrics
from ppomax.engine.report import evaluation_rows, markdown_table
from ppomax.engine.runs import RunFolder
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

TINY = DemoConfig(
    sft_dialogues=64, pairs=64, prompts=24, held_out_prompts=8, vocab_size=400, sft_steps=3, rm_steps=3, iterations=2,
    rollouts=8, eval_every=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Evaluation]]:
    """Both arms, side by side in two processes."""
    folder = tmp_path_factory.mktemp("demo") / "compared"
    return folder, run_demo(TINY, ("ppo-max", "vanilla"), folder)


def assert_complete(folder: Path, arms: list[str]) -> None:
    """Data, models that load in plain transformers, figures of each stage, table and curves."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["data", "sft", "rm", *arms, "report.md", "curves.png"]
    )
    lines = {path.stem: len(path.read_text().splitlines()) for path in (folder / "data").iterdir()}
    assert lines == {"sft": 64, "pairs": 64, "prompts": 24, "held_out": 8}
    for name in ("sft", *arms):
        assert AutoModelForCausalLM.from_pretrained(folder / name).config.hidden_size == 96
        assert AutoTokenizer.from_pretrained(folder / name).get_vocab().keys() >= {"<pad>", "</s>"}
    for path in (folder / "rm", *(folder / arm / "critic" for arm in arms)):
        assert AutoModelForSequenceClassification.from_pretrained(path).num_labels == 1
    for arm in arms:
        stages = [record["stage"] for record in read_metrics(folder / arm / "metrics.jsonl")]
        assert stages[-2:] == ["ppo", "ppo"]
        assert ("critic" in stages) == (arm == "ppo-max")
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def assert_reported(folder: Path, evaluations: dict[str, Evaluation]) -> None:
    """report.md has the table of these evaluations, eight samples and the curves."""
    text = (folder / "report.md").read_text()
    assert text.startswith("8 held-out prompts, one answer each\n\n")
    assert markdown_table(evaluation_rows("SFT", evaluations)) in text
    assert "| gold, win / tie / lose |" in text
    assert "| learned reward, mean |" in text
    samples, figure = text.strip().split("\n\n")[-2:]
    assert len(samples.splitlines()) == 2 + 8
    assert figure == "![curves](curves.png)"


@pytest.mark.parametrize("arm", ["ppo-max", "vanilla"])
def test_one_arm(arm: str, tmp_path: Path, compared: Any, weights_of: Callable, figures_of: Callable) -> None:
    """In this process; and with the same bits as side by side with the other arm."""
    threads = torch.get_num_threads()
    evaluations = run_demo(TINY, (arm,), tmp_path / "demo")
    assert list(evaluations) == [arm]
    assert_complete(tmp_path / "demo", [arm])
    assert_reported(tmp_path / "demo", evaluations)
    assert torch.get_num_threads() == threads
    assert figures_of(tmp_path / "demo" / arm) == figures_of(compared[0] / arm)
    alone, beside = (weights_of(folder / arm) for folder in (tmp_path / "demo", compared[0]))
    assert alone.keys() == beside.keys()
    assert all(torch.equal(weight, beside[name]) for name, weight in alone.items())


def test_both_arms(compared: tuple[Path, dict[str, Evaluation]]) -> None:
    folder, evaluations = compared
    assert list(evaluations) == ["ppo-max", "vanilla"]
    assert_complete(folder, ["ppo-max", "vanilla"])
    assert_reported(folder, evaluations)
    one, other = evaluations.values()
    assert [r.response for r in one.baseline.rollouts] == [r.response for r in other.baseline.rollouts]


def test_the_arms_differ_as_the_presets_do(compared: Any) -> None:
    ppo_max, vanilla = (RunFolder.open(compared[0] / arm).config(demo.PPOConfig) for arm in ("ppo-max", "vanilla"))
    assert ppo_max.kl_coef > 0 == vanilla.kl_coef
    assert ppo_max.ptx_coef > 0 == vanilla.ptx_coef
    assert (ppo_max.reward.transform, vanilla.reward.transform) == ("normalize", "none")
    assert (ppo_max.value_clip, vanilla.value_clip) == (0.2, None)
    assert ppo_max.critic_pretrain_iterations > 0 == vanilla.critic_pretrain_iterations
    shared = (
        "rollout",
        "runtime",
        "iterations",
        "rollouts_per_iteration",
        "minibatch_size",
        "gae_lambda",
        "eval_every",
    )
    assert all(getattr(ppo_max, name) == getattr(vanilla, name) for name in shared)
    assert (ppo_max.policy_optim.lr, ppo_max.critic_optim.lr) == (vanilla.policy_optim.lr, vanilla.critic_optim.lr)


def test_the_learned_reward_and_gold_are_both_measured_on_held_out_prompts(compared: Any) -> None:
    folder, evaluations = compared
    held_out = [json.loads(line)["messages"][0]["content"] for line in (folder / "data/held_out.jsonl").open()]
    for arm, evaluation in evaluations.items():
        assert [prompt.messages[-1]["content"] for prompt in evaluation.policy.prompts] == held_out
        assert list(evaluation.policy.scores) == ["learned reward", "gold"]
        last = read_metrics(folder / arm / "metrics.jsonl")[-1]
        # The run's last measurement and the final evaluation are of the same policy with the same seeds.
        assert last["eval/judge_mean"] == pytest.approx(float(evaluation.policy.scores["gold"].mean()), abs=1e-6)
        assert last["eval/score_mean"] == pytest.approx(
            float(evaluation.policy.scores["learned reward"].mean()), abs=1e-5
        )


# Where it goes


def test_a_second_demonstration_gets_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "demo-2", "demo-3"):
        folder = demo._new_folder(None)
        assert folder == Path("runs") / name
        folder.mkdir(parents=True)


def test_a_folder_in_use_is_refused(tmp_path: Path, ppomax: Callable, files_in: Callable) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=f"{tmp_path} is not empty: choose another --out"):
        run_demo(TINY, out=tmp_path)
    assert ppomax("demo", "--out", tmp_path).complaint == f"{tmp_path} is not empty: choose another --out"
    assert "thesis.tex is not empty" in ppomax("demo", "--out", tmp_path / "thesis.tex").complaint
    assert files_in(tmp_path) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_a_seed_that_cannot_be(seed: int, tmp_path: Path, ppomax: Callable) -> None:
    complaint = ppomax("demo", "--seed", seed, "--out", tmp_path / "demo").complaint
    assert complaint == f"RuntimeConfig.seed = {seed}: expected a whole number >= 0 and <= 2147483647"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "arms", "seed"),
    [
        ((), ("ppo-max",), 0),
        (("--preset", "vanilla"), ("vanilla",), 0),
        (("--compare", "--seed", "3"), demo.Arm.__args__, 3),
    ],
)
def test_the_command(
    flags: tuple[str, ...], arms: tuple[str, ...], seed: int, ppomax: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(demo, "run_demo", lambda *arguments: calls.append(arguments))
    assert ppomax("demo", *flags).code == 0
    assert calls == [(DemoConfig(seed=seed), arms, None)]


def test_when_one_arm_fails_the_other_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[str] = []

    class Process:
        def __init__(self, target: Any, args: tuple[Any, ...]) -> None:
            self.arm = args[1]
            self.exitcode = 1 if self.arm == "vanilla" else 0
            self.start = self.join = lambda: None

        def terminate(self) -> None:
            stopped.append(self.arm)

    monkeypatch.setattr(demo.multiprocessing, "get_context", lambda kind: SimpleNamespace(Process=Process))
    with pytest.raises(InputError, match="training vanilla ended with exit code 1"):
        demo._train_arms(TINY, ("ppo-max", "vanilla"), tmp_path, {})
    assert stopped == ["ppo-max", "vanilla"]


# At its full size


@pytest.mark.slow
def test_vanilla_ppo_is_over_optimised_and_ppo_max_is_not(tmp_path: Path) -> None:
    """The paper's point: the learned reward does not show the collapse, gold and KL do."""
    evaluations = run_demo(DemoConfig(), ("ppo-max", "vanilla"), tmp_path / "demo")
    ppo_max, vanilla = (evaluations[arm].policy.summary() for arm in ("ppo-max", "vanilla"))
    sft = evaluations["ppo-max"].baseline.summary()
    assert vanilla["learned reward_mean"] > ppo_max["learned reward_mean"] > sft["learned reward_mean"]
    assert vanilla["gold_mean"] < min(ppo_max["gold_mean"], sft["gold_mean"]) - 0.2
    assert vanilla["kl/ref_per_response"] > 3 * ppo_max["kl/ref_per_response"] > 0
