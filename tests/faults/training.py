"""Faults of training jobs."""

from __future__ import annotations

from tests.faults.matrix import Row

ROWS: list[Row] = []
