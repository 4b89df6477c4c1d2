from transformers import FeatureExtractionMixin
class JointMAEPointCloudProcessor(FeatureExtractionMixin):
    pass
