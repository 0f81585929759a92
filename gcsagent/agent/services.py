"""How each of the agent's services that come later (gcsagent.agent.later) is imported and made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gcsagent.agent.later import Later

if TYPE_CHECKING:
    from gcsagent.agent.cgroup_stats import StatsService
    from gcsagent.agent.checkpoint import CheckpointService
    from gcsagent.agent.container_list import ContainerListService
    from gcsagent.agent.forwarding.service import Forwards
    from gcsagent.agent.freezing import FreezingService
    from gcsagent.agent.guest.pressure import PressureWatches
    from gcsagent.agent.guest.snapshot import SnapshotService
    from gcsagent.agent.lifecycle import Lifecycle
    from gcsagent.agent.limits import LimitService
    from gcsagent.agent.pods.service import PodService
    from gcsagent.agent.process_list import ProcessListService
    from gcsagent.agent.registry import Registry
    from gcsagent.agent.restoring import RestoreService
    from gcsagent.agent.runtime_view import StateService
    from gcsagent.agent.spools import SpoolService
    from gcsagent.agent.storage.service import StorageService


def lifecycle(registry: Registry) -> Later[Lifecycle]:
    def make() -> Lifecycle:
        from gcsagent.agent.lifecycle import Lifecycle

        return Lifecycle(registry)

    return Later(make)


def states(registry: Registry) -> Later[StateService]:
    def make() -> StateService:
        from gcsagent.agent.runtime_view import StateService

        return StateService(registry)

    return Later(make)


def lists(registry: Registry) -> Later[ContainerListService]:
    def make() -> ContainerListService:
        from gcsagent.agent.container_list import ContainerListService

        return ContainerListService(registry)

    return Later(make)


def process_lists(registry: Registry) -> Later[ProcessListService]:
    def make() -> ProcessListService:
        from gcsagent.agent.process_list import ProcessListService

        return ProcessListService(registry)

    return Later(make)


def freezing(registry: Registry) -> Later[FreezingService]:
    def make() -> FreezingService:
        from gcsagent.agent.freezing import FreezingService

        return FreezingService(registry)

    return Later(make)


def checkpoints(registry: Registry) -> Later[CheckpointService]:
    def make() -> CheckpointService:
        from gcsagent.agent.checkpoint import CheckpointService

        return CheckpointService(registry)

    return Later(make)


def restoring(registry: Registry, lifecycle: Later[Lifecycle]) -> Later[RestoreService]:
    def make() -> RestoreService:
        from gcsagent.agent.restoring import RestoreService

        return RestoreService(registry, lifecycle.get())

    return Later(make)


def stats(registry: Registry) -> Later[StatsService]:
    def make() -> StatsService:
        from gcsagent.agent.cgroup_stats import StatsService

        return StatsService(registry)

    return Later(make)


def limits(registry: Registry) -> Later[LimitService]:
    def make() -> LimitService:
        from gcsagent.agent.limits import LimitService

        return LimitService(registry)

    return Later(make)


def pods(registry: Registry) -> Later[PodService]:
    def make() -> PodService:
        from gcsagent.agent.pods.service import PodService

        return PodService(registry)

    return Later(make)


def spools(registry: Registry) -> Later[SpoolService]:
    def make() -> SpoolService:
        from gcsagent.agent.spools import SpoolService

        return SpoolService(registry)

    return Later(make)


def forwards(registry: Registry, prefix: str) -> Later[Forwards]:
    def make() -> Forwards:
        from gcsagent.agent.forwarding.service import Forwards

        return Forwards(registry, prefix)

    return Later(make)


def storage(registry: Registry, state: str, guest: bool) -> Later[StorageService]:
    def make() -> StorageService:
        from gcsagent.agent.storage.service import StorageService, mounts_directory

        return StorageService(registry, state, mounts_directory(state, guest))

    return Later(make)


def snapshots(registry: Registry, state: str) -> Later[SnapshotService]:
    def make() -> SnapshotService:
        from gcsagent.agent.guest.snapshot import SnapshotService

        return SnapshotService(registry, state)

    return Later(make)


def pressure(registry: Registry) -> Later[PressureWatches]:
    def make() -> PressureWatches:
        from gcsagent.agent.guest.pressure import PressureWatches

        return PressureWatches(registry.keeper.supervisor, registry.events)

    return Later(make)
