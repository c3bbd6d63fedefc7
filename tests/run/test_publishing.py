"""What leaves a run while it goes on: what is written, what is shown, what is counted."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from engine.config import RuntimeConfig, SnapshotsConfig, ViewsConfig
from engine.events import Event, Warned
from engine.mapping.steps import MapCounts, MappingStep
from engine.output.recorder import Recorder
from engine.output.run_folder import RunFolder
from engine.output.statistics import RunStatistics
from engine.run.publishing import Publisher
from engine.run.queues import EventQueue, Writer
from engine.run.views import ViewDispatcher
from engine.types import DropReason, Frame, FrameId, FramePose, MapView
from tests.support.fake_runs import frame_of, trajectory_lines
from tests.support.mapper_runs import MapperRun
from tests.support.synthetic import FakeMatcher, SyntheticWorld, scene_graph, straight_path

HANG_S = 300.0  # a guard, no measure
OFTEN = ViewsConfig(max_map_hz=1e9, max_image_hz=1e9)
STEP = MappingStep(record=None, new_poses=(), jobs=(), due=(), counts=MapCounts(), view=None)
EMPTY_VIEW = MapView(
    version=3,
    keyframe_ids=np.empty(0, np.int64),
    cam_from_world=np.empty((0, 3, 4)),
    focal_px=np.empty(0),
    image_sizes=np.empty((0, 2), np.int64),
    points3D_in_world=np.empty((0, 3)),
    colors=np.empty((0, 3), np.uint8),
    chunk_ids=np.empty(0, np.int64),
    edges=np.empty((0, 2), np.int64),
    edge_reasons=(),
)
