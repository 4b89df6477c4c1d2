"""Joint-MAE: 2D-3D joint masked autoencoders for point clouds, native to Hugging Face transformers.

Importing this package registers its classes with transformers' Auto classes, so that
`AutoModel.from_pretrained("org/joint-mae")` works without `trust_remote_code`.
"""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForSemanticSegmentation,
    AutoProcessor,
)

from .auto import AutoModelForPartSegmentation, AutoModelForPointCloudClassification
from .configuration_joint_mae import JointMAEConfig
from .modeling_joint_mae import (
    JointMAEForPartSegmentation,
    JointMAEForPointCloudClassification,
    JointMAEForPreTraining,
    JointMAEModel,
    JointMAEPreTrainedModel,
)
from .point_cloud_processing_joint_mae import JointMAEPointCloudProcessor
from .version import __version__


AutoConfig.register("joint_mae", JointMAEConfig, exist_ok=True)
AutoModel.register(JointMAEConfig, JointMAEModel, exist_ok=True)
AutoModelForPreTraining.register(JointMAEConfig, JointMAEForPreTraining, exist_ok=True)
AutoModelForPointCloudClassification.register(JointMAEConfig, JointMAEForPointCloudClassification, exist_ok=True)
AutoModelForPartSegmentation.register(JointMAEConfig, JointMAEForPartSegmentation, exist_ok=True)
# Code in a repository can only name Auto classes that transformers has, and it has none for clouds: the heads borrow.
AutoModelForImageClassification.register(JointMAEConfig, JointMAEForPointCloudClassification, exist_ok=True)
AutoModelForSemanticSegmentation.register(JointMAEConfig, JointMAEForPartSegmentation, exist_ok=True)
AutoFeatureExtractor.register(JointMAEConfig, JointMAEPointCloudProcessor, exist_ok=True)
AutoProcessor.register(JointMAEConfig, JointMAEPointCloudProcessor, exist_ok=True)
# What is saved carries its code, for `trust_remote_code=True` where the package is not installed.
JointMAEConfig.register_for_auto_class()
JointMAEModel.register_for_auto_class("AutoModel")
JointMAEForPreTraining.register_for_auto_class("AutoModelForPreTraining")
JointMAEForPointCloudClassification.register_for_auto_class("AutoModelForImageClassification")
JointMAEForPartSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")

__all__ = [
    "AutoModelForPartSegmentation",
    "AutoModelForPointCloudClassification",
    "JointMAEConfig",
    "JointMAEForPartSegmentation",
    "JointMAEForPointCloudClassification",
    "JointMAEForPreTraining",
    "JointMAEModel",
    "JointMAEPointCloudProcessor",
    "JointMAEPreTrainedModel",
    "__version__",
]
