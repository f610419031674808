"""Solvers and noise levels that a model's record names: resume, receipts, edits, refusals."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import skyloom
from skyloom.core.errors import CheckpointError, NumericsError, RequestError
from skyloom.diffusion.schedule import wan_sigmas, whole_timesteps
from skyloom.generate.denoiser import Denoiser
from skyloom.generate.edit_spec import Edit
from skyloom.generate.request import Request
from skyloom.generate.window_keys import window_keys
from skyloom.models.diorama import config
from skyloom.models.family import Schedule
from skyloom.models.registry import read_model

SCHEDULES = {
    "unipc": {"solver": "unipc", "levels": "wan", "shift": 5.0},
    "renoise": {
        "solver": "renoise",
        "levels": "listed",
        "shift": 8.0,
        "timesteps": [1000, 757, 522],
    },
}
STEPS = {"unipc": 4, "renoise": 3}
LONG = Request("a red cat on the beach", seed=7, seconds=1.75)


def scheduled(source, folder, schedule, **manifest):
    """A copy of a model with another schedule and without a student."""
    shutil.copytree(source, folder)
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    values.pop("student_steps")
    values.pop("shift")
    path.write_text(json.dumps({**values, "schedule": schedule, **manifest}))
    return folder


@pytest.fixture(scope="module")
def pipelines(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("scheduled")
    return {
        name: skyloom.load(
            str(scheduled(tiny_model, root / name, schedule, num_steps=STEPS[name])),
            dtype="float32",
        )
        for name, schedule in SCHEDULES.items()
    }


@pytest.fixture
def pipeline(pipelines):
    return pipelines["unipc"]


def frames_of(steps):
    return torch.cat([step.frames for step in steps if step.frames is not None])


@pytest.mark.parametrize("name", SCHEDULES)
def test_stopped_after_any_step_it_goes_on_to_the_same_frames(pipelines, name, tmp_path):
    pipeline = pipelines[name]
    assert len(pipeline.plan(LONG).windows) == 2
    whole = pipeline.generate(LONG)
    for count in range(2, len(list(pipeline.stream(LONG)))):
        folder = tmp_path / str(count)
        stream = pipeline.stream(LONG, resume=folder)
        for _ in range(count):
            next(stream)
        stream.close()
        again = list(pipeline.stream(LONG, resume=folder))
        assert torch.equal(frames_of(again), whole.frames), count
        assert again[-1].receipt == whole.receipt


def test_resuming_repeats_no_step(pipeline, tmp_path, monkeypatch):
    calls = []
    velocity = Denoiser.velocity
    monkeypatch.setattr(Denoiser, "velocity", lambda *given: calls.append(1) or velocity(*given))
    stream = pipeline.stream(LONG, resume=tmp_path)
    for _ in range(4):  # the text and three steps
        next(stream)
    stream.close()
    list(pipeline.stream(LONG, resume=tmp_path))
    assert len(calls) == 4 * len(pipeline.plan(LONG).windows)


def test_solvers_give_different_videos(pipelines, tiny_model):
    frames = [pipelines[name].generate(LONG).frames for name in SCHEDULES]
    frames.append(skyloom.load(str(tiny_model), dtype="float32").generate(LONG).frames)
    assert not torch.equal(frames[0], frames[1])
    assert not torch.equal(frames[0], frames[2])


def test_the_noise_of_every_step_comes_from_the_seed(pipelines):
    pipeline = pipelines["renoise"]
    assert torch.equal(pipeline.generate(LONG).frames, pipeline.generate(LONG).frames)
    other = pipeline.generate(replace(LONG, seed=8)).frames
    assert not torch.equal(pipeline.generate(LONG).frames, other)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_receipt_names_solver_levels_and_shift(pipelines, name):
    receipt = pipelines[name].generate(LONG).receipt
    assert Schedule(**_tuples(receipt["notes"]["schedule"])) == pipelines[name].info.schedule
    assert receipt["request"]["num_steps"] == STEPS[name]
    assert receipt["request"]["guidance_scale"] == 2.0


def _tuples(values):
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }


def test_levels_of_diffusers_are_for_comparison(pipeline):
    request = replace(LONG, schedule="diffusers")
    made = pipeline.generate(request)
    assert made.receipt["request"]["schedule"] == "diffusers"
    assert made.receipt["notes"]["schedule"]["levels"] == "diffusers"
    assert not torch.equal(made.frames, pipeline.generate(LONG).frames)
    same = pipeline.generate(replace(LONG, schedule="wan"))
    assert torch.equal(same.frames, pipeline.generate(LONG).frames)


def test_a_model_with_its_own_levels_refuses_others(tiny_model, pipelines):
    tiny = skyloom.load(str(tiny_model), dtype="float32")
    with pytest.raises(RequestError, match="schedule must be linear for this model, got 'wan'"):
        tiny.plan(replace(LONG, schedule="wan"))
    with pytest.raises(RequestError, match="num_steps must be 3 for a model with listed"):
        pipelines["renoise"].plan(replace(LONG, num_steps=4))


def test_the_model_is_told_whole_timesteps(pipeline, monkeypatch):
    told = []
    forward = type(pipeline.transformer).forward

    def record(self, latent, sigma, *given, **named):
        told.append(1000 * sigma)
        return forward(self, latent, sigma, *given, **named)

    monkeypatch.setattr(type(pipeline.transformer), "forward", record)
    pipeline.generate(replace(LONG, seconds=0.5, guidance_scale=1.0))
    expected = whole_timesteps(wan_sigmas(4, 5.0))[:-1].tolist()
    assert expected == [999, 937, 833, 624]
    for timesteps, one in zip(told, expected, strict=True):
        torch.testing.assert_close(timesteps, torch.full_like(timesteps, one))


def test_listed_timesteps_are_told_and_solved_at_the_levels_of_training(pipelines, monkeypatch):
    pipeline = pipelines["renoise"]
    told = []
    solved = []
    forward = type(pipeline.transformer).forward
    velocity = Denoiser.velocity

    def record(self, latent, sigma, *given, **named):
        told.append(round(1000 * float(sigma[0, 0]), 3))
        return forward(self, latent, sigma, *given, **named)

    def record_solver(self, latent, sigma, span):
        solved.append(float(sigma[0, 0]))
        return velocity(self, latent, sigma, span)

    monkeypatch.setattr(type(pipeline.transformer), "forward", record)
    monkeypatch.setattr(Denoiser, "velocity", record_solver)
    pipeline.generate(replace(LONG, seconds=0.5, guidance_scale=1.0))
    assert told == [1000, 757, 522]
    assert solved == pytest.approx([1.0, 2.24 / 2.96, 0.96 / 1.84], abs=1e-7)


def test_the_shift_depends_on_the_size(tiny_model, tmp_path):
    schedule = {**SCHEDULES["unipc"], "shift": 3.0, "area_shifts": [[4096, 5.0]]}
    pipeline = skyloom.load(str(scheduled(tiny_model, tmp_path / "sized", schedule)))
    assert pipeline.plan(replace(LONG, size="64x32")).schedule.shift == 3.0
    assert pipeline.plan(replace(LONG, size="64x64")).schedule.shift == 5.0


@pytest.mark.parametrize(
    ("schedule", "cause"),
    [
        ({"solver": "unipc"}, "levels must be wan or diffusers for the solver unipc"),
        ({"levels": "listed"}, "timesteps must be falling"),
        ({"levels": "listed", "timesteps": [5, 7]}, "timesteps must be falling"),
        ({"shift": 0}, "shift must be > 0"),
        ({"solver": "heun"}, "solver must be one of euler, unipc, renoise"),
        ({"speed": 1}, "unknown key 'speed'"),
        ("fast", "not valid"),
    ],
)
def test_an_impossible_schedule_is_refused(tiny_model, tmp_path, schedule, cause):
    folder = scheduled(tiny_model, tmp_path / "wrong", schedule)
    with pytest.raises(CheckpointError, match=cause):
        read_model(folder)


def test_keys_of_cached_windows_depend_on_the_schedule(pipeline):
    def keys(**fields):
        plan = pipeline.plan(replace(LONG, **fields))
        where = (pipeline.device, pipeline.dtype)
        return window_keys(plan, plan.runs[0], pipeline.info, *where)

    assert keys() == keys(schedule="wan")
    assert not set(keys()) & set(keys(schedule="diffusers"))


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_edit_moves_further_from_its_source_with_more_strength(pipelines, name, tmp_path):
    """Against nearly no strength, since the tiny autoencoder does not restore its input."""
    pipeline = pipelines[name]
    pipeline.generate(replace(LONG, seconds=1)).save(tmp_path / "source.mkv")
    latents = []
    for strength in (0.01, 0.3, 0.95):
        edit = Edit("remix", (tmp_path / "source.mkv",), strength=strength)
        steps = pipeline.stream(Request("a blue dog", seed=3, edit=edit))
        latents.append([step.latent for step in steps if step.phase == "denoise"][-1])
    distance = [float((latent - latents[0]).square().mean()) for latent in latents]
    assert 0 < distance[1] < distance[2]


def test_what_an_inpainting_keeps_is_the_source_bit_for_bit(pipeline, tmp_path):
    source = pipeline.generate(replace(LONG, seconds=1))
    source.save(tmp_path / "source.mkv")
    made = {}
    for prompt in ("a blue dog", "a green boat"):
        edit = Edit("inpaint", (tmp_path / "source.mkv",), region="8,8,16,16")
        made[prompt] = pipeline.generate(Request(prompt, seed=3, edit=edit)).frames
    changed = (made["a blue dog"] != source.frames).any(dim=-1).any(dim=0)
    assert changed.any()
    assert not changed[:4].any()
    assert not changed[:, :4].any()
    assert not torch.equal(*made.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stop_the_generation_at_once(
    pipeline, tmp_path, monkeypatch, value
):
    calls = []
    velocity = Denoiser.velocity

    def broken(self, latent, sigma, span):
        calls.append(1)
        made = velocity(self, latent, sigma, span)
        if len(calls) == 3:
            made[0, 0, -1, 0, 0] = value
        return made

    monkeypatch.setattr(Denoiser, "velocity", broken)
    with pytest.raises(NumericsError, match=r"Step 3 of 4 .* not finite.*weights may be damaged"):
        pipeline.export(LONG, tmp_path / "cat.mp4")
    assert len(calls) == 3
    assert not list(tmp_path.iterdir())


def test_a_step_that_is_not_finite_is_not_a_checkpoint(pipeline, tmp_path, monkeypatch):
    velocity = Denoiser.velocity
    monkeypatch.setattr(Denoiser, "velocity", lambda *given: velocity(*given) * torch.nan)
    with pytest.raises(NumericsError):
        list(pipeline.stream(LONG, resume=tmp_path))
    assert not list(tmp_path.rglob("step-*"))


def test_float16_is_named_as_the_likely_cause(pipeline, monkeypatch):
    velocity = Denoiser.velocity

    def broken(self, latent, sigma, span):
        made = velocity(self, latent, sigma, span) * torch.nan
        self.dtype = torch.float16
        return made

    monkeypatch.setattr(Denoiser, "velocity", broken)
    with pytest.raises(NumericsError, match="use bfloat16 or float32"):
        pipeline.generate(LONG)


def test_a_decoder_is_tried_before_sampling_and_changes_no_frame(pipeline, monkeypatch):
    untried = pipeline.generate(LONG).frames
    monkeypatch.setattr(config, "FAMILY", replace(config.FAMILY, trial_decode=True))
    assert torch.equal(pipeline.generate(LONG).frames, untried)
    decode = type(pipeline.autoencoder).decode_step

    def broken(self, latent, cache):
        pixels, cache = decode(self, latent, cache)
        return pixels * torch.nan, cache

    monkeypatch.setattr(type(pipeline.autoencoder), "decode_step", broken)
    phases = []
    with pytest.raises(NumericsError, match="autoencoder gave pixels that are not finite"):
        phases.extend(step.phase for step in pipeline.stream(LONG))
    assert phases == ["text"]
