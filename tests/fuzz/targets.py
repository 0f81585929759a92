"""Every target by name, and how its inputs are changed."""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz.channel import Channel
from tests.fuzz.codec import Codec
from tests.fuzz.guest import Guest
from tests.fuzz.handshake import Handshake
from tests.fuzz.live import Archives, Methods, Wire
from tests.fuzz.mutate import Mutator, behind_a_byte, of_bytes, of_tar, of_values
from tests.fuzz.session import AgentSession
from tests.fuzz.tar import Tar
from tests.fuzz.target import Target

TARGETS: dict[str, tuple[Callable[[], Target], Mutator]] = {
    "codec": (Codec, behind_a_byte(of_values)),
    "session": (AgentSession, of_values),
    "handshake": (Handshake, behind_a_byte(of_bytes)),
    "guest": (Guest, of_values),
    "tar": (Tar, of_tar),
    "channel": (Channel, behind_a_byte(of_values)),
    "methods": (Methods, of_values),
    "wire": (Wire, of_values),
    "archive": (Archives, of_tar),
}
