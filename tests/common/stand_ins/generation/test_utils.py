"""Stand-in for a base class that the source distribution leaves out; the common tests only ask who inherits it."""


class GenerationTesterMixin:
    pass
