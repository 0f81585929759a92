"""What the kernel says in small files of /proc and /sys: one reader of each format (proc(5))."""

from __future__ import annotations

from protocol.dataclass import dataclass

BOOT_ID = "/proc/sys/kernel/random/boot_id"
MEMINFO = "/proc/meminfo"
UPTIME = "/proc/uptime"


def text(path: str) -> str:
    """What is in the file, without the end of its last line; empty where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def fields(text: str) -> dict[str, str]:
    """Of lines ``NAME: value``, as in meminfo and a process's status."""
    parts = (line.partition(":") for line in text.splitlines())
    return {name: value.strip() for name, _, value in parts}


def boot_id() -> str:
    """Names this boot of the kernel (random(4)). Raises OSError."""
    with open(BOOT_ID, encoding="ascii") as file:
        return file.read().strip()


def uptime() -> float:
    """Seconds since the kernel started."""
    return float(text(UPTIME).split()[0])


def meminfo(path: str = MEMINFO) -> dict[str, int]:
    """Mostly in KiB (proc_meminfo(5))."""
    return {name: int(value.split()[0]) for name, value in fields(text(path)).items() if value}


@dataclass(frozen=True, slots=True)
class Stat:
    """Of a process (proc_pid_stat(5)); times are in clock ticks, ``started_ticks`` since the boot."""

    name: str
    state: str
    ppid: int
    session: int
    flags: int
    cpu_ticks: int
    threads: int
    started_ticks: int

    @property
    def ended(self) -> bool:
        """The leader of a process whose other threads go on is a zombie, too; the process is none."""
        return self.state in "ZX" and self.threads <= 1


def parse_stat(data: bytes) -> Stat:
    """The name may hold blanks and parentheses: what follows the last one is numbers."""
    name, _, rest = data.decode(errors="replace").partition("(")[2].rpartition(")")
    field = rest.split()
    return Stat(
        name=name,
        state=field[0],
        ppid=int(field[1]),
        session=int(field[3]),
        flags=int(field[6]),
        cpu_ticks=int(field[11]) + int(field[12]),
        threads=int(field[17]),
        started_ticks=int(field[19]),
    )


def stat(pid: int) -> Stat:
    """Raises FileNotFoundError or ProcessLookupError when there is none by that pid."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return parse_stat(file.read())


def status(pid: int) -> dict[str, str]:
    """As proc_pid_status(5) has it. Raises as :func:`stat` does."""
    with open(f"/proc/{pid}/status", "rb") as file:
        return fields(file.read().decode(errors="replace"))
