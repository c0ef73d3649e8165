"""A signature of a merge: of its manifest, which holds the digests of the weights and of all that lies beside them.

It lies beside the manifest, as `manifest.json.sig`, and is what openssl makes and checks: Ed25519 (RFC 8032), or ECDSA
over SHA-256. Keys are PEM files:

    openssl genpkey -algorithm ed25519 -out key.pem
    openssl pkey -in key.pem -pubout -out public.pem
    openssl pkeyutl -verify -rawin -pubin -inkey public.pem -in manifest.json -sigfile manifest.json.sig
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

from mergeline.merging.engine.manifest import manifest_path, read_manifest, signature_path
from mergeline.merging.errors import UserError
from mergeline.merging.files import write_bytes
from mergeline.merging.reading import open_regular

_KINDS = "of Ed25519 or an elliptic curve; `openssl genpkey -algorithm ed25519 -out key.pem` makes one"


def write_signature(out: Path, key: Path) -> Path:
    """Sign the manifest of `out` with a private key; returns where the signature was put.

    Raises:
        UserError: no manifest, or one that does not cover all files; what is no private key of these kinds; a place
            that cannot be written.
    """
    _need_cryptography()
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    private = _key(key, lambda data: load_pem_private_key(data, password=None))
    manifest = _content(manifest_path(out))
    if "files" not in read_manifest(out):
        raise UserError(
            f"{manifest_path(out)}: does not cover the files beside the weights; merge again, then sign"
        )
    if isinstance(private, ed25519.Ed25519PrivateKey):
        signature = private.sign(manifest)
    elif isinstance(private, ec.EllipticCurvePrivateKey):
        signature = private.sign(manifest, ec.ECDSA(SHA256()))
    else:
        raise UserError(f"{key}: is no private key {_KINDS}")
    write_bytes(signature_path(out), signature)
    return signature_path(out)


def check_signature(out: Path, public_key: Path) -> None:
    """Check that the owner of a public key signed the manifest of `out` as it is.

    Raises:
        UserError: no manifest, no signature, another's, what is no public key of these kinds.
    """
    _need_cryptography()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    public = _key(public_key, load_pem_public_key)
    manifest, signature = _content(manifest_path(out)), _content(signature_path(out))
    try:
        if isinstance(public, ed25519.Ed25519PublicKey):
            public.verify(signature, manifest)
        elif isinstance(public, ec.EllipticCurvePublicKey):
            public.verify(signature, manifest, ec.ECDSA(SHA256()))
        else:
            raise UserError(f"{public_key}: is no public key {_KINDS}")
    except InvalidSignature:
        raise UserError(
            f"{signature_path(out)}: the owner of {public_key} did not sign this manifest: the key is another's, "
            "or the manifest was changed"
        ) from None


def _need_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise UserError("signatures need the package cryptography: pip install 'mergeline[sign]'") from None


def _key(path: Path, load: Callable[[bytes], Any]) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return load(_content(path))
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UserError(
            f"{path}: is no key in PEM that can be used ({str(error).partition('.')[0]})"
        ) from None


def _content(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
