"""Settings from file, environment and overrides; invalid values are refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from skyloom.core.errors import ConfigError
from skyloom.serve.settings import Settings, default_data, load_settings


def test_default_locations_are_in_the_data_folder(tmp_path):
    settings = load_settings(environment={}, data=tmp_path)
    assert settings.database == f"sqlite:///{tmp_path}/skyloom.db"
    assert settings.storage == str(tmp_path / "assets")
    assert settings.runs.parent == tmp_path / "runs"
    assert settings.runs != replace(settings, database_url="sqlite:///other.db").runs
    assert (settings.host, settings.models["sora-2"]) == ("127.0.0.1", "diorama")


def test_later_sources_override_earlier_ones(tmp_path):
    (tmp_path / "settings.toml").write_text(
        'port = 1\nhost = "a"\nmax_queued = 3\n[models]\n"sora-2" = "wan"\n'
    )
    environment = {"SKYLOOM_DATA": str(tmp_path), "SKYLOOM_HOST": "b", "SKYLOOM_PORT": "2"}
    settings = load_settings(environment=environment, port=3, database_url=None)
    assert (settings.max_queued, settings.host, settings.port) == (3, "b", 3)
    assert settings.models == {"sora-2": "wan", "sora-2-pro": "diorama"}
    assert settings.data == tmp_path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot = 1", "Did you mean 'port'"),
        ('port = "many"', "port"),
        ("models = 3", "models must be a table of names, got 3"),
        ("lease_seconds = 15.0", "lease_seconds must be >= 2 \\* heartbeat_seconds > 0"),
        ("max_queued = 0", "max_queued must be >= 1, got 0"),
        ("port = ", "is not valid TOML"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, text: str, words: str):
    file = tmp_path / "other.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_settings(file, environment={})


def test_a_wrong_variable_is_refused():
    with pytest.raises(ConfigError, match="environment"):
        load_settings(environment={"SKYLOOM_PORT": "many"})


def test_the_default_data_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_data() == tmp_path / "skyloom" == Settings().data
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_data() == Path.home() / ".local/share/skyloom"


def test_a_misspelt_variable_is_logged(caplog):
    load_settings(environment={"SKYLOOM_MAX_QUEUDE": "5", "SKYLOOM_CACHE": "off", "HOME": "/"})
    assert [record.getMessage() for record in caplog.records] == [
        "SKYLOOM_MAX_QUEUDE is not a setting and has no effect; did you mean SKYLOOM_MAX_QUEUED?"
    ]


def test_a_negative_disk_reserve_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="disk_reserve must be >= 0, got -1"):
        Settings(data=tmp_path, disk_reserve=-1)
