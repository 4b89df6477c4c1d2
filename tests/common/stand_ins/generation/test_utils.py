"""Stand-in for a base class that the source distribution leaves out; only looked for, and only on generative models."""


class GenerationTesterMixin:
    pass
