"""Runs after every other test (see conftest): together they have read each tensor of the golden suite."""

from __future__ import annotations

import pytest

GOLDEN_TESTS = {"test_golden_ops", "test_golden_commit", "test_model", "test_generate_golden"}


def test_golden_suite_is_complete(golden, request):
    run = {item.path.stem for item in request.session.items}
    if not run >= GOLDEN_TESTS or request.config.getoption("keyword"):
        pytest.skip("only a run of the whole suite covers everything")
    assert golden.unread() == []


def test_the_suite_has_what_its_manifest_lists(golden):
    assert len(golden.file_of) == len(golden.manifest["tensors"]) == 1515
    assert len(golden.cases) == 102
