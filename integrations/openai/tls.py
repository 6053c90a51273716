"""Encrypted connections: from files to an SSL context, with errors that name the option at fault."""

from __future__ import annotations

import ssl
from pathlib import Path

from ...base.errors import InvalidArgument


def tls_context(certfile: Path, keyfile: Path | None, password: str | None, ca_certs: Path | None) -> ssl.SSLContext:
    """
    Args:
        certfile: the server's certificate and those between it and the root, in PEM; its key too, without a `keyfile`.
        password: of an encrypted key.
        ca_certs: clients must have a certificate that one of these signed; None: they need none.

    Raises InvalidArgument, naming the option.
    """
    for name, file in (("ssl_certfile", certfile), ("ssl_keyfile", keyfile), ("ssl_ca_certs", ca_certs)):
        if file is not None:
            _check_readable(name, file)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    where = "ssl_certfile" if keyfile is None else "ssl_keyfile"
    asked = False

    def given() -> str:  # else OpenSSL asks at the terminal
        nonlocal asked
        asked = True
        return password or ""

    try:
        context.load_cert_chain(certfile, keyfile, given)
    except (ssl.SSLError, ValueError, OSError) as error:
        if asked:
            why = "is wrong" if password else "is needed: the key is encrypted"
            raise InvalidArgument(f"ssl_keyfile_password {why}") from error
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            raise InvalidArgument(f"{where}: the key is not that of the certificate in {certfile}") from error
        if b"BEGIN CERTIFICATE" not in certfile.read_bytes():
            raise InvalidArgument(f"ssl_certfile: no certificate in PEM in {certfile}") from error
        raise InvalidArgument(f"{where}: no private key in PEM can be read from {keyfile or certfile}") from error
    if ca_certs is not None:
        try:
            context.load_verify_locations(ca_certs)
        except ssl.SSLError as error:
            raise InvalidArgument(f"ssl_ca_certs: no certificates in PEM can be read from {ca_certs}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _check_readable(name: str, file: Path) -> None:
    try:
        file.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{name}: {file}: {error.strerror}") from None

