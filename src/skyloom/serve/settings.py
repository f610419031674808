"""Settings of the server and of its workers: a TOML file, then SKYLOOM_* of the environment, then what is given.

Every field `name` is a key of the file and the variable SKYLOOM_NAME; a variable holds a TOML value or plain text.
"""

import difflib
import hashlib
import logging
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from skyloom.core.config import from_table, read_table
from skyloom.core.errors import ConfigError

log = logging.getLogger(__name__)

DEFAULT_PORT = 8765
_PREFIX = "SKYLOOM_"
_MODELS: Mapping[str, str] = {"sora-2": "diorama", "sora-2-pro": "diorama"}
FILE = "settings.toml"
_LEAST_DAYS = 0.05
_AT_LEAST_ONE = ("max_attempts", "max_queued", "max_connections")
_AT_LEAST_ONE += ("max_connections_per_address", "max_body_bytes", "max_body_bytes_per_owner")
UNLIMITED_BY_ZERO = (
    "disk_reserve",
    *("stall_seconds", "load_seconds", "cancel_seconds", "max_attempt_seconds", "max_job_seconds"),
    *(
        "max_queued_per_owner",
        "max_queued_cost_per_owner",
        "max_files_per_owner",
        "max_file_bytes_per_owner",
    ),
    *("max_characters_per_owner", "max_batches_per_owner", "max_webhooks_per_owner"),
)


def default_data() -> Path:
    """The data folder when none is named: XDG_DATA_HOME/skyloom, or ~/.local/share/skyloom."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "skyloom"


@dataclass(frozen=True)
class Settings:
    """Where things lie, how many jobs may wait, how long things are kept. Times are seconds.

    `models` maps the names that clients ask for to installed models; `sora_sizes` says whether a size under such a name
    becomes the nearest that the model makes. `hosts` are more values of the Host header, like "video.example.org".
    `database_url` None is an SQLite file, and `storage_url` None a folder, both in `data`. `keep_seconds` None keeps
    results until they are deleted. The other `keep_*` say how long rows stay after they are over: of jobs that failed,
    were cancelled or have expired, of events, of webhook deliveries, of batches with their output files, and of files
    since they were uploaded; 0 keeps them. A stored file that nothing names any more is moved to the storage's trash
    after `collect_after_days`, and deleted `trash_days` later.
    `max_connections` may be open at once, `max_connections_per_address` of one client address (a proxy is one
    address). `max_body_bytes` of request bodies may be in flight at once, `max_body_bytes_per_owner` of one owner.

    `stall_seconds`, `load_seconds` and `cancel_seconds` say when a render is stuck (watchdog.py): without a step,
    before its first step or while its results are stored, and after it was asked to stop. `max_attempt_seconds` and
    `max_job_seconds` bound one attempt and all attempts of a job. `max_..._per_owner` are the quotas (quotas.py). In
    all of these 0 means no limit. Raises ConfigError for what cannot work.
    """

    data: Path = field(default_factory=default_data)
    database_url: str | None = None
    storage_url: str | None = None
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    lease_seconds: float = 30.0
    heartbeat_seconds: float = 10.0
    max_attempts: int = 5
    stall_seconds: float = 300.0
    load_seconds: float = 1_800.0
    cancel_seconds: float = 60.0
    max_attempt_seconds: float = 21_600.0
    max_job_seconds: float = 86_400.0
    max_queued: int = 1_000
    max_queued_per_owner: int = 100
    max_queued_cost_per_owner: int = 100_000
    max_files_per_owner: int = 10_000
    max_file_bytes_per_owner: int = 100 * 2**30
    max_characters_per_owner: int = 1_000
    max_batches_per_owner: int = 100
    max_webhooks_per_owner: int = 50
    keep_seconds: float | None = None
    keep_ended_seconds: float = 30 * 86_400
    keep_event_seconds: float = 7 * 86_400
    keep_delivery_seconds: float = 7 * 86_400
    keep_batch_seconds: float = 30 * 86_400
    keep_file_seconds: float = 0
    collect_after_days: float = 7.0
    trash_days: float = 7.0
    disk_reserve: int = 512 * 2**20
    max_connections: int = 500
    max_connections_per_address: int = 250
    max_body_bytes: int = 2 * 2**30
    max_body_bytes_per_owner: int = 2**30
    webhooks_to_loopback: bool = False
    models: Mapping[str, str] = field(default_factory=lambda: dict(_MODELS))
    hosts: tuple[str, ...] = ()
    sora_sizes: Literal["nearest", "strict"] = "nearest"
    url_references: bool = False
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.heartbeat_seconds * 2 <= self.lease_seconds:
            raise ConfigError(
                f"heartbeat_seconds is {self.heartbeat_seconds:g} and lease_seconds {self.lease_seconds:g}.",
                hint="A lease must last for two heartbeats at least.",
            )
        if not self.collect_after_days >= _LEAST_DAYS:
            raise ConfigError(
                f"collect_after_days must be {_LEAST_DAYS:g} or more, got {self.collect_after_days:g}.",
                hint="A file may be stored for an hour before a job names it.",
            )
        if not self.trash_days >= 0:
            raise ConfigError(
                f"trash_days must be 0 or more, got {self.trash_days:g}.", hint="7 is the default."
            )
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if self.keep_seconds is not None and not 0 < self.keep_seconds < math.inf:
            raise ConfigError(
                f"keep_seconds must be more than 0, got {self.keep_seconds:g}.",
                hint="Leave it out to keep results.",
            )
        for name in ("ended", "event", "delivery", "batch", "file"):
            seconds = getattr(self, f"keep_{name}_seconds")
            if not 0 <= seconds < math.inf:
                raise ConfigError(
                    f"keep_{name}_seconds must be 0 or more, got {seconds:g}.",
                    hint="0 keeps them for good.",
                )
        for name in UNLIMITED_BY_ZERO:
            if not 0 <= getattr(self, name) < math.inf:
                hint = "0 means no limit."
                raise ConfigError(
                    f"{name} must be 0 or more, got {getattr(self, name)}.", hint=hint
                )

    @property
    def database(self) -> str:
        """The database's URL."""
        return self.database_url or f"sqlite:///{self.data.absolute() / 'skyloom.db'}"

    @property
    def storage(self) -> str:
        """The URL, or the folder, of what is stored."""
        return self.storage_url or str(self.data.absolute() / "assets")

    @property
    def runs(self) -> Path:
        """The folder where workers keep videos in the making: one for each queue, whose jobs alone they know."""
        return (
            self.data.absolute() / "runs" / hashlib.sha256(self.database.encode()).hexdigest()[:12]
        )


def load_settings(
    file: Path | None = None, environment: Mapping[str, str] | None = None, **given: Any
) -> Settings:
    """Settings from a file, the environment and what is given; the later wins, and what is given as None is not.

    Without a file, settings.toml in the data folder is read if there is one. Raises ConfigError.
    """
    variables = os.environ if environment is None else environment
    names = [one.name for one in fields(Settings)]
    told = {
        name: text for name in names if (text := variables.get(_PREFIX + name.upper())) is not None
    }
    _warn_of_unknown(variables, names)
    given = {name: value for name, value in given.items() if value is not None}
    if file is None:
        beside = Path(given.get("data") or told.get("data") or default_data()) / FILE
        file = beside if beside.is_file() else None
    table = {} if file is None else read_table(file)
    table |= {name: _value(text) for name, text in told.items()}
    table |= {
        name: str(value) if isinstance(value, Path) else value for name, value in given.items()
    }
    models = table.pop("models", {})
    if not isinstance(models, dict) or not all(isinstance(value, str) for value in models.values()):
        raise ConfigError(
            f"models is {models!r:.80}.", hint='Write a table of names, like "sora-2" = "diorama".'
        )
    where = "the environment" if file is None else str(file)
    return replace(from_table(table, Settings, where), models={**_MODELS, **models})


def _warn_of_unknown(variables: Mapping[str, str], names: list[str]) -> None:
    """Log variables that are nearly a setting's: they are probably misspelt, and have no effect."""
    known = [_PREFIX + name.upper() for name in names]
    for variable in variables:
        near = difflib.get_close_matches(variable, known, n=1, cutoff=0.85)
        if variable.startswith(_PREFIX) and variable not in known and near:
            log.warning(
                "%s is not a setting and has no effect; did you mean %s?", variable, near[0]
            )


def _value(text: str) -> Any:
    """A TOML value, or the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return text
