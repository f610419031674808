"""The machine's own signer is made once, for its owner alone; a given one must be a pair of the right kind."""

import stat

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from skyloom.core.errors import ConfigError, MediaError
from skyloom.safety.signer import CERTIFICATE, KEY, find_signer, given_signer, own_signer


def pem(key) -> str:
    """An open private key."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def test_it_is_made_once_and_only_its_owner_reads_it(tmp_path):
    folder = tmp_path / "data" / "credentials"
    first = own_signer(folder)
    assert own_signer(folder) == first
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert [path.name for path in folder.parent.iterdir()] == ["credentials"]
    assert "PRIVATE" not in repr(first)


def test_two_machines_have_two_signers(tmp_path):
    assert own_signer(tmp_path / "a").key != own_signer(tmp_path / "b").key


def test_a_given_pair_is_used(tmp_path, monkeypatch):
    own = own_signer(tmp_path / "own")
    (tmp_path / "chain.pem").write_text(own.chain)
    (tmp_path / "key.pem").write_text(own.key)
    monkeypatch.setenv(CERTIFICATE, str(tmp_path / "chain.pem"))
    with pytest.raises(ConfigError, match="Only one of"):
        find_signer()
    monkeypatch.setenv(KEY, str(tmp_path / "key.pem"))
    assert (find_signer().chain, find_signer().authority) == (own.chain, None)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("no key", "no certificate and open key"),
        (pem(ec.generate_private_key(ec.SECP384R1())), "P-256"),
        (pem(ec.generate_private_key(ec.SECP256R1())), "does not belong"),
    ],
)
def test_a_wrong_pair_is_refused(tmp_path, key, message):
    (tmp_path / "chain.pem").write_text(own_signer(tmp_path / "own").chain)
    (tmp_path / "key.pem").write_text(key)
    with pytest.raises(ConfigError, match=message):
        given_signer(tmp_path / "chain.pem", tmp_path / "key.pem")


def test_a_folder_that_takes_none_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MediaError, match="holds no signer"):
        own_signer(tmp_path / "file" / "credentials")
