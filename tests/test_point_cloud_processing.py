"""The point cloud processor: every kind of input, what comes out of it, what it refuses, and how it is saved."""

import json
import logging
import os
import pickle
import subprocess
import sys
from collections import UserDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor, AutoProcessor

from jointmae_hf import JointMAEConfig, JointMAEForPreTraining, JointMAEPointCloudProcessor
from jointmae_hf.geometry_joint_mae import farthest_point_sample, gather_points, knn, project_depth, view_projection


SETTINGS = {"num_points": 64, "image_size": 32, "splat_size": 3, "num_centers": [16, 8], "num_neighbors": [8, 4]}


@pytest.fixture
def processor():
    return JointMAEPointCloudProcessor(**SETTINGS)


def cloud(size: int = 64, seed: int = 0, offset: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(size, 3)) * [1.0, 2.0, 0.5] + offset


def points_of(processor, given, **options) -> torch.Tensor:
    return processor(given, **options)["point_values"]


# ---- Arrays


@pytest.mark.parametrize(
    "convert",
    [
        np.float32,
        torch.from_numpy,
        lambda points: torch.from_numpy(points).requires_grad_(),
        np.ndarray.tolist,
        lambda points: tuple(map(tuple, points)),
        list,
        lambda points: np.hstack([points, np.full((64, 4), np.nan)]),
        lambda points: [points],
        lambda points: points[None],
        lambda points: torch.from_numpy(points)[None],
        lambda points: [points.tolist()],
        lambda points: {"points": points.tolist(), "label": 3},
        lambda points: [UserDict(points=points, label=3)],
        lambda points: {"points": [points], "label": [3]},
        lambda points: points.astype(">f8"),
        lambda points: np.asfortranarray(points),
    ],
)
def test_one_cloud_in_any_container_is_the_same_cloud(processor, convert):
    expected = points_of(processor, cloud())
    assert expected.shape == (1, 64, 3) and expected.dtype == torch.float32
    torch.testing.assert_close(points_of(processor, convert(cloud())), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32])
def test_narrow_dtypes_are_read_for_their_values(processor, dtype):
    points = torch.from_numpy(cloud() * 100).to(dtype)
    assert torch.equal(points_of(processor, points), points_of(processor, points.double()))


def test_many_clouds_come_out_in_order(processor):
    clouds = [cloud(seed=seed) for seed in range(3)]
    expected = torch.cat([points_of(processor, points) for points in clouds])
    for given in (
        clouds,
        np.stack(clouds),
        torch.from_numpy(np.stack(clouds)),
        [points.tolist() for points in clouds],
    ):
        assert torch.equal(points_of(processor, given), expected)


def test_a_cloud_does_not_depend_on_the_batch_it_is_in(processor):
    clouds = [cloud(size, seed) for seed, size in enumerate((64, 40, 500, 500, 64))]
    for sampling in ("random", "farthest"):
        together = points_of(processor, clouds, sampling=sampling)
        apart = torch.cat([points_of(processor, points, sampling=sampling) for points in clouds])
        assert torch.equal(together, apart)


def test_input_is_left_as_it_was(processor):
    given = cloud(100).astype(np.float32)
    before = given.copy()
    processor(given, do_normalize=False)["point_values"].add_(1)
    same_size = before[:64].copy()
    processor(same_size, do_normalize=False)["point_values"].add_(1)
    assert np.array_equal(given, before) and np.array_equal(same_size, before[:64])


# ---- Sampling


def test_a_large_cloud_gives_a_subset_without_repetition(processor):
    inputs = processor(cloud(500), return_indices=True)
    index = inputs["point_indices"][0]
    assert index.unique().numel() == 64
    assert torch.equal(inputs["point_values"], points_of(processor, cloud(500)[index]))


@pytest.mark.parametrize("sampling", ["random", "farthest"])
def test_a_small_cloud_keeps_every_point_and_the_rest_is_masked(processor, sampling):
    settings = {"sampling": sampling, "return_groups": True, "do_project": True}
    inputs = processor([cloud(25), cloud(64, 1)], return_indices=True, **settings)
    assert inputs["point_values"].shape == (2, 64, 3)
    assert inputs["point_mask"].sum(1).tolist() == [25, 64]
    assert inputs["point_indices"][0].tolist() == [*range(25), *range(25), *range(14)]
    whole = processor(cloud(25), **{**settings, "sampling": "none"})
    alone = processor(cloud(25), **settings)
    assert alone["point_values"].shape == (1, 64, 3) and alone["point_mask"].sum() == 25
    for name in ("pixel_values", "projection", "center_indices", "neighbor_indices_0", "neighbor_indices_1"):
        assert torch.equal(inputs[name][:1], whole[name]), name
        assert torch.equal(alone[name], whole[name]), name
    assert torch.equal(inputs["point_values"][:1, :25], whole["point_values"])
    assert "point_mask" not in processor([cloud(64), cloud(500)], sampling=sampling)
    # Padding is the cloud from its beginning, whatever is beside it, and indices say which point.
    short = processor([cloud(25), cloud(40, 1)], return_indices=True, **settings)
    assert torch.equal(short["point_values"][:1], alone["point_values"])
    index = short["point_indices"][:1, :, None].expand(-1, -1, 3)
    assert torch.equal(short["point_values"][:1], whole["point_values"].gather(1, index))


def test_a_cloud_of_the_right_size_keeps_its_order(processor):
    for sampling in ("random", "farthest", "none"):
        assert processor(cloud(), sampling=sampling, return_indices=True)["point_indices"][0].tolist() == [*range(64)]


def test_the_seed_alone_decides_the_subset(processor):
    first = points_of(processor, cloud(500))
    torch.rand(1), np.random.rand(1)
    assert torch.equal(points_of(processor, cloud(500)), first)
    assert torch.equal(points_of(JointMAEPointCloudProcessor(**SETTINGS, seed=7), cloud(500), seed=0), first)
    assert not torch.equal(points_of(processor, cloud(500), seed=1), first)


def test_farthest_sampling_is_that_of_the_geometry(processor):
    offset = 5e5  # where float32 knows steps of 3 cm only
    index = processor(cloud(500, offset=offset), sampling="farthest", return_indices=True)["point_indices"]
    points = cloud(500) - cloud(500).mean(0)
    assert torch.equal(index, farthest_point_sample(torch.from_numpy(points)[None].float(), 64))


def test_no_sampling_pads_and_masks(processor):
    clouds = [cloud(size, seed) for seed, size in enumerate((30, 90, 50))]
    inputs = processor(clouds, sampling="none", return_indices=True, return_groups=True, do_project=True)
    assert inputs["point_values"].shape == (3, 90, 3)
    assert inputs["point_mask"].sum(1).tolist() == [30, 90, 50]
    for i, points in enumerate(clouds):
        alone = processor(points, sampling="none", return_groups=True, do_project=True)
        assert alone["point_mask"].all()
        assert torch.equal(inputs["point_values"][i, : len(points)], alone["point_values"][0])
        assert torch.equal(inputs["pixel_values"][i], alone["pixel_values"][0])
        assert torch.equal(inputs["center_indices"][i], alone["center_indices"][0])
        assert torch.equal(inputs["neighbor_indices_0"][i], alone["neighbor_indices_0"][0])


def test_num_points_of_a_call_replaces_the_attribute(processor):
    assert points_of(processor, [cloud(500), cloud(50)], num_points=100).shape == (2, 100, 3)
    assert processor.num_points == 64


@pytest.mark.parametrize(("size", "kind", "ratio"), [(1100, "dense", "17.19"), (30, "sparse", "0.47")])
def test_unusual_density_is_reported_once_with_its_numbers(processor, size, kind, ratio):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("jointmae_hf.point_cloud_processing_joint_mae")
    logger.addHandler(handler)
    try:
        processor([cloud(1024), cloud(32)])
        assert messages == []
        for _ in range(2):
            processor([cloud(), cloud(size), cloud(size)])
    finally:
        logger.removeHandler(handler)
    assert len(messages) == 1
    assert f"point_clouds[1] holds {size} points, {ratio} times the 64" in messages[0] and kind in messages[0]


# ---- Normalisation


@pytest.mark.parametrize("size", [30, 64, 500])
def test_clouds_are_centred_and_in_the_unit_sphere(processor, size):
    points = points_of(processor, cloud(size, offset=40.0)).double()[:, :size]  # the rest is padding
    assert points.mean(1).abs().max() < 1e-7
    assert points.norm(dim=-1).max() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("sampling", ["random", "farthest", "none"])
def test_center_and_scale_lead_back_to_the_units_given(processor, sampling):
    clouds = [cloud(64, offset=100.0) * 3, cloud(80, seed=1)]
    options = {"sampling": sampling, "return_normalization": True, "return_indices": True}
    inputs = processor(clouds, **options)
    assert inputs["center"].shape == (2, 3) and inputs["scale"].shape == (2,)
    back = inputs["point_values"] * inputs["scale"][:, None, None] + inputs["center"][:, None]
    for i, points in enumerate(clouds):
        np.testing.assert_allclose(back[i], points[inputs["point_indices"][i]], atol=2e-6)


def test_large_coordinates_keep_their_digits(processor):
    near = points_of(processor, cloud())
    for given in (cloud(offset=5e5), torch.from_numpy(cloud(offset=5e5)), cloud(offset=5e5).tolist()):
        torch.testing.assert_close(points_of(processor, given), near, atol=1e-7, rtol=0)
    inputs = processor(cloud(offset=5e5), return_normalization=True)
    back = inputs["point_values"] * inputs["scale"] + inputs["center"]
    np.testing.assert_allclose(back[0], cloud(offset=5e5), atol=1e-6)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_the_unit_of_length_does_not_matter(processor, factor):
    torch.testing.assert_close(points_of(processor, cloud() * factor), points_of(processor, cloud()))


@pytest.mark.parametrize("sampling", ["random", "farthest"])
@pytest.mark.parametrize("exponent", [-100, -70, 70, 120])
def test_extreme_units_change_no_digit(processor, sampling, exponent):
    clouds = [cloud(500).astype(np.float32), cloud(500, 1).astype(np.float32)]
    expected = points_of(processor, clouds, sampling=sampling)
    given = [np.ldexp(clouds[0], exponent), clouds[1]]
    assert torch.equal(points_of(processor, given, sampling=sampling), expected)


def test_without_normalisation_coordinates_are_only_cast(processor):
    inputs = processor(cloud(offset=9.0), do_normalize=False, return_normalization=True)
    assert torch.equal(inputs["point_values"][0], torch.from_numpy(cloud(offset=9.0)).float())
    assert inputs["center"].tolist() == [[0, 0, 0]] and inputs["scale"].tolist() == [1]


# ---- Projection and groups


@pytest.mark.parametrize("view", [1, [2, 0], torch.tensor([2, 0])])
def test_projection_is_that_of_the_geometry(processor, view):
    inputs = processor([cloud(), cloud(80, 1)], do_project=True, view=view)
    views = torch.as_tensor(view).expand(2)
    projection = view_projection(inputs["point_values"], views, 32)
    assert torch.equal(inputs["projection"], projection)
    assert torch.equal(inputs["pixel_values"], project_depth(inputs["point_values"], projection, 32, 3))
    assert inputs["pixel_values"].shape == (2, 1, 32, 32) and inputs["pixel_values"].max() == 1


def test_groups_are_those_of_the_geometry(processor):
    inputs = processor([cloud(), cloud(80, 1)], return_groups=True)
    points = inputs["point_values"]
    index = farthest_point_sample(points, 16)
    centers = gather_points(points, index)
    assert torch.equal(inputs["center_indices"], index)
    assert torch.equal(inputs["neighbor_indices_0"], knn(centers, points, 8))
    assert torch.equal(inputs["neighbor_indices_1"], knn(centers[:, :8], centers, 4))


@pytest.mark.parametrize("attributes", [{}, {"do_project": True}, {"sampling": "none"}])
def test_model_input_names_are_what_a_call_returns(attributes):
    processor = JointMAEPointCloudProcessor(**SETTINGS, **attributes)
    assert list(processor(cloud())) == processor.model_input_names


def test_numpy_output_holds_the_same_values(processor):
    options = {"do_project": True, "return_groups": True, "return_normalization": True, "return_indices": True}
    tensors, arrays = processor(cloud(), **options), processor(cloud(), return_tensors="np", **options)
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        assert isinstance(array, np.ndarray) and np.array_equal(array, tensors[name])


# ---- Reconstruction


@pytest.fixture
def reconstruction(processor):
    """Two clouds of a model with 8 tokens and 4 x 4 patches, of which 6 and 12 are masked."""
    inputs = processor([cloud(), cloud(80, 1)], do_project=True, return_normalization=True)
    generator = torch.Generator().manual_seed(0)
    centers = inputs["point_values"][:, :8]
    masked_tokens = torch.stack([torch.randperm(8, generator=generator)[:6] for _ in range(2)])
    masked_patches = torch.stack([torch.randperm(16, generator=generator)[:12] for _ in range(2)])
    outputs = SimpleNamespace(
        centers=centers,
        mask_3d=torch.zeros(2, 8).scatter(1, masked_tokens, 1.0),
        masked_patches=masked_patches,
        reconstructed_points=torch.rand(2, 6, 5, 3, generator=generator),
        reconstructed_patches=torch.rand(2, 12, 64, generator=generator),
        pixel_values=inputs["pixel_values"],
    )
    return inputs, outputs


def test_reconstruction_joins_visible_and_reconstructed_points(processor, reconstruction):
    inputs, outputs = reconstruction
    results = processor.post_process_reconstruction(outputs, inputs["point_values"])
    for i, result in enumerate(results):
        nearest = torch.cdist(inputs["point_values"][i], outputs.centers[i]).argmin(1)
        visible = inputs["point_values"][i][outputs.mask_3d[i][nearest] == 0]
        assert torch.equal(result["visible_points"], visible) and 0 < len(visible) < 64
        assert torch.equal(result["points"], torch.cat([visible, outputs.reconstructed_points[i].flatten(0, 1)]))


def test_reconstruction_leaves_padding_out_and_returns_to_the_units_given(processor, reconstruction):
    inputs, outputs = reconstruction
    whole = processor.post_process_reconstruction(outputs, inputs["point_values"])
    mask = torch.arange(64).expand(2, 64) < 40
    cut = processor.post_process_reconstruction(outputs, inputs["point_values"][:, :40])
    masked = processor.post_process_reconstruction(outputs, inputs["point_values"], mask)
    units = {name: inputs[name] for name in ("center", "scale")}
    scaled = processor.post_process_reconstruction(outputs, inputs["point_values"], **units)
    for i in range(2):
        assert torch.equal(masked[i]["points"], cut[i]["points"])
        assert torch.equal(scaled[i]["points"], whole[i]["points"] * inputs["scale"][i] + inputs["center"][i])
    with pytest.raises(ValueError, match="`scale` is None"):
        processor.post_process_reconstruction(outputs, inputs["point_values"], center=inputs["center"])


@pytest.mark.parametrize("norm_pixel_loss", [False, True])
def test_reconstruction_fills_the_masked_patches_of_the_image(processor, reconstruction, norm_pixel_loss):
    inputs, outputs = reconstruction
    results = processor.post_process_reconstruction(outputs, inputs["point_values"], norm_pixel_loss=norm_pixel_loss)
    for i, result in enumerate(results):
        expected = inputs["pixel_values"][i, 0].clone()
        for patch, values in zip(outputs.masked_patches[i].tolist(), outputs.reconstructed_patches[i], strict=True):
            row, column = divmod(patch, 4)
            target = expected[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
            values = values.view(8, 8)
            if norm_pixel_loss:
                values = values * (target.var() + 1e-6).sqrt() + target.mean()
            target.copy_(values)
        torch.testing.assert_close(result["depth"], expected)


@pytest.mark.parametrize("use_image_branch", [True, False])
def test_reconstruction_takes_what_the_model_returns(use_image_branch):
    config = JointMAEConfig(
        **SETTINGS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        point_embed_sizes=[8, 16],
        patch_strides=[4, 2],
        image_embed_sizes=[8, 16],
        decoder_hidden_size=16,
        decoder_num_attention_heads=2,
        num_target_points=8,
        use_image_branch=use_image_branch,
    )
    processor = JointMAEPointCloudProcessor.from_config(config, do_project=use_image_branch)
    inputs = processor([cloud(), cloud(80, 1)])
    with torch.no_grad():
        outputs = JointMAEForPreTraining(config).eval()(**inputs)
    for i, result in enumerate(processor.post_process_reconstruction(outputs, inputs["point_values"])):
        assert len(result["reconstructed_points"]) == 6 * 8
        assert ("depth" in result) is use_image_branch
        if use_image_branch:
            same = result["depth"] == inputs["pixel_values"][i, 0]
            per_patch = same.view(4, 8, 4, 8).transpose(1, 2).flatten(2).all(-1).flatten()
            assert torch.equal(per_patch, outputs.mask_2d[i] == 0)


# ---- Files


def write_text(header: str = "", delimiter: str = " ", columns=(0, 1, 2), **options):
    def write(path, points):
        table = np.hstack([points, np.arange(len(points))[:, None]])[:, [*columns, 3]]
        np.savetxt(path, table, header=header, delimiter=delimiter, comments="", fmt="%.17g", **options)

    return write


TEXT_FILES = {
    "plain.xyz": write_text(),
    "tab.txt": write_text(delimiter="\t"),
    "count.pts": write_text(header="64"),
    "comma.csv": write_text(delimiter=","),
    "comma_space.txt": write_text(delimiter=", "),
    "header.csv": write_text(header='"x","y","z","label"', delimiter=","),
    "order.csv": write_text(header="Z,X,Y,label", delimiter=",", columns=(2, 0, 1)),
    "cloudcompare.txt": write_text(header="//X Y Z Label"),
    "comments.xyz": write_text(header="# 1 2 3\n\n// made by hand"),
    "bom.csv": write_text(header="x,y,z,label", delimiter=",", encoding="utf-8-sig"),
}
ARRAY_FILES = {
    "array.npy": lambda path, points: np.save(path, points),
    "single.npz": lambda path, points: np.savez(path, anything=points),
    "named.npz": lambda path, points: np.savez_compressed(path, labels=np.zeros(64), points=points),
    "CAPITAL.NPY": lambda path, points: np.save(path.open("wb"), points),
}


@pytest.mark.parametrize("name", [*TEXT_FILES, *ARRAY_FILES])
def test_files_of_points(processor, tmp_path, name):
    path = tmp_path / name
    {**TEXT_FILES, **ARRAY_FILES}[name](path, cloud())
    expected = points_of(processor, cloud())
    assert torch.equal(points_of(processor, path), expected)
    assert torch.equal(points_of(processor, [str(path), cloud()]), expected.expand(2, -1, -1))


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("# columns: x y z nx ny nz", "{0} {1} {2} 7 8 9"),
        ("# columns: nx ny nz x y z", "7 8 9 {0} {1} {2}"),
        ("# columns: x y z", "{0} {1} {2}"),
        ("points in x y z order", "{0} {1} {2}"),
        ("points in x y z order", "{0} {1} {2} 7 8 9"),
        ("# Cloud with x y z and colour", "{0} {1} {2} 255 0 0"),
        ("# made by hand today", "{0} {1} {2} 4"),
        ("nx ny nz x y z", "7 8 9 {0} {1} {2}"),
        (",x,y,z", "7,{0},{1},{2}"),
        ("x,y,z", "{0},{1},{2},"),
        ("id,x,y,z", "7,{0},{1},{2},9"),
        ("id,x [m],y [m],z [m]", "7,{0},{1},{2}"),
        ("id x(mm) y(mm) z(mm)", "7 {0} {1} {2}"),
        ('"id","X.m","Y.m","Z.m"', "7,{0},{1},{2}"),
        ("nx,ny,nz,x_m,y_m,z_m", "7,8,9,{0},{1},{2}"),
        ("vx vy vz pos_x pos_y pos_z", "7 8 9 {0} {1} {2}"),
        ("OID,POINT_X,POINT_Y,POINT_Z", "7,{0},{1},{2}"),
        ('"Normals:0","Normals:1","Normals:2","Points:0","Points:1","Points:2"', "7,8,9,{0},{1},{2}"),
        ("//Nx Ny Nz X Y Z", "7 8 9 {0} {1} {2}"),
        ("id\tx coord\ty coord\tz coord", "7\t{0}\t{1}\t{2}"),
        ('"x","y","z"', '"{0}","{1}","{2}"'),
        ('"name","x","y","z"', '"bolt, 3 mm #2",{0},{1},{2}'),
        ('"x" "y" "z"', '"7" {0} {1} {2}'),  # R names the rows, without a name above
        ("'x' 'y' 'z' 'c'", "{0} {1} {2} '#ff0000'"),
        ("Name;X;Y;Z", "bolt;{0};{1},0;{2}"),  # the comma is a decimal point
        ("id;x [m];y [m];z [m];", "7;{0}.0;{1}.0;{2}.0;"),
        ('"";"x";"y";"z"', '"7";{0},00;{1};{2}'),
        ('"x";"y";"z"', '"{0}";"{1},0";"{2}"'),
        ("label,x,y,z", "7;{0};{1};{2}"),
        ("x,y,z,rgba", "{0},{1},{2},255;0;128;255"),
        ("name,x,y,z,rgba", "bolt,{0},{1},{2},255;0;128;255"),
        ("x y z colour", "{0} {1} {2} 255;0;128;255"),
    ],
)
def test_the_header_of_a_text_file_tells_the_columns(processor, tmp_path, header, row):
    expected = [[2 * i, i * i, -i] for i in range(8)]
    lines = [header, *(row.format(*point) for point in expected)]
    path = tmp_path / "cloud.txt"
    path.write_text("\n".join(lines))
    assert points_of(processor, path, sampling="none", do_normalize=False)[0].tolist() == expected


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("id,px,py,pz", "7,1,2,3", r"columns are named \['id', 'px', 'py', 'pz'\], expected x, y and z among them"),
        ("# nx ny nz label", "1 2 3 4", r"columns are named \['nx', 'ny', 'nz', 'label'\], expected x, y and z"),
        (",0,1,2", "7,1,2,3", r"columns are named \['', '0', '1', '2'\], expected x, y and z"),
        (
            "id x y z",
            "7 1 2 3 9",
            r"header has the 4 names \['id', 'x', 'y', 'z'\], expected one for each of 5 columns",
        ),
        ("id,x,y,z", "1,2,3,", "could not convert string ''"),  # the first row lacks z
        ("x y z", "1,5 2,5 3,5", "no line with three numbers, written with a point"),
        ("x;y;z", "1.234,5;2,5;3,5", "no line with three numbers"),
        ("x;y;z", "1;2;3\n;;", "could not convert string ''"),  # rows that a table leaves below
        ("a;b;c;d", "1,5;2,5;3,5;4", r"columns are named \['a', 'b', 'c', 'd'\], expected x, y and z"),
    ],
)
def test_columns_of_a_text_file_are_not_guessed_against_its_header(processor, tmp_path, header, row, message):
    path = tmp_path / "cloud.txt"
    path.write_text("\n".join([header, *[row] * 8]))
    with pytest.raises(ValueError, match=rf"cloud.txt'\) cannot be read: .*{message}"):
        processor(path)


def test_a_column_that_counts_the_rows_is_not_taken_for_x(processor, tmp_path):
    path = tmp_path / "cloud.csv"
    path.write_text("\n".join(f"{number},{number % 3},2.5,1" for number in range(20)))
    with pytest.raises(ValueError, match="its first column counts the rows, and no header says"):
        processor(path)


def test_comments_may_stand_between_the_rows_of_a_text_file(processor, tmp_path):
    rows = [" ".join(map(repr, point)) for point in cloud().tolist()]
    path = tmp_path / "cloud.txt"
    path.write_text("\n".join([*rows[:9], "// second scan", "# by hand", "", *rows[9:]]))
    assert torch.equal(points_of(processor, path), points_of(processor, cloud()))


@pytest.mark.parametrize("suffix", ["ply", "glb", "obj"])
def test_point_clouds_in_mesh_formats(processor, tmp_path, suffix):
    trimesh = pytest.importorskip("trimesh")
    path = tmp_path / f"cloud.{suffix}"
    trimesh.PointCloud(cloud(), colors=np.full((64, 4), 99, np.uint8)).export(path)
    torch.testing.assert_close(points_of(processor, path), points_of(processor, cloud()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("suffix", ["ply", "obj", "stl", "off", "glb", "gltf"])
def test_meshes_in_files_are_sampled_on_their_surface(processor, tmp_path, suffix):
    trimesh = pytest.importorskip("trimesh")
    path = tmp_path / f"box.{suffix}"
    if suffix == "gltf":  # a file and the buffers beside it
        for name, content in trimesh.exchange.gltf.export_gltf(trimesh.Scene(trimesh.creation.box())).items():
            (tmp_path / name.replace("model.gltf", path.name)).write_bytes(content)
    else:
        trimesh.creation.box().export(path)
    points = points_of(processor, path, do_normalize=False)[0]
    assert points.shape == (64, 3)
    torch.testing.assert_close(points.abs().amax(1), torch.full((64,), 0.5))


# ---- Meshes


def test_surface_samples_are_uniform_by_area(processor):
    trimesh = pytest.importorskip("trimesh")
    # Two triangles of areas 1 and 3 on either side of x = 0; inside each, the mean of uniform samples is its centroid.
    vertices = [[0, 0, 0], [-1, 0, 0], [0, 2, 0], [3, 0, 0]]
    mesh = trimesh.Trimesh(vertices, [[0, 1, 2], [0, 3, 2]], process=False)
    points = points_of(processor, mesh, num_points=20000, do_normalize=False)[0]
    left = points[:, 0] < 0
    assert left.float().mean().item() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(points[left].mean(0), torch.tensor([-1 / 3, 2 / 3, 0]), atol=0.03, rtol=0)
    torch.testing.assert_close(points[~left].mean(0), torch.tensor([1, 2 / 3, 0]), atol=0.03, rtol=0)


@pytest.mark.parametrize("sampling", ["random", "farthest", "none"])
def test_surface_samples_depend_on_the_seed_only(processor, sampling):
    trimesh = pytest.importorskip("trimesh")
    box = trimesh.creation.box(extents=(1, 2, 3))
    first = points_of(processor, box, sampling=sampling)
    assert first.shape == (1, 64, 3)
    assert torch.equal(points_of(processor, [cloud(), box], sampling=sampling)[1:], first)
    assert not torch.equal(points_of(processor, box, sampling=sampling, seed=1), first)


def test_farthest_sampling_spreads_over_a_surface(processor):
    trimesh = pytest.importorskip("trimesh")
    gaps = {}
    for sampling in ("random", "farthest"):
        points = points_of(processor, trimesh.creation.icosphere(), sampling=sampling)[0]
        gaps[sampling] = (torch.cdist(points, points) + 9 * torch.eye(64)).amin(1).min().item()
    assert gaps["farthest"] > 3 * gaps["random"]


def test_scenes_put_their_meshes_in_place(processor):
    trimesh = pytest.importorskip("trimesh")
    scene = trimesh.Scene(trimesh.creation.box())
    scene.add_geometry(trimesh.creation.box(), transform=trimesh.transformations.translation_matrix([10, 0, 0]))
    scene.add_geometry(trimesh.PointCloud(cloud(offset=100.0)))
    scene.add_geometry(trimesh.load_path([[[50, 50, 50], [60, 60, 60]]]))
    points = points_of(processor, scene, num_points=1000, do_normalize=False)[0]
    assert points.amin(0).tolist() == pytest.approx([-0.5, -0.5, -0.5], abs=1e-6)
    assert points.amax(0).tolist() == pytest.approx([10.5, 0.5, 0.5], abs=1e-6)


def test_objects_of_trimesh_that_hold_points(processor):
    trimesh = pytest.importorskip("trimesh")
    expected = points_of(processor, cloud())
    mesh_without_faces = trimesh.Trimesh(vertices=cloud(), process=False)
    # The last is an array of a class of trimesh's own.
    for given in (trimesh.PointCloud(cloud()), mesh_without_faces, mesh_without_faces.vertices):
        assert torch.equal(points_of(processor, given), expected)


def test_rows_of_a_data_set_of_meshes(processor, tmp_path):
    trimesh, datasets = pytest.importorskip("trimesh"), pytest.importorskip("datasets")
    box, sphere = trimesh.creation.box(), trimesh.creation.icosphere()
    box.export(tmp_path / "box.ply")
    features = datasets.Features(mesh=datasets.Mesh(), label=datasets.Value("int64"))
    rows = {"mesh": [str(tmp_path / "box.ply"), sphere], "label": [0, 1]}  # a path, and the bytes of a .glb file
    table = datasets.Dataset.from_dict(rows, features=features)
    undecoded = table.cast_column("mesh", datasets.Mesh(decode=False))
    expected = points_of(processor, [tmp_path / "box.ply", sphere])
    for given in (table, undecoded):
        for batch in (given[:2], given["mesh"], given[:2]["mesh"], list(given)):
            torch.testing.assert_close(points_of(processor, batch), expected)
        torch.testing.assert_close(points_of(processor, given[1]), expected[1:])
        torch.testing.assert_close(points_of(processor, given[1]["mesh"]), expected[1:])


def test_rows_of_a_data_set_of_points(processor):
    datasets = pytest.importorskip("datasets")
    clouds = [cloud(), cloud(80, 1)]
    features = datasets.Features(points=datasets.Array2D((None, 3), "float64"))
    table = datasets.Dataset.from_dict({"points": clouds}, features=features)
    expected = points_of(processor, clouds)
    for given in (table[:2], table["points"], table.with_format("numpy")[:2], table.with_format("torch")["points"]):
        torch.testing.assert_close(points_of(processor, given), expected)
    mapped = table.map(processor, batched=True, remove_columns="points")
    torch.testing.assert_close(torch.tensor(mapped[:2]["point_values"]), expected)


# ---- What is refused


def with_values(*values: float) -> np.ndarray:
    points = cloud()
    points[3, : len(values)] = values
    return points


BAD_CLOUDS = {
    "empty": (np.empty((0, 3)), "is empty, expected at least 8 points"),
    "empty list": ([], "is empty, expected at least 8 points"),
    "not finite": (with_values(np.nan, -np.inf), "holds 2 non-finite values"),
    "out of range": (with_values(1e39), "holds 1 values outside the range of float32"),
    "two columns": (np.zeros((64, 2)), r"has shape \(64, 2\), expected \(n, 3\) or wider"),
    "nested too deep": (np.zeros((2, 64, 3)), r"has shape \(2, 64, 3\), expected \(n, 3\)"),
    "fewer than a group": (cloud(7), r"holds 7 points, expected at least the 8 of a group \(`num_neighbors\[0\]`\)"),
    "one point": (np.full((500, 3), 0.1), "has no extent: all 64 sampled points are equal"),
    "objects": (np.full((64, 3), None), "has dtype object, expected real numbers"),
    "complex": (cloud() + 1j, "has dtype complex128, expected real numbers"),
    "ragged": ([[1, 2, 3], [4, 5]], "is no table of numbers"),
    "row": ({"xyz": cloud()}, r"has the keys \['xyz'\], expected one of \('points', 'mesh'\)"),
    "undecoded": ({"bytes": b"ply", "path": None}, "has no 'path'"),
}


@pytest.mark.parametrize("name", BAD_CLOUDS)
@pytest.mark.parametrize("sampling", ["random", "none"])
def test_a_bad_cloud_is_refused_with_its_index(processor, name, sampling):
    bad, message = BAD_CLOUDS[name]
    if sampling == "none":
        message = message.replace("64 sampled", "500 sampled")
    with pytest.raises(ValueError, match=rf"point_clouds\[2\] {message}"):
        processor([cloud(), cloud(80), bad, cloud()], sampling=sampling)


@pytest.mark.parametrize("bad", [None, 7, b"ply", object()])
def test_what_is_no_cloud_is_refused_with_its_type(processor, bad):
    for given, name in ((bad, "point_clouds"), ([cloud(), bad], r"point_clouds\[1\]")):
        with pytest.raises(TypeError, match=f"{name} is of type {type(bad).__name__}, expected arrays"):
            processor(given)


def test_a_bad_batch_is_refused(processor):
    for given in (np.zeros(3), np.zeros((1, 2, 64, 3)), torch.zeros(())):
        with pytest.raises(ValueError, match=r"point_clouds has shape .* expected \(n, 3\) for one cloud"):
            processor(given)
    for given in ([], np.empty((0, 64, 3)), {"points": []}):
        with pytest.raises(ValueError, match="point_clouds is empty, expected at least one cloud"):
            processor(given)
    with pytest.raises(ValueError, match="point_clouds has the keys"):
        processor({"cloud": cloud()})


@pytest.mark.parametrize("do_normalize", [True, False])
def test_equal_points_are_refused_where_rounding_hides_it(processor, do_normalize):
    with pytest.raises(ValueError, match=r"point_clouds\[0\] has no extent"):
        processor(np.full((64, 3), 5e5 + 0.1), do_normalize=do_normalize)


def test_bad_meshes_are_refused(processor):
    trimesh = pytest.importorskip("trimesh")
    line = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 1, 2]], process=False)
    broken = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [np.nan, 0, 0]], [[0, 1, 2]], process=False)
    outside = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 5]], process=False)
    for bad, message in (
        (trimesh.Trimesh(), "is a mesh without faces and without points"),
        (trimesh.Scene(), "is a mesh without faces and without points"),
        (trimesh.load_path([[[0, 0, 0], [1, 1, 1]]]), "is a mesh without faces and without points"),
        (line, "is a mesh of 1 faces without area"),
        (broken, "holds 1 non-finite values"),
        (outside, "has faces on vertices 0 to 5 of 3"),
    ):
        with pytest.raises(ValueError, match=rf"point_clouds\[1\] {message}"):
            processor([cloud(), bad])


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


BAD_FILES = {
    "header_only.csv": b"x,y,z\n",
    "empty.xyz": b"",
    "two_columns.xyz": b"1 2\n3 4\n",
    "molecule.xyz": b"1\nwater\nO 0.0 0.0 0.0\n",
    "cut_row.xyz": b"1 2 3\n4 5 6\n7 8\n",
    "word.xyz": b"1 2 3\n4 five 6\n",
    "gap.csv": b"1,2,3,4\n1,,2,3\n",
    "binary.txt": bytes(range(256)),
    "junk.npy": b"junk",
    "junk.npz": b"junk",
    "empty.npy": b"",
    "pickle.npy": pickle.dumps([[1, 2, 3]] * 64),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_an_unreadable_file_is_named(processor, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BAD_FILES[name])
    with pytest.raises(ValueError, match=rf"point_clouds\[1\] \('.*{name}'\) cannot be read"):
        processor([cloud(), path])


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_pickled_objects_are_never_loaded(processor, tmp_path, suffix):
    path = tmp_path / f"objects.{suffix}"
    objects = np.full((64, 3), Bomb(), dtype=object)
    np.save(path, objects) if suffix == "npy" else np.savez(path, points=objects)
    with pytest.raises(ValueError, match=f"objects.{suffix}.* cannot be read: .*allow_pickle=False"):
        processor(path)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


@pytest.mark.parametrize("suffix", ["npy", "npz", "ply", "stl", "off", "glb"])
def test_a_truncated_file_is_refused(processor, tmp_path, suffix):
    path = tmp_path / f"file.{suffix}"
    if suffix.startswith("np"):
        np.save(path, cloud()) if suffix == "npy" else np.savez(path, points=cloud())
    else:
        pytest.importorskip("trimesh").creation.icosphere().export(path)
    path.write_bytes(half(path.read_bytes()))
    # Half a binary STL file is read as a text file in some encoding or other, without a single face.
    refusal = "(cannot be read|is a mesh without faces and without points)" if suffix == "stl" else "cannot be read"
    with pytest.raises(ValueError, match=rf"point_clouds\[0\] \('.*file.{suffix}'\) {refusal}"):
        processor(path)


@pytest.mark.parametrize(
    ("text", "faces"),
    [
        ("OFF\n5 2 0\n{}3 0 1 2\n3 0 2 3\n", [[0, 1, 2], [0, 2, 3]]),
        ("OFF5 2 0\r\n{}3 0 1 2\r\n3 0 2 3\r\n", [[0, 1, 2], [0, 2, 3]]),
        (
            "# made by hand\nOFF # version 2\n\n5 2 9\n{}\n4 0 1 2 3  0.5 0.5 0.5\n3 0 3 4",
            [[0, 1, 2], [0, 2, 3], [0, 3, 4]],
        ),
        ("COFF 5 2\n{}5 0 1 2 3 4\n2 0 1\n", [[0, 1, 2], [0, 2, 3], [0, 3, 4]]),
        ("off\n5 2 0\n{}3 0 1 2\n3 0 2 3", [[0, 1, 2], [0, 2, 3]]),
        ("OFF\r5 2 0\r{}3 0 1 2\r3 0 2 3\r", [[0, 1, 2], [0, 2, 3]]),
        ("OFF\n5 3 0\n{}3 0 1 2\n0\n3 0 2 3\n", [[0, 1, 2], [0, 2, 3]]),
    ],
)
def test_off_files_are_read_in_all_their_dialects(processor, tmp_path, text, faces):
    trimesh = pytest.importorskip("trimesh")
    path = tmp_path / "mesh.off"
    text = text.format("0 0 0\n1  0 0\n1 1 0 255 0 0\n\n0 1 0 # the fourth\n -1e0 .5 0\n")
    path.write_bytes((text.replace("\n", "\r") if "OFF\r5" in text else text).encode())
    mesh = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [-1, 0.5, 0]], faces, process=False)
    assert torch.equal(processor(path)["point_values"], processor(mesh)["point_values"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n-1 0 1 2\n", "a face begins with -1, expected its number of corners"),
        ("OFF BINARY\n", "it begins with 'OFF BINARY.*', expected OFF and two counts"),
        ("4OFF\n3 0 0\n", "it begins with '4OFF.*', expected OFF and two counts"),
    ],
)
def test_an_off_file_that_is_none_is_refused_with_what_is_wrong(processor, tmp_path, text, message):
    pytest.importorskip("trimesh")
    (tmp_path / "mesh.off").write_text(text)
    with pytest.raises(ValueError, match=rf"mesh.off'\) cannot be read: ValueError: {message}"):
        processor(tmp_path / "mesh.off")


def test_other_bad_files_are_refused_by_name(processor, tmp_path):
    np.savez(tmp_path / "two.npz", first=cloud(), second=cloud())
    with pytest.raises(ValueError, match=r"two.npz'\) cannot be read: .*\['first', 'second'\], expected one of"):
        processor(tmp_path / "two.npz")
    (tmp_path / "shape.step").write_text("")
    with pytest.raises(ValueError, match=r"shape.step'\) has the suffix '.step', expected one of .npy, "):
        processor(tmp_path / "shape.step")
    with pytest.raises(FileNotFoundError, match=r"point_clouds\[1\] \('.*missing.ply'\) is no file"):
        processor([cloud(), tmp_path / "missing.ply"])
    np.save(tmp_path / "nan.npy", with_values(np.nan))
    with pytest.raises(ValueError, match=r"nan.npy'\) holds 1 non-finite values"):
        processor(tmp_path / "nan.npy")


def test_a_mesh_file_is_not_repaired_in_silence(processor, tmp_path):
    pytest.importorskip("trimesh")
    for name, content in (
        ("nan.obj", "v 0 0 0\nv 1 0 0\nv 0 nan 0\nv 0 1 0\nf 1 2 3\nf 1 2 4\n"),
        ("nan.off", "OFF\n4 2 0\n0 0 0\n1 0 0\n0 nan 0\n0 1 0\n3 0 1 2\n3 0 1 3\n"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=rf"{name}'\) holds 1 non-finite values"):
            processor(tmp_path / name)


def test_without_trimesh_only_mesh_files_fail_and_say_what_to_install(processor, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trimesh", None)  # makes its import fail
    (tmp_path / "mesh.ply").write_text("ply")
    np.save(tmp_path / "points.npy", cloud())
    processor([cloud(), tmp_path / "points.npy"])
    with pytest.raises(ImportError, match=r'mesh.ply\'\) needs trimesh .*pip install "jointmae-hf\[io\]"'):
        processor(tmp_path / "mesh.ply")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_points", 7),
        ("num_points", 64.0),
        ("sampling", "grid"),
        ("seed", -1),
        ("view", 3),
        ("view", [0, 1, 2]),
        ("view", 0.5),
        ("return_tensors", "tf"),
        ("return_tensors", None),
    ],
)
def test_a_bad_argument_of_a_call_is_named(processor, name, value):
    with pytest.raises(ValueError, match=f"`{name}` is "):
        processor([cloud(), cloud()], **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_points", 0),
        ("num_points", True),
        ("image_size", 3),
        ("splat_size", 4),
        ("view", 5),
        ("num_centers", []),
        ("num_centers", 16),
        ("num_centers", [8, 16]),
        ("num_neighbors", [8]),
        ("num_neighbors", [8, 17]),
        ("num_neighbors", [8, 0]),
        ("sampling", None),
        ("seed", 1.5),
    ],
)
def test_a_bad_attribute_is_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}` is "):
        JointMAEPointCloudProcessor(**{**SETTINGS, name: value})


# ---- Saving and loading


def test_saving_and_loading_changes_nothing(tmp_path):
    saved = JointMAEPointCloudProcessor(**SETTINGS, view=2, do_project=True, sampling="farthest", seed=3)
    before = saved.to_dict()
    saved(cloud(5000))
    assert saved.to_dict() == before
    saved.save_pretrained(tmp_path)
    loaded = JointMAEPointCloudProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == before == saved.to_dict()
    assert {name: getattr(loaded, name) for name in SETTINGS} == SETTINGS
    first, second = saved(cloud(500)), loaded(cloud(500))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_numbers_of_numpy_are_saved_as_those_of_python(tmp_path):
    settings = {**SETTINGS, "view": 1, "seed": 3}
    given = {
        name: list(map(np.int64, value)) if isinstance(value, list) else np.int64(value)
        for name, value in settings.items()
    }
    saved = JointMAEPointCloudProcessor(**given, do_normalize=np.True_, do_project=np.False_)
    expected = JointMAEPointCloudProcessor(**settings)
    assert saved.to_json_string() == expected.to_json_string()
    saved.save_pretrained(tmp_path)
    assert JointMAEPointCloudProcessor.from_pretrained(tmp_path).to_dict() == expected.to_dict()


def test_a_saved_processor_brings_its_code_and_names_it_for_both_auto_classes(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    reference = "point_cloud_processing_joint_mae.JointMAEPointCloudProcessor"
    assert written["auto_map"] == {"AutoFeatureExtractor": reference, "AutoProcessor": reference}
    assert written["feature_extractor_type"] == "JointMAEPointCloudProcessor"
    assert {path.name for path in tmp_path.glob("*.py")} == {
        "geometry_joint_mae.py",
        "point_cloud_processing_joint_mae.py",
    }


@pytest.mark.parametrize("auto_class", [AutoFeatureExtractor, AutoProcessor])
@pytest.mark.parametrize("trust_remote_code", [None, False, True])
def test_the_auto_classes_load_the_class_of_the_package(processor, tmp_path, auto_class, trust_remote_code):
    processor.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path, trust_remote_code=trust_remote_code)
    assert type(loaded) is JointMAEPointCloudProcessor
    assert loaded.to_dict() == processor.to_dict()
    assert auto_class.from_pretrained(tmp_path, num_points=99, trust_remote_code=trust_remote_code).num_points == 99


REMOTE_CLIENT = """
import sys
sys.modules["jointmae_hf"] = None  # as if it were not installed
import numpy as np
from transformers import AutoFeatureExtractor, AutoProcessor

folder, cloud_file, output = sys.argv[1:]
for round in range(2):
    for auto_class in (AutoProcessor, AutoFeatureExtractor):
        processor = auto_class.from_pretrained(folder, trust_remote_code=True)
        assert type(processor).__module__.startswith("transformers_modules."), type(processor)
        folder = f"{output}/{round}_{auto_class.__name__}"
        processor.save_pretrained(folder)  # and the next loads what this one saved
np.save(f"{output}/points.npy", processor(cloud_file, return_tensors="np")["point_values"])
"""


def test_remote_code_loads_saves_and_loads_again_without_the_package(processor, tmp_path):
    processor.save_pretrained(tmp_path / "saved")
    np.save(tmp_path / "cloud.npy", cloud(500))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    arguments = [str(tmp_path / "saved"), str(tmp_path / "cloud.npy"), str(tmp_path)]
    run = subprocess.run(
        [sys.executable, "-c", REMOTE_CLIENT, *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    last = tmp_path / "1_AutoFeatureExtractor"
    for path in (tmp_path / "saved").iterdir():
        assert (last / path.name).read_text() == path.read_text()
    assert np.array_equal(np.load(tmp_path / "points.npy"), points_of(processor, cloud(500)))


def test_from_config_takes_what_the_model_was_made_for():
    config = JointMAEConfig.from_preset("tiny", num_points=1024, image_size=112, splat_size=3)
    processor = JointMAEPointCloudProcessor.from_config(config, view=1)
    for name in ("num_points", "image_size", "splat_size", "num_centers", "num_neighbors"):
        assert getattr(processor, name) == getattr(config, name)
    assert processor.view == 1
    assert JointMAEPointCloudProcessor.from_config(config, num_points=512).num_points == 512
    assert (
        JointMAEPointCloudProcessor().to_dict() == JointMAEPointCloudProcessor.from_config(JointMAEConfig()).to_dict()
    )
