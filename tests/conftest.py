"""Settings that have to stand before any test module imports Megatron, and what is not collected."""

import os
import signal
import sys

import pytest
from hypothesis import settings

# Megatron compiles small functions when it is imported. The CPU runtime switches that off in a job; here
# the tests of single modules import Megatron first, in the same process as the forked ranks.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
# Tests run side by side, and so do their ranks: more threads of sums only wait for a core, and a process
# that has started some cannot be forked.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples every time: a run of the tests says something about a change, not about luck.
# HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("search")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# A shell that runs the tests in the background without job control has them ignore Ctrl-C, and what they
# start would ignore it too; tests that interrupt a tool send the signal that a terminal sends.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Name a failed test at once under CI, where a run that is cut off prints no summary."""
    if report.failed and os.environ.get("CI") and "PYTEST_XDIST_WORKER" not in os.environ:
        text = f"\n{report.nodeid} failed in {report.duration:.0f} s\n{report.longreprtext}"
        print(text, file=sys.stderr, flush=True)
