"""Pictures of clouds, masks and reconstructions. Needs matplotlib."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .modeling_joint_mae import JointMAEForPreTraining
from .point_cloud_processing_joint_mae import JointMAEPointCloudProcessor


if TYPE_CHECKING:
    from matplotlib.axes import Axes

_VISIBLE, _PREDICTED, _INPUT = "#3b4252", "#d0721c", "#2f6f9f"


def oblique_view(points: np.ndarray, azimuth: float = 35.0, elevation: float = 28.0) -> np.ndarray:
    """
    Coordinates on a picture plane seen from above at an angle, z up.

    Args:
        points: `(n, 3)`.
        azimuth, elevation: direction of the viewer, in degrees.

    Returns:
        `(n, 3)`: right, up, and towards the viewer.
    """
    turn, rise = np.radians([azimuth, elevation])
    right = np.array([np.cos(turn), np.sin(turn), 0.0])
    toward = np.array([np.sin(turn) * np.cos(rise), -np.cos(turn) * np.cos(rise), np.sin(rise)])
    return points @ np.stack([right, np.cross(toward, right), toward]).T


def scatter_cloud(axis: "Axes", points: np.ndarray, colors: np.ndarray | str, size: float = 3.0):
    """
    Draws a cloud on a matplotlib axis; far points fade, so that depth can be read.

    Args:
        axis: the axis; its frame is hidden.
        points: `(n, 3)`, in the unit sphere.
        colors: one colour, or one for each point.
        size: area of a point.
    """
    from matplotlib.colors import to_rgba_array

    x, y, depth = oblique_view(np.asarray(points, dtype=np.float32)).T
    shades = np.broadcast_to(to_rgba_array(colors)[:, :3], (len(points), 3))
    fade = 0.55 * (depth.max() - depth) / max(float(np.ptp(depth)), 1e-6)
    order = np.argsort(depth)
    axis.scatter(x[order], y[order], s=size, c=(shades + fade[:, None] * (1 - shades))[order], linewidths=0)
    axis.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
    axis.set_axis_off()


@torch.no_grad()
def draw_reconstructions(
    model: JointMAEForPreTraining, points: np.ndarray, path: str | Path, num_shapes: int = 5, seed: int = 0
) -> Path:
    """
    Writes a picture of a few shapes: input, visible part, reconstruction, depth image, its visible patches, its
    reconstruction.

    Args:
        model: left in the mode it was in.
        points: float32 `(clouds, num_points, 3)`, normalised; `num_shapes` of them, evenly spread, are drawn.
        path: the PNG file to write.
        num_shapes: rows of the picture.
        seed: fixes the masks.

    Returns:
        The path.

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "jointmae-hf[train]".') from error

    chosen = np.linspace(0, len(points) - 1, min(num_shapes, len(points))).round().astype(int)
    batch = torch.from_numpy(points[chosen]).to(model.device)
    config, device = model.config, model.device
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    outputs = model(
        batch,
        view=torch.zeros(len(batch), dtype=torch.int64, device=device),
        point_noise=torch.rand(len(batch), config.num_centers[-1], generator=generator).to(device),
        patch_noise=torch.rand(len(batch), config.num_patches, generator=generator).to(device),
    )
    model.train(was_training)

    processor = JointMAEPointCloudProcessor.from_config(config)
    shapes = processor.post_process_reconstruction(outputs, batch, norm_pixel_loss=config.norm_pixel_loss)
    titles = ["input", "visible", "reconstructed"]
    if config.use_image_branch:
        titles += ["depth image", "visible", "reconstructed"]
        colormap = colormaps["magma"].with_extremes(bad="0.85")
    figure = Figure(figsize=(2.0 * len(titles), 2.0 * len(batch) + 0.3))
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(batch), len(titles), squeeze=False)
    for index, (row, shape) in enumerate(zip(axes, shapes, strict=True)):
        visible, predicted = shape["visible_points"], shape["reconstructed_points"]
        scatter_cloud(row[0], points[chosen[index]], _INPUT)
        scatter_cloud(row[1], visible.cpu().numpy(), _VISIBLE)
        colors = [_VISIBLE] * len(visible) + [_PREDICTED] * len(predicted)
        scatter_cloud(row[2], torch.cat([visible, predicted.to(visible)]).cpu().numpy(), colors, size=2.0)
        if config.use_image_branch:
            image = outputs.pixel_values[index, 0]
            images = (image, _without_masked(image, outputs.mask_2d[index], config.patch_size), shape["depth"])
            for axis, picture in zip(row[3:], images, strict=True):
                axis.imshow(picture.float().cpu().numpy(), cmap=colormap, vmin=0.0, vmax=1.0, interpolation="nearest")
                axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.3 / (2.0 * len(batch) + 0.3), bottom=0.01, wspace=0.04)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, facecolor="white")
    return path


def _without_masked(image: torch.Tensor, mask: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Image `(height, width)` with NaN in masked patches `(num_patches,)`."""
    grid = image.shape[0] // patch_size
    hidden = mask.bool().view(grid, grid).repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1)
    return image.masked_fill(hidden, torch.nan)
