"""Stand-in for a base class that the source distribution leaves out; `test_export.py` tests the exports instead."""


class ExportTesterMixin:
    pass
