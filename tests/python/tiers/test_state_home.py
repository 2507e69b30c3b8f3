"""StateHome and SwapSpace: where slabs go, what they hold, what is refused with which numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import offload
from offload import Budget, BudgetError, Policy, SwapSpaceError
from offload.runtime.wrapped import wrapped
from offload.tiers.slab import Residency, Slab
from offload.tiers.state_home import StateHome
from offload.tiers.swap_space import SwapSpace
from offload.tiers.update_staging import staging_bytes

MIB = 2**20
BLOCK = 64 << 10
STAGING = staging_bytes(0, BLOCK)  # the least


def policy(folder: Path | None, host: int, **kw: object) -> Policy:
    disk = kw.pop("disk", None)
    return Policy(
        Budget(host, disk=disk),  # type: ignore[arg-type]
        swap_dir=folder,
        io_block_bytes=BLOCK,
        calibrate_disk=False,
        **kw,  # type: ignore[arg-type]
    )


def noise(seed: int, nbytes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def test_what_fits_is_pinned_and_the_rest_is_on_disk(tmp_path: Path) -> None:
    home = StateHome.of_policy(policy(tmp_path, STAGING + MIB))
    slabs = [home.make_slab(f"slab {i}", MIB // 4 + 100 * (i == 1)) for i in range(6)]
    assert [s.pinned for s in slabs] == [True, True, True, False, False, False]
    contents = [noise(i, s.nbytes) for i, s in enumerate(slabs)]
    for slab, content in zip(slabs, contents, strict=True):
        assert not home.copy_out(slab).any()  # never written
        home.copy_in(slab, content)
    assert all(torch.equal(home.copy_out(s), c) for s, c in zip(slabs, contents, strict=True))
    assert [s.residency for s in slabs] == 3 * [Residency.HOST] + 3 * [Residency.DISK]
    assert home.mover.home.usage()["peak"] <= STAGING + MIB
    assert home.store is not None
    assert home.store.stats()["bytes_written"] >= 3 * MIB // 4
    home.close()


def test_a_copy_outlives_its_home(tmp_path: Path) -> None:
    home = StateHome.of_policy(policy(tmp_path, STAGING + 4096))
    slab = home.make_slab("slab", MIB)
    home.copy_in(slab, noise(0, MIB))
    copy = home.copy_out(slab)
    home.close()
    del home, slab
    assert torch.equal(copy, noise(0, MIB))


def test_no_swap_file_for_what_fits(tmp_path: Path) -> None:
    home = StateHome.of_policy(policy(tmp_path, MIB), total_bytes=MIB)
    assert home.store is None
    assert all(home.make_slab(f"slab {i}", MIB // 4).pinned for i in range(4))
    with pytest.raises(BudgetError, match=r"slab 5: 4096 bytes are needed, 0 are left"):
        home.make_slab("slab 5", 1)
    home.close()


def test_without_a_disk_what_does_not_fit_is_refused() -> None:
    for home in (StateHome.of_policy(policy(None, MIB)), StateHome.passing(policy(None, MIB))):
        home.make_slab("first", MIB - 4096)
        with pytest.raises(BudgetError, match=r"second: 8192 bytes are needed, 4096 are left"):
            home.make_slab("second", 5000)


def test_freed_places_are_used_again(tmp_path: Path) -> None:
    home = StateHome.of_policy(policy(tmp_path, STAGING + MIB, disk=8 * MIB))
    for _ in range(50):
        pinned, spilled = home.make_slab("pinned", MIB), home.make_slab("spilled", MIB)
        assert pinned.pinned
        assert not spilled.pinned
        for slab in (pinned, spilled):
            home.copy_in(slab, noise(1, MIB))
        home.free_slab(pinned)
        home.free_slab(spilled)
    home.close()


def test_a_disk_budget_that_is_too_small_is_named_when_the_slab_is_made(tmp_path: Path) -> None:
    home = StateHome.of_policy(policy(tmp_path, STAGING + 4096, disk=3 * MIB))
    home.make_slab("pinned", 4096)
    home.make_slab("first", MIB)
    with pytest.raises(SwapSpaceError, match=r"Budget\(disk=3145728\) is too small: \d+ bytes"):
        home.make_slab("second", 2 * MIB)
    home.make_slab("third", 1)  # what was refused was not promised
    home.close()


def test_a_budget_without_room_for_the_staging_is_refused_with_the_least(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"Budget\(host=4096\)") as refused:
        StateHome.of_policy(policy(tmp_path, 4096))
    least = re.findall(r"(\d+) in all", str(refused.value))
    StateHome.of_policy(policy(tmp_path, int(least[0]))).close()
    with pytest.raises(BudgetError):
        StateHome.of_policy(policy(tmp_path, int(least[0]) - 1))


@pytest.mark.parametrize("spills", [True, False])
def test_passing_slabs_come_to_memory(tmp_path: Path, spills: bool) -> None:
    home = StateHome.passing(policy(tmp_path if spills else None, 2 * MIB))
    slabs = [home.make_slab(f"slab {i}", MIB // 2) for i in range(16 if spills else 4)]

    def view(slab: Slab) -> torch.Tensor:
        return slab.view(0, (slab.nbytes,), (1,), torch.uint8)

    for i, slab in enumerate(slabs):
        home.mover.hold_new(slab)
        view(slab).copy_(noise(i, slab.nbytes))
    for i, slab in enumerate(slabs):
        home.mover.fetch(slab)
        assert torch.equal(view(slab), noise(i, slab.nbytes))
    for i, slab in enumerate(slabs):
        home.copy_in(slab, noise(-i, slab.nbytes))
        assert torch.equal(home.copy_out(slab), noise(-i, slab.nbytes))
    assert home.mover.home.usage()["peak"] <= 2 * MIB
    home.close()


def test_the_encrypted_stores_buffers_are_in_the_budget(tmp_path: Path) -> None:
    asked = policy(tmp_path, 8 * MIB, encrypt_swap=True, queue_depth=4)
    try:
        home = StateHome.passing(asked)
    except offload.UnsupportedError as error:
        pytest.skip(str(error))
    assert home.store is not None
    assert home.mover.home.usage()["budget"] + home.store.bounce_bytes == 8 * MIB
    home.close()


def test_a_wrapped_model_has_the_room_its_plan_gave_to_state(tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)])
    model = offload.wrap(model, policy(tmp_path, 6 * MIB))
    context = wrapped(model).context
    home = StateHome.of_context(context)
    assert StateHome.of_context(context) is home
    room = home.room
    assert 0 < room < context.plan.budget_bytes
    assert context.plan.disk_bytes()["optimizer state"] > 0
    slabs = []
    for i in range(1, 30):
        slabs.append(home.make_slab(f"slab {i}", 100_000))
        home.copy_in(slabs[-1], noise(i, 100_000))
    pinned = sum(s.pinned for s in slabs)
    assert pinned == room // 102_400 < len(slabs)
    for i, slab in enumerate(slabs, 1):
        assert torch.equal(home.copy_out(slab), noise(i, 100_000))
    home.close()  # the model's things stay open
    assert model(torch.randn(2, 256)).isfinite().all()


def test_promises_cover_what_they_were_made_for(tmp_path: Path) -> None:
    space = SwapSpace(policy(tmp_path, MIB), ())
    space.reserve(3 * MIB, 3)
    reserved = space.store.stats()["reserved_bytes"]
    objects = [space.create(MIB + 1) for _ in range(2)] + [space.create(MIB - 2)]
    assert space.store.stats()["reserved_bytes"] == reserved
    space.create(MIB)
    assert space.store.stats()["reserved_bytes"] > reserved
    space.remove(objects[0])
    grown = space.store.stats()["reserved_bytes"]
    space.create(MIB)
    assert space.store.stats()["reserved_bytes"] == grown
    space.store.close()
