"""Linear SVM, reconstruction losses, the report and its picture."""

import numpy as np
import pytest
import torch

from jointmae_hf import JointMAEConfig, JointMAEForPreTraining
from jointmae_hf.data.loading import PointTable
from jointmae_hf.evaluation import extract_features, linear_svm, pretraining_report, reconstruction_losses
from jointmae_hf.evaluation.part_forest import point_descriptors
from jointmae_hf.evaluation.reconstruction import averaged_encoder_output
from jointmae_hf.visualization import draw_reconstructions


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_points": 96,
    "num_centers": [32, 16],
    "num_neighbors": [8, 4],
    "point_embed_sizes": [16, 32],
    "image_size": 32,
    "patch_strides": [4, 2],
    "image_embed_sizes": [16, 32],
    "decoder_hidden_size": 32,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
    "num_target_points": 8,
}


@pytest.fixture(scope="module")
def model() -> JointMAEForPreTraining:
    torch.manual_seed(0)
    return JointMAEForPreTraining(JointMAEConfig(**TINY)).eval()


def shapes(count: int, seed: int) -> PointTable:
    """Rods and discs, in turn."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    points = generator.normal(size=(count, 96, 3)) * np.where(labels[:, None, None] == 0, [1, 0.1, 0.1], [1, 1, 0.1])
    points -= points.mean(1, keepdims=True)
    points /= np.linalg.norm(points, axis=-1).max(1)[:, None, None]
    return PointTable(points.astype(np.float32), labels, ["rod", "disc"])


def test_features_are_the_pooled_tokens_and_do_not_depend_on_the_batch(model):
    points = shapes(10, 0).points
    features = extract_features(model, points, batch_size=4)
    with torch.no_grad():
        expected = model.joint_mae(torch.from_numpy(points)).pooler_output.numpy()
    np.testing.assert_allclose(features, expected, atol=1e-5)
    by_layer = extract_features(model, points, layers=[0, -1])
    np.testing.assert_allclose(by_layer[1], features, atol=1e-5)
    assert not np.allclose(by_layer[0], features, atol=1e-2)


def test_a_model_keeps_its_mode(model):
    model.train()
    extract_features(model, shapes(2, 0).points)
    reconstruction_losses(model, shapes(2, 0).points)
    assert model.training and model.joint_mae.training
    model.eval()


def test_linear_svm_standardises_with_the_training_split():
    train, test = shapes(60, 0), shapes(40, 1)

    def of(table: PointTable) -> np.ndarray:
        return np.concatenate([table.points.std(1), np.random.default_rng(0).normal(size=(len(table.points), 3))], 1)

    result = linear_svm(of(train), train.labels, of(test), test.labels)
    assert result["accuracy"] >= 90.0
    # Without it, features a thousand times smaller would be all but ignored at C = 0.01.
    assert linear_svm(of(train) * 1e-3, train.labels, of(test) * 1e-3, test.labels) == result


def test_mean_class_accuracy_weighs_classes_equally():
    features = np.array([[0.0], [0.0], [1.0], [1.0]])
    labels = np.array([0, 0, 1, 1])
    result = linear_svm(features, labels, np.array([[0.0], [0.0], [0.0], [0.0]]), np.array([0, 0, 0, 1]), C=1.0)
    assert result == {"accuracy": 75.0, "mean_class_accuracy": 50.0}


def test_linear_svm_refuses_what_it_cannot_fit():
    with pytest.raises(ValueError, match="`test_labels` has 2 entries, expected one for each of 3 clouds"):
        linear_svm(np.eye(3), np.array([0, 1, 2]), np.eye(3), np.array([0, 1]))
    with pytest.raises(ValueError, match="fewer than two classes"):
        linear_svm(np.eye(3), np.zeros(3), np.eye(3), np.zeros(3))


def test_reconstruction_losses_repeat_and_are_means_over_shapes(model):
    points = shapes(7, 2).points
    losses = reconstruction_losses(model, points, seed=3, batch_size=7)
    assert losses == reconstruction_losses(model, points, seed=3, batch_size=7)
    assert losses != reconstruction_losses(model, points, seed=4, batch_size=7)
    assert set(losses) == {"loss_3d", "loss_2d", "loss_cross"}


def test_averaging_takes_away_what_the_encoder_saw(model):
    points = torch.from_numpy(shapes(4, 5).points)
    noise = {"point_noise": torch.rand(4, 16), "patch_noise": torch.rand(4, 16)}
    seen = []

    def remember(module, arguments):
        seen.append(arguments[0])

    handle = model.decoder.register_forward_pre_hook(remember)
    with torch.no_grad(), averaged_encoder_output(model):
        model(points, view=torch.zeros(4, dtype=torch.int64), **noise)
    model(points, view=torch.zeros(4, dtype=torch.int64), **noise)
    handle.remove()
    averaged, plain = seen
    visible = model.config.num_visible_tokens
    for part in (averaged[:, :visible], averaged[:, visible:]):
        assert torch.equal(part, part[:1, :1].expand_as(part))
    torch.testing.assert_close(averaged[0, 0], plain[:, :visible].mean((0, 1)))
    torch.testing.assert_close(averaged[0, -1], plain[:, visible:].mean((0, 1)))
    assert plain.std() > 10 * averaged[:, :visible].std(dim=(0, 1)).max()


def test_report_holds_what_was_measured(model, tmp_path):
    torch.manual_seed(1)
    untrained = JointMAEForPreTraining(model.config)
    train, test = shapes(40, 0), shapes(20, 1)
    report = pretraining_report(model, untrained, train, test, tmp_path)
    expected = linear_svm(
        extract_features(model, train.points), train.labels, extract_features(model, test.points), test.labels
    )
    svm = report["linear_svm"]
    assert svm["pretrained"]["accuracy"] == expected["accuracy"] == svm["pretrained"]["accuracy_by_layer"][-1]
    assert len(svm["untrained"]["accuracy_by_layer"]) == model.config.num_hidden_layers + 1
    held_out, averaged = (report["reconstruction"][key] for key in ("held_out", "encoder_output_averaged"))
    assert held_out == reconstruction_losses(model, test.points)
    assert report["reconstruction"]["ratio"]["loss_3d"] == held_out["loss_3d"] / averaged["loss_3d"]
    assert (tmp_path / report["picture"]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "left_out, losses",
    [
        ({}, {"loss_3d", "loss_2d", "loss_cross"}),
        ({"use_cross_loss": False}, {"loss_3d", "loss_2d"}),
        ({"use_image_branch": False}, {"loss_3d"}),
    ],
)
def test_report_holds_what_there_is_to_measure(left_out, losses, tmp_path):
    model = JointMAEForPreTraining(JointMAEConfig(**TINY, **left_out))
    table = PointTable(shapes(6, 0).points, None, None)
    report = pretraining_report(model, model, table, table, tmp_path)
    assert "linear_svm" not in report  # without labels
    assert all(report["reconstruction"][key].keys() == losses for key in ("held_out", "encoder_output_averaged"))


@pytest.mark.parametrize("use_image_branch", [True, False])
def test_a_picture_is_drawn_of_every_kind_of_model(use_image_branch, tmp_path):
    config = JointMAEConfig(**TINY, use_image_branch=use_image_branch)
    path = draw_reconstructions(JointMAEForPreTraining(config), shapes(3, 0).points, tmp_path / "new" / "picture.png")
    width, height = (int.from_bytes(path.read_bytes()[a : a + 4], "big") for a in (16, 20))
    assert (width > 1.5 * height) == use_image_branch


# ---- Descriptors of points


def test_descriptors_tell_a_line_a_plane_and_a_ball_apart():
    generator = np.random.default_rng(0)
    line = np.zeros((300, 3))
    line[:, 0] = generator.uniform(-1, 1, 300)
    plane = np.concatenate([generator.uniform(-1, 1, (300, 2)), np.zeros((300, 1))], axis=1)
    ball = generator.normal(size=(300, 3))
    points = torch.from_numpy(np.stack([line, plane, ball])).float()
    described = point_descriptors(points)
    assert described.shape == (3, 300, 34) and torch.equal(described[..., :3], points)
    assert torch.allclose(described[..., 3], (points - points.mean(1, keepdim=True)).norm(dim=-1), atol=1e-6)
    for first in (4, 14, 24):  # of each size of neighbourhood: linearity, planarity, sphericity, which sum to 1
        shares = described[..., first : first + 3]
        assert torch.allclose(shares.sum(-1), torch.ones(3, 300), atol=1e-4)
        assert (shares[0, :, 0] > 0.999).all() and (shares[1, :, 2] < 1e-4).all()
        assert shares[2, :, 2].mean() > 0.05 and shares[1, :, 1].mean() > 0.4
        assert (described[1, :, first + 6] > 0.999).all()  # the plane's normal is z
    chosen = torch.tensor([[7, 3], [0, 299], [5, 5]])
    few = described.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 34))
    assert torch.allclose(point_descriptors(points, chosen=chosen), few, atol=1e-6)


def test_descriptors_do_not_see_padding():
    points = torch.randn(1, 150, 3)
    padded = torch.cat([points, torch.full((1, 20, 3), 0.1)], dim=1)  # among them
    mask = torch.arange(170) < 150
    assert torch.allclose(point_descriptors(padded, mask[None])[:, :150], point_descriptors(points), atol=1e-5)
