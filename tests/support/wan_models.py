"""Tiny Wan models with random weights, written as diffusers writes its folders."""

import json
import math
from pathlib import Path

import pytest
import sentencepiece
import torch
from torch import nn

from skyloom.core.files import sha256_file
from skyloom.core.hash_cache import file_identity

TEXT_WIDTH = 32
SIZES = {"multiple": 32, "min_side": 32, "max_side": 256, "max_area": 65536, "default": [64, 64]}
WORDS = "a cat dog runs red on the beach at night in rain quick brown fox jumps over lazy"


def randomise(module: nn.Module, seed: int) -> None:
    """Draw weights of unit gain, so that no branch is negligible."""
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "norm" in name and name.endswith(("weight", "gamma")):
            nn.init.normal_(parameter, mean=1.0, std=0.2)
        elif name.endswith("bias") and parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.1)
        elif name.endswith("scale_shift_table"):
            nn.init.normal_(parameter, std=0.3)
        else:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()))


def make_transformer(channels: int, seed: int = 0):
    """A transformer of diffusers with two layers."""
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT_WIDTH,
        freq_dim=256,
        ffn_dim=64,
        num_layers=2,
    ).eval()
    randomise(model, seed)
    return model


def make_autoencoder(kind: str, seed: int = 1):
    """An autoencoder of diffusers: of Wan "2.1" or "2.2", 16 channels wide."""
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    options = {
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
    }
    if kind == "2.2":
        from skyloom.models.wan.autoencoder import MEAN_2_2, STD_2_2

        options |= {
            "base_dim": 16,
            "decoder_base_dim": 16,
            "z_dim": 48,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
            "latents_mean": list(MEAN_2_2),
            "latents_std": list(STD_2_2),
        }
    else:
        options |= {"base_dim": 16, "z_dim": 16}
    model = diffusers.AutoencoderKLWan(**options).eval()
    randomise(model, seed)
    return model


def make_text_encoder(vocabulary: int, seed: int = 2):
    """A UMT5 encoder of transformers with two layers."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    config = transformers.UMT5Config(
        vocab_size=vocabulary,
        d_model=TEXT_WIDTH,
        d_kv=8,
        num_heads=4,
        d_ff=48,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
    )
    model = transformers.UMT5EncoderModel(config).eval()
    randomise(model, seed)
    return model


def write_vocabulary(path: Path) -> int:
    """Train a tiny SentencePiece vocabulary; return its size."""
    import io

    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 20),
        model_writer=content,
        vocab_size=60,
        model_type="unigram",
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=content.getvalue()).vocab_size()


def write_parts(folder: Path, variant: str) -> dict[str, object]:
    """Write a folder in diffusers' layout; return the reference parts by name."""
    channels, kind = (48, "2.2") if variant == "ti2v-5b" else (16, "2.1")
    vocabulary = write_vocabulary(folder / "tokenizer" / "spiece.model")
    parts = {
        "transformer": make_transformer(channels),
        "vae": make_autoencoder(kind),
        "text_encoder": make_text_encoder(vocabulary),
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    return parts


def write_model(folder: Path, weights: Path, variant: str, **values: object) -> Path:
    """Write the manifest of a model that uses the files of `write_parts`."""
    files = {
        "transformer": weights / "transformer" / "diffusion_pytorch_model.safetensors",
        "text_encoder": weights / "text_encoder" / "model.safetensors",
        "tokenizer": weights / "tokenizer" / "spiece.model",
        "autoencoder": weights / "vae" / "diffusion_pytorch_model.safetensors",
    }
    rows = {
        part: [
            {
                "path": str(path),
                "bytes": path.stat().st_size,
                "sha256": sha256_file(path),
                "identity": file_identity(path.stat()),
                "fetched": False,
            }
        ]
        for part, path in files.items()
    }
    manifest = {
        "name": folder.name,
        "family": "wan",
        "variant": variant,
        "sizes": SIZES,
        "frames": 13,
        "num_steps": 3,
        **values,
        "parts": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
