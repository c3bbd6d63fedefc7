"""A small stand-in for upstream's package vggsfm: its documented interface, and true geometry.

It triangulates with the cameras it is given, adjusts everything by way of the pycolmap it was
written for, and answers in a gauge of its own. Its arguments are kept for tests to check.
"""

from __future__ import annotations

from pathlib import Path

TRIANGULATOR = """
import numpy as np
import pycolmap
import torch

QUESTIONS = []
FAILURES = []  # raised, one by one, instead of an answer
print("hello from upstream")


class Triangulator(torch.nn.Module):
    def __init__(self, cfg=None):
        super().__init__()

    def forward(self, pred_cameras, pred_tracks, pred_vis, images, preliminary_dict,
                pred_score=None, init_max_reproj_error=0.5, BA_iters=2, shared_camera=False,
                max_reproj_error=4, init_tri_angle_thres=16, min_valid_track_length=3,
                robust_refine=2, extract_color=True, camera_type="SIMPLE_PINHOLE"):
        QUESTIONS.append({
            "R": pred_cameras.R.numpy(), "T": pred_cameras.T.numpy(),
            "focal_length": pred_cameras.focal_length.numpy(),
            "tracks": pred_tracks.numpy(), "vis": pred_vis.numpy(),
            "image_shape": tuple(images.shape), "score": pred_score.numpy(),
            "fmat_inlier_mask": preliminary_dict["fmat_inlier_mask"].numpy()[0],
            "extract_color": extract_color,
        })
        print("solving")
        is_frame_lost = FAILURES == ["one frame lost"]
        if is_frame_lost:
            FAILURES.clear()
        if FAILURES:
            failure = FAILURES.pop()
            if failure == "debugger":
                import pdb; pdb.set_trace()
            elif failure == "missing":
                pycolmap.no_such_thing()
            elif failure == "nonsense":
                return self.nonsense(pred_vis)
            else:
                raise failure
        poses = np.concatenate([pred_cameras.R.numpy(), pred_cameras.T.numpy()[:, :, None]], axis=2)
        focal = pred_cameras.focal_length[:, 0].numpy() * 512.0
        tracks, seen = pred_tracks[0].double().numpy(), pred_vis[0].numpy() > 0.05
        poses, focal, points, kept = self.adjust(poses, focal, tracks, seen)
        if is_frame_lost:
            poses[-1, 0, 3] += 1.0
        intrinsics = np.tile(np.eye(3), (len(poses), 1, 1))
        intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = focal
        everything = torch.ones(seen.shape, dtype=torch.bool)
        return (torch.tensor(poses), torch.tensor(intrinsics), None, torch.tensor(points[kept]),
                None, None, everything[:, 0], everything, torch.tensor(kept))

    def nonsense(self, vis):
        num_frames, num_tracks = vis.shape[1:]
        poses = torch.eye(3, 4, dtype=torch.float64).repeat(num_frames, 1, 1)
        poses[:, 0, 3] = torch.arange(num_frames)
        points = torch.randn(num_tracks, 3, generator=torch.Generator().manual_seed(0)).double()
        everything = torch.ones(num_frames, num_tracks, dtype=torch.bool)
        intrinsics = 900.0 * torch.eye(3, dtype=torch.float64).repeat(num_frames, 1, 1)
        return (poses, intrinsics, None, points, None, None, everything[:, 0], everything,
                everything[0])

    def adjust(self, poses, focal, tracks, seen):
        reconstruction = pycolmap.Reconstruction()
        for frame, pose in enumerate(poses):
            params = np.array([focal[frame], 512.0, 512.0])
            reconstruction.add_camera(pycolmap.Camera(
                model="SIMPLE_PINHOLE", width=1024, height=1024, params=params, camera_id=frame))
            rigid = pycolmap.Rigid3d(pycolmap.Rotation3d(pose[:, :3]), pose[:, 3])
            reconstruction.add_image(pycolmap.Image(
                id=frame, name=f"image_{frame}", camera_id=frame, cam_from_world=rigid))
        kept = seen.sum(axis=0) >= 3
        keypoints = [[] for _ in poses]
        for number in np.flatnonzero(kept):
            frames = np.flatnonzero(seen[:, number])
            track = pycolmap.Track()
            for frame in frames:
                track.add_element(frame, len(keypoints[frame]))
                keypoints[frame].append(pycolmap.Point2D(tracks[frame, number]))
            rays = (tracks[frames, number] - 512.0) / focal[frames, None]
            xyz = self.intersection(poses[frames], rays)
            reconstruction.add_point3D(xyz, track, np.zeros(3))
        for frame, image in reconstruction.images.items():
            image.points2D = pycolmap.ListPoint2D(keypoints[frame])
            image.registered = True
        options = pycolmap.BundleAdjustmentOptions()
        options.solver_options.gradient_tolerance *= 10
        options.solver_options.max_num_iterations = 50
        pycolmap.bundle_adjustment(reconstruction, options)
        reconstruction.normalize(5.0, 0.1, 0.9, True)
        images, cameras = reconstruction.images, reconstruction.cameras
        poses = np.stack([images[i].cam_from_world.matrix() for i in range(len(poses))])
        focal = np.array([cameras[i].params[0] for i in range(len(poses))])
        points = np.zeros((len(kept), 3))
        for number, point_id in zip(np.flatnonzero(kept), sorted(reconstruction.point3D_ids())):
            points[number] = reconstruction.points3D[point_id].xyz
        return poses, focal, points, kept

    def intersection(self, poses, rays):
        rows = np.concatenate([rays[:, [axis]] * poses[:, 2] - poses[:, axis] for axis in (0, 1)])
        point = np.linalg.svd(rows)[2][-1]
        return point[:3] / point[3]
"""

PRELIMINARY = """
import torch

poselib = "there"
QUESTIONS = []


def estimate_preliminary_cameras_poselib(tracks, tracks_vis, width, height, tracks_score=None,
                                         max_error=0.5, max_ransac_iters=20000, **_):
    QUESTIONS.append({"vis": tracks_vis.numpy(), "width": width, "max_error": max_error})
    num_frames, num_tracks = tracks_vis.shape[1:]
    if tracks_vis[0].sum(dim=1).min() < 7:
        raise ValueError("cannot assign 0 input values")
    return None, {"fmat_inlier_mask": torch.ones(1, num_frames - 1, num_tracks, dtype=torch.bool)}
"""

PREDICTOR = """
from types import SimpleNamespace

import torch


class CameraPredictor(torch.nn.Module):
    '''Sees how bright an image is: that is where its camera stands.'''

    def __init__(self, cfg=None):
        super().__init__()
        self.backbone = torch.hub.load("facebookresearch/dinov2", "dinov2_vitb14_reg")
        self.scale = torch.nn.Parameter(torch.zeros(1))

    def forward(self, reshaped_image, preliminary_cameras=None, iters=4, batch_size=None):
        assert reshaped_image.shape[1:] == (3, 336, 336) and batch_size == 1
        middle = reshaped_image[:, :, 168, 168].mean(dim=1)
        shift = self.scale * (middle - middle[0])
        zeros = torch.zeros_like(shift)
        cameras = SimpleNamespace(
            R=torch.eye(3).repeat(len(shift), 1, 1),
            T=torch.stack([shift, zeros, zeros], dim=1),
            focal_length=torch.full((len(shift), 2), 1.6),
        )
        return {"pred_cameras": cameras}
"""

BACKBONE = """
import torch

dependencies = ["torch"]


def dinov2_vitb14_reg(pretrained=True):
    assert not pretrained, "weights would be fetched"
    return torch.nn.Linear(1, 1)
"""

FILES = {
    "vggsfm/__init__.py": "",
    "vggsfm/models/__init__.py": "",
    "vggsfm/models/triangulator.py": TRIANGULATOR,
    "vggsfm/models/camera_predictor.py": PREDICTOR,
    "vggsfm/two_view_geo/__init__.py": "",
    "vggsfm/two_view_geo/estimate_preliminary.py": PRELIMINARY,
}


def write_files(folder: Path, files: dict[str, str]) -> Path:
    """Writes texts by their relative paths; returns the folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder
