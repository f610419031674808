"""Consent for input media: required by policy, bounded in time, a plain statement."""

import pytest

from skyloom.core.errors import RequestError
from skyloom.safety.consent import MediaConsent, check_media_consent, parse_expiry
from skyloom.safety.watermark import watermark_id_of_receipt

CONSENT = MediaConsent("Ada", "birthday films", "2999-12-31")


def test_plain_values_survive():
    values = {"who": "Ada", "scope": "birthday films", "expiry": "2999-12-31"}
    assert MediaConsent.from_dict(values) == CONSENT
    assert CONSENT.to_dict() == values
    assert MediaConsent.from_dict({"who": "Ada", "scope": ""}).to_dict() == {"who": "Ada"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "Ada"}, "consent must have only who, scope, expiry, got 'name'"),
        ({"who": 3}, "consent.who must be a text of at most 500 characters, got 3"),
        ({"scope": "a" * 501}, "consent.scope must be a text of at most 500 characters"),
        ({"expiry": "soon"}, "consent.expiry must be a date or time like 2027-12-31, got 'soon'"),
        ({"expiry": "2027-13-01"}, "consent.expiry must be a date or time"),
    ],
)
def test_invalid_consent_is_refused(values, message):
    with pytest.raises(RequestError, match=message) as caught:
        MediaConsent.from_dict(values)
    assert caught.value.field == "consent"


def test_consent_is_required_for_media_only_by_a_policy_that_says_so(policy):
    check_media_consent(None, has_media=True)
    policy("consent = true")
    check_media_consent(CONSENT, has_media=True)
    check_media_consent(None, has_media=False)
    for missing in (None, MediaConsent(scope="films")):
        with pytest.raises(RequestError, match="consent must name who is shown"):
            check_media_consent(missing, has_media=True)


def test_consent_must_belong_to_media_and_last():
    with pytest.raises(RequestError, match="must be left out without an input picture or video"):
        check_media_consent(CONSENT, has_media=False)
    with pytest.raises(RequestError, match="expiry must be in the future, got 2020-01-31"):
        check_media_consent(MediaConsent("Ada", expiry="2020-01-31"), has_media=True)


def test_a_date_ends_at_its_last_moment_in_utc():
    assert parse_expiry("1970-01-01") == 86_400
    assert parse_expiry("1970-01-01T00:00:01") == 1
    assert parse_expiry("1970-01-01T01:00:00+01:00") == 0


def test_the_watermark_id_does_not_depend_on_consent():
    request = {"prompt": "a cat", "seed": 1}
    plain, agreed = (
        {"request": values, "weights": "ab"}
        for values in (request, {**request, "consent": CONSENT.to_dict()})
    )
    assert watermark_id_of_receipt(plain) == watermark_id_of_receipt(agreed)
