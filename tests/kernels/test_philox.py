"""The random stream: published vectors, `tl.rand` bit for bit, uniformity."""

import importlib.util
from pathlib import Path

import pytest
import torch
from ppomax.kernels.philox import philox_words, uniform

KERNELS = """
import triton
import triton.language as tl
from ppomax.kernels.gpu.sampling import uniform

@triton.jit
def ours(seeds_ptr, positions_ptr, out_ptr):
    i = tl.program_id(0)
    tl.store(out_ptr + i, uniform(seeds_ptr, positions_ptr, i))
"""


def test_known_answers() -> None:
    """The vectors published with Random123 (kat_vectors, philox4x32 10)."""
    counter = [[0, 0, 0, 0], [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]]
    key = [[0, 0], [0xFFFFFFFF] * 2, [0xA4093822, 0x299F31D0]]
    expected = [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]
    words = philox_words(torch.tensor(counter).t(), torch.tensor(key).t())
    assert words.t().tolist() == expected


def test_kernels_draw_the_same_numbers(path: str, tmp_path: Path) -> None:
    """Bit for bit, with seeds and positions of more than 32 bits and below zero."""
    if path == "torch":
        pytest.skip("the kernel's side is compared with it")
    pytest.importorskip("triton")
    (tmp_path / "rand.py").write_text(KERNELS)
    spec = importlib.util.spec_from_file_location("rand", tmp_path / "rand.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    seeds = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**40 + 5, 2**62, -3] * 3)
    positions = torch.tensor([0] * 7 + [1, 77, 2**31 - 1, 12, 13, 14, 15] + [2**32 + 1] * 7)
    out = torch.full((21,), torch.nan)
    module.ours[(21,)](seeds, positions, out)
    assert torch.equal(out, uniform(seeds, positions))


def test_uniformity() -> None:
    """Along seeds and along positions: counts in 64 bins are within 5 standard deviations, neighbours uncorrelated."""
    n = 200_000
    along_seeds = uniform(torch.arange(n), torch.zeros(n, dtype=torch.int64)).double()
    along_positions = uniform(torch.full((n,), 7), torch.arange(n)).double()
    for u in (along_seeds, along_positions):
        assert float(u.min()) >= 0.0
        assert float(u.max()) < 1.0
        counts = torch.histc(u, 64, 0, 1)
        assert float((counts - n / 64).abs().max()) < 5 * (n / 64) ** 0.5
        assert abs(float(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1])) < 0.01
    assert abs(float(torch.corrcoef(torch.stack([along_seeds, along_positions]))[0, 1])) < 0.01
