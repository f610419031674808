"""Metadata of jobs: round trip, validation, and rows of former versions."""

import json

import pytest
from pydantic import ValidationError

from skyloom.serve.queue.job_metadata import JobMetadata

# A row of version 4 of the database. Its keys are kept; fields may be added.
V4_ROW = {
    "model": "sora-2",
    "prompt": "Mossy and Nobody on the beach",
    "seconds": "4",
    "size": "128x128",
    "requested_size": "720x1280",
    "fps": 16.0,
    "verb": None,
    "remixed_from": None,
    "parents": [],
    "characters": ["char_1", "char_2"],
    "described": {"Mossy": "red cat"},
    "consent": None,
    "notices": ["a notice"],
    "variations": [],
    "extensions": 0,
    "steps": 4,
}


def test_a_row_of_version_4_is_read_and_written_in_the_same_keys():
    metadata = JobMetadata.from_row(V4_ROW)
    added = {
        name: field.get_default(call_default_factory=True)
        for name, field in JobMetadata.model_fields.items()
        if name not in V4_ROW
    }
    values = {**V4_ROW, **added}
    assert metadata.model_dump() == values
    row = json.loads(json.dumps(metadata.to_row()))
    assert row == {key: value for key, value in values.items() if value is not None}
    assert JobMetadata.from_row(row) == metadata


def test_missing_keys_have_defaults_and_unknown_keys_are_ignored():
    metadata = JobMetadata.from_row({"seconds": "1.5", "later": 1})
    assert (metadata.model, metadata.prompt, metadata.size) == ("sora-2", None, "")
    assert (metadata.duration, metadata.fps, metadata.verb) == (1.5, None, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds": "soon"},
        {"seconds": "-1"},
        {"seconds": "inf"},
        {"fps": 0},
        {"steps": 0},
        {"extensions": -1},
        {"characters": "char_1"},
        {"prompt": 7},
    ],
)
def test_values_are_validated_on_read_and_on_write(changes):
    for make in (
        lambda: JobMetadata.from_row({**V4_ROW, **changes}),
        lambda: JobMetadata.from_row(V4_ROW).replace(**changes),
    ):
        with pytest.raises(ValidationError) as caught:
            make()
        assert "Mossy" not in str(caught.value)


def test_metadata_is_immutable():
    with pytest.raises(ValidationError):
        JobMetadata().prompt = "a cat"
