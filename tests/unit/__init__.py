"""Unit tests. The helpers that assert for several of them explain a failure as a test does."""

import pytest

pytest.register_assert_rewrite("tests.unit.broken_tasks", "tests.unit.small_runs")
