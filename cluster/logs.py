"""Our log lines in the files of the Serve replica that writes them."""

from __future__ import annotations

import logging


def join_serve_logs() -> None:
    """Let loggers below ``dspark`` write where Serve's own logger of this replica writes."""
    ours = logging.getLogger("dspark")
    ours.handlers = list(logging.getLogger("ray.serve").handlers)
    ours.setLevel(logging.INFO)
    ours.propagate = False
