# SPDX-License-Identifier: LGPL-2.1-or-later
"""The exception for what the user can mend."""


class UserError(Exception):
    """A mistake or a lack on the user's side: shown as one line, without a traceback.

    `exit_code` is one of the os.EX_* values (sysexits(3)) and becomes the exit code
    of kdbusfs. Everything else that goes wrong is a fault of kdbusfs and is logged in full.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def one_line(text: str) -> str:
    """*text* with escapes for what would break a line or is in no encoding, such as odd paths."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
