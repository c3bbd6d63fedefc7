"""Which calibration goes to which camera of a run: by pattern, by shape, by name in the file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapters.calibrations.calibration import Calibration
from adapters.calibrations.calibration_files import read_calibration_file
from adapters.images.name_patterns import is_named, names_of
from engine.errors import ConfigError
from engine.types import CalibrationOrigin, Frame, IntrinsicsPrior

FILE_SIGMA_RATIO = 0.001  # how surely a calibration knows its focal length
_SAME_RATIO = 1e-9  # parameters this near are the same ones
_MAX_NAMED = 5  # cameras that one line names


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenCalibration:
    """One ``[PATTERN=]FILE[#CAMERA]`` of the user, and what its file holds."""

    spec: str
    pattern: str  # empty: for every camera whose images have its shape
    cameras: tuple[Calibration, ...]  # of the file; the one asked for, where one was

    @classmethod
    def read(cls, spec: str) -> GivenCalibration:
        """Reads the file.

        Raises:
            ConfigError: there is no such file, it holds no calibration, or not that camera.
        """
        pattern, path, camera = _split(spec)
        cameras = read_calibration_file(path)
        if camera:
            named = [calibration for calibration in cameras if calibration.name == camera]
            if not named:
                names = ", ".join(calibration.name or "one without name" for calibration in cameras)
                raise ConfigError(f"{path}: holds no camera {camera}, but {names}")
            cameras = named[:1]
        return cls(spec=spec, pattern=pattern, cameras=tuple(cameras))

    def matches(self, names: Collection[str]) -> bool:
        """Whether its pattern matches one of a camera's names; letters' case does not matter."""
        return not self.pattern or is_named(self.pattern, names)

    def fits(self, width: int, height: int) -> bool:
        """Whether one of its cameras can have made images of this size, in either position."""
        return any(
            camera.fits(width, height) or camera.fits(height, width) for camera in self.cameras
        )

    @property
    def sizes(self) -> str:
        """The image sizes of its cameras, in words."""
        return " or ".join(dict.fromkeys(camera.size for camera in self.cameras))


class CalibrationsByCamera:
    """The calibrations that the user gave, for the frames of a run (``CameraCalibrations``).

    A calibration with a pattern is for the cameras with a name that matches it; one without is for
    every camera whose images have its shape. Those with a pattern win, and of two the later one.
    """

    def __init__(self, given: Sequence[GivenCalibration]) -> None:
        later_first = list(reversed(given))
        self._given = [g for g in later_first if g.pattern] + [
            g for g in later_first if not g.pattern
        ]
        self._found: dict[tuple[str, ...], tuple[IntrinsicsPrior, int] | None] = {}
        self._settled: set[str] = set()  # specs that were used, or of which a warning said why not
        self._seen: dict[str, str] = {}  # image size by camera, in order of appearance
        self._warnings: list[str] = []

    @classmethod
    def read(cls, specs: Sequence[str]) -> CalibrationsByCamera:
        """Reads all files.

        Raises:
            ConfigError: one of them cannot be used.
        """
        return cls([GivenCalibration.read(spec) for spec in specs])

    def misfits(self, image_sizes: Collection[tuple[int, int]]) -> list[str]:
        """Which calibrations no image of these sizes, width and height, can be of; in words."""
        if not image_sizes:
            return []
        sizes = [f"{width} x {height}" for width, height in sorted(image_sizes)]
        return [
            f"{given.spec}: is for images of {given.sizes} px, and those of the sources are of"
            f" {', '.join(sizes[:_MAX_NAMED])} px; it holds only for the same images resized as a"
            " whole"
            for given in self._given
            if not any(given.fits(*size) for size in image_sizes)
        ]

    def calibrated(self, frame: Frame) -> Frame:
        """The frame with the calibration of its camera, where one was given.

        Frames turned differently are of different cameras then: each has its own principal point.
        """
        names = names_of(frame)
        key = (*names, f"{frame.width}x{frame.height}", str(frame.quarter_turns))
        if key not in self._found:
            self._seen.setdefault(frame.camera_key, f"{frame.width} x {frame.height}")
            self._found[key] = self._find(frame, names)
        found = self._found[key]
        if found is None:
            return frame
        prior, quarter_turns = found
        turned = f"|turned {90 * quarter_turns}" if quarter_turns else ""
        return replace(frame, intrinsics_prior=prior, camera_key=f"{frame.camera_key}{turned}")

    def take_warnings(self) -> list[str]:
        """What the user should know, each once."""
        warnings, self._warnings = self._warnings, []
        return warnings

    def unused(self) -> list[str]:
        """Which calibrations were for no camera, and why; asked at the end."""
        cameras = [f"{key} ({size})" for key, size in self._seen.items()]
        more = f" and {len(cameras) - _MAX_NAMED} more" if len(cameras) > _MAX_NAMED else ""
        listed = f"{', '.join(cameras[:_MAX_NAMED])}{more}" or "none"
        return [
            f"the calibration {given.spec} is for no camera of the run, since none is called"
            f" {given.pattern}: {listed}"
            if given.pattern
            else f"the calibration {given.spec}, for images of {given.sizes} px, fits no camera of"
            f" the run: {listed}"
            for given in self._given
            if given.spec not in self._settled
        ]

    def _find(self, frame: Frame, names: Sequence[str]) -> tuple[IntrinsicsPrior, int] | None:
        """The calibration for a frame, and how far it was turned for it."""
        for given in self._given:
            if not given.matches(names):
                continue
            placed = _placed(given, frame, names)
            if not isinstance(placed, str):
                self._settled.add(given.spec)
                calibration, quarter_turns = placed
                return _prior(calibration), quarter_turns
            if given.pattern or given.fits(frame.width, frame.height):
                self._settled.add(given.spec)
                self._warnings.append(f"{frame.camera_key}: {given.spec} is not used: {placed}")
                if given.pattern:
                    return None
        return None


def _placed(
    given: GivenCalibration, frame: Frame, names: Sequence[str]
) -> tuple[Calibration, int] | str:
    """The calibration for a frame's upright pixels and its turn, or why there is none."""
    fitting: list[tuple[Calibration, Calibration, int]] = []
    reasons = []
    for camera in given.cameras:
        upright = _upright(camera, frame)
        if isinstance(upright, str):
            reasons.append(upright)
        else:
            fitting.append((camera, *upright))
    if not fitting:
        return "; ".join(dict.fromkeys(reasons))
    exact = [f for f in fitting if _is_exact(f[0], frame)]
    named = [f for f in exact or fitting if f[0].name in names]
    chosen = named or exact or fitting
    if len(chosen) > 1:
        which = ", ".join(camera.name or "one without name" for camera, _, _ in chosen)
        return f"several of its cameras fit ({which}); name one, FILE#CAMERA"
    _, upright_camera, quarter_turns = chosen[0]
    return upright_camera, quarter_turns


def _is_exact(camera: Calibration, frame: Frame) -> bool:
    return {camera.width, camera.height} == {frame.width, frame.height}


def _upright(camera: Calibration, frame: Frame) -> tuple[Calibration, int] | str:
    """A calibration turned and scaled as a frame's pixels were, and its turn; or why it cannot be.

    It is taken for one of the stored pixels, as the sensor gives them, wherever these have its
    shape; else for one of upright pixels.
    """
    size = frame.width, frame.height
    stored = size[::-1] if frame.quarter_turns % 2 else size
    if camera.fits(*stored):
        turned = camera.turned(frame.quarter_turns)
        return turned.scaled_to(*size), frame.quarter_turns
    if camera.fits(*size):
        return camera.scaled_to(*size), 0
    if camera.fits(*size[::-1]):
        clockwise, counterclockwise = camera.turned(1), camera.turned(3)
        if _are_same(clockwise, counterclockwise):
            return clockwise.scaled_to(*size), 0
        return (
            f"it is for images of {camera.size} px, and these of {size[0]} x {size[1]} px lie on"
            " their side: nothing says on which; give it for upright images"
        )
    return f"it is for images of {camera.size} px, and these are of {size[0]} x {size[1]} px"


def _are_same(one: Calibration, other: Calibration) -> bool:
    return all(
        abs(a - b) <= _SAME_RATIO * max(1.0, abs(a), abs(b))
        for a, b in zip(one.params, other.params, strict=True)
    )


def _prior(calibration: Calibration) -> IntrinsicsPrior:
    return IntrinsicsPrior(
        focal_px=calibration.focal_px,
        camera_model=calibration.model,
        params=calibration.params,
        origin=CalibrationOrigin.FILE,
        focal_sigma_ratio=FILE_SIGMA_RATIO,
    )


def _split(spec: str) -> tuple[str, Path, str]:
    """Pattern, file and camera of ``[PATTERN=]FILE[#CAMERA]``.

    Files and patterns may hold = and #: a reading whose file exists is taken.
    """
    readings = list(_readings(spec))
    for pattern, file, camera in readings:
        if Path(file).expanduser().exists():
            return pattern, Path(file).expanduser(), camera
    pattern, file, camera = readings[-1]
    return pattern, Path(file).expanduser(), camera


def _readings(spec: str) -> Iterator[tuple[str, str, str]]:
    """All of them, the one without a pattern first."""
    starts = [0] + [place + 1 for place, char in enumerate(spec) if char == "="]
    for start in starts:
        rest = spec[start:]
        yield spec[: max(start - 1, 0)], rest, ""
        file, sign, camera = rest.rpartition("#")
        if sign:
            yield spec[: max(start - 1, 0)], file, camera
