"""The OpenAI-compatible HTTP API. Nothing in here knows Ray: it is a FastAPI application around a ``Service``."""
