"""Drawing the next token of each row: repetition penalty, temperature, top-k, top-p, draw.

    z' = z / penalty where z >= 0, z * penalty where z < 0, for each token of `seen`     CTRL, arXiv 1909.05858, section 4.1
    p = softmax(z' / temperature) cut to the top k, renormalised, cut to the top p, renormalised
    token = the first whose cumulative p, in order of token ids, exceeds u

Top-k keeps the k most probable tokens; top-p the smallest set in descending probability whose mass reaches p (arXiv
1904.09751); ties at either border go to the lower id; at least one token is kept.
`u` is a function of the row's (seed, position) alone: the first word of Philox4x32-10 (Salmon et al., SC 2011) with the
seed as key and the position as counter, turned into a float in [0, 1) as `tl.rand(seed, position)` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Option = float | int | Tensor

_LOW_WORD = 0xFFFFFFFF
_PHILOX_ROUNDS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEYS = (0x9E3779B9, 0xBB67AE85)
_CANDIDATES = (64, 1024)  # how many of the largest are looked at for the border of top-p before bisection, on a CPU
_MAX_CANDIDATES = 1024
_ELEMENTS_AT_ONCE = 1 << 19  # of the logits, on a CPU: what stays in cache
_UNIFORM_SCALE = 4.6566127342e-10  # (2^23 - 1) / 2^23 / 2^31, so that the largest word stays below 1 in fp32


class Sample(NamedTuple):
    """tokens [R] int64; logprobs [R] fp32 at temperature 1 on the unprocessed logits; behavior_logprobs [R] fp32 under the
    distribution the token was drawn from."""

    tokens: Tensor
    logprobs: Tensor
    behavior_logprobs: Tensor


def philox(seeds: Tensor, positions: Tensor) -> Tensor:
    """[4, R] int64: the words of Philox4x32-10 with key `seeds` and counter `positions`, both int64 of 64 bits."""
    counter = torch.stack([positions, positions >> 32]) & _LOW_WORD
    return philox_words(
        torch.cat([counter, torch.zeros_like(counter)]), torch.stack([seeds, seeds >> 32]) & _LOW_WORD
    )


def philox_words(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds over counter words [4, R] and key words [2, R], 32-bit words held in int64."""
    steps = torch.arange(10, device=key.device)[:, None, None]
    keys = (key + steps * torch.tensor(_PHILOX_KEYS, device=key.device)[:, None]) & _LOW_WORD
    multipliers = torch.tensor(_PHILOX_ROUNDS, device=key.device)[:, None]
    even, odd = counter[0::2], counter[1::2]
    for round_key in keys:
        product = (even * multipliers).flip(0)  # wraps in int64: the words are those of the unsigned product
        even, odd = ((product >> 32) & _LOW_WORD) ^ odd ^ round_key, product & _LOW_WORD
    return torch.stack([even[0], odd[0], even[1], odd[1]])


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """fp32 in [0, 1), equal to `tl.rand(seed, position)` with a 64-bit position."""
    word = philox(seeds, positions)[0]
    signed = torch.where(word >= 1 << 31, word - (1 << 32), word)
    return torch.where(signed < 0, -signed - 1, signed).to(torch.float32) * _UNIFORM_SCALE


def sample_ref(
    logits: Tensor,
    *,
    temperature: Option = 1.0,
    top_k: Option = 0,
    top_p: Option = 1.0,
    repetition_penalty: Option = 1.0,
    seen: Tensor | None = None,
    seeds: Tensor,
    positions: Tensor,
) -> Sample:
    """`sample` row by row with sorted probabilities in float64."""
    n_rows, vocab = logits.shape
    u = uniform(seeds, positions).double()
    rows = []
    for r in range(n_rows):
        p = processed_probs_ref(
            logits[r],
            temperature=_of_row(temperature, r),
            top_k=int(_of_row(top_k, r)),
            top_p=_of_row(top_p, r),
            repetition_penalty=_of_row(repetition_penalty, r),
            seen=None if seen is None else seen[r],
        )
        cdf = p.cumsum(0)
        token = min(int((cdf <= u[r] * cdf[-1]).sum()), vocab - 1)
        logp = torch.log_softmax(logits[r].double(), 0)[token]
        rows.append((token, float(logp), float(p[token].log())))
    tokens = torch.tensor([t for t, _, _ in rows], dtype=torch.int64)
    values = torch.tensor([v for _, *v in rows], dtype=torch.float64).view(n_rows, 2)
    return Sample(tokens, values[:, 0], values[:, 1])


def processed_probs_ref(
    logits: Tensor, *, temperature: float, top_k: int, top_p: float, repetition_penalty: float, seen: Tensor | None
) -> Tensor:
    """[V] float64: the distribution one row is drawn from, by a stable descending sort."""
    z = logits.double().clone()
    for token in set() if seen is None else set(seen.flatten().tolist()) - {-1}:
        z[token] = z[token] / repetition_penalty if z[token] >= 0 else z[token] * repetition_penalty
    if temperature == 0:
        return torch.zeros_like(z).index_fill_(0, z.argmax(), 1.0)
    p, order = torch.softmax(z / temperature, 0).sort(descending=True, stable=True)
    if 0 < top_k < p.numel():
        p[top_k:] = 0
        p = p / p.sum()
    if top_p < 1:
        p[(p.cumsum(0) - p) >= top_p] = 0
    p[0] = p[0].clamp(min=1e-300)
    return torch.zeros_like(p).index_copy_(0, order, p / p.sum())


def _of_row(option: Option, r: int) -> float:
    return float(option[r] if isinstance(option, Tensor) and option.dim() else option)


class _Options(NamedTuple):
    """Options as columns [R, 1] or scalars; None where an option is off for every row."""

    temperature: Tensor | float | None
    top_k: Tensor | int | None
    top_p: Tensor | float | None
    penalty: Tensor | float | None
    seen: Tensor | None

    def rows(self, rows: slice) -> _Options:
        return _Options(*(o[rows] if isinstance(o, Tensor) and o.dim() else o for o in self))

    @property
    def greedy(self) -> bool:
        return isinstance(self.temperature, float) and self.temperature == 0.0

    @property
    def off(self) -> bool:
        return all(o is None for o in self[:4])


def _option(value: Option, neutral: float, n_rows: int, device: torch.device, name: str) -> Tensor | float | None:
    if not isinstance(value, Tensor):
        return None if value == neutral else float(value)
    if value.dim() and value.shape != (n_rows,):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected a scalar or ({n_rows},)")
    return value.to(device).expand(n_rows)[:, None]


def _options(
    logits: Tensor, temperature: Option, top_k: Option, top_p: Option, penalty: Option, seen: Tensor | None
) -> _Options:
    n_rows, vocab = logits.shape
    top_k = 0 if not isinstance(top_k, Tensor) and not 0 < top_k < vocab else top_k
    top_p = 1.0 if not isinstance(top_p, Tensor) and top_p >= 1.0 else top_p
    temperature_, top_k_, top_p_, penalty_ = (
        _option(value, neutral, n_rows, logits.device, name)
        for value, neutral, name in (
            (temperature, 1.0, "temperature"),
            (top_k, 0, "top_k"),
            (top_p, 1.0, "top_p"),
            (penalty, 1.0, "repetition_penalty"),
        )
    )
    if seen is None or seen.numel() == 0:
        penalty_, seen = None, None
    elif seen.shape[0] != n_rows:
        raise ValueError(f"seen has {seen.shape[0]} rows, logits {n_rows}")
    top_k_ = int(top_k_) if isinstance(top_k_, float) else top_k_
    return _Options(temperature_, top_k_, top_p_, penalty_, seen)


def penalise(logits: Tensor, seen: Tensor, penalty: Tensor | float) -> Tensor:
    """A copy of the logits with the CTRL rule applied once to each distinct token of `seen` [R, L], -1 is padding."""
    some = seen.amax(1, keepdim=True)  # padding repeats this token, in rows of nothing but padding it is -1
    index = torch.where(seen >= 0, seen, some.clamp(min=0))
    z = logits.gather(1, index)
    z = torch.where(some < 0, z, torch.where(z >= 0, z / penalty, z * penalty))
    return logits.scatter(1, index, z)


def cut_top_k(e: Tensor, k: Tensor | int) -> Tensor:
    """Zeroes all but the k largest of each row (ties by lower index); k outside 1 .. V-1 keeps all."""
    vocab = e.shape[1]
    if isinstance(k, Tensor):
        wanted = torch.where((k > 0) & (k < vocab), k, vocab)
        threshold = _largest_threshold(e, wanted, _count_at_least)
    elif e.device.type == "cpu" and k <= _MAX_CANDIDATES:
        wanted, threshold = e.new_full((e.shape[0], 1), k), e.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    else:
        wanted = e.new_full((e.shape[0], 1), k)
        threshold = _largest_threshold(e, wanted, _count_at_least)
    above = (e > threshold).sum(1, keepdim=True)
    return _keep(e, threshold, wanted - above)


def cut_top_p(e: Tensor, p: Tensor | float) -> Tensor:
    """Zeroes all but the smallest set of each row, largest first (ties by lower index), with p of the row's mass."""
    total = row_sums(e)
    target = (total * p).clamp(min=torch.finfo(torch.float32).tiny).minimum(total)
    threshold, mass = _threshold_of_mass(e, target)
    return _keep(e, threshold, torch.ceil((target - mass) / threshold).clamp(min=1))


def _keep(e: Tensor, threshold: Tensor, ties: Tensor) -> Tensor:
    """Keeps what is above the threshold, and the first `ties` elements at it."""
    tied = e == threshold
    if e.device.type == "cpu" and not bool((tied.sum(1, keepdim=True) > ties).any()):
        return torch.where(e >= threshold, e, 0.0)
    return torch.where((e > threshold) | (tied & (tied.cumsum(1) <= ties)), e, 0.0)


def _threshold_of_mass(e: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The largest t with sum of {e >= t} >= target, and the sum of {e > t}, both [R, 1]."""
    if e.device.type == "cpu":
        for size in _CANDIDATES:
            if size < e.shape[1]:
                values = e.topk(size, dim=1).values
                mass = values.cumsum(1, dtype=torch.float64)
                if bool((mass[:, -1:] >= target).all()):
                    border = (mass < target).sum(1, keepdim=True)
                    threshold = values.gather(1, border)
                    return threshold, torch.where(values > threshold, values, 0.0).sum(1, keepdim=True, dtype=torch.float64)
    threshold = _largest_threshold(e, target, _mass_at_least)
    return threshold, row_sums(torch.where(e > threshold, e, 0.0))


def _mass_at_least(e: Tensor, t: Tensor) -> Tensor:
    return row_sums(torch.where(e >= t, e, 0.0))


def _count_at_least(e: Tensor, t: Tensor) -> Tensor:
    return (e >= t).sum(1, keepdim=True)


def _largest_threshold(e: Tensor, target: Tensor, measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The largest t >= 0 with measure(e, t) >= target, by bisection on the bits of non-negative fp32, which order as it."""
    low = torch.zeros(e.shape[0], 1, dtype=torch.int32, device=e.device)
    high = e.amax(1, keepdim=True).view(torch.int32) + 1
    for _ in range(31):
        middle = low + (high - low) // 2
        enough = measure(e, middle.view(torch.float32)) >= target
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low.view(torch.float32)


def row_sums(e: Tensor) -> Tensor:
    """[R, 1] fp64 sums of rows, the same bits whatever the other rows and the number of threads."""
    return e.sum(1, keepdim=True, dtype=torch.float64)


def _exp_shifted(z: Tensor, temperature: Tensor | float | None) -> Tensor:
    """exp((z - max z) / temperature)."""
    shifted = z - z.amax(1, keepdim=True)
    if temperature is not None:
        shifted = shifted.div_(temperature)
    return shifted.exp_()


def _draw(e: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(token [R], its log-prob [R]) by inverse CDF over unnormalised probabilities, in order of token ids."""
    cdf = e.cumsum(1, dtype=torch.float64)
    total = cdf[:, -1:]
    token = torch.searchsorted(cdf, u[:, None] * total, right=True).clamp_(max=e.shape[1] - 1)
    return token.squeeze(1), (e.gather(1, token).double().log() - total.log()).squeeze(1)


def _logprobs_at(z: Tensor, tokens: Tensor) -> Tensor:
    """Log-softmax of `z` at the tokens, [R]."""
    top = z.amax(1, keepdim=True)
    log_sum = row_sums((z - top).exp_()).log()
    return ((z.gather(1, tokens[:, None]) - top).double() - log_sum).squeeze(1)


def _sample_rows(logits: Tensor, options: _Options, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z = logits.float()
    if options.off:
        token, logprob = _draw(_exp_shifted(z, None), u)
        return token, logprob, logprob
    processed = z if options.penalty is None or options.seen is None else penalise(z, options.seen, options.penalty)
    if options.greedy:
        token = processed.argmax(1)
        behavior = torch.zeros_like(u)
    else:
        token, behavior = _sample_processed(processed, options, u)
    return token, _logprobs_at(z, token), behavior


def _sample_processed(z: Tensor, options: _Options, u: Tensor) -> tuple[Tensor, Tensor]:
    temperature = options.temperature
    greedy = temperature == 0 if isinstance(temperature, Tensor) else None
    if greedy is not None:
        temperature = torch.where(greedy, 1.0, temperature)
    e = _exp_shifted(z, temperature)
    e = e if options.top_k is None else cut_top_k(e, options.top_k)
    e = e if options.top_p is None else cut_top_p(e, options.top_p)
    token, logprob = _draw(e, u)
    if greedy is None:
        return token, logprob
    greedy = greedy.squeeze(1)
    return torch.where(greedy, z.argmax(1), token), torch.where(greedy, 0.0, logprob)


@torch.no_grad()
def sample(
    logits: Tensor,
    *,
    temperature: Option = 1.0,
    top_k: Option = 0,
    top_p: Option = 1.0,
    repetition_penalty: Option = 1.0,
    seen: Tensor | None = None,
    seeds: Tensor,
    positions: Tensor,
) -> Sample:
    """Draws one token per row, formulas in the module's docstring; a row's draw does not depend on the other rows.

    Args:
        logits: [R, V], any float dtype.
        temperature: 0 is greedy: the largest processed logit, behavior log-prob 0.
        top_k: 0 keeps all. top_p: 1 keeps all. repetition_penalty: 1 is off. Each a scalar or a tensor [R].
        seen: [R, L] int64, each row's response tokens so far, padded with -1; what the penalty applies to.
        seeds, positions: [R] int64, the key and the counter of each row's random number.

    Returns:
        Sample(tokens, logprobs, behavior_logprobs), each [R].

    Raises:
        ValueError: shapes that do not fit.
    """
    n_rows, vocab = logits.shape
    if seeds.shape != (n_rows,) or positions.shape != (n_rows,):
        raise ValueError(f"seeds {tuple(seeds.shape)} and positions {tuple(positions.shape)} must be ({n_rows},)")
    options = _options(logits, temperature, top_k, top_p, repetition_penalty, seen)
    u = uniform(seeds.to(logits.device), positions.to(logits.device)).double()
    step = max(1, _ELEMENTS_AT_ONCE // vocab) if logits.device.type == "cpu" else max(1, n_rows)
    chunks = [slice(start, start + step) for start in range(0, n_rows, step)]
    parts = [_sample_rows(logits[rows], options.rows(rows), u[rows]) for rows in chunks]
    if not parts:
        empty = logits.new_empty(0, dtype=torch.float32)
        return Sample(empty.long(), empty, empty.clone())
    tokens, logprobs, behavior = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return Sample(tokens, logprobs.float(), behavior.float())
