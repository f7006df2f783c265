"""A process with the null device, from which jobs are forked: `python -m tests.cuda.server`.

The null device must be there before torch is imported, and pytest's own process has imported it. This one
imports torch and Megatron once; each line of its standard input asks for a function of `tests.cuda.cases`
on some ranks, and each answer is one line.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from megatron_exact.rehearsal import device, session


def main() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever imports print is no answer
    device.activate()
    session.import_job_code()
    from tests.cuda import cases
    from tests.distributed import ranks

    ranks.prepare_ranks()
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        function = partial(
            getattr(cases, request["function"]), Path(request["folder"]), **request["arguments"]
        )
        try:
            ended = ranks.run_ranks(request["ranks"], function, Path(request["folder"]))
            answer = {"codes": ended.codes, "outputs": ended.outputs}
        except AssertionError as error:
            answer = {"codes": [-1], "outputs": [str(error)]}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
