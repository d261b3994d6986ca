"""Tokens, passwords and signatures of links are kept out of logs and answers.

What is configured is hidden by its value, wherever it turns up; what others hand out (presigned links, access tokens,
cookies) by its form. Every log record of the process passes here, whoever logs it and whatever writes it down.
"""

from __future__ import annotations

import base64
import logging
import re
from urllib.parse import quote, quote_plus

SHORTEST = 8
"""A password shorter than this could not be told from a word, and is not taken."""

LONGEST = 4000
"""Characters of a log message, after which it is cut off: it may hold what was sent to us."""

_HIDDEN = "***"
_FORMS = (
    (re.compile(r"(://)[^/?#\s'\"@]*@"), r"\1***@"),  # user and password of an address
    (re.compile(r"(?i)(authorization\W{1,8}(?:b['\"])?(?:bearer|basic|token)\s+)[^\s'\",]+"), r"\1***"),
    (re.compile(r"(?i)(cookie\W{1,8}(?:b['\"])?)[^'\"\r\n]+"), r"\1***"),
    (re.compile(r"\b(sessionid|csrftoken)=[^;\s'\"]+"), r"\1=***"),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?"), _HIDDEN),  # JSON web tokens
    (  # links signed for S3, Google and Azure, and what others call a secret
        re.compile(
            r"(?i)((?:[?&;]|%3f|%26|amp;)(?:x-(?:amz|goog)-(?:signature|credential|security-token)|signature|sig|"
            r"awsaccesskeyid|googleaccessid|(?:access_|refresh_)?token|api_?key|secret|password)(?:=|%3d))[^&\s'\"<>\\]+"
        ),
        r"\1***",
    ),
)
_secrets: frozenset[str] = frozenset()


def hide(*values: str | None) -> None:
    """Have these values, as they are, URL-encoded or in base64, replaced by `***` from now on."""
    global _secrets
    found = {value for value in values if value is not None and len(value) >= SHORTEST}
    forms = {form for value in found for form in (value, quote(value, safe=""), quote_plus(value), encoded(value))}
    _secrets |= forms
    install()


def encoded(value: str) -> str:
    """Base64, as HTTP's Basic authentication sends it."""
    return base64.b64encode(value.encode()).decode()


def redact(text: str) -> str:
    """The text without what must not be shown."""
    for secret in _secrets:
        if secret in text:
            text = text.replace(secret, _HIDDEN)
    for form, replacement in _FORMS:
        text = form.sub(replacement, text)
    return text


def install() -> None:
    """Have every log record of this process redacted, and kept on its line: what was sent to us cannot forge one."""
    logging.setLogRecordFactory(_Record)


class _Record(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802
        message = redact(super().getMessage()).rstrip().translate(_ON_ONE_LINE)
        return message if len(message) <= LONGEST else f"{message[:LONGEST]}..."

    @property
    def exc_text(self) -> str | None:
        """The traceback, which a formatter sets."""
        return self._traceback

    @exc_text.setter
    def exc_text(self, value: str | None) -> None:
        self._traceback = redact(value) if value else value


_ON_ONE_LINE = {code: f"\\x{code:02x}" for code in (*range(32), 127, 0x85)} | {
    9: "\t",
    10: "\\n",
    13: "\\r",
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}
