"""The report: what lives where, what moved, and what the training thread waited for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from offload.planner import Plan, Traffic, step_traffic


@dataclass(frozen=True)
class Report:
    """A snapshot of one wrapped model.

    Attributes:
        plan: where everything lives.
        params: number of parameters (elements).
        counters: bytes and seconds since wrap(); see as_dict().
        stall_seconds: by cause, time the training thread waited.
        notes: which engine was chosen and why, and which fallbacks were taken.
        uses: of the last forward and backward: (a unit's index, whether in the backward).
        lazy: updates run when their unit is next used.
        state_on_disk: bytes of optimizer state that live on disk, by unit; None: none was made.
        device_units: indices of the units whose updates run on their device; before there was an
            update, of those that may.
    """

    plan: Plan
    params: int
    counters: dict[str, Any]
    stall_seconds: dict[str, float]
    notes: tuple[str, ...] = field(default=())
    uses: tuple[tuple[int, bool], ...] | None = None
    lazy: bool = True
    state_on_disk: tuple[int, ...] | None = None
    device_units: frozenset[int] = frozenset()

    def plan_table(self) -> list[dict[str, Any]]:
        """Return one row per kind: {"what", "host_bytes", "disk_bytes"}."""
        disk = self.plan.disk_bytes()
        return [
            {"what": what, "host_bytes": nbytes, "disk_bytes": disk[what]}
            for what, nbytes in self.plan.host_bytes().items()
        ]

    def step_traffic(self, micro_batches: int = 1) -> Traffic:
        """Return the bytes that a step moves between host and disk, once it repeats itself.

        Those of activations are not in it: the counters have them.
        Counted along the uses of the last forward and backward; before there was one, as if every
        unit were used once in each. What stays on a device with more than the least memory for it
        need not come again, and is counted as if it did.

        Args:
            micro_batches: how many are accumulated in a step.
        """
        return step_traffic(
            self.plan, micro_batches, self.uses, self.lazy, self.state_on_disk, self.device_units
        )

    def expected_step_seconds(self, compute_seconds: float, micro_batches: int = 1) -> float:
        """Return how long a step will take if the disk keeps the rate measured by wrap().

        The larger of the compute alone and the disk alone: they overlap.

        Args:
            compute_seconds: forward and backward of all micro-batches of a step.
            micro_batches: how many are accumulated in a step.
        """
        rate = self.counters["disk_read_rate"]
        traffic = self.step_traffic(micro_batches)
        disk = max(traffic.read, traffic.written) / rate if rate else 0.0
        return max(compute_seconds, disk)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, strings, lists and dicts.

        ``params`` counts elements; ``*_bytes`` are bytes; ``*_seconds`` seconds;
        ``disk_read_bytes`` and ``disk_write_bytes`` are cumulative; ``stall_seconds`` is the sum
        over all causes in ``stalls``. With several devices, counts of a device are sums, and
        ``devices`` has those of each.
        """
        return {
            "params": self.params,
            "state_bytes": sum(
                row["host_bytes"] + row["disk_bytes"]
                for row in self.plan_table()
                if row["what"] not in ("staging", "activations")
            ),
            **self.counters,
            "stall_seconds": sum(self.stall_seconds.values()),
            "stalls": dict(self.stall_seconds),
            "plan": self.plan_table(),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        """The table for people."""
        lines = [f"{'what':<18}{'host':>12}{'disk':>12}   (MiB)"]
        for row in self.plan_table():
            host, disk = row["host_bytes"] / 2**20, row["disk_bytes"] / 2**20
            lines.append(f"{row['what']:<18}{host:>12.1f}{disk:>12.1f}")
        read, written = self.counters["disk_read_bytes"], self.counters["disk_write_bytes"]
        lines.append(f"disk: {read / 2**30:.2f} GiB read, {written / 2**30:.2f} GiB written")
        for device in self.counters.get("devices", ()):
            lines.append(
                f"{device['device']}: at most {device['device_peak_bytes'] / 2**20:.1f} of "
                f"{device['device_budget_bytes'] / 2**20:.1f} MiB in use, "
                f"{device['to_device_bytes'] / 2**30:.2f} GiB copied to it, "
                f"{device['to_host_bytes'] / 2**30:.2f} GiB from it"
            )
        saved = self.counters["activation_saved_bytes"]
        if saved:
            to_disk, back = (
                self.counters["activation_write_bytes"],
                self.counters["activation_read_bytes"],
            )
            lines.append(
                f"activations: {saved / 2**30:.2f} GiB saved, {to_disk / 2**30:.2f} GiB written to "
                f"disk, {back / 2**30:.2f} GiB read back"
            )
        stalls = ", ".join(f"{what} {s:.2f} s" for what, s in sorted(self.stall_seconds.items()))
        lines.append(f"waited for: {stalls or 'nothing'}")
        lines.extend(self.notes)
        return "\n".join(lines)
