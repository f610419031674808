"""Write a LoRA with random values for a model."""

from pathlib import Path

import torch
from torch import nn

from skyloom.generate.pipeline import Pipeline
from skyloom.generate.receipt import weights_digest
from skyloom.models.lora import LoraAdapter, adaptable_layers, save_lora


def write_lora(path: Path, pipeline: Pipeline) -> Path:
    """Write a LoRA of all layers of a pipeline's transformer that changes its frames visibly."""
    adapter = LoraAdapter.start(
        pipeline.transformer, adaptable_layers(pipeline.transformer), 2, 2.0
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    adapter.family = pipeline.info.record.name
    adapter.base = weights_digest(pipeline.info.manifest["files"])
    save_lora(path, adapter)
    return path
