"""What is known of a camera's lens before the map: by EXIF, names, metadata and the image."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from adapters.images.camera_names import is_action_camera, is_spherical_camera
from adapters.images.decoding import DecodedImage
from adapters.images.exif import Exif, intrinsics_prior
from adapters.images.panoramas import has_closed_seam, is_equirectangular, is_spherical_shape
from engine.types import IntrinsicsPrior, Uint8Array

_SPHERICAL_MODEL = "EQUIRECTANGULAR"
_FISHEYE_SIGMA_RATIO = 0.15
_MAX_EXAMINED = 20  # images of one size that show nothing: none of them will


class IntrinsicsReader:
    """Reads the priors of one source's images; one thread uses it, in order of arrival.

    Once an image is known to be spherical, so are all others of its size: a single dark one of the
    same camera shows nothing.
    """

    def __init__(self) -> None:
        self._spherical_sizes: set[tuple[int, int]] = set()
        self._num_examined: Counter[tuple[int, int]] = Counter()

    def of_image(self, image: DecodedImage) -> IntrinsicsPrior | None:
        """What is known of the camera of a photo."""
        name = f"{image.exif.make} {image.exif.model}"
        return self._read(
            image.pixels, image.exif, name=name, is_declared_spherical=image.is_spherical
        )

    def of_pixels(self, pixels: Uint8Array, *, name: str = "") -> IntrinsicsPrior | None:
        """What is known of the camera of a video's frame (H, W, 3), given what names the video."""
        return self._read(pixels, Exif(), name=name, is_declared_spherical=False)

    def _read(
        self, pixels: Uint8Array, exif: Exif, *, name: str, is_declared_spherical: bool
    ) -> IntrinsicsPrior | None:
        height, width = pixels.shape[:2]
        if is_spherical_shape(width, height) and self._is_spherical(
            pixels, name=name, is_declared=is_declared_spherical
        ):
            return spherical_prior(width, height)
        prior = intrinsics_prior(exif, width=width, height=height)
        if not is_action_camera(name):
            return prior
        if prior is None:
            return IntrinsicsPrior(focal_px=0.0, is_fisheye=True)
        # What makers call the focal length of a fisheye is not always that of its middle.
        return replace(prior, is_fisheye=True, focal_sigma_ratio=_FISHEYE_SIGMA_RATIO)

    def _is_spherical(self, pixels: Uint8Array, *, name: str, is_declared: bool) -> bool:
        size = (pixels.shape[1], pixels.shape[0])
        if size in self._spherical_sizes:
            return True
        if not is_declared:
            if self._num_examined[size] >= _MAX_EXAMINED:
                return False
            self._num_examined[size] += 1
            is_known_camera = is_spherical_camera(name) and has_closed_seam(pixels)
            if not (is_known_camera or is_equirectangular(pixels)):
                return False
        self._spherical_sizes.add(size)
        return True


def is_spherical_prior(prior: IntrinsicsPrior | None) -> bool:
    """Whether a prior is that of an equirectangular image."""
    return prior is not None and prior.camera_model == _SPHERICAL_MODEL


def spherical_prior(width: int, height: int) -> IntrinsicsPrior:
    """The calibration of an equirectangular image, which its size gives completely."""
    return IntrinsicsPrior(
        focal_px=width / (2.0 * np.pi),
        camera_model=_SPHERICAL_MODEL,
        params=(float(width), float(height)),
    )
