"""Validated configuration: loaded, overlaid and dumped here and nowhere else.

Precedence: built-in defaults < overlays, in order < ``section.key=value`` settings. An overlay is a
YAML file, or a preset by its name: the files of ``configs/``, which an installed package holds as
``engine/presets/``.

The string below a setting says its unit and effect. ``tools/generate_default_config.py`` writes
``configs/default.yaml`` from these strings and from the defaults.
"""

from __future__ import annotations

import difflib
import logging
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from engine.camera_models import CAMERA_MODELS, CameraModelName
from engine.errors import ConfigError
from engine.plain_yaml import load_plain_yaml
from engine.regular_files import read_regular_file

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parent
_MAX_FILE_BYTES = 256_000  # of YAML; all settings with their comments take a quarter
_MAX_PROBLEMS = 5  # in one message
_MAX_SHOWN_CHARS = 80  # of what the user gave
TelemetryOrder = Literal["auto", "latitude_first", "longitude_first"]

_MAX_EXTRA_BYTES = 64_000_000  # of an image file: thumbnails, previews, the video of a moving photo
_MAX_INT = 2**31 - 1  # COLMAP's options are C's int
_MAX_FLOAT = 1e9  # above it times no longer fit in the clocks of operating systems

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveRatio = Annotated[float, Field(gt=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1, le=_MAX_INT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=_MAX_INT)]
PositiveFloat = Annotated[float, Field(gt=0.0, le=_MAX_FLOAT)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, le=_MAX_FLOAT)]
AcuteDeg = Annotated[float, Field(gt=0.0, le=90.0)]
GridSize = Annotated[int, Field(ge=16, le=100_000)]  # keypoints that every keyframe has room for


def _calibrations(value: object) -> object:
    """A mapping of patterns to files as the list of its items."""
    if isinstance(value, Mapping):
        return [f"{pattern}={file}" for pattern, file in value.items()]
    return value


def _off(value: object) -> object:
    """YAML reads the word off as false."""
    return "off" if value is False else value


class Section(BaseModel):
    """A frozen group of settings; unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


class SourcesConfig(Section):
    """How frames are taken in."""

    min_image_edge_px: PositiveInt = 64
    """px, shorter side. Smaller images are dropped and counted as too_small."""
    max_image_megapixels: PositiveFloat = 120.0
    """Millions of pixels. Larger images are dropped and counted as too_large, before they are
    decoded."""
    max_frames: NonNegativeInt = 0
    """Frames. Each source ends after so many usable ones. 0: all."""
    every_nth_frame: PositiveInt = 1
    """One frame of n is taken: 3 makes a 30 Hz video a 10 Hz one, and takes every third image of a
    folder."""
    topics: tuple[str, ...] = ()
    """Of a ROS recording, the topics whose images are taken, by patterns like /front/*. Empty: all
    but depth."""
    hemispheres: Literal["", "NE", "NW", "SE", "SW"] = ""
    """Where photos lie whose EXIF has latitude and longitude without letters. Empty: as other
    photos of their folder that have them, else such positions are not used."""
    frame_queue_size: PositiveInt = 4
    """Frames of one source that wait to be tracked. When there are so many, a file waits and a live
    source drops its oldest."""
    mapping_queue_size: PositiveInt = 16
    """Tracked frames that wait to be mapped. More: bursts of keyframes stall tracking less, and the
    map lags more."""
    max_buffered_mb: PositiveInt = 512
    """MB. Pixels of all frames on their way through the engine; sources wait beyond it."""

    @property
    def max_image_bytes(self) -> int:
        """Of an image file: of uncompressed pixels of four channels of 16 bits, and what else."""
        return int(self.max_image_megapixels * 8e6) + _MAX_EXTRA_BYTES


class TelemetryConfig(Section):
    """How positions beside photos and videos are read."""

    positions: tuple[str, ...] = ()
    """Files with positions: of photos by their names, CSV with a header (name, latitude, longitude,
    altitude) or ODM's geo.txt, which win over EXIF; of videos, .SRT."""
    order: TelemetryOrder = "auto"
    """Which of the two numbers in GPS(a,b,...) of a drone's .SRT is the latitude: latitude_first or
    longitude_first. auto: by their range, the position of the video file, and the map."""


class LiveSourcesConfig(Section):
    """Sources that go on by themselves: streams, MQTT, phones and watched folders."""

    open_timeout_s: PositiveFloat = 10.0
    """s. A connection that takes longer to open has failed."""
    read_timeout_s: PositiveFloat = 5.0
    """s. A stream without a frame for so long is lost and is connected again."""
    retry_first_s: PositiveFloat = 0.5
    """s. Wait before the first try to connect again; it doubles with each try."""
    retry_max_s: PositiveFloat = 10.0
    """s. The longest wait between two tries."""
    give_up_after_s: NonNegativeFloat = 0.0
    """s. A source without an image for so long ends, and the run with its last source. 0: never."""
    max_cameras: PositiveInt = 16
    """Cameras of one source at most; frames of more are dropped and counted."""
    max_payload_mb: PositiveInt = 32
    """MB. Larger messages are refused before they are decoded; an MQTT broker that only speaks
    version 3.1.1 still delivers them first."""
    snapshot_rate_hz: PositiveFloat = 5.0
    """Hz. How often an http(s):// address that gives one picture is asked for it, at most."""
    rtsp_transport: Literal["tcp", "udp"] = "tcp"
    """tcp or udp: how rtsp:// carries images. tcp loses none."""
    verify_certificates: bool = True
    """Whether rtsps://, rtmps:// and https:// servers must prove who they are. Many cameras cannot,
    because they sign their own certificates. false: any server is trusted, and passwords may go to
    a stranger."""
    ca_file: str = ""
    """File of the certificates (PEM) that sign the servers'. Empty: the system's."""
    settle_s: NonNegativeFloat = 0.5
    """s. A file in a watched folder counts as written when it has not changed for so long."""
    camera_size: str = ""
    """WIDTHxHEIGHT to ask of camera:N. Empty: the camera's own."""
    camera_rate_hz: NonNegativeFloat = 0.0
    """Hz. Frames a second to ask of camera:N. 0: the camera's own."""


class MqttConfig(Section):
    """MQTT: how to connect, and what is published.

    User names stand in URLs, passwords only in the environment: LIVESFM_MQTT_PASSWORD.
    """

    publish: str = ""
    """mqtt(s)://[USER@]HOST[:PORT]/PREFIX, where the run's state, poses, keyframes and snapshots
    are published. Empty: nowhere."""
    commands: bool = False
    """Whether snapshot, pause, resume and stop are taken from PREFIX/command. Only with a user and
    a password: whoever may write there could stop the run."""
    telemetry_topic: str = ""
    """Topic of positions (JSON) for the frames of an mqtt:// source. Empty: the frames' topic with
    its last level replaced by telemetry."""
    ca_file: str = ""
    """File of the certificates (PEM) that sign the broker's, for mqtts://. Empty: the system's."""
    client_certificate: str = ""
    """Certificate file (PEM), for brokers that ask for the client's."""
    client_key: str = ""
    """File of the key (PEM) that belongs to client_certificate."""
    max_pose_hz: PositiveFloat = 30.0
    """Hz. Poses published of each camera at most."""
    max_points: NonNegativeInt = 200_000
    """Points of the map sent at most when PREFIX/points/request asks for them; of more, so many
    spread over all. 0: requests are not taken."""
    snapshot_base_url: str = ""
    """URL at which a server of yours shows the folder that holds the run folder; PREFIX/snapshot
    then has the snapshot's own URL, too. Without user names and passwords. Empty: none."""


class PhoneConfig(Section):
    """The page that a phone's browser opens: phone://HOST:PORT."""

    image_edge_px: Annotated[int, Field(ge=64)] = 1280
    """px. Longer edge that the page asks the camera for."""
    max_rate_hz: PositiveFloat = 10.0
    """Hz. Frames a second that the page sends at most."""
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 80
    """1..100. JPEG quality of the frames that the page sends."""
    certificate: str = ""
    """Certificate file (PEM) that the phone trusts. Empty: a self-signed one is made, and the
    browser asks once whether to go on."""
    certificate_key: str = ""
    """File of the key (PEM) that belongs to certificate."""
    max_phones: PositiveInt = 4
    """Phones connected at the same time."""


class GeoreferenceConfig(Section):
    """Laying the map onto GPS positions: east, north and up, in metres."""

    enabled: bool = True
    """Whether the map is laid onto the positions, when there are any."""
    min_fixes: Annotated[int, Field(ge=4)] = 6
    """Keyframes with a position before the first try."""
    min_extent_m: PositiveFloat = 10.0
    """m. The positions must extend so far for the directions to be certain."""
    max_error_m: PositiveFloat = 10.0
    """m. A position farther from the map than this is left out and reported."""
    max_gap_s: PositiveFloat = 2.0
    """s. Positions of telemetry farther apart in time than this are not interpolated."""
    accuracy_m: PositiveFloat = 2.0
    """m. Horizontal standard deviation of positions whose receiver reports none."""
    vertical_accuracy_m: PositiveFloat = 4.0
    """m. Standard deviation of altitudes whose receiver reports none."""
    control_accuracy_m: PositiveFloat = 0.03
    """m. Horizontal standard deviation of surveyed ground control points; their heights have more,
    by vertical_accuracy_m / accuracy_m."""
    adjust: bool = True
    """Whether positions may pull on the map in a last bundle adjustment."""
    metric_map: bool = True
    """Whether snapshots and exports are in metres east, north, up. false: in the map's own frame
    and unit."""


class CamerasConfig(Section):
    """Camera models, and how far their calibration is trusted."""

    model: CameraModelName = "SIMPLE_RADIAL"
    """COLMAP's model of cameras that are not completely known. Ordinary lenses: SIMPLE_PINHOLE,
    PINHOLE, SIMPLE_RADIAL, RADIAL, OPENCV, FULL_OPENCV. Wide ones: FOV, SIMPLE_DIVISION, DIVISION,
    EUCM. Fisheyes: SIMPLE_FISHEYE, FISHEYE, SIMPLE_RADIAL_FISHEYE, RADIAL_FISHEYE, OPENCV_FISHEYE,
    THIN_PRISM_FISHEYE, RAD_TAN_THIN_PRISM_FISHEYE. 360 degrees: EQUIRECTANGULAR. More parameters
    fit wide lenses better and are determined less surely."""
    focal_px: NonNegativeFloat = 0.0
    """px at the original image size. A known focal length, for images that do not hold it. 0: from
    EXIF, else estimated from the first pairs."""
    params: tuple[float, ...] = ()
    """A whole calibration in COLMAP's order for the model, e.g. [fx, fy, cx, cy] for PINHOLE; it
    wins over what sources report. []: unknown."""
    calibrations: Annotated[tuple[str, ...], BeforeValidator(_calibrations)] = ()
    """Calibration files, as [PATTERN=]FILE[#CAMERA]: COLMAP's cameras.txt, YAML of OpenCV, ROS or
    Kalibr. PATTERN with * and ? is for cameras by key, subfolder or source; without one a file is
    for all whose images have its shape. A mapping of patterns to files does, too. They win over
    params and focal_px, and the later of two over the earlier."""
    intrinsics: Literal["refined", "fixed"] = "refined"
    """refined: bundle adjustment improves the calibration. fixed: it never changes."""
    max_focal_change_ratio: PositiveRatio = 0.02
    """How far bundle adjustment may move a focal length that was given here, as a ratio of it."""
    refine_known_intrinsics: bool = False
    """Whether a calibration that a source knows completely, or a file gives, is refined too."""
    bounds: bool = True
    """Whether a calibration that is refined stays within what is known of it beforehand and what a
    lens can be, and is held where the images say nothing of it. false: it goes wherever the images
    fit best, however little they say."""
    recognise_lenses: bool = True
    """Whether long lenses and fisheyes that nobody named are searched where the map looks wrong."""
    split: bool = True
    """Whether cameras are split that were zoomed between images, and images that were cut off on
    one side are kept apart from whole ones."""
    default_focal_ratio: PositiveFloat = 0.85
    """Of the edge. The first guess of a focal length that neither EXIF nor the images give; 0.85 is
    61 degrees across."""
    single_camera_per_size: bool = True
    """Whether a folder's images of one size, camera, lens and zoom (as EXIF says) share one
    calibration. false: each image has its own, for collections from many cameras."""
    masks: dict[str, str] = {}
    """Mask files of whole cameras, by patterns with * and ? of cameras' keys, subfolders or
    sources; the last one that matches counts. Black is left out, anything else is used. --mask FILE
    is {"*": FILE}."""


class FrameTrackingConfig(Section):
    """Following keypoints from frame to frame, and choosing keyframes."""

    mode: Literal["auto", "video", "photos"] = "auto"
    """video: keyframes are chosen. photos: every frame is one. auto: as the source is."""
    max_tracked_points: PositiveInt = 250
    """Keypoints of a keyframe that are followed. More: steadier poses between keyframes, slower."""
    working_edge_px: PositiveInt = 640
    """px. Optical flow runs on frames reduced to this edge."""
    min_tracked_points: PositiveInt = 30
    """Points. With fewer left the frame becomes a keyframe, if it has so many keypoints itself."""
    max_flow_ratio: Ratio = 0.06
    """Of the image diagonal. With a larger median motion since the keyframe the frame becomes one.
    Lower: more keyframes."""
    min_overlap_ratio: Ratio = 0.55
    """With a smaller share of the keyframe's points left the frame becomes a keyframe. Higher: more
    keyframes."""
    min_flow_ratio: Ratio = 0.01
    """Of the image diagonal. A camera that moved less stands still and gets no keyframe by
    max_gap_s."""
    max_gap_s: NonNegativeFloat = 2.0
    """s. A moving camera gets a keyframe at least this often. 0: off."""
    max_interpolation_s: NonNegativeFloat = 1.0
    """s. A frame of a video without a pose of its own gets one between the keyframes around it if
    these are at most this far apart and the camera hardly turned; else it has none, as photos
    always. 0: off."""


class MatchingConfig(Section):
    """Which matcher relates keyframes, and what else of it is used."""

    matcher: Literal["sift", "mast3r", "oracle"] = "sift"
    """sift: any processor, no weights. mast3r: a network, see section mast3r; the preset mast3r
    goes with it. oracle: the true matches of synthetic:town, which measure what dense matches lead
    to; the preset oracle goes with it."""
    second: Annotated[Literal["off", "mast3r"], BeforeValidator(_off)] = "off"
    """mast3r: where SIFT finds too little, MASt3R matches a few pairs besides, see section second.
    Goes with matcher sift. off: no second matcher."""
    use_focal_lengths: bool = True
    """Whether a camera of unknown focal length starts with the one that a dense matcher
    estimates."""
    max_descriptors_mb: PositiveInt = 128
    """Memory for descriptors of keyframes; those used longest ago are read back from the run's
    database, a keyframe in less than a hundredth of the time that it is matched in. A photo has
    about 1 MB of them, a keyframe of a video an eighth as much."""
    metric_scale: Annotated[Literal["off", "report", "apply"], BeforeValidator(_off)] = "report"
    """What a dense matcher's depths in metres are used for. report: summary.json and an event
    report the length of the map's unit. apply: the first map is scaled to metres, too, and so is
    an early one, which there is not where no depths are known. off: nothing."""


class DenseMatchingConfig(Section):
    """How matches of a dense matcher (mast3r, oracle) become keypoints that many images share.

    Radii are px at an image edge of 1000 px and scale with the image.
    """

    max_corners: NonNegativeInt = 1024
    """Keypoints of a keyframe that are corners; optical flow follows them between keyframes."""
    max_keypoints: GridSize = 4096
    """Keypoints of a keyframe in all. Those that are not corners stand on a grid until a match
    moves one. More: denser maps, shorter tracks."""
    max_query_points: PositiveInt = 2048
    """Keypoints of each image that are looked up in the other one. Cost of a pair grows with it."""
    min_confidence: Ratio = 0.5
    """0..1. Matches of less confidence are left out. MASt3R: c / (1 + c), so 0.5 is a c of 1."""
    border_px: NonNegativeFloat = 6.0
    """px. Matches this close to an image's edge are left out."""
    max_matches_per_pair: PositiveInt = 2000
    """Matches of a pair that are verified: the most confident, spread over the image."""
    merge_radius_px: Annotated[float, Field(ge=0.5)] = 2.0
    """px. A match that ends this close to a keypoint becomes that keypoint. Higher: longer tracks
    and less exact points."""
    expected_radius_px: PositiveFloat = 6.0
    """px. The same radius for the keypoint that a third keyframe leads to. A match that ends
    farther away contradicts it and is left out."""


class SecondMatcherConfig(Section):
    """A second matcher for keyframes that the first one hardly matches (matching.second).

    It has a thread of its own, and no keyframe waits for it. Its pairs count only where a third
    image confirms them, and it gives none that the first matcher found. Matches become keypoints
    as section dense_matching says.
    """

    min_strong_pairs: PositiveInt = 2
    """A keyframe with fewer strong pairs is weak; so is one that no map holds."""
    strong_inliers: PositiveInt = 60
    """Verified matches that make a pair strong."""
    look_back: Annotated[int, Field(ge=1, le=1000)] = 16
    """Newest keyframes that are looked at while frames come."""
    final_pairs: NonNegativeInt = 100
    """Pairs at most that are tried after the last frame, of all keyframes that no map holds."""
    pairs_per_keyframe: PositiveInt = 8
    """Pairs of a weak keyframe that the second matcher tries in all."""
    pairs_at_once: Annotated[int, Field(ge=1, le=1000)] = 4
    """Pairs that are matched while the next keyframe is on its way."""
    pairs_per_s: Annotated[float, Field(gt=0.0, le=1000.0)] = 4.0
    """Pairs for each second of a camera's video; photos have no such limit."""
    free_keypoints: GridSize = 2048
    """Keypoints that a keyframe has room for besides the first matcher's, one to a cell of a
    grid."""
    max_error_px: PositiveFloat = 4.0
    """px at an image edge of 1000 px. How far a match may lie from its epipolar line: MASt3R's
    pixels are twice as large as those."""
    max_gpu_mb: PositiveInt = 6000
    """MB of a GPU that PyTorch may hold: weights, one pair at a time, and encoded keyframes in what
    is left, as far as mast3r.device_cache_mb lets them. 6000 is for a card of 8 GB, of which CUDA
    and the screen have the rest."""
    max_kept_images: PositiveInt = 2000
    """Keyframes whose images are kept for it, 0.1 MB each; it matches no older ones."""


class Mast3rConfig(Section):
    """MASt3R: matches of every pixel, which hold where SIFT gives up.

    Its weights are not part of LiveSfM and not free for commercial use; livesfm doctor prints how
    to get them.
    """

    checkpoint: str = ""
    """The public .pth file, or a folder of config.json and model.safetensors."""
    retrieval_checkpoint: str = ""
    """The public ..._retrieval_trainingfree.pth, its codebook beside it. Empty: places are
    recognised by the mean of the tokens, which needs no file."""
    implementation: Literal["native", "upstream"] = "native"
    """native: LiveSfM's own network. upstream: the published package, for comparison; slower."""
    upstream_root: str = ""
    """A recursive checkout of upstream's repository. Empty: the installed package."""
    device: str = "auto"
    """cpu, cuda or cuda:1. auto: a GPU when there is one."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """float32, bfloat16 or float16; upstream's own code always runs in float32. auto: bfloat16
    where the device multiplies it, else float32."""
    image_edge_px: Annotated[int, Field(ge=64, le=2048)] = 512
    """px. Longer edge of the image that the network sees; the public checkpoints were trained at
    512."""
    batch_pairs: PositiveInt = 8
    """Pairs decoded together; halved when memory runs out."""
    symmetric: bool = False
    """Whether a pair is decoded in both orders: twice the work, more matches, depths of both
    images."""
    scheme: Literal["queries", "fast_reciprocal"] = "queries"
    """queries: keypoints are looked up, to sub-pixels. fast_reciprocal: the published scheme of
    seeds on a grid, to whole pixels; no keypoint is looked up."""
    reciprocal_tolerance_px: NonNegativeFloat = 1.0
    """px of the network's image. How far from a keypoint the way there and back may end."""
    subsample: PositiveInt = 8
    """px of the network's image between the seeds of fast_reciprocal."""
    device_cache_mb: NonNegativeInt = 2048
    """MB of encoded keyframes on a GPU, 1.6 MB each at 512 x 384 in bfloat16; older ones move to
    main memory."""
    host_cache_mb: NonNegativeInt = 2048
    """MB of encoded keyframes in main memory; older ones move to a temporary folder on disk."""


class OracleConfig(Section):
    """The matcher that knows the truth of synthetic:town, and how it spoils it."""

    noise_px: NonNegativeFloat = 1.0
    """px. Standard deviation of where a keypoint is found in the other image, in x and in y."""
    outlier_ratio: Ratio = 0.1
    """Share of the matches that end anywhere in the other image."""
    dropped_ratio: Ratio = 0.0
    """Share of the image's 8 x 8 cells in which nothing is matched."""
    exposed_outlier_ratio: Ratio = 0.0
    """Share of the outliers that have low confidence; the others look like any match."""
    depth_noise_ratio: NonNegativeFloat = 0.05
    """Standard deviation of depths, as a share of the depth."""
    reports_focal_length: bool = True
    """Whether it reports focal lengths, wrong by 2 %."""
    reports_depths: bool = True
    """Whether it reports depths in metres."""
    pair_s: Annotated[float, Field(ge=0.0, le=60.0)] = 0.0
    """s. It sleeps so long for each pair, as if a network matched it elsewhere."""


class SiftConfig(Section):
    """The SIFT matcher."""

    max_features: PositiveInt = 8192
    """Keypoints kept per photo, strongest first. The cost of a pair grows with the square."""
    max_features_in_video: PositiveInt = 2000
    """Keypoints kept per keyframe of a video, whose frames overlap more; strongest first."""
    working_edge_px: PositiveInt = 1600
    """px. Keypoints are detected in images reduced to this edge."""
    upscaling: float = Field(default=1.6, ge=1.0, le=2.0)
    """How far photos are upscaled before keypoints are detected; frames of a video, and photos of
    640 px, are doubled. Higher: more of the smallest keypoints, and slower by its square."""
    lean_features: NonNegativeInt = 0
    """Keypoints kept per keyframe that overlaps widely with the one before it, as in a video; they
    are described at half the resolution, all for half the cost. 0: no keyframe is treated so. Those
    of which a mask leaves less than three quarters never are."""
    lean_edge_px: PositiveInt = 600
    """px. The working_edge_px of these keyframes."""
    min_lean_matches: PositiveInt = 100
    """Matches of lean keypoints with the keyframe before. One with fewer is described in full."""
    contrast_threshold: PositiveFloat = 0.01
    """Of the range of grey values. Lower: more keypoints in weak texture, and less stable ones."""
    edge_threshold: PositiveFloat = 10.0
    """Ratio of principal curvatures. Higher: more keypoints along edges."""
    max_ratio: Ratio = 0.8
    """Lowe's ratio test: distance to the best over distance to the second best descriptor. Lower:
    fewer and surer matches."""
    mutual: bool = True
    """Whether a match must be the best in both directions."""


class CoarseToFineConfig(Section):
    """Pairs with very many keypoints, as photos have: the largest keypoints are matched first.

    Pairs that hold by them are matched again in full, guided by what they show; most others are
    given up.
    """

    num_keypoints: NonNegativeInt = 2000
    """Largest keypoints of each image that are matched first. More: more weak pairs are found, and
    the cost of the first pass grows with the square. 0: all are matched at once."""
    min_coarse_matches: NonNegativeInt = 8
    """Pairs with fewer matches of the largest keypoints are given up."""
    enough_pairs: NonNegativeInt = 4
    """Weak pairs of a keyframe are matched in full until it has so many verified pairs, those that
    do not hold counted."""


class RetrievalConfig(Section):
    """Place recognition over keyframe descriptors, learned during the run."""

    num_words: PositiveInt = 512
    """Visual words, 9 bytes each per keyframe. More: finer distinctions, slower learning."""
    max_descriptors: PositiveInt = 1000
    """Descriptors of a keyframe that are used, strongest first."""
    first_vocabulary_at: PositiveInt = 10
    """Keyframes before places are recognised; words are learned from all but the last two."""
    max_vocabulary_keyframes: PositiveInt = 100
    """Keyframes. Words are learned again at each doubling up to here, then stay as they are."""


class SceneGraphConfig(Section):
    """Which pairs of keyframes are matched."""

    pairs_per_keyframe: PositiveInt = 14
    """Pairs matched for a new keyframe, a few more around a place it came back to. The main choice
    between speed and robustness."""
    exhaustive_below: NonNegativeInt = 30
    """Keyframes. All pairs are matched while there are at most so many."""
    temporal_offsets: tuple[PositiveInt, ...] = (1, 2, 3, 4, 6, 8, 12, 16)
    """Keyframes back in the same source that are matched because they are close in time."""
    num_covisible: NonNegativeInt = 4
    """Keyframes at most that are matched because they share most points with the last few ones."""
    num_retrieved: NonNegativeInt = 4
    """Keyframes at most that are matched because they look alike."""
    num_gps: NonNegativeInt = 4
    """Keyframes at most that are matched because they are nearest by GPS."""
    max_gps_distance_m: PositiveFloat = 150.0
    """m, over ground. Keyframes farther away are no GPS neighbours."""
    min_retrieval_score: Ratio = 0.15
    """0..1, similarity. Places less alike are not matched."""
    loop_min_gap: PositiveInt = 12
    """Keyframes. A verified pair closes a loop when at least so many lie between the two and
    nothing else joins them; the whole map is adjusted after it."""


class TwoViewConfig(Section):
    """Geometric verification of a pair."""

    max_error_px: PositiveFloat = 3.0
    """px at an edge of 1000 px, scaling with the image. How far a match may lie from its epipolar
    line."""
    min_inliers: PositiveInt = 18
    """Matches that must agree with one geometry. Lower: more pairs, more wrong ones."""
    min_inlier_ratio: Ratio = 0.25
    """Share of a pair's matches that must agree with one geometry."""
    find_overlays: bool = True
    """Whether what is fixed to the camera (a logo, text, dirt on the lens) is found and left out.
    It is what stays in the image against the motion of the rest."""


class AgreementConfig(Section):
    """Verified pairs that agree with each other."""

    mode: Annotated[Literal["auto", "required", "off"], BeforeValidator(_off)] = "auto"
    """Whether maps use only pairs that a third view confirms. auto: when the matcher matches
    everything, also images that share nothing, or when the run shows that many pairs are wrong.
    required: always; safe, and costs sparse photos their map. off: never."""


class InitializationConfig(Section):
    """The two keyframes that a map starts from."""

    min_keyframes: PositiveInt = 4
    """Keyframes to wait for before the first try, unless the sources end. More: a better choice,
    later."""
    min_inliers: PositiveInt = 60
    """Verified matches that the pair needs."""
    min_triangulation_angle_deg: AcuteDeg = 6.0
    """deg, median over the pair's points. Below it depth is too uncertain to start from."""
    early_triangulation_angle_deg: Annotated[float, Field(ge=0.0, le=90.0)] = 3.0
    """deg. Until there are min_keyframes, frames of a video get poses by an early map, of two
    keyframes of a known calibration or three, from a pair of this angle, or of
    min_triangulation_angle_deg where that is smaller. The run's map is made without it. 0: there is
    none."""
    max_reprojection_error_px: PositiveFloat = 2.0
    """px at an edge of 1000 px, mean after bundle adjustment. A pair above it starts no map."""
    max_pairs_tried: PositiveInt = 12
    """Pairs at each try, best first."""
    refuse_turning: bool = True
    """Whether a map is refused when a camera that turns without moving explains all of it. false: a
    map is made of whatever seems to have depth."""


class RegistrationConfig(Section):
    """Posing a keyframe against the map."""

    max_error_px: PositiveFloat = 8.0
    """px at an edge of 1000 px, scaling with the image. How far a 3D point may project from its
    keypoint."""
    min_inliers: PositiveInt = 20
    """3D points that must agree with the pose. Lower: more keyframes register, some of them
    wrongly."""
    sure_inlier_ratio: Ratio = 0.65
    """Share of the matched points that must agree while frames still arrive; a keyframe with fewer
    waits for better evidence."""
    min_inlier_ratio: Ratio = 0.25
    """Share of the matched points that must agree at the end of the run, when no better evidence
    can come."""
    max_retries_per_keyframe: PositiveInt = 4
    """Waiting keyframes tried again after each keyframe that registers."""


class TriangulationConfig(Section):
    """Making, extending and filtering 3D points."""

    min_angle_deg: AcuteDeg = 1.5
    """deg. Points seen under smaller angles are neither made nor kept."""
    max_reprojection_error_px: PositiveFloat = 3.0
    """px at an edge of 1000 px, scaling with the image. Observations with a larger error are
    filtered."""
    ignore_two_view_tracks: bool = True
    """Whether a point needs matches beyond one pair. false: more points, less certain ones."""
    max_transitivity: PositiveInt = 2
    """Steps from match to match when a track is extended. More: longer tracks, slower."""


class LocalBundleAdjustmentConfig(Section):
    """Bundle adjustment around each new keyframe."""

    num_keyframes: Annotated[int, Field(ge=2)] = 6
    """Keyframes whose poses are adjusted: the new one and those that share most points with it."""
    max_iterations: PositiveInt = 8
    """Solver steps at most."""
    num_passes: PositiveInt = 1
    """Rounds of adjusting and filtering."""


class GlobalBundleAdjustmentConfig(Section):
    """Bundle adjustment of the whole map, on a copy beside the growing map.

    A map of more than 100,000 observations is adjusted by a share of them: the longest tracks, all
    over each image. Its other points follow.
    """

    growth_ratio: Annotated[float, Field(gt=1.0)] = 1.3
    """It runs each time the map has so many times the registered keyframes of the last time. Lower:
    more often, less drift meanwhile, more work."""
    synchronous_until: NonNegativeInt = 12
    """Keyframes. Mapping waits for the adjustment of maps up to this size."""
    merge_after_keyframes: PositiveInt = 3
    """Keyframes added before the result joins the map; a fixed number, so that maps do not depend
    on timing."""
    max_iterations: PositiveInt = 20
    """Solver steps at most."""
    final_iterations: PositiveInt = 50
    """Solver steps at most at the end of the run."""
    final_passes: PositiveInt = 1
    """Rounds of extending tracks, adjusting and filtering at the end of the run."""


class WindowConfig(Section):
    """Stretches of keyframes solved as a whole, as VGGSfM does it, beside the growing map.

    All tracks are triangulated at once and all poses refined together. A result changes the map
    only where it is better.
    """

    enabled: bool = True
    """Whether windows are solved at all."""
    size: Annotated[int, Field(ge=3)] = 12
    """Newest keyframes of a window; their poses may change."""
    num_older: Annotated[int, Field(ge=2)] = 6
    """Older keyframes that share most points with them; their poses hold the window in place."""
    interval: PositiveInt = 8
    """Keyframes from one window to the next; doubled, up to four times this, while windows change
    nothing. Lower: more windows, more CPU."""
    min_keyframes: PositiveInt = 20
    """Keyframes of the map before the first window."""
    merge_after_keyframes: PositiveInt = 2
    """Keyframes added before the result joins the map; a fixed number, so that maps do not depend
    on timing."""
    weak_fit_ratio: Annotated[float, Field(gt=0.0, le=10.0)] = 0.9
    """The newest keyframes are solved again where keypoints of theirs fit the map less well than
    those of other keyframes, by this factor, or where the map misses one of them. Lower: fewer
    windows. 10: as often as interval says."""
    min_gain_ratio: Ratio = 0.01
    """A result is merged when the keypoints of its keyframes fit the map better by this share, or
    when it brings in keyframes that the map misses."""
    bootstrap: bool = True
    """Whether the first map may come from a window when no pair of keyframes gives one."""
    max_rescues: NonNegativeInt = 8
    """Windows at the end around keyframes that the map misses. 0: none."""
    max_final: NonNegativeInt = 4
    """Windows at the end around keyframes with more than 1.5 times the usual error, until one makes
    the map no better. 0: none."""
    solver: Literal["native", "vggsfm"] = "native"
    """native: the engine's own solver. vggsfm: upstream's own package, if you have it (its licence,
    CC BY-NC 4.0, allows non-commercial use only); tens of times slower."""
    vggsfm_root: str = ""
    """Folder of a checkout of upstream's repository. Empty: the installed package vggsfm."""
    camera_predictor: str = ""
    """Upstream's checkpoint vggsfm_v2_0_0.bin: with solver vggsfm its camera predictor gives
    initial cameras to keyframes without a pose. Empty: the engine's own solver does."""


class LoopsConfig(Section):
    """Ways that come back to where they were: the map is corrected until both visits are one."""

    correct: bool = True
    """Whether a map that pairs between its far parts contradict is corrected: its parts are scaled,
    turned and shifted onto each other, and their points merged. false: only what drifted by a few
    pixels is closed, by bundle adjustment."""
    max_live_keyframes: NonNegativeInt = 150
    """Keyframes. Larger maps are corrected at the end of the run only: mapping waits for it, some
    seconds. 0: all maps."""


class RescueConfig(Section):
    """What happens when keyframes are missing from the map."""

    grow_components: bool = True
    """Whether keyframes that fit nowhere start maps of their own at once, which grow beside the map
    and join it when pairs between them show how they lie. false: they wait until the end, when
    whole maps are built from other starts, and what is left becomes separate maps."""
    final_rebuilds: NonNegativeInt = 1
    """Other starts tried at the end of the run while keyframes are missing from all maps; with
    components one at most."""
    separate_maps: bool = True
    """Whether keyframes that join each other but not the map get maps of their own at the end:
    sparse/1, sparse/2, ... of the last snapshot."""


class DenseConfig(Section):
    """Depth maps of registered keyframes, made beside mapping, and dense points from them.

    They are in products/dense.ply and in the viewer. The sparse map is the same without them, to
    the bit. Depth is matched in the images; where the run's matcher makes pointmaps, as MASt3R
    does, they are the depth, scaled to the map, unless they are off by more than a few percent.
    """

    enabled: bool = True
    """Whether depth maps are made."""
    edge_px: Annotated[int, Field(ge=64, le=8192)] = 480
    """px, longer side. Images are matched at most at this size; twice of it costs up to eight times
    as much."""
    neighbours: Annotated[int, Field(ge=1, le=8)] = 2
    """Keyframes that a keyframe is matched with, at most, as long as their matching costs no more
    than that of a usual one. More fill holes and confirm depths."""
    voxel_size: NonNegativeFloat = 0.0
    """Edge of the cells that hold one dense point each, in units of the map that is written: metres
    where it is georeferenced. 0: as the images sample the surface; cells are at least a sixteenth
    of that."""
    orthophoto: bool = False
    """Whether products/ also has an orthophoto and a surface model: of scenes seen from above. The
    presets for drones switch it on. GeoTIFF needs the extra survey."""
    max_cpu_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.25
    """Share of the run's CPU time, below 1, that depth maps and dense points may take. Keyframes
    that do not fit into it, the oldest ones, get no depth map and are counted; a resume with a
    larger share makes theirs. What the map shows to be wrong is made again first, at the end of a
    run also beyond that."""


class SnapshotsConfig(Section):
    """COLMAP models written during the run; the last one when it stops."""

    every_keyframes: NonNegativeInt = 10
    """A snapshot is written after so many newly registered keyframes. 0: not by keyframes."""
    growth_ratio: Annotated[float, Field(ge=0.0, le=10.0)] = 0.1
    """And after no fewer than this share of those in the snapshot before, since each writes the
    whole map: what all of them cost follows the size of the last. 0: however large the map is."""
    every_s: NonNegativeFloat = 15.0
    """s. A snapshot is written after so long, when there is something new. 0: not by time."""
    max_time_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.02
    """Share of the time that snapshots by time may take: after one that took long, they wait."""
    keep: NonNegativeInt = 10
    """Newest snapshots kept; older ones are deleted. 0: all."""
    min_registered: Annotated[int, Field(ge=2)] = 3
    """Registered keyframes that a map needs to be written."""
    min_track_length: Annotated[int, Field(ge=2)] = 2
    """Images that must observe a point; others stay in the map but out of snapshots."""
    train: bool = False
    """Whether train/ follows the snapshots: undistorted keyframe images, sparse/0 and
    transforms.json, for a splat trainer that reads while the run goes on. It takes the disk space
    of the images once more, and that of images which another calibration undistorts anew."""
    train_keep_mb: NonNegativeInt = 4000
    """MB of disk space for former states of train/: of each its model, and images that are in no
    later one. The oldest are deleted first; the newest eight stay whatever they take."""


class ViewsConfig(Section):
    """The live view, its recording and its server."""

    max_map_hz: PositiveFloat = 1.0
    """Hz. The map is shown at most this often."""
    max_map_time_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.05
    """Share of the time that copying and showing the map may take: a large one is shown less often.
    """
    max_image_hz: PositiveFloat = 10.0
    """Hz. The current image is shown at most this often."""
    image_edge_px: PositiveInt = 640
    """px. Images that did not come as JPEG, and huge ones, are shown with this edge."""
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 80
    """1..100. JPEG quality of the images that are encoded to be shown."""
    grpc_port: Annotated[int, Field(ge=0, le=65535)] = 9876
    """TCP port that viewers fetch the run from, with --view serve. 0: any free one."""
    web_port: Annotated[int, Field(ge=0, le=65535)] = 9090
    """TCP port of the page for browsers, with --view serve. 0: any free one."""
    bind: str = "127.0.0.1"
    """Address that --view serve listens on. 127.0.0.1: this machine only. 0.0.0.0: everyone on the
    network may watch."""
    memory_limit_mb: PositiveInt = 512
    """MB that the live server keeps for viewers that connect late; the oldest goes first."""
    recording: bool = True
    """Whether recording.rrd is written."""
    max_recording_mb: NonNegativeInt = 4096
    """MB. A recording of this size goes on without images, graphs and what is new of the dense map.
    0: no limit."""
    geographic_map: bool = False
    """Whether a map of the world stands beside the 3D view, for runs with GPS. The viewer fetches
    its tiles from the internet."""


class ReportConfig(Section):
    """The page that says how good the map of a run is, and where it is not."""

    enabled: bool = True
    """Whether report.html is written when the run ends; livesfm report RUN writes it at any time.
    """


class FaultsConfig(Section):
    """What happens when a part of the run raises or hangs.

    It is reported, and the run goes on without what broke.
    """

    strict: bool = False
    """Whether the first fault ends the run, which saves its map and has failed; --strict."""
    max_call_s: NonNegativeFloat = 120.0
    """s. Decoding or describing a frame, matching a pair or showing something that takes longer has
    hung and is given up. 0: never."""
    max_solve_s: NonNegativeFloat = 1800.0
    """s. The same for a window, the search of a lens, and a global bundle adjustment beside the
    run. 0: never."""
    report_after_s: NonNegativeFloat = 120.0
    """s. Mapping and writing cannot be given up: a call of theirs that takes longer is reported,
    since all frames wait for it. 0: never."""
    max_hangs: PositiveInt = 3
    """Hangs of one part of the run after which it is called no more. Without its matcher a run
    ends and saves the map."""
    max_map_rebuilds: NonNegativeInt = 3
    """Times that the map is built anew from its keyframes and pairs, after mapping broke, before
    the run ends and saves it."""


class RemoteConfig(Section):
    """Work on other machines, by a Ray cluster inside a trusted network (extra ray).

    The map is the same to the bit as with the same matcher here. What the cluster does not do,
    because it is away or too slow, is done here.
    """

    address: str = ""
    """Of the cluster: HOST:PORT of its head, where `ray start` runs on this machine, too; auto, the
    one that this machine belongs to; or ray://HOST:PORT, over one port, with Ray's extra client.
    Empty: all work is done here."""
    matchers: Annotated[int, Field(ge=1, le=256)] = 1
    """Worker processes that hold the matcher; runs with the same settings share them in turn."""
    matcher_cpus: NonNegativeFloat = 1.0
    """CPUs of the cluster that each of them claims."""
    matcher_gpus: NonNegativeFloat = 0.0
    """GPUs of the cluster that each of them claims; 0.5: two of them share one."""
    matcher_resources: dict[str, PositiveFloat] = {}
    """Further resources that nodes must have, by their names in `ray start --resources`."""
    solves_windows: bool = False
    """Whether windows are solved there, too."""
    adjusts_maps: bool = False
    """Whether global bundle adjustments beside the run are made there, too."""
    solver_cpus: NonNegativeFloat = 1.0
    """CPUs of the cluster that solving a window or adjusting a map claims, beside those of the
    matchers; runtime.num_threads says how many threads an adjustment uses."""
    solver_timeout_s: PositiveFloat = 60.0
    """s. A window or an adjustment that takes longer is done here, and so are those of the next
    minute. Where no CPU is free they are done here at once."""
    calls_per_matcher: Annotated[int, Field(ge=1, le=16)] = 2
    """Calls that are on their way to a worker, so that it never waits for the network. Calls for
    keyframes whose turn it is get as many besides."""
    keyframes_ahead: Annotated[int, Field(ge=0, le=64)] = 8
    """Keyframes that are described, and pairs of so many that are matched, before their turn. 0:
    none."""
    connect_timeout_s: PositiveFloat = 60.0
    """s. How long a run waits for the cluster at its start."""
    call_timeout_s: PositiveFloat = 30.0
    """s. A call that takes longer is made again on another worker."""
    stall_s: PositiveFloat = 5.0
    """s. Without an answer from any worker for so long the cluster counts as away."""
    max_tries: Annotated[int, Field(ge=1, le=10)] = 3
    """Workers that a call is tried on before it is done here."""
    idle_s: NonNegativeFloat = 600.0
    """s. A worker that no run has called for so long ends. 0: never."""


class RuntimeConfig(Section):
    """Threads, seeds and the run as a whole."""

    seed: NonNegativeInt = 0
    """Seed of everything random. The same input and seed give the same map."""
    num_threads: NonNegativeInt = 1
    """Threads of global bundle adjustment. 0: as many as there are cores; large maps finish sooner,
    and repeated runs agree to rounding errors instead of to the bit."""
    keyframe_jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 95
    """1..100. JPEG quality of keyframe images whose frames did not come as JPEG."""
    min_free_mb: NonNegativeInt = 500
    """MB. What stays free on the disk of the run, at most 5 % of it, and room for the map besides.
    With less no new frames are taken, and the map is finished and saved. 0: no limit."""


class Config(Section):
    """All settings of a run."""

    sources: SourcesConfig = SourcesConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    live_sources: LiveSourcesConfig = LiveSourcesConfig()
    mqtt: MqttConfig = MqttConfig()
    phone: PhoneConfig = PhoneConfig()
    georeference: GeoreferenceConfig = GeoreferenceConfig()
    cameras: CamerasConfig = CamerasConfig()
    frame_tracking: FrameTrackingConfig = FrameTrackingConfig()
    matching: MatchingConfig = MatchingConfig()
    dense_matching: DenseMatchingConfig = DenseMatchingConfig()
    second: SecondMatcherConfig = SecondMatcherConfig()
    mast3r: Mast3rConfig = Mast3rConfig()
    oracle: OracleConfig = OracleConfig()
    sift: SiftConfig = SiftConfig()
    coarse_to_fine: CoarseToFineConfig = CoarseToFineConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    scene_graph: SceneGraphConfig = SceneGraphConfig()
    two_view: TwoViewConfig = TwoViewConfig()
    agreement: AgreementConfig = AgreementConfig()
    initialization: InitializationConfig = InitializationConfig()
    registration: RegistrationConfig = RegistrationConfig()
    triangulation: TriangulationConfig = TriangulationConfig()
    local_bundle_adjustment: LocalBundleAdjustmentConfig = LocalBundleAdjustmentConfig()
    global_bundle_adjustment: GlobalBundleAdjustmentConfig = GlobalBundleAdjustmentConfig()
    window: WindowConfig = WindowConfig()
    loops: LoopsConfig = LoopsConfig()
    rescue: RescueConfig = RescueConfig()
    dense: DenseConfig = DenseConfig()
    snapshots: SnapshotsConfig = SnapshotsConfig()
    views: ViewsConfig = ViewsConfig()
    report: ReportConfig = ReportConfig()
    faults: FaultsConfig = FaultsConfig()
    remote: RemoteConfig = RemoteConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="after")
    def _second_matcher_fits(self) -> Config:
        if self.matching.second == "off":
            return self
        if self.matching.matcher != "sift":
            raise ValueError(f"matching.second: helps sift, not {self.matching.matcher}")
        if self.agreement.mode == "off":
            raise ValueError(
                "matching.second: finds matches also where images share nothing; its pairs need"
                " agreement.mode=auto or required"
            )
        return self

    @model_validator(mode="after")
    def _whole_calibration_needs_its_model(self) -> Config:
        num_params = CAMERA_MODELS[self.cameras.model].num_params
        if self.cameras.params and len(self.cameras.params) != num_params:
            raise ValueError(
                f"cameras.params: {self.cameras.model} has {num_params} parameters, "
                f"{len(self.cameras.params)} given"
            )
        leading = self.cameras.params[: CAMERA_MODELS[self.cameras.model].num_positive]
        if any(value <= 0.0 for value in leading):
            given = ", ".join(f"{value:g}" for value in leading)
            raise ValueError(f"cameras.params: begin with {given}, which must be above 0")
        return self


def load_config(
    overlays: Sequence[str | Path] = (),
    settings: Iterable[str] = (),
    *,
    former: Path | None = None,
) -> Config:
    """Builds the configuration of a run.

    Args:
        overlays: YAML files, or names of presets (see ``overlay_path``); later ones win.
        settings: ``section.key=value`` strings, values in YAML; they win over overlays.
        former: the ``config.yaml`` of a run, over which all of it lies. What an older version wrote
            there and this one has no setting for is left out, with a warning in the log.

    Raises:
        ConfigError: a preset is unknown or a file cannot be read, a key is unknown (names the
            nearest valid one), or a value is out of range.
    """
    merged: dict[str, Any] = {}
    if former is not None:
        _merge(merged, _known_settings(former), origin=str(former))
    for overlay in overlays:
        _merge(merged, _read_yaml(overlay_path(overlay)), origin=str(overlay))
    for setting in settings:
        _merge(merged, _parse_setting(setting), origin=f"--set {_shortened(setting)}")
    return _validate(merged)


def preset_paths() -> dict[str, Path]:
    """The file of each preset, by its name in alphabetical order."""
    packaged = _PACKAGE / "presets"
    folder = packaged if packaged.is_dir() else _PACKAGE.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def overlay_path(overlay: str | Path) -> Path:
    """The file that an overlay stands for.

    A string without a path separator and a suffix is the name of a preset, or else of a file in
    the working folder; ``./phone`` is a file in any case. All other overlays are paths.

    Raises:
        ConfigError: the name is neither of a preset nor of a file.
    """
    path = Path(overlay)
    if isinstance(overlay, Path) or overlay != path.name or path.suffix:
        return path
    presets = preset_paths()
    if overlay in presets:
        return presets[overlay]
    if path.exists():
        return path
    nearest = difflib.get_close_matches(overlay, presets, n=1)
    advice = f"; did you mean {nearest[0]}?" if nearest else "."
    raise ConfigError(f"unknown preset: {overlay}{advice} Presets: {', '.join(presets)}")


def dump_config(config: Config) -> str:
    """The whole resolved configuration as YAML."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return text


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        loaded = load_plain_yaml(read_regular_file(path, max_bytes=_MAX_FILE_BYTES).decode())
    except OSError as error:
        is_preset = isinstance(error, FileNotFoundError) and path.stem in preset_paths()
        advice = f"; the preset of that name is --config {path.stem}" if is_preset else ""
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}{advice}") from error
    except ValueError as error:
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
        raise ConfigError(f"--set {_shortened(setting)}: expected section.key=value")
    try:
        value = load_plain_yaml(text)
    except ValueError as error:
        raise ConfigError(
            f"--set {_shortened(setting)}: the value is not valid YAML: {error}"
        ) from error
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


def _known_settings(path: Path) -> dict[str, Any]:
    """The settings of a run that are settings still."""
    written = _read_yaml(path)
    known: dict[str, Any] = {}
    for section, values in written.items():
        if section not in Config.model_fields or not isinstance(values, Mapping):
            logger.warning(
                "%s: %s is no section of settings any more", path, _shortened(str(section))
            )
            continue
        fields = type(getattr(Config(), section)).model_fields
        known[section] = {key: value for key, value in values.items() if key in fields}
        for key in values.keys() - known[section].keys():
            logger.warning("%s: %s.%s is no setting any more", path, section, _shortened(str(key)))
    return known


def _check_name(name: object, valid: Mapping[str, Any], *, what: str, origin: str) -> None:
    if name in valid:
        return
    shown = _shortened(name) if isinstance(name, str) else _given(name)
    nearest = difflib.get_close_matches(shown, valid, n=1, cutoff=0.0)
    raise ConfigError(f"{origin}: unknown {what}: {shown}; did you mean {nearest[0]}?")


def _validate(merged: Mapping[str, Any]) -> Config:
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        items = error.errors(include_url=False)
        problems = [
            f"{'.'.join(_shortened(str(part)) for part in item['loc']) or 'configuration'}: "
            f"{item['msg']}" + (f" (given {_given(item['input'])})" if item["loc"] else "")
            for item in items[:_MAX_PROBLEMS]
        ]
        more = len(items) - len(problems)
        raise ConfigError("; ".join(problems) + (f"; and {more} more" if more else "")) from error


def _given(value: object) -> str:
    """A value that the user gave, in one line of bounded length."""
    try:
        return _shortened(reprlib.repr(value))
    except ValueError:  # Python writes no number of more than 4,300 digits
        return f"a {type(value).__name__} too long to show"


def _shortened(text: str) -> str:
    """The beginning of a text, in one line."""
    line = "".join(char if char.isprintable() else "?" for char in text[: _MAX_SHOWN_CHARS + 1])
    return line if len(line) <= _MAX_SHOWN_CHARS else f"{line[:_MAX_SHOWN_CHARS]}..."
