"""The NeMo-RL adapter against loops over NeMo-RL's documented conventions."""

import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ppomax.kernels.adapters.nemo_rl import ClippedPGLossFn, MseValueLossFn

BASE = {"ratio_clip_min": 0.15, "ratio_clip_max": 0.3, "reference_policy_kl_penalty": 0.0}
CORRECTED = {"use_importance_sampling_correction": True}
CASES: dict[str, dict[str, Any]] = {
    "clipped": {},
    "dual": {"ratio_clip_c": 1.4},
    "on-policy": {"force_on_policy_ratio": True},
    "kl": {"reference_policy_kl_penalty": 0.3, "kl_input_clamp_value": 0.5, "kl_output_clamp_value": 0.1},
    "kl-unclamped": {
        "reference_policy_kl_penalty": 0.3, "kl_input_clamp_value": None, "kl_output_clamp_value": None,
    },
    "kl-k2": {"reference_policy_kl_penalty": 0.3, "reference_policy_kl_type": "k2"},
    "kl-off-policy": {"reference_policy_kl_penalty": 0.3, "use_on_policy_kl_approximation": True},
    "kl-in-reward": {"reference_policy_kl_penalty": 0.3, "use_kl_in_reward": True},
    "corrected": CORRECTED,
    "tis": {**CORRECTED, "truncated_importance_sampling_type": "tis", "truncated_importance_sampling_ratio": 1.1},
    "icepop": {
        **CORRECTED, "truncated_importance_sampling_type": "icepop", "truncated_importance_sampling_ratio": 1.2,
        "truncated_importance_sampling_ratio_min": 0.8,
    },
    "seq-mask": {
        **CORRECTED, "truncated_importance_sampling_type": "seq-mask-tis", "truncated_importance_sampling_ratio": 1.1,
        "truncated_importance_sampling_ratio_min": 0.8,
    },
}  # fmt: skip
TOTALS = {"tokens": 77.0, "samples": 12.0}


def data_of(f: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """(fields [B, S] with a first column that nothing may look at, totals of the global batch)."""
    names = {
        "prev_logprobs": "old_logprobs", "generation_logprobs": "rollout_logprobs",
        "reference_policy_logprobs": "ref_logprobs", "advantages": "advantages",
    }  # fmt: skip
    data = {name: torch.nn.functional.pad(getattr(f, field), (1, 0), value=math.nan) for name, field in names.items()}
    data["token_mask"] = torch.nn.functional.pad(f.mask.to(f.dtype), (1, 0), value=1.0)
    data["sample_mask"] = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0], dtype=f.dtype)
    f.mask[2] = False
    return data, torch.tensor(TOTALS["samples"]), torch.tensor(TOTALS["tokens"])


def kl_of(new: float, ref: float, o: dict[str, Any]) -> tuple[float, float]:
    """(value, derivative) of one token's KL estimate."""
    inside, outside = o.get("kl_input_clamp_value", 20.0), o.get("kl_output_clamp_value", 10.0)
    inside, outside = (math.inf if bound is None else bound for bound in (inside, outside))
    d = max(-inside, min(inside, new - ref))
    k2 = o.get("reference_policy_kl_type") == "k2"
    value, slope = (d * d / 2, d) if k2 else (math.exp(-d) - 1 + d, 1 - math.exp(-d))
    if d != new - ref or abs(value) > outside:
        slope = 0.0
    return max(-outside, min(outside, value)), slope


def importance(f: Any, loops: Any, o: dict[str, Any]) -> tuple[list[list[float]], list[list[float]]]:
    """(each token's weight, 1 where it or its sample is out of bounds)."""
    kind, high = o.get("truncated_importance_sampling_type"), o.get("truncated_importance_sampling_ratio", math.inf)
    low = o.get("truncated_importance_sampling_ratio_min", 0.0)
    old = f.rows("logprobs" if o.get("force_on_policy_ratio") else "old_logprobs")
    weights, outside = [], []
    for p, g, flags in zip(old, f.rows("rollout_logprobs"), f.keep, strict=True):
        ratios = [math.exp(x - y) if k else 1.0 for x, y, k in zip(p, g, flags, strict=True)]
        judged = ratios
        if kind == "seq-mask-tis":
            judged = [math.exp(loops.row_mean([math.log(x) for x in ratios], flags))] * len(ratios)
        outside.append([float(not (kind == "tis" or low <= x) or x > high) for x in judged])
        clamped = [min(x, high) for x in ratios]
        dropped = [0.0 if out else x for x, out in zip(ratios, outside[-1], strict=True)]
        weights.append(clamped if kind == "tis" else dropped if kind else ratios)
    return weights, outside


@pytest.mark.parametrize("token_level", [True, False], ids=["tokens", "samples"])
@pytest.mark.parametrize("name", CASES)
def test_loss(name: str, token_level: bool, fields: Any, loops: Any, same: Any) -> None:
    o = BASE | CASES[name]
    f = fields()
    data, samples, tokens = data_of(f)
    new = f.leaf("logprobs")
    loss, metrics = ClippedPGLossFn({**o, "token_level_loss": token_level})(new, data, samples, tokens)

    factors, outside = importance(f, loops, o)
    used = factors if o.get("use_importance_sampling_correction") else [[1.0] * 9] * 5
    old = "logprobs" if o.get("force_on_policy_ratio") else "old_logprobs"
    terms = loops.tokens(
        f, lambda n, p, a: loops.clipped(n, p, a, 0.15, 0.3, o.get("ratio_clip_c")), "logprobs", old, "advantages"
    )
    mode, total = ("token-mean", 77.0) if token_level else ("seq-mean-token-mean", 12.0)
    plain = loops.weights(f.keep, mode, total)
    w = [[x * y for x, y in zip(*row, strict=True)] for row in zip(plain, used, strict=True)]
    expected, slope = loops.total(w, terms), loops.slopes(w, terms)
    coef = 0.0 if o.get("use_kl_in_reward") else o["reference_policy_kl_penalty"]

    def kl(n: float, r: float, g: float) -> SimpleNamespace:
        value, slope = kl_of(n, r, o)
        weight = math.exp(n - g) if o.get("use_on_policy_kl_approximation") else 1.0
        return SimpleNamespace(term=weight * value, slope=weight * slope)

    if coef:
        kls = loops.tokens(f, kl, "logprobs", "ref_logprobs", "rollout_logprobs")
        expected += coef * loops.total(plain, kls)
        slope = [
            [x + coef * y for x, y in zip(*row, strict=True)]
            for row in zip(slope, loops.slopes(plain, kls), strict=True)
        ]
        same(metrics["kl_penalty"], loops.total(plain, kls))
    else:
        assert metrics["kl_penalty"] == 0.0
    same(loss, expected)
    same(metrics["loss"], expected)
    same(torch.autograd.grad(loss, new)[0], slope)
    part = loops.weights(f.keep, "token-mean", 77.0)
    same(
        metrics["sampling_importance_ratio"],
        sum(x * y for r in zip(part, factors, strict=True) for x, y in zip(*r, strict=True)),
    )
    if "truncated_importance_sampling_type" not in o:
        assert "is_oob_ratio" not in metrics
    elif name == "seq-mask":
        same(metrics["is_oob_ratio"], sum(row[0] for i, row in enumerate(outside) if i != 2) / 12.0)
    else:
        same(
            metrics["is_oob_ratio"],
            sum(x * y for r in zip(part, outside, strict=True) for x, y in zip(*r, strict=True)),
        )


@pytest.mark.parametrize("on_policy", [False, True])
def test_one_ratio_a_sample(on_policy: bool, fields: Any, loops: Any, same: Any) -> None:
    """On policy every token has its own ratio, of 1; samples are weighted by the product of their tokens' ratios."""
    f = fields()
    data, samples, tokens = data_of(f)
    new = f.leaf("logprobs")
    o = BASE | CORRECTED | {"sequence_level_importance_ratios": True, "token_level_loss": False, "ratio_clip_min": 0.05}
    loss, metrics = ClippedPGLossFn(o | {"force_on_policy_ratio": on_policy})(new, data, samples, tokens)
    plain = loops.weights(f.keep, "seq-mean-token-mean", 12.0)
    expected, slope, weights = 0.0, [], []
    old = "logprobs" if on_policy else "old_logprobs"
    rows = zip(*(f.rows(x) for x in ("logprobs", old, "rollout_logprobs", "advantages")), f.keep, strict=True)
    for w, (n, p, g, a, flags) in zip(plain, rows, strict=True):
        ratio = loops.row_mean([x - y for x, y in zip(n, p, strict=True)], flags)
        weights.append(math.exp(sum(x - y for x, y, k in zip(p, g, flags, strict=True) if k)))
        terms = [
            loops.clipped(ratio, 0.0, x, 0.05, 0.3, None, None, weights[-1]) if k else None
            for x, k in zip(a, flags, strict=True)
        ]
        expected += loops.total([w], [terms])
        (own,) = loops.slopes([w], [terms])
        shared = [sum(own) * k / max(sum(flags), 1) for k in flags]
        slope.append(own if on_policy else shared)
    same(loss, expected)
    same(torch.autograd.grad(loss, new)[0], slope)
    same(metrics["sampling_importance_ratio"], sum(x for i, x in enumerate(weights) if i != 2) / 12.0)


def test_metrics(fields: Any, loops: Any, same: Any) -> None:
    f = fields()
    data, samples, tokens = data_of(f)
    _, metrics = ClippedPGLossFn(BASE)(f.logprobs, data, samples, tokens)

    def token(n: float, p: float, g: float) -> SimpleNamespace:
        ratio, mixture = math.exp(n - p), 0.5 * math.exp(p) + 0.5 * math.exp(g)
        js = 0.5 * (math.exp(p) / mixture - 1 - math.log(math.exp(p) / mixture))
        js += 0.5 * (math.exp(g) / mixture - 1 - math.log(math.exp(g) / mixture))
        return SimpleNamespace(
            probs_ratio=ratio,
            probs_ratio_clamped=min(max(ratio, 0.85), 1.3),
            token_mult_prob_error=math.exp(abs(g - p)),
            gen_kl_error=math.exp(p - g) - 1 - (p - g),
            policy_kl_error=math.exp(g - p) - 1 - (g - p),
            js_divergence_error=js,
            approx_entropy=-math.exp(n - g) * n,
        )

    kept = loops.tokens(f, token, "logprobs", "old_logprobs", "rollout_logprobs")
    for name in vars(token(-1.0, -1.0, -1.0)):
        values = [getattr(t, name) for row in kept for t in row if t]
        same(metrics[name], sum(values) / 77.0)
        if name.startswith("probs_ratio"):
            same(metrics[f"{name}_min"], min(values))
            same(metrics[f"{name}_max"], max(values))
    assert metrics["num_valid_samples"] == 4


def test_nothing_to_train_on(fields: Any) -> None:
    f = fields()
    data, samples, tokens = data_of(f)
    data["sample_mask"][:] = 0.0
    new = f.leaf("logprobs")
    loss, metrics = ClippedPGLossFn(BASE | {"reference_policy_kl_penalty": 0.1})(new, data, samples, tokens)
    assert float(loss.detach()) == 0.0
    assert bool((torch.autograd.grad(loss, new)[0] == 0).all())
    assert metrics["probs_ratio_min"] == -metrics["probs_ratio_max"] == math.inf
    assert metrics["probs_ratio"] == metrics["num_valid_samples"] == 0.0


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_loss(clip: float | None, fields: Any, loops: Any, same: Any) -> None:
    f = fields()
    f.mask[2] = False
    data = {
        "token_mask": f.mask.to(f.dtype), "sample_mask": torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]), "returns": f.returns,
    }  # fmt: skip
    if clip is not None:
        data["values"] = f.old_values
    values = f.leaf("values")
    function = MseValueLossFn(SimpleNamespace(scale=0.7, cliprange=clip))
    loss, metrics = function(values[..., None], data, torch.tensor(12.0), torch.tensor(77.0))
    tokens = loops.tokens(f, lambda v, o, r: loops.critic(v, o, r, clip, 0.35), "values", "old_values", "returns")
    w = loops.weights(f.keep, "token-mean", 77.0)
    same(loss, loops.total(w, tokens))
    same(torch.autograd.grad(loss, values)[0], loops.slopes(w, tokens))
    pairs = [
        (v, r)
        for row in zip(f.rows("values"), f.rows("returns"), f.keep, strict=True)
        for v, r, k in zip(*row, strict=True)
        if k
    ]
    same(metrics["vf_clipfrac"], loops.share(tokens, "held") * len(pairs) / 77.0)
    expected = {
        "values_mean": sum(v for v, _ in pairs) / 77.0,
        "returns_mean": sum(r for _, r in pairs) / 77.0,
        "returns_sq_mean": sum(r * r for _, r in pairs) / 77.0,
        "residual_sq_mean": sum((r - v) ** 2 for v, r in pairs) / 77.0,
        "values_min": min(v for v, _ in pairs),
        "values_max": max(v for v, _ in pairs),
        "num_valid_samples": 5.0,
    }
    for name, value in expected.items():
        same(float(metrics[name]), value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disable_ppo_ratio": True}, "disable_ppo_ratio"),
        ({"use_cispo": True}, "use_cispo"),
        ({"positive_example_nll_weight": 0.1}, "positive_example_nll_weight"),
        ({"sequence_level_importance_ratios": True}, "token_level_loss"),
        ({"truncated_importance_sampling_ratio": 2.0}, "truncated_importance_sampling_type"),
        (
            {"truncated_importance_sampling_ratio": 2.0, "truncated_importance_sampling_type": "tis"},
            "use_importance_sampling_correction",
        ),
        (
            CORRECTED | {"truncated_importance_sampling_ratio": 2.0, "truncated_importance_sampling_type": "icepop"},
            "ratio_min",
        ),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClippedPGLossFn(SimpleNamespace(**options))


def test_kinds_and_pickling(fake_package: Any) -> None:
    """What the trainer asks of a loss function, and how it reaches the workers."""
    kinds = SimpleNamespace(TOKEN_LEVEL="token", SEQUENCE_LEVEL="sequence", LOGPROB="logprob", LOGIT="logit")
    fake_package("nemo_rl.algorithms.loss.interfaces", LossType=kinds, LossInputType=kinds)
    policy = pickle.loads(pickle.dumps(ClippedPGLossFn({"token_level_loss": False, "ratio_clip_max": 0.4})))
    assert (policy.loss_type, policy.input_type) == ("sequence", "logprob")
    assert policy.options.ratio_clip_max == 0.4
    value = MseValueLossFn({})
    assert (value.loss_type, value.input_type, value.scale, value.cliprange) == ("token", "logit", 1.0, None)
