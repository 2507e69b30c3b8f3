"""Checksums of slabs in host memory: that nothing changes them behind the mover's back.

A slab that is clean has the same bytes in memory and on disk, so its memory may be given up. Who
writes to it without telling the mover loses what it wrote, and says nothing. With
``Policy(debug=True)`` the CRC32C of the bytes is noted when a transfer has made memory and disk the
same, and compared when the memory is given up. It costs a pass over the bytes each time. What comes
from a device must arrive with the checksum that it had there.
"""

from __future__ import annotations

from offload import _native
from offload.errors import CorruptionError
from offload.tiers.slab import Slab


class Checksums:
    """What clean slabs held when they became clean."""

    def __init__(self, enabled: bool) -> None:
        """Know none; note none where they are not `enabled`."""
        self._enabled = enabled
        self._noted: dict[Slab, int] = {}
        self._expected: dict[Slab, int] = {}
        """Of what is on its way from a device."""

    def note(self, slab: Slab) -> None:
        """Memory and disk hold the same bytes of `slab`."""
        if self._enabled and slab.lease is not None and not slab.pinned:
            self._noted[slab] = _native.crc32c(slab.lease, slab.nbytes)

    def expect(self, slab: Slab, checksum: int | None) -> None:
        """Bytes with that `checksum`, if it is known, are on their way to the memory of `slab`."""
        if checksum is None:
            self._expected.pop(slab, None)
        else:
            self._expected[slab] = checksum

    def expects(self, slab: Slab) -> bool:
        """Whether what is on its way to the memory of `slab` is to be compared when it arrives."""
        return slab in self._expected

    def note_arrival(self, slab: Slab) -> None:
        """What was on its way to the memory of `slab` is there.

        Raises:
            CorruptionError: something else is.
        """
        expected = self._expected.pop(slab, None)
        if expected is None or slab.lease is None:
            return
        found = _native.crc32c(slab.lease, slab.nbytes)
        if found != expected:
            raise CorruptionError(
                f"{slab.name} ({slab.kind}) was sent from the device with the CRC32C "
                f"{expected:08x} and has arrived in host memory with {found:08x}"
            )

    def forget(self, slab: Slab) -> None:
        """The bytes of `slab` change, or its memory holds nothing any more."""
        self._noted.pop(slab, None)

    def verify(self, slab: Slab) -> None:
        """The memory of `slab`, which is clean, is about to be given up.

        Raises:
            CorruptionError: it holds other bytes than when it became clean.
        """
        noted = self._noted.pop(slab, None)
        if noted is None or slab.lease is None:
            return
        found = _native.crc32c(slab.lease, slab.nbytes)
        if found != noted:
            raise CorruptionError(
                f"{slab.name} ({slab.kind}) changed in memory since it was read or written (CRC32C "
                f"{noted:08x}, now {found:08x}), and nobody said so: the change would have been "
                "lost; what writes to a parameter past torch (a raw pointer, an extension, a view "
                "kept from an earlier step) has to do so inside offload.materialize()"
            )
