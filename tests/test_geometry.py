"""Geometry against independent truth: numpy in float64, SciPy's tree, finite differences, and brute force."""

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from jointmae_hf import geometry_joint_mae
from jointmae_hf.geometry_joint_mae import (
    MIN_DEPTH,
    VIEW_AXES,
    chamfer_distance,
    depth_consistency,
    farthest_point_sample,
    gather_points,
    group_points,
    interpolate_features,
    knn,
    neighborhood_moments,
    patch_index,
    project_depth,
    project_points,
    sample_depth,
    view_projection,
)


IMAGE_SIZE = 32


def random_points(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def sphere(num_points: int, seed: int = 0) -> torch.Tensor:
    points = torch.randn(1, num_points, 3, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(points, dim=-1)


def numpy_farthest_points(points: np.ndarray, num_samples: int) -> list[int]:
    """The textbook loop in float64, started at the point farthest from the centre of the bounding box."""
    points = points.astype(np.float64)
    middle = (points.min(0) + points.max(0)) / 2
    picked = [int(((points - middle) ** 2).sum(1).argmax())]
    distance = np.full(len(points), np.inf)
    while len(picked) < num_samples:
        distance = np.minimum(distance, ((points - points[picked[-1]]) ** 2).sum(1))
        picked.append(int(distance.argmax()))
    return picked


# ---- Farthest point sampling


def test_gathered_rows_pass_their_gradient_back():
    values = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[[0, 5], [5, 5]], [[3, 0], [1, 2]]])
    gathered = gather_points(values, indices)
    assert gathered.shape == (2, 2, 2, 4)
    for cloud in range(2):
        assert torch.equal(gathered[cloud], values[cloud][indices[cloud]])
    torch.autograd.gradcheck(lambda values: gather_points(values, indices), values)


def test_farthest_point_sample_is_the_greedy_loop():
    points = random_points(3, 300)
    indices = farthest_point_sample(points, 64)
    assert indices.shape == (3, 64) and indices.dtype == torch.int64
    for cloud, picked in zip(points, indices, strict=True):
        assert picked.tolist() == numpy_farthest_points(cloud.numpy(), 64)


def test_farthest_point_sample_is_nested():
    points = random_points(2, 200)
    many = farthest_point_sample(points, 64)
    assert torch.equal(farthest_point_sample(points, 16), many[:, :16])
    assert torch.equal(farthest_point_sample(gather_points(points, many), 64), torch.arange(64).expand(2, -1))


def test_farthest_point_sample_picks_the_same_points_of_a_shuffled_cloud():
    points = random_points(1, 200)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    shuffled = points[:, order]
    first = gather_points(points, farthest_point_sample(points, 50))
    assert torch.equal(first, gather_points(shuffled, farthest_point_sample(shuffled, 50)))


def test_farthest_point_sample_never_picks_padding():
    points = random_points(2, 100)
    mask = torch.zeros(2, 100, dtype=torch.bool)
    mask[0, 30:80] = True
    mask[1, :40] = True
    points[~mask] = 50.0  # padding that would win, were it looked at
    indices = farthest_point_sample(points, 32, mask)
    for cloud, picked, real in zip(points, indices, mask, strict=True):
        kept = real.nonzero().squeeze(1)
        assert kept[numpy_farthest_points(cloud[real].numpy(), 32)].tolist() == picked.tolist()


def test_farthest_point_sample_repeats_itself_when_points_run_out():
    points = random_points(1, 5)
    indices = farthest_point_sample(points, 12)[0].tolist()
    assert sorted(indices[:5]) == [0, 1, 2, 3, 4]
    assert indices == [indices[i % 5] for i in range(12)]
    mask = torch.tensor([[True, False, True, False, True]])
    masked = farthest_point_sample(points, 7, mask)[0].tolist()
    assert sorted(masked[:3]) == [0, 2, 4]
    assert masked == [masked[i % 3] for i in range(7)]


# ---- Nearest neighbours


def test_knn_finds_what_a_tree_finds():
    queries, points = random_points(2, 50), random_points(2, 400, seed=1)
    indices = knn(queries, points, 16)
    clouds = queries.double().numpy(), points.double().numpy(), indices.numpy()
    for query, cloud, found in zip(*clouds, strict=True):
        distance, expected = cKDTree(cloud).query(query, 16)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(np.linalg.norm(cloud[found] - query[:, None], axis=-1), distance, atol=1e-12)


def test_knn_gives_ties_to_the_lower_index():
    corners = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [-1, 0, 0], [0, -1, 0], [0, 0, 0.5], [0, 0, 1]]])
    assert knn(torch.zeros(1, 1, 3), corners, 5).tolist() == [[[4, 0, 1, 2, 3]]]
    copies = random_points(1, 20).repeat(1, 3, 1)  # every point three times
    expected = torch.tensor([0, 20, 40]) + torch.arange(20).unsqueeze(1)
    assert torch.equal(knn(copies[:, :20], copies, 3)[0], expected)


def test_knn_does_not_depend_on_the_chunk_size():
    queries, points = random_points(2, 33), random_points(2, 90, seed=1)
    whole = knn(queries, points, 7)
    for chunk_size in (1, 500, 2000):
        assert torch.equal(knn(queries, points, 7, chunk_size=chunk_size), whole)


def test_knn_leaves_padding_out_and_repeats_the_nearest():
    queries, points = random_points(1, 10), random_points(1, 30, seed=1)
    mask = torch.zeros(1, 30, dtype=torch.bool)
    mask[0, [3, 8, 21]] = True
    indices = knn(queries, points, 5, mask)
    assert set(indices.flatten().tolist()) <= {3, 8, 21}
    _, expected = cKDTree(points[0, mask[0]].numpy()).query(queries[0].numpy(), 3)
    assert torch.equal(indices[0, :, :3], torch.tensor([3, 8, 21])[torch.from_numpy(expected)])
    assert torch.equal(indices[..., 3:], indices[..., :1].expand(-1, -1, 2))


def test_knn_refuses_too_few_points():
    with pytest.raises(ValueError, match="`k` is 4, but there are only 3 points"):
        knn(random_points(1, 2), random_points(1, 3), 4)


def test_knn_is_exact_in_a_large_cloud():
    """Where the expanded form of the squared distance loses the digits that decide."""
    points = random_points(1, 100_000) + 3.0
    queries = points[:, ::500]
    indices = knn(queries, points, 16)[0].numpy()
    cloud = points[0].double().numpy()
    distance, _ = cKDTree(cloud).query(cloud[::500], 16)
    found = np.linalg.norm(cloud[indices] - cloud[::500][:, None], axis=-1)
    # Neighbours may only change places where float32 coordinates cannot tell their distances apart.
    np.testing.assert_allclose(found, distance, rtol=1e-6, atol=0)


def test_groups_are_relative_to_their_centers():
    points = random_points(2, 40)
    centers = points[:, :5]
    indices = knn(centers, points, 4)
    groups = group_points(points, centers, indices)
    assert torch.equal(groups[:, :, 0], torch.zeros(2, 5, 3))  # a centre is its own nearest neighbour
    assert torch.equal(groups[1, 3, 2], points[1, indices[1, 3, 2]] - centers[1, 3])


# ---- Chamfer distance


def test_chamfer_distance_is_its_definition():
    predicted, target = random_points(2, 4, 16).double(), random_points(2, 4, 24, seed=1).double()
    squared = torch.cdist(predicted, target, compute_mode="donot_use_mm_for_euclid_dist").square()
    expected = squared.amin(-1).mean(-1) + squared.amin(-2).mean(-1)
    torch.testing.assert_close(chamfer_distance(predicted, target), expected)
    assert chamfer_distance(predicted, predicted).abs().max() == 0


def test_chamfer_distance_has_the_right_gradient():
    predicted = random_points(2, 6).double().requires_grad_()
    target = random_points(2, 9, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(chamfer_distance, (predicted, target))


# ---- Projection


@pytest.mark.parametrize("view", [0, 1, 2])
def test_view_fills_the_image_with_the_object(view):
    points = random_points(4, 500) * torch.tensor([1.0, 0.5, 0.25]) + torch.tensor([0.3, -2.0, 5.0])
    projection = view_projection(points, torch.full((4,), view), IMAGE_SIZE)
    projected = project_points(points, projection)
    row_column, depth = projected[..., :2], projected[..., 2]
    middle = (row_column.amin(1) + row_column.amax(1)) / 2
    span = (row_column.amax(1) - row_column.amin(1)).amax(-1)
    torch.testing.assert_close(middle, torch.full((4, 2), (IMAGE_SIZE - 1) / 2), atol=1e-3, rtol=0)
    torch.testing.assert_close(span, torch.full((4,), IMAGE_SIZE - 3.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(depth.amin(1), torch.full((4,), MIN_DEPTH), atol=1e-4, rtol=0)
    torch.testing.assert_close(depth.amax(1), torch.ones(4), atol=1e-4, rtol=0)
    row_axis, column_axis, depth_axis = VIEW_AXES[view]
    assert torch.equal(depth.argmax(1), points[..., depth_axis].argmax(1))  # the viewer is on the positive side
    assert torch.equal(row_column[..., 0].argmax(1), points[..., row_axis].argmax(1))
    assert torch.equal(row_column[..., 1].argmin(1), points[..., column_axis].argmin(1))


@pytest.mark.parametrize("view", [0, 1, 2])
@pytest.mark.parametrize("splat_size", [1, 3, 5])
def test_every_pixel_shows_the_nearest_point_that_covers_it(view, splat_size):
    points = random_points(2, 150) * torch.tensor([1.0, 0.6, 0.8])
    projection = view_projection(points, torch.full((2,), view), IMAGE_SIZE)
    image = project_depth(points, projection, IMAGE_SIZE, splat_size)
    assert image.shape == (2, 1, IMAGE_SIZE, IMAGE_SIZE)
    projected = project_points(points, projection).numpy()
    reach = splat_size // 2
    for cloud, drawn in zip(projected, image[:, 0].numpy(), strict=True):
        expected = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
        for row, column, depth in cloud:
            row, column = int(np.round(row)), int(np.round(column))
            assert 0 <= row < IMAGE_SIZE and 0 <= column < IMAGE_SIZE
            assert drawn[row, column] >= min(depth, 1.0)
            square = (
                slice(max(row - reach, 0), row + reach + 1),
                slice(max(column - reach, 0), column + reach + 1),
            )
            expected[square] = np.maximum(expected[square], min(depth, 1.0))
        np.testing.assert_array_equal(drawn, expected)
    shown = image[image > 0]
    assert (image == 0).any() and shown.min() >= MIN_DEPTH - 1e-5 and shown.max() <= 1


def test_padding_is_neither_framed_nor_drawn():
    points = random_points(1, 60)
    padded = torch.cat([points, torch.full((1, 20, 3), 9.0)], dim=1)
    mask = torch.arange(80).unsqueeze(0) < 60
    view = torch.tensor([1])
    projection = view_projection(points, view, IMAGE_SIZE)
    assert torch.equal(view_projection(padded, view, IMAGE_SIZE, mask), projection)
    image = project_depth(padded, projection, IMAGE_SIZE, 3, mask)
    assert torch.equal(image, project_depth(points, projection, IMAGE_SIZE, 3))


def test_patch_index_is_the_patch_of_the_pixel():
    projected = torch.tensor([[[0.0, 31.4, 1], [3.4, 3.6, 1], [-7.0, 99.0, 1], [15.6, 16.0, 1]]])
    assert patch_index(projected, 32, 4).tolist() == [[[0, 7], [0, 1], [0, 7], [4, 4]]]


def test_geometry_stays_in_float32_under_autocast():
    points = sphere(64)
    view = torch.tensor([0])

    def everything():
        projection = view_projection(points, view, IMAGE_SIZE)
        image = project_depth(points, projection, IMAGE_SIZE, 3)
        return (
            farthest_point_sample(points, 16),
            knn(points[:, :8], points, 4),
            projection,
            project_points(points, projection),
            image,
            chamfer_distance(points[:, :8], points[:, 8:16]),
            depth_consistency(points * 1.1, projection, image),
        )

    expected = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = everything()
    for result, value in zip(results, expected, strict=True):
        assert result.dtype == value.dtype and torch.equal(result, value)


@pytest.mark.parametrize("scale", [(1, 1, 0), (1, 0, 0), (0, 0, 0)], ids=["flat", "line", "point"])
@pytest.mark.parametrize("view", [0, 1, 2])
def test_degenerate_clouds_stay_finite(scale, view):
    points = (random_points(1, 40) * torch.tensor(scale)).requires_grad_()
    projection = view_projection(points, torch.tensor([view]), IMAGE_SIZE)
    image = project_depth(points, projection, IMAGE_SIZE, 3)
    assert projection.isfinite().all() and image.isfinite().all() and image.max() > 0
    assert farthest_point_sample(points, 16).unique().numel() <= 16
    indices = knn(points[:, :4], points, 8)
    assert indices.min() >= 0 and indices.max() < 40
    loss = depth_consistency(points, projection, image).sum() + chamfer_distance(points[:, :20], points[:, 20:]).sum()
    loss = loss + interpolate_features(points, points[:, :4], points[:, :4]).sum()
    loss.backward()
    assert loss.isfinite() and points.grad.isfinite().all()


@pytest.mark.parametrize("counts", sorted({geometry_joint_mae._COMPILING_COUNTS_AS_EXPORTING, True}))
def test_kernels_are_used_where_a_graph_is_compiled_and_not_where_it_is_exported(counts, monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(geometry_joint_mae, "_COMPILING_COUNTS_AS_EXPORTING", counts)
    found = []

    class Sampling(torch.nn.Module):
        def forward(self, points):
            return farthest_point_sample(points, 4)

    def backend(graph, _):
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    points = random_points(1, 40)
    torch.compile(Sampling(), backend=backend, fullgraph=True)(points)
    assert any("jointmae_hf" in name for name in found)
    exported = torch.export.export(Sampling(), (points,))
    assert not any("jointmae_hf" in str(node.target) for node in exported.graph.nodes)


# ---- Depth consistency


def test_sample_depth_is_bilinear():
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([[[2.0, 5.0, 0], [2.25, 5.5, 0], [-2.0, 3.0, 0], [7.5, 0.0, 0]]])
    pixels = image[0, 0]
    between = 0.75 * (pixels[2, 5] + pixels[2, 6]) / 2 + 0.25 * (pixels[3, 5] + pixels[3, 6]) / 2
    expected = torch.stack([pixels[2, 5], between, torch.tensor(0.0), pixels[7, 0] / 2])
    torch.testing.assert_close(sample_depth(image, at)[0], expected)


def test_a_cloud_agrees_with_its_own_image():
    points = sphere(500)
    for view in range(3):
        projection = view_projection(points, torch.tensor([view]), IMAGE_SIZE)
        image = project_depth(points, projection, IMAGE_SIZE, 5)
        assert depth_consistency(points, projection, image).mean() < 1e-3


def test_points_at_the_back_are_not_punished_and_points_in_front_are():
    points = sphere(2000)
    projection = view_projection(points, torch.tensor([0]), IMAGE_SIZE)
    image = project_depth(points, projection, IMAGE_SIZE, 5)
    inner = points[:, points[0, :, :2].norm(dim=-1) < 0.5]
    back, front = inner[:, inner[0, :, 2] < 0].requires_grad_(), inner[:, inner[0, :, 2] > 0]
    hidden = depth_consistency(back, projection, image)
    hidden.sum().backward()
    assert hidden.abs().max() == 0 and back.grad.abs().max() == 0
    lifted = front + torch.tensor([0.0, 0.0, 0.5])  # half the radius, of a depth range of 0.8 over the diameter
    assert (depth_consistency(lifted, projection, image) > 0.1**2).all()
    outside = torch.tensor([[[3.0, 0.0, 0.0], [0.99, 0.99, 0.5]]])  # beside the image, and beside the silhouette
    assert (depth_consistency(outside, projection, image) > 0.3**2).all()


def test_depth_consistency_pulls_on_all_three_coordinates():
    """Against finite differences, where the bilinear image is smooth: well inside a cell of pixels."""
    points = sphere(2000)
    projection = view_projection(points, torch.tensor([0]), IMAGE_SIZE)
    image = project_depth(points, projection, IMAGE_SIZE, 5)
    front = points[:, (points[0, :, 2] > 0.2) & (points[0, :, :2].norm(dim=-1) > 0.4)]
    moved = front + torch.tensor([0.0, 0.0, 0.3])
    fraction = project_points(moved, projection)[0, :, :2] % 1
    moved = moved[:, ((fraction > 0.2) & (fraction < 0.8)).all(-1)][:, :30].clone().requires_grad_()
    depth_consistency(moved, projection, image).sum().backward()
    step = 1e-3
    numeric = torch.zeros_like(moved)
    with torch.no_grad():
        for axis in range(3):
            offset = torch.eye(3)[axis] * step
            high = depth_consistency(moved + offset, projection, image)
            low = depth_consistency(moved - offset, projection, image)
            numeric[..., axis] = (high - low) / (2 * step)
    torch.testing.assert_close(moved.grad, numeric, atol=2e-3, rtol=1e-2)
    assert (moved.grad.abs().amax(dim=(0, 1)) > 1e-2).all()


# ---- Interpolation


@pytest.mark.parametrize("num_centers", [6, 100])  # by a product, by gathering
def test_interpolation_weighs_the_three_nearest_centers(num_centers):
    points, centers = random_points(1, 20), random_points(1, num_centers, seed=1)
    features = torch.randn(1, num_centers, 4, generator=torch.Generator().manual_seed(0))
    spread = interpolate_features(points, centers, features)[0].numpy()
    distance, nearest = cKDTree(centers[0].numpy()).query(points[0].numpy(), 3)
    weight = 1 / distance**2
    weight /= weight.sum(1, keepdims=True)
    expected = (features[0].numpy()[nearest] * weight[..., None]).sum(1)
    np.testing.assert_allclose(spread, expected, atol=1e-4)


def test_interpolation_gives_a_center_its_own_feature():
    centers = random_points(1, 6)
    features = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(interpolate_features(centers, centers, features), features, atol=1e-5, rtol=0)


# ---- Moments of neighbourhoods


def test_moments_are_those_of_the_nearest_points():
    points = random_points(2, 60)
    found = neighborhood_moments(points, (5, 24)).double().numpy().reshape(2, 60, 2, 10)
    for cloud, rows in zip(points.double().numpy(), found, strict=True):
        nearest = cKDTree(cloud).query(cloud, 24)[1]
        for position, size in enumerate((5, 24)):
            groups = cloud[nearest[:, :size]]
            covariance = np.stack([np.cov(group.T, bias=True) for group in groups])
            trace = np.trace(covariance, axis1=1, axis2=2)[:, None]
            shape = covariance / trace[:, None] - np.eye(3) / 3
            picked = shape[:, [0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]]
            extent = np.log(trace / (size / 60)) / 2
            offset = (groups.mean(1) - cloud) / np.sqrt(trace)
            expected = np.concatenate([picked, extent, offset], axis=1)
            np.testing.assert_allclose(rows[:, position], expected, atol=1e-4)


def test_extents_of_neighbourhoods_do_not_depend_on_the_density():
    few, many = (
        neighborhood_moments(sphere(num_points), (16, 64)).view(num_points, 2, 10) for num_points in (512, 4096)
    )
    torch.testing.assert_close(few[..., 6].mean(0), many[..., 6].mean(0), atol=0.1, rtol=0)  # log 8 / 2 is 1.04


def test_moments_do_not_see_padding():
    points = random_points(1, 20)
    padded = torch.cat([points, points.new_full((1, 5, 3), 0.1)], dim=1)
    mask = torch.arange(25) < 20
    for sizes in ((4, 16), (8, 64)):
        found = neighborhood_moments(padded, sizes, mask[None])
        torch.testing.assert_close(found[:, :20], neighborhood_moments(points, sizes), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-9])
def test_moments_of_equal_points_are_those_of_a_ball(scale):
    found = neighborhood_moments(scale * random_points(1, 8), (4,))
    assert found[..., :6].abs().max() == 0 and (found[..., 6] == -3).all() and found[..., 7:].abs().max() < 1e-2
