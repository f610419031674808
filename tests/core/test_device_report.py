"""Report of devices: GPUs by what torch says of them, attention by what really runs."""

from types import SimpleNamespace

import pytest
import torch

from skyloom.core.device_report import (
    describe_attention,
    describe_cpu,
    describe_gpu,
    device_rows,
    find_driver,
)

CPU = torch.device("cpu")


@pytest.fixture
def turing(monkeypatch):
    """Pretend that there is one GPU without bf16."""
    properties = SimpleNamespace(name="NVIDIA T4", major=7, minor=5)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: properties)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (3 * 2**30, 16 * 2**30))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))


def test_a_gpu_is_described_in_one_line(turing):
    assert describe_gpu(0) == (
        "cuda:0 NVIDIA T4, compute capability 7.5, 16.0 GiB, 3.0 GiB free, no bf16: float32 is used"
    )


def test_rows_of_a_machine_with_a_gpu(turing, monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 580.95.05\necho 580.95.05\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    rows = list(device_rows(CPU, torch.float32))
    assert rows[0] == ("cuda", "12.8, driver 580.95.05")
    assert [name for name, _ in rows] == ["cuda", "gpu", "cpu", "attention"]


@pytest.mark.parametrize("body", ["exit 9", "echo", "kill -9 $$"])
def test_a_broken_driver_is_unknown(monkeypatch, tmp_path, body):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert find_driver() == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert find_driver() == "unknown"


def test_rows_of_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    for built, text in ((True, "none found"), (False, "none: this torch is built without CUDA")):
        monkeypatch.setattr("torch.backends.cuda.is_built", lambda built=built: built)
        assert dict(device_rows(CPU, torch.float32))["gpu"] == text
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert "--device mps; not tested" in dict(device_rows(CPU, torch.float32))["gpu"]


def test_attention_is_reported_by_what_runs(monkeypatch):
    report = describe_attention(CPU, torch.float32)
    chosen, _, running = report.partition("; kernels that run: ")
    assert chosen == "flash_attention_for_cpu"
    assert running.split(", ") == ["flash", "math"]
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        assert describe_attention(CPU, torch.float32).startswith("math; ")
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


def test_instructions_of_the_cpu(monkeypatch):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    assert describe_cpu().endswith("bf16 by AVX512-BF16, AMX")
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    assert describe_cpu().endswith("bf16 by none, so float32 is used")
