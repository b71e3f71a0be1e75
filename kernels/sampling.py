"""Drawing the next token of each row: repetition penalty, temperature, top-k, top-p, draw.

    z' = z / penalty where z >= 0, z * penalty where z < 0, for each token of `seen`
    p = softmax(z' / temperature) cut to the top k, renormalised, cut to the top p, renormalised
    token = the first whose cumulative p, in order of token ids, exceeds u

The penalty is that of CTRL (arXiv 1909.05858, section 4.1), each distinct token taking it once.
Top-k keeps the k most probable tokens; top-p the smallest set in descending probability whose mass reaches p
(arXiv 1904.09751); ties at either border go to the lower id; at least one token is kept.
`u` is a function of the row's (seed, position) alone: the first word of Philox4x32-10 (Salmon et al., SC
2011) with the seed as key and the position as counter, turned into a float in [0, 1) as `tl.rand(seed,
position)` does.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reductions import host_sees

Option = float | int | Tensor

_LOW_WORD = 0xFFFFFFFF
_PHILOX_ROUNDS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEYS = (0x9E3779B9, 0xBB67AE85)
_CANDIDATES = (64, 1024)  # how many of the largest are looked at for the border of top-p, on a CPU
_ELEMENTS_AT_ONCE = 1 << 18  # of the logits, on a CPU: what stays in cache
_UNIFORM_SCALE = 4.6566127342e-10  # (2^23 - 1) / 2^23 / 2^31, so that the largest word stays below 1 in fp32


class Sample(NamedTuple):
    """tokens [R] int64; logprobs [R] fp32 at temperature 1 on the unprocessed logits; behavior_logprobs [R]
    fp32 under the distribution the token was drawn from."""

    tokens: Tensor
    logprobs: Tensor
    behavior_logprobs: Tensor


def philox(seeds: Tensor, positions: Tensor) -> Tensor:
    """[4, R] int64: the words of Philox4x32-10 with key `seeds` and counter `positions`, both int64 of 64 bits."""
    counter = torch.stack([positions, positions >> 32]) & _LOW_WORD
    return philox_words(torch.cat([counter, torch.zeros_like(counter)]), torch.stack([seeds, seeds >> 32]) & _LOW_WORD)


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
    logits: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    seen: Tensor | None,
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
        """The same for a chunk of the rows."""
        return _Options(*(o[rows] if isinstance(o, Tensor) else o for o in self))  # type: ignore[arg-type]

    @property
    def greedy(self) -> bool:
        return isinstance(self.temperature, float) and self.temperature == 0.0

    @property
    def off(self) -> bool:
        return all(o is None for o in self[:4])


def _column(value: Option, n_rows: int, logits: Tensor, name: str) -> Tensor | float:
    """A scalar as it is, a tensor as a column [R, 1]."""
    if not isinstance(value, Tensor):
        return float(value)
    if value.dim() and value.shape != (n_rows,):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected a scalar or ({n_rows},)")
    return value.to(logits.device).expand(n_rows)[:, None]


def _options(
    logits: Tensor, temperature: Option, top_k: Option, top_p: Option, penalty: Option, seen: Tensor | None
) -> _Options:
    n_rows, vocab = logits.shape
    if seen is not None and seen.shape[0] != n_rows:
        raise ValueError(f"seen has {seen.shape[0]} rows, logits {n_rows}")
    k = _column(top_k, n_rows, logits, "top_k")
    k = k if isinstance(k, Tensor) else int(k)
    p = _column(top_p, n_rows, logits, "top_p")
    t = _column(temperature, n_rows, logits, "temperature")
    c = _column(penalty, n_rows, logits, "repetition_penalty")
    unpenalised = seen is None or seen.numel() == 0 or (isinstance(c, float) and c == 1.0)
    return _Options(
        temperature=None if isinstance(t, float) and t == 1.0 else t,
        top_k=None if isinstance(k, int) and not 0 < k < vocab else k,
        top_p=None if isinstance(p, float) and p >= 1.0 else p,
        penalty=None if unpenalised else c,
        seen=None if unpenalised else seen,
    )


def penalise(logits: Tensor, seen: Tensor, penalty: Tensor | float) -> Tensor:
    """A copy of the logits with the CTRL rule applied once to each distinct token of `seen` [R, L], -1 is padding."""
    some = seen.amax(1, keepdim=True)  # padding repeats this token, in rows of nothing but padding it is -1
    index = torch.where(seen >= 0, seen, some.clamp(min=0))
    z = logits.gather(1, index)
    z = torch.where(some < 0, z, torch.where(z >= 0, z / penalty, z * penalty))
    return logits.scatter(1, index, z)


def cut_top_k(p: Tensor, k: Tensor | int) -> Tensor:
    """Zeroes all but the k largest of each row (ties by lower index); a k outside 1 .. V-1 keeps all."""
    n_rows, vocab = p.shape
    k = k if isinstance(k, Tensor) else torch.full((n_rows, 1), k, device=p.device)
    on = (k > 0) & (k < vocab)
    k = torch.where(on, k, 1).long()
    if host_sees(p):
        threshold = p.topk(int(k.max()), dim=1).values.gather(1, k - 1)
    else:
        threshold = _largest_threshold(p, k, lambda p, t: (p >= t).sum(1, keepdim=True))
    threshold = torch.where(on, threshold, -1.0)
    return _keep(p, threshold, k - (p > threshold).sum(1, keepdim=True))


def cut_top_p(p: Tensor, top_p: Tensor | float) -> Tensor:
    """Zeroes all but the smallest set of each row, largest first (ties by lower index), with `top_p` of its mass."""
    total = _row_sums(p)
    target = (total * top_p).clamp(min=torch.finfo(torch.float32).tiny).minimum(total)
    if host_sees(p):
        threshold = _threshold_of_mass(p, target, _CANDIDATES)
    else:
        threshold = _largest_threshold(p, target, lambda p, t: _row_sums(torch.where(p >= t, p, 0.0)))
    above = _row_sums(torch.where(p > threshold, p, 0.0))
    return _keep(p, threshold, torch.ceil((target - above) / threshold).clamp(min=1))


def _keep(p: Tensor, threshold: Tensor, ties: Tensor) -> Tensor:
    """Keeps what is above the threshold, and the first `ties` elements at it."""
    tied = p == threshold
    if host_sees(p) and not bool((tied.sum(1, keepdim=True) > ties).any()):
        return torch.where(p >= threshold, p, 0.0)
    return torch.where((p > threshold) | (tied & (tied.cumsum(1) <= ties)), p, 0.0)


def _threshold_of_mass(p: Tensor, target: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The largest t with sum of {p >= t} >= target, [R, 1], on a CPU: looked for among the largest elements of each
    row, in rows where these do not reach it among more of them, and at last by bisection."""
    if not sizes:
        return torch.tensor([[_bisect_mass(row, float(t))] for row, t in zip(p, target, strict=True)])
    values = p.topk(min(sizes[0], p.shape[1]), dim=1).values
    mass = values.cumsum(1, dtype=torch.float64)
    threshold = values.gather(1, (mass < target).sum(1, keepdim=True).clamp(max=values.shape[1] - 1))
    short = (mass[:, -1:] < target).squeeze(1).nonzero().squeeze(1)
    if short.numel() and values.shape[1] < p.shape[1]:
        threshold[short] = _threshold_of_mass(p[short], target[short], sizes[1:])
    return threshold


def _bisect_mass(row: Tensor, target: float) -> float:
    """`_threshold_of_mass` of one row [V], by bisection on the bits of t: fp32 >= 0 orders as its bits do."""
    low, high = 0, 0x3F800001  # the bits of 0 and of what follows 1
    while high - low > 1:
        middle = (low + high) // 2
        below = struct.unpack("f", struct.pack("I", middle - 1))[0]
        mass = F.threshold(row, below, 0.0).sum(dtype=torch.float64)  # keeps what is above `below`
        low, high = (middle, high) if float(mass) >= target else (low, middle)
    return struct.unpack("f", struct.pack("I", low))[0]


def _largest_threshold(p: Tensor, target: Tensor, measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The largest t >= 0 with measure(p, t) >= target, [R, 1], by bisection without looking at the numbers."""
    low = torch.zeros(p.shape[0], 1, dtype=torch.int32, device=p.device)
    high = torch.full_like(low, 0x3F800001)
    for _ in range(30):
        middle = low + (high - low) // 2
        enough = measure(p, middle.view(torch.float32)) >= target
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low.view(torch.float32)


def _row_sums(p: Tensor) -> Tensor:
    return p.sum(1, keepdim=True, dtype=torch.float64)


def _draw(p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(token [R], its log-prob [R]) by inverse CDF over unnormalised probabilities, in order of token ids."""
    cdf = p.cumsum(1, dtype=torch.float64)
    total = cdf[:, -1:]
    token = torch.searchsorted(cdf, u[:, None] * total, right=True).clamp_(max=p.shape[1] - 1)
    return token.squeeze(1), (p.gather(1, token).double().log() - total.log()).squeeze(1)


def _logprobs_at(z: Tensor, p: Tensor, tokens: Tensor) -> Tensor:
    """Log-softmax of `z` at the tokens [R]; the largest element of its softmax `p` is 1 / sum exp(z - max z)."""
    chosen = z.gather(1, tokens[:, None]).squeeze(1)
    return (chosen - z.amax(1)) + p.amax(1).log()


def _sample_rows(logits: Tensor, options: _Options, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z = logits.float()
    p = torch.softmax(z, 1)
    if options.off:
        tokens, _ = _draw(p, u)
        logprobs = _logprobs_at(z, p, tokens)
        return tokens, logprobs, logprobs
    penalised = z if options.penalty is None or options.seen is None else penalise(z, options.seen, options.penalty)
    if options.greedy:
        tokens, behavior = penalised.argmax(1), torch.zeros_like(u)
    else:
        tokens, behavior = _sample_processed(penalised, options, u)
    return tokens, _logprobs_at(z, p, tokens), behavior


def _sample_processed(z: Tensor, options: _Options, u: Tensor) -> tuple[Tensor, Tensor]:
    """(token, its log-prob under the processed distribution)."""
    temperature, greedy = options.temperature, None
    if isinstance(temperature, Tensor):
        greedy = (temperature == 0).squeeze(1)
        temperature = torch.where(temperature == 0, 1.0, temperature)
    scaled = z if temperature is None else (z - z.amax(1, keepdim=True)).div_(temperature)
    p = torch.softmax(scaled, 1)
    p = p if options.top_k is None else cut_top_k(p, options.top_k)
    p = p if options.top_p is None else cut_top_p(p, options.top_p)
    tokens, logprobs = _draw(p, u)
    if greedy is None:
        return tokens, logprobs
    return torch.where(greedy, z.argmax(1), tokens), torch.where(greedy, 0.0, logprobs)


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
    u = uniform(seeds.to(logits.device).long(), positions.to(logits.device).long()).double()
    step = max(1, _ELEMENTS_AT_ONCE // vocab) if host_sees(logits) else max(1, n_rows)
    chunks = [slice(start, start + step) for start in range(0, n_rows, step)]
    parts = [_sample_rows(logits[rows], options.rows(rows), u[rows]) for rows in chunks]
    if not parts:
        empty = logits.new_empty(0, dtype=torch.float32)
        return Sample(empty.long(), empty, empty.clone())
    tokens, logprobs, behavior = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return Sample(tokens, logprobs.float(), behavior.float())
