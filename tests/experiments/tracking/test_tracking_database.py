"""Which database is taken, what is said when there is none, and that no password gets out."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pymongo
import pytest
from fake_mongod import FakeMongod, refusal
from toy_experiment import ex as toy
from toy_process import Server, environment, journals, run, start, wait_for
from toy_process import finish as wait

from experiments.tracking import UserError, embedded
from experiments.tracking.database import Choice, choose
from experiments.tracking.experiment import repository_info
from experiments.tracking.values import redacted, secrets_of

PASSWORD = "s3cret/w0rd"
QUOTED = "s3cret%2Fw0rd"
SECRETS = (PASSWORD, QUOTED)


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment that names no database."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("L2L_IMPLICIT_MONGO_URL", "L2L_IMPLICIT_MONGO_URL_FILE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_order_of_the_choice(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert choose() == Choice(None, "embedded")
    path = tmp_path / ".config/l2l_implicit/mongo_url"
    path.parent.mkdir(parents=True)
    path.write_text("mongodb://there/name\n")
    path.chmod(0o600)
    assert choose() == Choice("mongodb://there/name", str(path))
    clean.setenv("L2L_IMPLICIT_MONGO_URL", "mongodb+srv://cluster/x")
    assert choose() == Choice("mongodb+srv://cluster/x", "L2L_IMPLICIT_MONGO_URL")
    assert choose("host:1:db").url == "mongodb://host:1/db"
    assert choose("host:1").url == "mongodb://host:1/l2l_implicit"
    assert choose("db").url == "mongodb://localhost:27017/db"


SECRET_URL = f"mongodb://me:{QUOTED}@there".encode()


@pytest.mark.parametrize(("content", "mode", "message"), [
    (SECRET_URL, 0o640, "chmod 600"), (SECRET_URL, 0o604, "chmod 600"), (None, 0, "No such file"),
    (bytes(range(256)), 0o600, "must hold a URL that starts with mongodb://"),
])  # fmt: skip
def test_a_url_file_that_will_not_do_is_refused(
    clean: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, mode: int, message: str
) -> None:
    path = tmp_path / "url"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    clean.setenv("L2L_IMPLICIT_MONGO_URL_FILE", str(path))
    with pytest.raises(UserError, match=message) as caught:
        choose()
    assert str(path) in str(caught.value) and QUOTED not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "variable", "message"),
    [
        (f"mongodb://me:{QUOTED}@there", "", "-m takes HOST:PORT:DB"),
        (f"me:{QUOTED}@there:1:db", "", "-m takes HOST:PORT:DB"),
        (f"{PASSWORD}@there", "", "-m takes HOST:PORT:DB"),
        ("s3cret@there", "", "-m takes HOST:PORT:DB"),  # which Sacred takes for a name
        ("host:1:db.collection", "", "-m takes HOST:PORT:DB"),
        ("!", "", "-m takes HOST:PORT:DB"),
        (None, f"me:{QUOTED}@there", "must hold a URL that starts with mongodb://"),
    ],
)
def test_a_malformed_address_is_refused(
    clean: pytest.MonkeyPatch, option: str | None, variable: str, message: str
) -> None:
    clean.setenv("L2L_IMPLICIT_MONGO_URL", variable)
    with pytest.raises(UserError, match=message) as caught:
        choose(option)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("variable", ["L2L_IMPLICIT_MONGO_TIMEOUT", "L2L_IMPLICIT_MONGO_PATIENCE"])
def test_a_time_limit_that_is_none_is_one_line_at_the_start(tmp_path: Path, variable: str) -> None:
    code, output = run(environment(tmp_path, **{variable: "soon"}), "with", "quick")
    assert (code, output) == (1, f"error: {variable} must be a number of seconds, got 'soon'\n")


def test_a_missing_embedded_server_says_what_to_install(
    clean: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clean.setattr(embedded, "EXECUTABLE", "no-such-server")
    clean.setenv("L2L_IMPLICIT_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r'pip install "l2l_implicit\[experiments\]"'):
        embedded.EmbeddedServer()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mongodb://me:{}@127.0.0.1:1/x", "no database answers (L2L_IMPLICIT_MONGO_URL): 127"),
        ("mongodb://me:{}@127.0.0.1:port", "is not valid"),
        ("mongodb://me:{}/@@there", "is not valid"),
    ],
)
def test_a_wrong_url_is_one_line_at_once(tmp_path: Path, url: str, message: str) -> None:
    """At once: it has not the patience, of an hour, that a run has with its database."""
    own = {"L2L_IMPLICIT_MONGO_TIMEOUT": "1", "L2L_IMPLICIT_MONGO_PATIENCE": "3600"}
    env = environment(tmp_path, L2L_IMPLICIT_MONGO_URL=url.format(QUOTED), **own)
    code, output = run(env, "with", "quick")
    assert code == 1 and message in output and output.count("\n") == 1
    assert not any(secret in output for secret in SECRETS)


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
    "anything else": ({"insert": refusal(72, "InvalidOptions", "strange")}, "strange"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_server_that_refuses_is_one_line_at_the_start(
    clean: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    refused, message = REFUSALS[name]
    clean.setenv("L2L_IMPLICIT_DATA", str(tmp_path / "data"))
    with FakeMongod(refused) as server:
        user = f"me:{QUOTED}@" if "saslStart" in refused else ""
        clean.setenv("L2L_IMPLICIT_MONGO_URL", f"mongodb://{user}{server.address}/lab")
        with pytest.raises(SystemExit) as stopped:
            toy.run_commandline(["toy", "with", "quick"])
        assert set(refused) <= set(server.seen)
    lines = [line for line in capsys.readouterr().out.splitlines() if "error" in line]
    assert stopped.value.code == 1 and len(lines) == 1
    assert lines[0].startswith("error: ") and message in lines[0]
    assert not any(secret in lines[0] for secret in SECRETS)
    assert not journals(tmp_path / "data")


def test_a_server_that_wants_tls_is_one_line_at_the_start(tmp_path: Path) -> None:
    with FakeMongod(hangs_up=True) as server:
        env = environment(tmp_path, L2L_IMPLICIT_MONGO_URL=f"mongodb://{server.address}/lab")
        code, output = run(env, "with", "quick")
    assert (code, output.count("\n")) == (1, 1)
    assert "if it asks for TLS, the URL needs tls=true" in output


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that asks for the password."""
    folder = tmp_path_factory.mktemp("guarded")
    unguarded = Server(folder)
    unguarded.start()
    client: Any = pymongo.MongoClient(unguarded.address)
    client.admin.command("createUser", "me", pwd=PASSWORD, roles=["root"])
    client.admin.command("fsync")
    client.close()
    unguarded.kill()
    server = Server(folder, "--auth")
    server.start()
    yield server
    server.kill()


def guarded_url(server: Server, password: str = QUOTED) -> str:
    return f"mongodb://me:{password}@{server.address}/lab?authSource=admin"


def everything(server: Server) -> str:
    """All that the server holds, files included."""
    client: Any = pymongo.MongoClient(guarded_url(server))
    database = client["lab"]
    text = "".join(
        str(document) for name in database.list_collection_names()
        for document in database[name].find()
    )
    client.close()
    return text


def test_no_password_reaches_the_database_the_output_or_the_journal(
    tmp_path: Path, guarded: Server
) -> None:
    url = {"L2L_IMPLICIT_MONGO_URL": guarded_url(guarded), "L2L_IMPLICIT_MONGO_PATIENCE": "0.1"}
    env, gate = environment(tmp_path, **url), tmp_path / "gate"
    # the error's text holds the whole URL; the comment and the options hold the password
    assert run(env, "-c", f"with {PASSWORD}", "with", "fault=leak", f"say={QUOTED}")[0] == 1
    process = start(env, "-b", "0.2", "with", "steps=20", f"hold={gate}", f"anything={PASSWORD}")
    wait_for(lambda: "train/loss" in "".join(path.read_text() for path in journals(tmp_path)))
    guarded.kill()
    gate.touch()
    code, output = wait(process)
    kept = journals(tmp_path)
    guarded.start()
    assert code == 1 and len(kept) == 1
    for text in (output, kept[0].read_text(), everything(guarded)):
        assert "toy" in text
        assert not any(secret in text for secret in SECRETS)


def test_the_token_of_a_git_remote_is_hidden(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True)

    git("init", "-q")
    git("remote", "add", "origin", "https://me:ghp_token@host/x.git")
    assert repository_info(tmp_path) == []
    git("commit", "-q", "--allow-empty", "-m", "first")
    (found,) = repository_info(tmp_path)
    assert (found["url"], found["dirty"]) == ("https://***@host/x.git", False)


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("mongodb://u:pw@h:1/d", "mongodb://***@h:1/d"),
        ("mongodb://u:p@ss@h", "mongodb://***@h"),
        ("see https://token@host/a and mail a@b", "see https://***@host/a and mail a@b"),
        ("http://host/path@2x.png", "http://host/path@2x.png"),
        ("an abcdef key", "an *** key"),
    ],
)
def test_redaction(text: str, hidden: str) -> None:
    assert redacted({text: [text, 1]}, ["abcdef", "a"]) == {hidden: [hidden, 1]}


def test_both_forms_of_a_password_are_secret() -> None:
    assert secrets_of(f"mongodb://me:{QUOTED}@h/d") == set(SECRETS)
    assert secrets_of("mongodb://h/d") == set()
    key = "mongodb://h/?tls=true&tlsCertificateKeyFilePassword=of%20key"
    assert secrets_of(key) == {"of%20key", "of key"}
    token = "mongodb+srv://h/?authMechanismProperties=AWS_SESSION_TOKEN:abc"
    assert "abc" in secrets_of(token)
