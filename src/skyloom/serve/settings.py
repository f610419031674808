"""Settings of the server and its workers: a TOML file, SKYLOOM_* variables, then keyword arguments.

Each field `name` is a key of the file and the variable SKYLOOM_NAME; a variable holds a TOML value
or plain text. Later sources override earlier ones.
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
from skyloom.models.registry import DEFAULT_MODEL

log = logging.getLogger(__name__)

FILE = "settings.toml"
DEFAULT_PORT = 8765
_PREFIX = "SKYLOOM_"
_MODELS: Mapping[str, str] = {"sora-2": DEFAULT_MODEL, "sora-2-pro": DEFAULT_MODEL}
_LOCAL_HOSTS = ("localhost", "127.", "::1", "/")  # "/" is a Unix socket
_MIN_COLLECT_DAYS = 0.05  # uploads are stored up to an hour before a job refers to them
_TABLES = ("models", "loras")  # of names
_AT_LEAST_ONE = (
    "max_attempts",
    "max_queued",
    "max_connections",
    "max_connections_per_address",
    "max_body_bytes",
    "max_body_bytes_per_owner",
)
UNLIMITED_BY_ZERO = (
    "disk_reserve",
    "stall_seconds",
    "load_seconds",
    "cancel_seconds",
    "max_attempt_seconds",
    "max_job_seconds",
    "max_queued_per_owner",
    "max_queued_cost_per_owner",
    "max_files_per_owner",
    "max_file_bytes_per_owner",
    "max_characters_per_owner",
    "max_batches_per_owner",
    "max_webhooks_per_owner",
)
_KEPT_FOREVER_BY_ZERO = (
    "keep_ended_seconds",
    "keep_event_seconds",
    "keep_delivery_seconds",
    "keep_batch_seconds",
    "keep_file_seconds",
)


def default_data() -> Path:
    """The default data folder: XDG_DATA_HOME/skyloom, or ~/.local/share/skyloom."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "skyloom"


@dataclass(frozen=True)
class Settings:
    """Validated settings; docs/server.md has a table of all. Raises ConfigError.

    Times are seconds unless the name says days. 0 means no limit for the fields of
    UNLIMITED_BY_ZERO, and "keep until deleted" for the `keep_*` fields with a default number.
    """

    # Locations: None for SQLite, and a folder for results, inside `data`.
    data: Path = field(default_factory=default_data)
    database_url: str | None = None
    storage_url: str | None = None
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT

    # Leases and retries of jobs whose worker was lost.
    lease_seconds: float = 30.0
    heartbeat_seconds: float = 10.0
    max_attempts: int = 5

    # Memory of each worker for models (None: what its device has free when it starts), and files
    # of LoRAs by name.
    worker_memory_bytes: int | None = None
    loras: Mapping[str, str] = field(default_factory=dict[str, str])

    # Watchdog (workers/watchdog.py): time without a step, before the first step or while results
    # are stored, after a stop was requested, per attempt, and per job over all attempts.
    stall_seconds: float = 300.0
    load_seconds: float = 1_800.0
    cancel_seconds: float = 60.0
    max_attempt_seconds: float = 21_600.0
    max_job_seconds: float = 86_400.0

    # Queue size and quotas per owner (queue/quotas.py).
    max_queued: int = 1_000
    max_queued_per_owner: int = 100
    max_queued_cost_per_owner: int = 100_000
    max_files_per_owner: int = 10_000
    max_file_bytes_per_owner: int = 100 * 2**30
    max_characters_per_owner: int = 1_000
    max_batches_per_owner: int = 100
    max_webhooks_per_owner: int = 50

    # Retention: of results (None: until deleted), ended jobs, events, webhook deliveries, ended
    # batches and uploads. Unreferenced files move to the trash, and are deleted from there later.
    keep_seconds: float | None = None
    keep_ended_seconds: float = 30 * 86_400
    keep_event_seconds: float = 7 * 86_400
    keep_delivery_seconds: float = 7 * 86_400
    keep_batch_seconds: float = 30 * 86_400
    keep_file_seconds: float = 0
    collect_after_days: float = 7.0
    trash_days: float = 7.0
    disk_reserve: int = 512 * 2**20  # bytes of free disk below which no work is accepted

    # Open connections (a proxy counts as one address) and bytes of request bodies in flight.
    max_connections: int = 500
    max_connections_per_address: int = 250
    max_body_bytes: int = 2 * 2**30
    max_body_bytes_per_owner: int = 2**30

    # API: model aliases, further Host header values, and whether a size requested under an alias
    # becomes the nearest one that the model supports.
    webhooks_to_loopback: bool = False
    models: Mapping[str, str] = field(default_factory=lambda: dict(_MODELS))
    hosts: tuple[str, ...] = ()
    sora_sizes: Literal["nearest", "strict"] = "nearest"
    url_references: bool = False
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.heartbeat_seconds * 2 <= self.lease_seconds:
            raise ConfigError(
                f"lease_seconds must be >= 2 * heartbeat_seconds > 0, got lease_seconds = "
                f"{self.lease_seconds:g} and heartbeat_seconds = {self.heartbeat_seconds:g}.",
                hint="A lease must last for two heartbeats at least.",
            )
        if self.keep_seconds is not None and not 0 < self.keep_seconds < math.inf:
            raise ConfigError(
                f"keep_seconds must be > 0, got {self.keep_seconds:g}.",
                hint="Remove the key to keep results.",
            )
        if self.worker_memory_bytes is not None:
            self._check_minimum("worker_memory_bytes", 1)
        self._check_minimum("collect_after_days", _MIN_COLLECT_DAYS, finite=False)
        self._check_minimum("trash_days", 0, finite=False)
        for name in _AT_LEAST_ONE:
            self._check_minimum(name, 1)
        for name in _KEPT_FOREVER_BY_ZERO:
            self._check_minimum(name, 0, hint="0 keeps them until they are deleted.")
        for name in UNLIMITED_BY_ZERO:
            self._check_minimum(name, 0, hint="0 means no limit.")

    def _check_minimum(
        self, name: str, minimum: float, *, hint: str | None = None, finite: bool = True
    ) -> None:
        value = getattr(self, name)
        if not value >= minimum or (finite and value == math.inf):
            raise ConfigError(f"{name} must be >= {minimum:g}, got {value:g}.", hint=hint)

    @property
    def database(self) -> str:
        """URL of the database."""
        return self.database_url or f"sqlite:///{self.data.absolute() / 'skyloom.db'}"

    @property
    def storage(self) -> str:
        """URL or folder of stored files."""
        return self.storage_url or str(self.data.absolute() / "assets")

    @property
    def local_only(self) -> str | None:
        """Return "database" or "storage" if no other host can reach it; None if other hosts can."""
        from sqlalchemy.engine import make_url

        url = make_url(self.database)
        host = str(url.host or url.query.get("host") or "/")
        if url.get_backend_name() == "sqlite" or host.startswith(_LOCAL_HOSTS):
            return "database"
        is_folder = "://" not in self.storage or self.storage.startswith("file:")
        return "storage" if is_folder else None

    @property
    def runs(self) -> Path:
        """Folder of unfinished videos on this host, one per database."""
        digest = hashlib.sha256(self.database.encode()).hexdigest()[:12]
        return self.data.absolute() / "runs" / digest


def load_settings(
    file: Path | None = None, environment: Mapping[str, str] | None = None, **overrides: Any
) -> Settings:
    """Load settings from a file, the environment and `overrides`; an override of None is ignored.

    The default file is settings.toml in the data folder, if it exists. Raises ConfigError.
    """
    variables = os.environ if environment is None else environment
    names = [one.name for one in fields(Settings)]
    from_environment = {
        name: _parse_variable(text)
        for name in names
        if (text := variables.get(_PREFIX + name.upper())) is not None
    }
    _warn_of_misspelt(variables, names)
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if file is None:
        data = overrides.get("data") or from_environment.get("data") or default_data()
        default_file = Path(str(data)) / FILE
        file = default_file if default_file.is_file() else None
    table = {} if file is None else read_table(file)
    table.update(from_environment)
    table.update(
        {
            name: str(value) if isinstance(value, Path) else value
            for name, value in overrides.items()
        }
    )
    models, loras = (_check_names(name, table.pop(name, {})) for name in _TABLES)
    source = "the environment" if file is None else str(file)
    settings = from_table(table, Settings, source)
    return replace(settings, models={**_MODELS, **models}, loras=loras)


def _check_names(name: str, table: object) -> dict[str, str]:
    """Check a table of names. Raises ConfigError."""
    if isinstance(table, dict) and all(isinstance(value, str) for value in table.values()):
        return table
    raise ConfigError(
        f"{name} must be a table of names, got {table!r:.80}.",
        hint=f'Example: {name} = {{ "own" = "/srv/own" }}.',
    )


def _warn_of_misspelt(variables: Mapping[str, str], names: list[str]) -> None:
    """Log variables whose name is close to, but not, that of a setting."""
    known = [_PREFIX + name.upper() for name in names]
    for variable in variables:
        near = difflib.get_close_matches(variable, known, n=1, cutoff=0.85)
        if variable.startswith(_PREFIX) and variable not in known and near:
            log.warning(
                "%s is not a setting and has no effect; did you mean %s?", variable, near[0]
            )


def _parse_variable(text: str) -> Any:
    """The text as a TOML value, or the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return text
