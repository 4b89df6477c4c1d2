"""Auto classes for the tasks that transformers has none for."""

from collections import OrderedDict

from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES


class AutoModelForPointCloudClassification(_BaseAutoModelClass):
    """Loads a point cloud classification model by the type in its configuration."""

    _model_mapping = _LazyAutoMapping(CONFIG_MAPPING_NAMES, OrderedDict())


class AutoModelForPartSegmentation(_BaseAutoModelClass):
    """Loads a part segmentation model by the type in its configuration."""

    _model_mapping = _LazyAutoMapping(CONFIG_MAPPING_NAMES, OrderedDict())
