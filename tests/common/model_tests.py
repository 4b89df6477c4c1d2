"""transformers' own tests of models and configurations, on Joint-MAE. Imported once the common tests can be."""

import inspect
import unittest
from unittest import mock

import torch
from tiny import BATCH_SIZE, NUM_PATCHES, NUM_TOKENS, image_of, mask_noise, tiny_config_fields, tiny_points
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.testing_utils import torch_device
from transformers_common_tests.test_configuration_common import ConfigTester
from transformers_common_tests.test_modeling_common import ModelTesterMixin

from jointmae_hf import (
    JointMAEConfig,
    JointMAEForPartSegmentation,
    JointMAEForPointCloudClassification,
    JointMAEForPreTraining,
    JointMAEModel,
)


class JointMAEModelTester:
    """What the common tests ask of a model: a tiny configuration, inputs, and the sizes they imply."""

    def __init__(self, seq_length: int):
        self.batch_size = BATCH_SIZE
        self.seq_length = seq_length
        self.is_training = True
        self.hidden_size = 32
        self.num_hidden_layers = 2
        self.num_attention_heads = 4

    def get_config(self) -> JointMAEConfig:
        return JointMAEConfig(**tiny_config_fields())

    def prepare_config_and_inputs_for_common(self) -> tuple[JointMAEConfig, dict]:
        return self.get_config(), {"point_values": tiny_points().to(torch_device)}


class JointMAEModelTest(ModelTesterMixin, unittest.TestCase):
    """All classes, given points alone; pre-training then projects its images."""

    all_model_classes = (
        JointMAEModel,
        JointMAEForPreTraining,
        JointMAEForPointCloudClassification,
        JointMAEForPartSegmentation,
    )
    pipeline_model_mapping = {}
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True
    seq_length = NUM_TOKENS
    with_images = False

    def setUp(self):
        self.model_tester = JointMAEModelTester(self.seq_length)
        # The common tests know a model without a loss by its name in the Auto mapping of transformers.
        patch = mock.patch.dict(MODEL_MAPPING_NAMES, {JointMAEConfig.model_type: "JointMAEModel"})
        patch.start()
        self.addCleanup(patch.stop)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        points = inputs["point_values"]
        extra = mask_noise(points.shape[0])
        if self.with_images:
            extra |= image_of(points, self.model_tester.get_config())
        if return_labels and model_class is JointMAEForPointCloudClassification:
            inputs["labels"] = torch.zeros(points.shape[0], dtype=torch.int64, device=points.device)
        if return_labels and model_class is JointMAEForPartSegmentation:
            inputs["labels"] = torch.zeros(points.shape[:2], dtype=torch.int64, device=points.device)
        accepted = inspect.signature(model_class.forward).parameters
        return inputs | {name: value.to(points.device) for name, value in extra.items() if name in accepted}

    def test_model_get_set_embeddings(self):
        """Replaces the common one, which expects the embedding of a vocabulary, as models of images do."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertIsInstance(model.get_input_embeddings(), torch.nn.Module)
            self.assertIsNone(model.get_output_embeddings())


class JointMAEModelWithImagesTest(JointMAEModelTest):
    """The encoder, given images too: all tokens of both kinds attend."""

    all_model_classes = (JointMAEModel,)
    seq_length = NUM_TOKENS + NUM_PATCHES
    with_images = True


class JointMAEForPreTrainingWithImagesTest(JointMAEModelTest):
    """Pre-training on images that are given and not projected from the points."""

    all_model_classes = (JointMAEForPreTraining,)
    with_images = True


class JointMAEConfigTest(unittest.TestCase):
    def test_config(self):
        ConfigTester(
            self, config_class=JointMAEConfig, has_text_modality=False, **tiny_config_fields()
        ).run_common_tests()
