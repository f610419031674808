"""Downloads: every fault of a server ends in the exact file or in one sentence."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from model_hub import COMMIT, Answer, entry, weights

from skyloom.core.errors import DownloadError, GatedError
from skyloom.hub.download import MAX_TRIES, ask, download, part_path
from skyloom.hub.sources import Source

CONTENT = weights(0)
NAME = "part.safetensors"


@pytest.fixture
def target(hub, tmp_path) -> Path:
    """Where the file goes; the hub has it."""
    hub.put(NAME, CONTENT)
    return tmp_path / "files" / NAME


def state_path(target: Path) -> Path:
    """The state of an unfinished download."""
    return target.with_name(f"{target.name}.part.json")


def start_download(transfer, target: Path, size: int) -> None:
    """Leave a part of at least `size` bytes, as Ctrl-C does."""

    def stop(name, done, total):
        if done >= size:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(replace(transfer, progress=stop), entry(NAME, CONTENT), target)
    assert size <= part_path(target).stat().st_size < len(CONTENT)


def test_a_file_arrives_whole(transfer, hub, target):
    shown = []
    file = download(
        replace(transfer, progress=lambda *one: shown.append(one)), entry(NAME, CONTENT), target
    )
    assert target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == [NAME]
    assert file.revision == COMMIT
    assert shown[-1] == (NAME, len(CONTENT), len(CONTENT))


def test_a_connection_that_ends_fifty_times_is_continued(transfer, hub, target, recorder):
    draw = random.Random(5)
    hub.answers.extend(Answer(cut=draw.randint(1, 59_000)) for _ in range(50))
    download(transfer, entry(NAME, CONTENT), target)
    assert target.read_bytes() == CONTENT
    ranges = hub.gets("Range")
    assert len(ranges) == 51
    starts = [int(one.removeprefix("bytes=").removesuffix("-")) for one in ranges[1:]]
    assert starts == sorted(set(starts))
    assert len(recorder.slept) == 50


def test_another_process_continues(transfer, hub, target):
    start_download(transfer, target, 1_000_000)
    kept = part_path(target).stat().st_size
    download(transfer, entry(NAME, CONTENT), target)
    assert target.read_bytes() == CONTENT
    assert hub.gets("Range") == [None, f"bytes={kept}-"]
    assert [path.name for path in target.parent.iterdir()] == [NAME]


def test_a_part_without_its_state_is_not_trusted(transfer, hub, target):
    start_download(transfer, target, 1_000_000)
    state_path(target).write_text("{")
    download(transfer, entry(NAME, CONTENT), target)
    assert hub.gets("Range") == [None, None]
    assert target.read_bytes() == CONTENT


def test_a_whole_part_is_not_fetched_again(transfer, hub, target):
    start_download(transfer, target, 1_000_000)
    part_path(target).write_bytes(CONTENT)
    download(transfer, entry(NAME, CONTENT), target)
    assert len(hub.gets("Range")) == 1
    assert target.read_bytes() == CONTENT


def test_a_changed_file_starts_again(transfer, hub, target, recorder):
    start_download(transfer, target, 1_000_000)
    newer = weights(1)
    hub.put(NAME, newer)
    file = download(transfer, entry(NAME), target)
    assert target.read_bytes() == newer
    assert file.sha256 == entry(NAME, newer).sha256
    assert f"{NAME} starts again from 0: the file has changed on the server." in recorder.notices


def test_a_server_that_does_not_resume_sends_everything(transfer, hub, target, recorder):
    start_download(transfer, target, 1_000_000)
    hub.answers.append(Answer(whole=True))
    download(transfer, entry(NAME, CONTENT), target)
    assert target.read_bytes() == CONTENT
    assert recorder.notices == [f"{NAME} starts again from 0: the server does not resume."]


def test_a_refused_range_starts_again(transfer, hub, target, recorder):
    start_download(transfer, target, 1_000_000)
    hub.answers.append(Answer(status=416))
    download(transfer, entry(NAME, CONTENT), target)
    assert target.read_bytes() == CONTENT
    assert "the server has fewer bytes" in recorder.notices[0]


def test_a_part_continues_from_a_mirror(transfer, hub, start_hub, target):
    start_download(transfer, target, 1_000_000)
    mirror = start_hub()
    mirror.linked = False
    mirror.files[f"/{NAME}"] = CONTENT
    mirror.etags["/" + NAME] = "other"
    source = Source("url", mirror.url, flat=True)
    download(replace(transfer, source=source), entry(NAME, CONTENT), target)
    assert target.read_bytes() == CONTENT
    assert [one is None for one in mirror.gets("Range")] == [False]


@pytest.mark.parametrize(
    "answer",
    [
        Answer(headers={"Content-Length": "9000000"}, cut=1000),
        Answer(range_start=7),
        Answer(longer=b"more"),
        Answer(status=500),
        Answer(status=503, headers={"Retry-After": "3"}),
        Answer(cut=0),
    ],
    ids=["length", "range", "longer", "500", "503", "nothing"],
)
def test_a_fault_is_tried_again(transfer, hub, target, answer):
    start_download(transfer, target, 1_000_000)
    hub.linked = False  # sizes come from Content-Length and Content-Range alone
    hub.etags = {path: json.loads(state_path(target).read_text())["etag"] for path in hub.files}
    hub.answers.append(answer)
    download(transfer, entry(NAME, CONTENT), target)
    assert target.read_bytes() == CONTENT
    assert len(hub.gets("Range")) == 3


def test_the_server_sets_the_pause(transfer, hub, target, recorder):
    hub.answers.extend([Answer(status=429, headers={"Retry-After": "7"}), Answer(status=429)])
    download(transfer, entry(NAME, CONTENT), target)
    assert recorder.slept == [7.0, 2.0]
    assert recorder.notices[0] == (
        "127.0.0.1 allows no more requests for now (429). Trying again in 7 s."
    )


def test_waiting_ends(transfer, hub, target, recorder):
    hub.always = Answer(status=429)
    with pytest.raises(DownloadError, match="allows no more requests") as caught:
        download(transfer, entry(NAME, CONTENT), target)
    assert "goes on where it stopped" in caught.value.hint
    assert recorder.slept == [2.0**n for n in range(MAX_TRIES - 1)]


def test_a_server_that_never_gets_further_is_given_up(transfer, hub, target):
    hub.always = Answer(cut=1000, whole=True)
    with pytest.raises(DownloadError, match=r"The connection to 127\.0\.0\.1 broke"):
        download(transfer, entry(NAME, CONTENT), target)
    assert len(hub.gets("Range")) < 3 * MAX_TRIES


@pytest.mark.parametrize("index", [0, 20, 1_500_000, len(CONTENT) - 1])
def test_one_wrong_bit_is_found(transfer, hub, target, index):
    hub.answers.append(Answer(flip=index))
    with pytest.raises(DownloadError, match="arrived damaged: its SHA-256 is"):
        download(transfer, entry(NAME, CONTENT), target)
    assert not list(target.parent.iterdir())
    download(transfer, entry(NAME, CONTENT), target)
    assert target.read_bytes() == CONTENT


def test_the_header_is_checked_without_a_known_hash(transfer, hub, target):
    hub.put(NAME, CONTENT[:-1], etag="x")
    with pytest.raises(DownloadError, match=r"arrived damaged: .*not fully covered"):
        download(transfer, entry(NAME), target)
    assert not target.exists()


def test_another_file_than_the_catalogues_is_refused_at_once(transfer, hub, target):
    hub.put(NAME, weights(1))
    file = entry(NAME, CONTENT)
    with pytest.raises(DownloadError, match="is another file: sha256 is"):
        ask(transfer, file)
    with pytest.raises(DownloadError, match="is another file: sha256 is"):
        download(transfer, file, target)
    assert not target.exists()


REFUSALS = [
    (Answer(status=401), DownloadError, r"wants a token, or has no such repository.*\(401\)"),
    (Answer(status=401, headers={"X-Error-Code": "GatedRepo"}), GatedError, "is gated"),
    (Answer(status=403), GatedError, "Accept them at http://127.0.0.1.*/owner/small"),
    (Answer(status=404), DownloadError, r"is not at http.*\(404\): it was moved or deleted"),
    (Answer(status=418), DownloadError, "answered 418"),
]


@pytest.mark.parametrize(("answer", "kind", "words"), REFUSALS)
def test_refusals_have_a_cause_and_no_second_try(transfer, hub, target, answer, kind, words):
    hub.always = answer
    for call in (
        lambda: ask(transfer, entry(NAME)),
        lambda: download(transfer, entry(NAME), target),
    ):
        hub.requests.clear()
        with pytest.raises(kind, match=words) as caught:
            call()
        assert type(caught.value) is kind
        assert len(hub.requests) == 1


def test_a_refused_token_is_named_but_not_shown(transfer, hub, target):
    hub.always = Answer(status=401)
    source = replace(transfer.source, token="hf_secret")
    assert "hf_secret" not in repr(source)
    with pytest.raises(DownloadError, match="refused the token") as caught:
        ask(replace(transfer, source=source), entry(NAME))
    assert "hf_secret" not in str(caught.value)


def test_the_token_stays_at_the_hub(transfer, hub, start_hub, target):
    storage = start_hub()
    storage.linked = False
    storage.files, storage.etags = hub.files, dict.fromkeys(hub.files, "f" * 64)
    hub.redirect_to = storage.url
    transfer = replace(transfer, source=replace(transfer.source, token="hf_secret"))
    file = ask(transfer, entry(NAME))
    assert file.sha256 == entry(NAME, CONTENT).sha256
    assert not storage.requests
    assert download(transfer, file, target).revision == COMMIT
    assert target.read_bytes() == CONTENT
    assert hub.gets("Authorization") == ["Bearer hf_secret"]
    assert storage.gets("Authorization") == [None]


def test_a_storage_etag_is_not_taken_for_a_hash(transfer, hub, start_hub, target):
    storage = start_hub()
    storage.linked = hub.linked = False
    storage.files, storage.etags = hub.files, dict.fromkeys(hub.files, "f" * 64)
    hub.redirect_to = storage.url
    file = ask(replace(transfer, source=replace(transfer.source, token="t")), entry(NAME))
    assert (file.bytes, file.sha256) == (len(CONTENT), None)
    assert [headers.get("Authorization") for *_, headers in storage.requests] == [None]


def test_the_rate_is_limited(transfer, hub, target, recorder):
    transfer = replace(transfer, limit=500_000.0, clock=lambda: sum(recorder.slept))
    download(transfer, entry(NAME, CONTENT), target)
    assert sum(recorder.slept) == pytest.approx(len(CONTENT) / 500_000)


def test_no_answer_says_what_else_works(transfer, start_hub, tmp_path):
    silent = start_hub()
    silent.server.server_close()
    source = Source("hf", silent.url)
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1 does not answer") as caught:
        ask(replace(transfer, source=source), entry(NAME))
    assert "skyloom models add FOLDER" in caught.value.hint
