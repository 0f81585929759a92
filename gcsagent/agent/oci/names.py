"""Words of the OCI runtime spec and of Linux that a spec may use. Anything else is a mistake in writing."""

from __future__ import annotations


def _words(prefix: str, words: str) -> frozenset[str]:
    return frozenset(f"{prefix}{word}" for word in words.split())


CAPABILITIES = _words(
    "CAP_",
    "AUDIT_CONTROL AUDIT_READ AUDIT_WRITE BLOCK_SUSPEND BPF CHECKPOINT_RESTORE CHOWN DAC_OVERRIDE"
    " DAC_READ_SEARCH FOWNER FSETID IPC_LOCK IPC_OWNER KILL LEASE LINUX_IMMUTABLE MAC_ADMIN MAC_OVERRIDE"
    " MKNOD NET_ADMIN NET_BIND_SERVICE NET_BROADCAST NET_RAW PERFMON SETFCAP SETGID SETPCAP SETUID"
    " SYSLOG SYS_ADMIN SYS_BOOT SYS_CHROOT SYS_MODULE SYS_NICE SYS_PACCT SYS_PTRACE SYS_RAWIO"
    " SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG WAKE_ALARM",
)
"""capabilities(7), all 41 of Linux 6."""

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
