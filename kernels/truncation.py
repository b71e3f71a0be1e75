"""Top-k and top-p in torch: rows of probabilities without what is not kept.

Top-k keeps the k most probable; top-p the smallest set in descending probability whose mass reaches p (arXiv
1904.09751). Ties at either border go to the lower index; at least one element is kept.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .reductions import host_sees, keep_constant

_CANDIDATES = (64, 1024)  # how many of the largest are looked at for the border of top-p, on a CPU
_SHORT_ROW = 8192  # up to this an operation's call takes longer than its work on a row


def cut_top_k(p: Tensor, k: Tensor | int) -> Tensor:
    """Zeroes all but the k largest of each row (ties by lower index); a k outside 1 .. V-1 keeps all."""
    n_rows, vocab = p.shape
    k = k if isinstance(k, Tensor) else torch.full((n_rows, 1), k, device=p.device)
    on = (k > 0) & (k < vocab)
    k = torch.where(on, k, 1).long()
    if host_sees(p):
        threshold = _kth_largest(p, k)
    else:
        threshold = _largest_threshold(p, k, lambda p, t: (p >= t).sum(1, keepdim=True))
    threshold = torch.where(on, threshold, -1.0)
    return _keep(p, threshold, k - (p > threshold).sum(1, keepdim=True))


def _kth_largest(p: Tensor, k: Tensor) -> Tensor:
    """[R, 1], on a CPU."""
    most = int(k.max()) if k.numel() else 1
    if 64 * most > p.shape[1] and bool((k == most).all()):  # `topk` would sort them
        return p.kthvalue(p.shape[1] - most + 1, dim=1, keepdim=True).values
    return p.topk(most, dim=1).values.gather(1, k - 1)


def cut_top_p(p: Tensor, top_p: Tensor | float) -> Tensor:
    """Zeroes all but the smallest set of each row, largest first (ties by lower index), with `top_p` of its mass."""
    total = _row_sums(p)
    target = (total * top_p).clamp(min=torch.finfo(torch.float32).tiny).minimum(total)
    if host_sees(p):
        threshold = _threshold_of_mass(p, target, _CANDIDATES)
    else:
        threshold = _largest_threshold(p, target, _mass_from)
    above = _row_sums(keep_constant(p, p > threshold, p.dtype))
    return _keep(p, threshold, torch.ceil((target - above) / threshold).clamp(min=1))


def _keep(p: Tensor, threshold: Tensor, ties: Tensor) -> Tensor:
    """Keeps what is above the threshold, and the first `ties` elements at it."""
    tied = p == threshold
    if host_sees(p) and not bool((tied.sum(1, keepdim=True) > ties).any()):
        return keep_constant(p, p >= threshold, p.dtype)
    return torch.where((p > threshold) | (tied & (tied.cumsum(1) <= ties)), p, 0.0)


def _threshold_of_mass(p: Tensor, target: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The largest t with sum of {p >= t} >= target, [R, 1], on a CPU: looked for among the largest elements of each
    row, in rows where these do not reach it among more of them, and at last by bisection, of long rows one by one."""
    if not sizes and p.shape[1] <= _SHORT_ROW:
        return _largest_threshold(p, target, _mass_from)
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


def _mass_from(p: Tensor, threshold: Tensor) -> Tensor:
    """[R, 1], of the elements that are not below the threshold."""
    return _row_sums(keep_constant(p, p >= threshold, p.dtype))


def _row_sums(p: Tensor) -> Tensor:
    return p.sum(1, keepdim=True, dtype=torch.float64)
