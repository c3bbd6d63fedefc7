"""The way into a Ray cluster."""

from __future__ import annotations

import os

NAMESPACE = "livesfm"  # of the actors that runs share


def connect(address: str) -> None:
    """Connects this process, with the token of the cluster where there is one, as `ray start` does.

    Raises:
        ConnectionError: the cluster does not answer.
        Others of Ray: its version is another one, or the token is wrong.
    """
    has_token = "RAY_AUTH_TOKEN" in os.environ or os.path.exists(
        os.environ.get("RAY_AUTH_TOKEN_PATH", os.path.expanduser("~/.ray/auth_token"))
    )
    if has_token:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray  # which reads it now

    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
