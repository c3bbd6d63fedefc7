"""Rerun blueprint: the viewer's layout with map, current image, figures and log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapters.views.viewpoint import Viewpoint

if TYPE_CHECKING:
    import rerun.blueprint as rrb

Color = tuple[int, int, int, int]

BACKGROUND: Color = (14, 17, 22, 255)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One curve: entity ``metrics/<name>``, or ``load/<name>``."""

    name: str
    label: str
    color: Color


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """Curves of one unit, which share an axis."""

    title: str
    metrics: tuple[Metric, ...]


PLOTS = (
    Plot(
        title="Keyframes",
        metrics=(
            Metric(name="keyframes", label="keyframes", color=(120, 144, 168, 255)),
            Metric(name="registered", label="registered", color=(88, 196, 140, 255)),
            Metric(name="dropped", label="frames dropped", color=(232, 96, 84, 255)),
        ),
    ),
    Plot(
        title="Points",
        metrics=(Metric(name="points", label="points", color=(98, 168, 240, 255)),),
    ),
    Plot(
        title="Reprojection error (px)",
        metrics=(
            Metric(
                name="reprojection_error_px", label="mean error, px", color=(186, 140, 240, 255)
            ),
        ),
    ),
    Plot(
        title="Latency of live frames (ms)",
        metrics=(
            Metric(name="latency_ms", label="arrival to pose, ms", color=(240, 180, 72, 255)),
        ),
    ),
)
LOAD_PLOTS = (
    Plot(
        title="CPU by stage (cores)",
        metrics=(
            Metric(name="cpu_describe", label="decode, describe", color=(120, 144, 168, 255)),
            Metric(name="cpu_match", label="match, verify", color=(98, 168, 240, 255)),
            Metric(name="cpu_track", label="track, pose frames", color=(88, 196, 140, 255)),
            Metric(name="cpu_map", label="register, triangulate", color=(186, 140, 240, 255)),
            Metric(name="cpu_adjust", label="global BA, windows", color=(232, 96, 84, 255)),
            Metric(name="cpu_dense", label="depth, dense points", color=(232, 150, 190, 255)),
            Metric(name="cpu_output", label="files, views", color=(240, 180, 72, 255)),
            Metric(name="cpu_loop", label="event loop", color=(200, 200, 200, 255)),
        ),
    ),
    Plot(
        title="Longest waits (ms)",
        metrics=(
            Metric(name="late", label="event loop late", color=(232, 96, 84, 255)),
            Metric(name="wait_arrivals", label="frames to decode", color=(120, 144, 168, 255)),
            Metric(name="wait_mapping", label="frames to map", color=(186, 140, 240, 255)),
            Metric(name="wait_events", label="events", color=(88, 196, 140, 255)),
            Metric(name="wait_writes", label="writes", color=(240, 180, 72, 255)),
            Metric(name="wait_views", label="views", color=(98, 168, 240, 255)),
        ),
    ),
)
METRICS = tuple(metric for plot in PLOTS for metric in plot.metrics)


def build_blueprint(
    viewpoint: Viewpoint | None = None, *, with_geography: bool = False
) -> rrb.Blueprint:
    """The viewer's layout.

    Args:
        viewpoint: of the map; None: the viewer's camera follows the map as it grows.
        with_geography: a map of the world beside the scene graph, whose tiles the viewer fetches.
    """
    import rerun.blueprint as rrb

    tabs: list[rrb.View | rrb.Container] = [
        _log_view(),
        _verdict_view(),
        _camera_view(),
        _graph_view(),
        _load_view(),
    ]
    if with_geography:
        tabs.append(rrb.MapView(origin="/geo", name="World", zoom=17.0))
    beside = rrb.Vertical(
        rrb.Spatial2DView(origin="/world/live/image", name="Current image"),
        rrb.Tabs(*tabs, active_tab=len(tabs) - 1 if with_geography else 0),
        row_shares=[1.0, 1.0],
    )
    return rrb.Blueprint(
        rrb.Vertical(
            rrb.Horizontal(_map_view(viewpoint), beside, column_shares=[2.6, 1.0]),
            rrb.Horizontal(*(_plot_view(plot) for plot in PLOTS)),
            row_shares=[3.6, 1.0],
        ),
        rrb.TimePanel(
            timeline="frame", play_state="following", state=rrb.components.PanelState.Collapsed
        ),
        rrb.SelectionPanel(state=rrb.components.PanelState.Hidden),
        rrb.BlueprintPanel(state=rrb.components.PanelState.Hidden),
        auto_views=False,
        auto_layout=False,
    )


def _map_view(viewpoint: Viewpoint | None) -> rrb.Spatial3DView:
    import rerun.blueprint as rrb

    eye = rrb.EyeControls3D(
        kind=rrb.Eye3DKind.Orbital,
        position=None if viewpoint is None else viewpoint.position,
        look_target=None if viewpoint is None else viewpoint.target,
        eye_up=None if viewpoint is None else viewpoint.up,
    )
    return rrb.Spatial3DView(
        origin="/world",
        name="Map",
        background=BACKGROUND,
        line_grid=False,
        eye_controls=eye,
        overrides={"world/keyframe_path": rrb.EntityBehavior(visible=False)},
    )


def _graph_view() -> rrb.GraphView:
    import rerun.blueprint as rrb

    return rrb.GraphView(origin="/graph", name="Scene graph")


def _camera_view() -> rrb.TextDocumentView:
    import rerun.blueprint as rrb

    return rrb.TextDocumentView(origin="/cameras", name="Cameras")


def _verdict_view() -> rrb.TextDocumentView:
    import rerun.blueprint as rrb

    return rrb.TextDocumentView(origin="/verdict", name="Verdict")


def _log_view() -> rrb.TextLogView:
    import rerun.blueprint as rrb

    return rrb.TextLogView(
        origin="/logs",
        name="Log",
        columns=rrb.TextLogColumns(
            timeline_columns=["frame"], text_log_columns=["LogLevel", "Body"]
        ),
    )


def _load_view() -> rrb.Vertical:
    import rerun.blueprint as rrb

    plots = (_plot_view(plot, origin="/load") for plot in LOAD_PLOTS)
    return rrb.Vertical(*plots, name="Load")


def _plot_view(plot: Plot, *, origin: str = "/metrics") -> rrb.TimeSeriesView:
    import rerun.blueprint as rrb

    return rrb.TimeSeriesView(
        origin=origin,
        contents=[f"{origin}/{metric.name}" for metric in plot.metrics],
        name=plot.title,
        plot_legend=rrb.PlotLegend(rrb.Corner2D.LeftTop, visible=len(plot.metrics) > 1),
    )
