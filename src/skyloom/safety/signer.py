"""Who signs: a certificate of this machine's own, made at the first run, or one that the operator gives.

C2PA takes no self-signed certificate, so an authority is made that signs one leaf; its key is thrown away right after.
Elsewhere such a signature is whole but its signer unknown. Nothing is time-stamped, because nothing goes online;
therefore the leaf is valid for twenty years.
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

CERTIFICATE, KEY = "SKYLOOM_C2PA_CERT", "SKYLOOM_C2PA_KEY"
_CHAIN, _AUTHORITY, _LEAF_KEY = "chain.pem", "authority.pem", "leaf.key"
_YEARS = 20


@dataclass(frozen=True)
class Signer:
    """Certificates (PEM, leaf first), the leaf's ES256 key (PEM), and the authority to trust, if it is ours."""

    chain: str
    key: str
    authority: str | None = None

    def __repr__(self) -> str:
        return "Signer(...)"


def find_signer(folder: Path | None = None) -> Signer:
    """The operator's signer (SKYLOOM_C2PA_CERT and SKYLOOM_C2PA_KEY name its PEM files), else this machine's own, made
    if there is none yet. Raises ConfigError for files that are no ES256 pair, MediaError where none can be kept."""
    chain, key = os.environ.get(CERTIFICATE), os.environ.get(KEY)
    if bool(chain) != bool(key):
        raise ConfigError(f"Only one of {CERTIFICATE} and {KEY} is set.", hint="Set both, or none.")
    if chain and key:
        return given_signer(Path(chain), Path(key))
    return own_signer(folder or data_folder() / "credentials")


def given_signer(chain: Path, key: Path) -> Signer:
    """The signer in two PEM files. Raises ConfigError when they cannot be read or are no ES256 pair."""
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
            f"{chain} and {key} are no certificate and open key.", hint="Use two PEM files."
        ) from error
    if not isinstance(private, EllipticCurvePrivateKey) or not isinstance(private.curve, SECP256R1):
        raise ConfigError(f"The key in {key} is not of the curve P-256.", hint="Use an ES256 key.")
    if private.public_key() != leaf.public_key():
        raise ConfigError(
            f"{key} does not belong to the first certificate in {chain}.", hint="Name its own key."
        )
    return signer


def own_signer(folder: Path) -> Signer:
    """The signer kept in a folder that only its owner may read; made there if there is none. Raises MediaError."""
    try:
        if not (folder / _CHAIN).exists():
            _place(folder)
        return Signer(
            *(
                (folder / name).read_text(encoding="ascii")
                for name in (_CHAIN, _LEAF_KEY, _AUTHORITY)
            )
        )
    except OSError as error:
        hint = "Set SKYLOOM_DATA to a folder that can be written, or use --no-credentials."
        raise MediaError(
            f"{folder} holds no signer and takes none ({error.strerror}).", hint=hint
        ) from error


def own_authority(folder: Path | None = None) -> str | None:
    """The certificate of this machine's own authority, if it ever signed anything."""
    path = (folder or data_folder() / "credentials") / _AUTHORITY
    return path.read_text(encoding="ascii") if path.is_file() else None


def _place(folder: Path) -> None:
    """Make a signer beside the folder and move it there whole; of two that start at once, one wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".credentials-"))  # 0700
    try:
        for name, text in _make().items():
            (made / name).touch(mode=0o600)
            (made / name).write_text(text, encoding="ascii")
        made.rename(folder)
    except OSError:
        if not (folder / _CHAIN).exists():
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _make() -> dict[str, str]:
    """The PEM files of a new signer by name."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    authority_key, leaf_key = (
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP256R1()),
    )
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
    """A certificate for a key: an authority's where there is no issuer, else a leaf's, with what C2PA asks of it."""
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
    unused = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    unused += ("encipher_only", "decipher_only")
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # for clocks that are a little apart
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
