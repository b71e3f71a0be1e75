"""Operations of decoding: sampling, attention over the paged cache, writing to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from ops import Inputs, Judged, Op, Results, against, doubled, mapped, present
from ppomax.kernels import api
from timing import relative_error
from torch import Tensor

HEADS, KV_HEADS, WIDTH, BLOCK = 32, 8, 128, 16
TEMPERATURE, TOP_P = 0.8, 0.9


def sample(rows: int, vocab: int, dtype: torch.dtype, device: str, *, penalty: float = 1.0) -> list[Op]:
    """Top-p draws at a temperature, perhaps with a penalty on tokens seen before. A provider is judged by the
    log-probs of the tokens that it drew itself."""

    def inputs() -> Inputs:
        seeds = torch.arange(rows, device=device)
        logits = (torch.randn(rows, vocab, device=device) * 3).to(dtype)
        seen = None if penalty == 1.0 else torch.randint(0, vocab, (rows, 128), device=device)
        return {"logits": logits, "seeds": seeds, "positions": torch.zeros_like(seeds), "seen": seen}

    def ours(**given: Tensor) -> Results:
        drawn = api.sample(**given, temperature=TEMPERATURE, top_p=TOP_P, repetition_penalty=penalty)
        return drawn.tokens, drawn.logprobs

    def by_sorting(logits: Tensor, seen: Tensor | None, **keys: Tensor) -> Results:
        p, order = torch.softmax(processed(logits.float(), seen, penalty), -1).sort(-1, descending=True)
        p = torch.where(p.cumsum(-1) - p < TOP_P, p, 0.0)
        tokens = order.gather(1, torch.multinomial(p, 1)).squeeze(1)
        return tokens, torch.log_softmax(logits.float(), -1).gather(1, tokens[:, None]).squeeze(1)

    def judge(logits: Tensor, seen: Tensor | None, **keys: Tensor) -> Judged:
        return judge_draws(logits.double(), torch.softmax(processed(logits.double(), seen, penalty), -1))

    providers = mapped(present(ppomax=ours, sort_and_multinomial=by_sorting), torch.no_grad())
    name = "sample top-p" if penalty == 1.0 else "sample top-p with a repetition penalty"
    return [Op(name, f"{rows} x {vocab}", inputs, providers, judge, 1e-4, float(rows * vocab * dtype.itemsize))]


def processed(z: Tensor, seen: Tensor | None, penalty: float) -> Tensor:
    if seen is not None:
        x = z.gather(1, seen)
        z = z.scatter(1, seen, torch.where(x > 0, x / penalty, x * penalty))
    return z / TEMPERATURE


def judge_draws(logits: Tensor, p: Tensor) -> Judged:
    """inf where a token is less likely under p than the last that top-p keeps; else the error of the log-probs."""
    ranked = p.sort(-1, descending=True).values
    last = (ranked.cumsum(-1) < TOP_P).sum(-1).clamp(max=p.shape[1] - 1)
    least = ranked.gather(1, last[:, None]) * (1 - 1e-5)

    def error(results: Results) -> float:
        tokens, logprobs = results
        if bool((p.gather(1, tokens[:, None]) < least).any()):
            return float("inf")
        return relative_error(logprobs, torch.log_softmax(logits, -1).gather(1, tokens[:, None]).squeeze(1))

    return error


def paged_attention(
    sequences: int, length: int, new: int, dtype: torch.dtype, device: str, *, width: int = WIDTH
) -> list[Op]:
    """The last `new` tokens of each sequence over its cache: decoding where that is one, a chunk of a prompt else."""
    blocks = length // BLOCK

    def inputs() -> Inputs:
        pools = torch.randn(2, sequences * blocks, BLOCK, KV_HEADS, width, device=device).to(dtype)
        return {
            "q": torch.randn(sequences * new, HEADS, width, device=device).to(dtype),
            "k_pool": pools[0],
            "v_pool": pools[1],
            "block_table": torch.randperm(sequences * blocks, device=device).view(sequences, blocks).int(),
            "seq_lens": torch.full((sequences,), length, dtype=torch.int32, device=device),
            "cu_seqlens_q": new * torch.arange(sequences + 1, dtype=torch.int32, device=device),
        }

    def ours(**given: Tensor) -> Results:
        return (api.paged_attention(**given, scale=width**-0.5),)

    def gathered(q: Tensor, k_pool: Tensor, v_pool: Tensor, block_table: Tensor, **lengths: Tensor) -> Results:
        k, v = (pool[block_table.long()].view(sequences, length, KV_HEADS, width).transpose(1, 2)
                for pool in (k_pool, v_pool))  # fmt: skip
        q = q.view(sequences, new, HEADS, width).transpose(1, 2)
        seen = torch.arange(length, device=q.device) <= torch.arange(length - new, length, device=q.device)[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if new == 1 else seen, enable_gqa=True)
        return (out.transpose(1, 2).reshape(-1, HEADS, width),)

    name = "paged_attention decode" if new == 1 else "paged_attention prefill"
    providers = mapped(present(ppomax=ours, gather_and_SDPA=gathered), torch.no_grad())
    cached = 2.0 * sequences * length * KV_HEADS * width * dtype.itemsize
    size = f"{sequences} x {length}" if new == 1 else f"{sequences} x {new} of {length}"
    pairs = sequences * (new * length - new * (new - 1) / 2)
    return [
        Op(
            name,
            size if width == WIDTH else f"{size}, heads of {width}, {str(dtype)[6:]}",
            inputs,
            providers,
            against(doubled(gathered)),
            1e-2,
            bytes=cached + 2.0 * sequences * new * HEADS * width * dtype.itemsize,
            flops=0.0 if new == 1 else 4.0 * pairs * HEADS * width,
        )
    ]


def write_kv(tokens: int, dtype: torch.dtype, device: str, *, heads: int = KV_HEADS) -> list[Op]:
    """New keys and values into scattered slots."""

    def inputs() -> Inputs:
        k, v = torch.randn(2, tokens, heads, WIDTH, device=device).to(dtype)
        pools = torch.zeros(2, 2 * tokens // BLOCK, BLOCK, heads, WIDTH, device=device, dtype=dtype)
        slots = torch.randperm(2 * tokens, device=device)[:tokens].int()
        return {"k": k, "v": v, "k_pool": pools[0], "v_pool": pools[1], "slot_mapping": slots}

    def ours(k_pool: Tensor, v_pool: Tensor, **given: Tensor) -> Results:
        api.write_kv(k_pool=k_pool, v_pool=v_pool, **given)
        return k_pool, v_pool

    def indexed(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slot_mapping: Tensor) -> Results:
        for x, pool in ((k, k_pool), (v, v_pool)):
            pool.view(-1, heads, WIDTH).index_copy_(0, slot_mapping.long(), x)
        return k_pool, v_pool

    moved = 4.0 * tokens * heads * WIDTH * dtype.itemsize
    providers = present(ppomax=ours, torch_eager=indexed)
    return [Op("write_kv", f"{tokens} tokens, {heads} heads", inputs, providers, against(doubled(indexed)), 0.0, moved)]
