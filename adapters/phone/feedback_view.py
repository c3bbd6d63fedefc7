"""From the threads that see the run, to the event loop that sends it to phones; neither waits."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from adapters.phone.feedback import ArrivedPicture, DecodedPicture, PhoneState, RunFeedback
from adapters.phone.map_plan import Plan, draw_plan
from adapters.phone.messages import Direction
from engine.dense_types import DenseCloud, GroundPicture
from engine.events import Event, MainMapChanged
from engine.types import Float32Array, Frame, FrameId, FramePose, MapView

logger = logging.getLogger(__name__)

_MAX_WAITING = 20_000  # events; when the event loop is that late, the oldest are forgotten
_MAX_PATH_POINTS = 500  # of one phone


Update = Event | Plan | ArrivedPicture | DecodedPicture


class FeedbackChannel:
    """The state of the run as phones show it. For the event loop, except ``put``."""

    def __init__(self, *, source: str = "") -> None:
        """Begins before the run.

        Args:
            source: the label of the phones' source.
        """
        self.feedback = RunFeedback(source=source)
        self.plan_version = 0  # grows with every plan; 0: there is none
        self._plan: Plan | None = None
        self._plan_record: dict[str, Any] | None = None
        self._waiting: deque[Update] = deque(maxlen=_MAX_WAITING)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_over = False
        self._changed: Callable[[], None] = lambda: None

    @property
    def version(self) -> int:
        """Grows with everything that may change what phones show."""
        return self.feedback.version + self.plan_version

    def open(self, changed: Callable[[], None]) -> None:
        """From now on ``changed`` is called on this event loop when something has changed."""
        self._loop = asyncio.get_running_loop()
        self._changed = changed
        self._take_in()

    def close(self) -> None:
        """Takes nothing any more."""
        self._is_over = True
        self._loop = None
        self._waiting.clear()

    def put(self, update: Update) -> None:
        """Adds what has changed; from any thread, returns at once."""
        if self._is_over:
            return
        self._waiting.append(update)
        loop = self._loop
        if loop is not None and not loop.is_closed():
            try:
                loop.call_soon_threadsafe(self._take_in)
            except RuntimeError:
                logger.debug("the event loop closed while the run was reported")

    def end(self) -> None:
        """The run listens to no phone any more."""
        self._take_in()
        self.feedback.end()
        self._changed()

    def state_record(self, phone: int) -> dict[str, Any]:
        """What a phone shows, as JSON; places are on the newest plan."""
        state = self.feedback.state_of(phone)
        return {
            "phone": phone,
            "advice": state.advice,
            "hint": state.hint,
            "verdict": state.verdict,
            "doubt": state.doubt,
            "doubt_age_s": None if state.doubt_age_s is None else round(state.doubt_age_s),
            "frames": state.num_frames,
            "keyframes": state.num_keyframes,
            "registered": state.num_registered,
            "points": state.num_points3D,
            "plan": self.plan_version,
            **self._places(state),
        }

    def plan_record(self, *, known_version: int) -> dict[str, Any] | None:
        """The newest plan as JSON, unless the page has it."""
        if self._plan is None or known_version == self.plan_version:
            return None
        if self._plan_record is None:
            self._plan_record = self._as_record(self._plan)
        return self._plan_record

    def _take_in(self) -> None:
        if self._loop is None or not self._waiting:
            return
        while self._waiting:
            match self._waiting.popleft():
                case Plan() as plan:
                    self._plan, self._plan_record = plan, None
                    self.plan_version += 1
                case ArrivedPicture() as picture:
                    self.feedback.add_arrived(picture)
                case DecodedPicture() as picture:
                    self.feedback.add_decoded(picture)
                case event:
                    self.feedback.take(event)
        self._changed()

    def _places(self, state: PhoneState) -> dict[str, Any]:
        plan = self._plan

        def place(point: Direction | None) -> list[float] | None:
            return None if plan is None or point is None else _rounded(plan.place(point))

        heading = state.heading_in_world
        return {
            "here": place(state.position_in_world),
            "heading": None
            if plan is None or heading is None
            else _rounded(plan.direction(heading)),
            "lost_at": place(state.lost_at_in_world),
        }

    def _as_record(self, plan: Plan) -> dict[str, Any]:
        paths: dict[int, list[list[float]]] = {}
        for frame_id, place in zip(plan.keyframe_ids.tolist(), plan.path_xy.tolist(), strict=True):
            phone = self.feedback.phone_of_keyframe(FrameId(frame_id))
            paths.setdefault(phone, []).append(_rounded(place))
        height, width = plan.cells.shape[:2]
        return {
            "version": self.plan_version,
            "width": width,
            "height": height,
            "cells": base64.b64encode(plan.cells.tobytes()).decode("ascii"),
            "paths": [{"phone": phone, "places": _thinned(path)} for phone, path in paths.items()],
        }


class FeedbackView:
    """Shows the run on phones; every call comes from the views thread and returns at once."""

    def __init__(self, channel: FeedbackChannel) -> None:
        self._channel = channel
        self._map: MapView | None = None  # as shown last
        self._dense: DenseCloud | None = None  # likewise
        self._holes_in_world: Float32Array | None = None  # likewise

    def show_frame(self, frame: Frame, pose: FramePose | None) -> None:
        """Nothing: the phone has its own picture."""

    def show_map(self, view: MapView) -> None:
        """Draws the map from above for the phones."""
        self._map = view
        self._draw_plan(view)

    def show_dense(self, cloud: DenseCloud) -> None:
        """Draws the map from above with the colours of the dense map."""
        self._dense = cloud
        if self._map is not None:
            self._draw_plan(self._map)

    def show_ground(self, ground: GroundPicture) -> None:
        """Marks what is still to be filmed."""
        self._holes_in_world = ground.holes_in_world
        if self._map is not None:
            self._draw_plan(self._map)

    def show_event(self, event: Event) -> None:
        """Adds an event; another main map has a world of its own."""
        if isinstance(event, MainMapChanged):
            self._map = self._dense = self._holes_in_world = None
        self._channel.put(event)

    def close(self) -> None:
        """Nothing is pending."""

    def _draw_plan(self, view: MapView) -> None:
        up_in_world = self._channel.feedback.up_in_world
        plan = draw_plan(
            view,
            up_in_world=up_in_world,
            dense=self._dense,
            holes_in_world=self._holes_in_world,
        )
        if plan is not None:
            self._channel.put(plan)


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 2) for value in values]


def _thinned(path: list[list[float]]) -> list[list[float]]:
    """The path with its last place and not many more than the page can draw."""
    step = -(-len(path) // _MAX_PATH_POINTS)
    return path[::step] if (len(path) - 1) % step == 0 else [*path[::step], path[-1]]
