"""Which database is taken, what is said when there is none, and that no password gets out."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_mongod import HELLO, FakeMongod, refusal
from pytest import CaptureFixture, MonkeyPatch
from toy_experiment import ex as toy
from toy_process import Server, connected, finish, journals, run, start, wait_for

from experiments.tracking import UserError, embedded
from experiments.tracking.database import Choice, choose
from experiments.tracking.experiment import repository_info
from experiments.tracking.values import redacted, secrets_of

pytest_plugins = ("toy_process",)
pytestmark = pytest.mark.usefixtures("data")  # no database is named
PASSWORD = "s3cret/w0rd"
QUOTED = "s3cret%2Fw0rd"
SECRETS = (PASSWORD, QUOTED)


def test_the_order_of_the_choice(monkeypatch: MonkeyPatch, tmp_path: Path) -> None:
    assert choose() == Choice(None, "embedded")
    path = tmp_path / ".config/l2l_implicit/mongo_url"
    path.parent.mkdir(parents=True)
    path.write_text("mongodb://there/name\n")
    path.chmod(0o600)
    assert choose() == Choice("mongodb://there/name", str(path))
    monkeypatch.setenv("L2L_IMPLICIT_MONGO_URL", "mongodb+srv://cluster/x")
    assert choose() == Choice("mongodb+srv://cluster/x", "L2L_IMPLICIT_MONGO_URL")
    for option, url in (("host:1:db", "mongodb://host:1/db"),
                        ("host:1", "mongodb://host:1/l2l_implicit"),
                        ("db", "mongodb://localhost:27017/db")):  # fmt: skip
        assert choose(option) == Choice(url, "-m")


SECRET_URL = f"mongodb://me:{QUOTED}@there".encode()


@pytest.mark.parametrize(("content", "mode", "message"), [
    (SECRET_URL, 0o640, "chmod 600"), (SECRET_URL, 0o604, "chmod 600"),
    (Path.mkdir, 0, "Is a directory"), (lambda path: os.mkfifo(path, 0o600), 0, "must hold a URL"),
    (lambda path: path.symlink_to("nowhere"), 0, "No such file"),
    (bytes(range(256)), 0o600, "must hold a URL that starts with mongodb://"),
])  # fmt: skip
def test_a_url_file_that_will_not_do_is_refused(
    tmp_path: Path, content: bytes | Callable[[Path], object], mode: int, message: str
) -> None:
    path = tmp_path / ".config/l2l_implicit/mongo_url"
    path.parent.mkdir(parents=True)
    if not isinstance(content, bytes):
        content(path)
    else:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(UserError, match=message) as caught:
        choose()
    assert str(path) in str(caught.value) and QUOTED not in str(caught.value)


@pytest.mark.parametrize("option", [
    f"mongodb://me:{QUOTED}@there", f"me:{QUOTED}@there:1:db", f"{PASSWORD}@there",
    "s3cret@there",  # which Sacred takes for a name
    "host:1:db.collection", "!", None,
])  # fmt: skip
def test_a_malformed_address_is_refused(monkeypatch: MonkeyPatch, option: str | None) -> None:
    monkeypatch.setenv("L2L_IMPLICIT_MONGO_URL", f"me:{QUOTED}@there")
    wanted = "-m takes HOST:PORT:DB" if option else "must hold a URL that starts with mongodb://"
    with pytest.raises(UserError, match=wanted) as caught:
        choose(option)
    assert "s3cret" not in str(caught.value)


def test_a_missing_embedded_server_says_what_to_install(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "EXECUTABLE", "no-such-server")
    with pytest.raises(UserError, match=r'pip install "l2l_implicit\[experiments\]"'):
        embedded.EmbeddedServer()


@pytest.mark.parametrize(("changes", "message"), [
    *(({name: "soon"}, f"L2L_IMPLICIT_MONGO_{name} must be a number of seconds, got 'soon'")
      for name in ("TIMEOUT", "PATIENCE")),
    ({"URL": "mongodb://me:{}@127.0.0.1:1/x"}, "no database answers (L2L_IMPLICIT_MONGO_URL): 127"),
    ({"URL": "mongodb://me:{}@127.0.0.1:port"}, "is not valid"),
    ({"URL": "mongodb://me:{}/@@there"}, "is not valid"),
])  # fmt: skip
def test_a_wrong_variable_is_one_line(tmp_path: Path, changes: Any, message: str) -> None:
    """At once: it has not the patience, of an hour, that a run has with its database."""
    own = {"TIMEOUT": "1", "PATIENCE": "3600", **changes}
    own = {f"L2L_IMPLICIT_MONGO_{name}": value.format(QUOTED) for name, value in own.items()}
    code, output = run(tmp_path, "with", "quick", **own)
    assert code == 1 and message in output and output.count("\n") == 1
    assert output.startswith("error: ") and not any(secret in output for secret in SECRETS)


ON_INSERT = {"ok": 1, "n": 0, "writeErrors": [{"index": 0, "code": 14031,
             "errmsg": "No space left on device"}]}  # fmt: skip
QUOTA = "you are over your space quota, using 512 MB of 512 MB"
NOT_ALLOWED = refusal(13, "Unauthorized", "not authorized on lab to execute command")
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "wrong password": (
        {"saslStart": refusal(18, "AuthenticationFailed", "Authentication failed.")},
        "refuses the user name or password",
    ),
    "may not read": ({"find": NOT_ALLOWED}, "does not let this user read and write"),
    "may not write": ({"insert": NOT_ALLOWED}, "ask for the role readWrite"),
    "may not index": ({"createIndexes": NOT_ALLOWED}, "ask for the role readWrite"),
    "disk full": ({"insert": refusal(14031, "OutOfDiskSpace", "No space left")}, "is full"),
    "disk full at one document": ({"insert": ON_INSERT}, "is full"),
    "quota": ({"insert": refusal(8000, "AtlasError", QUOTA)}, "is full"),
    "atlas password": ({"find": refusal(8000, "AtlasError", "bad auth : authentication failed")},
                       "refuses the user name or password"),
    "too old": ({"ismaster": {**HELLO, "helloOk": False, "maxWireVersion": 5}},
                "reports wire version 5, but this version of PyMongo requires at least"),
    "TLS": ({}, "if it asks for TLS, the URL needs tls=true"),
    "anything else": ({"insert": refusal(72, "InvalidOptions", "strange")}, "strange"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_server_that_refuses_is_one_line_at_the_start(
    monkeypatch: MonkeyPatch, data: Path, capsys: CaptureFixture[str], name: str
) -> None:
    refused, message = REFUSALS[name]
    with FakeMongod(refused, hangs_up=not refused) as server:
        user = f"me:{QUOTED}@" if "saslStart" in refused else ""
        monkeypatch.setenv("L2L_IMPLICIT_MONGO_URL", f"mongodb://{user}{server.address}/lab")
        with pytest.raises(SystemExit) as stopped:
            toy.run_commandline(["toy", "with", "quick"])
        assert set(refused) <= set(server.seen)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "error" in line]
    assert stopped.value.code == 1 and line.startswith("error: ") and message in line
    assert not any(secret in line for secret in SECRETS)
    assert not journals(data)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that asks for the password."""
    folder = tmp_path_factory.mktemp("guarded")
    unguarded = Server(folder)
    unguarded.start()
    with connected(unguarded.address) as database:
        database.client.admin.command("createUser", "me", pwd=PASSWORD, roles=["root"])
        database.client.admin.command("fsync")
    unguarded.kill()
    server = Server(folder, "--auth")
    server.start()
    yield server
    server.kill()


def everything(url: str) -> str:
    """All that the server holds, files included."""
    with connected(url) as database:
        lab = database.client["lab"]
        return "".join(str(d) for name in lab.list_collection_names() for d in lab[name].find())


def test_no_password_reaches_database_output_or_journal(tmp_path: Path, guarded: Server) -> None:
    url, gate = f"mongodb://me:{QUOTED}@{guarded.address}/lab?authSource=admin", tmp_path / "gate"
    own = {"L2L_IMPLICIT_MONGO_URL": url, "L2L_IMPLICIT_MONGO_PATIENCE": "0.1"}
    # the error's text holds the whole URL; the comment and the options hold the password
    leak = ("-c", f"with {PASSWORD}", "with", "fault=leak", f"say={QUOTED}")
    assert run(tmp_path, *leak, **own)[0] == 1
    words = ("-b", "0.2", "with", "steps=20", f"hold={gate}", f"anything={PASSWORD}")
    process = start(tmp_path, *words, **own)
    wait_for(lambda: "train/loss" in "".join(path.read_text() for path in journals(tmp_path)))
    guarded.kill()
    gate.touch()
    code, output = finish(process)
    (kept,) = journals(tmp_path)
    guarded.start()
    assert code == 1
    for text in (output, kept.read_text(), everything(url)):
        assert "toy" in text
        assert not any(secret in text for secret in SECRETS)


def test_the_token_of_a_git_remote_is_hidden(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True)

    assert repository_info(tmp_path) == []
    git("init", "-q")
    git("remote", "add", "origin", "https://me:ghp_token@host/x.git")
    assert repository_info(tmp_path) == []
    git("commit", "-q", "--allow-empty", "-m", "first")
    (found,) = repository_info(tmp_path)
    assert (found["url"], found["dirty"]) == ("https://***@host/x.git", False)
    file, index = tmp_path / "file", tmp_path / ".git" / "index"
    file.touch()
    git("add", "file")
    git("commit", "-q", "-m", "second")
    os.utime(file, (1, 1))  # which `git status` would note
    before = index.read_bytes()
    (found,) = repository_info(tmp_path)
    assert not found["dirty"] and index.read_bytes() == before, "a run only reads"


@pytest.mark.parametrize(("text", "hidden"), [
    ("mongodb://u:pw@h:1/d", "mongodb://***@h:1/d"), ("mongodb://u:p@ss@h", "mongodb://***@h"),
    ("see https://token@host/a and mail a@b", "see https://***@host/a and mail a@b"),
    ("http://host/path@2x.png", "http://host/path@2x.png"), ("an abcdef key", "an *** key"),
])  # fmt: skip
def test_redaction(text: str, hidden: str) -> None:
    assert redacted({text: [text, 1]}, ["abcdef", "a"]) == {hidden: [hidden, 1]}


@pytest.mark.parametrize(("url", "secrets"), [
    (f"mongodb://me:{QUOTED}@h/d", set(SECRETS)), ("mongodb://h/d", set()),
    ("mongodb://h/?tls=true&tlsCertificateKeyFilePassword=of%20key", {"of%20key", "of key"}),
    ("mongodb+srv://h/?authMechanismProperties=AWS_SESSION_TOKEN:abc",
     {"AWS_SESSION_TOKEN:abc", "abc"}),
])  # fmt: skip
def test_both_forms_of_a_password_are_secret(url: str, secrets: set[str]) -> None:
    assert secrets_of(url) == secrets
