"""Exports to torch.export and ONNX give what the model gives, and sample each cloud anew."""

import pytest
import torch
from tiny import mask_noise, tiny_config_fields, tiny_points
from torch.export import Dim
from transformers.exporters import DynamoConfig, DynamoExporter, OnnxConfig, OnnxExporter
from transformers.exporters.utils import get_leaf_tensors

import jointmae_hf


MODELS = (
    "JointMAEModel",
    "JointMAEForPreTraining",
    "JointMAEForPointCloudClassification",
    "JointMAEForPartSegmentation",
)
# An exporter unrolls sampling step by step and its time grows with the graph: few centres, one block.
FEWER = {"num_centers": [8, 4], "num_neighbors": [4, 2], "num_hidden_layers": 1, "alignment_radii": [1]}


def tiny_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return getattr(jointmae_hf, name)(jointmae_hf.JointMAEConfig(**tiny_config_fields() | FEWER)).eval()


def tiny_inputs(name: str, seed: int = 0, batch_size: int = 2, num_points: int = 32) -> dict[str, torch.Tensor]:
    inputs = {"point_values": tiny_points(seed, batch_size, num_points)}
    if name == "JointMAEForPreTraining":
        noise = mask_noise(batch_size)
        inputs |= {"point_noise": noise["point_noise"][:, :4], "patch_noise": noise["patch_noise"]}
    return inputs


def assert_same_outputs(exported, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict:
    with torch.no_grad():
        expected = get_leaf_tensors(model(**inputs))
        outputs = get_leaf_tensors(exported(**{name: value.clone() for name, value in inputs.items()}))
    assert set(outputs) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(outputs[name], value, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    return outputs


def check_export(exporter, config, name: str, dynamic: bool):
    """The inputs of the export, then another cloud, then, of a dynamic export, another size of everything."""
    model, inputs = tiny_model(name), tiny_inputs(name)
    if dynamic:
        config.dynamic, config.dynamic_shapes = True, {key: {0: Dim.DYNAMIC} for key in inputs}
        config.dynamic_shapes["point_values"][1] = Dim.DYNAMIC
    exported = exporter.export(model, {key: value.clone() for key, value in inputs.items()}, config)
    first = assert_same_outputs(exported, model, inputs)
    second = assert_same_outputs(exported, model, tiny_inputs(name, seed=1))
    for key in {"centers", "logits"} & set(first):  # sampled indices that became constants would leave these alike
        assert not torch.allclose(first[key], second[key])
    if dynamic:
        assert_same_outputs(exported, model, tiny_inputs(name, seed=2, batch_size=3, num_points=40))


@pytest.mark.parametrize("name", MODELS)
def test_torch_export(name):
    check_export(DynamoExporter(), DynamoConfig(), name, dynamic=True)


# Dynamic shapes triple the time of an export to ONNX, so one class stands for all.
@pytest.mark.parametrize("name", MODELS)
def test_onnx_export(name):
    check_export(OnnxExporter(), OnnxConfig(), name, dynamic=name == "JointMAEForPointCloudClassification")
