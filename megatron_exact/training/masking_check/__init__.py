"""Proof that no document of a packed row sees another, on the model and the layout of a job.

`variants.py` edits micro-batches, `forward.py` builds the job's model and runs them, `verdict.py` compares
and says what it found. The command is tools/check_document_masking.py.
"""
