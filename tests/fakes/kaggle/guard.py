"""No test may reach Kaggle: the environment that leads the kaggle command to the stand-in, and a guard that proves it does.

The command honours one value only: KAGGLE_API_ENVIRONMENT=LOCALHOST is http://localhost, port 80, which the proxy variables
lead to the stand-in's port. Without it, or with any other value, TEST included, its requests go to the real site.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.fakes.kaggle.server import KaggleServer
from tests.fakes.kaggle.site import TOKEN

PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY")
ELSEWHERE = ("all_proxy", "ALL_PROXY", "REQUEST_METHOD")  # the last one makes Python ignore HTTP_PROXY
SECRETS = ("KAGGLE_", "WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_", "GOOGLE_APPLICATION_CREDENTIALS")
CREDENTIALS = (".kaggle", ".config/kaggle/kaggle.json", ".netrc", ".huggingface/token", ".cache/huggingface/token")
HOSTS = ("http://localhost", "https://www.kaggle.com", "https://api.kaggle.com", "https://storage.googleapis.com")
PROVED: set[frozenset[tuple[str, str]]] = set()
COMMAND = Path(sys.executable).with_name("kaggle")

# Run by the kaggle command's own Python: where its library would go, by which proxies, and one request that really goes there.
PROBE = """
import json, sys
import requests
from kagglesdk.kaggle_env import get_endpoint, get_env
endpoint = get_endpoint(get_env())
proxies = {url: requests.utils.get_environ_proxies(url).get(url.split(":")[0]) for url in [endpoint, *sys.argv[2:]]}
print(json.dumps({"endpoint": endpoint, "proxies": proxies}), flush=True)
if endpoint == "http://localhost" and set(proxies.values()) == {sys.argv[1]}:
    requests.get(endpoint + "/canary", params={"nonce": sys.stdin.read()}, timeout=10)
"""


class ReachesOut(Exception):
    """A request could leave this machine."""


def kaggle_environment(server: KaggleServer, home: Path) -> dict[str, str]:
    """The environment of a `kaggle` command that can only reach the server; its home and temporary files are in `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SECRETS) and name not in ELSEWHERE}
    (home / "tmp").mkdir(parents=True)
    ours = {"KAGGLE_API_ENVIRONMENT": "LOCALHOST", "KAGGLE_API_TOKEN": TOKEN, "NO_PROXY": "", "no_proxy": ""}
    ours |= {"HOME": str(home), "XDG_CONFIG_HOME": str(home / ".config"), "TMPDIR": str(home / "tmp")}
    ours |= {"PATH": f"{COMMAND.parent}{os.pathsep}{kept.get('PATH', '')}"}
    return {**kept, **ours, **dict.fromkeys(PROXIES, server.url)}


def check_environment(environment: dict[str, str], server: KaggleServer) -> None:
    """Raise ReachesOut where the variables themselves would let a request out, or hold a credential."""
    found = []
    site = environment.get("KAGGLE_API_ENVIRONMENT")
    if site != "LOCALHOST":
        found.append(f"KAGGLE_API_ENVIRONMENT is {site!r}: every value but LOCALHOST is the real site")
    for name in PROXIES:
        if environment.get(name) != server.url:
            found.append(f"{name} is {environment.get(name)!r} and not the stand-in's {server.url}")
    found += [
        f"{name} is {environment[name]!r} and must be empty" for name in ("NO_PROXY", "no_proxy") if environment.get(name)
    ]
    found += [f"{name} is set" for name in ELSEWHERE if name in environment]
    ours = {"KAGGLE_API_ENVIRONMENT", "KAGGLE_API_TOKEN"}
    found += [f"{name} is set" for name in environment if name.startswith(SECRETS) and name not in ours]
    if environment.get("KAGGLE_API_TOKEN") != TOKEN:
        found.append("KAGGLE_API_TOKEN is not the stand-in's")
    home = Path(environment.get("HOME", "/"))
    found += [f"{home / name} holds credentials" for name in CREDENTIALS if (home / name).exists()]
    if shutil.which("kaggle", path=environment.get("PATH")) != str(COMMAND):
        found.append(f"kaggle on the PATH is not {COMMAND}")
    if found:
        raise ReachesOut("; ".join(found))


def check_resolution(environment: dict[str, str], server: KaggleServer) -> None:
    """Raise ReachesOut unless the command's library asks localhost, every proxy is the server, and a canary arrives there."""
    nonce = secrets.token_hex(8)
    probe = [COMMAND.parent / "python", "-c", PROBE, server.url, *HOSTS]
    ended = subprocess.run(probe, env=environment, input=nonce, capture_output=True, text=True, timeout=60)
    told = json.loads(ended.stdout or "{}")
    if told.get("endpoint") != "http://localhost":
        raise ReachesOut(f"kagglesdk would ask {told.get('endpoint') or ended.stderr}, not http://localhost")
    for url, proxy in told["proxies"].items():
        if proxy != server.url or urlsplit(proxy).hostname != "127.0.0.1":
            raise ReachesOut(f"{url} would be asked by way of {proxy}, not of {server.url}")
    if not any(request.call == "GET" and nonce in request.url for request in server.requests):
        raise ReachesOut(f"a request to {told['endpoint']} did not arrive at {server.url}: {ended.stderr[-500:]}")
    server.requests.clear()


def refuse_unless_loopback(environment: dict[str, str], server: KaggleServer) -> None:
    """Fail the test, before it has begun, where a request could reach anything but the stand-in.

    What the library makes of a set of variables is asked once a session: the port apart, they are the same in every test.
    """
    decisive = frozenset(
        (name, value.replace(server.url, "the stand-in"))
        for name, value in environment.items()
        if name.startswith("KAGGLE_") or name.lower().endswith("_proxy")
    )
    try:
        check_environment(environment, server)
        if decisive not in PROVED:
            check_resolution(environment, server)
            PROVED.add(decisive)
    except ReachesOut as problem:
        pytest.fail(f"not started, a request could leave this machine: {problem}", pytrace=False)


def fail_on_trespass(server: KaggleServer) -> None:
    """Fail the test at its end where another host was asked for; the stand-in refused it."""
    if server.trespasses:
        pytest.fail(f"requests for another host than localhost: {server.trespasses}", pytrace=False)
