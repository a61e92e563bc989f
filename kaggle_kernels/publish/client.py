"""Calls of Kaggle's API: kagglesdk's typed requests and answers, with a time limit on every call.

kagglesdk's own HTTP client waits for ever. Its service clients take any object with a `call` method, and `Transport` is one
with time limits of the socket. They suffice against a server that never answers, because no call streams its answer.

Credentials are looked for where the kaggle command looks, and are never printed.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import requests
from kagglesdk.blobs.services.blob_api_service import BlobApiClient
from kagglesdk.competitions.services.competition_api_service import CompetitionApiClient
from kagglesdk.datasets.services.dataset_api_service import DatasetApiClient
from kagglesdk.kaggle_creds import KaggleCredentials
from kagglesdk.kaggle_env import KaggleEnv, get_access_token_from_env, get_endpoint
from kagglesdk.kaggle_http_client import KaggleHttpClient
from kagglesdk.kernels.services.kernels_api_service import KernelsApiClient
from kagglesdk.security.services.oauth_service import OAuthClient
from kagglesdk.security.types.oauth_service import IntrospectTokenRequest
from kagglesdk.users.services.account_service import AccountClient

from preprocess.core.errors import UserError
from preprocess.core.files import read_object

# Of one call: until there is a connection (or a piece of an upload is taken), and until the answer.
CONNECT_SECONDS = 10
ANSWER_SECONDS = 30
TIMEOUT = (CONNECT_SECONDS, ANSWER_SECONDS)

# A question that failed is repeated for so long. With the last attempt, that is less than two minutes.
REPEAT_SECONDS = 60

ITEMS_A_PAGE = 100

HOW_TO_LOG_IN = (
    "run `kaggle auth login`, or put a token of kaggle.com/settings/api into KAGGLE_API_TOKEN"
)


class Refused(UserError):
    """Kaggle answered with an error, and its HTTP status: 200 where a normal answer has the error."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status

    @property
    def is_absent(self) -> bool:
        """Whether there is no such thing, or none that this account may see (403)."""
        return self.status in (403, 404)


class Unanswered(UserError):
    """No answer, or none that tells whether the call took effect."""


@dataclass(frozen=True)
class Pace:
    """How often Kaggle is asked whether something is ready, and for how long in all."""

    poll_seconds: float = 15
    patience_seconds: float = 3600

    def looks(self) -> Iterator[int]:
        """Count from 0, with a pause before each number but the first, until the patience is over.

        A loop over these numbers asks Kaggle once in each round.
        """
        deadline = time.monotonic() + self.patience_seconds
        number = 0
        while True:
            yield number
            number += 1
            pause = self.pause(number)
            if time.monotonic() + pause > deadline:
                return
            time.sleep(pause)

    def pause(self, number: int) -> float:
        """Seconds to wait before look or attempt `number`, counted from 0: they grow eightfold."""
        return self.poll_seconds * min(1.5 ** (number - 1), 8)


@dataclass(frozen=True)
class Transport:
    """What kagglesdk's service clients send their requests through."""

    base_url: str
    session: requests.Session = field(default_factory=requests.Session)

    def call(self, service_name: str, request_name: str, request, response_type):
        """Make one call; kagglesdk's service clients require this signature.

        Raises:
            Refused: Kaggle answered with an error.
            Unanswered: The connection or the server failed.
        """
        url = f"{self.base_url}/v1/{service_name}/{request_name}"
        try:
            response = self.session.post(url, json=type(request).to_dict(request), timeout=TIMEOUT)
        except requests.RequestException as error:
            raise as_unanswered(request_name, error) from None

        try:
            check_status(request_name, response)
            # kagglesdk checks nothing: what it cannot read fails in many ways.
            return response_type.prepare_from(response)
        except (ValueError, KeyError, TypeError, AttributeError):
            text = " ".join(response.text.split())
            raise Unanswered(
                f"Kaggle: {request_name}: its answer cannot be read: {text[:100]!r}"
            ) from None


@dataclass(frozen=True)
class Kaggle:
    """An account on Kaggle, and kagglesdk's service clients that act for it."""

    owner: str
    pace: Pace
    session: requests.Session  # sends the credentials: for Kaggle's own addresses only
    blobs: BlobApiClient
    competitions: CompetitionApiClient
    datasets: DatasetApiClient
    kernels: KernelsApiClient


def connect(pace: Pace) -> Kaggle:
    """Log in with the credentials that the kaggle command would use."""
    # The kaggle command knows no other environment than these two.
    is_local = os.environ.get("KAGGLE_API_ENVIRONMENT") == "LOCALHOST"
    endpoint = get_endpoint(KaggleEnv.LOCAL if is_local else KaggleEnv.PROD)
    transport = Transport(f"{endpoint}/api" if is_local else endpoint)

    owner = log_in(transport, pace)
    return Kaggle(
        owner=owner,
        pace=pace,
        session=transport.session,
        blobs=BlobApiClient(transport),
        competitions=CompetitionApiClient(transport),
        datasets=DatasetApiClient(transport),
        kernels=KernelsApiClient(transport),
    )


def log_in(transport: Transport, pace: Pace) -> str:
    """Find the user's credentials, and have `transport` send them from now on.

    They are looked for where the kaggle command looks, in the same order.

    Returns:
        The user's name on Kaggle.
    """
    # An access token, from KAGGLE_API_TOKEN or a file.
    token, _ = get_access_token_from_env()
    if token:
        user = find_token_owner(transport, pace, token)
        if user:
            transport.session.auth = KaggleHttpClient.BearerAuth(token)
            return user

    # A user name and a key, each from the environment or else from kaggle.json.
    key_file = read_key_file()
    user = os.environ.get("KAGGLE_USERNAME") or key_file.get("username")
    key = os.environ.get("KAGGLE_KEY") or key_file.get("key")
    if user and key:
        transport.session.auth = (user, key)
        return user

    # What `kaggle auth login` left. kagglesdk renews it by the one client that it is given.
    users = SimpleNamespace(account_client=AccountClient(transport))
    login = KaggleCredentials.load(SimpleNamespace(users=users))
    if login and login.get_username():
        transport.session.auth = KaggleHttpClient.BearerAuth(login.get_access_token())
        return login.get_username()

    raise UserError(f"no credentials that Kaggle takes: {HOW_TO_LOG_IN}")


def find_token_owner(transport: Transport, pace: Pace, token: str) -> str | None:
    """Ask Kaggle whose access token it is; None where Kaggle does not know it, or no longer."""
    request = IntrospectTokenRequest()
    request.token = token
    try:
        answer = ask(pace, OAuthClient(transport).introspect_token, request)
    except Refused:
        return None
    return answer.username if answer.active else None


def read_key_file() -> dict:
    """Read kaggle.json from where the kaggle command has it; empty where there is none."""
    home = Path.home() / ".kaggle"
    folder = Path(os.environ.get("KAGGLE_CONFIG_DIR") or home)
    if folder == home and not home.exists():
        config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
        folder = Path(config) / "kaggle"

    file = folder / "kaggle.json"
    return read_object(file) if file.is_file() else {}


def ask(pace: Pace, method: Callable, request):
    """Make a call that only reads, and repeat it for a minute where the connection or Kaggle fails.

    Calls that change something do not go through here. Such a call may take effect although its answer
    is lost: repeated, it would make a second version, run or submission.

    Raises:
        Refused: Kaggle answered with an error.
        Unanswered: It failed for a minute.
    """
    started = time.monotonic()
    attempt = 0
    while True:
        try:
            return method(request)
        except Unanswered as error:
            attempt += 1
            pause = pace.pause(attempt)
            if time.monotonic() - started + pause > REPEAT_SECONDS:
                raise
            print(f"  {error}; repeated after {pause:g} s", flush=True)
            time.sleep(pause)


def list_all(pace: Pace, method: Callable, request, field_name: str) -> list:
    """Read all pages of a list, as `ask` reads one; an answer has its items in `field_name`."""
    request.page_size = ITEMS_A_PAGE
    items = []
    while True:
        answer = ask(pace, method, request)
        items.extend(getattr(answer, field_name) or [])

        # The last page names no next one. A page that names itself would be read for ever.
        next_page = answer.next_page_token
        if not next_page or next_page == request.page_token:
            return items
        request.page_token = next_page


def as_unanswered(name: str, error: requests.RequestException) -> Unanswered:
    """Say in one line why a request failed, without its address, which may hold a token."""
    if isinstance(error, requests.ReadTimeout):
        reason = f"no answer within {ANSWER_SECONDS} s"
    elif isinstance(error, requests.ConnectTimeout):
        reason = f"no connection within {CONNECT_SECONDS} s"
    elif isinstance(error, requests.HTTPError):
        reason = f"status {error.response.status_code}"
    else:
        reason = "no connection, or it broke off"
    return Unanswered(f"Kaggle: {name}: {reason}; check the network, then run this again")


def check_status(name: str, response: requests.Response) -> None:
    """Raise an error where the HTTP answer to the call `name` is one.

    Raises:
        UserError: Kaggle does not take the credentials.
        Unanswered: An error that passes by itself, such as that of an overloaded server.
        Refused: Any other error.
    """
    status = response.status_code
    message = response.reason or "no message"

    # Kaggle's own errors are JSON, some of them under HTTP 200; those of a gateway are pages.
    if "application/json" in response.headers.get("Content-Type", ""):
        answer = response.json()
        status = max(status, int(answer.get("code") or 0))
        message = answer.get("message") or message

    if status < 400:
        return
    if status == 401:
        raise UserError(f"Kaggle does not take these credentials ({message}): {HOW_TO_LOG_IN}")
    # These pass: a timeout, too many requests, a failing server.
    if status in (408, 429) or status >= 500:
        raise Unanswered(f"Kaggle: {name}: {status} {message}; run this again later")
    raise Refused(message, status)
