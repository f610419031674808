"""Test the server at OPENAI_BASE_URL with the installed version of OpenAI's Python client.

Prints one line per passed part; raises an exception at the first failure.
"""

import base64
import io
import sys
import warnings

import openai
from openai import OpenAI

warnings.simplefilter("ignore", DeprecationWarning)
PNG = b"\x89PNG\r\n\x1a\n" + bytes(64)


def say(part: str) -> None:
    """Report that a part passed."""
    sys.stdout.write(part + "\n")


def main() -> None:
    """Run all parts; one video is really generated."""
    client = OpenAI(max_retries=0)
    video = client.videos.create_and_poll(
        prompt="a red rocket over the ocean", seconds="2", extra_body={"seed": 7}
    )
    assert (video.status, video.progress, video.seconds) == ("completed", 100, "2"), video
    assert video.seed == 7
    say("create and poll")
    kinds = {"video": "video/mp4", "thumbnail": "image/webp", "spritesheet": "image/jpeg"}
    for variant, kind in kinds.items():
        content = client.videos.download_content(video.id, variant=variant)
        assert content.response.headers["content-type"] == kind
        assert len(content.read()) > 500
    say("download")
    assert video.id in [one.id for one in client.videos.list(limit=1)]
    say("list pages")
    remixed = client.videos.remix(video.id, prompt="a blue rocket")
    assert remixed.remixed_from_video_id == video.id
    gone = client.videos.delete(remixed.id)
    assert (gone.deleted, gone.object) == (True, "video.deleted")
    say("remix, delete")
    mp4 = client.videos.download_content(video.id).read()
    if hasattr(client.videos, "edit"):
        edited = client.videos.edit(prompt="at night", video=("v.mp4", mp4, "video/mp4"))
        longer = client.videos.extend(prompt="on", seconds="4", video=("v.mp4", mp4, "video/mp4"))
        named = client.videos.create_character(name="Momo", video=("v.mp4", mp4, "video/mp4"))
        assert client.videos.get_character(named.id).name == "Momo"
        for one in (edited, longer):
            client.videos.delete(one.id)
        say("edit, extend, characters")
    for reference in (("a.png", PNG, "image/png"), io.BytesIO(PNG)):
        client.videos.delete(client.videos.create(prompt="a cat", input_reference=reference).id)
    url = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    body = {"prompt": "a cat", "input_reference": {"image_url": url}}
    client.videos.delete(client.post("/videos", body=body, cast_to=type(video)).id)
    say("references")
    for wrong, param in (
        ({"model": "sora-9"}, "model"),
        ({"prompt": ""}, "prompt"),
        ({"seconds": "long"}, "seconds"),
    ):
        try:
            client.videos.create(**{"prompt": "a cat", **wrong})
        except openai.BadRequestError as error:
            assert error.param == param, error
            assert error.request_id
        else:
            raise AssertionError(f"{wrong} was taken")
    say("errors")
    assert {"sora-2", "diorama"} <= {model.id for model in client.models.list()}
    say("models")


if __name__ == "__main__":
    main()
