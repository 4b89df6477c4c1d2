"""Joint-MAE and its peers, each ready for a training step and for features, in its own published configuration.

Nothing of the peers' code is in this repository. Whoever measures them brings it:

    git clone https://github.com/Pang-Yatian/Point-MAE       # --point_mae FOLDER
    git clone https://github.com/ZrrSkywalker/Point-M2AE     # --point_m2ae FOLDER
    pip install --no-deps --target FOLDER torch-pointcloud==0.0.18 torch-geometric h5py xxhash  # --torch_pointcloud

Instead of their CUDA extensions they get the functions of this package: sampling, neighbours and Chamfer distance cost
them no more than us, so that the models are compared. With `plain` they get what is usual in plain torch, as who has
nothing but their repositories would write it. timm, easydict and termcolor shrink to the names in use. Two peers call
their packages `models` and `utils`, and some of the names are taken from torch itself, so that each peer needs a
process of its own.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from jointmae_hf import JointMAEConfig, JointMAEForPreTraining
from jointmae_hf.geometry_joint_mae import chamfer_distance, farthest_point_sample, knn
from jointmae_hf.modeling_joint_mae import JointMAEDropPath


@dataclass
class Contender:
    """
    A model with what a benchmark asks of it.

    Args:
        model: what is trained.
        sample: a batch of inputs.
        loss: of a batch, in training mode.
        features: of a batch without masks, pooled, in evaluation mode.
    """

    model: nn.Module
    sample: Callable[[int], torch.Tensor]
    loss: Callable[[torch.Tensor], torch.Tensor]
    features: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Geometry:
    """
    What takes the place of CUDA extensions.

    Args:
        sample: indices `(batch, num_samples)` of farthest points, given points and how many.
        neighbors: indices `(batch, num_queries, k)`, given queries, points and k.
        chamfer: squared Chamfer distance `(batch,)` of two batches of sets.
    """

    sample: Callable[[torch.Tensor, int], torch.Tensor]
    neighbors: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
    chamfer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def clouds(batch_size: int, num_points: int) -> torch.Tensor:
    """Points on ellipsoids `(batch, num_points, 3)`, in the unit sphere."""
    generator = torch.Generator().manual_seed(0)
    directions = nn.functional.normalize(torch.randn(batch_size, num_points, 3, generator=generator), dim=-1)
    return directions * torch.rand(batch_size, 1, 3, generator=generator).clamp_min(0.2)


def joint_mae(preset: str = "base", **overrides: Any) -> Contender:
    config = JointMAEConfig.from_preset(preset, **overrides)
    model = JointMAEForPreTraining(config)
    return Contender(
        model,
        lambda batch_size: clouds(batch_size, config.num_points),
        lambda points: model(points).loss,
        lambda points: model.joint_mae(points).pooler_output,
    )


def point_mae(folder: str, plain: bool = False) -> Contender:
    model = _official(folder, "models.Point_MAE", "Point_MAE", "cfgs/pretrain.yaml", plain)

    def features(points: torch.Tensor) -> torch.Tensor:
        tokens, _ = model.MAE_encoder(*model.group_divider(points), noaug=True)
        return tokens.mean(1) + tokens.amax(1)

    return Contender(model, lambda batch_size: clouds(batch_size, 1024), model, features)


def point_m2ae(folder: str, plain: bool = False) -> Contender:
    model = _official(folder, "models.Point_M2AE", "Point_M2AE", "cfgs/pre-training/point-m2ae.yaml", plain)
    return Contender(
        model, lambda batch_size: clouds(batch_size, 2048), model, lambda points: model(points, eval=True)
    )


def torch_pointcloud_mae(folder: str, plain: bool = False) -> Contender:
    models, losses = _torch_pointcloud(folder, plain)
    return _packed(
        models.PointMAEPretraining(0), models.PointMAEClassification(0, 0), losses.chamfer.ChamferDistance(), 1024
    )


def torch_pointcloud_m2ae(folder: str, plain: bool = False) -> Contender:
    models, losses = _torch_pointcloud(folder, plain)
    return _packed(
        models.PointM2AEPretraining(0), models.PointM2AEClassification(0, 0), losses.chamfer.ChamferDistance(), 2048
    )


def vit_mae(image_size: int = 224) -> Contender:
    """transformers' ViTMAE of the encoder's size: width 384, 12 blocks, 196 patches, 4 decoder blocks."""
    config = ViTMAEConfig(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=image_size,
        decoder_hidden_size=384,
        decoder_num_hidden_layers=4,
        decoder_num_attention_heads=6,
        decoder_intermediate_size=1536,
    )
    model = ViTMAEForPreTraining(config)

    def features(images: torch.Tensor) -> torch.Tensor:
        masked, config.mask_ratio = config.mask_ratio, 0.0
        try:
            return model.vit(images).last_hidden_state.mean(1)
        finally:
            config.mask_ratio = masked

    return Contender(
        model,
        lambda batch_size: torch.rand(batch_size, 3, image_size, image_size),
        lambda images: model(images).loss,
        features,
    )


def _official(folder: str, module: str, name: str, config: str, plain: bool) -> nn.Module:
    """A model built by its authors' class from their own configuration file."""
    _provide_stand_ins(PLAIN if plain else FAST)
    sys.path.insert(0, str(Path(folder).resolve()))
    settings = yaml.safe_load((Path(folder) / config).read_text())["model"]
    return getattr(importlib.import_module(module), name)(AttributeDict(settings))


def _torch_pointcloud(folder: str, plain: bool) -> tuple[ModuleType, ModuleType]:
    geometry = PLAIN if plain else FAST
    sys.path.insert(0, str(Path(folder).resolve()))
    cluster = importlib.import_module("torch_pointcloud.ops.cluster")
    cluster.pool.fps, cluster.pool.knn = partial(_packed_sampling, geometry), partial(_packed_neighbors, geometry)
    losses = importlib.import_module("torch_pointcloud.losses")
    return importlib.import_module("torch_pointcloud.models"), losses


def _packed(pretraining: nn.Module, encoder: nn.Module, criterion: nn.Module, num_points: int) -> Contender:
    """torch-pointcloud takes the points of a batch one cloud after another, and the cloud of each."""

    def pack(points: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        return None, points.flatten(0, 1), torch.arange(len(points)).repeat_interleave(points.shape[1])

    encoder.eval()
    return Contender(
        pretraining,
        lambda batch_size: clouds(batch_size, num_points),
        lambda points: criterion(*pretraining(*pack(points))),
        lambda points: encoder(*pack(points)),
    )


# ---- Stand-ins


class AttributeDict(dict):
    """easydict: nested settings by attribute."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__({key: AttributeDict(v) if isinstance(v, dict) else v for key, v in settings.items()})

    __getattr__ = dict.__getitem__


def plain_sample(points: torch.Tensor, num_samples: int) -> torch.Tensor:
    rows = torch.arange(len(points))
    distances, indices = torch.full(points.shape[:2], torch.inf), [torch.zeros(len(points), dtype=torch.long)]
    for _ in range(num_samples - 1):
        last = points[rows, indices[-1]].unsqueeze(1)
        distances = torch.minimum(distances, (points - last).square().sum(-1))
        indices.append(distances.argmax(-1))
    return torch.stack(indices, dim=1)


def plain_neighbors(queries: torch.Tensor, points: torch.Tensor, k: int) -> torch.Tensor:
    return torch.cdist(queries, points).topk(k, largest=False).indices


def plain_chamfer(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    predicted = predicted.float()
    squares = predicted.square().sum(-1, keepdim=True) + target.square().sum(-1).unsqueeze(1)
    distances = torch.baddbmm(squares, predicted, target.mT, alpha=-2)
    return distances.amin(2).mean(1) + distances.amin(1).mean(1)


FAST = Geometry(farthest_point_sample, knn, chamfer_distance)
PLAIN = Geometry(plain_sample, plain_neighbors, plain_chamfer)


class NearestNeighbors(nn.Module):
    """knn_cuda."""

    def __init__(self, geometry: Geometry, k: int, transpose_mode: bool = False):
        super().__init__()
        self.geometry, self.k = geometry, k

    def forward(self, points: torch.Tensor, queries: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, self.geometry.neighbors(queries, points, self.k)


class ChamferDistanceL2(nn.Module):
    """The Chamfer extension of both peers."""

    def __init__(self, geometry: Geometry):
        super().__init__()
        self.geometry = geometry

    def forward(self, predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.geometry.chamfer(predicted, target).mean()


def _gather(features: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """pointnet2_ops: `(batch, channels, points)` and `(batch, samples)` to `(batch, channels, samples)`."""
    return features.gather(2, indices.long().unsqueeze(1).expand(-1, features.shape[1], -1))


def _packed_sampling(
    geometry: Geometry, points: torch.Tensor, batch: torch.Tensor, ratio: float | None = None, **_: Any
) -> torch.Tensor:
    """torch-cluster's sampling, for clouds of equal size."""
    count = int(batch[-1]) + 1
    num_points = len(points) // count
    indices = geometry.sample(points.view(count, num_points, 3), round(ratio * num_points))
    return (indices + torch.arange(count).unsqueeze(1) * num_points).flatten()


def _packed_neighbors(
    geometry: Geometry,
    x: torch.Tensor,
    y: torch.Tensor,
    k: int,
    batch_x: torch.Tensor,
    batch_y: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """torch-cluster's neighbours, for clouds of equal size: rows of queries and of points."""
    count = int(batch_x[-1]) + 1
    num_points = len(x) // count
    indices = geometry.neighbors(y.view(count, -1, 3), x.view(count, num_points, 3), k)
    rows = torch.arange(len(y)).repeat_interleave(k)
    return torch.stack([rows, (indices + torch.arange(count).view(-1, 1, 1) * num_points).flatten()])


def _provide_stand_ins(geometry: Geometry):
    """Puts modules in the place of the extensions, and lets `.cuda()` inside the models stay on the CPU."""
    sampling = _module("pointnet2_ops.pointnet2_utils")
    sampling.furthest_point_sample, sampling.gather_operation = geometry.sample, _gather
    _module("pointnet2_ops").pointnet2_utils = sampling
    _module("knn_cuda").KNN = partial(NearestNeighbors, geometry)
    extension = _module("extensions.chamfer_dist")
    extension.ChamferDistanceL1 = extension.ChamferDistanceL2 = partial(ChamferDistanceL2, geometry)
    _module("extensions").chamfer_dist = extension
    layers = _module("timm.models.layers")
    layers.DropPath, layers.trunc_normal_ = JointMAEDropPath, nn.init.trunc_normal_
    _module("timm.models").layers = layers
    _module("timm").models = sys.modules["timm.models"]
    _module("easydict").EasyDict = AttributeDict
    _module("termcolor").colored = lambda text, *_, **__: text
    if not torch.cuda.is_available():
        nn.Module.cuda = torch.Tensor.cuda = lambda self, *_, **__: self


def _module(name: str) -> ModuleType:
    module = sys.modules[name] = ModuleType(name)
    module.__path__ = []
    return module


PEERS: dict[str, Callable[..., Contender]] = {
    "Joint-MAE": joint_mae,
    "Point-MAE": point_mae,
    "Point-M2AE": point_m2ae,
    "Point-MAE (torch-pointcloud)": torch_pointcloud_mae,
    "Point-M2AE (torch-pointcloud)": torch_pointcloud_m2ae,
    "ViTMAE": vit_mae,
}
