"""Settings that have to stand before any test module imports Megatron, and what is not collected."""

import os
from importlib.util import find_spec

# Megatron compiles small functions when it is imported. The CPU runtime switches that off in a job; here
# the tests of single modules import Megatron first, in the same process as the forked ranks.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

# The evaluation suites need the extra `eval`: `make test-eval` installs it and runs them
collect_ignore = [] if find_spec("lm_eval") else ["unit/evaluation_suites"]
