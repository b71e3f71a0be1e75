"""Drawing the next token of each row: repetition penalty, temperature, top-k, top-p, draw.

    z' = z / penalty where z >= 0, z * penalty where z < 0, for each token of `seen`
    p = softmax(z' / temperature) cut to the top k, renormalised, cut to the top p, renormalised
    token = the first whose cumulative p, in order of token ids, exceeds u

The penalty is that of CTRL (arXiv 1909.05858, section 4.1), each distinct token taking it once; top-k and top-p
are those of `truncation.py`. `u` is the random number of the row's (seed, position), `philox.uniform`.

In Triton the logits are read once, and again only what top-k and top-p might keep (`gpu/sampling.py`).
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .dispatch import uses_triton
from .philox import uniform
from .reductions import host_sees
from .truncation import cut_top_k, cut_top_p

Option = float | int | Tensor
Number = TypeVar("Number", int, float)

_ELEMENTS_AT_ONCE = 1 << 18  # of the logits, on a CPU: what stays in cache


class Sample(NamedTuple):
    """tokens [R] int64; logprobs [R] fp32 at temperature 1 on the unprocessed logits; behavior_logprobs [R]
    fp32 under the distribution the token was drawn from."""

    tokens: Tensor
    logprobs: Tensor
    behavior_logprobs: Tensor


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


def penalise(logits: Tensor, seen: Tensor, penalty: Tensor | float) -> Tensor:
    """A copy of the logits with the CTRL rule applied once to each distinct token of `seen` [R, L], -1 is padding."""
    some = seen.amax(1, keepdim=True)  # padding repeats this token, in rows of nothing but padding it is -1
    index = torch.where(seen >= 0, seen, some.clamp(min=0))
    z = logits.gather(1, index)
    z = torch.where(some < 0, z, torch.where(z >= 0, z / penalty, z * penalty))
    return logits.scatter(1, index, z)


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
    logprobs = _logprobs_at(z, p, tokens)
    return tokens, logprobs, torch.where(logprobs.isnan(), torch.nan, behavior)


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


def _sample_torch(logits: Tensor, options: _Options, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n_rows, vocab = logits.shape
    step = max(1, _ELEMENTS_AT_ONCE // vocab) if host_sees(logits) else max(1, n_rows)
    chunks = [slice(start, start + step) for start in range(0, n_rows, step)]
    parts = [_sample_rows(logits[rows], options.rows(rows), u[rows]) for rows in chunks]
    if not parts:
        empty = logits.new_empty(0, dtype=torch.float32)
        return empty.long(), empty, empty.clone()
    tokens, logprobs, behavior = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return tokens, logprobs.float(), behavior.float()


@torch.library.custom_op("ppomax::sample", mutates_args=())
def _sample(
    logits: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    top_k: int,
    top_ks: Tensor | None,
    top_p: float,
    top_ps: Tensor | None,
    penalty: float,
    penalties: Tensor | None,
    seen: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, logprobs, behavior log-probs), each [R]; of each option a number or, where given, a tensor [R].

    A number that leaves its option off is the default of `sample`; `seen` is None where no penalty applies.
    """
    if uses_triton(logits):
        from .gpu import sampling as triton_path

        return triton_path.sample(
            logits, temperature, temperatures, top_k, top_ks, top_p, top_ps, penalty, penalties, seen, seeds, positions
        )
    options = _Options(
        temperature=_column(temperature, temperatures, 1.0),
        top_k=_column(top_k, top_ks, 0),
        top_p=_column(top_p, top_ps, 1.0),
        penalty=None if seen is None else _column(penalty, penalties, 1.0),
        seen=seen,
    )
    return _sample_torch(logits, options, uniform(seeds, positions).double())


@_sample.register_fake
def _(logits: Tensor, *options: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor]:
    tokens = logits.new_empty(logits.shape[0], dtype=torch.int64)
    return tokens, torch.empty_like(tokens, dtype=torch.float32), torch.empty_like(tokens, dtype=torch.float32)


def _column(value: Number, values: Tensor | None, off: Number) -> Tensor | Number | None:
    """An option of `_Options`."""
    if values is not None:
        return values[:, None]
    return None if value == off else value


def _pair(option: Option, off: float, logits: Tensor, name: str) -> tuple[float, Tensor | None]:
    """(number, None) or (`off`, tensor [R] on the logits' device): custom ops take no unions."""
    if not isinstance(option, Tensor):
        return option, None
    n_rows = logits.shape[0]
    if option.dim() and option.shape != (n_rows,):
        raise ValueError(f"{name} has shape {tuple(option.shape)}, expected a scalar or ({n_rows},)")
    return off, option.to(logits.device).expand(n_rows).contiguous()


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
        Sample(tokens, logprobs, behavior_logprobs), each [R]. A row with a NaN or a logit of inf, or with nothing
        but -inf, gives some token of the vocabulary, which need not be the same on every device, and both its
        log-probs are NaN.

    Raises:
        ValueError: shapes that do not fit.
    """
    n_rows, vocab = logits.shape
    if seeds.shape != (n_rows,) or positions.shape != (n_rows,):
        raise ValueError(f"seeds {tuple(seeds.shape)} and positions {tuple(positions.shape)} must be ({n_rows},)")
    if seen is not None and seen.shape[0] != n_rows:
        raise ValueError(f"seen has {seen.shape[0]} rows, logits {n_rows}")
    t, temperatures = _pair(temperature, 1.0, logits, "temperature")
    k, top_ks = _pair(top_k, 0, logits, "top_k")
    p, top_ps = _pair(top_p, 1.0, logits, "top_p")
    penalty, penalties = _pair(repetition_penalty, 1.0, logits, "repetition_penalty")
    if seen is not None:
        penalised = seen.numel() > 0 and (penalties is not None or penalty != 1.0)
        seen = _unit_stride(seen) if penalised else None
    return Sample(*_sample(
        _unit_stride(logits), float(t), temperatures, int(k) if 0 < k < vocab else 0, top_ks,
        min(float(p), 1.0), top_ps, float(penalty), penalties, seen,
        seeds.to(logits.device).long().contiguous(), positions.to(logits.device).long().contiguous(),
    ))  # fmt: skip


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
