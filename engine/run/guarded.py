"""Matchers, place indexes and solvers whose failures are values: what they raise never goes on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import numpy as np

from engine.errors import HangError, InferenceError
from engine.events import RunPart
from engine.ports import PairMatcher, PlaceIndex, SecondMatcher, WindowSolver
from engine.run.faults import Faults, Guard, cause_of
from engine.types import NO_ROW, Features, Frame, FrameId, MatchRequest, PairMatches
from engine.window_types import WindowEstimate, WindowProblem, WindowStatus

_NEXT_TIME = "the keyframe is matched again with the next one"

Result = TypeVar("Result")


class GuardedMatcher:
    """A `PairMatcher` that raises nothing but `InferenceError`, and never hangs.

    A batch of pairs that cannot be matched as a whole is matched pair by pair, so that one pair
    costs only itself.

    Args:
        matcher: does the work.
        describing: guards its descriptions.
        matching: guards its matches.
        faults: takes what it raises.
    """

    def __init__(
        self, matcher: PairMatcher, *, describing: Guard, matching: Guard, faults: Faults
    ) -> None:
        self._matcher = matcher
        self._describing = describing
        self._matching = matching
        self._faults = faults

    @property
    def name(self) -> str:
        """The matcher's name."""
        return self._matcher.name

    @property
    def peak_gpu_mb(self) -> float:
        """The most memory that the matcher ever held on a GPU."""
        return self._matcher.peak_gpu_mb

    @property
    def matches_everything(self) -> bool:
        """Whether the matcher gives matches that agree also for images that share nothing."""
        return self._matcher.matches_everything

    def describe(self, frame: Frame) -> Features:
        """Describes a frame.

        Raises:
            InferenceError: the matcher raised or hung, or described another frame.
        """
        try:
            features = self._describing.call(lambda: self._matcher.describe(frame))
            if features.frame_id != frame.frame_id:
                raise InferenceError(f"{frame.name}: the matcher described another frame")
        except Exception as error:  # a task boundary: the frame does not become a keyframe
            self._faults.report(
                RunPart.DESCRIBING,
                error,
                consequence=f"{frame.name} does not become a keyframe",
                frame_id=frame.frame_id,
            )
            raise _inference_error(error) from error
        return features

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        """Matches each pair; those of a batch that cannot be matched have no rows.

        Raises:
            InferenceError: none of them could be matched, or the matcher hung.
        """
        try:
            return self._match(requests)
        except Exception as error:  # a task boundary: the keyframe is matched again later
            if len(requests) < 2 or isinstance(error, HangError):
                self._report(error, requests, consequence=_NEXT_TIME)
                raise _inference_error(error) from error
            return self._match_each(requests, error)

    def _match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        matched = self._matching.call(lambda: self._matcher.match(requests), times=len(requests))
        if [one.pair for one in matched] != [request.pair for request in requests]:
            raise InferenceError("the matcher's results are not of the pairs that were asked for")
        for one, request in zip(matched, requests, strict=True):
            num_rows = (len(request.first), len(request.second))
            rows = one.matches_idx
            if len(rows) and (rows.min() < NO_ROW or (rows.max(axis=0) >= num_rows).any()):
                raise InferenceError(f"pair {one.pair}: matches of keypoints that do not exist")
        return matched

    def _match_each(self, requests: Sequence[MatchRequest], cause: Exception) -> list[PairMatches]:
        matched: list[PairMatches] = []
        failed: list[MatchRequest] = []
        for request in requests:
            try:
                matched += self._match([request])
            except HangError as error:
                self._report(error, [request], consequence=_NEXT_TIME)
                raise _inference_error(error) from error
            except Exception as error:  # a task boundary: the pair has no matches
                cause = error
                failed.append(request)
                matched.append(_no_matches(request))
        if len(failed) == len(requests):
            self._report(cause, requests, consequence=_NEXT_TIME)
            raise _inference_error(cause) from cause
        consequence = "its pairs were matched one by one"
        if failed:
            consequence += f"; {len(failed)} of {len(requests)} are left out"
        self._report(cause, requests, consequence=consequence)
        return matched

    def _report(
        self, error: Exception, requests: Sequence[MatchRequest], *, consequence: str
    ) -> None:
        newest = max((request.pair.second for request in requests), default=None)
        self._faults.report(RunPart.MATCHING, error, consequence=consequence, frame_id=newest)


class GuardedSecond:
    """A `SecondMatcher` of which nothing that breaks or hangs costs more than its own pairs.

    Pairs are matched one by one, so that one needs the memory of one.

    Args:
        second: does the work.
        guard: guards its matches.
        faults: takes what it raises.
    """

    def __init__(self, second: SecondMatcher, *, guard: Guard, faults: Faults) -> None:
        self._second = second
        self._guard = guard
        self._faults = faults

    @property
    def name(self) -> str:
        """The matcher's name."""
        return self._second.name

    @property
    def peak_gpu_mb(self) -> float:
        """The most memory that the matcher ever held on a GPU."""
        return self._second.peak_gpu_mb

    def keep(self, frame: Frame) -> None:
        """Has a keyframe's image kept; where that breaks, the keyframe goes on without it."""
        try:
            self._second.keep(frame)
        except Exception as error:  # a task boundary: the first matcher goes on
            self._report(error, frame.frame_id, consequence=f"it does not match {frame.name}")

    def holds(self, frame_id: FrameId) -> bool:
        """Whether the matcher has a keyframe's image, and is of use."""
        return not self._guard.is_off and self._second.holds(frame_id)

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        """Matches each pair; those that cannot be matched have no rows."""
        matched = []
        for request in requests:
            try:
                (found,) = self._guard.call(functools.partial(self._second.match, [request]))
            except Exception as error:  # a task boundary: the pair has no matches
                self._report(error, request.pair.second, consequence=f"{request.pair} is left out")
                found = _no_matches(request)
            matched.append(found)
        return matched

    def _report(self, error: Exception, frame_id: FrameId, *, consequence: str) -> None:
        self._faults.report(
            RunPart.SECOND_MATCHING, error, consequence=consequence, frame_id=frame_id
        )


class GuardedPlaces:
    """A `PlaceIndex` that recognizes nothing where the guarded one raises or hangs.

    Args:
        places: does the work.
        guard: guards it.
        faults: takes what it raises.
    """

    def __init__(self, places: PlaceIndex, *, guard: Guard, faults: Faults) -> None:
        self._places = places
        self._guard = guard
        self._faults = faults

    def add(self, features: Features) -> None:
        """Adds a keyframe; one that the index does not take is not recognized."""
        self._call(lambda: self._places.add(features), None, frame_id=features.frame_id)

    def query(
        self, frame_id: FrameId, *, exclude: Collection[FrameId], limit: int
    ) -> list[tuple[FrameId, float]]:
        """The keyframes most like a given one; none where the index fails."""
        nothing: list[tuple[FrameId, float]] = []
        return self._call(
            lambda: self._places.query(frame_id, exclude=exclude, limit=limit),
            nothing,
            frame_id=frame_id,
        )

    def _call(self, use: Callable[[], Result], otherwise: Result, *, frame_id: FrameId) -> Result:
        try:
            return self._guard.call(use)
        except Exception as error:  # a task boundary: other kinds of pairs are matched
            self._faults.report(
                RunPart.PLACES,
                error,
                consequence="the keyframe is not compared with similar ones",
                frame_id=frame_id,
            )
            return otherwise


class GuardedSolver:
    """A `WindowSolver` whose failures are values, also what it raises.

    Args:
        solve: does the work.
        guard: guards it.
        faults: takes what it raises.
    """

    def __init__(self, solve: WindowSolver, *, guard: Guard, faults: Faults) -> None:
        self._solve = solve
        self._guard = guard
        self._faults = faults

    def __call__(self, problem: WindowProblem) -> WindowEstimate:
        """Solves a window; one whose solver raised or hung is not solved."""
        try:
            return self._guard.call(lambda: self._solve(problem))
        except Exception as error:  # a task boundary: the map stays as it is
            self._faults.report(
                RunPart.WINDOW, error, consequence="the map goes on without the window"
            )
            return _not_solved(problem, reason=cause_of(error))


def _inference_error(error: Exception) -> InferenceError:
    return error if isinstance(error, InferenceError) else InferenceError(cause_of(error))


def _no_matches(request: MatchRequest) -> PairMatches:
    return PairMatches.of_rows(
        request, matches_idx=np.empty((0, 2), np.int64), confidence=np.empty(0, np.float32)
    )


def _not_solved(problem: WindowProblem, *, reason: str) -> WindowEstimate:
    num_frames, num_tracks = problem.tracks_xy.shape[:2]
    num_cameras = len(problem.image_sizes)
    return WindowEstimate(
        status=WindowStatus.SOLVER_FAILED,
        reason=f"the solver failed: {reason}",
        cam_from_world=np.zeros((num_frames, 3, 4)),
        is_valid=np.zeros(num_frames, np.bool_),
        focal_px=np.zeros(num_cameras),
        distortion=np.zeros(num_cameras),
        points3D_in_world=np.zeros((num_tracks, 3)),
        is_point_valid=np.zeros(num_tracks, np.bool_),
        is_inlier=np.zeros((num_frames, num_tracks), np.bool_),
        mean_reprojection_px=0.0,
        num_unusable=0,
        is_bootstrapped=False,
        elapsed_s=0.0,
        cpu_s=0.0,
    )
