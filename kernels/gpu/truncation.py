"""Where top-k and top-p end in a row of logits, without sorting it.

A row is first read in groups of GROUP neighbours, whose largest logit and mass are then known. From these alone
follows a lower bound of the border; only groups that reach it can hold anything that is kept: they are listed,
and only they are read again.

The border is the largest t for which the elements >= t have weight enough, an element's weight being 1 for top-k
and its probability for top-p. The elements between a lower and an upper bound of t are gathered in a buffer of
CAPACITY and searched by bisection in registers. As long as they are too many for it, passes over the listed
groups weigh what is above three values between the bounds, and so move these. Values are compared by *keys*:
their bits, as unsigned integers of the same order.

In the arguments, `row` is (logits, bits of the seen tokens or None, penalty, vocabulary), `scale` is (largest
processed logit, log2(e) / T), `groups` is (list, its length).
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_KEY = tl.constexpr(0)  # below every number's
MOST_KEY = tl.constexpr(0xFFFFFFFF)
MOST = tl.constexpr(0x7FFFFFFF)
FAINT = tl.constexpr(-64.0)  # log2 of a weight, the largest being 1, that no draw can tell from none
BOUND_STEPS = tl.constexpr(12)


@triton.jit
def read(row, group, GROUP: tl.constexpr):
    """(logits, processed logits, token ids) [n, GROUP] of n groups; -inf outside the vocabulary."""
    logits_ptr, bits_ptr, penalty, vocab = row
    word = group[:, None, None] * (GROUP // 32) + tl.arange(0, GROUP // 32)[None, :, None]
    bit = tl.arange(0, 32)[None, None, :]
    ids = word * 32 + bit
    x = tl.load(logits_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    z = x
    if bits_ptr is not None:
        # .cg: past the L1 cache, which atomics do not change
        seen = (tl.load(bits_ptr + word, mask=word * 32 < vocab, other=0, cache_modifier=".cg") >> bit) & 1
        z = tl.where(seen != 0, tl.where(x >= 0, x * (1.0 / penalty), x * penalty), x)
    shape: tl.constexpr = (group.shape[0], GROUP)
    return tl.reshape(x, shape), tl.reshape(z, shape), tl.reshape(ids, shape)


@triton.jit
def key_of(z):
    """uint32 with the order of z; the two zeros share one."""
    bits = tl.where(z == 0, 0.0, z).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def value_of(key):
    return tl.where(key >= 0x80000000, key ^ 0x80000000, key ^ 0xFFFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def weight_of(z, scale):
    """Probability of an element, that of the largest being 1."""
    return tl.exp2((z - scale[0]) * scale[1])


@triton.jit
def _weight(key, scale, COUNTING: tl.constexpr):
    """What an element adds to top-k, or to top-p."""
    if COUNTING:
        return tl.full(key.shape, 1.0, tl.float32)
    else:
        return weight_of(value_of(key), scale)


@triton.jit
def is_kept(key, ids, border):
    """Above the border's key, or at it and not past its last id."""
    return (key > border[0]) | ((key == border[0]) & (ids <= border[1]))


@triton.jit
def _bound(d, mass, total, k, p, vocab, GROUP: tl.constexpr):
    """A lower bound of top-k's border, of top-p's where there is no k, given the groups; in units of d.

    d [G] is log2 of the weight of each group's largest element. A group where this reaches a value has one element
    at least that does, and GROUP - 1 at most, each lighter than the value, that do not. All elements lighter than
    (1 - p) / V of the mass make up less than 1 - p of it.
    """
    counting = k > 0
    goal = tl.where(counting, k.to(tl.float32), (p * total).to(tl.float32))
    light = tl.log2(tl.maximum((1.0 - p) * total, 1e-30).to(tl.float32) / vocab) - 1.0
    low = tl.where(counting, FAINT, tl.maximum(light, FAINT))
    high = tl.zeros((), tl.float32)
    peak = tl.exp2(d)
    for _ in range(BOUND_STEPS):
        middle = 0.5 * (low + high)
        held = tl.where(counting, 1.0, tl.maximum(peak, mass - (GROUP - 1) * tl.exp2(middle)))
        if tl.sum(tl.where(d >= middle, held, 0.0), 0) >= goal:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _keys(row, groups, start, GROUP: tl.constexpr, BLOCK_S: tl.constexpr):
    """(keys, ids) [BLOCK_S, GROUP] of the listed groups from `start` on."""
    offs_s = start + tl.arange(0, BLOCK_S)
    outside = row[3] // GROUP + 1
    group = tl.load(groups[0] + offs_s, mask=offs_s < groups[1], other=outside)
    _, z, ids = read(row, group, GROUP)
    return tl.where(ids < row[3], key_of(z), NO_KEY), ids


@triton.jit
def _ranks(chosen):
    """(how many chosen ones come before each place, how many there are)."""
    one = chosen.to(tl.int32)
    in_group = tl.sum(one, 1)
    before = tl.cumsum(in_group, 0) - in_group
    return before[:, None] + tl.cumsum(one, 1) - one, tl.sum(in_group, 0)


@triton.jit
def _gather(row, groups, low, high, buffer_ptr, GROUP: tl.constexpr, BLOCK_S: tl.constexpr, CAPACITY: tl.constexpr):
    """Writes the keys in [low, high) to the buffer; how many there are, or a number above CAPACITY."""
    n = 0
    start = 0
    tl.debug_barrier()
    while (start < groups[1]) & (n <= CAPACITY):
        keys, _ = _keys(row, groups, start, GROUP, BLOCK_S)
        chosen = (keys >= low) & (keys < high)
        rank, count = _ranks(chosen)
        place = n + rank
        tl.store(buffer_ptr + place, keys.to(tl.int32, bitcast=True), mask=chosen & (place < CAPACITY))
        n += count
        start += BLOCK_S
    tl.debug_barrier()
    return n


@triton.jit
def _total(x):
    return tl.sum(tl.sum(x, 1), 0).to(tl.float64)


@triton.jit
def _narrow(
    row, scale, groups, low, high, above, goal, by_value,
    COUNTING: tl.constexpr, GROUP: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The quarter of [low, high), by value or by key, that has the border, and the weight `above` it."""
    b = low + (high - low) // 2
    a, c = low + (b - low) // 2, b + (high - b) // 2
    if by_value:
        start, step = value_of(low), 0.25 * (value_of(high - 1) - value_of(low))
        a, b, c = key_of(start + step), key_of(start + 2 * step), key_of(start + 3 * step)
    a = tl.minimum(tl.maximum(a, low + 1), high - 1)
    b = tl.minimum(tl.maximum(b, a), high - 1)
    c = tl.minimum(tl.maximum(c, b), high - 1)
    from_a = tl.zeros((BLOCK_S, GROUP), tl.float32)
    from_b, from_c = from_a, from_a
    smallest = tl.full((BLOCK_S, GROUP), MOST_KEY, tl.uint32)
    for first in range(0, groups[1], BLOCK_S):
        keys, _ = _keys(row, groups, first, GROUP, BLOCK_S)
        keys = tl.where((keys >= low) & (keys < high), keys, NO_KEY)
        weight = _weight(keys, scale, COUNTING)
        from_a += tl.where(keys >= a, weight, 0.0)
        from_b += tl.where(keys >= b, weight, 0.0)
        from_c += tl.where(keys >= c, weight, 0.0)
        smallest = tl.minimum(smallest, tl.where(keys == NO_KEY, MOST_KEY, keys))
    at_a, at_b, at_c = above + _total(from_a), above + _total(from_b), above + _total(from_c)
    below_a, below_b, below_c = at_a < goal, at_b < goal, at_c < goal
    low = tl.where(below_a, low, tl.where(below_b, a, tl.where(below_c, b, c)))
    high = tl.where(below_a, a, tl.where(below_b, b, tl.where(below_c, c, high)))
    above = tl.where(below_a, at_a, tl.where(below_b, at_b, tl.where(below_c, at_c, above)))
    smallest = tl.min(tl.min(smallest, 1), 0)
    return tl.maximum(low, tl.minimum(smallest, high - 1)), high, above


@triton.jit
def _border(
    row, scale, groups, buffer_ptr, low, high, n, goal,
    COUNTING: tl.constexpr, GROUP: tl.constexpr, BLOCK_S: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """A key t in [low, high): those from it on are the fewest of the largest elements that weigh `goal`, or all.

    `n` is how many keys are in the buffer where it holds all from `low` on, else -1. Returns t, how many of the
    elements at t are needed, how many there are (MOST if more than fit the buffer), and `n` for the next search.
    """
    above = tl.zeros((), tl.float64)  # weight of what is not below `high`
    whole = high
    filled = n >= 0
    step = 0  # even: try to gather; odd: narrow
    while (filled == 0) & ((step % 2 == 0) | (low + 1 < high)):
        if step % 2 == 0:
            n = _gather(row, groups, low, high, buffer_ptr, GROUP, BLOCK_S, CAPACITY)
            filled = n <= CAPACITY
        else:
            low, high, above = _narrow(
                row, scale, groups, low, high, above, goal, step % 4 == 1, COUNTING, GROUP, BLOCK_S
            )  # fmt: skip
        step += 1
    t, needed, ties = _search(scale, buffer_ptr, low, high, tl.where(filled, n, 0), above, goal, COUNTING, CAPACITY)
    return t, needed, tl.where(filled, ties, MOST), tl.where(filled & (high == whole), n, -1)


@triton.jit
def _search(scale, buffer_ptr, low, high, n, above, goal, COUNTING: tl.constexpr, CAPACITY: tl.constexpr):
    """`_border` among the `n` keys in the buffer: t, how many at t are needed, how many there are."""
    offs_n = tl.arange(0, CAPACITY)
    keys = tl.load(buffer_ptr + offs_n, mask=offs_n < n, other=0).to(tl.uint32, bitcast=True)
    weights = _weight(keys, scale, COUNTING)
    reached = tl.full((), -1.0, tl.float64)
    while (low + 1 < high) & (reached != goal):
        middle = low + (high - low) // 2
        weight = above + tl.sum(tl.where(keys >= middle, weights, 0.0), 0).to(tl.float64)
        if weight >= goal:
            low, reached = middle, weight
        else:
            high = middle
    above += tl.sum(tl.where(keys > low, weights, 0.0), 0).to(tl.float64)
    each = _weight(low, scale, COUNTING)
    needed = tl.minimum(tl.ceil((goal - above) / each.to(tl.float64)), 1e9)
    return low, tl.maximum(needed, 1.0).to(tl.int32), tl.sum((keys == low).to(tl.int32), 0)


@triton.jit
def _id_of_tie(row, groups, key, nth, GROUP: tl.constexpr, BLOCK_S: tl.constexpr):
    """The id of the nth element with this key."""
    found = tl.full((), MOST, tl.int32)
    before = 0
    for start in range(0, groups[1], BLOCK_S):
        keys, ids = _keys(row, groups, start, GROUP, BLOCK_S)
        tied = keys == key
        rank, count = _ranks(tied)
        hit = tied & (before + rank == nth - 1)
        found = tl.minimum(found, tl.min(tl.min(tl.where(hit, ids, MOST), 1), 0))
        before += count
    return found


@triton.jit
def _masses(row, scale, groups, border, mass_ptr, GROUP: tl.constexpr, BLOCK_S: tl.constexpr):
    """Writes the kept mass of each listed group."""
    for start in range(0, groups[1], BLOCK_S):
        keys, ids = _keys(row, groups, start, GROUP, BLOCK_S)
        kept = is_kept(keys, ids, border) & (keys != NO_KEY)
        offs_s = start + tl.arange(0, BLOCK_S)
        mass = tl.sum(tl.where(kept, weight_of(value_of(keys), scale), 0.0), 1)
        tl.store(mass_ptr + offs_s, mass, mask=offs_s < groups[1])
    tl.debug_barrier()


@triton.jit
def truncate(
    row,
    scale,
    m,  # [G]: the largest processed logit of each group
    mass,  # [G]: the mass of each group, that of the largest element being 1
    k,  # int32, 0 = no top-k
    p,  # fp64, >= 1 = no top-p
    scratch,  # (list [groups] int32, masses [groups] fp32, buffer [CAPACITY] int32)
    TOP_K: tl.constexpr,  # whether there may be a k
    TOP_P: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """((key, last id) of the border, number of listed groups, kept mass [G] by place in the list)."""
    list_ptr, mass_ptr, buffer_ptr = scratch
    total = tl.sum(mass, 0).to(tl.float64)
    d = (m - scale[0]) * scale[1]
    faintest = _bound(d, mass, total, k, p, row[3], GROUP)
    offs_g = tl.arange(0, m.shape[0])
    listed = (d >= faintest) & (m > float("-inf"))
    place = tl.cumsum(listed.to(tl.int32), 0) - 1
    tl.store(list_ptr + place, offs_g, mask=listed)
    groups = (list_ptr, tl.max(place, 0) + 1)
    tl.debug_barrier()

    high = key_of(scale[0]) + 1
    low = tl.minimum(key_of(scale[0] + faintest / scale[1]), tl.min(tl.where(listed, key_of(m), MOST_KEY), 0))
    last = tl.full((), MOST, tl.int32)
    n = tl.full((), -1, tl.int32)
    for stage in tl.static_range(0 if TOP_K else 1, 2 if TOP_P else 1):  # top-k, then top-p of what it keeps
        if k > 0 if stage == 0 else p < 1:
            goal = k.to(tl.float64) if stage == 0 else p * total
            t, needed, ties, n = _border(
                row, scale, groups, buffer_ptr, low, high, n, goal, stage == 0, GROUP, BLOCK_S, CAPACITY
            )  # fmt: skip
            last = tl.where(t == low, last, MOST)
            if needed < ties:
                last = tl.minimum(last, _id_of_tie(row, groups, t, needed, GROUP, BLOCK_S))
            low = t
            _masses(row, scale, groups, (t, last), mass_ptr, GROUP, BLOCK_S)
            mass = tl.load(mass_ptr + offs_g, mask=offs_g < groups[1], other=0.0)
            total = tl.sum(mass, 0).to(tl.float64)
    return (low, last), groups[1], mass
