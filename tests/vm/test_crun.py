"""Rich cases in containers made with crun, beside the runc of all others: on cgroup v2, and a newer crun."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cases.machines import Booted
from tests.cases.spine import check, close_box, open_box
from tests.cases.target import Target
from tests.vm.test_spine import ROOTFS, SECONDS

pytestmark = pytest.mark.timeout(1300)
CASES = (
    "exec_before_and_after_start",
    "raw_programs_get_and_give_every_byte",
    "kill_all_reaches_every_process",
    "a_paused_container_does_nothing_until_it_is_resumed",
    "limits_are_changed_one_by_one_and_hold",
    "a_missing_program_is_a_typed_error_at_once",
    "an_exec_has_no_vsock",
    "ping_and_info_say_who_is_there",
)


@pytest.fixture(scope="module")
def target(vm: Booted) -> Iterator[Target]:
    target = Target(vm.machine.address, ROOTFS, box="box", pace=vm.pace, execs=6, runtime="crun")
    vm.runner.run(open_box(target))
    yield target
    vm.runner.run(close_box(target))


@pytest.mark.parametrize("name", CASES)
def test_case(vm: Booted, target: Target, name: str) -> None:
    vm.runner.run(check(target, name, SECONDS * vm.pace))
