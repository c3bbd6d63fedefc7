"""ROS messages: images, calibrations and positions, as rosbags deserializes them.

The forms are those of ``sensor_msgs``: Image, CompressedImage, CameraInfo (distortion models of REP
104 and of image_pipeline) and NavSatFix.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from adapters.images.decoding import as_8_bit
from engine.types import CalibrationOrigin, GpsFix, IntrinsicsPrior, Uint8Array

_PIXEL_OFFSET = 0.5  # ROS, like OpenCV: the first pixel's centre is (0, 0)
_NO_FIX = -1
_UNKNOWN_COVARIANCE = 0
_SHOWS_DEPTH = frozenset({"16uc1", "32fc1"})
_CHANNELS = {  # bytes of a pixel by encoding, and which of them are red, green and blue
    "rgb8": (3, (0, 1, 2)),
    "rgba8": (4, (0, 1, 2)),
    "bgr8": (3, (2, 1, 0)),
    "bgra8": (4, (2, 1, 0)),
    "8uc3": (3, (2, 1, 0)),
    "mono8": (1, (0, 0, 0)),
    "8uc1": (1, (0, 0, 0)),
}
_CODES = {  # bytes of a pixel by encoding, and OpenCV's conversion
    # Bayer patterns are named by their first line here, by the second line's middle in OpenCV.
    "bayer_rggb8": (1, "COLOR_BayerBG2RGB"),
    "bayer_bggr8": (1, "COLOR_BayerRG2RGB"),
    "bayer_gbrg8": (1, "COLOR_BayerGR2RGB"),
    "bayer_grbg8": (1, "COLOR_BayerGB2RGB"),
    "yuv422": (2, "COLOR_YUV2RGB_UYVY"),
    "uyvy": (2, "COLOR_YUV2RGB_UYVY"),
    "yuv422_yuy2": (2, "COLOR_YUV2RGB_YUY2"),
    "yuyv": (2, "COLOR_YUV2RGB_YUY2"),
}
_MONO16 = "mono16"


def rgb_of_image(message: Any) -> Uint8Array | str:
    """The pixels (H, W, 3) of an Image, RGB; or why there are none."""
    encoding = str(message.encoding).lower()
    if encoding in _SHOWS_DEPTH:
        return "depth images are not read"
    num_bytes = _num_bytes(encoding)
    if not num_bytes:
        return f"images of encoding {encoding or 'unknown'} are not read"
    height, width, step = int(message.height), int(message.width), int(message.step)
    data = np.asarray(message.data).view(np.uint8)
    if min(height, width) < 1 or step < width * num_bytes or data.size < step * height:
        return f"{data.size} bytes are no {width} x {height} px of {encoding}"
    lines = data[: step * height].reshape(height, step)[:, : width * num_bytes]
    if encoding == _MONO16:
        words = np.ascontiguousarray(lines).view(">u2" if message.is_bigendian else "<u2")
        return np.repeat(as_8_bit(words)[:, :, None], 3, axis=2)
    pixels = lines.reshape(height, width, num_bytes)
    if encoding in _CHANNELS:
        return np.ascontiguousarray(pixels[:, :, _CHANNELS[encoding][1]])
    return _converted(np.ascontiguousarray(pixels), encoding)


def _converted(pixels: Uint8Array, encoding: str) -> Uint8Array | str:
    """RGB of pixels (H, W, bytes of a pixel) by OpenCV; or why there is none."""
    import cv2

    try:
        return np.asarray(cv2.cvtColor(pixels, getattr(cv2, _CODES[encoding][1])), np.uint8)
    except cv2.error as error:  # YUV of an odd width
        height, width = pixels.shape[:2]
        return f"{width} x {height} px of {encoding} cannot be converted: {error.err}"


def _num_bytes(encoding: str) -> int:
    """Bytes of a pixel; 0: the encoding is not known."""
    if encoding == _MONO16:
        return 2
    return (_CHANNELS.get(encoding) or _CODES.get(encoding) or (0,))[0]


def prior_of_camera_info(message: Any) -> IntrinsicsPrior | str:
    """The calibration of a CameraInfo, of images as they are; or why there is none."""
    # ROS 1 writes them in capitals.
    matrix = np.asarray(message.K if hasattr(message, "K") else message.k, float).reshape(3, 3)
    params = np.asarray(message.D if hasattr(message, "D") else message.d, float)
    fx, fy = matrix[0, 0], matrix[1, 1]
    if not (np.isfinite(matrix).all() and np.isfinite(params).all()) or min(fx, fy) <= 0.0:
        return "the camera is not calibrated"
    center = matrix[0, 2] + _PIXEL_OFFSET, matrix[1, 2] + _PIXEL_OFFSET
    named = _named_distortion(str(message.distortion_model).lower(), params)
    if isinstance(named, str):
        return named
    model, distortion = named
    return IntrinsicsPrior(
        focal_px=(fx + fy) / 2.0,
        camera_model=model,
        params=tuple(map(float, (fx, fy, *center, *distortion))),
        origin=CalibrationOrigin.KNOWN,
    )


def prior_of_rectified(message: Any) -> IntrinsicsPrior | str:
    """The calibration of a CameraInfo, of images without distortion; or why there is none."""
    matrix = np.asarray(message.P if hasattr(message, "P") else message.p, float).reshape(3, 4)
    fx, fy = matrix[0, 0], matrix[1, 1]
    if not np.isfinite(matrix[:, :3]).all() or min(fx, fy) <= 0.0:
        return "it says nothing of rectified images"
    center = matrix[0, 2] + _PIXEL_OFFSET, matrix[1, 2] + _PIXEL_OFFSET
    return IntrinsicsPrior(
        focal_px=(fx + fy) / 2.0,
        camera_model="PINHOLE",
        params=tuple(map(float, (fx, fy, *center))),
        origin=CalibrationOrigin.KNOWN,
    )


def _named_distortion(name: str, params: np.ndarray[Any, Any]) -> tuple[str, list[float]] | str:
    """COLMAP's model and its distortion; or why there is none."""
    if name in {"plumb_bob", "rational_polynomial", ""}:
        padded = np.zeros(8)
        padded[: min(len(params), 8)] = params[:8]
        if not padded.any():
            return "PINHOLE", []
        if not padded[4:].any():
            return "OPENCV", padded[:4].tolist()
        return "FULL_OPENCV", padded.tolist()
    if name in {"equidistant", "fisheye", "kannala_brandt"} and len(params) >= 4:
        return "OPENCV_FISHEYE", params[:4].tolist()
    return f"calibrations of the model {name} are not read"


def fix_of_position(message: Any) -> GpsFix | str:
    """The position of a NavSatFix, without an altitude that is no number; or why there is none."""
    values = float(message.latitude), float(message.longitude), float(message.altitude)
    if int(message.status.status) <= _NO_FIX:
        return "no fix"
    if not all(map(math.isfinite, values[:2])):
        return "no position"
    if abs(values[0]) > 90.0 or abs(values[1]) > 180.0:
        return "no latitude and longitude"
    covariance = np.asarray(message.position_covariance, float).reshape(3, 3)
    accuracy_m = None
    if int(message.position_covariance_type) != _UNKNOWN_COVARIANCE:
        variance = (covariance[0, 0] + covariance[1, 1]) / 2.0
        accuracy_m = math.sqrt(variance) if math.isfinite(variance) and variance > 0.0 else None
    return GpsFix(
        latitude_deg=values[0],
        longitude_deg=values[1],
        altitude_m=values[2] if math.isfinite(values[2]) else None,
        accuracy_m=accuracy_m,
    )


def stamp_s(message: Any) -> float | None:
    """When a message was made, by its header; None: it does not say."""
    stamp = message.header.stamp
    nanoseconds = stamp.nanosec if hasattr(stamp, "nanosec") else stamp.nsec
    time_s = float(stamp.sec) + float(nanoseconds) * 1e-9
    return time_s if time_s > 0.0 else None
