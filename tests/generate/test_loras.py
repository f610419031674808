"""LoRAs of requests: they change the frames of their video only, and wrong ones are refused."""

import json
from dataclasses import replace

import pytest
import torch
from random_lora import write_lora
from safetensors.torch import load_file, save_file
from torch import nn

import skyloom
from skyloom.core.errors import CheckpointError, RequestError
from skyloom.core.files import sha256_file
from skyloom.generate.loras import MAX_LORAS, Lora, find_loras
from skyloom.generate.receipt import Receipt, weights_digest
from skyloom.generate.replay import check_loras, request_from_receipt
from skyloom.generate.request import Request
from skyloom.generate.window_keys import window_keys

ASK = Request("a red cat on the beach", seed=7, seconds=0.5)


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return skyloom.load(str(tiny_model), device="cpu")


@pytest.fixture
def felt(pipeline, tmp_path):
    """A LoRA of all layers of the tiny model, with random values."""
    return write_lora(tmp_path / "felt.safetensors", pipeline)


def test_frames_differ_with_a_lora_and_are_bit_identical_after_it(pipeline, felt):
    plain = pipeline.generate(ASK).frames
    weights = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    video = pipeline.generate(ASK, loras=[felt])
    assert not torch.equal(video.frames, plain)
    assert not torch.equal(pipeline.generate(ASK, loras=[f"{felt}:-0.5"]).frames, video.frames)
    assert torch.equal(pipeline.generate(ASK, loras=[f"{felt}:0"]).frames, plain)
    assert torch.equal(pipeline.generate(ASK, loras=[felt]).frames, video.frames)
    assert torch.equal(pipeline.generate(ASK).frames, plain)
    after = pipeline.transformer.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in weights.items())


def test_a_family_without_names_of_its_own_reads_files_of_peft(pipeline, tmp_path):
    name = next(
        name
        for name, layer in pipeline.transformer.named_modules()
        if isinstance(layer, nn.Linear) and "head" not in name
    )
    rows, columns = pipeline.transformer.get_submodule(name).weight.shape
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(*shape, generator=generator) for shape in ((2, columns), (rows, 2)))
    path = tmp_path / "peft.safetensors"
    keys = (f"transformer.{name}.lora_A.weight", f"transformer.{name}.lora_B.weight")
    save_file(dict(zip(keys, (down, up), strict=True)), path)
    plain = pipeline.generate(ASK).frames
    assert not torch.equal(pipeline.generate(ASK, loras=[path]).frames, plain)
    assert torch.equal(pipeline.generate(ASK).frames, plain)
    save_file({keys[0].replace(name, "elsewhere"): down}, path)
    with pytest.raises(RequestError, match="has 1 of 1 tensors for which"):
        pipeline.stream(ASK, loras=[path])


def test_videos_made_in_turn_by_one_pipeline_keep_their_own_loras(pipeline, felt):
    asks = (ASK, replace(ASK, loras=(Lora(str(felt)),)))
    expected = [pipeline.generate(ask).frames for ask in asks]
    streams = [pipeline.stream(ask) for ask in asks]
    ended: dict[int, torch.Tensor] = {}
    while len(ended) < len(streams):
        for index, stream in enumerate(streams):
            step = next(stream, None)
            if step is not None and step.video is not None:
                ended[index] = step.video.frames
    assert all(torch.equal(ended[index], frames) for index, frames in enumerate(expected))


def test_the_receipt_names_the_loras_and_replays(pipeline, felt):
    video = pipeline.generate(ASK, loras=[f"{felt}:0.5"])
    receipt = Receipt.from_dict(json.loads(json.dumps(video.receipt)))
    recorded = {"name": str(felt), "weight": 0.5, "sha256": sha256_file(felt)}
    assert receipt.loras == (recorded,)
    assert receipt.request.loras == (Lora(str(felt), 0.5),)
    check_loras(receipt)
    again = pipeline.generate(request_from_receipt(receipt))
    assert torch.equal(again.frames, video.frames)
    assert "loras" not in pipeline.generate(ASK).receipt
    save_file(load_file(felt), felt, metadata={"other": "header"})
    with pytest.raises(CheckpointError, match=r"made with LoRA .*felt"):
        check_loras(receipt)


def test_cached_windows_depend_on_the_loras(pipeline, felt):
    def keys(*loras: str) -> tuple[str, ...]:
        plan = pipeline.plan(replace(ASK, loras=loras))
        device, dtype = pipeline.device, pipeline.dtype
        return tuple(window_keys(plan, plan.runs[0], pipeline.info, device, dtype))

    assert len({keys(), keys(str(felt)), keys(f"{felt}:0.5")}) == 3
    assert keys(str(felt)) == keys(f"{felt}:1")


def test_names_are_files_of_the_data_folder(felt, tmp_path, monkeypatch):
    monkeypatch.setenv("SKYLOOM_DATA", str(tmp_path / "data"))
    with pytest.raises(RequestError, match="must name files that exist, got 'felt'") as refused:
        find_loras([Lora("felt")], None)
    assert "Available: none." in str(refused.value)
    folder = tmp_path / "data/loras"
    folder.mkdir(parents=True)
    felt.rename(folder / felt.name)
    (found,) = find_loras([Lora("felt", 0.5)], None)
    assert found.path == folder / "felt.safetensors"
    with pytest.raises(RequestError, match="Available: felt"):
        find_loras([Lora("../loras/felt")], None)


def test_a_worker_takes_names_of_its_settings_only(felt):
    (found,) = find_loras([Lora("ink")], {"ink": str(felt)})
    assert (found.path, found.sha256) == (felt, sha256_file(felt))
    for name in (str(felt), "felt"):
        with pytest.raises(RequestError, match="Available: ink"):
            find_loras([Lora(name)], {"ink": str(felt)})


def test_a_lora_that_does_not_fit_is_refused_with_its_first_wrong_key(pipeline, felt):
    tensors = load_file(felt)
    header = {"family": "diorama", "rank": "2", "alpha": "2.0"}
    header["base"] = weights_digest(pipeline.info.manifest["files"])
    first = min(tensors).removesuffix(".down")
    cases = {
        rf"{first}\.down .* got \(2, 3\)": {**tensors, f"{first}.down": torch.zeros(2, 3)},
        r"a\.b is no layer": {**tensors, "a.b.down": torch.zeros(2, 3), "z.up": torch.zeros(1)},
    }
    for message, wrong in cases.items():
        save_file(wrong, felt, metadata=header)
        with pytest.raises(RequestError, match=message):
            pipeline.stream(ASK, loras=[felt])
    save_file(tensors, felt, metadata={**header, "base": "0" * 64})
    with pytest.raises(RequestError, match="base of"):
        pipeline.stream(ASK, loras=[felt])


def test_the_forms_of_a_lora_in_a_request():
    forms = ["a", "b:0.5", {"name": "c"}, {"name": "d", "weight": -2}, Lora("x/e.safetensors", 1)]
    request = Request("a cat", loras=forms)
    assert [(lora.name, lora.weight) for lora in request.loras] == [
        ("a", 1.0),
        ("b", 0.5),
        ("c", 1.0),
        ("d", -2.0),
        ("x/e.safetensors", 1.0),
    ]
    assert Request.from_dict(json.loads(request.to_json())) == request
    assert "loras" not in Request("a cat").to_dict()


@pytest.mark.parametrize(
    ("loras", "message"),
    [
        ("felt", "loras must be a list of NAME or NAME:WEIGHT, got 'felt'"),
        ([3], "loras must be NAME or NAME:WEIGHT, got 3"),
        ([{"scale": 1}], "loras must be NAME or NAME:WEIGHT"),
        ([":1"], "name of a LoRA must be text, got ''"),
        (["felt:11"], "weight of LoRA 'felt' must be a number from -10 to 10, got 11"),
        (["felt:nan"], "weight of LoRA 'felt' must be a number from -10 to 10, got nan"),
        ([{"name": "felt", "weight": True}], "weight of LoRA 'felt' must be a number"),
        (["felt", "felt:2"], "loras must differ, got 'felt' twice"),
        ([f"{n}" for n in range(MAX_LORAS + 1)], f"loras must be at most {MAX_LORAS}, got"),
    ],
)
def test_wrong_loras_are_refused(loras, message):
    with pytest.raises(RequestError, match=message) as refused:
        Request("a cat", loras=loras)
    assert refused.value.field == "loras"
