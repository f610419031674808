"""Storyboards: cards on exact frames, each with its own prompt; errors name the line."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import skyloom
from skyloom.core.errors import RequestError
from skyloom.core.types import ScaleFactors, VideoShape
from skyloom.generate.cards import Card, CardError
from skyloom.generate.conditioning import align_to_latent_frames
from skyloom.generate.parsing import parse_clock
from skyloom.generate.request import Request
from skyloom.generate.storyboard import read_storyboard, storyboard_spans
from skyloom.generate.windows import shot_windows
from skyloom.models.registry import Rollout

SCALE = ScaleFactors(4, 16)
CARDS = (
    Card("0", "a red cat"),
    Card("1.1", "a dog on the beach", morph="0"),
    Card("2", "a red dog", cut=True),
)
BOARD = Request("", seed=7, seconds=3, cards=CARDS)
CHANGE, CUT = 18, 32  # the frames at which the second and the third card begin, at 16 a second


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return skyloom.load(str(tiny_model), dtype="bfloat16")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2.5", "5/2"),
        ("0", "0"),
        ("13/16", "13/16"),
        ("1:02.5", "125/2"),
        ("1:00:01", "3601"),
        ("0.1", "1/10"),
    ],
)
def test_times_are_exact(text: str, seconds: str):
    assert str(parse_clock(text)) == seconds


@pytest.mark.parametrize("text", ["", "-1", "1:2:3:4", "1e3", "nan", "5/0", "two"])
def test_what_is_no_time(text: str):
    assert parse_clock(text) is None


@given(
    st.lists(st.tuples(st.integers(1, 400), st.booleans()), max_size=6),
    st.integers(1, 30),
    st.integers(1, 9),
    st.integers(1, 4),
)
def test_every_frame_is_shown_once_by_its_own_card(cuts, tail, native, size):
    """For any cards, the displayed frames of all windows follow one another."""
    starts = sorted({frame for frame, _ in cuts})
    cards = [
        Card("0", "a"),
        *(Card(f"{frame}/16", "b", cut=dict(cuts)[frame], morph=None) for frame in starts),
    ]
    frames = 4 * ((starts[-1] if starts else 0) // 4 + tail) + 1
    spans = storyboard_spans(cards, "", VideoShape(frames, 32, 32), 16)
    windows = shot_windows(spans, SCALE, native, Rollout(3, 3, size))
    begins = [0, *starts]
    shots = [sum(card.cut for card in cards[: index + 1]) for index in range(len(cards))]
    seen: list[int] = []
    for window in windows:
        assert window.shot == shots[window.span]
        shot_begin = begins[shots.index(window.shot)]
        assert window.stop - window.start <= max(native if window.start == 0 else size, 1)
        for first, end in window.decode_chunks:
            begin, until = (SCALE.video_frames(cell) if cell else 0 for cell in (first, end))
            shown = range(max(begin, window.display_range[0]), min(until, window.display_range[1]))
            seen += [shot_begin + frame for frame in shown]
    assert seen == list(range(frames))


@pytest.mark.parametrize("quality", ["fast", "best"])
def test_one_card_is_a_plain_video(pipeline, quality):
    plain = Request("a red cat", seed=7, seconds=2.5, quality=quality)
    board = replace(plain, prompt="", cards=(Card("0", "a red cat"),))
    assert torch.equal(pipeline.generate(board).frames, pipeline.generate(plain).frames)


def test_a_card_sees_its_own_text_alone(pipeline):
    whole = pipeline.generate(BOARD).frames
    assert len(whole) == 49
    second = replace(CARDS[1], prompt="a cat")
    other = pipeline.generate(replace(BOARD, cards=(CARDS[0], second, CARDS[2]))).frames
    assert torch.equal(other[:CHANGE], whole[:CHANGE])
    assert not torch.equal(other[CHANGE], whole[CHANGE])
    assert torch.equal(other[CUT:], whole[CUT:])


def test_what_was_before_a_change_is_remembered_and_before_a_cut_is_not(pipeline):
    whole = pipeline.generate(BOARD).frames
    other = pipeline.generate(
        replace(BOARD, cards=(replace(CARDS[0], prompt="a dog"), *CARDS[1:]))
    ).frames
    assert not torch.equal(other[CHANGE + 4 : CUT], whole[CHANGE + 4 : CUT])
    assert torch.equal(other[CUT:], whole[CUT:])


def test_a_morph_goes_from_one_prompt_to_the_next(pipeline):
    whole = pipeline.generate(BOARD).frames
    soft = pipeline.generate(
        replace(BOARD, cards=(CARDS[0], replace(CARDS[1], morph="0.5"), CARDS[2]))
    ).frames
    assert torch.equal(soft[:CHANGE], whole[:CHANGE])
    assert not torch.equal(soft[CHANGE:CUT], whole[CHANGE:CUT])


def test_a_seed_of_its_own_keeps_a_card_as_it_is(pipeline):
    own = replace(CARDS[2], seed=3)
    one = pipeline.generate(replace(BOARD, cards=(*CARDS[:2], own))).frames
    two = pipeline.generate(replace(BOARD, seed=8, cards=(CARDS[0], own))).frames
    assert torch.equal(one[CUT:], two[CUT:])
    assert not torch.equal(one[:CHANGE], two[:CHANGE])


@pytest.mark.parametrize("at", ["0", "1", "1.1", "17/16"])
def test_a_picture_is_pinned_where_its_card_begins(pipeline, tmp_path, at):
    """Known latent frames decode the same at any position; earlier frames are generated."""
    Image.new("RGB", (32, 32), (250, 20, 60)).save(tmp_path / "red.png")
    pinned = Card(at, "a cat", image=str(tmp_path / "red.png"), morph=None if at == "0" else "0")
    cards = (pinned,) if at == "0" else (Card("0", "a dog"), pinned)
    video = pipeline.generate(Request("", seed=1, seconds=2, cards=cards))
    free = replace(pinned, strength=1.0)
    moved = pipeline.generate(Request("", seed=1, seconds=2, cards=(*cards[:-1], free)))
    frame = int(parse_clock(at) * 16)
    assert not torch.equal(moved.frames[frame], video.frames[frame])
    assert video.receipt["parents"][0]["verb"] == "storyboard"


def test_what_is_pinned_inside_a_latent_frame_is_repeated_back_to_its_begin():
    frames = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 1, 1, 3)
    fitted, cell, skip = align_to_latent_frames(
        frames, 7, SCALE
    )  # frames 5 to 8 are latent frame 2
    assert fitted[:, 0, 0, 0].tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5]
    assert (cell, skip) == (2, 1)
    assert align_to_latent_frames(frames, 0, SCALE)[0][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert align_to_latent_frames(frames[:1], 5, SCALE)[0][:, 0, 0, 0].tolist() == [0] * 5


def test_a_storyboard_is_stopped_and_goes_on(pipeline, tmp_path):
    whole = pipeline.generate(BOARD)
    stream = pipeline.stream(BOARD, resume=tmp_path / "kept")
    for _ in range(12):
        next(stream)
    stream.close()
    again = list(pipeline.stream(BOARD, resume=tmp_path / "kept"))
    assert torch.equal(
        torch.cat([step.frames for step in again if step.frames is not None]), whole.frames
    )


def test_a_request_with_cards_survives_json():
    assert Request.from_dict(json.loads(BOARD.to_json())) == BOARD


GOOD = """style = "at night"
seconds = 3

[[card]]
at = 0
prompt = "a cat"

[[card]]
at = 1.5
prompt = "a dog"
"""


def test_a_file_is_read_and_its_fields_can_be_replaced(tmp_path):
    path = tmp_path / "board.toml"
    path.write_text(GOOD)
    request = read_storyboard(path, {"seconds": 4.0}).request
    assert (request.prompt, request.seconds) == ("at night", 4.0)
    assert [card.at for card in request.cards] == ["0", "1.5"]
    (tmp_path / "board.json").write_text(
        json.dumps({"style": "at night", "cards": [c.to_dict() for c in request.cards]})
    )
    assert read_storyboard(tmp_path / "board.json", {}).request.cards == request.cards


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("at = 1.5", "at = 0", 9, "at must be later than card 1"),
        ("at = 1.5", "at = 7", 9, "at must be <= 3 s"),
        ("at = 1.5", 'at = "soon"', 9, "at must be a time"),
        ("at = 1.5", "at = 1.5\nimage = 'gone.png'", 10, "does not exist"),
        ("at = 0", "at = 0.5", 5, "at must be 0 for the first card"),
        ('prompt = "a dog"', 'prompt = ""', 10, "empty"),
        ('prompt = "a dog"', "prompt = 3", 10, "prompt must be text"),
        ('prompt = "a dog"', 'promt = "a dog"', 10, "promt"),
        ('prompt = "a dog"', 'prompt = "a dog"\nstrength = 2', 11, "strength"),
        ('prompt = "a dog"', 'prompt = "a dog"\ncut = true\nmorph = 1', 12, "morph"),
    ],
)
def test_errors_name_the_line_of_the_file(pipeline, tmp_path, old, new, line, words):
    path = tmp_path / "board.toml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(RequestError) as caught:
        board = read_storyboard(path, {})
        try:
            pipeline.plan(board.request)
        except CardError as error:
            raise board.explain(error) from error
    assert f"{path}, line {line}: Card" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("content", ["", "card = 3", "[[card]", "[]", '{"a": 1}', "[[1]]"])
@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_files_that_are_no_storyboard(tmp_path, content, suffix):
    path = tmp_path / f"board{suffix}"
    path.write_text(content)
    with pytest.raises(RequestError):
        read_storyboard(path, {})
