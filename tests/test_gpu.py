"""bench/gpu.py: every stage at toy shapes, what fails and what hangs costs one line, and what is counted of a step."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_gpt
from bench import gpu, gpu_card, gpu_correct, gpu_step
from conftest import PATIENCE, ROOT, clean_env

STAGES = ("machine", "correct", "train", "score", "runs")


def run_gpu(out: Path, *words: object) -> subprocess.CompletedProcess:
    command = map(str, [sys.executable, ROOT / "bench" / "gpu.py", "--device", "cpu", "--out", out, *words])
    return subprocess.run(list(command), env=clean_env(), capture_output=True, text=True, timeout=3 * PATIENCE)


def result(out: Path, stage: str) -> dict:
    return json.loads((out / f"{stage}.json").read_text())


# Another trainer: PR 367's variables, its lines, and more after training than anyone waits for.
OTHER = """
import os, time
assert os.environ["TRAIN_BATCH_TOKENS"] == "524288" and os.environ["MODEL_DIM"] == "32"
for step in range(0, int(os.environ["ITERATIONS"]) + 1, int(os.environ["TRAIN_LOG_EVERY"])):
    print(f"step:{step}/40 train_loss:3.0000 train_time:{100 + 20 * step}ms step_avg:{20 + 100 / max(step, 1):.2f}ms")
time.sleep(1000)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """All stages."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "other.py").write_text(OTHER)
    return folder / "out", run_gpu(folder / "out", "--seconds", 2 * PATIENCE, "--against", folder / "other.py")


@pytest.mark.rehearsal
def test_every_stage_runs(whole):
    out, done = whole
    results = {stage: result(out, stage) for stage in STAGES}
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()
    assert [r["failures"] for r in results.values()] == [[]] * 5
    assert {r["status"] for r in results.values()} == {"ok"}
    summary = (out / "summary.md").read_text()
    assert all(f"## {stage}: ok" in summary for stage in STAGES)
    assert "Toy shapes on a CPU" in summary
    assert len(list(out.iterdir())) == 8  # five results, summary.md, log.txt, results.jsonl


@pytest.mark.rehearsal
def test_what_the_stages_find(whole):
    out, _ = whole
    machine, correct, train, score, runs = (result(out, stage)["figures"] for stage in STAGES)
    assert machine["copy_bytes_per_second"] > 0 and machine["launch_seconds"]["one by one"] > 0
    assert all(rates["bf16"] > 0 for rates in machine["product_flops"].values())
    assert correct["same seed twice"] == "the same file" and correct["operators that differ"] == []
    assert correct["run two_ranks: gap between memory and file, bpb"]["error"] == 0
    assert correct["killed and resumed, or gloo group of one: another file"]["error"] == 0
    for preset in ("pr367", "golf16mb"):
        for batch in ("1,024", "2,048"):
            found = train[f"{preset}, {batch}"]
            assert found["tokens_per_second"] == pytest.approx(int(batch.replace(",", "")) / found["seconds"])
            parts = train[f"{preset}, {batch}: host"]
            assert parts["forward"] < parts["forward and backward"] < parts["step"]
        assert score[f"{preset}, 4 windows"]["tokens_per_second"] > 0
    assert train["pr367, 2,048"]["micro_batches"] == 2
    assert len(train["pr367, 1,024: textbook"]["pairs"]) == 2
    assert train["against other.py"]["seconds"] == pytest.approx(0.020)  # of its later steps, without its first 100 ms
    assert runs["one run"]["roundtrip_gap"] == 0 and runs["matrix"]["done"] == 2
    assert len((out / "results.jsonl").read_text().splitlines()) == 2


def test_a_failure_is_a_line_and_the_next_stage_runs(tmp_path):
    """Data that is not there: stages that need it say so, and those that do not are as ever."""
    out, missing = tmp_path / "out", tmp_path / "nothing"
    done = run_gpu(out, "--seconds", PATIENCE, "--only", "machine", "score", "runs", "--data", missing)
    assert done.returncode == 1
    assert result(out, "machine")["status"] == "ok"
    score, runs = result(out, "score"), result(out, "runs")
    assert "pr367, 4 windows" in score["figures"]
    assert [line.split(":")[0] for line in score["failures"]] == ["audit"]
    assert f"{missing}: no such data folder" in runs["failures"][0] and runs["status"] == "failed"
    assert (out / "summary.md").read_text().count("- FAILED") == 2


def test_time_is_up(tmp_path):
    """A stage that is cut off has a line, and leaves the next one its time."""
    done = run_gpu(tmp_path, "--seconds", 4, "--only", "machine", "correct")
    assert done.returncode == 1
    for stage in ("machine", "correct"):
        found = result(tmp_path, stage)
        assert found["status"] == "cut off" and found["failures"][-1].startswith(f"{stage}: cut off after its ")


def test_no_gpu_is_a_line(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run_gpu(tmp_path, "--device", "cuda", "--only", "score")
    assert done.returncode == 1
    assert result(tmp_path, "score")["failures"] == [
        "score: torch finds no CUDA device; --device cpu shows whether the stages work"]


@pytest.mark.parametrize(("program", "said"), [
    ("print('fine')", ""),
    ("import sys; print('error: no disk'); print('so it ends'); sys.exit(3)", "ended with status 3: error: no disk"),
    ("import os; print('now', flush=True); os.abort()", f"ended with signal {signal.SIGABRT.value}: now"),
    ("import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(1000)", "cut off after its 1 s"),
])
def test_supervision(tmp_path, monkeypatch, program, said):
    monkeypatch.setattr(gpu, "AFTER_ASKING", 0.2)
    (tmp_path / "log").write_text("error: of the stage before\n")
    assert gpu.supervise([sys.executable, "-c", program], 1.0 if "sleep" in program else PATIENCE,
                         tmp_path / "log") == said


def test_a_wrong_result_is_a_failure(tmp_path):
    words = ["--out", str(tmp_path), "--work", str(tmp_path), "--device", "cpu", "--stage", "correct"]
    stage = gpu.Stage("correct", gpu.parse_args(words))
    stage.check("exact", 0.0, 0.0)
    stage.check("near", 0.02, 0.01)
    stage.check("not a number", float("nan"), 0.01)
    assert [line.split(":")[0] for line in result(tmp_path, "correct")["failures"]] == ["near", "not a number"]


# -- what is counted --------------------------------------------------------------------------------------------------


PR367 = train_gpt.Config(**train_gpt.PRESETS["pr367"])


def test_flops_of_pr367():
    """By hand: 12 blocks of q, proj 768 x 768, k, v 384 x 768, up, down 2496 x 768, and the head 1024 x 768."""
    weights = 12 * (2 * 768 * 768 + 2 * 384 * 768 + 2 * 2496 * 768) + 1024 * 768
    assert gpu_step.flops_per_token(PR367) == (6 * weights, 6 * 12 * 768 * 2048)
    assert gpu_step.utilisation(PR367, 850_000) == pytest.approx(0.448, abs=0.001)


def test_flops_are_those_that_run():
    """Products of a step, as torch counts them."""
    config = train_gpt.Config(num_layers=3, model_dim=64, num_heads=4, num_kv_heads=2, mlp_hidden=96, vocab_size=200,
                              train_seq_len=32, eval_stride=32)
    model = train_gpt.GPT(config)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    train_gpt.Latents(model, config)
    ids = torch.randint(200, (2, 32))
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    counted = {op: flops for op, flops in counter.get_flop_counts()["Global"].items() if "bmm" not in str(op)}
    assert sum(counted.values()) == 64 * gpu_step.flops_per_token(config)[0]


def test_work_of_a_step():
    """The kinds add up, all but the optimizer's grow with the tokens, and the floor is the known one."""
    one, eight = (gpu_step.step_work(PR367, 65_536 * n, n) for n in (1, 8))
    flops = sum(w.flops for w in one if w.name != "optimizer and refresh")
    assert flops == 65_536 * sum(gpu_step.flops_per_token(PR367))
    for a, b in zip(one, eight, strict=True):
        times = 1 if a.name == "optimizer and refresh" else 8
        assert (b.flops, b.bytes) == (times * a.flops, times * a.bytes)
    assert 0.050 < sum(w.seconds for w in one) < 0.060
    assert "tokens/s on an H100 of 989 TFLOP/s and 3.35 TB/s" in gpu_step.floor_lines(one, 65_536)[-1]


@pytest.mark.parametrize(("name", "kind"), [
    ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x64x64", "attention"),
    ("nvjet_tst_192x128_64x4_2x1_v_bz_coopA_NTT", "products"),
    ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>", "products"),
    ("triton_tem_fused_mm_3", "products"),
    ("triton_red_fused__to_copy_mm_mul_rms_norm_7", "elementwise"),  # it takes a product's output
    ("triton_poi_fused_scaled_dot_product_attention_4", "elementwise"),
    ("triton_per_fused__to_copy_exp_tanh_where_12", "loss"),
    ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
    ("Memcpy HtoD (Pinned -> Device)", "copies"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "elementwise"),
])
def test_kinds_of_kernels(name, kind):
    assert gpu_step.kind_of(name) == kind


def test_profile_of_a_trace():
    """Two steps, in microseconds: kernels that overlap, one in the optimizer's range by its launch, a gap."""
    def event(cat, name, ts, dur, correlation=None):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"correlation": correlation}}

    trace = {"traceEvents": [
        {"ph": "M", "name": "process_name"},
        event("user_annotation", "optimizer", 100, 50), event("user_annotation", "other", 0, 1000),
        event("cuda_runtime", "cudaLaunchKernel", 10, 5, 1), event("cuda_driver", "cuLaunchKernelEx", 20, 5, 2),
        event("cuda_runtime", "cudaLaunchKernel", 120, 5, 3),
        event("kernel", "nvjet_tst", 1000, 400, 1), event("kernel", "triton_poi_fused_add_0", 1300, 300, 2),
        event("kernel", "nvjet_tst", 2000, 200, 3), event("gpu_memset", "Memset (Device)", 2300, 100, 4),
    ]}
    profile = gpu_step.read_profile(trace, 2)
    found = {kind: ms for kind, ms in profile.kinds.items() if ms}
    assert found == pytest.approx({"products": 0.2, "elementwise": 0.15, "optimizer": 0.1, "copies": 0.05})
    assert profile.busy == pytest.approx(0.45) and profile.launches == 2
    assert profile.longest[0] == (pytest.approx(0.3), 1.0, "nvjet_tst")
    assert profile.idle == [(pytest.approx(0.2), 0.5, "triton_poi_fused_add_0 -> nvjet_tst"),
                            (pytest.approx(0.05), 0.5, "nvjet_tst -> Memset (Device)")]
    lines = gpu_step.profile_lines(profile, 0.6)
    assert "launch gaps               0.150 ms  25.0%" in lines


# -- what results are compared with -----------------------------------------------------------------------------------


def test_float64_attention_is_torchs():
    q, k, v = (torch.randn(2, heads, 16, 8) for heads in (4, 2, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(gpu_card.attention_in_float64(q, k, v), expected)
    torch.testing.assert_close(gpu_card.attention_in_float64(q[:, :, -3:], k, v), expected[:, :, -3:])


@pytest.mark.parametrize("group", [128, 200])
def test_rounding_to_eight_bits(group):
    """Ternary codes are exact; others are off by half of a step of e4m3 at most, whatever their row's scale is."""
    codes = torch.randint(-1, 2, (8, 200)).float()
    scales = torch.rand(8, 1) + 0.5
    found = gpu_card.values(*gpu_card.rounded(codes * scales, group, torch.float8_e4m3fn), group)
    torch.testing.assert_close(found, (codes * scales).double(), rtol=1e-6, atol=0)
    x = torch.randn(8, 200) * scales
    found = gpu_card.values(*gpu_card.rounded(x, group, torch.float8_e4m3fn), group)
    assert gpu_correct.error_of([found], [x]) < 2**-4
    found = gpu_card.values(*gpu_card.rounded(x, group, torch.int8), group)
    assert float((found - x).abs().max()) <= float(x.abs().max()) / 254 * 1.001
