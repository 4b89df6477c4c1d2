"""Fixtures that several files share."""

import multiprocessing

import pytest


@pytest.fixture(scope="session")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jointmae_hf.training.pretraining", "datasets", "pytest"])
    return context
