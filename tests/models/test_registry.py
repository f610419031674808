"""Records of families, what manifests override, and size rules."""

import json
from dataclasses import replace
from inspect import signature
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyloom.core.errors import CheckpointError, RequestError
from skyloom.generate.edit_verbs import EDIT_VERBS, VERBS_WITHOUT_MODEL
from skyloom.models.base import FamilyLoader
from skyloom.models.family import Quality, Rollout, SizeRule
from skyloom.models.registry import (
    FAMILIES,
    family_module,
    find_family,
    find_model,
    read_model,
)

LOADERS = [name for name in vars(FamilyLoader) if not name.startswith("_")]
RULE = SizeRule(multiple=32, min_side=64, max_side=1280, max_area=1280 * 720, default=(832, 480))


def model(folder: Path, **manifest) -> Path:
    """A model folder with a manifest alone."""
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_short_manifest_is_completed_by_the_record(tmp_path):
    info = read_model(model(tmp_path, name="x", family="diorama"))
    record = info.record
    assert (info.fps, info.frames, info.schedule) == (record.fps, record.frames, record.schedule)
    assert info.size_rule == record.sizes
    assert info.default_size == "256x256"
    assert info.qualities == {"best": Quality(record.num_steps, record.guidance_scale)}
    assert info.edit_verbs == record.edit_verbs
    assert info.rollout is None


def test_a_manifest_overrides_the_record(tmp_path):
    info = read_model(
        model(
            tmp_path,
            name="x",
            family="diorama",
            licence="MIT",
            fps=24,
            sizes=["64x32", "32x32"],
            student_steps=8,
            knows={"things": ["cat"]},
            edit_verbs=["extend"],
        )
    )
    assert (info.licence, info.fps, info.size_rule.names) == ("MIT", 24, ("64x32", "32x32"))
    assert info.qualities["fast"] == Quality(8, 1.0, student=True)
    assert info.knows == {"things": ("cat",)}
    assert info.edit_verbs == ("extend",)


def test_a_student_has_the_steps_of_the_family(tmp_path):
    info = read_model(model(tmp_path, name="x", family="diorama", student=True))
    assert info.qualities["fast"] == info.record.few_step
    assert info.quality == "fast"


def test_a_manifest_may_hold_a_size_rule(tmp_path):
    table = {
        "multiple": 16,
        "min_side": 32,
        "max_side": 64,
        "max_area": 2048,
        "default": [64, 32],
    }
    info = read_model(model(tmp_path, name="x", family="diorama", sizes=table))
    assert info.size_rule.names == ("64x32",)
    info.size_rule.check(48, 32)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"name": "x"}, "lacks 'family'"),
        (
            {"name": "x", "family": "other"},
            f"family must be one of {', '.join(FAMILIES)}, got 'other'",
        ),
        ({"name": "x", "family": "diorama", "sizes": "wide"}, "sizes in .* must be a list"),
        ({"name": "x", "family": "diorama", "sizes": []}, "sizes in .* must be a list"),
        ({"name": "x", "family": "diorama", "sizes": {"multiple": 1}}, "sizes in .* must be a"),
    ],
)
def test_damaged_manifests_are_named(tmp_path, manifest, message):
    with pytest.raises(CheckpointError, match=message):
        read_model(model(tmp_path, **manifest))


@pytest.mark.parametrize("family", FAMILIES)
def test_records_are_complete(family):
    record = find_family(family)
    assert record.name == family
    assert set(record.edit_verbs) <= set(EDIT_VERBS)
    record.sizes.check(*record.sizes.default)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", LOADERS)
def test_loaders_have_the_parameters_of_the_contract(family, name):
    _, *parameters = signature(getattr(FamilyLoader, name)).parameters
    function = getattr(family_module(family, "load"), name)
    assert list(signature(function).parameters) == parameters


def test_a_family_without_a_student_refuses_models_with_one(tmp_path, monkeypatch):
    record = replace(find_family("diorama"), few_step=None, rollout=Rollout(1, 2, 3))
    monkeypatch.setattr("skyloom.models.diorama.config.FAMILY", record)
    info = read_model(model(tmp_path, name="x", family="diorama"))
    assert list(info.qualities) == ["best"]
    assert info.rollout == record.rollout
    for manifest in ({"student": True}, {"student_steps": 4}):
        with pytest.raises(CheckpointError, match="have no student"):
            read_model(model(tmp_path, name="x", family="diorama", **manifest))


def test_the_diorama_can_do_every_edit_that_generates():
    record = find_family("diorama")
    assert set(record.edit_verbs) == set(EDIT_VERBS) - set(VERBS_WITHOUT_MODEL)


def test_the_bundled_model_is_of_the_family_that_was_named_skyloom():
    info = find_model("diorama")
    assert info.family == "skyloom"
    assert info.record is find_family("diorama")
    assert info.size_rule.names == ("128x128",)


def test_listed_sizes_are_the_only_ones():
    rule = SizeRule.of_sizes(("128x128", "192x128"))
    rule.check(192, 128)
    assert rule.nearest(200, 100) == (192, 128)
    with pytest.raises(RequestError, match="one of 128x128, 192x128, got 128x192") as caught:
        rule.check(128, 192)
    assert caught.value.field == "size"
    assert caught.value.hint == "The nearest size is 128x128."


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ((832, 480), (832, 480)),
        ((1920, 1080), (1280, 704)),
        ((1, 1), (64, 64)),
        ((2000, 10), (1280, 64)),
        ((100, 100), (96, 96)),
    ],
)
def test_nearest_sizes(asked, given):
    assert RULE.nearest(*asked) == given


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_the_nearest_size_is_allowed_and_an_allowed_size_is_its_own(width, height):
    near = RULE.nearest(width, height)
    RULE.check(*near)
    assert RULE.nearest(*near) == near
    if not RULE.allows(width, height):
        with pytest.raises(RequestError, match=f"{near[0]}x{near[1]}"):
            RULE.check(width, height)


def test_the_nearest_listed_size_has_the_shape_that_was_asked():
    rule = SizeRule.of_sizes(("128x128", "192x128", "128x192"))
    assert rule.nearest(720, 1280) == (128, 192)
    assert rule.nearest(1280, 720) == (192, 128)
    assert rule.nearest(0, 0) == (128, 128)
    assert rule.names == ("128x128", "192x128", "128x192")
