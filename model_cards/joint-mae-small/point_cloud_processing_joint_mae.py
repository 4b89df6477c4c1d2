# Copyright 2026 The jointmae_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Point cloud processor of Joint-MAE: files, meshes or arrays in, tensors for the model out.

Notable choices:

- A cloud is processed the same whatever else is in the batch, and the same each time: every cloud gets a fresh random
  generator made from `seed`.
- Clouds are first sampled, then normalised, so that what the model sees is centred and of radius 1 to the last digit.
- A small cloud is padded, not repeated: copies would be each other's neighbours, and a model made for even surfaces
  takes that for another shape.
- Normalisation runs in float64: coordinates of a survey (5e5 m) keep their millimetres.
- Nothing is repaired in silence. Bad input is refused with the index of the cloud; trimesh is needed for meshes only.
"""

import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, FeatureExtractionMixin, TensorType
from transformers.utils import logging

from .geometry_joint_mae import VIEW_AXES, farthest_point_sample, gather_points, knn, project_depth, view_projection


logger = logging.get_logger(__name__)

SAMPLINGS = ("random", "farthest", "none")
ARRAY_SUFFIXES = (".npy", ".npz")
TEXT_SUFFIXES = (".xyz", ".txt", ".pts", ".csv")
MESH_SUFFIXES = (".ply", ".obj", ".stl", ".off", ".glb", ".gltf")
FILE_SUFFIXES = (*ARRAY_SUFFIXES, *TEXT_SUFFIXES, *MESH_SUFFIXES)
# Comments may stand before and after the magic word; ModelNet has files with the counts glued to it: `OFF490 518 0`.
# Some write it small; `4OFF` and `nOFF` have other coordinates than x, y, z.
_OFF_HEADER = re.compile(r"(?:\s|#[^\n]*\n)*(?:ST|C|N|st|c)*(?i:OFF)(?:\s|#[^\n]*\n)*(\d+)[ \t]+(\d+)[^\n]*(?:\n|$)")
# A quoted field of a text file, and what a header may hold beside the names of its columns: `x [m]`, `columns: x y z`.
_QUOTED = re.compile(r"""(?<![^\s,])(["'])((?:(?!\1).|\1\1)*)\1(?![^\s,])""")
_UNIT = re.compile(r"(?<=\w)[\s;]*[\[(][^\[\](),]{0,12}[\])]")
_LABEL = re.compile(r"\A.*?(?:[:=]\s+|\b(?:columns?|fields?|format)[:=])", re.IGNORECASE)
# Words that no column is named, though as many may stand in a line as there are columns.
_PROSE = {"and", "are", "as", "by", "for", "from", "in", "is", "of", "the", "to", "with"}
# Names of the axes: `x`, `X_m`, `x.coord`, `pos_x`, ParaView's `Points:0`; normals (`nx`) and velocities are none.
_PLACE = r"(?:points?|pos(?:itions?)?|coord(?:inate)?s?|loc(?:ations?)?|vert(?:ex|ices)|xyz)"
_LENGTH = r"(?:[kdcmunµ]?m|(?:kilo|centi|milli|micro)?met(?:er|re)s?|in(?:ch(?:es)?)?|ft|feet)"
_AXIS = re.compile(
    rf"({_PLACE}[\W_]*)?([xyz])([\W_]*(?:coord(?:inate)?s?|pos(?:ition)?)|[\W_]+{_LENGTH})?|({_PLACE}[\W_]+)([012])"
)
# Columns of a row of a data set, or arrays of an .npz file, that may hold the cloud.
POINT_KEYS = ("points", "mesh")

# Farthest point sampling of a surface chooses among this many times the points it keeps.
_SURFACE_OVERSAMPLING = 4
# Beyond these numbers of points for each point kept, a cloud no longer looks like those the model was made for.
_DENSE, _SPARSE = 16, 1 / 2
_FLOAT32 = np.finfo(np.float32)
# Up to 2**40 and down to its inverse, squares of float32 neither overflow nor vanish.
_SAFE_EXPONENT = 40
_EXPECTED = "arrays, tensors, nested lists, trimesh objects, rows with 'points' or 'mesh', or paths of files"


class JointMAEPointCloudProcessor(FeatureExtractionMixin):
    r"""
    Turns point clouds and meshes into the inputs of the Joint-MAE models.

    Each cloud is sampled to `num_points`, centred on its mean and scaled to the unit sphere. A cloud with fewer points
    keeps all of them; the rest is padding, which `point_mask` tells. A mesh is sampled on its surface, evenly by area.

    Args:
        num_points (`int`, defaults to 2048): Points of each processed cloud.
        image_size (`int`, defaults to 224): Side of the depth image in pixels.
        splat_size (`int`, defaults to 5): Odd side of the square that a point covers in the depth image, in pixels.
        view (`int`, defaults to 0):
            View of the depth image, 0 to 2: the axes (x, y, z), (z, x, y) or (y, z, x) become (row, column, depth).
        num_centers (`list[int]`, defaults to `[512, 256, 64]`): Groups at each scale, finest first.
        num_neighbors (`list[int]`, defaults to `[16, 8, 8]`):
            Neighbours in each group, first of points, then of the finer centres. A cloud of fewer points than the
            first is refused.
        do_normalize (`bool`, defaults to `True`):
            Whether to centre and scale. Without it coordinates are only cast to float32.
        do_project (`bool`, defaults to `False`): Whether to return the depth image and its projection.
        sampling (`str`, defaults to `"random"`):
            `"random"` takes a seeded random subset; `"farthest"` the evenly spread subset of farthest point sampling,
            which is slower; `"none"` keeps all points, pads the batch to its longest cloud and marks the real points
            in `point_mask`.
        seed (`int`, defaults to 0): Seed of the random subset and of the points on surfaces.

    Example:

    ```python
    >>> import numpy as np
    >>> from jointmae_hf import JointMAEPointCloudProcessor

    >>> processor = JointMAEPointCloudProcessor(num_points=1024)
    >>> inputs = processor([np.random.rand(5000, 3), np.random.rand(800, 3)])
    >>> inputs["point_values"].shape
    torch.Size([2, 1024, 3])
    ```"""

    # What `register_for_auto_class` sets: saving copies the code, so that a repository loads with trust_remote_code.
    _auto_class = "AutoFeatureExtractor"

    def __init__(
        self,
        num_points: int = 2048,
        image_size: int = 224,
        splat_size: int = 5,
        view: int = 0,
        num_centers: Sequence[int] = (512, 256, 64),
        num_neighbors: Sequence[int] = (16, 8, 8),
        do_normalize: bool = True,
        do_project: bool = False,
        sampling: str = "random",
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_points = num_points
        self.image_size = image_size
        self.splat_size = splat_size
        self.view = view
        self.num_centers = num_centers
        self.num_neighbors = num_neighbors
        self.do_normalize = do_normalize
        self.do_project = do_project
        self.sampling = sampling
        self.seed = seed
        self._warned = set()
        self._check_attributes()
        # JSON knows no tuples and no numbers of numpy: the same attributes before and after saving.
        for name in ("num_points", "image_size", "splat_size", "seed"):
            setattr(self, name, int(getattr(self, name)))
        self.view = int(_check_views(view, 1))
        self.num_centers, self.num_neighbors = list(map(int, num_centers)), list(map(int, num_neighbors))
        self.do_normalize, self.do_project = bool(do_normalize), bool(do_project)

    def _check_attributes(self):
        for name in ("num_centers", "num_neighbors"):
            values = getattr(self, name)
            valid = isinstance(values, Sequence) and len(values) > 0 and all(_is_integer(value, 1) for value in values)
            _require(name, values, valid, "positive integers")
        same = len(self.num_neighbors) == len(self.num_centers)
        _require("num_neighbors", self.num_neighbors, same, f"one entry for each of `num_centers` {self.num_centers}")
        for finer, coarser, k in zip(self.num_centers[:-1], self.num_centers[1:], self.num_neighbors[1:], strict=True):
            _require("num_centers", self.num_centers, coarser <= finer, "numbers that do not grow")
            _require("num_neighbors", self.num_neighbors, k <= finer, f"at most the finer centres {self.num_centers}")
        _require("image_size", self.image_size, _is_integer(self.image_size, 4), "an integer from 4 up")
        odd = _is_integer(self.splat_size, 1) and self.splat_size % 2 == 1
        _require("splat_size", self.splat_size, odd, "a positive odd integer")
        _check_sampling(self.num_points, self.sampling, self.seed, self.num_neighbors[0])
        _check_views(self.view, 1)

    @property
    def model_input_names(self) -> list[str]:
        """What every call returns with the attributes as they are; small clouds bring `point_mask` as well."""
        names = ["point_values"]
        if self.sampling == "none":
            names.append("point_mask")
        if self.do_project:
            names += ["pixel_values", "projection"]
        return names

    @classmethod
    def from_config(cls, config: Any, **overrides) -> "JointMAEPointCloudProcessor":
        """The processor for models of a [`JointMAEConfig`], with single arguments replaced by `overrides`."""
        names = ("num_points", "image_size", "splat_size", "num_centers", "num_neighbors")
        return cls(**{**{name: getattr(config, name) for name in names}, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """
        Everything needed to make this processor again.

        The class is named for both Auto classes that may ask for it: by `auto_map` where the code comes from the
        repository, by `processor_class` where it is installed (`AutoProcessor` looks at nothing else).
        """
        output = super().to_dict()
        del output["_warned"]
        reference = f"{type(self).__module__.split('.')[-1]}.{type(self).__name__}"
        output["auto_map"] = {"AutoFeatureExtractor": reference, "AutoProcessor": reference}
        output["processor_class"] = type(self).__name__
        return output

    def __call__(
        self,
        point_clouds: Any,
        *,
        num_points: int | None = None,
        sampling: str | None = None,
        seed: int | None = None,
        view: int | Sequence[int] | None = None,
        do_normalize: bool | None = None,
        do_project: bool | None = None,
        return_groups: bool = False,
        return_indices: bool = False,
        return_normalization: bool = False,
        return_tensors: str | TensorType = "pt",
    ) -> BatchFeature:
        """
        Processes one cloud or many.

        Args:
            point_clouds:
                One cloud or a sequence of clouds, of equal size or not. A cloud is an array, tensor or nested list of
                shape `(n, 3)` or wider (columns after x, y, z are dropped); a `trimesh` mesh, point cloud or scene; a
                row of a data set with its cloud under `"points"` or `"mesh"`, decoded or not; or the path of a file:
                arrays (.npy, .npz), text (.xyz, .txt, .pts, .csv, by whitespace, comma or semicolon; the columns that
                a header names x, y and z, or the first three without a header), meshes and clouds read by trimesh
                (.ply, .obj, .stl, .off, .glb, .gltf). An array or tensor `(b, n, 3)` is a batch.
            num_points, sampling, seed, do_normalize, do_project: Replace the attributes of that name for this call.
            view (`int` or `list[int]`, *optional*): View of the depth images, one for all clouds or one for each.
            return_groups (`bool`, defaults to `False`): Whether to return the groups that the model forms.
            return_indices (`bool`, defaults to `False`):
                Whether to return which of the given points were kept, for labels of points. Of no use for meshes.
            return_normalization (`bool`, defaults to `False`):
                Whether to return `center` and `scale`; `point_values * scale + center` is in the units given.
            return_tensors (`str`, defaults to `"pt"`): `"pt"` for torch tensors, `"np"` for numpy arrays.

        Returns:
            [`BatchFeature`], on the CPU, with

            - **point_values** float32 `(b, num_points, 3)`, in the unit sphere.
            - **point_mask** bool `(b, num_points)`, with `sampling="none"` or if a cloud holds less than `num_points`:
              false for padding, copies of real points.
            - **pixel_values** float32 `(b, 1, image_size, image_size)` and **projection** float32 `(b, 3, 4)`, with
              `do_project`: depth in [0, 1], and the map from a point to (pixel row, pixel column, depth).
            - **center_indices** int64 `(b, num_centers[0])` into `point_values`, with `return_groups`; the centres of
              coarser scales are prefixes. **neighbor_indices_0** int64 `(b, num_centers[0], num_neighbors[0])` into
              `point_values`, **neighbor_indices_1** and up into the centres of the next finer scale.
            - **point_indices** int64 `(b, num_points)` into the points given, with `return_indices`.
            - **center** float64 `(b, 3)` and **scale** float64 `(b,)` in the units given, with `return_normalization`.

        Raises:
            TypeError: if something is no point cloud at all.
            ValueError: if a cloud is empty, has a wrong shape, non-finite values, fewer points than a group or no
                extent, if a mesh has no area, if a file cannot be read, or if an argument is out of range.
            FileNotFoundError: if there is no such file.
            ImportError: if a mesh file is given and trimesh is not installed.
        """
        num_points = self.num_points if num_points is None else num_points
        sampling = self.sampling if sampling is None else sampling
        seed = self.seed if seed is None else seed
        do_normalize = self.do_normalize if do_normalize is None else do_normalize
        do_project = self.do_project if do_project is None else do_project
        _check_sampling(num_points, sampling, seed, self.num_neighbors[0])
        _require("return_tensors", return_tensors, return_tensors in ("pt", "np"), '"pt" or "np"')

        items = _split_batch(point_clouds)
        view = _check_views(self.view if view is None else view, len(items))
        num_surface_points = num_points * (_SURFACE_OVERSAMPLING if sampling == "farthest" else 1)
        names = [_name(item, i) for i, item in enumerate(items)]
        clouds = [_read_cloud(item, name, num_surface_points, seed) for item, name in zip(items, names, strict=True)]
        for cloud, name in zip(clouds, names, strict=True):
            self._check_cloud(cloud, name)
            self._warn_of_density(len(cloud), num_points, name)

        indices = _sample(clouds, num_points, sampling, seed)
        sampled = [cloud.take(index, axis=0) for cloud, index in zip(clouds, indices, strict=True)]
        points, center, scale = _normalize(sampled, names, do_normalize)
        sizes = np.array([len(cloud) for cloud in sampled])
        length = sizes.max() if sampling == "none" else num_points
        data, mask = {"point_values": torch.from_numpy(_pad(points, length))}, None
        if sampling == "none" or sizes.min() < length:
            mask = data["point_mask"] = torch.from_numpy(np.arange(length) < sizes[:, None])
        if do_project:
            data.update(self._project(data["point_values"], view, mask))
        if return_groups:
            data.update(self._group(data["point_values"], mask))
        if return_indices:
            data["point_indices"] = torch.from_numpy(_pad(indices, length))
        if return_normalization:
            data.update(center=torch.from_numpy(center), scale=torch.from_numpy(scale))
        if return_tensors == "np":
            data = {name: value.numpy() for name, value in data.items()}
        return BatchFeature(data)

    def _check_cloud(self, points: np.ndarray, name: str):
        """Refuses what would give NaN or a group of copies; `points` is `(n, 3)`."""
        if len(points) == 0:
            raise ValueError(f"{name} is empty, expected at least {self.num_neighbors[0]} points.")
        _check_values(points, name)
        if len(points) < self.num_neighbors[0]:
            raise ValueError(
                f"{name} holds {len(points)} points, expected at least the {self.num_neighbors[0]} of a group "
                "(`num_neighbors[0]`)."
            )

    def _warn_of_density(self, size: int, num_points: int, name: str):
        """Warns once for each processor, not once for each cloud of a data set."""
        ratio = size / num_points
        if ratio > _DENSE:
            kind = "dense"
            advice = "Details finer than the points kept are lost; to keep them, crop the cloud or raise `num_points`."
        elif ratio < _SPARSE:
            kind = "sparse"
            advice = "Its groups are wider than those the model has learned from, so features may be worse."
        else:
            return
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(
                f"{name} holds {size} points, {round(ratio, 2)} times the {num_points} (`num_points`) that the model "
                f"is made for. {advice} Other clouds as {kind} as this are not reported."
            )

    def _project(self, points: torch.Tensor, view: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        projection = view_projection(points, view, self.image_size, mask)
        image = project_depth(points, projection, self.image_size, self.splat_size, mask)
        return {"pixel_values": image, "projection": projection}

    def _group(self, points: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The centres and neighbours that the model finds in these points."""
        sampled = farthest_point_sample(points, self.num_centers[0], mask)
        centers = gather_points(points, sampled)
        groups = {"center_indices": sampled, "neighbor_indices_0": knn(centers, points, self.num_neighbors[0], mask)}
        for scale in range(1, len(self.num_centers)):
            finer, coarser = centers[:, : self.num_centers[scale - 1]], centers[:, : self.num_centers[scale]]
            groups[f"neighbor_indices_{scale}"] = knn(coarser, finer, self.num_neighbors[scale])
        return groups

    def post_process_reconstruction(
        self,
        outputs: Any,
        point_values: torch.Tensor,
        point_mask: torch.Tensor | None = None,
        center: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        norm_pixel_loss: bool = False,
    ) -> list[dict[str, torch.Tensor]]:
        """
        Whole clouds and depth images from what [`JointMAEForPreTraining`] reconstructed of the masked tokens.

        Args:
            outputs ([`JointMAEForPreTrainingOutput`]): What the model returned.
            point_values (`torch.Tensor` of shape `(batch, num_points, 3)`): What it was given.
            point_mask (`torch.Tensor` of shape `(batch, num_points)`, *optional*): Likewise.
            center (`torch.Tensor` of shape `(batch, 3)`, *optional*): From `return_normalization`.
            scale (`torch.Tensor` of shape `(batch,)`, *optional*): Likewise. With both, points are in the units given.
            norm_pixel_loss (`bool`, defaults to `False`):
                The field of the model's configuration: whether it predicts patches divided by their deviation.

        Returns:
            One dict for each cloud: **visible_points** `(v, 3)`, the points nearest to a visible centre;
            **reconstructed_points** `(r, 3)`; **points** `(v + r, 3)`, both of them; and, where the model has an image
            branch, **depth** `(image_size, image_size)`, visible patches as given and masked ones as reconstructed.

        Raises:
            ValueError: if only one of `center` and `scale` is given.
        """
        if (center is None) != (scale is None):
            missing = "scale" if scale is None else "center"
            raise ValueError(f"`{missing}` is None, expected both of `center` and `scale` or none.")
        nearest = knn(point_values, outputs.centers, 1).squeeze(-1)  # (batch, num_points)
        visible = ~outputs.mask_3d.bool().gather(1, nearest)
        if point_mask is not None:
            visible = visible & point_mask
        depth = None if outputs.reconstructed_patches is None else _assemble_depth(outputs, norm_pixel_loss)
        results = []
        for i, reconstructed in enumerate(outputs.reconstructed_points.flatten(1, 2)):
            parts = [point_values[i, visible[i]], reconstructed]
            if scale is not None:
                parts = [part * scale[i].to(part.device) + center[i].to(part.device) for part in parts]
            result = {"visible_points": parts[0], "reconstructed_points": parts[1], "points": torch.cat(parts)}
            if depth is not None:
                result["depth"] = depth[i]
            results.append(result)
        return results


def _assemble_depth(outputs: Any, norm_pixel_loss: bool) -> torch.Tensor:
    """Depth images `(batch, height, width)` with the masked patches replaced by their reconstructions."""
    patches = outputs.reconstructed_patches.float()
    image = outputs.pixel_values.float()
    size = round(patches.shape[-1] ** 0.5)
    tiles = image[:, 0].unfold(1, size, size).unfold(2, size, size)  # (batch, rows, columns, size, size)
    batch_size, num_rows, num_columns = tiles.shape[:3]
    tiles = tiles.reshape(batch_size, num_rows * num_columns, size * size).clone()
    index = outputs.masked_patches.unsqueeze(-1).expand_as(patches)
    if norm_pixel_loss:
        variance, mean = torch.var_mean(tiles.gather(1, index), dim=-1, keepdim=True)
        patches = patches * (variance + 1e-6).sqrt() + mean
    tiles = tiles.scatter(1, index, patches).view(batch_size, num_rows, num_columns, size, size)
    return tiles.transpose(2, 3).reshape(batch_size, num_rows * size, num_columns * size)


# ---- Arguments


def _require(name: str, value: Any, condition: bool, expected: str):
    if not condition:
        raise ValueError(f"`{name}` is {value!r}, expected {expected}.")


def _is_integer(value: Any, low: int) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= low


def _check_sampling(num_points: int, sampling: str, seed: int, least: int):
    _require("sampling", sampling, sampling in SAMPLINGS, f"one of {SAMPLINGS}")
    _require("seed", seed, _is_integer(seed, 0), "an integer from 0 up")
    enough = _is_integer(num_points, least)
    _require("num_points", num_points, enough, f"an integer from the {least} of a group (`num_neighbors[0]`) up")


def _check_views(view: int | Sequence[int], batch_size: int) -> torch.Tensor:
    """The view of each cloud, int64 `(batch,)`."""
    views = np.atleast_1d(np.asarray(view))
    valid = views.dtype.kind in "iu" and views.ndim == 1 and len(views) in (1, batch_size)
    valid = valid and ((views >= 0) & (views < len(VIEW_AXES))).all()
    _require("view", view, valid, f"0 to {len(VIEW_AXES) - 1}, one for all or one for each of {batch_size} clouds")
    return torch.from_numpy(views.astype(np.int64)).expand(batch_size)


# ---- Reading


def _split_batch(point_clouds: Any) -> list[Any]:
    """The clouds of whatever was given, not read yet."""
    if _is_path(point_clouds) or _is_trimesh(point_clouds):
        return [point_clouds]
    if isinstance(point_clouds, Mapping):
        key = _point_key(point_clouds, "point_clouds")
        return [point_clouds] if key is None else _split_batch(point_clouds[key])
    if isinstance(point_clouds, np.ndarray) and point_clouds.ndim == 1 and point_clouds.dtype == object:
        point_clouds = list(point_clouds)  # clouds of unequal size, as a data set formatted to numpy gives them
    if isinstance(point_clouds, (np.ndarray, torch.Tensor)):
        if point_clouds.ndim not in (2, 3):
            expected = "(n, 3) for one cloud or (b, n, 3) for many"
            raise ValueError(f"point_clouds has shape {tuple(point_clouds.shape)}, expected {expected}.")
        items = [point_clouds] if point_clouds.ndim == 2 else list(point_clouds)
    elif _is_sequence(point_clouds):
        items = [point_clouds] if len(point_clouds) > 0 and _is_row(point_clouds[0]) else list(point_clouds)
    else:
        raise TypeError(f"point_clouds is of type {type(point_clouds).__name__}, expected {_EXPECTED}.")
    if not items:
        raise ValueError("point_clouds is empty, expected at least one cloud.")
    return items


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _is_row(value: Any) -> bool:
    """Whether this is one point: a flat sequence of numbers."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim == 1
    return _is_sequence(value) and len(value) > 0 and isinstance(value[0], (int, float, np.number))


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, Path))


def _is_trimesh(value: Any) -> bool:
    """Told by its name, so that trimesh is not imported for clouds that do not need it."""
    if isinstance(value, np.ndarray):  # the vertices of a mesh are an array of trimesh's own
        return False
    return any(base.__module__.split(".")[0] == "trimesh" for base in type(value).__mro__)


def _point_key(row: Mapping, name: str) -> str | None:
    """The column that holds the cloud; none for a mesh file that is not decoded (`path` and `bytes`)."""
    for key in POINT_KEYS:
        if key in row:
            return key
    if "bytes" in row or "path" in row:
        return None
    raise ValueError(f"{name} has the keys {sorted(map(str, row))}, expected one of {POINT_KEYS}.")


def _name(item: Any, index: int) -> str:
    """What errors call a cloud: its index, and its file if it has one."""
    path = item.get("path") if isinstance(item, Mapping) else item
    return f"point_clouds[{index}] ({str(path)!r})" if _is_path(path) else f"point_clouds[{index}]"


def _read_cloud(item: Any, name: str, num_surface_points: int, seed: int) -> np.ndarray:
    """One cloud of any accepted kind as a float array `(n, 3)`; its values are not checked yet."""
    if isinstance(item, Mapping):
        key = _point_key(item, name)
        if key is not None:
            return _read_cloud(item[key], name, num_surface_points, seed)
        item = _read_undecoded(item, name)
    elif _is_path(item):
        item = _read_file(Path(item), Path(item).suffix, name)
    if not _is_trimesh(item):
        return _as_points(item, name)
    vertices, faces = _mesh_arrays(item, name)
    return vertices if faces is None else _sample_surface(vertices, faces, num_surface_points, seed, name)


def _read_undecoded(row: Mapping, name: str) -> Any:
    """A file as a data set with `Mesh(decode=False)` gives it: its path, its bytes or both."""
    content, path = row.get("bytes"), row.get("path")
    if path is None:
        raise ValueError(f"{name} has no 'path', expected one whose suffix tells the format of 'bytes'.")
    return _read_file(Path(path) if content is None else BytesIO(content), Path(path).suffix, name)


def _read_file(source: Path | BytesIO, suffix: str, name: str) -> Any:
    """An array or a trimesh scene from a file or from its content."""
    suffix = suffix.lower()
    if isinstance(source, Path) and not source.is_file():
        raise FileNotFoundError(f"{name} is no file.")
    if suffix not in FILE_SUFFIXES:
        raise ValueError(f"{name} has the suffix {suffix!r}, expected one of {', '.join(FILE_SUFFIXES)}.")
    trimesh = _import_trimesh(name) if suffix in MESH_SUFFIXES else None
    try:
        if suffix in ARRAY_SUFFIXES:
            return _read_array(source)
        if suffix in (*TEXT_SUFFIXES, ".off"):
            content = source.getvalue() if isinstance(source, BytesIO) else source.read_bytes()
            text = content.decode("utf-8-sig", errors="replace")
            return _read_text(text) if suffix in TEXT_SUFFIXES else trimesh.Trimesh(*_read_off(text), process=False)
        # `process` would merge vertices and drop bad ones in silence; materials would open more files.
        return trimesh.load_scene(source, file_type=suffix[1:], process=False, skip_materials=True)
    except Exception as error:  # readers raise whatever a broken file makes them stumble over
        raise ValueError(f"{name} cannot be read: {type(error).__name__}: {error}") from error


def _import_trimesh(name: str) -> Any:
    try:
        import trimesh
    except ImportError as error:
        raise ImportError(f'{name} needs trimesh to be read: pip install "jointmae-hf[io]".') from error
    return trimesh


def _read_array(source: Path | BytesIO) -> np.ndarray:
    loaded = np.load(source, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        keys = loaded.files
        key = next((key for key in POINT_KEYS if key in keys), keys[0] if len(keys) == 1 else None)
        if key is None:
            raise ValueError(f"arrays {keys}, expected one of {POINT_KEYS} or a single array")
        return loaded[key]


def _read_text(text: str) -> np.ndarray:
    """The rows `(n, 3)` after any header. A header that names x, y and z says which columns, else the first three."""
    originals = text.splitlines()
    if ";" in text:
        originals = _semicolons_to_commas(originals)
    lines = list(map(_unquote, originals)) if '"' in text or "'" in text else originals
    header = _TextHeader()
    for start, line in enumerate(lines):
        if not line.lstrip().startswith(("#", "//")):
            delimiter = "," if "," in line else None
            tokens = [token.strip() for token in line.split(delimiter)]
            columns = header.columns_of(line, tokens, originals[start])
            has_numbers = _are_numbers(tokens, (0, 1, 2))
            if has_numbers or (columns is not None and _are_numbers(tokens, columns)):
                if columns is None:
                    header.check_first_three(line, tokens)
                rows = lines[start:]
                if "//" in text:
                    rows = [row for row in rows if not row.lstrip().startswith("//")]
                values = np.loadtxt(rows, delimiter=delimiter, usecols=columns or (0, 1, 2), ndmin=2)
                if columns is None and len(tokens) > 3 and len(values) > 2 and (np.diff(values[:, 0]) == 1).all():
                    raise ValueError(
                        "its first column counts the rows, and no header says which ones are x, y and z; name them "
                        "so, or load the table yourself and pass an array (n, 3)"
                    )
                return values
        header.add(line)
    raise ValueError(
        "no line with three numbers, written with a point and parted by spaces, tabs, commas or semicolons"
    )


def _semicolons_to_commas(lines: list[str]) -> list[str]:
    """
    Lines parted by semicolons, where a comma stands for the decimal point, as lines parted by commas.

    The first line with three numbers decides. A line that can be read without has a list in one of its columns.
    """
    for line in lines:
        if _are_numbers(line.split(","), (0, 1, 2)) or _are_numbers(line.split(), (0, 1, 2)):
            return lines
        tokens = [token.strip(" \t\"'") for token in line.split(";")]
        if any(_count_numbers(token.split(",")) > 2 for token in tokens):
            return lines
        if _count_numbers([token.replace(",", ".") for token in tokens]) > 2:
            return [each.replace(",", ".").replace(";", ",") if ";" in each else each for each in lines]
    return lines


def _count_numbers(tokens: list[str]) -> int:
    return sum(_are_numbers([token], (0,)) for token in tokens)


def _unquote(line: str) -> str:
    """The line without quotes; what would part a quoted field or begin a comment becomes a semicolon."""
    return _QUOTED.sub(lambda match: re.sub(r"\s|,|#|//", ";", match[2].strip()), line)


class _TextHeader:
    """
    What the lines before the first row of a text file tell of its columns.

    A comment that mentions x, y and z is no header unless it has as many names as the rows have columns.
    """

    def __init__(self):
        self.columns: dict[int, tuple[int, ...]] = {}  # of x, y and z, for each number of names
        self.foreign: dict[int, list[str]] = {}  # names without x, y and z, by their number
        # The last names with x, y and z, for rows of another length.
        self.names: list[str] = []
        self.axes: tuple[int, ...] = (0, 1, 2)
        self.by_comma = self.commented = False

    def add(self, line: str):
        commented = line.lstrip().startswith(("#", "//"))
        line = _UNIT.sub("", line.lstrip("#/ "))
        by_comma = "," in line
        columns: dict[int, tuple[int, ...]] = {}
        for part in dict.fromkeys((line, _LABEL.sub("", line, count=1))):
            for delimiter in (",",) if by_comma else ("\t", None) if "\t" in part else (None,):
                names = [name.strip(" \t\"';#/()[]") for name in part.split(delimiter)]
                prose = not by_comma and any(name in _PROSE or _are_numbers([name], (0,)) for name in names)
                likely = not commented or (by_comma and not any(" " in name for name in names))
                axes = _find_axes(names)
                if axes is None:
                    if not prose and (likely or _have_triple(names)):
                        self.foreign.update(dict.fromkeys(_widths(names), names))
                    continue
                if not prose:
                    columns = dict.fromkeys(_widths(names), axes) | columns
                if axes[0] == min(axes) and (prose or (commented and not by_comma)):  # words stand before x
                    rest = tuple(axis - axes[0] for axis in axes)
                    columns = dict.fromkeys(_widths(names[axes[0] :]), rest) | columns
                if likely and not prose:
                    self.names, self.axes, self.by_comma, self.commented = names, axes, by_comma, commented
        self.columns.update(columns)

    def columns_of(self, line: str, tokens: list[str], original: str) -> tuple[int, ...] | None:
        """The columns of x, y and z in the row `line`; none where no header tells."""
        for width in _row_widths(line, tokens):
            if width in self.columns:
                return self.columns[width]
        # R writes no name above the names of the rows, which alone are quoted.
        if len(tokens) - 1 in self.columns and re.match(r"""\s*(["']).*?\1[\s,]+[^\s"']""", original):
            return tuple(column + 1 for column in self.columns[len(tokens) - 1])
        if self.by_comma and "," in line and (max(self.axes) < len(tokens) or not self.commented):
            return self.axes
        return None

    def check_first_three(self, line: str, tokens: list[str]):
        """Refuses names that do not tell which columns are x, y and z."""
        advice = "name them x, y and z, or load the table yourself and pass an array (n, 3)"
        if self.axes != (0, 1, 2) and max(self.axes) < len(tokens):
            raise ValueError(
                f"its header has the {len(self.names)} names {self.names}, expected one for each of {len(tokens)} "
                f"columns; {advice}"
            )
        for width in _row_widths(line, tokens):
            if width > 3 and width in self.foreign:
                raise ValueError(
                    f"its columns are named {self.foreign[width]}, expected x, y and z among them; {advice}"
                )


def _widths(tokens: list[str]) -> tuple[int, ...]:
    """The number of columns, with and without empty ones at the end."""
    filled = len(tokens)
    while filled and not tokens[filled - 1]:
        filled -= 1
    return tuple(dict.fromkeys((len(tokens), filled)))


def _row_widths(line: str, tokens: list[str]) -> tuple[int, ...]:
    """As `_widths`, and the number of columns before a `#`, which is a comment or a colour."""
    bare = line.partition("#")[0].strip().split("," if "," in line else None)
    return tuple(dict.fromkeys((*_widths(tokens), *_widths(bare))))


def _find_axes(names: list[str]) -> tuple[int, ...] | None:
    """The columns of x, y and z, all three named in one manner, if in several then the plainest."""
    manners: dict[tuple[str, str], dict[str, int]] = {}
    for column, name in enumerate(names):
        match = _AXIS.fullmatch(name.lower())
        if match is not None:
            before, axis, after, before_digit, digit = match.groups(default="")
            axis = axis or "xyz"[int(digit)]
            manners.setdefault((before + before_digit, after), {}).setdefault(axis, column)
    complete = [manner for manner, columns in manners.items() if len(columns) == 3]
    if not complete:
        return None
    columns = manners[min(complete, key=lambda manner: manner != ("", ""))]
    return tuple(columns[axis] for axis in "xyz")


def _have_triple(names: list[str]) -> bool:
    """Whether three names differ in x, y and z only, as `nx`, `ny` and `nz` do."""
    known = {name.lower() for name in names}
    return any({name[:-1] + axis for axis in "xyz"} <= known for name in known if name)


def _are_numbers(tokens: list[str], columns: tuple[int, ...]) -> bool:
    try:
        return all(float(tokens[column]) is not None for column in columns)
    except (ValueError, IndexError):
        return False


def _read_off(text: str) -> tuple[np.ndarray, np.ndarray]:
    """
    Vertices `(v, 3)` and triangles `(f, 3)` of an OFF file; faces of more corners become fans, colours are left out.

    Of a torn file trimesh returns what there is, and version 5.2 reads no faces of five corners and more.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    header = _OFF_HEADER.match(text)
    if header is None:
        raise ValueError(f"it begins with {text.lstrip()[:20]!r}, expected OFF and two counts")
    num_vertices, num_faces = int(header[1]), int(header[2])
    lines = [line.partition("#")[0].strip() for line in text[header.end() :].splitlines()]
    lines = [line for line in lines if line]
    if len(lines) < num_vertices + num_faces:
        raise ValueError(
            f"it is torn: {len(lines)} lines follow a header that promises {num_vertices} vertices and "
            f"{num_faces} faces"
        )
    vertices = np.loadtxt(lines[:num_vertices], usecols=(0, 1, 2), ndmin=2) if num_vertices else np.empty((0, 3))
    triangles = []
    for line in lines[num_vertices : num_vertices + num_faces]:
        count, *corners = line.split()
        if int(count) < 0:
            raise ValueError(f"a face begins with {count}, expected its number of corners")
        if len(corners) < int(count):
            raise ValueError(f"it is torn: a face of {count} corners has {len(corners)}")
        corners = list(map(int, corners[: int(count)]))
        triangles += [(corners[0], *edge) for edge in zip(corners[1:], corners[2:], strict=False)]
    return vertices, np.array(triangles, dtype=np.int64).reshape(-1, 3)


def _as_points(item: Any, name: str) -> np.ndarray:
    """A float array `(n, 3)` from an array, a tensor or a nested list."""
    if isinstance(item, torch.Tensor):
        item = item.detach().cpu()
        item = (item if item.dtype != torch.bfloat16 else item.float()).numpy()
    elif not isinstance(item, np.ndarray) and not _is_sequence(item):
        raise TypeError(f"{name} is of type {type(item).__name__}, expected {_EXPECTED}.")
    try:
        points = np.asarray(item)
    except ValueError as error:
        raise ValueError(f"{name} is no table of numbers: {error}") from error
    if points.size == 0:
        return np.empty((0, 3))
    if points.dtype.kind not in "fiu":
        raise ValueError(f"{name} has dtype {points.dtype}, expected real numbers.")
    if points.ndim != 2 or points.shape[1] < 3:
        raise ValueError(f"{name} has shape {points.shape}, expected (n, 3) or wider.")
    points = points[:, :3]
    return points if points.dtype in (np.float32, np.float64) else points.astype(np.float64)


def _check_values(points: np.ndarray, name: str):
    inside = np.abs(points) <= _FLOAT32.max  # false for NaN too
    if inside.all():
        return
    num_bad = points.size - np.isfinite(points).sum()
    if num_bad:
        raise ValueError(f"{name} holds {num_bad} non-finite values, expected none.")
    raise ValueError(f"{name} holds {(~inside).sum()} values outside the range of float32.")


# ---- Surfaces


def _mesh_arrays(item: Any, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """
    Vertices `(v, 3)` and faces `(f, 3)` of a trimesh object; no faces for a point cloud.

    The meshes of a scene are put in their places and joined; points beside them are left out.
    """
    parts = item.dump() if hasattr(item, "dump") else [item]
    meshes = [part for part in parts if len(getattr(part, "faces", ())) > 0]
    if not meshes:
        # Drawings (paths) have vertices too, but these are no samples of a shape.
        clouds = [part for part in parts if not hasattr(part, "entities") and len(getattr(part, "vertices", ())) > 0]
        if not clouds:
            raise ValueError(f"{name} is a mesh without faces and without points.")
        return np.concatenate([np.asarray(cloud.vertices, dtype=np.float64) for cloud in clouds]), None
    vertices = [np.asarray(mesh.vertices, dtype=np.float64) for mesh in meshes]
    first = np.cumsum([0, *map(len, vertices[:-1])])
    faces = [np.asarray(mesh.faces) + offset for mesh, offset in zip(meshes, first, strict=True)]
    return np.concatenate(vertices), np.concatenate(faces)


def _sample_surface(vertices: np.ndarray, faces: np.ndarray, num_points: int, seed: int, name: str) -> np.ndarray:
    """Points `(num_points, 3)` on triangles, uniform by area."""
    _check_values(vertices, name)
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(f"{name} has faces on vertices {faces.min()} to {faces.max()} of {len(vertices)}.")
    corner = vertices[faces[:, 0]]
    first, second = vertices[faces[:, 1]] - corner, vertices[faces[:, 2]] - corner
    area = np.linalg.norm(np.cross(first, second), axis=1)
    if not area.sum() > 0:
        raise ValueError(f"{name} is a mesh of {len(faces)} faces without area.")
    rng = np.random.default_rng(seed)
    face = rng.choice(len(faces), num_points, p=area / area.sum())
    u, v = rng.random((2, num_points, 1))
    # The half of the parallelogram beyond the triangle is folded back onto it.
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    return corner[face] + u * first[face] + v * second[face]


# ---- Sampling and normalisation


def _sample(clouds: list[np.ndarray], num_points: int, sampling: str, seed: int) -> list[np.ndarray]:
    """Indices of the points to keep of each cloud. Clouds of one size are sampled together, with the same result."""
    members: dict[int, list[int]] = {}
    for i, cloud in enumerate(clouds):
        members.setdefault(len(cloud), []).append(i)
    indices: list[np.ndarray] = [np.empty(0, np.int64)] * len(clouds)
    for size, group in members.items():
        if sampling == "none" or size <= num_points:
            chosen = [np.arange(size)] * len(group)
        elif sampling == "random":
            subset = np.random.default_rng(seed).choice(size, num_points, replace=False)
            chosen = [subset] * len(group)
        else:
            chosen = _farthest_indices(np.stack([clouds[i] for i in group]), num_points)
        for i, index in zip(group, chosen, strict=True):
            indices[i] = index
    return indices


def _farthest_indices(points: np.ndarray, num_points: int) -> np.ndarray:
    """Farthest point sampling, `(b, n, 3)` to `(b, num_points)`; centred first, as it runs in float32."""
    points = points.astype(np.float64)
    offsets = points - points.mean(1, keepdims=True)
    exponent = np.frexp(np.abs(offsets).max((1, 2)))[1]
    extreme = np.abs(exponent) > _SAFE_EXPONENT
    if extreme.any():  # powers of two change no digit
        offsets[extreme] = np.ldexp(offsets[extreme], -exponent[extreme, None, None])
    return farthest_point_sample(torch.from_numpy(offsets.astype(np.float32)), num_points).numpy()


def _normalize(
    clouds: list[np.ndarray], names: list[str], do_normalize: bool
) -> tuple[Sequence[np.ndarray], np.ndarray, np.ndarray]:
    """Clouds `(n, 3)` in float32, with their float64 centres `(b, 3)` and radii `(b,)`."""
    if len(set(map(len, clouds))) > 1:  # padding only comes after, so that it does not change a digit
        singles = [_normalize([cloud], [name], do_normalize) for cloud, name in zip(clouds, names, strict=True)]
        values, centers, scales = zip(*singles, strict=True)
        return [value[0] for value in values], np.concatenate(centers), np.concatenate(scales)
    # With the points along the last axis numpy reduces several times faster than along axis 1 of `(b, n, 3)`.
    points = np.stack([cloud.T for cloud in clouds]).astype(np.float64, order="C")  # (b, 3, n)
    flat = (points.max(2) - points.min(2)).max(1) < _FLOAT32.tiny
    if flat.any():
        raise ValueError(f"{names[flat.argmax()]} has no extent: all {points.shape[2]} sampled points are equal.")
    center, scale = np.zeros(points.shape[:2]), np.ones(len(points))
    if do_normalize:
        center = points.mean(2)
        points -= center[:, :, None]
        scale = np.sqrt(np.square(points).sum(1).max(1))
        points /= scale[:, None, None]
    return points.transpose(0, 2, 1).astype(np.float32, order="C"), center, scale


def _pad(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Arrays `(n, ...)` to `(b, length, ...)`. Padding repeats the array, so it is nothing foreign to any reader."""
    if isinstance(rows, np.ndarray) and rows.shape[1] == length:
        return rows
    return np.stack([row[np.arange(length) % len(row)] for row in rows])
