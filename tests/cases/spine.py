"""The list: every case there is, for the test modules of both tiers."""

from __future__ import annotations

import asyncio
import contextlib
import os

from gcsagent.host.client import Client
from protocol.errors import RpcError
from tests.cases import (
    data,
    endings,
    fifos,
    files,
    floods,
    forwards,
    hooks,
    hosts,
    lifecycle,
    limits,
    lives,
    network,
    oci,
    pods,
    pslist,
    requests,
    security,
    seeing,
    spools,
    storage,
    terminals,
)
from tests.cases.target import CASES, Target, connect, creation, nothing_left, remove

MODULES = (
    data,
    fifos,
    terminals,
    spools,
    lives,
    network,
    lifecycle,
    endings,
    limits,
    pslist,
    requests,
    floods,
    forwards,
    hosts,
    security,
    oci,
    pods,
    hooks,
    files,
    storage,
    seeing,
)
NAMES = {function.__name__: function for function in CASES}
assert len(NAMES) == len(CASES), "two cases have one name"

SAME_IN_A_VM = frozenset(
    {
        # data
        "init_output_is_exact_from_the_first_byte",
        "a_mebibyte_through_cat_comes_back_as_it_went",
        "the_end_of_stdin_ends_cat",
        "output_waits_in_the_pipe_for_whoever_attaches_after_the_exit",
        "null_streams_are_dev_null",
        "a_second_attach_is_refused_unless_it_takes",
        "stdin_stays_open_for_the_next_client_otherwise",
        # fifos, terminals, spools
        "annotations_that_contradict_are_refused",
        "what_cannot_be_a_fifo_is_refused_and_leaves_nothing",
        "a_resize_reaches_the_foreground_as_sigwinch",
        "ctrl_c_arrives_at_init",
        "stderr_is_a_terminal_too_and_the_only_stream_is_tty",
        "a_terminal_nobody_wants_holds_nobody_up",
        "a_process_without_a_terminal_cannot_be_resized",
        "a_tee_nobody_is_attached_to_holds_nothing_up",
        # lives
        "wait_twice_at_once_and_again_after_the_exit",
        "a_killed_container_is_killed_once",
        "an_exec_inherits_and_adds",
        "a_bad_working_directory_is_an_error",
        "a_duplicate_id_is_refused_and_the_first_is_untouched",
        "unknown_ids_are_not_found",
        "bad_ids_are_refused_by_the_agent_itself",
        "a_created_container_can_be_deleted_unstarted",
        "auto_delete_waits_until_the_output_is_taken",
        "a_bundle_is_a_directory_with_a_relative_root",
        # lifecycle, limits, lists of processes
        "a_signal_to_a_paused_container_acts_when_it_is_resumed",
        "a_pause_cut_off_by_its_deadline_leaves_the_container_running",
        "what_a_status_does_not_allow_names_it",
        "a_paused_container_is_deleted_with_force",
        "limits_can_be_changed_while_paused",
        "updates_that_cannot_be_are_refused",
        "updates_leave_what_they_do_not_name",
        "an_update_that_fails_changes_nothing",
        "an_update_cut_off_by_its_deadline_changes_nothing",
        "more_processes_than_fit_are_counted_and_come_page_by_page",
        # what is checked before anything is asked of the kernel
        "what_is_wrong_with_a_spec_is_named_and_leaves_nothing",
        "what_is_wrong_with_a_network_is_said_by_field",
        "a_profile_that_cannot_be_narrowed_is_refused",
        # files, forwards, hosts, seeing, storage
        "an_archive_wants_a_connection_of_its_own",
        "sixteen_mib_go_in_and_come_out_the_same",
        "a_stalled_target_and_a_dead_one_harm_nobody",
        "deleting_a_container_ends_its_forwards",
        "two_hosts_see_the_same",
        "metrics_come_page_by_page",
        "stacks_show_who_waits_where",
        "a_mount_that_is_given_up_leaves_nothing",
        # between the agent and its client or its runtime alone
        *(
            name
            for name, function in NAMES.items()
            if function.__module__ in (hooks.__name__, requests.__name__)
        ),
    }
)
"""What neither vsock nor the guest's kernel has a part in: in the VM it is run by ``make test-long`` only."""
assert NAMES.keys() >= SAME_IN_A_VM, f"there are no cases {sorted(SAME_IN_A_VM - NAMES.keys())}"

VM_NAMES = [name for name in NAMES if os.environ.get("GCS_SPINE") == "long" or name not in SAME_IN_A_VM]


async def open_box(target: Target) -> None:
    """Starts the container that cases exec in."""
    async with await connect(target) as client:
        await client.create_container(creation(target, target.box, ("sleep", "100000")))
        await client.start_container(target.box)


async def close_box(target: Target) -> None:
    async with await connect(target) as client:
        await remove(client, target.box)


async def check(target: Target, name: str, seconds: float) -> None:
    """Runs one case and sees that it leaves nothing; after a failure, that the next one begins with that."""
    try:
        async with asyncio.timeout(seconds):
            await NAMES[name](target)
            async with await connect(target) as client:
                await nothing_left(target, client)
    except BaseException:
        async with await connect(target) as client, asyncio.timeout(seconds):
            await _clear(target, client)
        raise


async def _clear(target: Target, client: Client) -> None:
    for container in await client.list_containers():
        if container.container != target.box:
            await remove(client, container.container)
            continue
        for process in container.processes[1:]:
            with contextlib.suppress(RpcError):
                await client.kill_process(target.box, process.process, "SIGKILL")
            await client.wait_process(target.box, process.process, deadline=10.0)
            await client.delete_process(target.box, process.process)
