"""Choice of device and dtype: what is missing is refused in a sentence, never replaced silently."""

import logging

import pytest
import torch

from skyloom.core.device import choose_device, choose_dtype, multiplies_bf16
from skyloom.core.errors import ConfigError


@pytest.fixture
def gpus(monkeypatch):
    """Return a function that pretends there are GPUs of a compute capability."""

    def pretend(count, capability=(9, 0)):
        monkeypatch.setattr("torch.backends.cuda.is_built", lambda: True)
        monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)

    return pretend


def test_cuda_is_the_default_if_there_is_one(gpus):
    gpus(0)
    assert choose_device() == torch.device("cpu")
    gpus(2)
    assert choose_device() == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("count", "name", "message"),
    [
        (2, "cuda:2", "must be one of cuda:0, cuda:1, got cuda:2"),
        (0, "cuda", "no CUDA device. Check nvidia-smi"),
        (1, "gpu", "must be cpu, cuda, cuda:N or mps, got 'gpu'"),
        (1, "meta", "must be cpu, cuda, cuda:N or mps, got 'meta'"),
        (1, "cuda:-1", "must be cpu, cuda, cuda:N or mps, got 'cuda:-1'"),
    ],
)
def test_other_devices_are_refused(gpus, count, name, message):
    gpus(count)
    with pytest.raises(ConfigError, match=message):
        choose_device(name)


def test_a_torch_without_cuda_is_named(monkeypatch):
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: False)
    with pytest.raises(ConfigError, match=r"built without CUDA. Install its CUDA build"):
        choose_device("cuda:0")


def test_mps_is_used_by_name_only(gpus, monkeypatch):
    gpus(0)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert choose_device() == torch.device("cpu")
    assert choose_device("mps") == torch.device("mps")
    assert choose_dtype(torch.device("mps")) == torch.float32
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(ConfigError, match="no mps device"):
        choose_device("mps")


@pytest.mark.parametrize(
    ("capability", "native"), [((7, 5), False), ((8, 0), True), ((12, 0), True)]
)
def test_a_gpu_without_bf16_gets_fp32_and_a_warning(gpus, caplog, capability, native):
    gpus(1, capability)
    device = torch.device("cuda")
    assert multiplies_bf16(device) is native
    with caplog.at_level(logging.WARNING, "skyloom"):
        dtype = choose_dtype(device)
    assert dtype == (torch.bfloat16 if native else torch.float32)
    assert ("no native bf16: float32 is used" in caplog.text) is not native


def test_fp16_is_refused():
    assert choose_dtype(torch.device("cpu"), "bfloat16") == torch.bfloat16
    with pytest.raises(ConfigError, match="must be one of float32, bfloat16, got 'float16'"):
        choose_dtype(torch.device("cpu"), "float16")
