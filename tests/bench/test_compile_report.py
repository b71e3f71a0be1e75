"""The committed launch configurations, compiled for GPUs that are not here: no spills, wide accesses, matrix units."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from ppomax.kernels.gpu import launch

BENCH = Path(__file__).parents[2] / "bench"
CHIPS = ("sm_80", "sm_90", "sm_100")
SMALL_CHIPS = ("sm_86", "sm_89", "sm_120")  # with 99 KiB of shared memory for a program
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: Triton interprets in this one."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCH), **environment}
    return subprocess.run([sys.executable, *arguments], env=kept, capture_output=True, text=True, check=False)


def made_report(folder: Path, *options: str, **environment: str) -> dict[str, Any]:
    done = python(str(BENCH / "compile_report.py"), "--json", str(folder / "report.json"), *options, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    assert report["failed"] == {}
    return report


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return made_report(tmp_path_factory.mktemp("report"))


def label(kernel: dict[str, Any]) -> str:
    return f"{kernel['kernel']} {kernel['constants']} on {kernel['chip']} for {kernel['op']}, {kernel['shape']}"


def spilling(report: dict[str, Any]) -> list[str]:
    return [label(k) for k in report["kernels"] if k["local"]]


def narrow(report: dict[str, Any]) -> list[str]:
    held = [k for k in report["kernels"] if "wide" in k["held_to"]]
    return [f"{label(k)}: {k['wide_share']:.0%}" for k in held if k["wide_share"] < 0.9]


def too_large(report: dict[str, Any]) -> list[str]:
    return [f"{label(k)}: {k['shared']} bytes of shared memory" for k in report["kernels"] if not k["shared_fits"]]


def without_matrix_units(report: dict[str, Any]) -> list[str]:
    return [label(k) for k in report["kernels"] if "matrix" in k["held_to"] and not k["matrix"]]


def test_nothing_spills(report: dict[str, Any]) -> None:
    assert spilling(report) == []


def test_shared_memory_is_there(report: dict[str, Any]) -> None:
    assert too_large(report) == []


def test_streaming_kernels_move_16_bytes_at_once(report: dict[str, Any]) -> None:
    assert narrow(report) == []
    assert len({k["kernel"] for k in report["kernels"] if "wide" in k["held_to"]}) >= 12


def test_products_use_matrix_units(report: dict[str, Any]) -> None:
    assert without_matrix_units(report) == []
    assert {k["kernel"] for k in report["kernels"] if "matrix" in k["held_to"]} == {
        "linear_statistics",
        "paged_attention",
    }


def test_every_committed_configuration_is_compiled(report: dict[str, Any]) -> None:
    asked = {chip: [e for e in report["configurations"] if e["chip"] == chip] for chip in CHIPS}
    table = launch.table()
    for chip, entries in asked.items():
        for name, default in table["default"].items():
            for entry in table.get(chip, {}).get(name) or default:
                config = {key: value for key, value in entry.items() if key != "up_to"}
                assert {"chip": chip, "name": name, **config} in entries


def test_operations_move_and_compute_what_they_must(report: dict[str, Any]) -> None:
    """Against the least possible: the logits once each way, GAE's tensors once, three products for a PPO step."""
    most = {
        "logprobs_from_logits forward": 1.01,
        "logprobs_from_logits forward + backward": 1.01,
        "ppo_loss forward + backward": 1.6,  # the gradients are scaled once more when the upstream one is known
        "gae": 1.01,
    }
    for op in report["ops"]:
        if op["op"] in most:
            moved = (op["triton_bytes"] + op["torch_bytes"]) / op["floor_bytes"]
            assert 0.99 <= moved <= most[op["op"]], op
        if op["op"].startswith(("linear_ppo_loss", "linear_cross_entropy")) and op["provider"] == "ppomax":
            assert op["flops"] == pytest.approx(op["floor_flops"], rel=1e-3), op


def test_an_interpreting_process_is_refused() -> None:
    done = python(str(BENCH / "compile_report.py"), TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert done.stderr.startswith("TRITON_INTERPRET is set")


PROBE = """
import json
from compile_report import kernel_entry, record
from compiled import compile_launch
from ops_head import from_logits
from ppomax.kernels.gpu.launch import overriding
from suites import BF16

def entry(vocab, **config):
    op = from_logits(64, vocab, BF16, "meta")[0]
    with overriding("logprobs_forward", {"BLOCK_V": 4096, "num_warps": 8, "num_stages": 1, **config}):
        launch = record(op, "ppomax", "sm_90").launches[0][1]
    return kernel_entry(op, "sm_90", launch, compile_launch(launch, "sm_90"))

print(json.dumps({"good": entry(32000), "odd": entry(32001), "crowded": entry(32000, BLOCK_V=32768, num_warps=4)}))
"""


def test_the_report_sees_spills_and_narrow_accesses() -> None:
    done = python("-c", PROBE)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert [len(spilling({"kernels": [found[name]]})) for name in ("good", "odd", "crowded")] == [0, 0, 1]
    assert [len(narrow({"kernels": [found[name]]})) for name in ("good", "odd", "crowded")] == [0, 1, 0]


STRIDES = """
import json, re, triton
from compile_report import record
from compiled import specialised
from ops_decode import paged_attention, write_kv
from suites import BF16

found = {}
for op in (paged_attention(64, 4096, 1, BF16, "meta")[0], write_kv(8192, BF16, "meta")[0]):
    for _, launch in record(op, "ppomax", "sm_90").launches:
        it = specialised(launch, "sm_90")
        ttir = triton.compile(it.source, target=it.target, options=it.options).asm["ttir"]
        uses = re.findall(r"^ *%\\w+ = (.* %stride_.*?) loc", ttir, re.M)
        narrow = [use for use in uses if not re.search("arith.extsi .* : i32 to i64", use)]
        found[launch.kernel.__name__] = narrow, len(uses)
print(json.dumps(found))
"""


def test_strides_are_multiplied_in_64_bits() -> None:
    """Those below 2^31 are passed as int32, and an index times such a stride may be beyond."""
    done = python("-c", STRIDES)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == {"paged_attention": [[], 3], "kv_write": [[], 4]}


ATTENTION = """
import json, sys
import torch
from compile_report import compile_all, kernel_entry, record
from ops_decode import paged_attention
from suites import BF16, FP32

WORST = [(8, 4096, 512, BF16, "meta", 256), (64, 4096, 1, FP32, "meta", 256)]
EVERY = [(8, 4096, new, dtype, "meta", width) for new in (1, 16, 512) for dtype in (BF16, torch.float16, FP32)
         for width in (64, 96, 128, 192, 256)]
chips, cases = sys.argv[2:], {"worst": WORST, "every": EVERY}[sys.argv[1]]
units = {}
for chip in chips:
    for *sizes, width in cases:
        (op,) = paged_attention(*sizes, width=width)
        units |= {key: (op, launch, chip) for key, launch in record(op, "ppomax", chip).launches}
found = compile_all([(launch, chip) for _, launch, chip in units.values()], 2)
entries = [kernel_entry(op, chip, launch, it) for (op, launch, chip), it in zip(units.values(), found, strict=True)]
print(json.dumps({"kernels": entries}))
"""


def compiled_attention(*arguments: str) -> dict[str, Any]:
    done = python("-c", ATTENTION, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout)
    assert len(report["kernels"]) >= len(arguments)
    return report


def test_attention_fits_chips_with_little_shared_memory() -> None:
    """Of heads of 256, whose tiles are the largest."""
    report = compiled_attention("worst", "sm_89", "sm_120")
    assert [spilling(report), too_large(report), without_matrix_units(report)] == [[], [], []]


@pytest.mark.slow
def test_every_kernel_fits_chips_with_little_shared_memory(tmp_path: Path) -> None:
    for report in (made_report(tmp_path, "--chips", *SMALL_CHIPS), compiled_attention("every", *SMALL_CHIPS)):
        assert {k["chip"] for k in report["kernels"]} == set(SMALL_CHIPS)
        assert [spilling(report), narrow(report), too_large(report), without_matrix_units(report)] == [[]] * 4


SUMS = """
import json, re, triton
from compile_report import record
from compiled import specialised
from ops_head import linear_logprobs, linear_ppo
from suites import BF16

def kernel(op):
    launch = next(x for _, x in record(op, "ppomax", "sm_90").launches if x.kernel.__name__.endswith("_rows"))
    it = specialised(launch, "sm_90")
    return launch.kernel.__name__, triton.compile(it.source, target=it.target, options=it.options).asm

def of_statistics(asm):
    # how the tiles that are summed lie on threads, and the arithmetic before the first result is stored
    layouts = dict(re.findall(r"^(#\\w+) = (#ttg.*)$", asm["ttgir"], re.M))
    summed = re.findall(r"\\}\\) : \\(tensor<(\\w+), (#\\w+)>\\) -> f32", asm["ttgir"])
    code = re.findall(r"\\b(?:[a-z]\\w*\\.[\\w.]*f32|shfl[\\w.]*|bar.sync)", asm["ptx"].split("st.global")[0])
    return [(shape, layouts[name]) for shape, name in summed], code

shape = (1024, 1024, 4096, BF16, "meta")
(op,) = [op for op in linear_logprobs(*shape) if op.name == "linear_logprobs forward"]
print(json.dumps({name: of_statistics(asm) for name, asm in map(kernel, (op, linear_ppo(*shape)[0]))}))
"""


def test_both_row_kernels_sum_in_one_order() -> None:
    """Of bf16 rows, whose gradient is stored in wider tiles than the logits are read in: scored and trained log-probs
    are to be equal bit for bit, and only a GPU's threads show where they are not."""
    done = python("-c", SUMS)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    (layouts, code), trained = found["linear_rows"], found["linear_policy_rows"]
    assert (len(layouts), len(code) > 50) == (3, True)
    assert [layouts, code] == trained
    assert any(each.startswith("max.NaN") for each in code)  # no maximum drops the NaN of a broken model


@pytest.mark.slow
def test_the_oldest_triton_too(tmp_path: Path) -> None:
    target = tmp_path / "triton"
    install = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), "triton==3.6.*")
    subprocess.run(install, check=True)
    environment = {"PYTHONPATH": f"{target}:{BENCH}", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    report = made_report(tmp_path, **environment)
    assert report["triton"].startswith("3.6.")
    assert [spilling(report), narrow(report), without_matrix_units(report)] == [[], [], []]
