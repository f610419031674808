"""Moderation of frames: blocked pictures by perceptual hash, and classifiers named by the policy.

One frame a second is checked, of generated video and of input files. A classifier that cannot run
fails closed (UncheckedError).
"""

from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from skyloom.core.errors import MediaError, SafetyError, UncheckedError
from skyloom.media.read import read_image
from skyloom.media.sandbox import is_picture
from skyloom.media.source import open_source
from skyloom.safety.moderation import ClassifierRule, ModerationResult, Policy, current_policy
from skyloom.safety.provenance import phash

Target = Literal["input", "output"]
Classify = Callable[[Any], Mapping[str, float]]
"""Takes uint8 frames [t h w 3] as a numpy array; returns a score in [0, 1] for every label."""
MAX_CLASSIFIED_SIDE = 512  # pixels; larger frames are reduced for the classifiers
_ALLOWED = ModerationResult(True)
_MIN_CONTRAST = 4.0  # of 255: standard deviation of brightness below which a hash is meaningless


class FrameModerator:
    """Checks single frames against the picture and classifier rules of a policy."""

    def __init__(self, policy: Policy) -> None:
        """Load the classifiers. Raises UncheckedError."""
        self._pictures = policy.pictures
        self._classifiers = [(rule, _load_classifier(rule)) for rule in policy.classifiers]

    def check(self, frame: UInt8[Tensor, "h w c"], at: float) -> ModerationResult:
        """Check a frame at a time in seconds. Raises UncheckedError if a classifier fails."""
        code = int(phash(frame), 16) if self._pictures else 0
        for rule in self._pictures:
            if min((code ^ other).bit_count() for other in rule.hashes) <= rule.distance:
                return _blocked(rule.name, rule.message, at)
        reduced = reduce_frame(frame) if self._classifiers else frame
        for rule, classify in self._classifiers:
            scores = _classify(rule, classify, reduced, at)
            if any(scores[label] >= threshold for label, threshold in rule.thresholds):
                return _blocked(rule.name, rule.message, at)
        return _ALLOWED


def load_frame_moderator(policy: Policy | None = None) -> FrameModerator | None:
    """Load the moderator of a policy (default: the current one); None if it has no frame rules.

    Raises ConfigError, or UncheckedError for a classifier that cannot be loaded.
    """
    policy = policy or current_policy()
    return FrameModerator(policy) if policy.pictures or policy.classifiers else None


class StreamModerator:
    """Checks one frame a second of a video whose frames arrive in batches."""

    def __init__(self, moderator: FrameModerator, fps: float | Fraction) -> None:
        self._moderator = moderator
        self._fps = float(fps)
        self._interval = max(1, round(fps))
        self._count = 0

    def find_violation(self, frames: UInt8[Tensor, "t h w c"]) -> ModerationResult:
        """Check the next frames; return the first blocked result, else an allowed one."""
        first = self._count
        self._count += len(frames)
        for index in range(-first % self._interval, len(frames), self._interval):
            result = self._moderator.check(frames[index], (first + index) / self._fps)
            if not result.allowed:
                return result
        return _ALLOWED

    def check(self, frames: UInt8[Tensor, "t h w c"]) -> None:
        """Check the next generated frames. Raises SafetyError with rule and time."""
        raise_if_blocked(self.find_violation(frames), "output", "the video")


def moderate_file(moderator: FrameModerator, path: Path) -> ModerationResult:
    """Check a picture, or a video at one frame a second. Raises MediaError for other files."""
    if is_picture(path):
        return moderator.check(read_image(path)[0], 0.0)
    stream = StreamModerator(moderator, 1)
    batches = open_source(path, fps=Fraction(1)).stream()
    results = (stream.find_violation(frames) for frames in batches)
    return next((result for result in results if not result.allowed), _ALLOWED)


def check_files(moderator: FrameModerator, paths: Iterable[Path]) -> None:
    """Check input files. Raises SafetyError with rule, file and time."""
    for path in paths:
        try:
            result = moderate_file(moderator, path)
        except UncheckedError as error:
            error.target = "input"
            raise
        raise_if_blocked(result, "input", str(path))


def perceptual_hashes(path: Path) -> list[str]:
    """Return the hashes of a picture, or of a video at one frame a second, for a picture rule.

    Flat frames are skipped, because their hash matches every flat frame. Raises MediaError if none
    is left.
    """
    batches = (
        [read_image(path)] if is_picture(path) else open_source(path, fps=Fraction(1)).stream()
    )
    frames = (frame for batch in batches for frame in batch)
    hashes = [phash(one) for one in frames if float(one.float().mean(-1).std()) >= _MIN_CONTRAST]
    if not hashes:
        raise MediaError(
            f"{path} has no frame with enough contrast for a perceptual hash.",
            hint="Choose a file that is not flat.",
        )
    return list(dict.fromkeys(hashes))


def raise_if_blocked(result: ModerationResult, target: Target, name: str) -> None:
    """Raise SafetyError for a blocked result; `name` is the file or video in the message."""
    if result.allowed:
        return
    at = result.at or 0.0
    raise SafetyError(
        f"Refused by the rule {result.rule}, for {name} at {at:g} s: {result.message}",
        hint="Use another input." if target == "input" else "Change the request.",
        rule=result.rule,
        at=at,
        target=target,
    )


def reduce_frame(frame: UInt8[Tensor, "h w c"]) -> UInt8[Tensor, "y x c"]:
    """Return the frame with a longer side of at most MAX_CLASSIFIED_SIDE, so that cost is bounded.

    Every pixel is the mean of those that it covers; smaller frames are unchanged.
    """
    longest = max(frame.shape[:2])
    if longest <= MAX_CLASSIFIED_SIDE:
        return frame
    size = [max(1, round(side * MAX_CLASSIFIED_SIDE / longest)) for side in frame.shape[:2]]
    picture = Image.fromarray(frame.cpu().numpy()).resize(size[::-1], Image.Resampling.BOX)
    return torch.from_numpy(np.array(picture))


def _blocked(rule: str, message: str, at: float) -> ModerationResult:
    return ModerationResult(False, rule=rule, message=message, at=at)


def _load_classifier(rule: ClassifierRule) -> Classify:
    """Import the function of a rule. Raises UncheckedError for any failure."""
    module, _, name = rule.call.partition(":")
    try:
        function = getattr(import_module(module), name)
    except Exception as error:  # operator code may raise anything
        raise _unchecked(rule, 0.0, f"cannot be loaded ({type(error).__name__})") from error
    if not callable(function):
        raise _unchecked(rule, 0.0, "is not a function")
    return cast("Classify", function)


def _classify(
    rule: ClassifierRule, classify: Classify, frame: Tensor, at: float
) -> Mapping[str, float]:
    """Return the scores of a frame, one per label of the rule. Raises UncheckedError."""
    try:
        scores = classify(frame[None].cpu().numpy().copy())
    except Exception as error:  # operator code may raise anything
        raise _unchecked(rule, at, f"failed ({type(error).__name__})") from error
    if not isinstance(scores, Mapping):
        raise _unchecked(rule, at, "returned no scores")
    for label, _ in rule.thresholds:
        score = scores.get(label)
        if not isinstance(score, Real) or not 0 <= score <= 1:  # also false for NaN
            raise _unchecked(rule, at, f"returned no score in [0, 1] for {label!r}")
    return scores


def _unchecked(rule: ClassifierRule, at: float, problem: str) -> UncheckedError:
    return UncheckedError(
        f"Frames could not be checked: the classifier {rule.name} {problem}.",
        hint="Fix the classifier in the policy.",
        rule=rule.name,
        at=at,
        target="output",
    )
