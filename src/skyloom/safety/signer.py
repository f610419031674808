"""Signing certificates: one created for this machine on first use, or one of the operator.

C2PA rejects self-signed certificates, so a local authority signs one leaf; the authority's key is
discarded. Other machines report such a signature as intact with an unknown signer. Signatures have
no time stamp, because signing is offline; therefore the leaf is valid for 20 years.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from skyloom.core.errors import ConfigError, MediaError
from skyloom.core.paths import data_folder

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.x509 import Certificate

CERTIFICATE = "SKYLOOM_C2PA_CERT"
KEY = "SKYLOOM_C2PA_KEY"
_CHAIN = "chain.pem"
_AUTHORITY = "authority.pem"
_LEAF_KEY = "leaf.key"
_YEARS = 20


@dataclass(frozen=True)
class Signer:
    """Certificate chain (PEM, leaf first), ES256 key (PEM), and the local authority, if any."""

    chain: str
    key: str
    authority: str | None = None

    def __repr__(self) -> str:
        return "Signer(...)"


def find_signer(folder: Path | None = None) -> Signer:
    """Load the signer of SKYLOOM_C2PA_CERT and SKYLOOM_C2PA_KEY (PEM files), else the local one.

    Creates the local signer on first use. Raises ConfigError for files that are no ES256 pair,
    MediaError if the folder cannot be written.
    """
    chain = os.environ.get(CERTIFICATE)
    key = os.environ.get(KEY)
    if bool(chain) != bool(key):
        raise ConfigError(
            f"{CERTIFICATE} and {KEY} must be set together, got only one.",
            hint="Set both, or none.",
        )
    if chain and key:
        return read_signer(Path(chain), Path(key))
    return local_signer(folder or data_folder() / "credentials")


def read_signer(chain: Path, key: Path) -> Signer:
    """Read a signer from two PEM files. Raises ConfigError if they are no ES256 pair."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        signer = Signer(chain.read_text(encoding="ascii"), key.read_text(encoding="ascii"))
        leaf = x509.load_pem_x509_certificates(signer.chain.encode())[0]
        private = load_pem_private_key(signer.key.encode(), None)
    except OSError as error:
        raise ConfigError(
            f"{error.filename} cannot be read ({error.strerror}).", hint="Check the path."
        ) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{chain} and {key} must be a certificate and an unencrypted key.",
            hint="Use PEM files.",
        ) from error
    if not isinstance(private, EllipticCurvePrivateKey) or not isinstance(private.curve, SECP256R1):
        raise ConfigError(f"The key in {key} must be on the curve P-256.", hint="Use an ES256 key.")
    if private.public_key() != leaf.public_key():
        raise ConfigError(
            f"{key} must be the key of the first certificate in {chain}.", hint="Use its key."
        )
    return signer


def local_signer(folder: Path) -> Signer:
    """Load the signer of a folder, create it if missing (mode 0700). Raises MediaError."""
    try:
        if not (folder / _CHAIN).exists():
            _create(folder)
        return Signer(
            chain=(folder / _CHAIN).read_text(encoding="ascii"),
            key=(folder / _LEAF_KEY).read_text(encoding="ascii"),
            authority=(folder / _AUTHORITY).read_text(encoding="ascii"),
        )
    except OSError as error:
        raise MediaError(
            f"The signer in {folder} can be neither read nor created ({error.strerror}).",
            hint="Set SKYLOOM_DATA to a writable folder, or use --no-credentials.",
        ) from error


def local_authority(folder: Path | None = None) -> str | None:
    """Return the certificate of the local authority; None before the first signature."""
    path = (folder or data_folder() / "credentials") / _AUTHORITY
    return path.read_text(encoding="ascii") if path.is_file() else None


def _create(folder: Path) -> None:
    """Create a signer in a temporary folder and rename it; with two processes at once, one wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".credentials-"))  # mode 0700
    try:
        for name, text in _new_pem_files().items():
            (temporary / name).touch(mode=0o600)
            (temporary / name).write_text(text, encoding="ascii")
        temporary.rename(folder)
    except OSError:
        if not (folder / _CHAIN).exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _new_pem_files() -> dict[str, str]:
    """Return the PEM files of a new signer by name."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    authority_key = ec.generate_private_key(ec.SECP256R1())
    leaf_key = ec.generate_private_key(ec.SECP256R1())
    authority = _certificate("skyloom local authority", authority_key, authority_key, None)
    leaf = _certificate("skyloom on this machine", leaf_key, authority_key, authority)
    pems = [one.public_bytes(Encoding.PEM).decode() for one in (leaf, authority)]
    key = leaf_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    return {_AUTHORITY: pems[1], _LEAF_KEY: key, _CHAIN: "".join(pems)}


def _certificate(
    name: str,
    key: "EllipticCurvePrivateKey",
    issuer_key: "EllipticCurvePrivateKey",
    issuer: "Certificate | None",
) -> "Certificate":
    """Return an authority certificate (without issuer) or a leaf certificate as C2PA requires."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "skyloom"),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )
    now = datetime.now(UTC)
    leaf = issuer is not None
    usage = {"digital_signature": leaf, "key_cert_sign": not leaf, "crl_sign": not leaf}
    unused = (
        *("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
        *("encipher_only", "decipher_only"),
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # tolerates clock differences
        .not_valid_after(now + timedelta(days=365 * _YEARS))
        .add_extension(
            x509.BasicConstraints(ca=not leaf, path_length=None if leaf else 0), critical=True
        )
        .add_extension(x509.KeyUsage(**usage, **dict.fromkeys(unused, False)), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if leaf:
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
        builder = builder.add_extension(identifier, critical=False)
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(purpose, critical=False)
    return builder.sign(issuer_key, hashes.SHA256())
