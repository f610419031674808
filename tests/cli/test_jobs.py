"""`skyloom jobs`: the queue from the command line."""

import json

import pytest

from skyloom.serve.queue.capabilities import Capabilities
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.queue.leases import Leases
from skyloom.serve.settings import Settings
from skyloom.serve.storage import FolderStorage


@pytest.fixture
def queue(tmp_path):
    """A queue in the data folder of the commands."""
    settings = Settings(data=tmp_path)
    store = JobStore(Database(settings.database), settings)
    yield store
    store.database.close()


def test_jobs_are_listed_shown_and_changed(skyloom, queue, tmp_path):
    first = queue.submit({"prompt": "a cat\non a beach"}, owner="ada")
    second = queue.submit({"prompt": "a dog"}, owner="bob")
    listed = skyloom("jobs", "list", "--data", tmp_path)
    assert [line.split()[0] for line in listed.out.splitlines()] == [second.id, first.id]
    assert "a cat on a beach" in listed.out
    shown = json.loads(skyloom("jobs", "show", first.id, "--data", tmp_path).out)
    assert (shown["id"], shown["owner"], shown["request"]["prompt"]) == (
        first.id,
        "ada",
        "a cat\non a beach",
    )
    assert shown["tried"] == []
    for verb, status in (
        ("pause", "paused"),
        ("resume", "queued"),
        ("cancel", "cancelled"),
        ("retry", "queued"),
    ):
        job = json.loads(skyloom("jobs", verb, first.id, "--data", tmp_path, "--json").out)
        assert job["status"] == status
    assert "--limit" in skyloom("jobs", "list", "--limit", "1", "--data", tmp_path).err
    paused = skyloom("jobs", "list", "--status", "paused", "--data", tmp_path)
    assert (paused.code, paused.out) == (0, "")


def test_workers_are_listed_with_models_and_jobs(skyloom, queue, tmp_path):
    leases = Leases(queue.database, queue.settings)
    capabilities = Capabilities({"wan": 2**31, "huge": 2**40}, ("felt",), 3 * 2**30)
    leases.register_worker("gpu", "cuda:0", capabilities)
    leases.register_worker("old", "cpu")
    job = queue.submit({"prompt": "a cat", "model": "wan"}, owner="ada")
    leases.lease("gpu")
    lines = skyloom("jobs", "workers", "--data", tmp_path).out.splitlines()
    assert lines == [f"gpu  cuda:0  wan  3.0 GiB  {job.id}", "old  cpu  diorama  -  idle"]
    rows = skyloom("jobs", "workers", "--data", tmp_path, "--json").out.splitlines()
    first = json.loads(rows[0])
    assert (first["name"], first["job"], first["capabilities"]["loras"]) == (
        "gpu",
        job.id,
        ["felt"],
    )


def test_a_dry_run_counts_unreferenced_files(skyloom, queue, tmp_path):
    counts = json.loads(skyloom("jobs", "collect", "--dry-run", "--json", "--data", tmp_path).out)
    assert counts["dry_run"]
    FolderStorage(tmp_path / "assets").put(b"somebody's", "bin")
    lines = skyloom("jobs", "collect", "--dry-run", "--data", tmp_path).out.splitlines()
    assert lines[-2:] == ["unowned        1", "unowned bytes  10"]
    ran = skyloom("jobs", "collect", "--json", "--data", tmp_path)
    assert (ran.code, json.loads(ran.out)["trashed"]) == (0, 0)
    ran = skyloom("jobs", "collect", "--data", tmp_path / "none")
    assert (ran.code, "There is no database" in ran.err) == (2, True)


def test_errors_are_one_sentence_without_secrets(skyloom, queue, tmp_path):
    gone = skyloom("jobs", "show", "video_none", "--data", tmp_path)
    assert (gone.code, gone.out) == (1, "")
    assert (
        gone.err == "skyloom: There is no job with the id 'video_none'. It may have been deleted.\n"
    )
    wrong = skyloom("jobs", "list", "--status", "done", "--data", tmp_path)
    assert wrong.code == 2
    assert "queued" in wrong.err
    other = skyloom("jobs", "list", "--database", "mysql://ada:secret@host/x")
    assert (other.code, "secret" in other.err) == (2, False)
