"""Whole experiments on the project's tools, run from a source checkout; no package installs them."""
