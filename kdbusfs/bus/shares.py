# SPDX-License-Identifier: LGPL-2.1-or-later
"""What one user may have the daemon keep, and what all users together may.

kdbus lived in the kernel, which charges memory to whoever makes a call. Here the daemon pays, so
it counts: whatever outlasts a call is charged to the real uid that opened the file it came
through, and discharged when it goes.
"""

from __future__ import annotations

from errno import EMFILE, ENOMEM, EXFULL

from ..abi.errors import CommandError
from .call import Step
from .principals import PRINCIPALS

MIB = 1 << 20


class Share:
    """Something of which there is *total* for all users of a mount.

    A user may have a third of what others leave, as with the quota of a pool, and no more than
    *most*. All users together may have three quarters; the rest is for root alone, which may have
    all that is left. So many users can use up what is for users, but never what is for root; and
    the subordinate ids of somebody are not many, but one (`principals`). *name* says what it is
    about, *errno* what who asks for more is told.
    """

    __slots__ = ("_n_taken", "_taken", "errno", "most", "name", "total")

    def __init__(self, name: str, errno: int, total: int, most: int) -> None:
        self.name = name
        self.errno = errno
        self.total = total
        self.most = most
        self._taken: dict[int, int] = {}
        """By uid; one that has none is not in it."""
        self._n_taken = 0

    def charge(self, uid: int, n: int) -> None:
        """Let user *uid* have *n* more; an error changes nothing."""
        if not n:
            return
        uid = PRINCIPALS.of(uid)
        mine = self._taken.get(uid, 0)
        if uid:
            share = min((self.total - self.total // 4 - self._n_taken + mine) // 3, self.most)
        else:
            share = self.total - self._n_taken + mine
        if mine + n > share:
            raise CommandError(self.errno, f"user {uid} has {mine} {self.name}, {n} more")
        self._taken[uid] = mine + n
        self._n_taken += n

    def discharge(self, uid: int, n: int) -> None:
        """Give back what `charge` took."""
        uid = PRINCIPALS.of(uid)
        left = self._taken.get(uid, 0) - n
        assert left >= 0, f"{self.name} of {uid} given back twice"
        if left:
            self._taken[uid] = left
        else:
            self._taken.pop(uid, None)
        self._n_taken -= n

    def taken(self, uid: int) -> int:
        """How much user *uid* has."""
        return self._taken.get(PRINCIPALS.of(uid), 0)

    def check(self) -> None:
        """Assert what must hold between any two calls."""
        assert all(n > 0 for n in self._taken.values())
        assert self._n_taken == sum(self._taken.values())

    def check_empty(self) -> None:
        """Assert that everything was given back."""
        assert not self._taken, f"{self.name} left: {self._taken}"


class Charge(Step):
    """What a command charges to *uid*, and gives back if it fails."""

    __slots__ = ("n", "share", "uid")

    def __init__(self, share: Share, uid: int, n: int) -> None:
        share.charge(uid, n)
        self.share = share
        self.uid = uid
        self.n = n

    def commit(self) -> None:
        pass

    def undo(self) -> None:
        self.share.discharge(self.uid, self.n)


class Budget:
    """The shares of a domain. *memory_size* is how many bytes the machine has."""

    __slots__ = ("addresses", "matches", "memory", "pools")

    def __init__(self, memory_size: int = 1 << 33) -> None:
        self.memory = Share("bytes of names, matches and policy", ENOMEM, 512 * MIB, 32 * MIB)
        """What is kept in the daemon: names, matches, policy, copies of messages."""
        self.matches = Share("matches", EMFILE, 65536, 8192)
        """Each may have to be looked at for each broadcast."""
        self.pools = Share("bytes of pools", EXFULL, memory_size * 3 // 4, memory_size // 4)
        """Memory of pools that has been in use, as far as the last byte ever allocated."""
        self.addresses = Share("bytes of address space", ENOMEM, 1 << 46, 1 << 42)
        """Sizes of pools, which are all mapped in one process: half of what Linux gives it on
        x86-64 (47 bits); to a user, as many connections as it may have with the largest pool."""

    def all(self) -> tuple[Share, ...]:
        """Each of them."""
        return self.memory, self.matches, self.pools, self.addresses

    def check(self) -> None:
        """Assert what must hold between any two calls."""
        for share in self.all():
            share.check()
