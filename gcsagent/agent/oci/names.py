"""Words of the OCI runtime spec and of Linux that a spec may use. Anything else is a mistake in writing."""

from __future__ import annotations


def _words(prefix: str, words: str) -> frozenset[str]:
    return frozenset(f"{prefix}{word}" for word in words.split())


_IN_ORDER = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE"
    " NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT"
    " SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE"
    " AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ"
    " PERFMON BPF CHECKPOINT_RESTORE"
)
CAPABILITIES = tuple(f"CAP_{name}" for name in _IN_ORDER.split())
"""capabilities(7), all 41 of Linux 6, in the order of their numbers (linux/capability.h)."""
ALL = "ALL"
"""Not a name of Linux's: all that the guest can give (capabilities.py)."""

CAPABILITY_SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")

RLIMITS = _words(
    "RLIMIT_",
    "AS CORE CPU DATA FSIZE LOCKS MEMLOCK MSGQUEUE NICE NOFILE NPROC RSS RTPRIO RTTIME SIGPENDING STACK",
)
"""getrlimit(2)."""

NAMESPACES = _words("", "pid network mount ipc uts user cgroup time")

PROPAGATIONS = _words("", "private rprivate slave rslave shared rshared unbindable runbindable")

SECCOMP_ACTIONS = _words("SCMP_ACT_", "KILL KILL_PROCESS KILL_THREAD TRAP ERRNO TRACE ALLOW LOG NOTIFY")
SECCOMP_OPERATORS = _words("SCMP_CMP_", "NE LT LE EQ GE GT MASKED_EQ")
SECCOMP_ARCHITECTURES = _words(
    "SCMP_ARCH_",
    "X86 X86_64 X32 ARM AARCH64 MIPS MIPS64 MIPS64N32 MIPSEL MIPSEL64 MIPSEL64N32 PPC PPC64 PPC64LE"
    " S390 S390X PARISC PARISC64 RISCV64 LOONGARCH64",
)
"""OCI runtime spec, config-linux.md."""

IPC_SYSCTLS = _words("kernel.", "msgmax msgmnb msgmni sem shmall shmmax shmmni shm_rmid_forced")
"""Those of System V IPC that belong to the ipc namespace, beside all of ``fs.mqueue.``."""
