"""A CUDA device without a GPU, to run the code that users run on GPUs where there is none.

Importing this package changes nothing. `device.activate()` puts the device in place, for the life of the
process and before torch is imported; `tools/rehearse.py` and the tests are its only callers.
"""
