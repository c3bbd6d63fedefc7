"""Validated configuration: loaded, overlaid and dumped here and nowhere else.

Precedence: built-in defaults < YAML overlays, in order < ``section.key=value`` settings. The
built-in defaults are the ones ``configs/default.yaml`` explains; a test holds the two together.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.errors import ConfigError

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """A frozen group of settings; unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


class SourcesConfig(Section):
    """How frames are taken in."""

    min_image_edge_px: PositiveInt = 64  # smaller frames are dropped as too_small
    max_image_megapixels: PositiveFloat = 120.0  # larger frames are dropped as too_large
    max_frames: NonNegativeInt = 0  # stop after this many frames; 0: all
    every_nth_frame: PositiveInt = 1  # video: take one frame of n
    frame_queue_size: PositiveInt = 4  # of one source; then a file waits, a live one drops oldest
    mapping_queue_size: PositiveInt = 16  # tracked frames waiting for mapping
    max_buffered_mb: PositiveInt = 512  # pixels of all frames on their way through the engine


class LiveSourcesConfig(Section):
    """Sources that go on by themselves: streams, MQTT, phones and watched folders."""

    open_timeout_s: PositiveFloat = 10.0  # until a connection is there
    read_timeout_s: PositiveFloat = 5.0  # without a frame, before a stream counts as lost
    retry_first_s: PositiveFloat = 0.5  # before the first try to connect again; then doubled
    retry_max_s: PositiveFloat = 10.0
    give_up_after_s: NonNegativeFloat = 0.0  # without a frame, the source ends; 0: never
    max_cameras: PositiveInt = 16  # of one source; frames of more are dropped
    max_payload_mb: PositiveInt = 32  # larger messages are refused unread
    rtsp_transport: Literal["tcp", "udp"] = "tcp"
    verify_certificates: bool = True  # of rtsps, rtmps and https; False: whoever answers is trusted
    ca_file: str = ""  # certificates that sign theirs; "": the system's
    settle_s: NonNegativeFloat = 0.5  # a watched file counts as written after so long unchanged
    camera_size: str = ""  # camera:N: WIDTHxHEIGHT to ask for; "": the camera's own
    camera_rate_hz: NonNegativeFloat = 0.0  # camera:N: frames a second to ask for; 0: its own


class MqttConfig(Section):
    """MQTT: how to connect, and what is published. Passwords come from the environment."""

    publish: str = ""  # mqtt(s)://[USER@]HOST[:PORT]/PREFIX that the run is told to; "": nowhere
    commands: bool = False  # take commands from PREFIX/command; needs a user and a password
    telemetry_topic: str = ""  # of positions for a source's frames; "": TOPIC with /telemetry
    ca_file: str = ""  # certificates that sign the broker's; "": the system's
    client_certificate: str = ""  # with its key, for brokers that ask for one
    client_key: str = ""
    max_pose_hz: PositiveFloat = 30.0  # of each camera


class PhoneConfig(Section):
    """The page that a phone's browser opens."""

    image_edge_px: Annotated[int, Field(ge=64)] = 1280  # longer edge the page asks the camera for
    max_rate_hz: PositiveFloat = 10.0  # frames a second that the page sends
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 80
    certificate: str = ""  # with its key, in PEM; "": a self-signed one is made
    certificate_key: str = ""
    max_phones: PositiveInt = 4  # at the same time


class GeoreferenceConfig(Section):
    """Laying the map onto GPS positions."""

    enabled: bool = True
    min_fixes: Annotated[int, Field(ge=4)] = 6  # keyframes with GPS before the first try
    min_extent_m: PositiveFloat = 10.0  # of the positions, for the directions to be certain
    max_error_m: PositiveFloat = 10.0  # a position farther from the map is left out
    max_gap_s: PositiveFloat = 2.0  # positions farther apart in time are not interpolated
    accuracy_m: PositiveFloat = 2.0  # horizontal standard deviation where a receiver tells none
    vertical_accuracy_m: PositiveFloat = 4.0
    adjust: bool = True  # let positions pull on the map, in a last bundle adjustment
    metric_map: bool = True  # snapshots and exports in metres east, north, up


class CamerasConfig(Section):
    """Camera models and how far their calibration is trusted."""

    model: Literal["SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV"] = (
        "SIMPLE_RADIAL"
    )
    focal_px: NonNegativeFloat = 0.0  # focal length at the original size; 0: from EXIF or images
    params: tuple[float, ...] = ()  # whole calibration in COLMAP's order for the model; (): unknown
    intrinsics: Literal["refined", "fixed"] = "refined"  # whether bundle adjustment may change them
    refine_known_intrinsics: bool = False  # also those a source knows completely
    default_focal_ratio: PositiveFloat = 0.85  # of the longer edge, when nothing better is known
    single_camera_per_size: bool = True  # a folder's images of one size and make share intrinsics


class FrameTrackingConfig(Section):
    """Following keypoints between keyframes and deciding on new keyframes."""

    mode: Literal["auto", "video", "photos"] = "auto"  # photos: every frame is a keyframe
    max_tracked_points: PositiveInt = 400
    working_edge_px: PositiveInt = 640  # optical flow runs on images of at most this longer edge
    min_tracked_points: PositiveInt = 30  # fewer left: a keyframe now, if the frame is usable
    max_flow_ratio: Ratio = 0.06  # median motion since the keyframe, of the image diagonal
    min_overlap_ratio: Ratio = 0.55  # share of the keyframe's points still followed
    min_flow_ratio: Ratio = 0.01  # below this the camera stands still: time makes no keyframe
    max_gap_s: NonNegativeFloat = 2.0  # a moving camera gets a keyframe at least this often; 0: off


class MatchingConfig(Section):
    """Which matcher relates keyframes, and what it may tell besides matches."""

    matcher: Literal["sift", "mast3r", "oracle"] = "sift"  # oracle: true matches of synthetic:town
    use_focal_lengths: bool = True  # of a matcher that sees them, for cameras nobody knows
    metric_scale: Literal["off", "report", "apply"] = "report"  # of a matcher that sees metres


class DenseMatchingConfig(Section):
    """How matches of a dense matcher become keypoints; radii are at an image edge of 1000 px."""

    max_corners: NonNegativeInt = 1024  # keypoints of a keyframe at corners, which flow can follow
    max_keypoints: Annotated[int, Field(ge=16)] = 4096  # the rest are free rows on a grid
    max_query_points: PositiveInt = 2048  # keypoints of each image looked up in the other
    min_confidence: Ratio = 0.5  # of a match
    border_px: NonNegativeFloat = 6.0  # matches this close to an image's edge are left out
    max_matches_per_pair: PositiveInt = 2000  # the most confident, spread over the image
    merge_radius_px: Annotated[float, Field(ge=0.5)] = 2.0  # ends this near a keypoint become it
    expected_radius_px: PositiveFloat = 6.0  # the same, where third keyframes lead to it


class Mast3rConfig(Section):
    """The MASt3R matcher."""

    checkpoint: str = ""  # the public .pth file, or a folder of config.json and model.safetensors
    retrieval_checkpoint: str = ""  # the public _retrieval_trainingfree.pth; "": pooled tokens
    implementation: Literal["native", "upstream"] = "native"
    upstream_root: str = ""  # a checkout of upstream's repository; "": the installed package
    device: str = "auto"  # auto: cuda when there is one; cpu, cuda, cuda:1
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on GPUs
    image_edge_px: Annotated[int, Field(ge=64, le=2048)] = 512  # longer edge the network sees
    batch_pairs: PositiveInt = 8  # decoded together
    symmetric: bool = False  # decode each pair in both orders: twice the work, more matches
    scheme: Literal["queries", "fast_reciprocal"] = "queries"
    reciprocal_tolerance_px: NonNegativeFloat = 1.0  # network px between a query and the way back
    subsample: PositiveInt = 8  # network px between the seeds of fast_reciprocal
    device_cache_mb: NonNegativeInt = 2048  # encoded keyframes kept on the device
    host_cache_mb: NonNegativeInt = 2048  # kept in main memory; what does not fit goes to disk


class OracleConfig(Section):
    """The matcher that knows the truth of synthetic:town, and how it spoils it."""

    noise_px: NonNegativeFloat = 1.0  # standard deviation of a match's far end, in x and in y
    outlier_ratio: Ratio = 0.1  # matches that end anywhere in the other image
    dropped_ratio: Ratio = 0.0  # of the image's cells, in which nothing is matched
    exposed_outlier_ratio: Ratio = 0.0  # of the outliers, those that low confidence gives away
    depth_noise_ratio: NonNegativeFloat = 0.05  # standard deviation of depths, relative
    tells_focal_length: bool = True
    tells_depths: bool = True


class SiftConfig(Section):
    """The SIFT matcher."""

    max_features: PositiveInt = 8192  # keypoints kept per photo, strongest first
    max_features_in_video: PositiveInt = 2000  # per keyframe of a video, whose frames overlap more
    working_edge_px: PositiveInt = 1600  # detection runs on images of at most this longer edge
    contrast_threshold: PositiveFloat = 0.01
    edge_threshold: PositiveFloat = 10.0
    max_ratio: Ratio = 0.8  # Lowe's ratio test on descriptor distances
    mutual: bool = True  # the match must be the best in both directions


class RetrievalConfig(Section):
    """Place recognition over keyframe descriptors."""

    num_words: PositiveInt = 512
    max_descriptors: PositiveInt = 1000  # of each keyframe, strongest first
    first_vocabulary_at: PositiveInt = 10  # keyframes seen before words are learned
    max_vocabulary_keyframes: PositiveInt = 100  # after so many the words stay as they are


class SceneGraphConfig(Section):
    """Which pairs of keyframes are matched."""

    pairs_per_keyframe: PositiveInt = 14  # budget of pairs for a new keyframe
    exhaustive_below: NonNegativeInt = 30  # all pairs while there are at most so many keyframes
    temporal_offsets: tuple[PositiveInt, ...] = (1, 2, 3, 4, 6, 8, 12, 16)
    num_covisible: NonNegativeInt = 4
    num_retrieved: NonNegativeInt = 4
    num_gps: NonNegativeInt = 4
    max_gps_distance_m: PositiveFloat = 150.0
    min_retrieval_score: Ratio = 0.15
    loop_min_gap: PositiveInt = 12  # keyframes between two that make their pair a loop


class TwoViewConfig(Section):
    """Geometric verification of a pair."""

    max_error_px: PositiveFloat = 3.0  # at an image edge of 1000 px; scales with the image
    min_inliers: PositiveInt = 18
    min_inlier_ratio: Ratio = 0.25


class InitializationConfig(Section):
    """The first two keyframes of a map."""

    min_keyframes: PositiveInt = 4  # wait for so many before trying (or the end of the sources)
    min_inliers: PositiveInt = 60
    min_triangulation_angle_deg: PositiveFloat = 6.0  # median over the points of the pair
    max_reprojection_error_px: PositiveFloat = 2.0  # mean after bundle adjustment
    max_pairs_tried: PositiveInt = 12  # each time


class RegistrationConfig(Section):
    """Posing a keyframe against the map."""

    max_error_px: PositiveFloat = 8.0  # at an image edge of 1000 px; scales with the image
    min_inliers: PositiveInt = 20
    sure_inlier_ratio: Ratio = 0.65  # of matched points, while frames still arrive
    min_inlier_ratio: Ratio = 0.25  # accepted at the end, when no better evidence can come
    max_retries_per_keyframe: PositiveInt = 4  # waiting keyframes tried after each success


class TriangulationConfig(Section):
    """Making, extending and filtering points."""

    min_angle_deg: PositiveFloat = 1.5
    max_reprojection_error_px: PositiveFloat = 3.0  # at an image edge of 1000 px
    ignore_two_view_tracks: bool = True  # a point needs matches beyond one pair
    max_transitivity: PositiveInt = 2  # how far matches are followed when extending tracks


class LocalBundleAdjustmentConfig(Section):
    """Refinement around each new keyframe."""

    num_keyframes: Annotated[int, Field(ge=2)] = 6  # the new one and its best covisible neighbours
    max_iterations: PositiveInt = 8
    num_passes: PositiveInt = 1


class GlobalBundleAdjustmentConfig(Section):
    """Refinement of the whole map, on a copy beside the growing map."""

    growth_ratio: Annotated[float, Field(gt=1.0)] = 1.3  # registered keyframes since the last
    synchronous_until: NonNegativeInt = 12  # maps of at most so many keyframes wait for it
    merge_after_keyframes: PositiveInt = 3  # the result joins the map so many keyframes later
    max_iterations: PositiveInt = 20
    final_iterations: PositiveInt = 50
    final_passes: PositiveInt = 1  # bundle adjustment and filtering at the end of the run


class WindowConfig(Section):
    """Stretches of keyframes solved as a whole, as VGGSfM does it, beside the growing map."""

    enabled: bool = True
    size: Annotated[int, Field(ge=3)] = 12  # newest keyframes of a window, whose poses may change
    num_older: Annotated[int, Field(ge=2)] = 6  # held keyframes that share most with them
    interval: PositiveInt = 8  # keyframes between windows; longer while they change nothing
    min_keyframes: PositiveInt = 20  # of the map before the first one
    merge_after_keyframes: PositiveInt = 2  # the result joins the map so many keyframes later
    min_gain_ratio: Ratio = 0.01  # by which the window's keypoints must fit better, to merge it
    bootstrap: bool = True  # a first map from a window when no pair of keyframes gives one
    max_rescues: NonNegativeInt = 8  # windows around missing keyframes, at the end
    max_final: NonNegativeInt = 4  # windows around keyframes that fit worse than most, at the end
    solver: Literal["native", "vggsfm"] = "native"  # vggsfm: upstream's own package
    vggsfm_root: str = ""  # a checkout of upstream's repository; "": the installed package
    camera_predictor: str = ""  # weights of upstream's camera predictor; "": it is not used


class RescueConfig(Section):
    """What happens when the map does not hold the keyframes it should."""

    restart_below_registered_ratio: Ratio = 0.5  # a fuller map is tried when fewer registered
    restart_min_keyframes: PositiveInt = 8  # keyframes seen before a restart is considered
    max_restarts: NonNegativeInt = 4
    final_rebuilds: NonNegativeInt = 3  # other starts tried at the end when keyframes are missing
    separate_maps: bool = True  # keyframes that cannot be joined to the map get maps of their own


class SnapshotsConfig(Section):
    """COLMAP models written during the run."""

    every_keyframes: NonNegativeInt = 10  # 0: only on stop
    every_s: NonNegativeFloat = 15.0  # 0: only by keyframes
    keep: NonNegativeInt = 10  # newest kept; 0: all
    min_registered: Annotated[int, Field(ge=2)] = 3
    min_track_length: Annotated[int, Field(ge=2)] = 2  # shorter points stay out of snapshots


class ViewsConfig(Section):
    """Live views."""

    max_map_hz: PositiveFloat = 1.0
    max_image_hz: PositiveFloat = 10.0
    image_edge_px: PositiveInt = 640  # images without a JPEG of their own are shown at this size
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 80
    grpc_port: Annotated[int, Field(ge=0, le=65535)] = 9876  # serve; 0: any free port
    web_port: Annotated[int, Field(ge=0, le=65535)] = 9090
    bind: str = "127.0.0.1"
    memory_limit_mb: PositiveInt = 512  # of the live server's buffer
    recording: bool = True  # write recording.rrd
    max_recording_mb: NonNegativeInt = 4096  # then images and graphs are left out; 0: no limit
    geographic_map: bool = False  # a map of the world beside the 3D view; the viewer loads tiles


class RuntimeConfig(Section):
    """Threads, seeds and the run as a whole."""

    seed: NonNegativeInt = 0
    num_threads: NonNegativeInt = 1  # of global bundle adjustment; 0: all cores
    keyframe_jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 95  # frames without own JPEG


class Config(Section):
    """Everything a run can be told."""

    sources: SourcesConfig = SourcesConfig()
    live_sources: LiveSourcesConfig = LiveSourcesConfig()
    mqtt: MqttConfig = MqttConfig()
    phone: PhoneConfig = PhoneConfig()
    georeference: GeoreferenceConfig = GeoreferenceConfig()
    cameras: CamerasConfig = CamerasConfig()
    frame_tracking: FrameTrackingConfig = FrameTrackingConfig()
    matching: MatchingConfig = MatchingConfig()
    dense_matching: DenseMatchingConfig = DenseMatchingConfig()
    mast3r: Mast3rConfig = Mast3rConfig()
    oracle: OracleConfig = OracleConfig()
    sift: SiftConfig = SiftConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    scene_graph: SceneGraphConfig = SceneGraphConfig()
    two_view: TwoViewConfig = TwoViewConfig()
    initialization: InitializationConfig = InitializationConfig()
    registration: RegistrationConfig = RegistrationConfig()
    triangulation: TriangulationConfig = TriangulationConfig()
    local_bundle_adjustment: LocalBundleAdjustmentConfig = LocalBundleAdjustmentConfig()
    global_bundle_adjustment: GlobalBundleAdjustmentConfig = GlobalBundleAdjustmentConfig()
    window: WindowConfig = WindowConfig()
    rescue: RescueConfig = RescueConfig()
    snapshots: SnapshotsConfig = SnapshotsConfig()
    views: ViewsConfig = ViewsConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="after")
    def _whole_calibration_needs_its_model(self) -> Config:
        num_params = {
            "SIMPLE_PINHOLE": 3,
            "PINHOLE": 4,
            "SIMPLE_RADIAL": 4,
            "RADIAL": 5,
            "OPENCV": 8,
        }[self.cameras.model]
        if self.cameras.params and len(self.cameras.params) != num_params:
            raise ValueError(
                f"cameras.params: {self.cameras.model} has {num_params} parameters, "
                f"{len(self.cameras.params)} given"
            )
        return self


def load_config(paths: Sequence[Path] = (), settings: Iterable[str] = ()) -> Config:
    """Builds the configuration of a run.

    Args:
        paths: YAML overlays, later ones win.
        settings: ``section.key=value`` strings, values in YAML; they win over files.

    Raises:
        ConfigError: a file cannot be read, a key is unknown (names the nearest valid one), or a
            value is out of range.
    """
    merged: dict[str, Any] = {}
    for path in paths:
        _merge(merged, _read_yaml(path), origin=str(path))
    for setting in settings:
        _merge(merged, _parse_setting(setting), origin=f"--set {setting}")
    return _validate(merged)


def dump_config(config: Config) -> str:
    """The whole resolved configuration as YAML."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return text


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected sections of settings, found {type(loaded).__name__}")
    return loaded


def _parse_setting(setting: str) -> Mapping[str, Any]:
    name, equals, text = setting.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(f"--set {setting}: expected section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {setting}: the value is not valid YAML: {error}") from error
    return {section: {key: value}}


def _merge(merged: dict[str, Any], overlay: Mapping[str, Any], *, origin: str) -> None:
    for section, values in overlay.items():
        _check_name(section, Config.model_fields, what="section", origin=origin)
        if not isinstance(values, Mapping):
            raise ConfigError(f"{origin}: {section} is a section of settings, not a value")
        section_fields = type(getattr(Config(), section)).model_fields
        for key, value in values.items():
            _check_name(key, section_fields, what=f"key of {section}", origin=origin)
            merged.setdefault(section, {})[key] = value


def _check_name(name: object, valid: Mapping[str, Any], *, what: str, origin: str) -> None:
    if name in valid:
        return
    nearest = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.0)
    raise ConfigError(f"{origin}: unknown {what}: {name}; did you mean {nearest[0]}?")


def _validate(merged: Mapping[str, Any]) -> Config:
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or 'configuration'}: {item['msg']}"
            + (f" (given {item['input']!r})" if item["loc"] else "")
            for item in error.errors()
        )
        raise ConfigError(problems) from error
