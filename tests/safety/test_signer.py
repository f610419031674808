"""Signers: the local one is created once and private; an operator's must be an ES256 pair."""

import stat

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from skyloom.core.errors import ConfigError, MediaError
from skyloom.safety.signer import CERTIFICATE, KEY, find_signer, local_signer, read_signer


def pem(key) -> str:
    """Return an unencrypted private key."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def test_local_signer_is_created_once_and_private(tmp_path):
    folder = tmp_path / "data" / "credentials"
    first = local_signer(folder)
    assert local_signer(folder) == first
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert [path.name for path in folder.parent.iterdir()] == ["credentials"]
    assert "PRIVATE" not in repr(first)


def test_every_folder_has_its_own_signer(tmp_path):
    assert local_signer(tmp_path / "a").key != local_signer(tmp_path / "b").key


def test_signer_of_the_environment(tmp_path, monkeypatch):
    own = local_signer(tmp_path / "own")
    (tmp_path / "chain.pem").write_text(own.chain)
    (tmp_path / "key.pem").write_text(own.key)
    monkeypatch.setenv(CERTIFICATE, str(tmp_path / "chain.pem"))
    with pytest.raises(ConfigError, match="must be set together"):
        find_signer()
    monkeypatch.setenv(KEY, str(tmp_path / "key.pem"))
    assert (find_signer().chain, find_signer().authority) == (own.chain, None)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("no key", "must be a certificate and an unencrypted key"),
        (pem(ec.generate_private_key(ec.SECP384R1())), "P-256"),
        (pem(ec.generate_private_key(ec.SECP256R1())), "must be the key of"),
    ],
)
def test_wrong_pairs_are_refused(tmp_path, key, message):
    (tmp_path / "chain.pem").write_text(local_signer(tmp_path / "own").chain)
    (tmp_path / "key.pem").write_text(key)
    with pytest.raises(ConfigError, match=message):
        read_signer(tmp_path / "chain.pem", tmp_path / "key.pem")


def test_unwritable_folder_raises_media_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MediaError, match="neither read nor created"):
        local_signer(tmp_path / "file" / "credentials")
