"""The prompts of edits: without one, an edit takes what its source shows at that time."""

import json
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import skyloom
from skyloom.core.errors import SafetyError
from skyloom.generate.edit_spec import Edit
from skyloom.generate.request import Request
from skyloom.generate.source_prompts import (
    PromptChooser,
    PromptSpan,
    source_prompts,
    timeline_prompts,
)
from skyloom.generate.timeline import Generate, Interpolate, Keep, SourceClip, make_timeline
from skyloom.media.source import open_source
from skyloom.media.write import write_video

V4 = Path(__file__).parents[1] / "fixtures" / "v4" / "receipts"
STYLE = "on the beach"
CARDS = ({"at": "0", "prompt": "a red cat"}, {"at": "1", "prompt": "a dog", "cut": True})
CAT, DOG = f"a red cat, {STYLE}", f"a dog, {STYLE}"
CHANGE, FRAMES = 16, 33  # the second card's first frame, and all


@dataclass
class Source:
    """A source of `frames` frames with a receipt."""

    frames: int
    receipt: dict = field(default_factory=dict)
    fps: Fraction = Fraction(16)


def rows(spans):
    return [(span.start, span.stop, span.prompt) for span in spans]


def receipt_of(request, fps="16", **notes):
    return {"request": request, "frames": {"fps": fps}, "notes": notes}


@pytest.mark.parametrize(
    ("fps", "source_fps", "change"),
    [
        ("16", 16, 18),  # 1.1 s is frame 17.6 of the model's, hence frame 18
        ("8", 16, 18),
        ("16", 24, 27),
        ("16", 12, 14),  # frame 13 is at 1.083 s and shows frame 17
        ("16", 10, 12),
    ],
)
def test_cards_hold_from_their_frame_on_at_any_rate(fps, source_fps, change):
    cards = [{"at": "0", "prompt": "a"}, {"at": "1.1", "prompt": "b"}]
    receipt = receipt_of({"prompt": "", "cards": cards}, fps)
    source = Source(2 * source_fps, receipt, Fraction(source_fps))
    assert rows(source_prompts(source)) == [(0, change, "a"), (change, 2 * source_fps, "b")]


def test_a_card_of_a_video_at_a_lower_rate_begins_with_a_frame_that_was_output():
    cards = [{"at": "0", "prompt": "a"}, {"at": "1.05", "prompt": "b"}]
    source = Source(33, receipt_of({"prompt": "", "cards": cards}, "8"))
    assert rows(source_prompts(source)) == [(0, 18, "a"), (18, 33, "b")]  # card 17, output 9


def test_cards_get_the_style_as_the_storyboard_gives_it(board):
    plan = board.pipeline.plan(Request(STYLE, seconds=2, cards=CARDS))
    assert [span.prompt for span in plan.timeline.generated_spans] == [CAT, DOG]
    assert rows(source_prompts(board.source)) == [(0, CHANGE, CAT), (CHANGE, FRAMES, DOG)]


def test_prompts_of_an_edit_are_those_of_its_receipt():
    notes = [[0, 8, "a"], [8, 12, ""], [12, 16, "b"], [16, 32, "b"]]
    source = Source(48, receipt_of({"prompt": "x", "edit": {}}, prompts=notes), Fraction(24))
    assert rows(source_prompts(source)) == [(0, 12, "a"), (12, 18, ""), (18, 48, "b")]


@pytest.mark.parametrize(
    "receipt",
    [
        {},
        {"request": None},
        {"request": {"prompt": 5}},
        receipt_of({"prompt": "a"}, "0"),
        receipt_of({"prompt": "a"}, "many"),
        receipt_of({"prompt": "a", "cards": [{"at": "soon", "prompt": "a"}]}),
        receipt_of({"prompt": "a", "cards": [{"at": "9" * 5000, "prompt": "a"}]}),
        receipt_of({"prompt": "a", "cards": [{"at": "0"}]}),
        receipt_of({"prompt": "a", "cards": 3}),
        receipt_of({"prompt": "a", "edit": "retake"}),
        receipt_of({"prompt": "a"}, prompts=[[0, 8]]),
        receipt_of({"prompt": "a"}, prompts=[[0, 8, None]]),
        receipt_of({"prompt": "a"}, prompts=[["0", 8, "a"]]),
        receipt_of({"prompt": "a"}, prompts=7),
    ],
    ids=range(14),
)
def test_a_damaged_receipt_has_no_prompt(receipt):
    assert rows(source_prompts(Source(9, receipt))) == [(0, 9, "")]


def test_rows_outside_the_video_and_endless_prompts_are_cut():
    notes = [[-4, 0, "x"], [40, 50, "y"], [4, 8, "z" * 9000]]
    (unknown, long) = source_prompts(Source(9, receipt_of({"prompt": ""}, prompts=notes)))
    assert (unknown, long.start, long.stop) == (PromptSpan(0, 4, ""), 4, 9)
    assert set(long.prompt) == {"z"}
    assert len(long.prompt) == 8000


@pytest.mark.parametrize(
    ("name", "prompts"),
    [
        ("text", ["a red cat on the beach"]),
        ("retake", ["a red cat asleep"]),
        ("restyle", [""]),  # made without a prompt: what it showed is unknown
        (
            "storyboard",
            [
                "a red cat on the beach, in a painted style",
                "a red cat in the snow, in a painted style",
                "a red cat at night, in a painted style",
                "a blue bus on the road, in a painted style",
            ],
        ),
    ],
)
def test_receipts_of_version_0_1_give_the_prompts_of_their_request(name, prompts):
    values = json.loads((V4 / f"{name}.json").read_text())
    source = Source(values["frames"]["shape"][0], values)
    assert [span.prompt for span in source_prompts(source)] == prompts


def test_prompts_of_a_timeline_are_those_of_its_parts():
    sources = [
        Source(8, receipt_of({"prompt": ""}, prompts=[[0, 3, "a"], [3, 8, "b"]])),
        Source(8),
    ]
    timeline = make_timeline(
        [
            Keep(SourceClip(0, 2, 6)),
            Generate(4, "b", "extend"),
            Generate(2, "c", "extend"),
            Keep(SourceClip(1, 0, 8)),
        ]
    )
    assert rows(timeline_prompts(timeline, sources)) == [
        (0, 1, "a"),
        (1, 8, "b"),
        (8, 10, "c"),
        (10, 18, ""),
    ]
    faster = make_timeline([Interpolate(SourceClip(0, 0, 8), Fraction(5, 2))])
    assert rows(timeline_prompts(faster, sources)) == [(0, 8, "a"), (8, 20, "b")]


class Board:
    """A storyboard of the tiny model in a file, and edits of it."""

    def __init__(self, pipeline, folder):
        self.pipeline = pipeline
        self.folder = folder
        video = pipeline.generate(Request(STYLE, seed=1, seconds=2, num_steps=1, cards=CARDS))
        video.save(folder / "board.mkv")
        self.source = Source(len(video.frames), video.receipt)

    def request(self, verb, *names, prompt="", **parameters):
        paths = [str(self.folder / f"{name}.mkv") for name in names or ("board",)]
        edit = Edit(verb, paths, **parameters)
        sampled = {"seed": 3, "num_steps": 1} if edit.needs_model else {}
        return Request(prompt, edit=edit, **sampled)

    def prompts(self, verb, *names, **parameters):
        """The prompts of the generated spans, and the notices about them."""
        timeline = self.pipeline.plan(self.request(verb, *names, **parameters)).timeline
        return [span.prompt for span in timeline.generated_spans], timeline.notices

    def edit(self, new, verb, *names, **parameters):
        """Write an edit to a file; return its video."""
        video = self.pipeline.generate(self.request(verb, *names, **parameters))
        video.save(self.folder / f"{new}.mkv")
        return video


@pytest.fixture(scope="module")
def board(tiny_model, tmp_path_factory):
    pipeline = skyloom.load(str(tiny_model), dtype="float32")
    board = Board(pipeline, tmp_path_factory.mktemp("board"))
    noise = torch.randint(256, (16, 32, 32, 3), generator=torch.Generator().manual_seed(0))
    write_video(noise.to(torch.uint8), 16, board.folder / "foreign.mkv")
    return board


@pytest.mark.parametrize(
    ("verb", "names", "parameters", "prompts"),
    [
        ("retake", (), {"start": "0.5", "stop": "1"}, [CAT]),
        ("retake", (), {"start": "1.25", "stop": "1.75"}, [DOG]),
        ("extend", (), {"seconds": "0.5"}, [DOG]),
        ("extend", (), {"seconds": "0.5", "backward": True}, [CAT]),
        ("recut", (), {"start": "0.5", "stop": "1.5", "seconds": "2"}, [CAT, DOG]),
        ("loop", (), {"start": "0", "stop": "0.75", "bridge": "0.25"}, [CAT]),
        ("loop", (), {"bridge": "0.25"}, [DOG]),
        ("stitch", ("board", "board"), {"morph": "0.25"}, [CAT]),
        ("blend", ("board", "board"), {"seconds": "0.5"}, [CAT]),
        ("restyle", (), {"style": "at night"}, [f"{CAT}, at night", f"{DOG}, at night"]),
    ],
)
def test_an_edit_without_a_prompt_takes_the_cards(board, verb, names, parameters, prompts):
    assert board.prompts(verb, *names, **parameters) == (prompts, ())
    chosen, notices = board.prompts(verb, *names, prompt=" a cat ", **parameters)
    assert set(chosen) == {"a cat, at night" if verb == "restyle" else "a cat"}
    assert notices == ()


def test_a_retake_of_several_cards_follows_each_in_one_shot(board):
    times = {"start": "0.5", "stop": "1.5"}
    assert board.prompts("retake", **times) == ([CAT, DOG], ())
    assert board.prompts("retake", **times, prompt="a cat") == (["a cat"], ())
    (run,) = board.pipeline.plan(board.request("retake", **times)).runs
    assert [span.continues for span in run.spans] == [False, True]
    spans = [window.span for window in run.windows]
    assert spans == sorted(spans)
    change = run.windows[spans.index(1)]
    assert change.generated[0] == run.known_before + (CHANGE - 8) // 4
    assert change.start < change.generated[0], "it sees what was generated before"
    assert change.prompt_fade[0] == 1
    assert sorted(change.prompt_fade, reverse=True) == list(change.prompt_fade)
    assert not any(window.prompt_fade for window in run.windows if not window.span)
    video = board.pipeline.generate(board.request("retake", **times))
    kept = open_source(board.folder / "board.mkv").read()
    assert torch.equal(video.frames[:8], kept[:8])
    assert torch.equal(video.frames[24:], kept[24:])
    assert video.receipt["notes"]["prompts"] == [[0, CHANGE, CAT], [CHANGE, FRAMES, DOG]]
    assert set(video.receipt["notes"]["seams"]) == {"8", str(CHANGE), "24"}


@pytest.mark.parametrize("times", [{}, {"start": "0.5"}, {"stop": "1.125"}, {"stop": "1.5"}])
def test_a_retake_of_several_cards_may_reach_the_ends(board, times):
    plan = board.pipeline.plan(board.request("retake", **times))
    video = board.pipeline.generate(board.request("retake", **times))
    assert [span.prompt for span in plan.timeline.generated_spans] == [CAT, DOG]
    assert len(video.frames) == FRAMES
    (run,) = plan.runs
    covered = [cell for window in run.windows for cell in range(*window.generated)]
    assert covered == [run.known_before + cell for cell in range(run.generated)]


def test_a_retake_takes_known_prompts_where_one_is_unknown():
    rows = [[0, 4, ""], [4, 8, "a"], [8, 12, ""], [12, 16, "b"]]
    source = Source(16, {"request": {"prompt": ""}, "notes": {"prompts": rows}})
    chooser = PromptChooser("", [source], ["x.mkv"])
    known = chooser.known(SourceClip(0, 2, 16))
    assert known == (PromptSpan(0, 10, "a"), PromptSpan(10, 14, "b"))
    assert chooser.notices == ()


def test_a_retake_generates_what_it_would_from_the_cards_text(board):
    times = {"start": "1.25", "stop": "1.5"}
    taken = board.pipeline.plan(board.request("retake", **times)).timeline
    given = board.pipeline.plan(board.request("retake", prompt=DOG, **times)).timeline
    assert taken == given


def test_a_chain_of_edits_loses_no_prompt(board):
    first = board.edit("first", "retake", prompt="a red dog", start="0.25", stop="0.75")
    assert first.receipt["notes"]["prompts"] == [
        [0, 4, CAT],
        [4, 12, "a red dog"],
        [12, CHANGE, CAT],
        [CHANGE, FRAMES, DOG],
    ]
    assert first.receipt["notes"]["spans"] == [
        [0, 4, "kept"],
        [4, 12, "generated"],
        [12, 33, "kept"],
    ]
    board.edit("second", "extend", "first", seconds="0.5", backward=True)
    third = board.edit("third", "retake", "second", start="1.75", stop="2")
    assert third.receipt["notes"]["prompts"] == [
        [0, 12, CAT],
        [12, 20, "a red dog"],
        [20, 24, CAT],
        [24, 41, DOG],
    ]
    assert board.prompts("retake", "third", start="0.8", stop="1") == (["a red dog"], ())
    assert board.prompts("retake", "third", start="1.25", stop="1.5") == ([CAT], ())
    board.edit("fast", "interpolate", "third", fps="32")
    assert board.prompts("retake", "fast", start="0.8", stop="1") == (["a red dog"], ())
    assert board.prompts("extend", "fast", seconds="0.5") == ([DOG], ())


def test_a_video_without_a_prompt_is_named(board):
    for verb, names, parameters in (
        ("retake", ("foreign",), {"start": "0.5"}),
        ("extend", ("foreign",), {"seconds": "0.25"}),
        ("stitch", ("board", "foreign"), {"morph": "0.25"}),
        ("restyle", ("foreign",), {"style": "at night"}),
    ):
        prompts, (notice,) = board.prompts(verb, *names, **parameters)
        assert prompts == [parameters.get("style", "")]
        assert notice.startswith(f"{board.folder / 'foreign.mkv'}: it has no prompt")
        assert board.prompts(verb, *names, prompt="a cat", **parameters)[1] == ()
    assert board.prompts("retake", "foreign", start="0.5", strength=0) == ([], ())
    assert board.prompts("stitch", "foreign", "board", morph="0") == ([], ())


def test_notices_are_shown_and_recorded(board):
    request = board.request("retake", "foreign", start="0.5")
    steps = list(board.pipeline.stream(request))
    (notice,) = steps[-1].video.receipt["notes"]["notices"]
    assert "it has no prompt" in notice
    assert [step.notice for step in steps if step.notice] == [notice]
    assert steps[-1].video.receipt["notes"]["prompts"] == [[0, 16, ""]]


def test_unknown_prompts_inside_a_range_yield_to_known_ones(board):
    board.edit("joined", "stitch", "foreign", "board", morph="0")
    assert board.prompts("retake", "joined", start="0.5", stop="1.5") == ([CAT], ())
    prompts, (notice,) = board.prompts("restyle", "joined", style="at night")
    assert prompts == ["at night", f"{CAT}, at night", f"{DOG}, at night"]
    assert "it has no prompt" in notice


def test_the_policy_holds_for_prompts_of_sources(board, policy):
    policy(
        '[[rules]]\nname = "no-dogs"\ngroups = ["dogs"]\nmessage = "No."\n[lists]\ndogs = ["dog"]'
    )
    assert board.prompts("retake", start="0.5", stop="0.75")[0] == [CAT]
    with pytest.raises(SafetyError, match="no-dogs"):
        board.prompts("extend", seconds="0.5")
