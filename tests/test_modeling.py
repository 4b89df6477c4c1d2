"""The method: what is hidden stays hidden, attention reaches where it should, and every switch does what it says."""

import json
import math

import pytest
import torch
from torch import nn

from jointmae_hf import (
    JointMAEConfig,
    JointMAEForPartSegmentation,
    JointMAEForPointCloudClassification,
    JointMAEForPreTraining,
    JointMAEModel,
    modeling_joint_mae,
)
from jointmae_hf.geometry_joint_mae import (
    chamfer_distance,
    depth_consistency,
    farthest_point_sample,
    gather_points,
    knn,
    project_depth,
    project_points,
    view_projection,
)
from jointmae_hf.modeling_joint_mae import agreement_loss, group_max, patchify, pool_tokens, random_mask


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "drop_path_rate": 0.0,
    "num_points": 128,
    "num_centers": [32, 16],
    "num_neighbors": [8, 4],
    "point_embed_sizes": [16, 32],
    "image_size": 32,
    "splat_size": 3,
    "patch_strides": [2, 2],
    "image_embed_sizes": [16, 32],
    "alignment_radii": [1, 2, None],
    "decoder_hidden_size": 16,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
    "decoder_num_shared_layers": 1,
    "num_target_points": 8,
    "classifier_hidden_size": 16,
}


def tiny_config(**overrides) -> JointMAEConfig:
    return JointMAEConfig(**TINY | overrides)


def build(model_class, config: JointMAEConfig | None = None, **kwargs):
    torch.manual_seed(0)
    return model_class._from_config(config or tiny_config(), **kwargs).eval()


def clouds(batch_size: int = 2, num_points: int = 128, seed: int = 0) -> torch.Tensor:
    """Points on the surfaces of ellipsoids of different shapes."""
    generator = torch.Generator().manual_seed(seed)
    points = nn.functional.normalize(torch.randn(batch_size, num_points, 3, generator=generator), dim=-1)
    return points * (0.3 + 0.7 * torch.rand(batch_size, 1, 3, generator=generator))


def with_images(points: torch.Tensor, config: JointMAEConfig, view: int = 0) -> dict[str, torch.Tensor]:
    projection = view_projection(points, torch.full((len(points),), view), config.image_size)
    pixel_values = project_depth(points, projection, config.image_size, config.splat_size)
    return {"point_values": points, "pixel_values": pixel_values, "projection": projection}


def masked_inputs(batch_size: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "point_values": clouds(batch_size, seed=seed),
        "point_noise": torch.rand(batch_size, 16, generator=generator),
        "patch_noise": torch.rand(batch_size, 64, generator=generator),
    }


def visible_of(batch_size: int = 2, tokens: int = 4, patches: int = 16) -> dict[str, torch.Tensor]:
    noise = masked_inputs(batch_size)
    return {
        "visible_tokens": random_mask(noise["point_noise"], tokens)[0],
        "visible_patches": random_mask(noise["patch_noise"], patches)[0],
    }


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# ---- Nothing of a masked token reaches the encoder


def test_masked_points_do_not_reach_the_encoder():
    """Only points in groups below a visible token have a gradient, and all other points have exactly none."""
    config = tiny_config()
    model = build(JointMAEModel, config)
    inputs, visible = with_images(clouds(), config), visible_of()
    points = inputs["point_values"].requires_grad_()
    output = model(**inputs, **visible).last_hidden_state
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(1))).sum().backward()

    for cloud, tokens, gradient in zip(points.detach(), visible["visible_tokens"], points.grad, strict=True):
        sampled = farthest_point_sample(cloud[None], 32)[0]
        allowed = set()
        for token in tokens.tolist():
            allowed.add(sampled[token].item())
            for child in (cloud[sampled] - cloud[sampled[token]]).norm(dim=1).argsort()[:4]:
                allowed.update((cloud - cloud[sampled[child]]).norm(dim=1).argsort()[:8].tolist())
        touched = set(gradient.abs().sum(1).nonzero().squeeze(1).tolist())
        assert touched <= allowed and len(touched) > len(allowed) / 2
        assert len(allowed) < 100  # else the cloud is too small for the test to mean anything


def test_masked_pixels_do_not_reach_the_encoder():
    config = tiny_config()
    model = build(JointMAEModel, config)
    inputs, visible = with_images(clouds(), config), visible_of()
    inputs["pixel_values"].requires_grad_()
    output = model(**inputs, **visible).last_hidden_state
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    touched = patchify(inputs["pixel_values"].grad, config.patch_size).abs().amax(-1) > 0
    expected = torch.zeros(2, 64, dtype=torch.bool).scatter(1, visible["visible_patches"], True)
    assert torch.equal(touched, expected)

    changed = torch.rand(2, 1, 32, 32)
    keep = expected.view(2, 1, 8, 1, 8, 1).expand(-1, -1, -1, 4, -1, 4).reshape(2, 1, 32, 32)
    inputs["pixel_values"] = torch.where(keep, inputs["pixel_values"], changed).detach()
    assert torch.equal(model(**inputs, **visible).last_hidden_state, output)


@pytest.mark.parametrize("num_visible", [1, 4, 12])
def test_visible_tokens_are_embedded_as_among_all(num_visible):
    """Embedding the children of visible tokens alone must not change them; 12 is past where that is worthwhile."""
    config = tiny_config(num_centers=[64, 32, 16], num_neighbors=[8, 4, 4], point_embed_sizes=[16, 24, 32])
    embeddings = build(JointMAEModel, config).point_embeddings
    points = clouds()
    visible = random_mask(masked_inputs()["point_noise"], num_visible)[0]
    tokens, centers, fine_features, _ = embeddings(points, None, None)
    some_tokens, some_centers, some_features, _ = embeddings(points, None, visible)
    torch.testing.assert_close(some_tokens, gather_points(tokens, visible), atol=1e-5, rtol=1e-5)
    assert torch.equal(some_centers, centers)
    assert some_features.shape[1] == {1: 16, 4: 64, 12: 64}[num_visible] <= fine_features.shape[1]


def test_visible_patches_are_embedded_as_among_all():
    config = tiny_config()
    embeddings = build(JointMAEModel, config).image_embeddings
    pixel_values, visible = torch.rand(2, 1, 32, 32), visible_of()["visible_patches"]
    torch.testing.assert_close(
        embeddings(pixel_values, visible), gather_points(embeddings(pixel_values, None), visible)
    )


def test_features_do_not_depend_on_the_order_of_points():
    model, points = build(JointMAEModel), clouds()
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    first, second = model(points), model(points[:, order])
    assert torch.equal(first.centers, second.centers)
    torch.testing.assert_close(first.last_hidden_state, second.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first.pooler_output, second.pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_the_unit_of_local_coordinates_follows_the_density_of_a_cloud(masked):
    embeddings = build(JointMAEModel).point_embeddings
    groups, k = embeddings.num_centers[0], embeddings.num_neighbors[0]
    surface = clouds(1, groups)
    # Four copies of half the size, far apart: four times the points, each group as before at half the scale.
    places = 10 * torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    dense = (surface / 2 + places[:, None]).flatten(0, 1).unsqueeze(0)
    mask = None
    if masked:
        dense = torch.cat([dense, torch.full((1, 3 * k, 3), 5.0)], dim=1)
        mask = torch.arange(dense.shape[1]).unsqueeze(0) < 4 * groups
    _, _, expected, _ = embeddings(surface, None, None)
    _, _, features, _ = embeddings(dense, mask, None)
    assert torch.cdist(features[0], expected[0]).amin(1).max() < 1e-3 * expected.abs().max()


def test_pooled_feature_is_mean_and_maximum_of_3d_tokens():
    config = tiny_config()
    output = build(JointMAEModel, config)(**with_images(clouds(), config))
    tokens = output.last_hidden_state[:, :16]
    torch.testing.assert_close(output.pooler_output, torch.cat([tokens.mean(1), tokens.max(1).values], dim=1))


@pytest.mark.parametrize("deviation", [False, True])
def test_features_of_several_layers_stand_side_by_side(deviation):
    config = tiny_config(pooling_layers=[3, 1], pooling_deviation=deviation)
    model = build(JointMAEModel, config)
    after_first = []
    model.layers[0].register_forward_hook(lambda module, inputs, output: after_first.append(output))
    output = model(**with_images(clouds(), config))
    expected = []
    for tokens in (output.last_hidden_state[:, :16], after_first[0][:, :16]):
        expected += [tokens.mean(1), tokens.max(1).values] + [tokens.std(1, unbiased=False)] * deviation
    assert output.pooler_output.shape == (2, config.pooled_size)
    torch.testing.assert_close(output.pooler_output, torch.cat(expected, dim=1), atol=1e-4, rtol=1e-4)


def test_the_pooled_deviation_has_a_gradient_where_all_tokens_are_equal():
    tokens = torch.ones(1, 4, 3, requires_grad=True)
    pool_tokens(tokens, deviation=True).sum().backward()
    assert tokens.grad.isfinite().all()


@pytest.mark.parametrize("head", [JointMAEForPointCloudClassification, JointMAEForPartSegmentation])
def test_heads_take_the_features_of_several_layers(head):
    model = build(head, tiny_config(pooling_layers=[1, 2], pooling_deviation=True, num_labels=3))
    assert model(clouds()).logits.shape[-1] == 3


# ---- Local-aligned attention


def allowed_pairs(points: torch.Tensor, centers: torch.Tensor, projection: torch.Tensor, radius: int | None):
    """Token by token: which of 16 3D and 64 2D tokens may attend to which."""
    allowed = torch.zeros(80, 80, dtype=torch.bool)
    pixels = project_points(centers[None], projection[None])[0, :, :2].round().long()
    for query in range(80):
        for key in range(80):
            if (query < 16) == (key < 16):
                allowed[query, key] = True
                continue
            token, patch = (query, key - 16) if query < 16 else (key, query - 16)
            row, column = (pixels[token] // 4).tolist()
            apart = max(abs(row - patch // 8), abs(column - patch % 8))
            allowed[query, key] = radius is None or apart <= radius
    return allowed


@pytest.mark.parametrize("view", [0, 1, 2])
def test_attention_reaches_exactly_the_aligned_tokens(view):
    config = tiny_config(num_hidden_layers=6)
    model = build(JointMAEModel, config, attn_implementation="eager")
    inputs = with_images(clouds(), config, view)
    output = model(**inputs, output_attentions=True)
    assert len(output.attentions) == 6
    for sample in range(2):
        for layer, radius in enumerate([1, 1, 2, 2, None, None]):
            expected = allowed_pairs(
                inputs["point_values"][sample], output.centers[sample], inputs["projection"][sample], radius
            )
            attends = output.attentions[layer][sample] > 0
            assert torch.equal(attends, expected.expand_as(attends))


def test_attention_is_aligned_among_visible_tokens_too():
    config = tiny_config(num_hidden_layers=1, alignment_radii=[1])
    model = build(JointMAEModel, config, attn_implementation="eager")
    inputs, visible = with_images(clouds(1), config), visible_of(1)
    output = model(**inputs, **visible, output_attentions=True)
    everything = allowed_pairs(inputs["point_values"][0], output.centers[0], inputs["projection"][0], 1)
    kept = torch.cat([visible["visible_tokens"][0], 16 + visible["visible_patches"][0]])
    attends = output.attentions[0][0] > 0
    assert torch.equal(attends, everything[kept][:, kept].expand_as(attends))


def test_a_far_patch_does_not_change_a_3d_token_in_the_first_block():
    config = tiny_config()
    model = build(JointMAEModel, config)
    inputs = with_images(clouds(1), config)
    before = model(**inputs, output_hidden_states=True)
    patch = 27  # row 3, column 3
    inputs["pixel_values"] = inputs["pixel_values"].clone()
    inputs["pixel_values"][0, 0, 12:16, 12:16] += 0.5
    after = model(**inputs, output_hidden_states=True)
    near = allowed_pairs(inputs["point_values"][0], before.centers[0], inputs["projection"][0], 1)[:16, 16 + patch]
    assert near.any() and not near.all()
    changed = (before.hidden_states[1] != after.hidden_states[1])[0, :16].any(-1)
    assert torch.equal(changed, near)
    assert (before.last_hidden_state != after.last_hidden_state)[0, :16].any(-1).all()


def test_without_local_alignment_all_tokens_attend():
    config = tiny_config(use_local_alignment=False)
    model = build(JointMAEModel, config, attn_implementation="eager")
    for attention in model(**with_images(clouds(), config), output_attentions=True).attentions:
        assert (attention > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stochastic_depth_keeps_the_mean_and_survives_loading(dtype, tmp_path):
    build(JointMAEModel, tiny_config(drop_path_rate=0.3)).save_pretrained(tmp_path)
    layers = JointMAEModel.from_pretrained(tmp_path, dtype=dtype).train().layers
    for layer, drop_prob in zip(layers, (0, 0.15, 0.3), strict=True):
        dropped = layer.drop_path(torch.ones(100_000, 1, 1, dtype=dtype)).float()
        assert (dropped == 0).float().mean() == pytest.approx(drop_prob, abs=5e-3)
        assert dropped.mean() == pytest.approx(1, abs=6e-3)
        assert torch.equal(layer.drop_path.eval()(dropped), dropped)


def test_a_dropped_image_is_hidden_from_3d_tokens_of_that_sample():
    config = tiny_config()
    model = build(JointMAEModel, config)
    inputs = with_images(clouds(), config)
    alone = model(inputs["point_values"]).last_hidden_state
    output = model(**inputs, image_dropped=torch.tensor([True, False])).last_hidden_state
    torch.testing.assert_close(output[0, :16], alone[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output[1, :16], alone[1], atol=1e-2)
    inputs["point_values"] = inputs["point_values"].flip(0)  # 2D tokens still see the cloud
    other = model(**inputs, image_dropped=torch.tensor([True, False])).last_hidden_state
    assert not torch.allclose(output[0, 16:], other[0, 16:], atol=1e-5)


def test_modality_dropout_drops_images_in_training_only():
    model = build(JointMAEForPreTraining, tiny_config(modality_dropout=1.0))
    inputs = masked_inputs() | {"view": torch.zeros(2, dtype=torch.int64)}
    dropped = torch.ones(2, dtype=torch.bool)
    evaluated = model(**inputs).loss
    assert evaluated == model(**inputs, image_dropped=~dropped).loss
    assert evaluated != model(**inputs, image_dropped=dropped).loss
    model.train()
    torch.testing.assert_close(model(**inputs).loss, model(**inputs, image_dropped=dropped).loss)


# ---- Pre-training


def test_masks_follow_the_noise():
    model, inputs = build(JointMAEForPreTraining), masked_inputs()
    output = model(**inputs)
    for mask, noise, masked, indices in (
        (output.mask_3d, inputs["point_noise"], 12, output.masked_tokens),
        (output.mask_2d, inputs["patch_noise"], 48, output.masked_patches),
    ):
        assert (mask.sum(1) == masked).all() and set(mask.unique().tolist()) == {0, 1}
        assert (noise.masked_fill(mask == 0, 9).amin(1) > noise.masked_fill(mask == 1, -9).amax(1)).all()
        assert torch.equal(torch.zeros_like(mask).scatter(1, indices, 1.0), mask)
    assert output.loss == model(**inputs).loss
    assert output.loss != model(**masked_inputs() | {"point_noise": inputs["point_noise"].flip(1)}).loss
    drawn = [model(inputs["point_values"]).mask_3d for _ in range(2)]
    assert not torch.equal(*drawn)


def test_losses_are_those_of_the_outputs():
    config = tiny_config(point_loss_weight=2.0, pixel_loss_weight=3.0, cross_loss_weight=5.0)
    inputs = masked_inputs()
    output = build(JointMAEForPreTraining, config)(**inputs)
    points = inputs["point_values"]
    assert output.reconstructed_points.shape == (2, 12, 8, 3)
    assert output.reconstructed_patches.shape == (2, 48, 16)
    centers = gather_points(output.centers, output.masked_tokens)
    target = gather_points(points, knn(centers, points, 8))
    torch.testing.assert_close(output.loss_3d, chamfer_distance(output.reconstructed_points, target).mean())
    patches = gather_points(patchify(output.pixel_values, 4), output.masked_patches)
    torch.testing.assert_close(output.loss_2d, (output.reconstructed_patches - patches).square().mean())
    cross = depth_consistency(output.reconstructed_points.flatten(1, 2), output.projection, output.pixel_values)
    torch.testing.assert_close(output.loss_cross, cross.mean())
    torch.testing.assert_close(output.loss, 2 * output.loss_3d + 3 * output.loss_2d + 5 * output.loss_cross)


def test_given_images_are_used_as_the_projected_ones_would_be():
    config = tiny_config()
    model, inputs = build(JointMAEForPreTraining, config), masked_inputs()
    for view in range(3):
        projected = model(**inputs, view=torch.full((2,), view))
        given = model(**inputs | with_images(inputs["point_values"], config, view))
        assert torch.equal(projected.pixel_values, given.pixel_values) and projected.loss == given.loss
    assert torch.equal(model(**inputs).projection, model(**inputs, view=torch.zeros(2, dtype=torch.int64)).projection)


def test_mask_tokens_see_visible_tokens_only():
    model = build(JointMAEForPreTraining)
    visible, generator = model.config.num_visible_tokens, torch.Generator().manual_seed(0)
    hidden_states = torch.randn(2, visible + model.config.num_visible_patches, 32, generator=generator)
    centers = torch.randn(2, 16, 3, generator=generator)
    patches = torch.arange(model.config.num_patches).expand(2, -1)

    def decode(moved: int) -> tuple[torch.Tensor, torch.Tensor]:
        offset = nn.functional.one_hot(torch.tensor(moved), 16).view(1, 16, 1)
        return model.decoder(hidden_states, centers + offset, visible, patches)

    (points, pixels), (moved_points, same_pixels) = decode(visible), decode(visible + 1)
    torch.testing.assert_close(same_pixels, pixels)
    torch.testing.assert_close(moved_points[:, 2:], points[:, 2:])
    assert (moved_points[:, :2] - points[:, :2]).abs().amin(dim=(0, 1)).max() > 1e-3
    moved_points, moved_pixels = decode(0)
    assert not torch.allclose(moved_points[:, 2:], points[:, 2:]) and not torch.allclose(moved_pixels, pixels)


def overfit(steps: int, learning_rate: float, **overrides) -> tuple:
    """Outputs on one batch before and after training on it."""
    model = build(JointMAEForPreTraining, tiny_config(**overrides)).train()
    inputs = masked_inputs() | {"view": torch.zeros(2, dtype=torch.int64)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    first = model(**inputs)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    return first, model(**inputs)


def test_one_batch_can_be_overfitted():
    first, last = overfit(150, 1e-2)
    assert last.loss_3d < first.loss_3d / 5
    assert last.loss_2d < first.loss_2d / 5


def test_the_cross_loss_alone_moves_points_behind_the_image():
    """Beside the other losses it has little to say at the start, when all points lie at their centre."""
    first, last = overfit(50, 1e-3, point_loss_weight=0.0, pixel_loss_weight=0.0, cross_loss_weight=1.0)
    assert first.loss_cross > 0
    assert last.loss_cross < first.loss_cross / 5


def test_every_parameter_has_a_gradient():
    """Parameters that no loss reaches stop distributed training."""
    labels = {"labels": torch.tensor([0, 1])}
    parts = {"labels": torch.zeros(2, 128, dtype=torch.int64)}
    comparing = tiny_config(agreement_loss_weight=1.0)
    for model_class, config, inputs in (
        (JointMAEForPreTraining, None, masked_inputs()),
        (JointMAEForPreTraining, comparing, masked_inputs() | {"second_point_values": clouds(seed=1)}),
        (JointMAEForPointCloudClassification, None, {"point_values": clouds()} | labels),
        (JointMAEForPartSegmentation, None, {"point_values": clouds()} | parts),
    ):
        model = build(model_class, config).train()
        model(**inputs).loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("of_visible", [True, False])
def test_agreement_finds_the_other_view_of_each_shape(of_visible):
    """Two views of a shape share it; swapping them between shapes makes the comparison wrong."""
    weights = {"point_loss_weight": 0.0, "pixel_loss_weight": 0.0, "cross_loss_weight": 0.0}
    config = tiny_config(**weights, agreement_loss_weight=2, agreement_of_visible=of_visible)
    torch.manual_seed(0)
    model = JointMAEForPreTraining(config).train()
    inputs = masked_inputs(4)
    second = inputs["point_values"].flip(1) * 1.1  # another order, another size
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(30):
        output = model(**inputs, second_point_values=second)
        torch.testing.assert_close(output.loss, 2 * output.loss_agreement)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    model.eval()
    right = model(**inputs, second_point_values=second).loss_agreement
    wrong = model(**inputs, second_point_values=second.roll(1, 0)).loss_agreement
    assert right < 0.3 < math.log(4) < wrong
    hidden = dict(inputs, point_noise=inputs["point_noise"].flip(1))  # other tokens stay visible
    changed = model(**hidden, second_point_values=second).loss_agreement
    assert torch.equal(changed, right) != of_visible


def test_agreement_is_blind_to_scale_and_offset_of_features():
    first = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    scale, offset = torch.tensor([1.0, 100.0, 0.01, 5.0, 1.0, 1.0]), torch.tensor([0.0, 50.0, 0.0, -3.0, 0.0, 1.0])
    second = first + 0.1
    value = agreement_loss(first, second, 0.1)
    torch.testing.assert_close(agreement_loss(first * scale + offset, second, 0.1), value, rtol=0.02, atol=1e-4)
    assert value < 0.05 < math.log(8) < agreement_loss(first, second.flip(0), 0.1)


def test_agreement_is_off_unless_asked_for():
    inputs, second = masked_inputs(), clouds(seed=1)
    faithful = build(JointMAEForPreTraining)
    comparing = build(JointMAEForPreTraining, tiny_config(agreement_loss_weight=1.0))
    assert faithful(**inputs).loss_agreement is None
    assert comparing(**inputs).loss_agreement is None  # evaluation goes without another view
    with pytest.raises(ValueError, match="`second_point_values` was given, but"):
        faithful(**inputs, second_point_values=second)
    with pytest.raises(ValueError, match=r"`second_point_values` has shape \(2, 64, 3\), expected"):
        comparing(**inputs, second_point_values=second[:, :64])
    with pytest.raises(ValueError, match="`second_point_values` is missing"):
        comparing.train()(**inputs)


@pytest.mark.parametrize("field", ["norm_point_loss", "norm_pixel_loss"])
def test_normalised_losses_are_finite_and_differ(field):
    inputs = masked_inputs()
    plain = build(JointMAEForPreTraining)(**inputs)
    output = build(JointMAEForPreTraining, tiny_config(**{field: True}))(**inputs)
    assert output.loss.isfinite() and output.loss != plain.loss


def test_without_image_branch_pretraining_is_3d_alone():
    model = build(JointMAEForPreTraining, tiny_config(use_image_branch=False))
    assert not [name for name, _ in model.named_parameters() if "image" in name]
    inputs = masked_inputs()
    output = model(inputs["point_values"], point_noise=inputs["point_noise"])
    assert output.loss_2d is None and output.loss_cross is None and output.mask_2d is None
    assert output.reconstructed_patches is None and output.pixel_values is None
    torch.testing.assert_close(output.loss, model.config.point_loss_weight * output.loss_3d)
    with pytest.raises(
        ValueError, match="`pixel_values` was given, but this encoder has no image branch: `use_image_branch` is false"
    ):
        model.joint_mae(**with_images(clouds(), model.config))


@pytest.mark.parametrize(
    "name, value",
    [
        ("point_mask", torch.ones(2, 100, dtype=torch.bool)),
        ("point_mask", torch.ones(1, 128, dtype=torch.bool)),
        ("point_mask", torch.ones(2, 128)),
        ("visible_tokens", torch.arange(4)[None]),
        ("visible_tokens", torch.arange(2)),
        ("visible_patches", torch.arange(4)[None]),
        ("image_dropped", torch.ones(3, dtype=torch.bool)),
        ("projection", torch.ones(2, 3, 3)),
    ],
)
def test_inputs_of_a_wrong_shape_or_type_are_refused(name, value):
    model = build(JointMAEModel)
    with pytest.raises(ValueError, match=rf"`{name}` has shape \({value.shape[0]},"):
        model(**with_images(clouds(), model.config) | {name: value})


@pytest.mark.parametrize(
    "name, value",
    [
        ("point_noise", torch.rand(2, 3)),
        ("point_noise", torch.rand(1, 8)),
        ("patch_noise", torch.rand(2, 3)),
        ("view", torch.zeros(3, dtype=torch.int64)),
        ("point_mask", torch.ones(2, 100, dtype=torch.bool)),
    ],
)
def test_masks_of_a_wrong_shape_are_refused_in_pretraining(name, value):
    with pytest.raises(ValueError, match=f"`{name}` has shape"):
        build(JointMAEForPreTraining)(clouds(), **{name: value})


def test_only_three_views_are_there():
    with pytest.raises(ValueError, match="`view` holds 7, expected 0 to 2"):
        build(JointMAEForPreTraining)(clouds(), view=torch.tensor([0, 7]))


def test_a_projection_without_its_images_is_refused():
    with pytest.raises(ValueError, match="`projection` was given without `pixel_values`"):
        build(JointMAEForPreTraining)(clouds(), projection=torch.ones(2, 3, 4))


@pytest.mark.parametrize(
    "model_class", [JointMAEForPreTraining, JointMAEForPointCloudClassification, JointMAEForPartSegmentation]
)
def test_a_configuration_may_ask_for_tuples(model_class):
    inputs = masked_inputs() if model_class is JointMAEForPreTraining else {"point_values": clouds()}
    expected = build(model_class)(**inputs).to_tuple()
    outputs = build(model_class, tiny_config(return_dict=False))(**inputs)
    assert isinstance(outputs, tuple) and len(outputs) == len(expected)
    assert all(torch.equal(output, value) for output, value in zip(outputs, expected, strict=True))


def test_a_sheet_seen_from_above_does_not_take_over_the_loss():
    model, losses = build(JointMAEForPreTraining), {}
    for thickness in (0.0, 1e-6, 1e-3, 0.02, 0.5):
        inputs = masked_inputs()
        inputs["point_values"][..., 2] *= thickness
        losses[thickness] = model(**inputs).loss_cross.item()
    assert losses[0.5] > 0 and max(losses.values()) < 1


def test_without_cross_loss_the_rest_is_unchanged():
    inputs = masked_inputs()
    with_cross = build(JointMAEForPreTraining)(**inputs)
    output = build(JointMAEForPreTraining, tiny_config(use_cross_loss=False))(**inputs)
    assert output.loss_cross is None and output.loss_3d == with_cross.loss_3d and output.loss_2d == with_cross.loss_2d
    cross = with_cross.loss - JointMAEConfig().cross_loss_weight * with_cross.loss_cross
    torch.testing.assert_close(output.loss, cross)


def test_positions_may_be_added_once():
    points = clouds()
    every, once = (build(JointMAEModel, tiny_config(position_every_layer=value)) for value in (True, False))
    assert not torch.allclose(every(points).last_hidden_state, once(points).last_hidden_state, atol=1e-2)


# ---- Backends and precision


@pytest.mark.parametrize("dropped", [None, torch.tensor([True, False])], ids=["image", "image_dropped"])
def test_eager_and_sdpa_agree(dropped):
    inputs = masked_inputs() | {"image_dropped": dropped}
    eager, sdpa = (
        build(JointMAEForPreTraining, attn_implementation=name)(**inputs, output_hidden_states=True)
        for name in ("eager", "sdpa")
    )
    torch.testing.assert_close(eager.loss, sdpa.loss)
    torch.testing.assert_close(eager.reconstructed_points, sdpa.reconstructed_points, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(eager.reconstructed_patches, sdpa.reconstructed_patches, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(eager.hidden_states[-1], sdpa.hidden_states[-1], atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_changes_no_gradient():
    inputs = masked_inputs() | {"view": torch.zeros(2, dtype=torch.int64)}
    plain, checkpointed = (build(JointMAEForPreTraining).train() for _ in range(2))
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        model(**inputs).loss.backward()
    expected, found = gradients(plain), gradients(checkpointed)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def test_bfloat16_autocast_is_close():
    model, inputs = build(JointMAEForPreTraining).train(), masked_inputs()
    inputs["view"] = torch.zeros(2, dtype=torch.int64)
    expected = model(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs)
    output.loss.backward()
    assert output.loss.dtype == torch.float32 and torch.equal(output.centers, expected.centers)
    for name in ("loss_3d", "loss_2d", "loss_cross"):
        torch.testing.assert_close(output[name], expected[name], atol=0, rtol=0.05)
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def gradients_of(model, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and the gradient of each parameter."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_how_many_clouds_are_embedded_at_once_changes_nothing(gradient_checkpointing, monkeypatch):
    model = build(JointMAEForPreTraining, tiny_config(agreement_loss_weight=1.0, agreement_of_visible=False))
    if gradient_checkpointing:
        model.train().gradient_checkpointing_enable()
    torch.manual_seed(1)
    inputs = {"point_values": clouds(5), "second_point_values": clouds(5, seed=1), "view": torch.arange(5) % 3}
    inputs |= {"point_noise": torch.rand(5, 16), "patch_noise": torch.rand(5, 64)}
    whole_loss, whole = gradients_of(model, **inputs)
    sizes, embed = [], modeling_joint_mae.JointMAEGroupEmbedding.forward

    def counted(self, groups):
        sizes.append(len(groups))
        return embed(self, groups)

    monkeypatch.setattr(modeling_joint_mae.JointMAEGroupEmbedding, "forward", counted)
    monkeypatch.setattr(modeling_joint_mae, "_CHUNK_SIZE", 2 * 32 * 8 * 16)
    loss, parts = gradients_of(model, **inputs)
    assert sizes == [4, 1] + 2 * [2, 2, 1]  # with half of the groups, then twice with all
    torch.testing.assert_close(loss, whole_loss)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_gradient_of_a_group_maximum_is_shared_by_equals(dtype):
    features = torch.randint(4, (2, 3, 8, 5), generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    weight = torch.arange(30.0).view(2, 3, 5).to(dtype)
    assert torch.equal(group_max(features), features.amax(2))
    (ours,) = torch.autograd.grad(group_max(features), features, weight)
    (theirs,) = torch.autograd.grad(features.amax(2), features, weight)
    torch.testing.assert_close(ours, theirs)


def test_the_gradient_of_a_group_maximum_can_be_differentiated():
    features = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda values: group_max(values).square(), features)


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, True), (torch.bfloat16, False)])
def test_on_a_cpu_attention_is_fused_in_float32_only(dtype, fused, monkeypatch):
    """torch's fused attention is slow in bfloat16 there."""
    calls, attention = [], nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(args)
        return attention(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
    build(JointMAEModel, attn_implementation="sdpa").to(dtype)(clouds())
    assert bool(calls) == fused


def test_compiled_model_gives_the_same():
    """In one graph. The default backend gives the same, and takes a minute to generate its code."""
    model = build(JointMAEForPreTraining, tiny_config(num_hidden_layers=1, num_centers=[16, 8], alignment_radii=[1]))
    inputs = masked_inputs()
    inputs["point_noise"] = inputs["point_noise"][:, :8]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for seed in (0, 1):
            inputs["point_values"] = clouds(seed=seed)
            expected, output = model(**inputs), compiled(**inputs)
            assert torch.equal(output.mask_3d, expected.mask_3d)
            torch.testing.assert_close(output.centers, expected.centers)
            for name in ("loss", "reconstructed_points", "reconstructed_patches"):
                torch.testing.assert_close(output[name], expected[name], atol=1e-4, rtol=1e-4)


# ---- Clouds of unequal size, and padding


def pad(points: torch.Tensor, extra: int) -> dict[str, torch.Tensor]:
    """Padding in between the points of the cloud and beyond them, in any order."""
    batch_size, num_points, _ = points.shape
    order = torch.randperm(num_points + extra, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([points, 1.2 * clouds(batch_size, extra, seed=9)], dim=1)[:, order]
    return {"point_values": padded, "point_mask": (order < num_points).expand(batch_size, -1)}


def test_padding_changes_nothing():
    points = clouds()
    padded = pad(points, 50)
    kept = padded["point_mask"][0]
    reordered = padded["point_values"][:, kept]
    for model_class in (JointMAEModel, JointMAEForPointCloudClassification, JointMAEForPartSegmentation):
        model = build(model_class)
        expected, output = model(reordered)[0], model(**padded)[0]
        if model_class is JointMAEForPartSegmentation:
            output = output[:, kept]
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    model, noise = build(JointMAEForPreTraining), masked_inputs()
    expected = model(**noise | {"point_values": reordered})
    output = model(**noise | padded)
    assert torch.equal(output.pixel_values, expected.pixel_values)
    torch.testing.assert_close(output.loss, expected.loss)


def test_padded_points_are_left_out_of_the_segmentation_loss():
    model = build(JointMAEForPartSegmentation)
    points = clouds()
    labels = (points[..., 2] > 0).long()
    order = torch.cat([torch.arange(128), torch.zeros(20, dtype=torch.int64)])
    mask = (torch.arange(148) < 128).expand(2, -1)
    expected = model(points, labels=labels).loss
    output = model(points[:, order], point_mask=mask, labels=torch.where(mask, labels[:, order], 1))
    torch.testing.assert_close(output.loss, expected)


def test_clouds_of_other_sizes_and_fewer_points_than_centers_work():
    model = build(JointMAEModel)
    for num_points in (8, 20, 500):
        output = model(clouds(num_points=num_points))
        assert output.last_hidden_state.shape == (2, 16, 32) and output.last_hidden_state.isfinite().all()
    mask = torch.arange(128).expand(2, -1) < torch.tensor([[3], [128]])
    assert model(clouds(), point_mask=mask).last_hidden_state.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"point_values": torch.zeros(2, 128)}, r"`point_values` has shape \(2, 128\)"),
        ({"point_values": torch.zeros(2, 128, 4)}, r"`point_values` has shape \(2, 128, 4\)"),
        ({"point_values": torch.zeros(2, 7, 3)}, "holds 7 points for each cloud, expected at least the 8"),
        (
            {"pixel_values": torch.zeros(2, 1, 28, 28)},
            r"`pixel_values` has shape \(2, 1, 28, 28\), expected \(2, 1, 32",
        ),
        ({"projection": None}, "`pixel_values` was given without `projection`"),
        ({"projection": torch.zeros(2, 4, 4)}, r"`projection` has shape \(2, 4, 4\)"),
    ],
)
@pytest.mark.parametrize("model_class", [JointMAEModel, JointMAEForPreTraining])
def test_wrong_inputs_are_named(model_class, change, message):
    config = tiny_config()
    with pytest.raises(ValueError, match=message):
        build(model_class, config)(**with_images(clouds(), config) | change)


def test_indices_beyond_the_tokens_are_refused():
    model = build(JointMAEModel)
    inputs = with_images(clouds(), model.config)
    for name, stop in (("visible_tokens", 16), ("visible_patches", 64)):
        with pytest.raises(ValueError, match=f"`{name}` holds {stop}, expected 0 to {stop - 1}"):
            model(**inputs, **{name: torch.tensor([[0, stop], [1, 2]])})


def test_pretraining_projects_nothing_before_it_has_looked_at_the_clouds():
    model = build(JointMAEForPreTraining, tiny_config(num_target_points=64))
    for points, message in (
        (torch.rand(128, 3), r"`point_values` has shape \(128, 3\), expected \(batch, num_points, 3\)"),
        (torch.rand(2, 128, 4), r"`point_values` has shape \(2, 128, 4\)"),
        (torch.rand(2, 40, 3), "holds 40 points for each cloud, expected at least the 64 .*`num_target_points`"),
    ):
        with pytest.raises(ValueError, match=message):
            model(points)


# ---- Heads


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "labels"),
    [
        ("regression", 1, torch.tensor([0.5, -1.0])),
        ("regression", 3, torch.tensor([[0.5, 1, 2], [3, -1.0, 0]])),
        ("single_label_classification", 3, torch.tensor([2, 0])),
        ("multi_label_classification", 3, torch.tensor([[1.0, 0, 1], [0, 0, 1]])),
    ],
)
@pytest.mark.parametrize("stated", [True, False])
def test_classification_losses(problem_type, num_labels, labels, stated):
    if not stated and problem_type == "regression" and num_labels > 1:
        problem_type = "multi_label_classification"  # what transformers makes of several floating-point targets
    config = tiny_config(num_labels=num_labels, problem_type=problem_type if stated else None)
    output = build(JointMAEForPointCloudClassification, config)(clouds(), labels=labels)
    assert output.logits.shape == (2, num_labels)
    expected = {
        "regression": lambda: nn.functional.mse_loss(output.logits.squeeze(), labels),
        "single_label_classification": lambda: nn.functional.cross_entropy(output.logits, labels),
        "multi_label_classification": lambda: nn.functional.binary_cross_entropy_with_logits(output.logits, labels),
    }
    torch.testing.assert_close(output.loss, expected[problem_type]())


def test_part_segmentation_labels_every_point():
    model = build(JointMAEForPartSegmentation, tiny_config(num_labels=5))
    points = clouds()
    labels = torch.randint(5, (2, 128), generator=torch.Generator().manual_seed(0))
    labels[:, :30] = -100
    output = model(points, labels=labels)
    assert output.logits.shape == (2, 128, 5)
    kept = labels >= 0
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits[kept], labels[kept]))
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(points[:, order]).logits, output.logits[:, order], atol=1e-5, rtol=1e-5)
    assert model(points, labels=torch.full_like(labels, -100)).loss == 0


def test_part_segmentation_is_told_the_object_class():
    model = build(JointMAEForPartSegmentation, tiny_config(num_object_classes=3))
    points = clouds()
    first, second = (model(points, object_class=torch.tensor([0, value])).logits for value in (1, 2))
    assert torch.equal(first[0], second[0]) and not torch.allclose(first[1], second[1])
    with pytest.raises(ValueError, match="`object_class` is missing; the configuration expects one of 3 classes"):
        model(points)
    with pytest.raises(ValueError, match="`object_class` holds 3, expected 0 to 2"):
        model(points, object_class=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"`object_class` has shape \(1,\), expected \(batch,\), here \(2,\)"):
        model(points, object_class=torch.tensor([1]))
    for wrong, came in ((1, "int"), (torch.tensor([0.0, 1.0]), "torch.float32")):
        with pytest.raises(TypeError, match=f"`object_class` is of type {came}, expected a tensor of torch.int64"):
            model(points, object_class=wrong)


@pytest.mark.parametrize("wrong", [-1, 4])
def test_labels_out_of_range_are_named(wrong):
    config = tiny_config(num_labels=4)
    message = f"`labels` holds {wrong}, expected 0 to 3"
    with pytest.raises(ValueError, match=message):
        build(JointMAEForPointCloudClassification, config)(clouds(), labels=torch.tensor([0, wrong]))
    with pytest.raises(ValueError, match=message):
        build(JointMAEForPartSegmentation, config)(clouds(), labels=torch.full((2, 128), wrong))


# ---- Construction, saving, loading


@pytest.mark.parametrize(
    "model_class",
    [JointMAEModel, JointMAEForPreTraining, JointMAEForPointCloudClassification, JointMAEForPartSegmentation],
)
def test_saved_models_load_as_they_were(model_class, tmp_path):
    model = build(model_class)
    model.save_pretrained(tmp_path)
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    inputs = masked_inputs() if model_class is JointMAEForPreTraining else {"point_values": clouds()}
    assert torch.equal(model(**inputs)[0], loaded.eval()(**inputs)[0])


@pytest.mark.parametrize("model_class", [JointMAEForPointCloudClassification, JointMAEForPartSegmentation])
def test_a_head_takes_its_encoder_from_pretraining(model_class, tmp_path):
    pretrained = build(JointMAEForPreTraining)
    pretrained.save_pretrained(tmp_path)
    model, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert all(name.startswith(("classifier.", "segmenter.")) for name in report["missing_keys"])
    assert not report["unexpected_keys"]
    points = clouds()
    expected = pretrained.joint_mae(points).last_hidden_state
    assert torch.equal(model.eval().joint_mae(points).last_hidden_state, expected)


def test_models_build_on_the_meta_device():
    for model_class in (JointMAEForPreTraining, JointMAEForPointCloudClassification, JointMAEForPartSegmentation):
        with torch.device("meta"):
            model = model_class(JointMAEConfig())
        assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


def test_shapes_can_be_had_on_the_meta_device():
    with torch.device("meta"):
        output = JointMAEModel(tiny_config())(torch.empty(2, 128, 3))
    assert output.last_hidden_state.shape == (2, 16, 32)


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_presets_run(name):
    config = JointMAEConfig.from_preset(name)
    assert config.num_visible_tokens == config.num_centers[-1] // 4
    assert config.num_visible_patches == config.num_patches // 4
    model = build(JointMAEForPreTraining, config)
    points = clouds(1, config.num_points)
    assert model(points).loss.isfinite()
    assert model.joint_mae(points).pooler_output.shape == (1, 2 * config.hidden_size)
    assert JointMAEConfig.from_preset(name, mask_ratio=0.5).num_visible_tokens == config.num_centers[-1] / 2


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="`name` is 'huge', expected one of"):
        JointMAEConfig.from_preset("huge")


def test_configuration_survives_json(tmp_path):
    named = {"num_object_classes": 2, "object_classes": ("rod", "disc")}
    config = tiny_config(mask_ratio=0.5, alignment_radii=(0, None), **named)
    config.save_pretrained(tmp_path)
    loaded = JointMAEConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() | {"transformers_version": None} == config.to_dict() | {"transformers_version": None}
    assert json.loads((tmp_path / "config.json").read_text())["alignment_radii"] == [0, None]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("hidden_size", 30, r"a multiple of `num_attention_heads` \(4\)"),
        ("hidden_size", 0, "a positive integer"),
        ("num_attention_heads", 0, "a positive integer"),
        ("num_hidden_layers", 0, "a positive integer"),
        ("intermediate_size", -1, "a positive integer"),
        ("decoder_hidden_size", 18, "a multiple of 4"),
        ("decoder_num_attention_heads", 0, "a positive integer"),
        ("decoder_intermediate_size", 0, "a positive integer"),
        ("decoder_num_shared_layers", -1, "0 or more"),
        ("decoder_num_specific_layers", -1, "0 or more"),
        ("num_points", 7, r"at least `num_neighbors\[0\]` and `num_target_points`"),
        ("num_centers", [16, 32], "finest scale first"),
        ("num_centers", [32, 0], "positive integers"),
        ("num_neighbors", [8], "one entry for each of `num_centers`"),
        ("num_neighbors", [8, 33], "at most as many neighbours as there are finer centres"),
        ("point_embed_sizes", [16, 24], r"to end in `hidden_size` \(32\)"),
        ("image_embed_sizes", [32], "one entry for each of `patch_strides`"),
        ("image_embed_sizes", [32, 16], "to end in `hidden_size`"),
        ("patch_strides", [2, 0], "positive integers"),
        ("image_size", 30, "a multiple of"),
        ("num_channels", 3, "1: depth has one"),
        ("splat_size", 4, "a positive odd integer"),
        ("image_kernel_size", 0, "a positive odd integer"),
        ("image_embed_depth", -1, "0 or more"),
        ("mask_ratio", 1.0, "leaving some of 16 tokens visible and some masked"),
        ("mask_ratio", 0.01, "leaving some of 16 tokens visible and some masked"),
        ("image_mask_ratio", 0.0, "leaving some of 64 tokens visible and some masked"),
        ("alignment_radii", [], "a list of radii"),
        ("alignment_radii", [2, -1], "a list of radii"),
        ("attention_probs_dropout_prob", 1.0, r"in \[0, 1\)"),
        ("drop_path_rate", -0.1, r"in \[0, 1\)"),
        ("classifier_dropout", 1.5, r"in \[0, 1\)"),
        ("modality_dropout", 1.1, r"in \[0, 1\]"),
        ("num_target_points", 0, "a positive integer"),
        ("point_loss_weight", -1.0, "0 or more"),
        ("pixel_loss_weight", -1.0, "0 or more"),
        ("cross_loss_weight", -1.0, "0 or more"),
        ("agreement_loss_weight", -1.0, "0 or more"),
        ("agreement_temperature", 0.0, "more than 0"),
        ("pooling_layers", [], "None or a list of blocks"),
        ("pooling_layers", [0, 1], "None or a list of blocks"),
        ("pooling_layers", [4], r"1 to `num_hidden_layers` \(3\)"),
        ("classifier_hidden_size", 0, "a positive integer"),
        ("classifier_num_layers", 0, "a positive integer"),
        ("num_object_classes", -1, "0 or more"),
        ("object_classes", ["body"], r"one name for each of `num_object_classes` \(0\)"),
    ],
)
def test_wrong_configurations_name_the_field(field, value, expected):
    with pytest.raises(Exception, match=rf"`{field}` is .*expected .*{expected}"):
        tiny_config(**{field: value})


def test_what_is_overridden_at_loading_is_validated_too(tmp_path):
    build(JointMAEForPreTraining).save_pretrained(tmp_path)
    for wrong in ({"mask_ratio": 0.0}, {"num_centers": [16, 32]}, {"num_hidden_layers": 2, "pooling_layers": [3]}):
        with pytest.raises(Exception, match=rf"`{list(wrong)[-1]}` is .*expected"):
            JointMAEForPreTraining.from_pretrained(tmp_path, **wrong)
    assert JointMAEModel.from_pretrained(tmp_path, num_centers=(16, 16)).config.num_centers == [16, 16]
    config, unused = JointMAEConfig.from_pretrained(tmp_path, num_centers=[24, 16], a=1, return_unused_kwargs=True)
    assert config.num_centers == [24, 16] and unused == {"a": 1}


# ---- Initial weights


@pytest.mark.parametrize("loaded", [False, True])
def test_narrow_layers_are_drawn_to_keep_the_variance(tmp_path, loaded):
    """Of custom code, transformers skips `_init_weights` of modules that hold no parameter of their own."""
    config = tiny_config(point_embed_sizes=[64, 64], image_embed_sizes=[64, 64], hidden_size=64)
    model = build(JointMAEForPreTraining, config)
    if loaded:  # what a file lacks is drawn likewise
        heads = JointMAEForPartSegmentation(config)
        weights = {name: tensor for name, tensor in heads.state_dict().items() if "point_embeddings" not in name}
        heads.save_pretrained(tmp_path, state_dict=weights)
        model = JointMAEForPartSegmentation.from_pretrained(tmp_path)
    embedding = model.joint_mae.point_embeddings
    layers = [*embedding.group_embedding.children(), *embedding.mergers[0].children()]
    if not loaded:
        layers += [*model.joint_mae.image_embeddings.projections, model.joint_mae.position_embeddings.fc2]
    for layer in (layer for layer in layers if isinstance(layer, nn.Linear)):
        assert layer.weight.std().item() == pytest.approx(layer.in_features**-0.5, rel=0.25)
    assert model.joint_mae.layers[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_segmentation_head_hears_all_of_its_inputs_alike():
    config = tiny_config(num_object_classes=5, classifier_hidden_size=64)
    model = build(JointMAEForPartSegmentation, config)
    heard = {}
    for name, layer in model.segmenter.named_children():
        if name.endswith(("_proj", "_embedding")) and name != "out_proj":
            layer.register_forward_hook(lambda _, __, output, name=name: heard.update({name: output.std().item()}))
    model(clouds(8), object_class=torch.arange(8) % 5)
    assert heard.keys() == {"token_proj", "fine_proj", "point_proj", "class_embedding"}
    assert max(heard.values()) < 3 * min(heard.values())


@pytest.mark.parametrize("layers", [1, 3])
def test_a_classifier_does_not_depend_on_the_scale_of_features_and_trains_on_one_cloud(layers):
    model = build(
        JointMAEForPointCloudClassification, tiny_config(classifier_num_layers=layers, classifier_dropout=0.0)
    )
    head, features = model.classifier.train(), torch.randn(16, model.config.pooled_size)
    scales = torch.logspace(-1, 2, model.config.pooled_size)
    torch.testing.assert_close(head(features * scales + 3), head(features), atol=2e-3, rtol=0)
    loss = model.train()(clouds(1), labels=torch.tensor([1])).loss
    loss.backward()
    assert loss.isfinite() and model.joint_mae.layers[0].mlp.fc1.weight.grad.norm() > 0
