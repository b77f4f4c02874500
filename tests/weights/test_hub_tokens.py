"""Tokens are sent or refused, and never shown."""

import logging
import re
import traceback

import pytest
from huggingface_hub import constants

from mixtral_offload.errors import DownloadError
from mixtral_offload.weights import hub
from tests.weights.hub_case import REPO, get

pytestmark = pytest.mark.usefixtures("surroundings")


TOKENS = [
    "hf_SECRETsecret",
    "hf_SECRET\n",
    "\r\n hf_SECRET \t",
    "hf_SECRET\nsecret",
    "hf_SECRET secret",
    "hf_SECRETé",
    "hf_SECRET\0x",
]


@pytest.fixture
def everything_logged(caplog):
    """All loggers at their most talkative, as where somebody looks for a fault."""
    caplog.set_level(logging.DEBUG)
    for name in ("huggingface_hub", "httpx", "httpcore"):
        caplog.set_level(logging.DEBUG, logger=name)
    return caplog


@pytest.mark.parametrize("answer", [None, 401, "gated", 503, "closed"])
@pytest.mark.parametrize("source", ["argument", "HF_TOKEN", "file"])
@pytest.mark.parametrize("token", TOKENS)
def test_a_token_is_sent_or_refused_and_never_shown(
    server, token, source, answer, everything_logged, monkeypatch, tmp_path, capfd
):
    sent, server.answer = [], None if answer == "closed" else answer
    server.headers = {
        "Set-Cookie": "id=cookieSECRET",
        "X-Next": "http://u:pwSECRET@h/x?X-Amz-Signature=abSECRET",
    }
    server.on_headers = lambda headers: sent.append(headers.get("Authorization"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    options = {}
    if source == "argument":
        options["token"] = token
    elif source == "file":
        (tmp_path / "token").write_text(token, encoding="utf-8")
    elif "\0" in token:
        pytest.skip("the environment holds no NUL")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    if answer == "closed":
        server.close()
    said = ""
    try:
        get(server, **options)
    except DownloadError as error:
        chain = error
        while chain is not None:
            said += f"{chain} {chain!r}\n" + "".join(traceback.format_exception(chain))
            chain = chain.__cause__ or chain.__context__
    good = re.fullmatch(r"\w+", token.strip(), re.ASCII)
    assert (said == "") == bool(good and answer is None)
    if good and answer != "closed":
        assert set(sent) == {f"Bearer {token.strip()}"}
    elif not good:
        assert "cannot be sent" in said and sent == []
    said += everything_logged.text + "".join(capfd.readouterr())
    assert "SECRET" not in said


def test_no_token_where_none_is_wanted(server, monkeypatch):
    sent = []
    server.on_headers = lambda headers: sent.append(headers.get("Authorization"))
    monkeypatch.setenv("HF_TOKEN", "hf_something")
    get(server, token=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    get(server)
    assert set(sent) == {None}
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(DownloadError, match="no token is stored here"):
        hub.plan_download(REPO, endpoint=server.endpoint, token=True)
