"""The real kaggle command in forks of one process that has imported its libraries: a tenth of a second a call, not a whole one.

`python tests/fakes/kaggle/forks.py serve SOCKET` is that process; `python -S forks.py call SOCKET WORD…` stands for the
command: it hands over its environment, folder and streams, passes Ctrl-C on, takes the call with it when it is killed, and
ends with its exit code. The package `kaggle` itself, which reads the environment when it is imported, is imported in each fork.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys

PRELOADED = ("kagglesdk.kaggle_client", "requests", "tqdm", "bleach", "slugify", "dateutil.parser", "runpy")


def call(path: str, words: list[str]) -> int:
    """The exit code of `kaggle WORD…`, run by the server at `path`."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        asked = {"words": words, "environment": dict(os.environ), "folder": os.getcwd()}
        signal.signal(signal.SIGINT, lambda *_: server.send(b"^"))
        socket.send_fds(server, [json.dumps(asked).encode() + b"\n"], [0, 1, 2])
        answer = server.recv(16)
        return int(answer) if answer else 1


def serve(path: str) -> None:
    """Answer calls until killed, or until whoever started this has closed its standard input."""
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.split(".")[0] == "kaggle"]:
        del sys.modules[name]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            client, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                os._exit(attend(client))
            client.close()


def attend(client: socket.socket) -> int:
    """Run one call in a fork of its own, interrupted or killed as its client is."""
    content, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
    while not content.endswith(b"\n"):
        content += client.recv(1 << 20)
    pid = os.fork()
    if pid == 0:
        client.close()
        run(json.loads(content), streams)
    for stream in streams:
        os.close(stream)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            with contextlib.suppress(BrokenPipeError):  # whoever asked was killed
                client.send(str(os.waitstatus_to_exitcode(status)).encode())
            return 0
        if client in select.select([client], [], [], 0.005)[0]:
            os.kill(pid, signal.SIGINT if client.recv(1) else signal.SIGKILL)


def run(asked: dict, streams: list[int]) -> None:
    """Become the command."""
    import runpy
    import tempfile
    import traceback

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tempfile.tempdir, sys.argv, code = None, ["kaggle", *asked["words"]], 0
    try:
        runpy.run_module("kaggle", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(call(sys.argv[2], sys.argv[3:]))
