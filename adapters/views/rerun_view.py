"""Rerun view: a run as a recording on disk, or live in a window or a browser."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

from adapters.live.run_counters import RunCounters
from adapters.live.verdict_words import verdict_document
from adapters.views.camera_table import camera_table
from adapters.views.display_image import DisplayImage, display_image
from adapters.views.log_lines import log_line_of
from adapters.views.rerun_blueprint import METRICS, build_blueprint
from adapters.views.rerun_dense import DenseDrawing
from adapters.views.rerun_geography import GeographyDrawing
from adapters.views.rerun_ground import GroundDrawing
from adapters.views.rerun_limits import RecordingLimit, RedrawSchedule
from adapters.views.rerun_load import LoadDrawing
from adapters.views.rerun_overlays import OverlayDrawing
from adapters.views.rerun_scene import LIVE_COLOR, SceneDrawing
from adapters.views.rerun_service import LiveServer
from adapters.views.view_mode import ViewMode
from adapters.views.viewpoint import Viewpoint
from engine.config import CamerasConfig, ViewsConfig
from engine.dense_types import DenseCloud, GroundPicture
from engine.errors import ConfigError
from engine.events import (
    BundleAdjusted,
    ComponentJoined,
    EarlyMapMade,
    Event,
    FrameDropped,
    FramePosed,
    FrameRegistered,
    KeyframeAdded,
    LoadMeasured,
    MainMapChanged,
    MapInitialized,
    OverlayFound,
    RunFinished,
    VerdictChanged,
)
from engine.types import Frame, FramePose, MapCounts, MapView

if TYPE_CHECKING:
    from rerun import RecordingStream
    from rerun.blueprint import Blueprint

APPLICATION_ID = "livesfm"  # under this name the viewer keeps a layout that a user arranged
FLUSH_TIMEOUT_S = 10.0
LINGER_S = 0.5  # connected viewers fetch the last messages after the recording has ended
MIN_FOCAL_RATIO = 0.3  # of the image edge: 118 degrees
UNKNOWN_FOCAL_RATIO = CamerasConfig().default_focal_ratio  # of a live camera not in the map yet
LOST_RATIO = 1e-6  # of the size of the live camera

_METRICS_OF_EVENT: dict[type[Event], tuple[str, ...]] = {
    FrameDropped: ("dropped",),
    FramePosed: ("latency_ms",),
    KeyframeAdded: ("keyframes",),
    EarlyMapMade: ("registered", "points"),
    MapInitialized: ("registered", "points"),
    FrameRegistered: ("registered", "points"),
    ComponentJoined: ("registered",),
    MainMapChanged: ("registered",),
    BundleAdjusted: ("points", "reprojection_error_px"),
    RunFinished: ("keyframes", "registered"),
}

logger = logging.getLogger(__name__)


class RerunView:
    """A run as a Rerun recording.

    Timelines: ``frame`` (frame ids), ``capture`` (the source's clock, from the first frame on) and
    ``run`` (time since the start). Points far outside the map are left out of the drawing, so that
    the viewer's automatic camera frames the map; the map itself and its snapshots keep them.
    """

    def __init__(
        self,
        recording: RecordingStream,
        *,
        config: ViewsConfig,
        server: LiveServer | None = None,
        path: Path | None = None,
        stays: bool = False,
    ) -> None:
        """Uses a recording whose sink is set, a server or a file; ``open`` makes one."""
        self._stays = stays
        self._recording = recording
        self._config = config
        self._server = server
        self._limit = RecordingLimit(path, max_mb=config.max_recording_mb)
        self._redraws = RedrawSchedule(memory_limit_mb=config.memory_limit_mb)
        self._geography = GeographyDrawing(recording) if config.geographic_map else None
        self._scene = SceneDrawing(recording)
        self._load = LoadDrawing(recording)
        self._dense = DenseDrawing(recording)
        self._ground = GroundDrawing(recording)
        self._undrawn_ground: GroundPicture | None = None  # the newest one that is not drawn
        self._shown_ground: GroundPicture | None = None  # as it was drawn last
        self._undrawn_dense: DenseCloud | None = None  # the newest one that is not drawn
        self._shown_dense: DenseCloud | None = None  # as it was drawn last
        self._counters = RunCounters()
        self._focal_of_size: dict[tuple[int, int], float] = {}
        self._newest_frame_id = 0
        self._newest_capture_s = 0.0
        self._first_capture_s: float | None = None
        self._run_s = 0.0
        self._overlays = OverlayDrawing(recording)
        self._camera_table = ""  # as it was shown last
        self._undrawn: MapView | None = None  # the newest map, when the recording is full
        self._log_constants()

    @classmethod
    def open(
        cls,
        run_name: str,
        *,
        mode: ViewMode,
        recording_path: Path | None,
        config: ViewsConfig,
        stays: bool = False,
    ) -> RerunView:
        """Starts a recording in a file, or in live modes a server and a viewer.

        For both, open two: a viewer that hangs does not affect the file, and a full file lacks
        images that the viewer still shows.

        Args:
            run_name: the recording's name in the viewer.
            mode: any but ``none``.
            recording_path: the file to write, with ``record``; else None.
            config: the views' settings.
            stays: viewers may connect until `end`, also after `close`.

        Raises:
            ConfigError: there is nothing to show to, a port is taken, there is no screen, or the
                file cannot be created.
        """
        import rerun as rr

        if mode is ViewMode.NONE or (mode is ViewMode.RECORD) != (recording_path is not None):
            raise ConfigError(f"the view '{mode}' does not go with the file {recording_path}")
        is_live = mode is not ViewMode.RECORD
        server = LiveServer(config, with_page=mode is ViewMode.SERVE) if is_live else None
        recording = rr.RecordingStream(APPLICATION_ID)
        try:
            _connect(recording, recording_path=recording_path, server=server, config=config)
        except ConfigError:
            recording.disconnect()
            raise
        recording.send_recording_name(run_name)
        return cls(recording, config=config, server=server, path=recording_path, stays=stays)

    @property
    def url(self) -> str | None:
        """The URL at which browsers see the run; None unless it is served."""
        return self._server.url if self._server else None

    @property
    def viewer_command(self) -> str | None:
        """The command that shows the run in a window of its own; None unless it is live."""
        if self._server is None:
            return None
        program = Path(sys.executable).with_name("rerun")
        return f"{os.path.relpath(program)} {self._server.grpc_url}"

    @property
    def has_viewers(self) -> bool:
        """Whether a viewer is connected, as far as the system says."""
        return self._server is not None and self._server.has_viewers

    def show_frame(self, frame: Frame, pose: FramePose | None) -> None:
        """Shows the current image and, when known, the camera that took it."""
        import rerun as rr

        self._update_newest(frame.frame_id, frame.captured_at_s)
        if self._limit.is_full:
            return
        self._stamp(frame.frame_id, frame.captured_at_s)
        if self._geography is not None and frame.gps is not None:
            self._geography.draw(frame.gps)
        image = display_image(frame, config=self._config)
        if pose is not None:
            self._log_live_pose(pose)
        self._log_live_camera(frame, image=image, is_placed=pose is not None)
        encoded = rr.EncodedImage(contents=image.jpeg, media_type="image/jpeg")
        self._recording.log("world/live/image", encoded)
        self._overlays.draw(frame, image=image)
        self._redraws.add_sent_bytes(len(image.jpeg))
        self._stamp()
        self._scene.draw_tail()

    def show_map(self, view: MapView) -> None:
        """Shows the map; only what changed is sent."""
        counts = MapCounts(
            num_registered=len(view.keyframe_ids), num_points3D=len(view.points3D_in_world)
        )
        self._counters.update_counts(counts)
        for focal_px, (width, height) in zip(view.focal_px, view.image_sizes, strict=True):
            self._focal_of_size[int(width), int(height)] = float(focal_px)
        self._stamp()
        self._log_metrics("registered", "points")
        self._log_cameras(view)
        self._undrawn = view if self._limit.is_full else None
        if self._undrawn is not None:
            return
        if self._server is not None and self._redraws.take_due():
            self._scene.draw_all_again()
            self._dense.draw_all_again()
            self._undrawn_dense = self._undrawn_dense or self._shown_dense
            self._undrawn_ground = self._undrawn_ground or self._shown_ground
        former_scale = self._scene.scale
        self._redraws.add_sent_bytes(self._scene.draw_map(view))
        if self._scene.scale is not former_scale:  # may show points that were too far out
            self._undrawn_dense = self._undrawn_dense or self._shown_dense
        self._draw_dense()
        self._draw_ground()

    def show_dense(self, cloud: DenseCloud) -> None:
        """Shows the dense map; only points that are new are sent, and what moved."""
        self._undrawn_dense = cloud
        self._stamp()
        if not self._limit.is_full:
            self._draw_dense()

    def show_ground(self, ground: GroundPicture) -> None:
        """Shows the ground from above, and where it is badly covered."""
        self._undrawn_ground = ground
        self._stamp()
        if not self._limit.is_full:
            self._draw_ground()

    def _forget_dense(self) -> None:
        """Takes the dense map and the ground of a former world away."""
        self._undrawn_dense = self._shown_dense = None
        self._undrawn_ground = self._shown_ground = None
        self._stamp()
        self._dense.clear()
        self._ground.clear()

    def _draw_ground(self) -> None:
        ground = self._undrawn_ground
        if ground is not None:
            self._redraws.add_sent_bytes(self._ground.draw(ground))
            self._undrawn_ground, self._shown_ground = None, ground

    def _draw_dense(self) -> None:
        """Draws the newest dense map, once it is known how large the map is."""
        cloud, scale = self._undrawn_dense, self._scene.scale
        if cloud is not None and scale is not None:
            self._redraws.add_sent_bytes(self._dense.draw(cloud, scale=scale))
            self._undrawn_dense, self._shown_dense = None, cloud

    def show_event(self, event: Event) -> None:
        """Shows one event: as a figure, a line of the log, or a step of the trajectory."""
        import rerun as rr

        self._counters.update(event)
        self._run_s = event.at_s
        if isinstance(event, FramePosed | KeyframeAdded):
            self._update_newest(event.frame_id, event.captured_at_s)
        if isinstance(event, OverlayFound):
            self._overlays.found(event)
        if isinstance(event, MainMapChanged):
            self._scene.forget_positions()
            self._forget_dense()
        if isinstance(event, FramePosed) and event.map_number == 0:
            self._scene.add_position(event.frame_id, event.cam_center_in_world)
        self._stamp()
        self._log_metrics(*_METRICS_OF_EVENT.get(type(event), ()))
        if isinstance(event, LoadMeasured):
            self._load.draw(event)
        if isinstance(event, VerdictChanged):
            document = rr.TextDocument(
                verdict_document(event.verdict), media_type=rr.MediaType.MARKDOWN
            )
            self._recording.log("verdict", document)
        if log_line := log_line_of(event, self._counters):
            for text in log_line.text.splitlines():  # the viewer shows one line of each entry
                self._recording.log("logs", rr.TextLog(text, level=log_line.level.value))

    def close(self) -> None:
        """Finishes the file; a page that was served ends, unless it stays."""
        try:
            if self._undrawn is not None:
                self._scene.draw_map(self._undrawn)
            if not self._limit.is_full:
                self._draw_dense()
                self._draw_ground()
            viewpoint = self._scene.overview()
            if self._server is None and viewpoint is not None:
                # No viewer is connected, so the viewpoint may change to show the whole map.
                self._recording.send_blueprint(self._blueprint(viewpoint))
            self._recording.flush(timeout_sec=FLUSH_TIMEOUT_S)
        except RuntimeError as error:
            logger.warning("the end of the recording may be missing: %s", error)
        if not self._stays:
            self.end()

    def end(self) -> None:
        """Ends the recording and its server; viewers keep what they have fetched."""
        self._recording.disconnect()
        if self._server is not None:
            time.sleep(LINGER_S)
            self._server.stop()

    def _blueprint(self, viewpoint: Viewpoint) -> Blueprint:
        return build_blueprint(viewpoint, with_geography=self._config.geographic_map)

    def _update_newest(self, frame_id: int, captured_at_s: float) -> None:
        if self._first_capture_s is None:
            self._first_capture_s = captured_at_s
        self._newest_frame_id = max(self._newest_frame_id, frame_id)
        self._newest_capture_s = max(self._newest_capture_s, captured_at_s)

    def _stamp(self, frame_id: int | None = None, captured_at_s: float | None = None) -> None:
        """Sets the time of what this thread logs next: of a frame, or of the newest one seen."""
        sequence = self._newest_frame_id if frame_id is None else int(frame_id)
        capture_s = self._newest_capture_s if captured_at_s is None else captured_at_s
        since_first_s = capture_s - (self._first_capture_s or 0.0)
        self._recording.set_time("frame", sequence=sequence)
        self._recording.set_time("capture", duration=since_first_s)
        self._recording.set_time("run", duration=self._run_s)

    def _log_constants(self) -> None:
        import rerun as rr

        self._recording.log("world", rr.ViewCoordinates.RDF, static=True)
        self._recording.log("world/live/image", rr.TransformAxes3D(0.0), static=True)
        for metric in METRICS:
            style = rr.SeriesLines(names=metric.label, colors=metric.color, widths=2.0)
            self._recording.log(f"metrics/{metric.name}", style, static=True)
        self._stamp()
        self._log_metrics("keyframes", "registered", "points", "dropped")

    def _log_metrics(self, *names: str) -> None:
        import rerun as rr

        for name in names:
            value = self._metric(name)
            if value is not None:
                self._recording.log(f"metrics/{name}", rr.Scalars(value))

    def _log_cameras(self, view: MapView) -> None:
        import rerun as rr

        table = camera_table(view.cameras)
        if table and table != self._camera_table:
            self._camera_table = table
            document = rr.TextDocument(table, media_type=rr.MediaType.MARKDOWN)
            self._recording.log("cameras", document)

    def _metric(self, name: str) -> float | None:
        counters = self._counters
        latency_s = counters.latest_latency_s
        return {
            "keyframes": counters.keyframes,
            "registered": counters.registered,
            "dropped": counters.dropped,
            "points": counters.points3D,
            "reprojection_error_px": counters.reprojection_error_px,
            "latency_ms": None if latency_s is None else 1e3 * latency_s,
        }[name]

    def _log_live_pose(self, pose: FramePose) -> None:
        import rerun as rr

        world_from_cam = pose.cam_from_world[:, :3].T
        center = -world_from_cam @ pose.cam_from_world[:, 3]
        self._recording.log("world/live", rr.Transform3D(translation=center, mat3x3=world_from_cam))

    def _log_live_camera(self, frame: Frame, *, image: DisplayImage, is_placed: bool) -> None:
        import rerun as rr

        distance = self._scene.live_image_distance_map
        camera = rr.Pinhole(
            # Rerun refuses NumPy's numbers, which a prior may hold.
            focal_length=float(self._focal_px(frame)) * image.width / frame.width,
            width=image.width,
            height=image.height,
            camera_xyz=rr.ViewCoordinates.RDF,
            # The 3D view complains about an image without a camera, so a lost one is made a dot.
            image_plane_distance=distance if is_placed else LOST_RATIO * distance,
            color=LIVE_COLOR,
            line_width=cast(float, rr.Radius.ui_points(0.75)),  # the stub says any array
        )
        self._recording.log("world/live/image", camera)

    def _focal_px(self, frame: Frame) -> float:
        """Of the pinhole in which the viewer hangs the image; a wider one would be all image."""
        return max(self._known_focal_px(frame), MIN_FOCAL_RATIO * max(frame.width, frame.height))

    def _known_focal_px(self, frame: Frame) -> float:
        known = self._focal_of_size.get((frame.width, frame.height))
        if known is not None:
            return known
        if frame.intrinsics_prior is not None and frame.intrinsics_prior.focal_px > 0.0:
            return frame.intrinsics_prior.focal_px
        return UNKNOWN_FOCAL_RATIO * max(frame.width, frame.height)


def _connect(
    recording: RecordingStream,
    *,
    recording_path: Path | None,
    server: LiveServer | None,
    config: ViewsConfig,
) -> None:
    import rerun as rr

    file_sinks = [rr.FileSink(recording_path)] if recording_path is not None else []
    live_sinks = [server.sink] if server is not None else []
    blueprint = build_blueprint(with_geography=config.geographic_map)
    try:
        recording.set_sinks(*file_sinks, *live_sinks, default_blueprint=blueprint)
    except RuntimeError as error:
        raise ConfigError(f"the recording cannot be started: {error}") from error
    if server is not None:
        server.start_viewer()
