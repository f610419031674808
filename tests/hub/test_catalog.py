"""The catalogue: complete, consistent, and exact about what nobody has verified."""

import re

import pytest

from skyloom.core.errors import RequestError
from skyloom.hub.catalog import load_catalog

UNVERIFIED = """
files/umt5_xxl_fp16/revision
files/umt5_xxl_fp8_e4m3fn_scaled/revision
files/wan2.1_t2v_1.3B_bf16/revision
files/wan2.1_t2v_1.3B_fp16/revision
files/wan2.1_t2v_14B_bf16/bytes
files/wan2.1_t2v_14B_bf16/path
files/wan2.1_t2v_14B_bf16/revision
files/wan2.1_t2v_14B_bf16/sha256
files/wan2.1_t2v_14B_fp16/bytes
files/wan2.1_t2v_14B_fp16/path
files/wan2.1_t2v_14B_fp16/revision
files/wan2.1_t2v_14B_fp16/sha256
files/wan2.1_t2v_14B_fp8_scaled/bytes
files/wan2.1_t2v_14B_fp8_scaled/path
files/wan2.1_t2v_14B_fp8_scaled/revision
files/wan2.1_t2v_14B_fp8_scaled/sha256
files/wan2.2_ti2v_5B_fp16/bytes
files/wan2.2_ti2v_5B_fp16/revision
files/wan2.2_vae/bytes
files/wan2.2_vae/dtype
files/wan2.2_vae/revision
files/wan2.2_vae/sha256
files/wan_2.1_vae/bytes
files/wan_2.1_vae/dtype
files/wan_2.1_vae/revision
files/wan_2.1_vae/sha256
models/wan2.1-1.3b/gpu_memory_gb
models/wan2.1-14b/gpu_memory_gb
models/wan2.2-5b/gpu_memory_gb
"""


def test_every_unverified_field_is_listed():
    assert load_catalog().unverified_fields() == UNVERIFIED.split()


def test_entries_are_consistent():
    catalog = load_catalog()
    used = {
        file.key for model in catalog.models.values() for p in model.parts.values() for file in p
    }
    assert used == set(catalog.files)
    for file in catalog.files.values():
        assert file.name == f"{file.key}.safetensors"
        assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
        assert file.bytes in (None, file.about_bytes)
    for model in catalog.models.values():
        assert set(model.parts) == {"transformer", "text_encoder", "tokenizer", "autoencoder"}
        assert model.licence.conditions


def test_a_variant_chooses_the_parts_that_have_it():
    model = load_catalog().find("wan2.1-1.3b")
    default = model.choose_files()
    assert default["transformer"].dtype == "bf16"
    assert default["text_encoder"].dtype == "fp8"
    assert default["tokenizer"] is default["text_encoder"]
    half = model.choose_files("fp16")
    assert {half["transformer"].dtype, half["text_encoder"].dtype} == {"fp16"}
    assert half["autoencoder"] == default["autoencoder"]
    with pytest.raises(RequestError, match="variant must be one of bf16, fp16, fp8"):
        model.choose_files("int4")


def test_unknown_names_get_the_nearest():
    with pytest.raises(RequestError, match=r"Did you mean wan2\.2-5b"):
        load_catalog().find("wan2.2-5")


def test_every_pickle_of_the_original_repositories_has_a_replacement():
    catalog = load_catalog()
    for name in ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "Wan2.2_VAE.pth"):
        assert catalog.replacement(name)
    assert catalog.replacement("other.pth") is None
