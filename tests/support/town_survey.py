"""A survey flight over the town with positions on the globe, for tests of files that hold them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from adapters.town.source import SyntheticTown, TownOptions
from engine.config import SourcesConfig
from engine.geometry import pose_in_other_world, rotation_from_vector
from engine.types import Float64Array, FrameId, GpsFix

ORIGIN = GpsFix(latitude_deg=36.6146, longitude_deg=-6.112, altitude_m=20.0)
UNIT_M = 12.5  # of the map below
_MAP_FROM_ENU = np.column_stack(
    [rotation_from_vector(np.array([0.4, -1.2, 2.0])) / UNIT_M, (1.0, -4.0, 2.0)]
)
_XMP_MARKER = b"http://ns.adobe.com/xap/1.0/\0"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Survey:
    """Where a drone was, and its cameras in a map of another frame and unit."""

    cam_from_map: Float64Array  # (N, 3, 4)
    fixes: tuple[GpsFix, ...]
    positions_m: Float64Array  # (N, 3) east, north, up of ORIGIN


def town_survey(num: int = 24, *, origin: GpsFix = ORIGIN) -> Survey:
    """A flight to and fro at one height, seen straight down."""
    options = TownOptions(path="lawnmower", num_frames=num, width=96, height=72)
    town = SyntheticTown(options, next_frame_id=lambda: FrameId(1), config=SourcesConfig())
    cam_from_enu = np.array([pose for _, pose in town.ground_truth()])
    positions_m = -np.einsum("nji,nj->ni", cam_from_enu[:, :, :3], cam_from_enu[:, :, 3])
    geodetic = pycolmap.GPSTransform().enu_to_ellipsoid(
        positions_m, origin.latitude_deg, origin.longitude_deg, origin.altitude_m or 0.0
    )
    return Survey(
        cam_from_map=pose_in_other_world(cam_from_enu, _MAP_FROM_ENU),
        fixes=tuple(
            GpsFix(latitude_deg=latitude, longitude_deg=longitude, altitude_m=altitude)
            for latitude, longitude, altitude in geodetic.tolist()
        ),
        positions_m=positions_m,
    )


def gps_tags(fix: GpsFix) -> dict[int, Any]:
    """EXIF's tags of a position, as drones write them."""
    altitude_m = fix.altitude_m or 0.0
    return {
        1: "N" if fix.latitude_deg >= 0.0 else "S",
        2: _in_arc(abs(fix.latitude_deg)),
        3: "E" if fix.longitude_deg >= 0.0 else "W",
        4: _in_arc(abs(fix.longitude_deg)),
        5: b"\0" if altitude_m >= 0.0 else b"\1",
        6: IFDRational(round(abs(altitude_m) * 1000), 1000),
    }


def write_photo(path: Path, *, gps: dict[int, Any], xmp: str = "", shade: int = 0) -> None:
    """A small JPEG with these tags."""
    exif = Image.Exif()
    exif[0x10F] = "Maker"
    if gps:
        exif.get_ifd(0x8825).update(gps)
    buffer = io.BytesIO()
    Image.new("RGB", (96, 72), (shade, 90, 7)).save(buffer, "JPEG", exif=exif.tobytes())
    data = buffer.getvalue()
    if xmp:
        body = _XMP_MARKER + xmp.encode()
        data = data[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + data[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def xmp_packet(*attributes: str) -> str:
    """An XMP packet whose description has these attributes."""
    return (
        '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" {" ".join(attributes)}/></rdf:RDF></x:xmpmeta>'
    )


def _in_arc(degrees: float) -> tuple[IFDRational, ...]:
    whole = int(degrees)
    minutes = (degrees - whole) * 60.0
    seconds = (minutes - int(minutes)) * 60.0
    return (
        IFDRational(whole, 1),
        IFDRational(int(minutes), 1),
        IFDRational(round(seconds * 100_000), 100_000),
    )
