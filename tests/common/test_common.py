"""Runs transformers' common tests on every model class. Without them this file fails; it never skips them."""

import fetch_common_tests
import pytest


try:
    fetch_common_tests.make_importable()
except fetch_common_tests.FetchError as error:
    MISSING = str(error)
else:
    MISSING = None
    from model_tests import (  # isort: skip
        JointMAEConfigTest,
        JointMAEForPreTrainingWithImagesTest,
        JointMAEModelTest,
        JointMAEModelWithImagesTest,
    )

    __all__ = [
        "JointMAEConfigTest",
        "JointMAEForPreTrainingWithImagesTest",
        "JointMAEModelTest",
        "JointMAEModelWithImagesTest",
    ]


def test_common_tests_of_transformers_are_there():
    if MISSING:
        pytest.fail(MISSING, pytrace=False)
