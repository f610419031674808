"""Sora's sizes on a model whose sides are multiples of 32, up to 1280x704 pixels in area."""

import openai
import pytest
from uncached_models import copy_without_rollout

from skyloom.generate.pipeline import load
from skyloom.generate.request import Request
from skyloom.media.source import open_source
from skyloom.serve.queue.capabilities import Capabilities
from skyloom.serve.queue.leases import Leases
from skyloom.serve.workers.worker import Progress, Worker

SIZES = {
    "multiple": 32,
    "min_side": 128,
    "max_side": 1280,
    "max_area": 1280 * 704,
    "default": [1280, 704],
}


@pytest.fixture
def model(tiny_model, tmp_path, monkeypatch):
    """An installed copy of the tiny model, without a rollout, with the sizes of Wan2.2 5B."""
    monkeypatch.setenv("SKYLOOM_MODELS", str(tmp_path / "models"))
    folder = tmp_path / "models" / "large"
    return copy_without_rollout(tiny_model, folder, name="large", sizes=SIZES)


@pytest.fixture
def make(model, make_server, tmp_path):
    """Make a server whose sora names are aliases of the model."""

    def build(**settings):
        names = {"sora-2": "large", "sora-2-pro": "large"}
        return make_server(tmp_path / "server", models=names, **settings)

    return build


@pytest.mark.parametrize(
    ("name", "asked", "made"),
    [
        ("sora-2", "1280x720", "1280x704"),
        ("sora-2", "720x1280", "704x1280"),
        ("sora-2-pro", "1792x1024", "1248x704"),
        ("sora-2-pro", "1080x1920", "704x1280"),
        ("sora-2", "640x352", "640x352"),
    ],
)
def test_a_size_of_sora_is_made_at_the_nearest_size_which_the_video_reports(
    make, name, asked, made
):
    client = make().openai()
    video = client.videos.create(prompt="a cat", model=name, size=asked, seconds="4")
    assert (video.size, video.requested_size, video.seconds) == (made, asked, "4")
    notices = [notice for notice in video.notices if notice.startswith(f"The size is {made}")]
    assert len(notices) == (asked != made)
    assert any("large was trained on videos of 17 frames (1 s)." in one for one in video.notices)


def test_strict_sizes_name_the_nearest_one(make):
    client = make(sora_sizes="strict").openai()
    with pytest.raises(openai.BadRequestError, match="nearest size is 1280x704") as error:
        client.videos.create(prompt="a cat", model="sora-2", size="1280x720")
    assert error.value.param == "size"


def test_the_file_has_the_size_and_its_remix_too(make, model, tmp_path):
    server = make()
    client = server.openai()
    video = client.videos.create(
        prompt="a cat", model="sora-2", size="720x1280", seconds="0.25", extra_body={"seed": 1}
    )

    def render(job, folder, *, output):
        """Render with the model itself."""
        path = output / "video.mp4"
        receipt = load(str(model), dtype="float32").export(
            Request.from_dict({**job.request, "num_steps": 1}), path
        )
        yield Progress(99, "decode", {"video": path}, receipt)

    services = server.services
    Worker(
        Leases(services.database, services.settings),
        services.storage,
        render,
        services.settings,
        name="painter",
        device="cpu",
        capabilities=Capabilities({"large": 1}),
    ).run(until_empty=True)
    done = client.videos.retrieve(video.id)
    assert (done.status, done.size) == ("completed", "704x1280")
    path = tmp_path / "file.mp4"
    client.videos.download_content(video.id).write_to_file(path)
    source = open_source(path)
    assert (source.width, source.height) == (704, 1280)
    assert source.receipt["request"]["size"] == "704x1280"
    remix = client.videos.remix(video.id, prompt="a dog")
    assert (remix.size, remix.notices) == ("704x1280", [])
