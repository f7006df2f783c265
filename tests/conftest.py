"""Settings that have to stand before any test module imports Megatron, and what is not collected."""

import os

# Megatron compiles small functions when it is imported. The CPU runtime switches that off in a job; here
# the tests of single modules import Megatron first, in the same process as the forked ranks.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
