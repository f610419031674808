"""Frames against the policy: known pictures by their looks, anything else by whatever classifier an operator has named.

One frame a second is looked at, as it is made, and before that the pictures and videos that are started from. A
classifier that cannot be asked refuses (UncheckedError): nothing passes because nobody looked.
"""

from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import Any, Literal, cast

from jaxtyping import UInt8
from torch import Tensor

from skyloom.core.errors import MediaError, SafetyError, UncheckedError
from skyloom.media.read import read_image
from skyloom.media.sandbox import is_picture
from skyloom.media.source import open_source
from skyloom.safety.moderation import ClassifierRule, ModerationResult, Policy, current_policy
from skyloom.safety.provenance import phash

Target = Literal["input", "output"]
Classify = Callable[[Any], Mapping[str, float]]
"""Takes uint8 frames [t h w 3] as a numpy array of its own; gives a score from 0 to 1 for every label."""
_ALLOWED = ModerationResult(True)
_FLAT = 4.0  # of 255: the spread of a frame's brightness below which it has no look of its own


class FrameModerator:
    """What a policy says of single frames."""

    def __init__(self, policy: Policy) -> None:
        """Raises UncheckedError for a classifier that is not there."""
        self._pictures = policy.pictures
        self._classifiers = [(rule, _find(rule)) for rule in policy.classifiers]

    def verdict(self, frame: UInt8[Tensor, "h w c"], at: float) -> ModerationResult:
        """Whether a frame may be shown, `at` that many seconds. Raises UncheckedError when nobody can tell."""
        look = int(phash(frame), 16) if self._pictures else 0
        for rule in self._pictures:
            if min((look ^ other).bit_count() for other in rule.looks) <= rule.distance:
                return ModerationResult(False, rule.name, None, rule.message, at)
        for rule, classify in self._classifiers:
            scores = _ask(rule, classify, frame, at)
            if any(scores[label] >= threshold for label, threshold in rule.thresholds):
                return ModerationResult(False, rule.name, None, rule.message, at)
        return _ALLOWED


def load_frame_moderator(policy: Policy | None = None) -> FrameModerator | None:
    """The judge of a policy, or of the current one; None where that has nothing to say of frames, and costs nothing.

    Raises ConfigError, or UncheckedError for a classifier that is not there.
    """
    policy = policy or current_policy()
    return FrameModerator(policy) if policy.pictures or policy.classifiers else None


class StreamModerator:
    """Takes a video's frames in order, some at a time, and looks at one a second."""

    def __init__(self, judge: FrameModerator, fps: float | Fraction) -> None:
        self._judge, self._fps = judge, float(fps)
        self._every, self._count = max(1, round(fps)), 0

    def verdict(self, frames: UInt8[Tensor, "t h w c"]) -> ModerationResult:
        """The first refusal among the next frames, if there is any."""
        first, self._count = self._count, self._count + len(frames)
        for index in range(-first % self._every, len(frames), self._every):
            verdict = self._judge.verdict(frames[index], (first + index) / self._fps)
            if not verdict.allowed:
                return verdict
        return _ALLOWED

    def check(self, frames: UInt8[Tensor, "t h w c"]) -> None:
        """Raise SafetyError, naming rule and time, for the next frames of a video in the making."""
        refuse(self.verdict(frames), "output", "the video")


def moderate_file(judge: FrameModerator, path: Path) -> ModerationResult:
    """The first refusal in a picture, or in a video at one frame a second. Raises MediaError for what is neither."""
    if is_picture(path):
        return judge.verdict(read_image(path)[0], 0.0)
    watch = StreamModerator(judge, 1)
    verdicts = (watch.verdict(frames) for frames in open_source(path, fps=Fraction(1)).stream())
    return next((verdict for verdict in verdicts if not verdict.allowed), _ALLOWED)


def check_files(judge: FrameModerator, paths: Iterable[Path]) -> None:
    """Raise SafetyError, naming rule, file and time, for a picture or video that nothing may be started from."""
    for path in paths:
        try:
            verdict = moderate_file(judge, path)
        except UncheckedError as error:
            error.target = "input"
            raise
        refuse(verdict, "input", str(path))


def perceptual_hashes(path: Path) -> list[str]:
    """The looks to block a picture by, or a video at one frame a second; without those of flat frames, which would
    fit anything flat. Raises MediaError where none is left."""
    runs = [read_image(path)] if is_picture(path) else open_source(path, fps=Fraction(1)).stream()
    frames = (frame for run in runs for frame in run)
    looks = [phash(frame) for frame in frames if float(frame.float().mean(-1).std()) >= _FLAT]
    if not looks:
        raise MediaError(
            f"{path} shows nothing that it could be known by.", hint="Choose one that is not flat."
        )
    return list(dict.fromkeys(looks))


def refuse(verdict: ModerationResult, target: Target, name: str) -> None:
    """Raise SafetyError for what may not be seen in `name`."""
    if verdict.allowed:
        return
    at = verdict.at or 0.0
    raise SafetyError(
        f"Refused by the rule {verdict.rule}, for {name} at {at:g} s: {verdict.message}",
        hint="Start from something else." if target == "input" else "Ask for something else.",
        rule=verdict.rule,
        at=at,
        target=target,
    )


def _find(rule: ClassifierRule) -> Classify:
    """The function that a rule names. Whatever goes wrong while it is imported is a refusal."""
    module, _, name = rule.call.partition(":")
    try:
        found = getattr(import_module(module), name)
    except Exception as error:  # an operator's own code may fail in any way
        raise _unchecked(rule, 0.0, f"cannot be loaded ({type(error).__name__})") from error
    if not callable(found):
        raise _unchecked(rule, 0.0, "is no function")
    return cast("Classify", found)


def _ask(rule: ClassifierRule, classify: Classify, frame: Tensor, at: float) -> Mapping[str, float]:
    """A classifier's scores for a frame, one for every label of the rule. Raises UncheckedError."""
    try:
        scores = classify(frame[None].cpu().numpy().copy())
    except Exception as error:  # an operator's own code may fail in any way
        raise _unchecked(rule, at, f"failed ({type(error).__name__})") from error
    if not isinstance(scores, Mapping):
        raise _unchecked(rule, at, "gave no scores")
    for label, _ in rule.thresholds:
        score = scores.get(label)
        if not isinstance(score, Real) or not 0 <= score <= 1:  # NaN is neither
            raise _unchecked(rule, at, f"gave no score from 0 to 1 for {label!r}")
    return scores


def _unchecked(rule: ClassifierRule, at: float, what: str) -> UncheckedError:
    message = f"Frames cannot be checked: the classifier {rule.name} {what}."
    return UncheckedError(
        message, hint="See to the policy's classifier.", rule=rule.name, at=at, target="output"
    )
