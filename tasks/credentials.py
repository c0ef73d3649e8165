"""Passwords, tokens and signatures in URLs: shown nowhere, and refused where they would be written down."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl

_LINK = re.compile(
    r"::(?=[A-Za-z][\w+.-]*(?:://|::))"
)  # between the links of a chain: filecache::https://...
_URL = re.compile(r"[A-Za-z][\w+.-]*(?:://|::)\S+")
_WEB = ("http", "https")
_SECRET_WORDS = {
    "auth", "authorization", "credential", "credentials", "jwt", "passwd", "password", "pwd", "sas", "secret", "sig",
    "signature", "token",
}  # fmt: skip
_SECRET_NAMES = {
    "accesskey", "accesskeyid", "apikey", "awsaccesskeyid", "googleaccessid", "key", "keypairid", "policy",
    "privatekey",
}  # fmt: skip
_SECRET_VALUE = re.compile(
    r"(hf_|gh[oprsu]_|github_pat_|glpat-|xox[abp]-|AKIA|eyJ)[\w.-]{12,}"
)  # as their makers mark


def without_credentials(url: str) -> str:
    """A URL, or a chain of them, less `user:password@`, query and fragment, where secrets travel; a path as it is."""
    return "::".join(_link_without(link) for link in _LINK.split(url))


def holds_credentials(url: str) -> bool:
    """Whether a URL, or one of a chain, holds a password, a token, or a parameter that is called or looks like one."""
    return any(_link_holds(link) for link in _LINK.split(url))


def scrubbed(text: str) -> str:
    """A text, such as another library's message, with the URLs in it without their credentials."""
    return _URL.sub(lambda found: without_credentials(found[0]), text)


def _link_without(link: str) -> str:
    scheme, is_url, rest = link.partition("://")
    if not is_url or scheme.lower() == "file":
        return link
    rest = rest[_user_length(scheme, rest) :]
    return f"{scheme}://{re.split('[?#]', rest, maxsplit=1)[0]}"


def _link_holds(link: str) -> bool:
    scheme, is_url, rest = link.partition("://")
    if not is_url or scheme.lower() == "file":
        return False
    length = _user_length(scheme, rest)
    _, _, query = rest[length:].replace("#", "?", 1).partition("?")
    return length > 0 or any(
        _is_secret(*pair) for pair in parse_qsl(query.replace("#", "&").replace("?", "&"))
    )


def _user_length(scheme: str, rest: str) -> int:
    """How many characters of what follows `scheme://` are a name and a password, with their @.

    A password may hold `/`, `?`, `#` and `@` that should have been escaped. Elsewhere than on the web a name without a
    password belongs to the address (abfs://container@account/); github://org:repo@revision/ holds no password at all.
    """
    if scheme.lower() == "github":
        return 0
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    name, colon, after = authority.partition(":")
    if colon and "@" not in name and not name.startswith("["):
        is_port = after == "" or after.isdigit()
        return (re.split("[?#]", rest, maxsplit=1)[0] if is_port else rest).rfind("@") + 1
    return authority.rfind("@") + 1 if scheme.lower() in _WEB else 0


def _is_secret(name: str, value: str) -> bool:
    words = re.split("[-_.]", re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower())
    named = not _SECRET_WORDS.isdisjoint(words) or "".join(words) in _SECRET_NAMES
    return named or bool(_SECRET_VALUE.search(value))
