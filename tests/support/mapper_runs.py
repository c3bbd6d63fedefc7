"""A mapper on one thread, fed as a run feeds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from engine.config import Config, GlobalBundleAdjustmentConfig, RuntimeConfig, WindowConfig
from engine.events import Event
from engine.mapping.jobs import FinishedJob, JobKind, MapJob
from engine.mapping.mapper import Mapper
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.steps import KeyframeRecord, KeyframeToMatch, MapFigures, MappingStep
from engine.mapping.stored_state import StoredModel, StoredRun
from engine.matching.pair_matching import PairMatching
from engine.matching.scene_graph import SceneGraph
from engine.ports import PairMatcher
from engine.types import FrameId, FramePose, Keyframe, TrackedFrame
from tests.support.stored_runs import StoredSteps

WITHOUT_WINDOWS = Config(
    global_bundle_adjustment=GlobalBundleAdjustmentConfig(
        synchronous_until=6, merge_after_keyframes=2
    ),
    window=WindowConfig(enabled=False),
    runtime=RuntimeConfig(num_threads=1),
)

AnyEvent = TypeVar("AnyEvent", bound=Event)


class MapperRun:
    """A mapper and all that it emits and returns.

    Its jobs are run on this thread when their results are due.

    Args:
        config: the whole configuration.
        matcher: matches keyframes.
        graph: chooses pairs.
        options: further ones of the mapper.
    """

    def __init__(
        self, config: Config, *, matcher: PairMatcher, graph: SceneGraph, **options: Any
    ) -> None:
        self.config = config
        self.graph = graph
        self.events: list[Event] = []
        self.records: list[KeyframeRecord] = []
        self.poses: list[FramePose] = []
        self.stored = StoredSteps()  # what a journal keeps
        self.jobs: list[MapJob] = []  # all that were handed out
        self.due: tuple[MapJob, ...] = ()
        self.matching = PairMatching(
            graph,
            matcher,
            two_view=config.two_view,
            dense=config.dense_matching,
            coarse_to_fine=config.coarse_to_fine,
        )
        self.mapper = Mapper(
            config, graph=graph, matching=self.matching, emit=self._emit, **options
        )
        self._running: dict[JobKind, MapJob] = {}

    # -- feeding --------------------------------------------------------------------------------

    def add_keyframe(self, keyframe: Keyframe, *, wants_view: bool = False) -> MappingStep:
        """Merges what is due, matches a keyframe and adds it to the map."""
        return self.match_and_add(self.begin_keyframe(keyframe), wants_view=wants_view)

    def begin_keyframe(self, keyframe: Keyframe) -> KeyframeToMatch:
        """Merges what is due and begins a keyframe, which is to be matched and added next."""
        due = [job for job in self.due if self._running.get(job.kind) is job]
        return self.mapper.begin_keyframe(keyframe, [self.run_job(job) for job in due])

    def match_and_add(self, to_match: KeyframeToMatch, *, wants_view: bool = False) -> MappingStep:
        """Matches the keyframe that began and adds it to the map."""
        matched = self.matching.match_keyframe(
            to_match.frame_id,
            wants_pointmaps=to_match.wants_pointmaps,
            intrinsics=to_match.intrinsics,
            lost_ids=to_match.lost_ids,
        )
        step = self.mapper.add_keyframe(matched, wants_view=wants_view)
        assert step.record is not None
        self.records.append(step.record)
        self.jobs += step.jobs
        self._running.update((job.kind, job) for job in step.jobs)
        self.due = step.due
        return self._took(step)

    def add_frame(
        self, tracked: TrackedFrame, *, fallback: TrackedFrame | None = None
    ) -> MappingStep:
        """Adds a frame between keyframes."""
        return self._took(self.mapper.add_frame(tracked, fallback=fallback))

    def end(self) -> MappingStep:
        """Merges the jobs in flight and finishes the map."""
        running = [self._running[kind] for kind in JobKind if kind in self._running]
        return self._took(self.mapper.finish([self.run_job(job) for job in running]))

    def restore(self, stored: StoredRun, models: Sequence[StoredModel] = ()) -> MappingStep:
        """Goes on with what a run before has stored."""
        self.stored.load(stored)
        step = self.mapper.restore(stored, models)
        self.jobs += step.jobs
        self._running.update((job.kind, job) for job in step.jobs)
        self.due = step.due
        return self._took(step)

    def run_job(self, job: MapJob) -> FinishedJob:
        """Runs a job that was handed out."""
        self._running.pop(job.kind, None)
        return FinishedJob(job=job, result=job.run())

    # -- what there is --------------------------------------------------------------------------

    def emitted(self, kind: type[AnyEvent]) -> list[AnyEvent]:
        """The events of one kind, in order."""
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def sparse_map(self) -> SparseMap:
        """The live map."""
        return self.mapper._map

    @property
    def separate_maps(self) -> list[SparseMap]:
        """The live maps of what could not be joined to the map."""
        return self.mapper._components.maps

    @property
    def registered_ids(self) -> list[FrameId]:
        """The keyframes in the map."""
        return self.sparse_map.registered_ids

    @property
    def trajectory(self) -> list[FramePose]:
        """The poses of the frames in the map."""
        trajectories = self.mapper.trajectories()
        return trajectories[0] if trajectories else []

    @property
    def figures(self) -> MapFigures:
        """The figures of the map."""
        return self.mapper.figures()

    def _took(self, step: MappingStep) -> MappingStep:
        self.poses += step.new_poses
        self.stored.add(step)
        return step

    def _emit(self, event: Event) -> None:
        self.events.append(event)
