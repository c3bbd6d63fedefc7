"""What images say of the lens: names of cameras, metadata, and spherical images by content."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from adapters.images.camera_names import is_action_camera, is_spherical_camera
from adapters.images.decoding import DecodedImage, decode_image
from adapters.images.intrinsics import IntrinsicsReader
from adapters.images.panoramas import has_closed_seam, is_equirectangular
from engine.config import SourcesConfig
from engine.types import IntrinsicsPrior, Uint8Array
from tests.support.spheres import SPHERE_HEIGHT, smooth_noise, sphere

HEIGHT = SPHERE_HEIGHT
MAKE, MODEL, EXIF_DIRECTORY, FOCAL_LENGTH_35MM = 0x10F, 0x110, 0x8769, 0xA405
XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description %s/></x:xmpmeta>"


def wide_photo(*, seed: int = 0) -> Uint8Array:
    """An ordinary 18:9 photo: the same textures, seen by a pinhole."""
    x, y = np.meshgrid(np.linspace(-1, 1, 2 * HEIGHT), np.linspace(-0.5, 0.5, HEIGHT))
    directions = np.stack([x, y, np.ones_like(x)], axis=-1)
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    return np.asarray(smooth_noise(directions, seed=seed).astype(np.uint8))


def landscape(*, seed: int = 0) -> Uint8Array:
    """A 2:1 photo of a smooth sky over fine grass: both borders bright above and dark below."""
    rng = np.random.default_rng(seed)
    pixels = np.full((HEIGHT, 2 * HEIGHT, 3), 220.0) - np.arange(HEIGHT)[:, None, None] * 0.2
    grass = rng.normal(70.0, 25.0, (HEIGHT // 2, 2 * HEIGHT, 1))
    pixels[HEIGHT // 2 :] = np.clip(grass, 0, 255)
    return np.asarray(pixels.astype(np.uint8))


def framed(pixels: Uint8Array, border: int) -> Uint8Array:
    """A photo in a black frame."""
    pixels = pixels.copy()
    pixels[:border] = pixels[-border:] = 0
    pixels[:, :border] = pixels[:, -border:] = 0
    return pixels


def letterboxed(pixels: Uint8Array, bar: int) -> Uint8Array:
    """A photo with black bars above and below."""
    pixels = pixels.copy()
    pixels[:bar] = pixels[-bar:] = 0
    return pixels


def encoded(
    pixels: Uint8Array, *, make: str = "", model: str = "", xmp: bytes = b""
) -> DecodedImage:
    """A JPEG as a source reads it."""
    tags = Image.Exif()
    if make or model:
        tags[MAKE], tags[MODEL] = make, model
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=90, exif=tags)
    data = file.getvalue()
    if xmp:
        segment = XMP % xmp
        data = data[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:]
    image = decode_image(data, config=SourcesConfig())
    assert isinstance(image, DecodedImage)
    return image


# -- spherical by content -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_spherical_image_is_recognised_by_what_is_in_it(seed: int) -> None:
    assert is_equirectangular(sphere(seed=seed))
    assert is_equirectangular(sphere(seed=seed, noise=2.5))


@pytest.mark.parametrize("seed", range(6))
def test_an_ordinary_photo_of_that_shape_is_not_taken_for_one(seed: int) -> None:
    photo = wide_photo(seed=seed)
    assert not is_equirectangular(photo)
    assert not is_equirectangular(landscape(seed=seed))
    assert not is_equirectangular(framed(photo, 20))
    assert not is_equirectangular(letterboxed(photo, 30))
    assert not is_equirectangular(letterboxed(landscape(seed=seed), 30))


def test_a_part_of_a_sphere_a_mirrored_half_and_an_even_image_are_none() -> None:
    whole = sphere(height=2 * HEIGHT)
    part = whole[HEIGHT // 2 : HEIGHT // 2 + HEIGHT, 100 : 100 + 2 * HEIGHT]
    assert not is_equirectangular(part)
    band = sphere()[60:180, :240]  # the middle of a sphere, half of it around
    assert not is_equirectangular(band)
    assert not is_equirectangular(np.full((HEIGHT, 2 * HEIGHT, 3), 90, np.uint8))
    assert not is_equirectangular(sphere()[:, 1:])  # not twice as wide as high


def test_black_poles_do_not_hide_a_sphere() -> None:
    pixels = sphere()
    pixels[-20:] = 0  # the tripod is painted over
    assert is_equirectangular(pixels)


# -- what is read ---------------------------------------------------------------------------------


def test_a_spherical_image_comes_with_its_whole_calibration() -> None:
    prior = IntrinsicsReader().of_image(encoded(sphere()))
    assert prior is not None
    assert (prior.camera_model, prior.params) == ("EQUIRECTANGULAR", (480.0, 240.0))


@pytest.mark.parametrize(
    "xmp",
    [
        b'GPano:ProjectionType="equirectangular"',
        b"><GPano:ProjectionType>equirectangular</GPano:ProjectionType><x",
    ],
)
def test_what_xmp_declares_is_believed_where_the_shape_fits(xmp: bytes) -> None:
    photo = wide_photo()
    prior = IntrinsicsReader().of_image(encoded(photo, xmp=xmp))
    assert prior is not None
    assert prior.camera_model == "EQUIRECTANGULAR"
    assert IntrinsicsReader().of_image(encoded(photo[:, :400], xmp=xmp)) is None
    assert (
        IntrinsicsReader().of_image(encoded(photo, xmp=b'GPano:ProjectionType="cylindrical"'))
        is None
    )


def test_a_360_camera_is_believed_when_its_borders_meet() -> None:
    pixels = sphere()
    pixels[-1] = np.arange(480)[:, None] // 2  # a caption in the last row
    assert not is_equirectangular(pixels)
    assert has_closed_seam(pixels)
    assert IntrinsicsReader().of_image(encoded(pixels)) is None
    prior = IntrinsicsReader().of_image(encoded(pixels, make="RICOH", model="RICOH THETA Z1"))
    assert prior is not None
    assert prior.camera_model == "EQUIRECTANGULAR"
    flat = encoded(wide_photo(), make="RICOH", model="RICOH THETA Z1")
    assert IntrinsicsReader().of_image(flat) is None


def test_a_dark_image_between_spherical_ones_is_of_the_same_camera() -> None:
    reader = IntrinsicsReader()
    dark = np.zeros((HEIGHT, 2 * HEIGHT, 3), np.uint8)
    assert reader.of_pixels(dark) is None
    first = reader.of_pixels(sphere())
    assert first is not None
    assert reader.of_pixels(dark) == first
    assert reader.of_pixels(dark[:, :300]) is None


def test_action_cameras_start_as_fisheyes_and_others_do_not() -> None:
    photo = wide_photo()[:, :320]
    reader = IntrinsicsReader()
    prior = reader.of_image(encoded(photo, make="GoPro", model="HERO11 Black"))
    assert prior == IntrinsicsPrior(focal_px=0.0, is_fisheye=True)
    assert reader.of_image(encoded(photo, make="Canon", model="Canon EOS 5D")) is None
    assert reader.of_pixels(photo, name="GoPro AVC  ") == prior
    assert reader.of_pixels(photo, name="VideoHandler Lavf61.1.100") is None


@pytest.mark.parametrize(
    "name",
    [
        "GoPro HERO9 Black",
        "DJI Osmo Action 4",
        "DJI OsmoAction",
        "DJI Action 2",
        "Insta360 GO 3",
        "Arashi Vision Insta360 Ace Pro",
        "SONY HDR-AS300",
        "SONY FDR-X3000",
        "SJCAM SJ8",
        "AKASO Brave 7",
        "XIAOYI YI 4K",
        "Garmin VIRB Ultra 30",
    ],
)
def test_names_of_action_cameras(name: str) -> None:
    assert is_action_camera(name)
    assert not is_spherical_camera(name)


@pytest.mark.parametrize(
    "name",
    [
        "Apple iPhone 15 Pro",
        "DJI FC6310",
        "DJI Mini 4 Pro",
        "SONY ILCE-7M4",
        "SONY FDR-AX53",
        "Canon Canon EOS R5",
        "HUAWEI P30",
        "Google Pixel 8",
        "Hasselblad L1D-20c",
        "",
    ],
)
def test_names_of_other_cameras(name: str) -> None:
    assert not is_action_camera(name)
    assert not is_spherical_camera(name)


@pytest.mark.parametrize(
    "name",
    ["RICOH RICOH THETA S", "Insta360 X3", "Insta360 ONE X2", "GoPro MAX", "SAMSUNG SM-C200"],
)
def test_names_of_cameras_that_see_all_around(name: str) -> None:
    assert is_spherical_camera(name)
