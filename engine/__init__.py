"""The ppomax engine: `from ppomax.engine import PPOTrainer, preset`.

The names below are imported when they are first used, so that `ppomax --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "ppomax.engine":
    raise ImportError(
        f"imported as {__name__!r}: the package is called ppomax.engine; under another name every class would "
        "exist twice. Install the project (pip install -e .) and write `import ppomax.engine`"
    )

if TYPE_CHECKING:
    from .config import PPOConfig, RewardModelConfig, RolloutConfig, SFTConfig
    from .evaluation import evaluate
    from .models import load_critic, load_policy, load_reward_model
    from .presets import preset
    from .reward_model import train_reward_model
    from .rollout import RolloutEngine
    from .sft import train_sft
    from .trainer import PPOTrainer

_HOMES = {
    "PPOConfig": "config",
    "PPOTrainer": "trainer",
    "RewardModelConfig": "config",
    "RolloutConfig": "config",
    "RolloutEngine": "rollout",
    "SFTConfig": "config",
    "evaluate": "evaluation",
    "load_critic": "models",
    "load_policy": "models",
    "load_reward_model": "models",
    "preset": "presets",
    "train_reward_model": "reward_model",
    "train_sft": "sft",
}

__all__ = [
    "PPOConfig",
    "PPOTrainer",
    "RewardModelConfig",
    "RolloutConfig",
    "RolloutEngine",
    "SFTConfig",
    "evaluate",
    "load_critic",
    "load_policy",
    "load_reward_model",
    "preset",
    "train_reward_model",
    "train_sft",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
