"""What is a secret in a URL is shown nowhere; what is none stays."""

from __future__ import annotations

import pytest

from mergeline.tasks.credentials import holds_credentials, scrubbed, without_credentials

SECRET = "S3CR3T"  # its first half alone must not be shown either

WITH_SECRETS = [
    f"http://bob:{SECRET}@host/x.safetensors",
    f"https://bob:{SECRET}@host:8443/x.safetensors",
    f"HTTPS://{SECRET}@host/x.safetensors",
    f"https://{SECRET}@host/folder@v1/x.safetensors",
    f"https://bob:S3C/R3T{SECRET}@host/x.safetensors",
    f"https://bob:S3C?R3T{SECRET}@host/x.safetensors",
    f"https://bob:S3C#R3T@{SECRET}@host/x.safetensors",
    f"https://bob:S3C::R3T{SECRET}@host/x.safetensors",
    f"filecache::https://{SECRET}@host/x.safetensors",
    f"zip://x.safetensors::HTTPS://bob:{SECRET}@host/x.zip",
    f"s3://KEY:{SECRET}@bucket/x.safetensors",
    f"https://host/x.safetensors?token={SECRET}",
    f"https://host/x.safetensors?download=true&X-Amz-Signature={SECRET}",
    f"https://host/x.safetensors?AWSAccessKeyId=A&Signature={SECRET}",
    f"https://account.blob.core.windows.net/x?sv=2024&sig={SECRET}",
    f"https://host/x.safetensors?accessToken={SECRET}",
    f"https://host/x.safetensors#api_key={SECRET}",
    f"https://host/x.safetensors?id=hf_{SECRET}abcdefghijklmn",
]
WITHOUT = [
    "https://host/x.safetensors",
    "https://host:8443/folder/x.safetensors",
    "https://host/folder@v1/x.safetensors",
    "https://[::1]:8080/folder@v1/x.safetensors",
    "hf://org/name@v1/model.safetensors",
    "open_clip://ViT-B-32/openai",
    "github://org:repo@main/x.safetensors",
    "abfs://container@account.dfs.core.windows.net/x.safetensors",
    "sftp://bob@host/x.safetensors",
    "simplecache::s3://bucket/x.safetensors",
    "file:///home/bob:x@host/a.safetensors",
    "/home/bob:x@host/a.safetensors",
]


@pytest.mark.parametrize("url", WITH_SECRETS)
def test_a_secret_is_found_and_not_shown(url):
    assert holds_credentials(url)
    for shown in (without_credentials(url), scrubbed(f"cannot open {url} today")):
        assert not any(part in shown for part in ("S3C", "R3T"))
        assert "x" in shown and "bob" not in shown


@pytest.mark.parametrize("url", WITHOUT)
def test_what_holds_no_secret_stays_as_it_is(url):
    assert not holds_credentials(url)
    assert without_credentials(url) == url


@pytest.mark.parametrize("query", ["download=true", "versionId=3", "image=picture&label=kind", "email=a@b"])
def test_parameters_that_are_no_secrets_are_allowed(query):
    assert not holds_credentials(f"https://host/x.safetensors?{query}")


def test_the_rest_of_a_message_stays():
    text = "HTTPError: 403 for https://bob:pw@host/x?sig=1 (see ftp://host/help), 3 of 4"
    assert scrubbed(text) == "HTTPError: 403 for https://host/x (see ftp://host/help), 3 of 4"
