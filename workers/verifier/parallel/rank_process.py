"""The process of one rank: ``python -m`` this, with a ``RankSpec`` as the first line of standard input.

It ends when standard input does. Why it ended, if not by that, is one JSON object on standard output.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback

from transformers.utils import logging

from dspark.errors import ConfigError, DSparkError
from dspark.workers.verifier.parallel.follower import follow
from dspark.workers.verifier.parallel.spec import RankSpec


def main() -> int:
    """Follow until the leader ends; the exit code."""
    report = os.dup(1)
    os.dup2(2, 1)  # what libraries print must not get between
    spec = RankSpec.from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_leader, daemon=True).start()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the leader shows one
    try:
        follow(spec, "127.0.0.1")
    except Exception as error:  # noqa: BLE001 - whatever it is, the leader wants to know
        if not isinstance(error, DSparkError):
            traceback.print_exc()
        words = {"error": str(error) or type(error).__name__, "is_refusal": isinstance(error, ConfigError)}
        os.write(report, json.dumps(words).encode())
        return 1
    return 0


def _end_with_leader() -> None:
    """Wait for the end of the lifeline. The main thread may hang in a collective that nobody will complete."""
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # process groups whose other end is gone may take for ever to be torn down
