"""Ends every exec called ``ending`` when an agent has just asked what is alive: put this folder, and the
tree, on its module path. The product knows nothing of this."""

import os
import signal

if int(os.environ.get("GCS_GENERATION", "0")) > 1:
    from gcsagent.agent.estate import Estate

    ask = Estate.ask

    async def and_end(estate: Estate) -> None:
        await ask(estate)
        for key, pid in list(estate.alive.items()):
            if key.endswith("/ending"):
                os.kill(pid, signal.SIGKILL)
                while os.path.exists(f"/proc/{pid}"):
                    pass  # until the supervisor has reaped it; nobody tells us, and no loop of ours may turn

    setattr(Estate, "ask", and_end)  # noqa: B010 - to mypy a method is not for assigning
