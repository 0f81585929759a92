"""The host side: client, VM launcher and `gcsctl`. Not in the guest image; imports `protocol` only.

For a daemon that looks after the containers of a VM, a containerd shim for instance, this is what there is to
hold, and what to do when something is lost:

The VM
    `vm.launcher.VirtualMachine` ends with the process that launched it. One that is to outlive it has a name:
    `vm.starter.start`, and from then on, in whichever process, `vm.found.FoundVm.named`. Disks and shares are
    plugged in by either, and mounted in the guest with `gcsagent.host.storage`.

The agent
    One `client.Client`. It makes its connection again by itself and repeats what was not answered, under the
    same `request_id`; `patience` is how long it waits for an agent that is away. At most 256 requests may be
    outstanding on it (`max_in_flight`), and one that waits for an exit is outstanding all the while.

Exits and the like, each once
    One subscription to all events, made before the containers are listed::

        events = await client.events(strict=True)
        while True:
            take_over(await client.list_containers())
            with contextlib.suppress(EventsMissed):
                async for event in events:
                    take(event)

    EventsMissed says that the agent's ring of events had overflowed while the connection was lost, or that
    its numbers began anew: what is true now is in the list, exit records included, for they are kept until
    the process is deleted. What the list and an event both tell of is known already when the second comes.
    An event may come before the answer to the request that caused it: the exit of an exec before its pid.
    `process.RemoteProcess` does without a subscription, and asks for one exit.

Output and input
    In mode `spool` with `when_full: block` output is exact across lost connections and the daemon's restarts:
    attach with `acknowledge=True` and, after a restart, `take=True` and the `offset` that was dealt with last
    (`Client.attach_spool`). It ends at the bytes that the exit record has for it (`Stream.finish_at`), a
    terminal's at those of the event `stream.end`. A predecessor that hangs is still attached: hence `take`.

After a restart
    The list has the containers with their `labels`, which the daemon gave them, and their processes. An exec
    has no labels: what else is to be known of it, such as paths on the host, is the daemon's to keep.

The end of the VM
    `VirtualMachine.wait` and `FoundVm.wait` tell of it at once. Close client, subscriptions and streams then:
    whoever waits for something of theirs is told ClosedByUs. Otherwise that is ConnectFailed, once the
    client's `patience` is over.

Errors are `protocol.errors.RpcError` for what the agent says (`code`; `details["status"]` where the state of
a container or process was in the way), `errors.HostError` for what became of a connection, and
`vm.errors.VmError`.
"""
