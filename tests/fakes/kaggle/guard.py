"""No test may reach Kaggle: the environment that leads every client to the stand-in, which refuses every other host.

The kaggle command and our own client honour one value only: KAGGLE_API_ENVIRONMENT=LOCALHOST is http://localhost, port 80,
which the proxy variables lead to the stand-in's port. With any other value their requests go to the real site.
"""

import os
from pathlib import Path

import pytest

from tests.fakes.kaggle.server import KaggleServer
from tests.fakes.kaggle.site import TOKEN

PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY")
# The last one makes Python ignore HTTP_PROXY.
ELSEWHERE = ("all_proxy", "ALL_PROXY", "REQUEST_METHOD")
SECRETS = ("KAGGLE_", "WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_", "GOOGLE_APPLICATION_CREDENTIALS")


def kaggle_environment(server: KaggleServer, home: Path) -> dict[str, str]:
    """The environment of a client that can only reach the server; its home and temporary files are in `home`."""
    (home / "tmp").mkdir(parents=True)
    environment = {}
    for name, value in os.environ.items():
        if not name.startswith(SECRETS) and name not in ELSEWHERE:
            environment[name] = value

    environment.update(dict.fromkeys(PROXIES, server.url))
    environment.update(KAGGLE_API_ENVIRONMENT="LOCALHOST", KAGGLE_API_TOKEN=TOKEN, NO_PROXY="", no_proxy="")
    environment.update(HOME=str(home), XDG_CONFIG_HOME=str(home / ".config"), TMPDIR=str(home / "tmp"))
    return environment


def fail_on_trespass(server: KaggleServer) -> None:
    """Fail the test at its end where another host was asked for; the stand-in refused it."""
    if server.trespasses:
        pytest.fail(f"requests for another host than localhost: {server.trespasses}", pytrace=False)
